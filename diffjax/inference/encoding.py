"""Encode a data set of images to the moments of latents, on all devices.

A shard that is there is not encoded again, so that an interrupted encoding resumes. With several
processes, each encodes its own shards.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils

from diffjax.config import Config
from diffjax.data.batches import THREADS
from diffjax.data.dataset import Dataset
from diffjax.data.image_io import to_float
from diffjax.data.latents import (
    AUTOENCODER,
    HELD_OUT,
    MIRRORED,
    MOMENTS,
    TRAIN,
    Manifest,
    Shards,
    read_manifest,
    write_shard,
)
from diffjax.devices.parallel import BatchMapper
from diffjax.inference.autoencoder import TrainedAutoencoder, save_autoencoder
from diffjax.interop import autoencoder_kl

SHARD = 10_000  # examples per shard
SAMPLED = 10_000  # examples that the standard deviation is measured on, at most
DIGESTED = 10  # images of each split, to distinguish data of the same name
Dtype = Literal["float32", "float16"]
Progress = Callable[[int], object]  # takes the number of images that were just done


@dataclass(frozen=True)
class EncodeOptions:
    """How images are encoded."""

    batch: int  # images at a time, over the devices of a process
    mirror: bool = False  # also encode the mirror of each image
    dtype: Dtype = "float32"  # of the stored moments
    shard: int = SHARD  # examples per shard


@dataclass(frozen=True)
class Encoding:
    """Images that are ready to be encoded into a folder."""

    autoencoder: TrainedAutoencoder
    dataset: Dataset
    folder: Path
    manifest: Manifest
    options: EncodeOptions

    @property
    def splits(self) -> dict[str, Any]:
        """The images by the name of their split."""
        return {TRAIN: self.dataset.train, HELD_OUT: self.dataset.held_out}

    def shards(self) -> list[tuple[str, int]]:
        """The shards of this process that are not there yet, as (split, number)."""
        mine = self._every()[jax.process_index() :: jax.process_count()]
        return [each for each in mine if self._is_missing(each)]

    def _every(self) -> list[tuple[str, int]]:
        return [(name, n) for name in self.splits for n in range(self.manifest.shards(name))]

    def _is_missing(self, shard: tuple[str, int]) -> bool:
        return not (self.folder / self.manifest.name_of(*shard)).exists()

    @property
    def images(self) -> int:
        """The number of images that this process has to encode."""
        return sum(len(self.manifest.rows_of(*each)) for each in self.shards())

    def run(self, progress: Progress = lambda images: None) -> Manifest:
        """Encode what is not there yet; return the complete manifest.

        Raises: ValueError or OSError for images that cannot be read, or files not written.
        """
        stored, shards = read_manifest(self.folder), self.shards()
        is_partial = stored is None or any(map(self._is_missing, self._every()))
        _wait("open")  # all have seen the folder as it was
        if jax.process_index() == 0 and is_partial:
            self.manifest.write(self.folder)
        _wait("begin")
        module = self.autoencoder.config.build(self.dataset.image_shape)
        mapper = BatchMapper(
            partial(_encode, module), jax.device_get(self.autoencoder.params), self.options.batch
        )
        for split, number in shards:
            rows = self.manifest.rows_of(split, number)
            records = self._records(mapper, self.splits[split], rows, progress)
            write_shard(self.folder / self.manifest.name_of(split, number), records)
        _wait("shards")
        if jax.process_index() == 0:
            self._complete()
        _wait("end")
        manifest = read_manifest(self.folder)
        assert manifest is not None
        return manifest

    def _records(
        self, mapper: BatchMapper, split: Any, rows: range, progress: Progress
    ) -> Iterator[np.ndarray]:
        """The records of a shard, in order."""
        source = grain.MapDataset.source(split)[rows.start : rows.stop]
        # The next batch is read while one is encoded.
        ahead = 2 * self.options.batch
        options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=ahead)
        examples = list[dict[str, Any]]()
        for example in source.to_iter_dataset(options):
            examples.append(example)
            if len(examples) == min(self.options.batch, len(rows)):
                yield from self._batch(mapper, examples)
                progress(len(examples))
                examples = []
        if examples:
            yield from self._batch(mapper, examples)
            progress(len(examples))

    def _batch(self, mapper: BatchMapper, examples: list[dict[str, Any]]) -> np.ndarray:
        """The records of a batch, filled with images from its start to one size."""
        size, layout = self.options.batch, self.manifest.record
        images = to_float(np.stack([example["image"] for example in examples]))
        images = images[np.arange(size) % len(images)]
        records = np.zeros(len(examples), layout)
        records[MOMENTS] = mapper((images,))[: len(examples)]
        if self.manifest.mirrored:
            records[MIRRORED] = mapper((images[:, :, ::-1],))[: len(examples)]
        for name in self.manifest.fields:
            column = np.stack([np.asarray(example[name]) for example in examples])
            records[name] = column.reshape(records[name].shape)
        return records

    def _complete(self) -> None:
        """Measure the scaling if there is none, and write autoencoder and manifest."""
        config = self.autoencoder.config
        if config.scaling == 1:
            std = measure_std(self.folder, self.manifest)
            config = dataclasses.replace(config, scaling=1 / std)
        save_autoencoder(self.folder / AUTOENCODER, self.autoencoder._replace(config=config))
        complete = dataclasses.replace(
            self.manifest, scaling=config.scaling, shift=config.shift, complete=True
        )
        complete.write(self.folder)


def _encode(module: Any, params: Any, images: jax.Array) -> jax.Array:
    return module.apply({"params": params}, images, method="encode")


def _wait(name: str) -> None:
    """Wait for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"encode {name}")


def measure_std(folder: Path, manifest: Manifest) -> float:
    """The standard deviation of latents of the split to train on.

    It is that of all numbers, drawn from their moments, of SAMPLED examples at equal distances, or
    of all examples.
    """
    shards = Shards(folder, manifest, TRAIN)
    rows = np.unique(np.linspace(0, len(shards) - 1, SAMPLED).round().astype(int))
    sums = np.zeros(3)
    for row in rows:
        mean, logvar = np.split(np.float64(shards[row][MOMENTS]), 2, axis=-1)
        sums += [mean.mean(), (mean**2).mean(), np.exp(logvar).mean()]
    mean, square, variance = sums / len(rows)
    return float(np.sqrt(square + variance - mean**2))


# ------------------------------------------------------------------------------- what is encoded


def open_encoding(
    autoencoder: TrainedAutoencoder,
    config: Config,
    dataset: Dataset,
    folder: Path,
    options: EncodeOptions,
) -> Encoding:
    """Check that images can be encoded into a folder, which may have some already.

    config: of the data set, which is of images.

    Raises: ValueError for an autoencoder that diffusers does not have, images that it does not
    take, and for a folder that has other files, or latents of another autoencoder or of other
    images.
    """
    autoencoder_kl.check(autoencoder.config)
    shape = dataset.image_shape
    channels = autoencoder.image_channels
    if shape[-1] != channels:
        raise ValueError(
            f"{config.data} has images of {shape[-1]} channels, and the autoencoder takes"
            f" {channels}: use the images that it was trained on, or data.grey"
        )
    manifest = Manifest(
        shape=autoencoder.config.latent_shape(shape),
        dtype=options.dtype,
        mirrored=options.mirror,
        splits={TRAIN: len(dataset.train), HELD_OUT: len(dataset.held_out)},
        shard=options.shard,
        fields=dataset.fields,
        data=dataclasses.asdict(config.data),
        images=shape,
        digest=digest_of(dataset),
        source=autoencoder.source,
        autoencoder=autoencoder.checksum,
        scaling=autoencoder.config.scaling,
        shift=autoencoder.config.shift,
    )
    _check_folder(folder, manifest, autoencoder)
    return Encoding(autoencoder, dataset, folder, manifest, options)


def digest_of(dataset: Dataset) -> str:
    """A checksum of some images of both splits, at equal distances."""
    found = hashlib.blake2b(digest_size=16)
    for split in (dataset.train, dataset.held_out):
        for row in np.unique(np.linspace(0, len(split) - 1, DIGESTED).round().astype(int)):
            found.update(np.ascontiguousarray(split[int(row)]["image"]).tobytes())
    return found.hexdigest()


def _check_folder(folder: Path, manifest: Manifest, autoencoder: TrainedAutoencoder) -> None:
    """Check that a folder is empty, absent, or has a part of the same latents."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out is {folder}, which is a file: use a folder")
    stored = read_manifest(folder)
    if stored is None:
        if folder.is_dir() and any(path.suffix != ".part" for path in folder.iterdir()):
            raise ValueError(f"out is {folder}, which has other files: use an empty folder")
        return
    scale = ("scaling", "shift") if autoencoder.config.scaling != 1 else ()
    for name in (*_COMPARED, *scale):
        old, new = getattr(stored, name), getattr(manifest, name)
        if old != new:
            raise ValueError(
                f"out is {folder}, whose latents have {name} {old}, and these would have {new}: use"
                " another folder"
            )


_COMPARED = (
    "autoencoder", "splits", "images", "digest", "fields", "dtype", "mirrored", "shard",
)  # fmt: skip
