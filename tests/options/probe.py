"""A network whose output is a table by class, and spies that end a program at a call.

What a program with this network should do has a closed form, and it compiles in no time.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn

from diffjax import loss
from diffjax.build import ModelInfo, build_optimizer
from diffjax.checkpoint import Checkpoints
from diffjax.cli import main
from diffjax.config import Config, Data, Diffusion, Train
from diffjax.nn import registry
from diffjax.nn.conditioning import ClassLabel, Conditioning
from diffjax.training import setup, trainer
from diffjax.training.state import init_state, state_to_trees

SHAPE, CLASSES = (8, 8, 1), 10
TRACED: list[int] = []  # batches that networks in training are traced with


@dataclass(frozen=True)
class ProbeConfig(registry.NetworkConfig):
    """A table of outputs by class."""

    fill: float = 0.0
    """Mean of the initial table."""
    spread: float = 0.0
    """Standard deviation of the initial table."""

    def build(self, x_shape, conditioning):
        """The module for x of shape [B, *x_shape]."""
        return Probe(self, tuple(x_shape), conditioning)


class Probe(nn.Module):
    """The row of the table for each condition, and a parameter that has no effect."""

    config: ProbeConfig
    shape: tuple[int, ...]
    conditioning: Conditioning

    @nn.compact
    def __call__(self, x, t, condition=None, keys=None):
        """The output, float32 of the shape of x."""
        if keys is not None:
            TRACED.append(len(x))
        config = self.config

        def init(key, shape):
            return config.fill + config.spread * jax.random.normal(key, shape)

        table = self.param("table", init, (CLASSES + 1, *self.shape))
        idle = self.param("idle", nn.initializers.ones, ())
        leaves = [leaf for leaf in jax.tree.leaves(condition) if leaf.dtype == np.int32]
        labels = leaves[0] if leaves else np.zeros(len(x), np.int32)
        return table[labels] + 0 * idle


registry.register("probe", ProbeConfig)

# ------------------------------------------------------------------------------- runs


def table_of(value):
    """A table whose rows differ, and whose pixels do; others for another value."""
    r = np.random.default_rng(round(1000 * value))
    return r.uniform(-0.6, 0.6, (CLASSES + 1, *SHAPE)).astype(np.float32)


def params_of(value):
    """Parameters that tell their value by `idle`."""
    return {"table": table_of(value), "idle": np.float32(value)}


def write_run(folder, data, values, **diffusion):
    """A run folder of the probe, which predicts x0, without training.

    values: by step, those of `params_of` of the raw parameters and of each average.
    """
    decays = (0.9, 0.5)
    config = Config(
        data=Data(source="npz", path=str(data)),
        network=ProbeConfig(),
        diffusion=Diffusion(**{"schedule": "cosine", "T": 20, "prediction": "x0"} | diffusion),
        train=Train(ema=decays, batch=16),
    )
    info, checkpoints = ModelInfo(config, SHAPE, ClassLabel(CLASSES)), Checkpoints(folder)
    for step, (raw, *averages) in values.items():
        state = init_state(params_of(raw), build_optimizer(config)[0], len(decays))
        state = state._replace(
            step=state.step + step, ema=tuple(params_of(value) for value in averages)
        )
        checkpoints.save(step, state_to_trees(jax.tree.map(np.asarray, state)), info.to_dict())
    checkpoints.close()
    return folder


# ------------------------------------------------------------------------------- spies


class Arrived(Exception):  # noqa: N818 (no error)
    """A program came to the call that a test waits for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("arrived")
        self.args_, self.kwargs = args, kwargs


def arrive(*args, **kwargs):
    """A function that ends the program with its arguments."""
    raise Arrived(*args, **kwargs)


def words_of(*words):
    """The words of a command line; those in one text are split at spaces."""
    return [each for word in words for each in str(word).split()]


def call(place, *words):
    """The arguments with which a command calls a function, where the command is ended.

    place: (object, name of the function).
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*place, arrive)
        with pytest.raises(Arrived) as arrived:
            main(words_of(*words))
    return arrived.value


def calls(place, *words, result=None, function=None):
    """The arguments of all calls of a function by a command, which runs to its end.

    function: called in its place, else `result` is returned.
    """
    found = []

    def spy(*args, **kwargs):
        found.append((args, kwargs))
        return function(*args, **kwargs) if function else result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*place, spy)
        main(words_of(*words))
    return found


def opened(config, folder, *words):
    """A session that `train` has opened, and what it gives to its loss and to its step."""
    losses, steps = [], []

    def spy(found, function):
        def called(*args, **kwargs):
            value = function(*args, **kwargs)
            found.append(SimpleNamespace(args=args, kwargs=kwargs, value=value))
            return value

        return called

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "denoising_loss", spy(losses, loss.denoising_loss))
        patch.setattr(setup, "make_train_step", spy(steps, setup.make_train_step))
        arrived = call((trainer, "run"), "train", config, "--workdir", folder, *words)
    session = arrived.args_[0]
    session.checkpoints.close()
    return SimpleNamespace(session=session, loss=losses[0], step=steps[0])


def is_same(a, b):
    """Whether two plans, or other trees of arrays, are equal."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(*pair) for pair in pairs)
