import time

import numpy as np
import pytest
from helpers import naming

from diffjax.data import dataset
from diffjax.data.batches import READ_AHEAD, batch_stream, first_batches
from diffjax.data.image_io import to_uint8


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The real builder, writing real files."""
    return dataset.load_tfds("digits", str(tmp_path_factory.mktemp("datasets")))


def take(stream, n):
    return [next(stream) for _ in range(n)]


def test_an_epoch_sees_every_image_once_and_the_next_in_another_order(digits):
    epochs = [take(batch_stream(digits.train, 100, seed=0, start=start), 15) for start in (0, 15)]
    seen = [np.concatenate([b["image"] for b in epoch]).reshape(1500, -1) for epoch in epochs]
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
    assert (other["image"] != whole[0]["image"]).any()


def test_hosts_share_each_global_batch_in_order(digits):
    whole = take(batch_stream(digits.train, 60, seed=3, start=2), 4)
    shares = [take(batch_stream(digits.train, 60, seed=3, start=2, host=h, hosts=3), 4) for h in range(3)]
    for n, batch in enumerate(whole):
        for key, value in batch.items():
            assert (np.concatenate([share[n][key] for share in shares]) == value).all()


def test_batches_are_what_the_step_takes(digits):
    batch = next(batch_stream(digits.train, 32, seed=0))
    assert {k: (v.shape, str(v.dtype)) for k, v in batch.items()} == {
        "image": ((32, 8, 8, 1), "float32"), "label": ((32,), "int32"), "index": ((32,), "uint32"),
    }  # fmt: skip
    assert (batch["image"].min(), batch["image"].max()) == (-1, 1)
    assert "label" not in next(batch_stream(digits.train, 32, seed=0, labels=False))


@pytest.mark.parametrize(("batch", "multiple", "sizes"), [(64, 8, [64] * 4), (512, 8, [296]), (64, 1, [64] * 4)])
def test_held_out_batches_are_always_the_same(digits, batch, multiple, sizes):
    found = first_batches(digits.held_out, batch, multiple, limit=9)
    assert [len(b["image"]) for b in found] == sizes
    assert (np.concatenate([b["index"] for b in found]) == np.arange(sum(sizes))).all()


def test_a_batch_larger_than_the_data_is_named(digits):
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


@pytest.mark.parametrize("hosts", [2, 4])
def test_a_host_reads_its_rows_and_no_others(hosts, monkeypatch):
    monkeypatch.setattr("diffjax.data.batches.READ_AHEAD", 1)
    monkeypatch.setattr("diffjax.data.batches.THREADS", 1)
    whole = take(batch_stream(Counting(240), 24, seed=1, start=3), 5)
    read = []
    for host in range(hosts):
        source = Counting(240)
        mine = take(batch_stream(source, 24, seed=1, start=3, host=host, hosts=hosts), 5)
        share = 24 // hosts
        rows = slice(host * share, (host + 1) * share)
        for batch, all_of_it in zip(mine, whole, strict=True):
            assert (batch["label"] == all_of_it["label"][rows]).all()
        expected = sorted(np.concatenate([batch["label"] for batch in mine]))
        assert set(expected) <= set(source.reads)
        assert len(source.reads) <= (5 + 3) * share  # and what is read ahead
        read.append(set(expected))
    assert sum(map(len, read)) == len(set.union(*read)) == 5 * 24  # within one pass, no image twice


def test_flips_are_of_the_seed_and_the_example_alone():
    def flipped(batches):
        return np.concatenate([b["image"][:, 0, 0, 0] > b["image"][:, 0, 1, 0] for b in batches])

    class Ramp(Counting):
        def __getitem__(self, i):
            return {"image": np.arange(8, dtype=np.uint8).reshape(1, 8, 1)}

    def stream(seed=5, flip=True, **options):
        return batch_stream(Ramp(400), 100, seed=seed, labels=False, flip=flip, **options)

    whole = flipped(take(stream(), 20))
    assert 0.45 < whole.mean() < 0.55  # 2000 draws: five standard deviations are 0.056
    assert (flipped(take(stream(start=7), 3)) == whole[700:1000]).all()
    shares = [flipped(take(stream(host=h, hosts=2), 20)).reshape(20, 50) for h in range(2)]
    assert (np.concatenate(shares, axis=1).ravel() == whole).all()
    assert (flipped(take(stream(seed=6), 20)) != whole).any()
    assert not flipped(take(stream(flip=False), 4)).any()
    pixels = take(stream(), 1)[0]["image"]
    assert (np.sort(pixels, axis=2) == np.sort(pixels[:1], axis=2)).all()


def test_the_stream_reads_ahead_of_who_takes_from_it():
    """While nothing is taken, a step's worth of batches is read: none holds up the step after it."""
    source = Counting(1000)
    stream = batch_stream(source, 10, seed=0)
    next(stream)
    until = time.monotonic() + 20
    while len(source.reads) < 10 * READ_AHEAD and time.monotonic() < until:
        time.sleep(0.01)
    assert len(source.reads) >= 10 * READ_AHEAD


def test_hosts_that_cannot_share_a_batch_are_named(digits):
    with pytest.raises(ValueError, match=naming("batch", 64, 3)):
        batch_stream(digits.train, 64, seed=0, hosts=3)
