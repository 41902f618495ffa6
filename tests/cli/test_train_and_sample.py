"""The two programs as their users run them: real processes, real digits, real files."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from helpers import QUICK, QUIET, TINY, check_mistake, check_told, naming
from PIL import Image

from diffjax import sampler, schedule
from diffjax.cli import demo, sample, train
from diffjax.config import config_names, flat_fields, load_config
from diffjax.data import image_io
from diffjax.evaluation.digits import score_digits
from diffjax.evaluation.results import as_dict
from diffjax.inference.pipeline import Guidance, Pipeline, load_model, sampling_row


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_training_learns_and_leaves_what_it_says(digits_run):
    lines = metrics(digits_run)
    losses = [line["loss"] for line in lines if "loss" in line]
    held_out = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    assert np.mean(losses[-3:]) < 0.25 * losses[0]
    assert held_out[-1] < min(0.12, held_out[0])
    assert sorted(int(path.name) for path in (digits_run / "checkpoints").iterdir()) == [200, 220]
    assert Image.open(digits_run / "previews" / "0000220.png").size[0] > 400
    assert len(list((digits_run / "tensorboard").iterdir())) == 1


def test_the_same_command_again_says_that_it_has_finished(digits_run, run_program):
    before = (digits_run / "metrics.jsonl").read_bytes()
    code, out, _ = run_program("train.py", "digits", "--workdir", digits_run, "--train.steps", 220)
    assert code == 0
    assert re.search(rf"{re.escape(str(digits_run))}\D+\b220\b", out)
    assert (digits_run / "metrics.jsonl").read_bytes() == before


def test_guided_ddim_draws_the_digits_that_were_asked_for(digits_run, run_program, tmp_path):
    """The cheaper version of what the README claims of the whole training: a quarter of the steps, 100 images."""
    code, out, err = run_program(
        "sample.py", digits_run, "--sampler", "ddim", "--steps", 50, "--eta", 0, "--guidance", 2.0, "--num", 100,
        "--seed", 0, "--out", tmp_path / "grid.png", "--save", tmp_path / "samples.npz",
    )  # fmt: skip
    assert code == 0, err
    for word in ("ddim(eta=0, trailing)", "| 50 ", "| 100 ", "426,961", "1 x cpu", "float32", "compile s"):
        assert word in out
    samples = np.load(tmp_path / "samples.npz")
    assert (samples["images"].shape, samples["images"].dtype) == ((100, 8, 8, 1), np.uint8)
    assert (samples["labels"] == np.arange(100) % 10).all()
    verdict = score_digits(samples["images"], samples["labels"])
    assert verdict.recognised >= 0.85  # the whole training: 0.97
    assert verdict.distinct >= 0.99
    assert verdict.novelty > 0.4


def test_ddpm_takes_the_whole_chain(digits_run, run_program, tmp_path):
    code, out, err = run_program(
        "sample.py", digits_run, "--sampler", "ddpm", "--num", 10, "--labels", "0,6",
        "--out", tmp_path / "grid.png", "--save", tmp_path / "samples.npz",
    )  # fmt: skip
    assert code == 0, err
    assert "ddpm(fixed_small, trailing) | 1000  | 1000 |" in out
    samples = np.load(tmp_path / "samples.npz")
    assert samples["labels"].tolist() == [0, 6] * 5
    assert (
        score_digits(samples["images"], samples["labels"]).recognised >= 0.5
    )  # one in ten by chance; unguided, few images


def test_every_sampler_makes_images_and_a_stored_plan_makes_them_again(digits_run, tmp_path, capsys):
    """In this process, on its eight devices: what another sampler needs is no other program."""
    plan = tmp_path / "plan.json"
    first = ["--sampler", "dpm_solver_pp_2m", "--steps", "10", "--spacing", "uniform_logsnr", "--eta", "0.5"]
    cases = {
        "a": [*first, "--save-plan", plan],
        "b": ["--plan", plan],
        "c": ["--sampler", "heun", "--levels", "1000,600.5,100"],
    }
    made = {}
    for name, arguments in cases.items():
        arguments += [
            "--num",
            "8",
            "--guidance",
            "2",
            "--out",
            tmp_path / f"{name}.png",
            "--save",
            tmp_path / f"{name}.npz",
        ]
        sample.main([str(digits_run), *map(str, arguments)])
        made[name] = np.load(tmp_path / f"{name}.npz")["images"]
    assert (made["a"] == made["b"]).all()
    assert (made["a"] != made["c"]).any()
    said = capsys.readouterr().out
    assert "| dpm_solver_pp_2m(eta=0.5, uniform_logsnr) | 10    | 20 " in said
    assert "| plan(plan.json) | 10    | 20 " in said
    assert "| heun(explicit, 3 levels) | 5     | 10 " in said
    assert score_digits(made["a"], np.arange(8)).recognised >= 0.6


def test_every_kind_of_guidance_makes_digits_and_counts_its_evaluations(digits_run, tmp_path, capsys):
    """DDIM in 10 steps: two evaluations for each guided one."""
    cases = {
        "2": ("", 20),
        "2 in two passes": ("--two-passes", 20),
        "2 in 0.3..5": ("--interval 0.3 5", 15),
        "2 rescaled 0.7 away from 5": ("--rescale 0.7 --negative 5", 20),
    }
    made = {}
    for i, (guided, (options, nfe)) in enumerate(cases.items()):
        arguments = ["--steps", "10", "--num", "24", "--labels", "0,1,6", "--guidance", "2", *options.split()]
        out = ["--out", str(tmp_path / f"{i}.png"), "--save", str(tmp_path / f"{i}.npz")]
        sample.main([str(digits_run), *arguments, *out])
        cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[2].split("|")]
        assert (cells[2], cells[3], cells[4]) == ("10", str(nfe), guided)
        made[guided] = np.load(tmp_path / f"{i}.npz")["images"].astype(int)
        assert score_digits(made[guided], np.resize([0, 1, 6], 24)).recognised >= 0.6
    assert np.abs(made["2"] - made["2 in two passes"]).max() <= 1  # a rounding to 8 bits apart
    assert all((made["2"] != made[other]).any() for other in cases if "passes" not in other and other != "2")


def test_a_run_can_be_led_away_from_a_worse_one(digits_run, tmp_path, capsys):
    """Autoguidance by an earlier checkpoint, in an interval: two networks where it is on, counted."""
    arguments = ["--steps", "10", "--num", "24", "--labels", "0,1,6", "--guidance", "2", "--interval", "0.3", "5"]
    arguments += ["--worse", str(digits_run), "--worse-checkpoint", "200", "--save", str(tmp_path / "a.npz")]
    sample.main([str(digits_run), *arguments, "--out", str(tmp_path / "grid.png")])
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[2].split("|")]
    assert (cells[3], cells[4]) == ("15", "2 in 0.3..5 away from unet of digits (ema, step 200)")
    made = np.load(tmp_path / "a.npz")["images"]
    assert score_digits(made, np.resize([0, 1, 6], 24)).recognised >= 0.3  # one in ten by chance; guided by no label


def test_sampling_can_be_watched(digits_run, tmp_path, monkeypatch):
    """A preview that is refreshed, and an animation of the first batch that ends at the images."""
    seen = []
    save = image_io.save_png
    monkeypatch.setattr(image_io, "save_png", lambda path, sheet: (seen.append(np.asarray(sheet)), save(path, sheet)))
    monkeypatch.setattr(sample, "REFRESH_SECONDS", 0.0)
    options = ["--steps", "20", "--num", "11", "--batch", "8", "--preview", "--animate", str(tmp_path / "a.gif")]
    out = ["--out", str(tmp_path / "a.png"), "--save", str(tmp_path / "a.npz")]
    sample.main([str(digits_run), *options, *out])
    assert len(seen) == 2 * 20 + 1
    assert (seen[-1] == np.asarray(Image.open(tmp_path / "a.png"))).all()
    assert (seen[0] != seen[10]).any()
    assert (seen[-2] == seen[-1]).all()  # the last estimate is the image
    animation = Image.open(tmp_path / "a.gif")
    assert animation.n_frames == 20
    animation.seek(19)
    images = np.load(tmp_path / "a.npz")["images"][:8]
    expected = image_io.grid(images, [str(i) for i in range(8)])
    assert np.abs(np.asarray(animation.convert("RGB"), int) - np.asarray(expected, int)).max() <= 2


@pytest.mark.parametrize(("steps", "every"), [(20, 1), (60, 2), (120, 3), (450, 10), (1000, 20)])
def test_frames_are_few_and_at_equal_distances(tmp_path, steps, every):
    watch = sample.Watch(sample.Options("", animate="a.gif", num=1), steps, (8, 8, 1), None, tmp_path)
    plan = sampler.ddim(schedule.linear(1000), schedule.trailing(schedule.linear(1000), steps))
    done, kept = 0, []
    for rows in sampler.segments(plan, np.float32, watch.every):
        done += rows.steps
        before = len(watch.frames)
        watch(0, done, np.zeros((1, 8, 8, 1)))
        kept += [done] * (len(watch.frames) - before)
    assert kept == [*range(every, steps, every), steps]
    assert len(kept) <= sample.FRAMES


def test_what_is_made_can_be_told_in_json(digits_run):
    run = load_model(digits_run)
    plan = sampler.ddim(run.schedule, [1000, 500])
    generate = Pipeline(run.network, run.prediction, *run.description[1:])
    made = generate(run.params, plan, np.arange(8), 8, guidance=Guidance(2.0), seed=0, batch=8)
    row = json.loads(json.dumps(as_dict(sampling_row(run, made, plan, "ddim", Guidance(2.0), 8))))
    assert (row["nfe"], row["guidance"], row["guided"]) == (4, 2.0, "2")


def test_images_are_the_same_on_eight_devices_and_in_other_batches(digits_run, run_program, tmp_path):
    made = []
    for name, batch, flags in [("a", 16, ""), ("b", 8, "--xla_force_host_platform_device_count=8")]:
        code, out, err = run_program(
            "sample.py", digits_run, "--steps", 10, "--num", 13, "--eta", 1, "--batch", batch,
            "--out", tmp_path / f"{name}.png", "--save", tmp_path / f"{name}.npz", flags=flags,
        )  # fmt: skip
        assert code == 0, err
        assert ("8 x cpu" in out) == bool(flags)
        made.append(np.load(tmp_path / f"{name}.npz")["images"].astype(int))
    assert made[0].shape == (13, 8, 8, 1)
    assert np.abs(made[0] - made[1]).max() <= 1  # a rounding to 8 bits apart


@pytest.fixture(scope="module")
def unconditional_run(run_program, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "unconditional"
    arguments = ["--train.steps", 3, "--workdir", folder, "--train.ema", 0.9, 0.1]
    code, _, err = run_program("train.py", "digits_unconditional", *TINY, *QUIET, *arguments, flags=QUICK)
    assert code == 0, err
    return folder


def test_an_unconditional_run_works_too(unconditional_run, run_program, tmp_path):
    arguments = ["--steps", 2, "--num", 5, "--out", tmp_path / "g.png", "--save", tmp_path / "s.npz"]
    arguments += ["--animate", tmp_path / "a.gif"]
    code, _, err = run_program("sample.py", unconditional_run, *arguments, "--weights", "raw", "--no-clip", flags=QUICK)
    assert code == 0, err
    assert (np.load(tmp_path / "s.npz")["labels"] == -1).all()


def test_each_of_several_averages_can_be_sampled(unconditional_run):
    params = {w: jax.tree.leaves(load_model(unconditional_run, weights=w).params) for w in ("ema", "0.9", "0.1", "raw")}
    apart = {w: sum(np.abs(a - b).sum() for a, b in zip(params[w], params["raw"], strict=True)) for w in params}
    assert apart["ema"] == apart["0.9"] > apart["0.1"] > apart["raw"] == 0


# ------------------------------------------------------------------------------------------- mistakes

SENTENCES = {
    "digitz --workdir x": "train.py: there is no configuration 'digitz': did you mean 'digits'?",
    "digits --workdir x --train.stepz 5": (
        "train.py digits: there is no option '--train.stepz': did you mean '--train.steps'?"
    ),
    "digits --workdir x --train.steps 0": "train.py: train.steps is 0: use a number above 0",
    "digits --workdir x --train.batch 12": (
        "train.py: train.batch is 12, which 8 devices cannot share equally: use a multiple of 8"
    ),
}


@pytest.mark.parametrize("command", SENTENCES)
def test_a_mistake_is_told_like_this(command, capsys):
    """Examples of the sentences, word by word. All other tests of errors leave their wording free."""
    with pytest.raises(SystemExit):
        train.main(command.split())
    assert capsys.readouterr().err == SENTENCES[command] + "\n"


BAD_TRAIN = {
    "digitz --workdir {tmp}/x": ("digitz", "digits"),
    "digits --workdir {tmp}/x --train.stepz 5": ("train.stepz", "train.steps"),
    "digits --workdir {tmp}/x --train.steps many": ("steps", "many"),
    "digits --workdir {tmp}/x --diffusion.schedule cosin": ("schedule", "cosin"),
    "digits": "workdir",
    "digits --workdir {tmp}/x extra": "extra",
    "digits --workdir {tmp}/file/x": "{tmp}/file/x",
    "digits --workdir {tmp}/x --train.steps 0": ("steps", "0"),
    "digits --workdir {tmp}/x --train.label-dropout 1.5": ("label_dropout", "1.5"),
    "digits --workdir {tmp}/x --train.learning-rate -1": ("learning_rate", "-1"),
    "digits --workdir {tmp}/x --train.learning-rate nan": ("learning_rate", "nan"),
    "digits --workdir {tmp}/x --train.clip inf": ("clip", "inf"),
    "digits --workdir {tmp}/x --train.seed 4294967296": ("seed", "4294967296"),
    "digits --workdir {tmp}/x --diffusion.T 20": ("beta_20", "1"),
    "digits --workdir {tmp}/x --diffusion.zero-terminal-snr": ("1000", "alpha", "eps"),
    "digits --workdir {tmp}/x --train.weighting snr": ("weighting", "snr"),
    "digits --workdir {tmp}/x --network.attention 5": ("attention", "5", "8", "4"),
    "digits --workdir {tmp}/x --data.name lfw": "lfw",
    "digits --workdir {tmp}/x --data.name mnist:9.9.9": "mnist:9.9.9",
    "digits --workdir {tmp}/x --train.save-every 0": ("save_every", "0"),
    "digits --workdir {tmp}/x --train.accumulate 0": ("accumulate", "0"),
    "digits --workdir {tmp}/x --train.accumulate 3": ("batch", "64", "8", "3", "24"),
    "digits --workdir {tmp}/x --train.steps-per-dispatch 0": ("steps_per_dispatch", "0"),
    "digits --workdir {tmp}/x --train.max-skipped 0": ("max_skipped", "0"),
    "digits --workdir {tmp}/x --train.ema": "train.ema",
    "digits --workdir {tmp}/x --train.ema 0.9 1.0": ("ema", "0.9", "1"),
    "digits --workdir {tmp}/x --train.ema many": ("ema", "many"),
    "digits --workdir {tmp}/x --parallel pmpa": ("parallel", "pmpa"),
    "digits --workdir {tmp}/x --train.parallel gspmd": ("parallel", "gspmd"),
    "digits --workdir {tmp}/x --distributed here": ("distributed", "here"),
    "digits --workdir {tmp}/x --distributed localhost:1": ("processes", "process"),
    "digits --workdir {tmp}/x --distributed localhost:1 --processes 2 --process 2": ("processes", "process", "2"),
    "digits --workdir {tmp}/x --distributed auto --processes 2": ("distributed", "auto", "processes", "process"),
    "digits --workdir {tmp}/x --process 1": ("distributed", "processes", "process"),
    "digits --workdir {run} --train.ema 0.9 0.99": ("ema", "0.9", "0.99", "0.999"),
    "digits --workdir {broken} --train.steps 40": "{broken}/checkpoints/30",
    "digits --workdir {file}": ("{file}", "workdir"),
    "digits --workdir {tmp}/x --network.channels 7": ("channels", "7"),
    "digits --workdir {tmp}/x --network.heads 5": ("heads", "5", "48"),
    "digits --workdir {tmp}/x --network.multipliers 1 1 1 1 1": ("multipliers", "8x8", "16"),
    "digits --workdir {tmp}/x --train.batch 12": ("batch", "12", "8"),
    "digits --workdir {tmp}/x --train.batch 4000": ("batch", "4000", "1500"),
    "digits --workdir {tmp}/x --data.name cifar1": ("cifar1", "cifar10"),
    "digits --workdir {run} --network.channels 32": ("channels", "32", "24"),
    "digits --workdir {run} --diffusion.T 500": ("diffusion.T", "500", "1000"),
}

BAD_SAMPLE = {
    "{tmp}/nowhere": "{tmp}/nowhere",
    "{tmp}": "{tmp}",
    "{run} --checkpoint 7": ("{run}", "7", "200", "220"),
    "{run} --sampler ddmi": ("sampler", "ddmi"),
    "{run} --weights best": ("weights", "best", "0.999"),
    "{run} --stepps 5": ("stepps", "steps"),
    "{run} --steps 0": ("steps", "0", "1000"),
    "{run} --steps 1001": ("steps", "1001", "1000"),
    "{run} --steps 900 --spacing quadratic": ("quadratic", "900", "801"),
    "{run} --eta 1.5": ("eta", "1.5"),
    "{run} --sampler ddpm --eta 0.5": ("eta", "ddim", "ddpm"),
    "{run} --variance fixed_large": ("variance", "ddpm", "ddim"),
    "{run} --sampler ddpm --variance big": ("variance", "big"),
    "{run} --sampler heun --eta 0": ("eta", "heun"),
    "{run} --sampler edm --churn=-1": ("churn", "-1"),
    "{run} --levels 1000,ten": ("levels", "1000,ten"),
    "{run} --levels 5,10": ("levels", "5", "10"),
    "{run} --levels 1000,0": ("level", "0"),
    "{run} --levels 1000,0.5": ("level", "0.5"),
    "{run} --levels 1000,1 --steps 3": ("levels", "steps"),
    "{run} --plan {tmp}/no.json": "{tmp}/no.json",
    "{run} --plan {tmp}/file": ("{tmp}/file", "JSON"),
    "{run} --plan {tmp}/file --eta 1": ("plan", "eta"),
    "{run} --save-plan {tmp}/plan.txt": ("{tmp}/plan.txt", ".json", ".png"),
    "{run} --labels 3,10": ("labels", "3,10", "9"),
    "{run} --labels two": ("labels", "two", "9"),
    "{run} --labels=-1": ("labels", "-1", "9"),
    "{run} --num 0": ("num", "0"),
    "{run} --seed=-1": ("seed", "-1"),
    "{run} --seed 9223372036854775808": ("seed", "9223372036854775808"),
    "{run} --guidance nan": ("guidance", "nan"),
    "{run} --guidance=-2": ("guidance", "-2"),
    "{run} --interval 0.3 5": ("guidance", "1", "0.3", "5"),
    "{run} --guidance 2 --interval 5 0.3": ("interval", "5", "0.3"),
    "{run} --guidance 2 --interval=-1 0.3": ("interval", "-1", "0.3"),
    "{run} --guidance 2 --rescale 1.5": ("rescale", "1.5"),
    "{run} --guidance 2 --negative 10": ("10", "9"),
    "{run} --threshold 0": ("threshold", "0"),
    "{unconditional} --guidance 1 --negative 2": ("unconditional", "guidance"),
    "{run} --worse {run}": ("guidance", "1", "digits"),
    "{run} --worse-checkpoint 5": ("worse_checkpoint", "worse"),
    "{run} --guidance 2 --worse {tmp}/nowhere": "{tmp}/nowhere",
    "{run} --guidance 2 --worse {run} --worse-checkpoint 7": ("{run}", "7", "200", "220"),
    "{run} --guidance 2 --worse {unconditional}": ("unconditional", "digits", "0", "10"),
    "{run} --guidance 2 --worse {run} --two-passes": ("worse", "negative", "two_passes"),
    "{run} --animate {tmp}/a.png": ("{tmp}/a.png", ".gif"),
    "{run} --batch 12": ("batch", "12", "8"),
    "{broken}": "{broken}/checkpoints/30",
    "{run} --out {tmp}/file/grid.png": "{tmp}/file/grid.png",
    "{run} --out {tmp}/grid.jpg": ("{tmp}/grid.jpg", ".png"),
    "{run} --save {tmp}/samples.npy": ("{tmp}/samples.npy", ".npz"),
    "{run} --save {tmp}": ("{tmp}", ".npz"),
    "{unconditional} --guidance 2": ("unconditional", "guidance"),
    "{unconditional} --labels 1": ("unconditional", "labels"),
}


BAD_DEMO = {
    "{tmp}/nowhere": "{tmp}/nowhere",
    "{unconditional}": ("{unconditional}", "digits"),
    "{run} --num 3": ("num", "3"),
}


@pytest.fixture
def places(tmp_path, data_dir, digits_run, unconditional_run):
    (tmp_path / "file").write_text("")
    (tmp_path / "broken" / "checkpoints" / "30").mkdir(parents=True)
    broken = {"broken": tmp_path / "broken", "file": tmp_path / "file"}
    return {"tmp": tmp_path, "run": digits_run, "unconditional": unconditional_run, "data": data_dir} | broken


@pytest.mark.parametrize("command", BAD_TRAIN)
def test_a_mistake_in_training_is_named_in_one_line(command, places, capsys):
    # Where the command gets as far as the data, they are those of the suite.
    with_data = command + " --data.dir {data}" if "--workdir" in command and "extra" not in command else command
    check_mistake(train.main, with_data, BAD_TRAIN[command], capsys, **places)
    assert sorted(path.name for path in places["tmp"].iterdir()) == ["broken", "file"]


@pytest.mark.parametrize("command", BAD_SAMPLE)
def test_a_mistake_in_sampling_is_named_in_one_line(command, places, capsys):
    check_mistake(sample.main, command, BAD_SAMPLE[command], capsys, **places)
    assert sorted(path.name for path in places["tmp"].iterdir()) == ["broken", "file"]


@pytest.mark.parametrize("command", BAD_DEMO)
def test_a_mistake_in_the_demo_is_named_in_one_line(command, places, capsys):
    check_mistake(demo.main, command, BAD_DEMO[command], capsys, **places)


def test_steps_that_are_no_numbers_end_the_run_with_what_was_seen(run_program, tmp_path):
    arguments = ["--train.learning-rate", 1e30, "--train.warmup", 0, "--train.clip", 1e30, "--train.save-every", 1]
    arguments += ["--train.max-skipped", 3, "--workdir", tmp_path]
    code, _, err = run_program("train.py", "digits", *TINY, *QUIET, *arguments, flags=QUICK)
    check_told(code, err, ("3", "learning_rate", "1e+30"), after_progress=True)
    for leaf in jax.tree.leaves(load_model(tmp_path, weights="raw").params):
        assert np.isfinite(leaf).all()  # what was saved is from before


def test_guidance_needs_label_dropout(digits_run):
    run = load_model(digits_run)
    config = run.description.config
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, label_dropout=0.0))
    run = run._replace(description=run.description._replace(config=config))
    with pytest.raises(ValueError, match=naming("label_dropout", 0)):
        sample.make_labels(sample.Options(run="x"), run, Guidance(2.0))
    assert sample.make_labels(sample.Options(run="x", num=3), run, Guidance(2.0, negative=5)).tolist() == [0, 1, 2]
    assert sample.make_labels(sample.Options(run="x", num=3), run, Guidance()).tolist() == [0, 1, 2]


@pytest.mark.parametrize("command", ["train.py --help", "train.py digits --help", "sample.py --help"])
def test_help_shows_every_option(command, run_program):
    name, *arguments = command.split()
    code, out, _ = run_program(name, *arguments)
    expected = {
        "train.py --help": config_names(),
        "train.py digits --help": [name.replace("_", "-") for name in flat_fields(load_config("digits"))],
        "sample.py --help": [
            f"--{field.name}".replace("_", "-") for field in dataclasses.fields(sample.Options) if field.name != "run"
        ],
    }
    assert code == 0
    # What a student was distilled for is written by `train.py distill`, and no option.
    assert [word for word in expected[command] if (word in out) == word.startswith("distillation.")] == []
