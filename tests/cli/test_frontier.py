"""`diffjax frontier`: sweeps that gather in a folder."""

import json
import re

import pytest
from helpers import check_mistake, check_told, naming

from diffjax.cli import main
from diffjax.evaluation import quality
from diffjax.evaluation.results import QualityRow
from diffjax.inference.pipeline import Pipeline

SWEEP = ["--sampler", "ddim,ddpm(variance=fixed_large):3", "--steps", "1,2"]
SWEEP += ["--num", "40", "--batch", "8", "--features", "pixels"]
FIGURES = ("fd", "kd", "precision", "recall", "nfe", "steps", "sampler", "guided", "seed")


def last_numbers(capsys):
    """The numbers of the last line: rows measured, rows that were there, compilations."""
    return [int(number) for number in re.findall(r"\d+", capsys.readouterr().out.splitlines()[-1])]


def figures(folder):
    rows = json.loads((folder / "frontier.json").read_text())
    return [{name: row[name] for name in FIGURES} for row in rows]


@pytest.mark.slow
def test_sweep(digits_run, tmp_path, capsys, in_suite_data):
    """Every combination is measured once, and a sweep continues where it was."""
    folder = tmp_path / "a"
    words = ["frontier", str(digits_run), *SWEEP, "--out", str(folder)]
    main([*words, "--guidance", "1,2"])
    rows = [QualityRow(**row) for row in json.loads((folder / "frontier.json").read_text())]
    assert [(row.sampler.split("(")[0], row.steps, row.guided, row.nfe) for row in rows] == [
        ("ddim", 1, "1", 1),
        ("ddim", 1, "2", 2),
        ("ddim", 2, "1", 2),
        ("ddpm", 3, "1", 3),
        ("ddim", 2, "2", 4),
        ("ddpm", 3, "2", 6),
    ]
    samplers = {row.sampler for row in rows}
    assert samplers == {"ddim(eta=0, trailing)", "ddpm(fixed_large, trailing)"}
    assert {(row.batches, row.batch) for row in rows} == {(5, 8)}
    (reference,) = {row.reference for row in rows}
    assert re.search(naming("digits", "train", "1,500"), reference)
    # Programs of one row, with and without noise and guidance; and the noise to start from.
    assert last_numbers(capsys) == [6, 0, 5]
    for suffix in ("csv", "md", "png", "svg"):
        assert (folder / f"frontier.{suffix}").stat().st_size > 500
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert len((folder / "frontier.csv").read_text().splitlines()) == 7

    before = figures(folder)
    # Cut short: a row is missing, and the images of another.
    stored = json.loads((folder / "frontier.json").read_text())
    (folder / "frontier.json").write_text(json.dumps(stored[:-1]))
    min((folder / "images").iterdir()).unlink()
    main([*words, "--guidance", "1,2"])
    assert last_numbers(capsys)[:2] == [2, 4]
    assert sorted(map(str, figures(folder))) == sorted(map(str, before))
    # Another sweep adds to it.
    one = [*words, "--guidance", "1", "--sampler", "ddim:1"]
    main([*one, "--seed", "0,1"])
    assert last_numbers(capsys)[:2] == [1, 1]
    assert len(figures(folder)) == 7
    # So does one in another context: a row is replaced only by its own kind.
    main([*one, "--num", "48"])
    assert last_numbers(capsys)[:2] == [1, 0]
    main([*one, "--reference", "held_out"])
    assert last_numbers(capsys)[:2] == [1, 0]
    assert len(figures(folder)) == 9


def test_interruption(unconditional_run, tmp_path, monkeypatch, capsys, in_suite_data):
    """Ctrl-C keeps the rows that were measured."""
    measure, calls = quality.measure, []

    def interrupted(*arguments, **options):
        calls.append(options)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*arguments, **options)

    monkeypatch.setattr(quality, "measure", interrupted)
    words = ["frontier", str(unconditional_run), *SWEEP, "--guidance", "1", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 130
    assert len(figures(tmp_path)) == 2
    main(words)
    assert len(calls) == 4
    assert len(figures(tmp_path)) == 3


def test_not_finite(unconditional_run, tmp_path, capsys, monkeypatch, in_suite_data):
    """Such images are named by their plan, and their row is not written."""
    sample = Pipeline._sample_batch

    def broken(*arguments):
        x, seconds = sample(*arguments)
        return x * float("nan"), seconds

    monkeypatch.setattr(Pipeline, "_sample_batch", broken)
    words = ["frontier", str(unconditional_run), *SWEEP[4:], "--sampler", "ddim:1"]
    with pytest.raises(SystemExit) as end:
        main([*words, "--out", str(tmp_path)])
    names = ("ddim(eta=0, trailing)", "1")
    check_told(end.value.code, capsys.readouterr().err, names, after_progress=True)
    assert not (tmp_path / "frontier.json").exists()


BAD = {
    "{tmp}/nowhere": "{tmp}/nowhere",
    "": "model",
    "{run} --sampler dim": ("sampler", "dim", "ddim"),
    "{run} --sampler ddim:x": "ddim:x",
    "{run} --sampler ddim(eta)": "ddim(eta)",
    "{run} --sampler ddim(eta=x)": ("ddim(eta=x)", "eta", "x"),
    "{run} --sampler ddim(speed=1)": ("ddim", "speed"),
    "{run} --sampler heun(eta=1)": ("eta", "heun"),
    "{run} --sampler ddim(spacing=wide)": ("spacing", "wide"),
    "{run} --sampler ddim:1001": ("steps", "1001", "1000"),
    "{run} --steps 2,x": ("steps", "2,x"),
    "{run} --steps 0": ("steps", "0", "1000"),
    "{run} --guidance high": ("guidance", "high"),
    "{run} --guidance=-1": ("guidance", "-1"),
    "{run} --seed 1.5": ("seed", "1.5"),
    "{run} --num 1": ("num", "1"),
    "{run} --num 30 --batch 8": ("num", "30", "batch", "8", "5"),
    "{run} --num 100 --batch 3": ("batch", "3", "8"),
    "{run} {run}": ("models", "name"),
    "{run} --weights 0.5": ("weights", "0.5", "0.1"),
    "{run} --features inception --inception {tmp}/none.safetensors": "{tmp}/none.safetensors",
    "{run} --out {tmp}/file": "{tmp}/file",
    "{run} --out {tmp}/rows --features pixels": "{tmp}/rows/frontier.json",
}


@pytest.mark.parametrize("command", BAD)
def test_mistakes(command, unconditional_run, tmp_path, capsys, in_suite_data):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "frontier.json").write_text('[{"steps": 3}]')
    places = {"run": unconditional_run, "tmp": tmp_path}
    check_mistake(main, f"frontier {command}", BAD[command], capsys, **places)
