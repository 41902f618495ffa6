import dataclasses
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
from helpers import naming
from hypothesis import given
from hypothesis import strategies as st

from diffjax.data import image_io
from diffjax.evaluation import frontier, report
from diffjax.evaluation.results import CONTEXT, NETWORK, QualityRow, markdown

ROW = QualityRow(
    sampler="ddim(eta=0, trailing)", clipping="clipped", steps=50, nfe=100, guidance=2.0, guided="2",
    frechet=3.25, kernel=0.01, kernel_error=0.002, inception=8.5, precision=0.75, recall=0.5, recognised=0.991,
    extractor="cnn-64, 98% on held-out", reference="digits, train, 1,597 images", images=500, seed=0,
    ms_per_image=1.5, spread=0.03, batches=5, batch=100, compile_seconds=0.5, network="unet of x", parameters=1234,
    weights="ema, step 7", image_size="8x8x1", device="1 x cpu", dtype="float32", versions="jax 1",
)  # fmt: skip


def test_a_row_without_its_context_cannot_be_built():
    values = dataclasses.asdict(ROW)
    for name in values:
        with pytest.raises(TypeError, match=naming(name)):
            QualityRow(**{key: value for key, value in values.items() if key != name})
    for name in (*CONTEXT, *NETWORK, "sampler", "clipping", "guided"):
        with pytest.raises(ValueError, match=naming(name)):
            dataclasses.replace(ROW, **{name: ""})


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("sampler", "ddim", "sampler 'ddim'"),
        ("batches", 4, "batches 4 5"),
        ("ms_per_image", math.nan, "milliseconds 0"),
        ("nfe", 0, "NFE 0"),
    ],
)
def test_a_row_that_could_be_misread_cannot_be_built(field, value, words):
    with pytest.raises(ValueError, match=naming(*words.split())):
        dataclasses.replace(ROW, **{field: value})


def test_the_table_shows_every_field():
    head, _, line = markdown([ROW]).splitlines()
    assert len(head) == len(line)
    shown = (
        "ddim(eta=0, trailing)",
        "50",
        "100",
        "1.5 ± 3%",
        "3.25",
        "0.01 ± 0.002",
        "8.50",
        "0.750",
        "0.500",
        "99.1%",
    )
    context = ("500 of 8x8x1", "5 of 100", "unet of x, 1,234 parameters", "ema, step 7", "1 x cpu", "float32", "jax 1")
    for word in (*shown, "99.1%", *context, ROW.extractor, ROW.reference, ROW.clipping):
        assert f" {word} " in line


costs_and_values = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6) | st.just(math.nan)), max_size=12)


@given(costs_and_values)
def test_the_frontier_is_what_nothing_beats(pairs):
    """By the definition, pair against pair."""
    kept = frontier.frontier([cost for cost, _ in pairs], [value for _, value in pairs])

    def beaten(i):
        cost, value = pairs[i]
        others = [(c, v) for j, (c, v) in enumerate(pairs) if j not in kept or j != i]
        return math.isnan(value) or any(c <= cost and v <= value and (c, v) != (cost, value) for c, v in others)

    for i, pair in enumerate(pairs):
        same = [j for j, other in enumerate(pairs) if other == pair]
        assert (not beaten(i)) == any(j in kept for j in same) or math.isnan(pair[1])
        assert sum(j in kept for j in same) <= 1
    assert [pairs[i] for i in kept] == sorted((pairs[i] for i in kept), key=lambda pair: pair[0])


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=5))
def test_seeds_are_gathered_and_nothing_else(figures):
    rows = [dataclasses.replace(ROW, seed=i, frechet=value) for i, value in enumerate(figures)]
    (point,) = frontier.points(rows)
    assert point.mean("frechet") == pytest.approx(np.mean(figures))
    assert point.error("frechet") == pytest.approx(np.std(figures, ddof=1) if len(figures) > 1 else 0)
    for name in (*CONTEXT, *NETWORK, "sampler", "clipping", "guided", "steps"):
        value = getattr(ROW, name)
        other = dataclasses.replace(ROW, **{name: value + 1 if isinstance(value, int) else f"{value}(other)"})
        assert len(frontier.points([ROW, other])) == 2, name


def test_what_differs_is_said_on_the_axes_and_in_the_table(tmp_path):
    other = dataclasses.replace(ROW, batch=7, network="unet of y", steps=10, nfe=10)
    assert frontier.differing([ROW, other]) == ["network", "batch"]
    assert frontier.differing([ROW, dataclasses.replace(ROW, clipping="unclipped")]) == ["clipping"]
    assert frontier.differing([ROW, dataclasses.replace(ROW, seed=3, steps=2)]) == []
    frontier.plot([ROW, other], tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert "rows differ in network, batch: see the legend" in drawn
    assert "guidance 2, unet of y, 7" in drawn
    frontier.plot([ROW], tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    for words in ("network unet of x; 1,234 parameters; weights ema, step 7", "batches of 100", "seed 0"):
        assert words in drawn
    assert "differ" not in drawn
    head, _, first, second, *_, shared = frontier.summary([ROW, other]).splitlines()
    assert head.split("|")[-3:-1] == [" network   ", " batch "]
    # By NFE, of which the other has less.
    assert ("unet of y" in first, "unet of x" in second, "unet of" in shared) == (True, True, False)
    assert "float32" in shared


def test_students_each_in_its_own_steps_are_one_curve(tmp_path):
    students = [dataclasses.replace(ROW, network=f"unet of x/{n}", steps=n, nfe=n, frechet=10 / n) for n in (4, 2, 1)]
    astray = dataclasses.replace(students[0], steps=8, nfe=8, frechet=9.0)
    frontier.plot([ROW, *students, astray], tmp_path / "plot.svg")
    entries = re.findall(r"<!-- (ddim\(.*) -->", (tmp_path / "plot.svg").read_text())
    assert entries == [f"ddim(eta=0, trailing), guidance 2, unet of x{name}" for name in ("", "/4")]
    apart = [dataclasses.replace(row, network=row.network.replace("x", "y")) for row in students]
    frontier.plot([ROW, *apart], tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert "guidance 2, unet of y -->" in drawn
    assert "<!-- ddim 1 -->" in drawn  # named on the frontier
    assert "/4" not in drawn


def test_the_page_holds_all_of_it_and_needs_nothing(tmp_path):
    frontier.plot([ROW], tmp_path / "plot.svg")
    (tmp_path / "a.png").write_bytes(b"\x89PNG picture")
    row = dataclasses.replace(ROW, reference='<b>"a" & b')
    html = report.page("A <title>", "All", (tmp_path / "plot.svg").read_text(), [row], [tmp_path / "a.png"])
    assert "<b>" not in html
    assert "&lt;b&gt;&quot;a&quot; &amp; b" in html
    assert "data:image/png;base64,iVBORyBwaWN0dXJl" in html
    assert html.count("<svg") == 1
    asked = re.findall(r'(?:src|href|url)[=(]\s*"?([^")\s]+)', html)
    assert len(asked) > 3
    assert all(text.startswith(("#", "data:image/png;base64,")) for text in asked), asked


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to open the page")
def test_a_browser_shows_the_page(tmp_path):
    frontier.plot([ROW], tmp_path / "plot.svg")
    image_io.save_png(tmp_path / "a.png", image_io.grid(np.zeros((2, 8, 8, 1), np.uint8)))
    page = report.page("Title", "All", (tmp_path / "plot.svg").read_text(), [ROW] * 3, [tmp_path / "a.png"] * 3)
    # What the page holds after a click on the head of its last column, and whether its pictures could be read.
    look = """<script>document.querySelector("th:last-child").click();
        document.body.dataset.rows = document.querySelectorAll("tbody tr").length;
        document.body.dataset.width = [...document.images].map(image => image.naturalWidth > 0)</script>"""
    (tmp_path / "report.html").write_text(page.replace("</body>", f"{look}</body>"))
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--dump-dom",
        f"file://{tmp_path}/report.html",
    ]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert 'data-rows="3"' in shown
    assert 'data-width="true,true,true"' in shown
    assert 'data-up="1"' in shown
