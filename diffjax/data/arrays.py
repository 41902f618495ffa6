"""Data sets of arrays in one .npz file."""

import hashlib
import zipfile
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffjax.data.dataset import (
    Dataset,
    Example,
    MappedSource,
    hash_of,
    label_fields,
    natural_order,
    train_holdout_split,
)
from diffjax.nn.conditioning import Conditioning, Vector

Columns = dict[str, np.ndarray]  # arrays of as many rows, by the fields of an example

# Names of the arrays; the last ones are the fields of an example.
IMAGES, LABELS = ("x", "images", "image"), ("y", "labels", "label")
# Names of the arrays of two splits, as Keras has them.
TRAIN, HELD_OUT = "_train", "_test"
LABEL_KINDS = "biuUSM"  # of numpy: bool, integers, text, bytes, dates
# What numpy raises for files that are damaged, or of another kind.
READ_ERRORS = (
    ValueError,
    TypeError,
    AttributeError,
    EOFError,
    OSError,
    zipfile.BadZipFile,
    zlib.error,
)


def load_npz(path: Path) -> Dataset:
    """The data set of one .npz file.

    Its arrays: x, uint8 [N, H, W] or [N, H, W, C], C of 1 or 3; y, integers, names or dates [N], if
    the images are labelled; or `images` and `labels`, as `diffjax sample` writes them. Every
    further array of finite numbers, [N] or [N, width], is a vector that a network can be
    conditioned on, by its name; others are ignored. A file of x_train, y_train, x_test and y_test,
    as Keras has them, holds out the second pair.

    Raises: ValueError, naming the path, for any other file.
    """
    arrays = _read(path)
    if not any(name + TRAIN in arrays for name in IMAGES):
        return from_columns(path, _columns(path, arrays))
    train, held_out = (
        {name.removesuffix(end): arrays[name] for name in arrays if name.endswith(end)}
        for end in (TRAIN, HELD_OUT)
    )
    if not any(name in held_out for name in IMAGES):
        return from_columns(path, _columns(path, train))
    return from_columns(path, _columns(path, train), _columns(path, held_out))


def from_columns(path: Path, train: Columns, held_out: Columns | None = None) -> Dataset:
    """The data set of columns.

    They are `image`, uint8 [N, H, W, C], `label` of any values, and vectors. The labels that occur
    are the classes, in order and named by their values, and a note tells so unless they are 0, 1,
    ... Without columns to hold out, a tenth is held out, by `train_holdout_split` of the images'
    bytes.

    Raises: ValueError, naming the path, for splits that differ, or too few images to split.
    """
    splits = [train] if held_out is None else [train, held_out]
    _check_splits(path, splits)
    fields: dict[str, Conditioning] = {}
    classes = None
    if "label" in train:
        classes = _Classes.of(np.concatenate([columns["label"] for columns in splits]))
        fields |= label_fields(len(classes.names), classes.names)
        parts = np.split(classes.labels, [len(train["label"])])
        splits = [
            columns | {"label": labels} for columns, labels in zip(splits, parts, strict=False)
        ]
    fields |= {
        name: Vector(column.shape[1], name)
        for name, column in train.items()
        if name not in ("image", "label")
    }
    sources = [MappedSource(rows, partial(_example, its)) for rows, its in _rows(path, splits)]
    notes = () if classes is None or not classes.note else (f"{path}: {classes.note}",)
    return Dataset(sources[0], sources[1], train["image"].shape[1:], fields, notes)


def _rows(path: Path, splits: list[Columns]) -> list[tuple[Any, Columns]]:
    """The rows to train on and those to hold out, of columns."""
    keys = _keys(splits[-1]["image"])
    if len(splits) == 1:
        labels = splits[0]["label"].tolist() if "label" in splits[0] else None
        return [(rows, splits[0]) for rows in train_holdout_split(keys, labels, path)]
    # Shuffled, since programs look at the first of them, which should be of every class.
    order = sorted(range(len(keys)), key=lambda i: hash_of(keys[i]))
    return [(range(len(splits[0]["image"])), splits[0]), (order, splits[1])]


def _check_splits(path: Path, splits: list[Columns]) -> None:
    """Check that two splits have the same fields, of the same shapes."""
    for name in sorted({*splits[0], *splits[-1]}):
        shapes = [columns[name].shape[1:] if name in columns else None for columns in splits]
        if shapes[0] != shapes[-1]:
            first, last = ("absent" if shape is None else f"{shape}" for shape in shapes)
            raise ValueError(
                f"{path}: {name} is {first} in the split to train on and {last} in the one to hold"
                " out: use the same in both"
            )
    if not all(len(columns["image"]) for columns in splits):
        raise ValueError(f"{path} has a split without images: use one or more")


def _columns(path: Path, arrays: dict[str, np.ndarray]) -> Columns:
    """The columns of the arrays of one split."""
    names = ", ".join(arrays) or "none"
    x, y = (_take(arrays, known) for known in (IMAGES, LABELS))
    if x is None:
        raise ValueError(
            f"{path} has the arrays {names}: use x (or images) for images, and y for their labels"
        )
    x = _check_images(path, x)
    y = None if y is None else check_labels(path, y, len(x))
    vectors = {
        name: array.reshape(len(x), -1).astype(np.float32)
        for name, array in arrays.items()
        if array.ndim in (1, 2) and len(array) == len(x) and _is_finite(array)
    }
    return {"image": x} | ({} if y is None else {"label": y}) | vectors


def _keys(x: np.ndarray) -> list[bytes]:
    """A name for each image: the hash of its bytes, and how many of the same are before it."""
    digests = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in x]
    seen: Counter[bytes] = Counter()
    keys = []
    for digest in digests:
        keys.append(digest + seen[digest].to_bytes(8, "big"))
        seen[digest] += 1
    return keys


class _Classes(NamedTuple):
    """The classes of labels of any values."""

    labels: np.ndarray  # int64 [N] of 0..len(names)-1
    names: tuple[str, ...]
    note: str  # "" for labels that stay as they are

    @staticmethod
    def of(y: np.ndarray) -> "_Classes":
        """The classes that occur in y [N], in natural order."""
        values, numbers = np.unique(y, return_inverse=True)
        names = [_name(value) for value in values]
        order = sorted(range(len(names)), key=lambda i: natural_order(names[i]))
        labels, names = np.argsort(order)[numbers], tuple(names[i] for i in order)
        note = f"labels {names[0]} to {names[-1]} become {len(names):,} classes of these names"
        is_plain = names == tuple(map(str, range(len(names))))
        return _Classes(labels, names, "" if is_plain else note)


def _name(value: Any) -> str:
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"data.path is {path}, which does not exist: use an .npz file of images")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: array for name in file if (array := _array(file, name)) is not None}
    except READ_ERRORS as error:
        raise ValueError(
            f"{path} cannot be read as an .npz file ({error}): it is damaged, or of another kind"
        ) from error


def _array(file: Any, name: str) -> np.ndarray | None:
    """An array of the file; None for an array of objects that is not needed."""
    try:
        return file[name]
    except ValueError:
        if name.removesuffix(TRAIN).removesuffix(HELD_OUT) in (*IMAGES, *LABELS):
            raise
        return None


def _take(arrays: dict[str, np.ndarray], names: tuple[str, ...]) -> np.ndarray | None:
    found = [arrays.pop(name) for name in names if name in arrays]
    return found[0] if found else None


def _check_images(path: Path, x: np.ndarray) -> np.ndarray:
    x = x[..., None] if x.ndim == 3 else x
    if x.ndim != 4 or x.shape[-1] not in (1, 3) or x.dtype != np.uint8:
        raise ValueError(
            f"images of {path} are {x.dtype} {x.shape}: use uint8 [N, H, W] or [N, H, W, 1 or 3]"
        )
    return x


def check_labels(path: Path, y: np.ndarray, num: int) -> np.ndarray | None:
    """The labels [num] or [num, 1] of images, as [num]; None where all of them are -1.

    Raises: ValueError, naming the path, for others than integers or names, one per image.
    """
    y = y[:, 0] if y.shape == (num, 1) else y
    if y.shape != (num,) or y.dtype.kind not in LABEL_KINDS:
        raise ValueError(
            f"labels of {path} are {y.dtype} {y.shape}: use {num} integers or names, one per image"
        )
    if y.dtype.kind != "i" or not (y < 0).any():
        return y
    if (y < 0).all():  # written by `diffjax sample` for images without labels
        return None
    raise ValueError(f"labels of {path} begin at {y.min()}: count classes from 0")


def _is_finite(array: np.ndarray) -> bool:
    return array.dtype.kind in "fiu" and bool(np.isfinite(array).all())


def _example(columns: Columns, i: int) -> Example:
    example: dict[str, Any] = {name: column[i] for name, column in columns.items()}
    return example | ({"label": int(example["label"])} if "label" in example else {})
