"""The typed configuration of an experiment, and its rules.

A configuration is stored with every checkpoint, so a run folder needs nothing else. The parts of
the library that it describes are built in build.py.
"""

import dataclasses
import difflib
import importlib.util
import math
import sys
import typing
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import tyro

from diffjax import averaging, schedule
from diffjax.devices.parallel import Mode
from diffjax.nn.autoencoder import AutoencoderConfig
from diffjax.nn.registry import (
    UNBOUND_FIELDS,
    NetworkConfig,
    network_class,
    network_to_dict,
)
from diffjax.nn.unet import UNetConfig

# Betas are rescaled to reach the same noise at any T, and the paths of EDM and flow matching are
# taken in their variance-preserving forms: x_t has the same scale whatever the schedule, and all
# that needs such a schedule works. The networks of both get the inputs of their own forms all the
# same (parameterization.py), so that images are the same too.
SCHEDULES = {
    "linear": schedule.rescaled_linear,
    "cosine": schedule.cosine,
    "scaled_linear": lambda T: schedule.scaled_linear(T, 0.85 / T, 12 / T),
    "sigmoid": schedule.sigmoid,
    "edm": lambda T: schedule.variance_preserving(schedule.edm(T)),
    "flow": lambda T, shift=1.0: schedule.variance_preserving(schedule.flow(T, shift)),
}
# The schedules that are given by their first and last beta.
BETAS = {"linear": schedule.linear, "scaled_linear": schedule.scaled_linear}
SEEDS = 2**32  # JAX would take a larger seed modulo this
PATHS = {  # what data.path is of each source
    "folder": "a folder of images",
    "npz": "an .npz file of images",
    "idx": "a folder of MNIST's files",
    "latents": "a folder of latents",
}
IMPORTED_PREFIX = "hf:"  # of the data's name of an imported network, and of the source it is from


@dataclass(frozen=True)
class Data:
    """Data set and preprocessing."""

    source: Literal["tfds", "folder", "npz", "idx", "latents"] = "tfds"
    """tensorflow-datasets, a folder of image files, an .npz file of arrays, a folder of files in
    MNIST's format (idx), or a folder of latents that `diffjax encode` has written."""
    name: str = "digits"
    """Data set of tfds: digits, or any image data set of its catalogue."""
    dir: str | None = None
    """Folder of prepared tfds data sets; None for the default of tfds."""
    path: str | None = None
    """Path of the folder or the .npz file; a relative path starts at the current directory. The
    sub-folders of a folder of image files are the classes."""
    size: int | None = None
    """Crop images to their center and resize them to this many pixels a side; None to keep them."""
    pad: int = 0
    """Black pixels to add on every side after resizing; 2 makes 28x28 into 32x32."""
    grey: bool = False
    """Convert images to grey; otherwise those of a folder are RGB."""
    conditions: tuple[str, ...] = ("label",)
    """Fields of the examples that the network is conditioned on; none for an unconditional one."""
    flip: bool = False
    """Mirror each image, left to right, with probability 1/2."""
    skip_damaged: bool = False
    """Read the next file of a folder for one that cannot be read, and count these; otherwise
    training saves and ends there."""

    def __str__(self) -> str:
        """The short name, as in "mnist" or "photos.npz"."""
        return self.name if self.source == "tfds" else Path(self.path or "").name

    @property
    def known(self) -> bool:
        """True if the data set is known; that of an imported network is not."""
        return not str(self).startswith(IMPORTED_PREFIX)

    def check(self) -> None:
        """Check the values of the fields.

        Raises: ValueError, naming the field.
        """
        if self.size is not None:
            _positive("data.size", self.size)
        _not_negative("data.pad", self.pad)
        if self.source == "tfds" and self.path is not None:
            raise ValueError(
                f"data.path is {self.path!r} and data.source tfds: use data.source folder, npz,"
                " idx or latents"
            )
        if self.source != "tfds" and self.path is None:
            raise ValueError(f"data.path is None: set it to {PATHS[self.source]}")
        if len(set(self.conditions)) < len(self.conditions):
            raise ValueError(f"data.conditions is {self.conditions}: use each field once")
        for name in ("size", "pad", "grey"):
            if self.source == "latents" and getattr(self, name):
                raise ValueError(
                    f"data.{name} is {getattr(self, name)} and data.source latents: images are"
                    " preprocessed when they are encoded, so leave it out"
                )
        if self.source == "folder" and self.size is None:
            raise ValueError("data.size is None: set it, since files have many sizes")
        if self.source != "folder" and self.skip_damaged:
            raise ValueError(
                f"data.skip_damaged is True and data.source {self.source}: use it with files of a"
                " folder"
            )


@dataclass(frozen=True)
class Diffusion:
    """Forward process and parameterization."""

    schedule: Literal["linear", "cosine", "scaled_linear", "sigmoid", "edm", "flow"] = "linear"
    """Noise schedule: linear (DDPM), cosine (improved DDPM), scaled_linear (latent diffusion),
    sigmoid, edm or flow (both in their variance-preserving forms)."""
    betas: tuple[float, float] | None = None
    """First and last beta of linear and scaled_linear, each above 0 and below 1; None for the
    paper's, rescaled to T."""
    shift: float = 1.0
    """Shift of flow, which multiplies sigma/alpha; above 1 for large images, as 3."""
    zero_terminal_snr: bool = False
    """Rescale the schedule to no signal at level T; refused with prediction eps or edm."""
    T: int = 1000
    """Number of noise levels."""
    prediction: Literal["eps", "x0", "v", "flow", "sit", "edm"] = "eps"
    """Prediction of the network: eps (the noise), x0 (the data), v (alpha*eps - sigma*x0), flow
    (eps - x0), sit (x0 - eps), or edm (EDM's preconditioning); the last three change its time and
    input too."""
    time_scale: float = 1000.0
    """Time of a network that predicts flow, as a multiple of sigma."""
    sigma_data: float = 0.5
    """Standard deviation of the data, for the prediction and the weighting edm."""

    def check(self) -> None:
        """Check the values of the fields.

        Raises: ValueError, naming the field.
        """
        for name in ("T", "shift", "time_scale", "sigma_data"):
            _positive(f"diffusion.{name}", getattr(self, name))
        if self.schedule == "flow" and self.zero_terminal_snr:
            raise ValueError(
                "diffusion.zero_terminal_snr is True and diffusion.schedule flow, which has no"
                f" signal at level {self.T} by itself: leave it out"
            )
        self._check_terminal()
        for name, value, default, part, owner in (
            ("shift", self.shift, 1.0, "schedule", "flow"),
            ("time_scale", self.time_scale, 1000.0, "prediction", "flow"),
        ):
            if value != default and getattr(self, part) != owner:
                raise ValueError(
                    f"diffusion.{name} is {value} and diffusion.{part} {getattr(self, part)}: use"
                    f" it with {owner}"
                )
        if self.betas and self.schedule not in BETAS:
            raise ValueError(
                f"diffusion.betas is {self.betas} and diffusion.schedule {self.schedule}: use betas"
                f" with {' or '.join(BETAS)}"
            )

    def _check_terminal(self) -> None:
        reasons = {
            "eps": "does not determine x0",
            "edm": "has the time log(sigma/alpha)/4, which is infinite",
        }
        if self.schedule == "flow":
            given = "diffusion.schedule is flow"
        elif self.zero_terminal_snr:
            given = "diffusion.zero_terminal_snr is True"
        else:
            return
        if self.prediction in reasons:
            raise ValueError(
                f"{given} and diffusion.prediction {self.prediction}, which"
                f" {reasons[self.prediction]} at level {self.T}, where no signal is left: use"
                " prediction v, x0 or flow"
            )


@dataclass(frozen=True)
class Train:
    """Optimization, and what is written during training."""

    steps: int = 1000
    """Training steps in total."""
    batch: int = 64
    """Examples per step, over all devices."""
    learning_rate: float = 2e-3
    """Learning rate of AdamW after the warm-up."""
    warmup: int = 100
    """Steps of linear warm-up."""
    decay: Literal["cosine", "none"] = "cosine"
    """Decay of the learning rate after the warm-up: cosine to 0 at the last step, or none."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    clip: float = 1.0
    """Maximum norm of the averaged gradient, above 0."""
    ema: tuple[float, ...] = (0.999,)
    """Decays of the moving averages of the parameters, each 0 or more and below 1; sampling uses
    the first."""
    power_ema: tuple[float, ...] = ()
    """Relative lengths of averages by power functions (EDM2), each above 0 and below 0.288, as 0.05
    0.1; every save stores them, for `diffjax average`."""
    weighting: Literal["simple", "min_snr", "truncated_snr", "sigmoid", "edm"] = "simple"
    """Loss weighting over noise levels: simple (1 for what the network predicts); min_snr or
    truncated_snr (min(SNR, 5) or max(SNR, 1), for x0); sigmoid (of logsnr); or edm (EDM's)."""
    times: Literal["uniform", "stratified", "antithetic", "log_normal"] = "uniform"
    """How noise levels are drawn for a batch: uniform (independently), stratified (at equal
    distances), antithetic (in pairs t and T + 1 - t; the batch must be even), or log_normal
    (independently, with log(sigma/alpha) normal)."""
    times_mean: float = 0.0
    """Mean of log(sigma/alpha) for the times log_normal; EDM's is -1.2."""
    times_std: float = 1.0
    """Standard deviation of log(sigma/alpha) for the times log_normal; EDM's is 1.2."""
    condition_dropout: float = 0.1
    """Probability of training an example without its condition, for classifier-free guidance; 0 or
    more and below 1."""
    seed: int = 0
    """Seed of parameters, data order and noise, from 0 to 2**32 - 1."""
    accumulate: int = 1
    """Parts of a batch whose gradients are computed in turn, to save memory."""
    parallel: Mode = "pmap"
    """How a step is shared by devices, of one host or several; all train the same parameters."""
    steps_per_dispatch: int = 1
    """Steps per call of the compiled program; more where the host is the bottleneck."""
    max_skipped: int = 10
    """Consecutive steps, skipped for gradients that are not finite, before training stops."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 200
    """Steps between held-out losses; 0 for never."""
    preview_every: int = 500
    """Steps between grids of samples at fixed seeds; 0 for never."""
    save_every: int = 200
    """Steps between checkpoints."""
    keep: int = 3
    """Number of latest checkpoints to keep."""

    @property
    def averages(self) -> int:
        """The number of moving averages."""
        return len(self.ema) + len(self.power_ema)

    def check(self) -> None:
        """Check the values of the fields.

        Raises: ValueError, naming the field.
        """
        for name in (
            "steps", "batch", "clip", "keep", "log_every", "save_every", "accumulate",
            "steps_per_dispatch", "max_skipped",
        ):  # fmt: skip
            _positive(f"train.{name}", getattr(self, name))
        for name in (
            "warmup", "seed", "eval_every", "preview_every", "learning_rate", "weight_decay",
        ):  # fmt: skip
            _not_negative(f"train.{name}", getattr(self, name))
        if not 0 <= self.condition_dropout < 1:
            raise ValueError(
                f"train.condition_dropout is {self.condition_dropout}: use 0 or more, less than 1"
            )
        if not self.ema or not all(0 <= decay < 1 for decay in self.ema):
            raise ValueError(
                f"train.ema is {self.ema}: use at least one decay, each 0 or more, and less than 1"
            )
        if len(set(self.power_ema)) < len(self.power_ema):
            raise ValueError(f"train.power_ema is {self.power_ema}: use each length once")
        if not all(0 < length < averaging.LONGEST for length in self.power_ema):
            raise ValueError(
                f"train.power_ema is {self.power_ema}: use lengths above 0 and below"
                f" {averaging.LONGEST:.3f}"
            )
        if self.seed >= SEEDS:
            raise ValueError(f"train.seed is {self.seed}: use less than 2**32")
        if not math.isfinite(self.times_mean):
            raise ValueError(f"train.times_mean is {self.times_mean}: use a finite number")
        _positive("train.times_std", self.times_std)
        for name, default in (("times_mean", 0.0), ("times_std", 1.0)):
            if self.times != "log_normal" and getattr(self, name) != default:
                raise ValueError(
                    f"train.{name} is {getattr(self, name)} and train.times {self.times}: use it"
                    " with log_normal"
                )
        if self.times == "antithetic" and self.batch % 2:
            raise ValueError(
                f"train.batch is {self.batch} and train.times antithetic, which draws levels in"
                " pairs: use an even number"
            )


@dataclass(frozen=True)
class Distillation:
    """The distillation that made a network; written by distillation, not an option."""

    method: Literal["none", "guidance", "progressive", "consistency"] = "none"
    """Method of distillation; none for a network trained on data alone."""
    teacher: str = ""
    """Name and weights of the teacher."""
    start: int = 0
    """Steps of the sampler at the start of the chain of students."""
    steps: int = 0
    """Steps that the student was trained for (the most, for consistency); 0 for any number."""
    guidance: float = 1.0
    """Largest guidance scale that the network is conditioned on, from 1; 1 for none."""

    @property
    def guidance_conditioned(self) -> bool:
        """True if the network is conditioned on a guidance scale (arXiv:2210.03142)."""
        return self.guidance > 1


@dataclass(frozen=True)
class Config:
    """One experiment."""

    data: Data = field(default_factory=Data)
    network: NetworkConfig = field(default_factory=UNetConfig)
    diffusion: Diffusion = field(default_factory=Diffusion)
    train: Train = field(default_factory=Train)
    distillation: Annotated[Distillation, tyro.conf.Suppress] = field(default_factory=Distillation)

    def check(self) -> None:
        """Check the values of all fields; those that types exclude need no check.

        Raises: ValueError, naming the field.
        """
        for part in (self.data, self.network, self.diffusion, self.train):
            part.check()
        users = self.diffusion.prediction, self.train.weighting
        if self.diffusion.sigma_data != 0.5 and "edm" not in users:
            raise ValueError(
                f"diffusion.sigma_data is {self.diffusion.sigma_data}, diffusion.prediction"
                f" {users[0]} and train.weighting {users[1]}: use it with prediction or weighting"
                " edm"
            )
        if self.is_autoencoder:
            _check_autoencoder(self)

    @property
    def is_autoencoder(self) -> bool:
        """True if the network is an autoencoder, which is trained to reconstruct images."""
        return isinstance(self.network, AutoencoderConfig)


# The beginnings of names of fields that are of no use to an autoencoder.
_OF_DENOISERS = ("diffusion.", "train.weighting", "train.times", "train.condition_dropout")


def _check_autoencoder(config: Config) -> None:
    if config.data.conditions:
        raise ValueError(
            f"data.conditions is {config.data.conditions}, and an autoencoder has none: use ()"
        )
    if config.data.source == "latents":
        raise ValueError(
            "data.source is latents, and an autoencoder is trained on images: use those that the"
            " latents are of"
        )
    default = flat_fields(Config())
    for name, value in flat_fields(config).items():
        if name.startswith(_OF_DENOISERS) and value != default[name]:
            raise ValueError(
                f"{name} is {value}, which an autoencoder has not: leave it at {default[name]}"
            )


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}: use a number above 0")


def _not_negative(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value}: use 0 or more")


# ------------------------------------------------------------------------------- files


def config_folder() -> Path:
    """The folder of diffjax's own configurations."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def config_names() -> list[str]:
    """The names of diffjax's own configurations."""
    return sorted(path.stem for path in config_folder().glob("*.py"))


def load_config(name: str) -> Config:
    """The `config` of a Python file, by a name of `config_names` or by its path.

    Raises: ValueError for a name that does not exist, with the nearest one, and for a file that
    does not define a configuration.
    """
    is_path = name.endswith(".py") or "/" in name
    path = Path(name) if is_path else config_folder() / f"{name}.py"
    if not path.is_file():
        if is_path:
            raise ValueError(f"configuration file {path} does not exist")
        raise ValueError(f"there is no configuration {name!r}: {suggest(name, config_names())}")
    config = getattr(_load_module(path), "config", None)
    if not isinstance(config, Config):
        raise ValueError(f"{path} must define `config`, a diffjax.config.Config")
    return config


def _load_module(path: Path) -> ModuleType:
    # It stays among the modules, since types that it defines are looked up there.
    name = f"diffjax_config_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's own file may raise
        del sys.modules[name]
        raise ValueError(f"{path} fails with {type(error).__name__}: {error}") from error
    return module


def suggest(name: str, names: Sequence[str]) -> str:
    """The end of an error message that suggests the nearest of the names."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(names)}"


# ------------------------------------------------------------------------------- stored


def flat_fields(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every field by its option name, as in {"train.steps": 1000, ...}."""
    if not dataclasses.is_dataclass(config):
        return {prefix: config}
    dot = prefix + "." if prefix else ""
    found: dict[str, Any] = {}
    for each in dataclasses.fields(config):
        found |= flat_fields(getattr(config, each.name), dot + each.name)
    return found


def config_to_dict(config: Config) -> dict[str, Any]:
    """The configuration for JSON; the network has its registered name as `kind`."""
    return dataclasses.asdict(config) | {"network": network_to_dict(config.network)}


def config_from_dict(values: dict[str, Any]) -> Config:
    """The inverse of `config_to_dict`, through JSON.

    Raises: ValueError for a network that is not registered, or fields that do not exist.
    """
    network = dict(values["network"])
    kind = network_class(network.pop("kind"))
    parts = {name: dataclass_from_dict(part, values[name]) for name, part in _PARTS.items()}
    return Config(network=dataclass_from_dict(kind, network), **parts)


_PARTS: dict[str, Any] = {
    "data": Data, "diffusion": Diffusion, "train": Train, "distillation": Distillation,
}  # fmt: skip


def dataclass_from_dict(kind: Any, values: dict[str, Any]) -> Any:
    """A flat dataclass from the values of its fields in JSON, with lists as tuples.

    Raises: ValueError for a field that the dataclass has not.
    """
    unknown = sorted(set(values) - set(typing.get_type_hints(kind)))
    if unknown:
        raise ValueError(f"stored configuration has the unknown field {unknown[0]!r}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


# Fields that a checkpoint is bound to: with another value its arrays would have other shapes, or
# mean something else. All fields of a network are bound but UNBOUND_FIELDS.
BOUND_FIELDS = (
    "data.source", "data.name", "data.size", "data.pad", "data.grey", "data.conditions",
    "diffusion.schedule", "diffusion.betas", "diffusion.shift", "diffusion.zero_terminal_snr",
    "diffusion.T", "diffusion.prediction", "diffusion.time_scale", "diffusion.sigma_data",
    "train.power_ema",
)  # fmt: skip


def is_bound(name: str) -> bool:
    """Return whether a checkpoint is bound to a field, by its option name."""
    part, _, rest = name.partition(".")
    return name in BOUND_FIELDS or (part == "network" and rest not in UNBOUND_FIELDS)


def forgotten_changes(stored: Config, given: Config, named: Collection[str]) -> list[str]:
    """The fields that differ from a checkpoint's without being named.

    Each as in "train.batch is 64, and the run has 32". named: as `flat_fields` names them. Those of
    the distillation are no options, and left to `check_resume`.
    """
    old, new = flat_fields(stored), flat_fields(given)
    names = [name for name in new if name in old and not name.startswith("distillation.")]
    return [
        f"{name} is {new[name]}, and the run has {old[name]}"
        for name in names
        if old[name] != new[name] and name not in named
    ]


def check_resume(stored: Config, given: Config) -> list[str]:
    """The fields that changed since a checkpoint, as in "train.steps: 1000 -> 2000".

    Raises: ValueError for a change that training cannot resume with.
    """
    if type(stored.network) is not type(given.network):
        raise ValueError(
            f"network is {type(given.network).__name__}, and the checkpoint has"
            f" {type(stored.network).__name__}: use another run folder"
        )
    old, new = flat_fields(stored), flat_fields(given)
    changed = [name for name in new if old[name] != new[name]]
    for name in changed:
        if name.startswith("data.") and not stored.data.known:
            continue  # the data of an imported network, which are named now
        if name.startswith("distillation.") or is_bound(name):
            raise ValueError(
                f"{name} is {new[name]}, and the checkpoint has {old[name]}: use the value of the"
                " checkpoint, or another run folder"
            )
    if len(stored.train.ema) != len(given.train.ema):
        raise ValueError(
            f"train.ema is {given.train.ema}, and the checkpoint has {stored.train.ema}: use as"
            " many decays"
        )
    return [f"{name}: {old[name]} -> {new[name]}" for name in changed]
