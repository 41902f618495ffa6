"""Laws of moving averages: their decays, their profiles, and how profiles combine."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import naming
from hypothesis import given
from hypothesis import strategies as st

from diffjax.averaging import (
    LONGEST,
    Profiles,
    combine,
    ema_decay,
    gamma_of_length,
    inner_product,
    power_decay,
)

LENGTHS = st.floats(0.02, 0.28)
UPDATES = st.integers(1, 100_000)


def test_decay_warms_up():
    decays = ema_decay(jnp.arange(20_000), 0.999)
    assert decays[0] == pytest.approx(0.1)
    assert (np.diff(decays) >= 0).all()
    assert decays[-1] == pytest.approx(0.999)


def track(history, length):
    """The average of a history [N, ...] as training tracks it, in float64: [N, ...]."""
    average, found = np.zeros_like(history[0]), []
    for step, value in enumerate(history):
        beta = (1 - 1 / (step + 1)) ** (gamma_of_length(length) + 1)
        average = beta * average + (1 - beta) * value
        found.append(average)
    return np.stack(found)


@given(LENGTHS)
def test_decays_are_those_of_the_profile(length):
    """Update k of n has weight (k**(gamma + 1) - (k - 1)**(gamma + 1))/n**(gamma + 1)."""
    n, power = 60, gamma_of_length(length) + 1
    k = np.arange(1, n + 1)
    weights = track(np.eye(n), length)[-1]
    np.testing.assert_allclose(weights, (k**power - (k - 1.0) ** power) / n**power, atol=1e-12)
    decays = power_decay(jnp.arange(n), length)
    np.testing.assert_allclose(decays, (1 - 1 / k) ** power, rtol=2e-5, atol=1e-6)
    assert decays[0] == 0


@given(LENGTHS)
def test_length_is_the_standard_deviation_of_the_profile(length):
    t = (np.arange(200_000) + 0.5) / 200_000
    density = t ** gamma_of_length(length)
    mean = np.average(t, weights=density)
    deviation = np.sqrt(np.average((t - mean) ** 2, weights=density))
    assert deviation == pytest.approx(length, rel=1e-4)


def test_the_longest_is_uniform():
    assert gamma_of_length(LONGEST) == pytest.approx(0, abs=1e-9)
    for length in (0.0, -0.1, 0.3, float("nan")):
        with pytest.raises(ValueError, match=naming("length", length)):
            gamma_of_length(length)


@given(UPDATES, UPDATES, LENGTHS, LENGTHS)
def test_inner_products_are_integrals(n, m, first, second):
    a, b = Profiles.of(n, first), Profiles.of(m, second)
    t = (np.arange(100_000) + 0.5) / 100_000 * min(n, m)
    product = np.ones_like(t)
    for profile in (a, b):
        product *= (
            (profile.gamma + 1) / profile.updates * (t / profile.updates) ** float(profile.gamma)
        )
    integral = product.mean() * min(n, m)
    assert inner_product(a, b) == pytest.approx(integral, rel=1e-3, abs=1e-12)
    assert inner_product(a, b) == pytest.approx(inner_product(b, a))


@given(st.integers(0, 9), st.sampled_from([0.05, 0.1]))
def test_a_stored_average_is_found_again(i, length):
    stored = Profiles.of(np.repeat(np.arange(100, 1001, 100), 2), np.tile([0.05, 0.1], 10))
    upto = Profiles(*(leaf[: 2 * i + 2] for leaf in stored))
    weights, error = combine(upto, Profiles.of(100 * (i + 1), length))
    expected = np.zeros(2 * i + 2)
    expected[-2 if length == 0.05 else -1] = 1
    np.testing.assert_allclose(weights, expected, atol=1e-6)
    assert error < 1e-5


@pytest.mark.parametrize("length", [0.04, 0.07, 0.15])
def test_averages_of_other_lengths_are_reconstructed(length):
    """Of a smooth history and a random walk, to 1e-5 of their size."""
    n, every = 10_000, 100
    k = np.arange(1, n + 1)[:, None]
    walk = np.cumsum(np.random.default_rng(0).normal(size=(n, 3)), axis=0) / 100
    history = np.concatenate([np.sin(k / 3000), np.log1p(k / 100), walk], axis=1)
    saved = np.arange(every, n + 1, every)
    tracked = np.stack([track(history, each)[saved - 1] for each in (0.05, 0.1)], axis=1)
    stored = Profiles.of(np.repeat(saved, 2), np.tile([0.05, 0.1], len(saved)))
    weights, error = combine(stored, Profiles.of(n, length))
    expected = track(history, length)[-1]
    found = weights @ tracked.reshape(2 * len(saved), -1)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(history).max()
    assert error < 1e-2


def test_error_is_the_distance_of_profiles():
    """It falls as more averages are stored."""
    errors = []
    for every in (500, 250, 125):
        saved = np.arange(every, 1001, every)
        stored = Profiles.of(np.repeat(saved, 2), np.tile([0.05, 0.1], len(saved)))
        weights, error = combine(stored, Profiles.of(1000, 0.15))
        t = (np.arange(200_000) + 0.5) / 200

        def density(updates, gamma, t=t):
            inside = t <= updates
            return (gamma + 1) / updates * (np.where(inside, t, 0) / updates) ** gamma * inside

        target = density(1000, gamma_of_length(0.15))
        pairs = zip(weights, *stored, strict=True)
        nearest = sum(weight * density(updates, gamma) for weight, updates, gamma in pairs)
        distance = np.linalg.norm(nearest - target) / np.linalg.norm(target)
        assert error == pytest.approx(distance, rel=1e-2)
        errors.append(error)
    assert errors[0] > errors[1] > errors[2]


def test_no_average_of_later_steps():
    with pytest.raises(ValueError, match=naming("updates", 200, 100)):
        combine(Profiles.of([50, 100], [0.1, 0.1]), Profiles.of(200, 0.1))
