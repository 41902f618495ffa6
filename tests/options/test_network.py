"""Options of the UNet: its parameters, and the layers that it calls."""

import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from diffjax.build import ModelInfo, abstract_params, build_module, build_network
from diffjax.nn import layers, unet
from diffjax.nn.conditioning import ClassLabel
from diffjax.training import trainer
from tests.options.observations import observes
from tests.options.probe import SHAPE, call

BASE = (
    "train digits --workdir x --network.channels 8 --network.multipliers 1 2 --network.blocks 1"
    " --network.attention --network.heads 1 --network.norm-groups 4"
)
NUM = 3  # examples


@functools.cache
def info_of(*words):
    """The description of the model that `train` would train."""
    config = call((trainer, "open_session"), BASE, *words).args_[0]
    return ModelInfo(config, SHAPE, ClassLabel(10))


@functools.cache
def shapes_of(*words):
    """The shapes of parameters by path, as "in/kernel"."""
    info = info_of(*words)
    leaves = jax.tree.leaves_with_path(abstract_params(info, build_module(info)))
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}


def modules_of(shapes):
    return {path.split("/")[0] for path in shapes}


@observes(
    "train --network.channels",
    "train --network.multipliers",
    "train --network.blocks",
    "train --network.scale-shift",
    "train --network.learned-variance",
)
def test_widths():
    """The shapes of parameters are those of the widths that are asked for."""
    base = shapes_of()
    assert base["in/kernel"] == (3, 3, 1, 8)
    assert base["middle_0/conv_1/kernel"] == (3, 3, 16, 16)
    assert base["down_0_0/condition/kernel"] == (32, 16)
    assert base["out/kernel"] == (3, 3, 8, 1)
    words = "--network.channels 12 --network.multipliers 1 3 4 --network.blocks 2"
    other = shapes_of(words, "--network.no-scale-shift --network.learned-variance")
    assert other["in/kernel"] == (3, 3, 1, 12)
    assert other["down_1_0/conv_1/kernel"] == (3, 3, 12, 36)
    assert other["middle_0/conv_1/kernel"] == (3, 3, 48, 48)
    blocks = {name for name in modules_of(other) if name[-1].isdigit() and name[:2] in ("do", "up")}
    down = {f"down_{i}_{j}" for i in range(3) for j in range(2)}
    assert blocks == down | {f"up_{i}_{j}" for i in range(3) for j in range(3)}
    assert other["down_0_0/condition/kernel"] == (48, 12)
    assert other["out/kernel"] == (3, 3, 12, 2)
    x = np.arange(NUM * 64.0).reshape(NUM, *SHAPE)
    module = SimpleNamespace(apply=lambda variables, x: np.concatenate([x, -x], axis=-1))
    both = build_network(info_of(), module)(None, x)
    dropped = build_network(info_of("--network.learned-variance"), module)(None, x)
    assert (both.shape[-1], np.array_equal(dropped, x)) == (2, True)


@observes(
    "train --network.attention",
    "train --network.middle-attention",
    "train --network.middle-attention-norm",
    "train --network.resample-blocks",
)
def test_blocks():
    """Attention and blocks are where they are asked for."""
    base, attending = shapes_of(), shapes_of("--network.attention 4 --network.resample-blocks")
    assert {name for name in modules_of(base) if "attention" in name} == {"middle_attention"}
    assert "middle_attention/norm/scale" in base
    assert "down_0_resample/kernel" in base
    found = {name for name in modules_of(attending) if "attention" in name}
    assert found == {"down_1_0_attention", "up_1_0_attention", "up_1_1_attention"} | {
        "middle_attention"
    }
    assert attending["down_0_resample/conv_2/kernel"] == (3, 3, 8, 8)
    assert "down_0_resample/kernel" not in attending
    without = shapes_of("--network.no-middle-attention")
    assert "middle_attention" not in modules_of(without)
    plain = shapes_of("--network.no-middle-attention-norm")
    assert set(base) - set(plain) == {"middle_attention/norm/scale", "middle_attention/norm/bias"}


@functools.cache
def traced(*words):
    """What the network of a command line calls: modules, outputs, and arguments of layers."""
    module, found = build_module(info_of(*words)), SimpleNamespace(modules={}, outputs={})
    found.queries, found.dropout, found.time = [], [], []

    def intercept(function, args, kwargs, context):
        value = function(*args, **kwargs)
        if context.method_name == "__call__":
            name = "/".join(context.module.path)
            found.modules[name], found.outputs[name] = context.module, value
        return value

    def spy(calls, function):
        return lambda *args, **kwargs: calls.append((args, kwargs)) or function(*args, **kwargs)

    inputs = jnp.zeros((NUM, *SHAPE)), jnp.zeros(NUM), jnp.zeros(NUM, jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), NUM))
    with pytest.MonkeyPatch.context() as patch, nn.intercept_methods(intercept):
        for place, name, calls in (
            (jax.nn, "dot_product_attention", found.queries),
            (unet, "dropout", found.dropout),
            (unet, "time_features", found.time),
        ):
            patch.setattr(place, name, spy(calls, getattr(place, name)))
        key = jax.eval_shape(lambda: jax.random.key(0))
        found.output, found.params = jax.eval_shape(module.init_with_output, key, *inputs, keys)
    return found


def of_kind(found, kind):
    return [module for module in found.modules.values() if type(module) is kind]


@observes(
    "train --network.heads",
    "train --network.norm-groups",
    "train --network.norm-epsilon",
    "train --network.symmetric-padding",
    "train --network.sin-first",
    "train --network.frequency-shift",
    "train --network.dropout",
)
def test_layers():
    """Layers are called with the options, and do what these say."""
    words = "--network.heads 4 --network.norm-groups 2 --network.norm-epsilon 3 --network.sin-first"
    others = "--network.symmetric-padding --network.frequency-shift 1 --network.dropout 0.25"
    found, plain = traced(words, others), traced()
    assert [args[0].shape for args, _ in found.queries] == [(NUM, 16, 4, 4)]
    assert [args[0].shape for args, _ in plain.queries] == [(NUM, 16, 1, 16)]
    check_norms(of_kind(found, layers.GroupNorm), groups=2, epsilon=3.0)
    check_norms(of_kind(plain, layers.GroupNorm), groups=4, epsilon=1e-6)
    check_padding(found.modules["down_0_resample"], corners=(4, 9))
    check_padding(plain.modules["down_0_resample"], corners=(9, 4))
    check_time(found.time, (np.sin, np.cos), shift=1)
    check_time(plain.time, (np.cos, np.sin), shift=0)
    check_dropout(found.dropout, 0.25)
    check_dropout(plain.dropout, 0)


def check_norms(norms, groups, epsilon):
    """Two groups of the mean 0 and the variance 1 are divided by sqrt(1 + epsilon)."""
    assert {(norm.groups, norm.epsilon) for norm in norms} == {(groups, epsilon)}
    x = np.tile([1.0, -1.0, 11.0, 9.0], 2)[None, None, None]  # 8 channels, in pairs
    norm = layers.GroupNorm(groups, epsilon)
    params = {"params": {"scale": np.ones(8), "bias": np.zeros(8)}}
    share = np.split(x.ravel(), groups)
    expected = [(part - part.mean()) / np.sqrt(part.var() + epsilon) for part in share]
    assert np.allclose(norm.apply(params, x).ravel(), np.concatenate(expected), atol=1e-4)


def check_padding(conv, corners):
    """The sums of the pixels that the kernel sees at the first corner and at the last."""
    params = {"params": {"kernel": np.ones((3, 3, 1, 1)), "bias": np.zeros(1)}}
    one = layers.Conv(1, strides=conv.strides, padding=conv.padding)
    y = np.asarray(one.apply(params, np.ones((1, 4, 4, 1))))[0, ..., 0]
    assert (y.shape, y[0, 0], y[-1, -1]) == ((2, 2), *corners)


def check_time(calls, waves, shift):
    ((_, features), options) = calls[0][0], calls[0][1]
    assert features == 8
    angles = 7 * 10_000.0 ** (-np.arange(4) / (4 - shift))
    expected = np.concatenate([wave(angles) for wave in waves])
    found = layers.time_features(np.array([7.0]), features, **options)
    assert np.allclose(found[0], expected, atol=1e-5)


def check_dropout(calls, rate):
    """Every block drops with keys of its own, one for each example."""
    assert len(calls) == 8  # 2 down, 2 in the middle, 4 up
    assert {args[2] for args, _ in calls} == {rate}
    assert {args[0].shape for args, _ in calls} == {(NUM,)}
    keys, x = jax.random.split(jax.random.key(0), 4), jnp.ones((4, 1000))
    dropped = np.asarray(layers.dropout(keys, x, rate))
    assert abs(np.mean(dropped == 0) - rate) <= 4 * math.sqrt(rate * (1 - rate) / 4000)
    assert np.allclose(dropped[dropped > 0], 1 / (1 - rate))


@observes("train --network.head-width", "train --network.dtype")
def test_heads_and_dtype():
    """Heads have the width; all but norms and the ends are computed in the dtype."""
    found = traced("--network.head-width 2 --network.dtype bfloat16")
    assert [args[0].shape for args, _ in found.queries] == [(NUM, 16, 8, 2)]
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(found.params)}
    assert dtypes == {str(found.output.dtype)} == {"float32"}
    for name in ("in", "down_0_0/conv_1", "middle_attention/qkv", "up_0_1/conv_2"):
        assert found.outputs[name].dtype == "bfloat16"
    assert {str(value.dtype) for value in traced().outputs.values()} == {"float32"}


@observes("train --network.remat")
def test_remat():
    """Less is kept for the gradient, and the parameters are the same."""

    def kept(*words):
        info = info_of("--network.multipliers 1 --network.no-middle-attention", *words)
        module = build_module(info)
        network, params = build_network(info, module), abstract_params(info, module)

        def residuals(params, x):
            return jax.vjp(lambda p: network(p, x, jnp.zeros(64), jnp.zeros(64, int)), params)[1]

        leaves = jax.tree.leaves(jax.eval_shape(residuals, params, jnp.zeros((64, *SHAPE))))
        return sum(leaf.size for leaf in leaves)

    assert kept("--network.remat") < 0.5 * kept("--network.no-remat")
