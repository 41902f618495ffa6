"""Convert between run folders and Hugging Face folders."""

import dataclasses
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from diffjax.build import build_optimizer
from diffjax.checkpoint import FOLDER, Checkpoints
from diffjax.cli import common
from diffjax.cli.options import Text, WeightsOptions
from diffjax.config import Config, Data, config_names, load_config
from diffjax.inference.model import TrainedModel, load_model
from diffjax.interop import hub
from diffjax.training.state import init_state, state_to_trees

# For further training: an imported network does not need the high rate of a new one.
STEPS, LEARNING_RATE = 10_000, 1e-4


@dataclass(frozen=True)
class Options:
    """Convert a published model to a run folder, or back.

    As in: diffjax convert hf:google/ddpm-cifar10-32 runs/cifar10 --data cifar10
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """hf:FOLDER or hf:OWNER/NAME, or a run folder."""
    destination: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DESTINATION")]
    """New run folder, or hf:FOLDER."""
    data: Text = None
    """Data of an imported network, to train it further: those of a configuration, by its name or
    path, as cifar10 or folder.py, or a data set of tfds; None if not known."""
    weight: tyro.conf.OmitArgPrefixes[WeightsOptions] = field(default_factory=WeightsOptions)


def run(options: Options) -> None:
    """Convert."""
    source, destination = options.source, options.destination
    config = None
    with common.user_errors():
        is_import = hub.is_source(source)
        if is_import == hub.is_source(destination):
            raise ValueError(
                f"source is {source} and destination {destination}: write hf: before the"
                " one that is a Hugging Face folder"
            )
        if options.data and not is_import:
            raise ValueError(f"data is {options.data}, and {source} records its own: leave it out")
        model = load_model(source, options.weight.checkpoint, options.weight.weights)
        if is_import:
            config = run_config(model, options.data)
            write_run(model, config, Path(destination))
        else:
            folder = Path(destination.removeprefix(hub.PREFIX))
            if (folder / "config.json").exists():
                raise ValueError(f"{folder} already has a config.json: use another folder")
            hub.save(folder, model.info, model.params, model.weights, model.step)
    for note in model.notes:
        print(f"{model.name}: {note}")
    words = shlex.quote(destination)
    print(f"wrote {destination}: sample from it with: diffjax sample {words}")
    if config is not None and config.distillation.method == "none":
        named = "" if config.data.known else " --data.name NAME"
        print(f"train it further with: diffjax train --resume {words}{named}")


def run_config(model: TrainedModel, data: str | None) -> Config:
    """The configuration of an imported network's run, with further training in it.

    Raises: ValueError for a configuration that cannot be read.
    """
    config = model.info.config
    train = dataclasses.replace(config.train, steps=model.step + STEPS, learning_rate=LEARNING_RATE)
    if data is not None:
        conditions = config.data.conditions
        is_config = data in config_names() or data.endswith(".py")
        named = load_config(data).data if is_config else Data(name=data)
        config = dataclasses.replace(config, data=dataclasses.replace(named, conditions=conditions))
    return dataclasses.replace(config, train=train)


def write_run(model: TrainedModel, config: Config, workdir: Path) -> None:
    """Write a run folder with one checkpoint, of the source's training step, or 0.

    Its moving average and its parameters are the same.

    Raises: ValueError for a folder that has checkpoints; OSError if it cannot be written.
    """
    if (workdir / FOLDER).is_dir():
        raise ValueError(f"{workdir} already has checkpoints: use another folder")
    optimizer, _ = build_optimizer(config)
    state = init_state(model.params, optimizer, len(config.train.ema))
    state = state._replace(step=state.step + model.step)
    checkpoints = Checkpoints(workdir)
    checkpoints.save(
        model.step, state_to_trees(state), model.info._replace(config=config).to_dict()
    )
    checkpoints.close()
