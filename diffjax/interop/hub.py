"""Published models, read and written without torch or pickle.

A source is hf:FOLDER, hf:OWNER/NAME of the Hugging Face hub, or the path of a .pt file. A folder
has config.json, safetensors and scheduler_config.json: all in one place, or in the parts of a
pipeline, unet/ or transformer/, scheduler/ and vae/, which may have a model_index.json.
"""

import dataclasses
import importlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from diffjax.build import ModelInfo
from diffjax.config import (
    IMPORTED_PREFIX,
    Config,
    Data,
    Diffusion,
    Distillation,
    Train,
    dataclass_from_dict,
)
from diffjax.interop import autoencoder_kl, dit, unet2d
from diffjax.interop.files import WEIGHTS, Weights, read_json, read_weights, write_json, write_part
from diffjax.interop.published import EMA_FIELDS, Published
from diffjax.interop.schedulers import FLOW, read_diffusion, scheduler_config, scheduler_notes
from diffjax.interop.torch_file import read_pt
from diffjax.nn.autoencoder import AutoencoderConfig
from diffjax.nn.conditioning import ClassLabel, Conditioning
from diffjax.nn.dit import DiTConfig
from diffjax.nn.unet import UNetConfig

PREFIX = IMPORTED_PREFIX
PT = ".pt"
READERS = {"UNet2DModel": unet2d.read, dit.CLASS: dit.read, dit.OLD_CLASS: dit.read}
NETWORKS = ("unet", "transformer")  # the folders of networks in a pipeline
# The parts of a pipeline that make images of latents.
AUTOENCODERS = ("vae", "vqvae", "vq_model", "vqgan", "movq", "autoencoder")


class Imported(NamedTuple):
    """A published model, as it was read."""

    info: ModelInfo
    params: Any
    weights: str  # "ema" or "raw", or "unknown" where the source does not record it
    step: int
    notes: tuple[str, ...]  # sentences on what was found, chosen or left out
    autoencoder: tuple[AutoencoderConfig, Any] | None = None  # with parameters; None for pixels


def is_source(name: str | Path) -> bool:
    """Return whether a model is named as hf:FOLDER, hf:OWNER/NAME, or a .pt file."""
    return str(name).startswith(PREFIX) or str(name).endswith(PT)


def short_name(source: str | Path) -> str:
    """The last word of a source, without an ending."""
    name = Path(str(source).removeprefix(PREFIX)).name
    return name.removesuffix(PT)


def locate(source: str | Path) -> Path:
    """The folder or the .pt file of a source, downloaded from the hub if needed.

    Raises: ValueError if there is none.
    """
    name = str(source).removeprefix(PREFIX)
    if Path(name).is_dir():
        return Path(name)
    if name.endswith(PT):
        if not Path(name).is_file():
            raise ValueError(f"file {name} does not exist: use the path of a {PT} file")
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


# ------------------------------------------------------------------------------- read


def load(place: Path) -> Imported:
    """Read a folder, or a .pt file of DiT or SiT.

    Raises: ValueError, naming the field or the first layer, for a network that cannot be read;
    OSError for files that cannot be read.
    """
    if place.is_file():
        return _load_pt(place)
    home = next(
        (place / name for name in NETWORKS if (place / name / "config.json").exists()), place
    )
    root = _pipeline(home)
    given = read_json(home / "config.json")
    kind = given.get("_class_name", "UNet2DModel")
    if kind == autoencoder_kl.CLASS:
        return _load_autoencoder(home)
    autoencoder = _read_autoencoder(root)
    if kind not in READERS:
        known = ", ".join([*dict.fromkeys(READERS), autoencoder_kl.CLASS])
        raise ValueError(f"{home / 'config.json'} describes a {kind}: only {known} can be read")
    weights = read_weights(home, WEIGHTS)
    found = READERS[kind](given, weights, home / "config.json")
    _check_latents(found, autoencoder, home)
    path = _scheduler_path(root, home)
    scheduler = read_json(path)
    found, told = name_classes(found, weights, _index(root))
    distillation = json.loads(weights.metadata.get("distillation", "{}"))
    config = _config(
        root.resolve().name,
        found,
        read_diffusion(scheduler, path),
        dataclass_from_dict(Distillation, distillation),
    )
    weights_are = _kind_of_weights(given, weights, home)
    info = ModelInfo(config, found.x_shape, found.conditioning, imported=weights_are)
    of_scheduler = scheduler_notes(scheduler, is_latent=autoencoder is not None)
    notes = *_notes(found, weights_are, weights), *told, *of_scheduler
    step = int(weights.metadata.get("step", 0))
    return Imported(info, found.params, weights_are, step, notes, autoencoder)


def load_autoencoder(place: Path) -> tuple[AutoencoderConfig, Any] | None:
    """Read the autoencoder of a folder or of a pipeline; None if it has none.

    Raises: as `load`.
    """
    path = place / "config.json"
    if path.is_file() and read_json(path).get("_class_name") == autoencoder_kl.CLASS:
        return autoencoder_kl.load(place)
    return _read_autoencoder(_pipeline(place)) if place.is_dir() else None


def _config(
    name: str, found: Published, diffusion: Diffusion, distillation: Distillation | None = None
) -> Config:
    label = found.conditioning
    return Config(
        data=Data(name=f"{PREFIX}{name}", conditions=("label",) if label.is_conditional else ()),
        network=found.network,
        diffusion=diffusion,
        train=Train(condition_dropout=0.1 if label.has_null else 0.0),
        distillation=distillation or Distillation(),
    )


def _load_autoencoder(home: Path) -> Imported:
    found = autoencoder_kl.read(home)
    data = Data(name=f"{PREFIX}{home.resolve().name}", conditions=())
    config = Config(data=data, network=found.network)
    info = ModelInfo(config, found.x_shape, found.conditioning, imported="unknown")
    return Imported(info, found.params, "unknown", 0, ())


def _pipeline(home: Path) -> Path:
    """The folder of the pipeline that a network belongs to, or else its own."""
    parent = home.resolve().parent
    is_part = home.name.removesuffix("_ema") in NETWORKS or (parent / "model_index.json").exists()
    return (home.parent if home.name else parent) if is_part else home


def _index(root: Path) -> dict[str, Any]:
    path = root / "model_index.json"
    return read_json(path) if path.exists() else {}


def _read_autoencoder(root: Path) -> tuple[AutoencoderConfig, Any] | None:
    """The autoencoder of a pipeline, if it has one.

    Raises: ValueError, naming its part, for one of another kind than AutoencoderKL.
    """
    index = _index(root)
    for name in AUTOENCODERS:
        path = root / name / "config.json"
        named = [str(word) for word in index.get(name) or () if word]
        if not named and not path.exists():
            continue
        kind = read_json(path).get("_class_name") if path.exists() else named[-1]
        if kind != autoencoder_kl.CLASS:
            raise ValueError(
                f"{root} is a pipeline with the part {name}, a {kind}: latents of"
                f" {autoencoder_kl.CLASS} alone can be read"
            )
        return autoencoder_kl.load(root / name)
    return None


def _check_latents(
    found: Published, autoencoder: tuple[AutoencoderConfig, Any] | None, home: Path
) -> None:
    if autoencoder is not None and found.x_shape[-1] != autoencoder[0].latent_channels:
        raise ValueError(
            f"{home / 'config.json'} has in_channels {found.x_shape[-1]}, and the autoencoder"
            f" beside it latent_channels {autoencoder[0].latent_channels}"
        )


def _scheduler_path(root: Path, home: Path) -> Path:
    paths = [place / "scheduler_config.json" for place in (root / "scheduler", root, home)]
    return next((path for path in paths if path.exists()), root / "scheduler_config.json")


def _kind_of_weights(given: dict[str, Any], weights: Weights, home: Path) -> str:
    if weights.metadata.get("weights") in ("ema", "raw"):
        return weights.metadata["weights"]
    variant = weights.variant.split(".")
    if "non_ema" in variant:
        return "raw"
    averaged = {"optimization_step", "use_ema_warmup", "inv_gamma"} <= set(given) & EMA_FIELDS
    return "ema" if averaged or home.name == "unet_ema" or "ema" in variant else "unknown"


def _notes(found: Published, kind: str, weights: Weights) -> Iterator[str]:
    yield {
        "ema": "the weights are a moving average",
        "raw": "the weights are as trained, not their moving average",
        "unknown": "the source does not record whether the weights are a moving average",
    }[kind]
    if weights.variant:
        yield f"the weights are of the variant {weights.variant}, in {weights.file.name}"
    if found.network.learned_variance:
        yield "the learned variance is dropped: plans use a fixed one"
    label = found.conditioning
    if isinstance(label, ClassLabel) and not label.has_null_label:
        yield (
            f"all {label.classes} rows of the class table are taken for labels: without a null"
            " label the network cannot be guided"
        )
    yield from found.notes


# ------------------------------------------------------------------------------- names of classes


def name_classes(
    found: Published, weights: Weights, index: dict[str, Any]
) -> tuple[Published, list[str]]:
    """The network with the names of its classes, and notes on them.

    They are in its file, or in the id2label of model_index.json.
    """
    label, notes = found.conditioning, []
    if not isinstance(label, ClassLabel):
        return found, notes
    names = tuple(json.loads(weights.metadata.get("names", "[]")))
    given = index.get("id2label")
    if not names and isinstance(given, dict) and given:
        numbers = {str(i) for i in range(label.classes)}
        if not numbers <= set(given):
            notes.append(f"id2label does not name all {label.classes} classes: they have numbers")
        else:
            names = unique([str(given[str(i)]) for i in range(label.classes)])
    return found._replace(conditioning=dataclasses.replace(label, names=names)), notes


def unique(names: list[str]) -> tuple[str, ...]:
    """Names of classes made different: a name of two classes gets their numbers."""
    counts = Counter(names)
    return tuple(f"{name} ({i})" if counts[name] > 1 else name for i, name in enumerate(names))


# ------------------------------------------------------------------------------- .pt files


def _load_pt(path: Path) -> Imported:
    """Read a .pt file of DiT or SiT; its name must have one of these words."""
    file = read_pt(path)
    if not dit.is_meta(file.tensors):
        first = next(iter(file.tensors), "nothing")
        raise ValueError(
            f"{path} has no layer {dit.META['patch']}.weight but {first}: only files of DiT and SiT"
            " can be read"
        )
    weights = Weights(file.tensors, {}, path, file.part)
    found = dit.read_meta(weights)
    words = [word for word in ("dit", "sit") if word in path.stem.lower()]
    if len(words) != 1:
        raise ValueError(
            f"{path} has tensors of DiT or of SiT, which have the same names: rename it with one of"
            " the two words in its name, as in DiT-XL-2.pt"
        )
    processes = {"dit": Diffusion(), "sit": Diffusion(schedule="flow", prediction="sit")}
    kind = "ema" if file.part == "ema" else "raw" if file.part else "unknown"
    info = ModelInfo(
        _config(path.stem, found, processes[words[0]]),
        found.x_shape,
        found.conditioning,
        imported=kind,
    )
    notes = *_notes(found, kind, weights), f"taken for a {words[0]}, which the file's name has"
    return Imported(info, found.params, kind, 0, notes)


# ------------------------------------------------------------------------------- write


def save(
    folder: Path,
    info: ModelInfo,
    params: Any,
    weights: str,
    step: int,
    autoencoder: tuple[AutoencoderConfig, Any] | None = None,
) -> None:
    """Write a folder that diffusers and `load` read.

    Networks of pixels: config.json, weights and scheduler_config.json in the folder itself, for
    `UNet2DModel.from_pretrained(folder)` and `DDPMScheduler.from_pretrained(folder)`. Networks of
    latents: the parts of a pipeline, for `DiTPipeline.from_pretrained(folder)`, which does not
    run flow matching: then, and for a UNet, model_index.json is left out.

    Raises: ValueError for a network or a process that diffusers does not have.
    """
    network = info.config.network
    if isinstance(network, AutoencoderConfig):
        autoencoder_kl.save(folder, network, params, info.x_shape[0])
        return
    latent = autoencoder is not None
    if autoencoder is not None and autoencoder[0].shift and isinstance(network, DiTConfig):
        raise ValueError(
            f"the autoencoder has network.shift {autoencoder[0].shift}: DiTPipeline of diffusers"
            " does not shift latents"
        )
    if isinstance(network, DiTConfig):
        part, inside = dit.write(info, params, for_pipeline=latent), "transformer"
    elif isinstance(network, UNetConfig):
        part, inside = unet2d.write(info, params), "unet"
    else:
        raise ValueError(
            f"network is {type(network).__name__}: diffusers has UNet2DModel for UNetConfig,"
            f" {dit.CLASS} for DiTConfig and {autoencoder_kl.CLASS} for AutoencoderConfig"
        )
    scheduler = scheduler_config(info.config, is_latent=latent)
    metadata = _metadata(info, weights, step) | part.metadata
    home, of_scheduler = (folder / inside, folder / "scheduler") if latent else (folder, folder)
    write_part(home, part.settings, part.tensors, metadata)
    write_json(of_scheduler / "scheduler_config.json", scheduler)
    if autoencoder is not None:
        config, values = autoencoder
        autoencoder_kl.save(folder / "vae", config, values, info.x_shape[0] * config.factor)
    is_flow = scheduler["_class_name"] == FLOW
    if latent and isinstance(network, DiTConfig) and not is_flow:
        index = _dit_pipeline(_names(info.conditioning), scheduler["_class_name"])
        write_json(folder / "model_index.json", index)


def _metadata(info: ModelInfo, weights: str, step: int) -> dict[str, str]:
    return {
        "weights": weights,
        "step": str(step),
        "names": json.dumps(_names(info.conditioning)),
        "distillation": json.dumps(dataclasses.asdict(info.config.distillation)),
    }


def _names(label: Conditioning) -> tuple[str, ...]:
    return label.names if isinstance(label, ClassLabel) else ()


def _dit_pipeline(names: tuple[str, ...], scheduler: str) -> dict[str, Any]:
    return {
        "_class_name": "DiTPipeline",
        "_diffusers_version": "0.36.0",
        "id2label": {str(i): name for i, name in enumerate(names)},
        "scheduler": ["diffusers", scheduler],
        "transformer": ["diffusers", dit.CLASS],
        "vae": ["diffusers", autoencoder_kl.CLASS],
    }
