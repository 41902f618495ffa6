"""Convert between run folders and Hugging Face folders."""

import dataclasses
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from diffjax.cli import common
from diffjax.cli.options import Text, WeightsOptions
from diffjax.config import Config, Data, config_names, load_config
from diffjax.data.latents import AUTOENCODER
from diffjax.inference.autoencoder import is_autoencoder, load_autoencoder, save_autoencoder
from diffjax.inference.model import TrainedModel, load_model
from diffjax.inference.weights import load_weights
from diffjax.interop import hub
from diffjax.training.run_folder import write_run

# For further training: an imported network does not need the high rate of a new one.
STEPS, LEARNING_RATE = 10_000, 1e-4


@dataclass(frozen=True)
class Options:
    """Convert a published model to a run folder, or back.

    As in: diffjax convert hf:google/ddpm-cifar10-32 runs/cifar10 --data cifar10
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """hf:FOLDER, hf:OWNER/NAME or FILE.pt, or a run folder."""
    destination: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DESTINATION")]
    """New run folder, or hf:FOLDER."""
    data: Text = None
    """Data of an imported network, to train it further: those of a configuration, by its name or
    path, as cifar10 or folder.py, or a data set of tfds; None if not known."""
    autoencoder: Annotated[str | None, tyro.conf.arg(metavar="AUTOENCODER")] = None
    """Autoencoder of the latents of a FILE.pt: hf:FOLDER, hf:OWNER/NAME or its run folder."""
    weight: tyro.conf.OmitArgPrefixes[WeightsOptions] = field(default_factory=WeightsOptions)


def run(options: Options) -> None:
    """Convert."""
    source, destination = options.source, options.destination
    with common.user_errors():
        is_import = hub.is_source(source)
        if is_import == hub.is_source(destination):
            raise ValueError(
                f"source is {source} and destination {destination}: write hf: before the"
                " one that is a Hugging Face folder"
            )
        if not is_import:
            for name in ("data", "autoencoder"):
                if value := getattr(options, name):
                    raise ValueError(
                        f"{name} is {value}, and {source} records its own: leave it out"
                    )
        notes, next_steps = (import_model if is_import else export_model)(options)
    for note in notes:
        print(note)
    print(f"wrote {destination}: {next_steps[0]}")
    for each in next_steps[1:]:
        print(each)


def import_model(options: Options) -> tuple[list[str], list[str]]:
    """Write the run folder of a published model; return notes and next steps.

    Raises: ValueError or OSError for a model that cannot be read, or a folder that has one.
    """
    source, weight, words = options.source, options.weight, shlex.quote(options.destination)
    if is_autoencoder(source):
        found = hub.load(hub.locate(source))
        info = found.info._replace(config=run_config(found, options.data))
        write_run(info, found.params, found.step, Path(options.destination))
        return [], [
            f"use it with: diffjax encode {words}, or evaluate it with: diffjax evaluate {words}"
        ]
    autoencoder = load_autoencoder(options.autoencoder) if options.autoencoder else None
    model = load_model(source, weight.checkpoint, weight.weights, autoencoder)
    config = run_config(model, options.data)
    if model.autoencoder is not None and config.data.known and config.data.source != "latents":
        raise ValueError(
            f"data is {options.data}, of images, and {source} is trained on latents: encode them,"
            " and name a configuration of the latents"
        )
    info = model.info._replace(config=config)
    write_run(info, model.params, model.step, Path(options.destination))
    if model.autoencoder is not None:
        save_autoencoder(Path(options.destination) / AUTOENCODER, model.autoencoder)
    then = [f"sample from it with: diffjax sample {words}"]
    if config.distillation.method == "none":
        named = "" if config.data.known else " --data.name NAME"
        if model.autoencoder is not None:
            named = " --data.source latents --data.path FOLDER"
        then.append(f"train it further with: diffjax train --resume {words}{named}")
    return [f"{model.name}: {note}" for note in model.notes], then


def export_model(options: Options) -> tuple[list[str], list[str]]:
    """Write a run's model for diffusers; return notes and next steps.

    Raises: ValueError or OSError for a model that diffusers does not have, or a folder that has
    one.
    """
    source, weight = options.source, options.weight
    folder, words = Path(options.destination.removeprefix(hub.PREFIX)), options.destination
    for name in ("config.json", "model_index.json", *hub.NETWORKS):
        if (folder / name).exists():
            raise ValueError(f"{folder} already has a {name}: use another folder")
    if is_autoencoder(source):
        info, params, weights, step = load_weights(Path(source), weight.checkpoint, weight.weights)
        hub.save(folder, info, params, weights, step)
        return [], [f"evaluate it with: diffjax evaluate {shlex.quote(words)} --data.config CONFIG"]
    model = load_model(source, weight.checkpoint, weight.weights)
    coder = None if model.autoencoder is None else model.autoencoder[:2]
    hub.save(folder, model.info, model.params, model.weights, model.step, coder)
    notes = [f"{model.name}: {note}" for note in model.notes]
    return notes, [f"sample from it with: diffjax sample {shlex.quote(words)}"]


def run_config(model: TrainedModel | hub.Imported, data: str | None) -> Config:
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
