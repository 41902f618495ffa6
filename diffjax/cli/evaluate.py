"""Measure the image quality of one sampler."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from diffjax.cli import common
from diffjax.cli.options import (
    Count,
    DataOptions,
    File,
    Model,
    ReportOptions,
    SamplerOptions,
    WeightsOptions,
    choose_plan,
)
from diffjax.config import Config, load_config
from diffjax.evaluation import quality
from diffjax.evaluation.quality import ReferenceOptions
from diffjax.evaluation.results import as_dict, classifier_warning, table_markdown
from diffjax.inference.defaults import check_seed, distillation_warning
from diffjax.inference.guidance import Guidance, check_guidance
from diffjax.inference.model import TrainedModel, load_model, output_folder
from diffjax.inference.pipeline import Bound, Clip, Hooks, Pipeline, Request


@dataclass(frozen=True)
class FeatureOptions:
    """Real images, and what images are compared by."""

    features: Literal["cnn", "pixels", "inception"] = "cnn"
    """Features: of a small classifier trained here, the pixels, or of Inception-v3."""
    reference: Literal["train", "held_out"] = "train"
    """Split of the real images."""
    inception: File = None
    """File with the weights of Inception-v3; None to download them once."""

    def to_library(self) -> ReferenceOptions:
        """Convert them to the options of `quality.read_reference`."""
        inception = None if self.inception is None else Path(self.inception)
        return ReferenceOptions(self.features, self.reference, inception)


@dataclass(frozen=True)
class BatchOptions:
    """How images are sampled."""

    batch: Count = None
    """Images at a time, over all devices; None for a fifth of all, up to 100."""
    clip: bool = True
    """Clip the estimates of x0 to the range of images."""

    def batch_of(self, num: int) -> int:
        """The batch for so many images.

        Raises: ValueError for one that gives no median time.
        """
        batch = quality.timed_batch(num) if self.batch is None else self.batch
        quality.check_batch(num, batch)
        return batch

    @property
    def bound(self) -> Bound:
        """The bound of the estimates of x0."""
        return Clip() if self.clip else None


@dataclass(frozen=True)
class SamplingOptions:
    """Images to sample and compare."""

    guidance: Annotated[float, tyro.conf.arg(metavar="SCALE")] = 1.0
    """Guidance scale: 0 is unconditional, 1 conditional, and more is guided."""
    num: int = 1000
    """Number of images, in five batches or more."""
    seed: int = 0
    """Seed, from 0."""


@dataclass(frozen=True)
class RealDataOptions(DataOptions):
    """Data of the real images."""

    config: Annotated[str | None, tyro.conf.arg(metavar="CONFIG")] = None
    """Configuration of the real images, as cifar10; None for the model's own."""

    def read_config(self, model: TrainedModel) -> Config:
        """The configuration of the real images.

        Raises: ValueError for one that does not exist, or a path that it does not take.
        """
        return self.locate(model.info.config if self.config is None else load_config(self.config))


@dataclass(frozen=True)
class Options:
    """Compare sampled images with real ones, and append a row to a file.

    Each row has its whole context.
    """

    model: Model
    """Run folder, or hf:FOLDER or hf:OWNER/NAME for a published model."""
    out: Annotated[str | None, tyro.conf.arg(metavar="FILE|FOLDER")] = None
    """File of the rows (.jsonl), or a folder for evaluations.jsonl; None for the run folder."""
    data: RealDataOptions = field(default_factory=RealDataOptions)
    sampling: tyro.conf.OmitArgPrefixes[SamplerOptions] = field(default_factory=SamplerOptions)
    image: tyro.conf.OmitArgPrefixes[SamplingOptions] = field(default_factory=SamplingOptions)
    batch: tyro.conf.OmitArgPrefixes[BatchOptions] = field(default_factory=BatchOptions)
    feature: tyro.conf.OmitArgPrefixes[FeatureOptions] = field(default_factory=FeatureOptions)
    weight: tyro.conf.OmitArgPrefixes[WeightsOptions] = field(default_factory=WeightsOptions)
    report: tyro.conf.OmitArgPrefixes[ReportOptions] = field(default_factory=ReportOptions)


def run(options: Options) -> None:
    """Sample, compare, print one row and append it."""
    with common.user_errors():
        model = load_model(options.model, options.weight.checkpoint, options.weight.weights)
        plan, name = choose_plan(options.sampling, model)
        request = make_request(options.image, options.batch, model)
        out = common.check_output(output_file(options), ".jsonl")
        report = options.report.check_report()
        reference = quality.read_reference(
            options.data.read_config(model),
            quality.image_shape(model),
            options.feature.to_library(),
            [model.info] if options.data.config is None else [],
        )
        conditioning, num = model.info.conditioning, request.num
        condition = quality.evaluation_condition(conditioning, reference.source, num)
        request = replace(request, condition=condition)
    if warning := distillation_warning(model, plan):
        print(warning)
    pipeline = Pipeline.for_model(model)
    total = plan.steps * -(-request.num // request.batch)
    with common.progress_bar(total) as bar:
        hooks = Hooks(common.compiling(bar, name, "comparing with real images"))
        row, _ = quality.measure(model, pipeline, reference, plan, name, request, hooks)
    common.print_report(table_markdown([row]), report)
    if warning := classifier_warning([row]):
        print(f"warning: {warning}")
    with common.user_errors(), out.open("a") as file:
        file.write(json.dumps(as_dict(row)) + "\n")
    print(f"appended to {out}")


def output_file(options: Options) -> Path:
    """The file that the row is appended to."""
    out = output_folder(options.model) if options.out is None else Path(options.out)
    is_folder = out.is_dir() or not (options.out and out.suffix)
    return out / "evaluations.jsonl" if is_folder else out


def make_request(options: SamplingOptions, batch: BatchOptions, model: TrainedModel) -> Request:
    """The samples that are asked for, but for their conditions.

    Raises: ValueError for what the model cannot do, or a batch that gives no median time.
    """
    check_seed(options.seed)
    guidance = Guidance(options.guidance)
    check_guidance(model, guidance)
    return Request(
        num=options.num,
        batch=batch.batch_of(options.num),
        seed=options.seed,
        guidance=guidance,
        bound=batch.bound,
    )
