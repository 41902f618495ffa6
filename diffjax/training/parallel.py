"""Data parallelism: one step function over all devices."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "data"


def device_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices, or the given ones, in a row."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices), (AXIS,))


def whole(mesh: Mesh) -> NamedSharding:
    """A copy on every device: parameters, training states."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """A share of the first axis on every device: batches."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def check_divisible(batch: int, devices: int, name: str = "batch") -> None:
    """ValueError unless a batch can be shared out equally."""
    if batch < 1 or batch % devices:
        raise ValueError(
            f"{name} is {batch}, which {devices} devices cannot share equally: use a multiple of {devices}"
        )


def round_up(number: int, devices: int) -> int:
    """The smallest batch of at least `number` that can be shared out equally."""
    return -(-number // devices) * devices


def shard(batch: Any, devices: int) -> Any:
    """[B, ...] -> [devices, B/devices, ...] on every leaf, as `pmap` takes it."""
    return jax.tree.map(lambda leaf: leaf.reshape(devices, -1, *leaf.shape[1:]), batch)


def pmap(
    step: Callable[..., Any], devices: Sequence[jax.Device] | None = None, donate: bool = False
) -> Callable[..., Any]:
    """step(state, batch, axis_name) over devices: the state goes in and comes out whole, batches as `shard` gives them.

    in_axes=(None, 0) and out_axes=None keep the state's logical shape: no leading device axis, and checkpoints that do
    not know how many devices there were. JAX does not check that what comes out is the same on all devices: the step
    averages everything that it returns over AXIS. Place the first state by `whole`, as the step returns it: otherwise
    the second call compiles again.
    """
    donated = (0,) if donate else ()
    return jax.pmap(
        partial(step, axis_name=AXIS), axis_name=AXIS, in_axes=(None, 0), out_axes=None,
        devices=devices, donate_argnums=donated,
    )  # fmt: skip
