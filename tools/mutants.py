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
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from tools.faults import Mutant, Source

CONFIGURATION = {"checkpoint.py", "config.py", "build.py"}  # stand beside the mathematics
PEERS = {"diffusers_baseline.py"}  # what make parity tests
IGNORED = shutil.ignore_patterns(".*", "__pycache__", "runs", "site", "dist", "*.egg-info")
NEAREST = 8  # test files that run on a mutant
TIME = "undecided: time is up"
HERE = Path(__file__).parent.parent
PYTEST = (
    "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "tools.quick_first",
    "-o", "addopts=",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Which faults to plant."""

    num: int = 50
    """Number of mutants, drawn from all."""
    seed: int = 0
    """Seed of the draw."""
    skip: int = 0
    """Mutants of the draw to leave out, from the first, as those of an earlier run."""
    minutes: float = 60.0
    """Minutes after which no further mutant begins."""
    seconds: int = 60
    """Seconds of processor time for the tests of a mutant; without a failure it is undecided."""
    at: tuple[str, ...] = ()
    """Files or FILE:LINE to plant faults at; none: the whole package."""
    caught: bool = False
    """Print the mutants that are caught too, with the test that failed."""
    jobs: int = 1
    """Mutants that are tried at once, each in a copy of its own."""
    compiled: Path | None = None
    """A folder of compiled programs to keep; None: a new one."""
    root: Path = HERE
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
    """The test files of a checkout, and the programs that they have compiled."""

    def __init__(self, root: Path, compiled: Path) -> None:
        """Read the imports of every file; compiled: a folder."""
        self.root, self.compiled = root, compiled
        paths = [path for folder in ("diffjax", "tests") for path in (root / folder).rglob("*.py")]
        names = [path.relative_to(root).as_posix() for path in paths]
        self.imports = {name: self._imports(name) for name in names}

    def near(self, path: str) -> list[str]:
        """The test files that reach a file: of its name, then by the number of imports between."""
        order, seen, mirror = [], {path}, mirror_of(path)
        folders = {mirror.rpartition("/")[0], "tests/options"}
        while reached := {file for file, of in self.imports.items() if of & seen} - seen:
            seen |= reached
            tests = [file for file in reached if re.match(r"tests/(?!docs/).*\btest_", file)]
            tests.sort(key=lambda f: (f != mirror, f.rpartition("/")[0] not in folders, f))
            order += tests
        return order

    def _imports(self, name: str) -> set[str]:
        """The files of the package that a file names, and the one that a test file mirrors.

        A test names commands too: "sample", or "train --steps".
        """
        text = (self.root / name).read_text()
        words = set(re.findall(r"diffjax(?:\.\w+)+", text))
        for package, names in re.findall(r"from (diffjax[\w.]*) import \(?([\w\s,]+)", text):
            words |= {f"{package}.{name}" for name in [*re.findall(r"\w+", names), "__init__"]}
        files = {Path(word.replace(".", "/")) for word in words}
        files = {part.with_suffix(".py") for file in files for part in (file, file.parent)}
        if name.startswith("tests/"):
            words = re.findall(r"[\"']([a-z][a-z-]*)[ \"']", text)
            files |= {Path("diffjax/cli", f"{word.replace('-', '_')}.py") for word in words}
        files.add(Path(re.sub(r"^tests/(.*)test_", r"diffjax/\1", name)))
        return {file.as_posix() for file in files if (self.root / file).exists()} - {name}

    def run(self, root: Path, words: Sequence[str], seconds: int, lasting: int = 1200) -> str:
        """The test that fails first in a copy; "" if none does, TIME if time is up before.

        seconds: of processor time. lasting: of the clock, which ends tests that wait for ever.
        """
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            # What a mutant compiles is not seen by others before it is whole.
            own = Path(shutil.copytree(self.compiled, f"{folder}/own", copy_function=os.link))
            environment = {
                "PYTHONPATH": f"{root}{os.pathsep}{HERE}",
                "QUICK_FIRST": str(self.compiled / "seconds"),
                "PROCESSOR_SECONDS": str(seconds),
                "PYTHONDONTWRITEBYTECODE": "1",
                "JAX_COMPILATION_CACHE_DIR": str(own),
            }
            with Path(folder, "out").open("w") as out:
                process = subprocess.Popen(
                    [sys.executable, *PYTEST, f"--basetemp={folder}/tests", *words],
                    cwd=root,
                    env=os.environ | environment,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(lasting)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            code, text = process.wait(), Path(folder, "out").read_text()
            made = sorted(own.iterdir(), key=lambda file: file.stat().st_mtime)
            for file in made[:-1] if code < 0 else made:  # the last may not be whole
                with contextlib.suppress(FileExistsError):
                    os.link(file, self.compiled / file.name)
        if code in (0, 5):  # 5: there are no tests
            return ""
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", text, re.MULTILINE)
        return TIME if code == -signal.SIGPROF else failed[1] if failed else text[-300:]

    def judge(self, root: Path, mutant: Mutant, seconds: int) -> str:
        """What `run` finds of a mutant, by the tests that are nearest to its file."""
        path, files = root / mutant.path, self.near(mutant.path)[:NEAREST]
        mirror = [file for file in files if file == mirror_of(mutant.path)]
        path.write_text(mutant.new)
        found = self.run(root, [*files, "-m", "not slow"], seconds)
        if mirror and not (found and found != TIME):
            slow = self.run(root, [*mirror, "-m", "slow"], seconds)
            found = slow or found
        path.write_text(mutant.old)
        return found


def mirror_of(path: str) -> str:
    """The test file of a file's name."""
    return re.sub(r"^diffjax/(.*?)(\w+\.py)$", r"tests/\1test_\2", path)


def main(options: Options) -> None:
    """Run tests on each mutant and print those that survive."""
    end = time.monotonic() + 60 * options.minutes
    drawn, found = draw(options)[options.skip :], []
    with tempfile.TemporaryDirectory() as folder, tqdm(total=len(drawn), unit="mutant") as bar:
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for i in range(options.jobs):
            copies.put(Path(shutil.copytree(options.root, f"{folder}/{i}", ignore=IGNORED)))
        compiled = options.compiled or Path(folder, "compiled")
        compiled.mkdir(exist_ok=True)
        suite = Suite(options.root, compiled)

        def begin(mutant: Mutant) -> None:
            if time.monotonic() < end:
                root = copies.get()
                found.append(suite.judge(root, mutant, options.seconds))
                copies.put(root)
                if options.caught or found[-1] in ("", TIME):
                    tqdm.write(f"{mutant.describe()}\n{found[-1] or 'survived'}\n", file=sys.stdout)
                bar.set_postfix_str(f"{found.count('')} survived, {found.count(TIME)} undecided")
                bar.update()

        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(begin, drawn))
        tests = sorted({test for test in found if "::" in test})
        if tests and (broken := suite.run(copies.get(), tests, 10 * options.seconds)):
            print(f"{broken}: fails without a mutant too")
    undecided, survived = found.count(TIME), found.count("")
    print(
        f"{len(found) - undecided - survived} caught, {survived} survived, {undecided} undecided,"
        f" {len(drawn) - len(found)} not begun; seed {options.seed}"
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
