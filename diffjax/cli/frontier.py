"""Measure the quality and the time of many samplers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from diffjax.cli import common
from diffjax.cli.evaluate import BatchOptions, FeatureOptions
from diffjax.cli.options import DataOptions, Folder, Numbers, SamplerText
from diffjax.evaluation import quality
from diffjax.evaluation.sweep import (
    NAME,
    STEPS,
    Combination,
    Sweep,
    SweepOptions,
    check_same_data,
    combine,
    read_rows,
)
from diffjax.inference.defaults import distillation_warning
from diffjax.inference.model import TrainedModel, load_model
from diffjax.inference.pipeline import Hooks
from diffjax.inference.samplers import parse_samplers

DEFAULT_STEPS = ",".join(map(str, STEPS))


@dataclass(frozen=True)
class SweepValues:
    """Values to combine, separated by commas."""

    sampler: SamplerText = None
    """Samplers, as in "ddim,ddim(eta=0.5),ddpm:1000".
    None for ddim,dpm_solver_pp_2m,heun,ddpm:1000, or what a distilled model was trained for."""
    steps: Numbers = DEFAULT_STEPS
    """Noise levels to visit, from 1 to T, unless a sampler ends in :N."""
    guidance: Annotated[str | None, tyro.conf.arg(metavar="SCALE,...")] = None
    """Guidance scales: 0 is unconditional, 1 conditional, and more is guided.
    None for 1, and 2 where the model can be guided, or the most it was distilled for."""
    seed: Numbers = "0"
    """Seeds, from 0, over which the spread is shown."""


@dataclass(frozen=True)
class ImageOptions:
    """Images of each combination."""

    num: int = 500
    """Number of images, in five batches or more."""


@dataclass(frozen=True)
class Options:
    """Measure quality and time of samplers, steps and guidance scales.

    Rows gather in a folder: an interrupted sweep continues where it was, and another one adds to
    it.
    """

    models: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="MODEL ...", help_behavior_hint="(required)"),
    ]
    """Run folders of the same data; every combination is measured for each of them."""
    out: Folder = "report"
    """Folder of frontier.json, .csv, .md, .png, .svg, report.html, and the images of each row."""
    weights: Annotated[str, tyro.conf.arg(metavar="ema|raw|DECAY")] = "ema"
    """ema (the moving average), raw (as trained), or the decay of one of several averages."""
    sweep: tyro.conf.OmitArgPrefixes[SweepValues] = field(default_factory=SweepValues)
    image: tyro.conf.OmitArgPrefixes[ImageOptions] = field(default_factory=ImageOptions)
    batch: tyro.conf.OmitArgPrefixes[BatchOptions] = field(default_factory=BatchOptions)
    data: DataOptions = field(default_factory=DataOptions)
    feature: tyro.conf.OmitArgPrefixes[FeatureOptions] = field(default_factory=FeatureOptions)


def run(options: Options) -> None:
    """Measure what is missing, write after every row, print the summary."""
    with common.user_errors():
        models = [load_model(model, weights=options.weights) for model in options.models]
        check_same_data(models, [options.data.trained_on(m.info.config) for m in models])
        combinations = make_combinations(options.sweep, models)
        sweep_options = make_sweep_options(options.image, options.batch)
        out = Path(options.out)
        common.check_output(out / f"{NAME}.json", ".json")
        read_rows(out)  # before the real images, which take longer
        reference = quality.read_reference(
            options.data.locate(models[0].info.config),
            quality.image_shape(models[0]),
            options.feature.to_library(),
            [model.info for model in models],
        )
        for model in models:
            quality.evaluation_condition(model.info.conditioning, reference.source, 1)
        sweep = Sweep(out, reference, sweep_options)
    for warning in dict.fromkeys(distillation_warning(c.model, c.plan) for c in combinations):
        if warning:
            print(warning)
    missing = sweep.missing(combinations)
    batches = -(-sweep_options.num // sweep_options.batch)
    common.print_report(measure(sweep, missing, batches))
    print(f"\nwrote {out}/report.html, {NAME}.json, .csv, .md, .png and .svg")
    print(
        f"{len(missing)} rows measured, {len(combinations) - len(missing)} were there;"
        f" {sweep.compilations} compilations"
    )


def make_combinations(values: SweepValues, models: list[TrainedModel]) -> list[Combination]:
    """Every combination, the quickest first.

    Raises: ValueError for one that cannot be measured.
    """
    scales = values.guidance and common.parse_numbers("guidance", values.guidance)
    return combine(
        models,
        None if values.sampler is None else parse_samplers(values.sampler),
        common.parse_integers("steps", values.steps),
        list(dict.fromkeys(scales)) if scales else None,
        common.parse_integers("seed", values.seed),
    )


def make_sweep_options(options: ImageOptions, batch: BatchOptions) -> SweepOptions:
    """The options that all rows share.

    Raises: ValueError for too few images, or a batch that gives no median time.
    """
    if options.num < 2:
        raise ValueError(f"num is {options.num}: a distance needs 2 images or more")
    return SweepOptions(options.num, batch.batch_of(options.num), batch.bound)


def measure(sweep: Sweep, combinations: list[Combination], batches: int) -> str:
    """Measure combinations behind a progress bar; write and return the report."""
    total = sum(combination.plan.steps for combination in combinations) * batches
    with common.progress_bar(total) as bar:
        for combination in combinations:
            try:
                sweep.measure(combination, Hooks(common.compiling(bar, str(combination))))
            except OSError as error:
                raise common.UserError(common.describe_os_error(error)) from error
        bar.set_description("writing the report")
        with common.user_errors():
            return sweep.write_report()
