"""Command lines, options, make targets and links on the pages exist."""

import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from diffjax.build import ModelInfo
from diffjax.checkpoint import Checkpoints
from diffjax.cli import COMMANDS, main
from diffjax.config import Config
from diffjax.nn.conditioning import ClassLabel
from tests.docs.pages import PAGES, ROOT, commands, inline_code, name_of
from tools import mutants

LINES = [(name_of(path), arguments) for path in PAGES for arguments in commands(path)]
# Options of other programs, and the prefixes of a configuration's fields.
FOREIGN = {"--help", "--strict", "--editable"}


def module_of(command):
    return importlib.import_module(f"diffjax.cli.{command.replace('-', '_')}")


def subcommands(command):
    return {
        "edit": [["reconstruct"], ["interpolate"], ["vary"], ["inpaint"]],
        "bench": [["networks"], ["sampler"], ["guidance"], ["training"]],
    }.get(command, [[]])


def write_run(folder):
    """A run folder that has a configuration to read, and no network."""
    info = ModelInfo(Config(), (8, 8, 1), ClassLabel(10))
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, {"params": {"a": np.zeros(1)}}, info.to_dict())
    checkpoints.close()


@pytest.mark.parametrize(
    ("page", "arguments"), LINES, ids=[f"{page}: {shlex.join(line)}"[:90] for page, line in LINES]
)
def test_command_parses(page, arguments, tmp_path, monkeypatch):
    """The real parser of the command takes the line; nothing is run."""
    if "--help" in arguments:
        pytest.skip("prints its help")
    monkeypatch.chdir(tmp_path)
    mine = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.S)
    Path("mine.py").write_text(mine.group(1))
    if "--resume" in arguments:
        write_run(Path(arguments[arguments.index("--resume") + 1]))
    parsed = []
    monkeypatch.setattr(module_of(arguments[0]), "run", parsed.append)
    main(arguments)
    assert len(parsed) == 1


def test_every_command_is_shown():
    """Each command appears in a line of some page."""
    assert set(COMMANDS) - {arguments[0] for _, arguments in LINES} <= {"demo"}


def test_inline_options_exist(capsys):
    """Options in backticks are options of some command."""
    parts = {"train": ["digits"], "dry-run": ["digits"]}
    known = FOREIGN | {f"--{field.name}" for field in dataclasses.fields(mutants.Options)}
    for command in COMMANDS:
        for part in subcommands(command):
            with pytest.raises(SystemExit):
                main([command, *parts.get(command, []), *part, "--help"])
            known |= set(re.findall(r"--[\w.-]+", capsys.readouterr().out))
    for path in PAGES:
        for text in inline_code(path):
            for option in re.findall(r"(?<![\w-])--[a-z][\w.-]*", text):
                prefix = option.endswith(".")
                found = (
                    any(each.startswith(option) for each in known) if prefix else option in known
                )
                assert found, f"{name_of(path)}: {option}"


def test_make_targets_exist():
    """`make TARGET`, in backticks or in a block, names a target of the Makefile."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for path in PAGES:
        named = re.findall(r"(?:`|^)make ([a-z][\w-]*)", path.read_text(), re.M)
        assert set(named) <= targets, name_of(path)


@pytest.mark.parametrize("path", PAGES[:2], ids=name_of)
def test_links_exist(path):
    """Relative links of pages outside of the site lead to files; mkdocs checks the others."""
    for link in re.findall(r"\]\((?!https?:|\.\./\.\./actions)([^)#]+)", path.read_text()):
        assert (path.parent / link).exists(), link


def test_readme_is_short():
    """At most 200 lines."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
