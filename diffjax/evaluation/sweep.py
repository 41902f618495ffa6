"""Sweeps over samplers, steps and guidance scales, measured in quality and cost.

Rows gather in a folder: an interrupted sweep continues, and further sweeps add to it.
"""

import csv
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

from diffjax.build import image_config
from diffjax.config import Config
from diffjax.data import image_io
from diffjax.data.files import atomic_path
from diffjax.evaluation import frontier, quality, report
from diffjax.evaluation.quality import Reference
from diffjax.evaluation.results import QualityContext, QualityRow, as_dict, classifier_warning
from diffjax.inference.defaults import check_seed, default_sampler
from diffjax.inference.guidance import Guidance, can_be_guided, check_guidance
from diffjax.inference.model import TrainedModel
from diffjax.inference.pipeline import Bound, Clip, Hooks, Pipeline, Request, Samples
from diffjax.inference.samplers import SamplerRequest, make_plan, parse_samplers
from diffjax.sampler import Plan
from diffjax.schedule import length

SAMPLERS = "ddim,dpm_solver_pp_2m,heun,ddpm:1000"
STEPS = (2, 4, 5, 8, 10, 20, 50)
SHOWN = 20  # images of every row
NAME = "frontier"  # of the files, but report.html and images/

# ------------------------------------------------------------------------------- combinations


class Combination(NamedTuple):
    """A model, a plan, a guidance scale and a seed: all that one row measures."""

    model: TrainedModel
    plan: Plan
    sampler: str  # the full name
    scale: float  # of guidance
    seed: int

    def __str__(self) -> str:
        """A short description, as in "ddim(eta=0, trailing) 5 guidance 2 seed 0"."""
        return f"{self.sampler} {self.plan.steps} guidance {self.scale:g} seed {self.seed}"


def combine(
    models: Sequence[TrainedModel],
    samplers: Sequence[SamplerRequest] | None,
    steps: Sequence[int],
    scales: Sequence[float] | None,
    seeds: Sequence[int],
) -> list[Combination]:
    """Every combination, once, the quickest first.

    samplers, scales: None for each model's default. steps: of samplers without steps of their own.

    Raises: ValueError for a combination that cannot be measured.
    """
    for seed in seeds:
        check_seed(seed)
    combinations = []
    for model in models:
        model_scales = default_scales(model) if scales is None else scales
        for scale in model_scales:
            check_guidance(model, Guidance(scale))
        requests = default_samplers(model) if samplers is None else samplers
        for request in requests:
            for n in [request.steps] if request.steps is not None else steps:
                plan, name = make_plan(request, model.schedule, n)
                combinations += [
                    Combination(model, plan, name, scale, seed)
                    for scale, seed in itertools.product(model_scales, seeds)
                ]
    # A plan may be asked for in two ways.
    unique = {(c.model.name, c.sampler, c.plan.steps, c.scale, c.seed): c for c in combinations}
    return sorted(unique.values(), key=lambda c: c.plan.steps * (1 if c.scale == 1 else 2))


def default_samplers(model: TrainedModel) -> list[SamplerRequest]:
    """The default samplers: for a model of few steps what it was distilled for."""
    distillation = model.info.config.distillation
    if not distillation.steps:
        T = length(model.schedule)
        requests = parse_samplers(SAMPLERS)
        return [r._replace(steps=min(r.steps, T)) if r.steps else r for r in requests]
    name, steps = default_sampler(distillation, model.schedule)
    return [SamplerRequest(name, steps=steps)]


def default_scales(model: TrainedModel) -> list[float]:
    """The default guidance scales: 1, and one that guides where the model allows."""
    distillation = model.info.config.distillation
    if distillation.guidance_conditioned:
        return [1.0, distillation.guidance]
    return [1.0, 2.0] if can_be_guided(model.info) else [1.0]


def check_same_data(models: Sequence[TrainedModel], images: Sequence[Config] | None = None) -> None:
    """Check that models have the same data, and different names.

    The data of a model of latents are the images that were encoded. images: the configurations of
    the models' images; None to look for them where they were.

    Raises: ValueError for models of different data, or of one name, or for none.
    """
    if not models:
        raise ValueError("models is empty: use one model or more")
    if images is None:
        images = [image_config(model.info.config) for model in models]
    data = [_describe_images(*pair) for pair in zip(models, images, strict=True)]
    for model, other in zip(models, data, strict=True):
        if other != data[0]:
            raise ValueError(
                f"{model.name} was trained on {other}, and {models[0].name} on {data[0]}: use a"
                " sweep for each"
            )
    names = [model.name for model in models]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"models have one name, {name!r}, and rows of either could be mistaken: rename a"
                " folder"
            )


def _describe_images(model: TrainedModel, images: Config) -> str:
    size = "x".join(map(str, quality.image_shape(model)))
    return f"{images.data} of {size}"


# ------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class SweepOptions:
    """Options that all rows of a sweep share."""

    num: int  # images of each row
    batch: int
    bound: Bound = field(default_factory=Clip)


class Sweep:
    """A folder of rows, and what measures those that are missing in it."""

    def __init__(self, folder: Path, reference: Reference, options: SweepOptions) -> None:
        """Read the rows that are in the folder.

        Raises: ValueError for a file of rows that cannot be read.
        """
        self.folder, self.rows = folder, read_rows(folder)
        self._reference, self._options = reference, options
        self._pipelines: dict[str, Pipeline] = {}

    def missing(self, combinations: Sequence[Combination]) -> list[Combination]:
        """The combinations without a row of the same context, or without its images."""
        done = {row.context for row in self.rows if image_path(self.folder, row).exists()}
        return [c for c in combinations if self.context(c) not in done]

    def context(self, combination: Combination) -> QualityContext:
        """The context of a combination's row."""
        model, plan, sampler, *_ = combination
        request = self._request(combination)
        return quality.quality_context(model, plan, sampler, request, self._reference)

    def measure(self, combination: Combination, hooks: Hooks | None = None) -> QualityRow:
        """Measure a combination, and write its images and the rows.

        Raises: NotFiniteError for images that are not finite; OSError for a folder that
        cannot be written.
        """
        model, plan, sampler, *_ = combination
        if model.name not in self._pipelines:
            self._pipelines[model.name] = Pipeline.for_model(model)
        pipeline, request = self._pipelines[model.name], self._request(combination)
        row, samples = quality.measure(
            model, pipeline, self._reference, plan, sampler, request, hooks
        )
        self._add(row, samples, model)
        return row

    @property
    def compilations(self) -> int:
        """Programs compiled so far."""
        return sum(pipeline.compilations for pipeline in self._pipelines.values())

    def write_report(self) -> str:
        """Write all files but the rows and images, as `write_report`."""
        return write_report(self.folder, self.rows)

    def _request(self, combination: Combination) -> Request:
        return Request(
            num=self._options.num,
            batch=self._options.batch,
            seed=combination.seed,
            guidance=Guidance(combination.scale),
            bound=self._options.bound,
        )

    def _add(self, row: QualityRow, samples: Samples, model: TrainedModel) -> None:
        captions = model.info.conditioning.describe(samples.condition)
        captions = None if captions is None else captions[:SHOWN]
        path = image_path(self.folder, row)
        image_io.save_png(path, image_io.grid(samples.images[:SHOWN], captions, columns=10))
        # A row whose images were lost is measured again, and replaced.
        others = [other for other in self.rows if image_path(self.folder, other) != path]
        self.rows = [*others, row]
        write_rows(self.folder, self.rows)


# ------------------------------------------------------------------------------- files


def read_rows(folder: Path) -> list[QualityRow]:
    """The rows of earlier sweeps in a folder, none if there is no file.

    Raises: ValueError for a file that has something else.
    """
    path = folder / f"{NAME}.json"
    if not path.exists():
        return []
    try:
        return [QualityRow(**row) for row in json.loads(path.read_bytes())]
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} has no rows of this version: move it, or use another folder"
        ) from error


def write_rows(folder: Path, rows: Sequence[QualityRow]) -> None:
    """Write the rows as JSON, one a line."""
    lines = ",\n".join(json.dumps(as_dict(row)) for row in rows)
    with atomic_path(folder / f"{NAME}.json") as part:
        part.write_text(f"[\n{lines}\n]\n")


def image_path(folder: Path, row: QualityRow) -> Path:
    """The path of a row's image grid, of words and a hash of its key and seed."""
    words = f"{row.sampler}-{row.steps}-{row.guided}-{row.seed}-{row.network}"
    name = "".join(c if c.isalnum() or c in ".-=" else "_" for c in words)
    digest = hashlib.sha256(repr((frontier.row_key(row), row.seed)).encode()).hexdigest()
    return folder / "images" / f"{name}-{digest[:12]}.png"


def write_report(folder: Path, rows: Sequence[QualityRow]) -> str:
    """Write the rows as tables, plots and a page.

    The files are frontier.csv, .md, .png, .svg and report.html. Returns the table in Markdown.
    """
    names = [column.name for column in fields(QualityRow)]
    with (folder / f"{NAME}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([getattr(row, name) for name in names] for row in rows)
    summary = frontier.summary(rows)
    (folder / f"{NAME}.md").write_text(f"{summary}\n")
    for suffix in (".png", ".svg"):
        frontier.plot(rows, folder / f"{NAME}{suffix}")
    (folder / "report.html").write_text(_page(folder, rows))
    return summary


def _page(folder: Path, rows: Sequence[QualityRow]) -> str:
    differing = frontier.differing_fields(rows)
    remark = "All rows share their context."
    if differing:
        remark = f"Rows differ in {', '.join(differing)}; compare with care."
    if warning := classifier_warning(rows):
        remark += f" Warning: {warning}."
    title = f"Quality and latency: {', '.join(dict.fromkeys(row.network for row in rows))}"
    shown = [row for row in rows if image_path(folder, row).exists()]
    svg = (folder / f"{NAME}.svg").read_text()
    return report.page(title, remark, svg, shown, [image_path(folder, row) for row in shown])
