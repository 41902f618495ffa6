"""One training step, written once: the same function runs under jit, pmap, shard_map or vmap, on one device or many."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from diffjax.loss import Objective


class TrainState(NamedTuple):
    """Everything that training changes; arrays only."""

    step: Array  # int32: steps done, those skipped among them
    skipped: Array  # int32: steps whose gradients were not numbers, so that they changed nothing else
    params: Any
    ema: tuple[Any, ...]  # moving averages of params, float32, one for each decay
    opt_state: Any


Metrics = dict[str, Array]
TrainStep = Callable[..., tuple[TrainState, Metrics]]  # (state, batch, axis_name=None)
Grouping = Callable[[Any, Array], Array]  # (batch, key of the step) -> which of four groups each example is in, [B]
QUARTERS = ("loss_q1", "loss_q2", "loss_q3", "loss_q4")


def init_state(params: Any, optimizer: optax.GradientTransformation, averages: int = 1) -> TrainState:
    """The state before the first step. Each average starts as a copy of the parameters."""
    copy = partial(jax.tree.map, lambda p: jnp.array(p, jnp.float32, copy=True))
    zero = jnp.zeros((), jnp.int32)
    ema = tuple(copy(params) for _ in range(averages))
    return TrainState(zero, zero + 0, params, ema, optimizer.init(params))


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
    objective: Objective,
    optimizer: optax.GradientTransformation,
    ema_limits: Sequence[float],
    seed: int,
    *,
    accumulate: int = 1,
    rate: optax.Schedule | None = None,
    quarters: Grouping | None = None,
) -> TrainStep:
    """The step of one device: (state, batch, axis_name=None) -> (state, metrics).

    batch: a dict with "index", the global index of each example, uint32 [B], and what the objective reads; under pmap
    and shard_map this device's share. axis_name: the mapped axis over which gradients are averaged, before the
    optimizer clips them. Shares are of equal size, so the mean of means is the mean.

    accumulate: parts of the batch whose gradients are taken one after the other, in so much less memory. ema_limits:
    the decay of each average. A step whose loss or gradient is not a number counts, and changes nothing else.

    Metrics: loss, grad_norm before clipping, skipped so far; with `rate`, learning_rate; with `t_quartile`, which puts
    each example in one of four groups, the mean loss of each, NaN for an empty one.
    """

    def of_part(params: Any, batch: Any, key: Array) -> Any:
        def mean(params: Any) -> tuple[Array, Array]:
            losses = objective(params, batch, key)
            return losses.mean(), losses

        (loss, losses), gradients = jax.value_and_grad(mean, has_aux=True)(params)
        member = jnp.zeros((0, len(losses)))
        if quarters is not None:
            member = (quarters(batch, key) == jnp.arange(len(QUARTERS))[:, None]).astype(jnp.float32)
        # An empty group must not become 0 * NaN of the others' losses.
        return loss, gradients, jnp.where(member > 0, losses, 0).sum(1), member.sum(1)

    def of_batch(params: Any, batch: Any, key: Array) -> Any:
        if accumulate == 1:
            return of_part(params, batch, key)
        # Every part takes from everywhere in the batch, so that under jit each device keeps its own examples.
        parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
        first = jax.tree.map(lambda x: x[0], parts)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_part, params, first, key))

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, of_part(params, part, key)), None

        return jax.tree.map(lambda x: x / accumulate, jax.lax.scan(add, zeros, parts)[0])

    def train_step(state: TrainState, batch: Any, axis_name: str | None = None) -> tuple[TrainState, Metrics]:
        found = of_batch(state.params, batch, step_key(seed, state.step))
        if axis_name is not None:
            found = jax.lax.pmean(found, axis_name)
        loss, gradients, sums, counts = found
        norm = optax.tree.norm(gradients)
        sound = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = tuple(
            jax.tree.map(partial(_average, ema_decay(state.step, limit)), average, params)
            for limit, average in zip(ema_limits, state.ema, strict=True)
        )
        taken = state.step - state.skipped
        done = TrainState(state.step + 1, state.skipped, params, ema, opt_state)
        nothing = state._replace(step=state.step + 1, skipped=state.skipped + 1)
        state = jax.tree.map(lambda new, old: jnp.where(sound, new, old), done, nothing)
        metrics = {"loss": loss, "grad_norm": norm, "skipped": state.skipped}
        if rate is not None:
            metrics["learning_rate"] = jnp.asarray(rate(taken), jnp.float32)
        if quarters is not None:
            metrics |= dict(zip(QUARTERS, sums / counts, strict=True))
        return state, metrics

    return train_step


def multi_step(step: TrainStep) -> TrainStep:
    """The step, over a leading axis of batches [K, B, ...]: K steps in one call, and the metrics of each, [K]."""

    def steps(state: TrainState, batches: Any, axis_name: str | None = None) -> tuple[TrainState, Metrics]:
        return jax.lax.scan(partial(step, axis_name=axis_name), state, batches)

    return steps


def make_eval_step(objective: Objective, seed: int) -> Callable[..., Array]:
    """(params, batch, axis_name=None) -> mean loss of one batch. Every call with the same batch draws the same
    levels and noise, so the figures of two checkpoints can be compared.
    """

    def eval_step(params: Any, batch: Any, axis_name: str | None = None) -> Array:
        loss = objective(params, batch, step_key(seed, 0)).mean()
        return loss if axis_name is None else jax.lax.pmean(loss, axis_name)

    return eval_step


def _average(decay: Array, average: Array, new: Array) -> Array:
    return decay * average + (1 - decay) * new
