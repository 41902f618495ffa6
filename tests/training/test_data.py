import functools
import gzip
import hashlib
import http.server
import io
import sys
import tarfile
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits

from diffjax.picture import to_uint8
from diffjax.training import data


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The real builder, writing real files."""
    return data.load("digits", str(tmp_path_factory.mktemp("datasets")))


def take(stream, n):
    return [next(stream) for _ in range(n)]


def test_digits_are_those_of_scikit_learn(digits):
    assert (digits.image_shape, digits.classes) == ((8, 8, 1), 10)
    assert (len(digits.train), len(digits.held_out)) == (1500, 297)
    real = load_digits()

    def bag(images, labels):
        return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))

    for split, part in [(digits.train, slice(0, 1500)), (digits.held_out, slice(1500, None))]:
        examples = [split[i] for i in range(len(split))]
        expected = np.round(real.images[part] * 255 / 16).astype(np.uint8)
        assert bag([e["image"] for e in examples], [e["label"] for e in examples]) == bag(expected, real.target[part])


def test_an_epoch_sees_every_image_once_and_the_next_in_another_order(digits):
    epochs = [take(data.batches(digits.train, 100, seed=0, start=start), 15) for start in (0, 15)]
    seen = [np.concatenate([b["image"] for b in epoch]).reshape(1500, -1) for epoch in epochs]
    real = np.sort([digits.train[i]["image"].tobytes() for i in range(1500)])
    for images in seen:
        assert (np.sort([to_uint8(image).tobytes() for image in images]) == real).all()
    assert (seen[0] != seen[1]).any()


def test_the_stream_is_a_function_of_the_step(digits):
    whole = take(data.batches(digits.train, 64, seed=3), 30)
    later = take(data.batches(digits.train, 64, seed=3, start=25), 5)
    for a, b in zip(whole[25:], later, strict=True):
        assert all((a[k] == b[k]).all() for k in a)
    assert (np.concatenate([b["index"] for b in whole]) == np.arange(30 * 64)).all()
    other = next(data.batches(digits.train, 64, seed=4))
    assert (other["image"] != whole[0]["image"]).any()


def test_hosts_share_each_global_batch_in_order(digits):
    whole = take(data.batches(digits.train, 60, seed=3, start=2), 4)
    shares = [take(data.batches(digits.train, 60, seed=3, start=2, host=h, hosts=3), 4) for h in range(3)]
    for n, batch in enumerate(whole):
        for key, value in batch.items():
            assert (np.concatenate([share[n][key] for share in shares]) == value).all()


def test_batches_are_what_the_step_takes(digits):
    batch = next(data.batches(digits.train, 32, seed=0))
    assert {k: (v.shape, str(v.dtype)) for k, v in batch.items()} == {
        "image": ((32, 8, 8, 1), "float32"), "label": ((32,), "int32"), "index": ((32,), "uint32"),
    }  # fmt: skip
    assert (batch["image"].min(), batch["image"].max()) == (-1, 1)
    assert "label" not in next(data.batches(digits.train, 32, seed=0, labels=False))


@pytest.mark.parametrize(("batch", "multiple", "sizes"), [(64, 8, [64] * 4), (512, 8, [296]), (64, 1, [64] * 4)])
def test_held_out_batches_are_always_the_same(digits, batch, multiple, sizes):
    found = data.first_batches(digits.held_out, batch, multiple, limit=9)
    assert [len(b["image"]) for b in found] == sizes
    assert (np.concatenate([b["index"] for b in found]) == np.arange(sum(sizes))).all()


@pytest.fixture
def download_site(tmp_path):
    """A web server on the loopback, in the place of a dataset's download site: its folder and its address."""
    folder = tmp_path / "site"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def serve(monkeypatch, builder, folder, url, files):
    """Put files on the site, and tell the builder's checksums of them."""
    infos = {}
    for name, content in files.items():
        (folder / name).write_bytes(content)
        checksum = tfds.download.checksums.UrlInfo(
            size=tfds.core.utils.Size(len(content)), checksum=hashlib.sha256(content).hexdigest(), filename=name
        )
        infos[url + name] = checksum
    monkeypatch.setattr(builder, "url_infos", infos)


def test_mnist_is_downloaded_and_prepared_without_tensorflow(tmp_path, monkeypatch, download_site):
    """The catalogue's own builder, its own download and unpacking; only the address and the number of images differ."""
    from tensorflow_datasets.image_classification import mnist

    folder, url = download_site
    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28), np.uint8)
    labels = np.arange(20, dtype=np.uint8) % 10
    idx = {"images-idx3": bytes(16) + images.tobytes(), "labels-idx1": bytes(8) + labels.tobytes()}
    files = {
        f"{split}-{kind}-ubyte.gz": gzip.compress(content)
        for split in ("train", "t10k")
        for kind, content in idx.items()
    }
    serve(monkeypatch, mnist.MNIST, folder, url, files)
    monkeypatch.setattr(mnist.MNIST, "URL", url)
    monkeypatch.setattr(mnist, "_TRAIN_EXAMPLES", 20)
    monkeypatch.setattr(mnist, "_TEST_EXAMPLES", 20)

    found = data.load("mnist", str(tmp_path / "data"))
    assert (found.image_shape, found.classes, len(found.train)) == ((28, 28, 1), 10, 20)
    pairs = sorted((e["image"].tobytes(), e["label"]) for e in (found.train[i] for i in range(20)))
    assert pairs == sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))
    assert "tensorflow" not in sys.modules


def test_cifar10_too_through_an_archive(tmp_path, monkeypatch, download_site):
    from tensorflow_datasets.image_classification import cifar

    folder, url = download_site
    rows = np.random.default_rng(0).integers(0, 256, (4, 1 + 3072), np.uint8)
    rows[:, 0] = [0, 9, 5, 5]
    info = cifar.Cifar10._cifar_info.fget(SimpleNamespace(name="cifar10"))
    members = {name: rows.tobytes() for name in [*info.train_files, *info.test_files]}
    members |= {name: b"\n".join(b"class%d" % i for i in range(10)) for name in info.label_files}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(info.prefix + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    serve(monkeypatch, cifar.Cifar10, folder, url, {"cifar-10-binary.tar.gz": archive.getvalue()})
    monkeypatch.setattr(cifar.Cifar10, "_cifar_info", info._replace(url=url + "cifar-10-binary.tar.gz"))

    found = data.load("cifar10", str(tmp_path / "data"))
    assert (found.image_shape, found.classes, len(found.train), len(found.held_out)) == ((32, 32, 3), 10, 20, 4)
    expected = rows[1, 1:].reshape(3, 32, 32).transpose(1, 2, 0)
    assert any((found.held_out[i]["image"] == expected).all() and found.held_out[i]["label"] == 9 for i in range(4))


def test_a_download_that_is_not_what_it_should_be_is_named(tmp_path, monkeypatch, download_site):
    from tensorflow_datasets.image_classification import mnist

    folder, url = download_site
    names = [f"{split}-{kind}-ubyte.gz" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    serve(monkeypatch, mnist.MNIST, folder, url, dict.fromkeys(names, b"not an archive"))
    monkeypatch.setattr(mnist.MNIST, "URL", url)
    with pytest.raises(
        ValueError, match=r"'mnist' could not be prepared in .*extracting.*; where TensorFlow is installed"
    ):
        data.load("mnist", str(tmp_path / "data"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar1", "no dataset 'cifar1': did you mean 'cifar10'"),
        ("imagenet2012", "different sizes"),
        ("ag_news_subset", "has no feature 'image': choose an image dataset"),
    ],
)
def test_a_dataset_that_cannot_be_used_is_named(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        data.load(name, str(tmp_path))


def test_no_network_is_said_at_once(tmp_path, monkeypatch):
    """A port where nothing listens, in place of the download site: refused like any site that is out of reach."""
    builder = tfds.builder("cifar10", data_dir=tmp_path, file_format="array_record")
    monkeypatch.setattr(type(builder), "url_infos", {"http://127.0.0.1:9/cifar.tar.gz": None})
    with pytest.raises(
        ValueError, match=r"'cifar10' .*127.0.0.1:9.* cannot be reached, .* point --data.dir at the copy"
    ):
        data.load("cifar10", str(tmp_path))


def test_a_batch_larger_than_the_data_is_named(digits):
    with pytest.raises(ValueError, match="a batch of 1600 is more than the 1500 images"):
        data.batches(digits.train, 1600, seed=0)
