"""Sample images from a trained model."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro
from jax import Array
from PIL.Image import Image

from diffjax.cli import common
from diffjax.cli.options import (
    Count,
    File,
    Flag,
    FolderOptions,
    Model,
    Number,
    SamplerOptions,
    Step,
    Text,
    WeightsOptions,
    choose_plan,
)
from diffjax.data import image_io
from diffjax.data.codec import Codec
from diffjax.devices import parallel
from diffjax.evaluation.results import sampling_row, table_markdown
from diffjax.inference import samplers
from diffjax.inference.defaults import check_seed, default_sampler, distillation_warning
from diffjax.inference.guidance import Guidance, check_guidance
from diffjax.inference.model import TrainedModel, load_model, output_folder
from diffjax.inference.pipeline import (
    Bound,
    Clip,
    DynamicThreshold,
    Hooks,
    Pipeline,
    Request,
    Samples,
    check_finite,
)
from diffjax.nn.conditioning import Condition, Conditioning
from diffjax.sampler import Plan

LARGEST_GRID = 400  # images in a picture, at most
FRAMES = 50  # of an animation, at most
REFRESH_SECONDS = 1.0  # between previews, at least


@dataclass(frozen=True)
class PlanOptions:
    """Explicit levels or a stored plan, in place of a sampler's own."""

    levels: Annotated[str | None, tyro.conf.arg(metavar="T,T,...")] = None
    """Noise levels to visit, from T down to 1, fractions allowed, in place of steps and spacing."""
    plan: File = None
    """Stored plan (.json) to run, in place of a sampler."""
    save_plan: File = None
    """Write the plan: for --plan (.json), or as a picture (.png)."""


@dataclass(frozen=True)
class GuidanceOptions:
    """Classifier-free guidance, or autoguidance.

    All other options of this group need --guidance other than 1.
    """

    guidance: Annotated[float, tyro.conf.arg(metavar="SCALE")] = 1.0
    """Guidance scale: 0 is unconditional, 1 conditional, and more is guided."""
    guidance_interval: Annotated[tuple[float, float] | None, tyro.conf.arg(metavar="LOW HIGH")] = (
        None
    )
    """Guide only where sigma/alpha is between these two, 0 or more; None for all levels."""
    guidance_rescale: Annotated[float, tyro.conf.arg(metavar="R")] = 0.0
    """Share, 0 to 1, by which the standard deviation of x0 is brought back to that of the
    conditional estimate."""
    guidance_channels: Count = None
    """Number of first channels of x to guide, 3 of 4 in DiT's sample code; None for all."""
    negative: Text = None
    """Condition to guide away from, in place of no condition."""
    two_passes: Flag = False
    """Evaluate the network twice for a guided step: half the memory of one pass."""
    autoguide_with: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """Autoguidance: a smaller or less trained model to guide away from."""
    autoguide_checkpoint: Step = None
    """Training step of that model's checkpoint; None for the latest."""


@dataclass(frozen=True)
class ImageOptions:
    """Images to sample."""

    condition: Text = None
    """Conditions, repeated over the images: for classes as in cat or 0,1,2.
    None for each class in turn."""
    num: int = 64
    """Number of images, 1 or more."""
    batch: Count = None
    """Images at a time, over all devices; None for all, up to 64."""
    seed: int = 0
    """Seed, from 0. Image i of a seed is the same for any batch and number of devices."""
    threshold: Number = None
    """Quantile of dynamic thresholding, above 0 and up to 1, as 0.995; None to clip."""
    clip: bool = True
    """Clip the estimates of x0 to the range of images."""


@dataclass(frozen=True)
class OutputOptions(FolderOptions):
    """Files to write. A file that an option names is replaced, others never are."""

    out: File = None
    """Picture of all images (.png); None for a new name in the run folder, or for no picture
    with --out-dir."""
    preview: Flag = False
    """Refresh the picture with the estimates of x0 during sampling."""
    animate: File = None
    """Animation of the estimates of x0 of the first batch (.gif)."""
    save: File = None
    """Arrays of all images (.npz): images uint8 [N, H, W, C], labels int [N] or -1."""


@dataclass(frozen=True)
class Options:
    """Sample images from a trained model, with any sampler, on all devices."""

    model: Model
    """Run folder, or hf:FOLDER or hf:OWNER/NAME for a published model."""
    sampling: tyro.conf.OmitArgPrefixes[SamplerOptions] = field(default_factory=SamplerOptions)
    plan: tyro.conf.OmitArgPrefixes[PlanOptions] = field(default_factory=PlanOptions)
    guidance: tyro.conf.OmitArgPrefixes[GuidanceOptions] = field(default_factory=GuidanceOptions)
    image: tyro.conf.OmitArgPrefixes[ImageOptions] = field(default_factory=ImageOptions)
    output: tyro.conf.OmitArgPrefixes[OutputOptions] = field(default_factory=OutputOptions)
    weight: tyro.conf.OmitArgPrefixes[WeightsOptions] = field(default_factory=WeightsOptions)


@dataclass(frozen=True)
class Outputs:
    """Paths of the files to write, all of which were checked."""

    grid: Path | None
    animation: Path | None
    arrays: Path | None
    plan: Path | None
    folder: Path | None  # of single images

    def __str__(self) -> str:
        """The paths, separated by commas."""
        paths = (self.grid, self.animation, self.arrays, self.plan, self.folder)
        return ", ".join(str(path) for path in paths if path)


def run(options: Options) -> None:
    """Sample, write, print."""
    with common.user_errors():
        model = load_model(options.model, options.weight.checkpoint, options.weight.weights)
        plan, name = make_plan(options, model)
        request = make_request(options, model)
        captions = model.info.conditioning.describe(request.condition)
        names = image_names(captions, request)
        outputs = check_outputs(options, plan, name, names)
    for note in model.notes:
        print(f"{model.name}: {note}")
    if warning := distillation_warning(model, plan):
        print(warning)
    watch = SampleWatch(model.codec, captions, request.num, plan.steps)
    if outputs.animation:
        watch.keep_frames()
    if options.output.preview and outputs.grid:
        watch.refresh(outputs.grid)
    total = plan.steps * -(-request.num // request.batch)
    with common.progress_bar(total) as bar:
        hooks = Hooks(common.compiling(bar, name), watch, watch.every)
        samples = Pipeline.for_model(model)(model.params, plan, request, hooks)
        bar.set_description("writing")
        with common.user_errors():
            write(outputs, samples, watch, model.info.conditioning, names)
            if outputs.plan:
                samplers.save_plan(outputs.plan, plan, name)
        row = sampling_row(model, samples, plan, name, request)
    if outputs.grid and request.num > LARGEST_GRID:
        print(f"{outputs.grid} shows the first {LARGEST_GRID} of {request.num} images")
    common.print_report(table_markdown([row]))
    print(f"\nwrote {outputs}")


def make_plan(options: Options, model: TrainedModel) -> tuple[Plan, str]:
    """The plan that is asked for, and its full name.

    Raises: ValueError or OSError for a sampler, levels or a file that cannot be used.
    """
    sampling, chosen = options.sampling, options.plan
    if chosen.plan is not None:
        given = {"sampler": sampling.sampler, "steps": sampling.steps, "levels": chosen.levels}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} is {value}, and the plan has its own: leave it out")
        plan = samplers.load_plan(Path(chosen.plan))
        samplers.check_plan_fits(plan, model.schedule)
        return plan, f"plan({Path(chosen.plan).name})"
    if chosen.levels is None:
        return choose_plan(sampling, model)
    if sampling.steps is not None:
        raise ValueError(f"levels are {chosen.levels!r} and steps {sampling.steps}: leave one out")
    name = sampling.sampler or default_sampler(model.info.config.distillation, model.schedule)[0]
    t = np.array(common.parse_numbers("levels", chosen.levels))
    return samplers.make_plan_at(samplers.parse_sampler(name), model.schedule, t)


def make_request(options: Options, model: TrainedModel) -> Request:
    """The samples that are asked for.

    Raises: ValueError or OSError for what the model cannot do, or a guide model that cannot be
    opened.
    """
    image, guidance = options.image, make_guidance(options)
    if image.num < 1:
        raise ValueError(f"num is {image.num}: use 1 or more")
    check_seed(image.seed)
    check_guidance(model, guidance)
    if image.batch is not None:
        parallel.check_divisible(image.batch, jax.device_count(), "batch")
    return Request(
        num=image.num,
        batch=image.batch or parallel.default_batch(image.num),
        seed=image.seed,
        condition=make_condition(model.info.conditioning, image.condition, image.num),
        guidance=guidance,
        bound=make_bound(image.threshold, clip=image.clip),
    )


def make_condition(conditioning: Conditioning, text: str | None, num: int) -> Condition:
    """The conditions that are asked for, by default all there are in turn.

    Raises: ValueError for a text that is none, and for None where conditions cannot be enumerated.
    """
    return conditioning.spread(num) if text is None else conditioning.parse(text, num)


def make_bound(threshold: float | None, *, clip: bool) -> Bound:
    """The bound of the estimates of x0.

    Raises: ValueError for a quantile outside (0, 1].
    """
    if threshold is None:
        return Clip() if clip else None
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}: use more than 0 and at most 1, as 0.995")
    return DynamicThreshold(threshold)


def make_guidance(options: Options) -> Guidance:
    """The guidance that is asked for.

    Raises: ValueError or OSError for a guide model that cannot be opened.
    """
    asked, guide_model = options.guidance, None
    if asked.autoguide_with is not None:
        guide_model = load_model(
            asked.autoguide_with, asked.autoguide_checkpoint, options.weight.weights
        )
    elif asked.autoguide_checkpoint is not None:
        raise ValueError(
            f"autoguide_checkpoint is {asked.autoguide_checkpoint}, and autoguide_with is not given"
        )
    return Guidance(
        asked.guidance,
        asked.guidance_interval,
        asked.guidance_rescale,
        asked.negative,
        not asked.two_passes,
        guide_model,
        asked.guidance_channels,
    )


def image_names(captions: list[str] | None, request: Request) -> list[str]:
    """The names of the files of single images, as in "00003-label-7-seed-0.png"."""
    digits = max(5, len(str(request.num - 1)))
    words = [f"label-{common.file_word(text)}-" for text in captions or ()] or [""] * request.num
    return [f"{i:0{digits}}-{word}seed-{request.seed}.png" for i, word in enumerate(words)]


def check_outputs(options: Options, plan: Plan, name: str, names: list[str]) -> Outputs:
    """The files to write. names: of the files of single images.

    Raises: ValueError for one that cannot be written.
    """
    output = options.output
    if output.preview and output.out_dir and not output.out:
        raise ValueError("preview refreshes the picture of all images, and out is not given")
    return Outputs(
        _grid_path(options, plan, name),
        common.check_output(Path(output.animate), ".gif") if output.animate else None,
        common.check_output(Path(output.save), ".npz") if output.save else None,
        common.check_output(Path(options.plan.save_plan), ".json", ".png")
        if options.plan.save_plan
        else None,
        output.check_folder(names),
    )


def _grid_path(options: Options, plan: Plan, name: str) -> Path | None:
    output = options.output
    if output.out:
        return common.check_output(Path(output.out), ".png")
    if output.out_dir is not None:
        return None
    own = (
        f"{name.split('(')[0]}-{plan.steps}-guidance-{options.guidance.guidance:g}"
        f"-seed-{options.image.seed}.png"
    )
    return common.check_output(
        common.free_path(output_folder(options.model) / "samples" / own), ".png"
    )


def write(
    outputs: Outputs,
    samples: Samples,
    watch: "SampleWatch",
    conditioning: Conditioning,
    names: list[str],
) -> None:
    """Write all files of images. names: of the files of single images."""
    if outputs.arrays:
        labels = conditioning.labels(samples.condition)
        if labels is None:
            labels = np.full(len(samples.images), -1, np.int32)
        np.savez(outputs.arrays, images=samples.images, labels=np.asarray(labels, np.int32))
    if outputs.animation:
        image_io.save_gif(outputs.animation, watch.sheets())
    if outputs.folder:
        for name, image in zip(names, samples.images, strict=True):
            image_io.save_image(outputs.folder / name, image)
    if outputs.grid:
        shown = samples.images[:LARGEST_GRID]
        image_io.save_png(outputs.grid, image_io.grid(shown, watch.captions))


class SampleWatch:
    """A hook that keeps the frames of an animation and refreshes a preview."""

    def __init__(self, codec: Codec, captions: list[str] | None, num: int, steps: int) -> None:
        """It does nothing until `keep_frames` or `refresh`. steps: rows of the plan."""
        self._codec, self._steps, self._num = codec, steps, min(num, LARGEST_GRID)
        self._shown: np.ndarray | None = None  # uint8 [num, H, W, C]
        self._preview: Path | None = None
        self._refreshed = 0.0
        self.captions = captions and captions[:LARGEST_GRID]
        self.every: int | None = None  # rows between frames
        self.frames: list[np.ndarray] = []  # of the first batch

    def keep_frames(self) -> None:
        """Keep at most FRAMES frames, at equal distances."""
        # Ten rows a call are quicker than one: frames lie at their ends, but for short plans.
        every = -(-self._steps // FRAMES)
        self.every = every if every < 5 else -(-every // 10) * 10

    def refresh(self, path: Path) -> None:
        """Write the estimates to this picture, once in REFRESH_SECONDS."""
        self._preview = path

    def __call__(self, first: int, done: int, x0: Array) -> None:
        """Take the estimates of the samples from index `first` on, after `done` rows."""
        at_frame = self.every is not None and (done % self.every == 0 or done == self._steps)
        keep = first == 0 and at_frame
        refresh = self._preview and time.monotonic() > self._refreshed + REFRESH_SECONDS
        count = max(0, self._num - first)
        if not (keep or refresh) or not count:
            return
        estimates = np.asarray(jax.device_get(x0)[:count])
        check_finite(estimates, self._steps, first)
        images = image_io.to_uint8(np.asarray(self._codec.decode(estimates)))
        if self._shown is None:  # grey until they are sampled
            self._shown = np.full((self._num, *images.shape[1:]), 127, np.uint8)
        self._shown[first : first + len(images)] = images
        if keep:
            self.frames.append(images)
        if refresh and self._preview:
            image_io.save_png(self._preview, image_io.grid(self._shown, self.captions))
            self._refreshed = time.monotonic()

    def sheets(self) -> list[Image]:
        """The frames as grids with captions."""
        captions = self.captions and self.captions[: len(self.frames[0])]
        return [image_io.grid(frame, captions) for frame in self.frames]
