"""The objective of autoencoders, with an encoder and a decoder whose values are known."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import naming

from diffjax.loss import example_keys
from diffjax.nn.autoencoder import draw
from diffjax.training.reconstruction import reconstruction_loss

MEAN, LOGVAR, GAIN = 0.7, -1.5, 3.0


class Linear:
    """An autoencoder of one latent: the mean of an image times MEAN, and GAIN times it."""

    def __init__(self, kl_weight):
        self.config = SimpleNamespace(kl_weight=kl_weight)

    def apply(self, variables, values, method):
        gain = variables["params"]
        if method == "encode":
            mean = MEAN * values.mean((1, 2, 3), keepdims=True)
            return jnp.concatenate([mean, jnp.full_like(mean, LOGVAR)], -1)
        assert method == "decode"
        return gain * values * jnp.ones((1, 2, 3, 1))


def batch_of(num=5):
    x = np.random.default_rng(0).uniform(-1, 1, (num, 2, 3, 1)).astype(np.float32)
    return {"x": x, "index": np.arange(10, 10 + num, dtype=np.uint32)}


@pytest.mark.parametrize("kl_weight", [0.0, 2.5])
@pytest.mark.parametrize("training", [True, False])
def test_parts_of_the_loss(kl_weight, training):
    """The error of each image, and the weight times the divergence per number of the image."""
    batch, key = batch_of(), jax.random.key(3)
    found = reconstruction_loss(Linear(kl_weight))(GAIN, batch, key, training=training)
    mean = MEAN * batch["x"].mean((1, 2, 3))
    z = mean
    if training:
        moments = np.stack([mean, np.full_like(mean, LOGVAR)], -1)
        z = np.asarray(draw(moments, example_keys(key, batch["index"])))[:, 0]
        assert (z != mean).all()
    error = np.abs(batch["x"] - GAIN * z[:, None, None, None]).mean((1, 2, 3))
    divergence = (mean**2 + np.exp(LOGVAR) - 1 - LOGVAR) / 2
    assert np.allclose(found.value, error + kl_weight * divergence / 6, rtol=1e-5)


def test_draws_depend_on_the_step_and_the_index_alone():
    objective, batch = reconstruction_loss(Linear(0.1)), batch_of()
    loss = np.asarray(objective(GAIN, batch, jax.random.key(3)).value)
    turned = {name: leaf[::-1] for name, leaf in batch.items()}
    assert np.allclose(objective(GAIN, turned, jax.random.key(3)).value[::-1], loss)
    assert (objective(GAIN, batch, jax.random.key(4)).value != loss).all()
    same = [objective(GAIN, batch, jax.random.key(n), training=False).value for n in (3, 4)]
    assert np.array_equal(*same)
    with pytest.raises(ValueError, match=naming("index")):
        objective(GAIN, {"x": batch["x"]}, jax.random.key(3))
