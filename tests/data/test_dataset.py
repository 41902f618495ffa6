from pathlib import Path

import numpy as np
import pytest
from helpers import naming
from hypothesis import given
from hypothesis import strategies as st

from diffjax.data.arrays import load_npz
from diffjax.data.dataset import preprocess, train_holdout_split


def test_size_grey_and_pad(tmp_path):
    images = np.random.default_rng(0).integers(1, 256, (10, 28, 28, 3), np.uint8)
    np.savez(tmp_path / "a.npz", x=images)
    loaded = load_npz(tmp_path / "a.npz")
    padded = preprocess(loaded, pad=2)
    assert padded.image_shape == (32, 32, 3)
    image = padded.train[3]["image"]
    assert (image[2:30, 2:30] == images[3]).all()
    assert image.astype(int).sum() == images[3].astype(int).sum()
    small = preprocess(loaded, size=14, pad=1, grey=True)
    assert small.image_shape == (16, 16, 1)
    image, grey = small.train[3]["image"], images[3] @ np.array([0.299, 0.587, 0.114])
    blocks = grey.reshape(14, 2, 14, 2).mean((1, 3))
    assert np.abs(image[1:15, 1:15, 0] - blocks).max() < 1.5  # each of two roundings to 8 bits
    assert preprocess(loaded) is loaded


@given(st.integers(10, 200))
def test_holdout_split(num):
    train, held_out = train_holdout_split(range(num), Path("x"))
    assert sorted(train + held_out) == [*range(num)]
    assert len(held_out) == num // 10
    assert train == sorted(train)
    assert (train, held_out) == train_holdout_split(range(num), Path("x"))


def test_too_few_to_split():
    with pytest.raises(ValueError, match=naming("photos", 9, 10)):
        train_holdout_split(range(9), Path("photos"))
