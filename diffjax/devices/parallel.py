"""Data parallelism: one step function over all devices, in three ways that compute the same."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "data"
LARGEST_BATCH = 64  # of images where nobody asked for a batch
Mode = Literal["pmap", "shard_map", "jit"]


@dataclass(frozen=True)
class DistributedOptions:
    """Options of a program that runs on several hosts."""

    distributed: str | None = None
    """Train on several hosts, with this command on each: auto on TPU pods and SLURM, else HOST:PORT of process 0."""
    processes: int | None = None
    """With HOST:PORT: how many there are."""
    process: int | None = None
    """With HOST:PORT: which one this is, from 0."""


def initialize_distributed(options: DistributedOptions) -> None:
    """Make one machine of the processes of several hosts, each of which calls this, before JAX looks for devices.
    Nothing is done where no address is told.

    "auto" is for where the surroundings tell: TPU pods, SLURM, Open MPI, Kubernetes. ValueError where they do not.
    """
    address, hosts, host = options.distributed, options.processes, options.process
    if address is None:
        if (hosts, host) != (None, None):
            raise ValueError("--processes and --process belong to --distributed: leave them out")
        return
    if address == "auto":
        if (hosts, host) != (None, None):
            raise ValueError("--distributed auto finds the processes itself: leave out --processes and --process")
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise ValueError(
                "--distributed auto finds neither a TPU pod nor SLURM, Open MPI or Kubernetes here: name the HOST:PORT"
                " of process 0, with --processes and --process"
            ) from error
        return
    if not re.fullmatch(r".+:\d+", address):
        raise ValueError(f"--distributed is {address!r}: write auto, or the HOST:PORT of process 0")
    if hosts is None or host is None or not 0 <= host < hosts:
        raise ValueError(
            f"--processes is {hosts} and --process is {host}: say how many there are, and which this is, from 0"
        )
    try:
        jax.distributed.initialize(address, hosts, host)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--distributed {address}: the processes did not find each other ({reason})") from error


def device_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices, those of a host side by side, or the given ones, in a row."""
    if devices is None:
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.asarray(devices), (AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device: parameters, training states."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """A share of one axis, the first if not told, on every device: batches."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, AXIS))


def check_divisible(batch: int, devices: int, name: str = "batch", parts: int = 1) -> None:
    """ValueError unless a batch can be shared out equally, and each share be taken in `parts`."""
    if batch < 1 or batch % (devices * parts):
        each = f", in {parts} parts each," if parts > 1 else ""
        of = devices * parts
        raise ValueError(
            f"{name} is {batch}, which {devices} devices{each} cannot share equally: use a multiple of {of}"
        )


def round_up(number: int, devices: int) -> int:
    """The smallest batch of at least `number` that can be shared out equally."""
    return -(-number // devices) * devices


def default_batch(num: int) -> int:
    """How many of `num` images to take at a time where nobody asked: all, up to LARGEST_BATCH, shared out equally over
    all devices.
    """
    return round_up(min(num, LARGEST_BATCH), jax.device_count())


def parallelize(
    mesh: Mesh, mode: Mode, step: Callable[..., Any], *, axis: int = 0, donate: bool = False, frozen: bool = False
) -> Any:
    """step(state, batch, axis_name) over the devices of a mesh, compiled when it is called, or by its `lower`.

    The state goes in and comes out whole, on every device; a batch is as `shard_batch` gives it, shared out along `axis`.
    donate: the state that comes out takes the memory of the one that went in; place the first one by `state_mesh`, as the
    step returns it. frozen: after the batch the step takes what it only reads, whole on every device like the state.

    "pmap" and "shard_map" run the step on each device's share, and the step averages all that it returns over AXIS:
    JAX does not check that. "jit" runs it once, on the whole batch, and leaves the sharing out to the compiler.
    """
    donated, read = (0,) if donate else (), 1 if frozen else 0
    if mode == "pmap":
        # in_axes None and out_axes None keep the state's logical shape: no leading device axis.
        return jax.pmap(
            partial(step, axis_name=AXIS), axis_name=AXIS, in_axes=(None, axis, *read * (None,)), out_axes=None,
            devices=list(mesh.devices.flat), donate_argnums=donated,
        )  # fmt: skip
    state, shares = replicated(mesh), batch_sharding(mesh, axis)
    placed = (state, shares, *read * (state,))
    if mode == "shard_map":
        # With check_vma, gradients of a state that is the same everywhere come out summed, and the step's mean of sums
        # is then too large by the number of devices.
        step = jax.shard_map(
            partial(step, axis_name=AXIS), mesh=mesh, in_specs=tuple(each.spec for each in placed),
            out_specs=state.spec, check_vma=False,
        )  # fmt: skip
    return jax.jit(step, in_shardings=placed, out_shardings=state, donate_argnums=donated)


def process_slice(batch: Any, host: int, hosts: int) -> Any:
    """A host's rows of a whole batch [B, ...]: [B/hosts, ...]."""
    return jax.tree.map(lambda leaf: np.split(leaf, hosts)[host], batch)


def shard_batch(mesh: Mesh, mode: Mode, batch: Any, axis: int = 0) -> Any:
    """The rows of a host of a batch, [..., B/hosts, ...] with the examples along `axis`, as `parallelize` takes them."""
    devices = len(mesh.local_devices)
    if mode == "pmap":
        shape = lambda leaf: (*leaf.shape[:axis], devices, -1, *leaf.shape[axis + 1 :])  # noqa: E731
        return jax.tree.map(lambda leaf: leaf.reshape(shape(leaf)), batch)
    put = partial(jax.make_array_from_process_local_data, batch_sharding(mesh, axis))
    return jax.tree.map(put, batch)


def state_mesh(mesh: Mesh, mode: Mode) -> Mesh:
    """Where `parallelize` keeps the state, whole: all devices, or, under pmap, those of this host, which is all it sees."""
    return device_mesh(mesh.local_devices) if mode == "pmap" else mesh


def on_mesh(mesh: Mesh, tree: Any) -> Any:
    """The same copies of arrays that are whole on every device, seen as arrays over the devices of this mesh: of all
    hosts, as checkpoints take them, or of this one alone. Nothing is copied.
    """

    def seen(leaf: jax.Array) -> jax.Array:
        copies = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, replicated(mesh), copies)

    return jax.tree.map(seen, tree)
