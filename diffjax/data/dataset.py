"""Labelled images in random access: from tensorflow-datasets (without TensorFlow), a folder of files, or one .npz file.

Each gives the same thing, a `Dataset`. Nothing is decoded before it is asked for.
"""

import contextlib
import difflib
import glob
import importlib.util
import io
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import requests
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.utils import lazy_imports_utils

from diffjax.data import image_io

NETWORK_SECONDS = 5.0  # how long a download site may take to answer before it counts as out of reach
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # of the files of a folder that are images
NAMES = (("x", "images"), ("y", "labels"))  # of the arrays of an .npz file
HOLDOUT_DIVISOR = 10  # where a source has no split of its own to hold out, a tenth of its examples is
HELD_OUT = ("test", "validation", "val")  # beside "train"


class UnreadableError(ValueError):
    """An example that cannot be read, met only when it is its turn."""


class Dataset(NamedTuple):
    """Two splits in random access, len() and [i] -> {"image": uint8 [H, W, C], "label": int, ...}."""

    train: Any
    held_out: Any
    image_shape: tuple[int, int, int]
    classes: int  # 0 where the images carry no label


class MappedSource:
    """What a source has in random access, each through a function when it is asked for."""

    def __init__(self, source: Any, then: Callable[[Any], Any]) -> None:
        """Nothing is read."""
        self._source, self._then = source, then

    def __len__(self) -> int:
        """How many there are."""
        return len(self._source)

    def __getitem__(self, i: Any) -> Any:
        """Number i."""
        return self._then(self._source[int(i)])


class Digits(tfds.core.GeneratorBasedBuilder):
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels (UCI Optical Recognition of Handwritten Digits); ships
    with scikit-learn, so nothing is downloaded. Its grey values 0..16 become round(value*255/16).
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(8, 8, 1)),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples(0, 1500), "test": self._generate_examples(1500, 1797)}

    def _generate_examples(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        for i in range(start, stop):
            image = np.round(digits.images[i] * 255 / 16).astype(np.uint8)
            yield i, {"image": _png(image[..., None]), "label": int(digits.target[i])}


def load_tfds(name: str, data_dir: str | None = None, size: int | None = None) -> Dataset:
    """An image dataset of the tensorflow-datasets catalogue (or "digits"), downloaded and prepared if need be.

    data_dir: None for tensorflow-datasets' own folder, ~/tensorflow_datasets or TFDS_DATA_DIR; size: as of `preprocess`,
    for images of different sizes. Held out is the split "test", else "validation", else the last tenth of "train".

    ValueError, at once and in one sentence: an unknown name, a dataset whose download cannot be reached, or one
    without images, or without one size for them.
    """
    builder, shape, classes = _described(name, data_dir, size)
    if not builder.is_prepared():
        _prepare(builder)
    splits = builder.info.splits
    held_out = next((split for split in ("test", "validation") if split in splits), None)
    train, held_out = ("train", held_out) if held_out else ("train[:90%]", "train[90%:]")
    found = Dataset(builder.as_data_source(train), builder.as_data_source(held_out), shape, classes)
    return found if size is None else preprocess(found, size)


def describe_tfds(name: str, data_dir: str | None = None, size: int | None = None) -> tuple[tuple[int, int, int], int]:
    """The image shape and the number of classes of what `load_tfds` would load; nothing is prepared. ValueError as
    there.
    """
    _, shape, classes = _described(name, data_dir, size)
    return (size or shape[0], size or shape[1], shape[2]), classes


def _described(name: str, data_dir: str | None, size: int | None) -> tuple[Any, tuple[Any, Any, int], int]:
    builder = _builder(name, data_dir)
    features: Any = builder.info.features
    if not isinstance(features, tfds.features.FeaturesDict) or "image" not in features:
        raise ValueError(f"dataset {name!r} has no feature 'image': choose an image dataset")
    shape = tuple(features["image"].shape)
    if None in shape and size is None:
        raise ValueError(f"dataset {name!r} has images of different sizes ({shape}): give one to all with --data.size")
    if len(shape) != 3 or shape[2] not in (1, 3) or features["image"].np_dtype != np.uint8:
        raise ValueError(f"dataset {name!r} has images of {shape}: choose one of 8 bits, grey or RGB")
    label: Any = features["label"] if "label" in features else None  # noqa: SIM401 (it has no get)
    classes = (label.num_classes or 0) if isinstance(label, tfds.features.ClassLabel) else 0
    return builder, shape, classes


def load_folder(path: Path, size: int, *, grey: bool = False) -> Dataset:
    """PNG, JPEG and WebP files, each turned as its camera says, laid over white where transparent, cut to its middle
    and resized to size x size, RGB or grey. A sub-folder, with all that is in it, is a class, in alphabetical order;
    without sub-folders there are no labels. Held out is the folder "test", "validation" or "val" where one stands
    beside "train", else a tenth of the files, drawn by chance but always the same.

    ValueError for a folder without images, images beside sub-folders, or classes that differ between the two; and
    `UnreadableError`, when it is its turn, for a file that is no image.
    """
    if not path.is_dir():
        raise ValueError(f"there is no folder of images {path}: name one with --data.path")
    shape = (size, size, 1 if grey else 3)
    if (path / "train").is_dir():
        parts = [path / name for name in ("train", *HELD_OUT) if (path / name).is_dir()]
        folders = (entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        beside = sorted(entry.name for entry in folders if entry not in parts)
        if len(parts) != 2 or beside:
            raise ValueError(
                f"{path} holds the folders {', '.join([*(part.name for part in parts), *beside])}: beside train put"
                f" one of {', '.join(HELD_OUT)}, and nothing else"
            )
        (classes, train), (others, held_out) = map(_files, parts)
        if classes != others:
            odd = sorted(set(classes) ^ set(others))[0]
            raise ValueError(f"class {odd!r} is in one of {parts[0]} and {parts[1]} alone: give both the same classes")
        held_out = [held_out[i] for i in _order(len(held_out))]  # the first are what is seen, of every class
    else:
        classes, files = _files(path)
        train, held_out = _train_holdout_split(files, path)
    decode = _decoder(shape)
    found = Dataset(MappedSource(train, then=decode), MappedSource(held_out, then=decode), shape, len(classes))
    for split in found[:2]:
        split[0]  # a folder of something else is better told now
    return found


def load_npz(path: Path) -> Dataset:
    """One .npz file: x, uint8 [N, H, W] or [N, H, W, C], and y, whole numbers [N] from 0, if the images are labelled;
    or `images` and `labels`, as sample.py writes them. Held out is a tenth of them, drawn by chance but
    always the same. ValueError for another file.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}: name an .npz file of images with --data.path")
    try:
        with np.load(path, allow_pickle=False) as file:
            x, y = (next((file[name] for name in names if name in file), None) for names in NAMES)
            held = ", ".join(file)
    except (ValueError, TypeError, AttributeError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path} cannot be read as an .npz file ({error}): it is damaged, or something else"
        ) from error
    if x is None:
        raise ValueError(f"{path} holds {held or 'nothing'}: name its images x (or images), and their labels y")
    x = x[..., None] if x.ndim == 3 else x
    if x.ndim != 4 or x.shape[-1] not in (1, 3) or x.dtype != np.uint8:
        raise ValueError(f"the images of {path} are {x.dtype} {x.shape}: use uint8 [N, H, W] or [N, H, W, 1 or 3]")
    if y is not None and (y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer)):
        raise ValueError(f"the labels of {path} are {y.dtype} {y.shape}: use {len(x)} whole numbers, one per image")
    if y is not None and len(y) and (y < 0).all():  # sample.py's way to say that there are none
        y = None
    if y is not None and (y < 0).any():
        raise ValueError(f"the labels of {path} begin at {y.min()}: count classes from 0")

    def example(i: int) -> dict[str, Any]:
        return {"image": x[i]} | ({} if y is None else {"label": int(y[i])})

    train, held_out = (MappedSource(rows, then=example) for rows in _train_holdout_split(range(len(x)), path))
    return Dataset(train, held_out, x.shape[1:], 0 if y is None else int(y.max()) + 1)


def preprocess(dataset: Dataset, size: int | None = None, pad: int = 0, *, grey: bool = False) -> Dataset:
    """Images cut to their middle and resized to size x size, made grey, and then surrounded by `pad` black pixels on
    every side: whichever is asked for, when they are read.
    """
    shape = preprocessed_shape(dataset.image_shape, size, grey=grey)

    def fit(example: dict[str, Any]) -> dict[str, Any]:
        image = example["image"]
        if image.shape != shape:
            image, _ = image_io.fit(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image), shape)
        return {**example, "image": np.pad(image, ((pad, pad), (pad, pad), (0, 0)))}

    padded = preprocessed_shape(dataset.image_shape, size, pad, grey=grey)
    if padded == dataset.image_shape:
        return dataset
    return Dataset(
        MappedSource(dataset.train, then=fit), MappedSource(dataset.held_out, then=fit), padded, dataset.classes
    )


def preprocessed_shape(
    shape: tuple[int, int, int], size: int | None = None, pad: int = 0, *, grey: bool = False
) -> tuple[int, int, int]:
    """The shape [H, W, C] of images that were [H, W, C], after `preprocess`."""
    height, width, channels = shape
    return (size or height) + 2 * pad, (size or width) + 2 * pad, 1 if grey else channels


def _files(folder: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    """The classes of a folder, none if it has no sub-folders, and its images in order, each with its label or -1."""
    inside = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    beside = [entry for entry in inside if entry.is_file() and entry.suffix.lower() in SUFFIXES]
    folders = [entry for entry in inside if entry.is_dir()]
    if folders and beside:
        raise ValueError(f"{folder} holds {beside[0].name} beside sub-folders: put every image into one, or none")
    if not folders and not beside:
        raise ValueError(
            f"{folder} holds no images: put PNG, JPEG or WebP files into it, or into a sub-folder per class"
        )
    files = [(file, -1) for file in beside]
    for label, entry in enumerate(folders):
        images = sorted(
            file
            for file in entry.rglob("*")
            if file.suffix.lower() in SUFFIXES
            and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(entry).parts)
        )
        if not images:
            raise ValueError(f"{entry} holds no images, and a sub-folder is a class: fill it, or remove it")
        files += [(file, label) for file in images]
    return [entry.name for entry in folders], files


def _decoder(shape: tuple[int, int, int]) -> Callable[[tuple[Path, int]], dict[str, Any]]:
    def decode(file: tuple[Path, int]) -> dict[str, Any]:
        path, label = file
        try:
            image, _ = image_io.read(path, shape)
        except OSError as error:  # about the file: gone, or not ours to read
            raise UnreadableError(
                f"{path} cannot be read ({error.strerror}): the data changed, or are not yours"
            ) from error
        except ValueError as error:
            raise UnreadableError(f"{error}, or remove it") from error
        return {"image": image} | ({} if label < 0 else {"label": label})

    return decode


def _train_holdout_split(rows: Sequence[Any], path: Path) -> tuple[list[Any], list[Any]]:
    """By chance, not every tenth: labels that go round by ten would all be the same. What is held out is in no order,
    since the first of it are what is looked at.
    """
    if len(rows) < HOLDOUT_DIVISOR:
        raise ValueError(
            f"{path} holds {len(rows)} images, of which a tenth is held out: use {HOLDOUT_DIVISOR} or more"
        )
    order = _order(len(rows))
    number = len(rows) // HOLDOUT_DIVISOR
    return [rows[i] for i in sorted(order[number:])], [rows[i] for i in order[:number]]


def _order(number: int) -> list[int]:
    return np.random.default_rng(0).permutation(number).tolist()


def _builder(name: str, data_dir: str | None) -> Any:
    if name.startswith("hf:"):
        raise ValueError(f"what {name} was trained on is not told: name it by 'diffjax convert {name} RUN --data'")
    if name == "digits":
        return Digits(data_dir=data_dir, file_format="array_record")
    try:
        return tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        near = difflib.get_close_matches(name, ["digits", *tfds.list_builders(with_community_datasets=False)], n=1)
        hint = f": did you mean {near[0]!r}?" if near else ": see https://www.tensorflow.org/datasets/catalog"
        raise ValueError(f"tensorflow-datasets has no dataset {name!r}{hint}") from None
    except (AssertionError, ImportError) as error:  # a version that is not there, a community dataset
        raise ValueError(f"dataset {name!r} cannot be used: {str(error).strip().splitlines()[0]}") from error
    except ValueError as error:  # whose reason is a page long
        raise ValueError(
            f"{name!r} is no name of a dataset: name one of the catalogue, or read files by --data.source folder or npz"
        ) from error


def _prepare(builder: Any) -> None:
    where = f"and is not prepared in {builder.data_dir}"
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        raise ValueError(
            f"dataset {builder.name!r} has to be downloaded by hand {where}: run 'tfds build {builder.name}'"
        )
    # tensorflow-datasets would retry for minutes where there is no network; any answer will do here.
    url = next(iter(builder.url_infos or ()), None)
    if url is not None:
        try:
            requests.head(url, timeout=NETWORK_SECONDS)
        except requests.RequestException:
            raise ValueError(
                f"dataset {builder.name!r} would be downloaded from {url}, which cannot be reached, {where}:"
                f" prepare it on a machine with a network and point --data.dir at the copy"
            ) from None
    try:
        with _without_tensorflow(builder):
            builder.download_and_prepare()
    except Exception as error:  # anything that a foreign builder may raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"dataset {builder.name!r} could not be prepared in {builder.data_dir}: {reason}; where TensorFlow is"
            f" installed, 'tfds build {builder.name} --file_format=array_record' prepares every dataset"
        ) from error


@contextlib.contextmanager
def _without_tensorflow(builder: Any) -> Iterator[None]:
    # tensorflow-datasets reads without TensorFlow, but prepares with it, for two things that Python has: encoding
    # pixels as a file, and opening local files. With these, most image datasets of the catalogue can be prepared.
    if importlib.util.find_spec("tensorflow") is not None:
        yield
        return
    generate = builder._generate_examples

    def encoded(*args: Any, **kwargs: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
        for key, example in generate(*args, **kwargs):
            image = example["image"]
            yield key, {**example, "image": _png(image)} if isinstance(image, np.ndarray) else example

    builder._generate_examples = encoded
    files = SimpleNamespace(GFile=open, listdir=os.listdir, glob=glob.glob, exists=os.path.exists, isdir=os.path.isdir)
    stand_in = SimpleNamespace(io=SimpleNamespace(gfile=files), compat=SimpleNamespace(as_text=os.fsdecode))
    with mock.patch.dict(lazy_imports_utils.tensorflow.__dict__, _module=stand_in):
        yield


def _png(image: np.ndarray) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "png")
    file.seek(0)
    return file
