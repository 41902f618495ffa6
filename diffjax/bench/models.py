"""The models that are measured.

Their parameters are random, which does not change their cost.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffjax.build import (
    ModelInfo,
    build_module,
    build_network,
    build_parameterization,
    build_schedule,
    init_params,
)
from diffjax.config import load_config
from diffjax.denoiser import Condition, Denoiser, Network, condition_on, from_network
from diffjax.nn.conditioning import UNCONDITIONAL, ClassLabel, Conditioning
from diffjax.parameterization import Parameterization
from diffjax.schedule import Schedule

INPUTS: dict[str, tuple[tuple[int, ...], Conditioning]] = {  # shape of x, and the conditioning
    "digits": ((8, 8, 1), ClassLabel(10)),
    "mnist_small": ((32, 32, 1), ClassLabel(10)),
    "cifar10": ((32, 32, 3), UNCONDITIONAL),
}


class BenchModel(NamedTuple):
    """A model that is measured."""

    name: str  # of its configuration
    info: ModelInfo
    network: Network
    params: object
    schedule: Schedule
    parameterization: Parameterization

    def condition(self, batch: int) -> Condition:
        """Conditions of all kinds, a pytree [batch, ...]; None for an unconditional model."""
        return jax.tree.map(jnp.asarray, self.info.conditioning.spread(batch))

    def x(self, batch: int) -> Array:
        """Noise, float32 [batch, ...]."""
        noise = np.random.default_rng(0).normal(size=(batch, *self.info.x_shape))
        return jnp.asarray(noise, jnp.float32)

    def denoiser(self, params: object, condition: Condition) -> Denoiser:
        """The denoiser for a condition [B, ...], which is not guided or clipped."""
        return condition_on(from_network(self.network, params, self.parameterization), condition)


def bench_model(name: str, dtype: Literal["float32", "bfloat16"] | None = None) -> BenchModel:
    """The model of a configuration, which computes in `dtype` if one is given.

    A little noise is added to its initial parameters: layers that start at zero would stay zero.
    """
    config = load_config(name)
    if dtype is not None:
        network = dataclasses.replace(config.network, dtype=dtype)
        config = dataclasses.replace(config, network=network)
    info = ModelInfo(config, *INPUTS[name])
    module, r = build_module(info), np.random.default_rng(0)
    params = init_params(info, module, jax.random.key(0))
    params = jax.tree.map(
        lambda leaf: leaf + 0.02 * jnp.asarray(r.normal(size=leaf.shape), leaf.dtype), params
    )
    return BenchModel(
        name=name,
        info=info,
        network=build_network(info, module),
        params=params,
        schedule=build_schedule(config),
        parameterization=build_parameterization(config),
    )
