"""Guidance against the equations of its papers, and the laws of guided denoisers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import naming
from hypothesis import given, settings
from hypothesis import strategies as st

from diffjax import denoiser, guidance, parameterization, process, sampler, schedule
from diffjax.guidance import autoguidance, classifier_free_guidance, guided_estimate
from diffjax.schedule import Level
from diffjax.testing import assert_denoiser, assert_interval

NULL = 10
LEVELS = schedule.linear(1000)


def network(params, x, t, condition):
    """Nonlinear, and different for every example: it depends on x, t and the label."""
    shift = condition[:, None, None] * 0.1 + t[:, None, None] / 1000
    return params * jnp.tanh(x + shift)


def inputs(seed=0, batch=6):
    x = jax.random.normal(jax.random.key(seed), (batch, 3, 2))
    return x, jnp.arange(batch) % 10, schedule.at(LEVELS, 400)


def from_network(network, params=None, prediction="x0"):
    parameters = parameterization.ddpm(process.PREDICTIONS[prediction])
    return denoiser.from_network(network, params, parameters)


def conditional(prediction="eps"):
    return from_network(network, 0.7, prediction)


# ----------------------------------------------------------------------------- classifier-free


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_scale_1_is_conditional_and_0_unconditional(prediction):
    x, labels, level = inputs()
    denoise = conditional(prediction)
    for scale, condition in [(1.0, labels), (0.0, jnp.full_like(labels, NULL))]:
        guided = classifier_free_guidance(denoise, labels, NULL, scale)(x, level)
        np.testing.assert_allclose(guided, denoise(x, level, condition), atol=1e-4)


@settings(max_examples=20)
@given(st.floats(0, 10), st.integers(0, 99))
def test_affine_in_the_scale(scale, seed):
    x, labels, level = inputs(seed)
    denoise = conditional("v")
    guided = classifier_free_guidance(denoise, labels, NULL, scale)(x, level)
    x0 = np.float64(denoise(x, level, labels))
    x0_null = np.float64(denoise(x, level, jnp.full_like(labels, NULL)))
    bound = 1e-5 * (1 + scale)
    np.testing.assert_allclose(guided, x0_null + scale * (x0 - x0_null), atol=bound)


@pytest.mark.usefixtures("x64")
def test_equation_6_of_the_paper():
    """(1 + w) eps_c - w eps_null, w = scale - 1: equation 6 of arXiv:2207.12598."""
    x, labels, level = inputs()
    x, scale = x.astype(jnp.float64), 3.0
    t = jnp.full(len(x), level.t - 1)
    eps, eps_null = (network(0.7, x, t, c) for c in (labels, jnp.full_like(labels, NULL)))
    guided = classifier_free_guidance(conditional(), labels, NULL, scale)(x, level)
    expected = process.x0_from_eps(x, scale * eps - (scale - 1) * eps_null, level)
    np.testing.assert_allclose(guided, expected, atol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "score"])
@pytest.mark.parametrize("t", [1, 400, 1000])
def test_commutes_with_the_prediction(prediction, t):
    """Guiding x0 and reading a prediction from it is guiding the prediction.

    All predictions are affine in x0.
    """
    x, labels, _ = inputs()
    x, scale, level = x.astype(jnp.float64), 3.0, schedule.at(LEVELS, t)
    kind, steps = process.PREDICTIONS[prediction], jnp.full(len(x), t - 1)
    output, output_null = (network(0.7, x, steps, c) for c in (labels, jnp.full_like(labels, NULL)))
    x0 = classifier_free_guidance(conditional(prediction), labels, NULL, scale)(x, level)
    guided = output_null + scale * (output - output_null)
    again = kind.target(x0, process.eps_from_x0(x, x0, level), level)
    # Near the data, eps is what is left of x0, over sigma.
    np.testing.assert_allclose(again, guided, rtol=0, atol=1e-10 * np.abs(guided).max())


@settings(max_examples=15)
@given(st.floats(0, 8), st.integers(1, 2), st.integers(0, 99))
def test_guidance_of_some_channels(scale, channels, seed):
    """The first ones are guided, and the rest conditional; of all of them it is guidance.

    The code of DiT guides 3 of 4 channels of eps, of which x0 is an affine function each.
    """
    x, labels, level = inputs(seed)
    denoise = conditional()
    all_of_them = classifier_free_guidance(denoise, labels, NULL, scale)(x, level)
    auto = autoguidance(
        denoiser.condition_on(denoise, labels),
        denoiser.condition_on(denoise, jnp.full_like(labels, NULL)),
        scale,
        channels=channels,
    )
    some = classifier_free_guidance(denoise, labels, NULL, scale, channels=channels)(x, level)
    bound = 1e-4 * (1 + scale)
    np.testing.assert_allclose(auto(x, level), some, atol=bound)
    np.testing.assert_allclose(some[..., :channels], all_of_them[..., :channels], atol=bound)
    rest = denoise(x, level, labels)[..., channels:]
    np.testing.assert_allclose(some[..., channels:], rest, atol=bound)


def test_scale_per_image():
    x, labels, level = inputs(batch=2)  # [2, 3, 2]: the batch is as long as the last axis
    scales = jnp.array([0.5, 3.0])
    each = classifier_free_guidance(conditional(), labels, NULL, scales)(x, level)
    for i, scale in enumerate((0.5, 3.0)):
        one = classifier_free_guidance(conditional(), labels, NULL, scale)(x, level)
        np.testing.assert_allclose(each[i], one[i], rtol=1e-6)


@settings(max_examples=15)
@given(st.floats(0, 8), st.floats(0, 1), st.integers(0, 99))
def test_batched_is_two_evaluations(scale, rescale, seed):
    x, labels, level = inputs(seed)
    one, two = (
        classifier_free_guidance(conditional("v"), labels, NULL, scale, rescale, batched)(x, level)
        for batched in (True, False)
    )
    np.testing.assert_allclose(two, one, atol=1e-5 * (1 + scale))


def test_negative_condition():
    """The null may be another condition of each image, to be led away from."""
    x, labels, level = inputs()
    away = jnp.array([5, 5, 5, 1, 1, 1])
    guided = classifier_free_guidance(conditional(), labels, away, 3.0)(x, level)
    from_, to = (conditional()(x, level, condition) for condition in (away, labels))
    np.testing.assert_allclose(guided, from_ + 3.0 * (to - from_), rtol=1e-4, atol=1e-4)


def test_scale_as_function_of_the_level():
    x, labels, _ = inputs()
    denoise = conditional()
    rising = classifier_free_guidance(denoise, labels, NULL, lambda level: 1 + 3 * level.sigma)
    for t in (10, 400, 999):
        level = schedule.at(LEVELS, t)
        fixed = classifier_free_guidance(denoise, labels, NULL, 1 + 3 * level.sigma)
        np.testing.assert_allclose(rising(x, level), fixed(x, level), rtol=1e-5)
    each, one = schedule.at(LEVELS, np.full(6, 400)), schedule.at(LEVELS, 400)
    np.testing.assert_allclose(rising(x, each), rising(x, one), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("x64")
def test_order_of_pairs_and_images():
    """(null, condition) with scale 1 - scale is the same guidance; images may be permuted."""
    x, labels, level = inputs()
    x = x.astype(jnp.float64)
    guided = classifier_free_guidance(conditional(), labels, NULL, 3.0)(x, level)
    nulls = jnp.full_like(labels, NULL)
    turned = classifier_free_guidance(conditional(), nulls, labels, 1 - 3.0)(x, level)
    np.testing.assert_allclose(turned, guided, atol=1e-10)
    order = jnp.array([3, 1, 5, 0, 2, 4])
    permuted = classifier_free_guidance(conditional(), labels[order], NULL, 3.0)(x[order], level)
    np.testing.assert_allclose(permuted, guided[order])


def test_one_batch_of_interleaved_pairs():
    seen = []

    def spy(params, x, t, condition):
        seen.append((x.shape, list(condition), list(t)))
        return x

    level = Level(*(jnp.asarray(leaf) for leaf in schedule.at(LEVELS, [3, 5])))
    guided = classifier_free_guidance(from_network(spy), jnp.array([7, 8]), NULL, 2.0)
    guided(jnp.zeros((2, 4, 4, 1)), level)
    assert seen == [((4, 4, 4, 1), [7, NULL, 8, NULL], [2, 2, 4, 4])]


# ----------------------------------------------------------------------------- any condition


def sees_all(params, x, t, condition):
    """Depends on each leaf of a condition, and on every number of it."""
    label, vector = condition["label"], condition["vector"] @ jnp.array([1.0, -2.0, 3.0])
    return jnp.tanh(x * (1 + vector)[:, None, None] + 0.1 * label[:, None, None])


def conditions():
    vector = jax.random.normal(jax.random.key(7), (6, 3))
    return {"label": jnp.arange(6), "vector": vector}, {"label": NULL, "vector": jnp.zeros(3)}


@pytest.mark.parametrize("batched", [True, False])
def test_condition_as_a_pytree(batched):
    """Each leaf stands beside its own null, as if leaves were guided with one by one."""
    seen, (x, _, level), (condition, null) = [], inputs(), conditions()

    def spy(params, x, t, condition):
        seen.append(jax.tree.map(np.asarray, condition))
        return sees_all(params, x, t, condition)

    denoise = from_network(spy)
    found = classifier_free_guidance(denoise, condition, null, 3.0, batched=batched)(x, level)
    nulls = {"label": jnp.full(6, NULL), "vector": jnp.zeros((6, 3))}
    x0, x0_null = (from_network(sees_all)(x, level, c) for c in (condition, nulls))
    np.testing.assert_allclose(found, x0_null + 3.0 * (x0 - x0_null), atol=1e-5)
    for name in ("label", "vector"):
        leaf, none = condition[name], nulls[name]
        if batched:
            (given_,) = seen
            np.testing.assert_array_equal(given_[name][::2], leaf)
            np.testing.assert_array_equal(given_[name][1::2], none)
        else:
            np.testing.assert_array_equal(seen[0][name], leaf)
            np.testing.assert_array_equal(seen[1][name], none)


def test_one_leaf_alone_is_an_array():
    """A pytree whose other leaves are their nulls is guidance by the one array."""
    (x, _, level), (condition, _) = inputs(), conditions()
    vector = condition["vector"]

    def sees_label(params, x, t, label):
        return sees_all(params, x, t, {"label": label, "vector": vector})

    both = classifier_free_guidance(
        from_network(sees_all), condition, {"label": NULL, "vector": vector}, 2.5, batched=False
    )(x, level)
    one = classifier_free_guidance(
        from_network(sees_label), condition["label"], NULL, 2.5, batched=False
    )(x, level)
    np.testing.assert_allclose(both, one, atol=1e-6)


def test_null_of_another_structure_is_refused():
    condition, _ = conditions()
    with pytest.raises(ValueError, match=naming("vector")):
        classifier_free_guidance(from_network(sees_all), condition, {"label": NULL}, 2.0)


# ----------------------------------------------------------------------------- the estimate


def test_combined_in_float32():
    """A difference of 1/256 is one digit of bfloat16 near 1: a hundred times it is not."""
    from_, to = (jnp.full((1, 2), value, jnp.bfloat16) for value in (1.0, 1.0078125))
    found = guided_estimate(from_, to, schedule.at(LEVELS, 5), 3.3)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 1 + 3.3 * 0.0078125, rtol=1e-6)


@given(st.floats(0, 10), st.floats(0, 1), st.integers(0, 99))
def test_rescale_restores_the_standard_deviation(scale, rescale, seed):
    x0_from, x0_to = jax.random.normal(jax.random.key(seed), (2, 3, 4, 4, 1))
    level = schedule.at(LEVELS, 400)
    plain = guided_estimate(x0_from, x0_to, level, scale)
    found = guided_estimate(x0_from, x0_to, level, scale, rescale)
    std, std_to = (np.std(x, axis=(1, 2, 3)) for x in (plain, x0_to))
    factor = 1 - rescale + rescale * std_to / std
    np.testing.assert_allclose(found, plain * factor.reshape(3, 1, 1, 1), rtol=2e-4, atol=1e-6)
    wholly = guided_estimate(x0_from, x0_to, level, scale, 1.0)
    np.testing.assert_allclose(np.std(wholly, axis=(1, 2, 3)), std_to, rtol=1e-4)


def test_rescale_of_flat_images():
    flat, level = jnp.full((2, 3, 3, 1), 0.3), schedule.at(LEVELS, 5)
    np.testing.assert_array_equal(guided_estimate(flat, flat, level, 2.0, 0.7), flat)


def test_bad_rescale_is_named():
    x = jnp.ones((1, 2))
    with pytest.raises(ValueError, match=naming("rescale", -0.1)):
        guided_estimate(x, x, schedule.at(LEVELS, 5), 2.0, -0.1)


@given(st.floats(0, 5))
def test_autoguidance_leads_away_from_the_guide(scale):
    x, labels, level = inputs()
    denoise = denoiser.condition_on(conditional(), labels)
    guide = denoiser.condition_on(conditional("x0"), labels)
    guided = autoguidance(denoise, guide, scale)(x, level)
    expected = guide(x, level) + scale * (denoise(x, level) - guide(x, level))
    np.testing.assert_allclose(guided, expected, atol=1e-4 * (1 + scale))


# ----------------------------------------------------------------------------- laws


def test_guided_denoiser_obeys_the_laws_of_denoisers():
    x, _, _ = inputs(batch=4)
    labels = jnp.full(4, 3)  # the law swaps images

    def guided(x, level):
        denoise = classifier_free_guidance(conditional("v"), labels[: len(x)], NULL, 2.0)
        level = Level(*(jnp.asarray(leaf) for leaf in level))
        return denoiser.clip(denoise)(x, level)

    assert_denoiser(guided, x, LEVELS)


@settings(max_examples=10)
@given(st.floats(0, 3), st.floats(0.1, 30))
def test_interval_as_a_scale_is_1_outside(low, width):
    x, labels, _ = inputs()

    def scale(level):
        ratio = level.sigma / level.alpha
        return jnp.where((low <= ratio) & (ratio <= low + width), 3.0, 1.0)

    guided = classifier_free_guidance(conditional("v"), labels, NULL, scale)
    plain = denoiser.condition_on(conditional("v"), labels)
    assert_interval(guided, plain, x, schedule.cosine(20), low, low + width)


def test_guidance_outside_its_interval_is_caught():
    x, labels, _ = inputs()
    plain = denoiser.condition_on(conditional("v"), labels)
    guided = classifier_free_guidance(conditional("v"), labels, NULL, 3.0)
    with pytest.raises(AssertionError, match=naming("interval", "sigma/alpha")):
        assert_interval(guided, plain, x, LEVELS, 0.5, 2.0)
    with pytest.raises(AssertionError, match=naming("interval")):  # nothing is guided
        assert_interval(plain, plain, x, LEVELS, 0.5, 2.0)


@given(st.floats(0, 3), st.floats(0.01, 30))
def test_in_interval(low, width):
    plan = sampler.ddim(LEVELS, schedule.trailing(LEVELS, 37))
    found = guidance.in_interval(plan.level, low, low + width)
    assert found.dtype == bool
    ratio = plan.level.sigma / plan.level.alpha
    clear = (np.abs(ratio - low) > 1e-9) & (np.abs(ratio - low - width) > 1e-9)
    np.testing.assert_array_equal(found[clear], ((low < ratio) & (ratio < low + width))[clear])


@pytest.mark.parametrize(("low", "high"), [(3.0, 0.5), (1.0, 1.0), (0.5, float("nan"))])
def test_bad_interval_is_named(low, high):
    with pytest.raises(ValueError, match=naming("interval", low, high)):
        guidance.in_interval(LEVELS, low, high)
