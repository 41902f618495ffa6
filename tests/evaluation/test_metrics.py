import numpy as np
import pytest
from helpers import naming
from hypothesis import given, settings
from hypothesis import strategies as st

from diffjax.evaluation import metrics

NO_ERROR = 1e-9  # of a few thousand operations in float64, relative to numbers of order 1


def gaussian(seed, n, size=5, mean=0.0, scale=1.0):
    return mean + scale * np.random.default_rng(seed).normal(size=(n, size))


def moments_of(features):
    return metrics.Moments.empty(features.shape[1]).update(features)


def exactly(mean, covariance, count=101):
    """Moments of a Gaussian that is known."""
    return metrics.Moments(
        count, np.asarray(mean, float), np.asarray(covariance, float) * (count - 1)
    )


def rotation(seed, size=5):
    return np.linalg.qr(gaussian(seed, size, size))[0]


seeds = st.integers(0, 2**32 - 1)

# ------------------------------------------------------------------------------- moments


@given(seeds, st.lists(st.integers(0, 40), min_size=1, max_size=6), st.sampled_from([0.0, 1e6]))
def test_moments_in_any_chunking(seed, sizes, mean):
    """Also far from 0, where a sum of squares has lost 12 of its 16 digits."""
    features = gaussian(seed, sum(sizes) + 2, mean=mean)
    found = metrics.Moments.empty(5)
    for chunk in np.split(features, np.cumsum(sizes)):
        found = found.update(chunk)
    assert found.count == len(features)
    # Deviations are exact to 1e-16 of the mean, and enter twice.
    tolerance = 1e-10 + 1e-15 * mean
    np.testing.assert_allclose(found.mean, features.mean(0), rtol=1e-14, atol=1e-12)
    np.testing.assert_allclose(
        found.scatter / (found.count - 1), np.cov(features.T), rtol=tolerance, atol=tolerance
    )


@given(seeds, st.integers(0, 20))
def test_merge_is_update(seed, at):
    features = gaussian(seed, 20)
    found = moments_of(features[:at]).merge(moments_of(features[at:]))
    for a, b in zip(found, moments_of(features), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


# ------------------------------------------------------------------------------- Frechet distance


def bures(a, b):
    """The closed form for covariances that commute: sum of (sqrt(a) - sqrt(b))^2."""
    return np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)


@given(seeds)
def test_frechet_of_shared_axes(seed):
    rng = np.random.default_rng(seed)
    a, b, shift, V = rng.uniform(0, 3, 5), rng.uniform(0, 3, 5), rng.normal(size=5), rotation(seed)
    found = metrics.frechet_distance(
        exactly(shift, V * a @ V.T), exactly(np.zeros(5), V * b @ V.T, count=7)
    )
    assert found == pytest.approx(shift @ shift + bures(a, b), abs=NO_ERROR)


def test_frechet_of_few_images():
    """80 features of which 5 vary: the other eigenvalues are rounding, of roots 1e-8 each."""
    rng, V = np.random.default_rng(0), rotation(0, 80)
    a, b = np.zeros(80), rng.uniform(0, 3, 80)
    a[:5] = rng.uniform(0, 3, 5)
    one, other = (exactly(np.zeros(80), V * each @ V.T) for each in (a, b))
    assert metrics.frechet_distance(one, other) == pytest.approx(bures(a, b), rel=NO_ERROR)
    assert metrics.frechet_distance(other, one) == pytest.approx(bures(a, b), rel=NO_ERROR)


def test_frechet_in_the_plane():
    """tr (S_a S_b)^1/2 = sqrt(tr S_a S_b + 2 sqrt(det S_a S_b)) there."""
    for seed in range(20):
        a, b = (np.cov(gaussian(seed + k, 10, 2).T) for k in (0, 100))
        root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
        found = metrics.frechet_distance(exactly([0, 0], a), exactly([1, 2], b))
        assert found == pytest.approx(5 + np.trace(a + b) - 2 * root, abs=NO_ERROR)


@given(seeds, st.integers(2, 30))
def test_frechet_is_a_distance(seed, n):
    """Also with singular covariances: rounding in their null space must not add up."""
    a, b, c = (moments_of(gaussian(seed + k, n, 8, mean=k)) for k in range(3))
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=NO_ERROR)
    assert metrics.frechet_distance(a, b) == pytest.approx(metrics.frechet_distance(b, a), abs=1e-7)
    ab, bc, ac = (np.sqrt(metrics.frechet_distance(*pair)) for pair in ((a, b), (b, c), (a, c)))
    assert ac <= ab + bc + NO_ERROR


@given(seeds)
def test_frechet_is_invariant(seed):
    a, b = gaussian(seed, 30), gaussian(seed + 1, 40, scale=2.0)
    V, shift = rotation(seed), gaussian(seed + 2, 1)
    before = metrics.frechet_distance(moments_of(a), moments_of(b))
    after = metrics.frechet_distance(moments_of(a @ V + shift), moments_of(b @ V + shift))
    assert after == pytest.approx(before, abs=NO_ERROR)


# ------------------------------------------------------------------------------- kernel distance


def discrepancy(x, y):
    """By its definition, pair by pair."""

    def mean(pairs):
        return np.mean([(u @ v / len(u) + 1) ** 3 for u, v in pairs])

    within = [
        mean([(u, v) for i, u in enumerate(z) for j, v in enumerate(z) if i != j]) for z in (x, y)
    ]
    return sum(within) - 2 * mean([(u, v) for u in x for v in y])


@given(seeds, st.integers(3, 8), st.integers(3, 8))
@settings(max_examples=20)
def test_kernel_by_definition(seed, m, n):
    x, y = gaussian(seed, m), gaussian(seed + 1, n, mean=0.5)
    found, error = metrics.kernel_distance(x, y)
    assert found == pytest.approx(discrepancy(x, y), abs=NO_ERROR)
    of_x = [discrepancy(np.delete(x, i, 0), y) for i in range(m)]
    of_y = [discrepancy(x, np.delete(y, i, 0)) for i in range(n)]
    assert error == pytest.approx(
        np.sqrt((m - 1) * np.var(of_x) + (n - 1) * np.var(of_y)), abs=NO_ERROR
    )


def test_kernel_of_subsets():
    x, y = gaussian(0, 20), gaussian(1, 30, mean=0.5)
    subsets = [(np.arange(k, k + 9), np.arange(2 * k, 2 * k + 12)) for k in range(5)]
    each = [metrics.kernel_distance(x[i], y[j])[0] for i, j in subsets]
    assert metrics.kernel_distance(x, y, subsets) == pytest.approx(
        (np.mean(each), np.std(each)), abs=NO_ERROR
    )


def test_kernel_in_blocks():
    """More images than fit into one, against all kernels at once; and neither set is first."""
    x, y = gaussian(0, 1203, 3), gaussian(1, 701, 3, mean=0.3)
    k = [(a @ b.T / 3 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    within = [(each.sum() - np.trace(each)) / (len(each) * (len(each) - 1)) for each in k[:2]]
    found = metrics.kernel_distance(x, y)
    assert found[0] == pytest.approx(sum(within) - 2 * k[2].mean(), abs=NO_ERROR)
    assert metrics.kernel_distance(y, x) == pytest.approx(found, abs=NO_ERROR)


@pytest.mark.parametrize(("mean", "too_large"), [(0.0, 1.42), (0.7, 1.05)])
def test_kernel_is_unbiased(mean, too_large):
    """Over 400 draws of 40 and 60 images: E k(x, x') is E (1 + x.x'/D)^3, known for Gaussians."""
    found = np.array(
        [
            metrics.kernel_distance(gaussian((0, i), 40), gaussian((1, i), 60, mean=mean))
            for i in range(400)
        ]
    )
    true = expected_kernel(0, 0) + expected_kernel(mean, mean) - 2 * expected_kernel(0, mean)
    spread = found[:, 0].std(ddof=1)
    assert abs(found[:, 0].mean() - true) < 4 * spread / np.sqrt(400)
    # The error as estimated, against the true one, which is known to 1/sqrt(800) and less for its
    # tails. Of equal sets, where only pairs matter, the jackknife counts every pair twice.
    estimated = np.sqrt(np.mean(found[:, 1] ** 2))
    assert 0.9 * too_large < estimated / spread < 1.15 * too_large


def expected_kernel(a, b, size=5):
    """E (1 + x.y/D)^3 for independent x ~ N(a, 1), y ~ N(b, 1) in every one of D dimensions.

    From the cumulants of x*y: ab, 1 + a^2 + b^2, and 6ab.
    """
    k1, k2, k3 = a * b * size, (1 + a**2 + b**2) * size, 6 * a * b * size
    m1, m2, m3 = k1, k2 + k1**2, k3 + 3 * k2 * k1 + k1**3
    return 1 + 3 * m1 / size + 3 * m2 / size**2 + m3 / size**3


# ------------------------------------------------------------------------------- inception score


def test_inception_score_extremes():
    classes = 7
    certain = np.eye(classes)[np.arange(10 * classes) % classes]
    assert metrics.inception_score(certain) == pytest.approx((classes, 0), abs=NO_ERROR)
    one = np.tile(np.random.default_rng(0).dirichlet(np.ones(classes)), (50, 1))
    assert metrics.inception_score(one) == pytest.approx((1, 0), abs=NO_ERROR)
    assert metrics.inception_score(np.eye(classes)[[2] * 30]) == pytest.approx((1, 0), abs=NO_ERROR)


@given(seeds, st.integers(1, 5))
def test_inception_score_is_mutual_information(seed, splits):
    """H(y) - H(y|x), of each part."""
    p = np.random.default_rng(seed).dirichlet(np.full(4, 0.3), size=23)
    mean, spread = metrics.inception_score(p, splits)

    def entropy(p):
        return -np.sum(np.where(p > 0, p * np.log(np.maximum(p, 1e-300)), 0), axis=-1)

    parts = [p[i * 23 // splits : (i + 1) * 23 // splits] for i in range(splits)]
    each = np.exp([entropy(part.mean(0)) - entropy(part).mean() for part in parts])
    assert (mean, spread) == pytest.approx((each.mean(), each.std()), abs=NO_ERROR)
    assert 1 - NO_ERROR <= mean <= 4 + NO_ERROR


# ------------------------------------------------------------------------------- precision, recall


def test_precision_recall_extremes():
    real = gaussian(0, 60)
    assert metrics.precision_recall(real, real) == (1, 1)
    assert metrics.precision_recall(real, real + 1e3) == (0, 0)


def test_precision_recall_of_modes():
    """Two modes of equal weight, of which one is generated, or four, of which two are real."""
    modes = [gaussian(k, 50, 2, mean=100.0 * k) for k in range(4)]
    two, four = np.concatenate(modes[:2]), np.concatenate(modes)
    assert metrics.precision_recall(two, modes[0]) == (1, 0.5)
    assert metrics.precision_recall(two, four) == (0.5, 1)


def nearest(real, generated, k):
    """By its definition, distance by distance."""

    def covered(points, by):
        radii = [np.sort([np.linalg.norm(a - b) for b in by])[k] for a in by]
        return np.mean(
            [
                any(np.linalg.norm(p - b) <= r for b, r in zip(by, radii, strict=True))
                for p in points
            ]
        )

    return covered(generated, real), covered(real, generated)


@given(seeds, st.integers(1, 4), st.integers(1, 9))
@settings(max_examples=20)
def test_precision_recall_by_definition(seed, k, batch):
    real, generated = gaussian(seed, 12, 2), gaussian(seed + 1, 9, 2, mean=1.0)
    found = metrics.precision_recall(real, generated, k, batch)
    assert found == nearest(real, generated, k)
    assert metrics.precision_recall(generated, real, k, batch) == found[::-1]
    V, shift = rotation(seed, 2), gaussian(seed + 2, 1, 2)
    assert metrics.precision_recall(real @ V + shift, generated @ V + shift, k, batch) == found


@pytest.mark.parametrize("batch", [7, 500])
def test_precision_recall_of_copies(batch):
    """Balls of radius 0 contain their centre.

    The 36th image is alone in its batch of 7, where products are rounded otherwise.
    """
    for seed in range(20):
        real = gaussian(seed, 36, 67, mean=3.0)
        generated = np.concatenate(
            [np.repeat(real[-1:], 4, 0), gaussian(seed + 1, 40, 67, mean=500.0)]
        )
        assert metrics.precision_recall(real, generated, batch=batch) == (4 / 44, 1 / 36)


# ------------------------------------------------------------------------------- bad input

# Each with the argument that has too few images, and how many it needs.
SETS = {
    "frechet": (lambda a, b: metrics.frechet_distance(moments_of(a), moments_of(b)), "moments", 2),
    "kernel": (metrics.kernel_distance, "generated", 3),
    "precision, recall": (metrics.precision_recall, "generated", 4),
}


@pytest.mark.parametrize(("measure", "too_few", "least"), SETS.values(), ids=SETS)
def test_bad_features(measure, too_few, least):
    real = gaussian(0, 20)
    with pytest.raises(ValueError, match=naming(too_few, "1", least)):
        measure(real, real[:1])
    with pytest.raises(ValueError, match=naming("features", "5", "3")):
        measure(real, real[:, :3])
    with pytest.raises(ValueError, match=naming("features", "NaN")):
        measure(real, np.where(np.arange(5) == 2, np.nan, real))


def test_bad_arguments():
    real = gaussian(0, 20)
    with pytest.raises(ValueError, match=naming("features", "[5]")):
        metrics.Moments.empty(5).update(real[0])
    with pytest.raises(ValueError, match=naming("generated", "[5]")):
        metrics.kernel_distance(real, real[0])
    with pytest.raises(ValueError, match=naming("moments", "NaN")):
        metrics.frechet_distance(exactly(np.full(2, np.nan), np.eye(2)), exactly([0, 0], np.eye(2)))
    with pytest.raises(ValueError, match=naming("subset", "1", "2")):
        metrics.kernel_distance(real, real, [([0], [0, 1])])
    with pytest.raises(ValueError, match=naming("subsets")):
        metrics.kernel_distance(real, real, [])
    with pytest.raises(ValueError, match=naming("probabilities", "9", "10")):
        metrics.inception_score(np.full((9, 2), 0.5))
    with pytest.raises(ValueError, match=naming("splits", "0")):
        metrics.inception_score(np.full((9, 2), 0.5), 0)
    with pytest.raises(ValueError, match=naming("probabilities", "1")):
        metrics.inception_score(np.full((20, 2), 1.5))
    with pytest.raises(ValueError, match=naming("neighbours", "0")):
        metrics.precision_recall(real, real, 0)


# ------------------------------------------------------------------------------- pairs of images


@given(seeds, st.floats(0.5, 60))
def test_peak_signal_to_noise(seed, shift):
    """An error of `shift` in a quarter of the numbers has a known ratio; equal images, infinity."""
    images = np.random.default_rng(seed).integers(0, 190, (3, 4, 4, 2)).astype(np.float64)
    others = images.copy()
    others[:, ::2, ::2] += shift
    expected = 20 * np.log10(255 / shift) + 10 * np.log10(4)
    assert metrics.peak_signal_to_noise(images, others) == pytest.approx(expected)
    smaller = metrics.peak_signal_to_noise(images / 255, others / 255, peak=1)
    assert smaller == pytest.approx(expected)
    assert metrics.peak_signal_to_noise(images, images) == np.inf


@given(st.floats(0, 255), st.floats(0, 255))
def test_similarity_of_constant_images(a, b):
    """Without structure the means remain."""
    images, others = (np.full((2, 11, 13, 1), value) for value in (a, b))
    c = 2.55**2
    expected = (2 * a * b + c) / (a * a + b * b + c)
    np.testing.assert_allclose(metrics.structural_similarity(images, others), expected, rtol=1e-9)


def similarity_pixel_by_pixel(a, b, peak):
    """The formula under each place of the window, for grey images [H, W]."""
    row = np.array([np.exp(-(i**2) / 4.5) for i in range(-5, 6)])
    window = np.outer(row, row) / row.sum() ** 2
    found = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            m, n = (window * p).sum(), (window * q).sum()
            covariance = (window * (p - m) * (q - n)).sum()
            variances = (window * (p - m) ** 2).sum() + (window * (q - n) ** 2).sum()
            c, d = (0.01 * peak) ** 2, (0.03 * peak) ** 2
            first, second = (2 * m * n + c) / (m * m + n * n + c), 2 * covariance + d
            found.append(first * second / (variances + d))
    return np.mean(found)


@pytest.mark.parametrize("peak", [1.0, 255.0])
def test_similarity_is_its_formula(peak):
    """Image by image, and the mean over channels; it is symmetric, and 1 of equal images."""
    r = np.random.default_rng(0)
    images = peak * r.uniform(size=(2, 13, 16, 3))
    others = np.clip(images + 0.2 * peak * r.normal(size=images.shape), 0, peak)
    found = metrics.structural_similarity(images, others, peak)
    expected = [
        np.mean([similarity_pixel_by_pixel(a[..., c], b[..., c], peak) for c in range(3)])
        for a, b in zip(images, others, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-8)
    assert (found < 0.99).all()
    np.testing.assert_allclose(metrics.structural_similarity(others, images, peak), found)
    np.testing.assert_allclose(metrics.structural_similarity(images, images, peak), 1)


def test_pairs_that_cannot_be_compared():
    a, b = np.zeros((2, 12, 12, 1)), np.zeros((2, 12, 10, 1))
    for function in (metrics.peak_signal_to_noise, metrics.structural_similarity):
        with pytest.raises(ValueError, match=naming("[2, 12, 12, 1]", "[2, 12, 10, 1]")):
            function(a, b)
    with pytest.raises(ValueError, match=naming("12x10", "11x11")):
        metrics.structural_similarity(b, b)
