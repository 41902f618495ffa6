"""The UNet of DDPM, improved DDPM and ADM.

arXiv:2006.11239, arXiv:2102.09672, arXiv:2105.05233. It maps x, a time and a condition to an array
of the shape of x, and knows nothing of diffusion.
"""

import zlib
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from diffjax.nn.conditioning import UNCONDITIONAL, Condition, Conditioning, check_structure
from diffjax.nn.layers import Conv, GroupNorm, downsample, dropout, time_features, upsample
from diffjax.nn.registry import DTYPES, NetworkConfig, register


class ResBlock(nn.Module):
    """A residual block, x + conv(norm(conv(norm(x)))), conditioned on an embedding.

    scale_shift: the embedding scales and shifts the output of the second norm (improved DDPM), else
    it is added to the input (DDPM). resample: "down" or "up" to halve or double the resolution
    between the first norm and the first convolution (ADM).
    """

    channels: int
    dropout: float = 0.0
    scale_shift: bool = True
    resample: str = ""
    groups: int | None = None
    epsilon: float = 1e-6
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, embedding: Array | None, keys: Array | None) -> Array:
        """The block's output, [B, H', W', channels].

        x: [B, H, W, C]; embedding of time and condition: [B, E], or None; keys: [B] for dropout, or
        None.
        """
        h = GroupNorm(self.groups, self.epsilon, nn.silu, name="norm_1")(x)
        if self.resample:
            change = {"down": downsample, "up": upsample}[self.resample]
            h, x = change(h), change(x)
        h = Conv(self.channels, dtype=self.dtype, name="conv_1")(h)
        norm = GroupNorm(self.groups, self.epsilon, nn.silu, name="norm_2")
        h = norm(h) if embedding is None else self._norm_conditioned(norm, h, embedding)
        h = dropout(keys, h, self.dropout)
        # Zero, so that a block starts as the identity, and the network as shallow as it can be.
        zeros = nn.initializers.zeros
        h = Conv(self.channels, kernel_init=zeros, dtype=self.dtype, name="conv_2")(h)
        if x.shape[-1] != self.channels:
            x = nn.Dense(self.channels, dtype=self.dtype, name="shortcut")(x)
        return x + h

    def _norm_conditioned(self, norm: GroupNorm, h: Array, embedding: Array) -> Array:
        width = self.channels * (2 if self.scale_shift else 1)
        shift = nn.Dense(width, dtype=self.dtype, name="condition")(nn.silu(embedding))
        shift = shift[:, None, None, :]
        return norm(h, *jnp.split(shift, 2, axis=-1)) if self.scale_shift else norm(h + shift)


class SelfAttention(nn.Module):
    """Multi-head attention over all pixels, added to x. norm: normalize its input."""

    heads: int
    norm: bool = True
    groups: int | None = None
    epsilon: float = 1e-6
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """The layer's output for x [B, H, W, C], of the same shape."""
        batch, height, width, channels = x.shape
        h = GroupNorm(self.groups, self.epsilon, name="norm")(x) if self.norm else x
        qkv = nn.Dense(3 * channels, dtype=self.dtype, name="qkv")(h)
        qkv = qkv.reshape(batch, height * width, 3, self.heads, channels // self.heads)
        h = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        h = h.reshape(batch, height, width, channels)
        zeros = nn.initializers.zeros
        return x + nn.Dense(channels, dtype=self.dtype, kernel_init=zeros, name="out")(h)


@dataclass(frozen=True)
class UNetConfig(NetworkConfig):
    """Architecture of the UNet."""

    channels: int = 32
    """Width at full resolution; an even number."""
    multipliers: tuple[int, ...] = (1, 2)
    """Width of each resolution, in units of channels; each resolution is half of the one before."""
    blocks: int = 1
    """Residual blocks per resolution on the way down; one more on the way up."""
    attention: tuple[int, ...] = ()
    """Heights in pixels at which self-attention follows each block."""
    middle_attention: bool = True
    """Self-attention between the two blocks at the lowest resolution."""
    middle_attention_norm: bool = True
    """A norm before that attention."""
    heads: int = 1
    """Attention heads; they must divide the width."""
    head_width: int | None = None
    """Channels of each attention head, in place of heads."""
    scale_shift: bool = True
    """Condition blocks by scaling and shifting their second norm (ADM), else by addition (DDPM)."""
    resample_blocks: bool = False
    """Change resolution inside residual blocks (ADM), else by convolutions (DDPM)."""
    symmetric_padding: bool = False
    """Pad downsampling convolutions on all four sides (PyTorch), else on two (TensorFlow)."""
    norm_groups: int | None = None
    """Groups of every norm; None for groups of four channels, 32 at most."""
    norm_epsilon: float = 1e-6
    """Constant that every norm adds to the variance."""
    sin_first: bool = False
    """Put sines before cosines in the embedding of the time (DDPM), else after (ADM)."""
    frequency_shift: float = 0.0
    """Shift of the embedding's frequencies: 1 for DDPM, 0 for ADM."""

    def check(self) -> None:
        """Check the values of the fields.

        Raises: ValueError, naming the field.
        """
        super().check()
        positive = ["channels", "blocks", "heads", "norm_epsilon"]
        positive += [
            name for name in ("head_width", "norm_groups") if getattr(self, name) is not None
        ]
        for name in positive:
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"network.{name} is {getattr(self, name)}: use a number above 0")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(
                f"network.multipliers is {self.multipliers}: use at least one, each 1 or more"
            )
        if self.channels % 2:
            raise ValueError(f"network.channels is {self.channels}: use an even number")

    def build(self, x_shape: tuple[int, ...], conditioning: Conditioning = UNCONDITIONAL) -> "UNet":
        """The UNet for x of shape [B, H, W, C]."""
        return UNet(self, x_shape[-1] * (2 if self.learned_variance else 1), conditioning)


class UNet(nn.Module):
    """Down to the lowest resolution and up, with a skip connection from every block.

    Parameters, norms, the embeddings and the output are float32 whatever the dtype of the config.
    """

    config: UNetConfig
    out_channels: int
    conditioning: Conditioning = UNCONDITIONAL

    @nn.compact
    def __call__(
        self, x: Array, t: Array, condition: Condition = None, keys: Array | None = None
    ) -> Array:
        """The network's output, float32 [B, H, W, out_channels].

        x: [B, H, W, C]; t: [B]; condition: as the conditioning has it, [B, ...]; keys: [B], one per
        example, to train with dropout.

        Raises: ValueError for x that cannot be halved often enough, heads that do not divide the
        width, or a condition missing or unexpected.
        """
        c, dtype = self.config, DTYPES[self.config.dtype]
        self._check(x, condition)
        embedding = self._embed(t, condition)
        h = Conv(c.channels, dtype=dtype, name="in")(x.astype(dtype))
        skips, last = [h], len(c.multipliers) - 1
        for i, multiplier in enumerate(c.multipliers):
            for j in range(c.blocks):
                h = self._block(h, embedding, keys, f"down_{i}_{j}", c.channels * multiplier)
                h = self._attend(h, f"down_{i}_{j}")
                skips.append(h)
            if i < last:
                h = self._downsample(h, embedding, keys, f"down_{i}_resample")
                skips.append(h)

        h = self._block(h, embedding, keys, "middle_0", h.shape[-1])
        if c.middle_attention:
            h = self._attention("middle", h.shape[-1], c.middle_attention_norm)(h)
        h = self._block(h, embedding, keys, "middle_1", h.shape[-1])

        for i, multiplier in reversed(list(enumerate(c.multipliers))):
            for j in range(c.blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = self._block(h, embedding, keys, f"up_{i}_{j}", c.channels * multiplier)
                h = self._attend(h, f"up_{i}_{j}")
            if i > 0:
                h = self._upsample(h, embedding, keys, f"up_{i}_resample")

        # Float32 at any dtype: at the noisy end an error of eps is multiplied by sigma/alpha, which
        # is about 160.
        norm = GroupNorm(c.norm_groups, c.norm_epsilon, nn.silu, name="norm_out")
        h = norm(h.astype(jnp.float32))
        return Conv(self.out_channels, kernel_init=nn.initializers.zeros, name="out")(h)

    def _block(
        self,
        h: Array,
        embedding: Array,
        keys: Array | None,
        name: str,
        channels: int,
        resample: str = "",
    ) -> Array:
        c = self.config
        if keys is not None:  # every block drops its own units
            number = zlib.crc32(name.encode())
            keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
        block = nn.remat(ResBlock) if c.remat else ResBlock
        return block(
            channels, c.dropout, c.scale_shift, resample, c.norm_groups, c.norm_epsilon,
            DTYPES[c.dtype], name=name,
        )(h, embedding, keys)  # fmt: skip

    def _attention(self, name: str, width: int, norm: bool = True) -> SelfAttention:
        c = self.config
        heads = width // c.head_width if c.head_width else c.heads
        dtype = DTYPES[c.dtype]
        return SelfAttention(
            heads, norm, c.norm_groups, c.norm_epsilon, dtype, name=f"{name}_attention"
        )

    def _attend(self, h: Array, name: str) -> Array:
        if h.shape[1] not in self.config.attention:
            return h
        return self._attention(name, h.shape[-1])(h)

    def _downsample(self, h: Array, embedding: Array, keys: Array | None, name: str) -> Array:
        if self.config.resample_blocks:
            return self._block(h, embedding, keys, name, h.shape[-1], "down")
        padding = ((1, 1), (1, 1)) if self.config.symmetric_padding else "SAME"
        dtype = DTYPES[self.config.dtype]
        return Conv(h.shape[-1], strides=2, padding=padding, dtype=dtype, name=name)(h)

    def _upsample(self, h: Array, embedding: Array, keys: Array | None, name: str) -> Array:
        if self.config.resample_blocks:
            return self._block(h, embedding, keys, name, h.shape[-1], "up")
        return Conv(h.shape[-1], dtype=DTYPES[self.config.dtype], name=name)(upsample(h))

    def _embed(self, t: Array, condition: Condition) -> Array:
        c = self.config
        features = time_features(t, c.channels, sin_first=c.sin_first, shift=c.frequency_shift)
        embedding = nn.Dense(4 * c.channels, name="time_in")(features)
        embedding = nn.Dense(4 * c.channels, name="time_out")(nn.silu(embedding))
        return embedding + self.conditioning.embed(condition, 4 * c.channels)

    def _check(self, x: Array, condition: Condition) -> None:
        c, halvings = self.config, len(self.config.multipliers) - 1
        if x.ndim != 4:
            raise ValueError(f"x has shape {x.shape}: use a batch of images, [B, H, W, C]")
        if any(side % 2**halvings for side in x.shape[1:3]):
            raise ValueError(
                f"x of {x.shape[1]}x{x.shape[2]} cannot be halved {halvings} times: use fewer"
                f" network.multipliers, or sides divisible by {2**halvings}"
            )
        sizes = [x.shape[1] // 2**i for i in range(halvings + 1)]
        if not set(c.attention) <= set(sizes):
            raise ValueError(
                f"network.attention is {tuple(c.attention)}: use heights of this network, {sizes}"
            )
        levels = zip(c.multipliers, sizes, strict=True)
        attending = {c.channels * m for m, size in levels if size in c.attention}
        attending |= {c.channels * c.multipliers[-1]} if c.middle_attention else set()
        for width in sorted(attending):
            if width % (c.head_width or c.heads):
                name, value = ("head_width", c.head_width) if c.head_width else ("heads", c.heads)
                raise ValueError(
                    f"network.{name} is {value}: use a divisor of every width with attention, as of"
                    f" {width}"
                )
        check_structure(self.conditioning, condition)


register("unet", UNetConfig)
