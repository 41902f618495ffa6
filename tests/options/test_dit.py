"""Options of the DiT: its parameters, and the layers that it calls."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from diffjax.build import ModelInfo, abstract_params, build_module
from diffjax.config import flat_fields
from diffjax.nn import dit
from diffjax.nn.conditioning import ClassLabel
from diffjax.training import trainer
from tests.options.observations import observes
from tests.options.probe import SHAPE, call

CONFIG = """
from diffjax.config import Config, Data
from diffjax.nn.dit import DiTConfig

config = Config(data=Data(name="digits"), network=DiTConfig(width=8, depth=2, heads=2, patch=2))
"""
VALUES = {
    "width": ("24", 24), "depth": ("3", 3), "heads": ("6", 6), "patch": ("4", 4),
    "mlp_ratio": ("5", 5), "norm_epsilon": ("0.25", 0.25), "mlp_norm_epsilon": ("0.75", 0.75),
    "frequency_shift": ("0.5", 0.5), "scan": ("", True), "dropout": ("0.15", 0.15),
    "dtype": ("bfloat16", "bfloat16"), "remat": ("", True), "learned_variance": ("", True),
}  # fmt: skip
NUM = 3  # examples


@pytest.fixture(scope="module")
def config_of(tmp_path_factory):
    """The configuration that `train` would train with these options."""
    path = tmp_path_factory.mktemp("dit") / "own.py"
    path.write_text(CONFIG)
    return functools.cache(
        lambda *words: call((trainer, "open_session"), "train", path, "--workdir x", *words).args_[
            0
        ]
    )


@observes(*(f"dit --network.{name.replace('_', '-')}" for name in VALUES))
def test_values(config_of):
    """Every field of the network is an option, and arrives."""
    words = [f"--network.{name.replace('_', '-')} {text}" for name, (text, _) in VALUES.items()]
    found = flat_fields(config_of(*words).network)
    assert found == {name: value for name, (_, value) in VALUES.items()}
    plain = flat_fields(config_of().network)
    assert [name for name in plain if plain[name] == found[name]] == []


def traced(config):
    """What the network calls for three images, without running it."""
    info = ModelInfo(config, SHAPE, ClassLabel(10))
    module, found = build_module(info), SimpleNamespace(dropout=[], time=[], norms=[], queries=[])
    found.shapes = jax.tree.map(lambda leaf: leaf.shape, abstract_params(info, module))

    def spy(calls, function):
        return lambda *args, **kwargs: calls.append((args, kwargs)) or function(*args, **kwargs)

    inputs = jnp.zeros((NUM, *SHAPE)), jnp.zeros(NUM), jnp.zeros(NUM, jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), NUM))
    with pytest.MonkeyPatch.context() as patch:
        for place, name, calls in (
            (jax.nn, "dot_product_attention", found.queries),
            (dit, "dropout", found.dropout),
            (dit, "time_features", found.time),
            (dit, "modulate", found.norms),
        ):
            patch.setattr(place, name, spy(calls, getattr(place, name)))
        key = jax.eval_shape(lambda: jax.random.key(0))
        found.output, _ = jax.eval_shape(module.init_with_output, key, *inputs, keys)
    return found


@observes(
    "dit --network.width",
    "dit --network.depth",
    "dit --network.patch",
    "dit --network.mlp-ratio",
    "dit --network.learned-variance",
)
def test_widths(config_of):
    """The shapes of parameters are those of the widths that are asked for."""
    words = "--network.width 12 --network.depth 3 --network.patch 4 --network.mlp-ratio 2"
    base, other = traced(config_of()), traced(config_of(words, "--network.learned-variance"))
    for found, width, depth, pixels, ratio, channels in (
        (base, 8, 2, 4, 4, 1),
        (other, 12, 3, 16, 2, 2),
    ):
        assert found.shapes["patch"]["kernel"] == (pixels, width)
        assert found.shapes["blocks"]["mlp_in"]["kernel"] == (depth, width, ratio * width)
        assert found.shapes["out"]["kernel"] == (width, pixels * channels)
        assert found.output.shape == (NUM, 8, 8, channels)


@observes(
    "dit --network.heads",
    "dit --network.norm-epsilon",
    "dit --network.mlp-norm-epsilon",
    "dit --network.frequency-shift",
    "dit --network.dropout",
    "dit --network.dtype",
)
def test_layers(config_of):
    """Layers are called with the options; the norm of a block's MLP is its second."""
    words = "--network.heads 4 --network.norm-epsilon 2 --network.mlp-norm-epsilon 3"
    others = "--network.frequency-shift 1 --network.dropout 0.25 --network.dtype bfloat16"
    for found, heads, epsilons, shift, rate, dtype in (
        (traced(config_of()), 2, {1e-6}, 0, 0.0, "float32"),
        (traced(config_of(words, others)), 4, {2.0, 3.0}, 1, 0.25, "bfloat16"),
    ):
        assert {args[0].shape for args, _ in found.queries} == {(NUM, 16, heads, 8 // heads)}
        assert {str(args[0].dtype) for args, _ in found.queries} == {dtype}
        assert {args[3] for args, _ in found.norms} == epsilons
        assert found.norms[-1][0][3] == min(epsilons)
        assert found.norms[1][0][3] == max(epsilons)
        assert [kwargs for _, kwargs in found.time] == [{"shift": shift}] * len(found.time)
        assert {args[2] for args, _ in found.dropout} == {rate}
        assert str(found.output.dtype) == "float32"


@observes("dit --network.scan", "dit --network.remat")
def test_programs(config_of):
    """A loop in the program, or none; less is kept for the gradient with remat."""

    def lowered(*words):
        info = ModelInfo(config_of(*words), SHAPE, ClassLabel(10))
        module = build_module(info)
        params = abstract_params(info, module)

        def output(params, x):
            return module.apply({"params": params}, x, jnp.zeros(64), jnp.zeros(64, int))

        x = jnp.zeros((64, *SHAPE))
        kept = jax.eval_shape(lambda p: jax.vjp(output, p, x)[1], params)
        text = jax.jit(output).lower(params, x).as_text()
        return text.count("stablehlo.while"), sum(leaf.size for leaf in jax.tree.leaves(kept))

    (loops, whole), (looped, _), (_, fewer) = (
        lowered(*words) for words in ((), ("--network.scan",), ("--network.remat",))
    )
    assert (loops, looped) == (0, 1)
    assert fewer < 0.5 * whole
