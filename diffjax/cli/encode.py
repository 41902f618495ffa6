"""Encode a data set of images to latents."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import jax
import tyro

from diffjax.build import load_data
from diffjax.cli import common
from diffjax.cli.options import DataOptions, Flag, Folder
from diffjax.config import Config, load_config
from diffjax.data.latents import HELD_OUT, TRAIN, Manifest
from diffjax.devices import parallel
from diffjax.devices.distributed import (
    DistributedOptions,
    first_process_first,
    initialize_distributed,
)
from diffjax.inference.autoencoder import TrainedAutoencoder, load_autoencoder
from diffjax.inference.encoding import Dtype, EncodeOptions, Encoding, open_encoding


@dataclass(frozen=True)
class ImageDataOptions(DataOptions):
    """Data of the images."""

    config: Annotated[str | None, tyro.conf.arg(metavar="CONFIG")] = None
    """Configuration of the images, as cifar10; None for those that the autoencoder was trained
    on."""

    def read_config(self, autoencoder: TrainedAutoencoder) -> Config:
        """The configuration of the images.

        Raises: ValueError for one that does not exist, or is of latents; for an autoencoder whose
        images are unknown; or a path that the images do not take.
        """
        if self.config is not None:
            config = load_config(self.config)
        elif autoencoder.info is not None:
            config = autoencoder.info.config
        else:
            raise ValueError(
                f"data.config is not given, and the images of {autoencoder.source} are unknown:"
                " name a configuration"
            )
        if config.data.source == "latents":
            raise ValueError(f"{config.data} are latents: use a configuration of images")
        return self.locate(config)


@dataclass(frozen=True)
class Options:
    """Encode images to the moments of their latents, once, to train models of latents.

    The same command again resumes.
    """

    autoencoder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="AUTOENCODER")]
    """Run folder of an autoencoder, or hf:FOLDER or hf:OWNER/NAME for a published one."""
    out: Folder
    """Folder of the latents, which is created."""
    data: ImageDataOptions = field(default_factory=ImageDataOptions)
    batch: int = 64
    """Images at a time, over the devices of a process."""
    mirror: Flag = False
    """Also encode each image mirrored, for data.flip."""
    dtype: Dtype = "float32"
    """Type of the stored moments; float16 takes half the space, and rounds to 3 digits."""
    hosts: tyro.conf.OmitArgPrefixes[DistributedOptions] = field(default_factory=DistributedOptions)


def run(options: Options) -> None:
    """Encode, write, print; the last two on process 0."""
    with common.user_errors():
        initialize_distributed(options.hosts)
        autoencoder = load_autoencoder(options.autoencoder)
        encoding = open_images(options, autoencoder)
    is_first = jax.process_index() == 0
    bar = common.progress_bar(encoding.images, "encoding", unit="image", disable=not is_first)
    with bar, common.user_errors():
        manifest = encoding.run(common.compiling(bar, "encoding"))
    if is_first:
        print(describe(options.out, manifest))


def open_images(options: Options, autoencoder: TrainedAutoencoder) -> Encoding:
    """The encoding that is asked for.

    Raises: ValueError or OSError for images that cannot be used, or a folder that has others.
    """
    if options.batch < 1:
        raise ValueError(f"batch is {options.batch}: use 1 or more")
    config = options.data.read_config(autoencoder)
    dataset = first_process_first("data", partial(load_data, config))
    for note in dataset.notes if jax.process_index() == 0 else ():
        print(note)
    asked = EncodeOptions(
        batch=parallel.round_up(options.batch, len(parallel.device_mesh().local_devices)),
        mirror=options.mirror,
        dtype=options.dtype,
    )
    return open_encoding(autoencoder, config, dataset, Path(options.out), asked)


def describe(out: str, manifest: Manifest) -> str:
    """A sentence on the latents of a folder."""
    size = "x".join(map(str, manifest.shape))
    mirrored = ", and of their mirrors" if manifest.mirrored else ""
    return (
        f"{out}: latents of {size} of {manifest.splits[TRAIN]} images to train on and"
        f" {manifest.splits[HELD_OUT]} held out{mirrored}, {manifest.dtype}, scaling"
        f" {manifest.scaling:.5g}"
    )
