"""diffusers' UNet2DModel folders, read and written: config.json, safetensors and scheduler_config.json. Neither torch
nor pickle is needed.

A folder is flat (config.json beside the weights) or a pipeline's (unet/ and scheduler/).
"""

import dataclasses
import importlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from safetensors import safe_open
from safetensors.flax import load_file
from safetensors.numpy import save_file

from diffjax.build import build_unet, params_like
from diffjax.config import BETAS, Config, Data, Diffusion, Distillation, Train, UNetConfig, config_from_dict

PREFIX = "hf:"  # of a source that is such a folder, or a repository of the Hugging Face hub
WEIGHTS = "diffusion_pytorch_model"
# Of fields that a config.json leaves out.
DEFAULTS: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "center_input_sample": False, "time_embedding_type": "positional",
    "time_embedding_dim": None, "freq_shift": 0, "flip_sin_to_cos": True, "mid_block_type": "UNetMidBlock2D",
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896], "layers_per_block": 2, "mid_block_scale_factor": 1,
    "downsample_padding": 1, "downsample_type": "conv", "upsample_type": "conv", "dropout": 0.0, "act_fn": "silu",
    "attention_head_dim": 8, "norm_num_groups": 32, "attn_norm_num_groups": None, "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default", "add_attention": True, "class_embed_type": None, "num_class_embeds": None,
    "sample_size": None,
}  # fmt: skip
ALLOWED = {  # fields of which the UNet knows only these values
    "center_input_sample": (False,), "time_embedding_type": ("positional",), "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,), "downsample_padding": (0, 1), "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"), "class_embed_type": (None,),
    "downsample_type": ("conv", "resnet", None), "upsample_type": ("conv", "resnet", None),
}  # fmt: skip
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}


class Imported(NamedTuple):
    """A network of such a folder, with its process."""

    config: Config
    image_shape: tuple[int, int, int]
    classes: int
    params: Any
    weights: str  # "ema" or "raw", or "unknown" where the source does not tell
    step: int
    remarks: tuple[str, ...]  # sentences on what was found, chosen or left out


def is_source(name: str | Path) -> bool:
    """Whether a run is asked for by the prefix hf:."""
    return str(name).startswith(PREFIX)


def locate(source: str | Path) -> Path:
    """The folder of hf:FOLDER, or of hf:OWNER/NAME downloaded from the hub. ValueError where there is none."""
    name = str(source).removeprefix(PREFIX)
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"there is no folder {name}: name one with a config.json, or a repository as hf:OWNER/NAME")
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        raise ValueError(
            f"there is no folder {name}, and downloading it from the hub needs: pip install 'diffjax[hub]'"
        ) from None
    try:
        return Path(hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # of several libraries
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{name} is no folder here and cannot be downloaded from the hub ({reason})") from error


def load(folder: Path) -> Imported:
    """Read a folder. ValueError, naming the field or the first layer, for what the UNet here cannot be; OSError for
    files that cannot be read.
    """
    home = folder / "unet" if (folder / "unet" / "config.json").exists() else folder
    given = _read_json(home / "config.json")
    tensors, metadata, file = _read_tensors(home)
    null_label = metadata.get("null_label") == "true"
    network, image_shape, classes = _network(given, null_label, home / "config.json")
    scheduler = next(
        (
            p
            for p in (folder / "scheduler", folder, home.parent / "scheduler")
            if (p / "scheduler_config.json").exists()
        ),
        folder,
    )
    described = _read_json(scheduler / "scheduler_config.json")
    config = Config(
        data=Data(name=f"{PREFIX}{folder.resolve().name}", labels=classes > 0),
        network=network,
        diffusion=_diffusion(described, scheduler / "scheduler_config.json"),
        train=Train(label_dropout=0.1 if null_label else 0.0),
        distillation=config_from_dict(json.loads(metadata.get("distillation", "{}")), Distillation),
    )
    unet = build_unet(config, image_shape, classes)
    like = params_like(unet, image_shape)
    params = _from_theirs(tensors, like, len(network.multipliers), file)
    weights = _weights(given, metadata, file, home)
    return Imported(
        config, image_shape, classes, params, weights, int(metadata.get("step", 0)),
        tuple(_remarks(config, classes, weights, described)),
    )  # fmt: skip


def save(
    folder: Path,
    config: Config,
    image_shape: tuple[int, int, int],
    classes: int,
    params: Any,
    weights: str,
    step: int,
) -> None:
    """Write a folder that `UNet2DModel.from_pretrained(folder)` and `DDPMScheduler.from_pretrained(folder)` load, and
    that `load` reads. The last row of the class table means no label. ValueError for a network that diffusers does not
    have.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = _settings(config, image_shape, classes)
    process = _scheduler(config)
    tensors = {name: np.ascontiguousarray(value) for name, value in _to_theirs(params, len(config.network.multipliers))}
    told = {"format": "pt", "weights": weights, "step": str(step), "null_label": str(config.network.null_label).lower()}
    told["distillation"] = json.dumps(dataclasses.asdict(config.distillation))
    save_file(tensors, folder / f"{WEIGHTS}.safetensors", metadata=told)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "scheduler_config.json").write_text(json.dumps(process, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------- files


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"{path.parent} holds no {path.name}: it is no folder of a UNet2DModel with its scheduler")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from error


def _read_tensors(home: Path) -> tuple[dict[str, np.ndarray], dict[str, str], Path]:
    files = sorted(home.glob(f"{WEIGHTS}*.safetensors"))
    if not files:
        pickled = sorted(home.glob("*.bin")) + sorted(home.glob("*.ckpt"))
        raise ValueError(
            f"{home} holds only pickled weights ({pickled[0].name}), which could run any code: save it again with"
            " safetensors, by UNet2DModel.from_pretrained(...).save_pretrained(...)"
            if pickled
            else f"{home} holds no {WEIGHTS}.safetensors"
        )
    # The plain file before variants like fp16; in parts, all of them.
    plain = [f for f in files if f.name == f"{WEIGHTS}.safetensors"]
    parts = [f for f in files if re.fullmatch(WEIGHTS + r"-\d+-of-\d+\.safetensors", f.name)]
    chosen = plain or parts or files[:1]
    tensors: dict[str, np.ndarray] = {}
    try:
        for file in chosen:
            tensors |= {name: np.asarray(value, np.float32) for name, value in load_file(file).items()}
        with safe_open(chosen[0], framework="flax") as opened:
            metadata = opened.metadata() or {}
    except Exception as error:  # SafetensorError is not a ValueError
        raise ValueError(f"{chosen[0]} cannot be read as safetensors ({error})") from error
    # Attention as it was named before 2023.
    old = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
    for before, now in old.items():
        tensors = {name.replace(before, now): value for name, value in tensors.items()}
    return tensors, metadata, chosen[0]


def _weights(given: dict[str, Any], metadata: dict[str, str], file: Path, home: Path) -> str:
    if metadata.get("weights") in ("ema", "raw"):
        return metadata["weights"]
    if ".non_ema." in file.name:
        return "raw"
    averaged = {"optimization_step", "use_ema_warmup", "inv_gamma"} <= set(given)  # written by diffusers' EMAModel
    return "ema" if averaged or home.name == "unet_ema" or ".ema." in file.name else "unknown"


def _remarks(config: Config, classes: int, weights: str, scheduler: dict[str, Any]) -> Iterator[str]:
    yield {
        "ema": "the weights are a moving average",
        "raw": "the weights are as trained, not their moving average",
        "unknown": "whether the weights are a moving average, the source does not tell",
    }[weights]
    if config.network.learned_variance:
        yield "the variance that it has learned is dropped: plans use a fixed one"
    if classes and not config.network.null_label:
        yield f"all {classes} rows of its class table are taken for labels: it cannot be guided away from no label"
    if scheduler.get("variance_type", "fixed_small") != "fixed_small":
        yield f"its scheduler has the variance {scheduler['variance_type']}: ddpm has its own, --variance"
    if scheduler.get("clip_sample") is False:
        yield "its scheduler does not clip: --no-clip does as it does"


# ---------------------------------------------------------------------------------------------- their config


def _network(given: dict[str, Any], null_label: bool, path: Path) -> tuple[UNetConfig, tuple[int, int, int], int]:
    kind = given.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise ValueError(f"{path} describes a {kind}: only UNet2DModel can be read")
    c: dict[str, Any] = DEFAULTS | given

    def refuse(name: str, remedy: str) -> None:
        raise ValueError(f"{path} has {name} {c[name]!r}: {remedy}")

    for name, values in ALLOWED.items():
        if c[name] not in values:
            refuse(name, f"the UNet here knows {' and '.join(map(repr, values))}")
    widths, size = c["block_out_channels"], c["sample_size"]
    if size is None:
        refuse("sample_size", "write the size of its images there")
    height, width = (size, size) if isinstance(size, int) else size
    if c["time_embedding_dim"] not in (None, 4 * widths[0]):
        refuse("time_embedding_dim", "the UNet here knows four times its first width")
    if any(w % widths[0] for w in widths):
        refuse("block_out_channels", "the UNet here knows multiples of the first width")
    if c["out_channels"] not in (c["in_channels"], 2 * c["in_channels"]):
        refuse("out_channels", "as many as in_channels are an estimate, twice as many a variance too")
    attends, resampled = _blocks(c, refuse)
    groups = c["attn_norm_num_groups"]
    if groups is None and c["resnet_time_scale_shift"] == "default":
        groups = c["norm_num_groups"]
    if groups not in (None, c["norm_num_groups"]):
        refuse("attn_norm_num_groups", "the UNet here has as many groups everywhere")
    rows = c["num_class_embeds"] or 0
    network = UNetConfig(
        channels=widths[0], multipliers=tuple(w // widths[0] for w in widths), blocks=c["layers_per_block"],
        attention=tuple(height // 2**i for i, attending in enumerate(attends) if attending),
        middle_attention=c["add_attention"], middle_attention_norm=groups is not None,
        heads=1, head_width=c["attention_head_dim"], scale_shift=c["resnet_time_scale_shift"] == "scale_shift",
        resample_blocks=resampled == "resnet", symmetric_padding=c["downsample_padding"] == 1,
        norm_groups=c["norm_num_groups"], norm_epsilon=c["norm_eps"], sin_first=not c["flip_sin_to_cos"],
        frequency_shift=c["freq_shift"], learned_variance=c["out_channels"] != c["in_channels"],
        null_label=null_label or not rows, dropout=c["dropout"],
    )  # fmt: skip
    return network, (height, width, c["in_channels"]), rows - 1 if null_label and rows else rows


def _blocks(c: dict[str, Any], refuse: Callable[[str, str], None]) -> tuple[list[bool], str]:
    # Which resolutions attend, and how resolutions change: the same on both ways.
    attends: dict[str, list[bool]] = {}
    ways = set()
    for name, word, change in (("down_block_types", "Down", "downsample"), ("up_block_types", "Up", "upsample")):
        theirs = c[f"{change}_type"] or "conv"
        known = {
            f"{word}Block2D": (False, "conv"), f"Attn{word}Block2D": (True, theirs),
            f"Resnet{word}sampleBlock2D": (False, "resnet"),
        }  # fmt: skip
        types = [kind.removeprefix("UNetRes") for kind in c[name]]
        if len(types) != len(c["block_out_channels"]) or not set(types) <= set(known):
            refuse(name, f"the UNet here knows one of {', '.join(known)} for each of block_out_channels")
        attends[word] = [known[kind][0] for kind in types]
        ways |= {known[kind][1] for kind in types[:-1]}  # the last resolution of a way changes no more
    if attends["Up"] != attends["Down"][::-1]:
        refuse("up_block_types", "the UNet here attends at the same resolutions on both ways")
    if len(ways) > 1:
        refuse("down_block_types", "the UNet here changes all resolutions alike, by convolutions or by resnets")
    return attends["Down"], next(iter(ways), "conv")


def _diffusion(described: dict[str, Any], path: Path) -> Diffusion:
    kind, betas = described.get("_class_name", "its scheduler"), described.get("beta_schedule", "linear")
    if not {"beta_schedule", "num_train_timesteps"} <= set(described) or "sigma_max" in described:
        raise ValueError(f"{path}: {kind} is of another process than DDPM's, which has a beta_schedule")
    if described.get("trained_betas") is not None:
        raise ValueError(f"{path} has trained_betas: only the schedules {', '.join(SCHEDULES)} can be read")
    prediction = described.get("prediction_type", "epsilon")
    if betas not in SCHEDULES or prediction not in PREDICTIONS:
        name, value, known = ("beta_schedule", betas, SCHEDULES)
        if betas in SCHEDULES:
            name, value, known = "prediction_type", prediction, PREDICTIONS
        raise ValueError(f"{path} has {name} {value!r}: only {', '.join(known)} can be read")
    ends, T = (described.get("beta_start", 0.0001), described.get("beta_end", 0.02)), described["num_train_timesteps"]
    schedule: Any = SCHEDULES[betas]
    predicted: Any = PREDICTIONS[prediction]
    usual = schedule not in BETAS or np.allclose(ends, _usual(schedule, T), rtol=1e-9)
    return Diffusion(
        schedule=schedule, betas=None if usual else ends, prediction=predicted, T=T,
        zero_terminal_snr=described.get("rescale_betas_zero_snr", False),
    )  # fmt: skip


def _usual(schedule: str, T: int) -> tuple[float, float]:
    # What betas None stands for; of cosine, which has none, what diffusers writes.
    return {"linear": (0.1 / T, 20 / T), "scaled_linear": (0.85 / T, 12 / T)}.get(schedule, (0.0001, 0.02))


def _settings(config: Config, image_shape: tuple[int, int, int], classes: int) -> dict[str, Any]:
    n, (height, width, channels) = config.network, image_shape
    sizes = [height // 2**i for i in range(len(n.multipliers))]
    attending = {n.channels * m for m, size in zip(n.multipliers, sizes, strict=True) if size in n.attention}
    attending |= {n.channels * n.multipliers[-1]} if n.middle_attention else set()
    widths = {n.head_width or w // n.heads for w in attending}
    if config.distillation.told:
        raise ValueError("diffusers has no UNet2DModel that is told a guidance scale, as this student is")
    if n.norm_groups is None:
        raise ValueError(
            "diffusers' networks have as many groups in every norm, and this one has groups of four channels: train"
            " with --network.norm-groups to write it for diffusers"
        )
    if len(widths) > 1 and n.heads > 1:
        raise ValueError(
            f"diffusers' attention has heads of one width, and here they have {sorted(widths)}: train with"
            " --network.head-width to write it for diffusers"
        )
    if n.scale_shift and n.middle_attention_norm:
        attention_groups = n.norm_groups
    else:
        attention_groups = None
        if not n.scale_shift and not n.middle_attention_norm:
            raise ValueError("diffusers always normalises before the middle's attention where the time is added")

    resnets = n.resample_blocks and len(n.multipliers) > 1  # one resolution never changes

    def names(way: str) -> list[str]:
        plain = f"Resnet{way}sampleBlock2D" if resnets else f"{way}Block2D"
        return [f"Attn{way}Block2D" if size in n.attention else plain for size in sizes]

    how = "resnet" if resnets else "conv"
    return {
        "_class_name": "UNet2DModel", "sample_size": height if height == width else [height, width],
        "in_channels": channels, "out_channels": channels * (2 if n.learned_variance else 1),
        "freq_shift": n.frequency_shift, "flip_sin_to_cos": not n.sin_first, "down_block_types": names("Down"),
        "up_block_types": names("Up")[::-1], "block_out_channels": [n.channels * m for m in n.multipliers],
        "layers_per_block": n.blocks, "downsample_padding": int(n.symmetric_padding), "downsample_type": how,
        "upsample_type": how, "dropout": n.dropout, "norm_num_groups": n.norm_groups,
        "attention_head_dim": None if n.heads == 1 and not n.head_width else next(iter(widths), None),
        "attn_norm_num_groups": attention_groups, "norm_eps": n.norm_epsilon, "add_attention": n.middle_attention,
        "resnet_time_scale_shift": "scale_shift" if n.scale_shift else "default",
        "num_class_embeds": classes + n.null_label if classes else None,
    }  # fmt: skip


def _scheduler(config: Config) -> dict[str, Any]:
    d = config.diffusion
    theirs = {ours: name for name, ours in SCHEDULES.items()}
    if d.schedule not in theirs:
        raise ValueError(f"diffusers has no schedule {d.schedule}: it has {', '.join(theirs)}")
    first, last = d.betas or _usual(d.schedule, d.T)
    return {
        "_class_name": "DDPMScheduler", "num_train_timesteps": d.T, "beta_schedule": theirs[d.schedule],
        "beta_start": first, "beta_end": last, "rescale_betas_zero_snr": d.zero_terminal_snr, "clip_sample": True,
        "prediction_type": {ours: name for name, ours in PREDICTIONS.items()}[d.prediction],
        "timestep_spacing": "trailing", "variance_type": "fixed_small",
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------- their layers

LAYERS = {
    "in": "conv_in", "time_in": "time_embedding.linear_1", "time_out": "time_embedding.linear_2",
    "label": "class_embedding", "norm_out": "conv_norm_out", "out": "conv_out", "middle_0": "mid_block.resnets.0",
    "middle_1": "mid_block.resnets.1", "middle_attention": "mid_block.attentions.0",
}  # fmt: skip
PARTS = {
    "norm_1": "norm1", "conv_1": "conv1", "condition": "time_emb_proj", "norm_2": "norm2", "conv_2": "conv2",
    "shortcut": "conv_shortcut", "norm": "group_norm", "out": "to_out.0",
}  # fmt: skip

ORDER = ("conv_in", "time_embedding", "class_embedding", "down_blocks", "mid_block", "up_blocks")
ORDER += ("conv_norm_out", "conv_out")


def _their_names(path: tuple[str, ...], levels: int) -> list[str]:
    """("up_1_0_attention", "qkv", "kernel") -> ["up_blocks.0.attentions.0.to_q.weight", ...]."""
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
    return {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _turned(path: tuple[str, ...], value: np.ndarray, back: bool) -> np.ndarray:
    # Kernels: ours HWIO and IO, theirs OIHW and OI; a shortcut is a convolution of one pixel to them.
    if path[-1] != "kernel":
        return value
    if back:
        value = value.reshape(value.shape[:2]) if path[-2] == "shortcut" and value.ndim == 4 else value
        return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
    return value[:, :, None, None] if path[-2] == "shortcut" else value


def _to_theirs(params: Any, levels: int) -> Iterator[tuple[str, np.ndarray]]:
    for path, leaf in _flat(params).items():
        names = _their_names(path, levels)
        for name, part in zip(names, np.split(np.asarray(leaf, np.float32), len(names), axis=-1), strict=True):
            yield name, _turned(path, part, back=False)


def _from_theirs(tensors: dict[str, np.ndarray], like: Any, levels: int, file: Path) -> Any:
    # Of views of one number: what is expected, layer by layer, in the order of the network, so that the first one that
    # differs is named.
    nothing = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), like)
    expected = {name: value.shape for name, value in _to_theirs(nothing, levels)}
    shapes = dict(sorted(expected.items(), key=lambda layer: ORDER.index(layer[0].split(".")[0])))
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(f"{file} has no layer {name}, which its config.json describes with the shape {shape}")
        if tensors[name].shape not in (shape, shape[:2] if shape[2:] == (1, 1) else shape):
            raise ValueError(f"{file} has the layer {name} of {tensors[name].shape}: its config.json describes {shape}")
    for name in tensors:
        if name not in shapes:
            raise ValueError(f"{file} has a layer {name}, which its config.json does not describe")

    def assemble(path: Any, leaf: Any) -> Array:
        key = tuple(part.key for part in path)
        parts = [_turned(key, tensors[name], back=True) for name in _their_names(key, levels)]
        return jax.numpy.asarray(np.concatenate(parts, axis=-1), leaf.dtype)

    return jax.tree_util.tree_map_with_path(assemble, like)
