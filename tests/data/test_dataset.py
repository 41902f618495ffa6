import functools
import gzip
import hashlib
import http.server
import io
import shutil
import sys
import tarfile
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers import naming
from PIL import Image
from sklearn.datasets import load_digits

from diffjax.data import dataset


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The real builder, writing real files."""
    return dataset.load_tfds("digits", str(tmp_path_factory.mktemp("datasets")))


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

    found = dataset.load_tfds("mnist", str(tmp_path / "data"))
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

    found = dataset.load_tfds("cifar10", str(tmp_path / "data"))
    assert (found.image_shape, found.classes, len(found.train), len(found.held_out)) == ((32, 32, 3), 10, 20, 4)
    expected = rows[1, 1:].reshape(3, 32, 32).transpose(1, 2, 0)
    assert any((found.held_out[i]["image"] == expected).all() and found.held_out[i]["label"] == 9 for i in range(4))


def test_a_download_that_is_not_what_it_should_be_is_named(tmp_path, monkeypatch, download_site):
    from tensorflow_datasets.image_classification import mnist

    folder, url = download_site
    names = [f"{split}-{kind}-ubyte.gz" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    serve(monkeypatch, mnist.MNIST, folder, url, dict.fromkeys(names, b"not an archive"))
    monkeypatch.setattr(mnist.MNIST, "URL", url)
    with pytest.raises(ValueError, match=naming("mnist", tmp_path / "data", "TensorFlow")):
        dataset.load_tfds("mnist", str(tmp_path / "data"))


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("cifar1", ["cifar10"]),
        ("imagenet2012", ["size"]),
        ("ag_news_subset", ["image"]),
    ],
)
def test_a_dataset_that_cannot_be_used_is_named(tmp_path, name, names):
    with pytest.raises(ValueError, match=naming(name, *names)):
        dataset.load_tfds(name, str(tmp_path))


def test_no_network_is_said_at_once(tmp_path, monkeypatch):
    """A port where nothing listens, in place of the download site: refused like any site that is out of reach."""
    builder = tfds.builder("cifar10", data_dir=tmp_path, file_format="array_record")
    url = "http://127.0.0.1:9/cifar.tar.gz"
    monkeypatch.setattr(type(builder), "url_infos", {url: None})
    with pytest.raises(ValueError, match=naming("cifar10", url, tmp_path)):
        dataset.load_tfds("cifar10", str(tmp_path))


# ------------------------------------------------------------------------------------------- folders


def paint(path, colour, size=(12, 9), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


@pytest.fixture
def photos(tmp_path):
    """Two classes of files of several kinds and sizes; what is no image, or hidden, is none."""
    folder = tmp_path / "photos"
    for i in range(30):
        name = f"{i:02}" + (".png", ".JPG", ".webp")[i % 3]
        paint(folder / ("zebra" if i % 2 else "ant") / "deep" / name, (8 * i, 0, 255 - 8 * i), (12 + i, 9))
    (folder / "notes.txt").write_text("no image")
    (folder / ".cache").mkdir()
    return folder


def colours(split):
    return np.array([split[i]["image"][4, 4] for i in range(len(split))]).astype(int)


def test_sub_folders_are_classes_in_order_and_a_tenth_is_held_out(photos):
    found = dataset.load_folder(photos, 8)
    assert (found.image_shape, found.classes) == ((8, 8, 3), 2)
    assert (len(found.train), len(found.held_out)) == (27, 3)
    numbers = [np.round(colours(split)[:, 0] / 8).astype(int) for split in found[:2]]  # as they were coloured
    assert sorted(np.concatenate(numbers)) == [*range(30)]
    for split, its in zip(found[:2], numbers, strict=True):
        assert [split[n]["label"] for n in range(len(split))] == [i % 2 for i in its]
        assert np.abs(colours(split) - [[8 * i, 0, 255 - 8 * i] for i in its]).max() <= 4  # JPEG and WebP round
    again = dataset.load_folder(photos, 8)
    assert (colours(again.held_out) == colours(found.held_out)).all()


def test_train_and_test_are_splits_where_both_are_there(photos, tmp_path):
    photos.rename(tmp_path / "train")
    for name in ("ant", "zebra"):
        paint(tmp_path / "test" / name / "a.png", "red")
    found = dataset.load_folder(tmp_path, 8)
    assert (len(found.train), len(found.held_out), found.classes) == (30, 2, 2)
    assert colours(found.held_out).tolist() == [[255, 0, 0]] * 2


def test_without_sub_folders_there_are_no_labels(tmp_path):
    for i in range(10):
        paint(tmp_path / f"{i}.png", "white")
    found = dataset.load_folder(tmp_path, 4, grey=True)
    assert (found.image_shape, found.classes, found.train[0].keys()) == ((4, 4, 1), 0, {"image"})


def test_a_file_is_cut_turned_and_laid_over_white(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # to be turned upside down
    image = Image.new("RGBA", (16, 8), (0, 0, 255, 255))
    image.paste((255, 0, 0, 255), (4, 0, 12, 4))  # the middle: red above, then nothing
    image.paste((0, 0, 0, 0), (4, 4, 12, 8))
    for i in range(10):
        image.save(tmp_path / f"{i}.png", exif=exif)
    made = dataset.load_folder(tmp_path, 8).train[0]["image"]
    assert (made[:4] == 255).all()
    assert (made[4:] == [255, 0, 0]).all()


def test_files_are_decoded_when_they_are_asked_for_and_the_damaged_one_is_named(photos):
    bad = sorted((photos / "zebra").rglob("*.png"))[0]
    bad.write_bytes(bad.read_bytes()[:45])
    found = dataset.load_folder(photos, 8)
    names = [path for path, _ in found.train._source]
    assert found.train[names.index(bad) - 1]["image"].shape == (8, 8, 3)
    with pytest.raises(dataset.UnreadableError, match=naming(bad)):
        found.train[names.index(bad)]
    bad.unlink()
    with pytest.raises(dataset.UnreadableError, match=naming(bad)):
        found.train[names.index(bad)]


# ------------------------------------------------------------------------------------------- .npz files


@pytest.mark.parametrize(("x", "y"), [("x", "y"), ("images", "labels")])
@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1), (5, 6, 3)])
def test_an_npz_holds_images_and_labels(tmp_path, x, y, shape):
    images = np.random.default_rng(0).integers(0, 256, (20, *shape), np.uint8)
    np.savez(tmp_path / "a.npz", **{x: images, y: np.arange(20) % 3})
    found = dataset.load_npz(tmp_path / "a.npz")
    assert (found.image_shape, found.classes) == ((*shape, 1)[:3], 3)
    train, held_out = ([split[i] for i in range(len(split))] for split in found[:2])
    assert (len(train), len(held_out)) == (18, 2)
    known = {image.tobytes(): i for i, image in enumerate(images)}
    numbers = [known[e["image"].tobytes()] for e in (*train, *held_out)]
    assert sorted(numbers) == [*range(20)]
    assert [e["label"] for e in (*train, *held_out)] == [i % 3 for i in numbers]


@pytest.mark.parametrize("name", ["test", "validation", "val"])
def test_a_folder_beside_train_is_held_out(photos, name):
    (photos / "train").mkdir()
    for label in ("ant", "zebra"):
        (photos / label).rename(photos / "train" / label)
    with pytest.raises(ValueError, match=naming(photos, "train", "test", "validation", "val")):
        dataset.load_folder(photos, 8)
    shutil.copytree(photos / "train", photos / name)
    found = dataset.load_folder(photos, 8)
    assert (found.classes, len(found.train), len(found.held_out)) == (2, 30, 30)
    assert len({found.held_out[i]["label"] for i in range(8)}) == 2  # the first ones are of both classes


def test_labels_that_go_round_by_ten_are_all_in_both_splits(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((1500, 2, 2), np.uint8), y=np.arange(1500) % 10)
    found = dataset.load_npz(tmp_path / "a.npz")
    for split in found[:2]:
        assert {split[i]["label"] for i in range(len(split))} == set(range(10))


def test_what_sample_py_saves_without_labels_has_none(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((10, 4, 4, 1), np.uint8), labels=np.full(10, -1))
    found = dataset.load_npz(tmp_path / "a.npz")
    assert (found.classes, found.train[0].keys()) == (0, {"image"})


# ------------------------------------------------------------------------------------------- sizes


def test_images_are_padded_with_black_cut_and_made_grey(tmp_path):
    images = np.random.default_rng(0).integers(1, 256, (10, 28, 28, 3), np.uint8)
    np.savez(tmp_path / "a.npz", x=images)
    found = dataset.load_npz(tmp_path / "a.npz")
    padded = dataset.preprocess(found, pad=2)
    assert padded.image_shape == (32, 32, 3)
    made = padded.train[3]["image"]
    assert (made[2:30, 2:30] == images[3]).all()
    assert made.astype(int).sum() == images[3].astype(int).sum()
    small = dataset.preprocess(found, size=14, pad=1, grey=True)
    assert small.image_shape == (16, 16, 1)
    made, grey = small.train[3]["image"], images[3] @ np.array([0.299, 0.587, 0.114])
    blocks = grey.reshape(14, 2, 14, 2).mean((1, 3))
    assert np.abs(made[1:15, 1:15, 0] - blocks).max() < 1.5  # each of two roundings to 8 bits
    assert dataset.preprocess(found) is found


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
            yield i, {"image": dataset._png(np.full((9 + i, 20, 3), 10 * i, np.uint8))}


def test_a_tfds_dataset_of_many_sizes_is_given_one(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "_builder", lambda *a: Sizes(data_dir=tmp_path, file_format="array_record"))
    with pytest.raises(ValueError, match=naming("sizes", "size")):
        dataset.load_tfds("sizes")
    found = dataset.load_tfds("sizes", size=8)
    assert (found.image_shape, len(found.train), len(found.held_out)) == ((8, 8, 3), 18, 2)
    seen = [split[i]["image"] for split in found[:2] for i in range(len(split))]
    assert sorted(int(image.mean()) for image in seen) == [10 * i for i in range(20)]


# ------------------------------------------------------------------------------------------- mistakes


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
    ({"x": IMAGES, "y": np.arange(20) - 2}, ["labels", -2]),
    ({"x": IMAGES[:7]}, [7, 10]),
    ({"x": np.array([None] * 20)}, []),
]


@pytest.mark.parametrize(("content", "names"), BAD_NPZ)
def test_an_npz_that_cannot_be_used_is_named(tmp_path, content, names):
    path = tmp_path / "a.npz"
    np.savez(path, **content) if isinstance(content, dict) else content(path)
    with pytest.raises(ValueError, match=naming(path, *names)):
        dataset.load_npz(path)


BAD_FOLDERS = [
    ([], ["{folder}"]),
    (["notes.txt"], ["{folder}", "PNG", "JPEG", "WebP"]),
    (["a.png", "cats/b.png"], ["{folder}", "a.png"]),
    (["cats/notes.txt", "dogs/a.png"], ["{folder}/cats"]),
    (["a.png", "b.png", "c.png"], ["{folder}", "3", "10"]),
    (["train/cats/a.png", "train/dogs/a.png", "test/cats/a.png"], ["dogs", "{folder}/train", "{folder}/test"]),
    ([f"{i}.txt.png" for i in range(10)], ["{folder}/0.txt.png"]),
]


@pytest.mark.parametrize(("files", "names"), BAD_FOLDERS)
def test_a_folder_that_cannot_be_used_is_named(tmp_path, files, names):
    folder = tmp_path / "images"
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("no image") if ".txt" in name else paint(folder / name, "red")
    with pytest.raises(ValueError, match=naming(*(name.format(folder=folder) for name in names))):
        dataset.load_folder(folder, 8)
