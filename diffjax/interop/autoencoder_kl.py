"""AutoencoderKL of diffusers, to and from the autoencoder."""

from pathlib import Path
from typing import Any

import numpy as np

from diffjax.interop.files import WEIGHTS, read_json, read_weights, write_part
from diffjax.interop.layers import (
    Keys,
    Stored,
    convolutional,
    from_tensors,
    linear,
    pointwise,
    to_tensors,
    with_new_names,
)
from diffjax.interop.published import Fields, Published
from diffjax.nn.autoencoder import AutoencoderConfig
from diffjax.nn.conditioning import UNCONDITIONAL
from diffjax.nn.registry import abstract_params

CLASS = "AutoencoderKL"
EPSILON = 1e-6  # of every norm; no field
# The values of fields that a config.json leaves out, as old ones do scaling_factor.
DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,  # it is computed in float32 here
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
# The only values of these fields that the autoencoder has.
ALLOWED = {"act_fn": ("silu", "swish"), "latents_mean": (None,), "latents_std": (None,)}
ORDER = ("encoder", "quant_conv", "post_quant_conv", "decoder")


def load(folder: Path) -> tuple[AutoencoderConfig, Any]:
    """Read the autoencoder of a folder, its configuration and its parameters.

    Raises: ValueError, naming the field or the first layer, for one that cannot be read; OSError
    for files that cannot be read.
    """
    found = read(folder)
    assert isinstance(found.network, AutoencoderConfig)
    return found.network, found.params


def read(folder: Path) -> Published:
    """The autoencoder of a folder; its shape is that of the images of the config.json.

    Raises: as `load`.
    """
    path = folder / "config.json"
    given = read_json(path)
    if given.get("_class_name", CLASS) != CLASS:
        raise ValueError(f"{path} describes a {given['_class_name']}: only {CLASS} can be read")
    c = Fields(given, DEFAULTS, path)
    _check_fields(c)
    config = AutoencoderConfig(
        channels=tuple(c["block_out_channels"]),
        blocks=c["layers_per_block"],
        latent_channels=c["latent_channels"],
        norm_groups=c["norm_num_groups"],
        norm_epsilon=EPSILON,
        middle_attention=c["mid_block_add_attention"],
        quant_conv=c["use_quant_conv"],
        post_quant_conv=c["use_post_quant_conv"],
        scaling=c["scaling_factor"],
        shift=c["shift_factor"] or 0.0,
    )
    size = c["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    # Any multiple of the factor has the same parameters.
    smallest = config.factor, config.factor, c["in_channels"]
    like = abstract_params(config.build(smallest), smallest, UNCONDITIONAL)
    weights = read_weights(folder, WEIGHTS)
    tensors, levels = with_new_names(weights.tensors), len(config.channels)
    params = from_tensors(tensors, like, lambda keys: _stored(keys, levels), ORDER, weights.file)
    return Published(config, (height, width, c["in_channels"]), UNCONDITIONAL, params)


def check(config: AutoencoderConfig) -> None:
    """Check that diffusers has such an autoencoder, as `save` does.

    Raises: ValueError, naming the field.
    """
    if config.norm_epsilon != EPSILON:
        raise ValueError(
            f"network.norm_epsilon is {config.norm_epsilon}: {CLASS} of diffusers has {EPSILON}"
        )


def save(
    folder: Path, config: AutoencoderConfig, params: Any, sample_size: int | None = None
) -> None:
    """Write a folder that `AutoencoderKL.from_pretrained(folder)` and `load` read.

    sample_size: the side of the images that it is made for, in the config.json only.

    Raises: ValueError for an autoencoder that diffusers does not have.
    """
    check(config)
    levels = len(config.channels)
    channels = np.shape(params["decoder"]["out"]["bias"])[0]
    settings = {
        "_class_name": CLASS,
        "in_channels": channels,
        "out_channels": channels,
        "down_block_types": DEFAULTS["down_block_types"] * levels,
        "up_block_types": DEFAULTS["up_block_types"] * levels,
        "block_out_channels": list(config.channels),
        "layers_per_block": config.blocks,
        "act_fn": "silu",
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_groups,
        "scaling_factor": config.scaling,
        "shift_factor": config.shift or None,
        "use_quant_conv": config.quant_conv,
        "use_post_quant_conv": config.post_quant_conv,
        "mid_block_add_attention": config.middle_attention,
    }
    if sample_size is not None:
        settings["sample_size"] = sample_size
    write_part(folder, settings, dict(to_tensors(params, lambda keys: _stored(keys, levels))), {})


def _check_fields(c: Fields) -> None:
    c.check_values(ALLOWED, "autoencoder")
    c.check_known("autoencoder")
    widths, groups = c["block_out_channels"], c["norm_num_groups"]
    for name in ("down_block_types", "up_block_types"):
        if list(c[name]) != DEFAULTS[name] * len(widths):
            c.refuse(name, f"use {DEFAULTS[name][0]} for each of block_out_channels")
    if not groups or any(width % groups for width in widths):
        c.refuse("norm_num_groups", f"use a divisor of every width, {widths}")
    if c["out_channels"] != c["in_channels"]:
        c.refuse("out_channels", f"the autoencoder here has in_channels, {c['in_channels']}")
    if not c["scaling_factor"] or not c["scaling_factor"] > 0:
        c.refuse("scaling_factor", "use a number above 0")


def _stored(keys: Keys, levels: int) -> Stored:
    part, *rest = keys
    if part in ("encoder", "decoder"):
        inside = convolutional(tuple(rest), levels)
        return inside._replace(names=[f"{part}.{name}" for name in inside.names])
    name = f"{part}.{'bias' if rest[-1] == 'bias' else 'weight'}"
    return pointwise(name) if rest[-1] == "kernel" else linear([name], "bias")
