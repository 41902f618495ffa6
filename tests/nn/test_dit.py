"""The DiT against its formulas in numpy, and the laws that every network here obeys."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import naming
from hypothesis import given, settings
from hypothesis import strategies as st

from diffjax.config import Config, config_from_dict, config_to_dict, is_bound
from diffjax.loss import example_keys
from diffjax.nn import dit
from diffjax.nn.conditioning import UNCONDITIONAL, ClassLabel, Fields, Vector
from diffjax.nn.dit import DiT, DiTConfig
from diffjax.nn.layers import dropout
from diffjax.nn.registry import abstract_params, init_params

SMALL = DiTConfig(width=16, depth=2, heads=2, patch=2)
LABEL, X_SHAPE = ClassLabel(3), (4, 6, 3)


def noisy(module, x_shape, conditioning):
    """Parameters none of which is zero, so that all matter."""
    r = np.random.default_rng(2)
    shapes = abstract_params(module, x_shape, conditioning)
    return jax.tree.map(lambda leaf: 0.25 * r.normal(size=leaf.shape).astype(np.float32), shapes)


@functools.cache
def build(conditioning=LABEL, x_shape=X_SHAPE, **options):
    """A network as (params, x, t, condition, keys) -> output, parameters, and four inputs."""
    module = dataclasses.replace(SMALL, **options).build(x_shape, conditioning)
    x = jax.random.normal(jax.random.key(0), (4, *x_shape))

    def apply(params, *inputs):
        return module.apply({"params": params}, *inputs)

    inputs = x, jnp.array([0.0, 1.0, 17.5, 64.0]), conditioning.nulls(4)
    if conditioning is LABEL:
        inputs = *inputs[:2], jnp.arange(4) % 4
    return jax.jit(apply), noisy(module, x_shape, conditioning), inputs


# ------------------------------------------------------------------------------- the oracle


def layer(p, x):
    return x @ p["kernel"] + p["bias"]


def silu(x):
    return x / (1 + np.exp(-x))


def normalized(x, epsilon):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)


def waves(positions, quarter):
    angles = positions[:, None] / 10_000 ** (np.arange(quarter) / quarter)
    return np.concatenate([np.sin(angles), np.cos(angles)], -1)


def oracle_block(p, c, h, embedding):
    shift, scale, gate, shift_2, scale_2, gate_2 = np.split(
        layer(p["modulation"], silu(embedding)), 6
    )
    qkv = layer(p["qkv"], normalized(h, c.norm_epsilon) * (1 + scale) + shift)
    q, k, v = np.split(qkv, 3, -1)
    size = c.width // c.heads
    outputs = []
    for head in range(c.heads):
        part = slice(head * size, (head + 1) * size)
        weights = np.exp(q[:, part] @ k[:, part].T / np.sqrt(size))
        outputs.append(weights / weights.sum(-1, keepdims=True) @ v[:, part])
    h = h + gate * layer(p["out"], np.concatenate(outputs, -1))
    hidden = layer(p["mlp_in"], normalized(h, c.mlp_norm_epsilon) * (1 + scale_2) + shift_2)
    gelu = hidden / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    return h + gate_2 * layer(p["mlp_out"], gelu)


def oracle(p, c, x, t, label):
    """The output for one image x [H, W, C] in float64, patch after patch."""
    rows, columns = x.shape[0] // c.patch, x.shape[1] // c.patch
    corners = [(i * c.patch, j * c.patch) for i in range(rows) for j in range(columns)]
    patches = [x[i : i + c.patch, j : j + c.patch].ravel() for i, j in corners]
    row, column = np.array(corners).T // c.patch
    places = np.concatenate([waves(column, c.width // 4), waves(row, c.width // 4)], -1)
    h = layer(p["patch"], np.array(patches)) + places
    angles = t / 10_000 ** (np.arange(128) / (128 - c.frequency_shift))
    features = np.concatenate([np.cos(angles), np.sin(angles)])
    embedding = layer(p["time_out"], silu(layer(p["time_in"], features)))
    embedding = embedding + p["label"]["embedding"][label]
    for i in range(c.depth):
        block = jax.tree.map(lambda leaf: leaf[i], p["blocks"])  # noqa: B023
        h = oracle_block(block, c, h, embedding)
    shift, scale = np.split(layer(p["modulation"], silu(embedding)), 2)
    h = layer(p["out"], normalized(h, c.norm_epsilon) * (1 + scale) + shift)
    y = np.zeros((*x.shape[:2], h.shape[-1] // c.patch**2))
    for (i, j), patch in zip(corners, h, strict=True):
        y[i : i + c.patch, j : j + c.patch] = patch.reshape(c.patch, c.patch, -1)
    return y


@pytest.mark.parametrize(
    ("x_shape", "options"),
    [
        (X_SHAPE, {"frequency_shift": 1.0, "norm_epsilon": 0.3, "mlp_norm_epsilon": 0.7}),
        ((8, 4, 1), {"patch": 4, "learned_variance": True, "mlp_ratio": 2, "scan": True}),
    ],
)
def test_output_is_that_of_the_formulas(x_shape, options):
    """The network and a loop over images, patches and heads agree to rounding."""
    apply, params, inputs = build(x_shape=x_shape, **options)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    config = dataclasses.replace(SMALL, **options)
    rows = zip(*(np.asarray(each, each.dtype) for each in inputs), strict=True)
    expected = np.stack([oracle(exact, config, *row) for row in rows])
    found = apply(params, *inputs)
    channels = x_shape[-1] * (2 if config.learned_variance else 1)
    assert found.shape == (4, *x_shape[:2], channels)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


# ------------------------------------------------------------------------------- laws


def test_scan_and_remat_change_nothing_but_the_program():
    """The same parameters give the same output and gradient, with dropout, in a loop or without."""
    found = []
    for options in ({}, {"scan": True, "remat": True}):
        apply, params, inputs = build(dropout=0.3, **options)
        keys = jax.random.split(jax.random.key(3), 4)

        def square(p, apply=apply, inputs=inputs, keys=keys):
            return jnp.mean(apply(p, *inputs, keys) ** 2)

        found.append(jax.jit(jax.value_and_grad(square))(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), *found)


@pytest.mark.parametrize("remat", [False, True])
def test_loops_are_in_the_program_where_they_are_asked_for(remat):
    """One forward and one backward; without `scan` the blocks follow each other."""
    loops = []
    for scan in (False, True):
        apply, params, inputs = build(scan=scan, remat=remat)
        gradient = jax.grad(lambda p, apply=apply, inputs=inputs: apply(p, *inputs).sum())
        loops.append(jax.jit(gradient).lower(params).as_text().count("stablehlo.while"))
    assert loops == [0, 2]


def test_parameters_are_those_of_any_scan_and_remat():
    """A checkpoint of one serves the other: training may resume with either."""
    trees = [
        abstract_params(dataclasses.replace(SMALL, **options).build(X_SHAPE, LABEL), X_SHAPE, LABEL)
        for options in ({}, {"scan": True}, {"remat": True})
    ]
    assert trees[0] == trees[1] == trees[2]
    assert not is_bound("network.scan")
    assert is_bound("network.patch")


def test_every_input_matters_and_images_do_not_mix():
    """The output of an image depends on its own inputs alone, and on all of its pixels."""
    apply, params, (x, t, label) = build()
    out = apply(params, x, t, label)
    first = np.eye(4)[0]  # of four images
    pixel = np.zeros((4, *X_SHAPE))
    pixel[0, 0, 0] = 1
    for changed in (
        (np.float32(x + pixel), t, label),
        (x, np.float32(t + first), label),
        (x, t, np.int32(label + 3 * first)),  # the null label
    ):
        moved = np.abs(apply(params, *changed) - out)
        assert moved[0].min() > 0
        assert moved[1:].max() == 0
    one = jax.vmap(lambda x, t, label: apply(params, x[None], t[None], label[None])[0])
    np.testing.assert_allclose(one(x, t, label), out, atol=1e-5)


@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_patches_are_undone(patch, rows, columns, channels):
    """unpatchify(patchify(x)) is x; a patch is a square of pixels in the order of rows."""
    x = np.random.default_rng(0).normal(size=(2, rows * patch, columns * patch, channels))
    patches = dit.patchify(x, patch)
    assert patches.shape == (2, rows * columns, patch * patch * channels)
    last = x[:, -patch:, -patch:].reshape(2, -1)
    np.testing.assert_array_equal(patches[:, -1], last)
    np.testing.assert_array_equal(dit.unpatchify(patches, patch, *x.shape[1:3]), x)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 6))
def test_positions_are_products_of_axes(height, width, quarter):
    """The first half knows the column alone, the second the row; a larger grid extends it."""
    features = dit.positions(height, width, 4 * quarter).reshape(height, width, -1)
    column, row = np.split(features, 2, -1)
    assert (column == column[:1]).all()
    assert (row == row[:, :1]).all()
    np.testing.assert_array_equal(column[0, : min(height, width)], row[: min(height, width), 0])
    larger = dit.positions(height + 2, width + 1, 4 * quarter).reshape(height + 2, width + 1, -1)
    np.testing.assert_array_equal(larger[:height, :width], features)
    np.testing.assert_allclose((features**2).sum(-1), 2 * quarter, rtol=1e-6)  # sin^2 + cos^2


@pytest.fixture(scope="module")
def initial():
    """A module and its initial parameters."""
    module = dataclasses.replace(SMALL, scan=True).build(X_SHAPE, LABEL)
    return module, init_params(module, X_SHAPE, LABEL, jax.random.key(0))


def test_it_starts_at_zero_and_every_parameter_learns(initial):
    """adaLN-Zero hides all but the last layer at first; some steps later all have a gradient."""
    module, params = initial
    x, t = jax.random.normal(jax.random.key(1), (8, *X_SHAPE)), jnp.arange(8.0)
    labels = jnp.arange(8) % 4

    @jax.jit
    def step(params):
        def loss(p):
            return jnp.mean((module.apply({"params": p}, x, t, labels) - x) ** 2)

        value, gradient = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.01 * jnp.sign(g), params, gradient), value, gradient

    params, first, gradient = jax.device_get(step(params))
    assert first == pytest.approx(np.mean(np.square(x)))  # of the output 0
    moving = {path[0].key for path, leaf in jax.tree.leaves_with_path(gradient) if leaf.any()}
    assert moving == {"out"}
    for _ in range(4):
        params, last, gradient = jax.device_get(step(params))
    assert last < first
    assert all(leaf.any() for leaf in jax.tree.leaves(gradient))
    for leaf in jax.tree.leaves(gradient["blocks"]):
        assert leaf.reshape(2, -1).any(-1).all()  # in each block


def test_initial_weights_are_those_of_the_paper(initial):
    """Uniform within sqrt(6/(in + out)), for patches and in every block."""
    _, params = initial
    kernels = {**params["blocks"], "patch": params["patch"]}
    for name in ("qkv", "out", "mlp_in", "mlp_out", "patch"):
        kernel = np.asarray(kernels[name]["kernel"])
        bound = np.sqrt(6 / sum(kernel.shape[-2:]))
        assert 0.95 * bound < np.abs(kernel).max() <= bound
        assert kernel.std() == pytest.approx(bound / np.sqrt(3), rel=0.1)
    assert not np.array_equal(*params["blocks"]["qkv"]["kernel"])  # blocks differ
    # Every gate is 0, and so is the output.
    zeros = params["blocks"]["modulation"], params["modulation"], params["out"]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(zeros))


def test_bfloat16_is_near_float32():
    """Parameters and the output stay float32."""
    apply, params, inputs = build()
    half, half_params, _ = build(dtype="bfloat16")
    out, expected = half(params, *inputs), apply(params, *inputs)
    assert out.dtype == jnp.float32
    assert 0 < np.abs(out - expected).max() < 0.03 * np.abs(expected).max()
    assert {leaf.dtype for leaf in jax.tree.leaves(half_params)} == {jnp.dtype("float32")}


def test_any_condition():
    """A dict of a label and a vector, each of whose parts matters; or none."""
    both = Fields((LABEL, Vector(2, "pose")))
    apply, params, (x, t, condition) = build(both)
    out = apply(params, x, t, condition)
    for name, value in {"label": np.zeros(4, np.int32), "pose": np.ones((4, 2), "f")}.items():
        changed = apply(params, x, t, condition | {name: value})
        assert np.abs(changed - out).max() > 1e-3
    apply, params, inputs = build(UNCONDITIONAL)
    assert jax.eval_shape(apply, params, *inputs).shape == x.shape


def test_dropout_is_keyed_by_example_and_block(monkeypatch):
    """An example drops the same units wherever it stands; no two blocks share a mask."""
    used = []

    def recording(keys, h, rate):
        if keys is not None:
            jax.debug.callback(lambda data: used.append(data), jax.random.key_data(keys))
        return dropout(keys, h, rate)

    monkeypatch.setattr("diffjax.nn.dit.dropout", recording)
    apply, params, (x, t, label) = build(dropout=0.5, scan=True)
    keys = example_keys(jax.random.key(0), jnp.arange(4, dtype=jnp.uint32))
    out = jax.block_until_ready(apply(params, x, t, label, keys))
    expected = [jax.vmap(lambda key: jax.random.fold_in(key, i))(keys) for i in range(2)]  # noqa: B023
    jax.effects_barrier()
    found = sorted(np.asarray(used).tolist())
    assert found == sorted(jax.random.key_data(jnp.stack(expected)).tolist())
    turned = apply(params, *(leaf[::-1] for leaf in (x, t, label, keys)))
    np.testing.assert_allclose(turned[::-1], out, atol=1e-5)
    assert np.abs(apply(params, x, t, label, keys[::-1]) - out).max() > 1e-3


# ------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    ("size", "parameters"),
    # Those of DiT's and SiT's published networks, and of arXiv:2212.09748, table 1, in millions.
    [("S", 32_865_056), ("B", 130_315_808), ("L", 457_840_672), ("XL", 674_834_720)],
)
def test_parameter_counts_of_the_paper(size, parameters):
    labels, x_shape = ClassLabel(1000), (32, 32, 4)
    module = dit.dit(size, patch=2, learned_variance=True).build(x_shape, labels)
    leaves = jax.tree.leaves(abstract_params(module, x_shape, labels))
    assert sum(leaf.size for leaf in leaves) == parameters


def test_sizes_and_storage():
    """A size takes changes; a configuration is stored by the name dit."""
    config = Config(network=dit.dit("B", 4, dropout=0.2))
    assert (config.network.width, config.network.patch, config.network.dropout) == (768, 4, 0.2)
    config.check()
    stored = json.loads(json.dumps(config_to_dict(config)))
    assert stored["network"]["kind"] == "dit"
    assert config_from_dict(stored) == config
    assert isinstance(DiTConfig().build((8, 8, 1)), DiT)
    with pytest.raises(ValueError, match=naming("XXL", "S", "B", "L", "XL")):
        dit.dit("XXL")


@pytest.mark.parametrize(
    ("options", "x_shape", "names"),
    [
        ({"patch": 4}, (8, 6, 1), ("network.patch", 4, "8x6")),
        ({"heads": 3}, X_SHAPE, ("network.heads", 3, "network.width", 16)),
        ({"width": 18, "heads": 2}, X_SHAPE, ("network.width", 18, 4)),
        ({"depth": 0}, X_SHAPE, ("network.depth", 0)),
        ({"mlp_norm_epsilon": 0.0}, X_SHAPE, ("network.mlp_norm_epsilon", 0)),
        ({"frequency_shift": 128.0}, X_SHAPE, ("network.frequency_shift", 128)),
        ({"dropout": 1.0}, X_SHAPE, ("network.dropout", 1)),
    ],
)
def test_values_that_cannot_be_built(options, x_shape, names):
    module = dataclasses.replace(SMALL, **options).build(x_shape, UNCONDITIONAL)
    with pytest.raises(ValueError, match=naming(*names)):
        abstract_params(module, x_shape, UNCONDITIONAL)


def test_inputs_that_do_not_fit():
    module, key = SMALL.build(X_SHAPE, LABEL), jax.random.key(0)
    for inputs, names in (
        ((jnp.zeros((1, 4, 4)), jnp.zeros(1), jnp.zeros(1, int)), ("x", 4)),
        ((jnp.zeros((1, *X_SHAPE)), jnp.zeros(1)), ("condition", "classes", 3)),
        ((jnp.zeros((1, *X_SHAPE)), jnp.zeros(1), {"label": jnp.zeros(1)}), ("condition",)),
    ):
        with pytest.raises(ValueError, match=naming(*names)):
            jax.eval_shape(module.init, key, *inputs)
    with pytest.raises(ValueError, match=naming("features", 6, 4)):
        dit.positions(2, 2, 6)
