"""The files of a Hugging Face folder: JSON, and weights in safetensors.

Weights are one file or several, and each may exist in variants, as fp16:

    NAME.safetensors                        NAME.fp16.safetensors
    NAME-00001-of-00003.safetensors         NAME.fp16-00001-of-00003.safetensors, or
                                            NAME-00001-of-00003.fp16.safetensors
    NAME.safetensors.index.json             NAME.safetensors.index.fp16.json
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open
from safetensors.flax import load_file
from safetensors.numpy import save_file

WEIGHTS = "diffusion_pytorch_model"  # the name of diffusers' files
HALF = {"fp16", "bf16"}  # variants that have lost digits


class Weights(NamedTuple):
    """The tensors of a folder, and where they were read."""

    tensors: dict[str, np.ndarray]  # float32
    metadata: dict[str, str]
    file: Path  # the first of them
    variant: str  # as "fp16" or "non_ema"; "" for none


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file.

    Raises: ValueError, naming the file, for one that does not exist, or is none.
    """
    if not path.exists():
        raise ValueError(
            f"{path.parent} has no {path.name}: use a folder of a UNet2DModel, a"
            " DiTTransformer2DModel or a pipeline of one, with its scheduler, or of an"
            " AutoencoderKL"
        )
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} has a {type(values).__name__}: use a JSON object")
    return values


def read_weights(home: Path, name: str) -> Weights:
    """The weights of a folder: without variants the plain ones, else the most precise.

    An index is taken before a single file, which may be older, as diffusers does.

    Raises: ValueError, naming the file, for none, a missing part, or one that cannot be read.
    """
    files, variant = _choose(home, name)
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        try:
            found = load_file(file)
            tensors |= {key: np.asarray(value, np.float32) for key, value in found.items()}
        except Exception as error:  # SafetensorError is not a ValueError
            raise ValueError(f"{file} cannot be read as safetensors ({error})") from error
    with safe_open(files[0], framework="flax") as opened:
        metadata = opened.metadata() or {}
    return Weights(tensors, metadata, files[0], variant)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file, whose folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n")


def write_part(
    home: Path, settings: dict[str, Any], tensors: dict[str, Any], metadata: dict[str, str]
) -> None:
    """Write a network as diffusers does: config.json, and its tensors with metadata."""
    write_json(home / "config.json", settings)
    rows = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(rows, home / f"{WEIGHTS}.safetensors", metadata={"format": "pt", **metadata})


class _Name(NamedTuple):
    """The parts of a file's name."""

    file: Path
    variant: str
    part: int  # 0 for none
    parts: int
    is_index: bool


def _choose(home: Path, name: str) -> tuple[list[Path], str]:
    """The files to read, and their variant."""
    names = [each for file in sorted(home.iterdir()) if (each := _parse(file, name))]
    if not names:
        pickled = sorted(home.glob("*.bin")) + sorted(home.glob("*.ckpt"))
        if pickled:
            raise ValueError(
                f"{home} has only pickled weights ({pickled[0].name}), which could run any code:"
                " load it by diffusers, and save it with safetensors by save_pretrained(...)"
            )
        raise ValueError(f"{home} has no {name}.safetensors")
    variant = min((each.variant for each in names), key=_rank)
    own = [each for each in names if each.variant == variant]
    index = [each.file for each in own if each.is_index]
    if index:
        return _indexed(index[0]), variant
    single = [each.file for each in own if not each.parts]
    return single or _all_parts(own), variant


def _parse(file: Path, name: str) -> _Name | None:
    variant = r"((?:\.\w+)*)"
    pattern = rf"{name}{variant}(?:-(\d+)-of-(\d+))?{variant}\.safetensors(\.index{variant}\.json)?"
    match = re.fullmatch(pattern, file.name)
    if match is None:
        return None
    before, part, parts, after, index, of_index = match.groups(default="")
    found = (before + after + of_index).removeprefix(".")
    return _Name(file, found, int(part or 0), int(parts or 0), bool(index))


def _rank(variant: str) -> tuple[bool, bool, bool, str]:
    # None at all, then averages, and full precision before half.
    words = set(variant.split("."))
    return variant != "", "non_ema" in words, bool(words & HALF), variant


def _indexed(index: Path) -> list[Path]:
    parts = read_json(index).get("weight_map")
    if not isinstance(parts, dict) or not parts:
        raise ValueError(f"{index} has no weight_map: it names the file of each layer")
    files = [index.parent / Path(str(part)).name for part in dict.fromkeys(parts.values())]
    for file in files:
        if not file.exists():
            raise ValueError(f"{index.parent} has no {file.name}, which {index.name} names")
    return files


def _all_parts(names: list[_Name]) -> list[Path]:
    first = names[0]
    if len({each.parts for each in names}) > 1:
        raise ValueError(
            f"{first.file.parent} has parts of several sets, {first.file.name} and"
            f" {names[-1].file.name}: leave one set there"
        )
    there = {each.part: each.file for each in names}
    for part in range(1, first.parts + 1):
        if part not in there:
            missing = first.file.name.replace(f"-{first.part:05d}-of", f"-{part:05d}-of")
            raise ValueError(f"{first.file.parent} has no {missing}, one of {first.parts} parts")
    return [there[part] for part in range(1, first.parts + 1)]
