"""Distillation: what a student that takes few steps should say, so that it does what its teacher does in many.

A teacher is a denoiser, and so is what a student learns: of x_t at one level it says an x0. Three targets, all of them
functions of the teacher: its estimate itself, two passes of guidance in one (arXiv:2210.03142); the x0 that takes one
step of DDIM to where the teacher's two lead (arXiv:2202.00512); and the x0 where the rest of its path ends
(arXiv:2303.01469).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffjax.denoiser import Denoiser
from diffjax.loss import Objective, TimeSampling, TrainingNetwork, add_noise_to_batch, squared_error
from diffjax.process import Prediction, append_dims, eps_from_x0, sqrt_snr_ratio
from diffjax.sampler import ddim_step
from diffjax.schedule import Level, Schedule, at, trailing

Rows = tuple[Any, ...]  # of a table [N]: the Level where the student is called, and what else its target reads
Target = Callable[..., Any]  # (condition, x_t, *row) -> x0

# ---------------------------------------------------------------------------------------------- which levels


def all_levels(schedule: Schedule) -> tuple[Level]:
    """Levels 1..T: of a student that any sampler may call."""
    return (at(schedule, np.arange(1, len(schedule.t))),)


def adjacent_levels(schedule: Schedule, steps: int) -> tuple[Level, Level]:
    """(t, s): the levels of `trailing(schedule, steps)`, the least noisy first, and of each the one that a sampler goes
    to from there, at last data. ValueError for other steps than 1..T.
    """
    t = trailing(schedule, steps)
    return at(schedule, t[::-1]), at(schedule, np.append(t[1:], 0)[::-1])


def halving_levels(schedule: Schedule, steps: int) -> tuple[Level, Level, Level, np.ndarray]:
    """(t, m, s, share): each step t -> s of a student of so many steps with the level m between, where its teacher of
    twice as many is called too, and the share of `progressive_target`, float64 [steps]. The least noisy first. The student is
    called exactly where `trailing(schedule, steps)` calls it: its levels are every other one of the teacher's, at any
    T, since they are rounded alike. ValueError unless the teacher's steps are 2..T.

    share = (r_ms - r_ts)/(1 - r_ts), r the `sqrt_snr_ratio` of two levels: how far m is from t on the way to s, as
    alpha/sigma goes. Onto data it is 0.
    """
    t, s = adjacent_levels(schedule, 2 * steps)
    level_t, level_m, level_s = (
        Level(*(leaf[which::2] for leaf in level)) for level, which in ((t, 1), (t, 0), (s, 0))
    )
    r_ts = sqrt_snr_ratio(level_t, level_s)
    return level_t, level_m, level_s, (sqrt_snr_ratio(level_m, level_s) - r_ts) / (1 - r_ts)


# ---------------------------------------------------------------------------------------------- what to say there


def progressive_target(teacher: Denoiser, x_t: Any, level_t: Level, level_m: Level, level_s: Level, share: Any) -> Any:
    """The x0 whose one step of DDIM from t to s ends where the teacher's two over m end: progressive distillation,
    Algorithm 2 (arXiv:2202.00512).

    Both of its steps leave the share sigma_s/sigma_t of x_t, as the one does, so that what is to be said is a mean of
    the teacher's two estimates, share*x0(x_t) + (1 - share)*x0(x_m), with the share of `halving_levels`. Its paper divides by
    what one step gives to x0, which cancels where the two levels are near; here nothing does. x_t: [B, ...]; leaves of
    levels and share: scalars or [B].
    """
    x0_t = teacher(x_t, level_t)
    x0_m = teacher(ddim_step(x_t, x0_t, level_t, level_m), level_m)
    weight = append_dims(share, x_t)
    return weight * x0_t + (1 - weight) * x0_m


def consistency_target(student: Denoiser, teacher: Denoiser, x_t: Any, level_t: Level, level_s: Level) -> Any:
    """The x0 that the student itself says one step of the teacher's DDIM later: consistency distillation, Algorithm 2
    (arXiv:2303.01469). On data (sigma_s 0), where the path ends, it is the sample as it is: the boundary condition,
    from which all levels above learn where it ends. student: an average of the one that learns, held still.

    x_t: [B, ...]; leaves of levels: scalars or [B]. The paper's path ends at sigma 0.002 and its network is made to be
    the identity there; here it ends on data, where no network is called, and a student that says v, with
    x0 = alpha*x_t - sigma*v, becomes the identity by itself as sigma vanishes.
    """
    x_s = ddim_step(x_t, teacher(x_t, level_t), level_t, level_s)
    return jnp.where(append_dims(level_s.sigma > 0, x_t), student(x_s, level_s), x_s)


# ---------------------------------------------------------------------------------------------- the objective


def distillation_loss(
    network: TrainingNetwork,
    prediction: Prediction,
    rows: Rows,
    weights: np.ndarray,
    target: Target,
    times: TimeSampling,
    largest: float = 1.0,
) -> Objective:
    """weight * mean of (what the student says of x_t - what it would say of the target's x0)**2 per example, at one of
    the rows [N] that `times` draws: it draws of 1..N what it draws of 1..T else. weights: [N], of the student's
    prediction, as a weighting of loss.py gives them.

    The batch is that of `loss.denoising_loss`. largest: of the guidance scales that the student is told, uniform from 1 on;
    its condition is then (label [B], scale [B, 1]), and that of the target too. 1 for none. Nothing is learned through
    the target. ValueError for weights of another length than the rows.
    """
    N = len(rows[0].t)
    if np.shape(weights) != (N,):
        raise ValueError(f"there are {N} rows and weights of shape {np.shape(weights)}: give one weight per row")

    def objective(params: Any, batch: Any, key: Array) -> Array:
        (level, *rest, weight), x_t, _, for_scale, for_dropout = add_noise_to_batch(batch, key, times, (*rows, weights))
        condition = batch.get("label")
        if largest > 1:
            draw = partial(jax.random.uniform, shape=(1,), minval=1.0, maxval=largest)
            condition = condition, jax.vmap(draw)(for_scale)
        goal = jax.lax.stop_gradient(target(condition, x_t, level, *rest))
        output = network(params, x_t, level.t - 1, condition, for_dropout)
        return weight * squared_error(output, prediction.target(goal, eps_from_x0(x_t, goal, level), level))

    return objective


def init_from_teacher(fresh: Any, teacher: Any) -> Any:
    """A student's parameters before its first step: the teacher's, and fresh ones for what the teacher has not.
    ValueError, when called or traced, for a teacher with others.
    """
    ours, theirs = (dict(jax.tree.leaves_with_path(tree)) for tree in (fresh, teacher))
    for path, leaf in theirs.items():
        if path not in ours or ours[path].shape != leaf.shape:
            raise ValueError(f"the teacher has {jax.tree_util.keystr(path)} of {leaf.shape}, which the student has not")
    return jax.tree.map_with_path(lambda path, leaf: theirs.get(path, leaf), fresh)
