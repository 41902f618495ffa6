import typing

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import naming

from diffjax import loss, process, schedule
from diffjax.devices import parallel
from diffjax.nn.unet import UNet
from diffjax.training.step import QUARTERS, ema_decay, init_state, make_eval_step, make_train_step, multi_step, step_key

UNET = UNet(channels=4, out_channels=1, multipliers=(1,), blocks=1, num_classes=3, dropout=0.1)


def small(params, x, t, label, keys):
    """Two layers with a label, a time and dropout: all that a UNet has which devices could share out wrongly."""
    hidden = jnp.tanh(x.reshape(len(x), -1) @ params["in"] + params["label"][label] + t[:, None] / 100)
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.9, hidden.shape[1:]))(keys)
    return ((hidden * kept) @ params["out"]).reshape(x.shape)


def small_params():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"in": (16, 8), "label": (4, 8), "out": (8, 16)}
    return {name: 0.3 * jax.random.normal(key, shapes[name]) for name, key in zip(shapes, keys, strict=True)}


def unet_params():
    return jax.jit(UNET.init)(jax.random.key(0), jnp.zeros((1, 4, 4, 1)), jnp.zeros(1), jnp.zeros(1, jnp.int32))


SMALL, WHOLE = (small, small_params), (UNET.apply, unet_params)


def objective(network=small):
    return loss.denoising_loss(network, process.PREDICTIONS["eps"], schedule.linear(100), null=3, drop_rate=0.2)


def batch(n, size=16):
    index = np.arange(n * size, (n + 1) * size, dtype=np.uint32)
    image = np.random.default_rng(n).uniform(-1, 1, (size, 4, 4, 1)).astype(np.float32)
    return {"image": image, "label": (index % 3).astype(np.int32), "index": index}


# SGD: Adam would hide a gradient that is too large by a constant.
SGD = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.3))


def train(devices, mode="pmap", net=SMALL, steps=20, per_dispatch=1, **options):
    mesh, (network, params) = parallel.device_mesh(jax.devices()[:devices]), net
    train_step = multi_step(make_train_step(objective(network), SGD, (0.9,), seed=5, **options))
    step = parallel.parallelize(mesh, mode, train_step, axis=1, donate=True)
    state = jax.device_put(init_state(params(), SGD), parallel.replicated(parallel.state_mesh(mesh, mode)))
    for first in range(0, steps, per_dispatch):
        together = jax.tree.map(lambda *leaves: np.stack(leaves), *map(batch, range(first, first + per_dispatch)))
        shares = parallel.shard_batch(mesh, mode, together, axis=1)
        if (first, devices) == (0, 4):  # the state is reused in place, every byte of it: no second copy
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            assert step.lower(state, shares).compile().memory_analysis().alias_size_in_bytes == size
        before = state
        state, metrics = step(before, shares)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    return jax.device_get((state, jax.tree.map(lambda leaf: leaf[-1], metrics)))


@pytest.fixture(scope="module")
def on_one_device():
    return train(1)


@pytest.mark.parametrize("mode", typing.get_args(parallel.Mode))
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_any_number_of_devices_in_any_mode_trains_the_same_parameters(on_one_device, mode, devices):
    state, metrics = on_one_device if (mode, devices) == ("pmap", 1) else train(devices, mode)
    assert np.abs(on_one_device[0].params["out"] - small_params()["out"]).max() > 0.01
    chex.assert_trees_all_close(state, on_one_device[0], rtol=1e-7, atol=1e-5)
    chex.assert_trees_all_close(metrics, on_one_device[1], rtol=1e-4)
    # No device axis anywhere.
    assert jax.tree.map(jnp.shape, state.params) == jax.tree.map(jnp.shape, small_params())
    assert int(state.step) == 20


def test_eight_devices_train_the_same_unet_as_one():
    (one, its), (eight, theirs) = train(1, "pmap", WHOLE), train(8, "shard_map", WHOLE)
    assert np.abs(one.params["params"]["out"]["kernel"] - unet_params()["params"]["out"]["kernel"]).max() > 0.01
    chex.assert_trees_all_close(eight, one, rtol=1e-7, atol=1e-5)
    chex.assert_trees_all_close(theirs, its, rtol=1e-4)


@pytest.mark.parametrize("mode", typing.get_args(parallel.Mode))
def test_a_batch_in_parts_and_steps_together_train_the_same_parameters(on_one_device, mode):
    state, metrics = train(2, mode, per_dispatch=5, accumulate=4)
    chex.assert_trees_all_close(state, on_one_device[0], rtol=1e-7, atol=1e-5)
    chex.assert_trees_all_close(metrics, on_one_device[1], rtol=1e-4)


def test_the_average_is_its_closed_form():
    """After n steps: sum over the parameters of every step, weighted by the decays that came after it."""

    def objective(params, batch, key):
        return (params - batch["image"]) ** 2

    step = make_train_step(objective, optax.sgd(0.1), (0.5, 0.2), seed=0)
    state, history = init_state(jnp.float32(1.0), optax.sgd(0.1), averages=2), [1.0]
    for n in range(8):
        state, _ = step(state, {"image": jnp.full(1, n / 10), "index": jnp.zeros(1, jnp.uint32)})
        history.append(float(state.params))
    for limit, average in zip((0.5, 0.2), state.ema, strict=True):
        decays = [min(limit, (1 + n) / (10 + n)) for n in range(8)]
        weights = [np.prod(decays)] + [(1 - decays[n]) * np.prod(decays[n + 1 :]) for n in range(8)]
        assert sum(weights) == pytest.approx(1)
        assert float(average) == pytest.approx(np.dot(weights, history), abs=1e-6)


def test_a_step_without_a_sound_gradient_counts_and_changes_nothing_else():
    """Adam, so that there is a state that could be spoilt."""
    adam = optax.adam(0.1)
    step = jax.jit(
        multi_step(make_train_step(lambda p, b, key: jnp.log(p * b["image"]), adam, (0.9,), 0, rate=lambda n: n))
    )
    images = jnp.array([2.0, 0.0, -1.0, jnp.inf, 3.0])[:, None]  # log: sound, -inf, nan, inf, sound
    state, metrics = step(init_state(jnp.float32(1.0), adam), {"image": images})
    without, its = step(init_state(jnp.float32(1.0), adam), {"image": images[jnp.array([0, 4])]})
    assert (int(state.step), int(state.skipped)) == (5, 3)
    assert metrics["skipped"].tolist() == [0, 1, 2, 3, 3]
    assert metrics["learning_rate"].tolist() == [0, 1, 1, 1, 1]  # a schedule goes by the steps that were taken
    chex.assert_trees_all_equal((state.params, state.opt_state), (without.params, without.opt_state))
    assert metrics["loss"][4] == its["loss"][1]
    for average in (state.ema[0], without.ema[0]):
        assert jnp.isfinite(average)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_loss_is_told_by_quarters_of_the_levels(accumulate):
    """A loss that is t itself: its mean is the mean of the four, weighted by how many there are."""
    T, index = 100, jnp.arange(64, dtype=jnp.uint32)
    draw = lambda key, index: loss.sample_t(loss.uniform, key, index, T)  # noqa: E731
    step = make_train_step(
        lambda p, b, key: p + draw(key, b["index"]).astype(jnp.float32), optax.sgd(0.1), (0.9,), 3,
        accumulate=accumulate, quarters=loss.t_quartile(loss.uniform, T),
    )  # fmt: skip
    _, metrics = jax.jit(step)(init_state(jnp.float32(0.0), optax.sgd(0.1)), {"index": index})
    t = np.asarray(draw(step_key(3, 0), index))
    for i, (low, high) in enumerate([(1, 25), (26, 50), (51, 75), (76, 100)]):
        assert metrics[QUARTERS[i]] == pytest.approx(t[(low <= t) & (t <= high)].mean(), rel=1e-5)
    assert metrics["loss"] == pytest.approx(t.mean(), rel=1e-5)


def test_decay_warms_up_to_its_limit():
    decays = ema_decay(jnp.arange(20_000), 0.999)
    assert decays[0] == pytest.approx(0.1)
    assert (np.diff(decays) >= 0).all()
    assert decays[-1] == pytest.approx(0.999)


def test_keys_differ_by_seed_step_and_example():
    index = jnp.arange(50, dtype=jnp.uint32)
    keys = [
        jax.random.key_data(loss.example_keys(step_key(seed, step), index)) for seed in (0, 1) for step in (0, 1, 2)
    ]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 300


@pytest.mark.parametrize("mode", typing.get_args(parallel.Mode))
def test_evaluation_draws_the_same_every_time(mode):
    mesh = parallel.device_mesh()
    step = parallel.parallelize(mesh, mode, make_eval_step(objective(), seed=1))
    losses = [float(step(small_params(), parallel.shard_batch(mesh, mode, batch(0)))) for _ in range(2)]
    assert losses[0] == losses[1] > 0


def test_a_batch_that_cannot_be_shared_is_named():
    with pytest.raises(ValueError, match=naming("train.batch", 12, 8)):
        parallel.check_divisible(12, 8, "train.batch")
    with pytest.raises(ValueError, match=naming("batch", 24, 8, 2, 16)):
        parallel.check_divisible(24, 8, parts=2)
