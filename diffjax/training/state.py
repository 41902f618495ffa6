"""The train state: everything that training changes, and its form in a checkpoint."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from diffjax.checkpoint import ema_key


class TrainState(NamedTuple):
    """Everything that training changes; arrays only."""

    step: Array  # int32: steps done, skipped ones included
    skipped: Array  # int32: steps with non-finite gradients, which changed nothing else
    params: Any
    # Moving averages of params, float32: one per decay, then one per length of a power function.
    ema: tuple[Any, ...]
    opt_state: Any


def init_state(
    params: Any, optimizer: optax.GradientTransformation, averages: int = 1
) -> TrainState:
    """The state before the first step, with copies of params as moving averages."""
    copy = partial(jax.tree.map, lambda p: jnp.array(p, jnp.float32, copy=True))
    zero = jnp.zeros((), jnp.int32)
    ema = tuple(copy(params) for _ in range(averages))
    return TrainState(zero, zero + 0, params, ema, optimizer.init(params))


def state_to_trees(state: TrainState) -> dict[str, Any]:
    """The named trees of a checkpoint: params, rest, and one per moving average."""
    rest = {"step": state.step, "skipped": state.skipped, "opt_state": state.opt_state}
    averages = {ema_key(i): tree for i, tree in enumerate(state.ema)}
    return {"params": state.params, "rest": rest, **averages}


def state_from_trees(trees: dict[str, Any], like: TrainState) -> TrainState:
    """The inverse of `state_to_trees`, with as many moving averages as `like` has."""
    rest, ema = trees["rest"], tuple(trees[ema_key(i)] for i in range(len(like.ema)))
    return TrainState(rest["step"], rest["skipped"], trees["params"], ema, rest["opt_state"])


def step_key(seed: int, step: Any) -> Array:
    """The random key of a step.

    All random draws of the step fold in the global index of an example, never a device or process.
    """
    return jax.random.fold_in(jax.random.key(seed), step)
