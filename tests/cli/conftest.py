"""Runs that several tests of commands share."""

import pytest
from helpers import QUIET, TINY

from diffjax.cli import main


@pytest.fixture(scope="session")
def unconditional_run(data_dir, tmp_path_factory):
    """A run of three steps without conditions, with two moving averages."""
    folder = tmp_path_factory.mktemp("runs") / "unconditional"
    options = ["--train.steps", "3", "--train.ema", "0.9", "0.1", "--data.dir", str(data_dir)]
    main(["train", "digits_unconditional", "--workdir", str(folder), *TINY, *QUIET, *options])
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
