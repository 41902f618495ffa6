"""The networks that a configuration can name, by the dataclasses that build them.

A network of another package is found by its entry point: in the group `diffjax.networks`, the name
of the network and its config class, as in `mixer = "my_package.mixer:MixerConfig"`.
"""

import dataclasses
import importlib.metadata
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.nn.conditioning import Conditioning

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
GROUP = "diffjax.networks"


@dataclass(frozen=True)
class NetworkConfig:
    """Base class of network configurations: what all networks share.

    A subclass adds its own fields and builds the module, a Flax module that is called as
    (x [B, ...], t [B], condition, keys [B] for dropout or None) and returns float32 of the shape of
    x, or of twice its channels with `learned_variance`.
    """

    learned_variance: bool = False
    """Output a variance too (improved DDPM). It is dropped: plans use a fixed variance."""
    dropout: float = 0.0
    """Rate of dropout, from 0 up to but excluding 1."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the network's computation; parameters are float32."""
    remat: bool = False
    """Recompute activations for the gradient: less memory, about a third more time."""

    def check(self) -> None:
        """Check the values of the fields.

        Raises: ValueError, naming the field.
        """
        if not 0 <= self.dropout < 1:
            raise ValueError(f"network.dropout is {self.dropout}: use 0 or more, and less than 1")

    def build(self, x_shape: tuple[int, ...], conditioning: Conditioning) -> nn.Module:
        """The module for x of shape [B, *x_shape].

        Raises: ValueError for shapes that it cannot take, at once or when it is initialised.
        """
        raise NotImplementedError


# What may change between training and resuming, since the parameters are the same.
UNBOUND_FIELDS = ("dropout", "dtype", "remat", "scan", "kl_weight")
NETWORKS: dict[str, type[NetworkConfig]] = {}


def register(name: str, kind: type[NetworkConfig]) -> None:
    """Register a network's config class under the name that checkpoints store."""
    NETWORKS[name] = kind


def network_class(name: str) -> type[NetworkConfig]:
    """The config class of a network that is registered, or has an entry point.

    Raises: ValueError for a name that is neither.
    """
    if name not in NETWORKS:
        for entry in importlib.metadata.entry_points(group=GROUP, name=name):
            register(name, entry.load())
    if name not in NETWORKS:
        raise ValueError(
            f"network is {name!r}, which is not registered: use one of {', '.join(NETWORKS)}, or"
            f" install the package that provides it (entry point group {GROUP})"
        )
    return NETWORKS[name]


def network_name(config: NetworkConfig) -> str:
    """The name that a network's config class is registered under.

    Raises: ValueError for a class that is not registered.
    """
    for name, kind in NETWORKS.items():
        if type(config) is kind:
            return name
    for entry in importlib.metadata.entry_points(group=GROUP):
        if entry.load() is type(config):
            register(entry.name, type(config))
            return entry.name
    raise ValueError(
        f"network config {type(config).__name__} is not registered: call nn.registry.register, or"
        " use an entry point"
    )


def network_to_dict(config: NetworkConfig) -> dict[str, Any]:
    """A network's configuration for JSON, with its name as `kind`."""
    return {"kind": network_name(config), **dataclasses.asdict(config)}


def init_params(
    module: nn.Module, x_shape: tuple[int, ...], conditioning: Conditioning, key: jax.Array
) -> Any:
    """Initial parameters of a network's module.

    Raises: ValueError for x of a shape that the network cannot take.
    """
    inputs = jnp.zeros((1, *x_shape)), jnp.zeros(1), conditioning.zeros(1)
    return jax.jit(module.init)(key, *inputs)["params"]


def abstract_params(module: nn.Module, x_shape: tuple[int, ...], conditioning: Conditioning) -> Any:
    """The shapes and dtypes of a network's parameters, which take no memory.

    Raises: ValueError as `init_params`.
    """
    return jax.eval_shape(
        lambda key: init_params(module, x_shape, conditioning, key), jax.random.key(0)
    )
