"""Inception-v3 as of 2015 (arXiv:1512.00567), whose features FID, KID and the inception score are told from: a network
that is only run, never trained, so that its batch norms are part of its convolutions.

It is TensorFlow's graph of December 2015, not the Inception-v3 of later years: 1008 classes, average pools that do not
count the padding, and in the last block a maximum where an average was meant. Any other weights, resizing or pooling
gives other figures.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

SIZE = 299  # pixels along an edge of what the convolutions see
NORM, EPSILON = ("weight", "bias", "running_mean", "running_var"), 1e-3  # of the batch norms
Layer = tuple[int, int, int]  # features, height and width of the kernel


class Inception(nn.Module):
    """(features [B, 2048], logits [B, 1008]) of images [B, H, W, 3] of 0..255, any H and W, in float32.

    The logits are without their bias, as the inception score has always been computed.
    """

    @nn.compact
    def __call__(self, images: Array) -> tuple[Array, Array]:
        """Parameters by the names that the weights have had since they left TensorFlow."""

        # Rounded to TF32 or bfloat16, as accelerators would, features are others.
        def conv(name: str, x: Array, layer: Layer, stride: int = 1, padding: str = "SAME") -> Array:
            features, *size = layer
            return nn.relu(nn.Conv(features, size, stride, padding, precision="highest", name=name)(x))

        def chain(name: str, x: Array, *layers: Layer, stride: int = 1) -> Array:
            """Convolutions name_1, name_2, ...; the last one with the stride, and then without padding."""
            for number, layer in enumerate(layers[:-1], 1):
                x = conv(f"{name}_{number}", x, layer)
            return conv(f"{name}_{len(layers)}", x, layers[-1], stride, "SAME" if stride == 1 else "VALID")

        def average(x: Array) -> Array:
            return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)

        def maximum(x: Array) -> Array:
            return nn.max_pool(x, (3, 3), (2, 2))

        def block_a(name: str, x: Array, pooled: int) -> Array:
            return _join(
                conv(f"{name}.branch1x1", x, (64, 1, 1)),
                chain(f"{name}.branch5x5", x, (48, 1, 1), (64, 5, 5)),
                chain(f"{name}.branch3x3dbl", x, (64, 1, 1), (96, 3, 3), (96, 3, 3)),
                conv(f"{name}.branch_pool", average(x), (pooled, 1, 1)),
            )

        def block_b(name: str, x: Array) -> Array:
            return _join(
                conv(f"{name}.branch3x3", x, (384, 3, 3), 2, "VALID"),
                chain(f"{name}.branch3x3dbl", x, (64, 1, 1), (96, 3, 3), (96, 3, 3), stride=2),
                maximum(x),
            )

        def block_c(name: str, x: Array, width: int) -> Array:
            across, down = (width, 1, 7), (width, 7, 1)
            return _join(
                conv(f"{name}.branch1x1", x, (192, 1, 1)),
                chain(f"{name}.branch7x7", x, (width, 1, 1), across, (192, 7, 1)),
                chain(f"{name}.branch7x7dbl", x, (width, 1, 1), down, across, down, (192, 1, 7)),
                conv(f"{name}.branch_pool", average(x), (192, 1, 1)),
            )

        def block_d(name: str, x: Array) -> Array:
            return _join(
                chain(f"{name}.branch3x3", x, (192, 1, 1), (320, 3, 3), stride=2),
                chain(f"{name}.branch7x7x3", x, (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3), stride=2),
                maximum(x),
            )

        def block_e(name: str, x: Array, pool: Any) -> Array:
            def fork(name: str, x: Array) -> Array:
                return _join(conv(f"{name}a", x, (384, 1, 3)), conv(f"{name}b", x, (384, 3, 1)))

            return _join(
                conv(f"{name}.branch1x1", x, (320, 1, 1)),
                fork(f"{name}.branch3x3_2", chain(f"{name}.branch3x3", x, (384, 1, 1))),
                fork(f"{name}.branch3x3dbl_3", chain(f"{name}.branch3x3dbl", x, (448, 1, 1), (384, 3, 3))),
                conv(f"{name}.branch_pool", pool(x), (192, 1, 1)),
            )

        x = (resize(images.astype(jnp.float32)) - 128) / 128
        x = conv("Conv2d_1a_3x3", x, (32, 3, 3), 2, "VALID")
        x = conv("Conv2d_2a_3x3", x, (32, 3, 3), 1, "VALID")
        x = maximum(conv("Conv2d_2b_3x3", x, (64, 3, 3)))
        x = conv("Conv2d_3b_1x1", x, (80, 1, 1))
        x = maximum(conv("Conv2d_4a_3x3", x, (192, 3, 3), 1, "VALID"))
        for letter, pooled in zip("bcd", (32, 64, 64), strict=True):
            x = block_a(f"Mixed_5{letter}", x, pooled)
        x = block_b("Mixed_6a", x)
        for letter, width in zip("bcde", (128, 160, 160, 192), strict=True):
            x = block_c(f"Mixed_6{letter}", x, width)
        x = block_d("Mixed_7a", x)
        x = block_e("Mixed_7b", x, average)
        x = block_e("Mixed_7c", x, lambda x: nn.max_pool(x, (3, 3), padding="SAME"))
        features = jnp.mean(x, (1, 2))
        return features, nn.Dense(1008, use_bias=False, precision="highest", name="fc")(features)


def _join(*branches: Array) -> Array:
    return jnp.concatenate(branches, -1)


def resize(x: Array) -> Array:
    """Bilinear, [B, H, W, C] to [B, 299, 299, C], by TensorFlow's first rule: pixel i is taken at i * H/299, from the
    corners and not from the middles of pixels, without smoothing where it shrinks.
    """
    for axis in (1, 2):
        size = x.shape[axis]
        at = np.arange(SIZE, dtype=np.float32) * np.float32(size / SIZE)
        low = at.astype(np.int32)
        share = (at - low).reshape(-1, *(1,) * (3 - axis))
        below, above = (jnp.take(x, i, axis) for i in (low, np.minimum(low + 1, size - 1)))
        x = below + (above - below) * share
    return x


@functools.cache
def shapes() -> Any:
    """The parameters as shapes, without computing any."""
    return jax.eval_shape(Inception().init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]


def from_tensors(tensors: Mapping[str, Any]) -> Any:
    """Parameters from PyTorch's tensors by their names there: NAME.conv.weight [O, I, H, W], NAME.bn.weight, .bias,
    .running_mean and .running_var [O], of every convolution, and fc.weight [1008, 2048]; what else there is, is not
    used. A batch norm in use is a factor s = weight/sqrt(var + 0.001) of the kernel, and a bias - mean*s.

    ValueError, naming the tensor, for one that is missing or of another shape.
    """

    def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in tensors:
            raise ValueError(f"there is no tensor {name}: these are not the weights of the Inception-v3 of 2015")
        found = np.asarray(tensors[name], np.float64)
        if found.shape != shape:
            raise ValueError(
                f"tensor {name} is {list(found.shape)} where {list(shape)} belongs: these are not the weights of the"
                " Inception-v3 of 2015"
            )
        return found

    params = {}
    for name, leaves in shapes().items():
        *size, inside, outside = leaves["kernel"].shape
        if name == "fc":
            params[name] = {"kernel": tensor("fc.weight", (outside, inside)).T}
            continue
        norm = {
            each: tensor(f"{name}.bn.{each}", (outside,)) for each in ("weight", "bias", "running_mean", "running_var")
        }
        factor = norm["weight"] / np.sqrt(norm["running_var"] + EPSILON)
        kernel = tensor(f"{name}.conv.weight", (outside, inside, *size)).transpose(2, 3, 1, 0) * factor
        params[name] = {"kernel": kernel, "bias": norm["bias"] - norm["running_mean"] * factor}
    return jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
