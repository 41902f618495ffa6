"""Edits of real digits by a trained run, as functions and as commands."""

import re

import numpy as np
import pytest
from helpers import check_mistake, naming
from PIL import Image

from diffjax import sampler, schedule
from diffjax.cli import edit
from diffjax.data import dataset, image_io
from diffjax.data.batches import first_images
from diffjax.devices import parallel
from diffjax.evaluation.digits import score_digits
from diffjax.inference import editing
from diffjax.inference.pipeline import Guidance, Pipeline, load_model

RIGHT = np.arange(8)[None, :, None] * np.ones((8, 1, 1)) < 4  # the left half is known


@pytest.fixture(scope="module")
def run(digits_run):
    return load_model(digits_run)


@pytest.fixture(scope="module")
def editor(run):
    return editing.Editor(run)


@pytest.fixture(scope="module")
def digits(digits_run, data_dir):
    """Sixteen held-out digits and their labels."""
    return first_images(dataset.load_tfds("digits", str(data_dir)).held_out, 16)


def test_reconstruction_improves_with_the_steps(editor, digits):
    """As in table 2 of DDIM; a fourfold number of steps divides the squared error by more than four."""
    images, labels = digits
    errors = [np.mean((editor.reconstruct(images, labels, n) - images) ** 2) / 4 for n in (10, 40)]
    assert errors[1] < errors[0] / 4
    assert errors[1] < 5e-3


def test_encoded_digits_are_noise(editor, digits):
    images, labels = digits
    noise = editor.encode(images, labels, 50)
    assert 0.6 < noise.std() < 1.1
    assert abs(noise.mean()) < 0.2
    assert abs(np.corrcoef(noise.ravel(), images.ravel())[0, 1]) < 0.4


def test_interpolation_begins_and_ends_at_the_images(editor, digits):
    images, _ = digits
    first, second = images[:2], images[2:4]
    found = editor.interpolate(first, second, None, 20, [0, 0.5, 1])
    assert found.shape == (3, 2, 8, 8, 1)
    for end, expected in ((found[0], first), (found[2], second)):
        np.testing.assert_allclose(end, editor.reconstruct(expected, None, 20), atol=1e-3)
        assert np.mean((end - expected) ** 2) < 0.05
    assert np.mean((found[1] - first) ** 2) > 0.05
    assert np.mean((found[1] - second) ** 2) > 0.05


def test_variations_keep_less_from_higher_levels(editor, digits):
    images, labels = digits
    levels = (1, 50, 300, 1000)
    lost = [np.mean((editor.vary(images, labels, level, min(5, level), seed=0) - images) ** 2) for level in levels]
    assert (np.diff(lost) > 0).all()
    assert lost[0] < 1e-3


def test_variations_are_led_to_other_labels(editor, digits):
    images, _ = digits
    labels = np.full(16, 6, np.int32)
    found = editor.vary(images, labels, 800, 20, guidance=Guidance(3.0), seed=0)
    assert score_digits(image_io.to_uint8(found), labels).recognised > 0.6
    again = editor.vary(images, labels, 800, 20, guidance=Guidance(3.0), seed=1)
    assert (found != again).any()


@pytest.mark.parametrize(("eta", "times", "scale"), [(0.0, 1, 1.0), (1.0, 3, 2.0)])
def test_inpainting_keeps_known_pixels_to_the_last_bit(editor, digits, eta, times, scale):
    images, labels = digits
    found = editor.inpaint(images, RIGHT, labels, 20, eta=eta, times=times, guidance=Guidance(scale), seed=0)
    known = np.broadcast_to(RIGHT, images.shape)
    assert (found[known] == images[known]).all()
    assert (found[~known] != images[~known]).mean() > 0.5  # black stays black
    assert score_digits(image_io.to_uint8(found), labels).recognised >= 0.5  # one in ten by chance


def test_an_edit_of_an_image_does_not_depend_on_its_batch(editor, digits):
    images, labels = digits
    whole = editor.inpaint(images, RIGHT, labels, 10, seed=3)
    few = editor.inpaint(images[:3], RIGHT, labels[:3], 10, seed=3)
    np.testing.assert_allclose(few, whole[:3], atol=1e-3)


def test_starts_are_taken_batch_by_batch(run):
    """Eleven images, eight at a time: a plan of one row at level 1 leaves nearly what it is given."""
    generate = Pipeline(run.network, run.prediction, *run.description[1:])
    x = np.linspace(-0.5, 0.5, 11)[:, None, None, None] * np.ones((1, 8, 8, 1))
    plan = sampler.ddim(run.schedule, [1])
    common = {"guidance": Guidance(), "seed": 0, "clip": False}
    made = generate(run.params, plan, np.zeros(11, int), 11, batch=8, x=x, **common)
    assert made.x.shape == (11, 8, 8, 1)
    assert np.abs(made.x - x).max() < 0.1
    seen = []
    known = x, np.ones_like(x, np.float32)
    found = generate(
        run.params, sampler.ddim(run.schedule, [900, 500, 20]), np.zeros(11, int), 11, batch=8, known=known, **common,
        watch=lambda first, done, x0: seen.append((first, done, x0.shape)), every=2,
    )  # fmt: skip
    np.testing.assert_array_equal(found.x, np.float32(x))
    assert seen == [(first, done, (8, 8, 8, 1)) for first in (0, 8) for done in (1, 2, 3)]


def test_progress_is_told_of_every_batch(editor, digits, monkeypatch):
    monkeypatch.setattr(parallel, "LARGEST_BATCH", 8)
    images, labels = digits
    told = []
    editor.encode(images[:11], labels[:11], 2, told.append)
    assert sum(told) == 2 * editor.batches(11) == 4


def test_images_of_another_size_are_named(editor):
    with pytest.raises(ValueError, match=naming("images", (2, 9, 8, 1), 8)):
        editor.encode(np.zeros((2, 9, 8, 1)), None, 2)


def test_levels_start_where_they_are_asked_to():
    levels = schedule.linear(1000)
    assert editing.trailing_from(levels, 300, 3).tolist() == [300, 200, 100]
    with pytest.raises(ValueError, match=naming("level", 1001, 1000)):
        editing.trailing_from(levels, 1001, 3)


@pytest.mark.parametrize(
    ("mask", "names"),
    [
        (np.ones((8, 8)), ["white"]),  # where there is to be some of what is made anew
        (np.zeros((8, 8)), ["black"]),
        (np.full((8, 8), 2), [2]),
        (np.full((8, 8), np.nan), ["nan"]),
        (np.ones((7, 8)), [(7, 8, 1), (3, 8, 8, 1)]),
    ],
)
def test_a_mask_that_cannot_be_is_named(mask, names):
    with pytest.raises(ValueError, match=naming("mask", *names)):
        editing.check_mask(mask, (3, 8, 8, 1))


# ------------------------------------------------------------------------------------------- commands


@pytest.mark.usefixtures("in_suite_data")
@pytest.mark.parametrize(
    ("command", "said", "size"),
    [
        ("reconstruct {run} --steps 5,20 --num 3", ["| 5 |", "| 20 |", "| 0.0065 |", "3", "8x8x1"], 3),
        ("interpolate {run} --num 4 --steps 10 --between 2", ["2", "4", "10"], 2),
        ("vary {run} --num 3 --levels 100,900 --steps 10 --labels 4,5 --guidance 2", ["[1, 9]"], 3),
        (
            "inpaint {run} --images {photo} {photo} --mask {mask} --steps 5 --resample 2",
            ["640x480", "RGB", "8x8", "0", "96"],
            3,
        ),
    ],
)
def test_a_command_leaves_its_picture_and_says_what_it_did(digits_run, tmp_path, capsys, command, said, size):
    photo, mask = tmp_path / "photo.jpg", tmp_path / "mask.png"
    Image.effect_noise((640, 480), 90).convert("RGB").save(photo)
    Image.fromarray(np.where(np.arange(16)[:, None] < 12, 0, np.full((16, 16), 255)).astype(np.uint8)).save(mask)
    out = tmp_path / "new" / "picture.png"
    places = {"run": digits_run, "photo": photo, "mask": mask}
    edit.main([word.format(**places) for word in command.split()] + ["--out", str(out)])
    told = capsys.readouterr().out
    assert [word for word in (*said, out) if not re.search(naming(word), told)] == [], told
    height = np.asarray(Image.open(out)).shape[0]
    assert height == size * 52 + 4


@pytest.mark.parametrize(("name", "made"), [("left", 20), ("right", 20), ("top", 20), ("bottom", 20), ("center", 12)])
def test_masks_have_names(name, made):
    mask = edit.read_mask(name, (8, 5, 3))
    assert (mask.shape, mask.dtype) == ((8, 5, 1), np.float32)
    assert abs((mask == 0).sum() - made) <= 4  # an odd middle
    assert {"left": mask[0, 0], "right": mask[0, 4], "top": mask[0, 0], "bottom": mask[7, 0], "center": mask[4, 2]}[
        name
    ] == 0


def test_the_commands_are_listed(capsys):
    edit.main(["--help"])
    said = capsys.readouterr().out
    assert all(command in said for command in ("reconstruct", "interpolate", "vary", "inpaint"))


BAD = {
    "inpant {run}": ("inpant", "inpaint"),
    "inpaint {tmp}/nowhere": "{tmp}/nowhere",
    "inpaint {run} --mask lefft": ("mask", "lefft", "left", "center"),
    "inpaint {run} --mask {tmp}/file": "{tmp}/file",
    "inpaint {run} --mask {tmp}/white.png": ("mask", "black"),
    "inpaint {run} --mask {tmp}/black.png": ("mask", "white"),
    "inpaint {run} --resample 0": ("resample", "0"),
    "inpaint {run} --eta 2": ("eta", "2"),
    "inpaint {run} --steps 0": ("steps", "0", "1000"),
    "inpaint {run} --guidance 2": ("guidance", "2", "labels"),
    "inpaint {run} --guidance nan --labels 3": ("guidance", "nan"),
    "inpaint {run} --labels 10": ("labels", "10", "9"),
    "inpaint {run} --images {tmp}/none.png": "{tmp}/none.png",
    "inpaint {run} --images {tmp}/file": "{tmp}/file",
    "inpaint {run} --images {tmp}": "{tmp}",
    "inpaint {run} --out {tmp}/a.jpg": ("{tmp}/a.jpg", ".png"),
    "inpaint {run} --seed=-1": ("seed", "-1"),
    "vary {run} --levels 0": ("level", "0", "1000"),
    "vary {run} --levels 1001": ("level", "1001", "1000"),
    "vary {run} --levels high": ("levels", "high"),
    "vary {run} --num 0": ("0", "297"),
    "reconstruct {run} --steps 10,1001": ("steps", "1001", "1000"),
    "reconstruct {run} --steps ten": ("steps", "ten"),
    "reconstruct {run} --num 1000": ("1000", "297"),
    "reconstruct {run} --stepps 10": ("stepps", "steps"),
    "interpolate {run} --num 2 --labels 3,8": ("labels", "3,8"),
    "inpaint {run} --mask {tmp}/clear.png": "{tmp}/clear.png",
    "interpolate {run} --num 3": ("images", "3"),
    "interpolate {run} --between 0": ("between", "0"),
}


@pytest.mark.usefixtures("in_suite_data")
@pytest.mark.parametrize("command", BAD)
def test_a_mistake_in_editing_is_named_in_one_line(command, digits_run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for name in ("white", "black"):
        Image.new("L", (8, 8), name).save(tmp_path / f"{name}.png")
    Image.new("RGBA", (8, 8), (255, 255, 255, 90)).save(tmp_path / "clear.png")
    check_mistake(edit.main, command, BAD[command], capsys, run=digits_run, tmp=tmp_path)
    assert not (digits_run / "edits").exists()
