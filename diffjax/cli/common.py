"""Parsing, exit codes, output files and progress bars of all commands."""

import contextlib
import io
import itertools
import logging
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro
from tqdm import tqdm

from diffjax.cli import plain_help, terminal
from diffjax.config import Config, config_names, load_config, suggest

# ------------------------------------------------------------------------------- errors


class UserError(Exception):
    """A mistake of the user, printed as one line without a traceback."""


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn the ValueError and OSError of a block into UserError.

    For checking what was asked, and for reading and writing files; not around computations, where
    such an error is a defect of ours, whose traceback is wanted.
    """
    try:
        yield
    except OSError as error:
        raise UserError(describe_os_error(error)) from error
    except ValueError as error:
        raise UserError(error) from error


def describe_os_error(error: OSError) -> str:
    """The reason and the file, as in "Permission denied: runs/digits"."""
    has_file = error.strerror and error.filename
    return f"{error.strerror}: {error.filename}" if has_file else str(error)


@contextlib.contextmanager
def exit_codes(program: str) -> Iterator[None]:
    """Print a UserError, or a FloatingPointError, as one line and exit with code 2.

    Ctrl-C exits with 130, and a closed pipe with 141.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        yield
    except (UserError, FloatingPointError) as error:
        print(f"{program}: {' '.join(str(error).splitlines())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # as in `diffjax sample --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


# ------------------------------------------------------------------------------- parsing


def parse(
    kind: Any, program: str, arguments: Sequence[str], default: Any = None, description: str = ""
) -> Any:
    """Parse a command's options.

    kind: a typed dataclass, or a union of several, whose docstrings are the help.

    Raises: UserError for an option that does not exist, with the nearest one, or has another type.
    """
    words, subcommands = list(arguments), _subcommands(kind)
    if subcommands and words and words[0] not in [*subcommands, "-h", "--help"]:
        raise UserError(f"there is no command {words[0]!r}: {suggest(words[0], list(subcommands))}")
    if subcommands and words and words[0] in subcommands:
        return parse(subcommands[words[0]], f"{program} {words[0]}", words[1:], default)
    settings: dict[str, Any] = {"prog": program, "registry": plain_help.REGISTRY}
    settings |= {"description": description} if description else {}
    settings |= {} if default is None else {"default": default}
    if {"-h", "--help"} & set(words):
        with plain_help.wrapped():  # tyro would leave out the options that stand before it
            tyro.cli(kind, args=["--help"], **settings)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            parsed, unknown = tyro.cli(kind, args=words, return_unknown_args=True, **settings)
    except SystemExit as end:
        if end.code:
            message = _first_sentence(errors.getvalue())
            raise UserError(f"{message} (see {program} --help)") from None
        raise
    if unknown:
        raise UserError(_describe_unknown(unknown[0], kind, settings))
    return parsed


def parse_with_config(kind: Any, program: str, arguments: Sequence[str]) -> Any:
    """Parse options whose defaults are those of the named configuration.

    The first argument names it, and it is the default of the field `experiment`.

    Raises: UserError as `parse`, and for a configuration that does not exist.
    """
    name = next(iter(arguments), "--help")
    config = Config()
    if not name.startswith("-"):
        with user_errors():
            config = load_config(name)
    elif not {"-h", "--help"} & set(arguments):
        raise UserError(f"{name} comes before the configuration: use {program} CONFIG {name} ...")
    default = kind(tyro.MISSING, tyro.MISSING, experiment=config)
    description = f"{kind.__doc__}\n\nConfigurations: {', '.join(config_names())}."
    return parse(kind, program, arguments or ["--help"], default, description)


def _first_sentence(box: str) -> str:
    # tyro draws its errors in boxes: a title, what is wrong, a rule, and advice.
    lines = [line.strip("│| ") for line in box.splitlines()[1:]]
    blocks = "\n".join("" if set(line) <= set("─-╰╯+") else line for line in lines).split("\n\n")
    sentence = next((" ".join(block.split()) for block in blocks if block.strip()), box.strip())
    missing = re.match(r"Missing from [^:]+: (\S+)", sentence)
    return f"{missing[1]} is missing" if missing else sentence


def _describe_unknown(word: str, kind: Any, settings: dict[str, Any]) -> str:
    program = settings["prog"]
    if not word.startswith("-"):
        return f"there is no argument {word!r} (see {program} --help)"
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        tyro.cli(kind, args=["--help"], **settings)
    known = list(dict.fromkeys(re.findall(r"--[\w.-]+", text.getvalue())))
    return f"there is no option {word!r}: {suggest(word.split('=')[0], known)}"


def _subcommands(kind: Any) -> dict[str, Any]:
    """The dataclasses of a union, by the names of their `tyro.conf.subcommand`."""
    parts = [typing.get_args(part) for part in typing.get_args(kind)]
    return {part[1].name: part[0] for part in parts if len(part) > 1 and part[1].name}


# ------------------------------------------------------------------------------- values


def parse_numbers(name: str, text: str) -> list[float]:
    """Numbers separated by commas.

    Raises: ValueError, naming the option, for another text.
    """
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} is {text!r}: use numbers separated by commas") from None


def parse_integers(name: str, text: str) -> list[int]:
    """Different integers of 0 or more, separated by commas.

    Raises: ValueError, naming the option, for another text.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"{name} is {text!r}: use integers of 0 or more, separated by commas")
    return list(dict.fromkeys(map(int, words)))


def check_output(path: Path, *suffixes: str) -> Path:
    """Check that a file of one of these suffixes can be written; return its path.

    Its folder is created. It is better to fail before an hour of sampling than after it.

    Raises: ValueError for another suffix, a folder, or a place that cannot be written to.
    """
    if path.suffix not in suffixes:
        raise ValueError(f"output file {path} must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise ValueError(f"output file {path} is a folder: name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise ValueError(f"output file {path} cannot be written: {error.strerror}") from error
    return path


def free_path(path: Path) -> Path:
    """The path itself, or the first of a-2.png, a-3.png, ... where a.png exists."""
    others = (path.with_stem(f"{path.stem}-{i}") for i in itertools.count(2))
    return next(each for each in itertools.chain([path], others) if not each.exists())


def check_output_folder(folder: Path, names: Sequence[str], *, overwrite: bool) -> Path:
    """Check that files of these names can be written into a folder, which is created.

    Raises: ValueError for a file in its place, a place that cannot be written to, names that the
    file system does not take, or files that exist and are not to be replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output folder {folder} is a file: name a folder")
    found = [name for name in names if (folder / name).exists()]
    if found and not overwrite:
        raise ValueError(
            f"output folder {folder} has {found[0]}"
            f"{f' and {len(found) - 1} more of the files' if len(found) > 1 else ''}: use another"
            " folder, or --overwrite"
        )
    for name in names:
        check_output(folder / name, Path(name).suffix)
    return folder


def file_word(text: str) -> str:
    """A text as a part of a file's name: without slashes, and at most 100 bytes long."""
    text = re.sub(r"[/\\\x00-\x1f]", "_", text)
    return text.encode()[:100].decode(errors="ignore")


# ------------------------------------------------------------------------------- printing


def print_report(markdown: str, file: Path | None = None) -> None:
    """Print a report in Markdown as narrow as a terminal; write it as it is.

    Raises: UserError for a file that cannot be written.
    """
    print(terminal.narrow(markdown))
    if file is not None:
        with user_errors():
            file.write_text(f"{markdown}\n")
        print(f"wrote {file}")


def progress_bar(
    total: int, description: str = "", unit: str = "step", *, disable: bool = False
) -> tqdm:
    """A progress bar on stderr, as wide as the terminal."""
    return tqdm(total=total, desc=description, unit=unit, dynamic_ncols=True, disable=disable)


def compiling(bar: tqdm, description: str, after: str = "") -> Callable[[int], None]:
    """The update of a bar, which says that programs are compiled until its first call.

    after: what follows the last step, which the bar says then.
    """
    bar.set_description(f"{description}, compiling")

    def update(steps: int) -> None:
        bar.set_description(description, refresh=False)
        bar.update(steps)
        if after and bar.n >= bar.total:
            bar.set_description(after)

    return update
