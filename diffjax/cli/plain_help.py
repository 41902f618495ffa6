"""Help texts in plain words, as wide as the terminal.

tyro writes types of Python, and keeps line breaks inside of sentences. Here a type gives the words
of its values: N for an integer, X for a real number, TEXT for a string, and "N ..." for several.
That an option may be None its own sentence says.
"""

import contextlib
import io
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, TextIO

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

REGISTRY = ConstructorRegistry()
WORDS = {"INT": "N", "FLOAT": "X", "STR": "TEXT"}

_defaults: list[bool] = []  # not empty while tyro's own rules are asked


@contextlib.contextmanager
def _default_rules() -> Iterator[None]:
    _defaults.append(True)
    try:
        yield
    finally:
        _defaults.pop()


@REGISTRY.primitive_rule
def _plain_values(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    if _defaults:
        return None
    with _default_rules():
        spec = ConstructorRegistry.get_primitive_spec(info)
    if not isinstance(spec, PrimitiveConstructorSpec):
        return None
    return replace(spec, metavar=plain_metavar(spec.metavar))


@REGISTRY.struct_rule
def _plain_fields(info: StructTypeInfo) -> StructConstructorSpec | None:
    if _defaults:
        return None
    with _default_rules():
        spec = ConstructorRegistry.get_struct_spec(info)
    if not isinstance(spec, StructConstructorSpec):
        return None
    return replace(spec, fields=tuple(map(_unbroken, spec.fields)))


def _unbroken(field: StructFieldSpec) -> StructFieldSpec:
    # tyro keeps the line breaks of a sentence in the source, and shows no value for ().
    found = field.helptext
    text = found() if callable(found) else found
    if isinstance(field.default, tuple) and not field.default:
        kind: Any = Annotated[field.type, tyro.conf.arg(help_behavior_hint="(default: none)")]
        field = replace(field, type=kind)
    return field if text is None else replace(field, helptext=" ".join(text.split()))


def plain_metavar(metavar: str) -> str:
    """A metavar of tyro in plain words: "{None}|[INT [INT ...]]" is "N ..."."""
    metavar = metavar.replace("{None}|", "").replace("|{None}", "")
    metavar = re.sub(r"^\{([A-Z .\[\]]+)\}$", r"\1", metavar)
    metavar = re.sub(r"\[(\S+) \[\1 \.\.\.\]\]", r"\1 ...", metavar)
    return re.sub(r"\b[A-Z]+\b", lambda word: WORDS.get(word[0], word[0]), metavar)


# ------------------------------------------------------------------------------- pages


class _Page(io.TextIOWrapper):
    """Text for another stream, with the colours and the characters that it can show."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(io.BytesIO(), stream.encoding or "utf-8", write_through=True)
        self._is_terminal = stream.isatty()

    def isatty(self) -> bool:
        return self._is_terminal

    def text(self) -> str:
        self.seek(0)
        return self.read()


@contextlib.contextmanager
def wrapped() -> Iterator[None]:
    """Print what is printed to stdout in here with no line wider than the terminal."""
    page = _Page(sys.stdout)
    try:
        with contextlib.redirect_stdout(page):
            yield
    finally:
        print("\n".join(map(_wrap, page.text().splitlines())))


def _wrap(line: str) -> str:
    columns = shutil.get_terminal_size().columns
    if len(re.sub(r"\x1b\[[0-9;]*m", "", line)) <= columns:
        return line
    indent = "    " if line.startswith("usage:") else ""
    long_words = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(line.strip(), columns, subsequent_indent=indent, **long_words)
