"""The cost of a configuration's programs, compiled for any devices.

The devices need not be here, since nothing runs. The train step and the DDIM sampler are the
very functions that training and sampling compile. For TPUs libtpu is the compiler, on any Linux
machine. This proves that they compile, fit into memory and communicate as they should, not how fast
they will be.
"""

import importlib.util
import math
import os
import re
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from diffjax import sampler, schedule
from diffjax.bench.loops import NO_PRODUCTS, Products, uncounted
from diffjax.build import (
    ModelInfo,
    abstract_params,
    build_module,
    build_network,
    build_parameterization,
    build_schedule,
    count_parameters,
    network_conditioning,
)
from diffjax.config import Config
from diffjax.data.codec import PIXELS
from diffjax.devices import parallel
from diffjax.evaluation.results import cells_markdown
from diffjax.inference.guidance import can_be_guided
from diffjax.inference.pipeline import Pipeline
from diffjax.training.setup import build_training

GIB = 2**30
STEPS = 50  # of DDIM
# Without these libtpu asks the machine which TPU it has; and another process may use it meanwhile.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
BITS = {"pred": 8, "bf16": 16} | {f"{kind}{n}": n for kind in "suf" for n in (8, 16, 32, 64)}
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Chip(NamedTuple):
    """A generation of TPUs, as its maker describes it (cloud.google.com/tpu/docs).

    The two cores of v2, v3 and v4 are devices of their own, and share the memory of the chip.
    """

    kind: str  # of its devices in JAX
    memory: int  # GiB of a chip
    dimensions: int  # of a topology
    largest: int  # chips of a pod


CHIPS = {
    "v2": Chip("TPU v2", 16, 2, 256),
    "v3": Chip("TPU v3", 32, 2, 1024),
    "v4": Chip("TPU v4", 32, 3, 4096),
    "v5e": Chip("TPU v5 lite", 16, 2, 256),
    "v5p": Chip("TPU v5", 95, 3, 8960),
    "v6e": Chip("TPU v6 lite", 32, 2, 256),
}


class Collective(NamedTuple):
    """The collectives of one kind in one call of a program."""

    kind: str
    count: int
    bytes: int  # of results, on each device


class Cost(NamedTuple):
    """The cost of a compiled program for each device, per call."""

    flops: float
    bytes: float  # read and written
    peak: float  # bytes of memory in use at most, with arguments and the program itself
    memory_limit: float  # bytes of memory of a device; NaN where it is not known
    collectives: tuple[Collective, ...]
    seconds: float  # to compile
    out_of_memory: bool = False  # the compiler refused it: the rest but peak and limit is unknown

    @property
    def fits(self) -> bool | None:
        """True if it fits into the memory of a device; None where that is not known."""
        if self.out_of_memory:
            return False
        if math.isnan(self.peak) or math.isnan(self.memory_limit):
            return None
        return self.peak <= self.memory_limit


# ------------------------------------------------------------------------------- devices


def check_target(target: str) -> None:
    """Check a target before the compiler sees it, which some topologies abort.

    Raises: ValueError for a topology that chips of this kind have not, or where there is no libtpu.
    """
    if target == "cpu":
        return
    example = "use cpu, or TPUs as in v5e:2x2"
    if not target.strip():
        raise ValueError(f"target is {target!r}: {example}")
    name, _, shape = target.partition(":")
    sizes = re.fullmatch(r"(\d+(?:x\d+)*)(?:_twisted|_untwisted)?", shape)
    lengths = [int(size) for size in sizes[1].split("x")] if sizes else []
    if name in CHIPS:
        chip, count = CHIPS[name], math.prod(lengths)
        if not 2 <= len(lengths) <= chip.dimensions:
            shape = "x".join(["2"] * chip.dimensions)
            raise ValueError(
                f"target is {target!r}: use cpu, or {name} with {chip.dimensions} dimensions, as in"
                f" {name}:{shape}"
            )
        if not 1 <= count <= chip.largest:
            raise ValueError(
                f"target is {target!r}, which has {count} chips: {name} has 1 to {chip.largest}"
            )
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"target is {target}, which needs libtpu, Google's compiler for TPUs: use cpu, or"
            " install 'diffjax[pod]' into an environment of its own"
        )


def find_devices(target: str) -> list[jax.Device]:
    """The devices of this machine for "cpu", else of a TPU topology as "v5e:2x2".

    Those of a host are side by side.

    Raises: ValueError for a topology that libtpu does not know, or where there is no libtpu.
    """
    check_target(target)
    if target == "cpu":
        return jax.devices("cpu")
    os.environ.update(ENVIRONMENT)
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=target)
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"target is {target!r}: use cpu, or TPUs as in v5e:2x2 or v5e:16x16 ({reason})"
        ) from error
    return sorted(topology.devices, key=lambda device: (device.process_index, device.id))


def memory_limit(device: jax.Device, count: int) -> float:
    """Bytes of memory of a device; NaN where it is not known.

    count: devices that share a memory, as `sharing` counts them.
    """
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / count
    memories = {chip.kind: chip.memory for chip in CHIPS.values()}
    return GIB * memories.get(device.device_kind, math.nan) / count


def sharing(devices: Sequence[Any]) -> int:
    """The number of devices that share a memory: a machine's CPUs, or a chip's cores."""
    if devices[0].platform == "cpu":
        return len(devices)
    return sum(device.coords == devices[0].coords for device in devices)


# ------------------------------------------------------------------------------- programs


def lower_step(info: ModelInfo, mesh: Mesh) -> Any:
    """Lower the train step over a mesh, for shapes alone.

    Raises: ValueError for a batch that devices cannot share equally.
    """
    train = info.config.train
    parallel.check_divisible(train.batch, mesh.size, "train.batch", train.accumulate)
    training = build_training(info)
    state = jax.eval_shape(training.init, jax.random.key(0))
    step = parallel.parallelize(mesh, train.parallel, training.step, axis=1, donate=True)
    return step.lower(state, _batches(info, mesh))


def _batches(info: ModelInfo, mesh: Mesh) -> dict[str, Any]:
    """The shapes of batches [1, B, ...], in the form that the step takes."""
    train = info.config.train
    pmapped = train.parallel == "pmap"
    return _batch_shapes(
        info, *((mesh.size, train.batch // mesh.size) if pmapped else (train.batch,))
    )


def _batch_shapes(info: ModelInfo, *shares: int) -> dict[str, Any]:
    """The shapes of one batch, [1, *shares, ...]."""

    def share(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *shares, *leaf.shape[1:]), leaf.dtype)

    batch = {"x": jnp.zeros((1, *info.x_shape)), "index": jnp.zeros(1, jnp.uint32)}
    if info.conditioning.is_conditional:
        batch["condition"] = info.conditioning.zeros(1)
    return jax.tree.map(share, batch)


def lower_sampler(info: ModelInfo, mesh: Mesh) -> Any:
    """Lower ten rows of DDIM over a mesh, for as many samples as a training batch has.

    It is guided if the model can be.
    """
    config, module = info.config, build_module(info)
    levels = build_schedule(config)
    plan = sampler.ddim(levels, schedule.trailing(levels, min(STEPS, schedule.length(levels))))
    pipeline = Pipeline(
        info, build_network(info, module), build_parameterization(config), PIXELS, mesh
    )
    rows, *_ = sampler.segments(plan, jnp.float32)
    params = abstract_params(info, module)
    return pipeline.lower(params, rows, config.train.batch, guided=can_be_guided(info))


def uncounted_of_step(info: ModelInfo, devices: int) -> Products:
    """The products of a device's train step in loops within its network."""
    train, training = info.config.train, build_training(info)
    state = jax.eval_shape(training.init, jax.random.key(0))
    batches = _batch_shapes(info, train.batch // devices)
    return uncounted(training.step, state, batches, loops=train.accumulate)


def uncounted_of_sampler(info: ModelInfo, devices: int) -> Products:
    """The products of a row of a device's sampler in loops within its network."""
    module = build_module(info)
    batch = info.config.train.batch // devices * (2 if can_be_guided(info) else 1)
    x = jax.ShapeDtypeStruct((batch, *info.x_shape), jnp.float32)
    condition = network_conditioning(info).zeros(batch)
    params = abstract_params(info, module)
    return uncounted(build_network(info, module), params, x, jnp.zeros(batch), condition)


# ------------------------------------------------------------------------------- cost


def compile_cost(
    lowered: Any, memory_limit: float, loops: int = 1, beside: Products = NO_PRODUCTS
) -> Cost:
    """Compile a lowered program, and read its cost.

    loops: the times that its loop runs, since XLA counts the body of a loop once. beside: the
    products of loops within it, as `uncounted` finds them.
    """
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed, limit = parse_oom(str(error))
        seconds = time.perf_counter() - began
        limit = min(memory_limit, limit)
        return Cost(math.nan, math.nan, needed, limit, (), seconds, out_of_memory=True)
    seconds = time.perf_counter() - began
    counted, memory = compiled.cost_analysis(), compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Cost(
        flops=loops * counted["flops"] + beside.flops,
        bytes=loops * counted["bytes accessed"] + beside.bytes,
        peak=held + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        memory_limit=memory_limit,
        collectives=find_collectives(compiled.as_text()),
        seconds=seconds,
    )


def find_collectives(hlo: str) -> tuple[Collective, ...]:
    """The collectives in the text of a compiled program, by kind.

    One that starts and ends apart counts once.
    """
    sizes: dict[str, list[int]] = {}
    pattern = rf"= (\(.*?\)|\S+) ({'|'.join(COLLECTIVES)})(-start)?\("
    for shape, kind, start in re.findall(pattern, hlo):
        arrays = [
            BITS.get(dtype, 32) // 8 * math.prod(int(size or 1) for size in lengths.split(","))
            for dtype, lengths in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape)
        ]
        # What starts an all-reduce has its results; others have their arguments, then results.
        if start and kind != "all-reduce":
            arrays = arrays[len(arrays) // 2 :]
        sizes.setdefault(kind, []).append(sum(arrays))
    return tuple(
        Collective(kind, len(sizes[kind]), sum(sizes[kind]))
        for kind in COLLECTIVES
        if kind in sizes
    )


def parse_oom(message: str) -> tuple[float, float]:
    """Bytes that a program needs, and that there are, in the compiler's error message.

    NaN where the message has none.
    """
    size = r"([\d.]+)([KMGT]?)"
    for pattern in (rf"Used {size} of {size}", rf"\({size}\) exceeds available HBM \({size}\)"):
        if match := re.search(pattern, message):
            needed, needed_unit, limit, limit_unit = match.groups()
            return float(needed) * UNITS[needed_unit], float(limit) * UNITS[limit_unit]
    return math.nan, math.nan


# ------------------------------------------------------------------------------- report


def report(info: ModelInfo, target: str) -> tuple[str, str]:
    """The cost of a model's programs as a table, and an error message.

    The message has what does not fit, and remedies; it is empty where everything fits.

    Raises: ValueError for a target that does not exist, or that cannot share the batch.
    """
    devices, config = find_devices(target), info.config
    mesh, limit = parallel.device_mesh(devices), memory_limit(devices[0], sharing(devices))
    lowered, count = lower_step(info, mesh), len(devices)
    step = compile_cost(lowered, limit, config.train.accumulate, uncounted_of_step(info, count))
    beside = uncounted_of_sampler(info, count)
    sampling = compile_cost(lower_sampler(info, mesh), limit, 1, beside)
    name = "guided DDIM" if can_be_guided(info) else "DDIM"
    table = _table(["each device", "train step", f"{name}, a row"], [step, sampling])
    head = _describe(info, target, devices, limit)
    return f"{head}\n\n{table}", _too_large(config, len(devices), name, step, sampling)


def _describe(info: ModelInfo, target: str, devices: Sequence[jax.Device], limit: float) -> str:
    config, batch = info.config, info.config.train.batch
    hosts = len({device.process_index for device in devices})
    parameters = count_parameters(abstract_params(info, build_module(info)))
    return (
        f"{target}: {len(devices)} x {devices[0].device_kind} of {hosts} host{'s' * (hosts > 1)},"
        f" {_gib(limit)} each\n{parameters:,} parameters, images {info.describe_x()}, batch {batch}"
        f" ({batch // len(devices)} a device), {config.network.dtype}, {config.train.parallel}"
    )


def _table(head: list[str], costs: list[Cost]) -> str:
    rows = [head, *(list(row) for row in zip(*map(_cells, costs), strict=True))]
    names = (
        "FLOPs", "bytes read and written", "peak memory", "collectives", "compiled in", "fits",
    )  # fmt: skip
    rows[1:] = [[name, *row] for name, row in zip(names, rows[1:], strict=True)]
    return cells_markdown(rows)


def _cells(cost: Cost) -> tuple[str, ...]:
    unknown = cost.out_of_memory
    collectives = ", ".join(map(format_collective, cost.collectives)) or "none"
    return (
        "?" if unknown else f"{cost.flops:.4g}",
        "?" if unknown else f"{cost.bytes:.4g}",
        f"{_gib(cost.peak)} of {_gib(cost.memory_limit)}",
        "?" if unknown else collectives,
        f"{cost.seconds:.0f} s",
        {True: "yes", False: "no", None: "unknown"}[cost.fits],
    )


def format_collective(collective: Collective) -> str:
    """A collective for reading, as in "2 all-reduce of 1,024 bytes"."""
    return f"{collective.count} {collective.kind} of {collective.bytes:,} bytes"


def _too_large(config: Config, devices: int, name: str, step: Cost, sampling: Cost) -> str:
    share = config.train.batch // devices // config.train.accumulate
    smaller = "a smaller batch of samples" if share > 1 else "a smaller network"
    programs = {
        "the train step": (step, _remedies(config, share, step)),
        name: (sampling, smaller),
    }
    return "; ".join(
        f"{what} does not fit: it needs {_gib(cost.peak)} of the {_gib(cost.memory_limit)} of a"
        f" device, {_gib(cost.peak - cost.memory_limit)} too much; {remedies} would help"
        for what, (cost, remedies) in programs.items()
        if cost.fits is False
    )


def _remedies(config: Config, share: int, step: Cost) -> str:
    # share: examples that a device takes at a time.
    remedies = [] if config.network.remat else ["network.remat"]
    if share > 1:
        # What is proportional to the share then fits, as most of it is; the state is not.
        divisors = (n for n in range(2, share) if share % n == 0)
        fits = partial(_fits_divided, step)
        parts = next(filter(fits, divisors), share)
        remedies += [
            f"train.accumulate {config.train.accumulate * parts}",
            f"train.batch {config.train.batch // parts}",
        ]
    return " or ".join(remedies) or "a smaller network"


def _fits_divided(step: Cost, parts: int) -> bool:
    return not parts * step.memory_limit < step.peak


def _gib(size: float) -> str:
    return "unknown" if math.isnan(size) else f"{size / GIB:.2f} GiB"
