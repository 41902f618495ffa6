"""A trained autoencoder, and the codec between images and its latents."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffjax.build import ModelInfo
from diffjax.checkpoint import latest_config, tree_sha256
from diffjax.data.codec import PIXELS, Codec
from diffjax.devices import parallel
from diffjax.inference.weights import load_weights
from diffjax.interop import autoencoder_kl, hub
from diffjax.interop.files import read_json
from diffjax.nn.autoencoder import Autoencoder, AutoencoderConfig, mode

BATCH = 16  # images at a time, on each device


class TrainedAutoencoder(NamedTuple):
    """A trained autoencoder, and where it is from."""

    config: AutoencoderConfig
    params: Any
    checksum: str  # of the parameters
    source: str  # as it was named
    weights: str = "unknown"  # as in `model.TrainedModel`
    step: int = 0
    info: ModelInfo | None = None  # of its own training; None for a published one

    @property
    def space(self) -> tuple[str, float, float]:
        """The space of its latents: checksum, scaling and shift."""
        return self.checksum, self.config.scaling, self.config.shift

    @property
    def image_channels(self) -> int:
        """The channels of images."""
        return self.params["encoder"]["in"]["kernel"].shape[2]


def load_autoencoder(
    source: str | Path, step: int | None = None, weights: str = "ema"
) -> TrainedAutoencoder:
    """Load the autoencoder of a run folder, or a published one.

    source: the run folder; "hf:FOLDER" or "hf:OWNER/NAME" for an AutoencoderKL of diffusers, or a
    pipeline that has one; or the path of a folder of AutoencoderKL. step, weights: of a run folder,
    as in `model.load_model`.

    Raises: FileNotFoundError where there is none; ValueError for a model of another kind, or one
    that cannot be read.
    """
    if _is_published(source):
        if step is not None or weights not in ("ema", "raw"):
            given = f"weights is {weights!r}" if step is None else f"checkpoint is {step}"
            raise ValueError(f"{given}, and {source} has one set of weights: leave it out")
        return published_autoencoder(*_load_published(source), source)
    found = load_weights(Path(source), step, weights)
    config = found.info.config.network
    if not isinstance(config, AutoencoderConfig):
        raise ValueError(f"{source} is no autoencoder, but a model of {found.info.config.data}")
    checksum, name = tree_sha256(found.params), str(source)
    return TrainedAutoencoder(
        config, found.params, checksum, name, found.weights, found.step, found.info
    )


def published_autoencoder(
    config: AutoencoderConfig, params: Any, source: str | Path
) -> TrainedAutoencoder:
    """The autoencoder that was read from a published folder."""
    return TrainedAutoencoder(config, params, tree_sha256(params), str(source))


def is_autoencoder(source: str | Path) -> bool:
    """Return whether a run folder or a published folder is an autoencoder's alone.

    Raises: FileNotFoundError or ValueError for a run folder without a readable checkpoint.
    """
    if _is_published(source):
        path = (hub.locate(source) if hub.is_source(source) else Path(source)) / "config.json"
        return path.is_file() and read_json(path).get("_class_name") == autoencoder_kl.CLASS
    return ModelInfo.from_dict(latest_config(Path(source))).config.is_autoencoder


def _is_published(source: str | Path) -> bool:
    return hub.is_source(source) or (Path(source) / "config.json").is_file()


def _load_published(source: str | Path) -> tuple[AutoencoderConfig, Any]:
    if not hub.is_source(source):
        return autoencoder_kl.load(Path(source))
    found = hub.load_autoencoder(hub.locate(source))
    if found is None:
        raise ValueError(f"{source} has no autoencoder: use one with an AutoencoderKL")
    return found


def save_autoencoder(folder: Path, autoencoder: TrainedAutoencoder) -> None:
    """Write an autoencoder as an AutoencoderKL folder, which `load_autoencoder` reads.

    Raises: ValueError for one that diffusers does not have; OSError for a folder that cannot be
    written.
    """
    autoencoder_kl.save(folder, autoencoder.config, jax.device_get(autoencoder.params))


def codec_of(autoencoder: TrainedAutoencoder | None) -> Codec:
    """The map between images and x: by an autoencoder, or the identity without one."""
    return PIXELS if autoencoder is None else autoencoder_codec(autoencoder)


def autoencoder_codec(autoencoder: TrainedAutoencoder, batch: int | None = None) -> Codec:
    """The map between images and scaled latents, on all devices of this process.

        x = (mean of latents - shift) * scaling,   images = decode(x/scaling + shift) in [-1, 1]

    It is compiled once per number of images, up to `batch` of them; None for BATCH on each device.
    Latents have no bounds.
    """
    mesh = parallel.device_mesh(jax.local_devices())
    params = jax.device_put(autoencoder.params, parallel.replicated(mesh))
    module = Autoencoder(autoencoder.config, autoencoder.image_channels)
    size = BATCH * mesh.size if batch is None else batch
    encoder, decoder = (
        parallel.BatchMapper(partial(function, module), params, size, mesh)
        for function in (_encode, _decode)
    )
    return Codec(partial(_map, encoder), partial(_map, decoder), None)


def _map(mapper: parallel.BatchMapper, values: np.ndarray) -> np.ndarray:
    return mapper((np.asarray(values, np.float32),))


def _encode(module: Autoencoder, params: Any, images: Array) -> Array:
    c = module.config
    moments: Any = module.apply({"params": params}, images, method="encode")
    return (mode(moments) - c.shift) * c.scaling


def _decode(module: Autoencoder, params: Any, x: Array) -> Array:
    c = module.config
    images: Any = module.apply({"params": params}, x / c.scaling + c.shift, method="decode")
    return jnp.clip(images, -1, 1)
