"""A mkdocs hook: the page cli.md is made of `diffjax COMMAND --help` when the site is built."""

import json
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
# Arguments before --help: parts of a command, or a configuration, whose fields are options.
ARGUMENTS = {
    "edit": ("reconstruct", "interpolate", "vary", "inpaint"),
    "bench": ("networks", "sampler", "guidance", "training"),
    "train": ("digits",),
    "dry-run": ("digits",),
}
# One process prints all help texts, since importing JAX takes longer than they do.
PRINT_ALL = """
import contextlib, io, json, sys
from diffjax.cli import COMMANDS, main

def text(*words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return out.getvalue()

arguments = json.loads(sys.argv[1])
texts = {"": text()}
for command in COMMANDS:
    for words in [[command, argument] for argument in arguments.get(command, [])] or [[command]]:
        texts[" ".join(words)] = text(*words)
print(json.dumps(texts))
"""


def help_texts() -> dict[str, str]:
    """The help text of every command, as it is printed on 100 columns.

    Raises: RuntimeError if a command fails.
    """
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-c", PRINT_ALL, json.dumps(ARGUMENTS)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"help of diffjax: {done.stderr.strip()}")
    texts = json.loads(done.stdout)
    return {name: re.sub(r"\x1b\[[0-9;]*m", "", text).strip() for name, text in texts.items()}


def page() -> str:
    """The page in Markdown."""
    texts = help_texts()
    sections = [INTRODUCTION]
    for name, text in texts.items():
        if not text:
            raise RuntimeError(f"diffjax {name} --help prints nothing")
        heading = f"## {name}\n\n" if name else ""
        sections.append(f"{heading}```text\n{text}\n```\n")
    return "\n".join(sections)


def on_files(files: Files, config: Any) -> Files:
    """Add the page to those of the site."""
    files.append(File.generated(config, "cli.md", content=page()))
    return files
