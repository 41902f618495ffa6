"""Inception-v3 of 2015, whose features define FID, KID and the inception score.

arXiv:1512.00567. It is the TensorFlow graph of December 2015, not the Inception-v3 of later years:
1008 classes, average pools that do not count the padding, and in the last block a maximum where an
average was meant. Other weights, resizing or pooling give other figures. The network is only run,
never trained, so that its batch norms are folded into its convolutions.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

SIZE = 299  # height and width of what the convolutions see
EPSILON = 1e-3  # of the batch norms
NORM = ("weight", "bias", "running_mean", "running_var")  # tensors of a batch norm
Layer = tuple[int, int, int]  # features, height and width of the kernel


class Inception(nn.Module):
    """Features and logits of images.

    Parameters have the names of PyTorch ports. The logits are without their bias, as the inception
    score has always been computed.
    """

    @nn.compact
    def __call__(self, images: Array) -> tuple[Array, Array]:
        """Features [B, 2048] and logits [B, 1008] of images [B, H, W, 3] of 0..255."""
        x = (resize(images.astype(jnp.float32)) - 128) / 128
        x = _conv("Conv2d_1a_3x3", x, (32, 3, 3), 2, "VALID")
        x = _conv("Conv2d_2a_3x3", x, (32, 3, 3), 1, "VALID")
        x = _max_pool(_conv("Conv2d_2b_3x3", x, (64, 3, 3)))
        x = _conv("Conv2d_3b_1x1", x, (80, 1, 1))
        x = _max_pool(_conv("Conv2d_4a_3x3", x, (192, 3, 3), 1, "VALID"))
        for letter, pooled in zip("bcd", (32, 64, 64), strict=True):
            x = _block_a(f"Mixed_5{letter}", x, pooled)
        x = _block_b("Mixed_6a", x)
        for letter, width in zip("bcde", (128, 160, 160, 192), strict=True):
            x = _block_c(f"Mixed_6{letter}", x, width)
        x = _block_d("Mixed_7a", x)
        x = _block_e("Mixed_7b", x, _average_pool)
        x = _block_e("Mixed_7c", x, _same_max_pool)
        features = jnp.mean(x, (1, 2))
        return features, nn.Dense(1008, use_bias=False, precision="highest", name="fc")(features)


# ------------------------------------------------------------------------------- blocks
# They create modules of the network that calls them.


def _conv(name: str, x: Array, layer: Layer, stride: int = 1, padding: str = "SAME") -> Array:
    features, *size = layer
    # Rounded to TF32 or bfloat16, as accelerators would, features differ.
    return nn.relu(nn.Conv(features, size, stride, padding, precision="highest", name=name)(x))


def _chain(name: str, x: Array, *layers: Layer, stride: int = 1) -> Array:
    """Convolutions name_1, name_2, ...; the last one has the stride, unpadded."""
    for number, layer in enumerate(layers[:-1], 1):
        x = _conv(f"{name}_{number}", x, layer)
    padding = "SAME" if stride == 1 else "VALID"
    return _conv(f"{name}_{len(layers)}", x, layers[-1], stride, padding)


def _average_pool(x: Array) -> Array:
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def _max_pool(x: Array) -> Array:
    return nn.max_pool(x, (3, 3), (2, 2))


def _same_max_pool(x: Array) -> Array:
    return nn.max_pool(x, (3, 3), padding="SAME")


def _join(*branches: Array) -> Array:
    return jnp.concatenate(branches, -1)


def _block_a(name: str, x: Array, pooled: int) -> Array:
    return _join(
        _conv(f"{name}.branch1x1", x, (64, 1, 1)),
        _chain(f"{name}.branch5x5", x, (48, 1, 1), (64, 5, 5)),
        _chain(f"{name}.branch3x3dbl", x, (64, 1, 1), (96, 3, 3), (96, 3, 3)),
        _conv(f"{name}.branch_pool", _average_pool(x), (pooled, 1, 1)),
    )


def _block_b(name: str, x: Array) -> Array:
    return _join(
        _conv(f"{name}.branch3x3", x, (384, 3, 3), 2, "VALID"),
        _chain(f"{name}.branch3x3dbl", x, (64, 1, 1), (96, 3, 3), (96, 3, 3), stride=2),
        _max_pool(x),
    )


def _block_c(name: str, x: Array, width: int) -> Array:
    first, across, down = (width, 1, 1), (width, 1, 7), (width, 7, 1)
    return _join(
        _conv(f"{name}.branch1x1", x, (192, 1, 1)),
        _chain(f"{name}.branch7x7", x, first, across, (192, 7, 1)),
        _chain(f"{name}.branch7x7dbl", x, first, down, across, down, (192, 1, 7)),
        _conv(f"{name}.branch_pool", _average_pool(x), (192, 1, 1)),
    )


def _block_d(name: str, x: Array) -> Array:
    first, across, down = (192, 1, 1), (192, 1, 7), (192, 7, 1)
    return _join(
        _chain(f"{name}.branch3x3", x, first, (320, 3, 3), stride=2),
        _chain(f"{name}.branch7x7x3", x, first, across, down, (192, 3, 3), stride=2),
        _max_pool(x),
    )


def _block_e(name: str, x: Array, pool: Callable[[Array], Array]) -> Array:
    double = _chain(f"{name}.branch3x3dbl", x, (448, 1, 1), (384, 3, 3))
    return _join(
        _conv(f"{name}.branch1x1", x, (320, 1, 1)),
        _fork(f"{name}.branch3x3_2", _chain(f"{name}.branch3x3", x, (384, 1, 1))),
        _fork(f"{name}.branch3x3dbl_3", double),
        _conv(f"{name}.branch_pool", pool(x), (192, 1, 1)),
    )


def _fork(name: str, x: Array) -> Array:
    return _join(_conv(f"{name}a", x, (384, 1, 3)), _conv(f"{name}b", x, (384, 3, 1)))


def resize(x: Array) -> Array:
    """Resize [B, H, W, C] to [B, 299, 299, C] bilinearly, by TensorFlow's first rule.

    Pixel i is taken at i * H/299, from the corners and not from the middles of pixels, without
    smoothing where it shrinks.
    """
    for axis in (1, 2):
        size = x.shape[axis]
        at = np.arange(SIZE, dtype=np.float32) * np.float32(size / SIZE)
        low = at.astype(np.int32)
        share = (at - low).reshape(-1, *(1,) * (3 - axis))
        below, above = (jnp.take(x, i, axis) for i in (low, np.minimum(low + 1, size - 1)))
        x = below + (above - below) * share
    return x


# ------------------------------------------------------------------------------- parameters


@functools.cache
def shapes() -> Any:
    """The shapes of the parameters, without computing any."""
    return jax.eval_shape(Inception().init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]


def from_tensors(tensors: Mapping[str, Any]) -> Any:
    """Convert PyTorch's tensors to parameters.

    The tensors are NAME.conv.weight [O, I, H, W], NAME.bn.weight, .bias, .running_mean and
    .running_var [O] of every convolution, and fc.weight [1008, 2048]; others are ignored. A batch
    norm becomes a factor s = weight/sqrt(var + 0.001) of the kernel, and a bias - mean*s.

    Raises: ValueError, naming the tensor, for one that is missing or has another shape.
    """
    params = {}
    for name, leaves in shapes().items():
        *size, inside, outside = leaves["kernel"].shape
        if name == "fc":
            params[name] = {"kernel": _tensor(tensors, "fc.weight", (outside, inside)).T}
            continue
        norm = {each: _tensor(tensors, f"{name}.bn.{each}", (outside,)) for each in NORM}
        factor = norm["weight"] / np.sqrt(norm["running_var"] + EPSILON)
        kernel = _tensor(tensors, f"{name}.conv.weight", (outside, inside, *size))
        params[name] = {
            "kernel": kernel.transpose(2, 3, 1, 0) * factor,
            "bias": norm["bias"] - norm["running_mean"] * factor,
        }
    return jax.tree.map(lambda leaf: leaf.astype(np.float32), params)


def _tensor(tensors: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> np.ndarray:
    advice = "use the weights of the Inception-v3 of 2015"
    if name not in tensors:
        raise ValueError(f"tensor {name} is missing: {advice}")
    tensor = np.asarray(tensors[name], np.float64)
    if tensor.shape != shape:
        raise ValueError(
            f"tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}: {advice}"
        )
    return tensor
