from functools import partial
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import naming
from hypothesis import given
from hypothesis import strategies as st

from diffjax import loss, parameterization, process, schedule, testing
from diffjax.testing import schedules

LEVELS = schedule.linear(1000)
NOISY = schedule.level_at(LEVELS, slice(1, None))
TEN = schedule.level_at(LEVELS, slice(1, 11))
EPS = parameterization.ddpm(process.PREDICTIONS["eps"])
X0 = parameterization.ddpm(process.PREDICTIONS["x0"])
KEY = jax.random.key(0)


def indices(n, start=0):
    return jnp.arange(start, start + n, dtype=jnp.uint32)


def keys(n):
    return loss.example_keys(KEY, indices(n))


# ----------------------------------------------------------------------------- draws of t

TIMES = {
    "uniform": loss.uniform,
    "antithetic": loss.antithetic,
    "stratified": partial(loss.stratified, batch=50),
}


@pytest.mark.parametrize("name", TIMES)
def test_t_is_uniform(name):
    drawn = jax.vmap(lambda key: TIMES[name](key, indices(50), TEN))(jax.random.split(KEY, 400))
    assert set(np.unique(drawn)) == set(range(1, 11))
    # Each share is 0.1 with standard deviation 0.003 where draws share nothing in pairs, and less
    # if they do.
    np.testing.assert_allclose(np.bincount(drawn.ravel())[1:] / drawn.size, 0.1, atol=0.012)
    # And each example's own draws are uniform: 400 of them, standard deviation 0.015.
    first = np.bincount(np.asarray(drawn)[:, 7], minlength=11)[1:] / 400
    np.testing.assert_allclose(first, 0.1, atol=0.06)


def test_stratified_covers_all_levels():
    for seed in range(5):
        t = loss.stratified(jax.random.key(seed), indices(50, start=150), TEN, batch=50)
        assert (np.bincount(t)[1:] == 5).all()


def test_antithetic_neighbours():
    t = np.asarray(loss.antithetic(KEY, indices(64, start=128), NOISY))
    assert (t[::2] + t[1::2] == 1001).all()
    assert len(set(t[::2])) > 25


@pytest.mark.parametrize("name", TIMES)
def test_probability_of_a_level(name):
    """1/T; and a law that catches another."""
    testing.assert_times(TIMES[name], NOISY, np.full(1000, 1e-3))
    with pytest.raises(AssertionError, match=naming("probability")):
        testing.assert_times(
            TIMES[name], NOISY, np.append(np.full(500, 1.2e-3), np.full(500, 8e-4))
        )


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-1.2, 1.2), (4.0, 0.8)])
@pytest.mark.parametrize("kind", ["flow", "shifted flow", "edm", "linear", "few"])
def test_log_normal(kind, mean, std):
    """log(sigma/alpha) is normal, rounded up to a level; and so its quarters are those of Phi."""
    levels = {
        "flow": schedule.flow(1000), "shifted flow": schedule.flow(200, 3.0),
        "edm": schedule.variance_preserving(schedule.edm(1000)), "linear": LEVELS,
        "few": schedule.flow(3),
    }[kind]  # fmt: skip
    noisy = schedule.level_at(levels, slice(1, None))
    with np.errstate(divide="ignore"):
        u = np.log(noisy.sigma / noisy.alpha)
    below = np.append([NormalDist(mean, std).cdf(each) for each in u[:-1]], 1.0)
    times = partial(loss.log_normal, mean=mean, std=std)
    testing.assert_times(times, noisy, np.diff(below, prepend=0.0))
    if len(u) > 500:
        drawn = np.sort(u[np.asarray(times(KEY, indices(20_000), noisy)) - 1])
        for share in (0.25, 0.5, 0.75):
            expected = min(NormalDist(mean, std).inv_cdf(share), u[-1])
            step = np.diff(u)[min(np.searchsorted(u, expected), len(u) - 2)]
            found = drawn[int(share * 20_000)]
            assert found == pytest.approx(expected, abs=0.05 * std + step)


def test_logit_normal_is_edms_lognormal():
    """On flow, the logit of sigma is log(sigma/alpha): the same levels are drawn on two schedules
    of the same noise."""
    noisy = schedule.level_at(schedule.flow(500), slice(1, 500))
    sigma = noisy.sigma / noisy.alpha
    exploding = schedule.Level(noisy.t, np.ones_like(sigma), sigma)
    drawn = [loss.log_normal(KEY, indices(200), each, -1.2, 1.2) for each in (noisy, exploding)]
    np.testing.assert_array_equal(*drawn)


@pytest.mark.parametrize(
    ("mean", "std", "words"),
    [
        (np.nan, 1.0, "mean nan"),
        (0.0, 0.0, "std 0"),
        (0.0, -1.0, "std -1"),
        (0.0, np.inf, "std inf"),
    ],
)
def test_bad_log_normal_is_named(mean, std, words):
    with pytest.raises(ValueError, match=naming(*words.split())):
        loss.log_normal(KEY, indices(2), NOISY, mean, std)


@pytest.mark.parametrize("name", TIMES)
def test_t_of_a_split_batch(name):
    """Draws do not depend on how a batch is split."""
    whole = TIMES[name](KEY, indices(50), NOISY)
    parts = [TIMES[name](KEY, part, NOISY) for part in np.split(indices(50), 5)]
    assert (np.concatenate(parts) == whole).all()


# ----------------------------------------------------------------------------- weightings


@given(
    schedules(exploding=True).filter(lambda levels: schedule.length(levels) > 1), st.floats(0.5, 10)
)
def test_weightings(levels, gamma):
    """Stated on the squared error of x0, and met by every prediction: weight * (output error)**2,
    where an error of x0 moves the output by the root of its output_sensitivity."""
    snr = np.exp(schedule.logsnr(levels)[1:])
    expected = {
        partial(loss.min_snr, gamma=gamma): np.minimum(snr, gamma),
        loss.truncated_snr: np.maximum(snr, 1),
        partial(loss.edm, sigma_data=0.7): (1 / snr + 0.49) / (0.49 / snr),
    }
    for weighting, of_x0 in expected.items():
        for name in ("eps", "x0", "v", "flow", "edm"):
            prediction = process.PREDICTIONS[name]
            weight = weighting(levels, prediction)[1:]
            noisy = schedule.level_at(levels, slice(1, None))
            x_t, x0 = 0.3 * levels.sigma[1:], 0.1
            said = [
                prediction.target(x, process.eps_from_x0(x_t, x, noisy), noisy)
                for x in (x0, x0 + 1)
            ]
            np.testing.assert_allclose(weight * (said[1] - said[0]) ** 2, of_x0, rtol=1e-6)


@given(schedules(exploding=True, flow=True), st.floats(0.1, 5))
def test_edm_weight_of_its_own_output(levels, sigma_data):
    """It is 1: EDM's loss is the mean squared error of F."""
    weight = loss.edm(levels, process.edm(sigma_data), sigma_data)
    np.testing.assert_allclose(weight[1:], 1, rtol=1e-12)


def test_min_snr_per_prediction():
    snr = np.exp(schedule.logsnr(LEVELS)[1:])
    for name, expected in {
        "eps": np.minimum(snr, 5) / snr,
        "v": np.minimum(snr, 5) / (snr + 1),
    }.items():
        np.testing.assert_allclose(
            loss.min_snr(LEVELS, process.PREDICTIONS[name])[1:], expected, rtol=1e-10
        )


def test_sigmoid_weighting():
    """The sum over t/T of weight(t)*f(logsnr) is the integral over logsnr of sigmoid(bias -
    logsnr)*f: two schedules over the same range agree, where the error of eps is f."""
    at, weights = np.polynomial.legendre.leggauss(100)
    value = 8 * at
    integral = 8 * weights @ (1 / (1 + np.exp(value - 1.0)) * np.cos(value / 4))
    for function in (lambda u: 8 - 16 * u, lambda u: 8 - 16 * u**2):
        levels = schedule.from_logsnr(function, 4000)
        weight = loss.sigmoid(levels, process.PREDICTIONS["eps"], bias=1.0)[1:]
        assert np.mean(weight * np.cos(schedule.logsnr(levels)[1:] / 4)) == pytest.approx(
            integral, rel=2e-3
        )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda s: loss.min_snr(s, process.PREDICTIONS["eps"], gamma=0.0), "gamma 0"),
        (lambda s: loss.edm(s, process.PREDICTIONS["eps"], sigma_data=-1.0), "sigma_data -1"),
        (
            lambda s: loss.min_snr(schedule.zero_terminal_snr(s), process.PREDICTIONS["eps"]),
            "1000 alpha eps",
        ),
        (
            lambda s: loss.sigmoid(schedule.zero_terminal_snr(s), process.PREDICTIONS["v"]),
            "sigmoid logsnr T",
        ),
        (
            lambda s: loss.min_snr(schedule.zero_terminal_snr(s), process.PREDICTIONS["v"]),
            "weighting level 1000",
        ),
        (
            lambda s: loss.denoising_loss(None, EPS, s, lambda s, p: np.ones(1000)),
            "weighting 1001 (1000,)",
        ),
        (
            lambda s: loss.denoising_loss(None, EPS, s, lambda s, p: np.full(1001, np.nan)),
            "weighting nan",
        ),
        (lambda s: loss.denoising_loss(None, EPS, s, drop_rate=1.5), "drop_rate 1.5"),
        (lambda s: loss.denoising_loss(None, EPS, s, drop_rate=0.1), "null"),
        (
            lambda s: loss.denoising_loss(None, EPS, s)(
                None, {"x": np.zeros((1, 2), np.uint8), "index": [0]}, KEY
            ),
            "uint8",
        ),
        (lambda s: loss.denoising_loss(None, EPS, schedule.zero_terminal_snr(s)), "1000 alpha eps"),
    ],
)
def test_bad_input_is_named(make, words):
    with pytest.raises(ValueError, match=naming(*words.split())):
        make(LEVELS)


def test_weights_without_signal():
    """v and x0 train at every level."""
    levels = schedule.zero_terminal_snr(LEVELS)
    for name in ("v", "x0", "flow", "sit", "edm"):
        for weighting in (loss.simple, loss.truncated_snr, loss.edm):
            weight = weighting(levels, process.PREDICTIONS[name])[1:]
            assert np.isfinite(weight).all()
            assert (weight > 0).all()


# ----------------------------------------------------------------------------- the objective


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_drop_rate(rate):
    dropped = np.asarray(loss.drop_condition(keys(20_000), jnp.zeros(20_000, jnp.int32), 10, rate))
    assert set(dropped) <= {0, 10}
    assert np.mean(dropped == 10) == pytest.approx(rate, abs=0.01)


def test_vectors_are_dropped_whole():
    condition = jnp.ones((4000, 4))
    dropped = np.asarray(loss.drop_condition(keys(4000), condition, jnp.zeros(4), 0.3))
    assert set(dropped.sum(1)) == {0, 4}
    assert (dropped[:, 0] == 0).mean() == pytest.approx(0.3, abs=0.03)


def test_pytrees_are_dropped_whole():
    """One draw per example for all leaves, the same as for each leaf alone."""
    label = jnp.arange(4000) % 7
    condition = {"label": label, "vector": jnp.ones((4000, 3)), "scale": jnp.full((4000, 1), 2.0)}
    null = {"label": 7, "vector": np.zeros(3, np.float32), "scale": -1.0}
    found = loss.drop_condition(keys(4000), condition, null, 0.3)
    dropped = np.asarray(found["label"] == 7)
    assert dropped.mean() == pytest.approx(0.3, abs=0.03)
    np.testing.assert_array_equal(found["vector"], np.where(dropped[:, None], 0, np.ones(3)))
    np.testing.assert_array_equal(found["scale"][:, 0], np.where(dropped, -1, 2))
    for name, leaf in condition.items():
        alone = loss.drop_condition(keys(4000), leaf, null[name], 0.3)
        np.testing.assert_array_equal(found[name], alone)
        assert alone.dtype == leaf.dtype


def test_quartiles():
    """0 for the least noisy quarter of 1..T, and so on."""
    objective = loss.denoising_loss(lambda p, x, t, c, keys: x + t[:, None], X0, LEVELS)
    found = objective(None, {"x": jnp.zeros((400, 2)), "index": indices(400)}, KEY)
    t = loss.sample_t(loss.uniform, KEY, indices(400), NOISY)
    np.testing.assert_array_equal(found.quartile, (t - 1) // 250)
    assert set(np.asarray(found.quartile)) == {0, 1, 2, 3}


@pytest.mark.parametrize("weighting", loss.WEIGHTINGS.values(), ids=loss.WEIGHTINGS)
@pytest.mark.parametrize("name", ["eps", "x0", "v"])
def test_denoising_loss(name, weighting):
    """A network that knows x0 has no loss; one that is off by 0.5 everywhere has 0.25 times the
    weight of its level."""
    prediction, x0, seen = process.PREDICTIONS[name], jax.random.normal(KEY, (8, 4, 4, 1)), []
    table = jax.tree.map(jnp.asarray, schedule.at(LEVELS, LEVELS.t))

    def network(offset, x_t, t, condition, keys):
        seen.append(t + 1)
        level = jax.tree.map(lambda leaf: leaf[t + 1], table)
        return prediction.target(x0, process.eps_from_x0(x_t, x0, level), level) + offset

    parameters = parameterization.ddpm(prediction)
    objective = loss.denoising_loss(network, parameters, LEVELS, weighting)
    for offset in (0.0, 0.5):
        found = objective(offset, {"x": x0, "index": indices(8)}, KEY).value
        weight = weighting(LEVELS, prediction)[np.asarray(seen[-1])]
        np.testing.assert_allclose(found / weight, offset**2, atol=3e-3)


def echo(params, x, t, condition, keys):
    return x


def at_level_500(key, index, levels):
    return jnp.full(index.shape, 500)


def test_noise_per_example():
    """Examples share none, and do not depend on their batch."""
    x0 = jnp.zeros((8, 4, 4, 1))
    objective = loss.denoising_loss(echo, X0, LEVELS, times=at_level_500)
    whole = objective(None, {"x": x0, "index": indices(8)}, KEY).value
    assert len(np.unique(whole)) == 8
    part = objective(None, {"x": x0[:3], "index": indices(3, start=5)}, KEY).value
    np.testing.assert_allclose(part, whole[5:], rtol=1e-6)


def test_noise_per_step():
    objective = loss.denoising_loss(echo, X0, LEVELS, times=at_level_500)
    batch = {"x": jnp.zeros((4, 3)), "index": indices(4)}
    drawn = [objective(None, batch, jax.random.key(seed)).value for seed in range(3)]
    assert len(np.unique(np.concatenate(drawn))) == 12


def test_independent_draws():
    """What the network is given: labels at the rate, and keys for dropout that are not those of
    the noise."""
    seen = {}

    def network(params, x, t, condition, keys):
        seen.update(x=x, condition=condition, keys=keys)
        return x

    objective = loss.denoising_loss(
        network, X0, LEVELS, times=at_level_500, null=10, drop_rate=0.3
    )  # fmt: skip
    n = 4000
    objective(
        None, {"x": jnp.zeros((n, 2)), "index": indices(n), "condition": jnp.arange(n) % 10}, KEY
    )
    dropped = np.asarray(seen["condition"] == 10)
    assert dropped.mean() == pytest.approx(0.3, abs=0.03)
    assert (seen["condition"] == np.where(dropped, 10, np.arange(n) % 10)).all()
    noise = np.asarray(seen["x"][:, 0]) / LEVELS.sigma[500]
    assert noise.std() == pytest.approx(1, abs=0.05)
    assert abs(np.corrcoef(noise, dropped)[0, 1]) < 0.06  # 4 standard deviations
    again = jax.vmap(lambda key: jax.random.normal(key, (2,)))(seen["keys"])[:, 0]
    assert abs(np.corrcoef(noise, again)[0, 1]) < 0.06


def test_squared_error_in_float32():
    """bfloat16 has three digits: 1 + 1/256 is 1 there, and a mean of many squares stops growing."""
    output = jnp.full((1, 4096), 1.0, jnp.bfloat16)
    found = loss.squared_error(output, jnp.full((1, 4096), 1 + 1 / 512, jnp.float32))
    assert found.dtype == jnp.float32
    assert float(found[0]) == pytest.approx(1 / 512**2, rel=1e-3)
