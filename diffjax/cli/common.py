"""What the programs share: typed options, and errors of one sentence."""

import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import tyro

from diffjax.config import suggest
from diffjax.devices import cpu


def exit_with_error(program: str, message: object) -> NoReturn:
    """Print one line and end with exit code 2: something that the user can put right."""
    print(f"{program}: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def user_errors(program: str) -> Iterator[None]:
    """Inside, a ValueError or OSError is the user's to put right: its message is printed, without a traceback.

    For checking what was asked, and for reading and writing files; not around computations, where such an error is a
    defect of ours and its traceback is wanted.
    """
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}" if error.strerror and error.filename else error
        exit_with_error(program, reason)
    except ValueError as error:
        exit_with_error(program, error)


def main(program: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Run a program with these arguments. Ctrl-C ends it with exit code 130, without a traceback."""
    cpu.tune()
    try:
        program(arguments)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        raise SystemExit(130) from None


def parse(kind: type, program: str, arguments: Sequence[str], default: Any = None) -> Any:
    """The options of a program, as the typed dataclass `kind`; its docstrings are the help."""
    options: dict[str, Any] = {"prog": program, "args": list(arguments), "return_unknown_args": True}
    if default is not None:
        options["default"] = default
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            parsed, unknown = tyro.cli(kind, **options)
    except SystemExit as end:
        if end.code:
            exit_with_error(program, _sentence(errors.getvalue()) + f" (see {program} --help)")
        raise
    if unknown:
        known = re.findall(r"--[\w.-]+", _help(kind, options))
        hint = suggest(unknown[0].split("=")[0], known) if unknown[0].startswith("-") else f"see {program} --help"
        exit_with_error(program, f"there is no option {unknown[0]!r}: {hint}")
    return parsed


def check_output(path: Path, *suffixes: str) -> Path:
    """The path, if a file of one of these suffixes can be written there; its folder is made. ValueError or OSError if
    not: better before an hour of sampling than after it.
    """
    if path.suffix not in suffixes:
        raise ValueError(f"{path} is to be a {' or '.join(suffixes)} file: give it that ending")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}): choose another place") from error
    return path


def _sentence(box: str) -> str:
    # tyro draws its errors in boxes of unicode or ASCII: a title, what is wrong, a rule, and advice.
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    blocks = "\n".join("" if set(line) <= set("─-╰╯") else line for line in lines).split("\n\n")
    return next((" ".join(block.split()) for block in blocks if block.strip()), box.strip())


def _help(kind: type, options: dict[str, Any]) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        tyro.cli(kind, **(options | {"args": ["--help"]}))
    return text.getvalue()
