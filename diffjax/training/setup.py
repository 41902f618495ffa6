"""The functions that train a network, for one device and compiled for all."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax

from diffjax import loss
from diffjax.build import (
    ModelInfo,
    build_module,
    build_network,
    build_optimizer,
    build_parameterization,
    build_schedule,
    build_times,
    build_weighting,
    init_params,
)
from diffjax.config import Train
from diffjax.denoiser import Network
from diffjax.devices import parallel
from diffjax.loss import Objective
from diffjax.training.reconstruction import reconstruction_loss
from diffjax.training.state import TrainState, init_state
from diffjax.training.step import Metrics, TrainStep, make_eval_step, make_train_step, multi_step


class Training(NamedTuple):
    """The functions that train a network, for one device.

    Those of a student (`distill.build_distillation`) take its teacher's parameters as one more
    argument after those given here.
    """

    module: nn.Module
    network: Callable[..., jax.Array]  # as `build.build_network` returns it
    init: Callable[..., TrainState]  # key -> state before the first step
    step: TrainStep  # (state, batches [K, B, ...], axis_name=None) -> (state, metrics [K])
    eval_step: Callable[..., jax.Array]  # (params, batch [B, ...], axis_name=None) -> loss


def build_training(info: ModelInfo) -> Training:
    """The functions that train a model on data.

    Raises: ValueError for parts of the configuration that do not fit each other.
    """
    config, train = info.config, info.config.train
    module = build_module(info)
    network, (optimizer, rate) = build_network(info, module), build_optimizer(config)
    objective, held_out = _objectives(info, module, network)
    step = make_train_step(
        objective,
        optimizer,
        train.ema,
        train.seed,
        power_lengths=train.power_ema,
        accumulate=train.accumulate,
        rate=rate,
        log_quartiles=not config.is_autoencoder,
    )
    init = Initializer(info, module, optimizer)
    return Training(module, network, init, multi_step(step), make_eval_step(held_out, train.seed))


def _objectives(info: ModelInfo, module: Any, network: Network) -> tuple[Objective, Objective]:
    """The objective of training, and the deterministic one of the held-out loss."""
    config = info.config
    if config.is_autoencoder:
        return reconstruction_loss(module), reconstruction_loss(module)
    schedule, parameterization = build_schedule(config), build_parameterization(config)
    conditioning = info.conditioning
    drop_rate = config.train.condition_dropout if conditioning.is_conditional else 0.0
    if drop_rate > 0 and not conditioning.has_null:
        raise ValueError(
            f"train.condition_dropout is {drop_rate}, and the model's {conditioning} have no null"
            " condition to be dropped to: use 0"
        )
    objective = loss.denoising_loss(
        network,
        parameterization,
        schedule,
        build_weighting(config),
        build_times(config),
        conditioning.null,
        drop_rate,
    )
    # The held-out loss is L_simple over independent levels whatever the weighting, so that runs
    # compare.
    return objective, loss.denoising_loss(network, parameterization, schedule)


@dataclass(frozen=True, eq=False)
class Initializer:
    """The function from a key to the state before the first step."""

    info: ModelInfo
    module: nn.Module
    optimizer: optax.GradientTransformation

    def __call__(self, key: jax.Array) -> TrainState:
        """The state with fresh parameters."""
        params = init_params(self.info, self.module, key)
        return init_state(params, self.optimizer, self.info.config.train.averages)


class ParallelTraining:
    """A training on all devices of all processes, in the mode of train.parallel.

    The train state is replicated, on the mesh of `parallel.state_mesh`.
    """

    def __init__(self, training: Training, train: Train, teacher_params: Any = None) -> None:
        """Nothing is compiled before it is called.

        teacher_params: of a student's teacher, replicated over all devices of all processes.
        """
        self._mesh, self._mode, self._init = parallel.device_mesh(), train.parallel, training.init
        self._state_mesh = parallel.state_mesh(self._mesh, self._mode)
        self._extra_args: tuple[Any, ...] = ()
        if teacher_params is not None:
            self._extra_args = (parallel.on_mesh(self._state_mesh, teacher_params),)
        compiled = partial(
            parallel.parallelize, self._mesh, self._mode, extra_args=len(self._extra_args)
        )
        self._step = compiled(training.step, axis=1, donate=True)
        self._eval_step = compiled(training.eval_step)

    def init_state(self, seed: int) -> TrainState:
        """The state before the first step."""
        sharding = parallel.replicated(self._state_mesh)
        init = jax.jit(partial(_init_from_seed, self._init), out_shardings=sharding)
        return init(np.uint32(seed), *self._extra_args)

    def place_state(self, state: TrainState) -> TrainState:
        """The state as the step takes it, replicated; nothing is copied.

        It is so from the start, so that the first step can reuse its memory like all others.
        """
        return parallel.on_mesh(self._state_mesh, state)

    def global_state(self, state: TrainState) -> TrainState:
        """The state as arrays over all devices of all processes, as checkpoints take it."""
        return parallel.on_mesh(self._mesh, state)

    def place_batch(self, batch: Any) -> Any:
        """A process's share of a batch [B, ...], placed as `eval_step` takes it."""
        return parallel.shard_batch(self._mesh, self._mode, batch)

    def step(self, state: TrainState, batches: Any) -> tuple[TrainState, Metrics]:
        """Train on this process's share of batches [K, B, ...], reusing the state."""
        batches = parallel.shard_batch(self._mesh, self._mode, batches, axis=1)
        return self._step(state, batches, *self._extra_args)

    def eval_step(self, params: Any, batch: Any) -> jax.Array:
        """The mean loss of a batch that `place_batch` has placed."""
        return self._eval_step(params, batch, *self._extra_args)


def _init_from_seed(init: Callable[..., TrainState], seed: Any, *extra_args: Any) -> TrainState:
    return init(jax.random.key(seed), *extra_args)
