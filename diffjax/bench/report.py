"""Tables and pictures of what networks cost."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure

from diffjax.bench import first_image
from diffjax.evaluation.results import TimingRow, table_markdown
from diffjax.inference.pipeline import describe_devices


def report_networks(rows: Sequence[TimingRow], first_images: Sequence[dict[str, float]]) -> str:
    """The table of all rows in Markdown, and that of the first image.

    first_images: as `first_image.measure` returns them.
    """
    tables = _context(rows), table_markdown(rows), _first_image_table(first_images)
    return "\n\n".join(tables)


def _context(rows: Sequence[TimingRow]) -> str:
    peaks = {row.dtype: row.ceiling for row in rows}
    text = ", ".join(
        f"{peak / 1e9:.0f} GFLOP/s in {dtype}" for dtype, peak in sorted(peaks.items())
    )
    beside = f"; beside {rows[0].peer}, in turns" if rows[0].peer else ""
    return (
        f"{describe_devices()}, jax {jax.__version__}{beside}; medians, ± half the distance of the"
        f" quartiles; MFU is of the machine's own matrix product, here {text}"
    )


def _first_image_table(first_images: Sequence[dict[str, float]]) -> str:
    heads = "digits, first image by DDIM-50, seconds", *first_image.PARTS, "in all"
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, parts in zip(("compiling", "from the persistent cache"), first_images, strict=True):
        seconds = " | ".join(f"{part:.2f}" for part in parts.values())
        lines.append(f"| {name} | {seconds} | {sum(parts.values()):.2f} |")
    return "\n".join(lines)


def plot_networks(rows: Sequence[TimingRow], path: Path) -> None:
    """Plot the milliseconds of every row, beside diffusers', on a logarithmic axis."""
    figure = Figure(figsize=(9, 1 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    place = np.arange(len(rows))[::-1]
    axes.barh(place + 0.2, [1e3 * row.seconds for row in rows], 0.4, label="diffjax")
    if rows[0].peer:
        theirs = [1e3 * (row.peer_seconds or np.nan) for row in rows]
        axes.barh(place - 0.2, theirs, 0.4, label=rows[0].peer)
    axes.set_yticks(place, [_describe(row) for row in rows], fontsize=8)
    axes.set(xscale="log", xlabel="milliseconds", ylim=(-0.8, len(rows) - 0.2))
    axes.set_title(describe_devices())
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=110)


def _describe(row: TimingRow) -> str:
    """A row's caption, as in "digits: DDIM-50, guided 2, one pass, batch 16, float32"."""
    text = row.what if row.steps is None else f"DDIM-{row.steps}"
    text += f", guided {row.guidance}" if row.guidance else ""
    return f"{row.network}: {text}, batch {row.batch}, {row.dtype}"
