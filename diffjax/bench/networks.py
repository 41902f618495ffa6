"""What networks cost: a pass, a gradient, a training step, images by DDIM; beside diffusers, where it is installed."""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.compilation_cache import compilation_cache
from tqdm import tqdm

from diffjax import denoiser, sampler, schedule
from diffjax.bench.peers import Peer, available, versions
from diffjax.bench.subject import Subject, subject
from diffjax.bench.timing import BLOCK, in_turns
from diffjax.evaluation.results import TimingRow
from diffjax.inference.pipeline import count_parameters, describe_devices
from diffjax.sampler import Carry, Plan
from diffjax.training.setup import build_training

SCALE = 2.0  # of guidance
DISPATCHED = 10  # training steps in one dispatch
BUDGET = 30.0  # seconds for the repeats of a case
SIDE = 2048  # of the matrices whose product is the ceiling


@dataclass(frozen=True)
class Case:
    """What is timed in turns: one computation, in one or more ways, and diffusers'."""

    network: str
    what: str  # "forward", "backward", "train", "ddim" or "guided"
    batch: int
    steps: int = 50  # of DDIM
    dispatched: bool = False  # train: DISPATCHED steps in one dispatch too
    dtype: Literal["float32", "bfloat16"] = "float32"


def cases(quick: bool) -> list[Case]:
    """All of them; quick: those that take seconds."""
    small = ("digits",) if quick else ("digits", "mnist_small")
    found = []
    for name in small:
        found += [Case(name, "forward", batch) for batch in (1, 16, 64)]
        found += [Case(name, "backward", 64), Case(name, "train", 64, dispatched=True)]
        found += [Case(name, "ddim", batch) for batch in (1, 16, 64)]
        found += [Case(name, "guided", batch) for batch in (1, 16, 64)]
    if quick:
        return [*found, Case("ddpm_cifar10", "forward", 1)]
    found += [Case("ddpm_cifar10", "forward", batch) for batch in (1, 16, 64)]
    found += [Case("ddpm_cifar10", "forward", 16, dtype="bfloat16"), Case("ddpm_cifar10", "train", 16)]
    return found + [Case("ddpm_cifar10", "ddim", batch, steps=5) for batch in (1, 16)]


class Program(NamedTuple):
    """A compiled program and what the compiler says of it."""

    call: Callable[..., Any]
    flops: float
    peak_bytes: int
    compile_seconds: float
    cached_seconds: float


class Way(NamedTuple):
    """One way of computing a case."""

    what: str
    run: Callable[[], Any]
    program: Program
    calls: float = 1  # of the program, in one run
    per: int = 1  # results of one run
    steps: int | None = None
    nfe: int | None = None
    guidance: str = ""


def measure(chosen: list[Case], repeats: int) -> Iterator[TimingRow]:
    """The rows of each case, one case after the other, with a progress bar.

    repeats: turns of each case. Compiled programs go through a persistent cache of their own.
    """
    before: str | None = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009 (set by JAX at run time)
    with tempfile.TemporaryDirectory() as cache, tqdm(total=len(chosen), desc="bench", dynamic_ncols=True) as bar:
        try:
            _use_cache(cache)
            ceilings = {dtype: ceiling(dtype) for dtype in {case.dtype for case in chosen}}
            for case in chosen:
                bar.set_postfix_str(f"{case.network} {case.what} {case.batch} {case.dtype}")
                yield from measure_case(case, repeats, ceilings[case.dtype])
                bar.update()
        finally:
            _use_cache(before)


def measure_case(case: Case, repeats: int, ceiling: float) -> Iterator[TimingRow]:
    """The rows of a case, its ways and diffusers' timed in turns."""
    it = subject(case.network, case.dtype)
    ways = {
        "forward": forward, "backward": backward, "train": train, "ddim": ddim, "guided": partial(ddim, scale=SCALE),
    }[case.what](it, case)  # fmt: skip
    peers = [peer(it, case)] if available() else []
    seconds = in_turns([*(way.run for way in ways), *peers], repeats, BLOCK, BUDGET)
    theirs = seconds[:, -1] if peers else None
    for way, runs in zip(ways, seconds.T, strict=False):
        own = runs / way.per
        quartiles = np.quantile(own, (0.25, 0.75))
        yield TimingRow(
            what=way.what, steps=way.steps, nfe=way.nfe, guidance=way.guidance,
            seconds=float(np.median(own)), spread=float(np.ptp(quartiles) / 2 / np.median(own)), repeats=len(own),
            flops=way.program.flops * way.calls / way.per, ceiling=ceiling, peak_bytes=way.program.peak_bytes,
            compile_seconds=way.program.compile_seconds, cached_seconds=way.program.cached_seconds,
            peer=versions() if peers else "",
            peer_seconds=None if theirs is None else float(np.median(theirs)),
            ratio=None if theirs is None else float(np.median(theirs / own)),
            network=case.network, parameters=count_parameters(it.params), batch=case.batch,
            image_size="x".join(map(str, it.image_shape)), device=describe_devices(), dtype=case.dtype,
        )  # fmt: skip


def ceiling(dtype: str) -> float:
    """FLOP/s of a product of two matrices of SIDE x SIDE numbers of `dtype`, summed in float32: the best of five."""
    a = jnp.ones((SIDE, SIDE), dtype)
    product = jax.jit(partial(jnp.matmul, preferred_element_type=jnp.float32))
    return 2 * SIDE**3 / in_turns([lambda: product(a, a)], 5).min()


def compiled(function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()) -> Program:
    """Compile a function twice, the second time from the persistent cache."""
    lowered = jax.jit(function, donate_argnums=donate).lower(*arguments)
    (call, first), (_, again) = _timed(lowered), _timed(jax.jit(function, donate_argnums=donate).lower(*arguments))
    memory = call.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return Program(call, _flops(lowered), peak - memory.alias_size_in_bytes, first, again)


# ---------------------------------------------------------------------------------------------- what is measured


def forward(it: Subject, case: Case) -> list[Way]:
    """One pass, without a gradient."""
    arguments = it.params, it.images(case.batch), jnp.zeros(case.batch), it.labels(case.batch)
    program = compiled(it.network, *arguments)
    return [Way("forward", lambda: program.call(*arguments), program)]


def backward(it: Subject, case: Case) -> list[Way]:
    """A pass and the gradient of its mean square."""
    arguments = it.params, it.images(case.batch), jnp.zeros(case.batch), it.labels(case.batch)
    program = compiled(jax.grad(lambda *inputs: jnp.mean(it.network(*inputs) ** 2)), *arguments)
    return [Way("forward + backward", lambda: program.call(*arguments), program)]


def train(it: Subject, case: Case) -> list[Way]:
    """A training step by itself, and as one of DISPATCHED in one dispatch."""
    training = build_training(it.config, it.image_shape, it.classes)
    batch = {"image": it.images(case.batch), "index": jnp.arange(case.batch, dtype=jnp.uint32)}
    batch |= {"label": it.labels(case.batch)} if it.classes else {}

    def way(what: str, steps: int) -> Way:
        state, batches = training.init(jax.random.key(0)), jax.tree.map(lambda leaf: jnp.stack([leaf] * steps), batch)
        program = compiled(training.step, state, batches, donate=(0,))

        def run() -> Any:
            nonlocal state
            state, metrics = program.call(state, batches)
            return metrics

        return Way(what, run, program, calls=steps, per=steps)  # XLA counts the body of a loop once

    once = way("train step", 1)
    return [once, way(f"train step, {DISPATCHED} per dispatch", DISPATCHED)] if case.dispatched else [once]


def ddim(it: Subject, case: Case, scale: float | None = None) -> list[Way]:
    """Images by DDIM, eta 0, trailing; guided in one pass of twice the batch, and in two, if there is a scale."""
    plan, labels = sampler.ddim(it.levels, schedule.trailing(it.levels, case.steps)), it.labels(case.batch)
    keys = sampler.image_keys(jax.random.key(0), np.arange(case.batch))
    x = it.images(case.batch)
    rows, *_ = sampler.segments(plan, x.dtype)
    carry: Any = (x, jnp.zeros_like(x), jnp.zeros_like(x))
    pass_flops = _flops(jax.jit(it.network).lower(it.params, x, jnp.zeros(case.batch), labels))

    def way(two_passes: bool = False) -> Way:
        def run(params: Any, labels: Array | None, scale: Any, rows: Plan, carry: Carry, keys: Array) -> Carry:
            conditional = denoiser.from_network(it.network, params, it.prediction)
            if scale is None or labels is None:
                denoise = denoiser.condition_on(conditional, labels)
            else:
                denoise = denoiser.classifier_free_guidance(
                    conditional, labels, it.classes, scale, two_passes=two_passes
                )
            return sampler.scan_plan(denoiser.clip(denoise), rows, carry, keys)

        program = compiled(run, it.params, labels, scale, rows, carry, keys)
        program = program._replace(flops=pass_flops * (1 if scale is None else 2))
        bound = partial(program.call, it.params, labels, scale)
        guidance = "" if scale is None else f"{scale:g}, {'two passes' if two_passes else 'one pass'}"
        return Way(
            "ddim(eta=0, trailing)", lambda: sampler.sample(bound, plan, x, keys), program, calls=plan.steps,
            steps=plan.steps, nfe=plan.steps * (1 if scale is None else 2), guidance=guidance,
        )  # fmt: skip

    return [way()] if scale is None else [way(), way(two_passes=True)]


def peer(it: Subject, case: Case) -> Callable[[], Any]:
    """The same by diffusers."""
    theirs = Peer(it.config, it.image_shape, it.classes, it.params)
    return {
        "forward": lambda: theirs.forward(case.batch, case.dtype),
        "backward": lambda: theirs.backward(case.batch),
        "train": lambda: theirs.train_step(case.batch),
        "ddim": lambda: theirs.ddim(case.batch, case.steps),
        "guided": lambda: theirs.ddim(case.batch, case.steps, SCALE),
    }[case.what]()


def _timed(lowered: Any) -> tuple[Any, float]:
    jax.clear_caches()  # of this process: what is left is the persistent one
    began = time.perf_counter()
    return lowered.compile(), time.perf_counter() - began


def _flops(lowered: Any) -> float:
    return lowered.cost_analysis()["flops"]


def _use_cache(folder: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0 if folder else 1.0)
    compilation_cache.reset_cache()
