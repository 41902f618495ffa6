"""Eight fake CPU devices stand for a pod, whatever started the tests."""

import os
import subprocess
import sys
from pathlib import Path

# Most of the suite's time is compiling: the compiler may be quick rather than good.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_parallel_codegen_split_count=2"
)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {QUICK}"
# XLA sizes its thread pool by the cores it sees; with fewer threads than devices a collective waits for ever.
os.environ["NPROC"] = "32"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest
from hypothesis import settings

settings.register_profile("diffjax", deadline=None, derandomize=True, max_examples=60, print_blob=True)
settings.load_profile("diffjax")

ROOT = Path(__file__).parent.parent
TINY = ("--network.channels=4", "--network.multipliers=1", "--network.attention", "--network.heads=1")


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

    def start(name, *arguments, flags=""):
        environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
        environment |= {"XLA_FLAGS": flags, "TFDS_DATA_DIR": str(data_dir), "JAX_COMPILATION_CACHE_DIR": str(cache)}
        environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
        command = [sys.executable, str(ROOT / name), *map(str, arguments)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)

    return start


@pytest.fixture(scope="session")
def run_program(program):
    """Run a program to its end: (exit code, stdout, stderr)."""

    def run(name, *arguments, flags=""):
        process = program(name, *arguments, flags=flags)
        out, err = process.communicate(timeout=400)
        return process.returncode, out, err

    return run


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory, run_program):
    """A run of the real configuration, cut to a quarter: its folder."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    code, out, err = run_program("train.py", "digits", "--workdir", folder, "--train.steps", 250, "--train.keep", 9)
    assert code == 0, out + err
    return folder
