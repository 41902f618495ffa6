"""`diffjax sample` of real digits."""

import json
import re
import shutil

import numpy as np
import pytest
from helpers import check_mistake, check_told
from PIL import Image

from diffjax import sampler, schedule
from diffjax.cli import main, sample
from diffjax.data import image_io
from diffjax.data.codec import PIXELS
from diffjax.evaluation.digits import score_digits
from tests.cli.conftest import CLASSES, COLOURS


def cells_of(out):
    """The fields of the row that was printed, one in a line, by their heads."""
    lines = [re.split(r"\s{2,}", line, maxsplit=1) for line in out.splitlines()]
    return dict(line for line in lines if len(line) == 2)


def plan_of(out):
    """The sampler of the row that was printed, its steps and its evaluations."""
    cells = cells_of(out)
    return [cells["sampler"], cells["steps"], cells["NFE"]]


def sample_to(folder, name, run, *options):
    """Sample in this process, on its eight devices; the arrays that were saved."""
    files = ["--out", folder / f"{name}.png", "--save", folder / f"{name}.npz"]
    main(["sample", str(run), *map(str, [*options, *files])])
    return np.load(folder / f"{name}.npz")


@pytest.mark.slow
def test_guided_ddim(digits_run, run_program, tmp_path):
    """As a user runs it: 100 digits, most of them recognised, after a fifth of the training."""
    code, out, err = run_program(
        "sample.py", digits_run, "--sampler", "ddim(eta=0):50", "--guidance", 2.0, "--num", 100,
        "--seed", 0, "--out", tmp_path / "grid.png", "--save", tmp_path / "samples.npz",
    )  # fmt: skip
    assert code == 0, err
    cells = cells_of(out)
    assert plan_of(out) == ["ddim(eta=0, trailing)", "50", "100"]
    assert [cells[name] for name in ("clipping", "dtype", "seed")] == ["clipped", "float32", "0"]
    assert [word for word in ("426,961", "1 x cpu", "compile s") if word not in out] == []
    lines = [line for line in out.splitlines() if str(tmp_path) not in line]
    assert max(map(len, lines)) <= 120
    samples = np.load(tmp_path / "samples.npz")
    assert (samples["images"].shape, samples["images"].dtype) == ((100, 8, 8, 1), np.uint8)
    assert (samples["labels"] == np.arange(100) % 10).all()
    scores = score_digits(samples["images"], samples["labels"])
    assert scores.class_accuracy >= 0.85  # after the whole training: 0.97
    assert scores.distinct >= 0.99
    assert scores.nearest_neighbour_ratio > 0.4


@pytest.mark.slow
def test_ddpm(digits_run, tmp_path, capsys):
    """All T steps by default, of the conditions that were asked for."""
    samples = sample_to(
        tmp_path, "a", digits_run, "--sampler", "ddpm", "--num", 10, "--condition", "0,6"
    )
    assert plan_of(capsys.readouterr().out) == ["ddpm(fixed_small, trailing)", "1000", "1000"]
    assert samples["labels"].tolist() == [0, 6] * 5
    # By chance one in ten; unguided, few images.
    assert score_digits(samples["images"], samples["labels"]).class_accuracy >= 0.5


@pytest.mark.slow
def test_plans(digits_run, tmp_path, capsys):
    """Samplers by name, a stored plan, and explicit levels."""
    plan = tmp_path / "plan.json"
    first = "dpm_solver_pp_2m(eta=0.5, spacing=uniform_logsnr):10"
    cases = {
        "a": ["--sampler", first, "--save-plan", plan],
        "b": ["--plan", plan],
        "c": ["--sampler", "heun", "--levels", "1000,600.5,100"],
    }
    common = ["--num", 8, "--guidance", 2]
    images, rows = {}, {}
    for name, options in cases.items():
        samples = sample_to(tmp_path, name, digits_run, *options, *common)
        images[name] = samples["images"]
        rows[name] = plan_of(capsys.readouterr().out)
    assert (images["a"] == images["b"]).all()
    assert (images["a"] != images["c"]).any()
    assert rows == {
        "a": ["dpm_solver_pp_2m(eta=0.5, uniform_logsnr)", "10", "20"],
        "b": ["plan(plan.json)", "10", "20"],
        "c": ["heun(explicit, 3 levels)", "5", "10"],
    }
    assert score_digits(images["a"], samples["labels"]).class_accuracy >= 0.6


@pytest.mark.slow
def test_guidance(digits_run, tmp_path, capsys):
    """DDIM in 10 steps: two evaluations for each guided one."""
    cases = {
        "2": ("", 20),
        "2 in two passes": ("--two-passes", 20),
        "2 in 0.3..5": ("--guidance-interval 0.3 5", 15),
        "2 rescaled 0.7 away from 5": ("--guidance-rescale 0.7 --negative 5", 20),
    }
    common = ["--steps", 10, "--num", 24, "--condition", "0,1,6", "--guidance", 2]
    images = {}
    for i, (guided, (options, nfe)) in enumerate(cases.items()):
        samples = sample_to(tmp_path, i, digits_run, *common, *options.split())
        cells = cells_of(capsys.readouterr().out)
        assert [cells[name] for name in ("steps", "NFE", "guidance")] == ["10", str(nfe), guided]
        images[guided] = samples["images"].astype(int)
        scores = score_digits(images[guided], np.resize([0, 1, 6], 24))
        assert scores.class_accuracy >= 0.6
    assert np.abs(images["2"] - images["2 in two passes"]).max() <= 1  # rounding to 8 bits
    others = [name for name in cases if "passes" not in name and name != "2"]
    assert all((images["2"] != images[other]).any() for other in others)


@pytest.mark.slow
def test_autoguidance(digits_run, tmp_path, capsys):
    """By an earlier checkpoint, in an interval: two networks where it is on, counted."""
    options = ["--steps", 10, "--num", 24, "--condition", "0,1,6", "--guidance", 2]
    options += ["--guidance-interval", 0.3, 5, "--autoguide-with", digits_run]
    samples = sample_to(tmp_path, "a", digits_run, *options, "--autoguide-checkpoint", 200)
    cells = cells_of(capsys.readouterr().out)
    away = "2 in 0.3..5 away from unet of digits (ema, step 200)"
    assert (cells["NFE"], cells["guidance"]) == ("15", away)
    # By chance one in ten; guided by no label.
    scores = score_digits(samples["images"], np.resize([0, 1, 6], 24))
    assert scores.class_accuracy >= 0.3


@pytest.mark.slow
def test_watching(digits_run, tmp_path, monkeypatch):
    """A preview is refreshed, and an animation of the first batch ends at the images."""
    pictures, save_png = [], image_io.save_png

    def spy(path, picture):
        pictures.append(np.asarray(picture))
        save_png(path, picture)

    monkeypatch.setattr(image_io, "save_png", spy)
    monkeypatch.setattr(sample, "REFRESH_SECONDS", 0.0)
    options = ["--steps", 20, "--num", 11, "--batch", 8, "--preview"]
    animation = tmp_path / "a.gif"
    samples = sample_to(tmp_path, "a", digits_run, *options, "--animate", animation)
    assert len(pictures) == 2 * 20 + 1
    assert (pictures[-1] == np.asarray(Image.open(tmp_path / "a.png"))).all()
    assert (pictures[0] != pictures[10]).any()
    assert (pictures[-2] == pictures[-1]).all()  # the last estimate is the image
    frames = Image.open(animation)
    assert frames.n_frames == 20
    frames.seek(19)
    captions = [str(i) for i in range(8)]
    expected = np.asarray(image_io.grid(samples["images"][:8], captions), int)
    assert np.abs(np.asarray(frames.convert("RGB"), int) - expected).max() <= 2


@pytest.mark.parametrize(("steps", "every"), [(20, 1), (60, 2), (120, 3), (450, 10), (1000, 20)])
def test_frames(steps, every):
    """They are few, and at equal distances."""
    watch = sample.SampleWatch(PIXELS, None, 1, steps)
    watch.keep_frames()
    levels = schedule.linear(1000)
    plan = sampler.ddim(levels, schedule.trailing(levels, steps))
    done, kept = 0, []
    boundaries = sampler.every_rows(plan, watch.every)
    for rows in sampler.segments(plan, np.float32, boundaries):
        done += rows.steps
        before = len(watch.frames)
        watch(0, done, np.zeros((1, 8, 8, 1)))
        kept += [done] * (len(watch.frames) - before)
    assert kept == [*range(every, steps, every), steps]
    assert len(kept) <= sample.FRAMES


@pytest.mark.slow
def test_devices_and_batches(digits_run, run_program, tmp_path):
    """Images are the same on eight devices and in other batches."""
    images = []
    for name, batch, flags in [
        ("a", 16, ""),
        ("b", 8, "--xla_force_host_platform_device_count=8"),
    ]:
        code, out, err = run_program(
            "sample", digits_run, "--sampler", "ddim(eta=1):10", "--num", 13, "--batch", batch,
            "--out", tmp_path / f"{name}.png", "--save", tmp_path / f"{name}.npz", flags=flags,
        )  # fmt: skip
        assert code == 0, err
        assert ("8 x cpu" in out) == bool(flags)
        images.append(np.load(tmp_path / f"{name}.npz")["images"].astype(int))
    assert images[0].shape == (13, 8, 8, 1)
    assert np.abs(images[0] - images[1]).max() <= 1  # rounding to 8 bits


def test_unconditional(unconditional_run, tmp_path, capsys):
    """Without labels they are -1; the row says that x0 was not clipped, or how."""
    options = ["--steps", 2, "--num", 5, "--weights", "raw"]
    samples = sample_to(tmp_path, "a", unconditional_run, *options, "--no-clip")
    assert (samples["labels"] == -1).all()
    assert samples["labels"].dtype.kind == "i"
    assert cells_of(capsys.readouterr().out)["clipping"] == "unclipped"
    sample_to(tmp_path, "b", unconditional_run, *options, "--threshold", 0.995)
    assert cells_of(capsys.readouterr().out)["clipping"] == "thresholded 0.995"


def test_plan_picture(unconditional_run, tmp_path):
    """A plan is written as a picture, or as JSON with every digit."""
    for name in ("plan.png", "plan.json"):
        options = ["--steps", 2, "--num", 1, "--batch", 8, "--save-plan", tmp_path / name]
        sample_to(tmp_path, "a", unconditional_run, *options)
    assert Image.open(tmp_path / "plan.png").size[0] > 400
    assert json.loads((tmp_path / "plan.json").read_text())["t"] == [1000, 500]


def test_single_images(painter_run, tmp_path, capsys):
    """A file for each image, with its label and its seed; those that exist are not replaced."""
    folder = tmp_path / "new" / "images"
    words = ["sample", str(painter_run), "--steps", "2", "--num", "4", "--condition", "1,0"]
    words += ["--seed", "3", "--out-dir", str(folder)]
    main(words)
    out, err = capsys.readouterr()
    assert err.index("compiling") < err.index("writing")
    assert re.search(r'network +painter of run<&", 1 parameters', out)
    names = [f"0000{i}-label-{CLASSES[1 - i % 2]}-seed-3.png" for i in range(4)]
    assert sorted(path.name for path in folder.iterdir()) == names
    for i, name in enumerate(names):
        image = np.asarray(Image.open(folder / name), float)
        assert image.shape == (8, 8, 3)
        assert np.abs(image - COLOURS[1 - i % 2]).max() <= 30
    assert not (painter_run / "samples").exists()
    assert str(folder) in out
    (folder / names[0]).unlink()
    with pytest.raises(SystemExit) as end:
        main(words)
    check_told(end.value.code, capsys.readouterr().err, (str(folder), "overwrite", "2"))
    assert not (folder / names[0]).exists()
    main([*words, "--overwrite"])
    assert (folder / names[0]).exists()


def test_single_images_without_labels(unconditional_run, tmp_path):
    """They are the images of the arrays, in their order."""
    options = ["--steps", 2, "--num", 3, "--out-dir", tmp_path / "images"]
    samples = sample_to(tmp_path, "a", unconditional_run, *options)
    for i, image in enumerate(samples["images"]):
        found = np.asarray(Image.open(tmp_path / "images" / f"0000{i}-seed-0.png"))
        assert (found == image[..., 0]).all()


def test_pictures_are_kept(painter_run, capsys):
    """A picture that no option names does not replace another one."""
    words = ["sample", str(painter_run), "--steps", "1", "--num", "2", "--condition"]
    main([*words, "0"])
    main([*words, "1"])
    folder = painter_run / "samples"
    names = ["ddim-1-guidance-1-seed-0.png", "ddim-1-guidance-1-seed-0-2.png"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    red, blue = (np.asarray(Image.open(folder / name)).astype(int) for name in names)
    assert (red[30, 30] - blue[30, 30])[0] > 200
    shutil.rmtree(folder)


BAD = {
    "{tmp}/nowhere": "{tmp}/nowhere",
    "{tmp}": "{tmp}",
    "{run} --checkpoint 7": ("{run}", "7", "200", "220"),
    "{run} --sampler ddmi": ("sampler", "ddmi"),
    "{run} --weights best": ("weights", "best", "0.999"),
    "{run} --stepps 5": ("stepps", "steps"),
    "{run} --steps 0": ("steps", "0", "1000"),
    "{run} --sampler ddim:1001": ("steps", "1001", "1000"),
    "{run} --sampler ddim(spacing=quadratic):900": ("quadratic", "900", "801"),
    "{run} --sampler ddim(eta=1.5)": ("eta", "1.5"),
    "{run} --sampler ddpm(eta=0.5)": ("eta", "ddim", "ddpm"),
    "{run} --sampler ddim(variance=fixed_large)": ("variance", "ddpm", "ddim"),
    "{run} --sampler ddpm(variance=big)": ("variance", "big"),
    "{run} --sampler heun(eta=0)": ("eta", "heun"),
    "{run} --sampler edm(s_churn=-1)": ("s_churn", "-1"),
    "{run} --levels 1000,ten": ("levels", "1000,ten"),
    "{run} --levels 5,10": ("levels", "5", "10"),
    "{run} --levels 1000,0": ("level", "0"),
    "{run} --levels 1000,0.5": ("level", "0.5"),
    "{run} --levels 1000,1 --steps 3": ("levels", "steps"),
    "{run} --levels 1000,1 --sampler ddim:3": ("levels", "steps", "3"),
    "{run} --plan {tmp}/no.json": "{tmp}/no.json",
    "{run} --plan {tmp}/file": ("{tmp}/file", "JSON"),
    "{run} --plan {tmp}/file --sampler ddim": ("plan", "sampler"),
    "{run} --plan {tmp}/file --steps 3": ("plan", "steps"),
    "{run} --save-plan {tmp}/plan.txt": ("{tmp}/plan.txt", ".json", ".png"),
    "{run} --condition 3,10": ("condition", "3,10", "9"),
    "{run} --condition two": ("condition", "two", "9"),
    "{run} --condition=-1": ("condition", "-1", "9"),
    "{run} --num 0": ("num", "0"),
    "{run} --seed=-1": ("seed", "-1"),
    "{run} --seed 9223372036854775808": ("seed", "9223372036854775808"),
    "{run} --guidance nan": ("guidance", "nan"),
    "{run} --guidance=-2": ("guidance", "-2"),
    "{run} --guidance-interval 0.3 5": ("guidance", "1", "0.3", "5"),
    "{run} --guidance 2 --guidance-interval 5 0.3": ("interval", "5", "0.3"),
    "{run} --guidance 2 --guidance-interval=-1 0.3": ("interval", "-1", "0.3"),
    "{run} --guidance 2 --guidance-rescale 1.5": ("rescale", "1.5"),
    "{run} --guidance 2 --negative 10": ("10", "9"),
    "{run} --threshold 0": ("threshold", "0"),
    "{unconditional} --guidance 1 --negative 2": ("unconditional", "guidance"),
    "{run} --autoguide-with {run}": ("guidance", "1", "digits"),
    "{run} --autoguide-checkpoint 5": ("autoguide_checkpoint", "autoguide_with"),
    "{run} --guidance 2 --autoguide-with {tmp}/nowhere": "{tmp}/nowhere",
    "{run} --guidance 2 --autoguide-with {run} --autoguide-checkpoint 7": (
        "{run}", "7", "200", "220",
    ),
    "{run} --guidance 2 --autoguide-with {unconditional}": ("unconditional", "digits", "10"),
    "{run} --guidance 2 --autoguide-with {run} --two-passes": ("negative", "autoguidance"),
    "{run} --animate {tmp}/a.png": ("{tmp}/a.png", ".gif"),
    "{run} --batch 12": ("batch", "12", "8"),
    "{broken}": "{broken}/checkpoints/30",
    "{run} --out {tmp}/file/grid.png": "{tmp}/file/grid.png",
    "{run} --out {tmp}/grid.jpg": ("{tmp}/grid.jpg", ".png"),
    "{run} --save {tmp}/samples.npy": ("{tmp}/samples.npy", ".npz"),
    "{run} --save {tmp}": ("{tmp}", ".npz"),
    "{run} --out-dir {tmp}/file": "{tmp}/file",
    "{run} --out-dir {tmp}/file/images": "{tmp}/file/images",
    "{run} --out-dir /proc/images": "/proc/images",
    "{run} --overwrite": ("overwrite", "out_dir"),
    "{run} --out-dir=": "out_dir",
    "{run} --out-dir {tmp}/images --preview": ("preview", "out"),
    "{unconditional} --guidance 2": ("unconditional", "guidance"),
    "{unconditional} --condition 1": ("unconditional", "condition"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("command", BAD)
def test_mistakes(command, places, capsys):
    check_mistake(main, f"sample {command}", BAD[command], capsys, **places)
    assert sorted(path.name for path in places["tmp"].iterdir()) == ["broken", "file"]
