import numpy as np
import pytest
from sklearn.datasets import load_digits

from diffjax.evaluation.digits import score_digits


@pytest.fixture(scope="module")
def real():
    digits = load_digits()
    return np.round(digits.images[:200] * 255 / 16).astype(np.uint8)[..., None], digits.target[:200]


def test_real_digits(real):
    """They are read as their label, and are not new."""
    scores = score_digits(*real)
    assert scores.class_accuracy > 0.99
    assert scores.distinct > 0.99
    assert scores.nearest_neighbour_ratio == pytest.approx(0, abs=0.01)


def test_wrong_labels_copies_and_noise(real):
    images, labels = real
    assert score_digits(images, (labels + 1) % 10).class_accuracy < 0.01
    copies = score_digits(np.repeat(images[:50], 4, axis=0), np.repeat(labels[:50], 4))
    assert copies.distinct == 0.25
    noise = np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
    assert score_digits(noise, labels).nearest_neighbour_ratio > 2


def test_scores_as_text(real):
    scores = score_digits(*real)
    words = (f"{scores.class_accuracy:.1%}", f"{scores.nearest_neighbour_ratio:.2f}", "distinct")
    assert all(word in str(scores) for word in words)
