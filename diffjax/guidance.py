"""Guidance: two denoisers combined into one.

    x0 = x0_from + scale*(x0_to - x0_from)

Scale 0 is the first denoiser, 1 the second, and more extrapolates beyond it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffjax.denoiser import Condition, ConditionalDenoiser, Denoiser
from diffjax.process import append_dims
from diffjax.schedule import Level, logsnr

Scale = (
    float | Array | Callable[[Level], Any]
)  # a number, one per sample [B], or a function of level


def classifier_free_guidance(
    denoise: ConditionalDenoiser,
    condition: Condition,
    null: Condition,
    scale: Scale,
    rescale: float = 0.0,
    batched: bool = True,
    channels: int | None = None,
) -> Denoiser:
    """Classifier-free guidance (arXiv:2207.12598).

    x0 = x0_null + scale*(x0_condition - x0_null). condition: a pytree of arrays [B, ...]; null: the
    same structure, broadcast against it, the condition that means "none", or one to be led away
    from; scale: 0 is unconditional, 1 conditional, more is guided. The paper's w is scale - 1.
    Since x0 is affine in eps, this is its equation 6. rescale, channels: as in `guided_estimate`.

    batched: one network evaluation on a batch of 2B, in which each condition stands beside its
    null, so that a batch that is split over devices keeps both on one device; else two evaluations
    one after the other, in half the memory.
    """
    nulls = jax.tree.map(
        lambda leaf, none: jnp.broadcast_to(none, leaf.shape).astype(leaf.dtype), condition, null
    )
    pairs = jax.tree.map(
        lambda leaf, none: jnp.stack([leaf, none], axis=1).reshape(-1, *leaf.shape[1:]),
        condition,
        nulls,
    )

    def guided(x_t: Array, level: Level) -> Array:
        if batched:
            twice = Level(*(jnp.repeat(leaf, 2) if jnp.ndim(leaf) else leaf for leaf in level))
            both = denoise(jnp.repeat(x_t, 2, axis=0), twice, pairs)
            both = both.reshape(-1, 2, *x_t.shape[1:])
            x0, x0_null = both[:, 0], both[:, 1]
        else:
            x0, x0_null = denoise(x_t, level, condition), denoise(x_t, level, nulls)
        return guided_estimate(x0_null, x0, level, scale, rescale, channels)

    return guided


def autoguidance(
    denoise: Denoiser,
    guide: Denoiser,
    scale: Scale,
    rescale: float = 0.0,
    channels: int | None = None,
) -> Denoiser:
    """Autoguidance (arXiv:2406.02507): x0_guide + scale*(x0 - x0_guide).

    guide: a worse version of the same denoiser, smaller or less trained. Scale 1 is the denoiser
    itself. rescale, channels: as in `guided_estimate`.
    """
    return lambda x_t, level: guided_estimate(
        guide(x_t, level), denoise(x_t, level), level, scale, rescale, channels
    )


def guided_estimate(
    x0_from: Array,
    x0_to: Array,
    level: Level,
    scale: Scale,
    rescale: float = 0.0,
    channels: int | None = None,
) -> Array:
    """The extrapolated estimate of x0, in float32 at least.

    x0 = x0_from + scale*(x0_to - x0_from).

    What bfloat16 loses in the difference, the scale would enlarge. scale: a number, one per sample
    [B], or a function of the level. rescale, 0 to 1: the share by which each sample's standard
    deviation is brought back to that of x0_to, which a large scale increases; equations 14 to 16 of
    arXiv:2305.08891, on x0. channels: number of first channels of the last axis to guide, with the
    others of x0_to, as DiT's sample code does with 3 of 4 (arXiv:2212.09748); None for all.

    Raises: ValueError for a rescale outside 0..1.
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale is {rescale}: use 0 (none) to 1 (full)")
    dtype = jnp.promote_types(x0_to.dtype, jnp.float32)
    x0_from, x0_to = x0_from.astype(dtype), x0_to.astype(dtype)
    x0 = x0_from + append_dims(scale(level) if callable(scale) else scale, x0_to) * (
        x0_to - x0_from
    )
    if channels is not None:
        x0 = jnp.concatenate([x0[..., :channels], x0_to[..., channels:]], axis=-1)
    if rescale == 0:
        return x0
    axes = tuple(range(1, x0.ndim))
    std, std_to = jnp.std(x0, axes, keepdims=True), jnp.std(x0_to, axes, keepdims=True)
    return x0 * (1 - rescale + rescale * jnp.where(std > 0, std_to / jnp.where(std > 0, std, 1), 1))


def in_interval(level: Level, low: float, high: float) -> np.ndarray:
    """The levels inside a guidance interval (arXiv:2404.07724), bool [N].

    They have low <= sigma/alpha <= high. Guidance outside of it costs evaluations and diversity,
    and brings nothing.

    Raises: ValueError unless low < high.
    """
    if not low < high:
        raise ValueError(f"guidance interval is {low} to {high}: its end must be above its start")
    ratio = np.exp(-logsnr(level) / 2)
    return (low <= ratio) & (ratio <= high)
