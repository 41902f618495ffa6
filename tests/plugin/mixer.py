"""A network of another package: a small MLP-mixer (arXiv:2105.01601) over patches of 2x2 pixels."""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import linen as nn

from diffjax.nn.conditioning import Conditioning
from diffjax.nn.layers import time_features
from diffjax.nn.registry import NetworkConfig


@dataclass(frozen=True)
class MixerConfig(NetworkConfig):
    """Architecture of the mixer."""

    width: int = 32
    """Channels of each patch."""
    depth: int = 2
    """Mixer blocks."""

    def build(self, x_shape, conditioning):
        """The mixer for x of shape [B, H, W, C]."""
        return Mixer(self, conditioning)


class Mixer(nn.Module):
    """Blocks that mix patches, then channels, after adding time and condition."""

    config: MixerConfig
    conditioning: Conditioning

    @nn.compact
    def __call__(self, x, t, condition=None, keys=None):
        batch, height, width, channels = x.shape
        h = x.reshape(batch, height // 2, 2, width // 2, 2, channels).swapaxes(2, 3)
        h = nn.Dense(self.config.width)(h.reshape(batch, height * width // 4, 4 * channels))
        embedding = nn.silu(nn.Dense(self.config.width, name="time")(time_features(t, 32)))
        embedding += self.conditioning.embed(condition, self.config.width)
        for _ in range(self.config.depth):
            h += embedding[:, None]
            mixed = nn.Dense(h.shape[1])(nn.gelu(nn.Dense(64)(nn.LayerNorm()(h).swapaxes(1, 2))))
            h += mixed.swapaxes(1, 2)
            h += nn.Dense(h.shape[2])(nn.gelu(nn.Dense(64)(nn.LayerNorm()(h))))
        h = nn.Dense(4 * channels, kernel_init=nn.initializers.zeros)(nn.LayerNorm()(h))
        h = h.reshape(batch, height // 2, width // 2, 2, 2, channels).swapaxes(2, 3)
        return h.reshape(x.shape).astype(jnp.float32)
