"""Likelihoods against what is known in closed form: Gaussian data and its exact denoiser."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import naming
from scipy.stats import norm

from diffjax import likelihood, sampler, schedule
from diffjax.testing import assert_log_density, gaussian_denoiser, gaussian_flow

LEVELS = schedule.linear(1000)
MEAN, STD = 0.3, 0.5


def exact(mean=MEAN, std=STD):
    denoise = gaussian_denoiser(mean, std)
    return lambda x_t, level, condition: denoise(x_t, level)


def draw(num, size=4, mean=MEAN, std=STD):
    keys = sampler.image_keys(jax.random.key(0), np.arange(num))
    return mean + std * jax.random.normal(jax.random.key(1), (num, size)), keys


def gaussian_nats(x, mean=MEAN, std=STD):
    return norm.logpdf(np.asarray(x), mean, std).sum(1)


@pytest.mark.parametrize(
    "levels", [LEVELS, schedule.cosine(200), schedule.zero_terminal_snr(LEVELS)]
)
def test_flow_on_gaussian_data(levels):
    """Each image to 1%, in float32."""
    x, keys = draw(40)

    @jax.jit
    def log_density(x):
        return likelihood.log_density(exact(), levels, x, None, keys, None).nats

    assert_log_density(log_density, MEAN, STD, np.asarray(x))


@pytest.mark.usefixtures("x64")
def test_flow_has_its_own_density():
    """Noise of level T is N(0, 1) to the model; the flow of Gaussian data is linear, so what it
    makes of that at level 1 is Gaussian too.
    """
    x, keys = draw(8)
    first, last = schedule.at(LEVELS, 1), schedule.at(LEVELS, 1000)
    ends = [
        gaussian_flow(np.array([z]), last, MEAN, STD, first)[0] / first.alpha for z in (0.0, 1.0)
    ]
    found = likelihood.log_density(exact(), LEVELS, x, None, keys, None, tolerance=1e-9).nats
    np.testing.assert_allclose(found, gaussian_nats(x, ends[0], ends[1] - ends[0]), rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_probes_have_no_bias():
    """A denoiser whose Jacobian is not diagonal: three probes err, and the mean over many is the
    exact density."""
    mix = jnp.array([[0.3, 0.2], [-0.4, 0.1]])

    def denoise(x_t, level, condition):
        return jnp.tanh(x_t @ mix) + condition[:, None]

    x, keys = draw(200, 2)
    x, condition = jnp.broadcast_to(x[:1], x.shape), jnp.full(200, 0.1)
    of = partial(likelihood.log_density, denoise, schedule.cosine(50), tolerance=1e-5)
    whole = of(x[:1], condition[:1], keys[:1], probes=None).nats
    found = of(x, condition, keys, probes=3).nats
    assert 1e-3 < found.std() < 1
    assert abs(found.mean() - whole[0]) < 4 * found.std() / 200**0.5


def test_images_alone():
    """Steps are each image's own."""
    x, keys = draw(6)
    x = x.at[0].multiply(30)  # needs other steps
    of = jax.jit(partial(likelihood.log_density, exact(), LEVELS, probes=1))
    whole, alone = of(x, None, keys), of(x[2:3], None, keys[2:3])
    np.testing.assert_allclose(whole.nats[2], alone.nats[0], rtol=1e-5)
    assert whole.steps[2] == alone.steps[0] != whole.steps[0]


def test_condition_as_a_pytree():
    """Of the flow and of the bound: as with the one array that holds them."""
    mean, std = jnp.linspace(-0.5, 0.5, 6), jnp.linspace(0.4, 0.6, 6)[:, None]

    def denoise(x_t, level, condition):
        return gaussian_denoiser(condition[0][:, None], condition[1]["std"])(x_t, level)

    def of_array(x_t, level, condition):
        return denoise(x_t, level, (condition[:, 0], {"std": condition[:, 1:]}))

    x, keys = draw(6)
    pytree, array = (mean, {"std": std}), jnp.concatenate([mean[:, None], std], axis=1)
    flow = partial(likelihood.log_density, schedule=LEVELS, x0=x, keys=keys, probes=None)
    found, expected = flow(denoise, condition=pytree), flow(of_array, condition=array)
    np.testing.assert_allclose(found.nats, expected.nats, rtol=1e-6)
    exact_nats = np.stack([gaussian_nats(x[i : i + 1], mean[i], std[i])[0] for i in range(6)])
    np.testing.assert_allclose(found.nats, exact_nats, atol=0.04)
    t = schedule.trailing(LEVELS, 20)
    bound = partial(likelihood.variational_bound, schedule=LEVELS, t=t, x0=x, keys=keys)
    found, expected = bound(denoise, condition=pytree), bound(of_array, condition=array)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_count_of_evaluations():
    """Six a step, and one before."""
    seen = []

    def counting(x_t, level, condition):
        jax.debug.callback(lambda t: seen.append(float(t)), level.t)
        return exact()(x_t, level, condition)

    x, keys = draw(1)
    found = likelihood.log_density(counting, LEVELS, x, None, keys, None)
    jax.effects_barrier()
    assert len(seen) == 6 * int(found.steps[0]) + 1


# ----------------------------------------------------------------------------- the bound


def closed_form_bound(levels, t, mean, std, noise_std):
    """Expectation over Gaussian data of the bound, per dimension, derived apart from the code:
    each step compares N(posterior mean, fixed_small**2) with N(posterior mean at the estimate,
    noise_std**2).
    """
    level_t, level_s = sampler.level_pairs(levels, t)
    left = (
        std**2 * level_t.sigma**2 / (level_t.alpha**2 * std**2 + level_t.sigma**2)
    )  # Var[x0 | x_t]
    total = -0.5 * np.log(2 * np.pi * level_t.sigma[-1] ** 2) - left[-1] / (
        2 * level_t.sigma[-1] ** 2
    )
    for i in range(len(level_t.t) - 1):
        pair = [schedule.level_at(level, i) for level in (level_t, level_s)]
        q, p = sampler.fixed_small(*pair), noise_std(*pair)
        ratio = pair[0].alpha / pair[1].alpha
        weight = pair[1].alpha * (1 - ratio**2 * pair[1].sigma ** 2 / pair[0].sigma ** 2)
        total -= np.log(p / q) + (q**2 + weight**2 * left[i]) / (2 * p**2) - 0.5
    alpha, sigma = level_t.alpha[0], level_t.sigma[0]
    return total - 0.5 * (sigma**2 + alpha**2 * (mean**2 + std**2) - 1 - np.log(sigma**2))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "noise_std", [sampler.fixed_small, sampler.fixed_large, sampler.interpolated_variance(0.4)]
)
@pytest.mark.parametrize("evaluations", [None, 3])
def test_bound_in_closed_form(noise_std, evaluations):
    """On Gaussian data."""
    levels = schedule.cosine(50)
    t, (x, keys) = (
        np.array([25, 22, 19, 15, 12, 9, 6, 2]),
        draw(20_000, 1),
    )  # whose end is not quite noise
    found = likelihood.variational_bound(
        exact(), levels, t, x, None, keys, noise_std, evaluations=evaluations, bin_width=None
    )
    expected, error = (
        closed_form_bound(levels, t, MEAN, STD, noise_std),
        found.std() / len(x) ** 0.5,
    )
    assert abs(found.mean() - expected) < 4 * error
    assert expected < -0.5 * np.log(
        2 * np.pi * np.e * STD**2
    )  # a bound, below the mean log density


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("steps", [1, 2, 20, 1000])
def test_bound_on_normal_data(steps):
    """There the reverse of every step is the Gaussian that it assumes: the bound is the density,
    to 1%."""
    t = schedule.trailing(LEVELS, steps)
    entropy = 0.5 * np.log(2 * np.pi * np.e)
    np.testing.assert_allclose(
        closed_form_bound(LEVELS, t, 0, 1, sampler.fixed_large), -entropy, rtol=1e-6
    )
    x, keys = draw(2000 if steps > 20 else 20_000, 1, 0, 1)
    found = likelihood.variational_bound(
        exact(0, 1),
        LEVELS,
        t,
        x,
        None,
        keys,
        sampler.fixed_large,
        min(19, steps - 1) or None,
        bin_width=None,
    )
    assert abs(found.mean() + entropy) < max(0.01 * entropy, 4 * found.std() / len(x) ** 0.5)


def test_bound_approaches_the_density():
    """Other data: what is lost falls as 1/steps where these are even in logsnr, and is below 1%
    from 200 on."""
    ideal, lost = -0.5 * np.log(2 * np.pi * np.e * STD**2), []
    for T in (100, 200, 400):
        levels = schedule.from_logsnr(lambda u: 9 - 16 * u, T)
        lost.append(
            ideal - closed_form_bound(levels, np.arange(T, 0, -1), MEAN, STD, sampler.fixed_large)
        )
    np.testing.assert_allclose(np.divide(lost[:-1], lost[1:]), 2, atol=0.2)
    assert lost[1] < 0.01 * abs(ideal)
    # DDPM's own chain and variance, on data that are not its ideal ones.
    whole = closed_form_bound(LEVELS, np.arange(1000, 0, -1), MEAN, STD, sampler.fixed_large)
    assert 0 < ideal - whole < 0.01 * abs(ideal)


@pytest.mark.parametrize(("mean", "std"), [(0.1, 0.002), (-1.0, 0.1), (0.999, 0.3), (0.5, 1e-4)])
def test_bins(mean, std):
    """The 256 bins of a Gaussian, at the edges too, sum to one; each is what scipy's float64
    says."""
    x = np.arange(256) / 127.5 - 1
    found = np.asarray(
        likelihood._log_gaussian(jnp.asarray(x, jnp.float32), mean, std, likelihood.BIN), np.float64
    )
    np.testing.assert_allclose(np.exp(found).sum(), 1, rtol=2e-3)  # float32's x/std
    high, low = (x + likelihood.BIN / 2 - mean) / std, (x - likelihood.BIN / 2 - mean) / std
    high[-1], low[0] = np.inf, -np.inf
    flip = low + high > 0
    low, high = np.where(flip, -high, low), np.where(flip, -low, high)
    expected = norm.logcdf(high) + np.log1p(-np.exp(norm.logcdf(low) - norm.logcdf(high)))
    near = expected > -50
    np.testing.assert_allclose(found[near], expected[near], rtol=2e-2, atol=2e-2)


def test_bits_per_dim():
    """Images drawn evenly from 256 values take 8 bits each, however they are said."""
    log_probability = np.full(3, 5 * np.log(1 / 256))
    np.testing.assert_allclose(
        likelihood.bits_per_dim(log_probability, (5, 1, 1), density=False), 8
    )
    density = 5 * np.log(1 / (256 * likelihood.BIN))  # even over the bins
    np.testing.assert_allclose(
        likelihood.bits_per_dim(np.full(3, density), (5, 1, 1), density=True), 8
    )
    images, keys = jnp.zeros((4000, 2)), sampler.image_keys(jax.random.key(0), np.arange(4000))
    noise = np.asarray(likelihood.dequantise(images, keys))
    assert np.abs(noise).max() <= likelihood.BIN / 2
    np.testing.assert_allclose(noise.std(), likelihood.BIN / 12**0.5, rtol=0.02)


@pytest.mark.parametrize("evaluations", [0, 8])
def test_bad_evaluations_are_named(evaluations):
    x, keys = draw(2)
    with pytest.raises(ValueError, match=naming("evaluations", evaluations, "7")):
        likelihood.variational_bound(
            exact(), LEVELS, schedule.trailing(LEVELS, 8), x, None, keys, evaluations=evaluations
        )
    with pytest.raises(ValueError, match=naming("schedule", "alpha**2 + sigma**2", "6401", "9")):
        likelihood.variational_bound(exact(), schedule.edm(9), np.array([9, 1]), x, None, keys)
