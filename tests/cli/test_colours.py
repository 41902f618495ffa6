"""Programs on a network that paints each class in one colour: what belongs together stays so."""

import csv
import json
import re
import stat

import numpy as np
import pytest
from helpers import check_mistake
from PIL import Image, ImageSequence

from diffjax.cli import main, sample
from diffjax.data import image_io
from diffjax.data.image_io import to_uint8
from diffjax.evaluation.results import QualityRow
from tests.colours import (
    CLASSES,
    NAMES,
    NONE,
    T,
    class_of,
    palette,
    read_grid,
    write_data,
    write_run,
)

LABELS = np.arange(120) % CLASSES
HALF, TURNED = (0, 1, 2, 0, 1, 2), (1, 2, 3, 4, 5, 0)
FEW = ["--features", "pixels", "--num", "48", "--batch", "8"]
ONE = ["--sampler", "ddim", "--steps", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of images of all colours."""
    return write_data(tmp_path_factory.mktemp("data") / "colours.npz", LABELS)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run whose folder has marks of HTML, SVG, Markdown and mathematics in its name."""
    return write_run(tmp_path_factory.mktemp("runs") / 'a<&"|$x$', data)


def rows_of(path):
    return [QualityRow(**json.loads(line)) for line in path.read_text().splitlines()]


def in_turn(num, order=range(CLASSES)):
    """The colour and the caption of each class in turn."""
    return [(order[i % CLASSES], NAMES[i % CLASSES]) for i in range(num)]


# ------------------------------------------------------------------------------- sample


def test_grid_and_arrays(run, tmp_path):
    """In the order of the conditions, in several batches of which the last is padded."""
    files = ["--out", str(tmp_path / "a.png"), "--save", str(tmp_path / "a.npz")]
    chosen = [4, 0, 3]
    condition = ["--condition", ",".join(NAMES[label] for label in chosen)]
    main(["sample", str(run), *ONE, "--num", "19", "--batch", "8", *condition, *files])
    expected = [chosen[i % 3] for i in range(19)]
    with Image.open(tmp_path / "a.png") as picture:
        assert read_grid(picture, 19) == [(label, NAMES[label]) for label in expected]
    saved = np.load(tmp_path / "a.npz")
    assert saved["labels"].tolist() == expected
    assert [class_of(image[4, 4]) for image in saved["images"]] == expected


def test_animation_and_preview(data, tmp_path, monkeypatch):
    """Frames are those of the rows in order, and previews show which images are done."""
    run = write_run(tmp_path / "run", data, fade=True)
    pictures, save_png = [], image_io.save_png

    def spy(path, picture):
        pictures.append(picture)
        save_png(path, picture)

    monkeypatch.setattr(image_io, "save_png", spy)
    monkeypatch.setattr(sample, "REFRESH_SECONDS", 0.0)
    files = ["--out", str(tmp_path / "a.png"), "--animate", str(tmp_path / "a.gif"), "--preview"]
    steps, num = 4, 11
    main(["sample", str(run), "--steps", str(steps), "--num", str(num), "--batch", "8", *files])
    # The network is told t - 1, and its colours fade with it.
    strengths = [1 - (T * (steps - i) / steps - 1) / T for i in range(steps)]
    with Image.open(tmp_path / "a.gif") as animation:
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(animation)]
    assert len(frames) == steps
    for picture, strength in zip(frames, strengths, strict=True):
        bright = int(to_uint8(np.float32(strength)))
        assert abs(max(picture.getpixel((28, 40))) - bright) <= 3  # the colours of a GIF are few
        if strength > 0.2:
            assert read_grid(picture, 8, columns=3) == in_turn(8)
    assert len(pictures) == 2 * steps + 1
    for done, picture in enumerate(pictures, 1):
        shown = read_grid(picture, num)
        whole = num if done > steps else 8
        assert [text for _, text in shown] == [text for _, text in in_turn(num)]
        assert {colour for colour, _ in shown[whole:]} <= {NONE}
        if done % steps > 1:  # bright enough
            assert shown[:8] == in_turn(8)
    assert read_grid(pictures[-1], num) == in_turn(num)


# ------------------------------------------------------------------------------- evaluate


def test_precision_and_recall(data, tmp_path, in_suite_data):
    """Three of six real colours are all precise, and recall half of what is real; or reversed."""
    half = write_data(tmp_path / "half.npz", LABELS, HALF)
    runs = {
        "subset": (write_run(tmp_path / "subset", data, palette(HALF)), data, 1.0, 0.5),
        "superset": (write_run(tmp_path / "superset", half), half, 0.5, 1.0),
    }
    for folder, _, precision, recall in runs.values():
        main(["evaluate", str(folder), *FEW, *ONE])
        (row,) = rows_of(folder / "evaluations.jsonl")
        assert row.precision == precision
        assert row.recall == pytest.approx(recall, abs=0.1)
        assert row.fd > 1
        assert (row.steps, row.nfe, row.images, row.batches) == (1, 1, 48, 6)


def test_images_have_moved(data, run, tmp_path, in_suite_data):
    """--data.path names them; a row tells other images of the same name from them."""
    moved = tmp_path / "elsewhere" / data.name
    moved.parent.mkdir()
    moved.write_bytes(data.read_bytes())
    others = write_data(tmp_path / "others" / data.name, LABELS, HALF)
    out = tmp_path / "rows.jsonl"
    for path in (moved, others):
        main(["evaluate", str(run), *FEW, *ONE, "--out", str(out), "--data.path", str(path)])
    there, different = rows_of(out)
    assert there.fd < 0.5 < different.fd
    assert there.reference != different.reference


def test_read_only_run(data, tmp_path, in_suite_data):
    """It is evaluated where a folder for the rows is named, and nothing in it changes."""
    run = write_run(tmp_path / "run", data)
    files = sorted(tmp_path.rglob("*"))
    for path in [run, *run.rglob("*")]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    out = tmp_path / "results"
    main(["evaluate", str(run), *FEW, *ONE, "--out", str(out)])
    assert len(rows_of(out / "evaluations.jsonl")) == 1
    assert set(tmp_path.rglob("*")) - set(files) == {out, out / "evaluations.jsonl"}


BAD = {
    "evaluate {other} --features pixels": ("green", "lime&"),
    "frontier {other} --features pixels": ("green", "lime&"),
    "evaluate {run} --out {tmp}/rows.json": ("{tmp}/rows.json", ".jsonl"),
    "evaluate {run} --data.path {tmp}/none.npz": "{tmp}/none.npz",
    "evaluate {run} --features cnn": ("features", "cnn", "one.npz", "pixels"),
    "frontier {run} --features cnn": ("features", "cnn", "one.npz", "pixels"),
}


@pytest.mark.parametrize("command", BAD)
def test_mistakes(command, tmp_path, capsys, in_suite_data):
    """Among them the features cnn of one class, and a class that has another name now."""
    one = write_data(tmp_path / "one.npz", np.zeros(40, int))
    run = write_run(tmp_path / "one", one, names=NAMES[:1])
    names = [name.replace("lime&", "green") for name in NAMES]
    renamed = write_data(tmp_path / "renamed.npz", LABELS, names=names)
    places = {"run": run, "other": write_run(tmp_path / "other", renamed), "tmp": tmp_path}
    check_mistake(main, command, BAD[command], capsys, **places)


# ------------------------------------------------------------------------------- frontier


def cells_of(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_report(data, run, tmp_path, in_suite_data):
    """Two runs in a report: the figures, pictures and captions of each row are its own."""
    turned = write_run(tmp_path / 'b<&"|$x$', data, palette(TURNED))
    out = tmp_path / "report"
    words = ["frontier", *FEW, *ONE, "--guidance", "1", "--out", str(out)]
    main([*words, str(run), str(turned)])
    rows = [QualityRow(**row) for row in json.loads((out / "frontier.json").read_text())]
    networks = [f"colours of {folder.name}" for folder in (run, turned)]
    assert [row.network for row in rows] == networks
    heads, *lines = csv.reader((out / "frontier.csv").open(newline=""))
    assert [dict(zip(heads, line, strict=True))["network"] for line in lines] == networks
    table = (out / "frontier.md").read_text().split("\n\n")[0].splitlines()
    assert len({len(cells_of(line)) for line in table}) == 1
    shown = [dict(zip(cells_of(table[0]), cells_of(line), strict=True)) for line in table[2:]]
    assert [re.sub(r"\\(.)", r"\1", cells["network"]) for cells in shown] == networks
    pictures = sorted((out / "images").iterdir(), key=lambda path: "of_b" in path.name)
    for path, order in zip(pictures, (range(CLASSES), TURNED), strict=True):
        with Image.open(path) as picture:
            assert read_grid(picture, 20, columns=10) == in_turn(20, order)
