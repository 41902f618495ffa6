"""What tests share that is no fixture. Nothing here imports JAX: conftest sets its environment first."""

import re
import socket
from pathlib import Path

import pytest

# Most of the suite's time is compiling: the compiler may be quick rather than good.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_parallel_codegen_split_count=2"
)
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


# ------------------------------------------------------------------------------------------- what is said
# Tests ask for the names and values in what is said, and leave its sentences free.


def naming(*words):
    """A regex of text that has every word, as a whole and in any order: match=naming("steps", 0). A name may be an
    option (save_every is also --save-every), and 2 is also 2.0, but neither 2.5 nor 12."""
    return r"(?s)\A" + "".join(f"(?=.*{_whole(str(word))})" for word in words)


def _whole(word):
    if re.fullmatch(r"-?\d+", word):
        return rf"(?<![\w-])(?<!\d[.,]){word}(?:\.0+)?(?![\w-]|[.,]\d)"
    return rf"(?<![\w-])(?:--)?{re.escape(word).replace('_', '[-_]')}(?![\w-])"


def of_steps(folder, done, steps):
    """A regex of text that has a run folder, and after it how many steps are done, and of how many."""
    return rf"{re.escape(str(folder))}\D+\b{done}\D+\b{steps}\b"


def check_told(code, err, names, after_progress=False, **places):
    """A program has ended with exit code 2 and a line on stderr that has the names: ("steps", "0"). It is the only
    line, or the last one after those of a progress bar.
    """
    *before, line = err.strip().splitlines() or [""]
    assert code == 2, err
    assert after_progress or not before, err
    assert "Traceback" not in err
    names = [name.format(**places) for name in ([names] if isinstance(names, str) else names)]
    assert names
    assert all(names)
    assert [name for name in names if not re.search(naming(name), line)] == [], line


def check_mistake(main, command, names, capsys, **places):
    """A command, run in this process, ends as check_told says."""
    arguments = [word.format(**places) for word in command.split()]
    with pytest.raises(SystemExit) as end:
        main(arguments)
    check_told(end.value.code, capsys.readouterr().err, names, **places)
