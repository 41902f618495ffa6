"""Published tensors and parameters, both ways.

PyTorch has kernels as [out, in, height, width] and [out, in], Flax as [height, width, in, out] and
[in, out]; what is one parameter here may be several tensors there.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

Keys = tuple[str, ...]  # of a parameter, as ("down_0_0", "conv_1", "kernel")


class Stored(NamedTuple):
    """How a parameter is stored: the names of its tensors, and both conversions."""

    names: list[str]
    unpack: Callable[[np.ndarray], Sequence[np.ndarray]]  # a parameter -> its tensors
    pack: Callable[[Sequence[np.ndarray]], np.ndarray]  # its tensors -> the parameter


Layout = Callable[[Keys], Stored]


def to_tensors(params: Any, layout: Layout) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of parameters, float32, with their names."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        stored = layout(_keys(path))
        tensors = stored.unpack(np.asarray(leaf, np.float32))
        yield from zip(stored.names, tensors, strict=True)


def from_tensors(
    tensors: dict[str, np.ndarray],
    like: Any,
    layout: Layout,
    order: Sequence[str],
    file: Path,
    source: str = "its config.json",
) -> Any:
    """The parameters, of the structure of `like`, of all the tensors of a file.

    order: the beginnings of names in the order of the network, so that the first layer that differs
    is named. source: of the sizes of `like`, for messages. A linear layer may be stored as a
    convolution of 1x1, or the other way round.

    Raises: ValueError, naming the file and the layer, for one that is missing, of another shape, or
    not of the network.
    """

    def place(layer: tuple[str, Any]) -> int:
        return next(i for i, start in enumerate(order) if layer[0].startswith(start))

    # Views of one number: they take no memory.
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), like)
    shapes = {name: value.shape for name, value in to_tensors(zeros, layout)}
    _check_layers(tensors, dict(sorted(shapes.items(), key=place)), file, source)

    def assemble(path: Any, leaf: Any) -> Array:
        stored = layout(_keys(path))
        found = [np.asarray(tensors[name], np.float32) for name in stored.names]
        parts = [part.reshape(shapes[name]) for name, part in zip(stored.names, found, strict=True)]
        return jax.numpy.asarray(stored.pack(parts), leaf.dtype)

    return jax.tree_util.tree_map_with_path(assemble, like)


def _keys(path: Any) -> Keys:
    return tuple(part.key for part in path)


def _check_layers(
    tensors: dict[str, np.ndarray], expected: dict[str, tuple[int, ...]], file: Path, source: str
) -> None:
    for name, shape in expected.items():
        if name not in tensors:
            raise ValueError(f"{file} has no layer {name}: {source} describes one of shape {shape}")
        if _without_ones(tensors[name].shape) != _without_ones(shape):
            raise ValueError(
                f"{file} has the layer {name} of shape {tensors[name].shape}: {source} describes"
                f" {shape}"
            )
    for name in tensors:
        if name not in expected:
            raise ValueError(f"{file} has the layer {name}: {source} describes none")


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if shape[2:] == (1, 1) else shape


# ------------------------------------------------------------------------------- kernels


def linear(names: list[str], leaf: str) -> Stored:
    """A linear layer of [in, out], stored in parts of its outputs, [out, in] each."""
    count = len(names)
    if leaf != "kernel":
        return Stored(names, lambda value: np.split(value, count, -1), np.concatenate)
    return Stored(
        names,
        lambda value: [part.T for part in np.split(value, count, -1)],
        lambda parts: np.concatenate([part.T for part in parts], -1),
    )


def convolution(name: str) -> Stored:
    """A kernel of [height, width, in, out], stored as [out, in, height, width]."""
    return Stored(
        [name],
        lambda value: [value.transpose(3, 2, 0, 1)],
        lambda parts: parts[0].transpose(2, 3, 1, 0),
    )


def pointwise(name: str) -> Stored:
    """A linear layer of [in, out], stored as a convolution, [out, in, 1, 1]."""
    return Stored(
        [name],
        lambda value: [value.T[:, :, None, None]],
        lambda parts: parts[0][:, :, 0, 0].T,
    )


# ------------------------------------------------------------------------------- names

LAYERS = {
    "in": "conv_in",
    "time_in": "time_embedding.linear_1",
    "time_out": "time_embedding.linear_2",
    "label": "class_embedding",
    "norm_out": "conv_norm_out",
    "out": "conv_out",
    "middle_0": "mid_block.resnets.0",
    "middle_1": "mid_block.resnets.1",
    "middle_attention": "mid_block.attentions.0",
}
PARTS = {
    "norm_1": "norm1",
    "conv_1": "conv1",
    "condition": "time_emb_proj",
    "norm_2": "norm2",
    "conv_2": "conv2",
    "shortcut": "conv_shortcut",
    "norm": "group_norm",
    "out": "to_out.0",
}
# The names of attention layers before 2023.
OLD = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def convolutional(path: Keys, levels: int) -> Stored:
    """The tensors of a parameter of a UNet or an autoencoder in diffusers.

    ("up_1_0_attention", "qkv", "kernel") of 2 levels is up_blocks.0.attentions.0.to_q.weight,
    ...to_k.weight and ...to_v.weight.
    """
    layer, *parts, leaf = path
    name = LAYERS.get(layer)
    if name is None:
        way, level, what, *attention = layer.split("_")
        block = f"{way}_blocks.{levels - 1 - int(level) if way == 'up' else level}"
        if what == "resample":
            name = f"{block}.{way}samplers.0" + ("" if parts else ".conv")
        else:
            name = f"{block}.{'attentions' if attention else 'resnets'}.{what}"
    kind = "bias" if leaf == "bias" else "weight"
    if parts == ["qkv"]:
        return linear([f"{name}.to_{letter}.{kind}" for letter in "qkv"], leaf)
    full = ".".join([name, *(PARTS[part] for part in parts), kind])
    if leaf == "kernel" and parts == ["shortcut"]:
        return pointwise(full)
    is_linear = layer.startswith("time_") or parts in (["condition"], ["out"])
    return convolution(full) if leaf == "kernel" and not is_linear else linear([full], leaf)


def with_new_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors under today's names of attention layers."""
    for before, now in OLD.items():
        tensors = {name.replace(before, now): value for name, value in tensors.items()}
    return tensors
