"""Data sets of image files in a folder."""

import os
import stat
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from diffjax.data import image_io
from diffjax.data.dataset import (
    Dataset,
    Example,
    MappedSource,
    ReadableSource,
    Shape,
    UnreadableError,
    hash_of,
    label_fields,
    natural_order,
    train_holdout_split,
)

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff",
)  # fmt: skip
HELD_OUT = ("test", "validation", "val")  # folders to hold out, beside "train"

File = tuple[Path, int]  # and its label, -1 for none
LeftOut = dict[str, list[Path]]  # files that are not read, by the reason


def load_folder(
    path: Path, size: int, *, grey: bool = False, skip_damaged: bool = False
) -> Dataset:
    """The data set of a folder of image files: PNG, JPEG, WebP, BMP, GIF and TIFF.

    Images are rotated by their EXIF data, laid over white where they are transparent, cropped to
    their center and resized to size x size, RGB or grey; an animation is its first picture. A
    sub-folder, with all that is in it and behind its links, is a class of its name, in alphabetical
    order with 2 before 10; without sub-folders there are no labels. Held out is the folder "test",
    "validation" or "val" if there is one beside "train", else a tenth of the files, by
    `train_holdout_split` of their names. The notes tell which files are left out.

    skip_damaged: read the next file for one that is no image.

    Raises: ValueError for a folder without images, images beside sub-folders, or classes that
    differ between the splits; and `UnreadableError`, when it is indexed, for a file that is no
    image.
    """
    if not path.is_dir():
        raise ValueError(f"data.path is {path}, which does not exist: use a folder of images")
    left_out: LeftOut = defaultdict(list)
    if (path / "train").is_dir():
        classes, train, held_out = _stored_splits(path, left_out)
    else:
        classes, files = _list_files(path, left_out)
        labels = [label for _, label in files]
        keys = [_key(file.relative_to(path)) for file, _ in files]
        split = train_holdout_split(keys, labels, path)
        train, held_out = ([files[i] for i in numbers] for numbers in split)
    shape, damaged = (size, size, 1 if grey else 3), set()
    sources: list[Any] = [MappedSource(its, partial(_decode, shape)) for its in (train, held_out)]
    if skip_damaged:
        sources = [ReadableSource(source, damaged) for source in sources]
    for source in sources:
        source[0]  # a folder of other files fails now rather than during training
    notes = tuple(_describe(path, left_out))
    fields = label_fields(len(classes), classes)
    return Dataset(sources[0], sources[1], shape, fields, notes, damaged)


def _key(path: Path) -> bytes:
    """The bytes of a relative path, the same on every system."""
    return os.fsencode(unicodedata.normalize("NFC", path.as_posix()))


def _describe(path: Path, left_out: LeftOut) -> Iterator[str]:
    for reason, files in left_out.items():
        first, others = min(files, key=str).relative_to(path), len(files) > 1
        number = f"{len(files):,} file{'s' * others}"
        yield f"{path}: {number} left out ({reason}): {first}{', ...' * others}"


def _stored_splits(path: Path, left_out: LeftOut) -> tuple[list[str], list[File], list[File]]:
    parts = [path / name for name in ("train", *HELD_OUT) if (path / name).is_dir()]
    folders = [entry for entry in path.iterdir() if entry.is_dir() and not _is_hidden(entry.name)]
    others = sorted(entry.name for entry in folders if entry not in parts)
    if len(parts) != 2 or others:
        names = ", ".join([*(part.name for part in parts), *others])
        raise ValueError(
            f"{path} has the folders {names}: use train, one of {', '.join(HELD_OUT)}, and no other"
        )
    (classes, train), (held_out_classes, held_out) = (_list_files(part, left_out) for part in parts)
    if classes != held_out_classes:
        odd = sorted(set(classes) ^ set(held_out_classes))[0]
        raise ValueError(
            f"class {odd!r} is in only one of {parts[0]} and {parts[1]}: use the same in both"
        )
    # Shuffled, since programs look at the first of them, which should be of every class.
    held_out.sort(key=lambda file: hash_of(_key(file[0].relative_to(path))))
    return classes, train, held_out


def _list_files(folder: Path, left_out: LeftOut) -> tuple[list[str], list[File]]:
    """The classes of a folder, none if it has no sub-folders, and its files in order."""
    images, folders = _scan(folder, left_out)
    if folders and images:
        raise ValueError(
            f"{folder} has {images[0].name} beside sub-folders: put every image into one, or none"
        )
    if not folders and not images:
        raise ValueError(
            f"{folder} has no images: put PNG, JPEG, WebP, BMP, GIF or TIFF files into it, or into"
            " a sub-folder per class"
        )
    files = [(file, -1) for file in images]
    folders.sort(key=lambda entry: natural_order(entry.name))
    for label, entry in enumerate(folders):
        inside = _images_below(entry, folder, left_out)
        if not inside:
            raise ValueError(
                f"{entry} has no images, and a sub-folder is a class: fill it, or remove it"
            )
        files += [(file, label) for file in inside]
    return [entry.name for entry in folders], files


def _images_below(folder: Path, root: Path, left_out: LeftOut) -> list[Path]:
    """The images of a folder and its sub-folders; links are followed, but into no folder twice."""
    images, seen, pending = [], {os.path.realpath(root)}, [folder]
    while pending:
        current = pending.pop()
        real = os.path.realpath(current)
        if real not in seen:
            seen.add(real)
            files, folders = _scan(current, left_out)
            images += files
            pending += reversed(folders)
    return sorted(images)


def _scan(folder: Path, left_out: LeftOut) -> tuple[list[Path], list[Path]]:
    """The images and the sub-folders of a folder, but for hidden ones, sorted."""
    images, folders = [], []
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        path, reason = Path(entry.path), _reason_to_leave_out(entry)
        if _is_hidden(entry.name):
            continue
        if reason:
            left_out[reason].append(path)
        else:
            (folders if entry.is_dir() else images).append(path)
    return images, folders


def _reason_to_leave_out(entry: os.DirEntry[str]) -> str:
    """A reason to read neither a folder nor an image here; "" for none."""
    try:
        status = entry.stat()
    except OSError:
        return "broken link"
    if stat.S_ISDIR(status.st_mode):
        return ""
    if not stat.S_ISREG(status.st_mode) or Path(entry.name).suffix.lower() not in SUFFIXES:
        return "of another kind"
    return "" if status.st_size else "empty"


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def _decode(shape: Shape, file: File) -> Example:
    path, label = file
    try:
        image, _ = image_io.read(path, shape)
    except OSError as error:  # about the file: gone, or without permission
        raise UnreadableError(
            f"{path} cannot be read ({error.strerror}): the data changed, or are not readable"
        ) from error
    except ValueError as error:
        raise UnreadableError(f"{error}, or remove it") from error
    return {"image": image} | ({} if label < 0 else {"label": label})
