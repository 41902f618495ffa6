import numpy as np
import pytest
from sklearn.datasets import load_digits

from diffjax.evaluation.digits import score_digits


@pytest.fixture(scope="module")
def real():
    digits = load_digits()
    return np.round(digits.images[:200] * 255 / 16).astype(np.uint8)[..., None], digits.target[:200]


def test_real_digits_are_recognised_and_not_new(real):
    verdict = score_digits(*real)
    assert verdict.recognised > 0.99
    assert verdict.distinct > 0.99
    assert verdict.novelty == pytest.approx(0, abs=0.01)


def test_wrong_labels_copies_and_noise_are_seen(real):
    images, labels = real
    assert score_digits(images, (labels + 1) % 10).recognised < 0.01
    assert score_digits(np.repeat(images[:50], 4, axis=0), np.repeat(labels[:50], 4)).distinct == 0.25
    noise = np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
    assert score_digits(noise, labels).novelty > 2
