"""`diffjax demo`, and what it leaves: the gate sets DEMO_RUN to the folder of its own demo."""

import json
import os
from pathlib import Path

import pytest
from helpers import check_mistake
from PIL import Image

from diffjax.cli import main

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
    rows = [line.split("|") for line in text.splitlines() if line.startswith(("| 10 |", "| 50 |"))]
    ten, fifty = (float(cells[2]) for cells in rows)
    assert fifty < ten / 4 < 0.02
    assert "0 of 320 known pixels" in text


def test_metrics(demo_run):
    lines = [json.loads(line) for line in (demo_run / "metrics.jsonl").read_text().splitlines()]
    assert any("held_out_loss" in line for line in lines)
