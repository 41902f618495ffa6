"""Reports in Markdown, for a terminal: no line is wider than 120 columns."""

import re
import textwrap
from collections.abc import Iterable, Sequence

COLUMNS = 120
GAP = "  "  # between columns

Line = Sequence[str]  # of a table, cell by cell


def narrow(markdown: str, columns: int = COLUMNS) -> str:
    """A report without the marks of Markdown, at most so many columns wide.

    Of a table, what all rows have in common stands below it, one field per line. A table that is
    still too wide is written in parts with the numbers of its rows.
    """
    parts: list[str] = []
    lines: list[list[str]] = []
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("|"):
            lines.append(_cells(line))
            continue
        if lines:
            parts.append(table_text([line for line in lines if not _is_rule(line)], columns))
            lines = []
        parts.append(_paragraph(_unescape(line), columns))
    return "\n".join(parts).rstrip("\n")


def table_text(lines: Sequence[Line], columns: int = COLUMNS) -> str:
    """A table for a terminal, as `narrow` has it. lines: of cells, the heads first."""
    fields = list(zip(*lines, strict=True))
    shared = [field for field in fields if len(set(field[1:])) == 1]
    differing = [field for field in fields if field not in shared]
    tables = [_part_text(part, columns) for part in _parts(differing, columns)]
    common = _listed(((head, value) for head, value, *_ in shared), columns)
    return "\n\n".join(part for part in (*tables, common) if part)


def _parts(fields: Sequence[Line], columns: int) -> list[list[Line]]:
    """The columns of one table, or of several with the numbers of the rows."""
    if not fields or _width(fields) <= columns:
        return [list(fields)] if fields else []
    numbers: Line = ("row", *map(str, range(1, len(fields[0]))))
    parts: list[list[Line]] = [[numbers]]
    for field in fields:
        if len(parts[-1]) > 1 and _width([*parts[-1], field]) > columns:
            parts.append([numbers])
        parts[-1].append(field)
    return parts


def _part_text(fields: Sequence[Line], columns: int) -> str:
    if _width(fields) <= columns:
        return _aligned(zip(*fields, strict=True))
    numbers, field = fields  # which is too wide on its own
    rows = zip(numbers[1:], field[1:], strict=True)
    return f"{field[0]}\n{_listed(rows, columns)}"


def _width(fields: Sequence[Line]) -> int:
    return sum(max(map(len, field)) + len(GAP) for field in fields) - len(GAP)


def _aligned(table: Iterable[Line]) -> str:
    lines = list(table)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        GAP.join(text.ljust(width) for text, width in zip(line, widths, strict=True))
        for line in lines
    )
    return "\n".join(line.rstrip() for line in padded)


def _listed(pairs: Iterable[tuple[str, str]], columns: int) -> str:
    """Values below each other, after their heads, but for those that are empty."""
    known = [(head, value) for head, value in pairs if value]
    width = max((len(head) for head, _ in known), default=0) + len(GAP)
    indent = min(width, columns // 2)
    return "\n".join(
        textwrap.fill(
            value, columns, initial_indent=head.ljust(width), subsequent_indent=" " * indent,
            break_on_hyphens=False,
        )
        for head, value in known
    )  # fmt: skip


def _paragraph(text: str, columns: int) -> str:
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(text, columns, subsequent_indent=indent, break_on_hyphens=False)


def _cells(line: str) -> list[str]:
    return [_unescape(cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def _is_rule(line: Line) -> bool:
    return all(set(cell) <= {"-", ":"} and cell for cell in line)


def _unescape(text: str) -> str:
    return re.sub(r"\\([\\|<&])", r"\1", text)
