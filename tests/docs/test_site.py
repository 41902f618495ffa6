"""The documentation builds as a site, where mkdocs is installed."""

import os
import subprocess
import sys

import pytest

from tests.docs.pages import ROOT


@pytest.mark.slow
def test_builds_strictly(tmp_path):
    """A broken link, a page without a place or a command whose help fails is an error."""
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "cli" / "index.html").is_file()
