import re

import numpy as np
import pytest
from helpers import naming

from diffjax.data.arrays import load_npz
from diffjax.nn.conditioning import ClassLabel, Vector


@pytest.mark.parametrize(("x", "y"), [("x", "y"), ("images", "labels")])
@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1), (5, 6, 3)])
def test_images_and_labels(tmp_path, x, y, shape):
    images = np.random.default_rng(0).integers(0, 256, (20, *shape), np.uint8)
    np.savez(tmp_path / "a.npz", **{x: images, y: np.arange(20) % 3})
    loaded = load_npz(tmp_path / "a.npz")
    assert (loaded.image_shape, loaded.classes) == ((*shape, 1)[:3], 3)
    train, held_out = ([split[i] for i in range(len(split))] for split in loaded[:2])
    assert len(held_out) < 10
    known = {image.tobytes(): i for i, image in enumerate(images)}
    numbers = [known[e["image"].tobytes()] for e in (*train, *held_out)]
    assert sorted(numbers) == [*range(20)]
    assert [e["label"] for e in (*train, *held_out)] == [i % 3 for i in numbers]


def test_periodic_labels_are_in_both_splits(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((1500, 2, 2), np.uint8), y=np.arange(1500) % 10)
    loaded = load_npz(tmp_path / "a.npz")
    for split in loaded[:2]:
        assert {split[i]["label"] for i in range(len(split))} == set(range(10))


LABELS = [
    ([1, 2, 10], ("1", "2", "10")),
    (np.array([7, 300_000]), ("7", "300000")),
    (np.array([2**63, 2**63 + 1], np.uint64), (str(2**63), str(2**63 + 1))),
    (np.array([20_251_231, 20_260_101], np.int32), ("20251231", "20260101")),
    (np.array(["2026-01-31", "2025-12-31"], "M8[D]"), ("2025-12-31", "2026-01-31")),
    (["owl", "11", "cat", "9", "10"], ("9", "10", "11", "cat", "owl")),
    ([b"owl", b"cat"], ("cat", "owl")),
    ([True, False], ("False", "True")),
]


@pytest.mark.parametrize(("values", "names"), LABELS)
def test_labels_of_any_values(tmp_path, values, names):
    """The values that occur are the classes; it is told."""
    values = np.asarray(values)
    x = np.random.default_rng(0).integers(0, 256, (60, 4, 4), np.uint8)
    y = values[np.arange(60) % len(values)]
    np.savez(tmp_path / "a.npz", x=x, y=y)
    loaded = load_npz(tmp_path / "a.npz")
    assert loaded.fields == {"label": ClassLabel(len(names), names=names)}
    (note,) = loaded.notes
    assert re.search(naming(tmp_path / "a.npz", names[0], names[-1], len(names)), note)
    written = {image.tobytes(): label for image, label in zip(x, y.tolist(), strict=True)}
    for split in loaded[:2]:
        for i in range(len(split)):
            value = written[split[i]["image"][..., 0].tobytes()]
            text = value.decode() if isinstance(value, bytes) else str(value)
            assert names[split[i]["label"]] == text
            assert type(split[i]["label"]) is int


def test_plain_labels_stay(tmp_path):
    y = np.array([2, 0, 1, 0] * 5, np.uint8)
    np.savez(
        tmp_path / "a.npz", x=np.random.default_rng(0).integers(0, 256, (20, 4, 4), np.uint8), y=y
    )
    loaded = load_npz(tmp_path / "a.npz")
    assert loaded.notes == ()
    assert loaded.fields == {"label": ClassLabel(3, names=("0", "1", "2"))}


def test_one_image_of_a_class_is_trained_on(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (100, 4, 4), np.uint8)
    np.savez(tmp_path / "a.npz", x=x, y=np.maximum(np.arange(100), 50))
    loaded = load_npz(tmp_path / "a.npz")
    assert {loaded.train[i]["label"] for i in range(len(loaded.train))} == {*range(50)}


def test_images_are_held_out_by_content(tmp_path):
    """Whatever their order, and those that are beside them."""
    x = np.random.default_rng(0).integers(0, 256, (200, 4, 4), np.uint8)

    def held_out(images):
        np.savez(tmp_path / "a.npz", x=images)
        split = load_npz(tmp_path / "a.npz").held_out
        return [split[i]["image"].tobytes() for i in range(len(split))]

    before, more = held_out(x[:150]), held_out(x[::-1])
    assert 5 < len(before) < 30
    assert [image for image in more if image in {i.tobytes() for i in x[:150]}] == before


def test_negative_labels_are_none(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((10, 4, 4, 1), np.uint8), labels=np.full(10, -1))
    loaded = load_npz(tmp_path / "a.npz")
    assert (loaded.classes, loaded.train[0].keys()) == (0, {"image"})


def not_an_npz(path):
    path.write_text("x,y\n1,2\n")


def flipped_byte(path):
    np.savez(path, x=np.zeros((20, 4, 4), np.uint8))
    content = bytearray(path.read_bytes())
    content[200] ^= 255
    path.write_bytes(content)


def cut_short(path):
    np.savez(path, x=np.zeros((20, 4, 4), np.uint8))
    path.write_bytes(path.read_bytes()[:300])


IMAGES = np.zeros((20, 4, 4), np.uint8)
BAD_NPZ = [
    (not_an_npz, []),
    (flipped_byte, ["x.npy"]),
    (cut_short, []),
    ({"a": IMAGES, "b": IMAGES}, ["b", "x", "images"]),
    ({}, ["x", "images"]),
    ({"x": IMAGES / 255}, ["float64", (20, 4, 4, 1), "uint8"]),
    ({"x": np.zeros((20, 4, 4, 4), np.uint8)}, ["uint8", (20, 4, 4, 4)]),
    ({"x": IMAGES, "y": np.arange(19)}, ["labels", "int64", (19,), 20]),
    ({"x": IMAGES, "y": np.zeros(20)}, ["labels", "float64", (20,)]),
    ({"x": IMAGES, "y": np.array([{}] * 20)}, []),
    ({"x": IMAGES, "y": np.arange(20) - 2}, ["labels", -2]),
    ({"x": IMAGES[:7]}, [7, 10]),
    ({"x": np.array([None] * 20)}, []),
]


@pytest.mark.parametrize(("content", "names"), BAD_NPZ)
def test_unusable_file(tmp_path, content, names):
    path = tmp_path / "a.npz"
    np.savez(path, **content) if isinstance(content, dict) else content(path)
    with pytest.raises(ValueError, match=naming(path, *names)):
        load_npz(path)


# ------------------------------------------------------------------------------- further arrays


def test_further_arrays_are_vectors(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (20, 3, 3), np.uint8)
    arrays = {"angle": np.arange(20) / 7, "pose": np.arange(60).reshape(20, 3)}
    ignored = {"names": np.array(["a"] * 20), "mean": np.zeros(3), "masks": x / 255}
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(20) % 4, **arrays, **ignored)
    loaded = load_npz(tmp_path / "a.npz")
    assert loaded.fields == {
        "label": ClassLabel(4, names=("0", "1", "2", "3")),
        "angle": Vector(1, "angle"),
        "pose": Vector(3, "pose"),
    }
    known = {image.tobytes(): i for i, image in enumerate(x)}
    for split in (loaded.train, loaded.held_out):
        for n in range(len(split)):
            example = split[n]
            i = known[example["image"].tobytes()]
            assert example.keys() == {"image", "label", "angle", "pose"}
            assert example["label"] == i % 4
            np.testing.assert_array_equal(loaded.fields["angle"].read(example), np.float32([i / 7]))
            np.testing.assert_array_equal(loaded.fields["pose"].read(example), arrays["pose"][i])


def test_vectors_are_finite(tmp_path):
    """Arrays that are no condition do not keep images from being read."""
    others = {"angle": np.full(20, np.nan), "names": np.array([{}] * 20), "size": np.ones(20)}
    np.savez(tmp_path / "a.npz", x=IMAGES, **others)
    assert set(load_npz(tmp_path / "a.npz").fields) == {"size"}


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=naming("data.path", tmp_path / "a.npz")):
        load_npz(tmp_path / "a.npz")


# ------------------------------------------------------------------------------- two splits


def test_arrays_of_keras(tmp_path):
    """The second pair is held out, whatever the images, and classes are of both."""
    x = np.random.default_rng(0).integers(0, 256, (50, 3, 4, 3), np.uint8)
    y = np.arange(50) % 4
    arrays = {"x_train": x[:40], "y_train": y[:40, None], "x_test": x[40:], "y_test": y[40:] + 1}
    arrays |= {"angle_train": np.arange(40) / 7, "angle_test": np.arange(10) / 7}
    np.savez(tmp_path / "a.npz", **arrays)
    loaded = load_npz(tmp_path / "a.npz")
    assert loaded.image_shape == (3, 4, 3)
    assert loaded.fields == {
        "label": ClassLabel(5, names=("0", "1", "2", "3", "4")),
        "angle": Vector(1, "angle"),
    }
    known = {image.tobytes(): i for i, image in enumerate(x)}
    for split, numbers in ((loaded.train, range(40)), (loaded.held_out, range(40, 50))):
        examples = [split[i] for i in range(len(split))]
        rows = [known[example["image"].tobytes()] for example in examples]
        assert sorted(rows) == [*numbers]
        assert [e["label"] for e in examples] == [y[i] + (i >= 40) for i in rows]
        assert [e["angle"] for e in examples] == [np.float32(i % 40 / 7) for i in rows]


BAD_PAIRS = [
    ({"x_train": IMAGES, "x_test": IMAGES[:, :3]}, ["image", 3, 4]),
    ({"x_train": IMAGES, "x_test": IMAGES, "y_train": np.arange(20)}, ["label", "absent"]),
    ({"x_train": IMAGES, "x_test": IMAGES[:0]}, []),
    ({"x_train": IMAGES, "y_train": np.arange(19), "x_test": IMAGES}, ["labels", 19, 20]),
    ({"x_train": IMAGES / 255, "x_test": IMAGES}, ["float64"]),
]


@pytest.mark.parametrize(("content", "names"), BAD_PAIRS)
def test_splits_that_differ(tmp_path, content, names):
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(ValueError, match=naming(tmp_path / "a.npz", *names)):
        load_npz(tmp_path / "a.npz")


def test_a_pair_alone_is_split(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (40, 3, 3), np.uint8)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=np.arange(40) % 4)
    loaded = load_npz(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", x=x, y=np.arange(40) % 4)
    other = load_npz(tmp_path / "b.npz")
    for split, same in zip(loaded[:2], other[:2], strict=True):
        assert [split[i]["image"].tobytes() for i in range(len(split))] == [
            same[i]["image"].tobytes() for i in range(len(same))
        ]
