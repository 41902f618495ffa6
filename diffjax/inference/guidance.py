"""Requests for guidance, and checks of whether a model can be guided so.

Guidance itself is applied in `DenoiserSpec.build` (pipeline.py), by the functions of
diffjax/guidance.py.
"""

from typing import NamedTuple

import jax
import numpy as np

from diffjax.build import ModelInfo
from diffjax.inference.model import TrainedModel


class Guidance(NamedTuple):
    """A request for guidance: towards conditions, or away from a worse model."""

    scale: float = 1.0  # 0 unconditional (or the guide model), 1 conditional, more is guided
    interval: tuple[float, float] | None = None  # of sigma/alpha, outside of which scale 1 is used
    rescale: float = 0.0  # share by which the contrast of guided samples is brought back
    negative: str | None = None  # a condition to be guided away from, in place of the null
    batched: bool = True  # one evaluation on twice the batch, or two evaluations
    guide_model: TrainedModel | None = None  # autoguidance: a worse model to be guided away from
    channels: int | None = None  # the first ones of x, which alone are guided; None for all

    @property
    def is_plain(self) -> bool:
        """True if samples are simply conditional, with one evaluation a step."""
        return self.guide_model is None and self == Guidance()

    def __str__(self) -> str:
        """A short description, as in "2 in 0.3..5 rescaled 0.7"."""
        text = f"{self.scale:g}"
        if self.interval is not None:
            text += " in {:g}..{:g}".format(*self.interval)
        if self.rescale:
            text += f" rescaled {self.rescale:g}"
        if self.channels is not None:
            text += f" on {self.channels} channels"
        if self.negative is not None:
            text += f" away from {self.negative}"
        if self.guide_model is not None:
            guide = self.guide_model
            text += f" away from {guide.name} ({guide.weights}, step {guide.step})"
        return text + ("" if self.batched else " in two passes")


def can_be_guided(info: ModelInfo) -> bool:
    """Return whether a model was trained without its condition too, as guidance needs."""
    trained = info.config.train.condition_dropout > 0 and info.conditioning.has_null
    return trained and info.config.distillation.method == "none"


def check_guidance(model: TrainedModel, guidance: Guidance) -> None:
    """Check that a model can be guided as asked.

    Raises: ValueError, naming the part of the guidance that it cannot serve.
    """
    info, scale = model.info, guidance.scale
    distillation, conditioning = info.config.distillation, info.conditioning
    if distillation.guidance_conditioned:
        _check_distilled(model, guidance)
        return
    if guidance.is_plain:
        return
    if distillation.method != "none":
        raise ValueError(
            f"guidance is {guidance}, and {model.name} was distilled without guidance: leave it out"
        )
    if not (np.isfinite(scale) and scale >= 0):
        raise ValueError(f"guidance is {scale}: use a number of 0 or more")
    if guidance.guide_model is None and not conditioning.is_conditional:
        raise ValueError(f"guidance is {guidance}, and {model.name} is unconditional: leave it out")
    if scale == 1:
        raise ValueError(f"guidance is {guidance}, and scale 1 is not guided: use another scale")
    if guidance.guide_model is not None:
        _check_guide_model(model, guidance.guide_model)
        if guidance.negative is not None or not guidance.batched:
            raise ValueError(
                "negative and two passes belong to classifier-free guidance: leave them out of"
                " autoguidance"
            )
    if guidance.negative is not None:
        pair = conditioning.parse(guidance.negative, 2)
        if any(not np.array_equal(leaf[0], leaf[1]) for leaf in jax.tree.leaves(pair)):
            raise ValueError(f"negative is {guidance.negative!r}: use one condition")
    if guidance.interval is not None and not 0 <= guidance.interval[0] < guidance.interval[1]:
        low, high = guidance.interval
        raise ValueError(
            f"guidance interval is {low:g} to {high:g}: use 0 or more, its end above its start"
        )
    channels = info.x_shape[-1]
    if guidance.channels is not None and not 0 < guidance.channels <= channels:
        raise ValueError(f"channels is {guidance.channels}: use 1 to {channels} (all) of x")
    if not 0 <= guidance.rescale <= 1:
        raise ValueError(f"rescale is {guidance.rescale}: use 0 (none) to 1 (full)")
    if guidance.guide_model is None and guidance.negative is None and not can_be_guided(info):
        raise ValueError(
            f"guidance is {guidance}, and {model.name} was trained with train.condition_dropout 0:"
            " it has no unconditional output to be guided away from"
        )


def _check_distilled(model: TrainedModel, guidance: Guidance) -> None:
    largest = model.info.config.distillation.guidance
    if not guidance._replace(scale=1.0).is_plain:
        raise ValueError(
            f"guidance is {guidance}, and {model.name} computes guidance itself: only its scale can"
            " be set"
        )
    if not 1 <= guidance.scale <= largest:
        raise ValueError(
            f"guidance is {guidance.scale}, and {model.name} was distilled for 1 to {largest:g}"
        )


def _check_guide_model(model: TrainedModel, guide: TrainedModel) -> None:
    if guide.info.config.distillation.method != "none":
        raise ValueError(f"guide model {guide.name} is distilled: use one trained on data")
    ours, theirs = (
        (str(info.config.data), info.describe_x(), str(info.conditioning))
        for info in (model.info, guide.info)
    )
    if ours != theirs:
        raise ValueError(
            f"guide model {guide.name} was trained on {', '.join(theirs)}, and {model.name} on"
            f" {', '.join(ours)}: use models of the same data"
        )
    ours, theirs = (
        None if each.autoencoder is None else each.autoencoder.space for each in (model, guide)
    )
    if ours != theirs:
        raise ValueError(
            f"guide model {guide.name} was trained on latents of another autoencoder, scaling or"
            f" shift than {model.name}: use models of the same latents"
        )
    if any(not np.array_equal(a, b) for a, b in zip(model.schedule, guide.schedule, strict=True)):
        raise ValueError(
            f"guide model {guide.name} was trained on another noise schedule than {model.name}"
        )
