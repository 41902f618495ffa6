"""Images and runs of the probe, and the configuration file that trains it."""

import numpy as np
import pytest

from tests.options.probe import CLASSES, SHAPE, write_run

CONFIG = """
from diffjax.config import Config, Data, Diffusion, Train
from tests.options.probe import ProbeConfig

config = Config(
    data=Data(source="npz", path={path!r}),
    network=ProbeConfig(),
    diffusion=Diffusion(schedule="cosine", T=16, prediction="x0"),
    train=Train(steps=1, batch=16, eval_every=0, preview_every=0),
)
"""


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A file of 160 images of black and white pixels, with labels and vectors; named "digits"."""
    r, path = np.random.default_rng(5), tmp_path_factory.mktemp("data") / "digits"
    x = 255 * r.integers(0, 2, (160, *SHAPE), np.uint8)
    pose = r.normal(size=(160, 3)).astype(np.float32)
    with path.open("wb") as file:
        np.savez(file, x=x, y=np.arange(160) % CLASSES, pose=pose)
    return path


@pytest.fixture(scope="session")
def probe_config(images, tmp_path_factory):
    """The path of a configuration of the probe, on these images."""
    path = tmp_path_factory.mktemp("configs") / "probe.py"
    path.write_text(CONFIG.format(path=str(images)))
    return path


@pytest.fixture(scope="session")
def run(images, tmp_path_factory):
    """A run of the probe with two checkpoints of two averages; its latest average is 0.5."""
    folder = tmp_path_factory.mktemp("runs") / "probe"
    return write_run(folder, images, {3: (0.1, 0.2, 0.3), 7: (0.4, 0.5, 0.6)})


@pytest.fixture(scope="session")
def other_run(images, tmp_path_factory):
    """Another run, whose averages are 0.8 and 0.9."""
    folder = tmp_path_factory.mktemp("runs") / "other"
    return write_run(folder, images, {2: (0.75, 0.8, 0.85), 4: (0.9, 0.95, 0.99)})
