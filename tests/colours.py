"""A network that paints each class in one unmistakable colour, and what reads its pictures.

A picture, a caption, a row and a number that belong together can then be told from others.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from diffjax import build
from diffjax.build import ModelInfo, build_optimizer
from diffjax.checkpoint import Checkpoints
from diffjax.config import Config, Data, Diffusion
from diffjax.data import image_io
from diffjax.data.codec import PIXELS
from diffjax.inference.model import TrainedModel
from diffjax.nn import registry
from diffjax.nn.conditioning import ClassLabel
from diffjax.training.state import init_state, state_to_trees

SHAPE, T = (8, 8, 3), 100
# Names that HTML, SVG, Markdown and mathematics take for something else, in natural order.
NAMES = ("$cy$'", 'blue"', "gold|", "lime&", "pink>", "red<")
COLOURS = np.array(
    [(-1, 1, 1), (-1, -1, 1), (1, 1, -1), (-1, 1, -1), (1, -1, 1), (1, -1, -1)], np.float32
)
CLASSES, NONE = len(NAMES), -1


@dataclass(frozen=True)
class ColoursConfig(registry.NetworkConfig):
    """A table of colours by class."""

    fade: bool = False
    """Estimate x0 the darker the more noise there is: white noise is grey."""

    def build(self, x_shape, conditioning):
        """The module for x of shape [B, H, W, 3]."""
        return Colours(self.fade)


class Colours(nn.Module):
    """The colour of each condition, at all pixels."""

    fade: bool

    @nn.compact
    def __call__(self, x, t, condition=None, keys=None):
        """The estimate of x0, float32 of the shape of x."""
        palette = self.param("palette", nn.initializers.zeros, (CLASSES + 1, 3))
        strength = 1 - t / T if self.fade else jnp.ones_like(t)
        return jnp.broadcast_to((strength[:, None] * palette[condition])[:, None, None], x.shape)


registry.register("colours", ColoursConfig)


def palette(order=range(CLASSES), strength=1.0):
    """The parameters of the network: colours by class in another order, and grey for no class."""
    table = np.concatenate([strength * COLOURS[list(order)], np.zeros((1, 3))])
    return {"palette": jnp.asarray(table, jnp.float32)}


def model_info(data="colours.npz", names=NAMES, *, fade=False):
    """The description of the network, which predicts x0."""
    config = Config(
        data=Data(source="npz", path=str(data)),
        network=ColoursConfig(fade=fade),
        diffusion=Diffusion(T=T, prediction="x0"),
    )
    return ModelInfo(config, SHAPE, ClassLabel(len(names), names=tuple(names)))


def colour_model(params=None, *, fade=False, name="colours of x"):
    """A trained model of the network, which nobody trained."""
    info = model_info(fade=fade)
    return TrainedModel(
        name=name,
        info=info,
        network=build.build_network(info, build.build_module(info)),
        params=palette() if params is None else params,
        parameterization=build.build_parameterization(info.config),
        schedule=build.build_schedule(info.config),
        codec=PIXELS,
        weights="ema",
        step=7,
    )


def write_run(folder, data, params=None, names=NAMES, *, fade=False):
    """A run folder of the network, which nobody trained; data: the path of its images."""
    info = model_info(data, names, fade=fade)
    state = init_state(palette() if params is None else params, build_optimizer(info.config)[0])
    checkpoints = Checkpoints(folder)
    checkpoints.save(7, state_to_trees(jax.tree.map(np.asarray, state)), info.to_dict())
    checkpoints.close()
    return folder


def paint(labels, order=range(CLASSES), strength=1.0):
    """Images of the colours of these labels, uint8 [N, 8, 8, 3]."""
    colours = strength * COLOURS[list(order)][np.asarray(labels)]
    return image_io.to_uint8(np.broadcast_to(colours[:, None, None], (len(labels), *SHAPE)))


def write_data(path, labels, order=range(CLASSES), strength=1.0, names=NAMES):
    """A file of such images with the names of their classes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, x=paint(labels, order, strength), y=np.array(names)[labels])
    return path


# ------------------------------------------------------------------------------- reading


def class_of(pixel):
    """The class of a colour by its bright channels, or NONE for grey."""
    signs = np.sign(np.asarray(pixel, float) - 127.5)
    grey = np.ptp(np.asarray(pixel, float)) < 20
    return NONE if grey else int(np.argmin(np.abs(COLOURS - signs).sum(1)))


def read_grid(picture, num, columns=None, captions=NAMES):
    """Read a grid of images: (class of the colour, caption) for each, in order.

    A caption is the one of `captions` whose letters are nearest to what stands above the image.
    """
    pixels = np.asarray(picture.convert("RGB"), float)
    columns = columns or int(np.ceil(np.sqrt(num)))
    letters = {text: _cell_of(text) for text in captions}
    height, width, _ = next(iter(letters.values())).shape
    margin = pixels.shape[1] - columns * width  # titles stand there
    found = []
    for i in range(num):
        top, left = 4 + i // columns * height, margin + i % columns * width
        cell = pixels[top : top + height, left : left + width]
        header = height - 52
        distances = {
            text: np.abs(cell[:header, :48] - each[:header, :48]).mean()
            for text, each in letters.items()
        }
        found.append((class_of(cell[header + 20, 24]), min(distances, key=distances.get)))
    return found


def _cell_of(text):
    """The cell of one image, with its caption and the gaps to the next cells."""
    picture = image_io.grid(np.zeros((1, *SHAPE), np.uint8), [text])
    return np.asarray(picture, float)[4:, 4:]
