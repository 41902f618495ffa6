"""Denoisers: functions (x_t, level) -> estimate of x0, and the functions that make one from another.

A network is any function (params, x, t, condition) -> output. `from_network` is the one place where a network meets
the schedule; everything after it speaks of x0 alone.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from diffjax.process import Prediction, append_dims
from diffjax.schedule import Level

Condition = Any  # an array [B, ...], or None
Network = Callable[[Any, Array, Array, Condition], Array]
ConditionalDenoiser = Callable[[Array, Level, Condition], Array]
Denoiser = Callable[[Array, Level], Array]
Scale = Any  # of guidance: a number, one per image [B], or a function of the level


def from_network(network: Network, params: Any, prediction: Prediction) -> ConditionalDenoiser:
    """The conditional denoiser that a network is: x0 = prediction.to_x0(x_t, network(params, x_t, t - 1, condition)).

    Networks count noisy levels from 0, as DDPM's code does, so level t is t - 1 to them. x_t: [B, ...]; level: scalar
    leaves, or [B]. ValueError, when called or traced, for an output of another shape than x_t. Whether the prediction
    can be used on a plan's levels, `process.check_prediction(prediction, plan.level)` tells before tracing.
    """

    def denoise(x_t: Array, level: Level, condition: Condition) -> Array:
        t = jnp.broadcast_to(jnp.asarray(level.t) - 1, x_t.shape[:1])
        output = network(params, x_t, t, condition)
        if output.shape != x_t.shape:
            raise ValueError(
                f"the network says {output.shape} of samples {x_t.shape}: it must say one number for each. A network"
                " with learned variance says two: wrap it in `drop_learned_variance`"
            )
        return prediction.to_x0(x_t, output, level)

    return denoise


def drop_learned_variance(network: Callable[..., Array]) -> Callable[..., Array]:
    """A network that says a variance after its estimate (improved DDPM, arXiv:2102.09672: twice the channels of x),
    without it: plans use a fixed variance.
    """
    return lambda params, x, *rest: network(params, x, *rest)[..., : x.shape[-1]]


def condition_on(denoise: ConditionalDenoiser, condition: Condition) -> Denoiser:
    """The denoiser for one condition [B, ...]; None for a network without one."""
    return lambda x_t, level: denoise(x_t, level, condition)


def classifier_free_guidance(
    denoise: ConditionalDenoiser,
    condition: Array,
    null: Array | int,
    scale: Scale,
    rescale: float = 0.0,
    two_passes: bool = False,
) -> Denoiser:
    """Classifier-free guidance (arXiv:2207.12598): x0_null + scale*(x0_condition - x0_null).

    condition: [B, ...]; null: the condition that means "none", or one to be led away from, broadcast against it; scale:
    0 is unconditional, 1 conditional, more is guided. The paper's w is scale - 1. Since x0 is affine in eps, this is
    its equation 6. rescale: as in `guided_estimate`.

    One pass over a batch of 2B: (condition, null) pairs are neighbours, so a batch that is split over devices keeps
    both halves of each pair on one device. two_passes: one after the other, in half the memory.
    """
    nulls = jnp.broadcast_to(null, condition.shape).astype(condition.dtype)
    pairs = jnp.stack([condition, nulls], axis=1).reshape(-1, *condition.shape[1:])

    def guided(x_t: Array, level: Level) -> Array:
        if two_passes:
            x0, x0_null = denoise(x_t, level, condition), denoise(x_t, level, nulls)
        else:
            twice = Level(*(jnp.repeat(leaf, 2) if jnp.ndim(leaf) else leaf for leaf in level))
            both = denoise(jnp.repeat(x_t, 2, axis=0), twice, pairs).reshape(-1, 2, *x_t.shape[1:])
            x0, x0_null = both[:, 0], both[:, 1]
        return guided_estimate(x0_null, x0, level, scale, rescale)

    return guided


def autoguidance(denoise: Denoiser, worse: Denoiser, scale: Scale, rescale: float = 0.0) -> Denoiser:
    """Autoguidance (arXiv:2406.02507): away from a worse version of the same denoiser, smaller or less trained,
    x0_worse + scale*(x0 - x0_worse). scale 1 is the denoiser itself; rescale: as in `guided_estimate`.
    """
    return lambda x_t, level: guided_estimate(worse(x_t, level), denoise(x_t, level), level, scale, rescale)


def guided_estimate(x0_from: Array, x0_to: Array, level: Level, scale: Scale, rescale: float = 0.0) -> Array:
    """x0 = x0_from + scale*(x0_to - x0_from), in float32 at least: what bfloat16 loses in the difference, scale
    enlarges.

    scale: a number, one per image [B], or a function of the level. rescale, 0 to 1 (else ValueError): the share by
    which each image's standard deviation is brought back to that of x0_to, where a large scale would make contrasts
    harsh; equations 14 to 16 of arXiv:2305.08891, on x0.
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale is {rescale}: use 0 (not at all) to 1 (wholly)")
    dtype = jnp.promote_types(x0_to.dtype, jnp.float32)
    x0_from, x0_to = x0_from.astype(dtype), x0_to.astype(dtype)
    x0 = x0_from + append_dims(scale(level) if callable(scale) else scale, x0_to) * (x0_to - x0_from)
    if rescale == 0:
        return x0
    axes = tuple(range(1, x0.ndim))
    std, std_to = jnp.std(x0, axes, keepdims=True), jnp.std(x0_to, axes, keepdims=True)
    return x0 * (1 - rescale + rescale * jnp.where(std > 0, std_to / jnp.where(std > 0, std, 1), 1))


def clip(denoise: Denoiser, low: float = -1.0, high: float = 1.0) -> Denoiser:
    """Clip the estimate of x0 to the range of the data. Samplers derive eps from x0, so it follows."""
    return lambda x_t, level: jnp.clip(denoise(x_t, level), low, high)


def dynamic_threshold(denoise: Denoiser, quantile: float) -> Denoiser:
    """Dynamic thresholding (arXiv:2205.11487, section 2.3): each image's estimate of x0 is clipped to [-s, s] and
    divided by s, where s is this quantile of its absolute values, or 1 if that is more. quantile: in (0, 1] (else
    ValueError).
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile is {quantile}: use more than 0, and at most 1; 0.995 is usual")

    def thresholded(x_t: Array, level: Level) -> Array:
        x0 = denoise(x_t, level)
        size = jnp.quantile(jnp.abs(x0).reshape(len(x0), -1).astype(jnp.float32), quantile, axis=1)
        size = append_dims(jnp.maximum(size, 1).astype(x0.dtype), x0)
        return jnp.clip(x0, -size, size) / size

    return thresholded


def inpaint(denoise: Denoiser, known: Array, mask: Array) -> Denoiser:
    """x0 <- mask*known + (1 - mask)*x0: what is known of the images stays exactly as it is.

    known: images [B, ...]; mask: 1 where they are known, 0 where they are to be made, broadcast against them (else
    ValueError). To be applied last, after guidance and clipping. What is made agrees better with what is known under a
    plan that takes its rows again, `solvers.repaint`.
    """
    try:
        jnp.broadcast_to(mask, known.shape)
    except ValueError:
        raise ValueError(
            f"the mask has shape {jnp.shape(mask)}, and images have {known.shape}: it must fit them"
        ) from None

    def inpainted(x_t: Array, level: Level) -> Array:
        return mask * known + (1 - mask) * denoise(x_t, level)

    return inpainted


def normalise(denoise: Denoiser) -> Denoiser:
    """The same denoiser for levels of any scale: it sees x_t / sqrt(alpha**2 + sigma**2), at the level that goes with
    it. A network trained on a variance-preserving schedule so serves every form of the same path, as in EDM
    (arXiv:2206.00364), where alpha is 1.
    """

    def normalised(x_t: Array, level: Level) -> Array:
        scale = (level.alpha**2 + level.sigma**2) ** 0.5
        return denoise(x_t / append_dims(scale, x_t), Level(level.t, level.alpha / scale, level.sigma / scale))

    return normalised
