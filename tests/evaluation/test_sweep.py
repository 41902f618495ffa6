import csv
import dataclasses
import json

import numpy as np
import pytest
from helpers import naming

from diffjax.config import Distillation, load_config
from diffjax.data.codec import Codec
from diffjax.evaluation import quality, sweep
from diffjax.evaluation.quality import ReferenceOptions
from diffjax.evaluation.sweep import Sweep, SweepOptions
from diffjax.inference.samplers import parse_samplers

OPTIONS = SweepOptions(num=40, batch=8)
FIGURES = ("fd", "kd", "precision", "recall", "nfe", "steps", "sampler", "guided", "seed")
PROGRESSIVE = Distillation(method="progressive", steps=4)
GUIDED = Distillation(method="guidance", guidance=3.0)
pytestmark = pytest.mark.usefixtures("in_suite_data")


@pytest.fixture
def reference():
    options = ReferenceOptions(features="pixels")
    return quality.read_reference(load_config("digits"), (8, 8, 1), options)


def combine(model, samplers="ddim,ddpm(variance=fixed_large):3", steps=(1, 2), scales=(1.0,)):
    return sweep.combine([model], parse_samplers(samplers), steps, scales, [0])


def figures(folder):
    rows = sweep.read_rows(folder)
    return sorted(str([getattr(row, name) for name in FIGURES]) for row in rows)


def measure_all(combinations, folder, reference, options=OPTIONS):
    """Measure what is missing: (number measured, the sweep)."""
    done = Sweep(folder, reference, options)
    missing = done.missing(combinations)
    for combination in missing:
        done.measure(combination)
    return len(missing), done


# ------------------------------------------------------------------------------- combinations


def test_combine_is_quickest_first(digits_model):
    found = combine(digits_model(), scales=(1.0, 2.0))
    assert [(c.sampler, c.plan.steps, c.scale) for c in found] == [
        ("ddim(eta=0, trailing)", 1, 1.0),
        ("ddim(eta=0, trailing)", 1, 2.0),
        ("ddim(eta=0, trailing)", 2, 1.0),
        ("ddpm(fixed_large, trailing)", 3, 1.0),
        ("ddim(eta=0, trailing)", 2, 2.0),
        ("ddpm(fixed_large, trailing)", 3, 2.0),
    ]
    assert str(found[0]) == "ddim(eta=0, trailing) 1 guidance 1 seed 0"


def test_combine_each_once(digits_model):
    found = combine(digits_model(), "ddim,ddim(eta=0),ddim:5", (5, 5), (1.0, 2.0))
    assert [(c.plan.steps, c.scale) for c in found] == [(5, 1.0), (5, 2.0)]


def test_combine_models_and_seeds(digits_model):
    models = [digits_model(), digits_model(name="unet of y")]
    found = sweep.combine(models, parse_samplers("ddim"), [2], [1.0], [0, 1])
    assert [(c.model.name, c.seed) for c in found] == [
        ("unet of x", 0), ("unet of x", 1), ("unet of y", 0), ("unet of y", 1)
    ]  # fmt: skip


def test_combine_defaults(digits_model):
    """A distilled model is sampled as it was distilled, and an unguidable one is not guided."""

    def default(model):
        short = parse_samplers("ddim,ddpm:10") if not model.info.config.distillation.steps else None
        found = sweep.combine([model], short, [4, 2], None, [0])
        return sorted((c.sampler, c.plan.steps, c.scale) for c in found)

    ddim, ddpm = "ddim(eta=0, trailing)", "ddpm(fixed_small, trailing)"
    plain = [(ddim, 2, 1.0), (ddim, 4, 1.0), (ddpm, 10, 1.0)]
    guided = [(name, steps, 2.0) for name, steps, _ in plain]
    assert default(digits_model()) == sorted([*plain, *guided])
    assert default(digits_model(dropout=0.0)) == plain
    assert default(digits_model("unconditional")) == plain
    assert default(digits_model(distillation=PROGRESSIVE)) == [(ddim, 4, 1.0)]
    assert sweep.default_scales(digits_model(distillation=GUIDED)) == [1.0, 3.0]
    *others, ddpm = sweep.default_samplers(digits_model())
    assert others == parse_samplers(sweep.SAMPLERS)[:-1]
    assert (ddpm.name, ddpm.steps) == ("ddpm", 100)  # as many as the model has


@pytest.mark.parametrize(
    ("samplers", "steps", "scales", "seeds", "words"),
    [
        ("ddim", [0], [1.0], [0], ("steps", 0)),
        ("ddim", [101], [1.0], [0], ("steps", 101, 100)),
        ("ddim", [2], [-1.0], [0], ("guidance", -1)),
        ("ddim", [2], [1.0], [-1], ("seed", -1)),
    ],
)
def test_combine_refuses(digits_model, samplers, steps, scales, seeds, words):
    with pytest.raises(ValueError, match=naming(*words)):
        sweep.combine([digits_model()], parse_samplers(samplers), steps, scales, seeds)


def test_check_same_data(digits_model):
    model, other = digits_model(), digits_model(name="unet of y")
    sweep.check_same_data([model, other])
    with pytest.raises(ValueError, match=naming("unet of x")):
        sweep.check_same_data([model, other, model])
    with pytest.raises(ValueError, match=naming("models")):
        sweep.check_same_data([])
    larger = other._replace(info=other.info._replace(x_shape=(16, 16, 1)))
    with pytest.raises(ValueError, match=naming("unet of y", "16x16x1", "unet of x", "8x8x1")):
        sweep.check_same_data([model, larger])


def test_models_of_latents_beside_those_of_images(digits_model, monkeypatch):
    """They have the same data if their latents were made of it, and decode to its size."""
    model = digits_model()
    images = model.info.config
    data = dataclasses.replace(images.data, source="latents", path="z")
    info = model.info._replace(config=dataclasses.replace(images, data=data), x_shape=(4, 4, 2))

    def latent_model(side):
        codec = Codec(lambda images: images, lambda x: np.zeros((len(x), side, side, 1)), None)
        return model._replace(name="dit of z", info=info, codec=codec)

    monkeypatch.setattr(
        sweep, "image_config", lambda config: images if config.data == data else config
    )
    sweep.check_same_data([model, latent_model(8)])
    with pytest.raises(ValueError, match=naming("dit of z", "16x16x1", "unet of x", "8x8x1")):
        sweep.check_same_data([model, latent_model(16)])


# ------------------------------------------------------------------------------- measuring


def test_sweep_measures_each_once_and_resumes(digits_model, reference, tmp_path):
    model = digits_model()
    combinations = combine(model, scales=(1.0, 2.0))
    measured, done = measure_all(combinations, tmp_path, reference)
    assert measured == 6
    # One row at a time, with noise or not, guided or not; and the initial noise.
    assert done.compilations == 5
    assert [(row.steps, row.guided, row.nfe) for row in done.rows] == [
        (1, "1", 1), (1, "2", 2), (2, "1", 2), (3, "1", 3), (2, "2", 4), (3, "2", 6)
    ]  # fmt: skip
    assert {row.reference for row in done.rows} == {reference.name}
    assert all((row.batches, row.batch, row.images) == (5, 8, 40) for row in done.rows)
    assert {sweep.image_path(tmp_path, row) for row in done.rows} == set(
        (tmp_path / "images").iterdir()
    )
    first = figures(tmp_path)
    assert measure_all(combinations, tmp_path, reference)[0] == 0
    # A row is lost, and the images of another.
    rows = json.loads((tmp_path / "frontier.json").read_text())
    (tmp_path / "frontier.json").write_text(json.dumps(rows[:-1]))
    sweep.image_path(tmp_path, done.rows[0]).unlink()
    assert measure_all(combinations, tmp_path, reference)[0] == 2
    assert figures(tmp_path) == first


def test_sweeps_add_up(digits_model, reference, tmp_path):
    """A row is replaced by its own kind only: another context is another row."""
    model = digits_model()
    combinations = combine(model, "ddim:1")
    other_seed = sweep.combine([model], parse_samplers("ddim:1"), [2], [1.0], [0, 1])
    larger = dataclasses.replace(OPTIONS, num=48)
    unclipped = dataclasses.replace(OPTIONS, bound=None)
    of_held_out = quality.read_reference(
        load_config("digits"), (8, 8, 1), ReferenceOptions(features="pixels", split="held_out")
    )
    for arguments in (
        (combinations, tmp_path, reference),
        (other_seed, tmp_path, reference),
        (combinations, tmp_path, reference, larger),
        (combinations, tmp_path, reference, unclipped),
        (combinations, tmp_path, of_held_out),
    ):
        assert measure_all(*arguments)[0] == 1
    assert len(figures(tmp_path)) == 5
    assert len(list((tmp_path / "images").iterdir())) == 5


def test_interrupted_sweep_keeps_rows(digits_model, reference, tmp_path, monkeypatch):
    model, measure, calls = digits_model(), quality.measure, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(quality, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_all(combine(model), tmp_path, reference)
    assert len(figures(tmp_path)) == 2
    assert measure_all(combine(model), tmp_path, reference)[0] == 1
    assert len(figures(tmp_path)) == 3


# ------------------------------------------------------------------------------- files


def test_report_files(quality_row, tmp_path):
    rows = [quality_row, dataclasses.replace(quality_row, steps=10, nfe=10, batch=7)]
    path = sweep.image_path(tmp_path, rows[0])
    path.parent.mkdir()
    path.write_bytes(b"\x89PNG picture")
    sweep.write_rows(tmp_path, rows)
    summary = sweep.write_report(tmp_path, rows)
    assert {path.name for path in tmp_path.iterdir()} == {
        "frontier.json", "frontier.csv", "frontier.md", "frontier.png", "frontier.svg",
        "report.html", "images",
    }  # fmt: skip
    assert sweep.read_rows(tmp_path) == rows
    assert (tmp_path / "frontier.md").read_text() == f"{summary}\n"
    heads, *lines = csv.reader((tmp_path / "frontier.csv").open(newline=""))
    assert [dict(zip(heads, line, strict=True))["batch"] for line in lines] == ["100", "7"]
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1  # the other row has no images
    assert "batch" in page.split("</p>")[0]  # in which they differ


def test_image_path_is_of_one_row(quality_row, tmp_path):
    """Readable, and another for every context and seed, but not for figures."""
    path = sweep.image_path(tmp_path, quality_row)
    assert path.name.startswith("ddim_eta=0__trailing_-50-2-0-unet_of_x-")
    assert sweep.image_path(tmp_path, dataclasses.replace(quality_row, fd=1.0)) == path
    for name in ("seed", "reference", "extractor", "weights", "versions", "clipping"):
        value = getattr(quality_row, name)
        other = value + 1 if isinstance(value, int) else f"{value}."
        row = dataclasses.replace(quality_row, **{name: other})
        assert sweep.image_path(tmp_path, row) != path


@pytest.mark.parametrize("text", ['[{"steps": 3}]', "{", '{"a": 1}', '[{"steps": [3]}]'])
def test_foreign_rows_are_refused(tmp_path, text):
    (tmp_path / "frontier.json").write_text(text)
    with pytest.raises(ValueError, match=naming(tmp_path / "frontier.json")):
        sweep.read_rows(tmp_path)
