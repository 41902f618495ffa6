"""Distill a trained model into models of few steps."""

import dataclasses
import typing
from collections.abc import Container, Iterable
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from diffjax.checkpoint import silence_orbax
from diffjax.cli import common
from diffjax.cli.options import Flag, Folder, Model, WeightsOptions
from diffjax.cli.train import named_fields, train
from diffjax.config import Data, Train
from diffjax.devices.distributed import DistributedOptions, initialize_distributed
from diffjax.inference.model import TrainedModel, load_model
from diffjax.training.distill import (
    TRAIN_DEFAULTS,
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
    kind = help_options() if {"-h", "--help"} & set(arguments) else Options
    return Request(common.parse(kind, program, arguments), program, arguments)


def help_options() -> type[Options]:
    """`Options` for the help text, which is printed before the teacher is known.

    Fields with the teacher's defaults show no value.
    """
    data = _subclass(Data, _from_teacher(Data))
    fixed = tyro.conf.arg(help_behavior_hint="(default: 0, and students take no other)")
    dropout = "condition_dropout", Annotated[float, fixed]
    train = _subclass(Train, [*_from_teacher(Train, TRAIN_DEFAULTS), dropout])
    parts = ("data", data, data()), ("train", train, train(**TRAIN_DEFAULTS))
    chain = _subclass(DistillOptions, parts)
    return _subclass(Options, [("chain", Annotated[chain, tyro.conf.arg(name="")], chain())])


def _from_teacher(kind: type, own: Container[str] = ()) -> list[tuple[str, Any]]:
    """Names and types of the fields, but for those with defaults of their own."""
    hint = tyro.conf.arg(help_behavior_hint="(default: from the teacher)")
    types = typing.get_type_hints(kind, include_extras=True).items()
    return [(name, Annotated[each, hint]) for name, each in types if name not in own]


def _subclass(kind: type, new_fields: Iterable[Any]) -> Any:
    # It has the help texts of its base, and the defaults where none are given.
    names = {"__doc__": kind.__doc__}
    return make_dataclass(kind.__name__, new_fields, bases=(kind,), namespace=names, frozen=True)


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
        # The option of the chain that gives this field is checked when a student is resumed.
        named = (*named_fields(request.arguments), "diffusion.prediction")
        train(config, folder, named, teacher=teacher, tensorboard=options.tensorboard)
        with common.user_errors():
            teacher = load_model(folder)


def parse_with_teacher(request: Request, teacher: TrainedModel) -> Options:
    """Parse again, with the data and the training of the teacher as defaults."""
    chain = default_options(request.options.chain, teacher)
    # A flag is off by default: one that is on has no word to turn it on.
    default = dataclasses.replace(request.options, chain=chain, tensorboard=False)
    return common.parse(Options, request.program, request.arguments, default)
