"""Classes of a folder: told at the start, stored, and the same when a run resumes."""

import dataclasses
import re
import shutil

import pytest
from helpers import naming
from PIL import Image

from diffjax.config import Data
from diffjax.inference.model import load_model
from diffjax.nn.conditioning import ClassLabel
from diffjax.training.trainer import open_session

from .conftest import CONFIG

pytestmark = pytest.mark.slow
NAMES = ("1", "2", "10")


def config_of(folder):
    data = Data(source="folder", path=str(folder / "images"), size=8)
    return dataclasses.replace(CONFIG, data=data)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """The images of three classes, a run on them before its first step, and what was reported."""
    folder, reported = tmp_path_factory.mktemp("classes"), []
    for label, name in enumerate(NAMES):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(20):
            image = Image.new("RGB", (8, 8), (100 * label, 0, 0))
            image.save(folder / "images" / name / f"{i}.png")
    (folder / "images" / "1" / "empty.png").write_bytes(b"")
    session = open_session(config_of(folder), folder / "run", report=reported.append)
    session.save(session.state)
    session.checkpoints.close()
    session.lock.close()
    return folder, reported


def test_data_are_told(opened):
    """Sizes, classes in their order, and what is left out."""
    folder, reported = opened
    told = "\n".join(reported)
    sizes = re.search(r"(\d+) images\D.*?(\d+) held out", told)
    assert sizes
    assert sum(map(int, sizes.groups())) == 60
    assert re.search(naming("3 classes", ", ".join(NAMES)), told)
    assert any(re.search(naming(1, "empty", "1/empty.png"), text) for text in reported)
    assert load_model(folder / "run").info.conditioning == ClassLabel(3, names=NAMES)


def test_a_renamed_class_is_refused(opened, tmp_path):
    """See `test_conditioning.test_differences_are_named` for other changes."""
    copy = tmp_path / "copy"
    shutil.copytree(opened[0], copy)
    (copy / "images" / "10").rename(copy / "images" / "3")
    with pytest.raises(ValueError, match=naming("'10'", "'3'", copy / "run")):
        open_session(config_of(copy), copy / "run", report=lambda text: None)
    assert not (copy / "run" / "lock").exists()
