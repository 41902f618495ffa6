"""The wheel, installed in a virtual environment of its own and used from an empty folder."""

import subprocess
import sys
import sysconfig
import zipfile

import numpy as np
import pytest
from helpers import QUICK, QUIET, ROOT, TINY

pytestmark = pytest.mark.slow

OWN = """
import dataclasses

from diffjax.config import load_config

digits = load_config("digits")
config = dataclasses.replace(digits, train=dataclasses.replace(digits.train, steps=2))
"""


def run(*words, **options):
    """Run a program to its end, and return what it prints."""
    found = subprocess.run([str(word) for word in words], capture_output=True, text=True, **options)
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, ROOT)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel, environment, tmp_path_factory):
    """Run a program of that environment in an empty folder: installed("diffjax", "--version")."""
    venv = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    python = venv / "bin" / "python"
    paths = {"base": str(venv), "platbase": str(venv)}
    own = sysconfig.get_path("purelib", "venv", paths)
    # The dependencies are those of the tests; .pth files among them, of an editable diffjax too,
    # are not read.
    with open(f"{own}/dependencies.pth", "w") as file:
        file.write(sysconfig.get_path("purelib"))
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel)
    folder = tmp_path_factory.mktemp("empty")

    def start(name, *words):
        variables = environment | {"XLA_FLAGS": QUICK}
        variables.pop("PYTHONPATH", None)
        return run(venv / "bin" / name, *words, cwd=folder, env=variables)

    start.folder = folder
    return start


def test_contents(wheel):
    """The configurations are inside of the package, and nothing else is at the top."""
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"diffjax"}
    configs = {path.name for path in (ROOT / "configs").glob("*.py")}
    assert {name.rpartition("/")[2] for name in names if "/configs/" in name} == configs
    assert "diffjax/py.typed" in names


def test_library(installed):
    script = "import diffjax; diffjax.sampler.ddim; print(diffjax.__version__, diffjax.__file__)"
    version, path = installed("python", "-c", script).split()
    assert not path.startswith(str(ROOT))
    assert installed("diffjax", "--version") == f"diffjax {version}\n"
    assert installed("python", "-m", "diffjax", "--version") == f"diffjax {version}\n"


def test_commands(installed):
    """Train by name, sample, and sweep."""
    installed("diffjax", "train", "digits", "--workdir", "r", "--train.steps", "60", *TINY, *QUIET)
    out = installed("diffjax", "sample", "r", "--steps", "2", "--num", "4", "--save", "a.npz")
    assert "unet of r" in out
    images = np.load(installed.folder / "a.npz")["images"]
    assert images.shape == (4, 8, 8, 1)
    sweep = ["--sampler", "ddim:1", "--guidance", "1", "--num", "20", "--features", "pixels"]
    installed("diffjax", "frontier", "r", *sweep, "--out", "report")
    assert (installed.folder / "report" / "report.html").exists()


def test_own_configuration(installed):
    """A run needs the file that it was trained from no more."""
    own = installed.folder / "own.py"
    own.write_text(OWN)
    installed("diffjax", "train", "./own.py", "--workdir", "own", *TINY, *QUIET)
    own.unlink()
    out = installed("diffjax", "sample", "own", "--steps", "2", "--num", "4")
    assert "unet of own" in out
