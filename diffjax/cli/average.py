"""Average the parameters of a run over its training."""

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from diffjax.checkpoint import silence_orbax
from diffjax.cli import common
from diffjax.cli.options import Folder
from diffjax.training.averages import make_average
from diffjax.training.latents import copy_autoencoder
from diffjax.training.run_folder import write_run

LARGEST_ERROR = 0.05  # of a profile, without a warning


@dataclass(frozen=True)
class Options:
    """Average the parameters of a run over a chosen length of its training.

    The run must have been trained with --train.power-ema, as 0.05 0.1, which stores averages.
    As in: diffjax average runs/cifar10 --length 0.12 --out runs/cifar10-0.12
    """

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    length: float
    """Length of the average: the standard deviation of its weights over the steps, as a share of
    the training, above 0 and at most 0.288."""
    out: Folder
    """New run folder for the average."""
    checkpoint: Annotated[int | None, tyro.conf.arg(metavar="STEP")] = None
    """Training step that the average ends at; None for the last one."""


def run(options: Options) -> None:
    """Write the average as a run folder."""
    silence_orbax()
    with common.user_errors():
        average = make_average(Path(options.run), options.length, options.checkpoint)
        train = dataclasses.replace(average.info.config.train, power_ema=())
        config = dataclasses.replace(average.info.config, train=train)
        info = average.info._replace(config=config, imported=f"average of {options.length:g}")
        write_run(info, average.params, average.step, Path(options.out))
        if info.autoencoder:
            copy_autoencoder(Path(options.run), Path(options.out))
    print(
        f"averaged {options.run} up to step {average.step} from {average.stored} stored averages:"
        f" the weights of the steps are off by {average.error:.2%}"
    )
    if average.error > LARGEST_ERROR:
        print("warning: save more often, or take a length nearer to those of train.power_ema")
    print(f"wrote {options.out}: sample from it with: diffjax sample {shlex.quote(options.out)}")
