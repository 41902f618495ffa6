"""UNet2DModel folders of diffusers, read and written without torch or pickle.

A folder has config.json, safetensors and scheduler_config.json: all in one place, or in the folders
unet/ and scheduler/ of a pipeline, which may have a model_index.json.
"""

import dataclasses
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from safetensors.numpy import save_file

from diffjax.build import ModelInfo, abstract_params, build_module
from diffjax.config import (
    IMPORTED_PREFIX,
    Config,
    Data,
    Distillation,
    Train,
    dataclass_from_dict,
)
from diffjax.interop.files import Weights, read_json, read_weights
from diffjax.interop.schedulers import read_diffusion, scheduler_config, scheduler_notes
from diffjax.nn.conditioning import UNCONDITIONAL, ClassLabel, Conditioning
from diffjax.nn.unet import UNetConfig

PREFIX = IMPORTED_PREFIX
WEIGHTS = "diffusion_pytorch_model"
# The values of fields that a config.json leaves out.
DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "mid_block_type": "UNetMidBlock2D",
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "sample_size": None,
}
# The only values of these fields that the UNet has.
ALLOWED = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (0, 1),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None,),
    "downsample_type": ("conv", "resnet", None),
    "upsample_type": ("conv", "resnet", None),
}
# The parts of a pipeline whose network makes latents.
AUTOENCODERS = ("vae", "vqvae", "vq_model", "vqgan", "movq", "autoencoder")


class Imported(NamedTuple):
    """A network that was read from such a folder."""

    info: ModelInfo
    params: Any
    weights: str  # "ema" or "raw", or "unknown" where the source does not record it
    step: int
    notes: tuple[str, ...]  # sentences on what was found, chosen or left out


def is_source(name: str | Path) -> bool:
    """Return whether a model is named as hf:FOLDER or hf:OWNER/NAME."""
    return str(name).startswith(PREFIX)


def locate(source: str | Path) -> Path:
    """The folder of hf:FOLDER, or of hf:OWNER/NAME after a download from the hub.

    Raises: ValueError if there is none.
    """
    name = str(source).removeprefix(PREFIX)
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(
            f"folder {name} does not exist: use one with a config.json, or a repository of the hub,"
            f" {PREFIX}OWNER/NAME"
        )
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        raise ValueError(
            f"folder {name} does not exist, and a download from the hub needs: pip install"
            " 'diffjax[hub]'"
        ) from None
    try:
        return Path(hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # of several libraries
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{name} is no folder, and cannot be downloaded from the hub ({reason})"
        ) from error


def load(folder: Path) -> Imported:
    """Read a folder.

    Raises: ValueError, naming the field or the first layer, for a network that the UNet cannot be;
    OSError for files that cannot be read.
    """
    home = folder / "unet" if (folder / "unet" / "config.json").exists() else folder
    _check_pixels(folder, home)
    given = read_json(home / "config.json")
    weights = read_weights(home, WEIGHTS)
    null_label = weights.metadata.get("null_label") == "true"
    network, x_shape, conditioning = _network(given, null_label, home / "config.json")
    if isinstance(conditioning, ClassLabel):
        names = tuple(json.loads(weights.metadata.get("names", "[]")))
        conditioning = dataclasses.replace(conditioning, names=names)
    path = _scheduler_path(folder, home)
    scheduler = read_json(path)
    conditions = ("label",) if isinstance(conditioning, ClassLabel) else ()
    distillation = json.loads(weights.metadata.get("distillation", "{}"))
    kind = _kind_of_weights(given, weights, home)
    config = Config(
        data=Data(name=f"{PREFIX}{folder.resolve().name}", conditions=conditions),
        network=network,
        diffusion=read_diffusion(scheduler, path),
        train=Train(condition_dropout=0.1 if null_label else 0.0),
        distillation=dataclass_from_dict(Distillation, distillation),
    )
    info = ModelInfo(config, x_shape, conditioning, imported=kind)
    like = abstract_params(info, build_module(info))
    tensors = _with_new_names(weights.tensors)
    params = _from_diffusers(tensors, like, len(network.multipliers), weights.file)
    notes = *_notes(network, conditioning, kind, weights), *scheduler_notes(scheduler)
    return Imported(info, params, kind, int(weights.metadata.get("step", 0)), notes)


def save(folder: Path, info: ModelInfo, params: Any, weights: str, step: int) -> None:
    """Write a folder that diffusers and `load` read.

    `UNet2DModel.from_pretrained(folder)` and `DDPMScheduler.from_pretrained(folder)` load it. The
    last row of the class table is the null label, if there is one.

    Raises: ValueError for a network that diffusers does not have.
    """
    network = info.config.network
    if not isinstance(network, UNetConfig):
        raise ValueError(f"network is {type(network).__name__}: UNet2DModel takes a UNetConfig")
    label = info.conditioning
    if label != UNCONDITIONAL and not (isinstance(label, ClassLabel) and label.field == "label"):
        raise ValueError(
            f"conditioning is {label!r}: UNet2DModel takes a ClassLabel of the field 'label', or"
            " none"
        )
    settings = _settings(info, network)
    scheduler = scheduler_config(info.config)
    tensors = {
        name: np.ascontiguousarray(value)
        for name, value in _to_diffusers(params, len(network.multipliers))
    }
    null_label = label.has_null_label if isinstance(label, ClassLabel) else True
    names = label.names if isinstance(label, ClassLabel) else ()
    metadata = {
        "format": "pt",
        "weights": weights,
        "step": str(step),
        "null_label": str(null_label).lower(),
        "names": json.dumps(names),
        "distillation": json.dumps(dataclasses.asdict(info.config.distillation)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"{WEIGHTS}.safetensors", metadata=metadata)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")


# ----------------------------------------------------------------- files


def _check_pixels(folder: Path, home: Path) -> None:
    """Check that a folder is not of a pipeline with an autoencoder.

    Raises: ValueError, naming its part.
    """
    for place in dict.fromkeys((folder, home.parent if home.name.startswith("unet") else folder)):
        index = place / "model_index.json"
        parts = read_json(index) if index.exists() else {}
        found = [
            name
            for name in AUTOENCODERS
            if any(parts.get(name) or ()) or (place / name / "config.json").exists()
        ]
        if found:
            raise ValueError(
                f"{place} is a pipeline with the part {found[0]}: its UNet makes latents, and only"
                " networks of pixels can be read"
            )


def _scheduler_path(folder: Path, home: Path) -> Path:
    paths = [
        place / "scheduler_config.json"
        for place in (folder / "scheduler", folder, home.parent / "scheduler")
    ]
    return next((path for path in paths if path.exists()), folder / "scheduler_config.json")


def _with_new_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    # The names of attention layers before 2023.
    old = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
    for before, now in old.items():
        tensors = {name.replace(before, now): value for name, value in tensors.items()}
    return tensors


def _kind_of_weights(given: dict[str, Any], weights: Weights, home: Path) -> str:
    if weights.metadata.get("weights") in ("ema", "raw"):
        return weights.metadata["weights"]
    variant = weights.variant.split(".")
    if "non_ema" in variant:
        return "raw"
    # The fields that diffusers' EMAModel writes.
    averaged = {"optimization_step", "use_ema_warmup", "inv_gamma"} <= set(given)
    return "ema" if averaged or home.name == "unet_ema" or "ema" in variant else "unknown"


def _notes(
    network: UNetConfig, conditioning: Conditioning, kind: str, weights: Weights
) -> Iterator[str]:
    yield {
        "ema": "the weights are a moving average",
        "raw": "the weights are as trained, not their moving average",
        "unknown": "the source does not record whether the weights are a moving average",
    }[kind]
    if weights.variant:
        yield f"the weights are of the variant {weights.variant}, in {weights.file.name}"
    if network.learned_variance:
        yield "the learned variance is dropped: plans use a fixed one"
    if isinstance(conditioning, ClassLabel) and not conditioning.has_null_label:
        yield (
            f"all {conditioning.classes} rows of the class table are taken for labels: without a"
            " null label the network cannot be guided"
        )


# ----------------------------------------------------------------- config.json

Shape = tuple[int, int, int]


class _Fields:
    """The fields of a config.json, with diffusers' defaults."""

    def __init__(self, given: dict[str, Any], path: Path) -> None:
        self._values, self._path = DEFAULTS | given, path

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def refuse(self, name: str, expected: str) -> None:
        raise ValueError(f"{self._path} has {name} {self[name]!r}: {expected}")


def _network(
    given: dict[str, Any], null_label: bool, path: Path
) -> tuple[UNetConfig, Shape, Conditioning]:
    kind = given.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise ValueError(f"{path} describes a {kind}: only UNet2DModel can be read")
    c = _Fields(given, path)
    _check_fields(c)
    attends, resampled = _blocks(c)
    groups = c["attn_norm_num_groups"]
    if groups is None and c["resnet_time_scale_shift"] == "default":
        groups = c["norm_num_groups"]
    if groups not in (None, c["norm_num_groups"]):
        c.refuse("attn_norm_num_groups", "the UNet here has as many groups in every norm")
    widths, (height, width) = c["block_out_channels"], _sides(c)
    head = c["attention_head_dim"]
    attending = [w for w, attend in zip(widths, attends, strict=True) if attend]
    attending += widths[-1:] if c["add_attention"] else []
    if head is not None and any(w % head for w in attending):
        c.refuse("attention_head_dim", f"use a divisor of every width with attention, {attending}")
    network = UNetConfig(
        channels=widths[0],
        multipliers=tuple(w // widths[0] for w in widths),
        blocks=c["layers_per_block"],
        attention=tuple(height // 2**i for i, attending in enumerate(attends) if attending),
        middle_attention=c["add_attention"],
        middle_attention_norm=groups is not None,
        heads=1,
        head_width=head,
        scale_shift=c["resnet_time_scale_shift"] == "scale_shift",
        resample_blocks=resampled == "resnet",
        symmetric_padding=c["downsample_padding"] == 1,
        norm_groups=c["norm_num_groups"],
        norm_epsilon=c["norm_eps"],
        sin_first=not c["flip_sin_to_cos"],
        frequency_shift=c["freq_shift"],
        learned_variance=c["out_channels"] != c["in_channels"],
        dropout=c["dropout"],
    )
    rows = c["num_class_embeds"] or 0
    label = ClassLabel(rows - null_label, has_null_label=null_label) if rows else UNCONDITIONAL
    return network, (height, width, c["in_channels"]), label


def _check_fields(c: _Fields) -> None:
    for name, values in ALLOWED.items():
        if c[name] not in values:
            c.refuse(name, f"the UNet here has {' or '.join(map(repr, values))}")
    widths = c["block_out_channels"]
    groups, halvings = c["norm_num_groups"], len(widths) - 1
    if not groups or any(width % groups for width in widths):
        c.refuse("norm_num_groups", f"use a divisor of every width, {widths}")
    if c["sample_size"] is None:
        c.refuse("sample_size", "write the size of the images there")
    if any(side % 2**halvings for side in _sides(c)):
        c.refuse("sample_size", f"the UNet here halves it {halvings} times")
    if c["time_embedding_dim"] not in (None, 4 * widths[0]):
        c.refuse("time_embedding_dim", "the UNet here has four times the first width")
    if any(width % widths[0] for width in widths):
        c.refuse("block_out_channels", "the UNet here has multiples of the first width")
    if c["out_channels"] not in (c["in_channels"], 2 * c["in_channels"]):
        c.refuse("out_channels", "the UNet here has in_channels, or twice as many with a variance")


def _sides(c: _Fields) -> tuple[int, int]:
    size = c["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _blocks(c: _Fields) -> tuple[list[bool], str]:
    # Which resolutions attend, and how resolutions change: the same on both ways.
    attends: dict[str, list[bool]] = {}
    changes = set()
    for name, way, kind in (
        ("down_block_types", "Down", c["downsample_type"]),
        ("up_block_types", "Up", c["upsample_type"]),
    ):
        known = {
            f"{way}Block2D": (False, "conv"),
            f"Attn{way}Block2D": (True, kind or "conv"),
            f"Resnet{way}sampleBlock2D": (False, "resnet"),
        }
        types = [block.removeprefix("UNetRes") for block in c[name]]
        if len(types) != len(c["block_out_channels"]) or not set(types) <= set(known):
            c.refuse(name, f"use one of {', '.join(known)} for each of block_out_channels")
        attends[way] = [known[block][0] for block in types]
        changes |= {known[block][1] for block in types[:-1]}  # the last one has no change after it
    if attends["Up"] != attends["Down"][::-1]:
        c.refuse("up_block_types", "the UNet here attends at the same resolutions on both ways")
    if len(changes) > 1:
        c.refuse(
            "down_block_types",
            "the UNet here changes all resolutions alike, by convolutions or by resnets",
        )
    return attends["Down"], next(iter(changes), "conv")


def _settings(info: ModelInfo, n: UNetConfig) -> dict[str, Any]:
    height, width, channels = info.x_shape
    if info.config.distillation.guidance_conditioned:
        raise ValueError(
            "conditioning is on a guidance scale, and diffusers has no UNet2DModel with one"
        )
    if n.norm_groups is None:
        raise ValueError(
            "network.norm_groups is None, for groups of four channels: diffusers has as many groups"
            " in every norm, so train with a number to write the network for diffusers"
        )
    if not n.scale_shift and not n.middle_attention_norm:
        raise ValueError(
            "network.middle_attention_norm is False and network.scale_shift too: diffusers then"
            " always has a norm before the attention in the middle"
        )
    resnets = n.resample_blocks and len(n.multipliers) > 1  # one resolution never changes
    change = "resnet" if resnets else "conv"
    label = info.conditioning
    return {
        "_class_name": "UNet2DModel",
        "sample_size": height if height == width else [height, width],
        "in_channels": channels,
        "out_channels": channels * (2 if n.learned_variance else 1),
        "freq_shift": n.frequency_shift,
        "flip_sin_to_cos": not n.sin_first,
        "down_block_types": _block_types(n, height, "Down", resnets),
        "up_block_types": _block_types(n, height, "Up", resnets)[::-1],
        "block_out_channels": [n.channels * m for m in n.multipliers],
        "layers_per_block": n.blocks,
        "downsample_padding": int(n.symmetric_padding),
        "downsample_type": change,
        "upsample_type": change,
        "dropout": n.dropout,
        "norm_num_groups": n.norm_groups,
        "attention_head_dim": _head_width(n, height),
        "attn_norm_num_groups": (
            n.norm_groups if n.scale_shift and n.middle_attention_norm else None
        ),
        "norm_eps": n.norm_epsilon,
        "add_attention": n.middle_attention,
        "resnet_time_scale_shift": "scale_shift" if n.scale_shift else "default",
        "num_class_embeds": (
            label.classes + label.has_null_label if isinstance(label, ClassLabel) else None
        ),
    }


def _block_types(n: UNetConfig, height: int, way: str, resnets: bool) -> list[str]:
    plain = f"Resnet{way}sampleBlock2D" if resnets else f"{way}Block2D"
    sizes = [height // 2**i for i in range(len(n.multipliers))]
    return [f"Attn{way}Block2D" if size in n.attention else plain for size in sizes]


def _head_width(n: UNetConfig, height: int) -> int | None:
    sizes = [height // 2**i for i in range(len(n.multipliers))]
    levels = zip(n.multipliers, sizes, strict=True)
    attending = {n.channels * m for m, size in levels if size in n.attention}
    attending |= {n.channels * n.multipliers[-1]} if n.middle_attention else set()
    widths = {n.head_width or width // n.heads for width in attending}
    if len(widths) > 1 and n.heads > 1:
        raise ValueError(
            f"network.heads is {n.heads}, for heads of the widths {sorted(widths)}: diffusers has"
            " one width, so train with network.head_width to write the network for diffusers"
        )
    return None if n.heads == 1 and not n.head_width else next(iter(widths), None)


# ----------------------------------------------------------------- layers

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

ORDER = ("conv_in", "time_embedding", "class_embedding", "down_blocks", "mid_block", "up_blocks")
ORDER += ("conv_norm_out", "conv_out")


def _diffusers_names(path: tuple[str, ...], levels: int) -> list[str]:
    """The names of a parameter in diffusers, several where it is stored in parts.

    ("up_1_0_attention", "qkv", "kernel") -> ["up_blocks.0.attentions.0.to_q.weight", ...]
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
        return [f"{name}.to_{letter}.{kind}" for letter in "qkv"]
    return [".".join([name, *(PARTS[part] for part in parts), kind])]


def _flat(tree: Any) -> dict[tuple[str, ...], Any]:
    return {
        tuple(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _transposed(path: tuple[str, ...], value: np.ndarray, back: bool) -> np.ndarray:
    # Kernels: ours HWIO and IO, in diffusers OIHW and OI, where a shortcut is a 1x1 convolution.
    if path[-1] != "kernel":
        return value
    shortcut = path[-2] == "shortcut"
    if back:
        value = value.reshape(value.shape[:2]) if shortcut and value.ndim == 4 else value
        return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
    return value[:, :, None, None] if shortcut else value


def _to_diffusers(params: Any, levels: int) -> Iterator[tuple[str, np.ndarray]]:
    for path, leaf in _flat(params).items():
        names = _diffusers_names(path, levels)
        parts = np.split(np.asarray(leaf, np.float32), len(names), axis=-1)
        for name, part in zip(names, parts, strict=True):
            yield name, _transposed(path, part, back=False)


def _from_diffusers(tensors: dict[str, np.ndarray], like: Any, levels: int, file: Path) -> Any:
    _check_layers(tensors, like, levels, file)

    def assemble(path: Any, leaf: Any) -> Array:
        key = tuple(part.key for part in path)
        names = _diffusers_names(key, levels)
        parts = [_transposed(key, tensors[name], back=True) for name in names]
        return jax.numpy.asarray(np.concatenate(parts, axis=-1), leaf.dtype)

    return jax.tree_util.tree_map_with_path(assemble, like)


def _check_layers(tensors: dict[str, np.ndarray], like: Any, levels: int, file: Path) -> None:
    # In the order of the network, so that the first layer that differs is named. The arrays are
    # views of one number.
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), like)
    expected = {name: value.shape for name, value in _to_diffusers(zeros, levels)}
    shapes = dict(sorted(expected.items(), key=lambda layer: ORDER.index(layer[0].split(".")[0])))
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(
                f"{file} has no layer {name}: its config.json describes one of shape {shape}"
            )
        if tensors[name].shape not in (shape, shape[:2] if shape[2:] == (1, 1) else shape):
            raise ValueError(
                f"{file} has the layer {name} of shape {tensors[name].shape}: its config.json"
                f" describes {shape}"
            )
    for name in tensors:
        if name not in shapes:
            raise ValueError(f"{file} has the layer {name}: its config.json describes none")
