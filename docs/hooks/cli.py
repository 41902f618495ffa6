"""A mkdocs hook: the page cli.md is made of `diffjax COMMAND --help` when the site is built."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
INTRODUCTION = """# Command line

`diffjax COMMAND ...`, or `python -m diffjax COMMAND ...`. This page is made from the help texts of
the commands.

- MODEL is a run folder, or `hf:FOLDER` or `hf:OWNER/NAME` for a network of diffusers.
- CONFIG is the name of a configuration, or the path of a `.py` file.
- Errors that the user can correct are one line on the standard error, with exit code 2; Ctrl-C ends
  with 130, and an interrupted training with 128 plus the signal.
"""
# Commands whose help is that of their parts.
PARTS = {
    "edit": ("reconstruct", "interpolate", "vary", "inpaint"),
    "bench": ("networks", "sampler", "guidance", "training"),
}
ARGUMENTS = {"train": ("digits",)}  # the options of `train` are those of a configuration


def help_of(*command: str) -> str:
    """The help text of a command, as it is printed on 100 columns.

    Raises: RuntimeError if the command fails.
    """
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-m", "diffjax", *command, "--help"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"diffjax {' '.join(command)} --help: {done.stderr.strip()}")
    return re.sub(r"\x1b\[[0-9;]*m", "", done.stdout).strip()


def page() -> str:
    """The page in Markdown."""
    overview = help_of()
    sections = [INTRODUCTION, f"```text\n{overview}\n```\n"]
    for name in re.findall(r"^  ([a-z-]+) ", overview, re.M):
        sections.append(f"## {name}\n")
        for part in PARTS.get(name, ("",)):
            command = (name, *ARGUMENTS.get(name, ()), *filter(None, [part]))
            heading = f"### {name} {part}\n\n" if part else ""
            sections.append(f"{heading}```text\n{help_of(*command)}\n```\n")
    return "\n".join(sections)


def on_files(files: Files, config: Any) -> Files:
    """Add the page to those of the site."""
    files.append(File.generated(config, "cli.md", content=page()))
    return files
