"""The parts of the library that a configuration describes: plain modules, functions and tables."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffjax import denoiser, loss, process, schedule
from diffjax.config import BETAS, DTYPES, SCHEDULES, Config
from diffjax.nn.unet import UNet


def load_data(config: Config) -> Any:
    """The images, as a `training.sources.Dataset`. ValueError or OSError for data that cannot be used."""
    from diffjax.data import dataset

    data = config.data
    if data.source == "tfds":
        found = dataset.load_tfds(data.name, data.dir, data.size)
    elif data.source == "folder":
        found = dataset.load_folder(Path(data.path or ""), data.size or 0, grey=data.grey)
    else:
        found = dataset.load_npz(Path(data.path or ""))
    if data.labels and not found.classes:
        raise ValueError(f"{data} has no class labels: train with --data.no-labels")
    return dataset.preprocess(found, data.size, data.pad, grey=data.grey)


def describe_data(config: Config) -> tuple[tuple[int, int, int], int]:
    """The shape of the images, and the number of classes that the network is told of, 0 for none. Nothing is downloaded
    for it. ValueError or OSError as of `load_data`.
    """
    from diffjax.data import dataset

    data = config.data
    if data.source != "tfds":
        found = load_data(config)
        return found.image_shape, found.classes if data.labels else 0
    shape, classes = dataset.describe_tfds(data.name, data.dir, data.size)
    if data.labels and not classes:
        raise ValueError(f"{data} has no class labels: train with --data.no-labels")
    return dataset.preprocessed_shape(shape, None, data.pad, grey=data.grey), classes if data.labels else 0


def build_schedule(config: Config) -> schedule.Schedule:
    """The noise schedule. ValueError for too few levels: linear betas reach 1 at T = 20."""
    chosen = config.diffusion
    usual = SCHEDULES[chosen.schedule]
    levels = BETAS[chosen.schedule](chosen.T, *chosen.betas) if chosen.betas else usual(chosen.T)
    return schedule.zero_terminal_snr(levels) if chosen.zero_terminal_snr else levels


def build_prediction(config: Config) -> process.Prediction:
    """What the network says."""
    return process.PREDICTIONS[config.diffusion.prediction]


def build_weighting(config: Config) -> loss.Weighting:
    """What the squared error counts at each level."""
    return loss.WEIGHTINGS[config.train.weighting]


def build_times(config: Config) -> loss.TimeSampling:
    """How a batch draws its levels. ValueError for antithetic pairs in an odd batch."""
    if config.train.times == "antithetic" and config.train.batch % 2:
        raise ValueError(f"train.batch is {config.train.batch}: antithetic levels come in pairs, use an even number")
    stratified = functools.partial(loss.stratified, batch=config.train.batch)
    return {"uniform": loss.uniform, "stratified": stratified, "antithetic": loss.antithetic}[config.train.times]


def build_unet(config: Config, image_shape: tuple[int, int, int], classes: int) -> UNet:
    """The network, for images of a shape [H, W, C] and a number of classes, 0 for none."""
    options: dict[str, Any] = dataclasses.asdict(config.network) | {"dtype": DTYPES[config.network.dtype]}
    says = image_shape[-1] * (2 if options.pop("learned_variance") else 1)
    told = config.distillation.told  # the scale, beside the label
    return UNet(**options, out_channels=says, num_classes=classes, condition_width=int(told))


def build_network(config: Config, unet: UNet) -> Callable[..., jax.Array]:
    """The UNet as a plain function (params, x, t, condition) -> output, or with keys for dropout after them. A variance
    that it has learned is dropped.
    """
    apply: Any = unet.apply

    def network(params: Any, *inputs: Any) -> jax.Array:
        return apply({"params": params}, *inputs)

    return denoiser.drop_learned_variance(network) if config.network.learned_variance else network


def init_params(unet: UNet, image_shape: tuple[int, int, int], key: jax.Array) -> Any:
    """Fresh parameters. ValueError for images that the network cannot take."""
    label = jnp.zeros(1, jnp.int32) if unet.num_classes else None
    numbers = jnp.zeros((1, unet.condition_width)) if unet.condition_width else None
    condition = (label, numbers) if unet.num_classes and unet.condition_width else label if numbers is None else numbers
    return jax.jit(unet.init)(key, jnp.zeros((1, *image_shape)), jnp.zeros(1), condition)["params"]


def params_like(unet: UNet, image_shape: tuple[int, int, int]) -> Any:
    """The shapes and types of its parameters, which take no memory. ValueError as of `init_params`."""
    return jax.eval_shape(lambda key: init_params(unet, image_shape, key), jax.random.key(0))


def build_optimizer(config: Config) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW behind a clip of the gradient's norm, and its learning rate by step."""
    train = config.train
    warmup = min(train.warmup, train.steps)
    rate = optax.linear_schedule(0.0, train.learning_rate, warmup) if warmup else None
    then = (
        optax.cosine_decay_schedule(train.learning_rate, max(1, train.steps - warmup))
        if train.decay == "cosine"
        else optax.constant_schedule(train.learning_rate)
    )
    rate = optax.join_schedules([rate, then], [warmup]) if rate else then
    adamw = optax.adamw(rate, weight_decay=train.weight_decay)
    return optax.chain(optax.clip_by_global_norm(train.clip), adamw), rate
