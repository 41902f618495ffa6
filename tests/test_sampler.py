from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffjax import denoiser, process, sampler, schedule
from diffjax.schedule import Level
from diffjax.testing import all_plans, gaussian_denoiser, gaussian_flow, pairs, plan_errors, run_plan, schedules, visits

ETAS = st.floats(0, 1)


def draw(seed, count=3, shape=(4, 2)):
    return np.random.default_rng(seed).normal(size=(count, *shape))


# ------------------------------------------------------------------------------------------- equations


@given(pairs(), ETAS, st.integers(0, 99))
def test_ddim_is_equation_12_of_the_paper(levels, eta, seed):
    """As printed, in alpha-bars: sigma of equation 16, with the cancellation that the code avoids."""
    level_t, level_s = levels
    x_t, x0, z = draw(seed)
    abar_t, abar_s = level_t.alpha**2, level_s.alpha**2
    sigma = eta * np.sqrt((1 - abar_s) / (1 - abar_t)) * np.sqrt(1 - abar_t / abar_s)
    eps = (x_t - np.sqrt(abar_t) * x0) / np.sqrt(1 - abar_t)
    expected = np.sqrt(abar_s) * x0 + np.sqrt(np.maximum(0, 1 - abar_s - sigma**2)) * eps + sigma * z
    # The printed form loses digits: sqrt of a difference of numbers near 1.
    np.testing.assert_allclose(sampler.ddim_step(x_t, x0, level_t, level_s, eta, z), expected, atol=2e-6)


@given(pairs(), st.integers(0, 99))
def test_eta_1_is_ddpm(levels, seed):
    x_t, x0, z = draw(seed)
    ddim = sampler.ddim_step(x_t, x0, *levels, 1.0, z)
    np.testing.assert_allclose(ddim, sampler.ddpm_step(x_t, x0, *levels, z), atol=1e-10)


@given(pairs(), st.integers(0, 99))
def test_eta_0_draws_nothing_and_is_an_euler_step_in_sigma_over_alpha(levels, seed):
    level_t, level_s = levels
    x_t, x0, z = draw(seed)
    x_s = sampler.ddim_step(x_t, x0, level_t, level_s, 0.0, z)
    slope = process.eps_from_x0(x_t, x0, level_t)
    change = level_s.sigma / level_s.alpha - level_t.sigma / level_t.alpha
    euler = x_t / level_t.alpha + change * slope
    np.testing.assert_allclose(x_s / level_s.alpha, euler, atol=1e-12 / level_t.alpha)
    assert (x_s == sampler.ddim_step(x_t, x0, level_t, level_s, 0.0, 2 * z)).all()


@given(schedules(), st.data())
def test_fixed_large_is_beta_on_the_full_chain(levels, data):
    t = data.draw(st.integers(1, schedule.length(levels)))
    beta = 1 - levels.alpha[t] ** 2 / levels.alpha[t - 1] ** 2
    std = sampler.fixed_large(schedule.at(levels, t), schedule.at(levels, t - 1))
    assert std**2 == pytest.approx(beta if t > 1 else 0, abs=1e-14)


@given(pairs(), st.floats(0, 1), ETAS, st.integers(0, 99))
def test_steps_compose_where_the_estimate_does_not_change(levels, w, eta, seed):
    """t -> s -> u equals t -> u: with eta 0 sample by sample, with eta 1 in mean and variance; and onto data for any
    eta. u is a level between s and data, at signal-to-noise ratios that w draws."""
    level_t, level_s = levels
    if level_s.sigma < 1e-3:
        return
    sigma_u = w * level_s.sigma
    level_u, data_level = Level(0, (1 - sigma_u**2) ** 0.5, sigma_u), Level(0, 1.0, 0.0)
    x_t, x0, z = draw(seed)
    x_s = sampler.ddim_step(x_t, x0, level_t, level_s, eta, z)
    assert (sampler.ddim_step(x_s, x0, level_s, data_level, eta, z) == x0).all()

    whole = sampler.ddim_step(x_t, x0, level_t, level_u)
    halves = sampler.ddim_step(sampler.ddim_step(x_t, x0, level_t, level_s), x0, level_s, level_u)
    np.testing.assert_allclose(halves, whole, atol=1e-9)

    mean, std = process.q_posterior(x_t, x0, level_t, level_u)
    mean_s, std_s = process.q_posterior(x_t, x0, level_t, level_s)
    mean_u, std_u = process.q_posterior(mean_s, x0, level_s, level_u)
    gain = process.q_posterior(1.0, 0.0, level_s, level_u)[0]
    np.testing.assert_allclose(mean_u, mean, atol=1e-9)
    np.testing.assert_allclose(std_u**2 + gain**2 * std_s**2, std**2, atol=1e-12)


# ------------------------------------------------------------------------------------------- tables


@given(schedules(), st.data())
def test_rows_keep_mean_and_variance_and_land_on_data(levels, data):
    for name, plan in all_plans(levels, data.draw(visits(levels))).items():
        errors = plan_errors(plan)
        assert errors["mean"] < 1e-12, name
        assert errors["landing"] == 0, name
        if name != "ddpm, fixed_large":
            assert errors["variance"] < 1e-12, name


@given(schedules(), st.data(), ETAS, st.integers(0, 99))
def test_rows_are_the_readable_steps(levels, data, eta, seed):
    t = data.draw(visits(levels))
    steps = {
        "ddim": (sampler.ddim(levels, t, eta), lambda *a: sampler.ddim_step(*a[:4], eta, a[4])),
        "small": (sampler.ddpm(levels, t), sampler.ddpm_step),
        "large": (sampler.ddpm(levels, t, sampler.fixed_large), lambda *a: sampler.ddpm_step(*a, sampler.fixed_large)),
    }
    x_t, x0, z = draw(seed)
    for name, (plan, step) in steps.items():
        for i in range(plan.steps):
            level_t = schedule.at(levels, t[i])
            level_s = schedule.at(levels, t[i + 1] if i + 1 < len(t) else 0)
            noise = 0 if plan.d is None else plan.d[i] * z
            row = plan.a[i] * x_t + plan.b[i] * x0 + noise
            np.testing.assert_allclose(row, step(x_t, x0, level_t, level_s, z), atol=1e-11, err_msg=name)


@given(schedules(), st.data())
def test_a_deterministic_plan_has_no_noise_column(levels, data):
    t = data.draw(visits(levels))
    assert sampler.ddim(levels, t).d is None
    assert (sampler.ddpm(levels, t).d is None) == (len(t) == 1)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_eta_outside_its_range_is_named(eta):
    with pytest.raises(ValueError, match="eta is"):
        sampler.ddim(schedule.linear(10), [10], eta)


# ------------------------------------------------------------------------------------------- convergence


def ddim_error(steps):
    levels = schedule.linear(4000, 1e-4 / 4, 0.02 / 4)
    x_T = draw(0, 1)[0] * 2
    found = run_plan(gaussian_denoiser(0.3, 0.5), sampler.ddim(levels, schedule.trailing(levels, steps)), x_T)
    return np.abs(found - gaussian_flow(x_T, schedule.at(levels, 4000), 0.3, 0.5)).max()


def test_ddim_converges_to_the_probability_flow_at_order_one():
    errors = [ddim_error(steps) for steps in (50, 100, 200, 400)]
    slopes = np.log2(np.divide(errors[:-1], errors[1:]))
    assert errors[-1] < 0.02
    assert (np.abs(slopes - 1) < 0.25).all(), slopes


def moments(plan, denoise):
    """Mean and variance of the samples, exactly: with a linear denoiser they pass through the rows."""
    m, v = 0.0, 1.0
    for i in range(plan.steps):
        level = Level(*(leaf[i] for leaf in plan.level))
        offset = denoise(0.0, level)
        gain = plan.a[i] + plan.b[i] * (denoise(1.0, level) - offset)
        m, v = gain * m + plan.b[i] * offset, gain**2 * v + (0 if plan.d is None else plan.d[i] ** 2)
    return m, v


@pytest.mark.parametrize("std", sampler.VARIANCES.values(), ids=sampler.VARIANCES)
def test_ddpm_samples_come_to_have_the_moments_of_the_data(std):
    """Both variances are biased at a finite number of steps, and the bias falls in proportion to it. fixed_small is
    too small and fixed_large too large: they are the bounds of the true one (DDPM, section 3.2)."""
    denoise, found = gaussian_denoiser(0.3, 0.5), []
    for T in (250, 500, 1000):
        levels = schedule.linear(T, 0.1 / T, 20 / T)
        found.append(moments(sampler.ddpm(levels, np.arange(T, 0, -1), std), denoise))
    # What is left of the data at the last level, alpha_T = 0.006, is missing from x_T.
    assert found[-1][0] == pytest.approx(0.3, abs=0.3 * 0.01)
    bias = np.array([v - 0.25 for _, v in found]) * (-1 if std is sampler.fixed_small else 1)
    assert (bias > 0).all()
    np.testing.assert_allclose(np.log2(bias[:-1] / bias[1:]), 1, atol=0.25)
    assert bias[-1] < 0.01


# ------------------------------------------------------------------------------------------- the loop


def plan_of(steps, eta=0.0, T=1000):
    levels = schedule.linear(T)
    return sampler.ddim(levels, schedule.trailing(levels, steps), eta)


def start(num=3, shape=(2, 2), seed=0):
    keys = sampler.image_keys(jax.random.key(seed), np.arange(num))
    return sampler.noise(keys, shape), keys


@settings(max_examples=12)
@given(st.integers(1, 47), st.sampled_from([0.0, 0.7, 1.0]), st.sampled_from([1, 10]))
def test_sample_is_the_plan_row_by_row(steps, eta, seed):
    """Against the numpy loop in float64, with the noise that the keys stand for."""
    plan, (x, keys) = plan_of(steps, eta), start(seed=seed)
    denoise = gaussian_denoiser(0.1, 0.6)
    found = sampler.sample(jax.jit(partial(sampler.advance, denoise)), plan, x, keys)
    z = np.stack([sampler.noise(keys, (2, 2), number) for number in plan.number])
    np.testing.assert_allclose(found, run_plan(denoise, plan, np.float64(x), np.float64(z)), atol=2e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_history_columns_reach_back_one_and_two_rows(eta):
    plan = plan_of(6, eta)
    plan = plan._replace(c=np.random.default_rng(0).normal(size=(6, 2)) / 10)
    denoise, (x, keys) = gaussian_denoiser(0.1, 0.6), start()
    z = np.stack([sampler.noise(keys, (2, 2), number) for number in plan.number])
    found = sampler.sample(jax.jit(partial(sampler.advance, denoise)), plan, x, keys)
    np.testing.assert_allclose(found, run_plan(denoise, plan, np.float64(x), np.float64(z)), atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("compiled", [True, False])
def test_in_pieces_or_whole_compiled_or_not(eta, compiled):
    plan, (x, keys) = plan_of(23, eta), start()
    run = partial(sampler.advance, gaussian_denoiser(0.1, 0.6))
    run = jax.jit(run) if compiled else run
    pieces = sampler.sample(run, plan, x, keys)
    (rows,) = sampler.chunks(plan, x.dtype, size=23)
    whole = run(rows, (x, jnp.zeros_like(x), jnp.zeros_like(x)), keys)[0]
    np.testing.assert_allclose(pieces, whole, atol=1e-6)


def test_two_programs_serve_every_plan_of_a_kind():
    traces = []

    def denoise(x, level):
        traces.append(1)
        return 0.5 * x

    run, (x, keys) = jax.jit(partial(sampler.advance, denoise)), start()
    levels = schedule.cosine(1000)
    for steps in (50, 13, 7, 1, 100):
        for plan in (plan_of(steps, 0.5), sampler.ddpm(levels, schedule.linspace(levels, steps + 1))):
            sampler.sample(run, plan, x, keys)
    assert len(traces) <= 2 * 2  # ten rows and one; with noise, and for the plan of one step without
    assert run._cache_size() <= 3


@pytest.mark.parametrize("steps", [1, 9, 10, 11, 20, 57])
def test_chunks_are_the_plan_in_order(steps):
    plan = plan_of(steps, 1.0)
    pieces = sampler.chunks(plan, jnp.float32)
    assert {piece.steps for piece in pieces} <= {1, 10}
    assert np.concatenate([piece.number for piece in pieces]).tolist() == list(range(1, steps + 1))
    np.testing.assert_array_equal(np.concatenate([piece.a for piece in pieces]), np.float32(plan.a))


def test_bfloat16_samples_still_count_levels_exactly():
    pieces = sampler.chunks(plan_of(1000), jnp.bfloat16)
    assert np.concatenate([piece.level.t for piece in pieces]).tolist() == list(range(1000, 0, -1))
    assert pieces[0].a.dtype == jnp.bfloat16


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_image_i_does_not_depend_on_the_batch(eta):
    denoise, plan = gaussian_denoiser(0.1, 0.6), plan_of(12, eta)
    run = jax.jit(partial(sampler.advance, denoise))
    many, one = start(64), start(1)
    assert (many[0][:1] == one[0]).all()
    assert (sampler.sample(run, plan, *many)[:1] == sampler.sample(run, plan, *one)).all()


def test_noise_differs_between_images_rows_and_seeds():
    keys = sampler.image_keys(jax.random.key(0), np.arange(4))
    other = sampler.image_keys(jax.random.key(1), np.arange(4))
    drawn = np.concatenate([sampler.noise(keys, (3,), n) for n in range(5)] + [sampler.noise(other, (3,))])
    assert len(np.unique(drawn)) == drawn.size


def test_progress_is_told_after_every_call():
    seen, (x, keys) = [], start()
    run = jax.jit(partial(sampler.advance, gaussian_denoiser(0.0, 1.0)))
    sampler.sample(run, plan_of(23), x, keys, lambda rows, carry: seen.append((rows, carry[0].shape)))
    assert [rows for rows, _ in seen] == [10, 10, 1, 1, 1]


@pytest.mark.parametrize(("scale", "expected"), [(None, 50), (2.0, 100)])
def test_nfe_is_counted_not_assumed(scale, expected):
    def network(params, x, t, condition):
        return x

    def build(network):
        conditional = denoiser.from_network(network, None, process.PREDICTIONS["eps"])
        labels = jnp.zeros(4, jnp.int32)
        if scale is None:
            return denoiser.condition_on(conditional, labels)
        return denoiser.guide(conditional, labels, 10, scale)

    x = jax.ShapeDtypeStruct((4, 8, 8, 1), jnp.float32)
    assert sampler.count_nfe(build, network, plan_of(50), x) == expected
