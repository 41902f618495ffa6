import pytest

from diffjax import bench, experiment


def test_the_figures_are_measured_and_printed(capsys, monkeypatch):
    """Small: times are not what is tested, but that each is there; and what does not depend on the machine is right."""
    monkeypatch.setattr(bench, "ROWS", 20)
    tiny = experiment.Config(network=experiment.Network(channels=4, multipliers=(1,), blocks=1, attention=()))
    monkeypatch.setattr(experiment, "named", lambda name: tiny)
    bench.main(["sampler", "--pairs", "1"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[4:]]
    figures = {what: figure for what, figure, _ in rows}
    assert len(figures) == 10
    assert figures["compilations of 12 plans of 11 samplers"] == "4"
    assert float(figures["DDIM-50 / 50 forwards"]) > 0
    assert any("forward, digits network" in what for what in figures)


def test_every_kind_of_guidance_is_timed_with_its_evaluations(capsys, monkeypatch):
    tiny = experiment.Config(network=experiment.Network(channels=4, multipliers=(1,), blocks=1, attention=()))
    monkeypatch.setattr(experiment, "named", lambda name: tiny)
    bench.main(["guidance", "--pairs", "1"])
    lines = capsys.readouterr().out.splitlines()[4:]
    nfe = {cells[1].strip(): int(cells[2]) for cells in (line.split("|") for line in lines)}
    assert nfe.pop("plain conditional") == 20
    inside = next(name for name in nfe if "rows" in name)
    assert 20 < nfe.pop(inside) < 40
    assert len(nfe) == 8
    assert set(nfe.values()) == {40}


def test_comparisons_take_turns():
    calls = []
    found = bench.compare(lambda: calls.append("a"), lambda: calls.append("b"), 3)
    assert calls == ["a", "b"] * 4
    assert found.ratio > 0


def test_bad_input_is_named(capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(["sampler", "--pairs", "0"])
    assert end.value.code == 2
    assert "--pairs is 0: measure once or more" in capsys.readouterr().err
