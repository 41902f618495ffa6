"""A small run on the digits, and functions that write run folders without training them."""

import dataclasses

import jax
import pytest

from diffjax.build import ModelInfo, build_module, build_optimizer, init_params
from diffjax.checkpoint import Checkpoints
from diffjax.config import Config, Data, Diffusion, Distillation, Train
from diffjax.nn import registry
from diffjax.nn.conditioning import ClassLabel
from diffjax.training.state import init_state, state_to_trees
from tests.plugin.small import SmallConfig

registry.register("small", SmallConfig)
SHAPE, LABEL = (8, 8, 1), ClassLabel(10)
CONFIG = Config(
    data=Data(name="digits"),
    network=SmallConfig(),
    diffusion=Diffusion(schedule="cosine", T=20),
    train=Train(batch=8, save_every=1, log_every=1, eval_every=0, preview_every=0),
)


def with_train(config, **fields):
    """The configuration with other fields of its training."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **fields))


def student_of(method, steps, guidance=1.0):
    """The configuration of a student."""
    return dataclasses.replace(
        with_train(CONFIG, condition_dropout=0.0, weighting="truncated_snr"),
        diffusion=dataclasses.replace(CONFIG.diffusion, prediction="v"),
        distillation=Distillation(method, "a teacher", 4, steps, guidance),
    )


def write_run(folder, config, conditioning=LABEL, seed=0):
    """A run folder of step 3 with random weights, none of them zero."""
    info = ModelInfo(config, SHAPE, conditioning)
    params = init_params(info, build_module(info), jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    state = init_state(tree.unflatten(noisy), build_optimizer(config)[0])
    state = state._replace(step=state.step + 3)
    checkpoints = Checkpoints(folder)
    checkpoints.save(3, state_to_trees(state), info.to_dict())
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory):
    """The run folder of a teacher."""
    return write_run(tmp_path_factory.mktemp("runs") / "teacher", CONFIG)
