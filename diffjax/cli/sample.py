"""Sample from a trained run.

diffjax sample runs/digits --sampler ddim --steps 50 --guidance 2.0 --num 64 --labels 0,1,2 --out grid.png
diffjax sample runs/digits --sampler ddpm --num 16
diffjax sample hf:google/ddpm-cifar10-32 --sampler ddim --steps 50
diffjax sample runs/digits --sampler dpm_solver_pp_2m --steps 10 --spacing uniform_logsnr --save-plan plan.json
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro
from jax import Array
from tqdm import tqdm

from diffjax import sampler, schedule
from diffjax.cli import common
from diffjax.data import image_io
from diffjax.devices import parallel
from diffjax.evaluation.results import markdown
from diffjax.inference import samplers
from diffjax.inference.pipeline import (
    Guidance,
    Pipeline,
    TrainedModel,
    check_guidance,
    check_seed,
    default_sampler,
    default_steps,
    distillation_warning,
    load_model,
    output_folder,
    read_labels,
    sampling_row,
)

PROGRAM = "diffjax sample"
SamplerName = Literal[
    "ddpm", "sigma_hat", "ddim", "euler", "heun", "dpm_solver_pp_2m", "dpm_solver_pp_3m", "exponential_ab3", "unipc_2",
    "edm", "consistency",
]  # fmt: skip
SpacingName = Literal["trailing", "leading", "linspace", "quadratic", "karras", "uniform_logsnr"]
LARGEST_PICTURE = 400
FRAMES = 50  # of an animation, at most
REFRESH_SECONDS = 1.0  # between previews, at least


@dataclass(frozen=True)
class Options:
    """Sample from a trained run, with any sampler, on all devices."""

    run: tyro.conf.Positional[str]
    """Run folder, as train.py leaves it; or hf:FOLDER or hf:OWNER/NAME, a UNet2DModel of diffusers."""
    sampler: SamplerName | None = None
    """DDPM is the Markov chain, DDIM the sampler for few steps, the solvers for fewer; consistency is for networks
    distilled for it. None for ddim, or what a student was distilled for."""
    steps: int | None = None
    """Levels visited, 1 to T; None for all T with ddpm and 50 with others, or what a student was distilled for. heun
    and edm call the network twice at each level but the last."""
    eta: float | None = None
    """Noise of ddim and dpm_solver_pp_2m: 0 (if None) is deterministic, 1 has the variance of DDPM."""
    variance: str | None = None
    """Noise of ddpm: fixed_small (if None) is right at any number of steps, fixed_large at all T; a number of 0 to 1 is
    between them."""
    churn: float | None = None
    """Noise of edm, S_churn; None for 40."""
    spacing: SpacingName = "trailing"
    """Which levels the steps visit."""
    levels: str | None = None
    """Or the levels one by one, decreasing, separated by commas: in place of --steps and --spacing."""
    plan: str | None = None
    """A stored plan (.json) in place of all of these."""
    save_plan: str | None = None
    """Write the plan: to load it again (.json), or as a picture (.png)."""
    guidance: float = 1.0
    """Guidance scale: 0 unconditional, 1 conditional, more is guided."""
    interval: tuple[float, float] | None = None
    """Guide only where sigma/alpha lies between these two: elsewhere the network is evaluated once a step."""
    rescale: float = 0.0
    """Share, 0 to 1, by which the contrast of guided images is brought back to that of unguided ones."""
    negative: int | None = None
    """Lead away from this label, instead of from no label."""
    worse: str | None = None
    """Autoguidance: lead away from the network of this run folder, smaller or less trained, instead of from no
    label."""
    worse_checkpoint: int | None = None
    """Training step of that run's checkpoint; None for the latest."""
    two_passes: bool = False
    """Evaluate the network twice for a guided step, not once on twice the batch: slower or not, in half the memory."""
    labels: str | None = None
    """Comma-separated labels, repeated over the images; None for all classes."""
    num: int = 64
    """Images."""
    batch: int | None = None
    """Images at a time, over all devices; None for all, up to 64."""
    seed: int = 0
    """Image i of a seed is the same for any batch and any number of devices."""
    weights: str = "ema"
    """The moving average of the parameters (of several the first, or name one by its decay, as 0.9999), or raw: the
    parameters as trained."""
    checkpoint: int | None = None
    """Training step of the checkpoint; None for the latest."""
    threshold: float | None = None
    """Dynamic thresholding at this quantile, as 0.995, in place of clipping."""
    clip: Annotated[bool, tyro.conf.arg(help="Clip the estimates of x0 to the range of images.")] = True
    out: str | None = None
    """Picture of all images (.png); None for a name in the run folder."""
    preview: bool = False
    """Refresh that picture with the estimates of x0 while sampling goes on."""
    animate: str | None = None
    """The estimates of x0 on the way, of the first batch (.gif)."""
    save: str | None = None
    """Arrays of all images (.npz): images uint8 [N, H, W, C], labels int [N], -1 for none."""


def main(arguments: list[str]) -> None:
    """Parse, sample, write, print."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    options = common.parse(Options, PROGRAM, arguments)
    with common.user_errors(PROGRAM):
        run = load_model(options.run, options.checkpoint, options.weights)
        plan, name = make_plan(options, run)
        guidance = make_guidance(options)
        if options.threshold is not None and not 0 < options.threshold <= 1:
            raise ValueError(f"--threshold is {options.threshold}: use more than 0, and at most 1; 0.995 is usual")
        if options.threshold is not None:
            name += f" thresholded {options.threshold:g}"
        elif not options.clip:
            name += " unclipped"
        labels = make_labels(options, run, guidance)
        batch = make_batch(options)
        name_out = f"{name.split('(')[0]}-{plan.steps}-guidance-{options.guidance:g}-seed-{options.seed}.png"
        out = Path(options.out or output_folder(options.run) / "samples" / name_out)
        common.check_output(out, ".png")
        animation = common.check_output(Path(options.animate), ".gif") if options.animate else None
        save = common.check_output(Path(options.save), ".npz") if options.save else None
        save_plan = common.check_output(Path(options.save_plan), ".json", ".png") if options.save_plan else None

    for remark in run.remarks:
        print(f"{run.name}: {remark}")
    if doubt := distillation_warning(run, plan):
        print(f"{run.name} {doubt}")
    generate, image_shape = Pipeline.of(run), run.description.image_shape
    watch = Watch(options, plan.steps, image_shape, labels, out)
    with tqdm(total=plan.steps * -(-options.num // batch), desc=name, unit="step", dynamic_ncols=True) as bar:
        made = generate(
            run.params, plan, labels, options.num,
            guidance=guidance, seed=options.seed, batch=batch, clip=options.clip, threshold=options.threshold,
            progress=bar.update, watch=watch, every=watch.every,
        )  # fmt: skip
    with common.user_errors(PROGRAM):
        if save_plan:
            samplers.save(save_plan, plan, name)
        if save:
            np.savez(save, images=made.images, labels=made.labels)
        if animation:
            captions = watch.captions and watch.captions[: len(watch.frames[0])]
            image_io.save_gif(animation, [image_io.grid(frame, captions) for frame in watch.frames])
        image_io.save_png(out, image_io.grid(made.images[:LARGEST_PICTURE], watch.captions))
    if options.num > LARGEST_PICTURE:
        print(f"{out} shows the first {LARGEST_PICTURE} of {options.num} images")
    print(markdown([sampling_row(run, made, plan, name, guidance, batch)]))
    print("wrote " + ", ".join(str(path) for path in (out, animation, save, save_plan) if path))


class Watch:
    """Looks on while images are made: keeps the frames of an animation, refreshes a preview."""

    def __init__(
        self, options: Options, steps: int, image_shape: tuple[int, ...], labels: np.ndarray | None, out: Path
    ) -> None:
        """For what the options ask to be shown of a plan of `steps`."""
        self._options, self._out, self._refreshed, self._steps = options, out, 0.0, steps
        # Frames at equal distances; where ten rows a call are quicker than one, at their ends.
        every = -(-steps // FRAMES)
        self.every = None if options.animate is None else every if every < 5 else -(-every // 10) * 10
        self._shown = np.full((min(options.num, LARGEST_PICTURE), *image_shape), 127, np.uint8)  # grey: not yet begun
        self.captions = None if labels is None else [str(label) for label in labels[:LARGEST_PICTURE]]
        self.frames: list[np.ndarray] = []

    def __call__(self, first: int, done: int, x0: Array) -> None:
        """The estimates of x0 of the images from index `first` on, after `done` steps."""
        keep = first == 0 and self.every is not None and (done % self.every == 0 or done == self._steps)
        refresh = self._options.preview and time.monotonic() > self._refreshed + REFRESH_SECONDS
        if not (keep or refresh):
            return
        now = image_io.to_uint8(jax.device_get(x0))[: max(0, len(self._shown) - first)]
        self._shown[first : first + len(now)] = now
        if keep:
            self.frames.append(now)
        if refresh:
            image_io.save_png(self._out, image_io.grid(self._shown, self.captions))
            self._refreshed = time.monotonic()


def make_guidance(options: Options) -> Guidance:
    """Guidance as asked for. ValueError or OSError for another run that cannot be opened."""
    if options.worse is None and options.worse_checkpoint is not None:
        raise ValueError("--worse-checkpoint belongs to --worse: name the run folder too")
    worse = None if options.worse is None else load_model(options.worse, options.worse_checkpoint, options.weights)
    return Guidance(options.guidance, options.interval, options.rescale, options.negative, options.two_passes, worse)


def make_plan(options: Options, run: TrainedModel) -> tuple[sampler.Plan, str]:
    """The plan and its full name. ValueError for levels that the schedule does not have, or a misplaced option."""
    levels, task = run.schedule, run.description.config.distillation
    name = options.sampler or default_sampler(task, levels)[0]
    dials = {"eta": options.eta, "variance": options.variance, "churn": options.churn}
    if options.plan is not None:
        given = {"steps": options.steps, "levels": options.levels} | dials
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"--plan says all of the sampler: leave out --{name}")
        plan = samplers.load(Path(options.plan))
        samplers.check_fits(plan, levels)
        return plan, f"plan({Path(options.plan).name})"
    if options.levels is not None:
        if options.steps is not None:
            raise ValueError("--levels says where the steps are: leave out --steps")
        try:
            t = np.array([float(text) for text in options.levels.split(",")])
        except ValueError:
            raise ValueError(f"--levels is {options.levels!r}: write numbers, separated by commas") from None
        return samplers.named(name, levels, t, "explicit", **dials)
    steps = default_steps(task, levels, name) if options.steps is None else options.steps
    t = schedule.SPACINGS[options.spacing](levels, steps)
    return samplers.named(name, levels, t, options.spacing, **dials)


def make_labels(options: Options, run: TrainedModel, guidance: Guidance) -> np.ndarray | None:
    """A label per image, or None for a network without classes. ValueError for labels or a scale it cannot take."""
    if options.num < 1:
        raise ValueError(f"--num is {options.num}: ask for at least one image")
    check_seed(options.seed)
    check_guidance(run, guidance)
    if options.labels is not None:
        return read_labels(run, options.labels, options.num)
    classes = run.description.classes
    return np.resize(np.arange(classes, dtype=np.int32), options.num) if classes else None


def make_batch(options: Options) -> int:
    """Images at a time: as asked, or as many as there are, up to a limit, shared equally by the devices."""
    if options.batch is None:
        return parallel.default_batch(options.num)
    parallel.check_divisible(options.batch, jax.device_count(), "--batch")
    return options.batch
