"""Data sets of tensorflow-datasets, without TensorFlow."""

import contextlib
import difflib
import glob
import importlib.util
import io
import os
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import requests
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.utils import lazy_imports_utils

from diffjax.data.dataset import Dataset, Shape, label_fields, preprocess
from diffjax.nn.conditioning import Conditioning

# Seconds that a download site may take to answer before it counts as unreachable.
NETWORK_SECONDS = 5.0
FORMAT = "array_record"  # read in random access, and without TensorFlow
CATALOGUE = "https://www.tensorflow.org/datasets/catalog"


class Digits(tfds.core.GeneratorBasedBuilder):
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, which need no download.

    They are UCI's Optical Recognition of Handwritten Digits. Grey values 0..16 become
    round(value*255/16).
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(8, 8, 1)),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {
            "train": self._generate_examples(0, 1500),
            "test": self._generate_examples(1500, 1797),
        }

    def _generate_examples(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        for i in range(start, stop):
            image = np.round(digits.images[i] * 255 / 16).astype(np.uint8)
            yield i, {"image": encode_png(image[..., None]), "label": int(digits.target[i])}


def load_tfds(name: str, data_dir: str | None = None, size: int | None = None) -> Dataset:
    """An image data set of the catalogue, or "digits", prepared if need be.

    data_dir: folder of prepared data sets; None for the default, TFDS_DATA_DIR or
    ~/tensorflow_datasets. size: as of `preprocess`, for images of different sizes. Held out is the
    split "test", else "validation", else the last tenth of "train".

    Raises: ValueError for an unknown name, a download that cannot be reached, or a data set without
    images, or with images of different sizes.
    """
    described = _describe(name, data_dir, size)
    builder = described.builder
    if not builder.is_prepared():
        _prepare(builder)
    splits = builder.info.splits
    held_out = next((split for split in ("test", "validation") if split in splits), None)
    names = ("train", held_out) if held_out else ("train[:90%]", "train[90%:]")
    train, held_out = (builder.as_data_source(split) for split in names)
    # Names of classes may come with the download.
    dataset = Dataset(train, held_out, described.shape, _fields(builder))
    return dataset if size is None else preprocess(dataset, size)


def describe_tfds(
    name: str, data_dir: str | None = None, size: int | None = None
) -> tuple[Shape, dict[str, Conditioning]]:
    """The image shape and the fields of the data set that `load_tfds` loads.

    It is not prepared.

    Raises: ValueError as `load_tfds`.
    """
    builder, (height, width, channels) = _describe(name, data_dir, size)
    return (size or height, size or width, channels), _fields(builder)


class _Described(NamedTuple):
    builder: Any
    shape: Any  # [H, W, C]; H and W may be None if a size is given


def _describe(name: str, data_dir: str | None, size: int | None) -> _Described:
    builder = _builder(name, data_dir)
    features: Any = builder.info.features
    if not isinstance(features, tfds.features.FeaturesDict) or "image" not in features:
        raise ValueError(f"data.name is {name!r}, which has no feature 'image': use images")
    image = features["image"]
    shape = tuple(image.shape)
    if None in shape and size is None:
        raise ValueError(
            f"data.name is {name!r}, with images of different sizes ({shape}): set data.size"
        )
    if len(shape) != 3 or shape[2] not in (1, 3) or image.np_dtype != np.uint8:
        raise ValueError(f"data.name is {name!r}, with images of {shape}: use 8 bits, grey or RGB")
    return _Described(builder, shape)


def _fields(builder: Any) -> dict[str, Conditioning]:
    """The field of the labels; tfds names classes by their numbers where they have no names."""
    features = builder.info.features
    label: Any = features["label"] if "label" in features else None  # noqa: SIM401 (it has no get)
    if not isinstance(label, tfds.features.ClassLabel) or not label.num_classes:
        return {}
    names = tuple(label.names)
    is_plain = names == tuple(map(str, range(len(names))))
    return label_fields(len(names), () if is_plain else names)


def _builder(name: str, data_dir: str | None) -> Any:
    if name == "digits":
        return Digits(data_dir=data_dir, file_format=FORMAT)
    try:
        return tfds.builder(name, data_dir=data_dir, file_format=FORMAT)
    except tfds.core.DatasetNotFoundError:
        names = ["digits", *tfds.list_builders(with_community_datasets=False)]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"see {CATALOGUE}"
        raise ValueError(
            f"data.name is {name!r}, which tensorflow-datasets does not have: {hint}"
        ) from None
    except (AssertionError, ImportError) as error:  # an unknown version, a community data set
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"data.name is {name!r}, which cannot be used: {reason}") from error
    except ValueError as error:  # whose reason is a page long
        raise ValueError(
            f"data.name is {name!r}, which is no name of a data set: use one of the catalogue,"
            " or read files with data.source folder or npz"
        ) from error


def _prepare(builder: Any) -> None:
    where = f"and is not prepared in {builder.data_dir}"
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        raise ValueError(
            f"data set {builder.name!r} has to be downloaded by hand {where}: run 'tfds build"
            f" {builder.name}'"
        )
    # tensorflow-datasets would retry for minutes where there is no network; any answer will do.
    url = next(iter(builder.url_infos or ()), None)
    if url is not None:
        try:
            requests.head(url, timeout=NETWORK_SECONDS)
        except requests.RequestException:
            raise ValueError(
                f"data set {builder.name!r} is downloaded from {url}, which cannot be reached,"
                f" {where}: prepare it on a machine with a network, and set data.dir to a copy"
            ) from None
    try:
        with _without_tensorflow(builder):
            builder.download_and_prepare()
    except Exception as error:  # builders of the catalogue may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"data set {builder.name!r} could not be prepared in {builder.data_dir}: {reason};"
            f" where TensorFlow is installed, 'tfds build {builder.name}' prepares any data set, in"
            f" the file format {FORMAT}"
        ) from error


@contextlib.contextmanager
def _without_tensorflow(builder: Any) -> Iterator[None]:
    # tensorflow-datasets reads without TensorFlow, but prepares with it, for two things that Python
    # has: encoding pixels as a file, and opening local files. With these, most image data sets of
    # the catalogue can be prepared.
    if importlib.util.find_spec("tensorflow") is not None:
        yield
        return
    builder._generate_examples = partial(_encoded_examples, builder._generate_examples)
    files = SimpleNamespace(
        GFile=open, listdir=os.listdir, glob=glob.glob, exists=os.path.exists, isdir=os.path.isdir
    )
    stand_in = SimpleNamespace(
        io=SimpleNamespace(gfile=files), compat=SimpleNamespace(as_text=os.fsdecode)
    )
    with mock.patch.dict(lazy_imports_utils.tensorflow.__dict__, _module=stand_in):
        yield


def _encoded_examples(
    generate: Callable[..., Iterator[tuple[Any, dict[str, Any]]]], *args: Any, **kwargs: Any
) -> Iterator[tuple[Any, dict[str, Any]]]:
    for key, example in generate(*args, **kwargs):
        image = example["image"]
        encoded = encode_png(image) if isinstance(image, np.ndarray) else image
        yield key, {**example, "image": encoded}


def encode_png(image: np.ndarray) -> io.BytesIO:
    """A PNG file in memory of an image, uint8 [H, W, 1 or 3]."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "png")
    file.seek(0)
    return file
