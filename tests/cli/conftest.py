"""Runs that several tests of commands share."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import QUIET, TINY
from PIL import Image

from diffjax import build
from diffjax.checkpoint import Checkpoints, ema_key
from diffjax.cli import main
from diffjax.config import Config, Data, Diffusion
from diffjax.nn import registry


@pytest.fixture(scope="session")
def unconditional_run(data_dir, tmp_path_factory):
    """A run of three steps without conditions, with two moving averages."""
    folder = tmp_path_factory.mktemp("runs") / "unconditional"
    options = ["--train.steps", "3", "--train.ema", "0.9", "0.1", "--data.dir", str(data_dir)]
    main(["train", "digits_unconditional", "--workdir", str(folder), *TINY, *QUIET, *options])
    return folder


# ------------------------------------------------------------------------------- painted

CLASSES = ('a<&"b', "c'>d")  # names that have a meaning in HTML
COLOURS = ((255, 0, 0), (0, 0, 255))


class Painter(nn.Module):
    """A network whose estimate of x0 is the colour of the class, and a tenth of it the noise."""

    @nn.compact
    def __call__(self, x, t, condition, keys=None):
        none = jnp.zeros((1, 3))  # grey
        colours = jnp.concatenate([jnp.array(COLOURS) / 127.5 - 1, none])
        share = self.param("share", lambda key: jnp.float32(0.1))
        return (1 - share) * colours[condition][:, None, None] + share * jnp.tanh(x)


@dataclasses.dataclass(frozen=True)
class PainterConfig(registry.NetworkConfig):
    """Configuration of a painter."""

    def build(self, x_shape, conditioning):
        return Painter()


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of two classes of 20 pictures each, red ones and blue ones."""
    folder = tmp_path_factory.mktemp("data") / 'photos<&"'
    for name, colour in zip(CLASSES, COLOURS, strict=True):
        (folder / name).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (8, 8), colour).save(folder / name / f"{i:02}.png")
    return folder


@pytest.fixture(scope="session")
def painter_run(photos, tmp_path_factory):
    """A run folder of a painter of that folder, which nobody had to train."""
    folder = tmp_path_factory.mktemp("runs") / 'run<&"'
    registry.register("painter", PainterConfig)
    config = Config(
        data=Data(source="folder", path=str(photos), size=8),
        network=PainterConfig(),
        diffusion=Diffusion(T=100, prediction="x0"),
    )
    info = build.describe_model(config)
    params = build.init_params(info, build.build_module(info), jax.random.key(0))
    trees = {"params": params, ema_key(0): params, "rest": {"step": np.int32(1)}}
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, trees, info.to_dict())
    checkpoints.close()
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
