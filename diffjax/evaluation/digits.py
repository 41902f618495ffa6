"""A judge of generated 8x8 digits: are they the digits they claim to be, are they many, and are they new?"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.metrics import pairwise_distances
from sklearn.svm import SVC


@dataclass(frozen=True)
class DigitScores:
    """Of N images with the labels that were asked for."""

    recognised: float  # share that a support vector machine, trained on all real digits, reads as its label
    distinct: float  # share of different images
    novelty: float  # median distance to the nearest real image, over that from each real image to its nearest other

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.recognised:.1%} recognised as their label, {self.distinct:.1%} distinct, "
            f"distance to the nearest real digit {self.novelty:.2f} of the real ones'"
        )


def score_digits(images: np.ndarray, labels: np.ndarray) -> DigitScores:
    """images: uint8 [N, 8, 8, 1]; labels: int [N] in 0..9. The machine sees pixels of 0..16, like scikit-learn's."""
    real: Any = load_digits()
    made = images.reshape(len(images), -1) / 255 * 16
    machine = SVC(gamma=0.001).fit(real.data, real.target)
    between_real = pairwise_distances(real.data)
    np.fill_diagonal(between_real, np.inf)
    return DigitScores(
        recognised=float(np.mean(machine.predict(made) == labels)),
        distinct=len(np.unique(made, axis=0)) / len(made),
        novelty=float(np.median(pairwise_distances(made, real.data).min(1)) / np.median(between_real.min(1))),
    )
