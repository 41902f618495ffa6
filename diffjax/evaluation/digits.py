"""Scores of generated 8x8 digits: recognised as their label, distinct, and new."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.metrics import pairwise_distances
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.svm import SVC


@dataclass(frozen=True)
class DigitScores:
    """Scores of N images with the labels that they were generated for."""

    class_accuracy: float  # share that a support vector machine, trained on all real digits, reads
    real_class_accuracy: float  # the same of real digits held out from it, in five parts
    distinct: float  # share of different images
    nearest_neighbour_ratio: (
        float  # median distance to the nearest real image, over that among real
    )

    def __str__(self) -> str:
        """The scores in one line."""
        return (
            f"{self.class_accuracy:.1%} classified as their label (held-out real digits:"
            f" {self.real_class_accuracy:.1%}), {self.distinct:.1%} distinct, distance to the"
            f" nearest real digit {self.nearest_neighbour_ratio:.2f} times that between real digits"
        )


def score_digits(images: np.ndarray, labels: np.ndarray) -> DigitScores:
    """Score generated digits with scikit-learn's real ones.

    images: uint8 [N, 8, 8, 1]; labels: int [N] in 0..9. The classifier takes pixels of 0..16, as
    scikit-learn's are.
    """
    real: Any = load_digits()
    classifier, accuracy = _classifier()
    generated = images.reshape(len(images), -1) / 255 * 16
    between_real = pairwise_distances(real.data)
    np.fill_diagonal(between_real, np.inf)
    nearest_real = pairwise_distances(generated, real.data).min(1)
    return DigitScores(
        class_accuracy=float(np.mean(classifier.predict(generated) == labels)),
        real_class_accuracy=accuracy,
        distinct=len(np.unique(generated, axis=0)) / len(generated),
        nearest_neighbour_ratio=float(np.median(nearest_real) / np.median(between_real.min(1))),
    )


@functools.cache
def _classifier() -> tuple[SVC, float]:
    """A classifier trained on all real digits, and its accuracy on held-out ones."""
    real: Any = load_digits()
    classifier = SVC(gamma=0.001)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    accuracy = cross_val_score(classifier, real.data, real.target, cv=folds).mean()
    return classifier.fit(real.data, real.target), float(accuracy)
