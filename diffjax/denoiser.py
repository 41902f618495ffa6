"""Denoisers: functions (x_t, level) -> estimate of x0, and transforms of them.

A network is any function (params, x, time, condition, keys=None) -> output. A condition is any
pytree of arrays with a leading batch axis, or None; keys, [B], are there in training alone, for
dropout, and a network that is not trained here may leave them out. `from_network` turns a network
into a denoiser; everything after it works on x0 alone. Guidance, which combines two denoisers, is
in guidance.py.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from diffjax.parameterization import Parameterization
from diffjax.process import append_dims
from diffjax.schedule import Level

Condition = Any  # a pytree of arrays [B, ...], or None for an unconditional network
# (params, x, time, condition, keys=None) -> output
Network = Callable[..., Array]
# (x_t, level, condition=None) -> x0; a denoiser by itself for a network without conditions
ConditionalDenoiser = Callable[..., Array]
Denoiser = Callable[[Array, Level], Array]


def from_network(
    network: Network, params: Any, parameterization: Parameterization
) -> ConditionalDenoiser:
    """The conditional denoiser of a network.

    x0 = to_x0(x_t, network(params, x, time, condition)), where x and time are
    `parameterization.inputs(x_t, level)`. x_t: [B, ...]; leaves of the level: scalars or [B].

    Raises: ValueError for a Flax module in place of its `apply`, and, when called or traced, for an
    output of another shape than x_t. Whether the prediction is usable at a plan's levels is checked
    before tracing, by `process.check_prediction(prediction, plan.level)`.
    """
    check_network(network)

    def denoise(x_t: Array, level: Level, condition: Condition = None) -> Array:
        output = network(params, *parameterization.inputs(x_t, level), condition)
        if output.shape != x_t.shape:
            raise ValueError(
                f"network output has shape {output.shape}, expected {x_t.shape}: wrap networks with"
                " a learned variance in `drop_learned_variance`"
            )
        return parameterization.prediction.to_x0(x_t, output, level)

    return denoise


def check_network(network: Network) -> None:
    """Check that a network is a function. Raises: ValueError for a Flax module."""
    if hasattr(network, "apply"):
        raise ValueError(
            f"network is a module, {type(network).__name__}: use the function (params, x, time,"
            " condition, keys=None), as its apply"
        )


def drop_learned_variance(network: Callable[..., Array]) -> Callable[..., Array]:
    """A network without its learned variance: the first half of its output channels.

    Improved DDPM (arXiv:2102.09672) outputs twice the channels of x, the second half of them a
    variance; plans use a fixed one.
    """
    return lambda params, x, *rest: network(params, x, *rest)[..., : x.shape[-1]]


def condition_on(denoise: ConditionalDenoiser, condition: Condition) -> Denoiser:
    """The denoiser for one condition, a pytree of arrays [B, ...], or None."""
    return lambda x_t, level: denoise(x_t, level, condition)


def clip(denoise: Denoiser, low: float = -1.0, high: float = 1.0) -> Denoiser:
    """Clip the estimate of x0 to the range of the data. Samplers derive eps from it."""
    return lambda x_t, level: jnp.clip(denoise(x_t, level), low, high)


def dynamic_threshold(denoise: Denoiser, quantile: float) -> Denoiser:
    """Dynamic thresholding (arXiv:2205.11487, section 2.3).

    x0 <- clip(x0, -s, s)/s for each sample, where s is this quantile of the absolute values of the
    sample's x0, or 1 if that is more.

    Raises: ValueError unless quantile is in (0, 1].
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile is {quantile}: use more than 0, and at most 1; 0.995 is common")

    def thresholded(x_t: Array, level: Level) -> Array:
        x0 = denoise(x_t, level)
        size = jnp.quantile(jnp.abs(x0).reshape(len(x0), -1).astype(jnp.float32), quantile, axis=1)
        size = append_dims(jnp.maximum(size, 1).astype(x0.dtype), x0)
        return jnp.clip(x0, -size, size) / size

    return thresholded


def inpaint(denoise: Denoiser, known: Array, mask: Array) -> Denoiser:
    """Keep the known part of the data exactly: x0 <- mask*known + (1 - mask)*x0.

    known: [B, ...]; mask: 1 where known, 0 where to be generated, broadcast against known. Apply it
    last, after guidance and clipping. Known and generated parts fit better under a plan that
    repeats its rows, `solvers.repaint`.

    Raises: ValueError for a mask that does not broadcast against known.
    """
    try:
        jnp.broadcast_to(mask, known.shape)
    except ValueError:
        raise ValueError(
            f"mask has shape {jnp.shape(mask)}, expected one that broadcasts to {known.shape}"
        ) from None

    def inpainted(x_t: Array, level: Level) -> Array:
        return mask * known + (1 - mask) * denoise(x_t, level)

    return inpainted
