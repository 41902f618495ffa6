"""The training objective: DDPM, Algorithm 1 (arXiv:2006.11239), with every draw keyed per example."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from diffjax.denoiser import Condition
from diffjax.process import Prediction, q_sample
from diffjax.schedule import Schedule, length

Objective = Callable[[Any, Any, Array], Array]  # (params, batch, keys [B]) -> loss per example [B]
# (params, x_t, t - 1, condition, keys [B] for dropout) -> output
TrainingNetwork = Callable[[Any, Array, Array, Condition, Array], Array]


def sample_t(keys: Array, schedule: Schedule) -> Array:
    """Uniform noisy levels 1..T, int32 [B], one per key."""
    return jax.vmap(lambda key: jax.random.randint(key, (), 1, length(schedule) + 1))(keys)


def drop_condition(keys: Array, condition: Array, null: Any, rate: float) -> Array:
    """Replace each example's condition by `null` with probability `rate` (arXiv:2207.12598, Algorithm 1): what makes
    one network both conditional and unconditional. condition: [B].
    """
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, rate))(keys)
    return jnp.where(dropped, jnp.asarray(null, condition.dtype), condition)


def squared_error(output: Array, target: Array) -> Array:
    """Mean over everything but the batch of (output - target)**2, in float32: [B]."""
    error = output.astype(jnp.float32) - target.astype(jnp.float32)
    return jnp.mean(error**2, axis=tuple(range(1, error.ndim)))


def simple(
    network: TrainingNetwork, prediction: Prediction, schedule: Schedule, null: Any = None, drop_rate: float = 0.0
) -> Objective:
    """L_simple, equation 14 of DDPM, per pixel: the mean of (target - network(x_t, t))**2 with t uniform over 1..T, for
    any prediction type.

    The batch is a dict: "image" float [B, ...] in [-1, 1], "label" [B] if the network has a condition, which is
    replaced by `null` with probability drop_rate.
    """
    table = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), schedule)

    def objective(params: Any, batch: Any, keys: Array) -> Array:
        x0, condition = batch["image"], batch.get("label")
        for_t, for_eps, for_condition, for_dropout = jax.vmap(lambda key: jax.random.split(key, 4), out_axes=1)(keys)
        t = sample_t(for_t, schedule)
        level = jax.tree.map(lambda leaf: leaf[t], table)
        eps = jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:]))(for_eps)
        if condition is not None and drop_rate > 0:
            condition = drop_condition(for_condition, condition, null, drop_rate)
        output = network(params, q_sample(x0, eps, level), t - 1, condition, for_dropout)
        return squared_error(output, prediction.target(x0, eps, level))

    return objective
