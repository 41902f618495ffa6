"""Compile training and sampling without running them, and print what they cost."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from diffjax.bench import dry_run
from diffjax.build import describe_model
from diffjax.cli import common
from diffjax.cli.options import ConfigName
from diffjax.config import Config


@dataclass(frozen=True)
class Options:
    """Compile training and sampling, and print their cost per device.

    Nothing is trained and no data are downloaded; libtpu compiles for TPUs that are not here.
    """

    config: ConfigName
    """Name of a configuration, or path of a Python file that defines `config`."""
    target: Annotated[str, tyro.conf.arg(metavar="TARGET")]
    """Devices: TPUs as in v5e:2x2, which takes libtpu, or cpu for those of this machine."""
    experiment: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def parse(program: str, arguments: list[str]) -> Options:
    """Parse the options, whose defaults are those of the named configuration."""
    return common.parse_with_config(Options, program, arguments)


def run(options: Options) -> None:
    """Print the table, or what does not fit."""
    with common.user_errors():
        options.experiment.check()
        info = describe_model(options.experiment)
        table, too_large = dry_run.report(info, options.target)
    print(table)
    if too_large:
        raise common.UserError(too_large)
