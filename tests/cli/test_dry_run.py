"""`diffjax dry-run`: tables, what does not fit, and mistakes."""

import importlib.util
import sys

import pytest
from helpers import check_mistake, check_told
from PIL import Image

from diffjax.bench import dry_run
from diffjax.cli import dry_run as cli_dry_run
from diffjax.cli import main

SMALL = "--network.channels=8 --network.multipliers=1 --network.attention --train.batch=16"
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


def test_table(tmp_path, monkeypatch, capsys):
    """It prints a table and leaves nothing."""
    monkeypatch.chdir(tmp_path)
    main(["dry-run", "digits", "--target", "cpu", *SMALL.split()])
    out = capsys.readouterr().out
    assert all(cell in out for cell in ("8 x cpu", "guided DDIM, a row", "all-reduce"))
    assert list(tmp_path.iterdir()) == []


def test_does_not_fit(monkeypatch, capsys):
    """The real programs, on devices of too little memory: the message has remedies."""
    monkeypatch.setattr(dry_run, "memory_limit", lambda device, count: 2.0**17)
    with pytest.raises(SystemExit) as end:
        main(["dry-run", "digits", "--target", "cpu", *SMALL.split()])
    out, err = capsys.readouterr()
    check_told(end.value.code, err, ("0.00", "network.remat"))
    assert "| no" in out


ABORT = (
    "import os, sys; sys.stderr.write('F0000 Check failed: topology\\n*** stack ***\\n');"
    " sys.stderr.flush(); os.abort()"
)
ENDS = {
    "aborts": (ABORT, ("v5e:2x2", "SIGABRT")),
    "divides by zero": ("import os; os.kill(os.getpid(), 8)", ("v5e:2x2", "SIGFPE")),
    "fails": (
        "raise RuntimeError('no such chip')",
        ("v5e:2x2", "1", "RuntimeError", "no such chip"),
    ),
    "refuses": (
        "import sys; sys.stderr.write('WARNING: x\\ndiffjax dry-run: batch is 7\\n'); sys.exit(2)",
        ("batch", "7"),
    ),
}


@pytest.fixture
def with_libtpu(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: "here" if name == "libtpu" else find(name)
    )


@pytest.mark.parametrize("end", ENDS)
def test_ends_of_the_compiler(end, with_libtpu, monkeypatch, capsys):
    """It runs in a process of its own: whatever ends it is one sentence."""
    script, names = ENDS[end]
    monkeypatch.setattr(cli_dry_run, "PROGRAM", (sys.executable, "-c", script))
    check_mistake(main, "dry-run digits --target v5e:2x2", names, capsys)


def test_what_the_compiler_prints(with_libtpu, monkeypatch, capsys):
    """It gets the words of the command, and its output is that of the command."""
    script = "import os, sys; print(*sys.argv[1:], os.environ['DIFFJAX_DRY_RUN_CHILD'])"
    monkeypatch.setattr(cli_dry_run, "PROGRAM", (sys.executable, "-c", script))
    main(["dry-run", "digits", "--target", "v5e:2x2", "--train.batch", "8"])
    assert capsys.readouterr().out == "digits --target v5e:2x2 --train.batch 8 1\n"


BAD = {
    "digits --target=": ("target", "cpu", "v5e:2x2"),
    "digits --target v5e:64x64": ("v5e:64x64", "4096", "256"),
    "digits --target v5e:32x16": ("v5e:32x16", "512", "256"),
    "digits --target v5e:0x4": ("v5e:0x4", "0", "256"),
    "digits --target v5e:2x2x2": ("v5e:2x2x2", "2", "v5e:2x2"),
    "digits --target v4:2x2x2x2": ("v4:2x2x2x2", "3", "v4:2x2x2"),
    "digits --target v4:32x32x32": ("v4:32x32x32", "32768", "4096"),
    "digits --target v2": ("v2", "2", "v2:2x2"),
    "digits --target v5e:4": ("v5e:4", "2", "v5e:2x2"),
    "digits --target v5e:axb": ("v5e:axb", "2", "v5e:2x2"),
    "digits --target v5e:2x2": ("v5e:2x2", "libtpu", "diffjax[pod]"),
    "digits --target gpu": ("gpu", "libtpu"),
    "digits": "target",
    "digits --target": "target",
    "digits --target cpu --train.batch 12": ("batch", "12", "8"),
    "digits --target cpu --train.accumulate 3": ("batch", "64", "8", "3", "24"),
    "digits --target cpu --network.attention 5": ("attention", "5", "8", "4"),
    "digits --target cpu --classes 10": ("classes", "10", "x-shape"),
    "digits --target cpu --x-shape 8,8 --classes 10": ("x_shape", "8,8"),
    "digits --target cpu --x-shape 8,0,1 --classes 10": ("x_shape", "8,0,1"),
    "digits --target cpu --x-shape 8,8,1": ("classes", "label"),
    "digits --target cpu --x-shape 8,8,1 --classes 0": ("classes", "0"),
    "digits --target cpu --x-shape 8,8,1 --classes 3 --data.conditions": ("classes", "3"),
    "digits --target cpu --x-shape 8,8,1 --classes 3 --data.conditions a": ("conditions", "a"),
    "digits --target cpu --data.name cifar1": ("cifar1", "cifar10"),
    "digits --target cpu --data.pad=-1": ("pad", "-1"),
    "digits --target cpu --data.size 0": ("data.size", "0"),
    "digits --target cpu --data.path {tmp}": ("data.path", "folder", "npz"),
    "digits --target cpu --data.source npz": ("data.path", "npz"),
    "digits --target cpu --data.source npz --data.path {tmp}/no.npz": "{tmp}/no.npz",
    "digits --target cpu --data.source npz --data.path {tmp}/text.npz": "{tmp}/text.npz",
    "digits --target cpu --data.source zip": ("data.source", "zip"),
    "folder --target cpu --data.path {tmp}/none": "{tmp}/none",
    "folder --target cpu --data.path {tmp}/empty": "{tmp}/empty",
    "folder --target cpu --data.path {tmp}/flat": ("conditions", "label"),
    "folder --target cpu --data.path {tmp}/flat --data.size 20 --data.conditions": (
        "multipliers", "20x20", "8",
    ),
}  # fmt: skip


@pytest.fixture
def places(tmp_path):
    for name in ("empty", "flat"):
        (tmp_path / name).mkdir()
    (tmp_path / "text.npz").write_text("x, y")
    for i in range(90):  # a tenth is held out, one for each device
        Image.new("RGB", (9, 9), (i, i, i)).save(tmp_path / "flat" / f"{i:02}.png")
    return {"tmp": tmp_path}


@pytest.mark.parametrize("command", BAD)
def test_mistakes(command, places, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name)
    )
    check_mistake(main, f"dry-run {command}", BAD[command], capsys, **places)


@needs_libtpu
def test_tpu_without_the_memory(capsys):
    options = "--train.batch 65536 --train.parallel shard_map --data.pad 28 --network.channels=16"
    options += " --network.multipliers=1 --network.attention --network.no-middle-attention"
    with pytest.raises(SystemExit) as end:
        main(["dry-run", "digits", "--target", "v5e:2x2", *options.split(), "--network.heads=1"])
    names = ("15.75", "network.remat", "train.accumulate", "4", "train.batch", "16384")
    check_told(end.value.code, capsys.readouterr().err, names)


@needs_libtpu
@pytest.mark.parametrize("target", ["v5e:3x5", "v9:2x2", "tpu"])
def test_tpu_that_does_not_exist(target, capsys):
    check_mistake(main, f"dry-run digits --target {target}", (target, "cpu"), capsys)
