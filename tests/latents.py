"""A small autoencoder that nobody trained, and images for it."""

import functools

import jax
import numpy as np

from diffjax.build import ModelInfo
from diffjax.config import Config, Data, Train
from diffjax.nn.autoencoder import AutoencoderConfig
from diffjax.nn.conditioning import UNCONDITIONAL
from diffjax.nn.registry import init_params
from diffjax.training.run_folder import write_run

SHAPE, CLASSES = (8, 8, 1), 4
TINY = {
    "channels": (4, 4), "blocks": 1, "latent_channels": 2, "norm_groups": 2,
    "middle_attention": False,
}  # fmt: skip


def write_images(path, num=60, seed=0):
    """A file of images of one grey each, with noise, of labels and of vectors."""
    rng, y = np.random.default_rng(seed), np.arange(num) % CLASSES
    x = (rng.integers(0, 50, (num, *SHAPE)) + 60 * y[:, None, None, None]).astype(np.uint8)
    with path.open("wb") as file:
        np.savez(file, x=x, y=y, pose=rng.normal(size=(num, 2)).astype(np.float32))
    return path


@functools.cache
def params_of(seed):
    """Initial parameters."""
    module = AutoencoderConfig(**TINY).build(SHAPE)
    return jax.device_get(init_params(module, SHAPE, UNCONDITIONAL, jax.random.key(seed)))


def write_autoencoder(folder, images, seed=0, **fields):
    """A run folder of an autoencoder of these images."""
    network = AutoencoderConfig(**TINY | fields)
    data = Data(source="npz", path=str(images), conditions=())
    config = Config(data=data, network=network, train=Train(batch=16))
    write_run(ModelInfo(config, SHAPE, UNCONDITIONAL), params_of(seed), 3, folder)
    return folder
