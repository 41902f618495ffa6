"""What trains the network of a configuration: functions of one device, to be compiled by `devices.parallel`."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from diffjax import loss, schedule
from diffjax.build import (
    build_network,
    build_optimizer,
    build_prediction,
    build_schedule,
    build_times,
    build_unet,
    build_weighting,
    init_params,
)
from diffjax.config import Config
from diffjax.nn.unet import UNet
from diffjax.training.step import TrainState, TrainStep, init_state, make_eval_step, make_train_step, multi_step


class Training(NamedTuple):
    """What trains a network."""

    unet: UNet
    network: Callable[..., jax.Array]  # as of build_network
    init: Callable[..., TrainState]  # key -> state before the first step
    step: TrainStep  # (state, batches [K, B, ...], axis_name=None) -> (state, metrics [K])
    eval_step: Callable[..., jax.Array]  # (params, batch [B, ...], axis_name=None) -> loss
    # Of a student (distill.build_training), init, step and eval_step take its teacher's parameters last.


def build_training(config: Config, image_shape: tuple[int, int, int], classes: int) -> Training:
    """The steps of one device, and the state that they start from, for images [H, W, C] and a number of classes, 0 for
    none: `parallel.parallelize` runs them on many. ValueError for parts that do not fit each other.
    """
    train, levels, prediction = config.train, build_schedule(config), build_prediction(config)
    unet, times = build_unet(config, image_shape, classes), build_times(config)
    network, (optimizer, rate) = build_network(config, unet), build_optimizer(config)
    weighting = build_weighting(config)
    objective = loss.denoising_loss(network, prediction, levels, weighting, times, classes, train.label_dropout)
    # The held-out loss is L_simple over independent levels whatever the weighting, so that runs compare.
    held_out = loss.denoising_loss(lambda *inputs: network(*inputs[:-1]), prediction, levels)
    step = make_train_step(
        objective, optimizer, train.ema, train.seed,
        accumulate=train.accumulate, rate=rate, quarters=loss.t_quartile(times, schedule.length(levels)),
    )  # fmt: skip

    def init(key: jax.Array) -> TrainState:
        return init_state(init_params(unet, image_shape, key), optimizer, len(train.ema))

    return Training(unet, network, init, multi_step(step), make_eval_step(held_out, train.seed))
