"""The cost of networks, beside diffusers where it is installed."""

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.compilation_cache import compilation_cache
from tqdm import tqdm

from diffjax import denoiser, guidance, sampler, schedule
from diffjax.bench import diffusers_baseline, first_image, report
from diffjax.bench.diffusers_baseline import DiffusersBaseline
from diffjax.bench.models import BenchModel, bench_model
from diffjax.bench.timing import BLOCK, interleaved
from diffjax.build import count_parameters
from diffjax.denoiser import Condition
from diffjax.evaluation.results import TimingRow, median_and_spread
from diffjax.inference.pipeline import describe_devices
from diffjax.sampler import Carry, Plan
from diffjax.training.setup import build_training

SCALE = 2.0  # of guidance
DISPATCHED = 10  # training steps in one dispatch
BUDGET = 30.0  # seconds for the repeats of a case
SIDE = 2048  # of the matrices whose product gives the peak FLOP/s


@dataclass(frozen=True)
class Case:
    """One computation to time, in one or more variants, beside diffusers'."""

    network: str
    what: Literal["forward", "backward", "train", "ddim", "guided"]
    batch: int
    steps: int = 50  # of DDIM
    dispatched: bool = False  # train: DISPATCHED steps in one dispatch too
    dtype: Literal["float32", "bfloat16"] = "float32"


def cases(quick: bool) -> list[Case]:
    """All cases, or with `quick` those that take seconds."""
    chosen = []
    for name in ("digits",) if quick else ("digits", "mnist_small"):
        chosen += [Case(name, "forward", batch) for batch in (1, 16, 64)]
        chosen += [Case(name, "backward", 64), Case(name, "train", 64, dispatched=True)]
        chosen += [Case(name, "ddim", batch) for batch in (1, 16, 64)]
        chosen += [Case(name, "guided", batch) for batch in (1, 16, 64)]
    if quick:
        return [*chosen, Case("cifar10", "forward", 1)]
    chosen += [Case("cifar10", "forward", batch) for batch in (1, 16, 64)]
    chosen += [Case("cifar10", "forward", 16, dtype="bfloat16"), Case("cifar10", "train", 16)]
    return chosen + [Case("cifar10", "ddim", batch, steps=5) for batch in (1, 16)]


def bench_networks(out: Path, quick: bool, repeats: int) -> str:
    """The table of all cases, which is written to files after every case.

    out: path of the rows as JSON; the table and a picture are written beside it, as .md and .png.
    """
    rows: list[TimingRow] = []
    first_images = first_image.measure("digits")
    text = ""
    for row in measure(cases(quick), repeats):
        rows.append(row)
        values = [dataclasses.asdict(row) | {"mfu": row.mfu} for row in rows]
        out.write_text(json.dumps(values, indent=1) + "\n")
        text = report.report_networks(rows, first_images)
        out.with_suffix(".md").write_text(text + "\n")
    report.plot_networks(rows, out.with_suffix(".png"))
    return f"{text}\n\nwrote {out}, {out.with_suffix('.md')}, {out.with_suffix('.png')}"


def measure(chosen: list[Case], repeats: int) -> Iterator[TimingRow]:
    """The rows of each case, one case after the other, with a progress bar.

    repeats: turns of each case. Compiled programs go through a persistent cache of their own.
    """
    # An attribute that JAX sets at run time, so that type checkers do not know it.
    before: str | None = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009
    with (
        tempfile.TemporaryDirectory() as cache,
        tqdm(total=len(chosen), desc="bench", dynamic_ncols=True) as bar,
    ):
        try:
            _use_cache(cache)
            peaks = {dtype: peak_flops(dtype) for dtype in {case.dtype for case in chosen}}
            for case in chosen:
                bar.set_postfix_str(f"{case.network} {case.what} {case.batch} {case.dtype}")
                yield from measure_case(case, repeats, peaks[case.dtype])
                bar.update()
        finally:
            _use_cache(before)


def measure_case(case: Case, repeats: int, peak: float) -> Iterator[TimingRow]:
    """The rows of a case, its variants and the baseline timed in turns.

    peak: FLOP/s, as `peak_flops`.
    """
    model = bench_model(case.network, case.dtype)
    variants = VARIANTS[case.what](model, case)
    baselines = [baseline(model, case)] if diffusers_baseline.is_available() else []
    functions = [*(variant.run for variant in variants), *baselines]
    seconds = interleaved(functions, repeats, BLOCK, BUDGET)
    for variant, runs in zip(variants, seconds.T, strict=False):
        ours, theirs = runs / variant.results_per_run, seconds[:, -1] if baselines else None
        median, spread = median_and_spread(ours)
        program, calls = variant.program, variant.calls_per_run / variant.results_per_run
        yield TimingRow(
            what=variant.what,
            steps=variant.steps,
            nfe=variant.nfe,
            guidance=variant.guidance,
            seconds=median,
            spread=spread,
            repeats=len(ours),
            flops=program.flops * calls,
            ceiling=peak,
            peak_bytes=program.peak_bytes,
            compile_seconds=program.compile_seconds,
            cached_seconds=program.cached_seconds,
            peer=diffusers_baseline.versions() if baselines else "",
            peer_seconds=None if theirs is None else float(np.median(theirs)),
            ratio=None if theirs is None else float(np.median(theirs / ours)),
            network=case.network,
            parameters=count_parameters(model.params),
            batch=case.batch,
            image_size=model.info.describe_x(),
            device=describe_devices(),
            dtype=case.dtype,
        )


def peak_flops(dtype: str) -> float:
    """FLOP/s of a product of matrices of `dtype`, summed in float32: the best of five."""
    a = jnp.ones((SIDE, SIDE), dtype)
    product = jax.jit(partial(jnp.matmul, preferred_element_type=jnp.float32))
    return 2 * SIDE**3 / interleaved([lambda: product(a, a)], 5).min()


# ------------------------------------------------------------------------------- programs


class CompiledProgram(NamedTuple):
    """A compiled program, and its cost by the compiler."""

    call: Callable[..., Any]
    flops: float
    peak_bytes: int
    compile_seconds: float
    cached_seconds: float


def compile_timed(
    function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()
) -> CompiledProgram:
    """Compile a function twice, the second time from the persistent cache."""
    lowered = jax.jit(function, donate_argnums=donate).lower(*arguments)
    call, first = _timed(lowered)
    _, again = _timed(jax.jit(function, donate_argnums=donate).lower(*arguments))
    memory = call.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    peak -= memory.alias_size_in_bytes
    return CompiledProgram(call, _flops(lowered), peak, first, again)


def _timed(lowered: Any) -> tuple[Any, float]:
    jax.clear_caches()  # those of this process: the persistent one is left
    began = time.perf_counter()
    return lowered.compile(), time.perf_counter() - began


def _flops(lowered: Any) -> float:
    return lowered.cost_analysis()["flops"]


def _use_cache(folder: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0 if folder else 1.0)
    compilation_cache.reset_cache()


# ------------------------------------------------------------------------------- variants


class CaseVariant(NamedTuple):
    """One variant of a case's computation."""

    what: str
    run: Callable[[], Any]
    program: CompiledProgram
    calls_per_run: float = 1  # of the program
    results_per_run: int = 1
    steps: int | None = None
    nfe: int | None = None
    guidance: str = ""


def forward(model: BenchModel, case: Case) -> list[CaseVariant]:
    """A forward pass, without a gradient."""
    arguments = _network_arguments(model, case)
    program = compile_timed(model.network, *arguments)
    return [CaseVariant("forward", partial(program.call, *arguments), program)]


def backward(model: BenchModel, case: Case) -> list[CaseVariant]:
    """A forward pass and the gradient of its mean square."""
    arguments = _network_arguments(model, case)
    program = compile_timed(
        jax.grad(lambda *inputs: jnp.mean(model.network(*inputs) ** 2)), *arguments
    )
    return [CaseVariant("forward + backward", partial(program.call, *arguments), program)]


def _network_arguments(model: BenchModel, case: Case) -> tuple[Any, ...]:
    batch = case.batch
    return model.params, model.x(batch), jnp.zeros(batch), model.condition(batch)


def train(model: BenchModel, case: Case) -> list[CaseVariant]:
    """A training step by itself, and as one of DISPATCHED in one dispatch."""
    variants = [_train_variant(model, case, "train step", 1)]
    if case.dispatched:
        name = f"train step, {DISPATCHED} per dispatch"
        variants.append(_train_variant(model, case, name, DISPATCHED))
    return variants


def _train_variant(model: BenchModel, case: Case, name: str, steps: int) -> CaseVariant:
    training = build_training(model.info)
    batch = {"x": model.x(case.batch), "index": jnp.arange(case.batch, dtype=jnp.uint32)}
    if model.info.conditioning.is_conditional:
        batch["condition"] = model.condition(case.batch)
    batches = jax.tree.map(lambda leaf: jnp.stack([leaf] * steps), batch)
    state = training.init(jax.random.key(0))
    program = compile_timed(training.step, state, batches, donate=(0,))
    run = _RepeatedStep(program.call, state, batches)
    # XLA counts the body of a loop once.
    return CaseVariant(name, run, program, calls_per_run=steps, results_per_run=steps)


class _RepeatedStep:
    """A training step on the same batches, from the state of the call before."""

    def __init__(self, step: Callable[..., Any], state: Any, batches: Any) -> None:
        self._step, self._state, self._batches = step, state, batches

    def __call__(self) -> Any:
        self._state, metrics = self._step(self._state, self._batches)
        return metrics


def ddim(model: BenchModel, case: Case) -> list[CaseVariant]:
    """Samples by DDIM, eta 0, trailing."""
    return [_ddim_variant(model, case)]


def guided(model: BenchModel, case: Case) -> list[CaseVariant]:
    """Samples by guided DDIM, by one pass on twice the batch, and by two passes."""
    return [_ddim_variant(model, case, SCALE, batched) for batched in (True, False)]


def _ddim_variant(
    model: BenchModel, case: Case, scale: float | None = None, batched: bool = True
) -> CaseVariant:
    plan = sampler.ddim(model.schedule, schedule.trailing(model.schedule, case.steps))
    keys = sampler.image_keys(jax.random.key(0), np.arange(case.batch))
    x, condition = model.x(case.batch), model.condition(case.batch)

    def run(
        params: Any, condition: Condition, scale: Any, rows: Plan, carry: Carry, keys: Array
    ) -> Carry:
        if scale is None:
            denoise = model.denoiser(params, condition)
        else:
            conditional = denoiser.from_network(model.network, params, model.parameterization)
            null = model.info.conditioning.null
            denoise = guidance.classifier_free_guidance(
                conditional, condition, null, scale, batched=batched
            )
        return sampler.scan_plan(denoiser.clip(denoise), rows, carry, keys)

    rows, *_ = sampler.segments(plan, x.dtype)
    carry = x, jnp.zeros_like(x), jnp.zeros_like(x)
    program = compile_timed(run, model.params, condition, scale, rows, carry, keys)
    pass_flops = _flops(jax.jit(model.network).lower(*_network_arguments(model, case)))
    evaluations = 1 if scale is None else 2
    bound = partial(program.call, model.params, condition, scale)
    return CaseVariant(
        what="ddim(eta=0, trailing)",
        run=partial(sampler.sample, bound, plan, x, keys),
        program=program._replace(flops=pass_flops * evaluations),
        calls_per_run=plan.steps,
        steps=plan.steps,
        nfe=plan.steps * evaluations,
        guidance="" if scale is None else f"{scale:g}, {'one pass' if batched else 'two passes'}",
    )


VARIANTS: dict[str, Callable[[BenchModel, Case], list[CaseVariant]]] = {
    function.__name__: function for function in (forward, backward, train, ddim, guided)
}


def baseline(model: BenchModel, case: Case) -> Callable[[], Any]:
    """The case's computation by diffusers."""
    diffusers = DiffusersBaseline(model)
    if case.what == "forward":
        return diffusers.forward(case.batch, case.dtype)
    if case.what == "backward":
        return diffusers.backward(case.batch)
    if case.what == "train":
        return diffusers.train_step(case.batch)
    return diffusers.ddim(case.batch, case.steps, SCALE if case.what == "guided" else None)
