"""The typed configuration of an experiment, and the parts of the library that it describes.

Only programs speak of configurations: what is built here are plain modules, functions and tables. A configuration is
stored with every checkpoint, so a run folder needs nothing else.
"""

import dataclasses
import difflib
import math
import runpy
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import tyro

from diffjax import schedule
from diffjax.devices.parallel import Mode

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Betas are rescaled to reach the same noise at any T, and EDM's path is taken in its variance-preserving form: networks
# see samples of the same size whatever the schedule.
SCHEDULES = {
    "linear": schedule.rescaled_linear,
    "cosine": schedule.cosine,
    "scaled_linear": lambda T: schedule.scaled_linear(T, 0.85 / T, 12 / T),
    "sigmoid": schedule.sigmoid,
    "edm": lambda T: schedule.variance_preserving(schedule.edm(T)),
}
BETAS = {"linear": schedule.linear, "scaled_linear": schedule.scaled_linear}  # by their first and last beta


@dataclass(frozen=True)
class Data:
    """The images."""

    source: Literal["tfds", "folder", "npz"] = "tfds"
    """A dataset of tensorflow-datasets, a folder of PNG, JPEG or WebP files, or an .npz file."""
    name: str = "digits"
    """Dataset of tfds: digits, or any image dataset of its catalogue."""
    dir: str | None = None
    """Folder of prepared datasets of tfds; None for its own."""
    path: str | None = None
    """Of folder, whose sub-folders are the classes, or npz: x uint8 [N,H,W] or [N,H,W,C], and labels y if any."""
    size: int | None = None
    """Cut images to their middle and resize them to this many pixels a side; None for images as they are."""
    pad: int = 0
    """Black pixels then added on every side, so that 28x28 becomes 32x32 by 2."""
    grey: bool = False
    """Make images grey; else those of a folder are RGB."""
    labels: bool = True
    """Condition the network on the class label."""
    flip: bool = False
    """Mirror images, left to right, each with probability 1/2."""

    def __str__(self) -> str:
        """As in "mnist" or "photos.npz"."""
        return self.name if self.source == "tfds" else Path(self.path or "").name


@dataclass(frozen=True)
class UNetConfig:
    """The UNet."""

    channels: int = 32
    """Width at full resolution; an even number."""
    multipliers: tuple[int, ...] = (1, 2)
    """Width of each resolution, in units of channels; each resolution is half of the one before."""
    blocks: int = 1
    """Residual blocks per resolution."""
    attention: tuple[int, ...] = ()
    """Sizes in pixels at which self-attention follows each block."""
    middle_attention: bool = True
    """Self-attention between the two blocks at the bottom."""
    middle_attention_norm: bool = True
    """A norm before that attention."""
    heads: int = 1
    """Attention heads; they divide the width."""
    head_width: int | None = None
    """Or, in place of heads, channels of each head."""
    scale_shift: bool = True
    """The time scales and shifts what blocks normalise (improved DDPM, ADM); else it is added to it (DDPM)."""
    resample_blocks: bool = False
    """Resolutions change inside residual blocks (ADM), not in convolutions (DDPM)."""
    symmetric_padding: bool = False
    """Convolutions that halve see zeros on all four sides (PyTorch), not on two (TensorFlow)."""
    norm_groups: int | None = None
    """Groups of every norm; None for groups of four channels, 32 at most."""
    norm_epsilon: float = 1e-6
    """What every norm adds to the variance."""
    sin_first: bool = False
    """Sines before cosines in the embedding of the time, as DDPM has them."""
    frequency_shift: float = 0.0
    """1 for the frequencies of DDPM, 0 for those of ADM."""
    learned_variance: bool = False
    """The network says a variance too, which is dropped: plans use a fixed one."""
    null_label: bool = True
    """The class table has a row for no label."""
    dropout: float = 0.0
    """Rate of dropout inside residual blocks."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the network's computation; parameters are float32."""
    remat: bool = False
    """Compute blocks again for the gradient: less memory, a third more time."""


@dataclass(frozen=True)
class Diffusion:
    """The forward process and what the network predicts of it."""

    schedule: Literal["linear", "cosine", "scaled_linear", "sigmoid", "edm"] = "linear"
    """Noise schedule."""
    betas: tuple[float, float] | None = None
    """First and last beta of linear and scaled_linear; None for the usual ones, rescaled to T."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that no signal is left at level T; predict v or x0 then."""
    T: int = 1000
    """Number of noise levels."""
    prediction: Literal["eps", "x0", "v"] = "eps"
    """What the network says about a noisy image."""


@dataclass(frozen=True)
class Train:
    """Optimization, and what is written on the way."""

    steps: int = 1000
    """Steps to train in all."""
    batch: int = 64
    """Examples per step, over all devices."""
    learning_rate: float = 2e-3
    """Of AdamW, after the warm-up."""
    warmup: int = 100
    """Steps of linear warm-up."""
    decay: Literal["cosine", "none"] = "cosine"
    """Of the learning rate after the warm-up: to 0 at the last step, or none."""
    weight_decay: float = 0.0
    """Of AdamW."""
    clip: float = 1.0
    """Largest norm of the averaged gradient."""
    ema: tuple[float, ...] = (0.999,)
    """Decays of the moving averages of the parameters, after their warm-up; sampling uses the first."""
    weighting: Literal["simple", "min_snr", "truncated_snr", "sigmoid", "edm"] = "simple"
    """What the squared error counts at each noise level."""
    times: Literal["uniform", "stratified", "antithetic"] = "uniform"
    """How a batch draws its noise levels."""
    label_dropout: float = 0.1
    """Share of labels that are withheld, so that the network can be guided."""
    seed: int = 0
    """Of parameters, data order and noise."""
    accumulate: int = 1
    """Parts of a batch whose gradients are taken one after the other: less memory."""
    parallel: Annotated[Mode, tyro.conf.arg(aliases=("--parallel",))] = "pmap"
    """How devices share a step: shard_map or jit for pods, pmap anywhere; the results are the same."""
    steps_per_dispatch: int = 1
    """Steps per call of the device: more where the host is what is waited for."""
    max_skipped: int = 10
    """Steps in a row that may be skipped, their gradients not being numbers, before training stops."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 200
    """Steps between losses on held-out images; 0 for none."""
    preview_every: int = 500
    """Steps between grids of samples at fixed seeds; 0 for none."""
    save_every: int = 200
    """Steps between checkpoints."""
    keep: int = 3
    """Checkpoints to keep, the latest ones."""


@dataclass(frozen=True)
class Distillation:
    """What a student was distilled from, and for: `train.py distill` writes it."""

    method: Literal["none", "guidance", "progressive", "consistency"] = "none"
    """How; none for a network that was trained on data alone."""
    teacher: str = ""
    """Whose weights it learned from, and which they were."""
    start: int = 0
    """Steps of the sampler that its line was to shorten."""
    steps: int = 0
    """Steps that it was made for, of consistency the most; 0 for any."""
    guidance: float = 1.0
    """The largest guidance scale that it is told, from 1 on; 1 if it is told none."""

    @property
    def told(self) -> bool:
        """Whether the network's condition holds a guidance scale."""
        return self.guidance > 1


@dataclass(frozen=True)
class Config:
    """One experiment."""

    data: Data = field(default_factory=Data)
    network: UNetConfig = field(default_factory=UNetConfig)
    diffusion: Diffusion = field(default_factory=Diffusion)
    train: Train = field(default_factory=Train)
    distillation: Annotated[Distillation, tyro.conf.Suppress] = field(default_factory=Distillation)


# What a checkpoint cannot do without: another value means other arrays, or arrays that mean something else.
BOUND = ("data.source", "data.name", "data.size", "data.pad", "data.grey", "data.labels")
BOUND += ("diffusion.schedule", "diffusion.betas", "diffusion.zero_terminal_snr", "diffusion.T", "diffusion.prediction")
BOUND += tuple(
    f"network.{f.name}" for f in dataclasses.fields(UNetConfig) if f.name not in ("dropout", "dtype", "remat")
)
SEEDS = 2**32  # JAX would take a larger seed modulo this


def config_folder() -> Path:
    """The folder of the configurations that come with diffjax: in a wheel inside the package, else beside it."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def config_names() -> list[str]:
    """The files of that folder."""
    return sorted(path.stem for path in config_folder().glob("*.py"))


def load_config(name: str) -> Config:
    """The `config` of a file: of a name that `config_names` lists, or of a path as in ./mine.py, which may lie anywhere.

    ValueError for a name that is not there, with the nearest one, and for a file that cannot be read as a
    configuration.
    """
    path = Path(name) if name.endswith(".py") or "/" in name else config_folder() / f"{name}.py"
    if not path.is_file():
        if path.parent != config_folder():
            raise ValueError(f"there is no configuration file {path}")
        raise ValueError(f"there is no configuration {name!r}: {suggest(name, config_names())}")
    try:
        config = runpy.run_path(str(path)).get("config")
    except Exception as error:
        raise ValueError(f"configuration file {path} fails with {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise ValueError(f"configuration file {path} must define `config`, a diffjax.config.Config")
    return config


def suggest(name: str, names: typing.Sequence[str]) -> str:
    """The end of a sentence that tells what could have been meant."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(names)}"


def check_config(config: Config) -> None:
    """ValueError, naming the field, for values that no run can have. What types exclude needs no check here."""
    fields = flat_fields(config)
    positive = ("network.channels", "network.blocks", "network.heads", "network.norm_epsilon", "diffusion.T")
    positive += tuple(name for name in ("network.head_width", "network.norm_groups") if fields[name] is not None)
    positive += ("train.steps", "train.batch", "train.clip", "train.keep", "train.log_every", "train.save_every")
    positive += ("train.accumulate", "train.steps_per_dispatch", "train.max_skipped")
    for name in positive:
        if not 0 < fields[name] < math.inf:
            raise ValueError(f"{name} is {fields[name]}: use a number above 0")
    for name in ("network.dropout", "train.label_dropout"):
        if not 0 <= fields[name] < 1:
            raise ValueError(f"{name} is {fields[name]}: use 0 or more, and less than 1")
    if not config.train.ema or not all(0 <= decay < 1 for decay in config.train.ema):
        raise ValueError(f"train.ema is {config.train.ema}: name at least one decay, each 0 or more, and less than 1")
    counts = ("train.warmup", "train.seed", "train.eval_every", "train.preview_every")
    for name in ("train.learning_rate", "train.weight_decay", *counts):
        if not 0 <= fields[name] < math.inf:
            raise ValueError(f"{name} is {fields[name]}: use 0 or more")
    if config.train.seed >= SEEDS:
        raise ValueError(f"train.seed is {config.train.seed}: use less than 2**32")
    _check_data(config.data)
    network = config.network
    if not network.multipliers or min(network.multipliers) < 1:
        raise ValueError(f"network.multipliers is {network.multipliers}: name at least one resolution, each 1 or more")
    if network.channels % 2:
        raise ValueError(f"network.channels is {network.channels}: use an even number")
    if config.train.label_dropout > 0 and config.data.labels and not network.null_label:
        raise ValueError("network.null_label is False, so no label can be withheld: use --train.label-dropout 0")
    if config.diffusion.betas and config.diffusion.schedule not in BETAS:
        raise ValueError(
            f"diffusion.betas are of the schedules {' and '.join(BETAS)}: leave them out of {config.diffusion.schedule}"
        )


def _check_data(data: Data) -> None:
    if data.size is not None and data.size < 1:
        raise ValueError(f"data.size is {data.size}: use a number above 0")
    if data.pad < 0:
        raise ValueError(f"data.pad is {data.pad}: use 0 or more")
    if data.source == "tfds" and data.path is not None:
        raise ValueError("data.path belongs to the sources folder and npz: say which with --data.source")
    if data.source != "tfds" and data.path is None:
        raise ValueError(f"data.path is None: say with --data.path where the {data.source} of images is")
    if data.source == "folder" and data.size is None:
        raise ValueError("data.size is None: files are of many sizes, give one to all with --data.size")


def flat_fields(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"train.steps": 1000, ...}: every field by its option name."""
    if not dataclasses.is_dataclass(config):
        return {prefix: config}
    dot = prefix + "." if prefix else ""
    return {
        k: v for f in dataclasses.fields(config) for k, v in flat_fields(getattr(config, f.name), dot + f.name).items()
    }


def config_to_dict(config: Config) -> dict[str, Any]:
    """For JSON."""
    return dataclasses.asdict(config)


def config_from_dict(values: dict[str, Any], kind: Any = Config) -> Any:
    """The inverse of `config_to_dict`, through JSON. Fields that are missing, from an older version, take their defaults;
    ValueError for fields that this version does not know.
    """
    types = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(types))
    if unknown:
        raise ValueError(
            f"the stored configuration has the unknown field {unknown[0]!r}: it is from another version of diffjax"
        )

    def parse(value: Any, hint: Any) -> Any:
        if dataclasses.is_dataclass(hint):
            return config_from_dict(value, hint)
        if typing.get_origin(hint) is tuple and not isinstance(value, list):
            return (value,)  # a field that has become several
        return tuple(value) if isinstance(value, list) else value

    return kind(**{name: parse(value, types[name]) for name, value in values.items()})


def check_resume(stored: Config, given: Config) -> list[str]:
    """What changed, as "name: old -> new". ValueError where the checkpoint cannot serve the change."""
    old, new = flat_fields(stored), flat_fields(given)
    changed = [name for name in new if old[name] != new[name]]
    for name in changed:
        if name.startswith("distillation."):
            raise ValueError(
                f"this student was made with {name.removeprefix('distillation.')} {old[name]}, and is now to have"
                f" {new[name]}: move its folder away, or take another --workdir"
            )
        if name in BOUND:
            raise ValueError(
                f"{name} is {new[name]} but the checkpoint was trained with {old[name]}:"
                f" take another --workdir, or leave {name} as it was"
            )
    if len(stored.train.ema) != len(given.train.ema):
        raise ValueError(
            f"train.ema is {given.train.ema} but the checkpoint holds the averages {stored.train.ema}: name as many"
        )
    return [f"{name}: {old[name]} -> {new[name]}" for name in changed]
