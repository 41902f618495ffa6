from diffjax.bench import guidance


def test_every_kind_is_timed_with_its_evaluations(tiny):
    lines = guidance.bench_guidance(1).splitlines()[4:]
    nfe = {cells[1].strip(): int(cells[2]) for cells in (line.split("|") for line in lines)}
    assert nfe.pop("plain conditional") == 20
    inside = next(name for name in nfe if "rows" in name)
    assert 20 < nfe.pop(inside) < 40
    assert len(nfe) == 8
    assert set(nfe.values()) == {40}
