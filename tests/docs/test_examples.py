"""Python blocks of README and the documentation run."""

import os
import re
import subprocess
import sys

import pytest

from tests.docs.pages import LESSON, PAGES, ROOT, has_python, name_of, run_page

SHORT = [path for path in PAGES if has_python(path) and path != LESSON]


@pytest.mark.parametrize("path", SHORT, ids=name_of)
def test_blocks_run(path, tmp_path, monkeypatch):
    """All blocks of a page run, and the property tests among them hold."""
    monkeypatch.chdir(tmp_path)
    namespace = run_page(path)
    for name, value in list(namespace.items()):
        if name.startswith("test_"):
            value()


def test_trained_run(digits_run, tmp_path, monkeypatch):
    """The block that loads a trained run samples from it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(digits_run)
    page = (ROOT / "docs" / "getting-started.md").read_text()
    namespace = {}
    exec(re.search(r"```\{\.python \.example\}\n(.*?)```", page, re.S)[1], namespace)
    assert namespace["images"].shape == (16, 8, 8, 1)


@pytest.mark.slow
def test_lesson_runs(tmp_path, data_dir):
    """The lesson runs in a process of its own, and makes every picture that it shows."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(ROOT), "TFDS_DATA_DIR": str(data_dir)}
    command = [sys.executable, str(ROOT / "tests" / "docs" / "pages.py"), str(LESSON)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    shown = re.findall(r"\]\((images/lesson/[\w.]+)\)", LESSON.read_text())
    assert len(shown) >= 8
    for picture in shown:
        assert (tmp_path / "docs" / picture).is_file()
        assert (ROOT / "docs" / picture).is_file()
