"""Edits of images by a trained model: reconstruct, interpolate, vary, inpaint.

Each is a plan and a start that sampler.py, solvers.py and denoiser.py have; here they meet a
model's network, on all devices. Images are float32 [N, H, W, C] in [-1, 1], and what the model's
codec encodes them to is x.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import sampler, schedule, solvers
from diffjax.denoiser import Condition
from diffjax.devices import parallel
from diffjax.inference.defaults import require_undistilled
from diffjax.inference.guidance import Guidance
from diffjax.inference.model import TrainedModel
from diffjax.inference.pipeline import Hooks, Pipeline, Request
from diffjax.sampler import Plan
from diffjax.schedule import Level, Schedule

PLAIN = Guidance()
Progress = Callable[[int], Any]  # takes the number of the plan's rows that were just done


@dataclass(frozen=True)
class EditRequest:
    """How images are edited."""

    steps: int  # levels that the sampler visits
    condition: Condition = None  # a pytree [N, ...]; None for the model's null condition
    progress: Progress = lambda rows: None


class Editor:
    """Edits by one model's network; compiled programs are kept from edit to edit."""

    def __init__(self, model: TrainedModel) -> None:
        """Nothing is compiled yet.

        Raises: ValueError for a distilled model, which is no denoiser of every level.
        """
        require_undistilled(model)
        self._model = model
        self._pipeline = Pipeline.for_model(model)

    def batches(self, num: int) -> int:
        """The number of batches in which `num` images are edited."""
        return -(-num // parallel.default_batch(num))

    def levels(self, steps: int) -> np.ndarray:
        """The levels of encoding and decoding, both ends among them.

        Encoding begins at level 1, where the data are, and ends in noise.

        Raises: ValueError for more steps than levels, or less than one.
        """
        return schedule.linspace(self._model.schedule, steps)

    def encode(self, images: np.ndarray, edit: EditRequest) -> np.ndarray:
        """The noise that DDIM decodes to these images, float32 [N, ...] of the shape of x.

        Section 4.3 of arXiv:2010.02502.
        """
        plan = sampler.encode(self._model.schedule, self.levels(edit.steps))
        return self._run(plan, edit, x=self._x(images), seed=0, bound=None)

    def decode(self, noise: np.ndarray, edit: EditRequest) -> np.ndarray:
        """The images that DDIM makes of noise, in as many steps as it was encoded in."""
        plan = sampler.ddim(self._model.schedule, self.levels(edit.steps))
        return self._images(self._run(plan, edit, x=noise, seed=0, bound=None))

    def reconstruct(self, images: np.ndarray, edit: EditRequest) -> np.ndarray:
        """The images encoded and decoded, which differ by the error of the steps.

        Table 2 of arXiv:2010.02502.
        """
        return self.decode(self.encode(images, edit), edit)

    def interpolate(
        self,
        first: np.ndarray,
        second: np.ndarray,
        edit: EditRequest,
        weights: Sequence[float] | np.ndarray,
    ) -> np.ndarray:
        """Images between those of two sets, [len(weights), N, H, W, C].

        Both are encoded, interpolated by `slerp` for each weight (0: the first, 1: the second), and
        decoded (arXiv:2010.02502, section 5.3). The condition is that of the pairs: one for the two
        images, and all between them.
        """
        x, y = (jnp.asarray(self.encode(images, edit)) for images in (first, second))
        between = [np.asarray(sampler.slerp(x, y, weight)) for weight in weights]
        return np.stack([self.decode(noise, edit) for noise in between])

    def vary(
        self,
        images: np.ndarray,
        edit: EditRequest,
        *,
        level: int,
        seed: int,
        eta: float = 0.0,
        guidance: Guidance = PLAIN,
    ) -> np.ndarray:
        """Images noised up to a level, and sampled from there by DDIM.

        SDEdit (arXiv:2108.01073). The higher the level, the less of them is left.

        Raises: ValueError for a level outside 1..T, or less than the steps.
        """
        levels = self._model.schedule
        plan = sampler.ddim(levels, trailing_from(levels, level, edit.steps), eta)
        keys = sampler.image_keys(jax.random.key(seed), np.arange(len(images)))
        start = sampler.noise_to_level(plan, jnp.asarray(self._x(images)), keys)
        x = self._run(plan, edit, x=np.asarray(start), seed=seed, guidance=guidance)
        return self._images(x)

    def inpaint(
        self,
        images: np.ndarray,
        mask: np.ndarray,
        edit: EditRequest,
        *,
        seed: int,
        eta: float = 1.0,
        resamples: int = 1,
        guidance: Guidance = PLAIN,
    ) -> np.ndarray:
        """Images kept exactly where the mask is 1, and generated by DDIM where it is 0.

        Every step is taken `resamples` times (`solvers.repaint`). mask: 0 to 1, [H, W] of the
        images, or what broadcasts to them, as [N, H, W, 1]. A latent is generated unless all of the
        pixels that it stands for are known, and the known pixels are put back after it is decoded.

        Raises: ValueError for a mask that `check_mask` or `mask_of_x` refuses.
        """
        x, levels = self._x(images), self._model.schedule
        known = check_mask(mask, np.shape(images))
        plan = sampler.ddim(levels, schedule.trailing(levels, edit.steps), eta)
        plan = solvers.repaint(plan, resamples)
        inpaint = x, mask_of_x(known, x.shape)
        found = self._images(self._run(plan, edit, inpaint=inpaint, seed=seed, guidance=guidance))
        if self._model.autoencoder is None:
            return found
        return known * np.asarray(images, np.float32) + (1 - known) * found

    def _x(self, images: np.ndarray) -> np.ndarray:
        shape = self._model.image_shape
        if np.shape(images)[1:] != shape or not len(images):
            raise ValueError(
                f"images have shape {np.shape(images)}: the model takes [N,"
                f" {', '.join(map(str, shape))}]"
            )
        return np.asarray(self._model.codec.encode(np.asarray(images, np.float32)), np.float32)

    def _images(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(self._model.codec.decode(x), np.float32)

    def _run(self, plan: Plan, edit: EditRequest, **fields: Any) -> np.ndarray:
        # x where a plan ends. fields: of the request to the pipeline, x or inpaint among them.
        x = fields["inpaint"][0] if "inpaint" in fields else fields["x"]
        condition, conditioning = edit.condition, self._model.info.conditioning
        if condition is None and conditioning.is_conditional:
            if not conditioning.has_null:
                raise ValueError(f"condition is None, and {self._model.name} needs one")
            condition = conditioning.nulls(len(x))
        request = Request(
            num=len(x),
            batch=parallel.default_batch(len(x)),
            condition=condition,
            decode=False,
            **fields,
        )
        hooks = Hooks(progress=edit.progress)
        return self._pipeline(self._model.params, plan, request, hooks).x


def trailing_from(levels: Schedule, level: int, steps: int) -> np.ndarray:
    """The trailing levels of a schedule that ends at a lower level than T.

    Raises: ValueError for a level outside 1..T, or less than the steps.
    """
    if not 1 <= level <= schedule.length(levels):
        raise ValueError(
            f"level is {level}: use 1 (nearly the image) to {schedule.length(levels)} (noise)"
        )
    return schedule.trailing(Level(*(leaf[: level + 1] for leaf in levels)), steps)


def mask_of_x(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The mask of images [N, H, W, C] as one of x, of this shape [N, h, w, c].

    A number of x is as known as the least known of the pixels that it stands for.

    Raises: ValueError if nothing of x is known.
    """
    if mask.shape == shape:
        return mask
    num, height, width, _ = shape
    sides = mask.shape[1] // height, mask.shape[2] // width
    cells = mask.reshape(num, height, sides[0], width, sides[1], -1).min((2, 4, 5))
    if cells.max() == 0:
        raise ValueError(
            f"mask has no block of {sides[0]}x{sides[1]} known pixels, which are one latent: make"
            " a larger part of it black"
        )
    return np.ascontiguousarray(np.broadcast_to(cells[..., None], shape))


def check_mask(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The mask as float32 of the shape [N, H, W, C] of images.

    Raises: ValueError unless it broadcasts to this shape, is of 0 (generated) to 1 (known), and
    neither all 1 nor all 0.
    """
    mask = np.asarray(mask, np.float32)
    mask = mask[..., None] if mask.ndim == 2 else mask
    try:
        full = np.ascontiguousarray(np.broadcast_to(mask, shape))
    except ValueError:
        raise ValueError(
            f"mask has shape {mask.shape}: use one that broadcasts to {shape}, the shape of images"
        ) from None
    if not ((full >= 0) & (full <= 1)).all():
        raise ValueError(
            f"mask has values {mask.min():g} to {mask.max():g}: use 0 (generated) to 1 (known)"
        )
    if full.min() == 1:
        raise ValueError("mask is all known, so nothing is generated: make a part of it white")
    if full.max() == 0:
        raise ValueError("mask is all unknown, so nothing is kept: make a part of it black")
    return full
