"""Latents in shards, written here record by record."""

import dataclasses
import json
import math
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
from helpers import naming

from diffjax.build import image_config, load_data, model_info
from diffjax.config import Config, Data
from diffjax.data import latents
from diffjax.data.batches import batch_stream, first_batches, first_examples
from diffjax.data.dataset import UnreadableError
from diffjax.data.latents import Manifest, load_latents, read_manifest, write_shard
from diffjax.nn.conditioning import ClassLabel, Fields, Vector

LABEL, ANGLE = ClassLabel(3, names=("a", "b", "c")), Vector(2, "angle")
DATA = dataclasses.asdict(Data(source="npz", path="photos.npz", size=16, grey=True))
DATA["conditions"] = ["label"]  # as JSON has it
SHAPE, NUM, SHARD = (2, 3, 4), {"train": 23, "held_out": 9}, 7


def manifest_of(**fields):
    plain = Manifest(
        shape=SHAPE,
        dtype="float32",
        mirrored=True,
        splits=NUM,
        shard=SHARD,
        fields={"label": LABEL, "angle": ANGLE},
        data=DATA,
        images=(16, 16, 1),
        digest="d",
        source="runs/autoencoder",
        autoencoder="1234",
        scaling=0.5,
        shift=0.25,
        complete=True,
    )
    return dataclasses.replace(plain, **fields)


def write(folder, manifest):
    """The records of each split, and their files."""
    folder.mkdir(exist_ok=True)
    rng, found = np.random.default_rng(0), {}
    for split, num in manifest.splits.items():
        records = np.zeros(num, manifest.record)
        for name in records.dtype.names:
            if name == "label":
                records[name] = np.arange(num) % 3
            else:
                records[name] = rng.normal(size=records[name].shape)
        for number in range(manifest.shards(split)):
            rows = records[manifest.rows_of(split, number)]
            write_shard(folder / manifest.name_of(split, number), rows)
        found[split] = records
    manifest.write(folder)
    return found


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "photos"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("mirrored", [False, True])
def test_examples(folder, dtype, mirrored):
    """Moments of scaled latents, of image and mirror, and fields, over the ends of shards."""
    manifest = manifest_of(dtype=dtype, mirrored=mirrored)
    written = write(folder, manifest)
    loaded = load_latents(folder)
    assert (loaded.image_shape, loaded.autoencoder) == (SHAPE, "1234")
    assert loaded.fields == {"label": LABEL, "angle": ANGLE}
    assert [len(split) for split in loaded[:2]] == [23, 9]
    names = {"moments", "mirrored"} if mirrored else {"moments"}
    for split, records in zip(loaded[:2], written.values(), strict=True):
        for i, record in enumerate(records):
            example = split[np.int64(i)]
            assert example.keys() == {*names, "label", "angle"}
            assert (type(example["label"]), example["label"]) == (int, i % 3)
            assert np.array_equal(ANGLE.read(example), record["angle"])
            for name in names:
                mean, std = record[name][..., :4], np.exp(np.float64(record[name][..., 4:]) / 2)
                assert example[name].dtype == np.float32
                assert np.allclose(example[name][..., :4], (np.float64(mean) - 0.25) * 0.5)
                assert np.allclose(np.exp(example[name][..., 4:] / 2), std * 0.5)


def test_manifest_is_read_as_it_was_written(folder):
    manifest = manifest_of(dtype="float16", splits={"train": 14, "held_out": 0})
    write(folder, manifest)
    assert read_manifest(folder) == manifest
    assert [manifest.shards(split) for split in ("train", "held_out")] == [2, 0]
    layout = json.loads((folder / "manifest.json").read_text())["layout"]
    moments = [[name, "<f2", [2, 3, 8]] for name in ("moments", "mirrored")]
    assert layout == [*moments, ["label", "<i8", []], ["angle", "<f4", [2]]]
    assert read_manifest(folder.parent) is None


def test_layout_without_numpy(folder):
    """A shard is ArrayRecord, of records as long as the layout tells."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    manifest = manifest_of()
    written = write(folder, manifest)
    paths = [str(folder / f"train-{i:05}-of-00004.array_record") for i in range(4)]
    records = [bytes(record) for record in ArrayRecordDataSource(paths)]
    assert records == [record.tobytes() for record in written["train"]]


# ------------------------------------------------------------------------------- random access


@pytest.fixture
def opened(monkeypatch):
    """The paths of the shards that are opened, in order."""
    paths, reader = [], latents.ArrayRecordReader

    def opening(path, *args, **kwargs):
        paths.append(path)
        return reader(path, *args, **kwargs)

    monkeypatch.setattr(latents, "ArrayRecordReader", opening)
    return paths


def test_nothing_is_read_before_it_is_asked_for(folder, opened):
    """Opening a folder of a thousand shards opens none of them; an example opens its own."""
    manifest = manifest_of(splits={"train": 7000, "held_out": 7}, fields={})
    folder.mkdir()
    for split in manifest.splits:
        for number in range(manifest.shards(split)):
            (folder / manifest.name_of(split, number)).touch()
    manifest.write(folder)
    loaded = load_latents(folder)
    assert (len(loaded.train), opened) == (7000, [])
    with pytest.raises(UnreadableError, match=naming(folder / manifest.name_of("train", 123))):
        loaded.train[7 * 123 + 1]
    assert opened == [str(folder / manifest.name_of("train", 123))]


def test_open_shards_are_limited(folder, opened, monkeypatch):
    """The one that was used longest ago is closed, and opened again when it is needed."""
    monkeypatch.setattr(latents, "OPEN_SHARDS", 2)
    write(folder, manifest_of())
    train = load_latents(folder).train
    for i in (0, 7, 1, 14, 8, 2, 15):  # of the shards 0, 1, 0, 2, 1, 0, 2
        assert train[i]["label"] == i % 3
    assert [path.split("train-")[1][4] for path in opened] == [*"012102"]
    assert len(train._source._readers) == 2


def test_shards_are_opened_at_the_same_time(folder, monkeypatch):
    """Two threads that open shards do not wait for each other."""
    write(folder, manifest_of())
    train, reader, both = load_latents(folder).train, latents.ArrayRecordReader, Barrier(2)

    def opening(*args, **kwargs):
        both.wait(timeout=10)
        return reader(*args, **kwargs)

    monkeypatch.setattr(latents, "ArrayRecordReader", opening)
    with ThreadPoolExecutor(2) as threads:
        assert [each["label"] for each in threads.map(train.__getitem__, (0, 7))] == [0, 1]
        # Of one shard that both open, one reader is kept.
        assert [each["label"] for each in threads.map(train.__getitem__, (14, 15))] == [2, 0]
    assert sorted(train._source._readers) == [0, 1, 2]


# ------------------------------------------------------------------------------- mistakes


def test_unusable_folder(folder):
    with pytest.raises(ValueError, match=naming("data.path", folder)):
        load_latents(folder)
    folder.mkdir()
    with pytest.raises(ValueError, match=naming(folder, "manifest.json")):
        load_latents(folder)
    write(folder, manifest_of(complete=False))
    with pytest.raises(ValueError, match=naming(folder)):
        load_latents(folder)
    write(folder, manifest_of(mirrored=False))
    load_latents(folder)
    with pytest.raises(ValueError, match=naming("data.flip", folder)):
        load_latents(folder, flip=True)
    name = "held_out-00001-of-00002.array_record"
    (folder / name).unlink()
    with pytest.raises(ValueError, match=naming(folder, name)):
        load_latents(folder)


@pytest.mark.parametrize("change", [{"format": 2}, {"shape": 3}, {"new": 1}, "{", "[]"])
def test_unusable_manifest(folder, change):
    write(folder, manifest_of())
    path = folder / "manifest.json"
    text = change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change)
    path.write_text(text)
    with pytest.raises(ValueError, match=naming(path)):
        load_latents(folder)


def test_damaged_shard(folder):
    """It ends with the record that cannot be read, and names its file."""
    write(folder, manifest_of())
    loaded = load_latents(folder)
    path = folder / "train-00001-of-00004.array_record"
    path.write_bytes(path.read_bytes()[:70_000])
    with pytest.raises(UnreadableError, match=naming(path)):
        loaded.train[8]
    assert loaded.train[6]["label"] == 0
    with pytest.raises(IndexError):
        loaded.train[23]


@pytest.mark.parametrize("name", ["size", "pad", "grey"])
def test_images_are_preprocessed_before(name):
    data = Data(source="latents", path="a", **{name: 1})
    with pytest.raises(ValueError, match=naming(f"data.{name}", "latents")):
        data.check()
    Data(source="latents", path="a", flip=True).check()


# ------------------------------------------------------------------------------- batches


def test_draws_are_normal():
    """Latents have the mean and the deviation of their moments, each number by itself."""
    moments = np.float32(np.random.default_rng(0).normal(size=(2, 3, 8)))
    x = np.stack([latents.draw(moments, np.random.default_rng((3, i))) for i in range(400)])
    assert (x.dtype, x.shape) == (np.float32, (400, 2, 3, 4))
    z = ((x - moments[..., :4]) / np.exp(moments[..., 4:] / 2)).reshape(400, -1)
    assert np.abs(z.mean(0)).max() < 4 / math.sqrt(400)
    assert np.abs(z.std(0) - 1).max() < 4 / math.sqrt(800)
    covariance = np.cov(z, rowvar=False)
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 4.5 / math.sqrt(400)


def test_training_draws_by_seed_and_index(folder):
    """An example has other latents in every epoch, and under every seed."""
    write(folder, manifest_of(splits={"train": 8, "held_out": 1}, fields={"angle": ANGLE}))
    train = load_latents(folder).train
    known = [train[i] for i in range(8)]
    found = {}
    for seed in (3, 4):
        stream = batch_stream(train, 8, seed, conditioning=ANGLE)
        for epoch in range(2):
            batch = next(stream)
            assert batch["x"].dtype == np.float32
            for x, index, angle in zip(
                *(batch[n] for n in ("x", "index", "condition")), strict=True
            ):
                row = next(i for i in range(8) if np.array_equal(known[i]["angle"], angle))
                drawn = latents.draw(known[row]["moments"], np.random.default_rng((seed, index)))
                assert np.array_equal(x, drawn)
                found[seed, epoch, row] = x.tobytes()
    assert len(set(found.values())) == len(found) == 32


@pytest.mark.parametrize("flip", [False, True])
def test_draws_do_not_depend_on_hosts(folder, flip):
    write(folder, manifest_of())
    train = load_latents(folder, flip=flip).train
    options = {"conditioning": Fields((LABEL, ANGLE)), "flip": flip}
    whole = batch_stream(train, 8, 5, start=2, **options)
    shares = [
        batch_stream(train, 8, 5, 2, **options, process_index=i, process_count=2) for i in range(2)
    ]
    for _ in range(2):
        batch, parts = next(whole), [next(share) for share in shares]
        assert np.array_equal(batch["x"], np.concatenate([part["x"] for part in parts]))
        assert np.array_equal(batch["index"], np.concatenate([part["index"] for part in parts]))
    other = next(batch_stream(train, 8, 6, start=3, **options))
    assert not np.isin(other["x"], batch["x"]).any()


def test_mirrors_are_drawn_half_of_the_time(folder):
    manifest = manifest_of(splits={"train": 10, "held_out": 1}, fields={})
    records = np.zeros(10, manifest.record)
    records["moments"][..., 4:] = records["mirrored"][..., 4:] = -30  # hardly any noise
    records["mirrored"][..., :4] = 1
    write(folder, manifest)
    for number in range(2):
        path = folder / manifest.name_of("train", number)
        write_shard(path, records[manifest.rows_of("train", number)])
    x = {}
    for flip in (False, True):
        stream = batch_stream(load_latents(folder, flip=flip).train, 10, 0, flip=flip)
        x[flip] = np.stack([next(stream)["x"] for _ in range(10)])
    assert np.allclose(x[False], -0.125, atol=1e-5)
    mirrored = np.isclose(x[True], 0.375, atol=1e-5)
    assert (mirrored | np.isclose(x[True], -0.125, atol=1e-5)).all()
    assert (mirrored.all((2, 3, 4)) == mirrored.any((2, 3, 4))).all()
    assert abs(mirrored.mean() - 0.5) < 4 * math.sqrt(0.25 / 100)


def test_held_out_latents_are_the_mode(folder):
    write(folder, manifest_of())
    held_out = load_latents(folder).held_out
    modes = np.stack([held_out[i]["moments"][..., :4] for i in range(8)])
    (batch,) = first_batches(held_out, 8, 1, 1, conditioning=ANGLE)
    assert np.array_equal(batch["x"], modes)
    x, condition = first_examples(held_out, 8, ANGLE)
    assert np.array_equal(x, modes)
    assert np.array_equal(condition, [held_out[i]["angle"] for i in range(8)])


# ------------------------------------------------------------------------------- configuration


def test_configuration(folder):
    """The model has the shape and the autoencoder of the latents; its images are the source's."""
    write(folder, manifest_of())
    config = Config(data=Data(source="latents", path=str(folder), conditions=("angle",)))
    config.check()
    info = model_info(config, load_data(config))
    assert (info.x_shape, info.conditioning, info.autoencoder) == (SHAPE, ANGLE, "1234")
    assert type(info).from_dict(json.loads(json.dumps(info.to_dict()))) == info
    images = image_config(config)
    expected = Data(source="npz", path="photos.npz", size=16, grey=True, conditions=("angle",))
    assert images == dataclasses.replace(config, data=expected)
    assert image_config(images) is images
