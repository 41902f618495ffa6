"""Compare DDPM, DDIM and guided DDIM on a model of digits."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from diffjax import sampler, schedule
from diffjax.cli import common
from diffjax.cli.options import Model
from diffjax.data import image_io
from diffjax.devices import parallel
from diffjax.evaluation.digits import DigitScores, score_digits
from diffjax.evaluation.results import SamplingRow, as_dict, sampling_row, table_markdown
from diffjax.inference.defaults import check_seed, require_undistilled
from diffjax.inference.guidance import Guidance, check_guidance
from diffjax.inference.model import TrainedModel, load_model
from diffjax.inference.pipeline import Hooks, Pipeline, Request, Samples
from diffjax.nn.conditioning import ClassLabel
from diffjax.sampler import Plan

SCALES = (1.0, 2.0, 3.0, 4.0)  # of guidance, for DDIM
DDIM_STEPS = 50
REPEATS = 3  # of the short runs, of which the median time counts


@dataclass(frozen=True)
class Options:
    """Sample digits by DDPM, DDIM and guided DDIM from the same seeds, and compare."""

    model: Model = "runs/digits"
    """Run folder of the configuration digits."""
    num: int = 100
    """Number of images per sampler, in one batch, 10 or more."""
    seed: int = 0
    """Seed of every sampler, from 0."""


class Job(NamedTuple):
    """One sampler of the demo."""

    name: str  # in full
    plan: Plan
    scale: float  # of guidance
    repeats: int

    @property
    def title(self) -> str:
        """A short title, as in "DDIM 50, scale 2"."""
        return f"{self.name.split('(')[0].upper()} {self.plan.steps}, scale {self.scale:g}"

    @property
    def file(self) -> str:
        """The name of its picture."""
        return f"{self.name.split('(')[0]}-{self.plan.steps}-guidance-{self.scale:g}.png"


class Result(NamedTuple):
    """The result of a job."""

    job: Job
    row: SamplingRow
    scores: DigitScores
    samples: Samples


def run(options: Options) -> None:
    """Sample, write a picture per sampler and one of all, print times and scores."""
    folder = Path(options.model)
    with common.user_errors():
        model = load_model(folder)
        check_model(model)
        check_seed(options.seed)
        if options.num < 10:
            raise ValueError(f"num is {options.num}: use 10 or more, one for each digit")
    pipeline = Pipeline.for_model(model)
    results = []
    for job in make_jobs(model):
        results.append(sample(model, pipeline, job, options))
        with common.user_errors():
            write_grid(folder, results[-1])
    with common.user_errors():
        common.print_report(write(folder, results))
    print(f"wrote {folder}/overview.png, a picture per row, demo.md and demo.json")


def check_model(model: TrainedModel) -> None:
    """Check that a model is one of digits that can be guided.

    Raises: ValueError for another model.
    """
    info = model.info
    if str(info.config.data) != "digits" or not isinstance(info.conditioning, ClassLabel):
        raise ValueError(
            f"{model.name} is not a model of the configuration digits: use 'diffjax sample'"
        )
    require_undistilled(model)
    check_guidance(model, Guidance(2.0))


def make_jobs(model: TrainedModel) -> list[Job]:
    """DDPM over all levels, and DDIM in few steps at several guidance scales."""
    levels = model.schedule
    ddpm = sampler.ddpm(levels, schedule.trailing(levels, schedule.length(levels)))
    ddim = sampler.ddim(levels, schedule.trailing(levels, DDIM_STEPS))
    jobs = [Job("ddpm(fixed_small, trailing)", ddpm, 1.0, 1)]
    return jobs + [Job("ddim(eta=0, trailing)", ddim, scale, REPEATS) for scale in SCALES]


def sample(model: TrainedModel, pipeline: Pipeline, job: Job, options: Options) -> Result:
    """Sample as often as the job says; the run of the median time counts."""
    labels = model.info.conditioning.spread(options.num)
    request = Request(
        num=options.num,
        batch=parallel.round_up(options.num, jax.device_count()),
        seed=options.seed,
        condition=labels,
        guidance=Guidance(job.scale),
    )
    total, title = job.plan.steps * job.repeats, f"{job.name} guidance {job.scale:g}"
    with common.progress_bar(total) as bar:
        hooks = Hooks(common.compiling(bar, title))
        timed = [pipeline(model.params, job.plan, request, hooks) for _ in range(job.repeats)]
    median = sorted(timed, key=lambda samples: samples.run_seconds)[job.repeats // 2]
    samples = replace(median, compile_seconds=sum(each.compile_seconds for each in timed))
    row = sampling_row(model, samples, job.plan, job.name, request)
    return Result(job, row, score_digits(samples.images, labels), samples)


def write_grid(folder: Path, result: Result) -> None:
    """Write the picture of a job's images."""
    images = result.samples.images
    captions = [str(i % 10) for i in range(len(images))]
    image_io.save_png(folder / result.job.file, image_io.grid(images, captions, columns=10))


def write(folder: Path, results: list[Result]) -> str:
    """Write the picture of all jobs, demo.md and demo.json; returns the report."""
    first = np.concatenate([result.samples.images[:10] for result in results])
    titles = [result.job.title for result in results]
    captions = list("0123456789") * len(results)
    overview = image_io.grid(first, captions, columns=10, titles=titles)
    image_io.save_png(folder / "overview.png", overview)
    speedup = results[0].row.run_seconds / results[1].row.run_seconds
    found = {
        "rows": [as_dict(result.row) for result in results],
        "scores": [asdict(result.scores) for result in results],
        "speedup": speedup,
    }
    (folder / "demo.json").write_text(json.dumps(found, indent=1))
    lines = [f"- {result.job.title}: {result.scores}" for result in results]
    lines.append(
        f"- DDIM {results[1].job.plan.steps} is {speedup:.1f} times as fast as DDPM"
        f" {results[0].job.plan.steps} (network, batch, device, dtype as above)"
    )
    report = table_markdown([result.row for result in results]) + "\n\n" + "\n".join(lines)
    (folder / "demo.md").write_text(report + "\n")
    return report
