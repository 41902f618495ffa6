"""The UNet of DDPM (arXiv:2006.11239) with scale-shift conditioning (arXiv:2102.09672): an image, a time
and a class go in, an image comes out. It knows nothing of diffusion.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike


def time_features(t: Array, features: int, max_period: float = 10_000.0) -> Array:
    """Sinusoids of a time (arXiv:1706.03762): cos and sin of t * max_period**(-i/half), i = 0..half-1.

    t: [B], any real number. Returns float32 [B, features], whatever the dtype of the network: bfloat16
    cannot tell 999 from 1000. ValueError for an odd number of features.
    """
    if features % 2:
        raise ValueError(f"time features come in pairs, got {features}: use an even number")
    half = features // 2
    frequencies = jnp.exp(-jnp.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class ResBlock(nn.Module):
    """x + conv(norm(conv(norm(x)))), the second norm scaled and shifted by the condition vector [B, E]."""

    channels: int
    dropout: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, condition: Array, keys: Array | None) -> Array:
        """x: [B, H, W, C], condition: [B, E], keys: [B] for dropout, or None. Returns [B, H, W, channels]."""
        h = nn.silu(_norm(x))
        h = nn.Conv(self.channels, (3, 3), dtype=self.dtype)(h)
        modulation = nn.Dense(2 * self.channels, dtype=self.dtype)(nn.silu(condition))
        scale, shift = jnp.split(modulation[:, None, None, :], 2, axis=-1)
        h = nn.silu(_norm(h) * (1 + scale) + shift)
        if keys is not None and self.dropout > 0:
            h = _dropout(keys, h, self.dropout)
        # Zero: at the start a block passes on what it gets, and the network is as shallow as it can be.
        h = nn.Conv(self.channels, (3, 3), dtype=self.dtype, kernel_init=nn.initializers.zeros)(h)
        if x.shape[-1] != self.channels:
            x = nn.Dense(self.channels, dtype=self.dtype, name="shortcut")(x)
        return x + h


class SelfAttention(nn.Module):
    """x + projection of multi-head attention over all pixels."""

    heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: [B, H, W, C], and so is what is returned."""
        batch, height, width, channels = x.shape
        qkv = nn.Dense(3 * channels, dtype=self.dtype)(_norm(x))
        qkv = qkv.reshape(batch, height * width, 3, self.heads, channels // self.heads)
        h = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        h = h.reshape(batch, height, width, channels)
        return x + nn.Dense(channels, dtype=self.dtype, kernel_init=nn.initializers.zeros)(h)


class UNet(nn.Module):
    """Down to the smallest resolution and up again, with a skip connection from every block.

    channels: width at full resolution; multipliers: width of each resolution, in units of `channels`, each
    resolution half of the one before; blocks: residual blocks per resolution on the way down (one more on the
    way up); attention: the sizes in pixels (of the image's height) at which blocks are followed by
    self-attention; heads: attention heads; dropout: rate inside residual blocks while training;
    num_classes: classes of the condition, 0 for none; dtype: of the computation (parameters stay float32).

    The class table has one row more than there are classes: label num_classes means "no label".
    """

    channels: int
    out_channels: int
    multipliers: Sequence[int] = (1, 2)
    blocks: int = 2
    attention: Sequence[int] = ()
    heads: int = 1
    dropout: float = 0.0
    num_classes: int = 0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, t: Array, condition: Array | None = None, keys: Array | None = None) -> Array:
        """x: [B, H, W, C], t: [B], condition: int labels [B] in 0..num_classes, or None without classes;
        keys: [B], one per example, to train with dropout. Returns float32 [B, H, W, out_channels].

        ValueError for an image that cannot be halved often enough, or a condition missing or unexpected.
        """
        size = x.shape[1]
        halvings = len(self.multipliers) - 1
        if any(side % 2**halvings for side in x.shape[1:3]):
            raise ValueError(
                f"images of {x.shape[1]}x{x.shape[2]} cannot be halved {halvings} times:"
                f" give the network fewer multipliers, or images with sides divisible by {2**halvings}"
            )
        sizes = [size // 2**i for i in range(halvings + 1)]
        if not set(self.attention) <= set(sizes):
            raise ValueError(f"attention at {tuple(self.attention)} never happens: this network sees sizes {sizes}")
        if (condition is None) != (self.num_classes == 0):
            raise ValueError(
                "this network has no classes: call it without a condition"
                if condition is not None
                else f"this network needs a label per image, {self.num_classes} for no label"
            )

        width = 4 * self.channels
        embedding = nn.Dense(width, name="time_in")(time_features(t, self.channels))
        embedding = nn.Dense(width, name="time_out")(nn.silu(embedding))
        if condition is not None:
            # As large as the time's part of the vector: a table of small numbers takes long to be heard.
            table = nn.Embed(self.num_classes + 1, width, embedding_init=nn.initializers.normal(1.0), name="label")
            embedding += table(condition)

        blocks = itertools.count()

        def res_block(h: Array, channels: int) -> Array:
            i = next(blocks)  # every block drops its own units
            block_keys = None if keys is None else jax.vmap(lambda key: jax.random.fold_in(key, i))(keys)
            return ResBlock(channels, self.dropout, self.dtype)(h, embedding, block_keys)

        def attend(h: Array) -> Array:
            return SelfAttention(self.heads, self.dtype)(h) if h.shape[1] in self.attention else h

        h = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name="in")(x.astype(self.dtype))
        skips = [h]
        for multiplier in self.multipliers:
            if len(skips) > 1:
                h = nn.Conv(h.shape[-1], (3, 3), strides=2, dtype=self.dtype)(h)
                skips.append(h)
            for _ in range(self.blocks):
                h = attend(res_block(h, self.channels * multiplier))
                skips.append(h)

        h = res_block(attend(res_block(h, h.shape[-1])), h.shape[-1])

        for multiplier in reversed(self.multipliers):
            for _ in range(self.blocks + 1):
                h = attend(res_block(jnp.concatenate([h, skips.pop()], axis=-1), self.channels * multiplier))
            if h.shape[1] < size:
                h = jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2)
                h = nn.Conv(h.shape[-1], (3, 3), dtype=self.dtype)(h)

        # In float32 at any dtype: at the noisy end an error of eps is multiplied by sigma/alpha, about 160.
        h = nn.silu(_norm(h.astype(jnp.float32)))
        return nn.Conv(self.out_channels, (3, 3), kernel_init=nn.initializers.zeros, name="out")(h)


def _dropout(keys: Array, x: Array, rate: float) -> Array:
    # One key per example, where nn.Dropout has one per batch: what is dropped does not depend on the devices.
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def _norm(x: Array) -> Array:
    # Statistics and affine map in float32, whatever the dtype of the network. Groups of four channels or more.
    channels = x.shape[-1]
    groups = next(g for g in range(min(32, max(1, channels // 4)), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups)(x.astype(jnp.float32)).astype(x.dtype)
