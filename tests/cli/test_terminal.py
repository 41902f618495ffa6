"""Reports as programs print them: as wide as a terminal, without the marks of Markdown."""

import io
import re

from tqdm import tqdm

from diffjax.cli.common import compiling
from diffjax.cli.terminal import narrow
from diffjax.evaluation.results import cells_markdown


def test_a_row_is_vertical():
    """One field per line, without those that are empty; names may have any characters."""
    lines = [["sampler", "steps", "recall", "network"], ["ddim", "50", "", r'unet of a<&"|\b']]
    expected = ["sampler  ddim", "steps    50", r'network  unet of a<&"|\b']
    assert narrow(cells_markdown(lines)).splitlines() == expected


def test_rows_are_a_table_of_what_differs():
    lines = [["steps", "FD", "dtype"], ["10", "3.25", "float32"], ["100", "1", "float32"]]
    expected = ["steps  FD", "10     3.25", "100    1", "", "dtype  float32"]
    assert narrow(cells_markdown(lines)).splitlines() == expected


def test_rows_that_are_equal_are_one():
    assert narrow(cells_markdown([["a", "b"], ["1", "2"], ["1", "2"]])) == "a  1\nb  2"


def test_a_wide_table_is_in_parts():
    """Each has the numbers of the rows, and no column is lost."""
    heads = [f"head {i}" for i in range(30)]
    rows = [[f"{i} of {row}" for i in range(30)] for row in range(3)]
    text = narrow(cells_markdown([heads, *rows]), 60)
    assert max(map(len, text.splitlines())) <= 60
    parts = [part.splitlines() for part in text.split("\n\n")]
    assert len(parts) > 1
    assert [[line.split()[0] for line in part] for part in parts] == [["row", "1", "2", "3"]] * len(
        parts
    )
    columns = [re.split(r"\s{2,}", part[2])[1:] for part in parts]
    assert [cell for part in columns for cell in part] == rows[1]


def test_a_wide_column_is_wrapped():
    words = [" ".join(f"{row}w{i}" for i in range(40)) for row in "ab"]
    text = narrow(cells_markdown([["steps", "what"], ["1", words[0]], ["2", words[1]]]), 60)
    assert max(map(len, text.splitlines())) <= 60
    assert [word for word in text.split() if re.search(r"w\d", word)] == [
        *words[0].split(),
        *words[1].split(),
    ]


def test_paragraphs_are_wrapped():
    report = "word " * 40 + "\n\n- " + "item " * 40
    lines = narrow(report, 60).splitlines()
    assert max(map(len, lines)) <= 60
    blank = lines.index("")
    assert " ".join(lines[:blank]).split() == ["word"] * 40
    assert lines[blank + 1].startswith("- item")
    assert lines[blank + 2].startswith("  item")


def test_a_bar_tells_what_is_done():
    """Compiling before the first step, and what follows after the last."""
    with tqdm(total=4, file=io.StringIO()) as bar:
        said = []
        update = compiling(bar, "ddim", "comparing")
        said.append(bar.desc)
        for steps in (1, 2, 1):
            update(steps)
            said.append(bar.desc)
    words = [re.findall("ddim|compiling|comparing", text) for text in said]
    assert words == [["ddim", "compiling"], ["ddim"], ["ddim"], ["comparing"]]
    assert bar.n == 4
