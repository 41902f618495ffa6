"""`diffjax bench`: what it prints and refuses; the measurements have tests of their own."""

import pytest
from helpers import check_mistake

from diffjax.cli import bench, main


@pytest.mark.parametrize("name", ["sampler", "guidance"])
def test_prints_the_report(name, monkeypatch, capsys):
    monkeypatch.setattr(bench, f"bench_{name}", lambda pairs: f"{name} in {pairs} pairs")
    main(["bench", name, "--pairs", "2"])
    assert capsys.readouterr().out == f"{name} in 2 pairs\n"


def test_report(tmp_path, monkeypatch, capsys):
    """It is printed as wide as a terminal, and written as it is."""
    table = f"| a | b |\n|---|---|\n| {'x ' * 70}| 1 |\n| y | 2 |"
    monkeypatch.setattr(bench, "bench_sampler", lambda pairs: table)
    main(["bench", "sampler", "--report", str(tmp_path / "a.md")])
    assert (tmp_path / "a.md").read_text() == f"{table}\n"
    out = capsys.readouterr().out
    assert max(map(len, out.replace(str(tmp_path), "").splitlines())) <= 120
    assert (out.count("x"), out.count("|")) == (70, 0)


@pytest.mark.parametrize(("options", "repeats"), [([], 15), (["--quick"], 3)])
def test_networks(options, repeats, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(bench, "bench_networks", lambda *args: calls.append(args) or "a table")
    main(["bench", "networks", "--out", str(tmp_path), *options])
    assert calls == [(tmp_path / "bench.json", bool(options), repeats)]
    assert capsys.readouterr().out == "a table\n"


def test_training(monkeypatch, capsys):
    monkeypatch.setattr(bench, "trainers", lambda npz: [npz])
    monkeypatch.setattr(bench, "bench_training", lambda made, pairs: f"{made} {pairs}")
    main(["bench", "training"])
    assert capsys.readouterr().out == "[None] 15\n"


BAD = {
    "sampler --pairs 0": ("pairs", "0"),
    "sampler --npz x.npz": "npz",
    "training --npz {tmp}/gone.npz": "{tmp}/gone.npz",
    "networks --out {tmp}/file": "{tmp}/file",
    "guidance --report {tmp}/file/a.md": "{tmp}/file/a.md",
    "training --report {tmp}/a.csv": ("{tmp}/a.csv", ".md"),
    "sampling": ("sampling", "sampler"),
}


@pytest.mark.parametrize("command", BAD)
def test_mistakes(command, tmp_path, capsys, in_suite_data):
    (tmp_path / "file").write_text("")
    # The data of digits are prepared first, if they are not there.
    check_mistake(main, f"bench {command}", BAD[command], capsys, True, tmp=tmp_path)
