"""Data sets of images in random access, and their preprocessing.

Data sets are read by `tfds`, `folder`, `arrays`, `idx` and `latents`. Nothing is decoded before it
is indexed.
"""

import contextlib
import hashlib
import re
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from diffjax.data import image_io
from diffjax.nn.conditioning import ClassLabel, Conditioning

# The share of examples to hold out, 1/10, from data that have no split for it.
HOLDOUT_DIVISOR = 10

Example = dict[str, Any]
Shape = tuple[int, int, int]


class UnreadableError(ValueError):
    """An example cannot be read, which shows only when it is indexed."""


class Dataset(NamedTuple):
    """Two splits of examples in random access.

    A split has len(), and [i] -> {"image": uint8 [H, W, C], "label": int, ...}; of latents it has
    "moments" in place of "image", as `latents.load_latents` describes them.
    """

    train: Any
    held_out: Any
    image_shape: Shape  # of images or latents
    fields: dict[str, Conditioning]  # what a network can be conditioned on, by the example's field
    notes: tuple[str, ...] = ()  # sentences on what was left out or changed, for the user
    damaged: AbstractSet[str] = frozenset()  # errors of the examples that were skipped so far
    autoencoder: str = ""  # checksum of what encoded the images to latents; "" for images

    @property
    def classes(self) -> int:
        """The number of classes; 0 for images without labels."""
        label = self.fields.get("label")
        return label.classes if isinstance(label, ClassLabel) else 0


def label_fields(classes: int, names: Sequence[str] = ()) -> dict[str, Conditioning]:
    """The fields of examples that have a label of so many classes; none for 0."""
    return {"label": ClassLabel(classes, names=tuple(names))} if classes else {}


def natural_order(name: str) -> tuple[Any, ...]:
    """The key that sorts names by their letters and numbers: 2 before 10."""
    parts = re.split(r"([0-9]+)", name)
    return tuple(int(part) if i % 2 else part for i, part in enumerate(parts)), name


class MappedSource:
    """A source in random access, each item mapped by a function when indexed."""

    def __init__(self, source: Any, function: Callable[[Any], Example]) -> None:
        """Reads nothing yet."""
        self._source, self._function = source, function

    def __len__(self) -> int:
        """The number of items."""
        return len(self._source)

    def __getitem__(self, i: Any) -> Example:
        """Item i, mapped."""
        return self._function(self._source[int(i)])


class ReadableSource:
    """A source in random access, with the next example for one that cannot be read.

    What stands for an example depends on the data alone.
    """

    def __init__(self, source: Any, damaged: set[str]) -> None:
        """Reads nothing yet. damaged: gets the errors of the examples that were skipped."""
        self._source, self._damaged = source, damaged

    def __len__(self) -> int:
        """The number of examples, with those that cannot be read."""
        return len(self._source)

    def __getitem__(self, i: Any) -> Example:
        """Example i, or the first after it that can be read; after the last one comes the first.

        Raises: UnreadableError where none can be read.
        """
        for n in range(len(self) - 1):
            with contextlib.suppress(UnreadableError):
                return self._read(int(i) + n)
        return self._read(int(i) - 1)

    def _read(self, i: int) -> Example:
        try:
            return self._source[i % len(self)]
        except UnreadableError as error:
            self._damaged.add(str(error))
            raise


def preprocess(
    dataset: Dataset, size: int | None = None, pad: int = 0, *, grey: bool = False
) -> Dataset:
    """Preprocess the images of a data set when they are read.

    size: crop to the center and resize to size x size. grey: convert to grey. pad: black pixels to
    add on every side, last.
    """
    shape = preprocessed_shape(dataset.image_shape, size, grey=grey)
    padded = preprocessed_shape(dataset.image_shape, size, pad, grey=grey)
    if padded == dataset.image_shape:
        return dataset
    function = partial(_fit_and_pad, shape, pad)
    train, held_out = (MappedSource(split, function) for split in (dataset.train, dataset.held_out))
    return dataset._replace(train=train, held_out=held_out, image_shape=padded)


def _fit_and_pad(shape: Shape, pad: int, example: Example) -> Example:
    image = example["image"]
    if image.shape != shape:
        pixels = image[..., 0] if image.shape[-1] == 1 else image
        image, _ = image_io.fit(Image.fromarray(pixels), shape)
    return {**example, "image": np.pad(image, ((pad, pad), (pad, pad), (0, 0)))}


def preprocessed_shape(
    shape: Shape, size: int | None = None, pad: int = 0, *, grey: bool = False
) -> Shape:
    """The shape [H, W, C] of images after `preprocess`."""
    height, width, channels = shape
    return (size or height) + 2 * pad, (size or width) + 2 * pad, 1 if grey else channels


def train_holdout_split(
    keys: Sequence[bytes], labels: Sequence[int] | None, path: Path
) -> tuple[list[int], list[int]]:
    """Split examples by their keys, and hold out about a tenth of them.

    An example is held out if the hash of its key, in [0, 1), is below 0.1, so that further examples
    move none of the others. Two exceptions: of every class the example of the largest hash is
    trained on, and, where no hash is below 0.1, the example of the smallest is held out.

    Returns (numbers of the examples to train on, in order, and of those to hold out, in the order
    of their hashes: programs look at the first of them, which should be of every class).

    Raises: ValueError, naming the path, for fewer than ten examples, or one per class.
    """
    if len(keys) < HOLDOUT_DIVISOR:
        raise ValueError(
            f"{path} has {len(keys)} images, of which a tenth is held out: use {HOLDOUT_DIVISOR} or"
            " more"
        )
    hashes = np.array([hash_of(key) for key in keys])
    order = np.argsort(hashes, kind="stable").tolist()
    kept = set({0 if labels is None else labels[i]: i for i in order}.values())
    movable = [i for i in order if i not in kept]
    if not movable:
        raise ValueError(
            f"{path} has one image of each class, and no class is held out whole: use two or more"
            " images of a class"
        )
    held_out = [i for i in movable if hashes[i] < 1 / HOLDOUT_DIVISOR] or movable[:1]
    return sorted(set(order).difference(held_out)), held_out


def hash_of(key: bytes) -> float:
    """A number in [0, 1) that looks random, and is the same on every machine."""
    digest = hashlib.blake2b(key, digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48
