"""Classes of a folder are called by the names of its sub-folders."""

import numpy as np
from helpers import check_mistake
from PIL import Image

from diffjax.cli import main

from .conftest import CLASSES, COLOURS


def test_conditions_are_names(painter_run, tmp_path):
    """The network paints the class that is asked for; numbers do so too."""
    for label, (name, colour) in enumerate(zip(CLASSES, COLOURS, strict=True)):
        for text in (name, str(label)):
            files = ["--out", tmp_path / "a.png", "--save", tmp_path / "a.npz"]
            options = ["--condition", text, "--num", 8, "--steps", 2, *files]
            main([*map(str, ["sample", painter_run, *options])])
            samples = np.load(tmp_path / "a.npz")
            assert samples["labels"].tolist() == [label] * 8
            assert np.abs(samples["images"].mean((0, 1, 2)) - colour).max() < 40


def test_unknown_names(painter_run, capsys):
    names = ("condition", "cat", *CLASSES, 0, 1)
    check_mistake(main, f"sample {painter_run} --condition cat", map(str, names), capsys)


def test_likelihood_of_other_classes(painter_run, tmp_path, capsys):
    """A label would mean another class."""
    for name in (CLASSES[0], "wolf"):
        (tmp_path / name).mkdir()
        for i in range(20):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / name / f"{i}.png")
    command = f"likelihood {painter_run} --num 2 --evaluations 10 --data.path {tmp_path}"
    check_mistake(main, command, ("wolf", CLASSES[1]), capsys)
