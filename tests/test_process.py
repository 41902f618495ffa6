import numpy as np
import pytest
from helpers import naming
from hypothesis import given
from hypothesis import strategies as st

from diffjax import process, schedule
from diffjax.schedule import Level
from diffjax.testing import assert_prediction, pairs, schedules


def draw(seed, shape=(5, 2, 3)):
    return np.random.default_rng(seed).normal(size=(2, *shape))


@given(schedules(), st.data(), st.sampled_from(sorted(process.PREDICTIONS)), st.integers(0, 99))
def test_predictions_give_back_x0(levels, data, name, seed):
    x0, eps = draw(seed)
    t = data.draw(st.lists(st.integers(1, schedule.length(levels)), min_size=5, max_size=5))
    level, prediction = schedule.at(levels, t), process.PREDICTIONS[name]
    x_t = process.q_sample(x0, eps, level)
    found = prediction.to_x0(x_t, prediction.target(x0, eps, level), level)
    # Dividing by alpha enlarges the rounding of x_t, which is about sigma*eps there.
    bound = 1e-14 * (1 + 1 / level.alpha.reshape(5, 1, 1))
    assert (np.abs(found - x0) < bound * 10).all()


@given(
    schedules(exploding=True),
    st.data(),
    st.sampled_from([np.float32, np.float64]),
    st.integers(0, 99),
)
def test_conversions(levels, data, dtype, seed):
    """From what any prediction says to any other and back. In units of rounding, an error in x0
    is one in x_t over alpha, and one in eps is one over sigma: near either end these are large,
    and bounded."""
    t = data.draw(st.integers(1, schedule.length(levels)))
    level = Level(*(dtype(leaf) for leaf in schedule.at(levels, t)))
    x0, eps = draw(seed).astype(dtype)
    x_t = process.q_sample(x0, eps, level)
    unit = (
        32
        * np.finfo(dtype).eps
        * max(1, np.abs(x_t).max())
        * max(np.abs(x0).max(), np.abs(eps).max())
    )
    error_x0 = unit * (1 + 1 / level.alpha)
    error_eps = unit * (1 + 1 / level.sigma) + error_x0 * level.alpha / level.sigma
    bounds = {
        "x0": error_x0,
        "eps": error_eps,
        "v": level.alpha * error_eps + level.sigma * error_x0,
        "score": error_eps / level.sigma,
        "flow": error_eps + error_x0,
        "sit": error_eps + error_x0,
        "edm": (2 * level.sigma * error_x0 + level.alpha / 2 * error_eps)
        / np.hypot(level.sigma, level.alpha / 2),
    }
    for source in process.PREDICTIONS:
        said = process.PREDICTIONS[source].target(x0, eps, level)
        for target in process.PREDICTIONS:
            pair = process.PREDICTIONS[source], process.PREDICTIONS[target]
            there = process.convert(x_t, said, level, *pair)
            np.testing.assert_array_less(
                np.abs(there - pair[1].target(x0, eps, level)),
                bounds[target],
                f"{source} to {target}",
            )
            back = process.convert(x_t, there, level, *pair[::-1])
            # The way back starts with the error of the way there: in x0, whichever prediction
            # carried it.
            loss = (
                bounds[target]
                / pair[1].output_sensitivity(level) ** 0.5
                * pair[0].output_sensitivity(level) ** 0.5
            )
            np.testing.assert_array_less(
                np.abs(back - said), 2 * (bounds[source] + loss), f"{source} to {target} and back"
            )
            assert back.dtype == dtype


@given(
    schedules(exploding=True),
    st.data(),
    st.sampled_from(sorted(process.PREDICTIONS)),
    st.integers(0, 99),
)
def test_output_sensitivity(levels, data, name, seed):
    """It is how far an error of x0 moves the output, squared."""
    level = schedule.at(levels, data.draw(st.integers(1, schedule.length(levels))))
    x_t, x0 = draw(seed)
    said = [
        process.PREDICTIONS[name].target(x, process.eps_from_x0(x_t, x, level), level)
        for x in (x0, x0 + 1.0)
    ]
    gain = process.PREDICTIONS[name].output_sensitivity(level)
    np.testing.assert_allclose((said[1] - said[0]) ** 2, gain, rtol=1e-6, atol=1e-9)


DETERMINED = ("x0", "v", "flow", "sit", "edm")  # at every level, without signal too


@given(schedules(most=60, exploding=True, terminal=True, flow=True), st.floats(0.1, 10))
def test_predictions_that_always_determine_x0(levels, sigma_data):
    for prediction in (
        *(process.PREDICTIONS[name] for name in DETERMINED),
        process.edm(sigma_data),
    ):
        process.check_prediction(prediction, levels)
        assert_prediction(prediction, levels)


def test_wrong_predictions_are_caught():
    levels, v = schedule.flow(5), process.PREDICTIONS["v"]
    eps = process.PREDICTIONS["eps"]
    with pytest.raises(AssertionError, match=naming("to_x0", "level")):
        assert_prediction(v._replace(to_x0=process.x0_from_flow), levels)
    wrong = v._replace(output_sensitivity=eps.output_sensitivity)
    with pytest.raises(AssertionError, match=naming("output_sensitivity", "level")):
        assert_prediction(wrong, levels)


@given(schedules(exploding=True, flow=True), st.data(), st.floats(0.1, 10), st.integers(0, 99))
def test_edm_as_published(levels, data, sigma_data, seed):
    """D(y; s) = c_skip*y + c_out*F of its table 1, at y = x_t/alpha and s = sigma/alpha."""
    t = data.draw(st.integers(1, schedule.length(levels)))
    level = schedule.at(levels, t)
    if level.alpha == 0:
        level = schedule.at(levels, t - 1)
    if level.sigma == 0:
        return
    x_t, output = draw(seed)
    s, y = level.sigma / level.alpha, x_t / level.alpha
    c_skip = sigma_data**2 / (s**2 + sigma_data**2)
    c_out = s * sigma_data / np.sqrt(s**2 + sigma_data**2)
    expected = c_skip * y + c_out * output
    found = process.edm(sigma_data).to_x0(x_t, output, level)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@given(schedules(exploding=True, terminal=True, flow=True), st.data(), st.floats(0.1, 10))
def test_edm_has_unit_variance(levels, data, sigma_data):
    """For data of this standard deviation, at every level: a target is linear in x0 and eps, so
    variances add up. In v it has that for data of standard deviation 1 alone."""
    level = schedule.at(levels, data.draw(st.integers(1, schedule.length(levels))))
    of_x0, of_eps = (process.edm(sigma_data).target(*unit, level) for unit in np.eye(2))
    assert (sigma_data * of_x0) ** 2 + of_eps**2 == pytest.approx(1, rel=1e-9)


@given(schedules(terminal=True), st.data(), st.integers(0, 99))
def test_edm_of_unit_data_is_v(levels, data, seed):
    """Up to its sign, on a variance-preserving schedule."""
    level = schedule.at(levels, data.draw(st.integers(1, schedule.length(levels))))
    x0, eps = draw(seed)
    found = process.edm(1.0).target(x0, eps, level)
    np.testing.assert_allclose(found, -process.v_from(x0, eps, level), atol=1e-9)


@given(st.integers(1, 300), st.data(), st.integers(0, 99))
def test_flow_is_the_velocity(T, data, seed):
    """On the straight path it is dx/dsigma, and SiT's is its opposite."""
    levels = schedule.flow(T)
    t = data.draw(st.integers(1, T))
    x0, eps = draw(seed)
    ends = [process.q_sample(x0, eps, schedule.at(levels, i)) for i in (t - 1, t)]
    slope = (ends[1] - ends[0]) * T
    for name, sign in (("flow", 1), ("sit", -1)):
        target = process.PREDICTIONS[name].target(x0, eps, schedule.at(levels, t))
        np.testing.assert_allclose(sign * target, slope, atol=1e-9)


@pytest.mark.parametrize("sigma_data", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_sigma_data_is_named(sigma_data):
    with pytest.raises(ValueError, match=naming("sigma_data", sigma_data)):
        process.edm(sigma_data)


def test_score_is_the_slope_of_log_density():
    level, x0, x_t, step = Level(1, 0.8, 0.6), 0.3, 1.1, 1e-5

    def log_density(x):
        return -((x - level.alpha * x0) ** 2) / (2 * level.sigma**2)

    slope = (log_density(x_t + step) - log_density(x_t - step)) / (2 * step)
    assert process.score_from_eps(process.eps_from_x0(x_t, x0, level), level) == pytest.approx(
        slope, rel=1e-8
    )


@pytest.mark.parametrize("name", ["eps", "score"])
def test_undetermined_x0_is_refused(name):
    levels = schedule.zero_terminal_snr(schedule.linear(50))
    with pytest.raises(ValueError, match=naming("level", "50", "alpha", name, "v", "x0")):
        process.check_prediction(process.PREDICTIONS[name], levels)
    process.check_prediction(process.PREDICTIONS[name], schedule.linear(50))
    with pytest.raises(ValueError, match=naming("level", "50", "alpha", name)):
        process.check_prediction(process.PREDICTIONS[name], schedule.at(levels, [50, 20]))
    process.check_prediction(process.PREDICTIONS[name], schedule.at(levels, [49, 20]))
    for other in DETERMINED:
        process.check_prediction(process.PREDICTIONS[other], levels)


@given(schedules(flow=True), st.data(), st.integers(0, 99))
def test_eps_follows_a_clipped_x0(levels, data, seed):
    x_t, x0 = draw(seed)
    level = schedule.at(levels, data.draw(st.integers(1, schedule.length(levels))))
    x0 = np.clip(x0, -1, 1)
    np.testing.assert_allclose(
        process.q_sample(x0, process.eps_from_x0(x_t, x0, level), level), x_t, atol=1e-12
    )


@given(pairs(), st.integers(0, 99))
def test_posterior_by_bayes(levels, seed):
    """q(x_s | x_t, x0) is proportional to q(x_t | x_s) q(x_s | x0): precisions add. Of data, it
    is x0 itself."""
    level_t, level_s = levels
    x_t, x0 = draw(seed)
    found_mean, found_std = process.q_posterior(x_t, x0, level_t, level_s)
    if level_s.sigma == 0:
        assert (found_mean == x0).all()
        assert found_std == 0
        return
    forward = level_t.alpha / level_s.alpha
    noise = level_t.sigma**2 - forward**2 * level_s.sigma**2
    precision = forward**2 / noise + 1 / level_s.sigma**2
    mean = (forward * x_t / noise + level_s.alpha * x0 / level_s.sigma**2) / precision
    np.testing.assert_allclose(found_mean, mean, atol=1e-9)
    np.testing.assert_allclose(found_std**2 * precision, 1, rtol=1e-9)


@given(pairs(flow=True), st.integers(0, 99))
def test_posterior_keeps_the_marginal(levels, seed):
    """The posterior of x_t ~ q(x_t | x0) is q(x_s | x0): the mean maps alpha_t*x0 to alpha_s*x0,
    variances add up."""
    level_t, level_s = levels
    x0, unit = draw(seed)
    mean, std = process.q_posterior(level_t.alpha * x0, x0, level_t, level_s)
    np.testing.assert_allclose(mean, level_s.alpha * x0, atol=1e-12)
    gain, _ = process.q_posterior(unit, 0 * unit, level_t, level_s)
    gain = (gain / unit).flat[0]
    assert gain**2 * level_t.sigma**2 + std**2 == pytest.approx(level_s.sigma**2, abs=1e-14)


def test_level_per_example():
    levels = Level(np.arange(2), np.array([1.0, 0.5]), np.array([0.0, 2.0]))
    x_t = process.q_sample(np.ones((2, 3, 4, 1)), np.ones((2, 3, 4, 1)), levels)
    assert (x_t[0] == 1).all()
    assert (x_t[1] == 2.5).all()
