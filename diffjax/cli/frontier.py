"""The latency-quality frontier of trained networks: every sampler, step count and guidance scale, measured.

diffjax frontier runs/digits --samplers ddim,dpm_solver_pp_2m,heun,ddpm:1000 --steps 2,4,5,8,10,20,50 \
    --guidance 1,2 --num 500 --out report/

Rows gather in the folder: a sweep that was interrupted goes on where it was, and another one adds to it, as that of
its students:

diffjax frontier runs/digits-distilled/16 runs/digits-distilled/4 --out report/
"""

import csv
import hashlib
import itertools
import json
import logging
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple

import tyro
from tqdm import tqdm

from diffjax.cli import common
from diffjax.data import image_io
from diffjax.evaluation import features, frontier, quality, report
from diffjax.evaluation.quality import Reference
from diffjax.evaluation.results import CONTEXT, QualityRow
from diffjax.inference import samplers
from diffjax.inference.pipeline import (
    Guidance,
    Pipeline,
    TrainedModel,
    check_guidance,
    check_seed,
    count_parameters,
    default_sampler,
    describe_devices,
    describe_weights,
    distillation_warning,
    load_model,
)
from diffjax.sampler import Plan

PROGRAM = "diffjax frontier"
SHOWN = 20  # images of every row
SAMPLERS = "ddim,dpm_solver_pp_2m,heun,ddpm:1000"


@dataclass(frozen=True)
class Options:
    """Measure quality and latency of every combination of samplers, steps and guidance scales."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders; every combination is measured for each of them."""
    samplers: str | None = None
    """As in ddim,ddim(eta=0.5),ddpm(variance=fixed_large):1000; the steps behind a colon replace --steps. None for
    ddim,dpm_solver_pp_2m,heun,ddpm:1000, and for a student of few steps only what it was distilled for."""
    steps: str = "2,4,5,8,10,20,50"
    """Levels visited."""
    guidance: str | None = None
    """Scales, as in 1,2: 0 unconditional, 1 conditional, more is guided; None for 1, and 2 where the network can be
    guided, or the largest that a student is told."""
    num: int = 500
    """Images of each combination."""
    seeds: str = "0"
    """Each combination is measured with each, and the spread over them is told."""
    batch: int | None = None
    """Images at a time; None for a fifth of --num, and 100 at most."""
    features: Literal["cnn", "pixels", "inception"] = "cnn"
    """What images are compared by: a small network trained here on the real ones, their pixels, or Inception-v3."""
    reference: Literal["train", "held_out"] = "train"
    """Split of the real images."""
    inception: str | None = None
    """File of Inception-v3's weights; None for those downloaded once."""
    clip: bool = True
    """Estimates of x0 to the range of images."""
    weights: str = "ema"
    """The moving average of the parameters, or the parameters as trained (raw)."""
    out: str = "report"
    """Folder of pareto.json, .csv, .md, .png, .svg, report.html, and the images of each row."""


class Combination(NamedTuple):
    """One row to be."""

    run: TrainedModel
    plan: Plan
    sampler: str
    scale: float
    seed: int


def main(arguments: list[str]) -> None:
    """Parse, measure what is missing, write after every row, print."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    options = common.parse(Options, PROGRAM, arguments)
    with common.user_errors(PROGRAM):
        runs = [load_model(run, weights=options.weights) for run in options.runs]
        if not runs:
            raise ValueError("name a run folder, or several")
        combinations = combine(options, runs)
        batch = quality.timed_batch(options.num) if options.batch is None else options.batch
        quality.check_batch(options.num, batch)
        out = common.check_output(Path(options.out) / "pareto.json", ".json")
        rows = read(out)
        check_same_data(runs)
        config, shape, _ = runs[0].description
        weights = None if options.inception is None else Path(options.inception)
        cache = features.cache_folder()
        reference = quality.read_reference(config, shape, options.features, options.reference, cache, weights)
    for doubt in dict.fromkeys(
        f"{c.run.name} {said}" for c in combinations if (said := distillation_warning(c.run, c.plan))
    ):
        print(doubt)
    weights_of = {run.name: describe_weights(run) for run in runs}
    known = [row for row in rows if shown(out.parent, row).exists()]  # others are measured again
    missing = [c for c in combinations if not is_there(c, known, options, reference, batch, weights_of[c.run.name])]
    batches = -(-options.num // batch)
    generators = {run.name: Pipeline.of(run) for run in runs}
    with tqdm(total=sum(c.plan.steps for c in missing) * batches, unit="step", dynamic_ncols=True) as bar:
        for c in missing:
            bar.set_description(f"{c.sampler} {c.plan.steps} guidance {c.scale:g} seed {c.seed}")
            try:
                row, made = quality.measure(
                    c.run, generators[c.run.name], reference, c.plan, c.sampler, guidance=Guidance(c.scale),
                    num=options.num, batch=batch, seed=c.seed, clip=options.clip, progress=bar.update,
                )  # fmt: skip
            except quality.NotFiniteError as error:
                common.exit_with_error(PROGRAM, error)
            captions = [str(label) for label in made.labels[:SHOWN]] if c.run.description.classes else None
            with common.user_errors(PROGRAM):
                place = shown(out.parent, row)
                image_io.save_png(place, image_io.grid(made.images[:SHOWN], captions, columns=10))
                rows = [*(other for other in rows if shown(out.parent, other) != place), row]
                write_rows(out, rows)
    with common.user_errors(PROGRAM):
        print(write_report(out, rows))
    compiled = sum(generator.compilations for generator in generators.values())
    print(f"{len(missing)} rows measured, {len(combinations) - len(missing)} were there; {compiled} compilations")


def combine(options: Options, runs: list[TrainedModel]) -> list[Combination]:
    """Every combination, the quick ones first. ValueError for what cannot be measured, before anything is."""
    steps = whole_numbers("--steps", options.steps)
    seeds = whole_numbers("--seeds", options.seeds)
    scales = None if options.guidance is None else numbers("--guidance", options.guidance)
    for seed in seeds:
        check_seed(seed)
    if options.num < 2:
        raise ValueError(f"--num is {options.num}: a distance takes two images or more, and a usual one thousands")

    found = []
    for run in runs:
        for request in samplers.requests(options.samplers or usual_samplers(run)):
            for n in [request.steps] if request.steps is not None else steps:
                plan, name = samplers.at_steps(request, run.schedule, n)
                for scale, seed in itertools.product(usual_scales(run) if scales is None else scales, seeds):
                    check_guidance(run, Guidance(scale))
                    found.append(Combination(run, plan, name, scale, seed))
    # One may be asked for in two ways.
    found = list({(c.run.name, c.sampler, c.plan.steps, c.scale, c.seed): c for c in found}.values())
    return sorted(found, key=lambda c: c.plan.steps * (1 if c.scale == 1 else 2))  # about the time that they take


def usual_samplers(run: TrainedModel) -> str:
    """What is measured if nobody says: of a student of few steps only what it was distilled for."""
    task = run.description.config.distillation
    return "{}:{}".format(*default_sampler(task, run.schedule)) if task.steps else SAMPLERS


def usual_scales(run: TrainedModel) -> list[float]:
    """The same, of guidance."""
    config = run.description.config
    if config.distillation.told:
        return [1.0, config.distillation.guidance]
    return [1.0, 2.0] if run.description.classes and config.train.label_dropout > 0 else [1.0]


def numbers(option: str, text: str) -> list[float]:
    """Different numbers, separated by commas. ValueError, naming the option, for anything else."""
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} is {text!r}: write numbers, separated by commas") from None
    return list(dict.fromkeys(found))


def whole_numbers(option: str, text: str) -> list[int]:
    """The same, of whole numbers."""
    if not all(word.strip().isdecimal() for word in text.split(",")):
        raise ValueError(f"{option} is {text!r}: write whole numbers, separated by commas")
    return [int(number) for number in numbers(option, text)]


def check_same_data(runs: list[TrainedModel]) -> None:
    """ValueError for runs of different images: they are held against the same real ones."""
    first, *others = runs
    for run in others:
        ours, theirs = ((str(r.description.config.data), r.description.image_shape) for r in (first, run))
        if ours != theirs:
            raise ValueError(f"{run.name} was trained on {theirs}, and {first.name} on {ours}: sweep them apart")
    if len({run.name for run in runs}) < len(runs):
        raise ValueError("two of the runs have one name, and their rows could not be told apart: rename a folder")


def is_there(
    c: Combination, rows: list[QualityRow], options: Options, reference: Reference, batch: int, weights: str
) -> bool:
    """Whether a row of this combination, in this context, has been measured."""
    wanted = {
        "sampler": c.sampler, "steps": c.plan.steps, "guided": str(Guidance(c.scale)), "seed": c.seed,
        "clipping": quality.describe_clipping(options.clip), "network": c.run.name,
        "parameters": count_parameters(c.run.params), "weights": weights,
        "images": options.num, "reference": reference.name, "extractor": reference.extractor.name, "batch": batch,
        "image_size": "x".join(map(str, c.run.description.image_shape)), "device": describe_devices(),
        "dtype": c.run.description.config.network.dtype, "versions": quality.versions(),
    }  # fmt: skip
    assert set(CONTEXT) <= set(wanted)
    return any(all(getattr(row, name) == value for name, value in wanted.items()) for row in rows)


def shown(folder: Path, row: QualityRow) -> Path:
    """Where the images of a row are: what tells it from all others, the most telling in words."""
    words = f"{row.sampler}-{row.steps}-{row.guided}-{row.seed}-{row.network}"
    rest = hashlib.sha256(repr((frontier.identity(row), row.seed)).encode()).hexdigest()[:12]
    return folder / "images" / ("".join(c if c.isalnum() or c in ".-=" else "_" for c in words) + f"-{rest}.png")


def read(path: Path) -> list[QualityRow]:
    """The rows of an earlier sweep, none where there is none. ValueError for a file that holds something else."""
    if not path.exists():
        return []
    try:
        return [QualityRow(**row) for row in json.loads(path.read_bytes())]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} holds no rows of this version: move it, or choose another --out") from error


def write_rows(path: Path, rows: list[QualityRow]) -> None:
    """Whole, or not at all."""
    part = path.with_suffix(".part")
    part.write_text("[\n" + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]\n")
    part.replace(path)


def write_report(path: Path, rows: list[QualityRow]) -> str:
    """Everything beside pareto.json. Returns what is printed."""
    names = [field.name for field in fields(QualityRow)]
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([names, *([getattr(row, name) for name in names] for row in rows)])
    summary = frontier.summary(rows)
    path.with_suffix(".md").write_text(f"{summary}\n")
    for suffix in (".png", ".svg"):
        frontier.plot(rows, path.with_suffix(suffix))
    differ = frontier.differing(rows)
    remark = f"Rows differ in {', '.join(differ)}; compare with care." if differ else "All rows share their context."
    title = f"Quality and latency: {', '.join(dict.fromkeys(row.network for row in rows))}"
    rows = [row for row in rows if shown(path.parent, row).exists()]
    pictures = [shown(path.parent, row) for row in rows]
    html = report.page(title, remark, path.with_suffix(".svg").read_text(), rows, pictures)
    (path.parent / "report.html").write_text(html)
    return f"{summary}\n\nwrote {path.parent}/report.html, pareto.json, .csv, .md, .png and .svg"
