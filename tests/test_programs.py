"""The two programs as their users run them: real processes, real digits, real files."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import QUICK, QUIET, TINY, check_mistake
from PIL import Image

import sample
import train
from diffjax import demo, experiment, picture, sampler, schedule
from diffjax.evaluation.digits import judge
from diffjax.evaluation.record import as_dict
from diffjax.run import Generator, Guidance, open_run, record


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
    assert (code, "has done its 220 steps" in out) == (0, True)
    assert (digits_run / "metrics.jsonl").read_bytes() == before


def test_guided_ddim_draws_the_digits_that_were_asked_for(digits_run, run_program, tmp_path):
    """The cheaper version of what the README claims of the whole training: a quarter of the steps, 100 images."""
    code, out, err = run_program(
        "sample.py", digits_run, "--sampler", "ddim", "--steps", 50, "--eta", 0, "--guidance", 2.0, "--num", 100,
        "--seed", 0, "--out", tmp_path / "grid.png", "--save", tmp_path / "samples.npz",
    )  # fmt: skip
    assert code == 0, err
    for word in ("ddim(eta=0, trailing)", "| 50 ", "| 100 ", "426,961 parameters", "1 x cpu", "float32", "compile s"):
        assert word in out
    samples = np.load(tmp_path / "samples.npz")
    assert (samples["images"].shape, samples["images"].dtype) == ((100, 8, 8, 1), np.uint8)
    assert (samples["labels"] == np.arange(100) % 10).all()
    verdict = judge(samples["images"], samples["labels"])
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
    assert judge(samples["images"], samples["labels"]).recognised >= 0.5  # one in ten by chance; unguided, few images


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
    assert judge(made["a"], np.arange(8)).recognised >= 0.6


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
        assert judge(made[guided], np.resize([0, 1, 6], 24)).recognised >= 0.6
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
    assert judge(made, np.resize([0, 1, 6], 24)).recognised >= 0.3  # one in ten by chance; guided by no label


def test_sampling_can_be_watched(digits_run, tmp_path, monkeypatch):
    """A preview that is refreshed, and an animation of the first batch that ends at the images."""
    seen = []
    save = picture.save_png
    monkeypatch.setattr(picture, "save_png", lambda path, sheet: (seen.append(np.asarray(sheet)), save(path, sheet)))
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
    expected = picture.grid(images, [str(i) for i in range(8)])
    assert np.abs(np.asarray(animation.convert("RGB"), int) - np.asarray(expected, int)).max() <= 2


@pytest.mark.parametrize(("steps", "every"), [(20, 1), (60, 2), (120, 3), (450, 10), (1000, 20)])
def test_frames_are_few_and_at_equal_distances(tmp_path, steps, every):
    watch = sample.Watch(sample.Options("", animate="a.gif", num=1), steps, (8, 8, 1), None, tmp_path)
    plan = sampler.ddim(schedule.linear(1000), schedule.trailing(schedule.linear(1000), steps))
    done, kept = 0, []
    for rows in sampler.chunks(plan, np.float32, watch.every):
        done += rows.steps
        before = len(watch.frames)
        watch(0, done, np.zeros((1, 8, 8, 1)))
        kept += [done] * (len(watch.frames) - before)
    assert kept == [*range(every, steps, every), steps]
    assert len(kept) <= sample.FRAMES


def test_what_is_made_can_be_told_in_json(digits_run):
    run = open_run(digits_run)
    plan = sampler.ddim(run.schedule, [1000, 500])
    generate = Generator(run.network, run.prediction, *run.description[1:])
    made = generate(run.params, plan, np.arange(8), 8, guidance=Guidance(2.0), seed=0, batch=8)
    row = json.loads(json.dumps(as_dict(record(run, made, plan, "ddim", Guidance(2.0), 8))))
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
    params = {w: jax.tree.leaves(open_run(unconditional_run, weights=w).params) for w in ("ema", "0.9", "0.1", "raw")}
    apart = {w: sum(np.abs(a - b).sum() for a, b in zip(params[w], params["raw"], strict=True)) for w in params}
    assert apart["ema"] == apart["0.9"] > apart["0.1"] > apart["raw"] == 0


# ------------------------------------------------------------------------------------------- mistakes

BAD_TRAIN = {
    "digitz --workdir {tmp}/x": "there is no configuration 'digitz': did you mean 'digits'?",
    "digits --workdir {tmp}/x --train.stepz 5": "there is no option '--train.stepz': did you mean '--train.steps'?",
    "digits --workdir {tmp}/x --train.steps many": "Error parsing --train.steps",
    "digits --workdir {tmp}/x --diffusion.schedule cosin": "'cosin'",
    "digits": "--workdir",
    "digits --workdir {tmp}/x extra": "there is no option 'extra'",
    "digits --workdir {tmp}/file/x": "Not a directory",
    "digits --workdir {tmp}/x --train.steps 0": "train.steps is 0: use a number above 0",
    "digits --workdir {tmp}/x --train.label-dropout 1.5": "train.label_dropout is 1.5",
    "digits --workdir {tmp}/x --train.learning-rate -1": "train.learning_rate is -1",
    "digits --workdir {tmp}/x --train.learning-rate nan": "train.learning_rate is nan",
    "digits --workdir {tmp}/x --train.clip inf": "train.clip is inf",
    "digits --workdir {tmp}/x --train.seed 4294967296": "train.seed is 4294967296: use less than 2**32",
    "digits --workdir {tmp}/x --diffusion.T 20": "beta_20 is 1.0: every beta lies strictly between 0 and 1",
    "digits --workdir {tmp}/x --diffusion.zero-terminal-snr": "level 1000 has no signal",
    "digits --workdir {tmp}/x --train.weighting snr": "'snr'",
    "digits --workdir {tmp}/x --network.attention 5": "attention at (5,) never happens: this network sees sizes [8, 4]",
    "digits --workdir {tmp}/x --data.name lfw": "dataset 'lfw'",
    "digits --workdir {tmp}/x --data.name mnist:9.9.9": "dataset 'mnist:9.9.9' cannot be used",
    "digits --workdir {tmp}/x --train.save-every 0": "train.save_every is 0",
    "digits --workdir {tmp}/x --train.accumulate 0": "train.accumulate is 0: use a number above 0",
    "digits --workdir {tmp}/x --train.accumulate 3": "which 8 devices, in 3 parts each, cannot share",
    "digits --workdir {tmp}/x --train.steps-per-dispatch 0": "train.steps_per_dispatch is 0: use a number above 0",
    "digits --workdir {tmp}/x --train.max-skipped 0": "train.max_skipped is 0: use a number above 0",
    "digits --workdir {tmp}/x --train.ema": "train.ema is (): name at least one decay",
    "digits --workdir {tmp}/x --train.ema 0.9 1.0": "train.ema is (0.9, 1.0): name at least one decay, each 0 or more",
    "digits --workdir {tmp}/x --train.ema many": "'many'",
    "digits --workdir {tmp}/x --parallel pmpa": "'pmpa'",
    "digits --workdir {tmp}/x --train.parallel gspmd": "'gspmd'",
    "digits --workdir {tmp}/x --distributed here": "--distributed is 'here': write auto, or the HOST:PORT of process 0",
    "digits --workdir {tmp}/x --distributed localhost:1": "--processes is None and --process is None: say how many",
    "digits --workdir {tmp}/x --distributed localhost:1 --processes 2 --process 2": "--process is 2: say how many",
    "digits --workdir {tmp}/x --distributed auto --processes 2": "leave out --processes and --process",
    "digits --workdir {tmp}/x --process 1": "--processes and --process belong to --distributed: leave them out",
    "digits --workdir {run} --train.ema 0.9 0.99": "but the checkpoint holds the averages (0.999,)",
    "digits --workdir {broken} --train.steps 40": "is incomplete: remove it",
    "digits --workdir {file}": "/file is a file: name a folder as --workdir",
    "digits --workdir {tmp}/x --network.channels 7": "network.channels is 7: use an even number",
    "digits --workdir {tmp}/x --network.heads 5": "heads is 5: it must divide every width where there is",
    "digits --workdir {tmp}/x --network.multipliers 1 1 1 1 1": "8x8 cannot be halved 4 times",
    "digits --workdir {tmp}/x --train.batch 12": "which 8 devices cannot share equally",
    "digits --workdir {tmp}/x --train.batch 4000": "a batch of 4000 is more than the 1500 images",
    "digits --workdir {tmp}/x --data.name cifar1": "no dataset 'cifar1': did you mean 'cifar10'?",
    "digits --workdir {run} --network.channels 32": "network.channels is 32 but the checkpoint was trained with 24",
    "digits --workdir {run} --diffusion.T 500": "diffusion.T is 500 but the checkpoint was trained with 1000",
}

BAD_SAMPLE = {
    "{tmp}/nowhere": "there is no run folder",
    "{tmp}": "holds no checkpoint",
    "{run} --checkpoint 7": "holds no checkpoint of step 7: it has 200, 220",
    "{run} --sampler ddmi": "'ddmi'",
    "{run} --weights best": "weights are 'best': use ema, raw, or the decay of an average, 0.999",
    "{run} --stepps 5": "there is no option '--stepps': did you mean '--steps'?",
    "{run} --steps 0": "steps is 0: this schedule takes 1 to 1000",
    "{run} --steps 1001": "steps is 1001: this schedule takes 1 to 1000",
    "{run} --steps 900 --spacing quadratic": "room for 801 of 1000 levels",
    "{run} --eta 1.5": "eta is 1.5",
    "{run} --sampler ddpm --eta 0.5": "--eta belongs to ddim",
    "{run} --variance fixed_large": "--variance belongs to ddpm",
    "{run} --sampler ddpm --variance big": "variance is 'big': use fixed_small, fixed_large, or a number",
    "{run} --sampler heun --eta 0": "--eta belongs to ddim and dpm_solver_pp_2m: the dials of heun are none",
    "{run} --sampler edm --churn=-1": "churn is -1.0",
    "{run} --levels 1000,ten": "--levels is '1000,ten': write numbers, separated by commas",
    "{run} --levels 5,10": "levels must decrease strictly, got 5.0 before 10.0",
    "{run} --levels 1000,0": "level 0 is data",
    "{run} --levels 1000,0.5": "level 0.5 has an end without a finite logsnr",
    "{run} --levels 1000,1 --steps 3": "leave out --steps",
    "{run} --plan {tmp}/no.json": "No such file",
    "{run} --plan {tmp}/file": "is not JSON",
    "{run} --plan {tmp}/file --eta 1": "--plan says all of the sampler: leave out --eta",
    "{run} --save-plan {tmp}/plan.txt": "is to be a .json or .png file",
    "{run} --labels 3,10": "name labels of 0 to 9",
    "{run} --labels two": "name labels of 0 to 9",
    "{run} --labels=-1": "name labels of 0 to 9",
    "{run} --num 0": "--num is 0",
    "{run} --seed=-1": "seed is -1",
    "{run} --seed 9223372036854775808": "seed is 9223372036854775808",
    "{run} --guidance nan": "guidance is nan",
    "{run} --guidance=-2": "guidance is -2",
    "{run} --interval 0.3 5": "has the scale 1, which is not guided",
    "{run} --guidance 2 --interval 5 0.3": "the interval is 5 to 0.3 of sigma/alpha",
    "{run} --guidance 2 --interval=-1 0.3": "the interval is -1 to 0.3",
    "{run} --guidance 2 --rescale 1.5": "rescale is 1.5",
    "{run} --guidance 2 --negative 10": "the label to be led away from is 10: use 0 to 9",
    "{run} --threshold 0": "--threshold is 0.0: use more than 0",
    "{unconditional} --guidance 1 --negative 2": "was trained without labels: leave out --guidance",
    "{run} --worse {run}": "has the scale 1, which is not guided",
    "{run} --worse-checkpoint 5": "--worse-checkpoint belongs to --worse",
    "{run} --guidance 2 --worse {tmp}/nowhere": "there is no run folder",
    "{run} --guidance 2 --worse {run} --worse-checkpoint 7": "holds no checkpoint of step 7",
    "{run} --guidance 2 --worse {unconditional}": "autoguidance takes two networks of the same data",
    "{run} --guidance 2 --worse {run} --two-passes": "leave out --negative and --two-passes",
    "{run} --animate {tmp}/a.png": "is to be a .gif file",
    "{run} --batch 12": "--batch is 12, which 8 devices cannot share equally: use a multiple of 8",
    "{broken}": "is incomplete: remove it",
    "{run} --out {tmp}/file/grid.png": "cannot be written",
    "{run} --out {tmp}/grid.jpg": "is to be a .png file",
    "{run} --save {tmp}/samples.npy": "is to be a .npz file",
    "{run} --save {tmp}": "is to be a .npz file",
    "{unconditional} --guidance 2": "was trained without labels: leave out --guidance",
    "{unconditional} --labels 1": "was trained without labels: leave out --labels",
}


BAD_DEMO = {
    "{tmp}/nowhere": "there is no run folder",
    "{unconditional}": "is not a run of the configuration 'digits'",
    "{run} --num 3": "--num is 3: ask for ten images or more",
}


@pytest.fixture
def places(tmp_path, data_dir, digits_run, unconditional_run):
    (tmp_path / "file").write_text("")
    (tmp_path / "broken" / "checkpoints" / "30").mkdir(parents=True)
    broken = {"broken": tmp_path / "broken", "file": tmp_path / "file"}
    return {"tmp": tmp_path, "run": digits_run, "unconditional": unconditional_run, "data": data_dir} | broken


@pytest.mark.parametrize("command", BAD_TRAIN)
def test_a_mistake_in_training_is_one_sentence(command, places, capsys):
    # Where the command gets as far as the data, they are those of the suite.
    with_data = command + " --data.dir {data}" if "--workdir" in command and "extra" not in command else command
    check_mistake(train.main, with_data, BAD_TRAIN[command], capsys, **places)
    assert sorted(path.name for path in places["tmp"].iterdir()) == ["broken", "file"]


@pytest.mark.parametrize("command", BAD_SAMPLE)
def test_a_mistake_in_sampling_is_one_sentence(command, places, capsys):
    check_mistake(sample.main, command, BAD_SAMPLE[command], capsys, **places)
    assert sorted(path.name for path in places["tmp"].iterdir()) == ["broken", "file"]


@pytest.mark.parametrize("command", BAD_DEMO)
def test_a_mistake_in_the_demo_is_one_sentence(command, places, capsys):
    check_mistake(demo.main, command, BAD_DEMO[command], capsys, **places)


def test_steps_that_are_no_numbers_end_the_run_with_what_was_seen(run_program, tmp_path):
    arguments = ["--train.learning-rate", 1e30, "--train.warmup", 0, "--train.clip", 1e30, "--train.save-every", 1]
    arguments += ["--train.max-skipped", 3, "--workdir", tmp_path]
    code, _, err = run_program("train.py", "digits", *TINY, *QUIET, *arguments, flags=QUICK)
    assert code == 2
    assert "Traceback" not in err
    said = err.splitlines()[-1]
    assert "the gradients of 3 steps in a row, to step " in said
    assert " at learning rate 1e+30, were not numbers, and the last losses " in said
    assert "start again from the last checkpoint with a lower --train.learning-rate" in said
    for leaf in jax.tree.leaves(open_run(tmp_path, weights="raw").params):
        assert np.isfinite(leaf).all()  # what was saved is from before


def test_guidance_needs_label_dropout(digits_run):
    run = open_run(digits_run)
    config = run.description.config
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, label_dropout=0.0))
    run = run._replace(description=run.description._replace(config=config))
    with pytest.raises(
        ValueError, match=r"trained with train.label_dropout 0, so it does not know images without a label"
    ):
        sample.make_labels(sample.Options(run="x"), run, Guidance(2.0))
    assert sample.make_labels(sample.Options(run="x", num=3), run, Guidance(2.0, negative=5)).tolist() == [0, 1, 2]
    assert sample.make_labels(sample.Options(run="x", num=3), run, Guidance()).tolist() == [0, 1, 2]


@pytest.mark.parametrize("command", ["train.py --help", "train.py digits --help", "sample.py --help"])
def test_help_shows_every_option(command, run_program):
    name, *arguments = command.split()
    code, out, _ = run_program(name, *arguments)
    expected = {
        "train.py --help": experiment.names(),
        "train.py digits --help": [name.replace("_", "-") for name in experiment.flat(experiment.named("digits"))],
        "sample.py --help": [
            f"--{field.name}".replace("_", "-") for field in dataclasses.fields(sample.Options) if field.name != "run"
        ],
    }
    assert code == 0
    # What a student was distilled for is written by `train.py distill`, and no option.
    assert [word for word in expected[command] if (word in out) == word.startswith("distillation.")] == []
