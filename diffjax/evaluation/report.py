"""One page that shows rows of quality with their images: a single file, which opens from a disk without a network."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from diffjax.evaluation.results import QualityRow, cells

STYLE = """
body { font: 14px/1.4 sans-serif; margin: 2em auto; max-width: 1500px; padding: 0 1em; color: #222 }
svg { width: 100%; height: auto } .wide { overflow-x: auto } table { border-collapse: collapse; white-space: nowrap }
td, th { padding: .25em .6em; border-bottom: 1px solid #ddd; text-align: left }
th { cursor: pointer; user-select: none } th:hover { background: #eee } tr:target, tr:hover { background: #f6f3e4 }
figure { display: inline-block; margin: .5em 1em .5em 0 } figcaption { font-size: 12px; max-width: 40em }
img { image-rendering: pixelated; max-width: 100% }
"""
SORT = """
document.querySelectorAll("th").forEach((head, column) => head.addEventListener("click", () => {
  const body = head.closest("table").tBodies[0], up = head.dataset.up = head.dataset.up === "1" ? "0" : "1";
  const key = row => { const text = row.cells[column].textContent, n = parseFloat(text); return isNaN(n) ? text : n };
  const compare = (a, b) => { const x = key(a), y = key(b); return (x > y) - (x < y) };
  [...body.rows].sort((a, b) => (up === "1" ? 1 : -1) * compare(a, b)).forEach(row => body.append(row));
}));
"""


def page(title: str, remark: str, svg: str, rows: Sequence[QualityRow], pictures: Sequence[Path]) -> str:
    """HTML of the plot (an SVG as text), the table, which a click on a head sorts, and every row's picture (PNG)."""
    heads, *lines = cells(rows)
    table = "".join(
        f'<tr id="row{i}"><td><a href="#images{i}">images</a></td>{"".join(map(_td, line))}</tr>\n'
        for i, line in enumerate(lines)
    )
    figures = "".join(
        f'<figure id="images{i}"><img src="data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"'
        f' alt="{escape(_caption(row))}"><figcaption><a href="#row{i}">{escape(_caption(row))}</a></figcaption>'
        "</figure>\n"
        for i, (row, picture) in enumerate(zip(rows, pictures, strict=True))
    )
    drawing = svg[svg.index("<svg") :]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1><p>{escape(remark)}</p>\n{drawing}\n"
        f'<h2>Rows</h2><div class="wide"><table><thead><tr><th></th>{"".join(f"<th>{escape(h)}</th>" for h in heads)}'
        f"</tr></thead><tbody>\n{table}</tbody></table></div>\n"
        f"<h2>Images: those of one seed begin from the same noise</h2>\n{figures}"
        f"<script>{SORT}</script></body></html>\n"
    )


def _td(cell: str) -> str:
    return f"<td>{escape(cell)}</td>"


def _caption(row: QualityRow) -> str:
    return (
        f"{row.sampler}, {row.steps} steps, NFE {row.nfe}, guidance {row.guided}, {row.network}, seed {row.seed}:"
        f" Frechet {row.frechet:.4g} ({row.extractor}), {row.ms_per_image:.3g} ms an image in batches of {row.batch}"
    )
