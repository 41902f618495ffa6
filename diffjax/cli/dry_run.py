"""Compile training and sampling without running them, and print what they cost."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

import diffjax
from diffjax.bench import dry_run
from diffjax.build import ModelInfo, describe_model
from diffjax.cli import common
from diffjax.cli.options import ConfigName, Count
from diffjax.config import Config
from diffjax.nn.conditioning import UNCONDITIONAL, ClassLabel

CHILD = "DIFFJAX_DRY_RUN_CHILD"  # a variable of the environment of the process that compiles
PROGRAM = (sys.executable, "-m", "diffjax", "dry-run")


@dataclass(frozen=True)
class Options:
    """Compile training and sampling, and print their cost per device.

    Nothing is trained and no data are downloaded; libtpu compiles for TPUs that are not here.
    """

    config: ConfigName
    """Name of a configuration, or path of a Python file that defines `config`."""
    target: Annotated[str, tyro.conf.arg(metavar="TARGET")]
    """Devices: TPUs as in v5e:2x2, which takes libtpu, or cpu for those of this machine."""
    x_shape: Annotated[str | None, tyro.conf.arg(metavar="N,N,N")] = None
    """Shape of x in place of that of the data, which are then not read: 32,32,4 for latents."""
    classes: Count = None
    """With --x-shape, the number of classes of a network that is conditioned on labels."""
    experiment: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


class Request(NamedTuple):
    """Options with their words, for the process that compiles."""

    options: Options
    arguments: list[str]


def parse(program: str, arguments: list[str]) -> Request:
    """Parse the options, whose defaults are those of the named configuration."""
    return Request(common.parse_with_config(Options, program, arguments), arguments)


def run(request: Request) -> None:
    """Print the table, or what does not fit."""
    options = request.options
    with common.user_errors():
        options.experiment.check()
        dry_run.check_target(options.target)
    if options.target != "cpu" and CHILD not in os.environ:
        run_child(request)
        return
    with common.user_errors():
        info = describe(options)
        table, too_large = dry_run.report(info, options.target)
    print(table)
    if too_large:
        raise common.UserError(too_large)


def describe(options: Options) -> ModelInfo:
    """The description of the model, from its data or from the options in their place.

    Raises: ValueError for options that do not describe x and its condition.
    """
    config, classes = options.experiment, options.classes
    conditions = config.data.conditions
    if options.x_shape is None:
        if classes is not None:
            raise ValueError(f"classes is {classes}, for data without --x-shape: leave it out")
        return describe_model(config)
    sides = options.x_shape.split(",")
    if len(sides) != 3 or not all(side.strip().isdecimal() and int(side) for side in sides):
        raise ValueError(
            f"x_shape is {options.x_shape!r}: use height, width and channels, as in 32,32,4"
        )
    if (classes is None) == bool(conditions) or conditions not in ((), ("label",)):
        raise ValueError(
            f"classes is {classes} and data.conditions {conditions}: with --x-shape use a number of"
            " classes for the condition label, or no condition and no classes"
        )
    if classes is not None and classes < 1:
        raise ValueError(f"classes is {classes}: use 1 or more")
    conditioning = UNCONDITIONAL if classes is None else ClassLabel(classes)
    return ModelInfo(config, tuple(map(int, sides)), conditioning)


def run_child(request: Request) -> None:
    """Run the same command in a process of its own, which libtpu may abort.

    Raises: UserError with the child's sentence, or if it was aborted.
    """
    package = str(Path(diffjax.__file__).parents[1])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*PROGRAM, *request.arguments],
        env=os.environ | {CHILD: "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout, end="")
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode == 2 and lines:
        raise common.UserError(lines[-1].removeprefix("diffjax dry-run: "))
    if done.returncode:
        reason = f": {lines[-1]}" if lines and done.returncode > 0 else ""
        raise common.UserError(
            f"target is {request.options.target!r}, and the compiler"
            f" {_describe_end(done.returncode)}{reason}; use another topology"
        )


def _describe_end(code: int) -> str:
    number = -code if code < 0 else code - 128  # a shell in between adds 128
    names = {each.value: each.name for each in signal.Signals}
    return f"aborted ({names[number]})" if number in names else f"ended with code {code}"
