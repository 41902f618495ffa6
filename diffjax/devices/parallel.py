"""Data parallelism: one step function on all devices, in three equivalent ways."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "data"
LARGEST_BATCH = 64  # default batch of images, at most
Mode = Literal["pmap", "shard_map", "jit"]


def device_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of one axis: the given devices, or all in order of their processes."""
    if devices is None:
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.asarray(devices), (AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of parameters and training states: a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The sharding of batches: `axis` is divided among the devices."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, AXIS))


def check_divisible(batch: int, devices: int, name: str = "batch", parts: int = 1) -> None:
    """Check that a batch divides into equal shares for the devices, each into `parts`.

    Raises: ValueError unless it does, naming `name`.
    """
    multiple = devices * parts
    if batch < 1 or batch % multiple:
        each = f" in {parts} parts each" if parts > 1 else ""
        raise ValueError(
            f"{name} is {batch}: {devices} devices{each} need a multiple of {multiple}"
        )


def round_up(number: int, devices: int) -> int:
    """The smallest multiple of the number of devices that is at least `number`."""
    return -(-number // devices) * devices


def default_batch(num: int) -> int:
    """The default batch: all `num` images up to LARGEST_BATCH, by `round_up`."""
    return round_up(min(num, LARGEST_BATCH), jax.device_count())


def parallelize(
    mesh: Mesh,
    mode: Mode,
    step: Callable[..., Any],
    *,
    axis: int = 0,
    donate: bool = False,
    extra_args: int = 0,
) -> Any:
    """Compile step(state, batch, *extra, axis_name) for all devices of a mesh.

    The result is called as (state, batch, *extra), and has `lower`. The state is replicated before
    and after; a batch is as `shard_batch` returns it, divided along `axis`. donate: reuse the
    memory of the input state; place the first one on `state_mesh`, where the step returns it.
    extra_args: number of replicated arguments after the batch, which the step only reads.

    "pmap" and "shard_map" run the step on each device's share, and the step averages all that it
    returns over AXIS: JAX does not check that. "jit" runs it once on the whole batch, and the
    compiler divides it.
    """
    donated = (0,) if donate else ()
    if mode == "pmap":
        # in_axes None and out_axes None keep the state's logical shape: no leading device axis.
        return jax.pmap(
            partial(step, axis_name=AXIS),
            axis_name=AXIS,
            in_axes=(None, axis, *extra_args * (None,)),
            out_axes=None,
            devices=list(mesh.devices.flat),
            donate_argnums=donated,
        )
    state, shares = replicated(mesh), batch_sharding(mesh, axis)
    placed = (state, shares, *extra_args * (state,))
    if mode == "shard_map":
        # With check_vma, gradients with respect to a replicated state come out summed, and the
        # step's mean of sums is then too large by the number of devices.
        step = jax.shard_map(
            partial(step, axis_name=AXIS),
            mesh=mesh,
            in_specs=tuple(each.spec for each in placed),
            out_specs=state.spec,
            check_vma=False,
        )
    return jax.jit(step, in_shardings=placed, out_shardings=state, donate_argnums=donated)


def process_slice(batch: Any, process_index: int, process_count: int) -> Any:
    """The rows of one process of a global batch [B, ...]: [B/process_count, ...]."""
    return jax.tree.map(lambda leaf: np.split(leaf, process_count)[process_index], batch)


def shard_batch(mesh: Mesh, mode: Mode, batch: Any, axis: int = 0) -> Any:
    """Place this process's rows of a batch as `parallelize` takes them.

    batch: [..., B/process_count, ...], the examples along `axis`.
    """
    if mode == "pmap":
        return jax.tree.map(partial(_split_axis, axis, len(mesh.local_devices)), batch)
    put = partial(jax.make_array_from_process_local_data, batch_sharding(mesh, axis))
    return jax.tree.map(put, batch)


def _split_axis(axis: int, devices: int, leaf: Any) -> Any:
    return leaf.reshape(*leaf.shape[:axis], devices, -1, *leaf.shape[axis + 1 :])


def state_mesh(mesh: Mesh, mode: Mode) -> Mesh:
    """The mesh of the train state: all devices, or this process's under pmap."""
    return device_mesh(mesh.local_devices) if mode == "pmap" else mesh


def on_mesh(mesh: Mesh, tree: Any) -> Any:
    """View replicated arrays on another mesh, without a copy.

    The mesh is global for checkpoints, and local for pmap.
    """
    return jax.tree.map(partial(_view, replicated(mesh)), tree)


def _view(sharding: NamedSharding, leaf: jax.Array) -> jax.Array:
    copies = [shard.data for shard in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, copies)


class BatchMapper:
    """A function of examples, compiled once and computed in batches on all devices.

        mapper = BatchMapper(function, params, batch=64)
        features = mapper((images,))

    function(params, *arrays) maps arrays [B, ...] to a pytree of arrays [B, ...], row by row.
    """

    def __init__(
        self, function: Callable[..., Any], params: Any, batch: int, mesh: Mesh | None = None
    ) -> None:
        """Place the parameters on all devices of the mesh.

        batch: largest batch over all devices; rounded up to a multiple of them.
        mesh: None for the devices of this process.
        """
        self._mesh = device_mesh(jax.local_devices()) if mesh is None else mesh
        self._batch = batch
        whole, self._shares = replicated(self._mesh), batch_sharding(self._mesh)
        self._params = jax.device_put(params, whole)
        self._compiled = jax.jit(
            jax.shard_map(
                lambda params, arrays: function(params, *arrays),
                mesh=self._mesh,
                in_specs=(whole.spec, self._shares.spec),
                out_specs=self._shares.spec,
                check_vma=False,
            )
        )

    def batch_of(self, num: int) -> int:
        """The batch that `num` examples are computed in: no larger than they need."""
        return round_up(min(self._batch, num), self._mesh.size)

    def num_batches(self, num: int) -> int:
        """The number of batches for `num` examples."""
        return -(-num // self.batch_of(num))

    def __call__(
        self, arrays: tuple[Any, ...], progress: Callable[[int], object] = lambda n: None
    ) -> Any:
        """The function's values for all examples, a pytree of numpy arrays [N, ...].

        arrays: pytrees of arrays [N, ...] with at least one example; the last batch is filled with
        examples from the start, whose values are dropped. progress: called as progress(1) after
        each batch, of which there are `num_batches(N)`.
        """
        num = len(jax.tree.leaves(arrays)[0])
        size, results = self.batch_of(num), []
        for first in range(0, num, size):
            index = np.arange(first, first + size) % num
            rows = jax.tree.map(lambda leaf, index=index: leaf[index], arrays)
            placed = jax.device_put(rows, self._shares)
            results.append(jax.device_get(self._compiled(self._params, placed)))
            progress(1)
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:num], *results)
