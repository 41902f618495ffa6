"""A trained model, opened from its run folder or a folder of another library."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diffjax.build import (
    ModelInfo,
    build_module,
    build_network,
    build_parameterization,
    build_schedule,
)
from diffjax.checkpoint import tree_sha256
from diffjax.data.codec import Codec
from diffjax.data.latents import AUTOENCODER
from diffjax.denoiser import Network
from diffjax.devices import parallel
from diffjax.inference.autoencoder import (
    TrainedAutoencoder,
    codec_of,
    load_autoencoder,
    published_autoencoder,
)
from diffjax.inference.weights import load_weights
from diffjax.interop import hub
from diffjax.nn.registry import network_name
from diffjax.parameterization import Parameterization
from diffjax.schedule import Schedule


class TrainedModel(NamedTuple):
    """A trained network, and all that is needed to sample from it."""

    name: str  # as in "unet of digits"
    info: ModelInfo
    network: Network
    params: Any
    parameterization: Parameterization
    schedule: Schedule
    codec: Codec
    weights: str  # "ema", a decay, "raw", or "unknown" where an import does not tell
    step: int
    notes: tuple[str, ...] = ()  # sentences on an imported model
    autoencoder: TrainedAutoencoder | None = None  # that the codec is of; None for pixels

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape [H, W, C] of images, which for a model of latents is not that of x."""
        if self.autoencoder is None:
            return self.codec.decode(np.zeros((1, *self.info.x_shape), np.float32)).shape[1:]
        height, width, _ = self.info.x_shape
        factor = self.autoencoder.config.factor
        return height * factor, width * factor, self.autoencoder.image_channels


def load_model(
    source: str | Path,
    step: int | None = None,
    weights: str = "ema",
    autoencoder: TrainedAutoencoder | None = None,
) -> TrainedModel:
    """Load the model of a run folder, or a published one.

    source: the folder, or for a published model "hf:FOLDER", "hf:OWNER/NAME" or a .pt file.
    step: the checkpoint's training step, None for the latest. weights: "ema", the first moving
    average; the decay of one, as "0.9999"; or "raw", the parameters as trained. autoencoder: of a
    published network of latents that is stored without one, as in a .pt file.

    Raises: FileNotFoundError where there is none; ValueError for weights that it has not, or that
    are not finite, for a network that cannot be read, or makes no images, and for a model of
    latents without its autoencoder.
    """
    if hub.is_source(source):
        return _load_imported(source, step, weights, autoencoder)
    workdir = Path(source)
    info, params, weights, step = load_weights(workdir, step, weights)
    if info.imported:
        weights = _imported_weights(source, info.imported, weights)
    name = workdir.resolve().name
    if info.config.distillation.method != "none":  # named by its steps, in a folder with a name
        name = f"{workdir.resolve().parent.name}/{name}"
    if autoencoder is not None:
        raise ValueError(
            f"autoencoder is {autoencoder.source}, and {source} is a run: leave it out"
        )
    autoencoder = stored_autoencoder(workdir, info.autoencoder) if info.autoencoder else None
    return _model(name, info, params, weights, step, autoencoder=autoencoder)


def stored_autoencoder(workdir: Path, checksum: str) -> TrainedAutoencoder:
    """The autoencoder of a run folder whose model is trained on latents.

    Raises: ValueError if it is absent, or has another checksum.
    """
    folder = workdir / AUTOENCODER
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} does not exist, and the model is one of latents: copy it from the folder of"
            " the latents"
        )
    found = load_autoencoder(folder)
    if found.checksum != checksum:
        raise ValueError(
            f"{folder} has the checksum {found.checksum[:8]}, and the model was trained on latents"
            f" of {checksum[:8]}: copy it from the folder of those"
        )
    return found


def _load_imported(
    source: str | Path, step: int | None, weights: str, autoencoder: TrainedAutoencoder | None
) -> TrainedModel:
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights is {weights!r}: use ema or raw")
    if step is not None:
        raise ValueError(f"checkpoint is {step}, and {source} has one set of weights: leave it out")
    found = hub.load(hub.locate(source))
    weights = _imported_weights(source, found.weights, weights)
    sharding = parallel.replicated(parallel.device_mesh())
    params = jax.device_put(jax.device_get(found.params), sharding)
    name = str(found.info.config.data)
    info = found.info
    if found.autoencoder is not None:
        if autoencoder is not None:
            raise ValueError(
                f"autoencoder is {autoencoder.source}, and {source} has its own: leave it out"
            )
        autoencoder = published_autoencoder(*found.autoencoder, source)
    if autoencoder is not None:
        latents = autoencoder.config.latent_channels
        if info.x_shape[-1] != latents:
            raise ValueError(
                f"autoencoder is {autoencoder.source}, of latents of {latents} channels, and"
                f" {source} has {info.x_shape[-1]}: use the one that it was trained with"
            )
        info = info._replace(autoencoder=autoencoder.checksum)
    return _model(name, info, params, weights, found.step, found.notes, autoencoder)


def _imported_weights(source: str | Path, found: str, asked: str) -> str:
    # An import has one set of weights, which is what it is whatever is asked for.
    if asked == "raw" and found not in ("raw", "unknown"):
        raise ValueError(f"weights is 'raw', and {source} has only a moving average: use ema")
    return found


def _model(
    name: str,
    info: ModelInfo,
    params: Any,
    weights: str,
    step: int,
    notes: tuple[str, ...] = (),
    autoencoder: TrainedAutoencoder | None = None,
) -> TrainedModel:
    config, name = info.config, f"{network_name(info.config.network)} of {name}"
    if config.is_autoencoder:
        raise ValueError(
            f"{name} has no samples: evaluate it, or use a model that is trained on its latents"
        )
    _check_finite(name, params)
    channels = info.x_shape[-1] if autoencoder is None else autoencoder.image_channels
    if channels not in (1, 3):
        raise ValueError(
            f"{name} has {channels} channels, and images have 1 (grey) or 3 (RGB): use it by the"
            " library, or a model of images; a published one of latents is converted with their"
            " autoencoder"
        )
    return TrainedModel(
        name=name,
        info=info,
        network=build_network(info, build_module(info)),
        params=params,
        parameterization=build_parameterization(config),
        schedule=build_schedule(config),
        codec=codec_of(autoencoder),
        weights=weights,
        step=step,
        notes=notes,
        autoencoder=autoencoder,
    )


def _check_finite(name: str, params: Any) -> None:
    for path, leaf in jax.tree.leaves_with_path(params):
        if not np.isfinite(np.asarray(leaf)).all():
            layer = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"{name} has weights that are not finite, the first ones in {layer}: use another"
                " checkpoint, or download it again"
            )


def output_folder(source: str | Path) -> Path:
    """The folder for a model's pictures: its run folder, or runs/NAME if imported."""
    if hub.is_source(source):
        return Path("runs") / hub.short_name(source)
    return Path(source)


def describe_weights(model: TrainedModel) -> str:
    """Weights, step and checksum, as in "ema, step 1000, sha256:45f1fd30".

    The checksum tells apart models that were trained anew in the same folder.
    """
    return f"{model.weights}, step {model.step}, sha256:{tree_sha256(model.params)[:8]}"
