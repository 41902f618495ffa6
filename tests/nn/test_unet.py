import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import naming

from diffjax.build import ModelInfo, abstract_params, build_module, count_parameters
from diffjax.config import load_config
from diffjax.loss import example_keys
from diffjax.nn.conditioning import UNCONDITIONAL, ClassLabel, Vector, WithGuidanceScale
from diffjax.nn.layers import dropout
from diffjax.nn.unet import UNet, UNetConfig

SMALL = UNetConfig(channels=8, multipliers=(1, 2), blocks=1, attention=(4,), heads=2)
LABEL = ClassLabel(3)


def small(conditioning=UNCONDITIONAL, **options):
    return UNet(dataclasses.replace(SMALL, **options), 1, conditioning)


def build(conditioning=LABEL, random_output=True, side=(8, 8), **options):
    """A network, its parameters (none of them zero, so that all matter), and inputs."""
    unet = small(conditioning, **options)
    x = jax.random.normal(jax.random.key(0), (4, *side, 1))
    labels = jnp.arange(4) % 3 if conditioning.is_conditional else None
    inputs = x, jnp.arange(4) * 200, labels
    params = jax.jit(unet.init)(jax.random.key(1), *inputs)
    if random_output:
        r = np.random.default_rng(2)
        params = jax.tree.map(lambda p: p + 0.1 * r.normal(size=p.shape).astype(np.float32), params)
    return jax.jit(unet.apply), params, inputs


def test_output_starts_at_zero():
    apply, params, inputs = build(random_output=False)
    assert (apply(params, *inputs) == 0).all()


def test_every_input_matters_and_images_do_not_mix():
    apply, params, (x, t, label) = build()
    out = apply(params, x, t, label)
    assert out.shape == x.shape
    for changed in (
        (x.at[0].add(1), t, label),
        (x, t.at[0].add(1), label),
        (x, t, label.at[0].set(3)),  # the null label
    ):
        moved = np.abs(apply(params, *changed) - out).max((1, 2, 3))
        assert moved[0] > 1e-3
        assert (moved[1:] < 1e-5).all()


@pytest.mark.parametrize("side", [(8, 12), (4, 8)])
def test_images_that_are_not_square(side):
    """Attention is at heights; every pixel reaches every other."""
    attention = (side[0] // 2,)
    apply, params, (x, t, label) = build(side=side, attention=attention)
    out = apply(params, x, t, label)
    assert out.shape == (4, *side, 1)
    moved = np.abs(apply(params, x.at[0, 0, 0].add(5), t, label) - out)
    assert (moved[0] > 0).mean() > 0.9
    assert (moved[1:] < 1e-5).all()
    with pytest.raises(ValueError, match=naming("network.attention", attention)):
        apply(params, jnp.swapaxes(x, 1, 2), t, label)


@pytest.mark.parametrize(("null", "rows"), [(True, 4), (False, 3)])
def test_class_table_has_a_row_for_the_null_label(null, rows):
    unet = small(ClassLabel(3, has_null_label=null))
    inputs = jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    params = jax.eval_shape(unet.init, jax.random.key(0), *inputs)
    assert params["params"]["label"]["embedding"].shape == (rows, 32)


@pytest.mark.parametrize(
    ("sizes", "middle", "expected"),
    [((4,), True, 4), ((4,), False, 3), ((8, 4), True, 7), ((), True, 1), ((), False, 0)],
)
def test_attention(sizes, middle, expected):
    unet = small(attention=sizes, middle_attention=middle)
    params = jax.eval_shape(unet.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1))
    assert sum(name.endswith("_attention") for name in params["params"]) == expected


def test_bfloat16_is_near_float32():
    apply, params, inputs = build()
    half, _, _ = build(dtype="bfloat16")
    out = half(params, *inputs)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, apply(params, *inputs), atol=0.06)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_remat_gives_the_same_gradient():
    apply, params, inputs = build(multipliers=(1,), attention=())
    again, *_ = build(multipliers=(1,), attention=(), remat=True)
    a, b = (
        jax.jit(jax.grad(lambda p, f=f: (f(p, *inputs) ** 2).sum()))(params) for f in (apply, again)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), a, b)


def test_vector_condition():
    unet = small(Vector(5))
    x, t, condition = jnp.ones((2, 8, 8, 1)), jnp.zeros(2), jnp.eye(2, 5)
    params = jax.jit(unet.init)(jax.random.key(0), x, t, condition)
    params = jax.tree.map(lambda p: p + 0.1, params)
    out = jax.jit(unet.apply)(params, x, t, condition)
    assert np.abs(out[0] - out[1]).max() > 1e-4
    with pytest.raises(ValueError, match=naming("condition", 5)):
        unet.apply(params, x, t)


@pytest.mark.parametrize(
    ("name", "x_shape", "conditioning", "options", "parameters"),
    [
        ("digits", (8, 8, 1), ClassLabel(10), {}, 426_961),
        ("mnist_small", (32, 32, 1), ClassLabel(10), {}, 878_273),
        # As stored by google/ddpm-cifar10-32; 35.7 M in arXiv:2006.11239.
        ("cifar10", (32, 32, 3), UNCONDITIONAL, {}, 35_746_307),
        # With the learned variance of the published one, and no null label; 296 M in
        # arXiv:2105.05233.
        (
            "imagenet64",
            (64, 64, 3),
            ClassLabel(1000, has_null_label=False),
            {"learned_variance": True},
            295_904_454,
        ),
    ],
)
def test_parameter_counts_of_the_papers(name, x_shape, conditioning, options, parameters):
    config = load_config(name)
    config = dataclasses.replace(config, network=dataclasses.replace(config.network, **options))
    info = ModelInfo(config, x_shape, conditioning)
    assert count_parameters(abstract_params(info, build_module(info))) == parameters


def test_dropout_is_keyed_by_example():
    apply, params, (x, t, label) = build(dropout=0.5)
    keys = example_keys(jax.random.key(0), jnp.arange(4, dtype=jnp.uint32))
    out = apply(params, x, t, label, keys)
    assert np.abs(out - apply(params, x, t, label)).max() > 1e-3
    np.testing.assert_allclose(apply(params, x[2:], t[2:], label[2:], keys[2:]), out[2:], atol=1e-5)
    assert np.abs(apply(params, x, t, label, keys[::-1]) - out).max() > 1e-3


def test_every_block_drops_its_own_units(monkeypatch):
    """The key of a block is folded with its name, so that no two blocks share a mask."""
    used = []

    def recording(keys, h, rate):
        if keys is not None:
            used.append(jax.random.key_data(keys))
        return dropout(keys, h, rate)

    monkeypatch.setattr("diffjax.nn.unet.dropout", recording)
    unet, keys = small(ClassLabel(3), dropout=0.5), jax.random.split(jax.random.key(0), 4)
    inputs = jnp.zeros((4, 8, 8, 1)), jnp.zeros(4), jnp.zeros(4, jnp.int32)
    params = jax.jit(unet.init)(jax.random.key(1), *inputs)
    unet.apply(params, *inputs, keys)
    names = ["down_0_0", "down_1_0", "middle_0", "middle_1"]
    names += ["up_1_0", "up_1_1", "up_0_0", "up_0_1"]
    fold = jax.vmap(jax.random.fold_in, (0, None))
    expected = [jax.random.key_data(fold(keys, zlib.crc32(name.encode()))) for name in names]
    np.testing.assert_array_equal(used, expected)
    assert len(np.unique(np.concatenate(used), axis=0)) == 4 * len(names)


@pytest.mark.parametrize(
    ("conditioning", "options", "condition", "names"),
    [
        (UNCONDITIONAL, {"multipliers": (1, 1, 1, 1, 1)}, None, ["multipliers", "8x8", 4, 16]),
        (UNCONDITIONAL, {"channels": 7, "heads": 1}, None, ["features", 7]),
        (ClassLabel(3), {}, None, ["condition", "classes", 3]),
        (UNCONDITIONAL, {}, jnp.zeros(4, jnp.int32), ["condition", "unconditional"]),
        (UNCONDITIONAL, {"head_width": 3}, None, ["head_width", 3, 16]),
        (UNCONDITIONAL, {"heads": 3}, None, ["heads", 3, 16]),
        (UNCONDITIONAL, {"attention": (5,)}, None, ["attention", 5, 8, 4]),
        (UNCONDITIONAL, {"norm_groups": 3}, None, ["norm_groups", 3, 8]),
        (
            WithGuidanceScale(ClassLabel(3)),
            {},
            jnp.zeros(4, jnp.int32),
            ["condition", "guidance scale"],
        ),
    ],
)
def test_shapes_that_do_not_fit(conditioning, options, condition, names):
    unet, x = small(conditioning, **options), jnp.zeros((4, 8, 8, 1))
    with pytest.raises(ValueError, match=naming(*names)):
        jax.eval_shape(lambda: unet.init(jax.random.key(0), x, jnp.zeros(4), condition))
