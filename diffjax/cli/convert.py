"""Between run folders and diffusers' UNet2DModel folders.

diffjax convert hf:google/ddpm-cifar10-32 runs/cifar10
diffjax convert runs/digits hf:exported
"""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from diffjax.build import build_optimizer
from diffjax.checkpoint import FOLDER, Checkpoints
from diffjax.cli import common
from diffjax.inference.pipeline import TrainedModel, load_model
from diffjax.interop import unet2d
from diffjax.training.step import init_state

PROGRAM = "diffjax convert"


@dataclass(frozen=True)
class Options:
    """Make a run folder of a UNet2DModel of diffusers, or the reverse; hf: marks the folder that is theirs."""

    source: tyro.conf.Positional[str]
    """hf:FOLDER or hf:OWNER/NAME; or a run folder."""
    destination: tyro.conf.Positional[str]
    """A new run folder; or hf:FOLDER."""
    data: str | None = None
    """The dataset that the network was trained on, to edit, evaluate and train it further."""
    checkpoint: int | None = None
    """Training step of the checkpoint of a run; None for the latest."""
    weights: Literal["ema", "raw"] = "ema"
    """Of a run: the moving average of the parameters, or the parameters as trained."""


def main(arguments: list[str]) -> None:
    """Parse and convert."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    options = common.parse(Options, PROGRAM, arguments)
    with common.user_errors(PROGRAM):
        theirs, into_theirs = unet2d.is_source(options.source), unet2d.is_source(options.destination)
        if theirs == into_theirs:
            raise ValueError(
                "one of the two is to be a folder of diffusers: write hf: before it, and not before the other"
            )
        if into_theirs and options.data:
            raise ValueError("--data belongs to a network from diffusers: leave it out")
        run = load_model(options.source, options.checkpoint, options.weights)
        if theirs:
            to_run(run, Path(options.destination), options.data)
        else:
            folder = Path(options.destination.removeprefix(unet2d.PREFIX))
            if (folder / "config.json").exists():
                raise ValueError(f"{folder} holds a config.json already: name another folder")
            unet2d.save(folder, *run.description, run.params, run.weights, run.step)
    for remark in run.remarks:
        print(f"{run.name}: {remark}")
    print(f"wrote {options.destination}: sample from it with 'diffjax sample {options.destination}'")


def to_run(run: TrainedModel, workdir: Path, data: str | None) -> None:
    """Write a run folder with one checkpoint, of the step that the source tells, or 0. Its moving average and its
    parameters are the same. ValueError for a folder that holds checkpoints.
    """
    if (workdir / FOLDER).is_dir():
        raise ValueError(f"{workdir} holds checkpoints already: name another folder")
    config = run.description.config
    if data is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, name=data))
    optimizer, _ = build_optimizer(config)
    state = init_state(run.params, optimizer, len(config.train.ema))
    checkpoints = Checkpoints(workdir)
    checkpoints.save(state._replace(step=state.step + run.step), run.description._replace(config=config).to_dict())
    checkpoints.close()
