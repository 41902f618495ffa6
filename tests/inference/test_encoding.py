"""Images encoded to shards of moments, which are those of the autoencoder, image by image."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import ROOT, naming

from diffjax.build import load_data
from diffjax.config import Config, Data
from diffjax.data.dataset import MappedSource
from diffjax.data.image_io import to_float
from diffjax.data.latents import Shards, load_latents, read_manifest
from diffjax.inference import encoding
from diffjax.inference.autoencoder import load_autoencoder
from diffjax.inference.encoding import EncodeOptions, open_encoding
from diffjax.nn.conditioning import ClassLabel, Vector
from tests.latents import SHAPE, TINY, params_of, write_autoencoder, write_images

OPTIONS = EncodeOptions(batch=8, mirror=True, shard=20)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images.npz")


@pytest.fixture(scope="module")
def autoencoder(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "autoencoder"
    return load_autoencoder(write_autoencoder(folder, images))


def encode(autoencoder, images, folder, options=OPTIONS, progress=lambda images: None):
    config = Config(data=Data(source="npz", path=str(images)))
    return open_encoding(autoencoder, config, load_data(config), folder, options).run(progress)


def manifest_of(autoencoder, images):
    """The manifest before anything is encoded."""
    config = Config(data=Data(source="npz", path=str(images)))
    folder = images.with_name("none")
    return open_encoding(autoencoder, config, load_data(config), folder, OPTIONS).manifest


@pytest.fixture(scope="module")
def encoded(autoencoder, images, tmp_path_factory):
    """The folder of the encoded images, its manifest, and the progress that was told."""
    folder, told = tmp_path_factory.mktemp("data") / "latents", []
    return folder, encode(autoencoder, images, folder, progress=told.append), told


@pytest.fixture(scope="module")
def moments():
    """The moments of one image, by the module itself."""
    from diffjax.nn.autoencoder import AutoencoderConfig

    module, params = AutoencoderConfig(**TINY).build(SHAPE), params_of(0)
    apply = jax.jit(lambda x: module.apply({"params": params}, x, method="encode"))
    return lambda image: np.asarray(apply(to_float(image)[None]))[0]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.array_record")}


# ------------------------------------------------------------------------------- what is written


def test_moments_of_every_image_and_its_mirror(encoded, images, moments):
    """In the order of the splits, with all fields, over the ends of batches and shards."""
    folder, manifest, told = encoded
    dataset = load_data(Config(data=Data(source="npz", path=str(images))))
    assert (manifest.shape, manifest.images) == ((4, 4, 2), SHAPE)
    assert manifest.fields == {
        "label": ClassLabel(4, names=("0", "1", "2", "3")),
        "pose": Vector(2, "pose"),
    }
    assert [manifest.shards(split) for split in manifest.splits] == [3, 1]
    assert sum(told) == 60
    for name, split in (("train", dataset.train), ("held_out", dataset.held_out)):
        records = Shards(folder, manifest, name)
        assert len(records) == len(split) > 3
        for i in range(len(split)):
            example, record = split[i], records[i]
            image = example["image"]
            assert np.allclose(record["moments"], moments(image), atol=1e-5)
            assert np.allclose(record["mirrored"], moments(image[:, ::-1]), atol=1e-5)
            assert record["label"] == example["label"]
            assert np.array_equal(record["pose"], example["pose"])


def test_latents_have_unit_variance(encoded, autoencoder):
    """The scaling is one over the deviation of drawn latents, and the copy of the autoencoder's."""
    folder, manifest, _ = encoded
    train = load_latents(folder).train
    x = np.stack([train[i]["moments"] for i in range(len(train))]).astype(np.float64)
    mean, variance = x[..., :2], np.exp(x[..., 2:])
    assert np.isclose(mean.var() + variance.mean(), 1, rtol=1e-5)
    copy = load_autoencoder(folder / "autoencoder")
    assert (copy.config.scaling, copy.config.shift) == (manifest.scaling, 0)
    assert copy.checksum == autoencoder.checksum == manifest.autoencoder
    stored = json.loads((folder / "autoencoder" / "config.json").read_text())
    assert stored["scaling_factor"] == manifest.scaling != 1


def test_own_scaling_is_kept(autoencoder, images, tmp_path):
    scaled = autoencoder._replace(
        config=dataclasses.replace(autoencoder.config, scaling=0.3, shift=0.2)
    )
    manifest = encode(scaled, images, tmp_path / "a")
    assert (manifest.scaling, manifest.shift) == (0.3, 0.2)
    encode(scaled, images, tmp_path / "a")
    other = scaled._replace(config=dataclasses.replace(scaled.config, scaling=0.4))
    with pytest.raises(ValueError, match=naming("scaling", 0.3, 0.4)):
        encode(other, images, tmp_path / "a")


def test_half_precision(encoded, autoencoder, images, tmp_path):
    """Moments are rounded to 11 bits, and take half of the space."""
    folder, manifest, _ = encoded
    half = encode(
        autoencoder, images, tmp_path / "a", dataclasses.replace(OPTIONS, dtype="float16")
    )
    found, expected = Shards(tmp_path / "a", half, "train"), Shards(folder, manifest, "train")
    assert found[3]["moments"].dtype == np.float16
    for i in range(9):
        error = np.abs(np.float32(found[i]["moments"]) - expected[i]["moments"])
        assert (error <= 2.0**-11 * np.abs(expected[i]["moments"]) + 1e-6).all()
        assert found[i]["label"] == expected[i]["label"]


# ------------------------------------------------------------------------------- interrupted

KILLED = """
import os, signal, sys
sys.path.insert(0, "tests")
from pathlib import Path
from tests.inference.test_encoding import encode, load_autoencoder
done = 0
def progress(images):
    global done
    done += images
    if done > 25:
        os.kill(os.getpid(), signal.SIGKILL)
encode(load_autoencoder({autoencoder!r}), Path({images!r}), Path({folder!r}), progress=progress)
"""


@pytest.mark.slow
def test_killed_in_the_middle(encoded, autoencoder, images, tmp_path):
    """It goes on with the shard that was not whole, and the files are those of one run."""
    folder = tmp_path / "a"
    program = KILLED.format(autoencoder=autoencoder.source, images=str(images), folder=str(folder))
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not read_manifest(folder).complete
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.array_record")}
    assert [path.name for path in before] == ["train-00000-of-00003.array_record"]
    told = []
    manifest = encode(autoencoder, images, folder, progress=told.append)
    assert sum(told) == 40
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert manifest == encoded[1]
    _check_equal(folder, encoded[0], manifest)
    assert not list(folder.glob("*.part"))


def _check_equal(folder, other, manifest):
    for split in manifest.splits:
        pairs = zip(Shards(folder, manifest, split), Shards(other, manifest, split), strict=True)
        assert all(a.tobytes() == b.tobytes() for a, b in pairs)


def test_nothing_is_encoded_twice(encoded, autoencoder, images):
    """A whole folder stays as it is; a shard that was removed comes again."""
    folder, manifest, _ = encoded
    before, told = content(folder), []
    assert encode(autoencoder, images, folder, progress=told.append) == manifest
    assert told == []
    (folder / manifest.name_of("train", 1)).unlink()
    assert encode(autoencoder, images, folder, progress=told.append) == manifest
    assert sum(told) == 20
    assert content(folder) == before


def test_processes_share_the_shards(encoded, autoencoder, images, tmp_path, monkeypatch):
    """Each encodes its own, and process 0 ends it: the files are those of one process."""
    folder, manifest, _ = encoded
    monkeypatch.setattr(encoding, "_wait", lambda name: None)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    manifest_of(autoencoder, images).write(tmp_path)  # process 0 has begun
    images_of = {}
    for index in (1, 2, 0):  # process 0 waits for the others before it ends
        told = []
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        found = encode(autoencoder, images, tmp_path, progress=told.append)
        assert found.complete == (index == 0)
        images_of[index] = sum(told)
    assert found == manifest
    held_out = manifest.splits["held_out"]
    assert images_of == {1: 20, 2: 20 - held_out, 0: 20 + held_out}
    assert content(tmp_path) == content(folder)


def test_folder_is_partial_while_another_process_encodes(
    encoded, autoencoder, images, tmp_path, monkeypatch
):
    """Process 0 says so also where it has nothing to encode itself."""
    folder, manifest, _ = encoded
    shutil.copytree(folder, tmp_path / "a")
    name, seen = manifest.name_of("train", 1), []  # of process 1
    (tmp_path / "a" / name).unlink()

    def wait(_):
        seen.append(read_manifest(tmp_path / "a").complete)
        if len(seen) == 3:  # process 1 has encoded it
            shutil.copy(folder / name, tmp_path / "a")

    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(encoding, "_wait", wait)
    assert encode(autoencoder, images, tmp_path / "a") == manifest
    assert seen == [True, False, False, True]  # open, begin, shards, end


def test_two_batches_are_read_ahead(autoencoder, images, tmp_path, monkeypatch):
    found, options = [], encoding.grain.ReadOptions
    monkeypatch.setattr(
        encoding.grain, "ReadOptions", lambda **given: (found.append(given), options(**given))[1]
    )
    encode(autoencoder, images, tmp_path / "a", EncodeOptions(batch=24))
    assert {given["prefetch_buffer_size"] for given in found} == {48}


# ------------------------------------------------------------------------------- mistakes


def test_what_diffusers_does_not_have_is_refused_first(autoencoder, images, tmp_path):
    """Not after all images are encoded."""
    other = autoencoder._replace(config=dataclasses.replace(autoencoder.config, norm_epsilon=1e-5))
    with pytest.raises(ValueError, match=naming("norm_epsilon", 1e-05)):
        encode(other, images, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_other_latents_are_refused(encoded, autoencoder, images, tmp_path):
    """A folder keeps what it has: of one autoencoder, data, and way of encoding."""
    folder, _, _ = encoded
    before = content(folder)
    other = load_autoencoder(write_autoencoder(tmp_path / "other", images, seed=1))
    with pytest.raises(ValueError, match=naming(folder, "autoencoder", other.checksum)):
        encode(other, images, folder)
    changed = tmp_path / "images.npz"
    write_images(changed, seed=1)
    with pytest.raises(ValueError, match=naming(folder)):
        encode(autoencoder, changed, folder)
    config = Config(data=Data(source="npz", path=str(images)))
    dataset = load_data(config)
    negative = MappedSource(dataset.train, lambda e: {**e, "image": 255 - e["image"]})
    with pytest.raises(ValueError, match=naming(folder, "digest")):
        open_encoding(autoencoder, config, dataset._replace(train=negative), folder, OPTIONS)
    for name, value in (("mirror", False), ("dtype", "float16"), ("shard", 30)):
        options = dataclasses.replace(OPTIONS, **{name: value})
        with pytest.raises(ValueError, match=naming(folder, value)):
            encode(autoencoder, images, folder, options)
    assert content(folder) == before


def test_unusable_folders_and_images(autoencoder, images, tmp_path):
    (tmp_path / "file").write_text("a")
    with pytest.raises(ValueError, match=naming("out", tmp_path / "file")):
        encode(autoencoder, images, tmp_path / "file")
    with pytest.raises(ValueError, match=naming("out", tmp_path)):
        encode(autoencoder, images, tmp_path)
    for shape, words in (((12, 8, 8, 3), (1, 3, "data.grey")), ((12, 9, 8), ("9x8", 2))):
        np.savez(tmp_path / "b.npz", x=np.zeros(shape, np.uint8))
        with pytest.raises(ValueError, match=naming(*words)):
            encode(autoencoder, tmp_path / "b.npz", tmp_path / "c")
    assert not (tmp_path / "c").exists()
