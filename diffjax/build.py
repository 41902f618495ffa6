"""The parts of the library that a configuration describes."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import optax

from diffjax import denoiser, loss, parameterization, schedule
from diffjax.config import (
    BETAS,
    SCHEDULES,
    Config,
    Data,
    config_from_dict,
    config_to_dict,
    dataclass_from_dict,
)
from diffjax.nn import registry
from diffjax.nn.conditioning import (
    Conditioning,
    WithGuidanceScale,
    conditioning_from_dict,
    conditioning_to_dict,
    difference,
    select,
)
from diffjax.parameterization import Parameterization


class ModelInfo(NamedTuple):
    """The description of a model, which is stored beside its weights."""

    config: Config
    x_shape: tuple[int, ...]  # of x, without the batch axis
    conditioning: Conditioning  # what samples are conditioned on
    # The weights of an import or of an average, not trained since, as "ema", "raw", "unknown" or
    # "average of 0.1"; "" for others.
    imported: str = ""
    autoencoder: str = ""  # checksum of the autoencoder of latents; "" for models of images

    def to_dict(self) -> dict[str, Any]:
        """The model's description for JSON."""
        return {
            "config": config_to_dict(self.config),
            "x_shape": list(self.x_shape),
            "conditioning": conditioning_to_dict(self.conditioning),
            "imported": self.imported,
            "autoencoder": self.autoencoder,
        }

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "ModelInfo":
        """The inverse of `to_dict`.

        Raises: ValueError for a description that is not of this version.
        """
        try:
            return ModelInfo(
                config_from_dict(values["config"]),
                tuple(values["x_shape"]),
                conditioning_from_dict(values["conditioning"]),
                values["imported"],
                values.get("autoencoder", ""),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"stored model description is of another version of diffjax ({error})"
            ) from error

    def describe_x(self) -> str:
        """The shape of x, as in "32x32x3"."""
        return "x".join(map(str, self.x_shape))


# ------------------------------------------------------------------------------- data


def load_data(config: Config) -> Any:
    """The data set, as a `data.dataset.Dataset`.

    Raises: ValueError or OSError for data that cannot be used.
    """
    # Imported here: sampling does not wait for libraries of data sets.
    from diffjax.data import arrays, dataset, folder, idx, latents, tfds

    data = config.data
    _check_known(data)
    if data.source == "tfds":
        images = tfds.load_tfds(data.name, data.dir, data.size)
    elif data.source == "latents":
        return latents.load_latents(Path(data.path or ""), flip=data.flip)
    elif data.source == "folder":
        images = folder.load_folder(
            Path(data.path or ""), data.size or 0, grey=data.grey, skip_damaged=data.skip_damaged
        )
    else:
        load = {"npz": arrays.load_npz, "idx": idx.load_idx}[data.source]
        images = load(Path(data.path or ""))
    return dataset.preprocess(images, data.size, data.pad, grey=data.grey)


def _check_known(data: Data) -> None:
    if not data.known:
        raise ValueError(
            f"data.name is {data.name}: the data of an imported network are unknown, so name them"
            " when it is converted"
        )


def model_info(config: Config, dataset: Any) -> ModelInfo:
    """The description of a model that is trained on a data set.

    Raises: ValueError for a condition that the data has not.
    """
    conditioning = select(dataset.fields, config.data.conditions)
    return ModelInfo(config, dataset.image_shape, conditioning, autoencoder=dataset.autoencoder)


def image_config(config: Config) -> Config:
    """The configuration with the images that its latents are of, if it has latents.

    Raises: ValueError for latents whose folder is not where it was.
    """
    from diffjax.data import latents

    if config.data.source != "latents":
        return config
    stored = latents.complete_manifest(Path(config.data.path or "")).data
    data = dataclass_from_dict(Data, stored)
    return replace(config, data=replace(data, conditions=config.data.conditions))


def check_conditions(info: ModelInfo, dataset: Any) -> None:
    """Check that a data set has the conditions of a model, and the same classes.

    Raises: ValueError, naming a class or a field that differs.
    """
    clause = difference(select(dataset.fields, info.config.data.conditions), info.conditioning)
    if clause:
        raise ValueError(f"{clause}: use the data that the model was trained on")


def describe_model(config: Config) -> ModelInfo:
    """The description of a configuration's model, without downloading its data.

    Raises: ValueError or OSError as `load_data` and `model_info`.
    """
    from diffjax.data import dataset, tfds

    data = config.data
    _check_known(data)
    if data.source != "tfds":
        return model_info(config, load_data(config))
    shape, fields = tfds.describe_tfds(data.name, data.dir, data.size)
    shape = dataset.preprocessed_shape(shape, None, data.pad, grey=data.grey)
    return ModelInfo(config, shape, select(fields, data.conditions))


# ------------------------------------------------------------------------------- process


def build_schedule(config: Config) -> schedule.Schedule:
    """The noise schedule.

    Raises: ValueError for too few levels: linear betas reach 1 at T = 20.
    """
    chosen = config.diffusion
    if chosen.betas:
        levels = BETAS[chosen.schedule](chosen.T, *chosen.betas)
    elif chosen.schedule == "flow":
        levels = SCHEDULES["flow"](chosen.T, chosen.shift)
    else:
        levels = SCHEDULES[chosen.schedule](chosen.T)
    return schedule.zero_terminal_snr(levels) if chosen.zero_terminal_snr else levels


def build_parameterization(config: Config) -> Parameterization:
    """The parameterization of the network, which the prediction decides."""
    chosen = config.diffusion
    if chosen.prediction == "flow":
        return parameterization.flow(chosen.time_scale)
    if chosen.prediction == "sit":
        return parameterization.sit()
    if chosen.prediction == "edm":
        return parameterization.edm(chosen.sigma_data)
    return parameterization.ddpm(chosen.prediction)


def build_weighting(config: Config) -> loss.Weighting:
    """The loss weighting over noise levels."""
    if config.train.weighting == "edm":
        return functools.partial(loss.edm, sigma_data=config.diffusion.sigma_data)
    return loss.WEIGHTINGS[config.train.weighting]


def build_times(config: Config) -> loss.TimeSampling:
    """The sampling of noise levels for a batch."""
    train = config.train
    times = {
        "uniform": loss.uniform,
        "stratified": functools.partial(loss.stratified, batch=train.batch),
        "antithetic": loss.antithetic,
        "log_normal": functools.partial(
            loss.log_normal, mean=train.times_mean, std=train.times_std
        ),
    }
    return times[train.times]


# ------------------------------------------------------------------------------- network


def network_conditioning(info: ModelInfo) -> Conditioning:
    """The conditioning of the network, with a guidance scale if it is distilled."""
    if info.config.distillation.guidance_conditioned:
        return WithGuidanceScale(info.conditioning)
    return info.conditioning


def build_module(info: ModelInfo) -> nn.Module:
    """The network's Flax module."""
    return info.config.network.build(info.x_shape, network_conditioning(info))


def build_network(info: ModelInfo, module: nn.Module) -> Callable[..., jax.Array]:
    """The module as a function (params, x, t, condition, keys) -> output.

    keys: for dropout, optional. A learned variance is dropped.
    """
    apply: Any = module.apply

    def network(params: Any, *inputs: Any) -> jax.Array:
        return apply({"params": params}, *inputs)

    learned_variance = info.config.network.learned_variance
    return denoiser.drop_learned_variance(network) if learned_variance else network


def init_params(info: ModelInfo, module: nn.Module, key: jax.Array) -> Any:
    """Initial parameters of the model's module.

    Raises: ValueError for x of a shape that the network cannot take.
    """
    return registry.init_params(module, info.x_shape, network_conditioning(info), key)


def abstract_params(info: ModelInfo, module: nn.Module) -> Any:
    """The shapes and dtypes of the parameters, which take no memory.

    Raises: ValueError as `init_params`.
    """
    return registry.abstract_params(module, info.x_shape, network_conditioning(info))


def count_parameters(params: Any) -> int:
    """The number of numbers in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


# ------------------------------------------------------------------------------- optimizer


def build_optimizer(config: Config) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW behind a clip of the gradient's norm, and its learning rate by step."""
    train = config.train
    warmup = min(train.warmup, train.steps)
    if train.decay == "cosine":
        decay_steps = max(1, train.steps - warmup)
        rate = optax.cosine_decay_schedule(train.learning_rate, decay_steps)
    else:
        rate = optax.constant_schedule(train.learning_rate)
    if warmup:
        ramp = optax.linear_schedule(0.0, train.learning_rate, warmup)
        rate = optax.join_schedules([ramp, rate], [warmup])
    adamw = optax.adamw(rate, weight_decay=train.weight_decay)
    return optax.chain(optax.clip_by_global_norm(train.clip), adamw), rate
