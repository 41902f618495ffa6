"""The training objective: DDPM, Algorithm 1 (arXiv:2006.11239), its weightings and its draws of t.

Every draw is keyed by (key of the step, global index of the example), so that nothing depends on how a batch is split
over devices.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffjax.denoiser import Condition
from diffjax.process import Prediction, append_dims, check_prediction, q_sample
from diffjax.schedule import Level, Schedule, at, length, logsnr

Objective = Callable[[Any, Any, Array], Array]  # (params, batch, key of the step) -> loss per example [B]
# (params, x_t, t - 1, condition, keys [B] for dropout) -> output
TrainingNetwork = Callable[[Any, Array, Array, Condition, Array], Array]


def example_keys(key: Array, index: Array) -> Array:
    """One key per example, [B], from its global index: not from a device or a host."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


# ---------------------------------------------------------------------------------------------- draws of t

TimeSampling = Callable[[Array, Array, int], Array]  # (key, global indices [B], T) -> t in 1..T, int32 [B]


def uniform(key: Array, index: Array, T: int) -> Array:
    """Independent and uniform over 1..T."""
    return jax.vmap(lambda key: jax.random.randint(key, (), 1, T + 1))(example_keys(key, index))


def stratified(key: Array, index: Array, T: int, batch: int) -> Array:
    """One draw for the whole batch, and its examples at equal distances from it, around 1..T: each t is uniform, and a
    batch covers all levels evenly (arXiv:2107.00630, appendix I.1). batch: examples per step, over all devices.
    """
    u = (jax.random.uniform(key) + (index % batch).astype(jnp.float32) / batch) % 1
    return jnp.minimum(1 + jnp.floor(u * T).astype(jnp.int32), T)


def antithetic(key: Array, index: Array, T: int) -> Array:
    """Neighbours of a batch, 2i and 2i+1, share a draw: t and T + 1 - t. Each is uniform over 1..T."""
    t = uniform(key, index // 2, T)
    return jnp.where(index % 2 == 0, t, T + 1 - t)


def sample_t(times: TimeSampling, key: Array, index: Array, T: int) -> Array:
    """The t that the objective draws in the step of this key: 1..T, int32 [B]."""
    return times(jax.random.fold_in(key, 0), index, T)


def t_quartile(times: TimeSampling, T: int) -> Callable[[Any, Array], Array]:
    """(batch, key of the step) -> the quarter of 1..T that each example's t is in, 0..3, int32 [B]: a loss that is
    watched by quarters tells which noise levels are being learnt.
    """
    return lambda batch, key: (sample_t(times, key, batch["index"], T) - 1) * 4 // T


# ---------------------------------------------------------------------------------------------- weightings

# The squared error of a network's output counts weight[t]; index 0 is never drawn. A weighting w of the squared error
# of x0 weighs what a network says by w / gain, since (output error)**2 = gain * (x0 error)**2.
Weighting = Callable[[Schedule, Prediction], np.ndarray]  # -> float64 [T+1]


def simple(schedule: Schedule, prediction: Prediction) -> np.ndarray:
    """1 for every prediction: L_simple, equation 14 of DDPM, where the network says eps."""
    return np.ones(length(schedule) + 1)


def min_snr(schedule: Schedule, prediction: Prediction, gamma: float = 5.0) -> np.ndarray:
    """Weight min(SNR, gamma) of the squared error of x0 (arXiv:2303.09556): min(SNR, gamma)/SNR of that of eps, and
    min(SNR, gamma)/(SNR + 1) of that of v. ValueError unless gamma > 0, and for a schedule without signal at level T,
    which it would never train.
    """
    if not gamma > 0:
        raise ValueError(f"gamma is {gamma}: use a number above 0")
    return _of_x0(lambda level: np.minimum((level.alpha / level.sigma) ** 2, gamma), schedule, prediction)


def truncated_snr(schedule: Schedule, prediction: Prediction) -> np.ndarray:
    """max(SNR, 1) of the squared error of x0: progressive distillation, section 4 (arXiv:2202.00512)."""
    return _of_x0(lambda level: np.maximum((level.alpha / level.sigma) ** 2, 1), schedule, prediction)


def sigmoid(schedule: Schedule, prediction: Prediction, bias: float = 0.0) -> np.ndarray:
    """The weighting by logsnr of arXiv:2303.00848, the same whatever the schedule: of the squared error of eps,
    1/(1 + exp(logsnr - bias)) times -d logsnr/du, u = t/T. The derivative is a difference of the table. ValueError for
    a schedule without signal at level T, where it is infinite.
    """
    if schedule.alpha[-1] == 0:
        raise ValueError("sigmoid weighting needs a finite logsnr at every level, and here level T has no signal")

    def weight(level: Level) -> np.ndarray:
        value = logsnr(level)
        slope = np.gradient(value) if len(value) > 1 else np.array([-1.0])
        return (level.alpha / level.sigma) ** 2 / (1 + np.exp(value - bias)) * -slope * len(value)

    return _of_x0(weight, schedule, prediction)


def edm(schedule: Schedule, prediction: Prediction, sigma_data: float = 0.5) -> np.ndarray:
    """(sigma**2 + sigma_data**2)/(sigma*sigma_data)**2 of the squared error of x0, with sigma/alpha for sigma: EDM,
    table 1 (arXiv:2206.00364). t is drawn over the schedule as ever, not lognormally. ValueError unless sigma_data > 0.
    """
    if not sigma_data > 0:
        raise ValueError(f"sigma_data is {sigma_data}: use a number above 0")
    return _of_x0(lambda level: (level.alpha / level.sigma) ** 2 + 1 / sigma_data**2, schedule, prediction)


def _of_x0(weight: Callable[[Level], np.ndarray], schedule: Schedule, prediction: Prediction) -> np.ndarray:
    noisy = Level(*(leaf[1:] for leaf in schedule))
    check_prediction(prediction, schedule)
    weights = weight(noisy) / prediction.gain(noisy)
    if (weights == 0).any():
        t = noisy.t[weights == 0][0]
        raise ValueError(f"this weighting gives level {t} no weight, so it would never be trained: use another")
    return np.append(0.0, weights)


WEIGHTINGS: dict[str, Weighting] = {f.__name__: f for f in (simple, min_snr, truncated_snr, sigmoid, edm)}


# ---------------------------------------------------------------------------------------------- the objective


def drop_condition(keys: Array, condition: Array, null: Any, rate: float) -> Array:
    """Replace each example's condition by `null` with probability `rate` (arXiv:2207.12598, Algorithm 1): what makes
    one network both conditional and unconditional. condition: [B, ...]; null: broadcast against one of it.
    """
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, rate))(keys)
    return jnp.where(append_dims(dropped, condition), jnp.asarray(null, condition.dtype), condition)


def squared_error(output: Array, target: Array) -> Array:
    """Mean over everything but the batch of (output - target)**2, in float32: [B]."""
    error = output.astype(jnp.float32) - target.astype(jnp.float32)
    return jnp.mean(error**2, axis=tuple(range(1, error.ndim)))


class NoisyBatch(NamedTuple):
    """What a step draws for the examples of a batch, [B] each."""

    row: Any  # of the table
    x_t: Array
    eps: Array
    for_condition: Array  # keys
    for_dropout: Array


def add_noise_to_batch(batch: Any, key: Array, times: TimeSampling, table: Any) -> NoisyBatch:
    """x_t of each image of a batch at a level drawn from a table: leaves [N], or a tree whose first is a Level. `times`
    draws 1..N, its rows in their order. All is keyed by the global index of an example. ValueError for images that are
    not floats.
    """
    x0, index = batch["image"], batch["index"]
    if not jnp.issubdtype(x0.dtype, jnp.floating):
        raise ValueError(f"images are {x0.dtype}: noise is added to floats, of -1 to 1")
    which = sample_t(times, key, index, len(table[0].t)) - 1
    # A whole number t stays one: a network may look it up.
    types = {"i": jnp.int32, "f": jnp.float32}
    row = jax.tree.map(lambda leaf: jnp.asarray(leaf, types[leaf.dtype.kind])[which], table)
    keys = jax.vmap(partial(jax.random.split, num=3), out_axes=1)(example_keys(jax.random.fold_in(key, 1), index))
    for_eps, for_condition, for_dropout = keys
    eps = jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:]))(for_eps)
    return NoisyBatch(row, q_sample(x0, eps, row[0]), eps, for_condition, for_dropout)


def denoising_loss(
    network: TrainingNetwork,
    prediction: Prediction,
    schedule: Schedule,
    weighting: Weighting = simple,
    times: TimeSampling = uniform,
    null: Any = None,
    drop_rate: float = 0.0,
) -> Objective:
    """weight[t] * mean of (target - network(x_t, t))**2 per example: Algorithm 1 of DDPM, with any prediction,
    weighting and draw of t.

    The batch is a dict: "image" float [B, ...] in [-1, 1], "index" uint32 [B], the global index of each example, and
    "label" [B] if the network has a condition, which is replaced by `null` with probability drop_rate.

    ValueError for a prediction or a weighting that some level of the schedule does not allow, for a drop_rate outside
    0..1 or without a null, and when traced for images that are not floats.
    """
    check_prediction(prediction, schedule)
    if not 0 <= drop_rate <= 1:
        raise ValueError(f"drop_rate is {drop_rate}: use 0 to 1")
    if drop_rate > 0 and null is None:
        raise ValueError("a condition that is dropped becomes null: say what null is")
    table_of_weights = np.asarray(weighting(schedule, prediction))
    if table_of_weights.shape != schedule.t.shape or not (table_of_weights >= 0).all():
        raise ValueError(
            f"a weighting gives a number of 0 or more for each of the {len(schedule.t)} levels from 0 to T,"
            f" not {table_of_weights.shape} with the least {table_of_weights.min()}"
        )
    table = at(schedule, np.arange(1, length(schedule) + 1)), table_of_weights[1:]

    def objective(params: Any, batch: Any, key: Array) -> Array:
        (level, weight), x_t, eps, for_condition, for_dropout = add_noise_to_batch(batch, key, times, table)
        condition = batch.get("label")
        if condition is not None and drop_rate > 0:
            condition = drop_condition(for_condition, condition, null, drop_rate)
        output = network(params, x_t, level.t - 1, condition, for_dropout)
        return weight * squared_error(output, prediction.target(batch["image"], eps, level))

    return objective
