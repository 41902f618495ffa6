"""Networks as denoisers, and transforms of denoisers, against their formulas and laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import naming
from hypothesis import given, settings
from hypothesis import strategies as st

from diffjax import denoiser, parameterization, process, schedule
from diffjax.testing import assert_bounded, assert_denoiser, assert_inpainting

LEVELS = schedule.linear(1000)


def network(params, x, t, condition):
    """Nonlinear, and different for every example: it depends on x, t and the label."""
    shift = condition[:, None, None] * 0.1 + t[:, None, None] / 1000
    return params * jnp.tanh(x + shift)


def inputs(seed=0, batch=6):
    x = jax.random.normal(jax.random.key(seed), (batch, 3, 2))
    return x, jnp.arange(batch) % 10, schedule.at(LEVELS, 400)


def conditional(prediction="eps"):
    parameters = parameterization.ddpm(process.PREDICTIONS[prediction])
    return denoiser.from_network(network, 0.7, parameters)


@pytest.mark.parametrize("prediction", process.PREDICTIONS)
def test_from_network(prediction):
    """x0 is read from the network's output at the level."""
    x, labels, level = inputs()
    output = network(0.7, x, jnp.full(6, 399), labels)
    expected = process.PREDICTIONS[prediction].to_x0(x, output, level)
    np.testing.assert_array_equal(conditional(prediction)(x, level, labels), expected)


def test_condition_may_be_any_pytree():
    def sees_all(params, x, t, condition):
        label, vector = condition["label"], condition["vector"]
        return x * label[:, None, None] + vector.sum(1)[:, None, None]

    x, labels, level = inputs()
    parameters = parameterization.ddpm(process.PREDICTIONS["x0"])
    condition = {"label": labels, "vector": jnp.ones((6, 3))}
    denoise = denoiser.condition_on(denoiser.from_network(sees_all, None, parameters), condition)
    np.testing.assert_allclose(denoise(x, level), x * labels[:, None, None] + 3, rtol=1e-6)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda x, level: x - x.mean(0), "batch"),
        (lambda x, level: x[:, :1], "shape (4, 1) (4, 3)"),
        (lambda x, level: x / 0, "finite level"),
        (lambda x, level: x + np.ndim(level.t), "level"),
    ],
)
def test_broken_denoiser_is_caught(broken, words):
    x = np.arange(12.0).reshape(4, 3)
    assert_denoiser(lambda x, level: x, x, LEVELS)
    with np.errstate(all="ignore"), pytest.raises(AssertionError, match=naming(*words.split())):
        assert_denoiser(broken, x, LEVELS)


def test_learned_variance_is_named():
    parameters = parameterization.ddpm(process.PREDICTIONS["eps"])
    denoise = denoiser.from_network(
        lambda p, x, t, c: jnp.concatenate([x, x], -1), None, parameters
    )
    x, level = jnp.zeros((2, 4, 4, 3)), schedule.at(LEVELS, 5)
    names = naming("(2, 4, 4, 6)", "(2, 4, 4, 3)", "drop_learned_variance")
    with pytest.raises(ValueError, match=names):
        jax.eval_shape(denoiser.condition_on(denoise, None), x, level)


@given(st.floats(-1, 0.9), st.floats(0.05, 1))
def test_clip_bounds_x0_and_eps_follows(low, width):
    x, labels, level = inputs()
    x0 = denoiser.clip(denoiser.condition_on(conditional(), labels), low, low + width)(x, level)
    assert ((x0 >= np.float32(low)) & (x0 <= np.float32(low + width))).all()
    eps = process.eps_from_x0(x, x0, level)
    np.testing.assert_allclose(process.q_sample(x0, eps, level), x, atol=1e-5)


# ----------------------------------------------------------------------------- thresholding


@given(st.floats(0.01, 1), st.floats(0.1, 5), st.integers(0, 99))
def test_threshold_is_each_images_own_quantile(quantile, size, seed):
    estimate = size * jax.random.normal(jax.random.key(seed), (3, 4, 4, 1))
    thresholded = denoiser.dynamic_threshold(lambda x, level: estimate, quantile)
    found = thresholded(estimate, schedule.at(LEVELS, 5))
    assert np.abs(found).max() <= 1 + 1e-6
    for image, result in zip(np.float64(estimate), found, strict=True):
        s = max(1, np.quantile(np.abs(image), quantile))
        np.testing.assert_allclose(result, np.clip(image, -s, s) / s, atol=1e-5)


def test_threshold_keeps_images_in_range():
    x = jax.random.uniform(jax.random.key(0), (2, 3, 3, 1), minval=-1, maxval=1)
    thresholded = denoiser.dynamic_threshold(lambda x, level: x, 0.995)
    np.testing.assert_array_equal(thresholded(x, schedule.at(LEVELS, 5)), x)


@pytest.mark.parametrize("quantile", [0.0, 1.1])
def test_bad_quantile_is_named(quantile):
    with pytest.raises(ValueError, match=naming("quantile", quantile)):
        denoiser.dynamic_threshold(lambda x, level: x, quantile)


@settings(max_examples=15)
@given(st.floats(0.01, 1), st.floats(0.1, 30))
def test_clip_and_threshold_are_bounded(quantile, size):
    x, labels, _ = inputs()

    def wild(x_t, level):
        return size * denoiser.condition_on(conditional(), labels)(x_t, level)

    assert_bounded(denoiser.dynamic_threshold(wild, quantile), x, LEVELS)
    assert_bounded(denoiser.clip(wild, -0.5, 0.25), x, LEVELS, -0.5, 0.25)
    with pytest.raises(AssertionError, match=naming("x0", "1.125")):
        assert_bounded(lambda x_t, level: 1.125 + 0 * x_t, x, LEVELS)


# ----------------------------------------------------------------------------- inpainting


@settings(max_examples=20)
@given(st.integers(0, 99), st.sampled_from([(6, 3, 2), (3, 2), (1, 3, 1), (2,)]))
def test_inpainting_keeps_the_known_part_exactly(seed, shape):
    x, labels, _ = inputs(seed)
    known = jax.random.uniform(jax.random.key(seed + 1), x.shape, minval=-1, maxval=1)
    mask = jax.random.bernoulli(jax.random.key(seed + 2), 0.5, shape).astype(jnp.float32)
    plain = denoiser.clip(denoiser.condition_on(conditional(), labels))
    assert_inpainting(denoiser.inpaint(plain, known, mask), plain, known, mask, x, LEVELS)


def test_broken_inpainting_is_caught():
    x, labels, _ = inputs()
    plain = denoiser.condition_on(conditional("x0"), labels)
    mask = jnp.zeros((3, 2)).at[0].set(1)
    assert_inpainting(denoiser.inpaint(plain, x, mask), plain, x, mask, x, LEVELS)
    with pytest.raises(AssertionError, match=naming("known", "level")):
        assert_inpainting(denoiser.inpaint(plain, x + 1e-6, mask), plain, x, mask, x, LEVELS)
    with pytest.raises(AssertionError, match=naming("mask", "level")):
        assert_inpainting(denoiser.inpaint(plain, x, 0 * mask + 1), plain, x, mask, x, LEVELS)


def test_soft_mask_blends():
    x, labels, level = inputs()
    plain = denoiser.condition_on(conditional("x0"), labels)
    found = denoiser.inpaint(plain, x, jnp.float32(0.25))(x, level)
    np.testing.assert_allclose(found, 0.25 * x + 0.75 * plain(x, level), rtol=1e-5, atol=1e-6)


def test_bad_mask_is_named():
    with pytest.raises(ValueError, match=naming("mask", "(7, 3, 2)", "(6, 3, 2)")):
        denoiser.inpaint(lambda x, level: x, jnp.zeros((6, 3, 2)), jnp.zeros((7, 3, 2)))
    with pytest.raises(ValueError, match=naming("mask", "(6, 3, 2)", "(1, 3, 2)")):
        denoiser.inpaint(lambda x, level: x, jnp.zeros((1, 3, 2)), jnp.zeros((6, 3, 2)))
