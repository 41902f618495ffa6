"""The one place where a network meets the schedule: time and input scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import naming
from hypothesis import given, settings
from hypothesis import strategies as st

from diffjax import denoiser, loss, parameterization, process, sampler, schedule
from diffjax.parameterization import Parameterization
from diffjax.process import PREDICTIONS
from diffjax.schedule import level_at
from diffjax.testing import (
    assert_rescalable,
    gaussian_denoiser,
    run_plan,
    schedules,
    visits,
)

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
    "make",
    [
        parameterization.ddpm, parameterization.variance_preserving, scaled,
        lambda prediction: parameterization.flow(), lambda prediction: parameterization.sit(),
        lambda prediction: parameterization.edm(),
    ],
)  # fmt: skip
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


# ----------------------------------------------------------------------------- flow, sit, edm


@settings(max_examples=25)
@given(schedules(most=20, exploding=True, flow=True), st.floats(0.1, 5), st.floats(0.5, 2000))
def test_networks_of_every_form_of_a_path(levels, sigma_data, time_scale):
    presets = [parameterization.flow(time_scale), parameterization.sit()]
    if levels.alpha[-1] > 0:
        presets.append(parameterization.edm(sigma_data))
    for preset in presets:
        preset.check(levels)
        assert_rescalable(preset, levels)


@pytest.mark.parametrize(
    ("broken", "word"),
    [
        (lambda p: p._replace(network_time=lambda level: level.sigma), "network_time"),
        (lambda p: p._replace(input_scale=lambda level: 1.0), "input_scale"),
        (lambda p: p._replace(prediction=PREDICTIONS["v"]), "target"),
    ],
)
def test_a_network_of_one_form_is_caught(broken, word):
    with pytest.raises(AssertionError, match=naming(word, "level")):
        assert_rescalable(broken(parameterization.flow()), LEVELS)


@given(st.integers(1, 300), st.floats(0.1, 10))
def test_inputs_on_the_straight_path(T, shift):
    """x_t as it is; the time is 1000*sigma, or alpha in SiT's direction."""
    levels = schedule.flow(T, shift)
    for preset, time in (
        (parameterization.flow(), 1000 * levels.sigma),
        (parameterization.flow(1.0), levels.sigma),
        (parameterization.sit(), levels.alpha),
    ):
        np.testing.assert_allclose(preset.network_time(levels), time, rtol=1e-12)
        np.testing.assert_allclose(preset.input_scale(levels), 1, rtol=1e-12)


@pytest.mark.usefixtures("x64")
@given(st.floats(0.1, 5))
def test_inputs_of_edm(sigma_data):
    """c_in and c_noise of its table 1, where alpha is 1; inputs have unit variance."""
    levels, preset = level_at(schedule.edm(20), slice(1, None)), parameterization.edm(sigma_data)
    sigma = levels.sigma
    np.testing.assert_allclose(preset.network_time(levels), np.log(sigma) / 4, rtol=1e-12)
    scale = preset.input_scale(levels)
    np.testing.assert_allclose(scale, 1 / np.sqrt(sigma**2 + sigma_data**2), rtol=1e-12)
    np.testing.assert_allclose(scale**2 * (sigma_data**2 + sigma**2), 1, rtol=1e-12)


def straight(x, time, sign):
    """x_t and its level of a network of `flow` (sign 1) or `sit` (-1)."""
    sigma = time / 1000 if sign > 0 else 1 - time
    return x, schedule.Level(0 * sigma, 1 - sigma, sigma)


def exploding(x, time, sign):
    """x_t and its level of a network of `edm`, in the form where alpha is 1."""
    level = schedule.Level(0 * time, 1 + 0 * time, jnp.exp(4 * time))
    return x * process.append_dims(process.edm_scale(level, 0.5), x), level


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["flow", "sit", "edm"])
@settings(max_examples=5)
@given(data=st.data(), shift=st.floats(0.2, 5))
def test_published_networks_sample_any_form(name, data, shift):
    """A network that knows nothing but its own inputs finds the ideal images on every form."""
    parameters = getattr(parameterization, name)()
    levels = schedule.flow(40, shift)
    if name == "edm":
        levels = level_at(levels, slice(40))  # with signal at every level
    t, z = data.draw(visits(levels)), np.random.default_rng(0).normal(size=(3, 4))
    ideal, form = gaussian_denoiser(0.2, 0.7), exploding if name == "edm" else straight

    def network(params, x, time, condition):
        x_t, level = form(x, time, 1 if name == "flow" else -1)
        x0 = ideal(x_t, level)
        return parameters.prediction.target(x0, process.eps_from_x0(x_t, x0, level), level)

    denoise = denoiser.condition_on(denoiser.from_network(network, None, parameters), None)
    for path in (levels, schedule.variance_preserving(levels)):
        plan = sampler.ddim(path, t)
        found = run_plan(denoise, plan, plan.init_noise_sigma * z)
        expected = run_plan(ideal, plan, plan.init_noise_sigma * z)
        np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("name", ["x0", "v", "flow", "sit", "edm"])
@given(schedules(exploding=True, flow=True), st.data(), st.integers(0, 99))
def test_digits_in_float32(name, levels, data, seed):
    """Nothing is divided by what vanishes: x0 keeps its digits next to data, and next to noise."""
    prediction = PREDICTIONS[name]
    exact = schedule.at(levels, data.draw(st.integers(1, schedule.length(levels))))
    level = schedule.Level(*(np.float32(leaf) for leaf in exact))
    x0, eps = np.random.default_rng(seed).normal(size=(2, 8)).astype(np.float32)
    x_t, output = process.q_sample(x0, eps, level), prediction.target(x0, eps, level)
    found = prediction.to_x0(x_t, output, level)
    size = np.abs(np.array([x0, eps])).max()
    assert np.abs(found - x0).max() <= 2e-6 * size


def test_levels_that_a_network_cannot_be_called_at():
    """Before anything is traced."""
    levels = schedule.flow(50)
    with pytest.raises(ValueError, match=naming("network_time", "level", "50", "alpha", "0")):
        parameterization.edm().check(levels)
    with pytest.raises(ValueError, match=naming("network_time", "50")):
        parameterization.edm().check(schedule.at(levels, [50, 20]))
    parameterization.edm().check(schedule.at(levels, [49, 20, 0]))
    with pytest.raises(ValueError, match=naming("level", "50", "eps")):
        parameterization.ddpm("eps").check(levels)
    with pytest.raises(ValueError, match=naming("network_time", "50")):
        loss.denoising_loss(lambda *inputs: 0.0, parameterization.edm(), levels)
    broken = parameterization.sit()._replace(input_scale=lambda level: 1 / level.alpha)
    with pytest.raises(ValueError, match=naming("input_scale", "50")):
        broken.check(levels)


@pytest.mark.parametrize("make", [parameterization.flow, parameterization.edm])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_bad_arguments_are_named(make, value):
    name = "time_scale" if make is parameterization.flow else "sigma_data"
    with pytest.raises(ValueError, match=naming(name, value)):
        make(value)
