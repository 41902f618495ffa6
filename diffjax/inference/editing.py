"""Edits of images that are there already, by a trained run: reconstruct, interpolate, vary, inpaint.

Each is a plan and a start that sampler.py, solvers.py and denoiser.py already have; here they meet a run's network, on
all devices. Images are float32 [N, H, W, C] in [-1, 1]; labels int [N], None for no label. `progress` is told the rows
of plans that are done.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import sampler, schedule, solvers
from diffjax.devices import parallel
from diffjax.inference.pipeline import Guidance, Pipeline, TrainedModel, require_undistilled
from diffjax.sampler import Plan
from diffjax.schedule import Level, Schedule

PLAIN = Guidance()
Progress = Callable[[int], Any]


def quiet(rows: int) -> None:
    """No progress bar."""


class Editor:
    """Edits by one run's network; compiled programs are kept from edit to edit."""

    def __init__(self, run: TrainedModel) -> None:
        """For a run; nothing is compiled yet. ValueError for a student, which is no denoiser of every level."""
        require_undistilled(run)
        self._run = run
        self._generate = Pipeline.of(run)

    def batches(self, num: int) -> int:
        """In how many batches `num` images are edited, all of whose steps `progress` is told."""
        return -(-num // parallel.default_batch(num))

    def levels(self, steps: int) -> np.ndarray:
        """The levels that encoding and decoding visit: both ends, since encoding begins at level 1, where the data are,
        and ends in noise. ValueError for more steps than levels, or less than one.
        """
        return schedule.linspace(self._run.schedule, steps)

    def encode(
        self, images: np.ndarray, labels: np.ndarray | None, steps: int, progress: Progress = quiet
    ) -> np.ndarray:
        """The noise that DDIM decodes to these images, float32 [N, H, W, C] (arXiv:2010.02502, section 4.3)."""
        plan = sampler.encode(self._run.schedule, self.levels(steps))
        return self._make(plan, labels, images, PLAIN, 0, progress, clip=False)

    def decode(
        self, noise: np.ndarray, labels: np.ndarray | None, steps: int, progress: Progress = quiet
    ) -> np.ndarray:
        """The images that DDIM makes of this noise, in as many steps as it was encoded in."""
        plan = sampler.ddim(self._run.schedule, self.levels(steps))
        return self._make(plan, labels, noise, PLAIN, 0, progress, clip=False)

    def reconstruct(
        self, images: np.ndarray, labels: np.ndarray | None, steps: int, progress: Progress = quiet
    ) -> np.ndarray:
        """Encoded and decoded: the same images but for the error of the steps (arXiv:2010.02502, table 2)."""
        return self.decode(self.encode(images, labels, steps, progress), labels, steps, progress)

    def interpolate(
        self,
        first: np.ndarray,
        second: np.ndarray,
        labels: np.ndarray | None,
        steps: int,
        weights: Any,
        progress: Progress = quiet,
    ) -> np.ndarray:
        """Images between those of two sets, [len(weights), N, H, W, C]: encoded, `slerp` by each weight (0: the first),
        decoded (arXiv:2010.02502, section 5.3). labels: one per pair, for both and what is between.
        """
        x, y = (jnp.asarray(self.encode(images, labels, steps, progress)) for images in (first, second))
        between = [np.asarray(sampler.slerp(x, y, weight)) for weight in weights]
        return np.stack([self.decode(noise, labels, steps, progress) for noise in between])

    def vary(
        self,
        images: np.ndarray,
        labels: np.ndarray | None,
        level: int,
        steps: int,
        *,
        eta: float = 0.0,
        guidance: Guidance = PLAIN,
        seed: int,
        progress: Progress = quiet,
    ) -> np.ndarray:
        """Images noised up to a level, of 1 to T, and sampled from there by DDIM in `steps` steps: SDEdit
        (arXiv:2108.01073). The higher the level, the less of them is left. ValueError for another level.
        """
        plan = sampler.ddim(self._run.schedule, trailing_from(self._run.schedule, level, steps), eta)
        keys = sampler.image_keys(jax.random.key(seed), np.arange(len(images)))
        start = np.asarray(sampler.noise_to_level(plan, jnp.asarray(images, jnp.float32), keys))
        return self._make(plan, labels, start, guidance, seed, progress)

    def inpaint(
        self,
        images: np.ndarray,
        mask: np.ndarray,
        labels: np.ndarray | None,
        steps: int,
        *,
        eta: float = 1.0,
        times: int = 1,
        guidance: Guidance = PLAIN,
        seed: int,
        progress: Progress = quiet,
    ) -> np.ndarray:
        """Images whose pixels are kept exactly where the mask is 1, and made by DDIM where it is 0, every step taken
        `times` times (`solvers.repaint`). mask: of 0 to 1, [H, W], or [N, H, W, C] or what broadcasts to it, as
        [N, H, W, 1] (else ValueError).
        """
        mask = check_mask(mask, images.shape)
        levels = self._run.schedule
        plan = solvers.repaint(sampler.ddim(levels, schedule.trailing(levels, steps), eta), times)
        return self._make(plan, labels, images, guidance, seed, progress, mask=mask)

    def _make(
        self,
        plan: Plan,
        labels: np.ndarray | None,
        images: np.ndarray,
        guidance: Guidance,
        seed: int,
        progress: Progress,
        clip: bool = True,
        mask: np.ndarray | None = None,
    ) -> np.ndarray:
        # From the images as they are; with a mask from noise, and the images are what is known.
        _, shape, classes = self._run.description
        images, num = np.asarray(images, np.float32), len(images)
        if images.shape[1:] != tuple(shape) or not num:
            raise ValueError(f"images are {images.shape}: this run knows [N, {', '.join(map(str, shape))}]")
        if classes and labels is None:
            labels = np.full(num, classes, np.int32)
        return self._generate(
            self._run.params, plan, labels, num,
            guidance=guidance, seed=seed, batch=parallel.default_batch(num), clip=clip, progress=progress,
            x=images if mask is None else None, known=None if mask is None else (images, mask),
        ).x  # fmt: skip


def trailing_from(levels: Schedule, level: int, steps: int) -> np.ndarray:
    """`schedule.trailing` of a schedule that ends at a lower level than T. ValueError unless it is one of 1 to T, and
    for more steps than it.
    """
    if not 1 <= level <= schedule.length(levels):
        raise ValueError(f"the level to start from is {level}: use 1 (nearly the image) to {schedule.length(levels)}")
    return schedule.trailing(Level(*(leaf[: level + 1] for leaf in levels)), steps)


def check_mask(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A mask as float32 of the shape [N, H, W, C] of images. ValueError unless it fits them, is of 0 (to be made) to 1
    (known), and neither all 1 nor all 0.
    """
    mask = np.asarray(mask, np.float32)
    mask = mask[..., None] if mask.ndim == 2 else mask
    try:
        whole = np.ascontiguousarray(np.broadcast_to(mask, shape))
    except ValueError:
        raise ValueError(f"the mask has shape {mask.shape}, and the images {shape}: it must fit them") from None
    if not ((whole >= 0) & (whole <= 1)).all():
        raise ValueError(f"the mask holds {mask.min():g} to {mask.max():g}: use 0 (to be made) to 1 (known)")
    if whole.min() == 1:
        raise ValueError("the mask says that all is known, so there is nothing to make: make a part of it white")
    if whole.max() == 0:
        raise ValueError("the mask says that nothing is known, so there is nothing to keep: make a part of it black")
    return whole
