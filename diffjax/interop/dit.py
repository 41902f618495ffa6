"""DiT of diffusers, and of Meta's .pt files, which are SiT's too.

The two differ in what the network computes: diffusers divides the exponents of the frequencies of
the time by half - 1 where Meta divides by half, and adds 1e-5 to the variance of the norms before
MLPs where Meta adds 1e-6. Each is read as its own.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.build import ModelInfo
from diffjax.interop.files import Weights
from diffjax.interop.layers import Keys, Stored, from_tensors, linear, to_tensors
from diffjax.interop.published import Fields, Part, Published
from diffjax.nn.conditioning import ClassLabel
from diffjax.nn.dit import SIZES, DiTConfig, positions
from diffjax.nn.registry import abstract_params

CLASS, OLD_CLASS = "DiTTransformer2DModel", "Transformer2DModel"
NULL_ROW = 1000  # the null label of DiTPipeline, whatever the number of classes
EPSILON, MLP_EPSILON = 1e-6, 1e-5  # of diffusers' norms; only that of MLPs is a field
DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "upcast_attention": False,  # of the softmax, which is in float32 here
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": MLP_EPSILON,
}
# The only values of these fields that the DiT has.
ALLOWED = {
    "attention_bias": (True,),
    "activation_fn": ("gelu-approximate",),
    "norm_type": ("ada_norm_zero",),
    "norm_elementwise_affine": (False,),
}

# ------------------------------------------------------------------------------- diffusers

FIRST = "transformer_blocks.0.norm1.emb."  # the embedders that the network takes, of its copies
COPY = re.compile(r"(transformer_blocks\.\d+\.norm1\.emb\.)(.+)")
ORDER = ("pos_embed", FIRST, "transformer_blocks", "proj_out_1", "proj_out_2")
NAMES = {
    "patch": "pos_embed.proj",
    "time_in": f"{FIRST}timestep_embedder.linear_1",
    "time_out": f"{FIRST}timestep_embedder.linear_2",
    "label": f"{FIRST}class_embedder.embedding_table",
    "modulation": "proj_out_1",
    "out": "proj_out_2",
}
BLOCK = {
    "modulation": ["norm1.linear"],
    "qkv": ["attn1.to_q", "attn1.to_k", "attn1.to_v"],
    "out": ["attn1.to_out.0"],
    "mlp_in": ["ff.net.0.proj"],
    "mlp_out": ["ff.net.2"],
}


def read(given: dict[str, Any], weights: Weights, path: Path) -> Published:
    """The network of a config.json at a path, and of the weights beside it.

    The last row of the class table is the null label.

    Raises: ValueError, naming the field or the first layer, for a network that the DiT cannot be.
    """
    of_old_class = {"norm_type": "layer_norm"} if given.get("_class_name") == OLD_CLASS else {}
    c = Fields(given, DEFAULTS | of_old_class, path)
    _check_fields(c)
    size, channels = c["sample_size"], c["in_channels"]
    network = DiTConfig(
        width=c["num_attention_heads"] * c["attention_head_dim"],
        depth=c["num_layers"],
        heads=c["num_attention_heads"],
        patch=c["patch_size"],
        norm_epsilon=EPSILON,
        mlp_norm_epsilon=c["norm_eps"],
        frequency_shift=1.0,
        learned_variance=c["out_channels"] == 2 * channels,
        dropout=c["dropout"],
    )
    kept = _without_copies(weights)
    tensors, classes = _without_padding(kept, weights, c["num_embeds_ada_norm"])
    stored = partial(_stored, depth=network.depth, channels=channels)
    shape, label = (size, size, channels), ClassLabel(classes)
    like = abstract_params(network.build(shape, label), shape, label)
    params = from_tensors(tensors, like, stored, ORDER, weights.file)
    note = "the time is embedded with diffusers' frequencies, which are not those of Meta's files"
    return Published(network, shape, label, params, (note,))


def write(info: ModelInfo, params: Any, *, for_pipeline: bool = False) -> Part:
    """The network as diffusers stores it.

    for_pipeline: the class table gets as many rows as put the null label where DiTPipeline takes
    it, at 1000; rows without a class are the null label too.

    Raises: ValueError for a network that diffusers does not have.
    """
    network, label = info.config.network, info.conditioning
    if not isinstance(network, DiTConfig):
        raise ValueError(f"network is {type(network).__name__}: {CLASS} takes a DiTConfig")
    is_label = isinstance(label, ClassLabel) and label.field == "label" and label.has_null_label
    if not isinstance(label, ClassLabel) or not is_label or _takes_a_scale(info):
        raise ValueError(
            f"conditioning is {label!r}: {CLASS} takes a ClassLabel of the field 'label', with a"
            " null label and without a guidance scale"
        )
    _check_network(network, info.x_shape)
    if for_pipeline and label.classes > NULL_ROW:
        raise ValueError(
            f"conditioning has {label.classes} classes: DiTPipeline of diffusers has {NULL_ROW} at"
            " most"
        )
    rows = NULL_ROW if for_pipeline else label.classes
    stored = partial(_stored, depth=network.depth, channels=info.x_shape[-1])
    tensors = dict(to_tensors(params, stored))
    table = tensors[NAMES["label"] + ".weight"]
    nulls = np.repeat(table[-1:], rows - label.classes, axis=0)
    tensors[NAMES["label"] + ".weight"] = np.concatenate([table[:-1], nulls, table[-1:]])
    for name in [name for name in tensors if name.startswith(FIRST)]:
        for i in range(1, network.depth):
            tensors[name.replace(".0.", f".{i}.", 1)] = tensors[name]
    return Part(_settings(network, info.x_shape, rows), tensors, {"classes": str(label.classes)})


def _takes_a_scale(info: ModelInfo) -> bool:
    return info.config.distillation.guidance_conditioned


def _settings(network: DiTConfig, x_shape: tuple[int, ...], rows: int) -> dict[str, Any]:
    channels = x_shape[-1]
    return {
        "_class_name": CLASS,
        "num_attention_heads": network.heads,
        "attention_head_dim": network.width // network.heads,
        "in_channels": channels,
        "out_channels": channels * (2 if network.learned_variance else 1),
        "num_layers": network.depth,
        "dropout": network.dropout,
        "attention_bias": True,
        "sample_size": x_shape[0],
        "patch_size": network.patch,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": rows,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": network.mlp_norm_epsilon,
    }


def _check_fields(c: Fields) -> None:
    c.check_values(ALLOWED, "DiT")
    c.check_known("DiT")
    width = c["num_attention_heads"] * c["attention_head_dim"]
    if width % 4:
        c.refuse("attention_head_dim", f"use a width of a multiple of 4, and not {width}")
    if not c["num_embeds_ada_norm"]:
        c.refuse("num_embeds_ada_norm", "use the number of classes")
    if not isinstance(c["sample_size"], int) or c["sample_size"] % c["patch_size"]:
        c.refuse("sample_size", f"use a multiple of patch_size, {c['patch_size']}")
    channels = c["in_channels"]
    if c["out_channels"] not in (None, channels, 2 * channels):
        c.refuse("out_channels", "the DiT here has in_channels, or twice as many with a variance")


def _check_network(network: DiTConfig, x_shape: tuple[int, ...]) -> None:
    fields = {
        "frequency_shift": (network.frequency_shift, 1.0),
        "norm_epsilon": (network.norm_epsilon, EPSILON),
        "mlp_ratio": (network.mlp_ratio, 4),
    }
    for name, (value, theirs) in fields.items():
        if value != theirs:
            raise ValueError(f"network.{name} is {value}: {CLASS} of diffusers has {theirs}")
    if x_shape[0] != x_shape[1]:
        raise ValueError(f"x is of {x_shape[0]}x{x_shape[1]}: {CLASS} of diffusers takes squares")


def _without_copies(weights: Weights) -> dict[str, np.ndarray]:
    """The tensors without the copies of the first block's embedders in other blocks."""
    kept = {}
    for name, value in weights.tensors.items():
        match = COPY.fullmatch(name)
        if match is None or match[1] == FIRST:
            kept[name] = value
        elif not np.array_equal(value, weights.tensors.get(FIRST + match[2], np.zeros(0))):
            raise ValueError(
                f"{weights.file} has the layer {name}, which is not equal to that of the first"
                " block: the DiT here has one embedding for all blocks"
            )
    return kept


def _without_padding(
    tensors: dict[str, np.ndarray], weights: Weights, rows: int
) -> tuple[dict[str, np.ndarray], int]:
    """The tensors with a row per class and the null label, and the number of classes."""
    name, classes = NAMES["label"] + ".weight", int(weights.metadata.get("classes", rows))
    table = tensors.get(name)
    if table is None or len(table) != rows + 1 or classes >= rows:
        return tensors, rows
    return tensors | {name: np.concatenate([table[:classes], table[-1:]])}, classes


# ------------------------------------------------------------------------------- Meta's files

SIZES_OF_META = "the shape of other layers"
META_ORDER = ("x_embedder", "t_embedder", "y_embedder", "blocks", "final_layer")
META = {
    "patch": "x_embedder.proj",
    "time_in": "t_embedder.mlp.0",
    "time_out": "t_embedder.mlp.2",
    "label": "y_embedder.embedding_table",
    "modulation": "final_layer.adaLN_modulation.1",
    "out": "final_layer.linear",
}
META_BLOCK = {
    "modulation": ["adaLN_modulation.1"],
    "qkv": ["attn.qkv"],  # rows of q, then of k and v
    "out": ["attn.proj"],
    "mlp_in": ["mlp.fc1"],
    "mlp_out": ["mlp.fc2"],
}


def read_meta(weights: Weights) -> Published:
    """The network of the tensors of a .pt file of DiT or SiT, whose sizes are theirs.

    The number of heads is no tensor's size: width and depth are those of a size of the paper.

    Raises: ValueError, naming the layer, for a network that is none of these.
    """
    tensors, file = dict(weights.tensors), weights.file
    kernel, table = (_tensor(tensors, META[name], file) for name in ("patch", "label"))
    final = _tensor(tensors, META["out"], file)
    if kernel.ndim != 4 or table.ndim != 2 or final.ndim != 2 or "pos_embed" not in tensors:
        raise ValueError(f"{file} has no pos_embed, or layers of other dimensions than DiT has")
    width, channels, patch, _ = kernel.shape
    side = _grid(tensors.pop("pos_embed"), width, file) * patch
    depth = 1 + max([-1, *(int(m[1]) for n in tensors if (m := re.match(r"blocks\.(\d+)\.", n)))])
    heads = _heads(width, depth, file)
    network = DiTConfig(
        width=width,
        depth=depth,
        heads=heads,
        patch=patch,
        learned_variance=len(final) == 2 * channels * patch**2,
    )
    shape, label = (side, side, channels), ClassLabel(len(table) - 1)
    like = abstract_params(network.build(shape, label), shape, label)
    stored = partial(
        _stored, depth=depth, channels=channels, names=META, block=("blocks", META_BLOCK)
    )
    params = from_tensors(tensors, like, stored, META_ORDER, file, SIZES_OF_META)
    return Published(network, shape, label, params)


def is_meta(tensors: dict[str, np.ndarray]) -> bool:
    """Return whether tensors have the names of Meta's files."""
    return META["patch"] + ".weight" in tensors


def _tensor(tensors: dict[str, np.ndarray], name: str, file: Path) -> np.ndarray:
    if f"{name}.weight" not in tensors:
        raise ValueError(f"{file} has no layer {name}.weight, which files of DiT and SiT have")
    return tensors[f"{name}.weight"]


def _grid(found: np.ndarray, width: int, file: Path) -> int:
    side = round(max(found.size // width, 1) ** 0.5)
    expected = positions(side, side, width) if width % 4 == 0 else np.zeros(0)
    if found.size != expected.size or not np.allclose(
        np.asarray(found, np.float32).reshape(expected.shape), expected, atol=1e-5
    ):
        raise ValueError(
            f"{file} has the layer pos_embed of shape {found.shape} with other values than those"
            " of the sines and cosines of a square grid"
        )
    return side


def _heads(width: int, depth: int, file: Path) -> int:
    for size in SIZES.values():
        if (size["width"], size["depth"]) == (width, depth):
            return size["heads"]
    known = ", ".join(f"{s['width']} and {s['depth']} ({name})" for name, s in SIZES.items())
    raise ValueError(
        f"{file} has {depth} blocks of width {width}, which do not tell the number of heads: width"
        f" and depth of the paper are {known}"
    )


# ------------------------------------------------------------------------------- layers


def _stored(
    keys: Keys,
    depth: int,
    channels: int,
    names: dict[str, str] = NAMES,
    block: tuple[str, dict[str, list[str]]] = ("transformer_blocks", BLOCK),
) -> Stored:
    """The tensors of a parameter: those of blocks are stacked, [depth, ...]."""
    layer, *_, leaf = keys
    kind = "bias" if leaf == "bias" else "weight"
    if layer == "blocks":
        prefix, parts = block
        of_each = [f"{part}.{kind}" for part in parts[keys[1]]]
        one = linear(of_each, leaf)
        full = [f"{prefix}.{i}.{name}" for i in range(depth) for name in of_each]
        return Stored(full, partial(_unstack, one.unpack), partial(_stack, one.pack, len(of_each)))
    name = f"{names[layer]}.{kind}"
    if layer == "patch" and leaf == "kernel":
        return _patches(name, channels)
    return linear([name], leaf)


def _unstack(unpack: Callable[..., Any], value: np.ndarray) -> list[np.ndarray]:
    return [part for each in value for part in unpack(each)]


def _stack(pack: Callable[..., Any], count: int, parts: Any) -> np.ndarray:
    return np.stack([pack(parts[i : i + count]) for i in range(0, len(parts), count)])


def _patches(name: str, channels: int) -> Stored:
    """A linear layer of patches [p*p*C, D], stored as a convolution [D, C, p, p]."""

    def unpack(value: np.ndarray) -> list[np.ndarray]:
        side = round((len(value) // channels) ** 0.5)
        return [value.reshape(side, side, channels, -1).transpose(3, 2, 0, 1)]

    def pack(parts: Any) -> np.ndarray:
        width = len(parts[0])
        return parts[0].transpose(2, 3, 1, 0).reshape(-1, width)

    return Stored([name], unpack, pack)
