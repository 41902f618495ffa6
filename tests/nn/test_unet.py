import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import naming

from diffjax.build import build_unet, init_params
from diffjax.config import load_config
from diffjax.inference.pipeline import count_parameters
from diffjax.loss import example_keys
from diffjax.nn.unet import UNet

SMALL = {"channels": 8, "out_channels": 1, "multipliers": (1, 2), "blocks": 1, "attention": (4,), "heads": 2}


def build(num_classes=3, random_output=True, **options):
    """A network, its parameters (zero-initialised layers filled, so that everything matters), and its inputs."""
    unet = UNet(**{**SMALL, **options}, num_classes=num_classes)
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    inputs = x, jnp.arange(4) * 200, jnp.arange(4) % num_classes if num_classes else None
    params = jax.jit(unet.init)(jax.random.key(1), *inputs)
    if random_output:
        generator = np.random.default_rng(2)
        params = jax.tree.map(lambda p: p + 0.1 * generator.normal(size=p.shape).astype(np.float32), params)
    return jax.jit(unet.apply), params, inputs


def test_a_fresh_network_says_nothing():
    apply, params, inputs = build(random_output=False)
    assert (apply(params, *inputs) == 0).all()


def test_every_input_matters_and_images_do_not_mix():
    apply, params, (x, t, label) = build()
    out = apply(params, x, t, label)
    assert out.shape == x.shape
    for changed in (
        (x.at[0].add(1), t, label),
        (x, t.at[0].add(1), label),
        (x, t, label.at[0].set(3)),  # no label
    ):
        moved = np.abs(apply(params, *changed) - out).max((1, 2, 3))
        assert moved[0] > 1e-3
        assert (moved[1:] < 1e-5).all()


def test_the_class_table_has_a_row_for_no_label():
    unet = UNet(**SMALL, num_classes=3)
    inputs = jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    params = jax.eval_shape(unet.init, jax.random.key(0), *inputs)
    assert params["params"]["label"]["embedding"].shape[0] == 4


def test_attention_only_where_it_is_asked_for():
    for sizes, middle, expected in [
        ((4,), True, 4),
        ((4,), False, 3),
        ((8, 4), True, 7),
        ((), True, 1),
        ((), False, 0),
    ]:
        unet = UNet(**{**SMALL, "attention": sizes, "middle_attention": middle})
        params = jax.eval_shape(unet.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1))
        assert sum(name.endswith("_attention") for name in params["params"]) == expected


def test_bfloat16_computes_near_float32_and_answers_in_it():
    apply, params, inputs = build()
    half, _, _ = build(dtype=jnp.bfloat16)
    out = half(params, *inputs)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, apply(params, *inputs), atol=0.06)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_blocks_computed_again_give_the_same_gradient():
    apply, params, inputs = build(multipliers=(1,), attention=())
    again, *_ = build(multipliers=(1,), attention=(), remat=True)
    a, b = (jax.jit(jax.grad(lambda p, f=f: (f(p, *inputs) ** 2).sum()))(params) for f in (apply, again))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), a, b)


def test_the_condition_may_be_real_numbers():
    unet = UNet(**SMALL, condition_width=5)
    x, t, condition = jnp.ones((2, 8, 8, 1)), jnp.zeros(2), jnp.eye(2, 5)
    params = jax.jit(unet.init)(jax.random.key(0), x, t, condition)
    params = jax.tree.map(lambda p: p + 0.1, params)
    out = jax.jit(unet.apply)(params, x, t, condition)
    assert np.abs(out[0] - out[1]).max() > 1e-4
    with pytest.raises(ValueError, match=naming("condition", "5")):
        unet.apply(params, x, t)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "options", "parameters"),
    [
        ("digits", (8, 8, 1), 10, {}, 426_961),
        ("mnist_small", (32, 32, 1), 10, {}, 878_273),
        # As stored by google/ddpm-cifar10-32; 35.7 M in arXiv:2006.11239.
        ("ddpm_cifar10", (32, 32, 3), 0, {}, 35_746_307),
        # With the learned variance of the published one, and no row for no label; 296 M in arXiv:2105.05233.
        ("adm_imagenet64", (64, 64, 3), 1000, {"learned_variance": True, "null_label": False}, 295_904_454),
    ],
)
def test_the_networks_of_the_papers_have_their_number_of_parameters(name, shape, classes, options, parameters):
    config = load_config(name)
    config = dataclasses.replace(config, network=dataclasses.replace(config.network, **options))
    unet = build_unet(config, shape, classes)
    params = jax.eval_shape(lambda key: init_params(unet, shape, key), jax.random.key(0))
    assert count_parameters(params) == parameters


def test_dropout_is_keyed_by_example():
    apply, params, (x, t, label) = build(dropout=0.5)
    keys = example_keys(jax.random.key(0), jnp.arange(4, dtype=jnp.uint32))
    out = apply(params, x, t, label, keys)
    assert np.abs(out - apply(params, x, t, label)).max() > 1e-3
    np.testing.assert_allclose(apply(params, x[2:], t[2:], label[2:], keys[2:]), out[2:], atol=1e-5)
    assert np.abs(apply(params, x, t, label, keys[::-1]) - out).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "inputs", "words"),
    [
        ({"multipliers": (1, 1, 1, 1, 1)}, {}, "multipliers 8x8 4 16"),
        ({"channels": 7, "heads": 1}, {}, "features 7"),
        ({}, {"condition": None}, "label 3"),
        ({"num_classes": 0}, {"condition": jnp.zeros(4, jnp.int32)}, "condition"),
        ({"head_width": 3}, {}, "head_width 3 16"),
        ({"condition_width": 2}, {}, "num_classes 3 condition_width 2"),
    ],
)
def test_what_does_not_fit_is_named(options, inputs, words):
    unet = UNet(**{**SMALL, "num_classes": 3, **options})
    inputs = {"condition": jnp.zeros(4, jnp.int32), **inputs}
    with pytest.raises(ValueError, match=naming(*words.split())):
        jax.eval_shape(lambda: unet.init(jax.random.key(0), jnp.zeros((4, 8, 8, 1)), jnp.zeros(4), **inputs))
