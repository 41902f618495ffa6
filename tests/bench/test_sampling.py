from diffjax.bench import sampling


def test_figures_are_measured(tiny, monkeypatch):
    monkeypatch.setattr(sampling, "ROWS", 20)
    lines = sampling.bench_sampler(1).splitlines()[4:]
    figures = dict([cell.strip() for cell in line.split("|")[1:3]] for line in lines)
    assert len(figures) == 10
    assert figures["compilations of 12 plans of 11 samplers"] == "4"
    assert float(figures["DDIM-50 / 50 forwards"]) > 0
    assert any("forward, digits network" in what for what in figures)
