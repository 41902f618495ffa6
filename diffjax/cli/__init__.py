"""Programs: parsing, progress and exit codes. Nothing imports them.

`diffjax COMMAND ...`, or `python -m diffjax COMMAND ...`.
"""

import importlib
import sys
from collections.abc import Sequence

from diffjax.cli import common
from diffjax.config import suggest

COMMANDS = {
    "train": "Train a diffusion model, or resume its training.",
    "distill": "Distill a trained model into students of few steps.",
    "sample": "Sample images from a trained model.",
    "frontier": "Measure quality and latency of many samplers.",
    "evaluate": "Measure the quality of one sampler.",
    "edit": "Reconstruct, interpolate, vary or inpaint images.",
    "convert": "Convert between run folders and folders of diffusers.",
    "bench": "Measure what networks, sampling and training cost.",
    "demo": "Compare DDPM, DDIM and guided DDIM on one trained model.",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command: of these arguments, or those of the command line."""
    command, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if command in ("-h", "--help"):
        lines = [f"  {name:<12}{text}" for name, text in COMMANDS.items()]
        print("usage: diffjax COMMAND ...\n\n" + "\n".join(lines) + "\n\ndiffjax COMMAND --help lists its options.")
        return
    if command not in COMMANDS:
        common.exit_with_error("diffjax", f"there is no command {command!r}: {suggest(command, list(COMMANDS))}")
    if command == "distill":
        command, rest = "train", ["distill", *rest]
    common.main(importlib.import_module(f"diffjax.cli.{command}").main, rest)
