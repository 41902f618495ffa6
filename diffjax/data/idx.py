"""Data sets of MNIST's own file format, IDX."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from diffjax.data.arrays import Columns, check_labels, from_columns
from diffjax.data.dataset import Dataset

TRAIN, HELD_OUT = "train", "t10k"  # how names of files begin
IMAGES, LABELS = ("images", 3), ("labels", 1)  # how they go on, and the axes of what they hold
UINT8 = 8  # the only type of numbers of MNIST's files, and of those like it
GZIP = b"\x1f\x8b"  # the first bytes of a compressed file


def load_idx(path: Path) -> Dataset:
    """The data set of a folder of MNIST's files, compressed by gzip or not.

    Its files are train-images-idx3-ubyte, train-labels-idx1-ubyte, and t10k-images-idx3-ubyte and
    t10k-labels-idx1-ubyte, which are held out; .gz may follow, and a dot may stand before idx.
    Without files of t10k a tenth of the images is held out, and without those of labels there are
    none; a note tells so.

    Raises: ValueError, naming the file, for other folders, and for files that are damaged.
    """
    if not path.is_dir():
        raise ValueError(
            f"data.path is {path}, which does not exist: use a folder of MNIST's files"
        )
    if _find(path, TRAIN, *IMAGES) is None:
        raise ValueError(
            f"{path} has no file {_name(TRAIN, *IMAGES)}: use a folder of MNIST's files"
        )
    notes, train = [], _columns(path, TRAIN)
    if "label" not in train:
        notes.append(f"{path} has no file {_name(TRAIN, *LABELS)}: images are without labels")
    if _find(path, HELD_OUT, *IMAGES) is None:
        notes.append(f"{path} has no file {_name(HELD_OUT, *IMAGES)}: a tenth is held out")
        dataset = from_columns(path, train)
    else:
        dataset = from_columns(path, train, _columns(path, HELD_OUT))
    return dataset._replace(notes=(*notes, *dataset.notes))


def _columns(path: Path, split: str) -> Columns:
    """The images of a split, uint8 [N, H, W, 1], and its labels if there are any."""
    file = _find(path, split, *IMAGES)
    assert file is not None
    images = read_idx(file, IMAGES[1])[..., None]
    file = _find(path, split, *LABELS)
    labels = None if file is None else check_labels(file, read_idx(file, LABELS[1]), len(images))
    return {"image": images} | ({} if labels is None else {"label": labels})


def _name(split: str, what: str, axes: int) -> str:
    return f"{split}-{what}-idx{axes}-ubyte"


def _find(path: Path, split: str, what: str, axes: int) -> Path | None:
    """A file of the folder, by any of its names."""
    name = _name(split, what, axes)
    dotted = name.replace("-idx", ".idx")
    files = (path / f"{each}{end}" for each in (name, dotted) for end in ("", ".gz"))
    return next((file for file in files if file.is_file()), None)


def read_idx(path: Path, axes: int) -> np.ndarray:
    """The array of an IDX file, uint8 with so many axes, compressed or not.

    The header is 0, 0, the type of the numbers, the number of axes, and the length of each, uint32,
    the highest byte first.

    Raises: ValueError, naming the path, for any other file.
    """
    content = _content(path)
    if content[:2] != bytes(2) or len(content) < 4 * (1 + axes):
        raise ValueError(f"{path} is no IDX file: use one of MNIST's format")
    if tuple(content[2:4]) != (UINT8, axes):
        raise ValueError(
            f"{path} has numbers of type {content[2]} and {content[3]} axes: use type {UINT8}"
            f" (uint8) and {axes} axes"
        )
    shape = [int(length) for length in np.frombuffer(content, ">u4", axes, 4)]
    start = 4 * (1 + axes)
    if len(content) != start + math.prod(shape):
        raise ValueError(
            f"{path} has {len(content) - start} bytes for {'x'.join(map(str, shape))} numbers: it"
            " is damaged"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    if content[:2] != GZIP:
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as a .gz file ({error}): it is damaged") from error
