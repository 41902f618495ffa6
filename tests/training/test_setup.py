import dataclasses
import typing

import chex
import jax
import numpy as np
import pytest
from helpers import naming

from diffjax.build import ModelInfo
from diffjax.devices import parallel
from diffjax.nn.conditioning import UNCONDITIONAL, ClassLabel, Fields, Vector
from diffjax.training.setup import ParallelTraining, build_training
from diffjax.training.step import QUARTILES

from .conftest import CONFIG, LABEL, SHAPE, with_train

CONDITIONINGS = {
    "none": UNCONDITIONAL,
    "label": LABEL,
    "vector": Vector(3),
    "fields": Fields((ClassLabel(4), Vector(2, "pose"))),
}


def batches(conditioning, steps=2, size=8):
    """Random batches [steps, size, ...]."""
    r = np.random.default_rng(0)
    x = r.uniform(-1, 1, (steps, size, *SHAPE)).astype(np.float32)
    index = np.arange(steps * size, dtype=np.uint32).reshape(steps, size)
    condition = jax.tree.map(np.asarray, conditioning.zeros(size))
    condition = jax.tree.map(lambda leaf: np.stack([leaf] * steps), condition)
    present = {} if condition is None else {"condition": condition}
    return {"x": x, "index": index, **present}


def test_dropout_needs_a_null_condition():
    """Labels without a null are trained at condition dropout 0 alone."""
    info = ModelInfo(CONFIG, SHAPE, ClassLabel(10, has_null_label=False))
    with pytest.raises(ValueError, match=naming("train.condition_dropout", 0.1)):
        build_training(info)
    build_training(info._replace(config=with_train(CONFIG, condition_dropout=0.0)))


@pytest.mark.parametrize("kind", CONDITIONINGS)
def test_every_conditioning_is_trained(kind):
    training = build_training(ModelInfo(CONFIG, SHAPE, CONDITIONINGS[kind]))
    state = training.init(jax.random.key(0))
    state, metrics = jax.jit(training.step)(state, batches(CONDITIONINGS[kind]))
    assert (int(state.step), int(state.skipped)) == (2, 0)
    assert np.isfinite(metrics["loss"]).all()
    assert set(metrics) == {"loss", "grad_norm", "skipped", "learning_rate", *QUARTILES}


def test_held_out_loss_is_comparable():
    """Neither the weighting nor the dropout of the training changes it."""
    network = dataclasses.replace(CONFIG.network, dropout=0.5)
    other = with_train(CONFIG, weighting="min_snr", times="stratified", condition_dropout=0.5)
    losses, batch = [], jax.tree.map(lambda leaf: leaf[0], batches(LABEL))
    for config in (CONFIG, dataclasses.replace(other, network=network)):
        training = build_training(ModelInfo(config, SHAPE, LABEL))
        params = training.init(jax.random.key(0)).params
        params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # no layer is zero
        losses.append(float(jax.jit(training.eval_step)(params, batch)))
    assert losses[0] == losses[1] > 0


@pytest.fixture(scope="module")
def on_one_device():
    """The data, and the first state, the last state and its losses on one device."""
    training = build_training(ModelInfo(with_train(CONFIG, warmup=0), SHAPE, LABEL))
    data, first = batches(LABEL), jax.jit(training.init)(jax.random.key(7))
    last, metrics = jax.jit(training.step)(first, data)
    return data, jax.device_get(first), jax.device_get(last), metrics["loss"]


@pytest.mark.parametrize("mode", typing.get_args(parallel.Mode))
def test_parallel_training(mode, on_one_device):
    """All devices train what one does."""
    config, (data, first, last, losses) = with_train(CONFIG, parallel=mode, warmup=0), on_one_device
    parts = ParallelTraining(build_training(ModelInfo(config, SHAPE, LABEL)), config.train)
    state = parts.init_state(7)
    chex.assert_trees_all_equal(jax.device_get(state), first)
    state, metrics = parts.step(parts.place_state(parts.global_state(state)), data)
    chex.assert_trees_all_close(metrics["loss"], losses, rtol=1e-4)
    chex.assert_trees_all_close(jax.device_get(state.params), last.params, atol=1e-3)
