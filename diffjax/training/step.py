"""One training step, written once: the same function runs under jit, pmap or vmap, on one device or many."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from diffjax.loss import Objective


class TrainState(NamedTuple):
    """Everything that training changes; arrays only."""

    step: Array  # int32: steps done
    params: Any
    ema: Any  # moving average of params, float32
    opt_state: Any


TrainStep = Callable[..., tuple[TrainState, dict[str, Array]]]  # (state, batch, axis_name=None)


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step. The average starts as a copy of the parameters."""
    ema = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params))


def ema_decay(step: Array, limit: float) -> Array:
    """min(limit, (1 + step)/(10 + step)): a short memory while the parameters move fast, up to `limit`.

    Without this warm-up an average with decay 0.9999 still holds 37% of the random start after 10,000 steps.
    """
    step = jnp.asarray(step, jnp.float32)
    return jnp.minimum(limit, (1 + step) / (10 + step))


def step_key(seed: int, step: Any) -> Array:
    """The key of a step. All that is drawn in it folds in the global index of an example: not a device or a host."""
    return jax.random.fold_in(jax.random.key(seed), step)


def make_train_step(
    objective: Objective, optimizer: optax.GradientTransformation, ema_limit: float, seed: int
) -> TrainStep:
    """The step of one device: (state, batch, axis_name=None) -> (state, metrics).

    batch: a dict with "index", the global index of each example, uint32 [B], and what the objective reads; under pmap
    this device's share. axis_name: the mapped axis over which gradients are averaged, before the optimizer clips
    them. Shares are of equal size, so the mean of means is the mean.
    """

    def train_step(state: TrainState, batch: Any, axis_name: str | None = None) -> tuple[TrainState, dict[str, Array]]:
        key = step_key(seed, state.step)
        loss, gradients = jax.value_and_grad(lambda params: objective(params, batch, key).mean())(state.params)
        if axis_name is not None:
            loss, gradients = jax.lax.pmean((loss, gradients), axis_name)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = ema_decay(state.step, ema_limit)
        ema = jax.tree.map(lambda average, p: decay * average + (1 - decay) * p, state.ema, params)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradients)}
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return train_step


def make_eval_step(objective: Objective, seed: int) -> Callable[..., Array]:
    """(params, batch, axis_name=None) -> mean loss of one batch. Every call with the same batch draws the same
    levels and noise, so the figures of two checkpoints can be compared.
    """

    def eval_step(params: Any, batch: Any, axis_name: str | None = None) -> Array:
        loss = objective(params, batch, step_key(seed, 0)).mean()
        return loss if axis_name is None else jax.lax.pmean(loss, axis_name)

    return eval_step
