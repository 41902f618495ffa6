import http.server
import importlib.util
import re
import threading
from hashlib import sha256

import chex
import jax
import numpy as np
import pytest
from helpers import naming
from safetensors.numpy import load, load_file, save_file
from sklearn.datasets import load_digits

from diffjax.evaluation import features, inception


@pytest.fixture(scope="module")
def digits():
    """Images and labels to train on, and others."""
    found = load_digits()
    images = np.round(found.images * 255 / 16).astype(np.uint8)[..., None]
    return images[:1600], found.target[:1600], images[1600:], found.target[1600:]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache") / "not made yet"


@pytest.fixture(scope="module")
def cnn(digits, cache):
    return features.small_cnn(*digits, 10, cache, 0, "digits")


def test_pixels_are_features(digits):
    found = features.pixels().extract(digits[0])
    assert found.probabilities is None
    np.testing.assert_allclose(found.features, digits[0].reshape(1600, 64) / 255, rtol=1e-6)


# ------------------------------------------------------------------------------------------- the small network


def test_the_small_network_reads_digits_and_says_how_well(digits, cnn):
    found = cnn.extract(digits[2])
    assert found.features.shape == (197, 64)
    np.testing.assert_allclose(found.probabilities.sum(1), 1, rtol=1e-5)
    right = np.mean(found.probabilities.argmax(1) == digits[3])
    assert right > 0.9  # chance is 0.1
    told = rf"cnn-64 trained on digits \(1,600\), seed 0, {100 * right:.1f}% of 197 held out, sha256:[0-9a-f]{{8}}"
    assert re.fullmatch(told, cnn.name)


def test_features_do_not_depend_on_devices_or_batches(digits, cnn, cache, monkeypatch):
    """The suite has eight devices; 13 images fill no batch of theirs."""
    everywhere = cnn.extract(digits[2])
    some = cnn.extract(digits[2][:13])
    devices = jax.local_devices()
    assert len(devices) == 8
    monkeypatch.setattr(jax, "local_devices", lambda: devices[:1])
    alone = features.small_cnn(*digits, 10, cache, 0, "digits")
    assert alone.name == cnn.name
    # float32's rounding; sums are taken in another order in another batch.
    chex.assert_trees_all_close(everywhere, alone.extract(digits[2]), rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(features.Outputs(*(leaf[:13] for leaf in everywhere)), some, rtol=1e-4, atol=1e-5)


def test_what_was_trained_is_read_again_unless_it_is_damaged_or_foreign(digits, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(features, "STEPS", 3)
    few = [part[:150, 2:6, 2:6] if part.ndim > 1 else part[:150] for part in digits]

    def trained(seed):
        """Whether it was: the bar tells."""
        features.small_cnn(*few, 10, tmp_path, seed)
        return "3/3" in capfd.readouterr().err

    assert trained(1)
    [other] = tmp_path.iterdir()
    foreign = other.read_bytes()
    assert trained(0)
    [file] = set(tmp_path.iterdir()) - {other}
    whole = file.read_bytes()
    assert not trained(0)
    for damaged in (whole[: len(whole) // 2], whole[:-9] + bytes([whole[-9] ^ 64]) + whole[-8:], foreign):
        file.write_bytes(damaged)
        assert trained(0)
        # float32's rounding, three steps long.
        chex.assert_trees_all_close(load_file(file), load(whole), rtol=1e-4, atol=1e-6)
    assert not trained(0)
    few[1] = (few[1] + 1) % 10
    assert trained(0)  # other labels


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({0: lambda x: x / 255.0}, "images float64 [150, 8, 8, 1] uint8"),
        ({2: lambda x: x[:, :4]}, "images 4x8x1 8x8x1"),
        ({2: lambda x: x[:0], 3: lambda y: y[:0]}, "images [0, 8, 8, 1]"),
        ({1: lambda y: y[:-1]}, "labels 150 149"),
        ({1: lambda y: y + 1}, "labels 1 10 0 9"),
        ({3: lambda y: y - 1}, "labels -1 8 0 9"),
    ],
)
def test_bad_images_and_labels_are_told_in_a_sentence(digits, tmp_path, change, words):
    parts = [change.get(i, lambda x: x)(part[:150]) for i, part in enumerate(digits)]
    with pytest.raises(ValueError, match=naming(*words.split())):
        features.small_cnn(*parts, 10, tmp_path, 0)


# ------------------------------------------------------------------------------------------- Inception's weights


@pytest.fixture
def site(tmp_path):
    """A server of files in tmp_path/site: (its address, the folder)."""
    folder = tmp_path / "site"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", folder
        server.shutdown()


def test_weights_are_downloaded_once_and_checked(site, tmp_path):
    address, folder = site
    right, path = b"x" * 3_000_000, tmp_path / "cache" / "weights.pth"
    url, digest = f"{address}/weights.pth", sha256(right).hexdigest()
    with pytest.raises(ValueError, match=naming(path, url, "404")):
        features.fetch(url, digest, path)
    (folder / "weights.pth").write_bytes(b"something else")
    with pytest.raises(ValueError, match=naming(url, digest)):
        features.fetch(url, digest, path)
    assert not list(path.parent.iterdir())  # nothing half done
    path.write_bytes(b"damaged")
    (folder / "weights.pth").write_bytes(right)
    features.fetch(url, digest, path)
    assert path.read_bytes() == right
    (folder / "weights.pth").unlink()
    features.fetch(url, digest, path)
    assert [each.name for each in path.parent.iterdir()] == ["weights.pth"]


def test_without_network_or_weights_a_sentence_says_where_to_put_them(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(features, "URL", "http://127.0.0.1:9/weights-of-2015.pth")  # where nobody listens
    place = tmp_path / "diffjax" / "weights-of-2015"
    torch = importlib.util.find_spec("torch") is not None
    missing = naming(f"{place}.pth", features.URL) if torch else naming(f"{place}.safetensors", "torch")
    with pytest.raises(ValueError, match=missing):
        features.inception()
    with pytest.raises(ValueError, match=naming(tmp_path / "none.pth")):
        features.inception(tmp_path / "none.pth")


def test_weights_that_are_none_are_told(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match=naming(path)):
        features.inception(path)
    save_file({"conv1.weight": np.zeros((3, 3))}, path)
    with pytest.raises(ValueError, match=naming(path, "Conv2d_1a_3x3.bn.weight")):
        features.inception(path)
    save_file({"Conv2d_1a_3x3.bn.weight": np.zeros(31)}, path)
    with pytest.raises(ValueError, match=naming(path, "Conv2d_1a_3x3.bn.weight", "[31]", "[32]")):
        features.inception(path)
    other = tmp_path / "weights.pth"
    other.write_bytes(b"no weights")
    with pytest.raises(ValueError, match=naming(other)):
        features.inception(other)


def test_inception_resizes_from_the_corner():
    """A line stays a line, up to the last pixel, which is repeated; 299 pixels stay as they are."""
    line = np.arange(13, dtype=np.float32)[None, :, None, None] * 10 + np.zeros((1, 13, 7, 1), np.float32)
    found = np.asarray(inception.resize(line))
    expected = np.minimum(np.arange(299) * 13 / 299, 12) * 10
    np.testing.assert_allclose(found[0, :, :, 0], np.broadcast_to(expected[:, None], (299, 299)), rtol=1e-5, atol=1e-4)
    whole = np.random.default_rng(0).uniform(size=(1, 299, 299, 2)).astype(np.float32)
    np.testing.assert_array_equal(inception.resize(whole), whole)
