"""Labelled images in random access, through tensorflow-datasets without TensorFlow.

The stream is a function of the step: example i of global batch n has index n*batch + i, whatever the number of hosts,
so nothing of it needs saving in a checkpoint.
"""

import contextlib
import difflib
import glob
import importlib.util
import io
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import grain
import numpy as np
import requests
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.utils import lazy_imports_utils

from diffjax.picture import to_float

NETWORK_SECONDS = 5.0  # how long a download site may take to answer before it counts as out of reach


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


class Dataset(NamedTuple):
    """Two splits in random access, len() and [i] -> {"image": uint8 [H, W, C], "label": int, ...}."""

    train: Any
    held_out: Any
    image_shape: tuple[int, int, int]
    classes: int  # 0 where the images carry no label


def load(name: str, data_dir: str | None = None) -> Dataset:
    """An image dataset of the tensorflow-datasets catalogue (or "digits"), downloaded and prepared if need be.

    data_dir: None for tensorflow-datasets' own folder, ~/tensorflow_datasets or TFDS_DATA_DIR. Held out is the split
    "test", else "validation", else the last tenth of "train".

    ValueError, at once and in one sentence: an unknown name, a dataset whose download cannot be reached, or one
    without images of one size.
    """
    builder = _builder(name, data_dir)
    features: Any = builder.info.features
    if not isinstance(features, tfds.features.FeaturesDict) or "image" not in features:
        raise ValueError(f"dataset {name!r} has no feature 'image': choose an image dataset")
    shape = tuple(features["image"].shape)
    if None in shape:
        raise ValueError(f"dataset {name!r} has images of different sizes ({shape}): choose one with a fixed size")
    if len(shape) != 3 or shape[2] not in (1, 3) or features["image"].np_dtype != np.uint8:
        raise ValueError(f"dataset {name!r} has images of {shape}: choose one of 8 bits, grey or RGB")
    if not builder.is_prepared():
        _prepare(builder)
    splits = builder.info.splits
    held_out = next((split for split in ("test", "validation") if split in splits), None)
    train, held_out = ("train", held_out) if held_out else ("train[:90%]", "train[90%:]")
    label: Any = features["label"] if "label" in features else None  # noqa: SIM401 (it has no get)
    classes = (label.num_classes or 0) if isinstance(label, tfds.features.ClassLabel) else 0
    return Dataset(builder.as_data_source(train), builder.as_data_source(held_out), shape, classes)


def batches(
    source: Any, batch: int, seed: int, start: int = 0, *, labels: bool = True, host: int = 0, hosts: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """The endless stream of this host's share of global batches start, start + 1, ...

    Yields {"image": float32 [batch/hosts, H, W, C] in [-1, 1], "label": int32 if labels, "index": uint32, the global
    example index}. Each pass over the data is in a new random order, of `seed` alone. Read ahead by a thread.
    ValueError for a batch larger than the data.
    """
    if len(source) < batch:
        raise ValueError(f"a batch of {batch} is more than the {len(source)} images of this split: use a smaller batch")
    shuffled = grain.MapDataset.source(source).seed(seed).shuffle().repeat(None)
    stream = shuffled.map_with_index(_example(labels)).batch(batch // hosts)[start * hosts + host :: hosts]
    return iter(stream.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=16)))


def first_batches(
    source: Any, batch: int, multiple: int, limit: int, *, labels: bool = True
) -> list[dict[str, np.ndarray]]:
    """At most `limit` batches from the start of the data, in order and in memory: the same images at every evaluation.
    Of `batch` examples, or where there are fewer of the largest multiple of `multiple` that there is.
    """
    batch = min(batch, len(source) // multiple * multiple)
    if not batch:
        raise ValueError(f"a split of {len(source)} images cannot be shared out over {multiple} devices: use fewer")
    stream: Any = grain.MapDataset.source(source).map_with_index(_example(labels)).batch(batch, drop_remainder=True)
    return [stream[i] for i in range(min(limit, len(stream)))]


def first_images(source: Any, num: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The first images of a split, float32 [num, H, W, C] in [-1, 1], and their labels, int32 [num], or None where they
    have none. ValueError where there are not so many.
    """
    if not 1 <= num <= len(source):
        raise ValueError(f"{num} images are asked for: this split holds {len(source)}, use 1 or more of them")
    examples = [source[i] for i in range(num)]
    images = to_float(np.stack([example["image"] for example in examples]))
    labelled = "label" in examples[0]
    return images, np.array([example["label"] for example in examples], np.int32) if labelled else None


def _example(labels: bool) -> Callable[[int, dict[str, Any]], dict[str, Any]]:
    def convert(index: int, example: dict[str, Any]) -> dict[str, Any]:
        label = {"label": np.int32(example["label"])} if labels else {}
        return {"image": to_float(example["image"]), "index": np.uint32(index), **label}

    return convert


def _builder(name: str, data_dir: str | None) -> Any:
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
