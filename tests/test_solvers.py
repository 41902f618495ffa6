"""Solvers against a second derivation each, written as their papers write them, and against their
order."""

import numpy as np
import pytest
from helpers import naming
from hypothesis import assume, given
from hypothesis import strategies as st

from diffjax import sampler, schedule, solvers
from diffjax.schedule import Level, level_at
from diffjax.testing import (
    MAKERS,
    ORDERS,
    assert_order,
    assert_plan,
    finite_denoiser,
    gaussian_denoiser,
    gaussian_flow,
    moments,
    run_plan,
    schedules,
    visits,
)


def denoise(x, level):
    """Nonlinear, and different at every level."""
    return np.tanh(x + level.sigma) / 2 + 0.1 * level.alpha


def grid(levels, t):
    """The visited levels and data, as lists to index: alpha, sigma, lambda."""
    visited = schedule.at(levels, np.append(t, 0))
    with np.errstate(divide="ignore"):
        return visited.alpha, visited.sigma, np.log(visited.alpha / visited.sigma)


def level_of(levels, t, i):
    return schedule.at(levels, t[i])


def check(make, direct, levels, t, seed, noises=1):
    plan = make(levels, t)
    x, *z = np.random.default_rng(seed).normal(size=(1 + noises * (plan.steps + 1), 4))
    found = run_plan(denoise, plan, x, z)
    np.testing.assert_allclose(found, direct(levels, t, x, z), atol=1e-9, rtol=1e-9)


DRAWN = given(schedules(exploding=True), st.data(), st.integers(0, 99))


# ----------------------------------------------------------------------------- first order


@DRAWN
def test_ddim_is_exponential_euler(levels, data, seed):
    """sigma_s/sigma_t*x - alpha_s*(exp(-h) - 1)*x0: equation 4.1 of arXiv:2211.01095."""

    def direct(levels, t, x, z):
        alpha, sigma, lam = grid(levels, t)
        for i in range(len(t)):
            x0 = denoise(x, level_of(levels, t, i))
            x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * np.expm1(lam[i] - lam[i + 1]) * x0
        return x

    t = data.draw(visits(levels, fractions=True))
    check(sampler.ddim, direct, levels, t, seed)
    check(sampler.euler, direct, levels, t, seed)


@DRAWN
def test_consistency(levels, data, seed):
    """It noises every estimate afresh."""

    def direct(levels, t, x, z):
        alpha, sigma, _ = grid(levels, t)
        for i in range(len(t)):
            x = alpha[i + 1] * denoise(x, level_of(levels, t, i)) + sigma[i + 1] * z[i]
        return x

    check(solvers.consistency, direct, levels, data.draw(visits(levels)), seed)


# ----------------------------------------------------------------------------- second order


@DRAWN
def test_2m_keeps_the_noise_of_ddim(levels, data, seed):
    """For every eta: the coefficient of x and the noise are those of DDIM, and x0 is extrapolated
    as without noise."""
    eta = data.draw(st.floats(0, 1))
    t = data.draw(visits(levels))
    first, second = sampler.ddim(levels, t, eta), solvers.dpm_solver_pp_2m(levels, t, eta)

    def direct(levels, t, x, z):
        _, _, lam = grid(levels, t)
        before = None
        for i in range(len(t)):
            x0 = denoise(x, level_of(levels, t, i))
            far = (
                0
                if before is None or i + 1 == len(t)
                else (lam[i + 1] - lam[i]) / (2 * (lam[i] - lam[i - 1]))
            )
            estimate = x0 + far * (x0 - (x0 if before is None else before))
            x = (
                first.a[i] * x
                + first.b[i] * estimate
                + (0 if first.d is None else first.d[i] * z[i])
            )
            before = x0
        return x

    check(lambda levels, t: second, direct, levels, t, seed)


@given(schedules(exploding=True), st.data(), st.integers(0, 99), st.sampled_from([0.0, 1.0]))
def test_2m_algorithm_2(levels, data, seed, eta):
    """With D = x0 + (x0 - x0_1)*h/(2*h_1); the SDE as in arXiv:2211.01095, appendix A."""

    def direct(levels, t, x, z):
        alpha, sigma, lam = grid(levels, t)
        before = None
        for i in range(len(t)):
            x0, h = denoise(x, level_of(levels, t, i)), lam[i + 1] - lam[i]
            if i + 1 == len(t):
                return x0
            estimate = (
                x0 if before is None else x0 + (x0 - before) * h / (2 * (lam[i] - lam[i - 1]))
            )
            x = (
                sigma[i + 1] / sigma[i] * np.exp(-eta * h) * x
                - alpha[i + 1] * np.expm1(-(1 + eta) * h) * estimate
            )
            x, before = x + eta * sigma[i + 1] * np.sqrt(-np.expm1(-2 * h)) * z[i], x0
        return None

    t = data.draw(visits(levels))
    check(lambda levels, t: solvers.dpm_solver_pp_2m(levels, t, eta), direct, levels, t, seed)


def heun_step(x, here, there, call):
    """From sigma `here` to `there` in x/alpha, as Algorithm 1 of arXiv:2206.00364 has it, but
    for the bound of steps that are too long for a trapezoid."""
    slope = (x - call(x, here)) / here
    after = x + (there - here) * slope
    if there == 0:
        return after
    if here > 3.8 * there:
        return after + 1.4 * (call(after, there) - call(x, here))
    return x + (there - here) * (slope + (after - call(after, there)) / there) / 2


@DRAWN
def test_heun_algorithm_1(levels, data, seed):
    """In sigma/alpha, as EDM has it."""

    def direct(levels, t, x, z):
        alpha, sigma, _ = grid(levels, t)
        ratio = sigma / alpha
        call = {ratio[i]: level_of(levels, t, i) for i in range(len(t))}
        x = x / alpha[0]
        for i in range(len(t)):
            x = heun_step(
                x, ratio[i], ratio[i + 1], lambda x, r: denoise(x * call[r].alpha, call[r])
            )
        return x

    check(solvers.heun, direct, levels, data.draw(visits(levels)), seed)


@given(schedules(exploding=True), st.data(), st.integers(0, 99), st.floats(0, 50))
def test_edm_algorithm_2(levels, data, seed, s_churn):
    """On any schedule, x/alpha follows EDM's algorithm; levels in the middle churn, up to what
    the schedule holds."""
    t = data.draw(visits(levels))
    plan = solvers.edm(levels, t, s_churn, 0.05, 2.0, 1.003)
    alpha, sigma, _ = grid(levels, t)
    ratio, top = sigma / alpha, levels.sigma[-1] / levels.alpha[-1]
    gamma = np.where((ratio >= 0.05) & (ratio <= 2.0), min(s_churn / len(t), np.sqrt(2) - 1), 0)
    hat = np.minimum((1 + gamma) * ratio, top)
    z = np.random.default_rng(seed).normal(size=(plan.steps + 1, 4))

    def call(x, ratio):
        where = schedule.at(levels, schedule.t_of_logsnr(levels, -2 * np.log(ratio)))
        return denoise(x * where.alpha, where)

    x, row = z[0] * hat[0], 0
    for i in range(len(t)):
        if i:
            x = x + 1.003 * np.sqrt(np.maximum(0, hat[i] ** 2 - ratio[i] ** 2)) * z[row]
        x = heun_step(x, hat[i], ratio[i + 1], call)
        row += 1 + (ratio[i + 1] > 0)
    start = hat[0] * schedule.at(levels, plan.level.t[0]).alpha * z[0]
    np.testing.assert_allclose(run_plan(denoise, plan, start, z[1:]), x, rtol=1e-6, atol=1e-6)


def test_edm_without_churn():
    """It is Heun."""
    levels = schedule.edm(100)
    t = schedule.karras(levels, 18)
    plain, churned = solvers.heun(levels, t), solvers.edm(levels, t, s_churn=0.0)
    assert plain.steps == 35  # network evaluations of EDM's CIFAR-10 sampler
    assert all(np.array_equal(a, b) for a, b in zip(plain.level, churned.level, strict=True))
    assert all(np.array_equal(getattr(plain, name), getattr(churned, name)) for name in "abc")
    assert churned.d is None


# ----------------------------------------------------------------------------- third order


def lagrange_weights(nodes, h):
    """Integrals from 0 to h of exp(l - h) * L_j(l), by quadrature with 60 nodes."""
    points, weights = np.polynomial.legendre.leggauss(60)
    at, weights = h * (points + 1) / 2, h * weights / 2 * np.exp(h * (points + 1) / 2 - h)
    basis = [
        np.prod(
            [(at - other) / (n - other) for other in nodes if other != n] or [1 + 0 * at], axis=0
        )
        for n in nodes
    ]
    return [weights @ values for values in basis]


@given(st.data(), st.integers(0, 99), st.floats(2, 8), st.integers(1, 40))
def test_exponential_ab3(data, seed, top, T):
    """It integrates the parabola through three estimates."""
    levels = schedule.from_logsnr(lambda u: top - (top + 6) * u, T)

    def direct(levels, t, x, z):
        alpha, sigma, lam = grid(levels, t)
        kept = []
        for i in range(len(t)):
            kept = [denoise(x, level_of(levels, t, i)), *kept][:3]
            if i + 1 == len(t):
                return kept[0]
            nodes = [lam[i - j] - lam[i] for j in range(len(kept))]
            weights = lagrange_weights(nodes, lam[i + 1] - lam[i])
            x = sigma[i + 1] / sigma[i] * x + alpha[i + 1] * sum(
                w * x0 for w, x0 in zip(weights, kept, strict=True)
            )
        return None

    check(solvers.exponential_ab3, direct, levels, data.draw(visits(levels)), seed)


@DRAWN
def test_3m_as_published(levels, data, seed):
    """The multistep third-order update of DPM-Solver++ in its authors' D0, D1, D2; earlier rows
    by 2M, then by 1."""

    def direct(levels, t, x, z):
        alpha, sigma, lam = grid(levels, t)
        kept = []
        for i in range(len(t)):
            kept = [denoise(x, level_of(levels, t, i)), *kept][:3]
            if i + 1 == len(t):
                return kept[0]
            h, phi = lam[i + 1] - lam[i], np.expm1(lam[i] - lam[i + 1])
            x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * phi * kept[0]
            if i == 1:
                x = x - alpha[i + 1] * phi / 2 * (kept[0] - kept[1]) / ((lam[i] - lam[i - 1]) / h)
            if i > 1:
                r0, r1 = (lam[i] - lam[i - 1]) / h, (lam[i - 1] - lam[i - 2]) / h
                first, second = (kept[0] - kept[1]) / r0, (kept[1] - kept[2]) / r1
                d1, d2 = first + r0 / (r0 + r1) * (first - second), (first - second) / (r0 + r1)
                x = (
                    x
                    + alpha[i + 1] * (phi / h + 1) * d1
                    - alpha[i + 1] * ((phi + h) / h**2 - 0.5) * d2
                )
        return None

    levels = level_at(levels, slice(41))  # phi as published cancels over very short steps
    steps = data.draw(visits(levels))
    h = np.diff(np.log(levels.alpha[steps] / levels.sigma[steps]))
    assume(not len(h) or h.min() > 1e-2)
    check(solvers.dpm_solver_pp_3m, direct, levels, steps, seed)


@DRAWN
def test_unipc_algorithms_5_and_6(levels, data, seed):
    """Algorithms 5 and 6 of arXiv:2302.04867 for order 2 and B_2: the corrector's weights from
    its linear system."""

    def direct(levels, t, x, z):
        alpha, sigma, lam = grid(levels, t)
        kept, corrected = [], x
        for i in range(len(t)):
            kept = [denoise(x, level_of(levels, t, i)), *kept][:3]
            if i:
                h = lam[i] - lam[i - 1]
                b_h = np.expm1(-h)
                base = sigma[i] / sigma[i - 1] * corrected - alpha[i] * b_h * kept[1]
                if i == 1:
                    corrected = base - alpha[i] * b_h * 0.5 * (kept[0] - kept[1])
                else:
                    r = (lam[i - 2] - lam[i - 1]) / h
                    phi_2 = b_h / -h - 1
                    phi_3 = phi_2 / -h - 0.5
                    old, new = np.linalg.solve([[1, 1], [r, 1]], [phi_2 / b_h, 2 * phi_3 / b_h])
                    corrected = base - alpha[i] * b_h * (
                        old * (kept[2] - kept[1]) / r + new * (kept[0] - kept[1])
                    )
            if i + 1 == len(t):
                return kept[0]
            h = lam[i + 1] - lam[i]
            x = sigma[i + 1] / sigma[i] * corrected - alpha[i + 1] * np.expm1(-h) * kept[0]
            if i:
                r = (lam[i - 1] - lam[i]) / h
                x = x - alpha[i + 1] * np.expm1(-h) * 0.5 * (kept[1] - kept[0]) / r
        return None

    levels = level_at(levels, slice(41))
    steps = data.draw(visits(levels))
    h = np.diff(np.log(levels.alpha[steps] / levels.sigma[steps]))
    assume(not len(h) or h.min() > 1e-2)  # phi_3 as published cancels over very short steps
    check(solvers.unipc_2, direct, levels, steps, seed)


def test_moments():
    """They are their integrals on both sides of the series."""
    for h in (1e-6, 1e-3, 0.1, 0.4999, 0.5001, 2.0, 15.0):
        points, weights = np.polynomial.legendre.leggauss(60)
        at = h * (points + 1) / 2
        for n, found in enumerate(solvers._moments(np.array([h]))):
            expected = h / 2 * weights @ (np.exp(at - h) * at**n)
            assert found[0] == pytest.approx(expected, rel=1e-13, abs=0)


# ----------------------------------------------------------------------------- convergence


@pytest.mark.parametrize("name", ORDERS)
def test_order(name):
    order, warm = ORDERS[name]
    assert_order(MAKERS[name], order, warm)


def test_missed_order_is_caught():
    with pytest.raises(AssertionError, match=naming("order", 2)):
        assert_order(sampler.ddim, 2)


def flow_by_small_steps(x, levels, points):
    """The probability flow by classical Runge-Kutta in sigma/alpha, 20,000 steps: another method,
    another variable."""
    call, n = finite_denoiser(points, std=0.3), 20_000
    logs = np.linspace(
        np.log(levels.sigma[-1] / levels.alpha[-1]),
        np.log(levels.sigma[1] / levels.alpha[1]),
        n + 1,
    )

    def slope(x, log):  # dx/dlog(sigma) for alpha 1
        return x - call(x, Level(0, 1.0, np.exp(log)))

    h = logs[1] - logs[0]
    for log in logs[:-1]:
        k1 = slope(x, log)
        k2 = slope(x + h / 2 * k1, log + h / 2)
        k3 = slope(x + h / 2 * k2, log + h / 2)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(x + h * k3, log + h))
    return x


def test_flow_of_a_data_set():
    """A nonlinear flow, integrated by another method: at 100 steps, higher order means a smaller
    error."""
    points = np.random.default_rng(0).uniform(-1, 1, (5, 3))
    levels = schedule.edm(4000, 0.05, 10.0)
    x = 10 * np.random.default_rng(1).normal(size=(4, 3))
    exact, errors = flow_by_small_steps(x, levels, points), {}
    t = schedule.uniform_logsnr(levels, 101)
    for name in (
        "ddim",
        "dpm_solver_pp_2m",
        "heun",
        "dpm_solver_pp_3m",
        "exponential_ab3",
        "unipc_2",
    ):
        plan = MAKERS[name](levels, t)
        found = run_plan(finite_denoiser(points, std=0.3), plan, x, rows=range(plan.steps - 1))
        errors[name] = np.abs(found - exact).max()
    assert errors["ddim"] < 0.05
    for name in ("dpm_solver_pp_2m", "heun"):
        assert errors[name] < errors["ddim"] / 5
    assert errors["unipc_2"] < errors["dpm_solver_pp_2m"] / 2


def test_gaussian_data_in_few_steps():
    """Onto data, from pure noise, in 20 calls of the denoiser: what they are for."""
    levels, x = schedule.linear(1000), 2 * np.random.default_rng(0).normal(size=50)
    exact, errors = gaussian_flow(x, schedule.at(levels, 1000), 0.3, 0.5), {}
    for name in ("ddim", "dpm_solver_pp_2m", "unipc_2"):
        plan = MAKERS[name](levels, schedule.uniform_logsnr(levels, 20))
        errors[name] = np.abs(run_plan(gaussian_denoiser(0.3, 0.5), plan, x) - exact).max()
    assert errors["dpm_solver_pp_2m"] < errors["ddim"] / 3
    assert errors["unipc_2"] < errors["ddim"] / 3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda s: solvers.dpm_solver_pp_2m(s, [5, 1], 1.5), "eta 1.5"),
        (lambda s: solvers.edm(s, [5, 1], -1.0), "s_churn -1"),
        (lambda s: solvers.edm(s, [5, 1], s_noise=0.0), "s_noise 0"),
        (lambda s: solvers.edm(s, [5, 1], s_noise=float("nan")), "s_noise nan"),
        (lambda s: solvers.heun(s, [5, 5]), "t 5"),
        (lambda s: solvers.unipc_2(s, []), "t (0,)"),
        (lambda s: solvers.edm(schedule.zero_terminal_snr(s), [10, 1]), "schedule level 10"),
    ],
)
def test_bad_input_is_named(make, words):
    with pytest.raises(ValueError, match=naming(*words.split())):
        make(schedule.linear(10))


@pytest.mark.parametrize("steps", [5, 10, 20, 50])
@pytest.mark.parametrize(
    "form", ["cosine", "zero terminal", "linear", "edm", "flow", "flow, shifted"]
)
def test_few_steps(form, steps):
    """The spread of Gaussian data, exactly, from few levels of every kind of schedule; cosine's
    first step is long."""
    levels = {
        "cosine": schedule.cosine(), "zero terminal": schedule.zero_terminal_snr(schedule.cosine()),
        "linear": schedule.linear(), "edm": schedule.edm(), "flow": schedule.flow(),
        "flow, shifted": schedule.flow(shift=3.0),
    }[form]  # fmt: skip
    t = schedule.karras(levels, steps) if form == "edm" else schedule.trailing(levels, steps)
    for name in (
        "ddim",
        "ddpm",
        "heun",
        "dpm_solver_pp_2m",
        "dpm_solver_pp_3m",
        "exponential_ab3",
        "unipc_2",
    ):
        plan = MAKERS[name](levels, t)
        _, variance = moments(plan, gaussian_denoiser(0.3, 0.5), 0.0, plan.init_noise_sigma**2)
        assert 0.1 < variance**0.5 < 1.5, name
        if steps == 50:  # the noise of DDPM is biased most
            assert variance**0.5 == pytest.approx(0.5, abs=0.1 if name == "ddpm" else 0.05), name


@pytest.mark.parametrize("name", ORDERS)
def test_solvers_on_flow(name):
    """From pure noise to where the probability flow of Gaussian data ends, exactly."""
    levels, x = schedule.flow(4000, 2.0), np.linspace(-2, 2, 5)
    exact = gaussian_flow(x, schedule.at(levels, 4000), 0.3, 0.5)
    missed = []
    for steps in (25, 50, 100, 200):
        plan = MAKERS[name](levels, schedule.trailing(levels, steps))
        missed.append(np.abs(run_plan(gaussian_denoiser(0.3, 0.5), plan, x) - exact).max())
    assert (np.diff(missed) < 0).all()
    assert missed[-1] < (0.02 if name == "ddim" else 0.005)


@pytest.mark.parametrize("spacing", ["karras", "uniform_logsnr", "linspace", "trailing"])
@pytest.mark.parametrize("form", ["linear", "cosine", "edm"])
def test_heun_on_few_levels(form, spacing):
    """Gaussian data, exactly: never farther off than DDIM, and never much too wide, where the
    trapezoid of the paper makes data up to 8 times too wide."""
    levels = getattr(schedule, form)()
    for steps in range(2, 11):
        t = schedule.SPACINGS[spacing](levels, steps)
        for std in (1.0, 0.3, 0.05):
            start = level_of(levels, t, 0)
            width = [
                moments(
                    make(levels, t),
                    gaussian_denoiser(0.0, std),
                    0.0,
                    (start.alpha * std) ** 2 + start.sigma**2,
                )[1]
                ** 0.5
                / std
                for make in (sampler.ddim, solvers.heun)
            ]
            assert width[0] - 1e-9 <= width[1] < 1.4, (steps, std)


def test_published_steps_of_edm():
    """None of the 18 has a correction that is bounded."""
    sigma = np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 18) ** 7
    r = sigma[1:] / sigma[:-1]
    assert ((1 - r) / (2 * r)).max() < solvers.LARGEST_CORRECTION


def test_evaluations_of_heun():
    """Two for every level but the last, however long the steps are."""
    levels = schedule.cosine(1000)
    plan = solvers.heun(levels, [1000, 900, 500, 1])
    assert list(plan.level.t) == [1000, 900, 900, 500, 500, 1, 1]
    assert list(plan.level.t) == list(solvers.edm(levels, [1000, 900, 500, 1], 0.0).level.t)


def test_churn_range():
    """Both ends are in it."""
    levels = schedule.edm(9)
    t = np.arange(9, 0, -1)
    low, high = levels.sigma[3], levels.sigma[6]
    plan = solvers.edm(levels, t, 1e9, low * (1 - 1e-12), high * (1 + 1e-12))
    drawn = plan.d > 0
    assert drawn.sum() == 4
    # Rows before the levels 6, 5, 4, 3, and no other: not even a rounding of noise.
    arrivals = np.append(plan.level.sigma[1:], 0)[drawn]
    np.testing.assert_allclose(arrivals, 2**0.5 * levels.sigma[[6, 5, 4, 3]], rtol=1e-9)


@pytest.mark.parametrize("order", [1, 3])
def test_order_from_above_and_below(order):
    with pytest.raises(AssertionError, match=naming("order", order)):
        assert_order(MAKERS["heun"], order)


# ----------------------------------------------------------------------------- resampling

LEVELS = schedule.linear(1000)


@given(schedules(exploding=True, terminal=True), st.data(), st.integers(1, 4), st.integers(1, 5))
def test_repaint(levels, data, resamples, jump_length):
    """Row by row against the loop as its paper writes it: steps down, then q(x_t | x_s) back up."""
    t = data.draw(visits(levels))
    eta = data.draw(st.sampled_from([0.0, 0.7, 1.0]))
    plan = sampler.ddim(levels, t, eta)
    found = solvers.repaint(plan, resamples, jump_length)
    assert_plan(found)
    expected = [
        (t[i], i + 1 == min(first + jump_length, len(t)) and again < resamples - 1, first, i)
        for first in range(0, len(t), jump_length)
        for again in range(resamples)
        for i in range(first, min(first + jump_length, len(t)))
    ]
    assert found.steps == len(expected)
    for row, (level, churned, first, i) in enumerate(expected):
        a, b, d = plan.a[i], plan.b[i], 0.0 if plan.d is None else plan.d[i]
        if churned:
            top, s = schedule.at(levels, t[first]), schedule.at(levels, np.append(t, 0)[i + 1])
            scale = top.alpha / s.alpha
            a, b, d = (
                a * scale,
                b * scale,
                np.hypot(d * scale, np.sqrt(max(0, top.sigma**2 - (scale * s.sigma) ** 2))),
            )
        assert found.level.t[row] == level
        np.testing.assert_allclose((found.a[row], found.b[row]), (a, b), rtol=1e-12)
        np.testing.assert_allclose(
            0.0 if found.d is None else found.d[row], d, rtol=1e-9, atol=1e-12
        )


def test_repaint_once():
    """One time is the plan itself."""
    for eta in (0.0, 1.0):
        plan = sampler.ddim(LEVELS, [900, 500, 100], eta)
        for column, same in zip(solvers.repaint(plan, 1, 2)[1:], plan[1:], strict=True):
            np.testing.assert_array_equal(column, same)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_repaint_conditions_on_the_known_part(eta):
    """Two correlated numbers, one known: the mean of the other comes nearer to E[other | known]
    with every doubling. Rows and denoiser are affine, so the mean of the images is the image of
    the means, without sampling."""
    covariance, known = 0.25 * np.array([[1, 0.9], [0.9, 1]]), 0.8

    def inpainted(x, level):
        gain = (
            level.alpha
            * covariance
            @ np.linalg.inv(level.alpha**2 * covariance + level.sigma**2 * np.eye(2))
        )
        x0 = x @ gain.T
        return np.stack([0 * x0[:, 0] + known, x0[:, 1]], 1)

    missed = []
    for resamples in (1, 2, 4, 8, 16):
        plan = sampler.ddim(LEVELS, schedule.trailing(LEVELS, 50), eta)
        plan = solvers.repaint(plan, resamples)
        found = run_plan(inpainted, plan, np.zeros((1, 2)), np.zeros((plan.steps, 1, 2)))
        assert found[0, 0] == known
        missed.append(0.9 * known - found[0, 1])
    assert (np.diff(missed) < 0).all()
    assert missed[-1] < 0.15 * missed[0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: solvers.repaint(sampler.ddim(LEVELS, [9, 5]), 0), "resamples 0"),
        (lambda: solvers.repaint(sampler.ddim(LEVELS, [9, 5]), 2, 0), "jump_length 0"),
        (lambda: solvers.repaint(solvers.heun(LEVELS, [9, 5]), 2), "plan ddim ddpm"),
        (lambda: solvers.repaint(solvers.dpm_solver_pp_2m(LEVELS, [9, 5, 2]), 2), "plan ddim ddpm"),
        (lambda: solvers.repaint(sampler.encode(LEVELS, [9, 5]), 2), "plan ddim ddpm"),
    ],
)
def test_bad_repaint_is_named(make, words):
    with pytest.raises(ValueError, match=naming(*words.split())):
        make()
