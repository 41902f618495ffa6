"""Distill a trained model into models of few steps."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from diffjax.checkpoint import silence_orbax
from diffjax.cli import common
from diffjax.cli.options import Flag, Folder, Model, WeightsOptions
from diffjax.cli.train import train
from diffjax.devices.distributed import DistributedOptions, initialize_distributed
from diffjax.inference.model import TrainedModel, load_model
from diffjax.training.distill import (
    DistillOptions,
    check_workdir,
    default_options,
    plan_chain,
    with_teacher,
)


@dataclass(frozen=True)
class Options:
    """Distill a trained model into students of few steps.

    Each student is a run folder, and the teacher of the next. The same command again resumes.
    """

    teacher: Model
    """Run folder of the teacher, or hf:FOLDER or hf:OWNER/NAME for a published model."""
    workdir: Folder
    """Folder of the students: any (of any number of steps), 32, 16, ..., 1, or consistency."""
    tensorboard: Flag = False
    """Write metrics and previews for TensorBoard too, in the folder of each student."""
    weight: tyro.conf.OmitArgPrefixes[WeightsOptions] = field(default_factory=WeightsOptions)
    hosts: tyro.conf.OmitArgPrefixes[DistributedOptions] = field(default_factory=DistributedOptions)
    chain: Annotated[DistillOptions, tyro.conf.arg(name="")] = field(default_factory=DistillOptions)


class Request(NamedTuple):
    """Options with their words, to be parsed again with the teacher's defaults."""

    options: Options
    program: str
    arguments: list[str]


def parse(program: str, arguments: list[str]) -> Request:
    """Parse the options, but for the defaults that the teacher gives."""
    return Request(common.parse(Options, program, arguments), program, arguments)


def run(request: Request) -> None:
    """Train one student after the other; those that are done stay as they are."""
    silence_orbax()
    with common.user_errors():
        initialize_distributed(request.options.hosts)
        weight = request.options.weight
        teacher = load_model(request.options.teacher, weight.checkpoint, weight.weights)
    options = parse_with_teacher(request, teacher)
    workdir = Path(options.workdir)
    with common.user_errors():
        stages = plan_chain(options.chain, teacher)
        check_workdir(workdir)
    for stage in stages:
        config = with_teacher(stage.config, teacher)
        folder = workdir / stage.name
        train(config, folder, teacher=teacher, tensorboard=options.tensorboard)
        with common.user_errors():
            teacher = load_model(folder)


def parse_with_teacher(request: Request, teacher: TrainedModel) -> Options:
    """Parse again, with the data and the training of the teacher as defaults."""
    chain = default_options(request.options.chain, teacher)
    default = dataclasses.replace(request.options, chain=chain)
    return common.parse(Options, request.program, request.arguments, default)
