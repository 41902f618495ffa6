import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import naming
from hypothesis import given, settings
from hypothesis import strategies as st

from diffjax import denoiser, process, schedule
from diffjax.schedule import Level
from diffjax.testing import assert_bounded, assert_denoiser, assert_inpainting, assert_interval

NULL = 10
LEVELS = schedule.linear(1000)


def network(params, x, t, condition):
    """Nonlinear, and different for every example: sees x, t and the label."""
    shift = condition[:, None, None] * 0.1 + t[:, None, None] / 1000
    return params * jnp.tanh(x + shift)


def inputs(seed=0, batch=6):
    x = jax.random.normal(jax.random.key(seed), (batch, 3, 2))
    return x, jnp.arange(batch) % 10, schedule.at(LEVELS, 400)


def conditional(prediction="eps"):
    return denoiser.from_network(network, 0.7, process.PREDICTIONS[prediction])


def test_networks_count_levels_from_zero():
    seen = []

    def spy(params, x, t, condition):
        seen.append(np.asarray(t))
        return x

    denoise = denoiser.condition_on(denoiser.from_network(spy, None, process.PREDICTIONS["x0"]), None)
    denoise(jnp.zeros((3, 2)), schedule.at(LEVELS, 1000))
    denoise(jnp.zeros((3, 2)), schedule.at(LEVELS, [1, 2, 1000]))
    assert [list(t) for t in seen] == [[999] * 3, [0, 1, 999]]


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_scale_one_is_conditional_and_zero_unconditional(prediction):
    x, labels, level = inputs()
    denoise = conditional(prediction)
    for scale, condition in [(1.0, labels), (0.0, jnp.full_like(labels, NULL))]:
        guided = denoiser.classifier_free_guidance(denoise, labels, NULL, scale)(x, level)
        np.testing.assert_allclose(guided, denoise(x, level, condition), atol=1e-4)


@settings(max_examples=20)
@given(st.floats(0, 10), st.integers(0, 99))
def test_guidance_is_two_passes_in_one_and_affine_in_the_scale(scale, seed):
    x, labels, level = inputs(seed)
    denoise = conditional("v")
    guided = denoiser.classifier_free_guidance(denoise, labels, NULL, scale)(x, level)
    with_label = np.float64(denoise(x, level, labels))
    without = np.float64(denoise(x, level, jnp.full_like(labels, NULL)))
    np.testing.assert_allclose(guided, without + scale * (with_label - without), atol=1e-5 * (1 + scale))


@pytest.mark.usefixtures("x64")
def test_guiding_x0_is_guiding_eps_as_the_paper_writes_it():
    """(1 + w) eps_c - w eps_null, w = scale - 1: equation 6 of arXiv:2207.12598."""
    x, labels, level = inputs()
    x, scale = x.astype(jnp.float64), 3.0
    t = jnp.full(len(x), level.t - 1)
    eps = scale * network(0.7, x, t, labels) - (scale - 1) * network(0.7, x, t, jnp.full_like(labels, NULL))
    guided = denoiser.classifier_free_guidance(conditional(), labels, NULL, scale)(x, level)
    np.testing.assert_allclose(guided, process.x0_from_eps(x, eps, level), atol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "score"])
@pytest.mark.parametrize("t", [1, 400, 1000])
def test_guidance_commutes_with_the_prediction(prediction, t):
    """Guiding x0 and then reading a prediction from it is guiding the prediction, for all are affine in x0."""
    x, labels, _ = inputs()
    x, scale, level, kind = x.astype(jnp.float64), 3.0, schedule.at(LEVELS, t), process.PREDICTIONS[prediction]
    steps = jnp.full(len(x), t - 1)
    said = [network(0.7, x, steps, condition) for condition in (labels, jnp.full_like(labels, NULL))]
    x0 = denoiser.classifier_free_guidance(conditional(prediction), labels, NULL, scale)(x, level)
    guided = said[1] + scale * (said[0] - said[1])
    again = kind.target(x0, process.eps_from_x0(x, x0, level), level)
    # Near the data, eps is what is left of x0, over sigma.
    np.testing.assert_allclose(again, guided, rtol=0, atol=1e-10 * np.abs(guided).max())


def test_each_image_may_have_its_own_scale():
    x, labels, level = inputs(batch=2)  # [2, 3, 2]: the batch is as long as the last axis
    each = denoiser.classifier_free_guidance(conditional(), labels, NULL, jnp.array([0.5, 3.0]))(x, level)
    for i, scale in enumerate((0.5, 3.0)):
        one = denoiser.classifier_free_guidance(conditional(), labels, NULL, scale)(x, level)
        np.testing.assert_allclose(each[i], one[i], rtol=1e-6)


@settings(max_examples=15)
@given(st.floats(0, 8), st.floats(0, 1), st.integers(0, 99))
def test_two_passes_are_one(scale, rescale, seed):
    x, labels, level = inputs(seed)
    one, two = (
        denoiser.classifier_free_guidance(conditional("v"), labels, NULL, scale, rescale, passes)(x, level)
        for passes in (False, True)
    )
    np.testing.assert_allclose(two, one, atol=1e-5 * (1 + scale))


def test_another_label_can_be_led_away_from():
    x, labels, level = inputs()
    away = jnp.array([5, 5, 5, 1, 1, 1])
    guided = denoiser.classifier_free_guidance(conditional(), labels, away, 3.0)(x, level)
    from_, to = (conditional()(x, level, condition) for condition in (away, labels))
    np.testing.assert_allclose(guided, from_ + 3.0 * (to - from_), rtol=1e-4, atol=1e-4)


def test_the_scale_may_be_a_function_of_the_level():
    x, labels, _ = inputs()
    rising = denoiser.classifier_free_guidance(conditional(), labels, NULL, lambda level: 1 + 3 * level.sigma)
    for t in (10, 400, 999):
        level = schedule.at(LEVELS, t)
        fixed = denoiser.classifier_free_guidance(conditional(), labels, NULL, 1 + 3 * level.sigma)
        np.testing.assert_allclose(rising(x, level), fixed(x, level), rtol=1e-5)
    each = schedule.at(LEVELS, np.full(6, 400))
    np.testing.assert_allclose(rising(x, each), rising(x, schedule.at(LEVELS, 400)), rtol=1e-4, atol=1e-4)


def test_guidance_is_combined_in_float32_whatever_the_network_computes_in():
    """A difference of 1/256 is one digit of bfloat16 near 1: a hundred times it is not."""
    from_, to = jnp.full((1, 2), 1.0, jnp.bfloat16), jnp.full((1, 2), 1.0078125, jnp.bfloat16)
    found = denoiser.guided_estimate(from_, to, schedule.at(LEVELS, 5), 3.3)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 1 + 3.3 * 0.0078125, rtol=1e-6)


@given(st.floats(0, 10), st.floats(0, 1), st.integers(0, 99))
def test_rescaling_brings_the_contrast_back(scale, rescale, seed):
    x0_from, x0_to = jax.random.normal(jax.random.key(seed), (2, 3, 4, 4, 1))
    level = schedule.at(LEVELS, 400)
    plain = denoiser.guided_estimate(x0_from, x0_to, level, scale)
    found = denoiser.guided_estimate(x0_from, x0_to, level, scale, rescale)
    std, std_to = (np.std(x, axis=(1, 2, 3)) for x in (plain, x0_to))
    factor = 1 - rescale + rescale * std_to / std
    np.testing.assert_allclose(found, plain * factor.reshape(3, 1, 1, 1), rtol=2e-4, atol=1e-6)
    wholly = denoiser.guided_estimate(x0_from, x0_to, level, scale, 1.0)
    np.testing.assert_allclose(np.std(wholly, axis=(1, 2, 3)), std_to, rtol=1e-4)


def test_rescaling_flat_images_divides_by_nothing():
    flat = jnp.full((2, 3, 3, 1), 0.3)
    np.testing.assert_array_equal(denoiser.guided_estimate(flat, flat, schedule.at(LEVELS, 5), 2.0, 0.7), flat)


@given(st.floats(0, 5))
def test_autoguidance_leads_away_from_the_worse_network(scale):
    x, labels, level = inputs()
    better, worse = denoiser.condition_on(conditional(), labels), denoiser.condition_on(conditional("x0"), labels)
    guided = denoiser.autoguidance(better, worse, scale)(x, level)
    expected = worse(x, level) + scale * (better(x, level) - worse(x, level))
    np.testing.assert_allclose(guided, expected, atol=1e-4 * (1 + scale))


@given(st.floats(0.01, 1), st.floats(0.1, 5), st.integers(0, 99))
def test_thresholding_bounds_each_image_by_its_own_quantile(quantile, size, seed):
    estimate = size * jax.random.normal(jax.random.key(seed), (3, 4, 4, 1))
    found = denoiser.dynamic_threshold(lambda x, level: estimate, quantile)(estimate, schedule.at(LEVELS, 5))
    assert np.abs(found).max() <= 1 + 1e-6
    for image, thresholded in zip(np.float64(estimate), found, strict=True):
        s = max(1, np.quantile(np.abs(image), quantile))
        np.testing.assert_allclose(thresholded, np.clip(image, -s, s) / s, atol=1e-5)


def test_thresholding_leaves_images_in_range_as_they_are():
    x = jax.random.uniform(jax.random.key(0), (2, 3, 3, 1), minval=-1, maxval=1)
    np.testing.assert_array_equal(denoiser.dynamic_threshold(lambda x, level: x, 0.995)(x, schedule.at(LEVELS, 5)), x)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda d: denoiser.dynamic_threshold(d, 0.0), "quantile 0"),
        (lambda d: denoiser.dynamic_threshold(d, 1.1), "quantile 1.1"),
        (lambda d: denoiser.autoguidance(d, d, 2.0, -0.1)(jnp.ones((1, 2)), schedule.at(LEVELS, 5)), "rescale -0.1"),
    ],
)
def test_bad_input_is_named(make, words):
    with pytest.raises(ValueError, match=naming(*words.split())):
        make(lambda x, level: x)


@pytest.mark.usefixtures("x64")
def test_the_order_of_pairs_does_not_matter():
    """(null, condition) pairs with the scale 1 - scale are the same guidance, and so are images in another order."""
    x, labels, level = inputs()
    x = x.astype(jnp.float64)
    guided = denoiser.classifier_free_guidance(conditional(), labels, NULL, 3.0)(x, level)
    nulls = jnp.full_like(labels, NULL)
    turned = denoiser.classifier_free_guidance(conditional(), nulls, labels, 1 - 3.0)(x, level)
    np.testing.assert_allclose(turned, guided, atol=1e-10)
    order = jnp.array([3, 1, 5, 0, 2, 4])
    np.testing.assert_allclose(
        denoiser.classifier_free_guidance(conditional(), labels[order], NULL, 3.0)(x[order], level), guided[order]
    )


def test_a_guided_denoiser_obeys_the_laws_of_denoisers():
    x, labels, _ = inputs(batch=4)
    labels = jnp.full(4, 3)  # the law swaps images

    def guided(x, level):
        denoise = denoiser.classifier_free_guidance(conditional("v"), labels[: len(x)], NULL, 2.0)
        level = Level(*(jnp.asarray(leaf) for leaf in level))
        return denoiser.clip(denoise)(x, level)

    assert_denoiser(guided, x, LEVELS)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda x, level: x - x.mean(0), ""),  # no law but that of the batch
        (lambda x, level: x[:, :1], "(4, 1) (4, 3)"),
        (lambda x, level: x / 0, "level"),
    ],
)
def test_a_denoiser_that_breaks_a_law_is_told(broken, words):
    x = np.arange(12.0).reshape(4, 3)
    assert_denoiser(lambda x, level: x, x, LEVELS)
    with np.errstate(all="ignore"), pytest.raises(AssertionError, match=naming(*words.split())):
        assert_denoiser(broken, x, LEVELS)


def test_a_network_with_learned_variance_is_named():
    denoise = denoiser.from_network(lambda p, x, t, c: jnp.concatenate([x, x], -1), None, process.PREDICTIONS["eps"])
    with pytest.raises(ValueError, match=naming("(2, 4, 4, 6)", "(2, 4, 4, 3)", "drop_learned_variance")):
        jax.eval_shape(denoiser.condition_on(denoise, None), jnp.zeros((2, 4, 4, 3)), schedule.at(LEVELS, 5))


def test_one_pass_of_interleaved_pairs():
    seen = []

    def spy(params, x, t, condition):
        seen.append((x.shape, list(condition), list(t)))
        return x

    denoise = denoiser.from_network(spy, None, process.PREDICTIONS["x0"])
    level = Level(*(jnp.asarray(leaf) for leaf in schedule.at(LEVELS, [3, 5])))
    denoiser.classifier_free_guidance(denoise, jnp.array([7, 8]), NULL, 2.0)(jnp.zeros((2, 4, 4, 1)), level)
    assert seen == [((4, 4, 4, 1), [7, NULL, 8, NULL], [2, 2, 4, 4])]


@given(st.floats(-1, 0.9), st.floats(0.05, 1))
def test_clip_bounds_x0_and_eps_follows(low, width):
    x, labels, level = inputs()
    x0 = denoiser.clip(denoiser.condition_on(conditional(), labels), low, low + width)(x, level)
    assert ((x0 >= np.float32(low)) & (x0 <= np.float32(low + width))).all()
    eps = process.eps_from_x0(x, x0, level)
    np.testing.assert_allclose(process.q_sample(x0, eps, level), x, atol=1e-5)


# ------------------------------------------------------------------------------------------- laws of transforms


@settings(max_examples=10)
@given(st.floats(0, 3), st.floats(0.1, 30))
def test_an_interval_as_a_scale_is_scale_one_outside(low, width):
    x, labels, _ = inputs()
    levels = schedule.cosine(20)

    def scale(level):
        ratio = level.sigma / level.alpha
        return jnp.where((low <= ratio) & (ratio <= low + width), 3.0, 1.0)

    guided = denoiser.classifier_free_guidance(conditional("v"), labels, NULL, scale)
    assert_interval(guided, denoiser.condition_on(conditional("v"), labels), x, levels, low, low + width)


def test_guidance_outside_its_interval_is_told():
    x, labels, _ = inputs()
    plain = denoiser.condition_on(conditional("v"), labels)
    with pytest.raises(AssertionError, match=naming("sigma/alpha")):
        assert_interval(
            denoiser.classifier_free_guidance(conditional("v"), labels, NULL, 3.0), plain, x, LEVELS, 0.5, 2.0
        )
    with pytest.raises(AssertionError):  # outside, the two are one
        assert_interval(plain, plain, x, LEVELS, 0.5, 2.0)


@settings(max_examples=15)
@given(st.floats(0.01, 1), st.floats(0.1, 30))
def test_clipping_and_thresholding_are_bounded(quantile, size):
    x, labels, _ = inputs()

    def wild(x_t, level):
        return size * denoiser.condition_on(conditional(), labels)(x_t, level)

    assert_bounded(denoiser.dynamic_threshold(wild, quantile), x, LEVELS)
    assert_bounded(denoiser.clip(wild, -0.5, 0.25), x, LEVELS, -0.5, 0.25)
    with pytest.raises(AssertionError, match=naming("1.125")):
        assert_bounded(lambda x_t, level: 1.125 + 0 * x_t, x, LEVELS)


@settings(max_examples=20)
@given(st.integers(0, 99), st.sampled_from([(6, 3, 2), (3, 2), (1, 3, 1), (2,)]))
def test_inpainting_keeps_what_is_known_exactly(seed, shape):
    x, labels, _ = inputs(seed)
    known = jax.random.uniform(jax.random.key(seed + 1), x.shape, minval=-1, maxval=1)
    mask = jax.random.bernoulli(jax.random.key(seed + 2), 0.5, shape).astype(jnp.float32)
    plain = denoiser.clip(denoiser.condition_on(conditional(), labels))
    assert_inpainting(denoiser.inpaint(plain, known, mask), plain, known, mask, x, LEVELS)


def test_inpainting_that_changes_a_pixel_is_told():
    x, labels, _ = inputs()
    plain = denoiser.condition_on(conditional("x0"), labels)
    mask = jnp.zeros((3, 2)).at[0].set(1)
    assert_inpainting(denoiser.inpaint(plain, x, mask), plain, x, mask, x, LEVELS)
    with pytest.raises(AssertionError, match=naming("known", "level")):
        assert_inpainting(denoiser.inpaint(plain, x + 1e-6, mask), plain, x, mask, x, LEVELS)
    with pytest.raises(AssertionError, match=naming("level")):
        assert_inpainting(denoiser.inpaint(plain, x, 0 * mask + 1), plain, x, mask, x, LEVELS)


def test_a_soft_mask_blends():
    x, labels, level = inputs()
    plain = denoiser.condition_on(conditional("x0"), labels)
    found = denoiser.inpaint(plain, x, jnp.float32(0.25))(x, level)
    np.testing.assert_allclose(found, 0.25 * x + 0.75 * plain(x, level), rtol=1e-5, atol=1e-6)


def test_a_mask_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=naming("mask", "(7, 3, 2)", "(6, 3, 2)")):
        denoiser.inpaint(lambda x, level: x, jnp.zeros((6, 3, 2)), jnp.zeros((7, 3, 2)))
    with pytest.raises(ValueError, match=naming("mask", "(6, 3, 2)", "(1, 3, 2)")):
        denoiser.inpaint(lambda x, level: x, jnp.zeros((1, 3, 2)), jnp.zeros((6, 3, 2)))
