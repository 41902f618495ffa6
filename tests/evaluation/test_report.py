import base64
import dataclasses
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers import naming
from PIL import Image

from diffjax.data import image_io
from diffjax.evaluation import frontier, report, sweep
from diffjax.evaluation.results import cells
from tests.colours import class_of, paint

ODD = "<b>&lt;\"'|$\\frac$"  # marks of HTML, SVG, Markdown and mathematics


def test_page_is_complete_and_alone(quality_row, tmp_path):
    frontier.plot([quality_row], tmp_path / "plot.svg")
    (tmp_path / "a.png").write_bytes(b"\x89PNG picture")
    row = dataclasses.replace(quality_row, reference='<b>"a" & b')
    html = report.page(
        "A <title>", "All", (tmp_path / "plot.svg").read_text(), [row], [tmp_path / "a.png"]
    )
    assert "<b>" not in html
    assert "&lt;b&gt;&quot;a&quot; &amp; b" in html
    assert "data:image/png;base64,iVBORyBwaWN0dXJl" in html
    assert html.count("<svg") == 1
    asked = re.findall(r'(?:src|href|url)[=(]\s*"?([^")\s]+)', html)
    assert len(asked) > 3
    assert all(text.startswith(("#", "data:image/png;base64,")) for text in asked), asked


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to open the page")
def test_page_in_a_browser(quality_row, tmp_path):
    frontier.plot([quality_row], tmp_path / "plot.svg")
    image_io.save_png(tmp_path / "a.png", image_io.grid(np.zeros((2, 8, 8, 1), np.uint8)))
    page = report.page(
        "Title",
        "All",
        (tmp_path / "plot.svg").read_text(),
        [quality_row] * 3,
        [tmp_path / "a.png"] * 3,
    )
    # The rows after a click on the head of the last column, and whether the images can be read.
    look = """<script>document.querySelector("th:last-child").click();
        const data = document.body.dataset, images = [...document.images];
        data.rows = document.querySelectorAll("tbody tr").length;
        data.width = images.map(image => image.naturalWidth > 0)</script>"""
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


class Page(HTMLParser):
    """The texts of a page: of its table by line, of the line above it, of its captions, and the
    images of its figures."""

    def __init__(self, html):
        super().__init__()
        self.lines, self.shared, self.captions, self.pictures, self._open = [], "", [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "tr":
            self.lines.append([])
        if tag in ("td", "th"):
            self.lines[-1].append("")
        if tag == "figcaption":
            self.captions.append("")
        if tag == "img":
            png = base64.b64decode(given["src"].removeprefix("data:image/png;base64,"))
            self.pictures.append((Image.open(io.BytesIO(png)), given["alt"]))
        elif tag not in ("meta",):
            self._open.append((tag, given.get("id")))

    def handle_endtag(self, tag):
        self._open.pop()

    def handle_data(self, data):
        tags = [tag for tag, _ in self._open]
        if "td" in tags or "th" in tags:
            self.lines[-1][-1] += data
        if ("p", "shared") in self._open:
            self.shared += data
        if "figcaption" in tags:
            self.captions[-1] += data


@pytest.fixture(scope="module")
def odd_rows(quality_row):
    """Rows of two networks, whose names and texts have marks of every format."""
    row = dataclasses.replace(
        quality_row,
        sampler=f"ddim({ODD})", reference=ODD, extractor=ODD, weights=ODD, guided=ODD,
        real_class_accuracy=0.5,
    )  # fmt: skip
    names = (f"a{ODD}", f"b{ODD}", f"c{ODD}")
    return [
        dataclasses.replace(row, network=name, fd=row.fd + i, steps=i + 1, nfe=10 * (i + 1))
        for i, name in enumerate(names)
    ]


@pytest.fixture(scope="module")
def odd_report(odd_rows, tmp_path_factory):
    """The files of a report of these rows; the picture of row i has colour i."""
    folder = tmp_path_factory.mktemp("report")
    for i, row in enumerate(odd_rows):
        image_io.save_png(sweep.image_path(folder, row), image_io.grid(paint([i])))
    sweep.write_report(folder, odd_rows)
    return folder


def test_page_has_the_rows_as_they_are(odd_rows, odd_report):
    """Every cell, caption and picture belongs to its row, whatever characters it has."""
    page = Page((odd_report / "report.html").read_text())
    (heads, *expected), (shown, *lines) = cells(odd_rows), page.lines
    assert len(lines) == len(odd_rows)
    for want, line in zip(expected, lines, strict=True):
        row, got = dict(zip(heads, want, strict=True)), dict(zip(shown, line, strict=True))
        assert got.pop("") == "images"
        assert got == {head: row[head] for head in got}
        folded = {head: row[head] for head in row if head not in got and row[head]}
        assert [head for head in folded if f"{head} {folded[head]}" not in page.shared] == []
    assert {"network", "sampler", "FD", "class accuracy", "real class accuracy"} < set(shown)
    assert {"device", "dtype", "features"}.isdisjoint(shown)
    assert len(page.captions) == len(page.pictures) == len(odd_rows)
    for i, row in enumerate(odd_rows):
        picture, text = page.pictures[i]
        assert class_of(picture.getpixel((28, 28))) == i
        assert text == page.captions[i]
        for word in (row.network, row.sampler, row.extractor, f"{row.fd:.4g}", f"NFE {row.nfe}"):
            assert word in text


def test_files_with_odd_names(odd_rows, odd_report):
    """The plot is well-formed, Markdown has as many cells a line, and the page warns."""
    svg = (odd_report / "frontier.svg").read_text()
    ElementTree.fromstring(svg)
    page = (odd_report / "report.html").read_text()
    ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    assert re.search(naming("50.0%", "90%"), page.split("</p>")[0])
    table, shared, warning = (odd_report / "frontier.md").read_text().split("\n\n")
    assert {len(re.split(r"(?<!\\)\|", line)) for line in table.splitlines()} == {14}
    for text in (table, shared, warning):
        assert not re.search(r"(?<!\\)[<&]", text)
    assert odd_rows[0].network in re.sub(r"\\(.)", r"\1", table)
    assert re.search(naming("50.0%", "90%"), warning)


def test_what_never_differs_is_folded():
    lines = [["steps", "device", "weights", "empty"], ["1", "cpu", "a", ""], ["1", "cpu", "b", ""]]
    table, text = report.fold_columns(lines)
    assert table == [["steps", "weights"], ["1", "a"], ["1", "b"]]
    assert text == "device cpu"
    assert report.fold_columns(lines[:2]) == ([["steps"], ["1"]], "device cpu; weights a")
