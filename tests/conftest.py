"""Fixtures of all tests. Eight fake CPU devices stand for a pod.

Tests may run in several processes (pytest-xdist), each of which has fixtures of its own but for the
run of digits, which one of them trains.
"""

import os
import shutil
import subprocess
import sys
import time

from helpers import QUICK, ROOT

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {QUICK}"
)
# XLA sizes its thread pool by the cores it sees; with fewer threads than devices a collective waits
# for ever.
os.environ["NPROC"] = "32"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest
from hypothesis import settings
from tqdm import tqdm

settings.register_profile(
    "diffjax", deadline=None, derandomize=True, max_examples=60, print_blob=True
)
settings.load_profile("diffjax")


# Fixtures that train a model or start processes, which take long.
SLOW = {"digits_run", "run_program", "dit_run", "unconditional_run"}


def pytest_collection_modifyitems(items):
    """Mark tests with such fixtures as slow, and begin with the files that have slow tests.

    Processes that share the tests so end together. Files that wait for the run of digits come
    second.
    """
    ranks = {}
    for item in items:
        if SLOW & set(item.fixturenames):
            item.add_marker("slow")
        waits = "digits_run" in item.fixturenames
        rank = 1 if waits else 0 if item.get_closest_marker("slow") else 2
        others = ranks.get(item.path, 2)
        ranks[item.path] = 1 if waits or others == 1 else min(rank, others)
    items.sort(key=lambda item: ranks[item.path])


@pytest.fixture
def bars(monkeypatch):
    """Progress bars of this process end at their totals; (n, total) of each that has ended.

    But for those that an error ends. Tests take interrupted ones out of the list.
    """
    ends, leave = [], tqdm.__exit__

    def note(bar, kind, *error):
        if kind is None and not bar.disable:
            ends.append((bar.n, bar.total))
        return leave(bar, kind, *error)

    monkeypatch.setattr(tqdm, "__exit__", note)
    yield ends
    assert [end for end in ends if end[0] != end[1]] == []


@pytest.fixture
def x64():
    """JAX in double precision."""
    with jax.enable_x64(True):
        yield


def shared_folder(tmp_path_factory):
    """The temporary folder of all processes of the tests."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory):
    """A cache of compiled programs, of all processes of the tests and those that they start.

    It is the one that the environment names, or a new one.
    """
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    folder = given or str(shared_folder(tmp_path_factory) / "compiled")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """The folder of the suite's prepared data sets."""
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="session")
def environment(compiled, data_dir):
    """The environment of a program that is started as a user does, on one device.

    It has the suite's data sets and compiled programs, and finds the networks of tests/plugin.
    """
    own = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    plugin = str(ROOT / "tests" / "plugin")
    return own | {
        "PYTHONPATH": os.pathsep.join([own.get("PYTHONPATH", plugin), plugin]),
        "TFDS_DATA_DIR": str(data_dir),
        "JAX_COMPILATION_CACHE_DIR": compiled,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }


@pytest.fixture(scope="session")
def program(environment):
    """Start a command in a process: program("train", "digits", ...) -> the running process.

    A name that ends in .py is a script of the repository.
    """

    def start(name, *arguments, flags="", output=subprocess.PIPE):
        script = [str(ROOT / name)] if name.endswith(".py") else ["-m", "diffjax", name]
        return subprocess.Popen(
            [sys.executable, *script, *map(str, arguments)],
            cwd=ROOT,
            env=environment | {"XLA_FLAGS": flags},
            stdout=output,
            stderr=output,
            text=True,
        )

    return start


@pytest.fixture(scope="session")
def run_program(program):
    """Run a command in a process to its end: (exit code, stdout, stderr)."""

    def run(name, *arguments, flags=""):
        process = program(name, *arguments, flags=flags)
        out, err = process.communicate(timeout=400)
        return process.returncode, out, err

    return run


@pytest.fixture(scope="session", autouse=True)
def digits_training(request, tmp_path_factory, program):
    """A run of the configuration digits, cut to a fifth of its steps: its folder, and its process.

    It is started before the first test and trains beside the others; None where no test needs it.
    """
    if not any("digits_run" in item.fixturenames for item in request.session.items):
        yield None
        return
    home = shared_folder(tmp_path_factory) / "trained"
    try:
        home.mkdir()
    except FileExistsError:  # another process of the tests trains it
        yield home / "digits", None
        return
    options = ["--workdir", home / "digits", "--train.steps", 220, "--train.keep", 9]
    with (
        (home / "log").open("w") as log,
        program("train.py", "digits", *options, "--tensorboard", output=log) as process,
    ):
        yield home / "digits", process
        process.kill()


@pytest.fixture(scope="session")
def digits_run(digits_training, tmp_path_factory):
    """The folder of that run, trained; a copy, which tests may write to."""
    folder, process = digits_training
    deadline = time.monotonic() + 600
    while not (folder / "curve.png").exists():  # written last
        is_alive = process is None or process.poll() is None
        assert is_alive, (folder.parent / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return shutil.copytree(folder, tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture
def in_suite_data(data_dir, monkeypatch):
    """Commands of this process use the suite's data sets, and leave nothing in the user's cache."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    monkeypatch.setenv("XDG_CACHE_HOME", str(data_dir / "cache"))
