"""Plant faults in a copy of the package, one at a time, and print those that no test catches.

The test file of the same name runs on a mutant, then the nearest ones by imports; it is caught if a
test fails, or does not end. `docs/testing.md` says how to read what survives.
"""

import contextlib
import itertools
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
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
        self.seconds: dict[Path, float | None] = {}
        self.imports = {path: self._imports(path) for path in root.rglob("*.py")}

    def choose(self, path: Path, budget: float) -> tuple[list[Path], float]:
        """The test files to run for a file, and the seconds that they take without a mutant."""
        files, total, others = [], 0.0, 0.0
        for file in self._near(path):
            if others > 0.8 * budget:
                break
            mine = file == self._mirror(path)
            seconds = self._measure(file)
            if seconds is not None and (mine or others + seconds <= budget):
                files.append(file)
                total, others = total + seconds, others + seconds * (not mine)
        return files, total

    def run(self, files: Sequence[Path], limit: float, compiled: Path | None = None) -> str | None:
        """The test that fails first, "time" if the limit ends first, or None."""
        own = {"PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1"}
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            if compiled is None:  # what a mutant compiles, or half writes, is not seen by others
                compiled = Path(folder, "compiled")
                shutil.copytree(self.compiled, compiled, copy_function=os.link)
            process = subprocess.Popen(
                [sys.executable, *PYTEST, f"--basetemp={folder}/tests", *map(str, files)],
                cwd=self.root,
                env=os.environ | own | {"JAX_COMPILATION_CACHE_DIR": str(compiled)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            try:
                out, _ = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                return "time"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", out, re.MULTILINE)
        return None if process.returncode == 0 else failed[1] if failed else out[-300:]

    def _measure(self, file: Path) -> float | None:
        if file not in self.seconds:
            start = _processor_time()
            failed = self.run([file], 1800, self.compiled)
            self.seconds[file] = None if failed else _processor_time() - start
            if failed:
                tqdm.write(f"left out, fails without a mutant: {failed}", file=sys.stderr)
        return self.seconds[file]

    def _near(self, path: Path) -> Iterator[Path]:
        """The test files that reach a file, by the number of imports between them."""
        seen, mirror = {path}, self._mirror(path)
        while reached := {file for file, of in self.imports.items() if of & seen} - seen:
            seen |= reached
            tests = [f for f in reached if f.name.startswith("test_") and f.parent.name != "docs"]
            yield from sorted(tests, key=lambda f: (f != mirror, f.parent != mirror.parent, f))

    def _mirror(self, path: Path) -> Path:
        folder = path.relative_to(self.root / "diffjax").parent
        return self.root / "tests" / folder / f"test_{path.name}"

    def _imports(self, path: Path) -> set[Path]:
        """The files of the package that a file names, and the one that a test file mirrors."""
        text = path.read_text()
        words = set(re.findall(r"diffjax(?:\.\w+)+", text))
        for package, names in re.findall(r"from (diffjax[\w.]*) import \(?([\w\s,]+)", text):
            words |= {f"{package}.{name}" for name in [*re.findall(r"\w+", names), "__init__"]}
        files = {Path(word.replace(".", "/")) for word in words}
        files = {part.with_suffix(".py") for file in files for part in (file, file.parent)}
        name = path.relative_to(self.root).as_posix()
        files.add(Path(re.sub(r"^tests/(.*)test_", r"diffjax/\1", name)))
        return {self.root / file for file in files if (self.root / file).exists()} - {path}


def _processor_time() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(options: Options) -> None:
    """Run tests on each mutant and print those that survive."""
    end = time.monotonic() + 60 * options.minutes
    drawn, done, caught = draw(options), 0, 0
    with tempfile.TemporaryDirectory() as folder, tqdm(total=len(drawn), unit="mutant") as bar:
        root, compiled = Path(folder, "copy"), Path(folder, "compiled")
        shutil.copytree(options.root, root, ignore=IGNORED)
        compiled.mkdir()
        suite = Suite(root, compiled)
        for mutant in drawn:
            if time.monotonic() > end:
                break
            bar.set_postfix_str(f"{caught} of {done} caught, now {mutant.path}")
            path = root / mutant.path
            files, seconds = suite.choose(path, options.budget)
            path.write_text(mutant.new)
            failed = suite.run(files, 300 + 20 * seconds) if files else None
            path.write_text(mutant.old)
            done, caught = done + 1, caught + bool(failed)
            if not failed or options.caught:
                how = f"caught by {failed}" if failed else f"survived {len(files)} test files"
                tqdm.write(f"{mutant.describe()}\n{how}\n", file=sys.stdout)
            bar.update()
    print(f"{caught} of {done} mutants caught, seed {options.seed}, {len(drawn) - done} not begun")


if __name__ == "__main__":
    main(tyro.cli(Options))
