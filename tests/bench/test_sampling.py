from diffjax.bench import sampling
from diffjax.bench.timing import Comparison


def test_figures_are_measured(tiny, monkeypatch):
    monkeypatch.setattr(sampling, "ROWS", 20)
    lines = sampling.bench_sampler(1).splitlines()[4:]
    figures = dict([cell.strip() for cell in line.split("|")[1:3]] for line in lines)
    assert len(figures) == 10
    assert figures["compilations of 12 plans of 11 samplers"] == "4"
    assert float(figures["DDIM-50 / 50 forwards"]) > 0
    assert any("forward, digits network" in what for what in figures)


def test_both_sides_of_the_comparison_are_images(tiny, monkeypatch):
    """The bench waits for the last image, not for what stands beside it."""
    shapes = []

    def compare(first, second, pairs):
        shapes.append([getattr(run(), "shape", None) for run in (first, second)])
        return Comparison(1.0, 1.0, 1.0)

    monkeypatch.setattr(sampling, "compare", compare)
    monkeypatch.setattr(sampling, "STEPS", 10)
    sampling.compare_forwards(1)
    images = (sampling.BATCH, 8, 8, 1)
    assert shapes == [[images, images], [images, None]]
