"""The pages of the documentation, and the code and commands on them."""

import re
import shlex
import sys
from pathlib import Path

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

ROOT = Path(__file__).parents[2]
LESSON = ROOT / "docs" / "lesson.md"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "results").glob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
PARSER = Sybil(parsers=[PythonCodeBlockParser()], pattern="*.md")


def name_of(path):
    """A page by its path from the root of the repository."""
    return str(path.relative_to(ROOT))


def has_python(path):
    """True for a page with Python blocks."""
    return any(language == "python" for language, _ in FENCE.findall(path.read_text()))


def run_page(path):
    """Run the Python blocks of a page, in order and in one namespace, which is returned."""
    document = PARSER.parse(path)
    for example in document.examples():
        example.evaluate()
    return document.namespace


def commands(path):
    """The arguments of each `diffjax ...` line in the fenced blocks of a page."""
    lines = [
        line
        for language, block in FENCE.findall(path.read_text())
        if not language
        for line in block.splitlines()
    ]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("diffjax ")]


def inline_code(path):
    """The texts in backticks of a page, outside of its fenced blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", path.read_text()))


if __name__ == "__main__":
    run_page(Path(sys.argv[1]))
