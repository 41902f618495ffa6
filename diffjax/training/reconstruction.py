"""The training objective of an autoencoder."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from diffjax.loss import ExampleLoss, Objective, check_batch, example_keys
from diffjax.nn.autoencoder import Autoencoder, draw, kl_divergence, mode
from diffjax.sampler import check_key


def reconstruction_loss(module: Autoencoder) -> Objective:
    """The mean absolute error of reconstructed images, and the divergence of latents.

        mean of |x - decode(z)| + kl_weight * KL(N(mean, std**2) | N(0, 1)) / (numbers of x)

    Both terms are per number of an image, so that the weight means the same for images of every
    size (arXiv:2112.10752, with its default of 1e-6). In training z is drawn, keyed by the step and
    the global index of the image; else it is the mean. There are no noise levels, and no quartiles.

    Raises: ValueError when traced for a batch without x or index.
    """

    def objective(params: Any, batch: Any, key: Array, *, training: bool = True) -> ExampleLoss:
        check_batch(batch)
        check_key(key)
        x, variables = batch["x"], {"params": params}
        moments: Any = module.apply(variables, x, method="encode")
        z = draw(moments, example_keys(key, batch["index"])) if training else mode(moments)
        images: Any = module.apply(variables, z, method="decode")
        error = jnp.mean(jnp.abs(images - x), axis=(1, 2, 3))
        divergence = kl_divergence(moments) / x[0].size
        value = error + module.config.kl_weight * divergence
        return ExampleLoss(value, jnp.zeros(len(x), jnp.int32))

    return objective
