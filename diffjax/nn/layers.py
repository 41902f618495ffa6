"""Layers of networks, in the form that XLA compiles to fast code."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike


def time_features(
    t: Array,
    features: int,
    max_period: float = 10_000.0,
    sin_first: bool = False,
    shift: float = 0.0,
) -> Array:
    """Sinusoidal features of a time (arXiv:1706.03762).

        cos and sin of t * max_period**(-i/(half - shift)), i = 0..half-1

    t: [B], any real number. Returns float32 [B, features], whatever the dtype of the network:
    bfloat16 cannot tell 999 from 1000. DDPM has sin_first and shift 1, ADM neither.

    Raises: ValueError for an odd number of features.
    """
    if features % 2:
        raise ValueError(f"features is {features}: use an even number, for pairs of cos and sin")
    half = features // 2
    frequencies = jnp.exp(
        -jnp.log(max_period) * jnp.arange(half, dtype=jnp.float32) / (half - shift)
    )
    angles = t.astype(jnp.float32)[:, None] * frequencies
    waves = (jnp.sin(angles), jnp.cos(angles)) if sin_first else (jnp.cos(angles), jnp.sin(angles))
    return jnp.concatenate(waves, axis=-1)


class GroupNorm(nn.Module):
    """Group normalization (arXiv:1803.08494) and an activation, in float32.

        activation((x - mean)/std * scale + bias), mean and std of a group of adjacent channels

    groups: None for groups of four channels or more, 32 groups at most.
    """

    groups: int | None = None
    epsilon: float = 1e-6
    activation: Callable[[Array], Array] = lambda x: x

    @nn.compact
    def __call__(self, x: Array, scale: Array | None = None, shift: Array | None = None) -> Array:
        """Normalize x [B, H, W, C]; the result has its shape and dtype.

        scale, shift: [B, 1, 1, C]; the normalized x is multiplied by 1 + scale, and shift is added.

        Raises: ValueError for groups that do not divide the channels.
        """
        batch, channels = x.shape[0], x.shape[-1]
        groups = self.groups
        if groups is None:
            most = min(32, max(1, channels // 4))
            groups = next(g for g in range(most, 0, -1) if channels % g == 0)
        if channels % groups:
            raise ValueError(
                f"network.norm_groups is {groups}: use a divisor of every width, as of {channels}"
            )
        # Over space first and over the channels of a group after: the large sums run along
        # contiguous channels. What follows is one multiplication and one addition per number of x.
        mean, variance = _moments(x.astype(jnp.float32))  # [B, C]
        of_groups = mean.reshape(batch, groups, -1)
        group_mean = jnp.mean(of_groups, -1, keepdims=True)
        between = (of_groups - group_mean) ** 2
        group_variance = jnp.mean(variance.reshape(batch, groups, -1) + between, -1)
        mean, variance = (
            jnp.repeat(leaf.reshape(batch, groups), channels // groups, axis=-1)
            for leaf in (group_mean, group_variance)
        )
        a = jax.lax.rsqrt(variance + self.epsilon)
        a *= self.param("scale", nn.initializers.ones, (channels,))
        b = self.param("bias", nn.initializers.zeros, (channels,)) - mean * a
        a, b = a[:, None, None, :], b[:, None, None, :]
        if scale is not None and shift is not None:
            a, b = a * (1 + scale), b * (1 + scale) + shift

        # Cheap, so it is recomputed for the gradient: memory is the bottleneck on all devices.
        @jax.checkpoint
        def apply(x: Array, a: Array, b: Array) -> Array:
            return self.activation(x.astype(jnp.float32) * a + b).astype(x.dtype)

        return apply(x, a, b)


def _moments(x: Array) -> tuple[Array, Array]:
    """Mean and variance of each channel of x [B, H, W, C] over its pixels, [B, C].

    Where the mean is large beside the spread, E[x**2] - E[x]**2 has none of the variance's digits
    left. The mean is taken off first, as a constant: its gradient is in the last term, which is 0.
    """
    mean = jnp.mean(x, (1, 2))
    pivot = jax.lax.stop_gradient(mean)
    variance = jnp.mean((x - pivot[:, None, None, :]) ** 2, (1, 2)) - (mean - pivot) ** 2
    return mean, variance


class Conv(nn.Module):
    """A convolution of 3x3 pixels, with a bias."""

    features: int
    strides: int = 1
    padding: Any = "SAME"
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Convolve x [B, H, W, C] to [B, H', W', features], in the layer's dtype."""
        kernel = self.param("kernel", self.kernel_init, (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = (leaf.astype(self.dtype) for leaf in (x, kernel, bias))
        return convolve(x, kernel, self.strides, self.padding) + bias


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def convolve(x: Array, kernel: Array, strides: int = 1, padding: Any = "SAME") -> Array:
    """Convolve x [B, H, W, C] with a kernel [3, 3, C, D] to [B, H', W', D]."""
    return _convolve(x, kernel, strides, padding, ("NHWC", "HWIO", "NHWC"))


def _convolve_jvp(strides: int, padding: Any, primals: Any, tangents: Any) -> tuple[Array, Array]:
    # The derivative, with axes in an order whose transpose, which gradients use, is a convolution
    # of NHWC by HWIO again. JAX's own is not, and XLA brings such convolutions to that form on CPUs
    # only outside loops: a training step inside `lax.scan` would be twenty times as slow. Elsewhere
    # XLA folds the transposes away. The price is paid by forward derivatives, which have another
    # form and are slow on CPUs inside loops.
    (x, kernel), (dx, dkernel) = primals, tangents
    parts = []  # a tangent that is known to be zero has none
    if not isinstance(dx, SymbolicZero):
        axes = ("NHWC", "HWOI", "NHWC")
        parts.append(_convolve(dx, kernel.transpose(0, 1, 3, 2), strides, padding, axes))
    if not isinstance(dkernel, SymbolicZero):
        axes, operands = (
            ("CHWN", "IHWO", "HWNC"),
            (x.transpose(3, 1, 2, 0), dkernel.transpose(2, 0, 1, 3)),
        )
        parts.append(_convolve(*operands, strides, padding, axes).transpose(2, 0, 1, 3))
    y = convolve(x, kernel, strides, padding)
    return y, sum(parts, start=jnp.zeros_like(y)) if len(parts) != 1 else parts[0]


convolve.defjvp(_convolve_jvp, symbolic_zeros=True)


def _convolve(
    x: Array, kernel: Array, strides: int, padding: Any, axes: tuple[str, str, str]
) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (strides, strides), padding, dimension_numbers=axes
    )


def upsample(x: Array) -> Array:
    """Repeat every pixel to two by two: [B, H, W, C] -> [B, 2H, 2W, C]."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


def downsample(x: Array) -> Array:
    """Average two by two pixels: [B, 2H, 2W, C] -> [B, H, W, C]."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def dropout(keys: Array | None, x: Array, rate: float) -> Array:
    """Set numbers to 0 with probability `rate`, and divide the others by 1 - rate.

    keys: one per example, [B], where nn.Dropout has one per batch: what is dropped does not depend
    on the devices. None for no dropout.
    """
    if keys is None or rate == 0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
