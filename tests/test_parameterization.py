"""The one place where a network meets the schedule: time and input scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffjax import denoiser, loss, parameterization, process, sampler, schedule
from diffjax.parameterization import Parameterization
from diffjax.process import PREDICTIONS
from diffjax.schedule import level_at
from diffjax.testing import gaussian_denoiser, run_plan, schedules, visits

LEVELS = schedule.linear(1000)


def scaled(prediction):
    """Another time and input scale than DDPM's, that a network can undo."""
    return Parameterization(
        prediction,
        network_time=lambda level: 1000 * level.sigma,
        input_scale=lambda level: 1 / (1 + level.sigma),
    )


def test_ddpm_time_counts_from_0():
    seen = []

    def spy(params, x, t, condition):
        seen.append(np.asarray(t))
        return x

    parameters = parameterization.ddpm(PREDICTIONS["x0"])
    denoise = denoiser.condition_on(denoiser.from_network(spy, None, parameters), None)
    denoise(jnp.zeros((3, 2)), schedule.at(LEVELS, 1000))
    denoise(jnp.zeros((3, 2)), schedule.at(LEVELS, [1, 2, 1000]))
    assert [list(t) for t in seen] == [[999] * 3, [0, 1, 999]]


def test_ddpm_keeps_the_input():
    x = jax.random.normal(jax.random.key(0), (3, 4))
    inputs, _ = parameterization.ddpm(PREDICTIONS["v"]).inputs(x, schedule.at(LEVELS, 400))
    np.testing.assert_array_equal(inputs, x)


@pytest.mark.parametrize(
    "make", [parameterization.ddpm, parameterization.variance_preserving, scaled]
)
def test_inputs_of_a_level_given_once_or_per_image(make):
    x = jax.random.normal(jax.random.key(0), (3, 4, 2))
    parameters = make(PREDICTIONS["eps"])
    once = parameters.inputs(x, schedule.at(LEVELS, 400))
    each = parameters.inputs(x, schedule.at(LEVELS, [400] * 3))
    assert [array.shape for array in once] == [(3, 4, 2), (3,)]
    for a, b in zip(once, each, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.usefixtures("x64")
@settings(max_examples=20)
@given(st.sampled_from(sorted(PREDICTIONS)), st.integers(1, 1000), st.integers(0, 99))
def test_time_and_scale_that_the_network_undoes(name, t, seed):
    """Denoisers of the same x0 follow from two parameterizations of one network."""
    x, level = jax.random.normal(jax.random.key(seed), (2, 3)), schedule.at(LEVELS, t)

    def network(params, x, time, condition):
        return jnp.tanh(x + time[:, None] / 1000)

    def undoing(params, x, time, condition):
        sigma = time / 1000
        t = jnp.interp(sigma, LEVELS.sigma, LEVELS.t)
        return network(params, x * (1 + sigma)[:, None], t - 1, condition)

    plain = denoiser.from_network(network, None, parameterization.ddpm(PREDICTIONS[name]))
    other = denoiser.from_network(undoing, None, scaled(PREDICTIONS[name]))
    expected = plain(x, level, None)
    bound = 1e-9 * max(1, np.abs(expected).max())
    np.testing.assert_allclose(other(x, level, None), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("name", ["eps", "x0", "v"])
def test_the_loss_uses_the_same_inputs(name):
    """Training a network by another parameterization is training the one that undoes it."""
    x0 = jax.random.normal(jax.random.key(0), (8, 5))
    batch = {"x": x0, "index": jnp.arange(8, dtype=jnp.uint32)}
    sigma = jnp.asarray(LEVELS.sigma, jnp.float32)

    def network(params, x, time, condition, keys):
        return jnp.tanh(x + time[:, None] / 1000)

    def undoing(params, x, time, condition, keys):
        t = jnp.argmin(jnp.abs(time[:, None] / 1000 - sigma), axis=1)
        return network(params, x * (1 + time / 1000)[:, None], t - 1, condition, keys)

    plain = loss.denoising_loss(network, parameterization.ddpm(PREDICTIONS[name]), LEVELS)
    other = loss.denoising_loss(undoing, scaled(PREDICTIONS[name]), LEVELS)
    found, expected = (f(None, batch, jax.random.key(1)) for f in (other, plain))
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-4)
    np.testing.assert_array_equal(found.quartile, expected.quartile)


# ----------------------------------------------------------------------------- variance_preserving


@given(schedules(exploding=True), st.data(), st.integers(0, 99))
def test_input_scale_gives_unit_variance(levels, data, seed):
    """The network's input is x_t of the variance-preserving form of the path."""
    level = schedule.at(levels, data.draw(st.integers(1, schedule.length(levels))))
    preserving = schedule.variance_preserving(level)
    x0, eps = np.random.default_rng(seed).normal(size=(2, 3, 4))
    scale = parameterization.variance_preserving(PREDICTIONS["eps"]).input_scale(level)
    found = scale * process.q_sample(x0, eps, level)
    np.testing.assert_allclose(found, process.q_sample(x0, eps, preserving), rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["eps", "x0"])
@settings(max_examples=10)
@given(data=st.data(), seed=st.integers(0, 99))
def test_a_network_serves_every_form_of_a_path(name, data, seed):
    """Trained on the variance-preserving form, it samples the same images on the exploding one."""
    levels = level_at(schedule.linear(100), slice(61))  # alpha far above 0
    exploding = schedule.variance_exploding(levels)
    t = data.draw(visits(levels))
    z = np.random.default_rng(seed).normal(size=(3, 4))
    ideal, prediction = gaussian_denoiser(0.2, 0.7), PREDICTIONS[name]

    def network(params, x, time, condition):
        level = jax.tree.map(lambda leaf: jnp.asarray(leaf)[time + 1], levels)
        x0 = ideal(x, level)
        return prediction.target(x0, process.eps_from_x0(x, x0, level), level)

    parameters = parameterization.variance_preserving(prediction)
    denoise = denoiser.condition_on(denoiser.from_network(network, None, parameters), None)
    plans = [sampler.ddim(form, t) for form in (levels, exploding)]
    images = [run_plan(denoise, plan, plan.init_noise_sigma * z) for plan in plans]
    np.testing.assert_allclose(*images, atol=1e-9)
    np.testing.assert_allclose(images[0], run_plan(ideal, plans[0], z), atol=1e-9)
