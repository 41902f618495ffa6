"""Data sets of images in random access, and their preprocessing.

Data sets are read by `tfds`, `folder` and `arrays`. Nothing is decoded before it is indexed.
"""

from collections.abc import Callable, Sequence
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

    A split has len(), and [i] -> {"image": uint8 [H, W, C], "label": int, ...}.
    """

    train: Any
    held_out: Any
    image_shape: Shape
    fields: dict[str, Conditioning]  # what a network can be conditioned on, by the example's field

    @property
    def classes(self) -> int:
        """The number of classes; 0 for images without labels."""
        label = self.fields.get("label")
        return label.classes if isinstance(label, ClassLabel) else 0


def label_fields(classes: int) -> dict[str, Conditioning]:
    """The fields of examples that have a label of so many classes; none for 0."""
    return {"label": ClassLabel(classes)} if classes else {}


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
    return Dataset(train, held_out, padded, dataset.fields)


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


def train_holdout_split(rows: Sequence[Any], path: Path) -> tuple[list[Any], list[Any]]:
    """Split rows at random, but always alike, and hold out a tenth of them.

    Returns (rows to train on, rows to hold out). The latter are shuffled, since programs look at
    the first of them. They are not every tenth row:
    labels that repeat with period ten would all be the same.

    Raises: ValueError, naming the path, for fewer than ten rows.
    """
    if len(rows) < HOLDOUT_DIVISOR:
        raise ValueError(
            f"{path} has {len(rows)} images, of which a tenth is held out: use {HOLDOUT_DIVISOR} or"
            " more"
        )
    order = fixed_shuffle(len(rows))
    number = len(rows) // HOLDOUT_DIVISOR
    return [rows[i] for i in sorted(order[number:])], [rows[i] for i in order[:number]]


def fixed_shuffle(number: int) -> list[int]:
    """The permutation of 0..number-1 that data are shuffled by, always the same."""
    return np.random.default_rng(0).permutation(number).tolist()
