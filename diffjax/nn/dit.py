"""The diffusion transformer, DiT (arXiv:2212.09748), which is SiT's network too.

It cuts x into patches, transforms these by blocks of attention that the time and the condition
modulate, and joins them again. It knows nothing of diffusion.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from diffjax.nn.conditioning import UNCONDITIONAL, Condition, Conditioning, check_structure
from diffjax.nn.layers import dropout, time_features
from diffjax.nn.registry import DTYPES, NetworkConfig, register

TIME_FEATURES = 256
XAVIER = nn.initializers.xavier_uniform()
ZEROS = nn.initializers.zeros


@dataclass(frozen=True)
class DiTConfig(NetworkConfig):
    """Architecture of the DiT."""

    width: int = 64
    """Channels of each patch in the blocks; a multiple of 4."""
    depth: int = 4
    """Number of blocks."""
    heads: int = 4
    """Number of attention heads; a divisor of the width."""
    patch: int = 2
    """Side of a patch; a divisor of both sides of x."""
    mlp_ratio: int = 4
    """Width of the hidden layer of each block's MLP, as a multiple of the width."""
    norm_epsilon: float = 1e-6
    """Constant that the norms before attention and at the end add to the variance."""
    mlp_norm_epsilon: float = 1e-6
    """Constant that the norms before MLPs add to the variance; 1e-5 in diffusers."""
    frequency_shift: float = 0.0
    """Shift of the frequencies in the embedding of the time: 0 for DiT and SiT, 1 for diffusers."""
    scan: bool = False
    """Compile one block and loop over it, in place of all blocks; the parameters are the same."""

    def check(self) -> None:
        """Check the values of the fields.

        Raises: ValueError, naming the field.
        """
        super().check()
        for name in (
            "width", "depth", "heads", "patch", "mlp_ratio", "norm_epsilon", "mlp_norm_epsilon",
        ):  # fmt: skip
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"network.{name} is {getattr(self, name)}: use a number above 0")
        if self.width % 4:
            raise ValueError(f"network.width is {self.width}: use a multiple of 4, for positions")
        if self.width % self.heads:
            raise ValueError(
                f"network.heads is {self.heads}: use a divisor of network.width, {self.width}"
            )
        if not 0 <= self.frequency_shift <= 1:
            raise ValueError(
                f"network.frequency_shift is {self.frequency_shift}: use 0 (DiT) to 1 (diffusers)"
            )

    def build(self, x_shape: tuple[int, ...], conditioning: Conditioning = UNCONDITIONAL) -> "DiT":
        """The DiT for x of shape [B, H, W, C]."""
        return DiT(self, x_shape[-1] * (2 if self.learned_variance else 1), conditioning)


SIZES: dict[str, dict[str, Any]] = {  # arXiv:2212.09748, table 1
    "S": {"width": 384, "depth": 12, "heads": 6},
    "B": {"width": 768, "depth": 12, "heads": 12},
    "L": {"width": 1024, "depth": 24, "heads": 16},
    "XL": {"width": 1152, "depth": 28, "heads": 16},
}


def dit(size: str, patch: int = 2, **changes: Any) -> DiTConfig:
    """The configuration of a size of the paper, as DiT-XL/2 by `dit("XL", 2)`.

    changes: other fields. The paper's networks have a learned variance too, which is not trained
    here: `learned_variance=True`.

    Raises: ValueError for a size that is not one of S, B, L, XL.
    """
    if size not in SIZES:
        raise ValueError(f"size is {size!r}: use one of {', '.join(SIZES)}")
    return dataclasses.replace(DiTConfig(patch=patch, **SIZES[size]), **changes)


# ------------------------------------------------------------------------------- layers


def positions(height: int, width: int, features: int) -> np.ndarray:
    """Sinusoidal features of each place of a grid, float32 [height * width, features].

        sin and cos of column * 10000**(-i/quarter), then of row, i = 0..quarter-1

    Raises: ValueError for features that are no multiple of 4.
    """
    if features % 4:
        raise ValueError(f"features is {features}: use a multiple of 4, sin and cos of two axes")
    quarter = features // 4
    row, column = np.indices((height, width)).reshape(2, -1, 1).astype(np.float64)
    frequencies = 10_000.0 ** (-np.arange(quarter) / quarter)
    waves = [wave(place * frequencies) for place in (column, row) for wave in (np.sin, np.cos)]
    return np.concatenate(waves, axis=-1).astype(np.float32)


def patchify(x: Array, patch: int) -> Array:
    """Cut x [B, H, W, C] into patches, [B, (H/p)(W/p), p*p*C], row by row."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.swapaxes(2, 3).reshape(batch, -1, patch * patch * channels)


def unpatchify(patches: Array, patch: int, height: int, width: int) -> Array:
    """The inverse of `patchify`, for x of height and width."""
    batch = patches.shape[0]
    x = patches.reshape(batch, height // patch, width // patch, patch, patch, -1)
    return x.swapaxes(2, 3).reshape(batch, height, width, -1)


def modulate(x: Array, shift: Array, scale: Array, epsilon: float) -> Array:
    """Normalize each patch over its channels in float32, then scale and shift it.

        (x - mean)/sqrt(variance + epsilon) * (1 + scale) + shift

    x: [B, N, D]; shift, scale: [B, D], of the condition. The result has the dtype of x.
    """
    h = x.astype(jnp.float32)
    h -= h.mean(-1, keepdims=True)
    h *= jax.lax.rsqrt((h**2).mean(-1, keepdims=True) + epsilon)
    return (h * (1 + scale[:, None]) + shift[:, None]).astype(x.dtype)


class Block(nn.Module):
    """A block of attention and MLP, by adaLN-Zero: it starts as the identity.

        x <- x + gate*attention(norm(x)*(1 + scale) + shift);  x <- x + the same with the MLP

    shift, scale and gate of both are one dense layer of the embedding.
    """

    config: DiTConfig

    @nn.compact
    def __call__(
        self, x: Array, embedding: Array, keys: Array | None, number: Array
    ) -> tuple[Array, None]:
        """The block's output [B, N, D], and None, since `nn.scan` expects a pair.

        x: [B, N, D]; embedding of time and condition: [B, D]; keys: [B] for dropout, or None;
        number: of the block, so that each drops its own units.
        """
        c, dtype, width = self.config, DTYPES[self.config.dtype], x.shape[-1]
        changes = _dense(6 * width, "modulation", ZEROS, dtype)(nn.silu(embedding))
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(changes, 6, axis=-1)
        h = modulate(x, shift_1, scale_1, c.norm_epsilon)
        x += gate_1[:, None] * self._attend(h, c.heads, dtype)
        h = modulate(x, shift_2, scale_2, c.mlp_norm_epsilon)
        h = nn.gelu(_dense(c.mlp_ratio * width, "mlp_in", XAVIER, dtype)(h), approximate=True)
        if keys is not None:
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
        h = dropout(keys, h, c.dropout)
        return x + gate_2[:, None] * _dense(width, "mlp_out", XAVIER, dtype)(h), None

    def _attend(self, h: Array, heads: int, dtype: DTypeLike) -> Array:
        batch, number, width = h.shape
        qkv = _dense(3 * width, "qkv", XAVIER, dtype)(h)
        q, k, v = jnp.moveaxis(qkv.reshape(batch, number, 3, heads, width // heads), 2, 0)
        h = jax.nn.dot_product_attention(q, k, v).reshape(batch, number, width)
        return _dense(width, "out", XAVIER, dtype)(h)


def _dense(features: int, name: str, init: Any, dtype: DTypeLike = jnp.float32) -> nn.Dense:
    return nn.Dense(features, dtype=dtype, kernel_init=init, name=name)


class DiT(nn.Module):
    """Patches with their positions, the blocks, and the patches of the output.

    Parameters, norms, the embeddings and the output are float32 whatever the dtype of the config.
    The parameters of all blocks are stacked, [depth, ...]: their tree is the same with `scan`.
    """

    config: DiTConfig
    out_channels: int
    conditioning: Conditioning = UNCONDITIONAL

    @nn.compact
    def __call__(
        self, x: Array, t: Array, condition: Condition = None, keys: Array | None = None
    ) -> Array:
        """The network's output, float32 [B, H, W, out_channels].

        x: [B, H, W, C]; t: [B]; condition: as the conditioning has it, [B, ...]; keys: [B], one per
        example, to train with dropout.

        Raises: ValueError for x that cannot be cut into patches, a width that the heads do not
        divide or that is no multiple of 4, or a condition missing or unexpected.
        """
        c, dtype = self.config, DTYPES[self.config.dtype]
        self._check(x, condition)
        height, width = x.shape[1:3]
        embedding = self._embed(t, condition)
        h = _dense(c.width, "patch", XAVIER, dtype)(patchify(x, c.patch).astype(dtype))
        h += positions(height // c.patch, width // c.patch, c.width)
        blocks = nn.scan(
            nn.remat(Block, prevent_cse=not c.scan) if c.remat else Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            length=c.depth,
            unroll=1 if c.scan else c.depth,
        )
        h, _ = blocks(c, name="blocks")(h.astype(dtype), embedding, keys, jnp.arange(c.depth))
        # Float32 at any dtype: at the noisy end an error of eps is multiplied by sigma/alpha, which
        # is about 160.
        changes = _dense(2 * c.width, "modulation", ZEROS)(nn.silu(embedding))
        shift, scale = jnp.split(changes, 2, axis=-1)
        h = modulate(h.astype(jnp.float32), shift, scale, c.norm_epsilon)
        h = _dense(c.patch**2 * self.out_channels, "out", ZEROS)(h)
        return unpatchify(h, c.patch, height, width)

    def _embed(self, t: Array, condition: Condition) -> Array:
        # Weights of the usual size, as the UNet's, where the paper has N(0, 0.02): beside class
        # tables as `embed` has them the time would be too small to learn from.
        width, shift = self.config.width, self.config.frequency_shift
        features = time_features(t, TIME_FEATURES, shift=shift)
        h = nn.Dense(width, name="time_in")(features)
        h = nn.Dense(width, name="time_out")(nn.silu(h))
        return h + self.conditioning.embed(condition, width)

    def _check(self, x: Array, condition: Condition) -> None:
        self.config.check()
        if x.ndim != 4:
            raise ValueError(f"x has shape {x.shape}: use a batch of images, [B, H, W, C]")
        if any(side % self.config.patch for side in x.shape[1:3]):
            raise ValueError(
                f"network.patch is {self.config.patch}: use a divisor of both sides of x, which is"
                f" {x.shape[1]}x{x.shape[2]}"
            )
        check_structure(self.conditioning, condition)


register("dit", DiTConfig)
