"""The autoencoder beside its formulas in numpy, and the laws of moments of latents."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import naming
from hypothesis import given
from hypothesis import strategies as st

from diffjax.nn.autoencoder import (
    LOGVAR_RANGE,
    Autoencoder,
    AutoencoderConfig,
    draw,
    kl_divergence,
    mode,
)
from diffjax.nn.conditioning import UNCONDITIONAL, ClassLabel
from diffjax.nn.registry import abstract_params

SMALL = AutoencoderConfig(channels=(4, 8), blocks=1, latent_channels=2, norm_groups=2)
SHAPE = (6, 4, 3)


def parameters(config, shape=SHAPE):
    """Parameters of moderate size, none of them zero."""
    r = np.random.default_rng(0)

    def draw_leaf(leaf):
        scale = 1 / np.sqrt(max(1, np.prod(leaf.shape[:-1])))
        return (scale * r.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree.map(draw_leaf, abstract_params(config.build(shape), shape, UNCONDITIONAL))


def size_of(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_sizes_of_stable_diffusion():
    """The published numbers of parameters; the sides of images do not matter."""
    shape = (64, 128, 3)
    found = abstract_params(AutoencoderConfig().build(shape), shape, UNCONDITIONAL)
    sizes = {name: size_of(part) for name, part in found.items()}
    assert sizes == {
        "encoder": 34_163_592,
        "decoder": 49_490_179,
        "quant_conv": 72,
        "post_quant_conv": 20,
    }
    assert sum(sizes.values()) == 83_653_863
    assert AutoencoderConfig().latent_shape(shape) == (8, 16, 4)


# ------------------------------------------------------------------------------- in numpy


def conv(p, x, stride=1):
    """A convolution of one image [H, W, C], pixel by pixel; stride 2 pads right and below."""
    kernel, bias = (np.asarray(p[name], np.float64) for name in ("kernel", "bias"))
    before = 1 if stride == 1 else 0
    x = np.pad(x, ((before, 1), (before, 1), (0, 0)))
    rows, columns = ((side - 3) // stride + 1 for side in x.shape[:2])
    out = np.zeros((rows, columns, len(bias)))
    for i in range(rows):
        for j in range(columns):
            window = x[stride * i : stride * i + 3, stride * j : stride * j + 3]
            out[i, j] = np.tensordot(window, kernel, 3) + bias
    return out


def dense(p, x):
    return x @ np.asarray(p["kernel"], np.float64) + p["bias"]


def norm(p, x, groups, epsilon):
    parts = np.split(x, groups, axis=-1)
    parts = [(part - part.mean()) / np.sqrt(part.var() + epsilon) for part in parts]
    return np.concatenate(parts, -1) * p["scale"] + p["bias"]


def silu(x):
    return x / (1 + np.exp(-x))


def block(c, p, x):
    h = conv(p["conv_1"], silu(norm(p["norm_1"], x, c.norm_groups, c.norm_epsilon)))
    h = conv(p["conv_2"], silu(norm(p["norm_2"], h, c.norm_groups, c.norm_epsilon)))
    return h + (dense(p["shortcut"], x) if "shortcut" in p else x)


def attention(c, p, x):
    h = norm(p["norm"], x, c.norm_groups, c.norm_epsilon).reshape(-1, x.shape[-1])
    q, k, v = np.split(dense(p["qkv"], h), 3, axis=-1)
    scores = np.exp(q @ k.T / np.sqrt(x.shape[-1]))
    weights = scores / scores.sum(1, keepdims=True)
    return x + dense(p["out"], weights @ v).reshape(x.shape)


def middle(c, p, x):
    x = block(c, p["middle_0"], x)
    if c.middle_attention:
        x = attention(c, p["middle_attention"], x)
    return block(c, p["middle_1"], x)


def out(c, p, x):
    return conv(p["out"], silu(norm(p["norm_out"], x, c.norm_groups, c.norm_epsilon)))


def encode(c, params, image):
    p = params["encoder"]
    x = conv(p["in"], image)
    for i in range(len(c.channels)):
        for j in range(c.blocks):
            x = block(c, p[f"down_{i}_{j}"], x)
        if i < len(c.channels) - 1:
            x = conv(p[f"down_{i}_resample"], x, stride=2)
    x = out(c, p, middle(c, p, x))
    return dense(params["quant_conv"], x) if c.quant_conv else x


def decode(c, params, z):
    p = params["decoder"]
    z = dense(params["post_quant_conv"], z) if c.post_quant_conv else z
    x = middle(c, p, conv(p["in"], z))
    for i in reversed(range(len(c.channels))):
        for j in range(c.blocks + 1):
            x = block(c, p[f"up_{i}_{j}"], x)
        if i:
            x = conv(p[f"up_{i}_resample"], x.repeat(2, 0).repeat(2, 1))
    return out(c, p, x)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"channels": (4, 4, 8), "norm_epsilon": 0.3, "quant_conv": False},
        {"middle_attention": False, "post_quant_conv": False, "blocks": 2, "channels": (4,)},
    ],
)
def test_formulas(options):
    """Moments and images are those of the formulas, image by image."""
    config = dataclasses.replace(SMALL, **options)
    shape = tuple(2 * side for side in SHAPE[:2]) + SHAPE[2:]
    params = parameters(config, shape)
    r = np.random.default_rng(1)
    images = r.uniform(-1, 1, (2, *shape)).astype(np.float32)
    module = Autoencoder(config, shape[-1])

    @jax.jit
    def apply(params, images):
        moments = module.apply({"params": params}, images, method="encode")
        return moments, module.apply({"params": params}, images)

    moments, reconstructed = map(np.asarray, apply(params, images))
    latent = config.latent_shape(shape)
    assert moments.shape == (2, *latent[:2], 2 * latent[2])
    for image, found, again in zip(images, moments, reconstructed, strict=True):
        expected = encode(config, params, image.astype(np.float64))
        assert np.abs(expected).max() < LOGVAR_RANGE[1]  # nothing is clamped here
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
        expected = decode(config, params, found[..., : latent[2]].astype(np.float64))
        assert np.abs(again - expected).max() < 1e-4 * np.abs(expected).max()


def test_log_variances_are_clamped_and_means_are_not():
    config = dataclasses.replace(SMALL, channels=(4,), middle_attention=False)
    params = parameters(config)
    params["quant_conv"]["kernel"] = 1e4 * params["quant_conv"]["kernel"]
    images = np.random.default_rng(1).normal(size=(3, *SHAPE)).astype(np.float32)
    module = Autoencoder(config, 3)
    moments = jax.jit(lambda p: module.apply({"params": p}, images, method="encode"))(params)
    mean, logvar = jnp.split(moments, 2, -1)
    assert (float(logvar.min()), float(logvar.max())) == LOGVAR_RANGE
    assert float(jnp.abs(mean).max()) > 100


def test_dtype():
    """All but norms and the ends are computed in the dtype, and outputs are float32."""
    config = dataclasses.replace(SMALL, channels=(4,), middle_attention=False)
    params = parameters(config)
    images = np.random.default_rng(1).uniform(-1, 1, (2, *SHAPE)).astype(np.float32)

    def reconstructed(**options):
        module = Autoencoder(dataclasses.replace(config, **options), 3)
        return jax.jit(module.apply)({"params": params}, images)

    exact, rounded = reconstructed(), reconstructed(dtype="bfloat16")
    assert exact.dtype == rounded.dtype == jnp.float32
    assert 1e-4 < jnp.abs(rounded - exact).max() / jnp.abs(exact).max() < 0.1


def test_remat():
    """Less is kept for the gradient."""

    def kept(remat):
        module = Autoencoder(dataclasses.replace(SMALL, channels=(4,), blocks=2, remat=remat), 3)

        def residuals(params, x):
            return jax.vjp(lambda params: module.apply({"params": params}, x), params)[1]

        shapes = jax.eval_shape(residuals, parameters(module.config), jnp.zeros((64, *SHAPE)))
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    assert kept(remat=True) < 0.6 * kept(remat=False)


# ------------------------------------------------------------------------------- moments


@given(st.floats(-4, 4), st.floats(-5, 2))
def test_divergence_is_its_integral(mean, logvar):
    """It is the integral of p*log(p/q) for each latent, and their sum."""
    std = np.exp(logvar / 2)
    z = mean + std * np.linspace(-12, 12, 4001)
    log_p = -(((z - mean) / std) ** 2) / 2 - np.log(std)
    expected = np.trapezoid(np.exp(log_p) * (log_p + z**2 / 2), z) / np.sqrt(2 * np.pi)
    moments = np.stack([np.full((2, 3, 1), mean), np.full((2, 3, 1), logvar)], -1)[..., 0, :]
    found = kl_divergence(jnp.asarray(moments[None].repeat(2, 0), jnp.float32))
    assert found.shape == (2,)
    assert np.allclose(found, 6 * expected, rtol=1e-4, atol=1e-4)


def test_draws_have_the_moments():
    """Of each latent, over the keys; each image has its own key."""
    r = np.random.default_rng(0)
    mean, logvar = r.normal(size=(2, 3, 1, 2)), r.uniform(-4, 1, (3, 1, 2))[None].repeat(2, 0)
    moments = np.concatenate([mean, logvar], -1).astype(np.float32)
    num = 4000
    keys = jax.vmap(jax.random.key)(np.arange(num))
    drawn = np.asarray(draw(jnp.asarray(moments[:1].repeat(num, 0)), keys))
    std = np.exp(logvar[0] / 2)
    assert (np.abs(drawn.mean(0) - mean[0]) < 5 * std / num**0.5).all()
    assert (np.abs(drawn.std(0) / std - 1) < 5 / (2 * num) ** 0.5).all()
    pair = jnp.asarray(moments)
    together, alone = draw(pair, keys[:2]), draw(pair[1:], keys[1:2])
    assert np.array_equal(together[1], alone[0])
    assert np.array_equal(mode(pair), moments[..., :2])


# ------------------------------------------------------------------------------- mistakes


def test_images_that_cannot_be_halved():
    with pytest.raises(ValueError, match=naming("10x6", 3, 8)):
        AutoencoderConfig().build((10, 6, 3))
    with pytest.raises(ValueError, match=naming("condition", str(ClassLabel(3)))):
        SMALL.build(SHAPE, ClassLabel(3))
    params = parameters(SMALL)
    with pytest.raises(ValueError, match=naming("5x4", 1, 2)):
        Autoencoder(SMALL, 3).apply({"params": params}, jnp.zeros((1, 5, 4, 3)), method="encode")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("channels", ()),
        ("channels", (4, 0)),
        ("blocks", 0),
        ("latent_channels", 0),
        ("norm_groups", 3),
        ("norm_epsilon", 0.0),
        ("scaling", 0.0),
        ("scaling", float("nan")),
        ("shift", float("inf")),
        ("kl_weight", -1.0),
        ("dropout", 0.1),
        ("learned_variance", True),
    ],
)
def test_fields_that_cannot_be_used(name, value):
    SMALL.check()
    with pytest.raises(ValueError, match=naming(f"network.{name}")):
        dataclasses.replace(SMALL, **{name: value}).check()
