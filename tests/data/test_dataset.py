import hashlib
from pathlib import Path

import numpy as np
import pytest
from helpers import naming
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffjax.data.arrays import load_npz
from diffjax.data.dataset import (
    Dataset,
    ReadableSource,
    UnreadableError,
    label_fields,
    natural_order,
    preprocess,
    train_holdout_split,
)
from diffjax.data.folder import load_folder


def test_size_grey_and_pad(tmp_path):
    images = np.random.default_rng(0).integers(1, 256, (10, 28, 28, 3), np.uint8)
    np.savez(tmp_path / "a.npz", x=images)
    loaded = load_npz(tmp_path / "a.npz")
    padded = preprocess(loaded, pad=2)
    assert padded.image_shape == (32, 32, 3)
    image, source = padded.train[3]["image"], loaded.train[3]["image"]
    assert (image[2:30, 2:30] == source).all()
    assert image.astype(int).sum() == source.astype(int).sum()
    small = preprocess(loaded, size=14, pad=1, grey=True)
    assert small.image_shape == (16, 16, 1)
    image, grey = small.train[3]["image"], source @ np.array([0.299, 0.587, 0.114])
    blocks = grey.reshape(14, 2, 14, 2).mean((1, 3))
    assert np.abs(image[1:15, 1:15, 0] - blocks).max() < 1.5  # each of two roundings to 8 bits
    assert preprocess(loaded) is loaded


# ------------------------------------------------------------------------------- crops


COLOURS = {
    "red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0), "yellow": (255, 255, 0),
    "magenta": (255, 0, 255), "cyan": (0, 255, 255),
}  # fmt: skip
# Of a crop to the center: its quarters.
MIDDLE = [["green", "yellow"], ["magenta", "cyan"]]
LANDSCAPE = [["red", *row, "blue"] for row in MIDDLE]
PORTRAIT = [["red"] * 2, *MIDDLE, ["blue"] * 2]


def blocks(names, size):
    """An image of squares of named colours, each of size x size pixels."""
    colours = np.array([[COLOURS[name] for name in row] for row in names], np.uint8)
    return colours.repeat(size, 0).repeat(size, 1)


def grey_of(image):
    """Rec. 601's luma, [H, W, 1]."""
    return np.round(image @ np.array([0.299, 0.587, 0.114]))[..., None]


def loaded_as_npz(folder, image, size, grey):
    np.savez(folder / "a.npz", x=np.stack([image] * 10))
    return preprocess(load_npz(folder / "a.npz"), size, grey=grey)


def loaded_as_folder(folder, image, size, grey):
    for i in range(10):
        Image.fromarray(image).save(folder / f"{i}.png")
    return load_folder(folder, size, grey=grey)


@pytest.mark.parametrize("load", [loaded_as_npz, loaded_as_folder])
@pytest.mark.parametrize("names", [MIDDLE, LANDSCAPE, PORTRAIT])
@pytest.mark.parametrize(("size", "pad", "grey"), [(8, 0, False), (8, 3, True), (32, 1, False)])
def test_what_is_cropped_and_resized(tmp_path, load, names, size, pad, grey):
    """The middle of landscape and portrait images, smaller and larger, with a black frame."""
    dataset = preprocess(load(tmp_path, blocks(names, 8), size, grey), pad=pad)
    expected = blocks(MIDDLE, size // 2)
    expected = grey_of(expected) if grey else expected
    frame = np.pad(expected, ((pad, pad), (pad, pad), (0, 0)))
    assert dataset.image_shape == frame.shape
    for split in (dataset.train, dataset.held_out):
        np.testing.assert_allclose(split[0]["image"], frame, atol=grey)


def test_notes_and_classes_are_kept():
    fields = label_fields(2, ("cat", "dog"))
    before = Dataset([0] * 1200, [0] * 10, (8, 8, 3), fields, ("a note",), {"an error"})
    after = preprocess(before, 4, 1, grey=True)
    assert (after.fields, after.notes, after.damaged) == (fields, ("a note",), {"an error"})


def test_natural_order():
    names = ["b", "a10b", "a2", "10", "2", "a", "02", "a10"]
    assert sorted(names, key=natural_order) == ["02", "2", "10", "a", "a2", "a10", "a10b", "b"]


# ------------------------------------------------------------------------------- held out


def named(num):
    return [f"{i}.png".encode() for i in range(num)]


def share(key):
    return int(hashlib.blake2b(key, digest_size=6).hexdigest(), 16) / 2**48


@given(st.integers(10, 60), st.binary(max_size=2), st.data())
def test_holdout_split(num, prefix, data):
    """The hash of the key decides, but for one image of every class and an empty split."""
    keys = [prefix + key for key in named(num)]
    classes = data.draw(st.integers(1, num // 2))
    labels = [i % classes for i in range(len(keys))]
    train, held_out = train_holdout_split(keys, labels, Path("x"))
    assert sorted(train + held_out) == [*range(len(keys))]
    assert train == sorted(train)
    assert {labels[i] for i in train} == set(labels)
    shares = [share(key) for key in keys]
    assert held_out == sorted(held_out, key=shares.__getitem__)
    last = {max((s, i) for i, s in enumerate(shares) if labels[i] == c)[1] for c in set(labels)}
    movable = sorted({*range(num)} - last, key=shares.__getitem__)
    assert held_out == ([i for i in movable if shares[i] < 0.1] or movable[:1])


def test_one_more_image_moves_no_other():
    def membership(keys):
        train, held_out = train_holdout_split(keys, None, Path("x"))
        return {keys[i] for i in train}, {keys[i] for i in held_out}

    for seed in range(50):
        keys = [f"{seed}/{i}".encode() for i in range(61)]
        train, held_out = membership(keys[1:])
        for more in (keys, keys[::-1]):
            more_train, more_held_out = membership(more)
            assert train <= more_train
            assert held_out <= more_held_out


def test_about_a_tenth_is_held_out():
    train, held_out = train_holdout_split(named(10_000), None, Path("x"))
    assert abs(len(held_out) - 1000) < 150  # five standard deviations
    assert len(train) + len(held_out) == 10_000
    # It must never change: runs would be evaluated on images that they were trained on.
    assert train_holdout_split(named(40), None, Path("x"))[1] == [26, 11]


def test_classes_stay_in_training():
    num = 200
    train, held_out = train_holdout_split(named(num), [i // 2 for i in range(num)], Path("x"))
    assert {i // 2 for i in train} == {*range(num // 2)}
    assert 0 < len(held_out) < 40
    with pytest.raises(ValueError, match=naming("photos", "class")):
        train_holdout_split(named(12), range(12), Path("photos"))
    assert len(train_holdout_split(named(12), [0, *range(11)], Path("x"))[1]) == 1


def test_too_few_to_split():
    with pytest.raises(ValueError, match=naming("photos", 9, 10)):
        train_holdout_split(named(9), None, Path("photos"))


# ------------------------------------------------------------------------------- damaged


class Sparse:
    """Ten examples, of which some cannot be read."""

    def __init__(self, bad):
        self._bad = bad

    def __len__(self):
        return 10

    def __getitem__(self, i):
        if i in self._bad:
            raise UnreadableError(f"file {i}")
        return {"label": i}


def test_the_next_example_is_read():
    damaged = set()
    source = ReadableSource(Sparse({0, 3, 4, 9}), damaged)
    assert not damaged
    assert [source[np.int64(i)]["label"] for i in range(10)] == [1, 1, 2, 5, 5, 5, 6, 7, 8, 1]
    assert damaged == {"file 0", "file 3", "file 4", "file 9"}
    assert len(source) == 10
    assert ReadableSource(Sparse({*range(10)} - {3}), set())[4] == {"label": 3}
    with pytest.raises(UnreadableError):
        ReadableSource(Sparse(range(10)), set())[3]
