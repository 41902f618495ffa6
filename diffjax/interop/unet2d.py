"""UNet2DModel of diffusers, to and from the UNet."""

import json
from pathlib import Path
from typing import Any

from diffjax.build import ModelInfo
from diffjax.interop.files import Weights
from diffjax.interop.layers import convolutional, from_tensors, to_tensors, with_new_names
from diffjax.interop.published import Fields, Part, Published
from diffjax.nn.conditioning import UNCONDITIONAL, ClassLabel, Conditioning
from diffjax.nn.registry import abstract_params
from diffjax.nn.unet import UNetConfig

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
ORDER = ("conv_in", "time_embedding", "class_embedding", "down_blocks", "mid_block", "up_blocks")
ORDER += ("conv_norm_out", "conv_out")
Shape = tuple[int, int, int]


def read(given: dict[str, Any], weights: Weights, path: Path) -> Published:
    """The network of a config.json at a path, and of the weights beside it.

    The last row of the class table is taken for the null label where the file says so.

    Raises: ValueError, naming the field or the first layer, for a network that the UNet cannot be.
    """
    null_label = weights.metadata.get("null_label") == "true"
    network, x_shape, conditioning = _network(Fields(given, DEFAULTS, path), null_label)
    like = abstract_params(network.build(x_shape, conditioning), x_shape, conditioning)
    levels, tensors = len(network.multipliers), with_new_names(weights.tensors)
    params = from_tensors(
        tensors, like, lambda keys: convolutional(keys, levels), ORDER, weights.file
    )
    return Published(network, x_shape, conditioning, params)


def write(info: ModelInfo, params: Any) -> Part:
    """The network as diffusers stores it.

    The null label is the last row of the class table.

    Raises: ValueError for a network that diffusers does not have.
    """
    network, label = info.config.network, info.conditioning
    if not isinstance(network, UNetConfig):
        raise ValueError(f"network is {type(network).__name__}: UNet2DModel takes a UNetConfig")
    if label != UNCONDITIONAL and not (isinstance(label, ClassLabel) and label.field == "label"):
        raise ValueError(
            f"conditioning is {label!r}: UNet2DModel takes a ClassLabel of the field 'label', or"
            " none"
        )
    settings, levels = _settings(info, network), len(network.multipliers)
    null_label = label.has_null_label if isinstance(label, ClassLabel) else True
    tensors = dict(to_tensors(params, lambda keys: convolutional(keys, levels)))
    return Part(settings, tensors, {"null_label": json.dumps(null_label)})


# ------------------------------------------------------------------------------- config.json


def _network(c: Fields, null_label: bool) -> tuple[UNetConfig, Shape, Conditioning]:
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


def _check_fields(c: Fields) -> None:
    c.check_values(ALLOWED, "UNet")
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


def _sides(c: Fields) -> tuple[int, int]:
    size = c["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _blocks(c: Fields) -> tuple[list[bool], str]:
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
