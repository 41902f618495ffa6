"""Measure the image quality of one sampler."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from diffjax.cli import common
from diffjax.cli.options import (
    Count,
    File,
    Model,
    SamplerOptions,
    WeightsOptions,
    choose_plan,
)
from diffjax.config import load_config
from diffjax.evaluation import quality
from diffjax.evaluation.quality import ReferenceOptions
from diffjax.evaluation.results import as_dict, table_markdown
from diffjax.inference.defaults import check_seed, distillation_warning
from diffjax.inference.guidance import Guidance, check_guidance
from diffjax.inference.model import TrainedModel, load_model, output_folder
from diffjax.inference.pipeline import Clip, Hooks, Pipeline, Request


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
class SamplingOptions:
    """Images to sample and compare."""

    guidance: Annotated[float, tyro.conf.arg(metavar="SCALE")] = 1.0
    """Guidance scale: 0 is unconditional, 1 conditional, and more is guided."""
    num: int = 1000
    """Number of images, in five batches or more."""
    batch: Count = None
    """Images at a time, over all devices; None for a fifth of all, up to 100."""
    seed: int = 0
    """Seed, from 0."""
    clip: bool = True
    """Clip the estimates of x0 to the range of images."""


@dataclass(frozen=True)
class Options:
    """Compare sampled images with real ones, and append a row to evaluations.jsonl.

    The file is in the run folder, and each row has its whole context.
    """

    model: Model
    """Run folder, or hf:FOLDER or hf:OWNER/NAME for a published model."""
    data: Annotated[str | None, tyro.conf.arg(metavar="CONFIG")] = None
    """Configuration of the real images, as cifar10; None for the model's own."""
    sampling: tyro.conf.OmitArgPrefixes[SamplerOptions] = field(default_factory=SamplerOptions)
    image: tyro.conf.OmitArgPrefixes[SamplingOptions] = field(default_factory=SamplingOptions)
    feature: tyro.conf.OmitArgPrefixes[FeatureOptions] = field(default_factory=FeatureOptions)
    weight: tyro.conf.OmitArgPrefixes[WeightsOptions] = field(default_factory=WeightsOptions)


def run(options: Options) -> None:
    """Sample, compare, print one row and append it."""
    with common.user_errors():
        model = load_model(options.model, options.weight.checkpoint, options.weight.weights)
        plan, name = choose_plan(options.sampling, model)
        request = make_request(options.image, model)
        out = output_folder(options.model) / "evaluations.jsonl"
        common.check_output(out, ".jsonl")
        config = model.info.config if options.data is None else load_config(options.data)
        reference = quality.read_reference(
            config, quality.image_shape(model), options.feature.to_library()
        )
        conditioning, num = model.info.conditioning, request.num
        condition = quality.evaluation_condition(conditioning, reference.source, num)
        request = replace(request, condition=condition)
    if warning := distillation_warning(model, plan):
        print(warning)
    pipeline = Pipeline.for_model(model)
    total = plan.steps * -(-request.num // request.batch)
    with common.progress_bar(total, name) as bar:
        try:
            row, _ = quality.measure(
                model, pipeline, reference, plan, name, request, Hooks(bar.update)
            )
        except quality.NotFiniteError as error:
            raise common.UserError(error) from error
    print(table_markdown([row]))
    with common.user_errors(), out.open("a") as file:
        file.write(json.dumps(as_dict(row)) + "\n")
    print(f"appended to {out}")


def make_request(options: SamplingOptions, model: TrainedModel) -> Request:
    """The samples that are asked for, but for their conditions.

    Raises: ValueError for what the model cannot do, or a batch that gives no median time.
    """
    check_seed(options.seed)
    guidance = Guidance(options.guidance)
    check_guidance(model, guidance)
    batch = quality.timed_batch(options.num) if options.batch is None else options.batch
    quality.check_batch(options.num, batch)
    return Request(
        num=options.num,
        batch=batch,
        seed=options.seed,
        guidance=guidance,
        bound=Clip() if options.clip else None,
    )
