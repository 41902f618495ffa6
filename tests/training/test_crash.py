"""Kills at any moment, signals, damaged files, full disks, several processes: real processes."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from functools import partial

import jax
import numpy as np
import pytest
from helpers import QUICK, QUIET, ROOT, TINY, check_told, free_port, lines_of, naming, of_steps
from PIL import Image

from diffjax.build import ModelInfo
from diffjax.checkpoint import Checkpoints
from diffjax.cli import main
from diffjax.inference.model import describe_weights, load_model
from diffjax.training.averages import make_average
from diffjax.training.state import state_to_trees
from diffjax.training.trainer import resume

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("KILLS", "3"))  # `make crash` asks for more
STEPS = 12 + 4 * KILLS
COSINE = ["--diffusion.schedule", "cosine", "--diffusion.T", 20]
LOGGED = [*QUIET, *COSINE, "--train.log-every", 1]
SHORT = [*TINY, *LOGGED]


def steps_of(folder):
    names = [path.name for path in (folder / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdecimal())


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name != "steps_per_second"}
        for line in lines
    ]


def assert_same_params(folder, expected):
    for weights in ("raw", "ema"):
        pair = [load_model(each, weights=weights).params for each in (folder, expected)]
        jax.tree.map(np.testing.assert_array_equal, *pair)


def assert_same_run(folder, expected):
    assert_same_params(folder, expected)
    assert metrics(folder) == metrics(expected)


@pytest.fixture(scope="module")
def arguments():
    return ["train.py", "digits", *SHORT, "--train.save-every", 1, "--train.steps", STEPS]


@pytest.fixture(scope="module")
def uninterrupted(run_program, arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("crash") / "uninterrupted"
    code, _, err = run_program(*arguments, "--workdir", folder, flags=QUICK)
    assert code == 0, err
    return folder


@pytest.fixture(scope="module")
def killed(uninterrupted, program, run_program, arguments):
    """A run that was killed KILLS times, every other time during a save, and then left to end."""
    folder, chance = uninterrupted.parent / "killed", random.Random(0)
    for kill in range(KILLS):
        before = max(steps_of(folder), default=0)
        process = program(*arguments, "--workdir", folder, flags=QUICK)
        if kill % 3 == 2:  # at any moment of the start
            time.sleep(chance.uniform(0, 4))
        else:
            seen = []
            while process.poll() is None and len(seen) < 2:
                if max(steps_of(folder), default=0) > before + len(seen):
                    seen.append(time.monotonic())
            if kill % 2:  # at any moment between two saves
                time.sleep(chance.uniform(0, 1) * (seen[1] - seen[0]))
            else:
                while process.poll() is None and not list((folder / "checkpoints").glob("*tmp*")):
                    pass
        process.send_signal(signal.SIGKILL)
        out, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, err  # it was still training
        if kill % 3 != 2:  # what it leaves is taken over
            holder = json.loads((folder / "lock").read_text())
            assert holder["process"] == process.pid
        if out:
            assert re.search(of_steps(folder, before, STEPS), out)  # no checkpoint was lost
        assert not (folder / "damaged").exists()
    before = max(steps_of(folder))
    code, out, err = run_program(*arguments, "--workdir", folder, flags=QUICK)
    assert code == 0, err
    assert re.search(of_steps(folder, before, STEPS), out)
    return folder


def test_kills_leave_no_trace(killed, uninterrupted):
    """Parameters, averages and metrics are the same bit for bit.

    No checkpoint is lost, and nothing is left of saves that were cut short.
    """
    assert_same_run(killed, uninterrupted)
    assert steps_of(killed) == [STEPS - 2, STEPS - 1, STEPS]
    assert sorted(path.name for path in killed.iterdir()) == [
        "checkpoints",
        "curve.png",
        "metrics.jsonl",
    ]
    assert len(list((killed / "checkpoints").iterdir())) == 3


# Where one array cannot be read, Orbax leaves the reads of others under way, and they find its
# event loop closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_checkpoints_are_quarantined(killed, uninterrupted, run_program, arguments):
    last, before = killed / "checkpoints" / str(STEPS), killed / "checkpoints" / str(STEPS - 1)
    for payload in (last / "params").rglob("d/*"):
        content = bytearray(payload.read_bytes())
        content[len(content) // 2] ^= 1
        payload.write_bytes(content)
    shutil.rmtree(before / "ema")
    with pytest.raises(ValueError, match=naming(last)):
        load_model(killed, weights="raw")
    code, out, err = run_program(*arguments, "--workdir", killed, flags=QUICK)
    assert code == 0, err
    for step in (STEPS, STEPS - 1):
        aside = killed / "damaged" / str(step)
        assert aside.is_dir()
        assert any(re.search(naming(step, aside, STEPS - 2), line) for line in out.splitlines())
    assert "Traceback" not in err
    assert_same_run(killed, uninterrupted)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # as above
def test_without_a_whole_checkpoint_nothing_is_touched(killed, tmp_path, run_program, arguments):
    shutil.copytree(killed, tmp_path / "run")
    for step in steps_of(tmp_path / "run"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step) / "rest")
    code, _, err = run_program(
        *arguments, "--workdir", tmp_path / "run", "--train.steps", STEPS + 1, flags=QUICK
    )
    check_told(code, err, str(tmp_path / "run" / "checkpoints" / str(STEPS)))
    assert steps_of(tmp_path / "run") == steps_of(killed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_resumes_after_a_signal(number, code, program, tmp_path):
    arguments = ["train.py", "digits", *SHORT, "--train.save-every", 5, "--workdir", tmp_path]
    process = program(*arguments, "--train.steps", 100_000, flags=QUICK)
    while process.poll() is None and not (tmp_path / "checkpoints" / "5").exists():
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == code, err
    (said,) = lines_of(err)
    assert "Traceback" not in err
    assert re.search(naming(load_model(tmp_path).step), said)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of two megabytes."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_full_disk_leaves_the_last_checkpoint(small_disk, run_program):
    arguments = ["train.py", "digits", *SHORT, "--workdir", small_disk / "run"]
    arguments += ["--train.save-every", 2, "--train.keep", 1]
    code, _, err = run_program(*arguments, "--train.steps", 2, flags=QUICK)
    assert code == 0, err
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    # Room for metrics, and for the start of a checkpoint.
    os.truncate(filler, filler.stat().st_size - 16384)
    code, _, err = run_program(*arguments, "--train.steps", 40, flags=QUICK)
    check_told(code, err, str(small_disk / "run" / "checkpoints"), after_progress=True)
    filler.unlink()
    assert load_model(small_disk / "run").step == 2
    code, out, err = run_program(*arguments, "--train.steps", 4, flags=QUICK)
    assert code == 0, err
    assert re.search(of_steps(small_disk / "run", 2, 4), out)


# ------------------------------------------------------------------------------- processes

CONSTANT = ["--train.decay", "none", "--train.warmup", 2]
SMALL_DIGITS = ROOT / "tests" / "plugin" / "small_digits.py"


def two_processes(program, name, *arguments):
    """Two processes of four devices each that run one command."""
    flags = f"{QUICK} --xla_force_host_platform_device_count=4"
    together = ["--distributed", f"localhost:{free_port()}", "--processes", 2]
    return [program(name, *arguments, *together, "--process", i, flags=flags) for i in range(2)]


def outputs_of(processes):
    """The (stdout, stderr) of two processes that must succeed; only the first one reports."""
    outputs = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "8 x cpu" in outputs[0][0]
    assert "8 x cpu" not in outputs[1][0]


def assert_trained_as(folder, expected):
    """Losses and parameters are the same to the rounding of sums over devices."""
    for ours, theirs in zip(metrics(folder), metrics(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    one, two = (load_model(each, weights="raw").params for each in (folder, expected))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=2e-6), one, two)


def test_two_processes_train_as_one(program, data_dir, tmp_path):
    """Four devices each, under shard_map, and from its checkpoint on under pmap.

    Every step is saved twice at once: a checkpoint, and the averages of a length chosen afterwards.
    """
    arguments = ["--train.save-every", 1, "--train.power-ema", 0.1, "--workdir"]
    for steps, mode in ((3, "shard_map"), (6, "pmap")):
        options = [
            "--train.steps",
            steps,
            "--train.parallel",
            mode,
            "--train.preview-every",
            steps - 3,
        ]
        command = [SMALL_DIGITS, *LOGGED, *CONSTANT, *arguments, tmp_path / "two", *options]
        outputs_of(two_processes(program, "train.py", *command))
    alone = [SMALL_DIGITS, *LOGGED, *CONSTANT, *arguments, tmp_path / "one", "--train.steps", 6]
    main(["train", *map(str, alone), "--data.dir", str(data_dir)])
    assert_trained_as(tmp_path / "two", tmp_path / "one")
    assert [line["step"] for line in metrics(tmp_path / "two")] == [1, 2, 3, 4, 5, 6]
    averages = [make_average(tmp_path / name, 0.12) for name in ("two", "one")]
    assert [average.stored for average in averages] == [6, 6]
    params = [average.params for average in averages]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=2e-6), *params)
    previews = (tmp_path / "two" / "previews").iterdir()
    assert [path.name for path in previews] == ["0000006.png"]


def test_processes_agree_on_a_signal(program, uninterrupted, tmp_path):
    """Both save the same step and end.

    They agree by the number of the call, which is far from the step in a run that was resumed, and
    are asked about saves at every step.
    """
    far, checkpoints = 1_000_000, Checkpoints(uninterrupted)
    info = ModelInfo.from_dict(checkpoints.config(STEPS))
    state = resume(checkpoints, info.config).state
    moved = Checkpoints(tmp_path)
    moved.save(far, state_to_trees(state._replace(step=np.int32(far))), info.to_dict())
    moved.close()
    options = ["--train.save-every", 1, "--train.steps", 2 * far, "--workdir", tmp_path]
    processes = two_processes(program, "train.py", "digits", *SHORT, *CONSTANT, *options)
    try:
        while all(p.poll() is None for p in processes) and max(steps_of(tmp_path)) < far + 3:
            time.sleep(0.01)
        processes[1].send_signal(signal.SIGTERM)
        errors = [process.communicate(timeout=100)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [143, 143], errors
    last = [lines_of(err)[-1] for err in errors]
    assert all(re.search(naming(max(steps_of(tmp_path))), line) for line in last)
    assert load_model(tmp_path).step == max(steps_of(tmp_path)) < 2 * far


# ------------------------------------------------------------------------------- distillation


def test_a_killed_chain_ends_as_if_never_interrupted(teacher_run, program, run_program, tmp_path):
    """Guidance and two halvings, killed in the middle of the first halving."""
    command = ["distill", teacher_run, "--start", 4, "--guidance", 2, "--train.steps", 6, *QUIET]
    command += ["--train.save-every", 1, "--workdir"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, out, err = run_program(*command, whole, flags=QUICK)
    assert code == 0, err
    for name, steps in (("any", 6), ("2", 12), ("1", 12)):
        assert re.search(of_steps(whole / name, 0, steps), out)
    process = program(*command, killed, flags=QUICK)
    while process.poll() is None and not (killed / "2" / "checkpoints" / "3").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "1").exists()
    code, out, err = run_program(*command, killed, flags=QUICK)
    assert code == 0, err
    assert not re.search(of_steps(killed / "any", 0, 6), out)  # it was done already
    assert re.search(rf"{re.escape(str(killed / 'any'))}\D+\b6\b", out)
    assert int(re.search(of_steps(killed / "2", r"(\d+)", 12), out)[1]) >= 3
    for name in ("any", "2", "1"):
        assert_same_params(killed / name, whole / name)
    teachers = [load_model(whole / name).info.config.distillation.teacher for name in ("2", "1")]
    models = [load_model(whole / name) for name in ("any", "2")]
    assert teachers == [f"{model.name}, {describe_weights(model)}" for model in models]
    # Another chain is not resumed there.
    command[command.index("--guidance") + 1] = 3
    code, _, err = run_program(*command, whole, flags=QUICK)
    check_told(code, err, ("guidance", "2", "3"))


def test_two_processes_distill_as_one(teacher_run, program, data_dir, tmp_path):
    """Four devices each: guidance in one evaluation and, from it, consistency, with previews."""
    command = [teacher_run, "--method", "consistency", "--start", 4, "--guidance", 2, *QUIET]
    command += ["--train.steps", 2, "--train.preview-every", 2, "--data.dir", data_dir, "--workdir"]
    outputs_of(two_processes(program, "distill", *command, tmp_path / "two"))
    main(["distill", *map(str, command), str(tmp_path / "one")])
    for name in ("any", "consistency"):
        folders = [tmp_path / processes / name for processes in ("one", "two")]
        assert_trained_as(*folders)
        pictures = [Image.open(folder / "previews" / "0000002.png") for folder in folders]
        assert np.abs(np.subtract(*(np.asarray(picture, int) for picture in pictures))).max() <= 2
