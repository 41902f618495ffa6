"""What things cost.

diffjax bench                 networks: passes, training steps, images, beside diffusers where it
is installed diffjax bench sampler         the compiled sampling loop beside its network diffjax
bench guidance        every kind of guidance beside none diffjax bench training        steps in one
dispatch, real data and saves, beside bare training steps
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from matplotlib.figure import Figure

from diffjax.bench import first_image, networks
from diffjax.bench.guidance import bench_guidance
from diffjax.bench.loop import bench_sampler
from diffjax.bench.training import bench_training, trainers
from diffjax.cli import common
from diffjax.evaluation.results import TimingRow, markdown
from diffjax.inference.pipeline import describe_devices

PROGRAM = "diffjax bench"


@dataclass(frozen=True)
class Options:
    """Measure what networks, sampling, guidance or training cost."""

    what: tyro.conf.Positional[Literal["networks", "sampler", "guidance", "training"]] = "networks"
    """Networks, the compiled sampling loop beside its network, every kind of guidance beside none,
    or what training costs beside its steps."""
    pairs: int = 15
    """Times that each comparison is repeated, its sides in turns."""
    quick: bool = False
    """Networks: only what takes seconds, three times each."""
    out: str = "runs/bench"
    """Networks: folder of bench.json, bench.md and bench.png."""
    npz: str | None = None
    """Training: an .npz file of images for mnist_small, in place of tensorflow-datasets' MNIST."""


def main(arguments: list[str]) -> None:
    """Measure and print."""
    options = common.parse(Options, PROGRAM, arguments)
    with common.user_errors(PROGRAM):
        if options.pairs < 1:
            raise ValueError(f"--pairs is {options.pairs}: measure once or more")
        out = Path(options.out) / "bench.json"
        if options.what == "networks":
            common.check_output(out, ".json")
        if options.what != "training" and options.npz is not None:
            raise ValueError(f"--npz belongs to training: leave it out of {options.what}")
        made = trainers(options.npz and Path(options.npz)) if options.what == "training" else []
    if options.what == "networks":
        print(
            bench_networks(
                out, options.quick, min(options.pairs, 3) if options.quick else options.pairs
            )
        )
    elif options.what == "training":
        print(bench_training(made, options.pairs))
    else:
        print({"sampler": bench_sampler, "guidance": bench_guidance}[options.what](options.pairs))


def bench_networks(out: Path, quick: bool, repeats: int) -> str:
    """The table of all cases; written after every case, with the rows as JSON and a picture beside
    it.
    """
    rows: list[TimingRow] = []
    firsts = first_image.measure("digits")
    report = ""
    for row in networks.measure(networks.cases(quick), repeats):
        rows.append(row)
        out.write_text(
            json.dumps([dataclasses.asdict(row) | {"mfu": row.mfu} for row in rows], indent=1)
            + "\n"
        )
        report = f"{head(rows)}\n\n{markdown(rows)}\n\n{to_first_image(firsts)}"
        out.with_suffix(".md").write_text(report + "\n")
    plot(rows, out.with_suffix(".png"))
    return f"{report}\n\nwrote {out}, {out.with_suffix('.md')}, {out.with_suffix('.png')}"


def head(rows: list[TimingRow]) -> str:
    """Where figures were taken."""
    ceilings = ", ".join(
        f"{c / 1e9:.0f} GFLOP/s in {d}"
        for d, c in sorted({row.dtype: row.ceiling for row in rows}.items())
    )
    beside = f"; beside {rows[0].peer}, in turns" if rows[0].peer else ""
    return (
        f"{describe_devices()}, jax {jax.__version__}{beside}; medians, ± half the distance of the quartiles; "
        + (f"MFU is of the machine's own matrix product, here {ceilings}")
    )


def to_first_image(firsts: list[dict[str, float]]) -> str:
    """A table of the parts."""
    lines = [
        "| digits, first image by DDIM-50, seconds | "
        + " | ".join(first_image.PARTS)
        + " | in all |"
    ]
    lines.append("|---" * (len(first_image.PARTS) + 2) + "|")
    for name, parts in zip(("compiling", "from the persistent cache"), firsts, strict=True):
        lines.append(
            f"| {name} | "
            + " | ".join(f"{s:.2f}" for s in parts.values())
            + f" | {sum(parts.values()):.2f} |"
        )
    return "\n".join(lines)


def plot(rows: list[TimingRow], path: Path) -> None:
    """Milliseconds of every row, and diffusers' beside them, on a logarithmic axis."""
    figure = Figure(figsize=(9, 1 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    place = np.arange(len(rows))[::-1]
    axes.barh(place + 0.2, [1e3 * row.seconds for row in rows], 0.4, label="diffjax")
    theirs = [1e3 * (row.peer_seconds or np.nan) for row in rows]
    if rows[0].peer:
        axes.barh(place - 0.2, theirs, 0.4, label=rows[0].peer)
    axes.set_yticks(
        place, [f"{r.network}: {describe(r)}, batch {r.batch}, {r.dtype}" for r in rows], fontsize=8
    )
    axes.set(
        xscale="log", xlabel="milliseconds", ylim=(-0.8, len(rows) - 0.2), title=describe_devices()
    )
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=110)


def describe(row: TimingRow) -> str:
    """As in "DDIM-50, guided in one pass"."""
    text = row.what if row.steps is None else f"DDIM-{row.steps}"
    return text + (f", guided {row.guidance}" if row.guidance else "")
