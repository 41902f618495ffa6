"""Train a diffusion model."""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import jax
import tyro

from diffjax.checkpoint import silence_orbax
from diffjax.cli import common
from diffjax.cli.options import ConfigName, Flag, Folder
from diffjax.config import Config
from diffjax.data.dataset import UnreadableError
from diffjax.devices.distributed import DistributedOptions, initialize_distributed
from diffjax.inference.model import TrainedModel
from diffjax.training import trainer
from diffjax.training.trainer import TrainResult


@dataclass(frozen=True)
class Options:
    """Train a diffusion model, or resume from its last checkpoint."""

    config: ConfigName
    """Name of a configuration, or path of a Python file that defines `config`."""
    workdir: Folder
    """Run folder for checkpoints, metrics.jsonl, previews and the loss curve."""
    tensorboard: Flag = False
    """Write metrics and previews for TensorBoard too, to the folder tensorboard of the run
    folder."""
    hosts: tyro.conf.OmitArgPrefixes[DistributedOptions] = field(default_factory=DistributedOptions)
    experiment: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def parse(program: str, arguments: list[str]) -> Options:
    """Parse the options, whose defaults are those of the named configuration."""
    return common.parse_with_config(Options, program, arguments)


def run(options: Options) -> None:
    """Train, or resume."""
    silence_orbax()
    with common.user_errors():
        initialize_distributed(options.hosts)
    workdir = Path(options.workdir)
    train(options.experiment, workdir, tensorboard=options.tensorboard)


def train(
    config: Config,
    workdir: Path,
    *,
    teacher: TrainedModel | None = None,
    tensorboard: Flag = False,
) -> None:
    """Train in a run folder, and print how it ended.

    Raises: UserError for what the user can correct; SystemExit with 128 plus the signal that
    interrupted training.
    """
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
        print(_describe(result, workdir, is_student=teacher is not None), flush=True)


def _run(session: trainer.Session) -> TrainResult:
    try:
        return trainer.run(session)
    except FloatingPointError as error:
        raise common.UserError(
            f"{error}: resume from the last checkpoint with a lower --train.learning-rate"
        ) from error
    except UnreadableError as error:
        raise common.UserError(error) from error
    except OSError as error:
        reason = common.describe_os_error(error)
        raise common.UserError(
            f"{reason}: correct it, and the same command resumes from the last checkpoint"
        ) from error


def _describe(result: TrainResult, workdir: Path, *, is_student: bool) -> str:
    if result.status == "done":
        return f"done: sample with 'diffjax sample {workdir}'"
    # More steps would make another teacher of a student, whose own students would be trained anew.
    more = "" if is_student else ", or train on with a higher --train.steps"
    return f"{workdir} has done its {result.step} steps: sample from it{more}"
