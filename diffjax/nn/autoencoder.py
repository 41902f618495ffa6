"""The autoencoder of latent diffusion, AutoencoderKL (arXiv:2112.10752).

It maps images to the mean and variance of latents of a fraction of their height and width, and
latents to images. Diffusion models of latents are trained on what it encodes.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from diffjax.nn.conditioning import UNCONDITIONAL, Condition, Conditioning
from diffjax.nn.layers import Conv, GroupNorm, upsample
from diffjax.nn.registry import DTYPES, NetworkConfig, register
from diffjax.nn.unet import ResBlock, SelfAttention

LOGVAR_RANGE = (-30.0, 20.0)  # of the log variance of a latent


# ------------------------------------------------------------------------------- moments


def mode(moments: Array) -> Array:
    """The mean of the latents, [..., c]. moments: [..., 2c], mean | log variance."""
    return jnp.split(moments, 2, axis=-1)[0]


def draw(moments: Array, keys: Array) -> Array:
    """Latents mean + std * noise, [B, ..., c]. moments: [B, ..., 2c]; keys: [B]."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
    return mean + jnp.exp(logvar / 2) * noise


def kl_divergence(moments: Array) -> Array:
    """The divergence of latents from standard normal ones, in nats per image.

        KL(N(mean, std**2) | N(0, 1)) = (mean**2 + std**2 - 1 - log std**2)/2, over all latents

    moments: [B, ..., 2c]. Returns [B] (arXiv:1312.6114, appendix B).
    """
    mean, logvar = jnp.split(moments, 2, axis=-1)
    each = (mean**2 + jnp.exp(logvar) - 1 - logvar) / 2
    return each.sum(axis=tuple(range(1, each.ndim)))


# ------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class AutoencoderConfig(NetworkConfig):
    """Architecture of the autoencoder; the defaults are Stable Diffusion's."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    """Width of each resolution; each resolution is half of the one before."""
    blocks: int = 2
    """Residual blocks per resolution of the encoder; the decoder has one more."""
    latent_channels: int = 4
    """Channels of the latents."""
    norm_groups: int = 32
    """Groups of every norm; a divisor of every width."""
    norm_epsilon: float = 1e-6
    """Constant that every norm adds to the variance."""
    middle_attention: bool = True
    """Put self-attention, with one head, between the two blocks in the middle."""
    quant_conv: bool = True
    """End the encoder with a linear map of the moments at each place."""
    post_quant_conv: bool = True
    """Begin the decoder with a linear map of the latents at each place."""
    scaling: float = 1.0
    """Factor that gives latents a standard deviation near 1, for a diffusion model."""
    shift: float = 0.0
    """Number to subtract from latents before scaling: x = (latents - shift) * scaling."""
    kl_weight: float = 1e-6
    """Weight of the KL divergence of latents in the loss, where the error of images has 1."""

    def check(self) -> None:
        """Check the values of the fields.

        Raises: ValueError, naming the field.
        """
        super().check()
        if not self.channels or min(self.channels) < 1:
            raise ValueError(
                f"network.channels is {self.channels}: use at least one width, each 1 or more"
            )
        for name in ("blocks", "latent_channels", "norm_groups", "norm_epsilon", "scaling"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"network.{name} is {getattr(self, name)}: use a number above 0")
        if not abs(self.shift) < float("inf"):
            raise ValueError(f"network.shift is {self.shift}: use a finite number")
        if not 0 <= self.kl_weight < float("inf"):
            raise ValueError(f"network.kl_weight is {self.kl_weight}: use 0 or more")
        for width in self.channels:
            if width % self.norm_groups:
                raise ValueError(
                    f"network.norm_groups is {self.norm_groups}: use a divisor of every width, as"
                    f" of {width}"
                )
        for name in ("learned_variance", "dropout"):
            if getattr(self, name):
                raise ValueError(
                    f"network.{name} is {getattr(self, name)}, which an autoencoder has not: leave"
                    " it out"
                )

    @property
    def factor(self) -> int:
        """How many times smaller the sides of the latents are than those of images."""
        return 2 ** (len(self.channels) - 1)

    def latent_shape(self, image_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """The shape [h, w, c] of the latents of images [H, W, C].

        Raises: ValueError for images that cannot be halved often enough.
        """
        height, width = image_shape[-3:-1]
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"images of {height}x{width} cannot be halved {len(self.channels) - 1} times: use"
                f" fewer network.channels, or sides divisible by {self.factor}"
            )
        return height // self.factor, width // self.factor, self.latent_channels

    def build(
        self, x_shape: tuple[int, ...], conditioning: Conditioning = UNCONDITIONAL
    ) -> "Autoencoder":
        """The autoencoder of images of shape [H, W, C].

        Raises: ValueError for images that cannot be halved often enough, or a condition.
        """
        self.latent_shape(x_shape)
        if conditioning.is_conditional:
            raise ValueError(f"an autoencoder takes no condition, and the data has {conditioning}")
        return Autoencoder(self, x_shape[-1])


# ------------------------------------------------------------------------------- the module


class Autoencoder(nn.Module):
    """An encoder of images to moments of latents, and a decoder of latents to images.

    Parameters, norms, moments and images are float32 whatever the dtype of the config.
    """

    config: AutoencoderConfig
    image_channels: int = 3

    def setup(self) -> None:
        """Name the parts."""
        c = self.config
        self.encoder = Encoder(c)
        self.decoder = Decoder(c, self.image_channels)
        if c.quant_conv:
            self.quant_conv = nn.Dense(2 * c.latent_channels)
        if c.post_quant_conv:
            self.post_quant_conv = nn.Dense(c.latent_channels)

    def __call__(
        self,
        images: Array,
        t: Array | None = None,
        condition: Condition = None,
        keys: Array | None = None,
    ) -> Array:
        """Reconstruct images [B, H, W, C] from the mean of their latents.

        keys: one per image, [B], to reconstruct them from random latents. t and condition are not
        used: all networks take them.
        """
        moments = self.encode(images)
        return self.decode(mode(moments) if keys is None else draw(moments, keys))

    def encode(self, images: Array) -> Array:
        """The moments of latents, float32 [B, h, w, 2c]: mean | log variance.

        Raises: ValueError for images that cannot be halved often enough.
        """
        self.config.latent_shape(images.shape)
        moments = self.encoder(images)
        if self.config.quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return jnp.concatenate([mean, jnp.clip(logvar, *LOGVAR_RANGE)], axis=-1)

    def decode(self, latents: Array) -> Array:
        """The images, float32 [B, H, W, C], of latents [B, h, w, c] as they are encoded."""
        if self.config.post_quant_conv:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)


class Encoder(nn.Module):
    """Images [B, H, W, C] to moments [B, h, w, 2c], before their last linear map."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """The moments, float32."""
        c, dtype = self.config, DTYPES[self.config.dtype]
        h = Conv(c.channels[0], dtype=dtype, name="in")(images.astype(dtype))
        for i, width in enumerate(c.channels):
            for j in range(c.blocks):
                h = _block(c, h, f"down_{i}_{j}", width)
            if i < len(c.channels) - 1:
                # One row and one column of zeros, at the right and at the bottom.
                padding = ((0, 1), (0, 1))
                name = f"down_{i}_resample"
                h = Conv(width, strides=2, padding=padding, dtype=dtype, name=name)(h)
        return _out(c, _middle(c, h), 2 * c.latent_channels)


class Decoder(nn.Module):
    """Latents [B, h, w, c], after their first linear map, to images [B, H, W, C]."""

    config: AutoencoderConfig
    image_channels: int

    @nn.compact
    def __call__(self, latents: Array) -> Array:
        """The images, float32."""
        c, dtype = self.config, DTYPES[self.config.dtype]
        h = Conv(c.channels[-1], dtype=dtype, name="in")(latents.astype(dtype))
        h = _middle(c, h)
        for i, width in reversed(list(enumerate(c.channels))):
            for j in range(c.blocks + 1):
                h = _block(c, h, f"up_{i}_{j}", width)
            if i > 0:
                h = Conv(width, dtype=dtype, name=f"up_{i}_resample")(upsample(h))
        return _out(c, h, self.image_channels)


def _block(c: AutoencoderConfig, h: Array, name: str, width: int) -> Array:
    block = nn.remat(ResBlock) if c.remat else ResBlock
    module = block(
        width, groups=c.norm_groups, epsilon=c.norm_epsilon, dtype=DTYPES[c.dtype], name=name
    )
    return module(h, None, None)


def _middle(c: AutoencoderConfig, h: Array) -> Array:
    h = _block(c, h, "middle_0", h.shape[-1])
    if c.middle_attention:
        attention = SelfAttention(
            heads=1, groups=c.norm_groups, epsilon=c.norm_epsilon, dtype=DTYPES[c.dtype],
            name="middle_attention",
        )  # fmt: skip
        h = attention(h)
    return _block(c, h, "middle_1", h.shape[-1])


def _out(c: AutoencoderConfig, h: Array, features: int) -> Array:
    # Float32 at any dtype, as the output of a UNet: eight bits of a number are those of a pixel.
    h = GroupNorm(c.norm_groups, c.norm_epsilon, nn.silu, name="norm_out")(h.astype(jnp.float32))
    return Conv(features, name="out")(h)


register("autoencoder", AutoencoderConfig)
