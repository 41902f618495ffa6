"""Metrics of a training run: as lines of JSON, for TensorBoard, and as a picture."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from diffjax.data.files import atomic_path
from diffjax.training.step import QUARTILES


class JsonlWriter:
    """metrics.jsonl: one JSON object per line, each with the number of steps done."""

    def __init__(self, path: Path, start: int) -> None:
        """Lines after step `start`, of a run that went beyond its last checkpoint, are dropped."""
        self._path = path
        lines = _read_lines(path)
        with atomic_path(path) as part:
            part.write_text(
                "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= start)
            )

    def write(self, step: int, **metrics: Any) -> None:
        """Append a line; metrics are numbers, or arrays of one, and null where not finite."""
        values = {"step": step} | {name: _finite(value) for name, value in metrics.items()}
        with self._path.open("a") as file:
            file.write(json.dumps(values) + "\n")


class TensorBoard:
    """Metrics and pictures for TensorBoard."""

    def __init__(self, folder: Path, start: int) -> None:
        """Open the writer; steps after `start` in the folder are no longer shown."""
        from tensorboardX import SummaryWriter  # here, since most runs do without

        self._writer = SummaryWriter(str(folder), purge_step=start + 1)

    def write(self, step: int, **metrics: Any) -> None:
        """Write metrics: numbers, or arrays of one."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), step)

    def write_picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Write a picture, uint8 [H, W, 3]."""
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is not written yet."""
        self._writer.close()


def plot_curve(metrics: Path, path: Path, title: str = "") -> None:
    """Plot the losses in a metrics.jsonl as a PNG file.

    Left: the training loss with a running mean, and the held-out loss; right: the running means of
    the loss in each quarter of the noise levels, the first of which has the least noise.

    Raises: OSError for files that cannot be read or written.
    """
    metrics.stat()  # raises where it does not exist
    lines = _read_lines(metrics)
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    step, loss = _series(lines, "loss")
    left.plot(step, loss, color="C0", alpha=0.3, linewidth=0.8)
    left.plot(step, running_mean(loss), color="C0", label="loss")
    step, held_out = _series(lines, "held_out_loss")
    left.plot(step, held_out, color="C1", marker="o", label="held-out images, first average")
    for i, name in enumerate(QUARTILES):
        step, loss = _series(lines, name)
        if len(step):  # students of fewer levels than quartiles have none
            right.plot(step, running_mean(loss), label=f"levels of quartile {i + 1}")
    for axes in (left, right):
        axes.set(xlabel="step", yscale="log")
        axes.grid(alpha=0.3, which="both")
        if axes.lines:
            axes.legend(fontsize=8)
    left.set(ylabel="loss", title=title)
    with atomic_path(path) as part:
        figure.savefig(part, dpi=90, format="png")


def running_mean(values: np.ndarray, share: float = 0.03) -> np.ndarray:
    """The running mean of values [N] over a share of them around each."""
    half = max(1, round(share * len(values) / 2))
    total = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(len(values)) - half, 0)
    last = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (total[last] - total[first]) / (last - first)


def _series(lines: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps and values of a metric, without those that are null."""
    found = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    steps, values = [step for step, _ in found], [value for _, value in found]
    return np.array(steps), np.array(values, np.float64)


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    # A line that was cut short by a kill is dropped, and all lines after it.
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
