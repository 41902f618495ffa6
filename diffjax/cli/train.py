"""Train a diffusion model or an autoencoder."""

import dataclasses
import itertools
import shlex
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import jax
import tyro

from diffjax.checkpoint import FOLDER, silence_orbax
from diffjax.cli import common
from diffjax.cli.options import ConfigName, Flag, Folder
from diffjax.config import Config, flat_fields, forgotten_changes
from diffjax.data.dataset import UnreadableError
from diffjax.devices.distributed import DistributedOptions, initialize_distributed
from diffjax.inference.model import TrainedModel
from diffjax.training import trainer
from diffjax.training.trainer import TrainResult


@dataclass(frozen=True)
class Options:
    """Train a diffusion model or an autoencoder, or resume from its last checkpoint."""

    config: ConfigName
    """Name of a configuration, or path of a Python file that defines `config`."""
    workdir: Folder
    """Run folder for checkpoints, metrics.jsonl, previews and the loss curve."""
    resume: Annotated[str | None, tyro.conf.arg(metavar="RUN")] = None
    """Run folder to train on in, in place of CONFIG and --workdir: the options that are not given
    are those of its last checkpoint."""
    tensorboard: Flag = False
    """Write metrics and previews for TensorBoard too, to the folder tensorboard of the run
    folder."""
    hosts: tyro.conf.OmitArgPrefixes[DistributedOptions] = field(default_factory=DistributedOptions)
    experiment: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    named: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()


def parse(program: str, arguments: list[str]) -> Options:
    """Parse the options; defaults are those of a configuration or of a run."""
    run = resumed_run(arguments)
    if run is None:
        first = next(iter(arguments), "")
        if first and (Path(first) / FOLDER).is_dir():
            raise common.UserError(f"{first} is a run folder: resume it with --resume {first}")
        options = common.parse_with_config(Options, program, arguments)
        return dataclasses.replace(options, named=named_fields(arguments))
    with common.user_errors():
        config = trainer.stored_config(Path(run))
    default = Options("", run, resume=run, experiment=config)
    options = common.parse(Options, program, arguments, default)
    if options.config or options.workdir != run:
        given = f"CONFIG {options.config}" if options.config else f"--workdir {options.workdir}"
        raise common.UserError(
            f"--resume {run} is the run folder and has the configuration: leave out {given}"
        )
    return dataclasses.replace(options, named=tuple(flat_fields(config)))


def resumed_run(arguments: list[str]) -> str | None:
    """The run folder that --resume names; None without it.

    Raises: UserError where it has no value.
    """
    for word, value in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        name, _, joined = word.partition("=")
        if name == "--resume":
            if run := joined or ("" if value.startswith("-") else value):
                return run
            raise common.UserError("--resume has no value: use --resume RUN")
    return None


def named_fields(arguments: Iterable[str]) -> tuple[str, ...]:
    """The fields that options name, as in "train.steps"."""
    words = [word[2:].partition("=")[0] for word in arguments if word.startswith("--")]
    return tuple(word.replace(".no-", ".").replace("-", "_") for word in words)


def run(options: Options) -> None:
    """Train, or resume."""
    silence_orbax()
    with common.user_errors():
        initialize_distributed(options.hosts)
    workdir = Path(options.workdir)
    train(options.experiment, workdir, options.named, tensorboard=options.tensorboard)


def train(
    config: Config,
    workdir: Path,
    named: Collection[str],
    *,
    teacher: TrainedModel | None = None,
    tensorboard: Flag = False,
) -> None:
    """Train in a run folder, and print how it ended.

    named: the fields that may differ from those of the run.

    Raises: UserError for what the user can correct; SystemExit with 128 plus the signal that
    interrupted training.
    """
    check_unchanged(config, workdir, named, teacher)
    with common.user_errors():
        session = trainer.open_session(
            config,
            workdir,
            teacher=teacher,
            tensorboard=tensorboard,
            report=partial(print, flush=True),
        )
    result = _run(session)
    if result.status == "interrupted":
        print(f"interrupted: the same command resumes from step {result.step}", file=sys.stderr)
        raise SystemExit(128 + result.signal)
    if jax.process_index() == 0:
        print(_describe(result, workdir, config, is_student=teacher is not None), flush=True)


def check_unchanged(
    config: Config, workdir: Path, named: Collection[str], teacher: TrainedModel | None
) -> None:
    """Check that a configuration differs from that of the run in named fields only.

    Raises: UserError, naming the others.
    """
    try:
        stored = trainer.stored_config(workdir)
    except (ValueError, OSError):
        return  # there is no run, or the trainer says what is wrong with it
    if stored.distillation.method != "none" and teacher is None:
        raise common.UserError(
            f"{workdir} is a student of {stored.distillation.teacher or 'another model'}: the"
            " diffjax distill that made it resumes it"
        )
    if forgotten := forgotten_changes(stored, config, named):
        keep = (
            "" if teacher else f", or resume with --resume {workdir}, which keeps what the run has"
        )
        raise common.UserError(f"{'; '.join(forgotten)}: name what is to change{keep}")


def _run(session: trainer.Session) -> TrainResult:
    try:
        return trainer.run(session)
    except FloatingPointError as error:
        raise common.UserError(
            f"{error}: resume from the last checkpoint, with a lower --train.learning-rate"
        ) from error
    except UnreadableError as error:
        raise common.UserError(error) from error
    except OSError as error:
        reason = common.describe_os_error(error)
        raise common.UserError(
            f"{reason}: correct it, and the same command resumes from the last checkpoint"
        ) from error


def _describe(result: TrainResult, workdir: Path, config: Config, *, is_student: bool) -> str:
    words = shlex.quote(str(workdir))
    next_command = "evaluate" if config.is_autoencoder else "sample"
    if result.status == "done":
        return f"done: {next_command} with: diffjax {next_command} {words}"
    # More steps would make another teacher of a student, whose own students would be trained anew.
    more = (
        "" if is_student else f", or train on with: diffjax train --resume {words} --train.steps N"
    )
    then = "evaluate it" if config.is_autoencoder else "sample from it"
    return f"{workdir} has done its {result.step} steps: {then}{more}"
