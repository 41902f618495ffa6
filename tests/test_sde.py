"""The continuous view: one ODE and one SDE for all schedules, and the samplers as their
discretisations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import naming
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from diffjax import process, sampler, schedule, sde
from diffjax.testing import (
    assert_exponential_euler,
    assert_probability_flow,
    at_noise_time,
    gaussian_denoiser,
    pairs,
    schedules,
)

X = np.linspace(-2, 2, 5)


@settings(max_examples=20)
@given(schedules(most=30))
def test_probability_flow(levels):
    """It is tangent to the exact flow."""
    assert_probability_flow(sde.probability_flow, levels)


def test_broken_velocity_is_caught():
    with pytest.raises(AssertionError, match=naming("velocity", "level", "1")):
        assert_probability_flow(sde.reverse_drift, schedule.linear(100))


@settings(max_examples=30)
@given(pairs())
def test_ddim_is_exponential_euler(pair):
    level_t, level_s = pair
    assume(level_s.sigma > 0)
    assume(
        sde.noise_time(level_t) - sde.noise_time(level_s) < 8
    )  # farther, the oracle needs more steps
    assert_exponential_euler(sampler.ddim_step, level_t, level_s)


def test_broken_step_is_caught():
    pair = (schedule.at(schedule.cosine(100), t) for t in (60, 40))
    with pytest.raises(AssertionError, match=naming("step", "eps")):
        assert_exponential_euler(lambda x, x0, t, s: sampler.ddim_step(x, x0, t, s, 1.0), *pair)


@given(st.floats(-6, 6), st.floats(-2, 2))
def test_small_reverse_steps(u, x0):
    """A small step of DDIM is the flow, and one of DDPM the reverse SDE: (x_s - x_t)/(u_s - u_t),
    and the variance added per unit of time: the limits of the two samplers."""
    h = 1e-5
    level_t, level_s = at_noise_time(u), at_noise_time(u - h)
    slope = (sampler.ddim_step(X, x0, level_t, level_s) - X) / -h
    np.testing.assert_allclose(slope, sde.probability_flow(X, x0, level_t), atol=1e-3)
    mean, std = process.q_posterior(X, x0, level_t, level_s)
    np.testing.assert_allclose((mean - X) / -h, sde.reverse_drift(X, x0, level_t), atol=1e-3)
    np.testing.assert_allclose(std**2 / h, sde.diffusion(level_t) ** 2, rtol=1e-3)


@given(st.floats(-6, 6), st.floats(-2, 2))
def test_small_forward_step(u, x0):
    """A small step of the forward process is the forward SDE."""
    h = 1e-5
    level, later = at_noise_time(u), at_noise_time(u + h)
    keeps = later.alpha / level.alpha
    np.testing.assert_allclose((keeps * X - X) / h, sde.drift(X, level), atol=1e-3)
    np.testing.assert_allclose(
        (later.sigma**2 - (keeps * level.sigma) ** 2) / h, sde.diffusion(level) ** 2, rtol=1e-3
    )


@given(st.floats(-6, 6), st.floats(-2, 2))
def test_equations_6_and_13(u, x0):
    """f - g**2/2*score and f - g**2*score, equations 13 and 6 of arXiv:2011.13456, and score =
    -eps/sigma."""
    level = at_noise_time(u)
    score, drift, g2 = sde.score(X, x0, level), sde.drift(X, level), sde.diffusion(level) ** 2
    np.testing.assert_allclose(score, -process.eps_from_x0(X, x0, level) / level.sigma, rtol=1e-12)
    close = {"rtol": 1e-9, "atol": 1e-9}
    np.testing.assert_allclose(sde.probability_flow(X, x0, level), drift - g2 / 2 * score, **close)
    np.testing.assert_allclose(sde.reverse_drift(X, x0, level), drift - g2 * score, **close)


@given(st.floats(-6, 6), st.floats(0.1, 2))
def test_score(u, std):
    """It is the gradient of the log density."""
    level = at_noise_time(u)
    variance = level.alpha**2 * std**2 + level.sigma**2
    score = sde.score(X, gaussian_denoiser(0.3, std)(X, level), level)
    np.testing.assert_allclose(score, -(X - level.alpha * 0.3) / variance, rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("x64")
@settings(max_examples=20)
@given(schedules(most=50, terminal=True), st.floats(0, 1))
def test_level_of_noise_time(levels, share):
    """The levels are those of the schedule."""
    last = schedule.length(levels) - (levels.alpha[-1] == 0)
    t = 1 + share * (last - 1)
    level = schedule.at(levels, t)
    found = jax.jit(sde.level_of_noise_time(levels))(float(sde.noise_time(level)))
    np.testing.assert_allclose(found, level, rtol=1e-7, atol=1e-9)


def test_integer_noise_time():
    np.testing.assert_allclose(
        sde.level_of_noise_time(schedule.linear(100))(0).alpha, 0.5**0.5, rtol=1e-6
    )


def test_beyond_the_ends():
    """t stays there."""
    level = sde.level_of_noise_time(schedule.linear(100))(jnp.array([-20.0, 20.0]))
    assert level.t.tolist() == [1, 100]
    np.testing.assert_allclose(level.sigma, [np.exp(-20), 1], rtol=1e-5)


def test_exploding_schedule_is_named():
    with pytest.raises(ValueError, match=naming("schedule", "alpha**2 + sigma**2", "6401", "10")):
        sde.level_of_noise_time(schedule.edm(10))
