"""Sweeps of a trained run as a command, and its quality as one row."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from helpers import check_mistake, check_told, naming

from diffjax import schedule
from diffjax.cli import evaluate, frontier
from diffjax.config import load_config
from diffjax.devices.parallel import device_mesh
from diffjax.evaluation import quality
from diffjax.evaluation.results import QualityRow
from diffjax.inference import samplers
from diffjax.inference.pipeline import Guidance, Pipeline, load_model

SWEEP = ["--samplers", "ddim,ddpm(variance=fixed_large):3", "--steps", "1,2", "--num", "40", "--batch", "8"]
FIGURES = ("frechet", "kernel", "precision", "recall", "nfe", "steps", "sampler", "guided", "seed")


def last_numbers(capsys):
    """Of the last line: the rows that were measured, those that were there, and the compilations."""
    return [int(number) for number in re.findall(r"\d+", capsys.readouterr().out.splitlines()[-1])]


def figures(path):
    return [{name: row[name] for name in FIGURES} for row in json.loads(path.read_text())]


@pytest.mark.usefixtures("in_suite_data")
def test_a_sweep_measures_every_combination_once_and_goes_on_where_it_was(digits_run, tmp_path, capsys):
    arguments = [str(digits_run), *SWEEP, "--features", "pixels", "--out", str(tmp_path / "a")]
    frontier.main([*arguments, "--guidance", "1,2"])
    out = tmp_path / "a" / "pareto.json"
    rows = [QualityRow(**row) for row in json.loads(out.read_text())]
    assert [(row.sampler.split("(")[0], row.steps, row.guided, row.nfe) for row in rows] == [
        ("ddim", 1, "1", 1), ("ddim", 1, "2", 2), ("ddim", 2, "1", 2), ("ddpm", 3, "1", 3), ("ddim", 2, "2", 4),
        ("ddpm", 3, "2", 6),
    ]  # fmt: skip
    assert {row.sampler for row in rows} == {"ddim(eta=0, trailing)", "ddpm(fixed_large, trailing)"}
    assert all(row.batches == 5 and row.batch == 8 and row.reference == "digits, train, 1,500 images" for row in rows)
    # Compiled are: one row at a time, noisy or not, guided or not; and the noise to start from.
    assert last_numbers(capsys) == [6, 0, 5]
    for name in ("pareto.csv", "pareto.md", "pareto.png", "pareto.svg", "report.html"):
        assert (tmp_path / "a" / name).stat().st_size > 500
    page = (tmp_path / "a" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert len((tmp_path / "a" / "pareto.csv").read_text().splitlines()) == 7

    first = figures(out)
    # Cut short: a row is missing, and the images of another.
    lost = json.loads(out.read_text())
    out.write_text(json.dumps(lost[:-1]))
    sorted((tmp_path / "a" / "images").iterdir())[0].unlink()
    frontier.main([*arguments, "--guidance", "1,2"])
    assert last_numbers(capsys)[:2] == [2, 4]
    again = figures(out)
    assert sorted(map(str, again)) == sorted(map(str, first))
    # Another sweep adds to it.
    frontier.main([*arguments, "--guidance", "1", "--seeds", "0,1", "--samplers", "ddim:1"])
    assert last_numbers(capsys)[:2] == [1, 1]
    assert len(figures(out)) == 7
    # So does one of the same samplers in another context: nothing takes the place of a row but its own kind.
    frontier.main([*arguments, "--guidance", "1", "--samplers", "ddim:1", "--num", "48"])
    assert last_numbers(capsys)[:2] == [1, 0]
    frontier.main([*arguments, "--guidance", "1", "--samplers", "ddim:1", "--reference", "held_out"])
    assert last_numbers(capsys)[:2] == [1, 0]
    assert len(figures(out)) == 9


@pytest.mark.usefixtures("in_suite_data")
def test_an_interrupted_sweep_keeps_its_rows(digits_run, tmp_path, monkeypatch):
    measure, calls = quality.measure, []

    def interrupted(*arguments, **options):
        calls.append(options)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*arguments, **options)

    monkeypatch.setattr(quality, "measure", interrupted)
    arguments = [str(digits_run), *SWEEP, "--features", "pixels", "--guidance", "1", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        frontier.main(arguments)
    assert len(figures(tmp_path / "pareto.json")) == 2
    frontier.main(arguments)
    assert len(calls) == 4
    assert len(figures(tmp_path / "pareto.json")) == 3


@pytest.mark.usefixtures("in_suite_data")
def test_one_row_of_quality_is_complete_and_appended(digits_run, capsys):
    command = [str(digits_run), "--num", "80", "--batch", "16", "--sampler", "ddim", "--steps", "10", "--guidance", "2"]
    evaluate.main(command)
    evaluate.main([*command, "--seed", "1"])
    said = capsys.readouterr().out
    first, second = (
        QualityRow(**json.loads(line)) for line in (digits_run / "evaluations.jsonl").read_text().splitlines()
    )
    assert (first.seed, second.seed, first.nfe, first.guided) == (0, 1, 20, "2")
    assert first.recognised is not None
    assert first.recognised > 0.5  # a fifth of the training: more than four times chance
    assert 1 < first.inception < 10
    assert second.frechet != first.frechet
    assert second.frechet == pytest.approx(first.frechet, rel=0.5)
    assert re.search(naming("cnn-64", "digits"), first.extractor)
    for word in (first.extractor, first.reference, "426,961", "ddim(eta=0, trailing)", "float32"):
        assert word in said


@pytest.mark.usefixtures("in_suite_data")
def test_one_device_and_eight_measure_the_same(digits_run, tmp_path):
    run = load_model(digits_run)
    reference = quality.read_reference(*run.description[:2], "pixels", "held_out", tmp_path, None)
    plan, name = samplers.at_steps(samplers.requests("ddim:3")[0], run.schedule, 3)
    measured = [
        quality.measure(
            run, Pipeline(run.network, run.prediction, *run.description[1:], mesh=device_mesh(jax.devices()[:n])),
            reference, plan, name, guidance=Guidance(1.0), num=40, batch=8, seed=0,
        )
        for n in (1, 8)
    ]  # fmt: skip
    (one, made), (eight, others) = measured
    assert np.abs(made.images.astype(int) - others.images).max() <= 1  # rounding, of sums in another order
    for figure in ("frechet", "kernel", "precision", "recall"):
        assert getattr(one, figure) == pytest.approx(getattr(eight, figure), rel=1e-3, abs=1e-6)
    assert "held out" in one.reference


@pytest.mark.usefixtures("in_suite_data")
def test_real_images_that_cannot_be_compared_are_told(tmp_path):
    config = load_config("digits")
    foreign = dataclasses.replace(config, data=dataclasses.replace(config.data, name="hf:someone/ddpm"))
    with pytest.raises(ValueError, match=naming("hf:someone/ddpm")):
        quality.read_reference(foreign, (8, 8, 1), "pixels", "train", tmp_path, None)
    with pytest.raises(ValueError, match=naming("digits", "8x8x1", "32x32x3")):
        quality.read_reference(config, (32, 32, 3), "pixels", "train", tmp_path, None)


def test_samplers_are_asked_for_by_name_dials_and_steps():
    levels = schedule.linear(1000)
    asked = samplers.requests("ddim, ddim(eta=0.5, spacing=karras):7,ddpm(variance=fixed_large):1000")
    assert [samplers.at_steps(request, levels, 20)[1] for request in asked] == [
        "ddim(eta=0, trailing)", "ddim(eta=0.5, karras)", "ddpm(fixed_large, trailing)"
    ]  # fmt: skip
    assert [samplers.at_steps(request, levels, 20)[0].steps for request in asked] == [20, 7, 1000]


@pytest.mark.usefixtures("in_suite_data")
def test_what_is_asked_for_twice_is_measured_once(digits_run):
    run = load_model(digits_run)
    options = frontier.Options((str(digits_run),), samplers="ddim,ddim(eta=0),ddim:5", steps="5,5")
    assert [(c.plan.steps, c.scale) for c in frontier.combine(options, [run])] == [(5, 1.0), (5, 2.0)]
    unlabelled = dataclasses.replace(run.description.config.train, label_dropout=0.0)
    config = dataclasses.replace(run.description.config, train=unlabelled)
    alone = run._replace(description=run.description._replace(config=config))
    assert [c.scale for c in frontier.combine(options, [alone])] == [1.0]  # cannot be guided


@pytest.mark.usefixtures("in_suite_data")
def test_images_that_are_not_finite_are_named_by_their_plan(digits_run, tmp_path, capsys, monkeypatch):
    generate = Pipeline.__call__

    def broken(*arguments, **options):
        made = generate(*arguments, **options)
        return made._replace(x=made.x * np.nan)

    monkeypatch.setattr(Pipeline, "__call__", broken)
    command = "{run} --samplers ddim:1 --guidance 1 --num 40 --batch 8 --features pixels --out {tmp}"
    with pytest.raises(SystemExit) as end:
        frontier.main(command.format(run=digits_run, tmp=tmp_path).split())
    check_told(end.value.code, capsys.readouterr().err, ("ddim(eta=0, trailing)", "1"), after_progress=True)
    assert not (tmp_path / "pareto.json").exists()


BAD = {
    "{tmp}/nowhere": "{tmp}/nowhere",
    "": "run",
    "{run} --samplers dim": ("dim", "ddpm"),
    "{run} --samplers ddim:x": "ddim:x",
    "{run} --samplers ddim(eta)": "ddim(eta)",
    "{run} --samplers ddim(eta=x)": ("ddim(eta=x)", "eta", "x"),
    "{run} --samplers ddim(speed=1)": ("ddim(speed=1)", "speed"),
    "{run} --samplers heun(eta=1)": ("eta", "heun"),
    "{run} --samplers ddim(spacing=wide)": ("spacing", "wide"),
    "{run} --samplers ddim:1001": ("steps", "1001", "1000"),
    "{run} --steps 2,x": ("steps", "2,x"),
    "{run} --steps 0": ("steps", "0", "1000"),
    "{run} --guidance high": ("guidance", "high"),
    "{run} --guidance=-1": ("guidance", "-1"),
    "{run} --seeds 1.5": ("seeds", "1.5"),
    "{run} --num 1": ("num", "1"),
    "{run} --num 30 --batch 8": ("num", "30", "batch", "8", "5"),
    "{run} --num 100 --batch 3": ("batch", "3", "8"),
    "{run} {run}": "runs",
    "{run} --weights 0.5": ("weights", "0.5", "0.999"),
    "{run} --features inception --inception {tmp}/none.safetensors": "{tmp}/none.safetensors",
    "{run} --out {tmp}/file": "{tmp}/file",
    "{run} --out {tmp}/rows": "{tmp}/rows/pareto.json",
}


@pytest.mark.usefixtures("in_suite_data")
@pytest.mark.parametrize("command", BAD)
def test_a_mistake_in_sweeping_is_named_in_one_line(command, digits_run, tmp_path, capsys):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "pareto.json").write_text('[{"steps": 3}]')
    check_mistake(frontier.main, command, BAD[command], capsys, run=digits_run, tmp=tmp_path)
