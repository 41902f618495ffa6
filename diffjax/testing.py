"""Laws as code: hypothesis strategies, exact oracles, and checks.

They hold your own schedule, sampler or denoiser to what the library's own are held to.

    import numpy as np
    from hypothesis import given, strategies as st
    from diffjax import testing

    @given(testing.schedules(), st.data())
    def test_my_sampler_keeps_mean_and_variance(schedule, data):
        plan = my_sampler(schedule, data.draw(testing.visits(schedule)))
        testing.assert_plan(plan)

    def test_my_sampler_converges_at_order_two():
        testing.assert_order(my_sampler, 2)

Everything here is numpy in float64. `python -m diffjax.testing` prints the measured orders of the
library's solvers.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from diffjax import sampler, schedule, sde, solvers
from diffjax.denoiser import Denoiser
from diffjax.loss import TimeSampling
from diffjax.parameterization import Parameterization
from diffjax.process import Prediction, append_dims, eps_from_x0, q_sample
from diffjax.sampler import Plan
from diffjax.schedule import Level, Schedule, level_at

Maker = Callable[[Schedule, Any], Plan]  # (schedule, t) -> plan
DATA = Level(0, 1.0, 0.0)

# ----------------------------------------------------------------------------- strategies


@st.composite
def schedules(
    draw: st.DrawFn,
    most: int = 300,
    exploding: bool = False,
    terminal: bool = False,
    flow: bool = False,
) -> Schedule:
    """Variance-preserving schedules of 1..most levels, of every kind and of any betas.

    exploding: variance-exploding ones too; terminal: such without signal at level T too; flow:
    those of flow matching too, which have no signal there either.
    """
    T = draw(st.integers(1, most))
    kinds = ["linear", "scaled_linear", "cosine", "sigmoid", "logsnr", "betas"]
    kinds += ["edm", "exploding"] * exploding + ["terminal"] * (terminal and T > 1)
    kinds += ["flow"] * flow
    kind = draw(st.sampled_from(kinds))
    if kind == "linear":
        first = draw(st.floats(1e-5, 0.01))
        return schedule.linear(T, first, draw(st.floats(first, 0.2)))
    if kind == "scaled_linear":
        return schedule.scaled_linear(T, 1e-4, draw(st.floats(1e-3, 0.3)))
    if kind == "cosine":
        return schedule.cosine(T, draw(st.floats(1e-3, 0.1)))
    if kind == "sigmoid":
        return schedule.sigmoid(T, draw(st.floats(-4, 0)), draw(st.floats(1, 4)))
    if kind == "logsnr":
        top, bottom = draw(st.floats(2, 12)), draw(st.floats(-12, 0))
        return schedule.from_logsnr(lambda u: top + (bottom - top) * u, T)
    if kind == "flow":
        return schedule.flow(T, draw(st.floats(0.1, 10)))
    if kind == "edm":
        return schedule.edm(T, draw(st.floats(1e-3, 0.1)), draw(st.floats(1, 100)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = schedule.from_betas(10 ** generator.uniform(-4, -0.1, T))
    if kind == "exploding":
        # Far from the data alpha**2 vanishes in float64, where no such form exists.
        return schedule.variance_exploding(level_at(levels, slice(1 + min(T, 30))))
    return schedule.zero_terminal_snr(levels) if kind == "terminal" else levels


@st.composite
def visits(
    draw: st.DrawFn, levels: Schedule, most: int = 20, fractions: bool = False
) -> np.ndarray:
    """Levels that a sampler may visit: any decreasing choice of 1..T.

    fractions: levels between two of the table too.
    """
    T = schedule.length(levels)
    chosen = draw(st.sets(st.integers(1, T), min_size=1, max_size=min(T, most)))
    t = np.array(sorted(chosen, reverse=True))
    if fractions and T > 1 and levels.alpha[-1] > 0:
        t = np.unique(np.clip(t + draw(st.sampled_from([0.0, 0.25, -0.5])), 1, T))[::-1]
    return t


@st.composite
def pairs(draw: st.DrawFn, **kinds: bool) -> tuple[Level, Level]:
    """Two levels (t, s) of a schedule, t noisier than s, s perhaps data.

    kinds: the keyword arguments of `schedules`.
    """
    levels = draw(schedules(**kinds))
    t = draw(st.integers(1, schedule.length(levels)))
    return schedule.at(levels, t), schedule.at(levels, draw(st.integers(0, t - 1)))


# ----------------------------------------------------------------------------- oracles


def at_noise_time(u: Any) -> Level:
    """The variance-preserving level with log(sigma/alpha) = u, its t 0."""
    return Level(0, (1 + np.exp(2 * u)) ** -0.5, (1 + np.exp(-2 * u)) ** -0.5)


def gaussian_denoiser(mean: Any, std: Any) -> Denoiser:
    """E[x0 | x_t] for data N(mean, std**2), elementwise, in closed form.

    x0 = mean + alpha*std**2/(alpha**2*std**2 + sigma**2) * (x_t - alpha*mean)
    """

    def denoise(x_t: Any, level: Level) -> Any:
        alpha, sigma = append_dims(level.alpha, x_t), append_dims(level.sigma, x_t)
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        return mean + gain * (x_t - alpha * mean)

    return denoise


def gaussian_flow(x_t: Any, level: Level, mean: Any, std: Any, to: Level = DATA) -> Any:
    """The point to which the probability flow of N(mean, std**2) takes x_t.

    x_t is at `level`; the point is at level `to`. The flow keeps the distance to the mean in
    units of the standard deviation.
    """
    before = (level.alpha**2 * std**2 + level.sigma**2) ** 0.5
    after = (to.alpha**2 * std**2 + to.sigma**2) ** 0.5
    return to.alpha * mean + after * (x_t - level.alpha * mean) / before


def finite_denoiser(points: np.ndarray, std: float = 0.0) -> Denoiser:
    """E[x0 | x_t] for data that is one of the points [M, ...], plus noise of `std`.

    It is the mean of the estimates from each point alone, weighted by the probability of x_t
    under it: nonlinear, and exact for any data set. Levels: scalar leaves.
    """
    flat = points.reshape(len(points), -1)

    def denoise(x_t: Any, level: Level) -> Any:
        x = np.reshape(x_t, (len(x_t), -1))
        spread = level.alpha**2 * std**2 + level.sigma**2
        misfit = ((x[:, None] - level.alpha * flat) ** 2).sum(-1) / (2 * spread)
        weights = np.exp(misfit.min(1, keepdims=True) - misfit)
        center = weights / weights.sum(1, keepdims=True) @ flat
        return (center + level.alpha * std**2 / spread * (x - level.alpha * center)).reshape(
            np.shape(x_t)
        )

    return denoise


def run_plan(
    denoise: Denoiser,
    plan: Plan,
    x: Any,
    z: Any = None,
    history: tuple[Any, Any] | None = None,
    rows: Any = None,
) -> Any:
    """Run a plan row by row in numpy: the reference for `sampler.scan_plan`.

    z: the noise [N, ...], for a plan that draws; history: the two estimates of x0 before the
    first row, zeros if None; rows: the indices of the rows to run, all if None.
    """
    x0_1, x0_2 = history or (np.zeros_like(x), np.zeros_like(x))
    for i in range(plan.steps) if rows is None else rows:
        x0 = denoise(x, level_at(plan.level, i))
        x = plan.a[i] * x + plan.b[i] * x0 + plan.c[i, 0] * x0_1 + plan.c[i, 1] * x0_2
        if plan.d is not None:
            x = x + plan.d[i] * z[i]
        x0_1, x0_2 = x0, x0_1
    return x


def moments(plan: Plan, denoise: Denoiser, mean: float, variance: float) -> tuple[float, float]:
    """Mean and variance of a plan's samples from x_T ~ N(mean, variance), exactly.

    For a denoiser that is affine in x: then rows transform the joint mean and covariance of
    (x, x0_1, x0_2) in closed form. Elementwise.
    """
    m, cov = np.array([mean, 0.0, 0.0]), np.diag([variance, 0.0, 0.0])
    zero: Any = np.zeros(1)
    for i in range(plan.steps):
        level = level_at(plan.level, i)
        offset = denoise(zero, level)[0]
        slope = denoise(zero + 1, level)[0] - offset
        c_1, c_2 = plan.c[i]
        matrix = np.array([[plan.a[i] + plan.b[i] * slope, c_1, c_2], [slope, 0, 0], [0, 1, 0]])
        m = matrix @ m + np.array([plan.b[i] * offset, offset, 0])
        cov = matrix @ cov @ matrix.T
        cov[0, 0] += 0 if plan.d is None else plan.d[i] ** 2
    return float(m[0]), float(cov[0, 0])


# ----------------------------------------------------------------------------- laws


def assert_schedule(levels: Schedule) -> None:
    """Check a schedule: index 0 is data, and logsnr decreases at every level.

    All of it is finite float64, and respacing is indexing.
    """
    assert (levels.t[0], levels.alpha[0], levels.sigma[0]) == (0, 1, 0), (
        "index 0 is data: alpha 1, sigma 0"
    )
    assert list(levels.t) == list(range(len(levels.t))), "t counts the levels"
    assert all(leaf.dtype == np.float64 and np.isfinite(leaf).all() for leaf in levels[1:]), (
        "tables: finite float64"
    )
    assert (np.diff(schedule.logsnr(levels)) < 0).all(), "logsnr decreases"
    for t in (np.arange(len(levels.t))[::-1], 0, schedule.length(levels)):
        for picked, leaf in zip(schedule.at(levels, t), levels, strict=True):
            assert np.array_equal(picked, leaf[t]), "respacing is indexing"


def plan_errors(plan: Plan) -> dict[str, np.ndarray]:
    """The errors of each row of a plan in the laws that samplers obey, [N].

    With s the level where the row lands:

    mean: a*alpha_t + b + c1 + c2 - alpha_s, so that the true x0 stays the mean; variance:
    (a**2*sigma_t**2 + d**2)/sigma_s**2 - 1, so that x_s is as noisy as its level; where sigma_s
    is 0, the numerator itself. Variances larger than fixed_small, and churn with s_noise above 1,
    exceed it.
    """
    alpha_s, sigma_s = (
        np.append(plan.level.alpha[1:], DATA.alpha),
        np.append(plan.level.sigma[1:], DATA.sigma),
    )
    d = 0.0 if plan.d is None else plan.d
    noise = plan.a**2 * plan.level.sigma**2 + d**2
    return {
        # b and c first: Heun's corrections are large, and cancel.
        "mean": plan.a * plan.level.alpha + (plan.b + plan.c.sum(1)) - alpha_s,
        "variance": np.where(
            sigma_s > 0, noise / np.where(sigma_s > 0, sigma_s, 1) ** 2 - 1, noise
        ),
    }


def assert_plan(plan: Plan, variance: bool = True, tolerance: float = 1e-12) -> None:
    """Check a plan: its rows keep the mean and the variance, and the last returns x0.

    Levels get noisier by churn only, whose rows draw noise; and rows are numbered from 1.
    variance: False for plans that exceed it by design, see `plan_errors`.
    """
    sampler.check_plan(plan)
    errors = plan_errors(plan)
    # Where two levels are nearly equal, extrapolation makes b and c large; rounding of their
    # sum is relative to the largest of them.
    size = np.maximum(1, np.abs(np.column_stack([plan.b, plan.c])).max(axis=1))
    worst = (np.abs(errors["mean"]) / size).max()
    assert worst <= tolerance, f"mean: a*alpha_t + b + c1 + c2 differs from alpha_s by {worst:.3g}"
    worst = np.abs(errors["variance"]).max()
    assert not variance or worst <= tolerance, (
        f"variance: a**2*sigma_t**2 + d**2 differs from sigma_s**2 by {worst:.3g} of it"
    )
    rises = np.flatnonzero(np.diff(plan.level.t) > 0)
    assert not len(rises) or (plan.d is not None and (plan.d[rises] > 0).all()), (
        "level: rises in a row that draws no noise"
    )
    last = (plan.a[-1], plan.b[-1], *plan.c[-1], 0.0 if plan.d is None else plan.d[-1])
    assert last == (0, 1, 0, 0, 0), f"x0: the last row is {last}, expected a 0, b 1 and no others"
    numbers = list(range(1, plan.steps + 1))
    assert list(plan.noise_index) == numbers, "noise_index: rows are numbered from 1"


def assert_forms(make: Maker, levels: Schedule, t: Any, tolerance: float = 1e-7) -> None:
    """Check that a path and its variance-preserving form give the same images.

    The denoiser is not linear, and sees x and its level in the latter form; from the same noise, a
    sampler ends at the same image. tolerance: relative to the largest value.
    """

    def denoise(x: Any, level: Level) -> Any:
        with np.errstate(divide="ignore"):
            half = np.log(level.alpha / level.sigma)
        return np.tanh(x / np.hypot(level.alpha, level.sigma) + np.tanh(half))

    forms = levels, schedule.variance_preserving(levels)
    plans = [make(form, t) for form in forms]
    z = np.random.default_rng(0).normal(size=(plans[0].steps + 1, 4))
    images = [run_plan(denoise, plan, plan.init_noise_sigma * z[0], z[1:]) for plan in plans]
    wrong = np.abs(images[0] - images[1]).max()
    assert wrong <= tolerance * max(1, np.abs(images[1]).max()), (
        f"images: differ by {wrong:.3g} from those of the variance-preserving form"
    )


def assert_prediction(prediction: Prediction, levels: Schedule, tolerance: float = 1e-9) -> None:
    """Check that a prediction determines x0 at every noisy level.

    Its two directions are inverse to each other, and an error of x0 moves it by the root of its
    output_sensitivity. tolerance: relative to the largest value.
    """
    x0, eps = np.random.default_rng(0).normal(size=(2, 5))
    for t in range(1, len(levels.t)):
        level = schedule.at(levels, t)
        x_t = q_sample(x0, eps, level)
        wrong = np.abs(prediction.to_x0(x_t, prediction.target(x0, eps, level), level) - x0).max()
        assert wrong <= tolerance * np.abs(x0).max(), f"to_x0: off by {wrong:.3g} at level {t}"
        outputs = [prediction.target(x, eps_from_x0(x_t, x, level), level) for x in (x0, x0 + 1.0)]
        found, expected = (outputs[1] - outputs[0]) ** 2, prediction.output_sensitivity(level)
        assert (np.abs(found - expected) <= 1e-5 * expected + 1e-12).all(), (
            f"output_sensitivity: {expected:.6g} at level {t}, and an error moves it by {found}"
        )


def assert_rescalable(parameterization: Parameterization, levels: Schedule) -> None:
    """Check that a network serves every rescaled form of a path.

    At factor*x_t, with alpha and sigma times the same factor, it has the same inputs, target and
    estimate of x0: to 1e-5, since a time may be computed in float32.
    """
    x0, eps = np.random.default_rng(0).normal(size=(2, 5))
    prediction = parameterization.prediction
    for t in range(1, len(levels.t)):
        level, values = schedule.at(levels, t), []
        for factor in (1.0, 0.01, 30.0):
            scaled = Level(level.t, factor * level.alpha, factor * level.sigma)
            x_t, target = q_sample(x0, eps, scaled), prediction.target(x0, eps, scaled)
            values.append(
                {
                    "network_time": parameterization.network_time(scaled),
                    "input_scale": parameterization.input_scale(scaled) * x_t,
                    "target": target,
                    "to_x0": prediction.to_x0(x_t, target + 0.1, scaled),
                }
            )
        for name, expected in values[0].items():
            bound = 1e-5 * max(1, np.abs(expected).max())
            for other in values[1:]:
                assert np.abs(other[name] - expected).max() <= bound, (
                    f"{name}: depends on the scale of the path at level {t}"
                )


def assert_times(times: TimeSampling, levels: Level, probability: Any, draws: int = 20_000) -> None:
    """Check that each of the noisy levels [T] is drawn with its probability [T].

    The largest difference of the two cumulative distributions is at most 2/sqrt(draws), as it is
    for one in 1,500 of right ones; and a draw does not depend on how a batch is split.
    """
    key, index = jax.random.key(0), jnp.arange(draws, dtype=jnp.uint32)
    t = np.asarray(times(key, index, levels))
    assert t.min() >= 1, f"t: {t.min()}, below 1"
    assert t.max() <= len(levels.t), f"t: {t.max()}, above {len(levels.t)}"
    found = np.bincount(t, minlength=len(levels.t) + 1)[1:] / draws
    wrong = np.abs(np.cumsum(found - probability)).max()
    assert wrong <= 2 / draws**0.5, f"probability: cumulated, it differs by {wrong:.3g}"
    part = np.asarray(times(key, index[7:50], levels))
    assert (part == t[7:50]).all(), "index: draws depend on the batch that an example is in"


def measured_order(
    make: Maker, steps: Sequence[int] = (40, 80, 160, 320), warm: int = 0
) -> np.ndarray:
    """The order of convergence to the exact probability flow of Gaussian data.

    One slope per doubling of the steps, on lambda = log(alpha/sigma) from -1 to 2 in equal steps:
    both ends away from infinity, since onto data every sampler is of order one. warm: rows at the
    start that are replaced by the exact solution, for samplers that need history.
    """
    mean, std, x = 0.3, 0.5, np.linspace(-2, 2, 5)
    denoise, errors = gaussian_denoiser(mean, std), []
    for n in steps:
        # Level n + 1 has lambda -1, level 1 has 2; the row from level 1 onto data is left out.
        levels = schedule.from_logsnr(lambda u, n=n: 2 * (2 - 3 * (u * (n + 1) - 1) / n), n + 1)
        plan = make(levels, np.arange(n + 1, 0, -1))
        exact = [
            gaussian_flow(x, level_at(plan.level, 0), mean, std, level_at(plan.level, i))
            for i in range(warm + 1)
        ]
        estimates = [denoise(exact[i], level_at(plan.level, i)) for i in range(warm)]
        history = (estimates[-1], estimates[-2]) if warm > 1 else None
        found = run_plan(
            denoise, plan, exact[warm], history=history, rows=range(warm, plan.steps - 1)
        )
        expected = gaussian_flow(x, level_at(plan.level, 0), mean, std, schedule.at(levels, 1))
        errors.append(np.abs(found - expected).max())
    return np.log2(np.divide(errors[:-1], errors[1:])) / np.log2(np.divide(steps[1:], steps[:-1]))


def assert_order(make: Maker, order: float, warm: int = 0) -> None:
    """Check the order of convergence, to a quarter, at doublings from 40 to 320 steps."""
    slopes = measured_order(make, warm=warm)
    assert (np.abs(slopes - order) <= 0.25).all(), f"order: measured {slopes}, expected {order}"


def assert_denoiser(denoise: Denoiser, x: Any, levels: Schedule, tolerance: float = 1e-5) -> None:
    """Check that a denoiser is a function of each image and its level alone.

    It is finite, has the shape of x [B, ...], is the same for a level given once and given per
    image, and the same whatever else is in the batch. tolerance: relative to the largest value.
    """
    T = schedule.length(levels)
    for t in {1, (T + 1) // 2, T}:
        level = schedule.at(levels, t)
        whole = np.asarray(denoise(x, level))
        assert whole.shape == np.shape(x), f"shape: {whole.shape}, expected {np.shape(x)}"
        assert np.isfinite(whole).all(), f"finite: the estimate at level {t} is not"
        bound = tolerance * max(1, np.abs(whole).max())
        each = schedule.at(levels, np.full(len(x), t))
        assert np.abs(np.asarray(denoise(x, each)) - whole).max() <= bound, (
            "level: one per image changes the estimate"
        )
        assert np.abs(np.asarray(denoise(x[:1], level)) - whole[:1]).max() <= bound, (
            "batch: its size changes the estimate"
        )
        assert np.abs(np.asarray(denoise(x[::-1], level))[::-1] - whole).max() <= bound, (
            "batch: its order changes the estimate"
        )


def assert_interval(
    guided: Denoiser, plain: Denoiser, x: Any, levels: Schedule, low: float, high: float
) -> None:
    """Check that guidance in an interval low..high of sigma/alpha is scale 1 outside.

    Outside, `guided` is the conditional denoiser `plain`; if there are levels inside, it differs
    at one of them.
    """
    ratio, differs = np.exp(sde.noise_time(levels)), []
    for t in range(1, len(ratio)):
        level = schedule.at(levels, t)
        one, other = (np.asarray(denoise(x, level)) for denoise in (guided, plain))
        if low <= ratio[t] <= high:
            differs.append((one != other).any())
        else:
            assert np.allclose(one, other, rtol=1e-5, atol=1e-6), (
                f"interval: guided outside of it, at sigma/alpha {ratio[t]:.3g}"
            )
    assert not differs or any(differs), "interval: nothing is guided inside of it"


def assert_bounded(
    denoise: Denoiser, x: Any, levels: Schedule, low: float = -1.0, high: float = 1.0
) -> None:
    """Check that estimates lie in low..high, at the first, middle and last level."""
    for t in {1, (schedule.length(levels) + 1) // 2, schedule.length(levels)}:
        x0 = np.asarray(denoise(x, schedule.at(levels, t)))
        slack = 1e-6 * max(abs(low), abs(high))
        assert (low - slack <= x0).all(), f"x0: {x0.min()} at level {t}, below {low}"
        assert (x0 <= high + slack).all(), f"x0: {x0.max()} at level {t}, above {high}"


def assert_inpainting(
    inpainted: Denoiser, denoise: Denoiser, known: Any, mask: Any, x: Any, levels: Schedule
) -> None:
    """Check that inpainting keeps the known part exactly, and `denoise` elsewhere.

    Then so do samples, since the last row of a plan returns the estimate.
    """
    mask = np.broadcast_to(mask, np.shape(x))
    for t in {1, (schedule.length(levels) + 1) // 2, schedule.length(levels)}:
        level = schedule.at(levels, t)
        found, free = np.asarray(inpainted(x, level)), np.asarray(denoise(x, level))
        assert (found[mask == 1] == np.asarray(known)[mask == 1]).all(), (
            f"known: pixels of it change at level {t}"
        )
        assert np.allclose(found[mask == 0], free[mask == 0], rtol=1e-5, atol=1e-6), (
            f"mask: where it is 0 the estimate changes at level {t}"
        )


def reconstruction_errors(
    denoise: Denoiser, x0: Any, levels: Schedule, steps: Sequence[int]
) -> np.ndarray:
    """Mean squared errors of x0 encoded and decoded by DDIM, one for each of `steps`.

    Values are taken in [0, 1], half of those in [-1, 1], as in table 2 of arXiv:2010.02502.
    """
    errors = []
    for n in steps:
        t = schedule.linspace(levels, n)
        noise = run_plan(denoise, sampler.encode(levels, t), x0)
        again = run_plan(denoise, sampler.ddim(levels, t), noise)
        errors.append(np.mean((np.asarray(again) - np.asarray(x0)) ** 2) / 4)
    return np.array(errors)


def assert_reconstruction(
    denoise: Denoiser,
    x0: Any,
    levels: Schedule,
    steps: Sequence[int] = (10, 20, 50, 100, 200, 500, 1000),
) -> None:
    """Check that the error of encoding and decoding falls with the steps.

    As in table 2 of arXiv:2010.02502.
    """
    errors = reconstruction_errors(denoise, x0, levels, steps)
    assert (np.diff(errors) < 0).all(), f"error: {errors} for {steps} steps, expected to fall"


def assert_probability_flow(velocity: Callable[[Any, Any, Level], Any], levels: Schedule) -> None:
    """Check that velocity(x, x0, level) is dx/du of the probability flow.

    With u = log(sigma/alpha): for Gaussian data it is tangent to the exact flow at every level.
    """
    mean, std, width = 0.3, 0.5, 1e-4
    x: Any = np.linspace(-2, 2, 5)
    denoise = gaussian_denoiser(mean, std)
    for t in range(1, len(levels.t)):
        level, u = schedule.at(levels, t), sde.noise_time(schedule.at(levels, t))
        ends = [at_noise_time(u + side) for side in (width, -width)]
        up, down = (gaussian_flow(x, level, mean, std, end) for end in ends)
        found = velocity(x, denoise(x, level), level)
        wrong = np.abs((up - down) / (2 * width) - found).max()
        assert wrong <= 1e-6, f"velocity: differs from the flow by {wrong:.3g} at level {t}"


def assert_exponential_euler(
    step: Callable[[Any, Any, Level, Level], Any], level_t: Level, level_s: Level
) -> None:
    """Check that step(x_t, x0, level_t, level_s) is the exponential Euler step.

    DDIM is that step. It is the exact solution of the probability flow from t to s with eps held
    constant, here found by Runge and Kutta's method in small steps.
    """
    x_t, x0 = np.linspace(-2, 2, 5), np.linspace(1, -1, 5)
    eps = (x_t - level_t.alpha * x0) / level_t.sigma
    us, x = np.linspace(sde.noise_time(level_t), sde.noise_time(level_s), 401), x_t

    def velocity(x: Any, u: Any) -> Any:
        level = at_noise_time(u)
        return sde.probability_flow(x, (x - level.sigma * eps) / level.alpha, level)

    for u, h in zip(us[:-1], np.diff(us), strict=True):
        k_1 = velocity(x, u)
        k_2 = velocity(x + h / 2 * k_1, u + h / 2)
        k_3 = velocity(x + h / 2 * k_2, u + h / 2)
        x = x + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + velocity(x + h * k_3, u + h))
    wrong = np.abs(step(x_t, x0, level_t, level_s) - x).max()
    assert wrong <= 1e-6 * np.abs(x).max(), (
        f"step: differs from the flow with constant eps by {wrong:.3g}"
    )


def assert_log_density(
    log_density: Callable[[Any], Any], mean: Any, std: Any, x: Any, tolerance: float = 0.01
) -> None:
    """Check that log_density(x) [B], in nats, is that of N(mean, std**2) elementwise.

    x: [B, ...]; tolerance: for each image, relative to its log density, or to one nat per
    dimension if that is more.
    """
    exact = -0.5 * ((x - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
    exact = np.sum(np.broadcast_to(exact, np.shape(x)), axis=tuple(range(1, np.ndim(x))))
    found = np.asarray(log_density(x))
    assert found.shape == exact.shape, f"shape: {found.shape}, expected {exact.shape}"
    wrong = np.abs(found - exact) / np.maximum(np.abs(exact), np.size(x) / len(exact))
    i = int(np.argmax(wrong))
    assert wrong[i] <= tolerance, (
        f"log_density: {found[i]:.6g} for image {i}, expected {exact[i]:.6g}"
    )


def assert_halving(
    student: Callable[[Denoiser], Denoiser], teacher: Denoiser, levels: Schedule, steps: int, x: Any
) -> None:
    """Check that one DDIM step by `student(teacher)` ends where the teacher's two end.

    The student takes so many steps over trailing levels, the teacher twice as many: from x [B,
    ...], at every step, onto data too, to 1e-9 of the largest number; and so for all of them in
    sequence.
    """
    one, two = (sampler.ddim(levels, schedule.trailing(levels, n)) for n in (steps, 2 * steps))
    halved = student(teacher)
    for rows in [*([i] for i in range(steps)), list(range(steps))]:
        expected = run_plan(teacher, two, x, rows=[row for i in rows for row in (2 * i, 2 * i + 1)])
        wrong = np.abs(run_plan(halved, one, x, rows=rows) - expected).max()
        bound = 1e-9 * max(1, np.abs(expected).max(), np.abs(x).max())
        assert wrong <= bound, (
            f"student: differs by {wrong:.3g} from two steps from level {one.level.t[rows[0]]}"
        )


def assert_consistency(
    target: Callable[[Denoiser, Denoiser], Denoiser],
    teacher: Denoiser,
    levels: Schedule,
    steps: int,
    x: Any,
) -> None:
    """Check that the end of the teacher's path is a fixed point of the target.

    The target is `target(student, teacher)`. If the student outputs the end of the teacher's DDIM
    over the trailing levels of so many steps, from each of them, so does the target, to 1e-9. At
    the last of them the student is not called, so that it has to learn the end from the teacher:
    the boundary condition.
    """
    plan = sampler.ddim(levels, schedule.trailing(levels, steps))
    first = {t: i for i, t in enumerate(plan.level.t)}

    def end(x_t: Any, level: Level) -> Any:
        if level.sigma == 0:
            return np.full_like(x_t, np.nan)
        return run_plan(teacher, plan, x_t, rows=range(first[int(level.t)], steps))

    for i in range(steps):
        level = level_at(plan.level, i)
        expected = end(x, level)
        wrong = np.abs(np.asarray(target(end, teacher)(x, level)) - expected).max()
        assert wrong <= 1e-9 * max(1, np.abs(expected).max()), (
            f"target: differs from the end of the path by {wrong:.3g} at level {level.t}"
        )


def _resampled(make: Maker) -> Maker:
    return lambda levels, t: solvers.repaint(make(levels, t), resamples=3, jump_length=2)


# Every kind of plan that the library makes, for laws that hold for all.
MAKERS: dict[str, Maker] = {
    "ddim": sampler.ddim,
    "ddim, eta 0.3": partial(sampler.ddim, eta=0.3),
    "ddim, eta 1": partial(sampler.ddim, eta=1.0),
    "ddpm": sampler.ddpm,
    "dpm_solver_pp_2m": solvers.dpm_solver_pp_2m,
    "dpm_solver_pp_2m, eta 0.5": partial(solvers.dpm_solver_pp_2m, eta=0.5),
    "dpm_solver_pp_2m, eta 1": partial(solvers.dpm_solver_pp_2m, eta=1.0),
    "dpm_solver_pp_3m": solvers.dpm_solver_pp_3m,
    "exponential_ab3": solvers.exponential_ab3,
    "unipc_2": solvers.unipc_2,
    "heun": solvers.heun,
    "consistency": solvers.consistency,
    "ddim, resampled": _resampled(sampler.ddim),
    "ddpm, resampled": _resampled(sampler.ddpm),
}
# They need signal at every level.
CHURNING: dict[str, Maker] = {"edm": partial(solvers.edm, s_noise=1.0)}
# They leave more noise than a level has; for variance-preserving schedules.
EXCESSIVE: dict[str, Maker] = {
    "ddpm, fixed_large": sampler.sigma_hat,
    "ddpm, interpolated 0.3": partial(sampler.ddpm, std=sampler.interpolated_variance(0.3)),
}

# Order of convergence, and the number of first rows that it is measured without: solvers of order
# 3 start from exact history, as their own first rows have none and are of lower order. UniPC's
# corrector uses one estimate more than its predictor.
ORDERS: dict[str, tuple[int, int]] = {
    "ddim": (1, 0),
    "heun": (2, 0),
    "dpm_solver_pp_2m": (2, 0),
    "dpm_solver_pp_3m": (2, 2),
    "exponential_ab3": (3, 2),
    "unipc_2": (3, 0),
}

if __name__ == "__main__":
    print("| sampler | order | measured, 40 to 80 steps | 80 to 160 | 160 to 320 |")
    print("|---|---|---|---|---|")
    for name, (order, warm) in ORDERS.items():
        slopes = " | ".join(f"{slope:.2f}" for slope in measured_order(MAKERS[name], warm=warm))
        print(f"| `{name}`{', from exact history' if warm else ''} | {order} | {slopes} |")
