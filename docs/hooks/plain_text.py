"""A griffe extension: docstrings are plain text, so Markdown's marks in formulas are escaped."""

import re
from typing import Any

import griffe

MARKS = re.compile(r"([*_\[\]<>])")


def escape(text: str) -> str:
    """The text with Markdown's marks escaped, except in code and in indented blocks."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("    "):
            parts = line.split("`")
            parts[::2] = [MARKS.sub(r"\\\1", part) for part in parts[::2]]
            line = "`".join(parts)
        lines.append(line)
    return "\n".join(lines)


class PlainText(griffe.Extension):
    """Escape the docstrings of all objects."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Escape one docstring, when its object has been read."""
        if obj.docstring:
            obj.docstring.value = escape(obj.docstring.value)
