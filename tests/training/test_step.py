import typing
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax import loss, parameterization, process, schedule
from diffjax.devices import parallel
from diffjax.loss import ExampleLoss
from diffjax.nn.conditioning import ClassLabel
from diffjax.nn.unet import UNetConfig
from diffjax.training.state import init_state, step_key
from diffjax.training.step import (
    QUARTILES,
    make_eval_step,
    make_train_step,
    multi_step,
    value_and_grad_accumulated,
)

MODES = typing.get_args(parallel.Mode)
UNET = UNetConfig(channels=4, multipliers=(1,), dropout=0.1).build((4, 4, 1), ClassLabel(3))


def small(params, x, t, label, keys=None):
    """Two layers with a label, a time and dropout: all that devices could share out wrongly."""
    hidden = x.reshape(len(x), -1) @ params["in"] + params["label"][label] + t[:, None] / 100
    kept = 1.0
    if keys is not None:
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.9, hidden.shape[1:]))(keys)
    return ((jnp.tanh(hidden) * kept) @ params["out"]).reshape(x.shape)


def small_params():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"in": (16, 8), "label": (4, 8), "out": (8, 16)}
    return {
        name: 0.3 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def unet_params():
    inputs = jnp.zeros((1, 4, 4, 1)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    return jax.jit(UNET.init)(jax.random.key(0), *inputs)


SMALL, WHOLE = (small, small_params), (UNET.apply, unet_params)


def objective(network=small):
    eps = parameterization.ddpm(process.PREDICTIONS["eps"])
    return loss.denoising_loss(network, eps, schedule.linear(100), null=3, drop_rate=0.2)


def batch(n, size=16):
    index = np.arange(n * size, (n + 1) * size, dtype=np.uint32)
    x = np.random.default_rng(n).uniform(-1, 1, (size, 4, 4, 1)).astype(np.float32)
    return {"x": x, "condition": (index % 3).astype(np.int32), "index": index}


def stacked(numbers):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *map(batch, numbers))


# SGD: Adam would hide a gradient that is too large by a constant.
SGD = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.3))


def train(devices, mode="pmap", net=SMALL, steps=20, per_dispatch=1, **options):
    """The state and the last metrics after steps in which the state's memory was reused."""
    mesh, (network, params) = parallel.device_mesh(jax.devices()[:devices]), net
    train_step = multi_step(make_train_step(objective(network), SGD, (0.9,), seed=5, **options))
    step = parallel.parallelize(mesh, mode, train_step, axis=1, donate=True)
    home = parallel.replicated(parallel.state_mesh(mesh, mode))
    state = jax.device_put(init_state(params(), SGD), home)
    for first in range(0, steps, per_dispatch):
        batches = stacked(range(first, first + per_dispatch))
        shares = parallel.shard_batch(mesh, mode, batches, axis=1)
        if (first, devices) == (0, 4):  # every byte of the state is reused: there is no second copy
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            assert step.lower(state, shares).compile().memory_analysis().alias_size_in_bytes == size
        before = state
        state, metrics = step(before, shares)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    return jax.device_get((state, jax.tree.map(lambda leaf: leaf[-1], metrics)))


def assert_same(found, expected):
    chex.assert_trees_all_close(found[0], expected[0], rtol=1e-7, atol=1e-5)
    chex.assert_trees_all_close(found[1], expected[1], rtol=1e-4)


@pytest.fixture(scope="module")
def on_one_device():
    return train(1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_devices_and_modes(on_one_device, mode, devices):
    """Any number of devices in any mode trains the same parameters."""
    state, metrics = on_one_device if (mode, devices) == ("pmap", 1) else train(devices, mode)
    assert np.abs(on_one_device[0].params["out"] - small_params()["out"]).max() > 0.01
    assert_same((state, metrics), on_one_device)
    # There is no device axis anywhere.
    assert jax.tree.map(jnp.shape, state.params) == jax.tree.map(jnp.shape, small_params())
    assert int(state.step) == 20


def test_vmap_stands_for_devices(on_one_device):
    step = jax.jit(
        jax.vmap(
            lambda state, batch: make_train_step(objective(), SGD, (0.9,), 5)(state, batch, "data"),
            in_axes=(None, 0),
            axis_name="data",
        )
    )
    state = init_state(small_params(), SGD)
    for n in range(20):
        shares = jax.tree.map(lambda leaf: leaf.reshape(4, 4, *leaf.shape[1:]), batch(n))
        states, metrics = step(state, shares)
        state, metrics = (jax.tree.map(lambda leaf: leaf[3], tree) for tree in (states, metrics))
    assert_same((state, metrics), on_one_device)


def test_a_unet_on_eight_devices():
    one, eight = train(1, "pmap", WHOLE), train(8, "shard_map", WHOLE)
    kernels = (params["params"]["out"]["kernel"] for params in (one[0].params, unet_params()))
    assert np.abs(np.subtract(*kernels)).max() > 0.01
    assert_same(eight, one)


@pytest.mark.parametrize("mode", MODES)
def test_accumulation_and_dispatches(on_one_device, mode):
    """A batch in parts, and several steps in one call, train the same parameters."""
    assert_same(train(2, mode, per_dispatch=5, accumulate=4), on_one_device)


def test_accumulated_gradients_are_those_of_the_batch():
    functions = [
        jax.jit(partial(value_and_grad_accumulated, objective(), accumulate=parts))
        for parts in (1, 4)
    ]
    whole, parts = (each(small_params(), batch(0), step_key(5, 0)) for each in functions)
    chex.assert_trees_all_close(parts, whole, rtol=1e-5, atol=1e-7)


def test_averages_have_their_closed_form():
    """After n steps: all parameters, weighted by the decays that came after them."""

    def objective(params, batch, key):
        return ExampleLoss((params - batch["x"]) ** 2, batch["index"])

    step = make_train_step(objective, optax.sgd(0.1), (0.5, 0.2), seed=0)
    state, history = init_state(jnp.float32(1.0), optax.sgd(0.1), averages=2), [1.0]
    for n in range(8):
        state, _ = step(state, {"x": jnp.full(1, n / 10), "index": jnp.zeros(1, jnp.uint32)})
        history.append(float(state.params))
    for limit, average in zip((0.5, 0.2), state.ema, strict=True):
        decays = [min(limit, (1 + n) / (10 + n)) for n in range(8)]
        weights = [np.prod(decays)] + [(1 - decays[n]) * np.prod(decays[n + 1 :]) for n in range(8)]
        assert sum(weights) == pytest.approx(1)
        assert float(average) == pytest.approx(np.dot(weights, history), abs=1e-6)


def test_skipped_steps_change_nothing_but_their_count():
    """Adam, so that there is an optimizer state that could be spoilt."""

    def objective(params, batch, key):
        return ExampleLoss(jnp.log(params * batch["x"]), jnp.zeros(1, jnp.int32))

    adam = optax.adam(0.1)
    train_step = make_train_step(objective, adam, (0.9,), 0, rate=lambda n: n)
    step, x = jax.jit(multi_step(train_step)), jnp.array([2.0, 0.0, -1.0, jnp.inf, 3.0])[:, None]
    # log: finite, -inf, nan, inf, finite
    state, metrics = step(init_state(jnp.float32(1.0), adam), {"x": x})
    without, expected = step(init_state(jnp.float32(1.0), adam), {"x": x[jnp.array([0, 4])]})
    assert (int(state.step), int(state.skipped)) == (5, 3)
    assert metrics["skipped"].tolist() == [0, 1, 2, 3, 3]
    # The learning rate is that of the updates, without the skipped steps.
    assert metrics["learning_rate"].tolist() == [0, 1, 1, 1, 1]
    chex.assert_trees_all_equal(
        (state.params, state.opt_state), (without.params, without.opt_state)
    )
    assert metrics["loss"][4] == expected["loss"][1]
    for average in (state.ema[0], without.ema[0]):
        assert jnp.isfinite(average)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_quartiles(accumulate):
    """The loss is the mean of those of the quartiles, weighted by their examples."""
    index = jnp.arange(64, dtype=jnp.uint32)
    value, quartile = jnp.exp(index / 10), jnp.array([0, 3, 3, 1])[(index * 7) % 4]

    def objective(params, batch, key):
        i = batch["index"]
        return ExampleLoss(params + value[i], quartile[i])

    step = make_train_step(
        objective, optax.sgd(0.1), (0.9,), 3, accumulate=accumulate, log_quartiles=True
    )
    state = init_state(jnp.float32(0.0), optax.sgd(0.1))
    _, metrics = jax.jit(step)(state, {"index": index})
    assert metrics["loss"] == pytest.approx(float(value.mean()), rel=1e-5)
    for i, name in enumerate(QUARTILES):
        mean = np.asarray(value)[quartile == i].mean() if i != 2 else np.nan
        assert metrics[name] == pytest.approx(mean, rel=1e-5, nan_ok=True)


def test_an_empty_quartile_hides_no_other():
    """A loss that is not a number stays in its own quartile."""

    def objective(params, batch, key):
        return ExampleLoss(params + batch["x"], batch["index"])

    step = make_train_step(objective, optax.sgd(0.1), (0.9,), 3, log_quartiles=True)
    data = {"x": jnp.array([1.0, jnp.nan, 3.0]), "index": jnp.array([0, 1, 2])}
    _, metrics = step(init_state(jnp.float32(0.0), optax.sgd(0.1)), data)
    values = [float(metrics[name]) for name in QUARTILES]
    assert values == pytest.approx([1, np.nan, 3, np.nan], nan_ok=True)


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_is_repeatable(mode):
    mesh = parallel.device_mesh()
    step = parallel.parallelize(mesh, mode, make_eval_step(objective(), seed=1))
    losses = [
        float(step(small_params(), parallel.shard_batch(mesh, mode, batch(0)))) for _ in range(2)
    ]
    assert losses[0] == losses[1] > 0
