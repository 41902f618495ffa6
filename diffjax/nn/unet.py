"""The UNet of DDPM (arXiv:2006.11239), improved DDPM (arXiv:2102.09672) and ADM (arXiv:2105.05233): an image, a time
and a condition go in, an image comes out. It knows nothing of diffusion.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from diffjax.nn.layers import Conv, GroupNorm, downsample, dropout, time_features, upsample


class ResBlock(nn.Module):
    """x + conv(norm(conv(norm(x)))), the second norm told of the time and the condition by a vector [B, E].

    scale_shift: by scaling and shifting what is normalised (improved DDPM), else by adding to it before (DDPM).
    resample: "down" and "up" halve and double the resolution between the first norm and the first convolution (ADM).
    """

    channels: int
    dropout: float = 0.0
    scale_shift: bool = True
    resample: str = ""
    groups: int | None = None
    epsilon: float = 1e-6
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, condition: Array, keys: Array | None) -> Array:
        """x: [B, H, W, C], condition: [B, E], keys: [B] for dropout, or None. Returns [B, H', W', channels]."""
        h = GroupNorm(self.groups, self.epsilon, nn.silu, name="norm_1")(x)
        if self.resample:
            change = {"down": downsample, "up": upsample}[self.resample]
            h, x = change(h), change(x)
        h = Conv(self.channels, dtype=self.dtype, name="conv_1")(h)
        width = self.channels * (2 if self.scale_shift else 1)
        told = nn.Dense(width, dtype=self.dtype, name="condition")(nn.silu(condition))[:, None, None, :]
        norm = GroupNorm(self.groups, self.epsilon, nn.silu, name="norm_2")
        h = norm(h, *jnp.split(told, 2, axis=-1)) if self.scale_shift else norm(h + told)
        h = dropout(keys, h, self.dropout)
        # Zero: at the start a block passes on what it gets, and the network is as shallow as it can be.
        h = Conv(self.channels, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="conv_2")(h)
        if x.shape[-1] != self.channels:
            x = nn.Dense(self.channels, dtype=self.dtype, name="shortcut")(x)
        return x + h


class SelfAttention(nn.Module):
    """x + projection of multi-head attention over all pixels, normalised before unless norm is False."""

    heads: int
    norm: bool = True
    groups: int | None = None
    epsilon: float = 1e-6
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: [B, H, W, C], and so is what is returned."""
        batch, height, width, channels = x.shape
        h = GroupNorm(self.groups, self.epsilon, name="norm")(x) if self.norm else x
        qkv = nn.Dense(3 * channels, dtype=self.dtype, name="qkv")(h)
        qkv = qkv.reshape(batch, height * width, 3, self.heads, channels // self.heads)
        h = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        h = h.reshape(batch, height, width, channels)
        return x + nn.Dense(channels, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="out")(h)


class UNet(nn.Module):
    """Down to the smallest resolution and up again, with a skip connection from every block.

    channels: width at full resolution; multipliers: width of each resolution, in units of `channels`, each
    resolution half of the one before; blocks: residual blocks per resolution on the way down (one more on the
    way up); attention: the sizes in pixels (of the image's height) at which blocks are followed by
    self-attention, and middle_attention: so are the two blocks at the bottom, in between; heads: attention heads, or
    head_width: channels of each, instead; scale_shift: how blocks are told of the time (see ResBlock);
    resample_blocks: resolutions change inside residual blocks (ADM), not in convolutions (DDPM); dropout: rate inside
    residual blocks while training; remat: blocks are computed again for the gradient, which takes less memory, and a
    third more time; dtype: of the computation. Parameters, norms, the embedding of the time and the output are float32.

    num_classes: classes of the condition, 0 for none. The class table has one row more than there are classes, unless
    null_label is False: label num_classes means "no label". condition_width: width of a condition of real numbers; a
    network with classes too does not hear them before it has learned to.

    And what implementations differ in: norm_groups, for groups of four channels, 32 at most, if None; norm_epsilon;
    middle_attention_norm; symmetric_padding: convolutions that halve see a border of zeros on all four sides (PyTorch's
    habit), not on two (TensorFlow's); sin_first and frequency_shift: as of `time_features`.
    """

    channels: int
    out_channels: int
    multipliers: Sequence[int] = (1, 2)
    blocks: int = 2
    attention: Sequence[int] = ()
    middle_attention: bool = True
    middle_attention_norm: bool = True
    heads: int = 1
    head_width: int | None = None
    scale_shift: bool = True
    resample_blocks: bool = False
    symmetric_padding: bool = False
    norm_groups: int | None = None
    norm_epsilon: float = 1e-6
    sin_first: bool = False
    frequency_shift: float = 0.0
    dropout: float = 0.0
    num_classes: int = 0
    null_label: bool = True
    condition_width: int = 0
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, t: Array, condition: Any = None, keys: Array | None = None) -> Array:
        """x: [B, H, W, C], t: [B], condition: int labels [B] in 0..num_classes, floats [B, condition_width], the pair
        of them where there are both, or None without either; keys: [B], one per example, to train with dropout. Returns
        float32 [B, H, W, out_channels].

        ValueError for an image that cannot be halved often enough, heads that do not fit, or a condition missing or
        unexpected.
        """
        self._check(x, condition)
        embedding = self._embed(t, condition)
        make_block = nn.remat(ResBlock) if self.remat else ResBlock
        drawn = 0

        def block(h: Array, channels: int, name: str, resample: str = "") -> Array:
            nonlocal drawn  # every block drops its own units
            block_keys = None if keys is None else jax.vmap(lambda key, i=drawn: jax.random.fold_in(key, i))(keys)
            drawn += 1
            made = make_block(
                channels, self.dropout, self.scale_shift, resample, self.norm_groups, self.norm_epsilon, self.dtype,
                name=name,
            )  # fmt: skip
            return made(h, embedding, block_keys)

        def attend(h: Array, name: str, with_norm: bool = True) -> Array:
            heads = h.shape[-1] // self.head_width if self.head_width else self.heads
            made = SelfAttention(
                heads, with_norm, self.norm_groups, self.norm_epsilon, self.dtype, name=name + "_attention"
            )
            return made(h)

        def block_and_attention(h: Array, channels: int, name: str) -> Array:
            h = block(h, channels, name)
            return attend(h, name) if h.shape[1] in self.attention else h

        h = Conv(self.channels, dtype=self.dtype, name="in")(x.astype(self.dtype))
        skips, last = [h], len(self.multipliers) - 1
        for i, multiplier in enumerate(self.multipliers):
            for j in range(self.blocks):
                h = block_and_attention(h, self.channels * multiplier, f"down_{i}_{j}")
                skips.append(h)
            if i < last:
                name = f"down_{i}_resample"
                if self.resample_blocks:
                    h = block(h, h.shape[-1], name, "down")
                else:
                    padding = ((1, 1), (1, 1)) if self.symmetric_padding else "SAME"
                    h = Conv(h.shape[-1], strides=2, padding=padding, dtype=self.dtype, name=name)(h)
                skips.append(h)

        h = block(h, h.shape[-1], "middle_0")
        h = attend(h, "middle", self.middle_attention_norm) if self.middle_attention else h
        h = block(h, h.shape[-1], "middle_1")

        for i, multiplier in reversed(list(enumerate(self.multipliers))):
            for j in range(self.blocks + 1):
                h = block_and_attention(
                    jnp.concatenate([h, skips.pop()], axis=-1), self.channels * multiplier, f"up_{i}_{j}"
                )
            if i > 0:
                name = f"up_{i}_resample"
                if self.resample_blocks:
                    h = block(h, h.shape[-1], name, "up")
                else:
                    h = Conv(h.shape[-1], dtype=self.dtype, name=name)(upsample(h))

        # In float32 at any dtype: at the noisy end an error of eps is multiplied by sigma/alpha, about 160.
        h = GroupNorm(self.norm_groups, self.norm_epsilon, nn.silu, name="norm_out")(h.astype(jnp.float32))
        return Conv(self.out_channels, kernel_init=nn.initializers.zeros, name="out")(h)

    def _embed(self, t: Array, condition: Any) -> Array:
        width = 4 * self.channels
        features = time_features(t, self.channels, sin_first=self.sin_first, shift=self.frequency_shift)
        embedding = nn.Dense(width, name="time_in")(features)
        embedding = nn.Dense(width, name="time_out")(nn.silu(embedding))
        label, numbers = condition if self.num_classes and self.condition_width else (condition, condition)
        if self.num_classes:
            # As large as the time's part of the vector: a table of small numbers takes long to be heard.
            rows = self.num_classes + self.null_label
            table = nn.Embed(rows, width, embedding_init=nn.initializers.normal(1.0), name="label")
            embedding += table(label)
        if self.condition_width:
            said = nn.Dense(width, name="condition_in")(numbers.astype(jnp.float32))
            # Zero beside labels: a network that knows them may be told more without forgetting.
            first = nn.initializers.zeros if self.num_classes else nn.linear.default_kernel_init
            embedding += nn.Dense(width, kernel_init=first, name="condition_out")(nn.silu(said))
        return embedding

    def _check(self, x: Array, condition: Any) -> None:
        halvings = len(self.multipliers) - 1
        if any(side % 2**halvings for side in x.shape[1:3]):
            raise ValueError(
                f"images of {x.shape[1]}x{x.shape[2]} cannot be halved {halvings} times:"
                f" give the network fewer multipliers, or images with sides divisible by {2**halvings}"
            )
        sizes = [x.shape[1] // 2**i for i in range(halvings + 1)]
        if not set(self.attention) <= set(sizes):
            raise ValueError(f"attention at {tuple(self.attention)} never happens: this network sees sizes {sizes}")
        attending = {
            self.channels * m for m, size in zip(self.multipliers, sizes, strict=True) if size in self.attention
        }
        attending |= {self.channels * self.multipliers[-1]} if self.middle_attention else set()
        for width in sorted(attending):
            if width % (self.head_width or self.heads):
                what = f"head_width is {self.head_width}" if self.head_width else f"heads is {self.heads}"
                raise ValueError(f"{what}: it must divide every width where there is attention, and not {width}")
        if (self.num_classes > 0 and self.condition_width > 0) != isinstance(condition, tuple):
            raise ValueError(
                f"num_classes is {self.num_classes} and condition_width {self.condition_width}: a network with both"
                " is called with a pair of labels and numbers, others are not"
            )
        if (condition is None) != (self.num_classes == 0 and self.condition_width == 0):
            raise ValueError(
                "this network has no classes: call it without a condition"
                if condition is not None
                else f"this network needs a condition of {self.condition_width} numbers per image"
                if self.condition_width
                else f"this network needs a label per image, {self.num_classes} for no label"
            )
