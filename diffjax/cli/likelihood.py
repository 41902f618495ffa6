"""Measure the bits per dimension of held-out images."""

import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro

from diffjax.build import check_conditions, load_data
from diffjax.cli import common
from diffjax.cli.options import (
    Count,
    DataOptions,
    File,
    Model,
    ReportOptions,
    WeightsOptions,
)
from diffjax.data.batches import first_examples
from diffjax.evaluation import bits_per_dim
from diffjax.evaluation.bits_per_dim import LikelihoodOptions
from diffjax.evaluation.results import as_dict, table_markdown
from diffjax.inference.model import TrainedModel, load_model, output_folder
from diffjax.nn.conditioning import Condition


@dataclass(frozen=True)
class ImageOptions:
    """Held-out images."""

    num: int = 64
    """Number of images, the first ones, 2 or more."""
    condition: bool = True
    """Condition the network on what the images are labelled with."""
    seed: int = 0
    """Seed of all that is drawn, from 0."""


@dataclass(frozen=True)
class FlowOptions:
    """Probability flow."""

    probes: int = 1
    """Random probes of the flow's divergence per image, 1 or more."""
    repeats: int = 3
    """Evaluations with different probes, whose spread is shown, 1 or more."""
    tolerance: float = 1e-4
    """Relative and absolute tolerance of the solver, above 0 and at most 0.01."""


@dataclass(frozen=True)
class BoundOptions:
    """Variational bound."""

    evaluations: Count = 200
    """Noise levels drawn at random for each image, from 1 to T - 1; None for all."""
    variance: str = "fixed_large"
    """Noise of the chain: fixed_large, fixed_small, or a number of 0 to 1 between them."""


@dataclass(frozen=True)
class Options:
    """Measure bits per dimension by probability flow and by variational bound.

    Less is better; a uniform model of 8-bit images has 8. For a model of latents
    they are of the density of latents, and may be below 0. It needs diffrax: pip install
    'diffjax[diffrax]'.
    """

    model: Model
    """Run folder, or hf:FOLDER or hf:OWNER/NAME for a published model."""
    out: File = None
    """Rows of the table (.json); None for likelihood.json in the run folder."""
    image: tyro.conf.OmitArgPrefixes[ImageOptions] = field(default_factory=ImageOptions)
    data: DataOptions = field(default_factory=DataOptions)
    flow: tyro.conf.OmitArgPrefixes[FlowOptions] = field(default_factory=FlowOptions)
    bound: tyro.conf.OmitArgPrefixes[BoundOptions] = field(default_factory=BoundOptions)
    weight: tyro.conf.OmitArgPrefixes[WeightsOptions] = field(default_factory=WeightsOptions)
    report: tyro.conf.OmitArgPrefixes[ReportOptions] = field(default_factory=ReportOptions)


def run(options: Options) -> None:
    """Measure, write, print."""
    with common.user_errors():
        if importlib.util.find_spec("diffrax") is None:
            raise ValueError("likelihoods need diffrax: pip install 'diffjax[diffrax]'")
        model = load_model(options.model, options.weight.checkpoint, options.weight.weights)
        measured = make_options(options)
        bits_per_dim.check_likelihood(model, measured)
        x, condition = read_examples(options, model)
        out = Path(options.out or output_folder(options.model) / "likelihood.json")
        common.check_output(out, ".json")
        report = options.report.check_report()
    total = bits_per_dim.num_batches(len(x), measured.repeats)
    with common.progress_bar(total, unit="batch") as bar:
        update = common.compiling(bar, "bits per dim")
        try:
            rows = bits_per_dim.measure_bits_per_dim(model, x, condition, measured, update)
        except bits_per_dim.UnsolvedError as error:
            raise common.UserError(error) from error
    with common.user_errors():
        out.write_text(json.dumps([as_dict(row) for row in rows], indent=1) + "\n")
    common.print_report(table_markdown(rows), report)
    print(f"wrote {out}")


def make_options(options: Options) -> LikelihoodOptions:
    """The options of the library."""
    return LikelihoodOptions(
        seed=options.image.seed,
        probes=options.flow.probes,
        repeats=options.flow.repeats,
        tolerance=options.flow.tolerance,
        evaluations=options.bound.evaluations,
        variance=options.bound.variance,
    )


def read_examples(options: Options, model: TrainedModel) -> tuple[np.ndarray, Condition]:
    """The first held-out images, and their conditions, None for no condition.

    Raises: ValueError for too few images, or no condition where the model needs one.
    """
    num = options.image.num
    if num < 2:
        raise ValueError(f"num is {num}: a mean and its error need 2 images or more")
    dataset = load_data(options.data.locate(model.info.config))
    check_conditions(model.info, dataset)
    images, condition = first_examples(dataset.held_out, num, model.info.conditioning)
    x = model.codec.encode(images)
    if not options.image.condition:
        condition = None
    bits_per_dim.likelihood_condition(model, condition, num)
    return x, condition
