"""`diffjax demo`, and what it leaves: the gate sets DEMO_RUN to the folder of its own demo."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import check_mistake, naming
from PIL import Image

from diffjax import sampler, schedule
from diffjax.cli import demo as demo_program
from diffjax.cli import main
from diffjax.data import image_io
from diffjax.data.codec import PIXELS
from diffjax.evaluation.digits import DigitScores
from diffjax.evaluation.results import SamplingRow
from diffjax.inference.pipeline import Samples

BAD = {
    "{tmp}/nowhere": "{tmp}/nowhere",
    "{unconditional}": ("unet of unconditional", "digits"),
    "{run} --num 3": ("num", "3"),
    "{run} --seed=-1": ("seed", "-1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", BAD)
def test_mistakes(command, places, capsys):
    check_mistake(main, f"demo {command}", BAD[command], capsys, **places)


def result(number, labels, seconds):
    """The result of a job whose images have a brightness of its own, and of their labels."""
    levels = schedule.linear(100)
    plan = sampler.ddim(levels, schedule.trailing(levels, 2 + number))
    context = dict.fromkeys(("network", "image_size", "dtype", "weights", "device"), "x")
    row = SamplingRow(
        **context, versions="x", clipping="clipped", guided="1", parameters=1, guidance=1.0,
        sampler=f"ddim{number}(eta=0)", steps=plan.steps, images=len(labels), batch=1, seed=0,
        nfe=plan.steps, compile_seconds=100.0, run_seconds=seconds,
    )  # fmt: skip
    job = demo_program.Job(row.sampler, plan, 1.0, 1)
    x = (20 * labels + number)[:, None, None, None] * np.ones((8, 8, 1)) / 127.5 - 1
    samples = Samples(x.astype(np.float32), labels, plan.steps, 0.0, (seconds,), PIXELS)
    scores = DigitScores(0.1 * number, 0.99, 1.0, 1.0)
    return demo_program.Result(job, row, scores, samples)


def test_what_it_writes(tmp_path):
    """Each picture, title, caption and score stands with its job, and DDIM is so much faster."""
    labels = np.arange(30) % 10
    results = [result(number, labels, seconds) for number, seconds in enumerate((50.0, 4.0, 2.0))]
    for each in results:
        demo_program.write_grid(tmp_path, each)
    report = demo_program.write(tmp_path, results)
    captions = [str(label) for label in range(10)]
    for number, each in enumerate(results):
        expected = image_io.grid(each.samples.images, 3 * captions, columns=10)
        picture = np.asarray(Image.open(tmp_path / each.job.file))
        np.testing.assert_array_equal(picture, np.asarray(expected))
        row = image_io.grid(each.samples.images[:10], captions, columns=10)
        height, width = np.asarray(row).shape[0] - 8, np.asarray(row).shape[1] - 4
        overview = np.asarray(Image.open(tmp_path / "overview.png"))
        shown = overview[4 + number * (height + 4) :][:height, -width:]
        np.testing.assert_array_equal(shown, np.asarray(row)[4:-4, 4:])
        title = np.asarray(image_io.grid(each.samples.images[:1], ["0"], titles=[each.job.title]))
        beside = overview[4 + number * (height + 4) :][:height, : title.shape[1] - 52]
        np.testing.assert_array_equal(beside, title[4:-4, : title.shape[1] - 52])
        assert re.search(rf"{re.escape(each.job.title)}: {10 * number}\.0%", report)
    found = json.loads((tmp_path / "demo.json").read_text())
    assert found["speedup"] == 12.5
    assert re.search(naming(12.5, "DDIM 3", "DDPM 2"), report)
    assert [row["images_per_second"] for row in found["rows"]] == [0.6, 7.5, 15.0]
    assert [scores["class_accuracy"] for scores in found["scores"]] == [0.0, 0.1, 0.2]
    assert (tmp_path / "demo.md").read_text().strip() == report


@pytest.fixture(scope="module")
def demo_run():
    """The folder of a demo that ran before, with the output of edits in edit.txt."""
    if "DEMO_RUN" not in os.environ:
        pytest.skip("DEMO_RUN is not set: make demo-check")
    return Path(os.environ["DEMO_RUN"])


@pytest.fixture(scope="module")
def demo(demo_run):
    return json.loads((demo_run / "demo.json").read_text())


def test_rows(demo):
    """DDPM over all levels, and DDIM at four scales: two evaluations for each guided step."""
    names = ("steps", "nfe", "guidance")
    rows = [(row["sampler"].split("(")[0], *(row[n] for n in names)) for row in demo["rows"]]
    ddim = [("ddim", 50, 50 if scale == 1 else 100, scale) for scale in (1.0, 2.0, 3.0, 4.0)]
    assert rows == [("ddpm", 1000, 1000, 1.0), *ddim]


def test_pictures(demo, demo_run):
    for row in demo["rows"]:
        sampler = row["sampler"].split("(")[0]
        path = demo_run / f"{sampler}-{row['steps']}-guidance-{row['guidance']:g}.png"
        assert Image.open(path).size[0] > 400
    for name in ("overview", "reconstruct", "inpaint"):
        assert Image.open(demo_run / f"{name}.png").size[0] > 400


def test_scores(demo):
    guided = demo["scores"][2]
    assert guided["class_accuracy"] >= 0.85
    assert guided["distinct"] >= 0.98


def test_speedup(demo):
    """A ratio of two times of one run, above 18 on a quiet machine.

    Far below it, something compiled in between.
    """
    assert demo["speedup"] > 10


def test_edits(demo_run):
    """Reconstruction improves with the steps, and inpainting keeps the known pixels."""
    text = (demo_run / "edit.txt").read_text()
    rows = [line.split("|") for line in text.splitlines() if line.startswith(("| 10 ", "| 50 "))]
    ten, fifty = (float(cells[2]) for cells in rows)
    assert fifty < ten / 4 < 0.02
    assert "0 of 320 known pixels" in text


def test_metrics(demo_run):
    lines = [json.loads(line) for line in (demo_run / "metrics.jsonl").read_text().splitlines()]
    assert any("held_out_loss" in line for line in lines)
