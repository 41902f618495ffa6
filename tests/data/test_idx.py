"""MNIST's files, written here by the format's own words."""

import gzip
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import naming

from diffjax.build import load_data
from diffjax.config import Config, Data
from diffjax.data.idx import load_idx, read_idx
from diffjax.nn.conditioning import ClassLabel

FASHION = Path("/usr/share/datasets/fashion-mnist")  # of the Debian package dataset-fashion-mnist
NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
NAMES += ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def content_of(array, kind=8):
    """The bytes of a file: two zeros, type, number of axes, lengths, numbers."""
    lengths = b"".join(length.to_bytes(4, "big") for length in array.shape)
    return bytes([0, 0, kind, array.ndim]) + lengths + array.tobytes()


def arrays_of(num=30, held_out=20, shape=(5, 6)):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (n, *shape), np.uint8) for n in (num, held_out)]
    labels = [(np.arange(n) * 7 % 3).astype(np.uint8) for n in (num, held_out)]
    return images[0], labels[0], images[1], labels[1]


def write(folder, arrays, names=NAMES, compress=False):
    for name, array in zip(names, arrays, strict=True):
        content = content_of(array)
        end = ".gz" if compress else ""
        (folder / f"{name}{end}").write_bytes(gzip.compress(content) if compress else content)


def examples(split):
    return sorted(
        (e["image"].tobytes(), e.get("label")) for e in map(split.__getitem__, range(len(split)))
    )


def expected(images, labels=None):
    labels = [None] * len(images) if labels is None else labels.tolist()
    return sorted(zip([image.tobytes() for image in images], labels, strict=True))


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("mark", ["-", "."])
def test_pairs_are_the_splits(tmp_path, compress, mark):
    """Images and labels, in both spellings of names, compressed or not."""
    arrays = arrays_of()
    write(tmp_path, arrays, [name.replace("-idx", f"{mark}idx") for name in NAMES], compress)
    loaded = load_idx(tmp_path)
    assert (loaded.image_shape, loaded.notes) == ((5, 6, 1), ())
    assert loaded.fields == {"label": ClassLabel(3, names=("0", "1", "2"))}
    assert [loaded.train[i]["label"] for i in range(30)] == arrays[1].tolist()  # in their order
    assert examples(loaded.train) == expected(*arrays[:2])
    assert examples(loaded.held_out) == expected(*arrays[2:])
    assert type(loaded.train[0]["label"]) is int


def test_first_held_out_examples_are_of_every_class(tmp_path):
    images, labels, others, _ = arrays_of(held_out=300)
    write(tmp_path, (images, labels, others, np.arange(300, dtype=np.uint8) // 100))
    held_out = load_idx(tmp_path).held_out
    assert {held_out[i]["label"] for i in range(20)} == {0, 1, 2}


def test_without_labels_or_held_out_files(tmp_path):
    images, labels, *_ = arrays_of()
    write(tmp_path, [images], NAMES[:1])
    loaded = load_idx(tmp_path)
    assert loaded.fields == {}
    assert sorted(examples(loaded.train) + examples(loaded.held_out)) == expected(images)
    told = " ".join(loaded.notes)
    assert all(name in told for name in NAMES[1:3])
    write(tmp_path, [labels], NAMES[1:2])
    loaded = load_idx(tmp_path)
    assert loaded.classes == 3
    assert len(loaded.notes) == 1
    assert sorted(examples(loaded.train) + examples(loaded.held_out)) == expected(images, labels)
    write(tmp_path, [images[:5]], NAMES[2:3])  # images to hold out, without labels
    with pytest.raises(ValueError, match=naming(tmp_path, "label", "absent")):
        load_idx(tmp_path)


GOOD = content_of(np.zeros((12, 4, 4), np.uint8))
BAD = {
    "no such format": (b"PNG" + GOOD, []),
    "cut header": (GOOD[:9], []),
    "empty": (b"", []),
    "floats": (content_of(np.zeros((12, 4, 4), np.float32), 13), [13, 3, "uint8"]),
    "labels": (content_of(np.zeros(12, np.uint8)), [8, 1, 3]),
    "cut numbers": (GOOD[:-1], [191, "12x4x4"]),
    "more numbers": (GOOD + b"1", [193, "12x4x4"]),
    "cut gz": (gzip.compress(GOOD)[:-9], [".gz"]),
    "damaged gz": (gzip.compress(GOOD)[:20] + b"0" * 20, [".gz"]),
}


@pytest.mark.parametrize("case", BAD)
def test_unusable_file(tmp_path, case):
    content, names = BAD[case]
    write(tmp_path, arrays_of())
    path = tmp_path / NAMES[0]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=naming(path, *names)):
        load_idx(tmp_path)


def test_unusable_folder(tmp_path):
    with pytest.raises(ValueError, match=naming("data.path", tmp_path / "none")):
        load_idx(tmp_path / "none")
    with pytest.raises(ValueError, match=naming(tmp_path, NAMES[0])):
        load_idx(tmp_path)
    images, labels, others, more = arrays_of()
    write(tmp_path, (images, labels[:-1], others, more))
    with pytest.raises(ValueError, match=naming(tmp_path / NAMES[1], 29, 30)):
        load_idx(tmp_path)
    write(tmp_path, (images, labels, others[:, :4], more))
    with pytest.raises(ValueError, match=naming(tmp_path, "image", 4, 5, 6)):
        load_idx(tmp_path)
    write(tmp_path, (images, labels, others[:0], more[:0]))
    with pytest.raises(ValueError, match=naming(tmp_path)):
        load_idx(tmp_path)


@pytest.mark.skipif(not FASHION.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_fashion_mnist():
    """All 70,000 images are read in seconds."""
    start = time.perf_counter()
    loaded = load_data(Config(data=Data(source="idx", path=str(FASHION), pad=2)))
    assert time.perf_counter() - start < 30
    assert (len(loaded.train), len(loaded.held_out)) == (60_000, 10_000)
    assert (loaded.image_shape, loaded.classes) == ((32, 32, 1), 10)
    labels = read_idx(FASHION / f"{NAMES[1]}.gz", 1)
    assert np.bincount(labels).tolist() == [6000] * 10
    assert loaded.train[59_999]["label"] == labels[-1]
