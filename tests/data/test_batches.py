import time

import numpy as np
import pytest
from helpers import naming

from diffjax.data.batches import READ_AHEAD, batch_stream, first_batches, first_examples
from diffjax.data.image_io import to_float, to_uint8
from diffjax.data.tfds import load_tfds
from diffjax.nn.conditioning import ClassLabel, Fields, Vector

LABEL = ClassLabel(10)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The real builder, writing real files."""
    return load_tfds("digits", str(tmp_path_factory.mktemp("datasets")))


def take(stream, n):
    return [next(stream) for _ in range(n)]


def test_an_epoch_is_a_permutation(digits):
    epochs = [take(batch_stream(digits.train, 100, seed=0, start=start), 15) for start in (0, 15)]
    seen = [np.concatenate([b["x"] for b in epoch]).reshape(1500, -1) for epoch in epochs]
    real = np.sort([digits.train[i]["image"].tobytes() for i in range(1500)])
    for images in seen:
        assert (np.sort([to_uint8(image).tobytes() for image in images]) == real).all()
    assert (seen[0] != seen[1]).any()


def test_the_stream_is_a_function_of_the_step(digits):
    whole = take(batch_stream(digits.train, 64, seed=3), 30)
    later = take(batch_stream(digits.train, 64, seed=3, start=25), 5)
    for a, b in zip(whole[25:], later, strict=True):
        assert all((a[k] == b[k]).all() for k in a)
    assert (np.concatenate([b["index"] for b in whole]) == np.arange(30 * 64)).all()
    other = next(batch_stream(digits.train, 64, seed=4))
    assert (other["x"] != whole[0]["x"]).any()


def test_processes_share_each_global_batch(digits):
    whole = take(batch_stream(digits.train, 60, seed=3, start=2, conditioning=LABEL), 4)
    shares = [
        take(
            batch_stream(
                digits.train,
                60,
                seed=3,
                start=2,
                conditioning=LABEL,
                process_index=i,
                process_count=3,
            ),
            4,
        )
        for i in range(3)
    ]
    for n, batch in enumerate(whole):
        for key, value in batch.items():
            assert (np.concatenate([share[n][key] for share in shares]) == value).all()


def test_shapes_and_dtypes(digits):
    batch = next(batch_stream(digits.train, 32, seed=0, conditioning=LABEL))
    assert {k: (v.shape, str(v.dtype)) for k, v in batch.items()} == {
        "x": ((32, 8, 8, 1), "float32"),
        "condition": ((32,), "int32"),
        "index": ((32,), "uint32"),
    }
    assert (batch["x"].min(), batch["x"].max()) == (-1, 1)
    assert "condition" not in next(batch_stream(digits.train, 32, seed=0))


def test_condition_of_several_fields():
    class Examples:
        def __len__(self):
            return 8

        def __getitem__(self, i):
            vector = np.array([i, -i], np.float32)
            return {"image": np.full((1, 1, 1), i, np.uint8), "label": i, "vector": vector}

    conditioning = Fields((LABEL, Vector(2)))
    streamed = next(batch_stream(Examples(), 8, seed=0, conditioning=conditioning))
    x, condition = first_examples(Examples(), 8, conditioning)
    order = np.argsort(streamed["x"].ravel())
    for batch, found in (
        (streamed["x"][order], x),
        (streamed["condition"]["label"][order], condition["label"]),
    ):
        np.testing.assert_array_equal(batch, found)
    np.testing.assert_array_equal(streamed["condition"]["vector"][order], condition["vector"])
    np.testing.assert_array_equal(condition["vector"], np.outer(np.arange(8), [1, -1]))
    assert condition["label"].dtype == np.int32


def test_first_examples(digits):
    x, labels = first_examples(digits.held_out, 5, LABEL)
    examples = [digits.held_out[i] for i in range(5)]
    np.testing.assert_array_equal(x, to_float(np.stack([e["image"] for e in examples])))
    assert labels.tolist() == [e["label"] for e in examples]
    assert first_examples(digits.held_out, 5)[1] is None
    for num in (0, 298):
        with pytest.raises(ValueError, match=naming("num", num, 297)):
            first_examples(digits.held_out, num)


def test_held_out_examples_are_read_in_order():
    """As they are, by both functions: neither shuffled nor mirrored."""
    r = np.random.default_rng(0)
    split = [
        {"image": r.integers(0, 256, (2, 4, 3), np.uint8), "label": (7 * i) % 10} for i in range(20)
    ]
    found = first_batches(split, 6, 2, limit=9, conditioning=LABEL)
    x, labels = first_examples(split, 18, LABEL)
    assert [len(batch["x"]) for batch in found] == [6, 6, 6]
    for images, its in (
        (
            np.concatenate([batch["x"] for batch in found]),
            np.concatenate([b["condition"] for b in found]),
        ),
        (x, labels),
    ):
        expected = np.stack([example["image"] for example in split[:18]]) / 127.5 - 1
        np.testing.assert_allclose(images, expected, atol=1e-6)
        assert its.tolist() == [7 * i % 10 for i in range(18)]
    assert first_batches(split[:3], 6, 8, limit=0) == []
    with pytest.raises(ValueError, match=naming(3, 8)):
        first_batches(split[:3], 6, 8, limit=1)


@pytest.mark.parametrize(
    ("batch", "multiple", "sizes"), [(64, 8, [64] * 4), (512, 8, [296]), (64, 1, [64] * 4)]
)
def test_first_batches(digits, batch, multiple, sizes):
    found = first_batches(digits.held_out, batch, multiple, limit=9)
    assert [len(b["x"]) for b in found] == sizes
    assert (np.concatenate([b["index"] for b in found]) == np.arange(sum(sizes))).all()


def test_batch_larger_than_the_data(digits):
    with pytest.raises(ValueError, match=naming("batch", 1600, 1500)):
        batch_stream(digits.train, 1600, seed=0)


class Counting:
    """A source that knows what was read of it."""

    def __init__(self, n):
        self.reads, self._n = [], n

    def __len__(self):
        return self._n

    def __getitem__(self, i):
        self.reads.append(int(i))
        return {"image": np.full((2, 4, 1), i % 256, np.uint8), "label": int(i)}


@pytest.mark.parametrize("count", [2, 4])
def test_a_process_reads_its_rows_alone(count, monkeypatch):
    monkeypatch.setattr("diffjax.data.batches.READ_AHEAD", 1)
    monkeypatch.setattr("diffjax.data.batches.THREADS", 1)
    options = {"seed": 1, "start": 3, "conditioning": ClassLabel(240)}
    whole = take(batch_stream(Counting(240), 24, **options), 5)
    read = []
    for index in range(count):
        source = Counting(240)
        stream = batch_stream(source, 24, process_index=index, process_count=count, **options)
        mine = take(stream, 5)
        share = 24 // count
        rows = slice(index * share, (index + 1) * share)
        for batch, all_of_it in zip(mine, whole, strict=True):
            assert (batch["condition"] == all_of_it["condition"][rows]).all()
        expected = sorted(np.concatenate([batch["condition"] for batch in mine]))
        assert set(expected) <= set(source.reads)
        assert len(source.reads) <= (5 + 3) * share  # and what is read ahead
        read.append(set(expected))
    assert sum(map(len, read)) == len(set.union(*read)) == 5 * 24  # within one pass, no image twice


def test_flips_depend_on_seed_and_example():
    def flipped(batches):
        return np.concatenate([b["x"][:, 0, 0, 0] > b["x"][:, 0, 1, 0] for b in batches])

    class Ramp(Counting):
        def __getitem__(self, i):
            return {"image": np.arange(8, dtype=np.uint8).reshape(1, 8, 1)}

    def stream(seed=5, flip=True, **options):
        return batch_stream(Ramp(400), 100, seed=seed, flip=flip, **options)

    whole = flipped(take(stream(), 20))
    assert 0.45 < whole.mean() < 0.55  # 2000 draws: five standard deviations are 0.056
    assert (flipped(take(stream(start=7), 3)) == whole[700:1000]).all()
    shares = [
        flipped(take(stream(process_index=h, process_count=2), 20)).reshape(20, 50)
        for h in range(2)
    ]
    assert (np.concatenate(shares, axis=1).ravel() == whole).all()
    assert (flipped(take(stream(seed=6), 20)) != whole).any()
    assert not flipped(take(stream(flip=False), 4)).any()
    pixels = take(stream(), 1)[0]["x"]
    assert (np.sort(pixels, axis=2) == np.sort(pixels[:1], axis=2)).all()


def test_images_are_mirrored_to_the_pixel():
    """Half of them are, left to right, and the others are as they were; no other flip."""
    images = np.random.default_rng(0).integers(0, 256, (500, 3, 4, 3), np.uint8)

    class Images(Counting):
        def __getitem__(self, i):
            return {"image": images[i], "label": int(i)}

    def mirrored(batches, **options):
        stream = batch_stream(Images(500), 100, seed=2, conditioning=ClassLabel(500), **options)
        for batch in take(stream, batches):
            for x, label in zip(to_uint8(batch["x"]), batch["condition"], strict=True):
                if (x == images[label][:, ::-1]).all():
                    yield True
                else:
                    np.testing.assert_array_equal(x, images[label])
                    yield False

    num = sum(mirrored(20, flip=True))
    assert abs(num - 1000) < 5 * np.sqrt(2000 * 0.25)  # five standard deviations of 2000 draws
    assert not any(mirrored(2, flip=False))
    assert not any(mirrored(2))


def test_reading_ahead():
    """While nothing is taken, a step's worth of batches is read, so that none delays the next."""
    source = Counting(1000)
    stream = batch_stream(source, 10, seed=0)
    next(stream)
    until = time.monotonic() + 20
    while len(source.reads) < 10 * READ_AHEAD and time.monotonic() < until:
        time.sleep(0.01)
    assert len(source.reads) >= 10 * READ_AHEAD


def test_batch_not_divisible_by_processes(digits):
    with pytest.raises(ValueError, match=naming("batch", 64, 3)):
        batch_stream(digits.train, 64, seed=0, process_count=3)
