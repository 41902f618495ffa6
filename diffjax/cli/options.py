"""Groups of options that several commands share: one spelling for one idea."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from diffjax.build import image_config
from diffjax.cli import common
from diffjax.config import Config
from diffjax.data.latents import MANIFEST
from diffjax.inference.defaults import default_sampler, default_steps
from diffjax.inference.model import TrainedModel
from diffjax.inference.samplers import make_plan, parse_sampler
from diffjax.sampler import Plan

Model = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
ConfigName = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CONFIG")]
Flag = tyro.conf.FlagCreatePairsOff[bool]  # off by default, without a --no-NAME
Folder = Annotated[str, tyro.conf.arg(metavar="FOLDER")]
File = Annotated[str | None, tyro.conf.arg(metavar="FILE")]
Files = Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE ...")]
Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT")]
Step = Annotated[int | None, tyro.conf.arg(metavar="STEP")]
Count = Annotated[int | None, tyro.conf.arg(metavar="N")]
Number = Annotated[float | None, tyro.conf.arg(metavar="X")]
Numbers = Annotated[str, tyro.conf.arg(metavar="N,N,...")]
SamplerText = Annotated[str | None, tyro.conf.arg(metavar="SAMPLER")]


@dataclass(frozen=True)
class WeightsOptions:
    """Weights of the model."""

    weights: Annotated[str, tyro.conf.arg(metavar="ema|raw|DECAY")] = "ema"
    """ema (the moving average), raw (as trained), or the decay of one of several averages."""
    checkpoint: Step = None
    """Training step of the checkpoint; None for the latest."""


@dataclass(frozen=True)
class ReportOptions:
    """A file for what is printed."""

    report: File = None
    """File for what is printed, in Markdown (.md), with its tables as wide as they are."""

    def check_report(self) -> Path | None:
        """The file, None for none.

        Raises: ValueError for one that cannot be written.
        """
        return common.check_output(Path(self.report), ".md") if self.report else None


@dataclass(frozen=True)
class FolderOptions:
    """A folder of single images."""

    out_dir: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of single images (.png), one file each, which may have none of them yet."""
    overwrite: Flag = False
    """Replace the images that are in that folder."""

    def check_folder(self, names: Sequence[str]) -> Path | None:
        """The folder, in which files of these names can be written.

        Raises: ValueError for a folder that cannot be written to, or has such files.
        """
        if self.out_dir is None:
            if self.overwrite:
                raise ValueError("overwrite is for images of out_dir, which is not given")
            return None
        if not self.out_dir.strip():
            raise ValueError(f"out_dir is {self.out_dir!r}: name a folder")
        return common.check_output_folder(Path(self.out_dir), names, overwrite=self.overwrite)


@dataclass(frozen=True)
class DataOptions:
    """Data of the model."""

    path: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """Folder or .npz file of the images, or folder of the latents, where they have moved since
    training."""

    def trained_on(self, config: Config) -> Config:
        """The configuration with the images of training: those that latents are of.

        Latents may have moved; the path of images stays as it was.

        Raises: ValueError for latents whose folder is not where it was.
        """
        return image_config(self._moved(config) if self._has_latents(config) else config)

    def locate(self, config: Config) -> Config:
        """The configuration with the images where they are now: those that latents are of.

        Raises: ValueError for a path of data that are no folder or file, and for latents whose
        folder is not where it was.
        """
        images = self.trained_on(config)
        if self.path is None or self._has_latents(config):
            return images
        if images.data.source == "tfds":
            raise ValueError(
                f"data.path is {self.path!r}, and {images.data} is no folder or .npz file: leave"
                " it out"
            )
        return self._moved(images)

    def _has_latents(self, config: Config) -> bool:
        """Return whether the path is that of a configuration's latents, not of their images."""
        is_latent = self.path is not None and config.data.source == "latents"
        return is_latent and (Path(self.path or "") / MANIFEST).is_file()

    def _moved(self, config: Config) -> Config:
        return replace(config, data=replace(config.data, path=self.path))


@dataclass(frozen=True)
class SamplerOptions:
    """Sampler and its steps."""

    sampler: SamplerText = None
    """Sampler: ddim, "ddim(eta=0.5):50" or "ddpm(variance=fixed_large, spacing=leading)".
    None for ddim, or what a distilled model was trained for."""
    steps: Count = None
    """Noise levels to visit, from 1 to T, unless --sampler ends in :N.
    None for all T with ddpm, 50 with others, or what a distilled model was trained for."""


def choose_plan(options: SamplerOptions, model: TrainedModel) -> tuple[Plan, str]:
    """The plan of a sampler and its full name, by default those of the model.

    Raises: ValueError for a sampler or a number of steps that cannot be used.
    """
    distillation = model.info.config.distillation
    name = options.sampler or default_sampler(distillation, model.schedule)[0]
    request = parse_sampler(name)
    steps = options.steps
    if steps is None:
        steps = default_steps(distillation, model.schedule, request.name)
    return make_plan(request, model.schedule, steps)
