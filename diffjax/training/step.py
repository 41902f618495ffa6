"""The training step, written once for jit, pmap, shard_map and vmap."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from diffjax.averaging import ema_decay, power_decay
from diffjax.loss import Objective
from diffjax.training.state import TrainState, step_key

Metrics = dict[str, Array]
# (state, batch, *extra arguments that are only read, axis_name=None) -> (state, metrics)
TrainStep = Callable[..., tuple[TrainState, Metrics]]
# Metrics of the loss in each quarter of the noise levels, the least noisy first.
QUARTILES = ("loss_q1", "loss_q2", "loss_q3", "loss_q4")


class Gradients(NamedTuple):
    """The mean loss of a batch, its gradients, and what the loss by quartile needs."""

    loss: Array  # float32
    gradients: Any
    quartile_sum: Array  # [4], or [0] without quartiles: sum of the losses in each
    quartile_count: Array  # [4] or [0], float32: number of examples in each


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    ema_decays: Sequence[float],
    seed: int,
    *,
    power_lengths: Sequence[float] = (),
    accumulate: int = 1,
    rate: optax.Schedule | None = None,
    log_quartiles: bool = False,
) -> TrainStep:
    """The train step (state, batch, axis_name=None) -> (state, metrics).

    batch: a dict with "index", the global index of each example, uint32 [B], and what the objective
    reads; under pmap and shard_map this device's share of it. axis_name: the mapped axis over which
    gradients are averaged, before the optimizer clips them. Shares are of equal size, so the mean
    of their means is the mean of the batch.

    power_lengths: relative lengths of the averages by power functions, which follow those of
    ema_decays in the state. accumulate: parts of the batch whose gradients are computed in turn,
    to save memory. A step with a non-finite loss or gradient is counted, and changes nothing else.

    Metrics: loss; grad_norm before clipping; skipped steps so far; learning_rate, where `rate` is
    given; with log_quartiles the mean loss of each quarter of the noise levels, QUARTILES, NaN for
    one without examples.
    """

    def train_step(
        state: TrainState, batch: Any, axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]:
        key = step_key(seed, state.step)
        batch_gradients = value_and_grad_accumulated(
            objective, state.params, batch, key, accumulate, log_quartiles
        )
        if axis_name is not None:
            batch_gradients = jax.lax.pmean(batch_gradients, axis_name)
        norm = optax.tree.norm(batch_gradients.gradients)
        is_finite = jnp.isfinite(batch_gradients.loss) & jnp.isfinite(norm)
        done = state.step - state.skipped
        decays = [ema_decay(state.step, limit) for limit in ema_decays]
        decays += [power_decay(done, length) for length in power_lengths]
        updated = apply_update(state, batch_gradients.gradients, is_finite, optimizer, decays)
        found = metrics(batch_gradients, norm, updated.skipped)
        if (
            rate is not None
        ):  # of this update: optimizers count those before it, without the skipped
            found["learning_rate"] = jnp.asarray(rate(done), jnp.float32)
        return updated, found

    return train_step


def value_and_grad_accumulated(
    objective: Objective,
    params: Any,
    batch: Any,
    key: Array,
    accumulate: int = 1,
    log_quartiles: bool = False,
) -> Gradients:
    """The mean loss of a batch and its gradients.

    accumulate: parts of the batch that are computed one after the other.
    """
    part_gradients = partial(_value_and_grad, objective, log_quartiles)
    if accumulate == 1:
        return part_gradients(params, batch, key)
    # Every part takes examples from all over the batch, so that under jit none changes its device.
    parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(part_gradients, params, first, key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(total: Gradients, part: Any) -> tuple[Gradients, None]:
        return jax.tree.map(jnp.add, total, part_gradients(params, part, key)), None

    total, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda x: x / accumulate, total)


def apply_update(
    state: TrainState,
    gradients: Any,
    is_finite: Array,
    optimizer: optax.GradientTransformation,
    decays: Sequence[Array],
) -> TrainState:
    """The state after an optimizer step, skipped if gradients are not finite.

    decays: of this step, one per moving average.
    """
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = tuple(
        jax.tree.map(partial(_average, decay), average, params)
        for decay, average in zip(decays, state.ema, strict=True)
    )
    updated = TrainState(state.step + 1, state.skipped, params, ema, opt_state)
    skipped = state._replace(step=state.step + 1, skipped=state.skipped + 1)
    return jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), updated, skipped)


def metrics(gradients: Gradients, norm: Array, skipped: Array) -> Metrics:
    """The metrics of a step, as `make_train_step` lists them."""
    found = {"loss": gradients.loss, "grad_norm": norm, "skipped": skipped}
    quartiles = gradients.quartile_sum / gradients.quartile_count
    # Without quartiles there is nothing to name.
    return found | dict(zip(QUARTILES[: len(quartiles)], quartiles, strict=True))


def multi_step(step: TrainStep) -> TrainStep:
    """K steps in one call: the step over a leading axis of batches [K, B, ...].

    Returns the last state, and the metrics of each step, [K].
    """

    def steps(
        state: TrainState, batches: Any, *extra_args: Any, axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]:
        def body(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
            return step(state, batch, *extra_args, axis_name=axis_name)

        return jax.lax.scan(body, state, batches)

    return steps


def make_eval_step(objective: Objective, seed: int) -> Callable[..., Array]:
    """The evaluation step: (params, batch, axis_name=None) -> mean loss of the batch.

    Every call with the same batch draws the same levels and noise, so that checkpoints compare;
    nothing is dropped.
    """

    def eval_step(params: Any, batch: Any, axis_name: str | None = None) -> Array:
        loss = objective(params, batch, step_key(seed, 0), training=False).value.mean()
        return loss if axis_name is None else jax.lax.pmean(loss, axis_name)

    return eval_step


def _value_and_grad(
    objective: Objective, log_quartiles: bool, params: Any, batch: Any, key: Array
) -> Gradients:
    def mean(params: Any) -> tuple[Array, Any]:
        losses = objective(params, batch, key)
        return losses.value.mean(), losses

    (loss, (losses, quartile)), gradients = jax.value_and_grad(mean, has_aux=True)(params)
    member = jnp.zeros((0, len(losses)))
    if log_quartiles:
        member = (quartile == jnp.arange(len(QUARTILES))[:, None]).astype(jnp.float32)
    # An empty quartile must not become 0 * NaN of the losses of the others.
    sums = jnp.where(member > 0, losses, 0).sum(1)
    return Gradients(loss, gradients, sums, member.sum(1))


def _average(decay: Array, average: Array, new: Array) -> Array:
    return decay * average + (1 - decay) * new
