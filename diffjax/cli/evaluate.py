"""Measure the image quality of one sampler, or of an autoencoder."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from diffjax.build import ModelInfo, describe_model
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
from diffjax.devices import parallel
from diffjax.evaluation import quality
from diffjax.evaluation.quality import ReferenceOptions
from diffjax.evaluation.reconstruction import measure_reconstructions, number_of_images
from diffjax.evaluation.results import (
    QualityRow,
    ReconstructionRow,
    as_dict,
    classifier_warning,
    table_markdown,
)
from diffjax.inference.autoencoder import (
    TrainedAutoencoder,
    is_autoencoder,
    load_autoencoder,
)
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

    def read_config(self, info: ModelInfo | None, source: str) -> Config:
        """The configuration of the real images.

        info: of the model, None for one that does not name its images. source: the model's name.

        Raises: ValueError for one that does not exist or is not known, or a path that it does not
        take.
        """
        if self.config is not None:
            return self.locate(load_config(self.config))
        if info is None:
            raise ValueError(
                f"data.config is None, and {source} does not name its training images: name a"
                " configuration"
            )
        return self.locate(info.config)


@dataclass(frozen=True)
class Options:
    """Compare sampled images with real ones, and append a row to a file.

    For an autoencoder, held-out images are compared with their reconstructions. Each row has its
    whole context.
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
    """Sample or reconstruct, compare, print one row and append it."""
    with common.user_errors():
        is_reconstructed = is_autoencoder(options.model)
    if is_reconstructed:
        run_autoencoder(options)
    else:
        run_sampler(options)


def run_sampler(options: Options) -> None:
    """Sample, compare, print one row and append it."""
    with common.user_errors():
        model = load_model(options.model, options.weight.checkpoint, options.weight.weights)
        plan, name = choose_plan(options.sampling, model)
        request = make_request(options.image, options.batch, model)
        out = common.check_output(output_file(options), ".jsonl")
        report = options.report.check_report()
        reference = quality.read_reference(
            options.data.read_config(model.info, options.model),
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
    write_row(row, out, report)


def run_autoencoder(options: Options) -> None:
    """Reconstruct, compare, print one row and append it."""
    with common.user_errors():
        check_autoencoder_options(options)
        weight = options.weight
        autoencoder = load_autoencoder(options.model, weight.checkpoint, weight.weights)
        out = common.check_output(output_file(options), ".jsonl")
        report = options.report.check_report()
        config, shape = find_images(options, autoencoder)
        reference = quality.read_reference(config, shape, options.feature.to_library())
        num = number_of_images(reference, options.image.num)
        batch = options.batch.batch or parallel.default_batch(num)
    row = measure_reconstructions(autoencoder, reference, num, batch, str(config.data))
    write_row(row, out, report)


def check_autoencoder_options(options: Options) -> None:
    """Check that no option of samplers is given.

    Raises: ValueError, naming the first one.
    """
    given, default = options.sampling, SamplerOptions()
    pairs = [(name, getattr(given, name), getattr(default, name)) for name in vars(default)]
    image, clip = SamplingOptions(), BatchOptions().clip
    pairs += [(name, getattr(options.image, name), getattr(image, name)) for name in vars(image)]
    pairs += [("clip", options.batch.clip, clip)]
    for name, value, usual in pairs:
        if name != "num" and value != usual:
            raise ValueError(
                f"{name} is {value}, and {options.model} is an autoencoder, which is not sampled:"
                " leave it out"
            )
    for name, value, least in (
        ("num", options.image.num, quality.LEAST_IMAGES),
        ("batch", options.batch.batch, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}: use {least} or more")


def find_images(
    options: Options, autoencoder: TrainedAutoencoder
) -> tuple[Config, tuple[int, ...]]:
    """The configuration of the images, and their shape, which the autoencoder takes.

    Raises: ValueError for a published autoencoder without a configuration, or images of other
    channels or sides.
    """
    info = autoencoder.info if options.data.config is None else None
    config = options.data.read_config(info, options.model)
    shape = describe_model(config).x_shape if info is None else info.x_shape
    if shape[-1] != autoencoder.image_channels:
        raise ValueError(
            f"{config.data} has images of {shape[-1]} channels, and the autoencoder takes"
            f" {autoencoder.image_channels}: use data.grey, or other images"
        )
    autoencoder.config.latent_shape(shape)
    return config, shape


def write_row(row: QualityRow | ReconstructionRow, out: Path, report: Path | None) -> None:
    """Print a row, and append it to a file."""
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
