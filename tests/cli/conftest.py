"""Runs that several tests of commands share."""

import pytest
from helpers import QUIET, TINY
from PIL import Image

from diffjax.cli import main


@pytest.fixture(scope="session")
def unconditional_run(data_dir, tmp_path_factory):
    """A run of three steps without conditions, with two moving averages."""
    folder = tmp_path_factory.mktemp("runs") / "unconditional"
    options = ["--train.steps", "3", "--train.ema", "0.9", "0.1", "--data.dir", str(data_dir)]
    main(["train", "digits_unconditional", "--workdir", str(folder), *TINY, *QUIET, *options])
    return folder


CLASSES = ('a<&"b', "c'>d")  # names that are no names in HTML


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of two classes of 40 pictures each, red ones and blue ones."""
    folder = tmp_path_factory.mktemp("data") / 'photos<&"'
    for name, colour in zip(CLASSES, ((255, 0, 0), (0, 0, 255)), strict=True):
        (folder / name).mkdir(parents=True)
        for i in range(40):
            Image.new("RGB", (8, 8), colour).save(folder / name / f"{i:02}.png")
    return folder


@pytest.fixture(scope="session")
def folder_run(photos, tmp_path_factory):
    """A run of two steps on that folder, in a folder of such a name."""
    folder = tmp_path_factory.mktemp("runs") / 'run<&"'
    data = ["--data.source", "folder", "--data.path", str(photos), "--data.size", "8"]
    options = ["--train.steps", "2", "--train.batch", "8", *TINY, *QUIET, *data]
    main(["train", "digits", "--workdir", str(folder), *options])
    return folder


@pytest.fixture
def places(tmp_path, data_dir, digits_run, unconditional_run):
    """Paths that commands name in braces."""
    (tmp_path / "file").write_text("")
    (tmp_path / "broken" / "checkpoints" / "30").mkdir(parents=True)
    return {
        "tmp": tmp_path,
        "data": data_dir,
        "run": digits_run,
        "unconditional": unconditional_run,
        "broken": tmp_path / "broken",
        "file": tmp_path / "file",
    }
