"""The frontier of quality and cost: the best of many rows, a table and a plot."""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from diffjax.evaluation.results import (
    QualityRow,
    cells_markdown,
    classifier_warning,
    escape_markdown,
    metric_names,
)

NETWORK = ("network", "parameters", "weights")
# Two rows may share an axis where they agree in this, but for their networks.
CONTEXT = ("images", "reference", "extractor", "image_size", "batch", "device", "dtype", "versions")
COMPARED = ("clipping", *NETWORK, *CONTEXT)  # labelled wherever rows differ in it
ROW_KEY = ("sampler", "steps", "guided", *COMPARED)


class Point(NamedTuple):
    """Rows that differ in nothing but their seed."""

    rows: tuple[QualityRow, ...]

    @property
    def first(self) -> QualityRow:
        """One of the rows, for what all of them share."""
        return self.rows[0]

    def mean(self, name: str) -> float:
        """The mean of a figure over the seeds; NaN where a row has none."""
        return float(np.mean(self._values(name)))

    def error(self, name: str) -> float:
        """The standard deviation of a figure over the seeds, ddof 1; 0 for one seed."""
        values = self._values(name)
        return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0

    def format_cell(self, name: str, form: str) -> str:
        """The mean of a figure ± its deviation over the seeds, as in "3.25 ± 0.1"."""
        if getattr(self.first, name) is None:
            return ""
        if len(self.rows) == 1:
            return format(self.mean(name), form)
        deviation = round(self.error(name), 9)  # a deviation within rounding is 0
        return f"{format(self.mean(name), form)} ± {deviation:.1g}"

    def _values(self, name: str) -> np.ndarray:
        return np.array([getattr(row, name) for row in self.rows], np.float64)


def row_key(row: QualityRow) -> tuple[object, ...]:
    """The fields that tell a row from others, without its seed and its figures."""
    return tuple(getattr(row, name) for name in ROW_KEY)


def points(rows: Sequence[QualityRow]) -> list[Point]:
    """Rows grouped over their seeds, in the order of the first row of each group."""
    groups: dict[tuple[object, ...], list[QualityRow]] = {}
    for row in rows:
        groups.setdefault(row_key(row), []).append(row)
    return [Point(tuple(group)) for group in groups.values()]


def differing_fields(rows: Sequence[QualityRow]) -> list[str]:
    """The fields of the context in which rows differ, which plots must label."""
    return [name for name in COMPARED if len({getattr(row, name) for row in rows}) > 1]


def frontier(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Indices of the undominated points by rising cost: nothing as cheap is as good.

    costs, values: less is better. NaN is dominated by all; of equal points the first counts.
    """
    best, kept = np.inf, []
    for i in np.lexsort((values, costs)):
        if values[i] < best:
            best = values[i]
            kept.append(int(i))
    return kept


# ------------------------------------------------------------------------------- a table


def summary(rows: Sequence[QualityRow]) -> str:
    """A short Markdown table by rising NFE, mean ± standard deviation over the seeds.

    Beneath it stands what all rows share; what they do not share has columns. Last comes a warning,
    if there is one.
    """
    differing, names = differing_fields(rows), metric_names(rows)
    heads = ["sampler", "steps", "NFE", "guidance", "ms/image", names["FD"], names["KD"]]
    heads += ["precision", "recall", "class accuracy", "real class accuracy"]
    lines = [[*heads, *differing]]
    for point in sorted(points(rows), key=lambda point: point.first.nfe):
        row = point.first
        lines.append(
            [
                row.sampler,
                str(row.steps),
                str(row.nfe),
                row.guided,
                f"{point.mean('ms_per_image'):.3g}",
                point.format_cell("fd", ".4g"),
                point.format_cell("kd", ".3g"),
                point.format_cell("precision", ".3f"),
                point.format_cell("recall", ".3f"),
                point.format_cell("class_accuracy", ".3f"),
                "" if row.real_class_accuracy is None else f"{row.real_class_accuracy:.3f}",
                *(str(getattr(row, name)) for name in differing),
            ]
        )
    text = f"{cells_markdown(lines)}\n\n{escape_markdown(_describe_shared(rows, differing))}."
    warning = classifier_warning(rows)
    return f"{text}\n\nWarning: {escape_markdown(warning)}." if warning else text


def _describe_shared(rows: Sequence[QualityRow], differing: Sequence[str]) -> str:
    seeds = sorted({row.seed for row in rows})
    forms = {
        "batch": "batches of {}",
        "parameters": "{:,} parameters",
        "images": "{} images a row",
        "clipping": "{}",
    }
    shared = [
        forms.get(name, name.replace("_", " ") + " {}").format(getattr(rows[0], name))
        for name in COMPARED
        if name not in differing
    ]
    kind = "mean ± standard deviation over seeds" if len(seeds) > 1 else "seed"
    return f"{'; '.join(shared)}; {kind} {', '.join(map(str, seeds))}"


# ------------------------------------------------------------------------------- a plot

_MARKERS = "osD^vP*X<>"
COSTS = {"nfe": "network evaluations per image", "ms_per_image": "milliseconds per image"}


class _Series(NamedTuple):
    """Points that share a label, a colour and a marker."""

    label: str
    colour: str
    marker: str
    points: list[Point]


def plot(rows: Sequence[QualityRow], path: Path) -> None:
    """Write the figure of `draw` as a picture of the path's suffix."""
    draw(rows).savefig(path, dpi=110)


def draw(rows: Sequence[QualityRow]) -> Figure:
    """Draw the Frechet distance against NFE and against milliseconds.

    Axes are logarithmic. The frontier is joined, and named with its steps. A colour is a sampler of
    a network, a marker its guidance; distilled models that are named by their steps, each sampled
    in its own, are one network. The legend has every field of the context in which rows differ.
    """
    with rc_context({"text.parse_math": False}):  # names may have dollars
        return _draw(rows)


def _draw(rows: Sequence[QualityRow]) -> Figure:
    figure = Figure(figsize=(13, 7), layout="constrained")
    groups, differing = points(rows), differing_fields(rows)
    colours = _colours(groups, differing)
    lows, highs = zip(*map(_error_bar, groups), strict=True)
    panels = dict(zip(COSTS, figure.subplots(1, 2, sharey=True), strict=True))
    for cost, axes in panels.items():
        for each in _series(groups, differing, colours):
            _draw_series(axes, each, cost)
        axes.set(xscale="log", yscale="log", xlabel=COSTS[cost])
        values = [each.mean(cost) for each in groups]
        axes.set(xlim=_limits(values), ylim=_limits([*lows, *highs]))
        axes.grid(alpha=0.3, which="both")
        for axis in (axes.xaxis, axes.yaxis):
            _label_ticks(axis)
    for cost, axes in panels.items():  # when all limits are known
        _draw_frontier(axes, groups, cost, [colours[_family(p.first, differing)] for p in groups])
    left = panels["nfe"]
    left.set_ylabel("Frechet distance" + (" (FID)" if metric_names(rows)["FD"] == "FID" else ""))
    handles, labels = left.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=3, fontsize=8, title="black: frontier"
    )
    figure.suptitle(_title(rows, differing), fontsize=9)
    return figure


def _error_bar(point: Point) -> tuple[float, float]:
    """The ends of a point's error bar, which may not reach zero on a logarithmic axis."""
    mean, error = point.mean("fd"), point.error("fd")
    return mean - min(error, 0.9 * mean), mean + error


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """The ends of a logarithmic axis, with a margin in which labels have place."""
    positive = [value for value in values if 0 < value < np.inf] or [1.0]
    low, high = min(positive), max(positive)
    margin = max(1.3, (high / low) ** 0.08)
    return low / margin, high * margin


def _title(rows: Sequence[QualityRow], differing: Sequence[str]) -> str:
    shared = textwrap.fill(_describe_shared(rows, differing), 170)
    names = ", ".join(differing).replace("_", " ")
    return f"{shared}\nrows differ in {names}: see the legend" if differing else shared


def _label_ticks(axis: Axis) -> None:
    """Label the ticks of a logarithmic axis with plain numbers."""
    low, high = axis.get_view_interval()
    narrow = high < 10 * low  # where powers of ten and their halves are few
    axis.set_major_locator(MaxNLocator(6) if narrow else LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _plain_number(value)))
    axis.set_minor_formatter(NullFormatter())


def _plain_number(value: float) -> str:
    return np.format_float_positional(value, precision=6, fractional=False, trim="-")


def _colours(groups: Sequence[Point], differing: Sequence[str]) -> dict[str, str]:
    colours: dict[str, str] = {}
    for point in groups:
        colours.setdefault(_family(point.first, differing), f"C{len(colours) % 10}")
    return colours


def _series(
    groups: Sequence[Point], differing: Sequence[str], colours: dict[str, str]
) -> list[_Series]:
    scales = list(dict.fromkeys(point.first.guided for point in groups))
    series: dict[str, _Series] = {}
    for point in groups:
        row = point.first
        label, colour = _label(row, differing), colours[_family(row, differing)]
        marker = _MARKERS[scales.index(row.guided) % len(_MARKERS)]
        series.setdefault(label, _Series(label, colour, marker, [])).points.append(point)
    return list(series.values())


def _family(row: QualityRow, differing: Sequence[str]) -> str:
    """The sampler, and the context where it differs: one colour each."""
    # The number of levels is in a name beside the steps, and no option of the sampler.
    parts = [re.sub(r", \d+ levels", "", row.sampler)]
    # Parameters and weights follow from the network's name, wherever that differs.
    context = [name for name in differing if "network" not in differing or name not in NETWORK[1:]]
    parts += [
        _network_line(row) if name == "network" else str(getattr(row, name)) for name in context
    ]
    return ", ".join(parts)


def _network_line(row: QualityRow) -> str:
    # Distilled models of one line, as "unet of digits-distilled/4", each sampled in its own steps.
    return row.network.removesuffix(f"/{row.steps}")


def _label(row: QualityRow, differing: Sequence[str]) -> str:
    sampler, *context = _family(row, differing).split("), ", 1)
    return ", ".join([sampler + (")" if context else ""), f"guidance {row.guided}", *context])


def _draw_series(axes: Axes, series: _Series, cost: str) -> None:
    ordered = sorted(series.points, key=lambda point: point.mean(cost))
    x, y = [point.mean(cost) for point in ordered], [point.mean("fd") for point in ordered]
    low, high = (np.abs(np.array(ends) - y) for ends in zip(*map(_error_bar, ordered), strict=True))
    axes.errorbar(
        x,
        y,
        yerr=[low, high],
        label=series.label,
        marker=series.marker,
        color=series.colour,
        markersize=4.5,
        linewidth=0.8,
        linestyle=":",
        capsize=2,
    )


def _draw_frontier(axes: Axes, groups: Sequence[Point], cost: str, colours: Sequence[str]) -> None:
    x, y = [point.mean(cost) for point in groups], [point.mean("fd") for point in groups]
    best = frontier(x, y)
    axes.plot([x[i] for i in best], [y[i] for i in best], color="black", linewidth=1, zorder=1)
    for i in best:
        row = groups[i].first
        # Towards the middle, lest a label leaves the axes.
        at = axes.transAxes.inverted().transform(axes.transData.transform((x[i], y[i])))
        right, up = at < 0.5
        axes.annotate(
            f"{row.sampler.split('(')[0]} {row.steps}",
            (x[i], y[i]),
            (6 if right else -6, 6 if up else -6),
            textcoords="offset points",
            fontsize=7,
            ha="left" if right else "right",
            va="bottom" if up else "top",
            color=colours[i],
        )
