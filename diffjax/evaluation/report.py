"""A page of quality rows with their images: one file that needs no network."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from diffjax.evaluation.results import QualityRow, cells, metric_names

STYLE = """
body { font: 14px/1.4 sans-serif; margin: 2em auto; max-width: 1500px; padding: 0 1em; color: #222 }
svg { width: 100%; height: auto } .wide { overflow-x: auto }
table { border-collapse: collapse; white-space: nowrap }
td, th { padding: .25em .6em; border-bottom: 1px solid #ddd; text-align: left }
th { cursor: pointer; user-select: none } th:hover { background: #eee }
tr:target, tr:hover { background: #f6f3e4 }
figure { display: inline-block; margin: .5em 1em .5em 0 }
figcaption { font-size: 12px; max-width: 40em }
img { image-rendering: pixelated; max-width: 100% }
"""
SORT = """
document.querySelectorAll("th").forEach((head, column) => head.addEventListener("click", () => {
  const body = head.closest("table").tBodies[0];
  const up = head.dataset.up = head.dataset.up === "1" ? "0" : "1";
  const key = row => {
    const text = row.cells[column].textContent, n = parseFloat(text);
    return isNaN(n) ? text : n;
  };
  const compare = (a, b) => { const x = key(a), y = key(b); return (x > y) - (x < y) };
  const sorted = [...body.rows].sort((a, b) => (up === "1" ? 1 : -1) * compare(a, b));
  sorted.forEach(row => body.append(row));
}));
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>{style}</style></head>
<body><h1>{title}</h1><p>{remark}</p>
{plot}
<h2>Rows</h2>
<p id="shared">{shared}</p>
<div class="wide"><table><thead><tr><th></th>{heads}</tr></thead>
<tbody>
{lines}
</tbody></table></div>
<h2>Images: those of one seed begin from the same noise</h2>
{figures}
<script>{script}</script></body></html>
"""
LINE = '<tr id="row{i}"><td><a href="#images{i}">images</a></td>{cells}</tr>'
FIGURE = (
    '<figure id="images{i}"><img src="data:image/png;base64,{png}" alt="{caption}">'
    '<figcaption><a href="#row{i}">{caption}</a></figcaption></figure>'
)


# Columns that a table has even where its rows agree.
COLUMNS = (
    "sampler", "steps", "NFE", "guidance", "ms/image", "FD", "FID", "KD", "KID",
    "precision", "recall", "class accuracy", "real class accuracy",
)  # fmt: skip


def page(
    title: str, remark: str, svg: str, rows: Sequence[QualityRow], pictures: Sequence[Path]
) -> str:
    """The HTML of a plot, a table that a click on a head sorts, and the images.

    What is the same in all rows stands in a line above the table.

    svg: the plot, as the text of an SVG file. pictures: a PNG file for each row.
    """
    (heads, *lines), shared = fold_columns(cells(rows))
    figures = zip(rows, pictures, strict=True)
    return PAGE.format(
        title=escape(title),
        style=STYLE,
        remark=escape(remark),
        plot=svg[svg.index("<svg") :],
        shared=escape(f"All rows: {shared}." if shared else ""),
        heads="".join(f"<th>{escape(head)}</th>" for head in heads),
        lines="\n".join(_line(i, line) for i, line in enumerate(lines)),
        figures="\n".join(_figure(i, row, png) for i, (row, png) in enumerate(figures)),
        script=SORT,
    )


def fold_columns(lines: Sequence[Sequence[str]]) -> tuple[list[list[str]], str]:
    """The columns of a table that differ or are of COLUMNS, and a text of the others.

    lines: the heads first. A column that is empty in all lines is left out.
    """
    columns = [(head, values) for head, *values in zip(*lines, strict=True)]
    folded = [
        (head, values[0])
        for head, values in columns
        if head not in COLUMNS and len(set(values)) == 1
    ]
    names = [head for head, _ in folded]
    kept = [[head, *values] for head, values in columns if head not in names and any(values)]
    text = "; ".join(f"{head} {value}" for head, value in folded if value)
    return [list(line) for line in zip(*kept, strict=True)], text


def _line(i: int, line: Sequence[str]) -> str:
    return LINE.format(i=i, cells="".join(f"<td>{escape(cell)}</td>" for cell in line))


def _figure(i: int, row: QualityRow, picture: Path) -> str:
    png = base64.b64encode(picture.read_bytes()).decode()
    return FIGURE.format(i=i, png=png, caption=escape(_caption(row)))


def _caption(row: QualityRow) -> str:
    return (
        f"{row.sampler}, {row.steps} steps, NFE {row.nfe}, guidance {row.guided}, {row.network},"
        f" seed {row.seed}: {metric_names([row])['FD']} {row.fd:.4g} ({row.extractor}),"
        f" {row.ms_per_image:.3g} ms an image in batches of {row.batch}"
    )
