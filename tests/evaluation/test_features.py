import http.server
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

from diffjax.evaluation import features


class Examples:
    """Images with labels in random access, which are counted."""

    def __init__(self, images, labels):
        self.images, self.labels, self.reads = images, labels, 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        self.reads += 1
        return {"image": self.images[i], "label": self.labels[i]}


@pytest.fixture(scope="module")
def digits():
    """Examples to train on, and held-out ones."""
    found = load_digits()
    images = np.round(found.images * 255 / 16).astype(np.uint8)[..., None]
    halves = slice(0, 1600), slice(1600, None)
    return [Examples(images[half], found.target[half]) for half in halves]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache") / "not made yet"


@pytest.fixture(scope="module")
def cnn(digits, cache):
    return features.small_cnn(*digits, 10, cache, 0, "digits")


def test_pixels_are_features(digits):
    images = digits[0].images
    outputs = features.pixels().extract(images)
    assert outputs.probabilities is None
    np.testing.assert_allclose(outputs.features, images.reshape(1600, 64) / 255, rtol=1e-6)


# ------------------------------------------------------------------------------- small network


def test_cnn_classifies_digits(digits, cnn):
    """Its name has the accuracy on held-out images, and all that it depends on."""
    images, labels = digits[1].images, digits[1].labels
    outputs = cnn.extract(images)
    assert outputs.features.shape == (197, 64)
    np.testing.assert_allclose(outputs.probabilities.sum(1), 1, rtol=1e-5)
    accuracy = np.mean(outputs.probabilities.argmax(1) == labels)
    assert accuracy > 0.9  # chance is 0.1
    assert cnn.accuracy == accuracy
    name = rf"cnn-64 .*digits \(1,600\), seed 0, {accuracy:.1%} of 197 .*, sha256:[0-9a-f]{{8}}"
    assert re.fullmatch(name, cnn.name)


def test_features_on_any_devices_in_any_batch(digits, cnn, cache, monkeypatch):
    """The suite has eight devices; 13 images fill no batch of theirs."""
    images = digits[1].images
    everywhere = cnn.extract(images)
    some = cnn.extract(images[:13])
    devices = jax.local_devices()
    assert len(devices) == 8
    monkeypatch.setattr(jax, "local_devices", lambda: devices[:1])
    alone = features.small_cnn(*digits, 10, cache, 0, "digits")
    assert (alone.name, alone.accuracy) == (cnn.name, cnn.accuracy)
    # float32's rounding; sums are taken in another order in another batch.
    chex.assert_trees_all_close(everywhere, alone.extract(images), rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(
        features.Outputs(*(leaf[:13] for leaf in everywhere)), some, rtol=1e-4, atol=1e-5
    )


def test_cnn_is_cached(digits, tmp_path, monkeypatch):
    """It is trained again only if its file is damaged or foreign, or for other labels."""
    monkeypatch.setattr(features, "STEPS", 3)
    few = [Examples(part.images[:150, 2:6, 2:6], part.labels[:150]) for part in digits]
    train, calls = features._train, []

    def counted(*arguments):
        calls.append(arguments)
        return train(*arguments)

    monkeypatch.setattr(features, "_train", counted)

    def trained(seed):
        before = len(calls)
        features.small_cnn(*few, 10, tmp_path, seed)
        return len(calls) > before

    assert trained(1)
    [other] = tmp_path.iterdir()
    foreign = other.read_bytes()
    assert trained(0)
    [file] = set(tmp_path.iterdir()) - {other}
    whole = file.read_bytes()
    assert not trained(0)
    for damaged in (
        whole[: len(whole) // 2],
        whole[:-9] + bytes([whole[-9] ^ 64]) + whole[-8:],
        foreign,
    ):
        file.write_bytes(damaged)
        assert trained(0)
        # float32's rounding, three steps long.
        chex.assert_trees_all_close(load_file(file), load(whole), rtol=1e-4, atol=1e-6)
    assert not trained(0)
    monkeypatch.setattr(features, "MOST_HASHED", 20)
    assert trained(0)
    few[0].reads = few[1].reads = 0
    assert not trained(0)
    assert (few[0].reads, few[1].reads) == (20, 20)  # and no more than those by which it is found
    few[0].labels = (few[0].labels + 1) % 10
    assert trained(0)  # other labels


def test_cnn_reads_some_of_many(digits, tmp_path, monkeypatch):
    """Some are drawn where memory does not hold all, and the name tells their number."""
    monkeypatch.setattr(features, "STEPS", 2)
    monkeypatch.setattr(features, "MOST_READ", 90)
    few = [Examples(part.images[:150, 2:6, 2:6], part.labels[:150]) for part in digits]
    read, train = [], features._train
    monkeypatch.setattr(features, "_train", lambda *args: read.append(args[1]) or train(*args))
    name = features.small_cnn(*few, 10, tmp_path, 0).name
    assert re.search(r"\(90\), .* of 90 held out", name)
    drawn = np.sort(np.random.default_rng(0).permutation(150)[:90])
    np.testing.assert_array_equal(read[0].images, few[0].images[drawn])
    np.testing.assert_array_equal(read[0].labels, few[0].labels[drawn])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({0: lambda x: x / 255.0}, ("train.images", "float64", "[150, 8, 8, 1]", "uint8")),
        ({2: lambda x: x[:, :4]}, ("held_out.images", "4x8x1", "8x8x1")),
        ({2: lambda x: x[:0], 3: lambda y: y[:0]}, ("held_out.images", "[0]")),
        ({1: np.zeros_like}, ("train.labels", 0, 2)),
        ({1: lambda y: y / 1.0}, ("train.labels", "float64")),
        ({1: lambda y: y + 1}, ("train.labels", 1, 10, 0, 9)),
        ({3: lambda y: y - 1}, ("held_out.labels", -1, 8, 0, 9)),
    ],
)
def test_bad_images_and_labels(digits, tmp_path, change, words):
    arrays = [array[:150] for part in digits for array in (part.images, part.labels)]
    a, b, c, d = (change.get(i, lambda x: x)(array) for i, array in enumerate(arrays))
    with pytest.raises(ValueError, match=naming(*words)):
        features.small_cnn(Examples(a, b), Examples(c, d), 10, tmp_path, 0)


def test_bad_images_of_extractors(cnn):
    with pytest.raises(ValueError, match=naming("images", "float32", "uint8")):
        features.pixels().extract(np.zeros((2, 8, 8, 1), np.float32))
    with pytest.raises(ValueError, match=naming("images", "4x4x1", "8x8x1")):
        cnn.extract(np.zeros((2, 4, 4, 1), np.uint8))


# ------------------------------------------------------------------------------- Inception


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


def test_fetch_downloads_once_and_checks(site, tmp_path):
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


def test_missing_weights_have_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        features, "URL", "http://127.0.0.1:9/weights-of-2015.pth"
    )  # where nobody listens
    missing = naming(tmp_path / "diffjax" / "weights-of-2015.pth", features.URL)
    with pytest.raises(ValueError, match=missing):
        features.inception()
    with pytest.raises(ValueError, match=naming(tmp_path / "none.pth")):
        features.inception(tmp_path / "none.pth")


def test_bad_weights(tmp_path):
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


@pytest.mark.parametrize("channels", [1, 3])
def test_inception_sees_rgb(channels, bars):
    """Grey images three times, RGB images as they are; the bar counts batches."""
    seen = []

    class Mapper:
        def num_batches(self, num):
            return 2

        def __call__(self, arrays, progress):
            seen.extend(arrays)
            progress(1)
            progress(1)
            return np.zeros((5, 2)), np.ones((5, 1))

    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, channels), np.uint8)
    features._extract_by_inception(Mapper(), images)
    np.testing.assert_array_equal(seen, [np.broadcast_to(images, (5, 4, 4, 3))])
    assert bars == [(2, 2)]
