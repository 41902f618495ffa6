"""The networks that are measured, with random parameters, since what they are does not change what they cost."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffjax.build import build_network, build_prediction, build_schedule, build_unet, init_params
from diffjax.config import Config, load_config
from diffjax.denoiser import Network
from diffjax.process import Prediction
from diffjax.schedule import Schedule

SHAPES: dict[str, tuple[tuple[int, int, int], int]] = {  # of images, and classes
    "digits": ((8, 8, 1), 10), "mnist_small": ((32, 32, 1), 10), "ddpm_cifar10": ((32, 32, 3), 0),
}  # fmt: skip


class Subject(NamedTuple):
    """A network with all that it takes to use it."""

    name: str
    config: Config
    image_shape: tuple[int, int, int]
    classes: int
    network: Network
    params: Any
    levels: Schedule
    prediction: Prediction

    def labels(self, batch: int) -> Array | None:
        """Each class in turn, int [batch]; None where there are none."""
        return jnp.arange(batch) % self.classes if self.classes else None

    def images(self, batch: int) -> Array:
        """Noise, float32 [batch, H, W, C]."""
        return jnp.asarray(np.random.default_rng(0).normal(size=(batch, *self.image_shape)), jnp.float32)


def subject(name: str, dtype: Literal["float32", "bfloat16"] | None = None) -> Subject:
    """The network of a configuration, computing in `dtype` if it is named. Its parameters are those of the start and a
    little noise: layers that start at zero would be all zero.
    """
    config = load_config(name)
    if dtype is not None:
        config = dataclasses.replace(config, network=dataclasses.replace(config.network, dtype=dtype))
    image_shape, classes = SHAPES[name]
    unet, r = build_unet(config, image_shape, classes), np.random.default_rng(0)
    params = init_params(unet, image_shape, jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + 0.02 * jnp.asarray(r.normal(size=leaf.shape), leaf.dtype), params)
    return Subject(
        name, config, image_shape, classes, build_network(config, unet), params,
        build_schedule(config), build_prediction(config),
    )  # fmt: skip
