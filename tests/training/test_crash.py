"""What may befall a run: kills at any moment, signals, damaged files, full disks, several hosts. Real processes."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from helpers import QUICK, QUIET, TINY, check_told, free_port, lines_of, naming, of_steps

from diffjax.checkpoint import Checkpoints
from diffjax.cli import train
from diffjax.devices.parallel import device_mesh
from diffjax.inference.pipeline import ModelInfo, load_model

KILLS = int(os.environ.get("KILLS", "5"))  # `make crash` asks for more
STEPS = 12 + 4 * KILLS
SHORT = [
    *TINY,
    *QUIET,
    "--diffusion.schedule",
    "cosine",
    "--diffusion.T",
    20,
    "--train.log-every",
    1,
]


def steps_of(folder):
    names = [path.name for path in (folder / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdecimal())


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name != "steps_per_second"}
        for line in lines
    ]


def assert_same_run(folder, expected):
    for weights in ("raw", "ema"):
        jax.tree.map(
            np.testing.assert_array_equal,
            *(load_model(f, weights=weights).params for f in (folder, expected)),
        )
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
    """Killed KILLS times, every other time at the sight of a save under way, then left to end."""
    folder, chance = uninterrupted.parent / "killed", random.Random(0)
    for kill in range(KILLS):
        before = max(steps_of(folder), default=0)
        process = program(*arguments, "--workdir", folder, flags=QUICK)
        if kill % 5 == 4:  # at any moment of the start
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
        if out:
            assert re.search(of_steps(folder, before, STEPS), out)  # no checkpoint was lost
        assert not (folder / "damaged").exists()
    before = max(steps_of(folder))
    code, out, err = run_program(*arguments, "--workdir", folder, flags=QUICK)
    assert code == 0, err
    assert re.search(of_steps(folder, before, STEPS), out)
    return folder


def test_killed_again_and_again_a_run_ends_as_if_never_interrupted(killed, uninterrupted):
    """Parameters, averages and metrics bit for bit; no checkpoint lost, nothing left of saves that were cut short."""
    assert_same_run(killed, uninterrupted)
    assert steps_of(killed) == [STEPS - 2, STEPS - 1, STEPS]
    assert sorted(path.name for path in killed.iterdir()) == [
        "checkpoints",
        "curve.png",
        "metrics.jsonl",
    ]
    assert len(list((killed / "checkpoints").iterdir())) == 3


# Where one array cannot be read, Orbax leaves the reads of others under way, and they find its event loop closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    killed, uninterrupted, run_program, arguments
):
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
def test_where_no_checkpoint_is_whole_nothing_is_touched(killed, tmp_path, run_program, arguments):
    shutil.copytree(killed, tmp_path / "run")
    for step in steps_of(tmp_path / "run"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step) / "rest")
    code, _, err = run_program(
        *arguments, "--workdir", tmp_path / "run", "--train.steps", STEPS + 1, flags=QUICK
    )
    check_told(code, err, str(tmp_path / "run" / "checkpoints" / str(STEPS)))
    assert steps_of(tmp_path / "run") == steps_of(killed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_run_that_goes_on(number, code, program, tmp_path):
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
    """A folder of two megabytes."""
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path], capture_output=True
    ).returncode:
        pytest.skip("only root can mount a small disk")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_full_disk_is_named_and_leaves_the_last_checkpoint(small_disk, run_program):
    arguments = [
        "train.py",
        "digits",
        *SHORT,
        "--train.save-every",
        2,
        "--train.keep",
        1,
        "--workdir",
        small_disk / "run",
    ]
    code, _, err = run_program(*arguments, "--train.steps", 2, flags=QUICK)
    assert code == 0, err
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(
        filler, filler.stat().st_size - 16384
    )  # room for metrics, and for the start of a checkpoint
    code, _, err = run_program(*arguments, "--train.steps", 40, flags=QUICK)
    check_told(code, err, str(small_disk / "run" / "checkpoints"), after_progress=True)
    filler.unlink()
    assert load_model(small_disk / "run").step == 2
    code, out, err = run_program(*arguments, "--train.steps", 4, flags=QUICK)
    assert code == 0, err
    assert re.search(of_steps(small_disk / "run", 2, 4), out)


HOSTS = ["digits", *SHORT, "--train.decay", "none", "--train.warmup", 2]


def two_hosts(program, *arguments):
    """Two processes of four devices each, which train one run."""
    flags = f"{QUICK} --xla_force_host_platform_device_count=4"
    together = ["--distributed", f"localhost:{free_port()}", "--processes", 2]
    return [
        program("train.py", *HOSTS, *arguments, *together, "--process", i, flags=flags)
        for i in range(2)
    ]


def test_two_processes_of_four_devices_train_what_one_of_eight_does(program, data_dir, tmp_path):
    """Under shard_map, and from its checkpoint on under pmap."""
    arguments = ["--train.save-every", 3, "--workdir"]
    for steps, mode in ((3, "shard_map"), (6, "pmap")):
        options = ["--train.steps", steps, "--parallel", mode, "--train.preview-every", steps - 3]
        hosts = two_hosts(program, *arguments, tmp_path / "two", *options)
        told = [host.communicate(timeout=400) for host in hosts]
        assert [host.returncode for host in hosts] == [0, 0], told
        assert "8 x cpu" in told[0][0]
        assert "8 x cpu" not in told[1][0]  # only the first host speaks
    alone = [*HOSTS, *arguments, tmp_path / "one", "--train.steps", 6, "--data.dir", data_dir]
    train.main([*map(str, alone)])
    one, two = (load_model(tmp_path / name, weights="raw").params for name in ("one", "two"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), one, two)
    assert [line["step"] for line in metrics(tmp_path / "two")] == [1, 2, 3, 4, 5, 6]
    for ours, theirs in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert sorted(path.name for path in (tmp_path / "two" / "previews").iterdir()) == [
        "0000006.png"
    ]


def test_a_signal_to_one_host_is_agreed_on_by_all(program, uninterrupted, tmp_path):
    """Both save the same step and end. What they agree by, the number of the call, is far from the number of the step
    in a run that goes on, and saves are asked about at every step."""
    far, checkpoints = 1_000_000, Checkpoints(uninterrupted)
    description = ModelInfo.from_dict(checkpoints.config(STEPS))
    state = train.resume(checkpoints, description.config, device_mesh()).state
    moved = Checkpoints(tmp_path)
    moved.save(state._replace(step=np.int32(far)), description.to_dict())
    moved.close()
    hosts = two_hosts(
        program, "--train.save-every", 1, "--train.steps", 2 * far, "--workdir", tmp_path
    )
    try:
        while all(host.poll() is None for host in hosts) and max(steps_of(tmp_path)) < far + 3:
            time.sleep(0.01)
        hosts[1].send_signal(signal.SIGTERM)
        told = [lines_of(host.communicate(timeout=100)[1])[-1] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [143, 143], told
    assert all(re.search(naming(max(steps_of(tmp_path))), said) for said in told)
    assert load_model(tmp_path).step == max(steps_of(tmp_path)) < 2 * far


def test_hosts_that_cannot_be_found_are_asked_for(run_program, tmp_path):
    code, _, err = run_program(
        "train.py", "digits", "--workdir", tmp_path / "x", "--distributed", "auto", flags=QUICK
    )
    check_told(code, err, ("distributed", "auto", "HOST:PORT", "processes", "process"))
