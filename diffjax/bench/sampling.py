"""The cost of the sampling loop beside its network."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from diffjax import denoiser, sampler, schedule
from diffjax.bench.models import bench_model
from diffjax.bench.timing import Comparison, compare, describe_context
from diffjax.build import count_parameters
from diffjax.inference.samplers import make_plan, parse_samplers
from diffjax.sampler import Carry, Plan
from diffjax.schedule import Level

ROWS = 1000  # of the plan whose rows are timed without a network
BATCH, STEPS = 64, 50  # of DDIM
# Twelve plans of every kind, of 7 to 100 levels.
SWEEP = (
    "ddpm:100, ddim:50, ddim:7, euler:20, sigma_hat:33, heun:18, dpm_solver_pp_2m:10,"
    " dpm_solver_pp_3m:25, exponential_ab3:15, unipc_2:8, edm:12, consistency:9"
)


def bench_sampler(pairs: int) -> str:
    """The table of a plan's row, DDIM beside its forward passes, and compilations.

    pairs: times that each comparison is repeated, in turns.
    """
    with tqdm(total=4, desc="bench sampler", unit="figure", dynamic_ncols=True) as bar:
        plain = compare_rows(pairs, sampler.ddim)
        bar.update()
        noisy = compare_rows(min(3, pairs), sampler.ddpm)
        bar.update()
        sampling, forward, parameters = compare_forwards(pairs)
        bar.update()
        compilations = count_compilations()
        bar.update()
    requests = parse_samplers(SWEEP)
    samplers = len({request.name for request in requests})
    network, shape = f"digits network ({parameters:,} parameters)", f"{BATCH}x8x8x1"
    lines = [
        ("row of a plan, 16x32x32x3, no network (x0 = 0.5*x)", _per_row(plain.first), ""),
        ("the same with noise", _per_row(noisy.first), ""),
        ("bare scan row, x = a*x + b*y, same shape", _per_row(plain.second), ""),
        ("row / bare row", f"{plain.ratio:.2f}", "at most 10"),
        (f"forward, {network}, {shape}", f"{1e3 * forward:.2f} ms", ""),
        ("row / forward", f"{plain.first / ROWS / forward:.2%}", "under 2%"),
        (f"DDIM-50, digits network, {shape}, trailing", f"{1e3 * sampling.first:.1f} ms", ""),
        ("50 jitted forwards in turn, the same", f"{1e3 * sampling.second:.1f} ms", ""),
        ("DDIM-50 / 50 forwards", f"{sampling.ratio:.3f}", "at most 1.03"),
        (
            f"compilations of {len(requests)} plans of {samplers} samplers",
            str(compilations),
            "at most 4",
        ),
    ]
    table = "\n".join(f"| {what} | {figure} | {goal} |" for what, figure, goal in lines)
    return f"{describe_context(pairs)}\n\n| what | figure | goal |\n|---|---|---|\n{table}"


def _per_row(seconds: float) -> str:
    return f"{1e6 * seconds / ROWS:.1f} us"


def compare_rows(pairs: int, make: Callable[..., Plan]) -> Comparison:
    """Time ROWS rows of a plan, with the denoiser 0.5*x, beside the barest scan."""
    levels, shape = schedule.linear(ROWS), (16, 32, 32, 3)
    keys = sampler.image_keys(jax.random.key(0), np.arange(shape[0]))
    x, y = sampler.noise(keys, shape[1:]), sampler.noise(keys, shape[1:], 1)
    zero, run = jnp.zeros_like(x), jax.jit(partial(sampler.scan_plan, _halve))
    plan = make(levels, schedule.trailing(levels, ROWS))
    (rows,) = jax.device_put(sampler.segments(plan, x.dtype, size=ROWS))

    @jax.jit
    def bare(a: Array, b: Array, x: Array, y: Array) -> Array:
        return jax.lax.scan(lambda x, row: (row[0] * x + row[1] * y, None), x, (a, b))[0]

    return compare(
        lambda: run(rows, (x, zero, zero), keys), lambda: bare(rows.a, rows.b, x, y), pairs
    )


def _halve(x: Array, level: Level) -> Array:
    return 0.5 * x


def compare_forwards(pairs: int) -> tuple[Comparison, float, int]:
    """Time DDIM with the digits network beside as many of its forward passes.

    Returns also the seconds of one forward pass, and the number of parameters.
    """
    model = bench_model("digits")
    params, condition = model.params, model.condition(BATCH)
    plan = sampler.ddim(model.schedule, schedule.trailing(model.schedule, STEPS))
    keys = sampler.image_keys(jax.random.key(0), np.arange(BATCH))
    x = sampler.init_noise(plan, keys, model.info.x_shape)
    times = [jnp.full(BATCH, t - 1) for t in plan.level.t]

    @jax.jit
    def run(params: Any, rows: Plan, carry: Carry, keys: Array) -> Carry:
        denoise = denoiser.clip(model.denoiser(params, condition))
        return sampler.scan_plan(denoise, rows, carry, keys)

    forward = jax.jit(model.network)

    def forwards(times: list[Array]) -> Array:
        y = x
        for t in times:
            y = forward(params, y, t, condition)
        return y

    sampling = compare(
        lambda: sampler.sample(partial(run, params), plan, x, keys), lambda: forwards(times), pairs
    )
    once = compare(lambda: forwards(times[:1]), lambda: (), pairs).first
    return sampling, once, count_parameters(params)


def count_compilations() -> int:
    """The compilations of the plans of SWEEP, one after the other."""
    traces = []

    def denoise(x: Array, level: Level) -> Array:
        traces.append(x.shape)
        return 0.5 * x

    run, levels = jax.jit(partial(sampler.scan_plan, denoise)), schedule.linear(1000)
    keys = sampler.image_keys(jax.random.key(0), np.arange(4))
    for request in parse_samplers(SWEEP):
        plan, _ = make_plan(request, levels, STEPS)
        sampler.sample(run, plan, sampler.init_noise(plan, keys, (8, 8, 1)), keys)
    return len(traces)
