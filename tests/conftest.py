"""Eight fake CPU devices stand for a pod, whatever started the tests."""

import os
import subprocess
import sys

from helpers import QUICK, ROOT

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {QUICK}"
# XLA sizes its thread pool by the cores it sees; with fewer threads than devices a collective waits for ever.
os.environ["NPROC"] = "32"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest
from hypothesis import settings

settings.register_profile("diffjax", deadline=None, derandomize=True, max_examples=60, print_blob=True)
settings.load_profile("diffjax")


@pytest.fixture
def x64():
    """JAX in double precision."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Where the suite prepares its datasets."""
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="session")
def program(tmp_path_factory, data_dir):
    """Start a program as a user does, on one device: program("train.py", ...) -> a running process."""
    cache = tmp_path_factory.mktemp("compiled")

    def start(name, *arguments, flags="", output=subprocess.PIPE):
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        environment |= {"XLA_FLAGS": flags, "TFDS_DATA_DIR": str(data_dir), "JAX_COMPILATION_CACHE_DIR": str(cache)}
        environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
        command = [sys.executable, str(ROOT / name), *map(str, arguments)]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output, text=True)

    return start


@pytest.fixture(scope="session")
def run_program(program):
    """Run a program to its end: (exit code, stdout, stderr)."""

    def run(name, *arguments, flags=""):
        process = program(name, *arguments, flags=flags)
        out, err = process.communicate(timeout=400)
        return process.returncode, out, err

    return run


@pytest.fixture(scope="session", autouse=True)
def digits_training(request, tmp_path_factory, program):
    """A run of the real configuration, cut to a fifth, started before the first test so that it trains beside the
    others; None where no test needs it."""
    if not any("digits_run" in item.fixturenames for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("runs") / "digits"
    arguments = ["digits", "--workdir", folder, "--train.steps", 220, "--train.keep", 9, "--tensorboard"]
    with folder.with_suffix(".log").open("w") as log, program("train.py", *arguments, output=log) as process:
        yield folder, process
        process.kill()


@pytest.fixture(scope="session")
def digits_run(digits_training):
    """The folder of that run, trained."""
    folder, process = digits_training
    assert process.wait(timeout=600) == 0, folder.with_suffix(".log").read_text()
    return folder


@pytest.fixture
def in_suite_data(data_dir, monkeypatch):
    """Programs of this process find the suite's datasets, and leave nothing in the user's cache."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    monkeypatch.setenv("XDG_CACHE_HOME", str(data_dir / "cache"))
