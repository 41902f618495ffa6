"""Distillation: targets for a student of few steps from a teacher of many.

Teacher and student are denoisers: at a level, an x0 for x_t. There are three targets: the teacher's
estimate itself, two passes of guidance in one (arXiv:2210.03142); the x0 whose one DDIM step ends
where the teacher's two end (arXiv:2202.00512); and the x0 where the rest of the teacher's path ends
(arXiv:2303.01469).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffjax.denoiser import Condition, Denoiser, Network
from diffjax.loss import (
    ExampleLoss,
    Objective,
    TimeSampling,
    add_noise_to_batch,
    squared_error,
)
from diffjax.parameterization import Parameterization
from diffjax.process import append_dims, eps_from_x0, sqrt_snr_ratio
from diffjax.sampler import ddim_step
from diffjax.schedule import Level, Schedule, at, trailing

# A table [N]: the Level where the student is called, and what else its target needs.
Rows = tuple[Any, ...]
Target = Callable[..., Array]  # (condition, x_t, *row) -> x0

# ------------------------------------------------------------------------------- levels


def all_levels(schedule: Schedule) -> tuple[Level]:
    """Levels 1..T, for a student that any sampler may call."""
    return (at(schedule, np.arange(1, len(schedule.t))),)


def adjacent_levels(schedule: Schedule, steps: int) -> tuple[Level, Level]:
    """The levels (t, s) of each step of `trailing`, the least noisy first.

    s is the level that a sampler goes to from t, data (sigma 0) in the first pair.

    Raises: ValueError for steps outside 1..T.
    """
    t = trailing(schedule, steps)
    return at(schedule, t[::-1]), at(schedule, np.append(t[1:], 0)[::-1])


def halving_levels(schedule: Schedule, steps: int) -> tuple[Level, Level, Level, np.ndarray]:
    """The levels (t, m, s) and the share of each of a student's steps.

    The student steps from t to s, its teacher of twice as many steps over m in between; the least
    noisy step is first. The student is called exactly where `trailing(schedule, steps)` calls it:
    its levels are every other one of the teacher's, at any T, since they are rounded alike.

    The share of `progressive_target` is (r_ms - r_ts)/(1 - r_ts), float64 [steps], r the
    `sqrt_snr_ratio` of two levels: how far m is from t on the way to s, in alpha/sigma. Onto data
    it is 0.

    Raises: ValueError unless the teacher's 2*steps are in 2..T.
    """
    t, s = adjacent_levels(schedule, 2 * steps)
    level_t, level_m, level_s = (
        Level(*(leaf[start::2] for leaf in level)) for level, start in ((t, 1), (t, 0), (s, 0))
    )
    r_ts = sqrt_snr_ratio(level_t, level_s)
    return level_t, level_m, level_s, (sqrt_snr_ratio(level_m, level_s) - r_ts) / (1 - r_ts)


# ------------------------------------------------------------------------------- targets


def progressive_target(
    teacher: Denoiser, x_t: Array, level_t: Level, level_m: Level, level_s: Level, share: Any
) -> Array:
    """The x0 whose one DDIM step from t to s ends where the teacher's two over m end.

    Progressive distillation, Algorithm 2 (arXiv:2202.00512). Both of the teacher's steps keep the
    share sigma_s/sigma_t of x_t, as the one step does, so that the target is a mean of its two
    estimates, share*x0(x_t) + (1 - share)*x0(x_m), with the share of `halving_levels`. The paper
    divides by the weight of x0 in one step, which cancels for two levels near each other; here
    nothing cancels. x_t: [B, ...]; leaves of levels and share: scalars or [B].
    """
    x0_t = teacher(x_t, level_t)
    x0_m = teacher(ddim_step(x_t, x0_t, level_t, level_m), level_m)
    weight = append_dims(share, x_t)
    return weight * x0_t + (1 - weight) * x0_m


def consistency_target(
    student: Denoiser, teacher: Denoiser, x_t: Array, level_t: Level, level_s: Level
) -> Array:
    """The student's own x0 one DDIM step of the teacher later.

    Consistency distillation, Algorithm 2 (arXiv:2303.01469). On data (sigma_s 0), where the path
    ends, it is the sample itself: the boundary condition. student: a moving average of the one that
    is trained, held constant. x_t: [B, ...]; leaves of levels: scalars or [B].

    The paper's path ends at sigma 0.002 and its network is the identity there by construction; here
    the path ends on data, where no network is called, and a student that predicts v, with
    x0 = alpha*x_t - sigma*v, becomes the identity by itself as sigma vanishes. So does one that
    predicts flow, or EDM's output.
    """
    x_s = ddim_step(x_t, teacher(x_t, level_t), level_t, level_s)
    return jnp.where(append_dims(level_s.sigma > 0, x_t), student(x_s, level_s), x_s)


# ------------------------------------------------------------------------------- the objective


def distillation_loss(
    network: Network,
    parameterization: Parameterization,
    rows: Rows,
    weights: np.ndarray,
    target: Target,
    times: TimeSampling,
    max_guidance: float = 1.0,
) -> Objective:
    """The loss of a student that learns a target.

    weight * mean of (student's output - the output of the target's x0)**2 for each example. Each
    example is at one of the rows [N], drawn by `times`. weights: [N], on the output of the student,
    as a weighting of loss.py gives them. The batch is that of `loss.denoising_loss`. No gradient
    flows through the target.

    max_guidance: above 1 the student is conditioned on a guidance scale too, drawn uniformly from 1
    to max_guidance; its condition, and the target's, is then (condition, scale [B, 1]).

    Raises: ValueError for weights of another length than the rows, and for a level where the
    student cannot be called, as `Parameterization.check`.
    """
    N = len(rows[0].t)
    parameterization.check(rows[0])
    if np.shape(weights) != (N,):
        raise ValueError(f"weights have shape {np.shape(weights)}, expected ({N},), one per row")

    def objective(params: Any, batch: Any, key: Array, *, training: bool = True) -> ExampleLoss:
        noisy = add_noise_to_batch(batch, key, times, (*rows, weights))
        level, *rest, weight = noisy.row
        condition: Condition = batch.get("condition")
        if max_guidance > 1:
            draw = partial(jax.random.uniform, shape=(1,), minval=1.0, maxval=max_guidance)
            condition = condition, jax.vmap(draw)(noisy.condition_keys)
        x0 = jax.lax.stop_gradient(target(condition, noisy.x_t, level, *rest))
        inputs = parameterization.inputs(noisy.x_t, level)
        keys = (noisy.dropout_keys,) if training else ()
        output = network(params, *inputs, condition, *keys)
        eps = eps_from_x0(noisy.x_t, x0, level)
        expected = parameterization.prediction.target(x0, eps, level)
        return ExampleLoss(weight * squared_error(output, expected), noisy.quartile)

    return objective


def init_from_teacher(fresh: Any, teacher: Any) -> Any:
    """A student's initial parameters: the teacher's, and fresh ones it lacks.

    Raises: ValueError, when called or traced, for a teacher with parameters that the student has
    not.
    """
    ours, theirs = (dict(jax.tree.leaves_with_path(tree)) for tree in (fresh, teacher))
    for path, leaf in theirs.items():
        if path not in ours or ours[path].shape != leaf.shape:
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"teacher parameter {name} of shape {leaf.shape} is not in the student"
            )
    return jax.tree.map_with_path(lambda path, leaf: theirs.get(path, leaf), fresh)
