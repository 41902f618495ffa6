"""Data sets of image files in a folder."""

from functools import partial
from pathlib import Path

from diffjax.data import image_io
from diffjax.data.dataset import (
    Dataset,
    Example,
    MappedSource,
    Shape,
    UnreadableError,
    fixed_shuffle,
    label_fields,
    train_holdout_split,
)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
HELD_OUT = ("test", "validation", "val")  # folders to hold out, beside "train"

File = tuple[Path, int]  # and its label, -1 for none


def load_folder(path: Path, size: int, *, grey: bool = False) -> Dataset:
    """The data set of a folder of PNG, JPEG and WebP files.

    Images are rotated by their EXIF data, laid over white where they are transparent, cropped to
    their center and resized to size x size, RGB or grey. A sub-folder, with all that is in it, is a
    class, in alphabetical order; without sub-folders there are no labels. Held out is the folder
    "test", "validation" or "val" if there is one beside "train", else a tenth of the files, by
    `train_holdout_split`.

    Raises: ValueError for a folder without images, images beside sub-folders, or classes that
    differ between the splits; and `UnreadableError`, when it is indexed, for a file that is no
    image.
    """
    if not path.is_dir():
        raise ValueError(f"data.path is {path}, which does not exist: use a folder of images")
    shape = (size, size, 1 if grey else 3)
    if (path / "train").is_dir():
        classes, train, held_out = _stored_splits(path)
    else:
        classes, files = _list_files(path)
        train, held_out = train_holdout_split(files, path)
    decode = partial(_decode, shape)
    dataset = Dataset(
        MappedSource(train, decode),
        MappedSource(held_out, decode),
        shape,
        label_fields(len(classes)),
    )
    for split in (dataset.train, dataset.held_out):
        split[0]  # a folder of other files fails now rather than during training
    return dataset


def _stored_splits(path: Path) -> tuple[list[str], list[File], list[File]]:
    parts = [path / name for name in ("train", *HELD_OUT) if (path / name).is_dir()]
    folders = [entry for entry in path.iterdir() if entry.is_dir() and not _is_hidden(entry)]
    others = sorted(entry.name for entry in folders if entry not in parts)
    if len(parts) != 2 or others:
        names = ", ".join([*(part.name for part in parts), *others])
        raise ValueError(
            f"{path} has the folders {names}: use train, one of {', '.join(HELD_OUT)}, and no other"
        )
    (classes, train), (held_out_classes, held_out) = map(_list_files, parts)
    if classes != held_out_classes:
        odd = sorted(set(classes) ^ set(held_out_classes))[0]
        raise ValueError(
            f"class {odd!r} is in only one of {parts[0]} and {parts[1]}: use the same in both"
        )
    # Shuffled, since programs look at the first of them, which should be of every class.
    return classes, train, [held_out[i] for i in fixed_shuffle(len(held_out))]


def _list_files(folder: Path) -> tuple[list[str], list[File]]:
    """The classes of a folder, none if it has no sub-folders, and its files in order."""
    entries = sorted(entry for entry in folder.iterdir() if not _is_hidden(entry))
    images = [entry for entry in entries if _is_image(entry)]
    folders = [entry for entry in entries if entry.is_dir()]
    if folders and images:
        raise ValueError(
            f"{folder} has {images[0].name} beside sub-folders: put every image into one, or none"
        )
    if not folders and not images:
        raise ValueError(
            f"{folder} has no images: put PNG, JPEG or WebP files into it, or into a sub-folder per"
            " class"
        )
    files = [(file, -1) for file in images]
    for label, entry in enumerate(folders):
        inside = _images_below(entry)
        if not inside:
            raise ValueError(
                f"{entry} has no images, and a sub-folder is a class: fill it, or remove it"
            )
        files += [(file, label) for file in inside]
    return [entry.name for entry in folders], files


def _images_below(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.rglob("*")
        if _is_image(file) and not any(map(_is_hidden, map(Path, file.relative_to(folder).parts)))
    )


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".")


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
