import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax import loss, process, schedule
from diffjax.models.unet import UNet
from diffjax.training import parallel
from diffjax.training.step import ema_decay, init_state, make_eval_step, make_train_step, step_key

UNET = UNet(channels=4, out_channels=1, multipliers=(1,), blocks=1, num_classes=3, dropout=0.1)


def objective():
    def network(params, x, t, condition, keys):
        return UNET.apply(params, x, t, condition, keys)

    return loss.denoising(network, process.PREDICTIONS["eps"], schedule.linear(100), null=3, drop_rate=0.2)


def params():
    return jax.jit(UNET.init)(jax.random.key(0), jnp.zeros((1, 4, 4, 1)), jnp.zeros(1), jnp.zeros(1, jnp.int32))


def batch(n, size=16):
    index = np.arange(n * size, (n + 1) * size, dtype=np.uint32)
    image = np.random.default_rng(n).uniform(-1, 1, (size, 4, 4, 1)).astype(np.float32)
    return {"image": image, "label": (index % 3).astype(np.int32), "index": index}


def train(devices, steps=20, optimizer=None):
    # SGD: Adam would hide a gradient that is too large by a constant.
    optimizer = optimizer or optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.3))
    step = parallel.pmap(make_train_step(objective(), optimizer, 0.9, seed=5), jax.devices()[:devices], donate=True)
    state = jax.device_put(
        init_state(params(), optimizer), parallel.whole(parallel.device_mesh(jax.devices()[:devices]))
    )
    for n in range(steps):
        state, metrics = step(state, parallel.shard(batch(n), devices))
    return jax.device_get((state, metrics))


@pytest.fixture(scope="module")
def on_one_device():
    return train(1)


def test_eight_devices_train_the_same_parameters_as_one(on_one_device):
    state, metrics = train(8)
    moved = np.abs(optax.tree.sub(on_one_device[0].params, params())["params"]["out"]["kernel"]).max()
    assert moved > 0.01
    chex.assert_trees_all_close(state, on_one_device[0], rtol=1e-7, atol=1e-5)
    chex.assert_trees_all_close(metrics, on_one_device[1], rtol=1e-4)
    # No device axis anywhere, and a state that is reused in place at every step.
    assert jax.tree.map(jnp.shape, state.params) == jax.tree.map(jnp.shape, params())
    assert int(state.step) == 20


def test_plain_jit_runs_the_same_step(on_one_device):
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.3))
    step = jax.jit(make_train_step(objective(), optimizer, 0.9, seed=5))
    state = init_state(params(), optimizer)
    for n in range(20):
        state, _ = step(state, batch(n))
    chex.assert_trees_all_close(state.params, on_one_device[0].params, rtol=1e-7, atol=1e-5)


def test_the_average_is_its_closed_form():
    """After n steps: sum over the parameters of every step, weighted by the decays that came after it."""

    def objective(params, batch, key):
        return (params - batch["image"]) ** 2

    step = make_train_step(objective, optax.sgd(0.1), ema_limit=0.5, seed=0)
    state, history = init_state(jnp.float32(1.0), optax.sgd(0.1)), [1.0]
    for n in range(8):
        state, _ = step(state, {"image": jnp.full(1, n / 10), "index": jnp.zeros(1, jnp.uint32)})
        history.append(float(state.params))
    decays = [min(0.5, (1 + n) / (10 + n)) for n in range(8)]
    weights = [np.prod(decays)] + [(1 - decays[n]) * np.prod(decays[n + 1 :]) for n in range(8)]
    assert sum(weights) == pytest.approx(1)
    assert float(state.ema) == pytest.approx(np.dot(weights, history), abs=1e-6)


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


def test_evaluation_draws_the_same_every_time():
    step = parallel.pmap(make_eval_step(objective(), seed=1))
    losses = [float(step(params(), parallel.shard(batch(0), 8))) for _ in range(2)]
    assert losses[0] == losses[1] > 0


def test_a_batch_that_cannot_be_shared_is_named():
    with pytest.raises(
        ValueError, match=r"train.batch is 12, which 8 devices cannot share equally: use a multiple of 8"
    ):
        parallel.check_divisible(12, 8, "train.batch")
