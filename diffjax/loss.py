"""The training objective of DDPM, Algorithm 1 (arXiv:2006.11239).

It comes with loss weightings over noise levels and with ways to sample t. Every random draw is
keyed by (key of the step, global index of the example), so that nothing depends on how a batch is
split over devices.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffjax.denoiser import Condition, Network, check_network
from diffjax.parameterization import Parameterization
from diffjax.process import Prediction, append_dims, check_prediction, prediction_of, q_sample
from diffjax.sampler import check_key
from diffjax.schedule import Level, Schedule, at, check_schedule, length, level_at, logsnr


class ExampleLoss(NamedTuple):
    """The losses of a batch."""

    value: Array  # [B], float32
    quartile: Array  # [B], int32: the quarter of the noise levels that t is in, 0 the least noisy


class Objective(Protocol):
    """A function from parameters, a batch and the key of a step to losses."""

    def __call__(
        self, params: Any, batch: Any, key: Array, *, training: bool = True
    ) -> ExampleLoss:
        """The losses of the batch; the network drops units only in training."""
        ...


def example_keys(key: Array, index: Array) -> Array:
    """One key per example, [B], from its global index, whatever its device."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


# ------------------------------------------------------------------------------- sampling of t

# (key, global indices [B], noisy levels [T] on the host, the least noisy first) -> t in 1..T, the
# number of a level among them, int32 [B]
TimeSampling = Callable[[Array, Array, Level], Array]


def uniform(key: Array, index: Array, levels: Level) -> Array:
    """Independent and uniform over 1..T."""
    T = len(levels.t)
    return jax.vmap(lambda key: jax.random.randint(key, (), 1, T + 1))(example_keys(key, index))


def stratified(key: Array, index: Array, levels: Level, batch: int) -> Array:
    """One draw for the batch, and its examples at equal distances around 1..T.

    Each t is uniform, and a batch covers all levels evenly (arXiv:2107.00630, appendix I.1).
    batch: examples per step, over all devices.
    """
    T = len(levels.t)
    u = (jax.random.uniform(key) + (index % batch).astype(jnp.float32) / batch) % 1
    return jnp.minimum(1 + jnp.floor(u * T).astype(jnp.int32), T)


def antithetic(key: Array, index: Array, levels: Level) -> Array:
    """One draw for two neighbours of a batch, 2i and 2i+1: t and T + 1 - t.

    Each is uniform over 1..T.
    """
    t = uniform(key, index // 2, levels)
    return jnp.where(index % 2 == 0, t, len(levels.t) + 1 - t)


def log_normal(
    key: Array, index: Array, levels: Level, mean: float = 0.0, std: float = 1.0
) -> Array:
    """Independent, with log(sigma/alpha) normal, rounded up to the next level.

    On the path of `schedule.flow`, sigma is then logit-normal, with mean 0 and std 1 as in
    arXiv:2403.03206, section 3.1. EDM's lognormal sigma has mean -1.2 and std 1.2
    (arXiv:2206.00364, table 1).

        P(t <= k) = Phi((log(sigma_k/alpha_k) - mean)/std) for k < T

    Raises: ValueError unless mean is finite and std > 0.
    """
    if not np.isfinite(mean):
        raise ValueError(f"mean is {mean}: use a finite number")
    if not 0 < std < np.inf:
        raise ValueError(f"std is {std}: use a number above 0")
    below = level_at(levels, slice(None, -1))
    cdf = [math.erfc((mean - u) / (std * 2**0.5)) / 2 for u in -logsnr(below) / 2]
    draws = jax.vmap(jax.random.uniform)(example_keys(key, index))
    return 1 + jnp.searchsorted(jnp.asarray(cdf, jnp.float32), draws, "right").astype(jnp.int32)


def sample_t(times: TimeSampling, key: Array, index: Array, levels: Level) -> Array:
    """The t that the objective draws in the step of this key: 1..T, int32 [B].

    levels: the noisy ones [T].
    """
    return times(jax.random.fold_in(key, 0), index, levels)


# ------------------------------------------------------------------------------- weightings

# The squared error of a network's output is weighted by weight[t]; index 0 is never drawn. A
# weighting w of the squared error of x0 is w / output_sensitivity on the output, since
# (output error)**2 = output_sensitivity * (x0 error)**2.
Weighting = Callable[[Schedule, Prediction | str], np.ndarray]  # -> float64 [T+1]


def simple(schedule: Schedule, prediction: Prediction | str) -> np.ndarray:
    """Weight 1 for every prediction; for eps, L_simple of DDPM, equation 14."""
    return np.ones(length(schedule) + 1)


def min_snr(schedule: Schedule, prediction: Prediction | str, gamma: float = 5.0) -> np.ndarray:
    """Weight min(SNR, gamma) of the squared error of x0 (arXiv:2303.09556).

    It is min(SNR, gamma)/SNR on eps and min(SNR, gamma)/(SNR + 1) on v.

    Raises: ValueError unless gamma > 0, and for a schedule without signal at level T, which would
    never be trained.
    """
    if not gamma > 0:
        raise ValueError(f"gamma is {gamma}: use a number above 0")
    return _on_output(
        lambda level: np.minimum((level.alpha / level.sigma) ** 2, gamma), schedule, prediction
    )


def truncated_snr(schedule: Schedule, prediction: Prediction | str) -> np.ndarray:
    """Weight max(SNR, 1) of the squared error of x0 (arXiv:2202.00512, section 4)."""
    return _on_output(
        lambda level: np.maximum((level.alpha / level.sigma) ** 2, 1), schedule, prediction
    )


def sigmoid(schedule: Schedule, prediction: Prediction | str, bias: float = 0.0) -> np.ndarray:
    """The weighting by logsnr of arXiv:2303.00848, the same for every schedule.

    On the squared error of eps it is 1/(1 + exp(logsnr - bias)) * -d logsnr/du, u = t/T; the
    derivative is a difference of the table.

    Raises: ValueError for a schedule without signal at level T, where the derivative is infinite.
    """
    if schedule.alpha[-1] == 0:
        raise ValueError(
            "sigmoid weighting needs a finite logsnr at every level, and level T has no signal"
        )

    def weight(level: Level) -> np.ndarray:
        value = logsnr(level)
        slope = np.gradient(value) if len(value) > 1 else np.array([-1.0])
        snr = (level.alpha / level.sigma) ** 2
        return snr / (1 + np.exp(value - bias)) * -slope * len(value)

    return _on_output(weight, schedule, prediction)


def edm(schedule: Schedule, prediction: Prediction | str, sigma_data: float = 0.5) -> np.ndarray:
    """EDM's weight of the squared error of x0 (arXiv:2206.00364, table 1).

    With sigma/alpha for sigma it is (sigma**2 + sigma_data**2)/(sigma*sigma_data)**2, and 1 on
    the output of a network with EDM's prediction. For EDM's times see `log_normal`.

    Raises: ValueError unless sigma_data > 0.
    """
    if not sigma_data > 0:
        raise ValueError(f"sigma_data is {sigma_data}: use a number above 0")
    return _on_output(
        lambda level: (level.alpha / level.sigma) ** 2 + 1 / sigma_data**2, schedule, prediction
    )


def _on_output(
    weight: Callable[[Level], np.ndarray], schedule: Schedule, prediction: Prediction | str
) -> np.ndarray:
    """A weight of the squared error of x0 as one of the squared error of the output."""
    noisy = Level(*(leaf[1:] for leaf in schedule))
    check_prediction(prediction, schedule)
    weights = weight(noisy) / prediction_of(prediction).output_sensitivity(noisy)
    if (weights == 0).any():
        t = noisy.t[weights == 0][0]
        raise ValueError(f"weighting is 0 at level {t}, which would never be trained: use another")
    return np.append(0.0, weights)


WEIGHTINGS: dict[str, Weighting] = {
    f.__name__: f for f in (simple, min_snr, truncated_snr, sigmoid, edm)
}


# ------------------------------------------------------------------------------- the objective


def drop_condition(keys: Array, condition: Condition, null: Condition, rate: float) -> Condition:
    """Replace each example's condition by `null` with probability `rate`.

    It makes one network both conditional and unconditional (arXiv:2207.12598, Algorithm 1).
    condition: a pytree of arrays [B, ...], dropped as a whole; null: the same structure, broadcast
    against one example's; keys: [B].
    """
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, rate))(keys)

    def drop(leaf: Array, none: Any) -> Array:
        return jnp.where(append_dims(dropped, leaf), jnp.asarray(none, leaf.dtype), leaf)

    return jax.tree.map(drop, condition, null)


def squared_error(output: Array, target: Array) -> Array:
    """The mean of (output - target)**2 over everything but the batch, in float32: [B]."""
    error = output.astype(jnp.float32) - target.astype(jnp.float32)
    return jnp.mean(error**2, axis=tuple(range(1, error.ndim)))


class NoisyBatch(NamedTuple):
    """The random draws of a step for the examples of a batch, [B] each."""

    row: Any  # of the table
    quartile: Array  # int32: the quarter of the table that the row is in
    x_t: Array
    eps: Array
    condition_keys: Array
    dropout_keys: Array


def check_batch(batch: Any) -> None:
    """Check that a batch has x [B, ...] and index [B]. Raises: ValueError if not."""
    for name, rule in (
        ("x", "data [B, ...]"),
        ("index", "the global index of each example, as np.arange(first, first + B)"),
    ):
        if name not in batch:
            raise ValueError(f"batch has {', '.join(batch)}, and no {name}: it is {rule}")
    x, index = (np.shape(batch[name]) for name in ("x", "index"))
    if len(x) < 2 or index != x[:1]:
        raise ValueError(f"batch has x of {x} and index of {index}: use [B, ...] and [B]")


def add_noise_to_batch(batch: Any, key: Array, times: TimeSampling, table: Any) -> NoisyBatch:
    """x_t of each example of a batch, at a level drawn from a table.

    table: a tree of leaves [N] whose first is a Level, the least noisy first; `times` draws 1..N,
    the rows in their order.
    All is keyed by the global index of an example.

    Raises: ValueError for a batch without x or index, an index of another length, data that is not
    floating point, and several keys in place of one.
    """
    check_batch(batch)
    check_key(key)
    x0, index = batch["x"], batch["index"]
    if not jnp.issubdtype(x0.dtype, jnp.floating):
        raise ValueError(f"x has dtype {x0.dtype}, expected floating point")
    N = len(table[0].t)
    number = sample_t(times, key, index, table[0]) - 1
    # An integer t stays one: a network may look it up.
    types = {"i": jnp.int32, "f": jnp.float32}
    row = jax.tree.map(lambda leaf: jnp.asarray(leaf, types[leaf.dtype.kind])[number], table)
    keys = example_keys(jax.random.fold_in(key, 1), index)
    eps_keys, condition_keys, dropout_keys = jax.vmap(partial(jax.random.split, num=3), out_axes=1)(
        keys
    )
    eps = jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:]))(eps_keys)
    x_t = q_sample(x0, eps, row[0])
    return NoisyBatch(row, number * 4 // N, x_t, eps, condition_keys, dropout_keys)


def denoising_loss(
    network: Network,
    parameterization: Parameterization,
    schedule: Schedule,
    weighting: Weighting | str = simple,
    times: TimeSampling = uniform,
    null: Condition = None,
    drop_rate: float = 0.0,
) -> Objective:
    """The loss weight[t] * mean of (target - network(x_t, t))**2 of each example.

    It is Algorithm 1 of DDPM with any parameterization, weighting and sampling of t. A batch is a
    dict: "x" float [B, ...]; "index" uint32 [B], the global index of each example; and, for a
    conditional network, "condition", a pytree of arrays [B, ...] that is replaced by `null` with
    probability drop_rate.

    Raises: ValueError for a parameterization or a weighting that some level of the schedule does
    not allow, for a drop_rate outside 0..1 or without a null, and when traced for data that is not
    floating point.
    """
    check_network(network)
    check_schedule(schedule)
    prediction = parameterization.prediction
    parameterization.check(schedule)
    if not 0 <= drop_rate <= 1:
        raise ValueError(f"drop_rate is {drop_rate}: use 0 to 1")
    if drop_rate > 0 and null is None:
        raise ValueError(f"null is None and drop_rate {drop_rate}: dropped conditions become null")
    if isinstance(weighting, str):
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting is {weighting!r}: use one of {', '.join(WEIGHTINGS)}")
        weighting = WEIGHTINGS[weighting]
    weights = np.asarray(weighting(schedule, prediction))
    if weights.shape != schedule.t.shape or not (weights >= 0).all():
        raise ValueError(
            f"weighting has shape {weights.shape} and minimum {weights.min()}, expected a number"
            f" of 0 or more for each of the {len(schedule.t)} levels from 0 to T"
        )
    table = at(schedule, np.arange(1, length(schedule) + 1)), weights[1:]

    def objective(params: Any, batch: Any, key: Array, *, training: bool = True) -> ExampleLoss:
        noisy = add_noise_to_batch(batch, key, times, table)
        level, weight = noisy.row
        condition = batch.get("condition")
        if condition is None and drop_rate > 0:
            raise ValueError(
                f"batch has {', '.join(batch)}, and no condition to be dropped with drop_rate"
                f" {drop_rate}"
            )
        if drop_rate > 0:
            condition = drop_condition(noisy.condition_keys, condition, null, drop_rate)
        inputs = parameterization.inputs(noisy.x_t, level)
        keys = (noisy.dropout_keys,) if training else ()
        output = network(params, *inputs, condition, *keys)
        target = prediction.target(batch["x"], noisy.eps, level)
        return ExampleLoss(weight * squared_error(output, target), noisy.quartile)

    return objective
