"""The programs of a configuration compiled for devices that need not be here, and what they will cost; nothing runs.

The train step and the guided DDIM sampler are the very functions that train.py and sample.py compile. For TPUs libtpu
is the compiler, on any Linux machine. This proves that they compile, fit, and speak to each other as they should; not
how fast they will be.
"""

import importlib.util
import os
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from diffjax import sampler, schedule
from diffjax.build import build_network, build_prediction, build_schedule, build_unet, params_like
from diffjax.config import Config
from diffjax.devices import parallel
from diffjax.inference.pipeline import Pipeline
from diffjax.training.setup import build_training

GIB = 2**30
MEMORY = {"TPU v3": 16, "TPU v5 lite": 16, "TPU v5": 95, "TPU v6 lite": 32}  # GiB of a device, as its maker says
STEPS = 50  # of DDIM
# libtpu asks the machine that it is on which TPU it has, unless told; and another process may use it meanwhile.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
BITS = {"pred": 8, "bf16": 16} | {f"{kind}{n}": n for kind in "suf" for n in (8, 16, 32, 64)}


class Collective(NamedTuple):
    """What devices send each other in one call of a program."""

    kind: str
    count: int
    bytes: int  # of results, on each device


class Cost(NamedTuple):
    """What a compiled program costs each device, per call."""

    flops: float
    bytes: float  # read and written
    peak: float  # bytes of memory in use at most, arguments and the program itself among them
    room: float  # bytes of memory that there are; not a number where that is not known
    collectives: tuple[Collective, ...]
    seconds: float  # to compile
    refused: bool = False  # by the compiler, for its memory: all but peak and room is then unknown

    @property
    def fits(self) -> bool:
        """Into the memory of a device, as far as it is known."""
        return not self.refused and not self.peak > self.room


def devices(target: str) -> list[jax.Device]:
    """Those of this machine for "cpu", else of a TPU topology as in "v5e:2x2", those of a host side by side.
    ValueError for a topology that libtpu does not know, or where there is no libtpu.
    """
    if target == "cpu":
        return jax.devices("cpu")
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"--dry-run {target} needs libtpu, Google's compiler for TPUs: pip install 'diffjax[pod]' into an"
            " environment of its own, or take --dry-run cpu"
        )
    os.environ.update(ENVIRONMENT)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=target).devices
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--dry-run is {target!r}: use cpu, or TPUs as in v5e:2x2 or v5e:16x16 ({reason})") from error
    return sorted(found, key=lambda device: (device.process_index, device.id))


def room(device: jax.Device, number: int) -> float:
    """Bytes of memory of a device; for `number` devices that are one machine, its share of the machine's."""
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / number
    return GIB * MEMORY.get(device.device_kind, float("nan"))


def lower_step(config: Config, image_shape: tuple[int, int, int], classes: int, mesh: Mesh) -> Any:
    """train.py's step over a mesh, for shapes alone. ValueError for a batch that it cannot share equally."""
    mode, batch = config.train.parallel, config.train.batch
    parallel.check_divisible(batch, mesh.size, "train.batch", config.train.accumulate)
    training = build_training(config, image_shape, classes)
    state = jax.eval_shape(training.init, jax.random.key(0))
    shares = (mesh.size, batch // mesh.size) if mode == "pmap" else (batch,)

    def of(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *shares, *shape), dtype)

    batches = {"image": of(image_shape, jnp.float32), "index": of((), jnp.uint32)}
    batches |= {"label": of((), jnp.int32)} if classes else {}
    return parallel.parallelize(mesh, mode, training.step, axis=1, donate=True).lower(state, batches)


def lower_sampler(config: Config, image_shape: tuple[int, int, int], classes: int, mesh: Mesh) -> Any:
    """sample.py's program over a mesh: ten rows of DDIM, guided where there are classes, for as many images as a
    training batch has.
    """
    unet = build_unet(config, image_shape, classes)
    levels = build_schedule(config)
    plan = sampler.ddim(levels, schedule.trailing(levels, min(STEPS, schedule.length(levels))))
    generate = Pipeline(build_network(config, unet), build_prediction(config), image_shape, classes, mesh)
    params = params_like(unet, image_shape)
    rows = next(rows for rows in sampler.segments(plan, jnp.float32))
    return generate.lower(params, rows, config.train.batch, guided=is_guided(config, classes))


def is_guided(config: Config, classes: int) -> bool:
    """Whether a network can be guided."""
    return classes > 0 and config.train.label_dropout > 0


def cost(lowered: Any, room: float, times: int = 1) -> Cost:
    """Compile a lowered program, and read off what it costs. times: how often its loop runs, since XLA counts what is
    in a loop once.
    """
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needs, has = memory_of_refusal(str(error))
        nan = float("nan")
        return Cost(nan, nan, needs, min(room, has), (), time.perf_counter() - began, refused=True)
    seconds = time.perf_counter() - began
    counted, memory = compiled.cost_analysis(), compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = held + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    return Cost(
        times * counted["flops"], times * counted["bytes accessed"], peak, room,
        collectives(compiled.as_text()), seconds,
    )  # fmt: skip


def collectives(hlo: str) -> tuple[Collective, ...]:
    """Those in the text of a compiled program, by kind; one that starts and ends apart counts once."""
    found: dict[str, list[int]] = {}
    for shape, kind, start in re.findall(rf"= (\(.*?\)|\S+) ({'|'.join(COLLECTIVES)})(-start)?\(", hlo):
        arrays = [
            BITS.get(dtype, 32) // 8 * _product(sizes)
            for dtype, sizes in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape)
        ]
        # What starts an all-reduce gives its results; of the others, what goes in, then what comes out.
        if start and kind != "all-reduce":
            arrays = arrays[len(arrays) // 2 :]
        found.setdefault(kind, []).append(sum(arrays))
    return tuple(Collective(kind, len(found[kind]), sum(found[kind])) for kind in COLLECTIVES if kind in found)


def memory_of_refusal(message: str) -> tuple[float, float]:
    """How many bytes a program needs and how many there are, of the compiler's sentence that refuses it; not a number
    where it does not tell.
    """
    size = r"([\d.]+)([KMGT]?)"
    for pattern in (rf"Used {size} of {size}", rf"\({size}\) exceeds available HBM \({size}\)"):
        if told := re.search(pattern, message):
            a, of_a, b, of_b = told.groups()
            units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
            return float(a) * units[of_a], float(b) * units[of_b]
    return float("nan"), float("nan")


def report(config: Config, target: str, image_shape: tuple[int, int, int], classes: int) -> tuple[str, str]:
    """The costs of a configuration as a table, and a sentence that says what does not fit and what would help, empty
    where all fits. ValueError for a target that there is not, or that cannot share the batch.
    """
    found = devices(target)
    mesh, batch = parallel.device_mesh(found), config.train.batch
    has = room(found[0], len(found))
    step = cost(lower_step(config, image_shape, classes, mesh), has, config.train.accumulate)
    sampling = cost(lower_sampler(config, image_shape, classes, mesh), has)
    unet = build_unet(config, image_shape, classes)
    params = params_like(unet, image_shape)
    hosts = len({device.process_index for device in found})
    head = (
        f"{target}: {len(found)} x {found[0].device_kind} of {hosts} host{'s' * (hosts > 1)}, {_gib(has)} each;"
        f" {sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters,"
        f" images {'x'.join(map(str, image_shape))}, batch {batch} ({batch // len(found)} a device),"
        f" {config.network.dtype}, {config.train.parallel}"
    )
    name = "guided DDIM" if is_guided(config, classes) else "DDIM"
    table = _table(["each device", "train step", f"{name}, a row"], [step, sampling])
    return f"{head}\n\n{table}", _too_large(config, len(found), name, step, sampling)


def _table(head: list[str], costs: list[Cost]) -> str:
    rows = [
        head,
        ["FLOPs", *("?" if cost.refused else f"{cost.flops:.4g}" for cost in costs)],
        ["bytes read and written", *("?" if cost.refused else f"{cost.bytes:.4g}" for cost in costs)],
        ["peak memory", *(f"{_gib(cost.peak)} of {_gib(cost.room)}" for cost in costs)],
        [
            "collectives",
            *("?" if cost.refused else ", ".join(map(_told, cost.collectives)) or "none" for cost in costs),
        ],
        ["compiled in", *(f"{cost.seconds:.0f} s" for cost in costs)],
        ["fits", *("yes" if cost.fits else "no" for cost in costs)],
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["| " + " | ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _too_large(config: Config, number: int, name: str, step: Cost, sampling: Cost) -> str:
    share = config.train.batch // number // config.train.accumulate
    helps = [] if config.network.remat else ["--network.remat"]
    if share > 1:
        # What is proportional to the share then fits, as most of it is; the state is not.
        part = next((n for n in range(2, share) if share % n == 0 and not n * step.room < step.peak), share)
        helps += [f"--train.accumulate {config.train.accumulate * part}", f"--train.batch {config.train.batch // part}"]
    short = {
        "the train step": (step, " or ".join(helps) or "a smaller network"),
        name: (sampling, "a smaller --batch of sample.py" if share > 1 else "a smaller network"),
    }
    said = [
        f"{what} does not fit: it needs {_gib(cost.peak)} of the {_gib(cost.room)} of a device,"
        f" {_gib(cost.peak - cost.room)} too much; {remedy} would help"
        for what, (cost, remedy) in short.items()
        if not cost.fits
    ]
    return "; ".join(said)


def _told(found: Collective) -> str:
    return f"{found.count} {found.kind} of {found.bytes:,} bytes"


def _gib(size: float) -> str:
    return "? GiB" if size != size else f"{size / GIB:.2f} GiB"


def _product(sizes: str) -> int:
    product = 1
    for size in sizes.split(","):
        product *= int(size or 1)
    return product
