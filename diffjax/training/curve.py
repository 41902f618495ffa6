"""How training went, as a picture."""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

QUARTERS = ("loss_q1", "loss_q2", "loss_q3", "loss_q4")


def draw(metrics: Path, path: Path, title: str = "") -> None:
    """Draw what metrics.jsonl holds: the loss, smoothed too, that of held-out images, and that of each quarter of the
    noise levels, whose first is the one with the least noise. OSError where either file cannot be used.
    """
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]

    def series(name: str) -> tuple[np.ndarray, np.ndarray]:
        # What was not a number is null there, as the loss of a quarter that no example of a batch was in.
        found = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        return np.array([step for step, _ in found]), np.array([value for _, value in found], np.float64)

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    step, loss = series("loss")
    left.plot(step, loss, color="C0", alpha=0.3, linewidth=0.8)
    left.plot(step, smoothed(loss), color="C0", label="loss")
    step, held_out = series("held_out_loss")
    left.plot(step, held_out, color="C1", marker="o", label="held-out images, first average")
    for i, name in enumerate(QUARTERS):
        step, loss = series(name)
        if len(step):  # a student of fewer levels has no quarters
            right.plot(step, smoothed(loss), label=f"levels of quarter {i + 1}")
    for axes in (left, right):
        axes.set(xlabel="step", yscale="log")
        axes.grid(alpha=0.3, which="both")
        if axes.lines:
            axes.legend(fontsize=8)
    left.set(ylabel="loss", title=title)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=90, format="png")
    part.replace(path)


def smoothed(values: np.ndarray, share: float = 0.03) -> np.ndarray:
    """Running mean [N] -> [N] over a share of all values about each, fewer at the ends."""
    half = max(1, round(share * len(values) / 2))
    total = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(len(values)) - half, 0)
    last = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (total[last] - total[first]) / (last - first)
