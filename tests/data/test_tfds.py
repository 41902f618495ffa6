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
from helpers import naming
from sklearn.datasets import load_digits

from diffjax.build import describe_model, load_data, model_info
from diffjax.config import Config, Data
from diffjax.data.dataset import label_fields
from diffjax.data.tfds import describe_tfds, encode_png, load_tfds


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The real builder, writing real files."""
    return load_tfds("digits", str(tmp_path_factory.mktemp("datasets")))


def test_digits(digits):
    assert (digits.image_shape, digits.fields) == ((8, 8, 1), label_fields(10))
    assert (len(digits.train), len(digits.held_out)) == (1500, 297)
    real = load_digits()

    def bag(images, labels):
        return sorted(
            (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
        )

    for split, part in [(digits.train, slice(0, 1500)), (digits.held_out, slice(1500, None))]:
        examples = [split[i] for i in range(len(split))]
        expected = np.round(real.images[part] * 255 / 16).astype(np.uint8)
        assert bag([e["image"] for e in examples], [e["label"] for e in examples]) == bag(
            expected, real.target[part]
        )


@pytest.fixture
def download_site(tmp_path):
    """A web server on the loopback for the download site: its folder and its address."""
    folder = tmp_path / "site"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def serve(monkeypatch, builder, folder, url, files):
    """Put files on the site, and their checksums into the builder."""
    infos = {}
    for name, content in files.items():
        (folder / name).write_bytes(content)
        checksum = tfds.download.checksums.UrlInfo(
            size=tfds.core.utils.Size(len(content)),
            checksum=hashlib.sha256(content).hexdigest(),
            filename=name,
        )
        infos[url + name] = checksum
    monkeypatch.setattr(builder, "url_infos", infos)


def test_mnist_without_tensorflow(tmp_path, monkeypatch, download_site):
    """The catalogue's builder, download and unpacking; only address and number of images differ."""
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

    loaded = load_tfds("mnist", str(tmp_path / "data"))
    assert (loaded.image_shape, loaded.classes, len(loaded.train)) == ((28, 28, 1), 10, 20)
    pairs = sorted((e["image"].tobytes(), e["label"]) for e in (loaded.train[i] for i in range(20)))
    assert pairs == sorted(
        (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    )
    assert "tensorflow" not in sys.modules


def test_cifar10_archive(tmp_path, monkeypatch, download_site):
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
    monkeypatch.setattr(
        cifar.Cifar10, "_cifar_info", info._replace(url=url + "cifar-10-binary.tar.gz")
    )

    loaded = load_tfds("cifar10", str(tmp_path / "data"))
    assert (loaded.image_shape, loaded.classes, len(loaded.train), len(loaded.held_out)) == (
        (32, 32, 3),
        10,
        20,
        4,
    )
    # The archive has the names.
    assert loaded.fields == label_fields(10, [f"class{i}" for i in range(10)])
    assert describe_tfds("cifar10", str(tmp_path / "data"))[1] == loaded.fields
    expected = rows[1, 1:].reshape(3, 32, 32).transpose(1, 2, 0)
    assert any(
        (loaded.held_out[i]["image"] == expected).all() and loaded.held_out[i]["label"] == 9
        for i in range(4)
    )


def test_damaged_download(tmp_path, monkeypatch, download_site):
    from tensorflow_datasets.image_classification import mnist

    folder, url = download_site
    names = [
        f"{split}-{kind}-ubyte.gz"
        for split in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    ]
    serve(monkeypatch, mnist.MNIST, folder, url, dict.fromkeys(names, b"not an archive"))
    monkeypatch.setattr(mnist.MNIST, "URL", url)
    with pytest.raises(ValueError, match=naming("mnist", tmp_path / "data", "TensorFlow")):
        load_tfds("mnist", str(tmp_path / "data"))


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("cifar1", ["cifar10"]),
        ("imagenet2012", ["size"]),
        ("ag_news_subset", ["image"]),
    ],
)
def test_unusable_dataset(tmp_path, name, names):
    with pytest.raises(ValueError, match=naming(name, *names)):
        load_tfds(name, str(tmp_path))


def test_unreachable_site(tmp_path, monkeypatch):
    """A port where nothing listens refuses like a download site that is out of reach."""
    builder = tfds.builder("cifar10", data_dir=tmp_path, file_format="array_record")
    url = "http://127.0.0.1:9/cifar.tar.gz"
    monkeypatch.setattr(type(builder), "url_infos", {url: None})
    with pytest.raises(ValueError, match=naming("cifar10", url, tmp_path)):
        load_tfds("cifar10", str(tmp_path))


class Sizes(tfds.core.GeneratorBasedBuilder):
    """Twenty images of twenty sizes."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"image": tfds.features.Image()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(20):
            yield i, {"image": encode_png(np.full((9 + i, 20, 3), 10 * i, np.uint8))}


def test_images_of_many_sizes(tmp_path, monkeypatch):
    sizes = Sizes(data_dir=tmp_path, file_format="array_record")
    monkeypatch.setattr("diffjax.data.tfds._builder", lambda *a: sizes)
    with pytest.raises(ValueError, match=naming("sizes", "size")):
        load_tfds("sizes")
    loaded = load_tfds("sizes", size=8)
    assert (loaded.image_shape, len(loaded.train), len(loaded.held_out)) == ((8, 8, 3), 18, 2)
    seen = [split[i]["image"] for split in loaded[:2] for i in range(len(split))]
    assert sorted(int(image.mean()) for image in seen) == [10 * i for i in range(20)]


def test_description_without_download(data_dir):
    """It is that of the data set which training reads."""
    data = Data(dir=str(data_dir), pad=3, size=16)
    described = describe_model(Config(data=data))
    assert described == model_info(Config(data=data), load_data(Config(data=data)))
    assert described.x_shape == (22, 22, 1)


def test_data_of_an_imported_network():
    config = Config(data=Data(name="hf:someone-digits"))
    assert not config.data.known
    for function in (load_data, describe_model):
        with pytest.raises(ValueError, match=naming("data.name", "hf:someone-digits")):
            function(config)
