"""Denoisers: functions (x_t, level) -> estimate of x0, and the functions that make one from another.

A network is any function (params, x, t, condition) -> output. `from_network` is the one place where a network meets
the schedule; everything after it speaks of x0 alone.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from diffjax.process import Prediction, expand
from diffjax.schedule import Level

Condition = Any  # an array [B, ...], or None
Network = Callable[[Any, Array, Array, Condition], Array]
ConditionalDenoiser = Callable[[Array, Level, Condition], Array]
Denoiser = Callable[[Array, Level], Array]


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
                " with learned variance says two: keep the first half of its channels, since plans use a fixed variance"
            )
        return prediction.to_x0(x_t, output, level)

    return denoise


def condition_on(denoise: ConditionalDenoiser, condition: Condition) -> Denoiser:
    """The denoiser for one condition [B, ...]; None for a network without one."""
    return lambda x_t, level: denoise(x_t, level, condition)


def guide(denoise: ConditionalDenoiser, condition: Array, null: Array | int, scale: Array | float) -> Denoiser:
    """Classifier-free guidance (arXiv:2207.12598): x0_null + scale*(x0_condition - x0_null).

    condition: [B, ...]; null: the condition that means "none", broadcast against it; scale: 0 is unconditional, 1
    conditional, more is guided; one for all images, or [B]. The paper's w is scale - 1. Since x0 is affine in eps, this
    is its equation 6.

    One pass over a batch of 2B: (condition, null) pairs are neighbours, so a batch that is split over devices keeps
    both halves of each pair on one device.
    """
    pairs = jnp.stack([condition, jnp.broadcast_to(null, condition.shape).astype(condition.dtype)], axis=1)
    pairs = pairs.reshape(-1, *condition.shape[1:])

    def guided(x_t: Array, level: Level) -> Array:
        twice = Level(*(jnp.repeat(leaf, 2) if jnp.ndim(leaf) else leaf for leaf in level))
        x0 = denoise(jnp.repeat(x_t, 2, axis=0), twice, pairs).reshape(-1, 2, *x_t.shape[1:])
        return x0[:, 1] + expand(scale, x_t) * (x0[:, 0] - x0[:, 1])

    return guided


def clip(denoise: Denoiser, low: float = -1.0, high: float = 1.0) -> Denoiser:
    """Clip the estimate of x0 to the range of the data. Samplers derive eps from x0, so it follows."""
    return lambda x_t, level: jnp.clip(denoise(x_t, level), low, high)


def normalise(denoise: Denoiser) -> Denoiser:
    """The same denoiser for levels of any scale: it sees x_t / sqrt(alpha**2 + sigma**2), at the level that goes with
    it. A network trained on a variance-preserving schedule so serves every form of the same path, as in EDM
    (arXiv:2206.00364), where alpha is 1.
    """

    def normalised(x_t: Array, level: Level) -> Array:
        scale = (level.alpha**2 + level.sigma**2) ** 0.5
        return denoise(x_t / expand(scale, x_t), Level(level.t, level.alpha / scale, level.sigma / scale))

    return normalised
