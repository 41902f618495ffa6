"""Measure the speed of networks, samplers, guidance and training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from diffjax.bench.guidance import bench_guidance
from diffjax.bench.networks import bench_networks
from diffjax.bench.sampling import bench_sampler
from diffjax.bench.training import bench_training, trainers
from diffjax.cli import common
from diffjax.cli.options import File, Flag, Folder, ReportOptions

DESCRIPTION = "Measure what networks, sampling, guidance or training cost on this machine."
QUICK_REPEATS = 3


@dataclass(frozen=True)
class BenchOptions:
    """Options of all measurements."""

    pairs: int = 15
    """Times that each comparison is repeated, its two sides in turns, 1 or more."""

    def check(self) -> None:
        """Check the values.

        Raises: ValueError for fewer than one repetition.
        """
        if self.pairs < 1:
            raise ValueError(f"pairs is {self.pairs}: use 1 or more")


@dataclass(frozen=True)
class Networks(BenchOptions):
    """Passes, training steps and images, beside diffusers where it is installed."""

    quick: Flag = False
    """Measure only what takes seconds, at most three times."""
    out: Folder = "runs/bench"
    """Folder of bench.json, bench.md and bench.png."""


@dataclass(frozen=True)
class Sampler(BenchOptions, ReportOptions):
    """The compiled sampling loop, beside its network."""


@dataclass(frozen=True)
class Guidance(BenchOptions, ReportOptions):
    """Every kind of guidance, beside none."""


@dataclass(frozen=True)
class Training(BenchOptions, ReportOptions):
    """Several steps in one dispatch, real data and saves, beside bare training steps."""

    npz: File = None
    """File of images for mnist_small (.npz); None for the MNIST of tensorflow-datasets."""


Options = (
    Annotated[Networks, tyro.conf.subcommand("networks")]
    | Annotated[Sampler, tyro.conf.subcommand("sampler")]
    | Annotated[Guidance, tyro.conf.subcommand("guidance")]
    | Annotated[Training, tyro.conf.subcommand("training")]
)


def parse(program: str, arguments: list[str]) -> Any:
    """Parse the options of one of the measurements."""
    return common.parse(Options, program, arguments, description=DESCRIPTION)


def run(options: Any) -> None:
    """Measure and print. options: one of the union `Options`."""
    with common.user_errors():
        options.check()
    if isinstance(options, Networks):
        run_networks(options)
    elif isinstance(options, Training):
        run_training(options)
    else:
        bench = bench_sampler if isinstance(options, Sampler) else bench_guidance
        with common.user_errors():
            report = options.check_report()
        common.print_report(bench(options.pairs), report)


def run_networks(options: Networks) -> None:
    """Measure networks, write the files, print the tables."""
    with common.user_errors():
        out = common.check_output(Path(options.out) / "bench.json", ".json")
    repeats = min(options.pairs, QUICK_REPEATS) if options.quick else options.pairs
    common.print_report(bench_networks(out, options.quick, repeats))


def run_training(options: Training) -> None:
    """Measure training, print the table."""
    with common.user_errors():
        report = options.check_report()
        made = trainers(None if options.npz is None else Path(options.npz))
    common.print_report(bench_training(made, options.pairs), report)
