"""Convert between run folders and Hugging Face folders."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from diffjax.build import build_optimizer
from diffjax.checkpoint import FOLDER, Checkpoints
from diffjax.cli import common
from diffjax.cli.options import Text, WeightsOptions
from diffjax.inference.model import TrainedModel, load_model
from diffjax.interop import unet2d
from diffjax.training.state import init_state, state_to_trees


@dataclass(frozen=True)
class Options:
    """Convert a Hugging Face folder of a UNet2DModel to a run folder, or back.

    As in: diffjax convert hf:google/ddpm-cifar10-32 runs/cifar10
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """hf:FOLDER or hf:OWNER/NAME, or a run folder."""
    destination: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DESTINATION")]
    """New run folder, or hf:FOLDER."""
    data: Text = None
    """Data set that an imported network was trained on, as cifar10; None if not known."""
    weight: tyro.conf.OmitArgPrefixes[WeightsOptions] = field(default_factory=WeightsOptions)


def run(options: Options) -> None:
    """Convert."""
    source, destination = options.source, options.destination
    with common.user_errors():
        is_import = unet2d.is_source(source)
        if is_import == unet2d.is_source(destination):
            raise ValueError(
                f"source is {source} and destination {destination}: write hf: before the"
                " one that is a Hugging Face folder"
            )
        if options.data and not is_import:
            raise ValueError(f"data is {options.data}, and {source} records its own: leave it out")
        model = load_model(source, options.weight.checkpoint, options.weight.weights)
        if is_import:
            write_run(model, Path(destination), options.data)
        else:
            folder = Path(destination.removeprefix(unet2d.PREFIX))
            if (folder / "config.json").exists():
                raise ValueError(f"{folder} already has a config.json: use another folder")
            unet2d.save(folder, model.info, model.params, model.weights, model.step)
    for note in model.notes:
        print(f"{model.name}: {note}")
    print(f"wrote {destination}: sample from it with 'diffjax sample {destination}'")


def write_run(model: TrainedModel, workdir: Path, data: str | None) -> None:
    """Write a run folder with one checkpoint, of the source's training step, or 0.

    Its moving average and its parameters are the same.

    Raises: ValueError for a folder that has checkpoints; OSError if it cannot be written.
    """
    if (workdir / FOLDER).is_dir():
        raise ValueError(f"{workdir} already has checkpoints: use another folder")
    info = model.info
    if data is not None:
        own_data = dataclasses.replace(info.config.data, name=data)
        info = info._replace(config=dataclasses.replace(info.config, data=own_data))
    optimizer, _ = build_optimizer(info.config)
    state = init_state(model.params, optimizer, len(info.config.train.ema))
    state = state._replace(step=state.step + model.step)
    checkpoints = Checkpoints(workdir)
    checkpoints.save(model.step, state_to_trees(state), info.to_dict())
    checkpoints.close()
