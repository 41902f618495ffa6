"""Quality against cost: rows of many samplers, what of them is best, and a picture that says where they differ."""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diffjax.evaluation.results import CONTEXT, NETWORK, QualityRow, table


class Point(NamedTuple):
    """Rows that differ in nothing but their seed."""

    rows: tuple[QualityRow, ...]

    @property
    def first(self) -> QualityRow:
        """What all of them share can be read from it."""
        return self.rows[0]

    def mean(self, name: str) -> float:
        """Of a figure, over the seeds; NaN where a row has none."""
        return float(np.mean(self._values(name)))

    def error(self, name: str) -> float:
        """Standard deviation of a figure over the seeds, ddof 1; 0 for one seed."""
        values = self._values(name)
        return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0

    def _values(self, name: str) -> np.ndarray:
        return np.array([getattr(row, name) for row in self.rows], np.float64)


_SAID = ("clipping", *NETWORK, *CONTEXT)  # wherever rows differ in it
_IDENTITY = ("sampler", "steps", "guided", *_SAID)


def identity(row: QualityRow) -> tuple[object, ...]:
    """All that tells a row from others, its seed and its figures apart."""
    return tuple(getattr(row, name) for name in _IDENTITY)


def points(rows: Sequence[QualityRow]) -> list[Point]:
    """Rows gathered over their seeds, in the order in which each was met first."""
    found: dict[tuple[object, ...], list[QualityRow]] = {}
    for row in rows:
        found.setdefault(identity(row), []).append(row)
    return [Point(tuple(group)) for group in found.values()]


def differing(rows: Sequence[QualityRow]) -> list[str]:
    """The fields of their context in which rows differ: what has to be said where they share an axis."""
    return [name for name in _SAID if len({getattr(row, name) for row in rows}) > 1]


def frontier(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Indices, by rising cost, of what nothing else beats: nothing as cheap is as good.

    costs, values: less is better. NaN is beaten by all; of equals the first counts.
    """
    best, kept = np.inf, []
    for i in np.lexsort((values, costs)):
        if values[i] < best:
            best = values[i]
            kept.append(int(i))
    return kept


def summary(rows: Sequence[QualityRow]) -> str:
    """A short table in markdown by rising NFE, mean ± standard deviation over the seeds, and beneath it all that the
    rows share; what they do not share has columns.
    """
    differ = differing(rows)

    def told(point: Point, name: str, form: str) -> str:
        if getattr(point.first, name) is None:
            return ""
        error = f" ± {round(point.error(name), 9):.1g}" if len(point.rows) > 1 else ""  # rounding is no spread
        return format(point.mean(name), form) + error

    heads = ["sampler", "steps", "NFE", "guidance", "ms/image"]
    lines = [[*heads, "Frechet", "kernel", "precision", "recall", "recognised", *differ]]
    for point in sorted(points(rows), key=lambda point: point.first.nfe):
        row = point.first
        figures = [told(point, name, ".3f") for name in ("precision", "recall", "recognised")]
        lines.append(
            [row.sampler, str(row.steps), str(row.nfe), row.guided, f"{point.mean('ms_per_image'):.3g}"]
            + [told(point, "frechet", ".4g"), told(point, "kernel", ".3g"), *figures]
            + [str(getattr(row, name)) for name in differ]
        )
    return f"{table(lines)}\n\n{_shared(rows, differ)}."


def _shared(rows: Sequence[QualityRow], differ: Sequence[str]) -> str:
    seeds = sorted({row.seed for row in rows})
    words = {"batch": "batches of {}", "parameters": "{:,} parameters", "images": "{} images a row", "clipping": "{}"}
    said = [
        words.get(name, name.replace("_", " ") + " {}").format(getattr(rows[0], name))
        for name in _SAID
        if name not in differ
    ]
    kinds = "mean ± standard deviation over seeds" if len(seeds) > 1 else "seed"
    return f"{'; '.join(said)}; {kinds} {', '.join(map(str, seeds))}"


def plot(rows: Sequence[QualityRow], path: Path) -> None:
    """Frechet distance against network evaluations and against milliseconds per image, both on logarithmic axes; what
    nothing beats is joined, and named with its steps. A colour is a sampler of a network, a marker its guidance;
    students, each in the steps that it is named by, are one network. Contexts that differ are said, each in the legend
    of its own.
    """
    figure = Figure(figsize=(13, 7), layout="constrained")
    found, differ = points(rows), differing(rows)
    labels = [_label(point.first, differ) for point in found]
    colours = {}  # by sampler, on the network that it samples where that differs
    for point in found:
        colours.setdefault(_family(point.first, differ), f"C{len(colours) % 10}")
    scales = list(dict.fromkeys(point.first.guided for point in found))
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, cost, words in (
        (left, "nfe", "network evaluations per image"), (right, "ms_per_image", "milliseconds per image")
    ):  # fmt: skip
        for label in dict.fromkeys(labels):
            mine = [point for point, its in zip(found, labels, strict=True) if its == label]
            colour = colours[_family(mine[0].first, differ)]
            marker = _MARKERS[scales.index(mine[0].first.guided) % len(_MARKERS)]
            _draw(axes, mine, cost, label, colour, marker)
        costs = [point.mean(cost) for point in found]
        values = [point.mean("frechet") for point in found]
        best = frontier(costs, values)
        axes.plot([costs[i] for i in best], [values[i] for i in best], color="black", linewidth=1, zorder=1)
        for n, i in enumerate(best):
            row = found[i].first
            name, colour = f"{row.sampler.split('(')[0]} {row.steps}", colours[_family(row, differ)]
            place, side = ((6, 6), "left") if n % 2 else ((-6, -12), "right")
            axes.annotate(
                name, (costs[i], values[i]), place, textcoords="offset points", fontsize=7, ha=side, color=colour
            )
        axes.set(xscale="log", yscale="log", xlabel=words)
        axes.grid(alpha=0.3, which="both")
    left.set_ylabel("Frechet distance")
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8, title="black: what nothing beats")
    differing_too = f"\nrows differ in {', '.join(differ).replace('_', ' ')}: see the legend" if differ else ""
    figure.suptitle(textwrap.fill(_shared(rows, differ), 170) + differing_too, fontsize=9)
    figure.savefig(path, dpi=110)


_MARKERS = "osD^vP*X<>"


def _family(row: QualityRow, differ: Sequence[str]) -> str:
    # The number of levels is in a name beside the steps, and no dial of the sampler.
    parts = [re.sub(r", \d+ levels", "", row.sampler)]
    # Parameters and weights follow from the network's name, wherever that differs.
    context = [name for name in differ if "network" not in differ or name not in NETWORK[1:]]
    parts += [_line(row) if name == "network" else str(getattr(row, name)) for name in context]
    return ", ".join(parts)


def _line(row: QualityRow) -> str:
    # Of students of one line, as "unet of digits-distilled/4", each in its own steps.
    return row.network.removesuffix(f"/{row.steps}")


def _label(row: QualityRow, differ: Sequence[str]) -> str:
    sampler, *context = _family(row, differ).split("), ", 1)
    return ", ".join([sampler + (")" if context else ""), f"guidance {row.guided}", *context])


def _draw(axes: Axes, mine: Sequence[Point], cost: str, label: str, colour: str, marker: str) -> None:
    mine = sorted(mine, key=lambda point: point.mean(cost))
    x, y = [p.mean(cost) for p in mine], [p.mean("frechet") for p in mine]
    error = [p.error("frechet") for p in mine]
    # On a logarithmic axis a bar may not reach zero.
    low = [min(e, 0.9 * value) for e, value in zip(error, y, strict=True)]
    axes.errorbar(
        x, y, yerr=[low, error], label=label, marker=marker, color=colour, markersize=4.5, linewidth=0.8,
        linestyle=":", capsize=2,
    )  # fmt: skip
