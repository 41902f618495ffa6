"""`diffjax train` as its users run it: real processes, real digits, real files."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import QUICK, QUIET, TINY, check_mistake, check_told
from PIL import Image

from diffjax.build import ModelInfo
from diffjax.checkpoint import Checkpoints
from diffjax.cli import main
from diffjax.cli import train as train_command
from diffjax.config import Config, Distillation, forgotten_changes
from diffjax.inference.model import load_model
from diffjax.nn.conditioning import UNCONDITIONAL


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_training_learns(digits_run):
    """Losses fall, and checkpoints, previews and metrics are where the command says."""
    lines = metrics(digits_run)
    losses = [line["loss"] for line in lines if "loss" in line]
    held_out = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    assert np.mean(losses[-3:]) < 0.25 * losses[0]
    assert held_out[-1] < min(0.12, held_out[0])
    assert sorted(int(path.name) for path in (digits_run / "checkpoints").iterdir()) == [200, 220]
    assert Image.open(digits_run / "previews" / "0000220.png").size[0] > 400
    assert len(list((digits_run / "tensorboard").iterdir())) == 1


@pytest.mark.slow
def test_finished(digits_run, capsys, in_suite_data):
    """The same command again says so, and changes nothing."""
    before = (digits_run / "metrics.jsonl").read_bytes()
    options = ["--train.steps", "220", "--train.keep", "9"]
    main(["train", "digits", "--workdir", str(digits_run), *options])
    assert re.search(rf"{re.escape(str(digits_run))}\D+\b220\b", capsys.readouterr().out)
    assert (digits_run / "metrics.jsonl").read_bytes() == before


def test_averages(unconditional_run):
    """Each of several moving averages can be opened."""
    names = ("ema", "0.9", "0.1", "raw")
    params = {w: jax.tree.leaves(load_model(unconditional_run, weights=w).params) for w in names}
    apart = {
        w: sum(np.abs(a - b).sum() for a, b in zip(params[w], params["raw"], strict=True))
        for w in names
    }
    assert apart["ema"] == apart["0.9"] > apart["0.1"] > apart["raw"] == 0


def test_non_finite(data_dir, tmp_path, capsys):
    """Training ends with the step and the learning rate; what was saved is from before."""
    options = ["--train.learning-rate", "1e30", "--train.warmup", "0", "--train.clip", "1e30"]
    options += ["--train.save-every", "1", "--train.max-skipped", "3", "--data.dir", str(data_dir)]
    with pytest.raises(SystemExit) as end:
        main(["train", "digits", "--workdir", str(tmp_path), *TINY, *QUIET, *options])
    names = ("3", "learning_rate", "1e+30")
    check_told(end.value.code, capsys.readouterr().err, names, after_progress=True)
    for leaf in jax.tree.leaves(load_model(tmp_path, weights="raw").params):
        assert np.isfinite(leaf).all()


def test_damaged_image(tmp_path, capsys):
    """It is met at its turn, after the progress bar, and what was trained before it is kept."""
    (tmp_path / "images").mkdir()
    for i in range(90):
        Image.new("RGB", (9, 9), (i, i, i)).save(tmp_path / "images" / f"{i:02}.png")
    (tmp_path / "images" / "05.png").write_text("no image")
    options = "--data.size 8 --network.channels=4 --network.multipliers=1 --network.attention"
    options += f" --network.head-width=4 --train.batch=8 --data.path {tmp_path}/images"
    options += " --train.eval-every 0 --train.steps 30"
    words = ["train", "folder", "--workdir", str(tmp_path / "run"), *options.split()]
    with pytest.raises(SystemExit) as end:
        main([*words, "--data.conditions"])
    err = capsys.readouterr().err
    check_told(end.value.code, err, f"{tmp_path}/images/05.png", after_progress=True)
    assert [line["step"] for line in metrics(tmp_path / "run")] == []  # one in 100 is logged
    assert 0 < load_model(tmp_path / "run").step < 11  # in the first pass over the images


@pytest.mark.slow
def test_processes_not_found(run_program, tmp_path):
    options = ["--workdir", tmp_path / "x", "--distributed", "auto"]
    code, _, err = run_program("train", "digits", *options, flags=QUICK)
    check_told(code, err, ("distributed", "auto", "HOST:PORT", "processes", "process"))


OWN_NETWORK = '''
from dataclasses import dataclass

from diffjax.config import Config
from diffjax.nn.unet import UNetConfig


@dataclass(frozen=True)
class Mine(UNetConfig):
    """A network of the file."""

    extra: int = 3
    """A number."""


config = Config(network=Mine())
'''


def test_network_that_is_not_registered(tmp_path, capsys):
    """It is refused before training, since no checkpoint could name it; its options are shown."""
    path = tmp_path / "own.py"
    path.write_text(OWN_NETWORK)
    with pytest.raises(SystemExit) as end:
        main(["train", str(path), "--help"])
    assert end.value.code == 0
    assert "--network.extra" in capsys.readouterr().out
    command = f"train {path} --workdir {tmp_path}/run --network.extra 5"
    check_mistake(main, command, ("Mine",), capsys)
    assert not (tmp_path / "run").exists()


BAD = {
    "digitz --workdir {tmp}/x": ("digitz", "digits"),
    "{tmp}/own.py --workdir {tmp}/x": "{tmp}/own.py",
    "{file}.py --workdir {tmp}/x": "{file}.py",
    "digits --workdir {tmp}/x --train.stepz 5": ("train.stepz", "train.steps"),
    "digits --workdir {tmp}/x --train.steps many": ("steps", "many"),
    "digits --workdir {tmp}/x --diffusion.schedule cosin": ("schedule", "cosin"),
    "digits": "workdir",
    "digits --workdir {tmp}/x extra": "extra",
    "digits --workdir {tmp}/file/x": "{tmp}/file/x",
    "digits --workdir {tmp}/x --train.steps 0": ("train.steps", "0"),
    "digits --workdir {tmp}/x --train.condition-dropout 1.5": ("condition_dropout", "1.5"),
    "digits --workdir {tmp}/x --train.learning-rate -1": ("learning_rate", "-1"),
    "digits --workdir {tmp}/x --train.learning-rate nan": ("learning_rate", "nan"),
    "digits --workdir {tmp}/x --train.clip inf": ("clip", "inf"),
    "digits --workdir {tmp}/x --train.seed 4294967296": ("seed", "4294967296"),
    "digits --workdir {tmp}/x --diffusion.T 20": ("beta_20", "1"),
    "digits --workdir {tmp}/x --diffusion.zero-terminal-snr": (
        "zero_terminal_snr", "prediction", "eps", "1000",
    ),
    "digits --workdir {tmp}/x --train.weighting snr": ("weighting", "snr"),
    "digits --workdir {tmp}/x --network.attention 5": ("attention", "5", "8", "4"),
    "digits --workdir {tmp}/x --network.dropout 1": ("network.dropout", "1"),
    "digits --workdir {tmp}/x --data.conditions colour": ("conditions", "colour", "label"),
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
    "digits --workdir {tmp}/x --train.parallel pmpa": ("parallel", "pmpa"),
    "digits --workdir {tmp}/x --train.parallel gspmd": ("parallel", "gspmd"),
    "digits --workdir {tmp}/x --distributed here": ("distributed", "here"),
    "digits --workdir {tmp}/x --distributed localhost:1": ("processes", "process"),
    "digits --workdir {tmp}/x --distributed localhost:1 --processes 2 --process 2": (
        "processes", "process", "2",
    ),
    "digits --workdir {tmp}/x --distributed auto --processes 2": (
        "distributed", "auto", "processes", "process",
    ),
    "digits --workdir {tmp}/x --process 1": ("distributed", "processes", "process"),
    "digits --workdir {broken} --train.steps 40": "{broken}/checkpoints/30",
    "digits --workdir {file}": ("{file}", "workdir"),
    "digits --workdir {tmp}/x --network.channels 7": ("channels", "7"),
    "digits --workdir {tmp}/x --network.heads 5": ("heads", "5", "48"),
    "digits --workdir {tmp}/x --network.multipliers 1 1 1 1 1": ("multipliers", "8x8", "16"),
    "digits --workdir {tmp}/x --train.batch 12": ("batch", "12", "8"),
    "digits --workdir {tmp}/x --train.batch 4000": ("batch", "4000", "1500"),
    "digits --workdir {tmp}/x --data.name cifar1": ("cifar1", "cifar10"),
    "digits_unconditional --workdir {unconditional} --train.ema 0.9": ("ema", "0.9", "0.1"),
    "digits_unconditional --workdir {unconditional} --network.channels 32": (
        "channels", "32", "4",
    ),
    "digits_unconditional --workdir {unconditional} --diffusion.T 500": (
        "diffusion.T", "500", "1000",
    ),
    "digits --workdir {unconditional}": ("data.conditions", "label"),
}  # fmt: skip


@pytest.fixture
def few_places(tmp_path, data_dir, unconditional_run):
    (tmp_path / "file").write_text("")
    (tmp_path / "file.py").write_text("config = 3")
    (tmp_path / "broken" / "checkpoints" / "30").mkdir(parents=True)
    places = {"tmp": tmp_path, "data": data_dir, "unconditional": unconditional_run}
    return places | {"broken": tmp_path / "broken", "file": tmp_path / "file"}


@pytest.mark.parametrize("command", BAD)
def test_mistakes(command, few_places, capsys):
    words = command
    if "unconditional}" in command:  # all other options as the run has them
        same = (*TINY, *QUIET, "--train.steps=3")
        words += " " + " ".join(o for o in same if o.split("=")[0] not in command)
        words += "" if "ema" in command else " --train.ema 0.9 0.1"
    if "--workdir" in command and "extra" not in command:
        words += " --data.dir {data}"  # of the suite, where the command gets as far as the data
    check_mistake(main, f"train {words}", BAD[command], capsys, **few_places)
    names = sorted(path.name for path in few_places["tmp"].iterdir())
    assert names == ["broken", "file", "file.py"]


# ------------------------------------------------------------------------------- resuming


@pytest.fixture
def own_run(unconditional_run, tmp_path):
    """A copy of the run of three steps, whose options are not those of its configuration."""
    return Path(shutil.copytree(unconditional_run, tmp_path / "run"))


def parse(*words):
    return train_command.parse("diffjax train", [str(word) for word in words])


def test_a_run_resumes_from_its_folder(own_run):
    """Its stored configuration is the default of every option."""
    stored = load_model(own_run).info.config
    assert parse("--resume", own_run).experiment == stored
    changed = parse(f"--resume={own_run}", "--train.steps", 5, "--train.ema", 0.9, 0.2)
    train = dataclasses.replace(stored.train, steps=5, ema=(0.9, 0.2))
    assert changed.experiment == dataclasses.replace(stored, train=train)
    assert changed.workdir == str(own_run)
    main(["train", "--resume", str(own_run), "--train.steps", "4", "--train.log-every", "1"])
    assert [line["step"] for line in metrics(own_run) if "loss" in line][-1] == 4
    assert load_model(own_run).info.config.train.ema == (0.9, 0.1)
    assert load_model(own_run).step == 4


def test_resume_reads_past_damage(own_run):
    """The defaults are those of the latest checkpoint that can be read."""
    stored = load_model(own_run).info.config
    (own_run / "checkpoints" / "9" / "config").mkdir(parents=True)
    (own_run / "checkpoints" / "9" / "config" / "metadata").write_text('{"config": {}}')
    assert parse("--resume", own_run).experiment == stored


def test_forgotten_options_are_told(own_run, capsys):
    """An option that the run has otherwise is refused unless it is named."""
    words = f"train digits_unconditional --workdir {own_run} {' '.join(TINY)} {' '.join(QUIET)}"
    words += " --train.steps 5"
    before = sorted(own_run.rglob("*"))
    names = ("train.ema", "0.999", "0.9", "--resume", str(own_run))
    check_mistake(main, words, names, capsys)
    check_mistake(main, f"train digits --workdir {own_run}", ("data.conditions", "label"), capsys)
    assert sorted(own_run.rglob("*")) == before


def test_named_options_change_a_run(own_run):
    """Also to the values that are the configuration's own."""
    stored = load_model(own_run).info.config
    words = ["--workdir", own_run, *TINY, "--train.batch=64", "--train.preview_every", 0]
    options = parse("digits_unconditional", *words, "--data.no-flip", "--train.ema", 0.5, 0.1)
    assert {"train.batch", "train.preview_every", "data.flip", "train.ema"} <= {*options.named}
    left = forgotten_changes(stored, options.experiment, options.named)
    assert {text.split()[0] for text in left} == {"train.steps", "train.eval_every", "data.dir"}


RESUME_MISTAKES = {
    "--resume": "--resume",
    "--resume --train.steps 5": "--resume",
    "--resume {tmp}/gone": "{tmp}/gone",
    "--resume {broken}": "{broken}/checkpoints/30",
    "{unconditional} --train.steps 5": ("{unconditional}", "--resume"),
    "digits --resume {unconditional}": ("CONFIG", "digits", "--resume"),
    "--resume {unconditional} --workdir {tmp}/x": ("--workdir", "{tmp}/x"),
    "--resume {unconditional} --network.channels 8": ("network.channels", "8", "4"),
    "--resume {unconditional} --diffusion.prediction v": ("diffusion.prediction", "v", "eps"),
    "--resume {unconditional} --data.pad 2": ("data.pad", "2", "0"),
    "--resume {unconditional} --data.conditions label": ("data.conditions", "label"),
    "--resume {unconditional} --train.stepz 8": ("train.stepz", "train.steps"),
    "--resume {unconditional} --train.ema 0.9": ("train.ema", "0.9", "0.1"),
}


@pytest.mark.parametrize("command", RESUME_MISTAKES)
def test_mistakes_in_resuming(command, few_places, capsys):
    check_mistake(main, f"train {command}", RESUME_MISTAKES[command], capsys, **few_places)


def test_students_are_not_trained(tmp_path, capsys):
    """They have a teacher, which only their own command knows."""
    config = Config(distillation=Distillation("progressive", "a teacher", 4, 2, 1.0))
    checkpoints = Checkpoints(tmp_path)
    info = ModelInfo(config, (8, 8, 1), UNCONDITIONAL).to_dict()
    checkpoints.save(1, {"params": {"a": np.zeros(1)}}, info)
    checkpoints.close()
    for words in (f"train --resume {tmp_path}", f"train digits --workdir {tmp_path}"):
        check_mistake(main, words, (str(tmp_path), "a teacher"), capsys)
