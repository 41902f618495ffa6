"""Data sets of latents: what an autoencoder encodes images to, in shards.

A folder has `manifest.json`, shards of ArrayRecord, and the autoencoder in `autoencoder`. A record
is one example: its moments, those of the mirrored image if these are stored, and the fields that a
network can be conditioned on, each as the manifest describes it.
"""

import dataclasses
import json
import math
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from diffjax.data.dataset import Dataset, Example, MappedSource, Shape, UnreadableError
from diffjax.data.files import atomic_path
from diffjax.nn.conditioning import (
    ClassLabel,
    Conditioning,
    conditioning_from_dict,
    conditioning_to_dict,
)

FORMAT = 1  # of folders; a number for each change of it
MANIFEST, AUTOENCODER = "manifest.json", "autoencoder"
TRAIN, HELD_OUT = "train", "held_out"  # the splits
MOMENTS, MIRRORED = "moments", "mirrored"  # of an example, beside its fields
OPEN_SHARDS = 256  # at most, at a time: what is open takes memory
# Records are read one by one, in any order.
WRITER_OPTIONS = "group_size:1,uncompressed"
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
BUFFER_BYTES = 2**15

# ------------------------------------------------------------------------------- the manifest


@dataclass(frozen=True)
class Manifest:
    """The description of a folder of latents, which is its manifest.json."""

    shape: Shape  # [h, w, c] of the latents
    dtype: str  # of the stored moments, float16 or float32
    mirrored: bool  # whether there are the moments of mirrored images
    splits: dict[str, int]  # examples, by the name of the split
    shard: int  # records per shard; the last one of a split may have fewer
    fields: dict[str, Conditioning]  # what a network can be conditioned on
    data: dict[str, Any]  # configuration of the data that were encoded
    images: Shape  # [H, W, C] of the images
    digest: str  # of some of the images, to distinguish data of the same name
    source: str  # of the autoencoder
    autoencoder: str  # checksum of the autoencoder's parameters
    scaling: float  # x = (latents - shift) * scaling
    shift: float
    complete: bool = False  # whether all shards are there
    format: int = FORMAT

    @property
    def record(self) -> np.dtype:
        """The layout of a record."""
        *sides, channels = self.shape
        kind = np.dtype(self.dtype).newbyteorder("<")
        moments = (kind, (*sides, 2 * channels))
        parts: list[Any] = [(MOMENTS, *moments)]
        parts += [(MIRRORED, *moments)] if self.mirrored else []
        for name, field in self.fields.items():
            is_label = isinstance(field, ClassLabel)
            width = np.shape(field.zeros(1))[1:]
            parts.append((name, "<i8" if is_label else "<f4", width))
        return np.dtype(parts)

    def shards(self, split: str) -> int:
        """The number of shards of a split."""
        return math.ceil(self.splits[split] / self.shard)

    def name_of(self, split: str, number: int) -> str:
        """The name of the file of a shard."""
        return f"{split}-{number:05}-of-{self.shards(split):05}.array_record"

    def rows_of(self, split: str, number: int) -> range:
        """The numbers of the examples of a shard."""
        first = number * self.shard
        return range(first, min(first + self.shard, self.splits[split]))

    def write(self, folder: Path) -> None:
        """Write the manifest of a folder."""
        values = dataclasses.asdict(dataclasses.replace(self, fields={}))
        fields = {name: conditioning_to_dict(field) for name, field in self.fields.items()}
        layout = [[name, *_describe(self.record[name])] for name in self.record.names or ()]
        values |= {"fields": fields, "layout": layout}
        with atomic_path(folder / MANIFEST) as part:
            part.write_text(json.dumps(values, indent=1) + "\n")


def _describe(kind: np.dtype) -> tuple[str, list[int]]:
    return kind.base.str, list(kind.shape)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, None for a folder without.

    Raises: ValueError for one that cannot be read, or of another version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']}, and this is {FORMAT}")
        del values["layout"]  # which follows from the rest
        fields = {name: conditioning_from_dict(each) for name, each in values["fields"].items()}
        shapes = {name: tuple(values[name]) for name in ("shape", "images")}
        return Manifest(**values | shapes | {"fields": fields})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged, or of another version of diffjax ({error}): encode the images"
            " again"
        ) from error


# ------------------------------------------------------------------------------- shards


def write_shard(path: Path, records: Iterable[np.ndarray]) -> None:
    """Write a shard of records, whole or not at all."""
    with atomic_path(path) as part:
        writer = ArrayRecordWriter(str(part), WRITER_OPTIONS)
        for record in records:
            writer.write(record.tobytes())
        writer.close()


class Shards:
    """The records of one split, in random access.

    A file is opened when a record of it is asked for; of many the one that was used longest ago is
    closed, so that the memory is that of OPEN_SHARDS.
    """

    def __init__(self, folder: Path, manifest: Manifest, split: str) -> None:
        """Reads nothing yet."""
        self._folder, self._manifest, self._split = folder, manifest, split
        self._record = manifest.record
        self._readers: OrderedDict[int, ArrayRecordReader] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """The number of records."""
        return self._manifest.splits[self._split]

    def __getitem__(self, i: int) -> np.ndarray:
        """Record i, an array without axes of the manifest's layout.

        Raises: UnreadableError for a shard that is damaged or absent.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        number, row = divmod(int(i), self._manifest.shard)
        try:
            content = self._reader(number).read([row])[0]
            return np.frombuffer(content, self._record, 1)[0]
        except (RuntimeError, ValueError, IndexError) as error:
            path = self._folder / self._manifest.name_of(self._split, number)
            raise UnreadableError(
                f"{path} cannot be read ({error}): remove it and encode the images again"
            ) from error

    def _reader(self, number: int) -> ArrayRecordReader:
        with self._lock:  # threads read ahead
            reader = self._readers.get(number)
        if reader is None:  # opened outside of the lock, so that threads open shards at once
            path = self._folder / self._manifest.name_of(self._split, number)
            reader = ArrayRecordReader(
                str(path), READER_OPTIONS, file_reader_buffer_size=BUFFER_BYTES
            )
        with self._lock:
            reader = self._readers.setdefault(number, reader)  # another thread may have been first
            self._readers.move_to_end(number)
            if len(self._readers) > OPEN_SHARDS:
                self._readers.popitem(last=False)  # closed when no thread reads it any more
            return reader


# ------------------------------------------------------------------------------- the data set


def load_latents(path: Path, *, flip: bool = False) -> Dataset:
    """The data set of a folder of latents, as `diffjax encode` writes it.

    Its examples have the moments of x, float32 [h, w, 2c]: the mean and the log variance of the
    latents, shifted and scaled, and those of the mirrored image if these are stored. No shard is
    opened before an example of it is asked for.

    flip: whether mirrored images are needed.

    Raises: ValueError for a folder that is not complete, or has no mirrored images if these are
    needed; `UnreadableError`, when it is indexed, for a shard that is damaged.
    """
    manifest = complete_manifest(path)
    if flip and not manifest.mirrored:
        raise ValueError(
            f"data.flip is True, and {path} has no latents of mirrored images: encode the images"
            " with their mirrors, or use False"
        )
    present = {entry.name for entry in path.iterdir()}
    for split in (TRAIN, HELD_OUT):
        for number in range(manifest.shards(split)):
            if manifest.name_of(split, number) not in present:
                raise ValueError(
                    f"{path} has no {manifest.name_of(split, number)}: encode the images again"
                )
    sources = [
        MappedSource(Shards(path, manifest, split), partial(_example, manifest))
        for split in (TRAIN, HELD_OUT)
    ]
    return Dataset(
        sources[0],
        sources[1],
        manifest.shape,
        manifest.fields,
        (f"{path}: {manifest.source} encoded {_name(manifest)}",),
        autoencoder=manifest.autoencoder,
    )


def complete_manifest(path: Path) -> Manifest:
    """The manifest of a folder of latents.

    Raises: ValueError for another folder, and for one that is not complete.
    """
    if not path.is_dir():
        raise ValueError(f"data.path is {path}, which does not exist: use a folder of latents")
    manifest = read_manifest(path)
    if manifest is None:
        raise ValueError(f"{path} has no {MANIFEST}: use a folder that diffjax encode has written")
    if not manifest.complete:
        raise ValueError(f"{path} is not complete: run diffjax encode again, which goes on there")
    return manifest


def _name(manifest: Manifest) -> str:
    data = manifest.data
    return data["name"] if data["source"] == "tfds" else Path(data["path"] or "").name


def _example(manifest: Manifest, record: np.ndarray) -> Example:
    example: Example = {name: record[name] for name in manifest.fields}
    if "label" in example:
        example["label"] = int(example["label"])
    for name in (MOMENTS, MIRRORED)[: 1 + manifest.mirrored]:
        example[name] = scale_moments(record[name], manifest.scaling, manifest.shift)
    return example


def scale_moments(moments: np.ndarray, scaling: float, shift: float) -> np.ndarray:
    """The moments of (latents - shift) * scaling, float32 [..., 2c]."""
    mean, logvar = np.split(np.asarray(moments, np.float32), 2, axis=-1)
    scaled = (mean - np.float32(shift)) * np.float32(scaling)
    return np.concatenate([scaled, logvar + np.float32(2 * math.log(scaling))], axis=-1)


def draw(moments: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
    """Latents mean + std * noise of moments [..., 2c]; the mean without a generator."""
    mean, logvar = np.split(moments, 2, axis=-1)
    if rng is None:
        return mean
    return mean + np.exp(logvar / 2) * rng.standard_normal(mean.shape, np.float32)
