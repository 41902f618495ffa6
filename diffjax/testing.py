"""Laws as code: hypothesis strategies and exact oracles, public, so that users can hold their own schedules, samplers
and denoisers to what the library's own are held to.

    from hypothesis import given
    from diffjax.testing import plan_errors, schedules

    @given(schedules())
    def test_my_sampler(schedule):
        assert plan_errors(my_plan(schedule))["mean"] < 1e-12
"""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from diffjax import sampler, schedule
from diffjax.denoiser import Denoiser
from diffjax.process import expand
from diffjax.sampler import Plan
from diffjax.schedule import Level, Schedule


@st.composite
def schedules(draw: st.DrawFn, most: int = 300) -> Schedule:
    """Schedules of 1..most levels: linear, cosine, and any betas."""
    T = draw(st.integers(1, most))
    kind = draw(st.sampled_from(["linear", "cosine", "betas"]))
    if kind == "linear":
        first = draw(st.floats(1e-5, 0.01))
        return schedule.linear(T, first, draw(st.floats(first, 0.2)))
    if kind == "cosine":
        return schedule.cosine(T, draw(st.floats(1e-3, 0.1)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return schedule.from_betas(10 ** generator.uniform(-4, -0.1, T))


@st.composite
def visits(draw: st.DrawFn, levels: Schedule) -> np.ndarray:
    """Levels that a sampler may visit: any decreasing choice of 1..T."""
    T = schedule.length(levels)
    chosen = draw(st.sets(st.integers(1, T), min_size=1, max_size=min(T, 20)))
    return np.array(sorted(chosen, reverse=True))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Level, Level]:
    """Neighbouring levels (t, s) of a schedule, t noisier than s, s perhaps data."""
    levels = draw(schedules())
    t = draw(st.integers(1, schedule.length(levels)))
    return schedule.at(levels, t), schedule.at(levels, draw(st.integers(0, t - 1)))


def gaussian_denoiser(mean: Any, std: Any) -> Denoiser:
    """E[x0 | x_t] where data is N(mean, std**2), elementwise: the denoiser that training would find, in closed form.

    x0 = mean + alpha*std**2/(alpha**2*std**2 + sigma**2) * (x_t - alpha*mean)
    """

    def denoise(x_t: Any, level: Level) -> Any:
        alpha, sigma = expand(level.alpha, x_t), expand(level.sigma, x_t)
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        return mean + gain * (x_t - alpha * mean)

    return denoise


def gaussian_flow(x_T: Any, level: Level, mean: Any, std: Any) -> Any:
    """Where the probability flow of N(mean, std**2) takes x_T at `level` on its way to data: it keeps the distance to
    the mean in units of the standard deviation.
    """
    spread = (level.alpha**2 * std**2 + level.sigma**2) ** 0.5
    return mean + std * (x_T - level.alpha * mean) / spread


def run_plan(denoise: Denoiser, plan: Plan, x: Any, z: Any = None) -> Any:
    """A plan row by row in numpy, float64, with the noise z [N, ...] given: what `sampler.advance` must agree with."""
    x0_1 = x0_2 = np.zeros_like(x)
    for i in range(plan.steps):
        level = Level(*(leaf[i] for leaf in plan.level))
        x0 = denoise(x, level)
        x = plan.a[i] * x + plan.b[i] * x0 + plan.c[i, 0] * x0_1 + plan.c[i, 1] * x0_2
        if plan.d is not None:
            x = x + plan.d[i] * z[i]
        x0_1, x0_2 = x0, x0_1
    return x


def plan_errors(plan: Plan) -> dict[str, float]:
    """By how much the rows of a plan miss what every sampler owes, at the worst row:

    mean: a*alpha_t + b + c1 + c2 = alpha_s, so that the true x0 stays the mean;
    variance: a**2*sigma_t**2 + d**2 = sigma_s**2, so that x_s is as noisy as its level says (not owed by fixed_large,
    nor by rows with c);
    landing: the last row returns x0 exactly.
    """
    alpha_s, sigma_s = np.append(plan.level.alpha[1:], 1.0), np.append(plan.level.sigma[1:], 0.0)
    d = 0.0 if plan.d is None else plan.d
    last = (
        abs(plan.a[-1]) + abs(plan.b[-1] - 1) + np.abs(plan.c[-1]).sum() + (0.0 if plan.d is None else abs(plan.d[-1]))
    )
    return {
        "mean": float(np.abs(plan.a * plan.level.alpha + plan.b + plan.c.sum(1) - alpha_s).max()),
        "variance": float(np.abs(plan.a**2 * plan.level.sigma**2 + d**2 - sigma_s**2).max()),
        "landing": float(last),
    }


def all_plans(levels: Schedule, t: Any) -> dict[str, Plan]:
    """Every kind of plan over the same visits, for laws that hold for all."""
    plans = {f"ddim, eta {eta}": sampler.ddim(levels, t, eta) for eta in (0.0, 0.3, 1.0)}
    return plans | {f"ddpm, {name}": sampler.ddpm(levels, t, std) for name, std in sampler.VARIANCES.items()}
