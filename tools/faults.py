"""The faults that `make mutants` plants: changes of one place of a file.

They stand for what goes wrong between an option and a result: an argument that is not passed, two
that are exchanged, another constant, a comparison or condition turned round, another variable
returned, a statement left out. Messages, annotations, looks and default numbers are left alone.
"""

import ast
import contextlib
import difflib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Keywords of texts and looks, which no result depends on.
LOOKS = {
    "help", "desc", "title", "unit", "dynamic_ncols", "leave", "stacklevel", "fontsize", "figsize",
    "dpi", "linewidth", "markersize", "marker", "color", "capsize", "zorder", "layout", "loc",
    "ncol", "ncols", "textcoords", "xytext",
}  # fmt: skip
SWAPS: dict[type, tuple[bytes, bytes]] = {
    ast.Lt: (b"<", b"<="), ast.LtE: (b"<=", b"<"), ast.Gt: (b">", b">="), ast.GtE: (b">=", b">"),
    ast.Eq: (b"==", b"!="), ast.NotEq: (b"!=", b"=="), ast.Is: (b"is", b"is not"),
    ast.IsNot: (b"is not", b"is"), ast.In: (b"in", b"not in"), ast.NotIn: (b"not in", b"in"),
    ast.And: (b"and", b"or"), ast.Or: (b"or", b"and"), ast.Add: (b"+", b"-"),
    ast.Sub: (b"-", b"+"), ast.Mult: (b"*", b"/"), ast.Div: (b"/", b"*"),
    ast.FloorDiv: (b"//", b"*"), ast.Mod: (b"%", b"//"),
}  # fmt: skip
Edits = list[tuple[slice, bytes]]


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    path: str
    line: int
    old: str
    new: str

    def describe(self) -> str:
        """The place of the change, and the lines that it removes and adds."""
        sides = self.old.splitlines(), self.new.splitlines()
        diff = list(difflib.unified_diff(*sides, n=0, lineterm=""))[3:]
        return "\n".join([f"{self.path}:{self.line}", *diff])


@dataclass(frozen=True)
class Fault:
    """The edits of a mutant, which may not parse."""

    source: "Source"
    edits: Edits

    def mutant(self) -> Mutant | None:
        """The mutant; None if it does not parse, or parses as the same."""
        old = new = self.source.data
        for place, text in sorted(self.edits, key=lambda edit: -edit[0].start):
            new = new[: place.start] + text + new[place.stop :]
        with contextlib.suppress(SyntaxError):  # the parentheses of an argument are in no node
            if ast.dump(ast.parse(new)) != ast.dump(ast.parse(old)):
                line = old.count(b"\n", 0, min(place.start for place, _ in self.edits)) + 1
                return Mutant(self.source.path, line, old.decode(), new.decode())
        return None


class Source:
    """The text of a file, and the faults of its nodes."""

    def __init__(self, root: Path, path: str) -> None:
        """Read a file."""
        self.path, self.data = path, (root / path).read_bytes()
        lines = map(len, self.data.splitlines(keepends=True))
        self.begin = [0, *itertools.accumulate(lines)]

    def faults(self) -> Iterator[Fault]:
        """The faults of the file, in order."""
        for node in nodes_of(ast.parse(self.data)):
            for edits in self.edits_of(node):
                yield Fault(self, edits)

    def span(self, node: Any) -> slice:
        """The place of a node in the bytes of the file."""
        start = self.begin[node.lineno - 1] + node.col_offset
        return slice(start, self.begin[node.end_lineno - 1] + node.end_col_offset)

    def edits_of(self, node: Any) -> Iterator[Edits]:
        """The edits of each fault at a node."""
        match node:
            case ast.Constant(value=bool() | int() | float() as old):
                new = not old if isinstance(old, bool) else old + 1
                new = 10 * old or 1.0 if isinstance(old, float) else new
                yield [(self.span(node), str(new).encode())]
            case ast.Call():
                yield from self.removed(node)
                yield from self.exchanged(node.args)
                yield from self.exchanged([keyword.value for keyword in node.keywords])
            case ast.FunctionDef():
                yield from self.returned(node)
            case ast.BinOp():
                yield from self.swapped([node.op], [node.left, node.right])
            case ast.BoolOp(op=op, values=values):
                yield from self.swapped([op] * (len(values) - 1), values)
            case ast.Compare():
                yield from self.swapped(node.ops, [node.left, *node.comparators])
            case ast.If() | ast.While() | ast.IfExp():
                yield self.negated(node.test)
            case ast.comprehension(ifs=tests):
                yield from map(self.negated, tests)
            case ast.Assign() | ast.AugAssign() | ast.Expr(value=ast.Call()):
                yield [(self.span(node), b"pass")]
            case ast.Break() | ast.Continue():
                yield [(self.span(node), b"pass")]

    def negated(self, test: ast.expr) -> Edits:
        """A condition, negated."""
        return [(self.span(test), b"(not (" + self.data[self.span(test)] + b"))")]

    def swapped(self, ops: Sequence[ast.AST], sides: Sequence[ast.expr]) -> Iterator[Edits]:
        """Each operator between two sides, replaced by its neighbour or its opposite."""
        for op, (left, right) in zip(ops, itertools.pairwise(sides), strict=True):
            old, new = SWAPS.get(type(op), (b"", b""))
            place = slice(self.span(left).stop, self.span(right).start)
            if old and old in self.data[place]:
                yield [(place, self.data[place].replace(old, new, 1))]

    def removed(self, call: ast.Call) -> Iterator[Edits]:
        """Each keyword, left out."""
        every = [*call.args, *call.keywords]
        spans = [self.span(argument) for argument in every]
        for i, argument in enumerate(every):
            if isinstance(argument, ast.keyword) and argument.arg not in LOOKS:
                start = spans[i - 1].stop if i else spans[i].start
                stop = spans[i].stop if i or len(every) == 1 else spans[1].start
                yield [(slice(start, stop), b"")]

    def exchanged(self, values: Sequence[ast.expr]) -> Iterator[Edits]:
        """Each two neighbours, exchanged."""
        for one, two in itertools.pairwise(map(self.span, values)):
            yield [(one, self.data[two]), (two, self.data[one])]

    def returned(self, function: ast.FunctionDef) -> Iterator[Edits]:
        """Each returned value, replaced by another variable: the one that was bound last."""
        names = []
        for node in ast.walk(function):
            match node:
                case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()) if name != "self":
                    names.append((node.lineno, name))
        for node in ast.walk(function):
            if isinstance(node, ast.Return) and node.value:
                place = self.span(node.value)
                before = [name for line, name in sorted(names) if line < node.lineno]
                other = [name for name in before if name.encode() != self.data[place]]
                yield from [[(place, name.encode())] for name in other[-1:]]


def nodes_of(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below one where faults are planted."""
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            match child:
                case _ if name in ("annotation", "returns", "decorator_list"):
                    continue
                case ast.Raise() | ast.JoinedStr():  # messages
                    continue
                case ast.keyword(arg=arg) if arg in LOOKS:
                    continue
                case ast.Constant(value=v) if (
                    isinstance(node, ast.AnnAssign) and type(v) is not bool
                ):
                    continue
                case ast.AST():
                    yield child
                    yield from nodes_of(child)
