"""The smallest network that trains: it compiles in a fraction of the time of a UNet.

Tests that are not about a network train it; processes find it by its entry point.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import linen as nn

from diffjax.nn.conditioning import Conditioning
from diffjax.nn.layers import time_features
from diffjax.nn.registry import NetworkConfig


@dataclass(frozen=True)
class SmallConfig(NetworkConfig):
    """Architecture of the network."""

    width: int = 4
    """Channels of its layer."""

    def build(self, x_shape, conditioning):
        """The module for x of shape [B, *x_shape]."""
        return Small(self.width, conditioning)


class Small(nn.Module):
    """A layer over channels, to which time and condition are added, and a layer back."""

    width: int
    conditioning: Conditioning

    @nn.compact
    def __call__(self, x, t, condition=None, keys=None):
        """The output, float32 of the shape of x."""
        embedding = nn.Dense(self.width, name="time")(time_features(t, 4))
        embedding += self.conditioning.embed(condition, self.width)
        h = jnp.tanh(nn.Dense(self.width)(x) + embedding[:, None, None])
        return nn.Dense(x.shape[-1])(h).astype(jnp.float32)
