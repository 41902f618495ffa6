import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import naming
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from diffjax import denoiser, guidance, parameterization, process, sampler, schedule, solvers
from diffjax.devices import parallel
from diffjax.nn.conditioning import UNCONDITIONAL
from diffjax.nn.unet import UNet, UNetConfig
from diffjax.schedule import Level, level_at
from diffjax.testing import (
    CHURNING,
    EXCESSIVE,
    MAKERS,
    assert_forms,
    assert_plan,
    assert_reconstruction,
    finite_denoiser,
    gaussian_denoiser,
    moments,
    pairs,
    plan_errors,
    reconstruction_errors,
    run_plan,
    schedules,
    visits,
)

ETAS = st.floats(0, 1)


LEVELS = schedule.linear(1000)


def draw(seed, count=3, shape=(4, 2)):
    return np.random.default_rng(seed).normal(size=(count, *shape))


# ----------------------------------------------------------------------------- equations


@given(pairs(), ETAS, st.integers(0, 99))
def test_ddim_equation_12(levels, eta, seed):
    """As printed, in alpha-bars: sigma of equation 16, with the cancellation that the code
    avoids."""
    level_t, level_s = levels
    x_t, x0, z = draw(seed)
    abar_t, abar_s = level_t.alpha**2, level_s.alpha**2
    sigma = eta * np.sqrt((1 - abar_s) / (1 - abar_t)) * np.sqrt(1 - abar_t / abar_s)
    eps = (x_t - np.sqrt(abar_t) * x0) / np.sqrt(1 - abar_t)
    expected = (
        np.sqrt(abar_s) * x0 + np.sqrt(np.maximum(0, 1 - abar_s - sigma**2)) * eps + sigma * z
    )
    # The printed form loses digits: sqrt of a difference of numbers near 1.
    np.testing.assert_allclose(
        sampler.ddim_step(x_t, x0, level_t, level_s, eta, z), expected, atol=2e-6
    )


@given(
    st.integers(2, 1000),
    st.floats(1e-5, 0.01),
    st.floats(0.01, 0.05),
    st.data(),
    st.integers(0, 99),
)
def test_ddpm_algorithm_2(T, first, last, data, seed):
    """As printed, in the paper's alpha = 1 - beta, its product alpha-bar, and eps: both choices
    of its sigma."""
    levels, beta = schedule.linear(T, first, last), np.linspace(first, last, T)
    alpha, abar = 1 - beta, np.append(1.0, np.cumprod(1 - beta))
    t = data.draw(st.integers(1, T))
    x_t, eps, z = draw(seed)
    level_t, level_s = schedule.at(levels, t), schedule.at(levels, t - 1)
    x0 = process.x0_from_eps(x_t, eps, level_t)
    mean = (x_t - (1 - alpha[t - 1]) / np.sqrt(1 - abar[t]) * eps) / np.sqrt(alpha[t - 1])
    variances = {
        sampler.fixed_large: beta[t - 1],
        sampler.fixed_small: (1 - abar[t - 1]) / (1 - abar[t]) * beta[t - 1],
    }
    for std, variance in variances.items():
        noise = np.sqrt(variance) * z if t > 1 else 0  # "z ~ N(0, I) if t > 1, else z = 0"
        found = sampler.ddpm_step(x_t, x0, level_t, level_s, z, std)
        np.testing.assert_allclose(found, mean + noise, rtol=1e-6, atol=1e-8 / abar[t] ** 0.5)


@given(pairs(), st.integers(0, 99))
def test_eta_1_is_ddpm(levels, seed):
    x_t, x0, z = draw(seed)
    ddim = sampler.ddim_step(x_t, x0, *levels, 1.0, z)
    np.testing.assert_allclose(ddim, sampler.ddpm_step(x_t, x0, *levels, z), atol=1e-10)


@given(pairs(), st.integers(0, 99))
def test_eta_0_is_euler(levels, seed):
    """It draws nothing, and is an Euler step in sigma/alpha."""
    level_t, level_s = levels
    x_t, x0, z = draw(seed)
    x_s = sampler.ddim_step(x_t, x0, level_t, level_s, 0.0, z)
    slope = process.eps_from_x0(x_t, x0, level_t)
    change = level_s.sigma / level_s.alpha - level_t.sigma / level_t.alpha
    euler = x_t / level_t.alpha + change * slope
    np.testing.assert_allclose(x_s / level_s.alpha, euler, atol=1e-12 / level_t.alpha)
    assert (x_s == sampler.ddim_step(x_t, x0, level_t, level_s, 0.0, 2 * z)).all()


@pytest.mark.usefixtures("x64")
def test_steps_under_jit():
    """They compile, and take a level per image."""
    x_t, x0, z = draw(0, shape=(3, 4, 2))
    t, s = [900, 500, 1], [500, 20, 0]
    steps = {
        "ddim": lambda x_t, x0, level_t, level_s, z: sampler.ddim_step(
            x_t, x0, level_t, level_s, 0.5, z
        ),
        "ddpm": sampler.ddpm_step,
        "ddpm, fixed_large": partial(sampler.ddpm_step, std=sampler.fixed_large),
        "posterior": lambda x_t, x0, level_t, level_s, z: process.q_posterior(
            x_t, x0, level_t, level_s
        )[0],
    }
    for name, step in steps.items():
        found = jax.jit(step)(x_t, x0, schedule.at(LEVELS, t), schedule.at(LEVELS, s), z)
        for i in range(3):
            one = step(x_t[i], x0[i], schedule.at(LEVELS, t[i]), schedule.at(LEVELS, s[i]), z[i])
            np.testing.assert_allclose(found[i], one, atol=1e-12, err_msg=name)


@given(schedules(), st.data())
def test_fixed_large(levels, data):
    """It is beta on the full chain."""
    t = data.draw(st.integers(1, schedule.length(levels)))
    beta = 1 - levels.alpha[t] ** 2 / levels.alpha[t - 1] ** 2
    std = sampler.fixed_large(schedule.at(levels, t), schedule.at(levels, t - 1))
    assert std**2 == pytest.approx(beta if t > 1 else 0, abs=1e-14)


def test_sigma_hat():
    """sqrt(1 - abar_t/abar_s), appendix D.3, beside the direction of eta 1."""
    levels = schedule.linear(1000)
    t = schedule.trailing(levels, 20)
    plan, s = sampler.sigma_hat(levels, t), np.append(t[1:], 0)
    abar = levels.alpha**2
    np.testing.assert_allclose(plan.d[:-1], np.sqrt(1 - abar[t] / abar[s])[:-1], rtol=1e-12)
    assert plan.d[-1] == 0
    np.testing.assert_allclose(plan.a, sampler.ddim(levels, t, 1.0).a, rtol=1e-12)


@given(pairs(), st.floats(0, 1))
def test_interpolated_variance(levels, v):
    """It lies between the two in the logarithm."""
    small, large = sampler.fixed_small(*levels), sampler.fixed_large(*levels)
    std = sampler.interpolated_variance(v)(*levels)
    if levels[1].sigma > 0:
        assert np.log(std) == pytest.approx((1 - v) * np.log(small) + v * np.log(large), abs=1e-9)
    else:
        assert std == small == large == 0
    assert small - 1e-12 <= std <= large + 1e-12
    assert sampler.interpolated_variance(0)(*levels) == small
    assert sampler.interpolated_variance(1)(*levels) == large


@given(pairs(), st.floats(0.01, 0.99), st.floats(0.1, 0.9), st.integers(0, 99))
def test_steps_compose(levels, w, eta, seed):
    """t -> s -> u equals t -> u: with eta 0 sample by sample, with eta 1 in mean and variance,
    for any eta onto data. With an eta between the two, only the marginal is kept: half steps
    forget more of x_t. u is a level between s and data, at signal-to-noise ratios that w
    draws."""
    level_t, level_s = levels
    assume(level_s.sigma >= 1e-3)
    sigma_u = w * level_s.sigma
    level_u, data_level = Level(0, (1 - sigma_u**2) ** 0.5, sigma_u), Level(0, 1.0, 0.0)
    x_t, x0, z = draw(seed)
    x_s = sampler.ddim_step(x_t, x0, level_t, level_s, eta, z)
    assert (sampler.ddim_step(x_s, x0, level_s, data_level, eta, z) == x0).all()

    whole = sampler.ddim_step(x_t, x0, level_t, level_u)
    halves = sampler.ddim_step(sampler.ddim_step(x_t, x0, level_t, level_s), x0, level_s, level_u)
    np.testing.assert_allclose(halves, whole, atol=1e-9)

    def gain_and_std(eta, level_t, level_s):
        return [
            sampler.ddim_step(x, 0.0, level_t, level_s, eta, z) for x, z in ((1.0, 0.0), (0.0, 1.0))
        ]

    for each in (1.0, eta):
        (gain_s, std_s), (gain_u, std_u) = (
            gain_and_std(each, level_t, level_s),
            gain_and_std(each, level_s, level_u),
        )
        gain, std = gain_and_std(each, level_t, level_u)
        variance = std_u**2 + gain_u**2 * std_s**2
        marginal = gain_s**2 * gain_u**2 * level_t.sigma**2 + variance
        assert marginal == pytest.approx(gain**2 * level_t.sigma**2 + std**2, rel=1e-9, abs=0)
        assert marginal == pytest.approx(level_u.sigma**2, rel=1e-9, abs=0)
        if each == 1:
            assert gain_s * gain_u == pytest.approx(gain, rel=1e-9, abs=0)
            assert variance == pytest.approx(std**2, rel=1e-9, abs=0)
    # Above these ratios a half step forgets less than rounding.
    r_s, r_u = process.sqrt_snr_ratio(level_t, level_s), process.sqrt_snr_ratio(level_s, level_u)
    assert gain_s * gain_u < gain * (1 - 1e-6 if max(r_s, r_u) < 0.9 else 1 + 1e-9)


# ----------------------------------------------------------------------------- tables


@given(schedules(exploding=True, terminal=True, flow=True), st.data())
def test_plans_obey_their_laws(levels, data):
    """Rows keep mean and variance, and the last lands on data."""
    t = data.draw(visits(levels, fractions=True))
    for name, make in (MAKERS | (CHURNING if levels.alpha[-1] > 0 else {})).items():
        plan = make(levels, t)
        try:
            assert_plan(plan)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize(
    ("broken", "law"),
    [
        (lambda p: p._replace(b=p.b * 1.0001), {"alpha_s"}),
        (lambda p: p._replace(a=p.a * 1.0001, b=p.b - 0.0001 * p.a * p.level.alpha), {"sigma_s"}),
        (lambda p: p._replace(noise_index=p.noise_index[::-1]), set()),
        (lambda p: p._replace(a=p.a + 1e-9 * (np.arange(5) == 4)), {"x0"}),
        (
            lambda p: sampler.encode(LEVELS, p.level.t)._replace(noise_index=p.noise_index),
            {"alpha_s"},
        ),
    ],
)
def test_broken_plan_is_caught(broken, law):
    plan = ddim_plan(5)
    assert_plan(plan)
    with pytest.raises(AssertionError) as raised:
        assert_plan(broken(plan), tolerance=1e-8)
    assert laws(raised.value) == law


def laws(error):
    """Of mean, variance and last row, those that an error of `assert_plan` names by what they are
    about."""
    return {name for name in ("alpha_s", "sigma_s", "x0") if re.search(naming(name), str(error))}


def test_rising_levels_are_caught():
    """Levels may rise only where noise is drawn."""
    plan = solvers.edm(schedule.edm(100), schedule.karras(schedule.edm(100), 5), s_noise=1.0)
    rises = np.append(np.diff(plan.level.t) > 0, [False])
    assert_plan(plan)
    with pytest.raises(AssertionError) as raised:
        assert_plan(plan._replace(d=np.where(rises, 0, plan.d)), variance=False)
    assert not laws(raised.value)


@given(schedules(exploding=True), st.data(), st.integers(0, 99))
def test_eps_after_clipping(levels, data, seed):
    """Each row of DDIM lands on alpha_s*x0 + sigma_s*eps with x_t = alpha_t*x0 + sigma_t*eps for
    the clipped x0."""
    t, x = data.draw(visits(levels)), draw(seed, 1)[0]
    plan, seen = sampler.ddim(levels, t), []

    def clipped(x, level):
        seen.append((x, np.asarray(np.clip(3 * x, -1, 1)), level))
        return seen[-1][1]

    made = run_plan(clipped, plan, x)
    arrivals = [*seen[1:], (made, None, Level(0, 1.0, 0.0))]
    for (x_t, x0, level_t), (x_s, _, level_s) in zip(seen, arrivals, strict=True):
        eps = (x_t - level_t.alpha * x0) / level_t.sigma
        np.testing.assert_allclose(
            x_s, level_s.alpha * x0 + level_s.sigma * eps, atol=1e-9 * (1 + np.abs(x_t).max())
        )


@given(schedules(), st.data(), st.floats(0, 1))
def test_excess_of_larger_variances(levels, data, v):
    """By std**2 - fixed_small**2; fixed_large**2 is (sigma_t/sigma_s)**2 times fixed_small**2."""
    t = data.draw(visits(levels))
    level_t, level_s = sampler.level_pairs(levels, t)
    small = sampler.fixed_small(level_t, level_s)
    growth = (level_t.sigma[:-1] / level_s.sigma[:-1]) ** 2
    for power, std in ((1, sampler.fixed_large), (v, sampler.interpolated_variance(v))):
        plan = sampler.ddpm(levels, t, std)
        assert_plan(plan, variance=False)
        excess = plan_errors(plan)["variance"][:-1] * level_s.sigma[:-1] ** 2
        np.testing.assert_allclose(excess, small[:-1] ** 2 * (growth**power - 1), atol=1e-12)


@given(schedules(exploding=True), st.data(), st.floats(0, 100), st.floats(0.9, 1.2))
def test_churn_noise(levels, data, s_churn, s_noise):
    """A row that churns up from s to s^ has (a*sigma_t)**2 + (d/s_noise)**2 = sigma_s^**2."""
    plan = solvers.edm(levels, data.draw(visits(levels)), s_churn, 0.0, 1e9, s_noise)
    assert_plan(plan._replace(d=None if plan.d is None else plan.d / s_noise), tolerance=1e-9)


@given(schedules(), st.data(), ETAS, st.integers(0, 99))
def test_rows_are_the_steps(levels, data, eta, seed):
    t = data.draw(visits(levels))
    steps = {
        "ddim": (sampler.ddim(levels, t, eta), lambda *a: sampler.ddim_step(*a[:4], eta, a[4])),
        "small": (sampler.ddpm(levels, t), sampler.ddpm_step),
        "large": (
            sampler.ddpm(levels, t, sampler.fixed_large),
            lambda *a: sampler.ddpm_step(*a, sampler.fixed_large),
        ),
        "sigma-hat": (
            sampler.sigma_hat(levels, t),
            lambda *a: sampler.ddpm_step(*a, sampler.fixed_large),
        ),
        "euler": (sampler.euler(levels, t), lambda *a: sampler.ddim_step(*a[:4])),
    }
    x_t, x0, z = draw(seed)
    for name, (plan, step) in steps.items():
        for i in range(plan.steps):
            level_t = schedule.at(levels, t[i])
            level_s = schedule.at(levels, t[i + 1] if i + 1 < len(t) else 0)
            noise = 0 if plan.d is None else plan.d[i] * z
            row = plan.a[i] * x_t + plan.b[i] * x0 + noise
            np.testing.assert_allclose(
                row, step(x_t, x0, level_t, level_s, z), atol=1e-11, err_msg=name
            )


@given(schedules(), st.data())
def test_no_noise_column(levels, data):
    """A deterministic plan has none."""
    t = data.draw(visits(levels))
    assert sampler.ddim(levels, t).d is None
    assert (sampler.ddpm(levels, t).d is None) == (len(t) == 1)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_bad_eta_is_named(eta):
    with pytest.raises(ValueError, match=naming("eta", eta)):
        sampler.ddim(schedule.linear(10), [10], eta)


# ----------------------------------------------------------------------------- editing


def test_encode_and_decode():
    """The error falls at least as N**-0.75 from 50 steps on; the denoiser is that of a blurred
    data set, nonlinear."""
    points = np.random.default_rng(0).uniform(-1, 1, (5, 3))
    levels, errors = schedule.linear(1000), []
    denoise = finite_denoiser(points, std=0.3)
    x = np.random.default_rng(1).uniform(-1, 1, (4, 3))
    for steps in (50, 100, 200, 500):
        t = schedule.trailing(levels, steps)
        noisy = run_plan(denoise, sampler.encode(levels, t), x)
        errors.append(np.abs(run_plan(denoise, sampler.ddim(levels, t), noisy) - x).max())
    slopes = -np.diff(np.log(errors)) / np.diff(np.log([50, 100, 200, 500]))
    assert (slopes >= 0.75).all(), slopes


@given(schedules(exploding=True), st.data(), st.integers(0, 99))
def test_encode_inverts_ddim_rows(levels, data, seed):
    """Where the estimate does not change, rows upward undo the rows downward, from the first
    visited level on."""
    t, (x_t, x0) = data.draw(visits(levels)), draw(seed, 2)
    up, down = sampler.encode(levels, t), sampler.ddim(levels, t)
    assert (up.level.t == np.append(t[-1:], t[::-1][:-1])).all()
    noisy = run_plan(lambda x, level: x0, up._replace(a=up.a, b=up.b), x_t, rows=range(1, up.steps))
    back = run_plan(lambda x, level: x0, down, noisy, rows=range(down.steps - 1))
    np.testing.assert_allclose(back, x_t, atol=1e-8 * (1 + np.abs(noisy).max() / levels.sigma[1]))


def test_encode_compiled():
    levels, t = schedule.linear(1000), schedule.trailing(schedule.linear(1000), 23)
    plan, (x, keys) = sampler.encode(levels, t), start()
    found = sampler.sample(COMPILED, plan, x, keys)
    np.testing.assert_allclose(
        found, run_plan(gaussian_denoiser(0.1, 0.6), plan, np.float64(x)), atol=2e-5
    )


@given(schedules(exploding=True), st.data(), st.integers(0, 99))
def test_encode_first_row(levels, data, seed):
    """It adds the noise that the denoiser sees in the data."""
    t, (x, x0) = data.draw(visits(levels)), draw(seed, 2)
    level = schedule.at(levels, t[-1])
    first = run_plan(lambda x, level: x0, sampler.encode(levels, t), x, rows=[0])
    expected = process.q_sample(x, process.eps_from_x0(x, x0, level), level)
    np.testing.assert_allclose(first, expected, atol=1e-12)


@given(st.floats(0, 1), st.integers(0, 99))
def test_slerp(weight, seed):
    """It goes round the sphere."""
    x, y = jnp.asarray(draw(seed, 2, (3, 5)), jnp.float32)
    between = sampler.slerp(x, y, weight)
    np.testing.assert_allclose(sampler.slerp(x, y, 0.0), x, atol=1e-5)
    np.testing.assert_allclose(sampler.slerp(x, y, 1.0), y, atol=1e-5)
    np.testing.assert_allclose(sampler.slerp(y, x, 1 - weight), between, atol=1e-4)
    unit = [v / jnp.linalg.norm(v, axis=1, keepdims=True) for v in (x, y)]
    round_ = sampler.slerp(*unit, jnp.full(3, weight))
    np.testing.assert_allclose(jnp.linalg.norm(round_, axis=1), 1, atol=1e-4)
    angle = [
        np.arccos(np.clip(np.sum(np.float64(unit[0]) * np.float64(v), 1), -1, 1))
        for v in (unit[1], round_)
    ]
    np.testing.assert_allclose(angle[1], weight * angle[0], atol=2e-3)  # arccos near 1, in float32


def test_slerp_over_small_angles():
    x, y = jnp.array([[1.0, 0.0]]), jnp.array([[np.cos(0.05), np.sin(0.05)]], jnp.float32)
    expected = [[np.cos(0.025), np.sin(0.025)]]
    np.testing.assert_allclose(sampler.slerp(x, y, 0.5), expected, atol=2e-6)


def test_slerp_of_parallel_images():
    """It is a straight line."""
    x = jnp.ones((2, 4))
    np.testing.assert_allclose(sampler.slerp(x, x, 0.3), x, atol=1e-6)
    assert (sampler.slerp(0 * x, 0 * x, 0.3) == 0).all()


def test_noise_to_level():
    """SDEdit: with a denoiser that knows the data set, from a low level back to the nearest
    point, from T to any."""
    points = np.sign(np.random.default_rng(0).normal(size=(6, 40))).astype(np.float32)
    levels, keys = schedule.linear(1000), sampler.image_keys(jax.random.key(0), np.arange(6))
    t = schedule.trailing(levels, 100)
    same = {}
    for top in (200, 1000):
        plan = sampler.ddim(levels, t[t <= top])
        assert plan.level.t[0] == top
        x = sampler.noise_to_level(plan, jnp.asarray(points), keys)
        level = schedule.at(levels, top)
        expected = level.alpha * points + level.sigma * sampler.noise(keys, (40,))
        np.testing.assert_allclose(x, expected, atol=1e-5)
        made = run_plan(finite_denoiser(points), plan, np.float64(x))
        same[top] = int((np.abs(made - points).max(1) < 0.01).sum())
    assert same[200] == 6
    assert same[1000] < 6


@given(schedules(exploding=True), st.data())
def test_init_noise(levels, data):
    plan = sampler.ddim(levels, data.draw(visits(levels)))
    keys = sampler.image_keys(jax.random.key(0), np.arange(2))
    expected = np.hypot(plan.level.alpha[0], plan.level.sigma[0]) * sampler.noise(keys, (3,))
    np.testing.assert_allclose(sampler.init_noise(plan, keys, (3,)), expected, rtol=1e-5)


# ----------------------------------------------------------------------------- one path, two forms


@given(schedules(), st.floats(0.1, 10), st.data())
def test_forms_of_a_path_sample_alike(levels, shift, data):
    """A denoiser that sees x/sqrt(alpha**2 + sigma**2) and logsnr cannot tell the
    variance-preserving form of a path from the exploding one or the straight one, and no sampler
    can: all but fixed_large, which is not defined for the others."""
    levels = level_at(levels, slice(31))  # alpha far above float64's least
    straight = schedule.flow(schedule.length(levels), shift)
    for form in (schedule.variance_exploding(levels), straight):
        t = data.draw(visits(form, fractions=True))
        makers = MAKERS | (CHURNING if form.alpha[-1] > 0 else {})
        for name, make in makers.items():
            try:
                assert_forms(make, form, t)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
    exploding = schedule.variance_exploding(levels)
    with pytest.raises(ValueError, match=naming("schedule", "fixed_small", "alpha**2 + sigma**2")):
        sampler.sigma_hat(exploding, [1])


def test_another_image_of_a_form_is_caught():
    def make(levels, t):
        plan = sampler.ddim(levels, t)
        return plan._replace(b=plan.b + 1e-3)

    assert_forms(sampler.ddim, schedule.flow(50), [50, 20])
    with pytest.raises(AssertionError, match=naming("images")):
        assert_forms(make, schedule.flow(50), [50, 20])


@given(st.integers(1, 300), st.floats(0.1, 10), st.data(), st.integers(0, 99))
def test_ddim_on_flow_is_euler(T, shift, data, seed):
    """x + (sigma_s - sigma_t)*u, with u = eps - x0: a row of a = sigma_s/sigma_t and b = 1 - a."""
    levels = schedule.flow(T, shift)
    t = data.draw(visits(levels))
    plan, sigma = sampler.ddim(levels, t), schedule.at(levels, np.append(t, 0)).sigma
    np.testing.assert_allclose(plan.a, sigma[1:] / sigma[:-1], rtol=1e-12)
    np.testing.assert_allclose(plan.b, 1 - plan.a, atol=1e-12)
    x = x_t = draw(seed)[0]

    def velocity(x, level):
        return np.tanh(x + level.sigma)

    for i, each in enumerate(t):
        x = x + (sigma[i + 1] - sigma[i]) * velocity(x, schedule.at(levels, each))
    found = run_plan(lambda x, level: process.x0_from_flow(x, velocity(x, level), level), plan, x_t)
    np.testing.assert_allclose(found, x, atol=1e-12)


# ----------------------------------------------------------------------------- stochastic samplers

STOCHASTIC = {
    name: make for name, make in MAKERS.items() if "eta" in name or name in ("ddpm", "consistency")
}


@pytest.mark.parametrize("name", [*STOCHASTIC, *CHURNING, *EXCESSIVE])
def test_bias_falls_with_the_steps(name):
    """Mean and variance go through the rows exactly. Multistep consistency sampling is not of a
    flow: with a denoiser that is no consistency function its spread collapses, so there the means
    alone are held."""
    make = (STOCHASTIC | CHURNING | EXCESSIVE)[name]
    denoise, found = gaussian_denoiser(0.3, 0.5), []
    for T in (125, 250, 500, 1000):
        levels = schedule.rescaled_linear(T)
        top = schedule.at(levels, T)
        exact = top.alpha * 0.3, top.alpha**2 * 0.25 + top.sigma**2
        found.append(moments(make(levels, np.arange(T, 0, -1)), denoise, *exact))
    bias = np.abs(np.array(found) - [0.3, 0.25])
    assert bias[-1, 0] < 1e-3
    if name != "consistency":
        # At order one or better, until nothing is left but rounding.
        assert (bias[1:, 1] < np.maximum(0.6 * bias[:-1, 1], 1e-9)).all(), bias
        assert bias[-1, 1] < 0.01


@pytest.mark.parametrize("std", sampler.VARIANCES.values(), ids=sampler.VARIANCES)
def test_variances_of_ddpm_are_bounds(std):
    """fixed_small leaves too little spread and fixed_large too much (DDPM, section 3.2), at order
    one in the steps."""
    denoise, found = gaussian_denoiser(0.3, 0.5), []
    for T in (250, 500, 1000):
        levels = schedule.rescaled_linear(T)
        found.append(moments(sampler.ddpm(levels, np.arange(T, 0, -1), std), denoise, 0.0, 1.0))
    bias = np.array([v - 0.25 for _, v in found]) * (-1 if std is sampler.fixed_small else 1)
    assert (bias > 0).all()
    np.testing.assert_allclose(np.log2(bias[:-1] / bias[1:]), 1, atol=0.25)


@pytest.mark.parametrize("name", ["ddpm", "dpm_solver_pp_2m, eta 1"])
def test_samples_have_the_moments(name):
    """A hundred thousand samples, and the moments that rows propagate."""
    levels, n = schedule.linear(1000), 100_000
    plan = MAKERS[name](levels, schedule.trailing(levels, 20))
    keys = sampler.image_keys(jax.random.key(0), np.arange(n))
    run = jax.jit(partial(sampler.scan_plan, gaussian_denoiser(0.3, 0.5)))
    made = np.float64(sampler.sample(run, plan, sampler.init_noise(plan, keys, (1,)), keys))
    mean, variance = moments(plan, gaussian_denoiser(0.3, 0.5), 0.0, 1.0)
    assert made.mean() == pytest.approx(mean, abs=4 * (variance / n) ** 0.5)
    assert made.var() == pytest.approx(variance, rel=4 * (2 / n) ** 0.5)


# ----------------------------------------------------------------------------- the loop


def ddim_plan(steps, eta=0.0, T=1000):
    levels = schedule.linear(T)
    return sampler.ddim(levels, schedule.trailing(levels, steps), eta)


def start(num=3, shape=(2, 2), seed=0):
    keys = sampler.image_keys(jax.random.key(seed), np.arange(num))
    return sampler.noise(keys, shape), keys


@settings(max_examples=12)
@given(st.integers(1, 47), st.sampled_from([0.0, 0.7, 1.0]), st.sampled_from([1, 10]))
def test_sample_is_the_plan(steps, eta, seed):
    """Against the numpy loop in float64, with the noise that the keys stand for."""
    plan, (x, keys) = ddim_plan(steps, eta), start(seed=seed)
    denoise = gaussian_denoiser(0.1, 0.6)
    found = sampler.sample(jax.jit(partial(sampler.scan_plan, denoise)), plan, x, keys)
    z = np.stack([sampler.noise(keys, (2, 2), number) for number in plan.noise_index])
    np.testing.assert_allclose(
        found, run_plan(denoise, plan, np.float64(x), np.float64(z)), atol=2e-5
    )


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_history_columns(eta):
    """They reach back one and two rows."""
    plan = ddim_plan(6, eta)
    plan = plan._replace(c=np.random.default_rng(0).normal(size=(6, 2)) / 10)
    denoise, (x, keys) = gaussian_denoiser(0.1, 0.6), start()
    z = np.stack([sampler.noise(keys, (2, 2), number) for number in plan.noise_index])
    found = sampler.sample(jax.jit(partial(sampler.scan_plan, denoise)), plan, x, keys)
    np.testing.assert_allclose(
        found, run_plan(denoise, plan, np.float64(x), np.float64(z)), atol=1e-5
    )


EVERY = MAKERS | CHURNING | EXCESSIVE


@pytest.mark.parametrize("name", EVERY)
def test_segments_or_whole(name):
    """Compiled in segments, or not compiled in one scan."""
    levels, (x, keys) = schedule.linear(1000), start()
    plan = EVERY[name](levels, schedule.trailing(levels, 12))
    run = partial(sampler.scan_plan, gaussian_denoiser(0.1, 0.6))
    pieces = sampler.sample(COMPILED, plan, x, keys)
    (rows,) = sampler.segments(plan, x.dtype, size=plan.steps)
    with jax.disable_jit():
        whole = run(rows, (x, jnp.zeros_like(x), jnp.zeros_like(x)), keys)[0]
    np.testing.assert_allclose(pieces, whole, atol=2e-6)


COMPILED = jax.jit(partial(sampler.scan_plan, gaussian_denoiser(0.1, 0.6)))


def test_two_programs_serve_every_plan():
    """Of ten rows and of one, with noise and without: four, whatever the sampler, the schedule
    and the steps."""
    traces = []

    def denoise(x, level):
        traces.append(1)
        return 0.5 * x

    run, (x, keys) = jax.jit(partial(sampler.scan_plan, denoise)), start()
    for levels in (schedule.cosine(1000), schedule.edm(500)):
        for steps in (50, 13, 7, 1, 100):
            for make in (MAKERS | CHURNING).values():
                t = (
                    schedule.linspace(levels, steps)
                    if steps % 2
                    else schedule.karras(levels, steps)
                )
                sampler.sample(run, make(levels, t), x, keys)
    assert len(traces) == 4
    assert run._cache_size() == 4


@pytest.mark.parametrize("steps", [1, 9, 10, 11, 20, 57])
def test_segments(steps):
    """They are the plan in order."""
    plan = ddim_plan(steps, 1.0)
    pieces = sampler.segments(plan, jnp.float32)
    assert {piece.steps for piece in pieces} <= {1, 10}
    assert np.concatenate([piece.noise_index for piece in pieces]).tolist() == list(
        range(1, steps + 1)
    )
    np.testing.assert_array_equal(np.concatenate([piece.a for piece in pieces]), np.float32(plan.a))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_half_precision_noise(dtype, eta):
    """In three digits the thousand small steps of a chain would be lost."""
    plan, n = ddim_plan(1000, eta), 20_000
    keys = sampler.image_keys(jax.random.key(0), np.arange(n))
    made = sampler.sample(
        jax.jit(partial(sampler.scan_plan, gaussian_denoiser(0.3, 0.5))),
        plan,
        sampler.init_noise(plan, keys, (), dtype),
        keys,
    )
    assert made.dtype == jnp.float32
    mean, variance = moments(plan, gaussian_denoiser(0.3, 0.5), 0.0, 1.0)
    assert float(made.mean()) == pytest.approx(mean, abs=4 * (variance / n) ** 0.5)
    assert float(made.var()) == pytest.approx(variance, rel=4 * (2 / n) ** 0.5)


def test_float64_table():
    assert sampler.segments(ddim_plan(5), np.float64)[0].level.t.dtype == np.float64


@pytest.mark.parametrize("every", [1, 3, 10, 25, 100])
def test_boundaries(every):
    plan = ddim_plan(57)
    pieces = sampler.segments(plan, jnp.float32, sampler.every_rows(plan, every))
    ends = np.cumsum([piece.steps for piece in pieces])
    assert {piece.steps for piece in pieces} <= {1, 10}
    assert set(range(every, 57, every)) <= set(ends)
    assert np.concatenate([piece.noise_index for piece in pieces]).tolist() == list(range(1, 58))


@pytest.mark.parametrize("every", [1, 4, 10, 50])
def test_trajectory(every):
    """Bit for bit within one program and its segments, and to rounding across sizes of segments."""
    plan, (x, keys) = ddim_plan(23, 1.0), start()
    xs, x0s = sampler.trajectory(COMPILED, plan, x, keys, every)
    rows = [n for n in range(1, 24) if n % every == 0 or n == 23]
    assert xs.shape == x0s.shape == (len(rows), 3, 2, 2)
    boundaries = sampler.every_rows(plan, every)
    again = sampler.sample(COMPILED, plan, x, keys, boundaries=boundaries)
    np.testing.assert_array_equal(xs[-1], again)
    np.testing.assert_allclose(xs[-1], sampler.sample(COMPILED, plan, x, keys), atol=2e-6)
    z = np.float64(np.stack([sampler.noise(keys, (2, 2), number) for number in plan.noise_index]))
    for i, n in enumerate(rows):
        partly = run_plan(gaussian_denoiser(0.1, 0.6), plan, np.float64(x), z, rows=range(n - 1))
        level = level_at(plan.level, n - 1)
        np.testing.assert_allclose(x0s[i], gaussian_denoiser(0.1, 0.6)(partly, level), atol=2e-5)


@pytest.mark.parametrize("make", [sampler.ddim, solvers.heun, partial(sampler.ddim, eta=1.0)])
def test_sample_switching(make):
    """As one denoiser that looks at the level; outside the interval its other half is not called
    at all."""
    low, high, calls = 0.5, 3.0, {"inside": 0, "outside": 0}

    def counted(name, denoise):
        def call(x, level):
            jax.debug.callback(lambda: calls.__setitem__(name, calls[name] + 1))
            return denoise(x, level)

        return call

    inside, outside = gaussian_denoiser(0.3, 0.5), gaussian_denoiser(-0.2, 0.8)
    runs = [
        jax.jit(partial(sampler.scan_plan, counted(*each)))
        for each in (("outside", outside), ("inside", inside))
    ]
    plan, (x, keys) = make(LEVELS, schedule.trailing(LEVELS, 37)), start()
    which = guidance.in_interval(plan.level, low, high)
    found = sampler.sample_switching(runs, which.astype(int), plan, x, keys)
    jax.effects_barrier()
    assert calls == {"inside": which.sum(), "outside": (~which).sum()}
    assert 0 < which.sum() < plan.steps

    def both(x, level):
        return (inside if low <= level.sigma / level.alpha <= high else outside)(x, level)

    z = np.float64(np.stack([sampler.noise(keys, (2, 2), number) for number in plan.noise_index]))
    np.testing.assert_allclose(found, run_plan(both, plan, np.float64(x), z), atol=2e-5)
    pieces = sampler.segments(plan, jnp.float32, 1 + np.flatnonzero(np.diff(which)))
    assert {piece.steps for piece in pieces} <= {1, 10}
    starts = np.cumsum([0, *(piece.steps for piece in pieces)])
    assert {row for row in range(1, plan.steps) if which[row] != which[row - 1]} <= set(starts)


@pytest.mark.parametrize("index", [[0, 0, 1, 0, 0], [0, -1, 0, 0, 0], [0, 0]])
def test_bad_program_index_is_named(index):
    with pytest.raises(ValueError, match=naming("program_index", 0, 5)):
        sampler.sample_switching([COMPILED], index, ddim_plan(5), *start())


def test_bad_every_is_named():
    with pytest.raises(ValueError, match=naming("every", 0)):
        sampler.every_rows(ddim_plan(5), 0)
    with pytest.raises(ValueError, match=naming("every", 0)):
        sampler.trajectory(COMPILED, ddim_plan(5), *start(), 0)


# ----------------------------------------------------------------------------- image i


def made_on(devices, num, plan, denoise, shape):
    """x_T, one row's noise and images, spread over devices, the batch filled up as sample.py
    does."""
    split = jax.P("data")
    run = jax.shard_map(
        partial(sampler.scan_plan, denoise), mesh=parallel.device_mesh(jax.devices()[:devices]),
        in_specs=(jax.P(), split, split), out_specs=split, check_vma=False,
    )  # fmt: skip
    mesh = parallel.device_mesh(jax.devices()[:devices])
    keys = jax.device_put(
        sampler.image_keys(jax.random.key(0), np.arange(parallel.round_up(num, devices))),
        parallel.batch_sharding(mesh),
    )
    x, row = (
        jax.jit(
            lambda keys, n=n: sampler.noise(keys, shape, n),
            out_shardings=parallel.batch_sharding(mesh),
        )(keys)
        for n in (0, 5)
    )
    assert len(x.sharding.device_set) == devices
    images = sampler.sample(jax.jit(run), plan, x, keys)
    return [np.asarray(array)[:num] for array in (jax.random.key_data(keys), x, row, images)]


@pytest.fixture(scope="module")
def unet():
    config = UNetConfig(channels=4, multipliers=(1,), blocks=1)
    network = UNet(config, out_channels=1, conditioning=UNCONDITIONAL)
    params = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 4, 4, 1)), jnp.zeros(1), None)
    # A fresh network outputs 0: make every parameter count.
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = tree.unflatten(
        [
            leaf + 0.1 * jax.random.normal(k, leaf.shape)
            for leaf, k in zip(leaves, keys, strict=True)
        ]
    )
    parameters = parameterization.ddpm(process.PREDICTIONS["v"])
    denoise = denoiser.from_network(network.apply, params, parameters)
    return denoiser.clip(denoiser.condition_on(denoise, None))


@pytest.mark.parametrize("kind", ["elementwise", "unet"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_image_i_in_any_batch(kind, eta, unet):
    """Keys, noise and x_T bit for bit, for batches of 1, 3 and 64 on 1, 2 and 8 devices; images
    too with an elementwise denoiser, and with the UNet but for how its sums are ordered."""
    denoise = gaussian_denoiser(0.1, 0.6) if kind == "elementwise" else unet
    plan = ddim_plan(11, eta)
    cases = (
        [(64, 1), (1, 1), (3, 2), (64, 8)]
        if kind == "unet"
        else [(64, 1), (1, 1), (3, 1), (3, 2), (3, 8), (64, 8)]
    )
    reference, *others = [made_on(devices, num, plan, denoise, (4, 4, 1)) for num, devices in cases]
    for other in others:
        n = len(other[0])
        for found, expected in zip(other[:3], reference[:3], strict=True):
            np.testing.assert_array_equal(found, expected[:n])
        np.testing.assert_allclose(
            other[3], reference[3][:n], rtol=0, atol=0 if kind == "elementwise" else 1e-4
        )
    assert np.std(reference[3]) > 0.1


def test_missing_keys_are_named():
    x, keys = start(4)
    with pytest.raises(ValueError, match=naming("keys", "1", "4")):
        sampler.sample(COMPILED, ddim_plan(5, 1.0), x, keys[:1])


def test_noise_differs():
    """Between images, rows and seeds."""
    keys = sampler.image_keys(jax.random.key(0), np.arange(4))
    other = sampler.image_keys(jax.random.key(1), np.arange(4))
    drawn = np.concatenate(
        [sampler.noise(keys, (3,), n) for n in range(5)] + [sampler.noise(other, (3,))]
    )
    assert len(np.unique(drawn)) == drawn.size


def test_callback():
    seen, (x, keys) = [], start()
    run = jax.jit(partial(sampler.scan_plan, gaussian_denoiser(0.0, 1.0)))
    sampler.sample(
        run, ddim_plan(23), x, keys, lambda rows, carry: seen.append((rows, carry[0].shape))
    )
    assert [rows for rows, _ in seen] == [10, 10, 1, 1, 1]


@pytest.mark.parametrize(("scale", "expected"), [(None, 50), (2.0, 100)])
def test_count_nfe(scale, expected):
    def network(params, x, t, condition):
        return x

    def build(counted):
        parameters = parameterization.ddpm(process.PREDICTIONS["eps"])
        conditional = denoiser.from_network(counted(network), None, parameters)
        labels = jnp.zeros(4, jnp.int32)
        if scale is None:
            return denoiser.condition_on(conditional, labels)
        return guidance.classifier_free_guidance(conditional, labels, 10, scale)

    x = jax.ShapeDtypeStruct((4, 8, 8, 1), jnp.float32)
    assert sampler.count_nfe(build, ddim_plan(50), x) == expected
    assert sampler.count_nfe(build, solvers.heun(LEVELS, [900, 500, 100]), x) == expected // 50 * 5

    def twice(counted):
        return lambda x, level: build(counted)(build(counted)(x, level), level)

    assert sampler.count_nfe(twice, ddim_plan(50), x) == 2 * expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p._replace(a=p.a * np.nan), "a nan 1"),
        (lambda p: p._replace(b=p.b * np.nan), "b nan 1"),  # a is an article too
        (lambda p: p._replace(c=np.where(np.arange(5)[:, None] == 3, np.inf, p.c)), "c inf 4"),
        (lambda p: p._replace(b=p.b[:4]), "b (4,) (5,)"),
        (lambda p: p._replace(level=p.level._replace(alpha=np.full(5, np.nan))), "alpha nan 1"),
    ],
)
def test_bad_plan_is_named(change, words):
    """Before it runs."""
    x, keys = start()
    with pytest.raises(ValueError, match=naming(*words.split())):
        sampler.sample(COMPILED, change(ddim_plan(5)), x, keys)


@pytest.mark.parametrize("v", [-0.1, 1.1, float("nan")])
def test_bad_v_is_named(v):
    with pytest.raises(ValueError, match=naming("v", v)):
        sampler.interpolated_variance(v)


def test_plan_as_text():
    text = str(sampler.ddim(schedule.linear(1000), [1000, 500.5, 1], 0.5)).splitlines()
    assert text[0].split() == ["row", "t", "alpha", "sigma", "logsnr", "a", "b", "c1", "c2", "d"]
    assert [line.split()[:2] for line in text[1:]] == [["1", "1000"], ["2", "500.5"], ["3", "1"]]
    assert text[3].split()[5:] == ["0", "1", "0", "0", "0"]
    long = str(ddim_plan(1000)).splitlines()
    assert len(long) == 42
    assert long[21] == "..."
    assert long[-1].split()[0] == "1000"


# ----------------------------------------------------------------------------- reconstruction


def test_reconstruction():
    """On Gaussian data, and on a data set of eight points, at the steps of the DDIM paper's table
    2."""
    generator = np.random.default_rng(0)
    points = generator.uniform(-1, 1, (8, 3))
    for denoise, x0 in [
        (gaussian_denoiser(0.3, 0.5), generator.normal(0.3, 0.5, (20, 3))),
        (finite_denoiser(points, 0.1), points + 0.1 * generator.normal(size=points.shape)),
    ]:
        assert_reconstruction(denoise, x0, LEVELS)
        errors = reconstruction_errors(denoise, x0, LEVELS, [100, 200, 400])
        assert (np.divide(errors[:-1], errors[1:]) > 2).all()  # of order one at least, squared


def test_reconstruction_from_pure_noise():
    """The flow leads back from a level without signal too, and on a straight path in fewer
    steps."""
    generator, steps = np.random.default_rng(0), [10, 50, 200]
    points = generator.uniform(-1, 1, (8, 3))
    x0 = points + 0.1 * generator.normal(size=points.shape)
    denoise, levels = finite_denoiser(points, 0.1), schedule.flow(1000)
    assert_reconstruction(denoise, x0, levels, steps)
    errors = [reconstruction_errors(denoise, x0, form, steps) for form in (levels, LEVELS)]
    assert (errors[0] < errors[1]).all()


def test_broken_reconstruction_is_caught():
    with pytest.raises(AssertionError, match=naming("steps", "(10, 20, 50)")):
        assert_reconstruction(
            lambda x, level: np.clip(x, -0.1, 0.1),
            np.linspace(-1, 1, 5)[:, None],
            LEVELS,
            (10, 20, 50),
        )
