import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import naming
from hypothesis import given, settings
from hypothesis import strategies as st

from diffjax.nn.layers import Conv, GroupNorm, convolve, downsample, time_features, upsample


@settings(max_examples=15)
@given(
    st.integers(1, 4),
    st.integers(1, 6),
    st.sampled_from([1, 3, 4]),
    st.integers(0, 99),
    st.floats(-10, 10),
)
def test_norm_is_its_definition(batch, side, of_a_group, seed, mean):
    """Mean and standard deviation of a group by numpy in float64, then scale and shift."""
    groups = 2
    r = np.random.default_rng(seed)
    x = mean + r.normal(size=(batch, side, 3, groups * of_a_group)).astype(np.float32)
    gain, bias, scale, shift = (r.normal(size=x.shape[-1]).astype(np.float32) for _ in range(4))
    norm = GroupNorm(groups, 1e-3, jnp.tanh)
    modulation = [np.broadcast_to(leaf, (batch, 1, 1, x.shape[-1])) for leaf in (scale, shift)]
    found = norm.apply({"params": {"scale": gain, "bias": bias}}, x, *modulation)
    grouped = x.astype(np.float64).reshape(batch, -1, groups, of_a_group)
    grouped = (grouped - grouped.mean((1, 3), keepdims=True)) / np.sqrt(
        grouped.var((1, 3), keepdims=True) + 1e-3
    )
    expected = np.tanh((grouped.reshape(x.shape) * gain + bias) * (1 + scale) + shift)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(("ratio", "largest"), [(10, 1e-5), (100, 1e-4), (1000, 1e-3)])
def test_norm_of_a_large_mean(ratio, largest):
    """Of each channel another, as after a convolution's bias; beside two passes in float64."""
    r = np.random.default_rng(0)
    means = ratio * (1 + 1e-3 * r.normal(size=32))
    x = (means + r.normal(size=(2, 16, 16, 32))).astype(np.float32)
    norm = GroupNorm(8)
    found = norm.apply(norm.init(jax.random.key(0), x), x)
    grouped = x.astype(np.float64).reshape(2, -1, 8, 4)
    grouped = (grouped - grouped.mean((1, 3), keepdims=True)) / np.sqrt(
        grouped.var((1, 3), keepdims=True) + 1e-6
    )
    assert np.abs(found - grouped.reshape(x.shape)).max() < largest


def test_second_derivative_of_the_norm(x64):
    """Right, though the mean is taken off as a constant."""
    r = np.random.default_rng(0)
    x, direction = r.normal(size=(2, 1, 2, 2, 4))
    norm, ones = GroupNorm(2), {"params": {"scale": np.ones(4), "bias": np.zeros(4)}}

    def definition(x):
        grouped = x.reshape(1, -1, 2, 2)
        mean = grouped.mean((1, 3), keepdims=True)
        variance = jnp.mean((grouped - mean) ** 2, (1, 3), keepdims=True)
        return ((grouped - mean) / jnp.sqrt(variance + 1e-6)).reshape(x.shape)

    def curvature(function):  # of a sum of the outputs, along the direction
        def slope(x):
            return jax.jvp(lambda x: jnp.sum(jnp.sin(function(x))), (x,), (direction,))[1]

        return jax.jit(jax.grad(slope))(x)

    found, expected = curvature(lambda x: norm.apply(ones, x)), curvature(definition)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)  # the layer is in float32


def test_norm_agrees_with_flax():
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 32))
    ours, theirs = GroupNorm(8), nn.GroupNorm(8)
    params = ours.init(jax.random.key(1), x)
    np.testing.assert_allclose(ours.apply(params, x), theirs.apply(params, x), atol=1e-5)
    a, b = (
        jax.grad(lambda p, x, f=f: (f.apply(p, x) ** 3).sum(), (0, 1))(params, x)
        for f in (ours, theirs)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), a, b)


def test_default_groups():
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 24))
    params = GroupNorm().init(jax.random.key(1), x)
    np.testing.assert_array_equal(GroupNorm().apply(params, x), GroupNorm(6).apply(params, x))
    with pytest.raises(ValueError, match=naming("norm_groups", "5", "24")):
        GroupNorm(5).apply(params, x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_norm_computes_in_float32(dtype):
    x = (100 + jax.random.normal(jax.random.key(0), (2, 4, 4, 8))).astype(dtype)
    params = GroupNorm(2).init(jax.random.key(1), x)
    found = GroupNorm(2).apply(params, x)
    assert found.dtype == dtype
    wide = GroupNorm(2).apply(params, x.astype(jnp.float32))
    np.testing.assert_array_equal(found, wide.astype(dtype))


@settings(max_examples=10)
@given(st.integers(0, 99), st.sampled_from([(1, "SAME"), (2, "SAME"), (2, ((1, 1), (1, 1)))]))
def test_convolution_is_its_sum(seed, how):
    """out[i, j] = sum over the 3x3 pixels from (strides*i - before), in float64."""
    strides, padding = how
    r = np.random.default_rng(seed)
    x, kernel = r.normal(size=(2, 6, 4, 3)), r.normal(size=(3, 3, 3, 5))
    params = {"kernel": kernel.astype(np.float32), "bias": np.arange(5, dtype=np.float32)}
    found = Conv(5, strides=strides, padding=padding).apply(
        {"params": params}, x.astype(np.float32)
    )
    before = 0 if strides == 2 and padding == "SAME" else 1  # TensorFlow pads after, PyTorch both
    padded = np.pad(x, ((0, 0), (before, 2), (before, 2), (0, 0)))
    expected = np.empty((2, 6 // strides, 4 // strides, 5))
    for i, j in np.ndindex(*expected.shape[1:3]):
        window = padded[:, strides * i : strides * i + 3, strides * j : strides * j + 3]
        expected[:, i, j] = np.einsum("bijc,ijcd->bd", window, kernel) + np.arange(5)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("strides", "padding"), [(1, "SAME"), (2, "SAME"), (2, ((1, 1), (1, 1)))])
def test_derivative_of_a_convolution(x64, strides, padding):
    r = np.random.default_rng(0)
    x, kernel, dx, dkernel = (r.normal(size=shape) for shape in 2 * ((2, 6, 8, 3), (3, 3, 3, 5)))

    def theirs(x, kernel):
        window = (strides, strides), padding
        return jax.lax.conv_general_dilated(
            x, kernel, *window, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def ours(x, kernel):
        return convolve(x, kernel, strides, padding)

    def derivatives(function):
        def total(x, kernel):
            return jnp.sum(jnp.sin(function(x, kernel)))

        forward = jax.jvp(function, (x, kernel), (dx, dkernel))
        reverse = jax.grad(total, (0, 1))
        return forward, reverse(x, kernel), jax.vmap(reverse, (0, None))(np.stack([x, dx]), kernel)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12),
        derivatives(ours),
        derivatives(theirs),
    )


def test_derivative_along_x_alone():
    x, kernel = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 4, 4))
    along = jax.jit(lambda dx: jax.jvp(lambda x: convolve(x, kernel), (x,), (dx,))[1])
    assert along.lower(x).as_text().count("stablehlo.convolution") == 1


@pytest.mark.parametrize("strides", [1, 2])
def test_gradients_inside_a_loop(strides):
    """XLA's CPU backend computes any other order of axes pixel by pixel, twenty times as slowly."""

    def loop(x, kernels):
        def step(x, kernel):
            gradients = jax.grad(lambda *inputs: jnp.sum(convolve(*inputs, strides) ** 2), (0, 1))(
                x, kernel
            )
            return gradients[0], gradients[1]

        return jax.lax.scan(step, x, kernels)

    compiled = (
        jax.jit(loop).lower(jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 3, 4, 4))).compile().as_text()
    )
    assert set(re.findall(r"dim_labels=(\S+?),", compiled)) == {"b01f_01io->b01f"}


def test_upsample_and_downsample():
    x = jnp.arange(2 * 2 * 3 * 2.0).reshape(2, 2, 3, 2)
    np.testing.assert_array_equal(upsample(x), np.repeat(np.repeat(x, 2, 1), 2, 2))
    np.testing.assert_array_equal(downsample(upsample(x)), x)
    np.testing.assert_allclose(
        downsample(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0], [[2.5, 4.5], [10.5, 12.5]]
    )


def test_time_features():
    """DDPM: sines first, frequencies down to 1/10000. ADM: cosines first, the last one above it."""
    t, i = np.array([0.0, 1.0, 250.5, 999.0]), np.arange(16)
    ddpm = np.concatenate([f(t[:, None] * 1e4 ** (-i / 15)) for f in (np.sin, np.cos)], -1)
    adm = np.concatenate([f(t[:, None] * 1e4 ** (-i / 16)) for f in (np.cos, np.sin)], -1)
    np.testing.assert_allclose(
        time_features(jnp.float32(t), 32, sin_first=True, shift=1), ddpm, atol=2e-4
    )
    np.testing.assert_allclose(time_features(jnp.float32(t), 32), adm, atol=2e-4)


def test_time_features_differ_in_float32():
    t = jnp.arange(1000, dtype=jnp.bfloat16).astype(jnp.float32)
    features = time_features(jnp.arange(1000), 32)
    assert features.dtype == jnp.float32
    assert len(np.unique(features, axis=0)) == 1000
    np.testing.assert_allclose((features[:, :16] ** 2 + features[:, 16:] ** 2), 1, atol=1e-5)
    assert len(np.unique(t)) < 600  # why they are not computed in bfloat16
