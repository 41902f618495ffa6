"""Helpers of tests. They do not import JAX, since conftest sets its environment first."""

import re
import socket
from importlib import metadata
from pathlib import Path

import pytest

# Most of the suite's time is compiling: the compiler may be quick rather than good.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_parallel_codegen_split_count=2"
)
# The emitters of fusions take half of the compiler's time. An unknown flag would end the program.
if metadata.version("jaxlib").startswith("0.10."):
    QUICK += " --xla_cpu_use_fusion_emitters=false"
ROOT = Path(__file__).parent.parent
QUIET = ("--train.preview-every=0", "--train.eval-every=0")
TINY = (
    "--network.channels=4",
    "--network.norm-groups=1",
    "--network.multipliers=1",
    "--network.attention",
    "--network.heads=1",
)


def free_port():
    """A port of this machine that nothing listens at."""
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


# ------------------------------------------------------------------------------- messages
# Tests ask for the names and values in a message, and leave its sentences free.


def naming(*words):
    """A regex of text that has every word, as a whole and in any order: match=naming("steps", 0).

    A name may be an option (save_every is also --save-every), and 2 is also 2.0, but neither 2.5
    nor 12.
    """
    return r"(?s)\A" + "".join(f"(?=.*{_whole(str(word))})" for word in words)


def _whole(word):
    if re.fullmatch(r"-?\d+", word):
        return rf"(?<![\w-])(?<!\d[.,]){word}(?:\.0+)?(?![\w-]|[.,]\d)"
    return rf"(?<![\w-])(?:--)?{re.escape(word).replace('_', '[-_]')}(?![\w-])"


def of_steps(folder, done, steps):
    """A regex of text with a run folder, and after it the steps done and the steps in total."""
    return rf"{re.escape(str(folder))}\D+\b{done}\D+\b{steps}\b"


# Progress as tqdm draws it, with a total and without, and its cursor's way back up.
PROGRESS = re.compile(
    r"[^\r\n]*?(?:\d+%\|[^|\r\n]*\|[^[\r\n]*|\d+ \w+ )\[\d+:\d\d[^]\r\n]*\]|\x1b\[A"
)


def lines_of(err):
    """The lines of stderr, without progress; an error may stand on the line of a bar."""
    return [line for line in PROGRESS.sub("", err).splitlines() if line.strip()]


def check_told(code, err, names, after_progress=False, **places):
    """A program ended with exit code 2 and one line on stderr that has the names: ("steps", "0").

    after_progress: there may be progress bars too, which have names and numbers of their own.
    """
    lines = lines_of(err) if after_progress else err.strip().splitlines()
    assert code == 2, err
    assert len(lines) == 1, err
    assert "Traceback" not in err
    names = [name.format(**places) for name in ([names] if isinstance(names, str) else names)]
    assert names
    assert all(names)
    assert [name for name in names if not re.search(naming(name), lines[0])] == [], lines[0]


def check_mistake(main, command, names, capsys, after_progress=False, **places):
    """A command, run in this process by main(words), ends as `check_told` says."""
    with pytest.raises(SystemExit) as end:
        main([word.format(**places) for word in command.split()])
    check_told(end.value.code, capsys.readouterr().err, names, after_progress, **places)
