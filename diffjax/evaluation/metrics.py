"""How far generated images are from real ones, told from their features: all in float64, on the host.

Features are rows of numbers, one per image, of the same network for both sets: a distance is of its extractor as much
as of its images, and of their number. Every function raises ValueError, in one sentence, for features that are not
[N, D], hold NaN or infinity, are of different sizes, or of too few images.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    """Mean and covariance of images seen so far; the covariance is scatter / (count - 1)."""

    count: int
    mean: np.ndarray  # float64 [D]
    scatter: np.ndarray  # float64 [D, D], sum of outer products of deviations from the mean


def no_moments(size: int) -> Moments:
    """Of no image, for features of `size` numbers."""
    return Moments(0, np.zeros(size), np.zeros((size, size)))


def add(moments: Moments, features: np.ndarray) -> Moments:
    """With N more images; features: [N, D], N may be 0."""
    features = _checked(features, "features", 0)
    if not len(features):
        return merge(moments, no_moments(features.shape[1]))
    mean = features.mean(0)
    return merge(moments, Moments(len(features), mean, (features - mean).T @ (features - mean)))


def merge(a: Moments, b: Moments) -> Moments:
    """Of the images of both: S = S_a + S_b + d d^T n_a n_b/(n_a + n_b), d = mean_b - mean_a (Chan, Golub, LeVeque
    1979). No sum of squares is formed, which a large mean would drown.
    """
    _check_sizes(len(a.mean), len(b.mean))
    count = a.count + b.count
    if not count:
        return a
    difference, share = b.mean - a.mean, b.count / count
    scatter = a.scatter + b.scatter + np.outer(difference, difference) * (a.count * share)
    return Moments(count, a.mean + difference * share, scatter)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2), of the Gaussians of these moments (FID, arXiv:1706.08500).

    With factors S = R R^T, the trace of the root is the sum of the singular values of R_a^T R_b: real and not negative
    even where covariances are singular, as those of fewer images than features are. It is biased upwards, by more the
    fewer images there are: compare equal numbers only. 2 images or more each.
    """
    _check_sizes(len(a.mean), len(b.mean))
    if min(a.count, b.count) < 2:
        raise ValueError(f"moments are of {a.count} and {b.count} images: a covariance needs 2 or more of each")
    if not all(np.isfinite(leaf).all() for moments in (a, b) for leaf in moments):
        raise ValueError("moments hold NaN or infinity: what made the features or the images went wrong")
    S_a, S_b = (moments.scatter / (moments.count - 1) for moments in (a, b))
    root = np.linalg.svd(_factor(S_a).T @ _factor(S_b), compute_uv=False).sum()
    distance = np.sum((a.mean - b.mean) ** 2) + np.trace(S_a) + np.trace(S_b) - 2 * root
    return max(0.0, float(distance))  # rounding may take it below


def _factor(covariance: np.ndarray) -> np.ndarray:
    """R with R R^T = covariance. Eigenvalues that are rounding's are 0, or their roots would add up: 1e-16 has 1e-8."""
    values, vectors = np.linalg.eigh(covariance)
    least = values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors * np.sqrt(np.where(values > least, values, 0.0))


def kernel_distance(
    real: np.ndarray,
    made: np.ndarray,
    subsets: Sequence[tuple[np.ndarray, np.ndarray]] | None = None,
) -> tuple[float, float]:
    """Squared maximum mean discrepancy under the kernel k(x, y) = (x.y/D + 1)^3 (KID, arXiv:1801.01401), unbiased:

        mean of k(x, x') over x != x'  +  mean of k(y, y') over y != y'  -  2 * mean of k(x, y)

    and its standard error. Unlike Frechet's distance it may be compared between different numbers of images, and may
    fall below 0 where the sets are alike.

    real: [M, D]; made: [N, D]. Without subsets, over all images, 3 or more each, at M*N + M*M + N*N kernels; the error
    is the jackknife's, over images of both sets, and is up to 1.4 times too large (never too small, on average) where
    they are alike. subsets: pairs (rows of real, rows of made) of index arrays, of 2 or more each; the mean over these,
    and their standard deviation: the error of one subset, not of their mean, and what the literature reports.
    """
    real, made = _checked_pair(real, made, 3 if subsets is None else 2)
    if subsets is not None:
        if not len(subsets):
            raise ValueError("there are no subsets: give one pair of index arrays or more, or None")
        found = []
        for x, y in subsets:
            if min(len(x), len(y)) < 2:
                raise ValueError(f"a subset is of {len(x)} and {len(y)} images: use 2 or more of each")
            A, B, C = (sums.sum() for sums in _kernel_sums(real[x], made[y])[:3])
            found.append(_discrepancy(A, B, C, len(x), len(y)))
        return float(np.mean(found)), float(np.std(found))
    m, n = len(real), len(made)
    within_real, within_made, across_real, across_made = _kernel_sums(real, made)
    A, B, C = within_real.sum(), within_made.sum(), across_real.sum()
    # Without one image, its pairs are missing: those with its own set from both sides.
    without_real = _discrepancy(A - 2 * within_real, B, C - across_real, m - 1, n)
    without_made = _discrepancy(A, B - 2 * within_made, C - across_made, m, n - 1)
    variance = sum((len(each) - 1) * each.var() for each in (without_real, without_made))
    return float(_discrepancy(A, B, C, m, n)), float(np.sqrt(variance))


def _discrepancy(within_real: np.ndarray, within_made: np.ndarray, across: np.ndarray, m: int, n: int) -> np.ndarray:
    """From sums of kernels over all ordered pairs of different images."""
    return within_real / (m * (m - 1)) + within_made / (n * (n - 1)) - 2 * across / (m * n)


def _kernel_sums(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Per image: of k(x, x') and of k(y, y') over the others of its set; of k(x, y) over all y, and over all x."""

    def within(x: np.ndarray) -> np.ndarray:
        self = _kernel(np.einsum("nd,nd->n", x, x), x.shape[1])
        return np.concatenate([_kernel(x[rows] @ x.T, x.shape[1]).sum(1) for rows in _blocks(len(x))]) - self

    across_x, across_y = [], np.zeros(len(y))
    for rows in _blocks(len(x)):
        kernels = _kernel(x[rows] @ y.T, x.shape[1])
        across_x.append(kernels.sum(1))
        across_y += kernels.sum(0)
    return within(x), within(y), np.concatenate(across_x), across_y


def _kernel(products: np.ndarray, size: int) -> np.ndarray:
    base = products / size + 1
    return base * base * base  # a power of floats is many times slower


def inception_score(probabilities: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """exp(mean of KL(p(y|x) | p(y))), p(y) the mean of p(y|x) (arXiv:1606.03498): from 1 to the number of classes.

    probabilities: [N, classes], rows that add up to 1. The mean over `splits` parts of as many images as possible, one
    after the other, and the standard deviation over these, 0 for one. A part should look like the whole: shuffle images
    that come class by class. ValueError for fewer images than parts.
    """
    if splits < 1:
        raise ValueError(f"splits is {splits}: use 1 or more")
    p = _checked(probabilities, "probabilities", splits)
    if (p < 0).any() or np.abs(p.sum(1) - 1).max() > 1e-3:
        raise ValueError("probabilities are below 0 or do not add up to 1: give the softmax of a classifier's outputs")
    bounds = [i * len(p) // splits for i in range(splits + 1)]
    scores = []
    for first, last in pairwise(bounds):
        part = p[first:last]
        # log p - log q, and 0 where p is 0, where q may be 0 too.
        ratio = np.divide(part, part.mean(0), out=np.ones_like(part), where=part > 0)
        scores.append(np.exp(np.sum(part * np.log(ratio), axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real: np.ndarray, made: np.ndarray, neighbours: int = 3, batch: int = 500) -> tuple[float, float]:
    """Precision, the share of made images within the manifold of the real ones, and recall, the share of real images
    within that of the made ones (arXiv:1904.06991).

    The manifold of a set: balls about each of its images, to its `level_pairs`-th nearest other one, edges included.
    real: [M, D]; made: [N, D]; more than `level_pairs` each. batch: rows of distances at a time, at 8*batch*max(M, N)
    bytes.
    """
    if neighbours < 1 or batch < 1:
        raise ValueError(f"neighbours is {neighbours} and batch is {batch}: use 1 or more")
    real, made = _checked_pair(real, made, neighbours + 1)
    centre = real.mean(0)  # distances are told from products: the smaller, the more exactly
    real, made = real - centre, made - centre

    def covered(points: np.ndarray, by: np.ndarray) -> float:
        # Each image is its own nearest one.
        radii = [
            np.partition(_squared_distances(by[rows], by), neighbours)[:, neighbours]
            for rows in _blocks(len(by), batch)
        ]
        radius = np.concatenate(radii)
        inside = [(_squared_distances(points[rows], by) <= radius).any(1) for rows in _blocks(len(points), batch)]
        return float(np.concatenate(inside).mean())

    return covered(made, real), covered(real, made)


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """|x - y|^2 of all pairs, [N, M]; exactly 0 where rounding cannot tell them apart, or copies would differ."""
    norms = np.sum(x * x, axis=1)[:, None] + np.sum(y * y, axis=1)
    squares = norms - 2 * (x @ y.T)
    return np.where(squares > x.shape[1] * np.finfo(np.float64).eps * norms, squares, 0.0)


def _blocks(number: int, size: int = 500) -> Iterator[slice]:
    return (slice(first, first + size) for first in range(0, number, size))


def _checked(values: np.ndarray, name: str, least: int) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 2:
        raise ValueError(f"{name} are {list(values.shape)}: use one row per image, [N, D]")
    if len(values) < least:
        raise ValueError(f"{name} are of {len(values)} images: use {least} or more")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} hold NaN or infinity: what made the features or the images went wrong")
    return values


def _checked_pair(real: np.ndarray, made: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    real, made = _checked(real, "features of real images", least), _checked(made, "features of made images", least)
    _check_sizes(real.shape[1], made.shape[1])
    return real, made


def _check_sizes(a: int, b: int) -> None:
    if a != b:
        raise ValueError(f"features are of {a} and {b} numbers: use the same extractor for both sets")
