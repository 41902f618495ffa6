import dataclasses
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffjax.evaluation import frontier

costs_and_values = st.lists(
    st.tuples(st.integers(1, 6), st.integers(0, 6) | st.just(math.nan)), max_size=12
)


@given(costs_and_values)
def test_frontier_is_undominated(pairs):
    """By the definition, pair against pair."""
    kept = frontier.frontier([cost for cost, _ in pairs], [value for _, value in pairs])

    def beaten(i):
        cost, value = pairs[i]
        others = [(c, v) for j, (c, v) in enumerate(pairs) if j not in kept or j != i]
        return math.isnan(value) or any(
            c <= cost and v <= value and (c, v) != (cost, value) for c, v in others
        )

    for i, pair in enumerate(pairs):
        same = [j for j, other in enumerate(pairs) if other == pair]
        assert (not beaten(i)) == any(j in kept for j in same) or math.isnan(pair[1])
        assert sum(j in kept for j in same) <= 1
    assert [pairs[i] for i in kept] == sorted((pairs[i] for i in kept), key=lambda pair: pair[0])


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=5))
def test_points_group_seeds_only(quality_row, figures):
    rows = [dataclasses.replace(quality_row, seed=i, fd=value) for i, value in enumerate(figures)]
    (point,) = frontier.points(rows)
    assert point.mean("fd") == pytest.approx(np.mean(figures))
    assert point.error("fd") == pytest.approx(np.std(figures, ddof=1) if len(figures) > 1 else 0)
    for name in frontier.ROW_KEY:
        value = getattr(quality_row, name)
        other = dataclasses.replace(
            quality_row, **{name: value + 1 if isinstance(value, int) else f"{value}(other)"}
        )
        assert len(frontier.points([quality_row, other])) == 2, name


def test_differing_fields_are_labelled(quality_row, tmp_path):
    other = dataclasses.replace(quality_row, batch=7, network="unet of y", steps=10, nfe=10)
    assert frontier.differing_fields([quality_row, other]) == ["network", "batch"]
    unclipped = dataclasses.replace(quality_row, clipping="unclipped")
    assert frontier.differing_fields([quality_row, unclipped]) == ["clipping"]
    assert (
        frontier.differing_fields([quality_row, dataclasses.replace(quality_row, seed=3, steps=2)])
        == []
    )
    frontier.plot([quality_row, other], tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert re.search(r"differ\D*network, batch\b", drawn)
    assert "guidance 2, unet of y, 7" in drawn
    frontier.plot([quality_row], tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    for words in ("unet of x", "1,234", "ema, step 7", "batches of 100", "seed 0"):
        assert words in drawn
    assert "differ" not in drawn
    head, _, first, second, *_, shared = frontier.summary([quality_row, other]).splitlines()
    assert head.split("|")[-3:-1] == [" network   ", " batch "]
    # By NFE, of which the other has less.
    assert ("unet of y" in first, "unet of x" in second, "unet of" in shared) == (True, True, False)
    assert "float32" in shared


def test_distilled_models_are_one_curve(quality_row, tmp_path):
    distilled = [
        dataclasses.replace(quality_row, network=f"unet of x/{n}", steps=n, nfe=n, fd=10 / n)
        for n in (4, 2, 1)
    ]
    astray = dataclasses.replace(distilled[0], steps=8, nfe=8, fd=9.0)
    frontier.plot([quality_row, *distilled, astray], tmp_path / "plot.svg")
    entries = re.findall(r"<!-- (ddim\(.*) -->", (tmp_path / "plot.svg").read_text())
    assert entries == [f"ddim(eta=0, trailing), guidance 2, unet of x{name}" for name in ("", "/4")]
    apart = [dataclasses.replace(row, network=row.network.replace("x", "y")) for row in distilled]
    frontier.plot([quality_row, *apart], tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert "guidance 2, unet of y -->" in drawn
    assert "<!-- ddim 1 -->" in drawn  # named on the frontier
    assert "/4" not in drawn


def test_summary_of_seeds(quality_row):
    """Mean ± deviation over the seeds, and the names of Inception's distances."""
    rows = [dataclasses.replace(quality_row, seed=i, fd=3.0 + i) for i in range(3)]
    head, _, line, *_, shared = frontier.summary(rows).splitlines()
    cells = dict(zip(head.split("|"), line.split("|"), strict=True))
    cells = {name.strip(): cell.strip() for name, cell in cells.items()}
    assert (cells["FD"], cells["KD"], cells["class accuracy"]) == ("4 ± 1", "0.01 ± 0", "0.991 ± 0")
    assert (cells["precision"], cells["recall"]) == ("0.750 ± 0", "0.500 ± 0")
    assert (cells["real class accuracy"], cells["ms/image"], cells["NFE"]) == (
        "0.976",
        "1.5",
        "100",
    )
    assert "0, 1, 2" in shared
    inception = dataclasses.replace(quality_row, extractor="inception-v3-2015", class_accuracy=None)
    head = frontier.summary([inception]).splitlines()[0]
    assert [name for name in ("FID", "KID") if f"| {name}" in head] == ["FID", "KID"]


@pytest.mark.parametrize(("number", "scale"), [(1, 1.0), (2, 3e5), (14, 1e-4), (14, 1.0)])
def test_axes_are_readable(quality_row, number, scale):
    """Ticks are plain numbers, and every label lies within its axes."""
    rows = [
        dataclasses.replace(
            quality_row, sampler="dpm_solver_pp_2m(eta=0, trailing)", steps=i + 1, nfe=2**i,
            ms_per_image=scale * 2**i, fd=scale * 50 / (i + 1), seed=seed,
        )
        for i in range(number) for seed in (0, 1)
    ]  # fmt: skip
    figure = frontier.draw(rows)
    figure.draw_without_rendering()
    for axes in figure.axes:
        area = axes.get_window_extent()
        assert len(axes.texts) == number
        for text in axes.texts:
            found = text.get_window_extent()
            corners = (found.x0, found.y0), (found.x1, found.y1)
            assert all(area.contains(*corner) for corner in corners), text
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            inside = {
                tick.label1.get_text()
                for tick in axis.get_major_ticks()
                if low <= tick.get_loc() <= high
            }
            assert len(inside) > 1
            assert all(re.fullmatch(r"\d+(\.\d+)?", text) for text in inside), inside
            # As drawn: the number of a tick is where it stands.
            assert all(low <= float(text) <= high for text in inside)
