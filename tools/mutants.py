"""Plant faults in a copy of the package, one at a time, and print those that no test catches.

The test file of the same name runs on a mutant, then the nearest ones by imports; it is caught if a
test fails, or does not end. `docs/testing.md` says how to read what survives.
"""

import contextlib
import itertools
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from tools.faults import Mutant, Source

CONFIGURATION = {"checkpoint.py", "config.py", "build.py"}  # stand beside the mathematics
PEERS = {"diffusers_baseline.py"}  # what make parity tests
IGNORED = shutil.ignore_patterns(".*", "__pycache__", "runs", "site", "dist", "*.egg-info")
PYTEST = ("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=")


@dataclass(frozen=True)
class Options:
    """Which faults to plant."""

    num: int = 50
    """Number of mutants, drawn from all."""
    seed: int = 0
    """Seed of the draw."""
    minutes: float = 60.0
    """Minutes after which no further mutant begins."""
    budget: float = 30.0
    """Seconds of tests beside the file of the same name: processor time, without a mutant."""
    at: tuple[str, ...] = ()
    """Files or FILE:LINE to plant faults at; none: the whole package."""
    caught: bool = False
    """Print the mutants that are caught too, with the test that failed."""
    jobs: int = 1
    """Mutants that are tried at once, each in a copy of its own."""
    root: Path = Path(__file__).parent.parent
    """The checkout to copy."""


def paths_of(root: Path) -> list[str]:
    """Every file of the package but the mathematics."""
    files = [root / "diffjax" / name for name in sorted(CONFIGURATION)]
    files += sorted(root.glob("diffjax/*/*.py"))
    return [file.relative_to(root).as_posix() for file in files if file.name not in PEERS]


def draw(options: Options) -> list[Mutant]:
    """The mutants of a seed."""
    paths, at = paths_of(options.root), set(options.at)
    wanted = {place.partition(":")[0] for place in at} or set(paths)
    faults = [f for p in paths if p in wanted for f in Source(options.root, p).faults()]
    random.Random(options.seed).shuffle(faults)
    mutants = (mutant for fault in faults if (mutant := fault.mutant()))
    mutants = (m for m in mutants if not at or {m.path, f"{m.path}:{m.line}"} & at)
    return list(itertools.islice(mutants, options.num))


class Suite:
    """The test files of a copy: what they import, and how long they take."""

    def __init__(self, root: Path, compiled: Path) -> None:
        """Read the imports of every file; compiled: the folder of compiled programs."""
        self.root, self.compiled = root, compiled
        self.seconds: dict[str, float | None] = {}
        self.locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
        self.imports = {name: self._imports(name) for name in names}

    def choose(self, path: str, budget: float, root: Path) -> tuple[list[str], float]:
        """The test files to run for a file, and the seconds that they take without a mutant."""
        files, total, others = [], 0.0, 0.0
        for file in self._near(path):
            if others > 0.8 * budget:
                break
            mine = file == _mirror(path)
            seconds = self._measure(file, root)
            if seconds is not None and (mine or others + seconds <= budget):
                files.append(file)
                total, others = total + seconds, others + seconds * (not mine)
        return files, total

    def _measure(self, file: str, root: Path) -> float | None:
        with self.locks[file]:
            if file not in self.seconds:
                failed, self.seconds[file] = run([file], root, self.compiled, 1800)
                if failed:
                    self.seconds[file] = None
                    tqdm.write(f"left out, fails without a mutant: {failed}", file=sys.stderr)
        return self.seconds[file]

    def _near(self, path: str) -> Iterator[str]:
        """The test files that reach a file, by the number of imports between them."""
        seen, mirror = {path}, _mirror(path)
        folder = mirror.rpartition("/")[0]
        while reached := {file for file, of in self.imports.items() if of & seen} - seen:
            seen |= reached
            tests = [file for file in reached if re.match(r"tests/(?!docs/).*\btest_", file)]
            yield from sorted(tests, key=lambda f: (f != mirror, f.rpartition("/")[0] != folder, f))

    def _imports(self, name: str) -> set[str]:
        """The files of the package that a file names, and the one that a test file mirrors."""
        text = (self.root / name).read_text()
        words = set(re.findall(r"diffjax(?:\.\w+)+", text))
        for package, names in re.findall(r"from (diffjax[\w.]*) import \(?([\w\s,]+)", text):
            words |= {f"{package}.{name}" for name in [*re.findall(r"\w+", names), "__init__"]}
        files = {Path(word.replace(".", "/")) for word in words}
        files = {part.with_suffix(".py") for file in files for part in (file, file.parent)}
        files.add(Path(re.sub(r"^tests/(.*)test_", r"diffjax/\1", name)))
        return {file.as_posix() for file in files if (self.root / file).exists()} - {name}


def _mirror(path: str) -> str:
    return re.sub(r"^diffjax/(.*?)(\w+\.py)$", r"tests/\1test_\2", path)


def run(files: Sequence[str], root: Path, compiled: Path, limit: float) -> tuple[str | None, float]:
    """The test that fails first, "time" if it is the limit, or None; and processor seconds."""
    own = {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    own["JAX_COMPILATION_CACHE_DIR"] = str(compiled)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        with Path(folder, "out").open("w") as out:
            process = subprocess.Popen(
                [sys.executable, *PYTEST, f"--basetemp={folder}/tests", *files],
                cwd=root,
                env=os.environ | own,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        timer = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        _, status, used = os.wait4(process.pid, 0)
        late = not timer.is_alive()
        timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        with contextlib.suppress(ProcessLookupError):  # what its tests have left running
            os.killpg(process.pid, signal.SIGKILL)
        text = Path(folder, "out").read_text()
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
    name = "time" if late else failed[1] if failed else text[-300:]
    return None if process.returncode == 0 else name, used.ru_utime + used.ru_stime


def try_mutant(mutant: Mutant, suite: Suite, root: Path, options: Options) -> tuple[str, bool]:
    """What became of a mutant, and whether it is caught."""
    files, seconds = suite.choose(mutant.path, options.budget, root)
    path, failed = root / mutant.path, None
    with tempfile.TemporaryDirectory() as folder:
        # What a mutant compiles, or half writes, is not seen by others.
        compiled = shutil.copytree(suite.compiled, f"{folder}/own", copy_function=os.link)
        path.write_text(mutant.new)
        if files:
            failed, _ = run(files, root, Path(compiled), 300 + 20 * seconds)
        path.write_text(mutant.old)
    how = f"caught by {failed}" if failed else f"survived {len(files)} test files"
    return f"{mutant.describe()}\n{how}\n", bool(failed)


def main(options: Options) -> None:
    """Run tests on each mutant and print those that survive."""
    end = time.monotonic() + 60 * options.minutes
    drawn, results = draw(options), []
    with tempfile.TemporaryDirectory() as folder, tqdm(total=len(drawn), unit="mutant") as bar:
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for i in range(options.jobs):
            copies.put(Path(shutil.copytree(options.root, f"{folder}/copy{i}", ignore=IGNORED)))
        compiled = Path(folder, "compiled")
        compiled.mkdir(exist_ok=True)
        suite = Suite(options.root, compiled)

        def begin(mutant: Mutant) -> None:
            if time.monotonic() < end:
                root = copies.get()
                text, caught = try_mutant(mutant, suite, root, options)
                copies.put(root)
                results.append(caught)
                if options.caught or not caught:
                    tqdm.write(text, file=sys.stdout)
                bar.set_postfix_str(f"{sum(results)} of {len(results)} caught")
                bar.update()

        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(begin, drawn))
    left = len(drawn) - len(results)
    print(f"{sum(results)} of {len(results)} mutants caught, seed {options.seed}, {left} not begun")


if __name__ == "__main__":
    main(tyro.cli(Options))
