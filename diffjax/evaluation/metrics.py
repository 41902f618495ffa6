"""Distances between generated and real images, of sets of them and of pairs.

All are computed in float64 on the host. Features are rows of numbers, one per image, by one
extractor for both sets: a distance depends on the extractor and on the number of images as much as
on the images. Every function raises ValueError for features that are not [N, D], contain NaN or
infinity, have different sizes, or are of too few images. Pairs are images [N, H, W, C] of one
shape.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    """Mean and covariance of features so far; the covariance is scatter / (count - 1)."""

    count: int
    mean: np.ndarray  # float64 [D]
    scatter: np.ndarray  # float64 [D, D], sum of outer products of deviations from the mean

    @staticmethod
    def empty(dim: int) -> "Moments":
        """The moments of no image, for features [N, dim]."""
        return Moments(0, np.zeros(dim), np.zeros((dim, dim)))

    def update(self, features: np.ndarray) -> "Moments":
        """The moments with N more images; features: [N, D], N may be 0."""
        features = _checked(features, "features", 0)
        if not len(features):
            return self.merge(Moments.empty(features.shape[1]))
        mean = features.mean(0)
        scatter = (features - mean).T @ (features - mean)
        return self.merge(Moments(len(features), mean, scatter))

    def merge(self, other: "Moments") -> "Moments":
        """The moments of the images of both.

            S = S_a + S_b + d d^T n_a n_b / (n_a + n_b),   d = mean_b - mean_a

        (Chan, Golub, LeVeque 1979.) No sum of squares is formed: with a large mean it would lose
        all digits.
        """
        _check_sizes(len(self.mean), len(other.mean))
        count = self.count + other.count
        if not count:
            return self
        difference, share = other.mean - self.mean, other.count / count
        outer = np.outer(difference, difference) * (self.count * share)
        return Moments(count, self.mean + difference * share, self.scatter + other.scatter + outer)


def frechet_distance(real: Moments, generated: Moments) -> float:
    """The Frechet distance of the Gaussians of two moments (FID, arXiv:1706.08500).

        |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2)

    With factors S = R R^T, the trace of the root is the sum of the singular values of R_a^T R_b:
    real and not negative even where covariances are singular, as with fewer images than features.
    It is biased upwards, by more the fewer images there are: compare equal numbers only. Both
    moments need 2 images or more. It is symmetric.
    """
    a, b = real, generated
    _check_sizes(len(a.mean), len(b.mean))
    if min(a.count, b.count) < 2:
        raise ValueError(
            f"moments are of {a.count} and {b.count} images: a covariance needs 2 or more of each"
        )
    if not all(np.isfinite(leaf).all() for moments in (a, b) for leaf in moments):
        raise ValueError("moments contain NaN or infinity: the features or the images do")
    S_a, S_b = (moments.scatter / (moments.count - 1) for moments in (a, b))
    root = np.linalg.svd(_factor(S_a).T @ _factor(S_b), compute_uv=False).sum()
    distance = np.sum((a.mean - b.mean) ** 2) + np.trace(S_a) + np.trace(S_b) - 2 * root
    return max(0.0, float(distance))  # rounding may take it below


def _factor(covariance: np.ndarray) -> np.ndarray:
    """R with R R^T = covariance.

    Eigenvalues within rounding of 0 are set to 0, since their roots would add up: 1e-16 has 1e-8.
    """
    values, vectors = np.linalg.eigh(covariance)
    least = values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors * np.sqrt(np.where(values > least, values, 0.0))


# ------------------------------------------------------------------------------- kernel distance

Subsets = Sequence[tuple[np.ndarray, np.ndarray]]


def kernel_distance(
    real: np.ndarray, generated: np.ndarray, subsets: Subsets | None = None
) -> tuple[float, float]:
    """The squared maximum mean discrepancy, and its error (KID, arXiv:1801.01401).

        mean of k(x, x') over x != x' + mean of k(y, y') over y != y' - 2 * mean of k(x, y)

    with the kernel k(x, y) = (x.y/D + 1)^3. It is unbiased: unlike the Frechet distance it may be
    compared between different numbers of images, and may fall below 0 where the sets are alike.

    real: [M, D]; generated: [N, D]. Without subsets, over all images, 3 or more each, at
    M*N + M*M + N*N kernels; the error is the jackknife's, over images of both sets, and is up to
    1.4 times too large (never too small, on average) where the sets are alike. subsets: pairs
    (rows of real, rows of generated) of index arrays, of 2 or more each; the mean over them, and
    their standard deviation: the error of one subset, not of their mean, as the literature reports.
    """
    real, generated = _checked_pair(real, generated, 3 if subsets is None else 2)
    if subsets is not None:
        return _kernel_distance_of_subsets(real, generated, subsets)
    m, n = len(real), len(generated)
    sums = _kernel_sums(real, generated)
    within_real, within_generated, across_real, across_generated = sums
    A, B, C = within_real.sum(), within_generated.sum(), across_real.sum()
    # Without one image, its pairs are missing: those with its own set from both sides.
    without_real = _discrepancy(A - 2 * within_real, B, C - across_real, m - 1, n)
    without_generated = _discrepancy(A, B - 2 * within_generated, C - across_generated, m, n - 1)
    variance = sum((len(each) - 1) * each.var() for each in (without_real, without_generated))
    return float(_discrepancy(A, B, C, m, n)), float(np.sqrt(variance))


def _kernel_distance_of_subsets(
    real: np.ndarray, generated: np.ndarray, subsets: Subsets
) -> tuple[float, float]:
    if not len(subsets):
        raise ValueError("subsets is empty: use one pair of index arrays or more, or None")
    distances = []
    for x, y in subsets:
        if min(len(x), len(y)) < 2:
            raise ValueError(f"a subset is of {len(x)} and {len(y)} images: use 2 or more of each")
        A, B, C = (sums.sum() for sums in _kernel_sums(real[x], generated[y])[:3])
        distances.append(_discrepancy(A, B, C, len(x), len(y)))
    return float(np.mean(distances)), float(np.std(distances))


def _discrepancy(
    within_real: np.ndarray, within_generated: np.ndarray, across: np.ndarray, m: int, n: int
) -> np.ndarray:
    """The discrepancy from sums of kernels over all ordered pairs of different images."""
    return within_real / (m * (m - 1)) + within_generated / (n * (n - 1)) - 2 * across / (m * n)


def _kernel_sums(
    x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sums of kernels per image: within x and y, and across for each x and y."""
    across_x, across_y = [], np.zeros(len(y))
    for rows in _blocks(len(x)):
        kernels = _kernel(x[rows] @ y.T, x.shape[1])
        across_x.append(kernels.sum(1))
        across_y += kernels.sum(0)
    return _within(x), _within(y), np.concatenate(across_x), across_y


def _within(x: np.ndarray) -> np.ndarray:
    """The sum of k(x, x') per image, over the others of its set."""
    dim = x.shape[1]
    itself = _kernel(np.einsum("nd,nd->n", x, x), dim)
    sums = [_kernel(x[rows] @ x.T, dim).sum(1) for rows in _blocks(len(x))]
    return np.concatenate(sums) - itself


def _kernel(products: np.ndarray, dim: int) -> np.ndarray:
    base = products / dim + 1
    return base * base * base  # a power of floats is many times slower


# ------------------------------------------------------------------------------- other metrics


def inception_score(probabilities: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """The inception score, and its deviation over splits (arXiv:1606.03498).

        exp(mean of KL(p(y|x) | p(y))),   p(y) the mean of p(y|x)

    It lies between 1 and the number of classes.

    probabilities: [N, classes], rows that add up to 1. The mean over `splits` parts of as many
    images as possible, one after the other, and the standard deviation over them, 0 for one. A part
    should look like the whole: shuffle images that are sorted by class.

    Raises: ValueError for fewer images than splits.
    """
    if splits < 1:
        raise ValueError(f"splits is {splits}: use 1 or more")
    p = _checked(probabilities, "probabilities", splits)
    if (p < 0).any() or np.abs(p.sum(1) - 1).max() > 1e-3:
        raise ValueError(
            "probabilities are below 0 or do not add up to 1: use the softmax of a classifier's"
            " outputs"
        )
    bounds = [i * len(p) // splits for i in range(splits + 1)]
    scores = []
    for first, last in pairwise(bounds):
        part = p[first:last]
        # log p - log q, and 0 where p is 0, where q may be 0 too.
        ratio = np.divide(part, part.mean(0), out=np.ones_like(part), where=part > 0)
        scores.append(np.exp(np.sum(part * np.log(ratio), axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(
    real: np.ndarray, generated: np.ndarray, neighbours: int = 3, batch: int = 500
) -> tuple[float, float]:
    """Precision and recall of generated images (arXiv:1904.06991).

    Precision is the share of generated images within the manifold of the real ones; recall is the
    share of real images within that of the generated ones. The manifold of a set: balls about each
    of its images, to its `neighbours`-th nearest other one, edges included.

    real: [M, D]; generated: [N, D]; more than `neighbours` each. batch: rows of distances at a
    time, at 8*batch*max(M, N) bytes.
    """
    if neighbours < 1 or batch < 1:
        raise ValueError(f"neighbours is {neighbours} and batch is {batch}: use 1 or more")
    real, generated = _checked_pair(real, generated, neighbours + 1)
    centre = real.mean(0)  # distances come from products: the smaller, the more exact
    real, generated = real - centre, generated - centre
    precision = _covered(generated, real, neighbours, batch)
    return precision, _covered(real, generated, neighbours, batch)


def _covered(points: np.ndarray, by: np.ndarray, neighbours: int, batch: int) -> float:
    """The share of points within the manifold of another set."""
    # Each image is its own nearest one.
    radii = [
        np.partition(_squared_distances(by[rows], by), neighbours)[:, neighbours]
        for rows in _blocks(len(by), batch)
    ]
    radius = np.concatenate(radii)
    inside = [
        (_squared_distances(points[rows], by) <= radius).any(1)
        for rows in _blocks(len(points), batch)
    ]
    return float(np.concatenate(inside).mean())


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """|x - y|^2 of all pairs, [N, M]; exactly 0 within rounding, for copies."""
    norms = np.sum(x * x, axis=1)[:, None] + np.sum(y * y, axis=1)
    squares = norms - 2 * (x @ y.T)
    return np.where(squares > x.shape[1] * np.finfo(np.float64).eps * norms, squares, 0.0)


def _blocks(num: int, size: int = 500) -> Iterator[slice]:
    return (slice(first, first + size) for first in range(0, num, size))


# ------------------------------------------------------------------------------- pairs of images

WINDOW, WINDOW_STD = 11, 1.5  # of structural similarity, in pixels


def peak_signal_to_noise(images: np.ndarray, others: np.ndarray, peak: float = 255.0) -> float:
    """The peak signal-to-noise ratio of pairs of images, in dB.

        10*log10(peak^2 / mean of (image - other)^2),   over all numbers of all images

    Infinity for equal ones. images, others: [N, H, W, C], 0..peak.

    Raises: ValueError for images of different shapes.
    """
    images, others = _checked_images(images, others)
    error = float(np.mean((images - others) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(peak**2 / error))


def structural_similarity(
    images: np.ndarray, others: np.ndarray, peak: float = 255.0
) -> np.ndarray:
    """The structural similarity of pairs of images, 1 for equal ones.

        (2 m_a m_b + c_1)(2 s_ab + c_2) / ((m_a^2 + m_b^2 + c_1)(s_a^2 + s_b^2 + c_2))

    with means, variances and covariance under a Gaussian window of 11x11 pixels and standard
    deviation 1.5, c_1 = (0.01 peak)^2, c_2 = (0.03 peak)^2: its mean over all places of the window
    inside the image, and over channels (Wang et al. 2004).

    images, others: [N, H, W, C], 0..peak. Returns [N].

    Raises: ValueError for images of different shapes, or smaller than the window.
    """
    images, others = _checked_images(images, others)
    if min(images.shape[1:3]) < WINDOW:
        raise ValueError(
            f"images are {images.shape[1]}x{images.shape[2]}: structural similarity needs"
            f" {WINDOW}x{WINDOW} pixels or more"
        )
    c_1, c_2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    found = []
    for a, b in zip(images, others, strict=True):
        m_a, m_b = _windowed(a), _windowed(b)
        variances = _windowed(a * a) - m_a**2 + _windowed(b * b) - m_b**2
        covariance = _windowed(a * b) - m_a * m_b
        means = (2 * m_a * m_b + c_1) / (m_a**2 + m_b**2 + c_1)
        found.append(np.mean(means * (2 * covariance + c_2) / (variances + c_2)))
    return np.array(found)


def _windowed(image: np.ndarray) -> np.ndarray:
    """The means of an image [H, W, C] under the window, at all places inside."""
    distance = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(distance**2) / (2 * WINDOW_STD**2))
    weights /= weights.sum()
    for axis in (0, 1):
        image = np.lib.stride_tricks.sliding_window_view(image, WINDOW, axis) @ weights
    return image


def _checked_images(images: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    images, others = np.asarray(images, np.float64), np.asarray(others, np.float64)
    if images.ndim != 4 or images.shape != others.shape or not len(images):
        raise ValueError(
            f"images have shape {list(images.shape)}, and others {list(others.shape)}: use one"
            " shape [N, H, W, C] with N of 1 or more"
        )
    return images, others


# ------------------------------------------------------------------------------- checks


def _checked(values: np.ndarray, name: str, least: int) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 2:
        raise ValueError(f"{name} have shape {list(values.shape)}: use one row per image, [N, D]")
    if len(values) < least:
        raise ValueError(f"{name} are of {len(values)} images: use {least} or more")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} contain NaN or infinity: the network or the images do")
    return values


def _checked_pair(
    real: np.ndarray, generated: np.ndarray, least: int
) -> tuple[np.ndarray, np.ndarray]:
    real = _checked(real, "features of real images", least)
    generated = _checked(generated, "features of generated images", least)
    _check_sizes(real.shape[1], generated.shape[1])
    return real, generated


def _check_sizes(a: int, b: int) -> None:
    if a != b:
        raise ValueError(
            f"features have {a} and {b} numbers an image: use one extractor for both sets"
        )
