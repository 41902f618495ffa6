"""What sampling costs beside its network: a row of a plan beside a bare one, DDIM-50 beside 50 forwards, and the
compilations of many plans.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from diffjax import denoiser, sampler, schedule
from diffjax.bench.subject import subject
from diffjax.bench.timing import Compared, compare, context
from diffjax.inference import samplers
from diffjax.inference.pipeline import count_parameters
from diffjax.sampler import Carry, Plan
from diffjax.schedule import Level

ROWS = 1000  # of the plan whose rows are timed without a network
SWEEP = [  # twelve plans of every kind, of 7 to 100 levels
    ("ddpm", 100), ("ddim", 50), ("ddim", 7), ("euler", 20), ("sigma_hat", 33), ("heun", 18), ("dpm_solver_pp_2m", 10),
    ("dpm_solver_pp_3m", 25), ("exponential_ab3", 15), ("unipc_2", 8), ("edm", 12), ("consistency", 9),
]  # fmt: skip


def bench_sampler(pairs: int) -> str:
    """A row of a plan beside a bare one, DDIM-50 beside 50 forwards, and the compilations of many plans."""
    with tqdm(total=4, desc="bench sampler", unit="figure", dynamic_ncols=True) as bar:
        plain = row_and_bare_row(pairs, sampler.ddim)
        bar.update()
        noisy = row_and_bare_row(min(3, pairs), sampler.ddpm)
        bar.update()
        sampling, forward, parameters = sampling_and_forwards(pairs)
        bar.update()
        compilations = sweep()
        bar.update()
    samplers = len({name for name, _ in SWEEP})
    lines = [
        ("row of a plan, 16x32x32x3, no network (x0 = 0.5*x)", f"{1e6 * plain.first / ROWS:.1f} us", ""),
        ("the same with noise", f"{1e6 * noisy.first / ROWS:.1f} us", ""),
        ("bare scan row, x = a*x + b*y, same shape", f"{1e6 * plain.second / ROWS:.1f} us", ""),
        ("row / bare row", f"{plain.ratio:.2f}", "at most 10"),
        (f"forward, digits network ({parameters:,} parameters), 64x8x8x1", f"{1e3 * forward:.2f} ms", ""),
        ("row / forward", f"{plain.first / ROWS / forward:.2%}", "under 2%"),
        ("DDIM-50, digits network, 64x8x8x1, trailing", f"{1e3 * sampling.first:.1f} ms", ""),
        ("50 jitted forwards in turn, the same", f"{1e3 * sampling.second:.1f} ms", ""),
        ("DDIM-50 / 50 forwards", f"{sampling.ratio:.3f}", "at most 1.03"),
        (f"compilations of {len(SWEEP)} plans of {samplers} samplers", str(compilations), "at most 4"),
    ]
    table = "\n".join(f"| {what} | {figure} | {goal} |" for what, figure, goal in lines)
    return f"{context(pairs)}\n\n| what | figure | goal |\n|---|---|---|\n{table}"


def row_and_bare_row(pairs: int, make: Callable[..., Plan]) -> Compared:
    """ROWS rows of a plan whose denoiser is 0.5*x, and as many of the barest scan of the same shape."""
    levels, shape = schedule.linear(ROWS), (16, 32, 32, 3)
    keys = sampler.image_keys(jax.random.key(0), np.arange(shape[0]))
    x, y = sampler.noise(keys, shape[1:]), sampler.noise(keys, shape[1:], 1)
    zero, run = jnp.zeros_like(x), jax.jit(partial(sampler.scan_plan, lambda x, level: 0.5 * x))
    (rows,) = jax.device_put(sampler.segments(make(levels, schedule.trailing(levels, ROWS)), x.dtype, size=ROWS))

    @jax.jit
    def bare(a: Array, b: Array, x: Array, y: Array) -> Array:
        return jax.lax.scan(lambda x, row: (row[0] * x + row[1] * y, None), x, (a, b))[0]

    return compare(lambda: run(rows, (x, zero, zero), keys), lambda: bare(rows.a, rows.b, x, y), pairs)


def sampling_and_forwards(pairs: int) -> tuple[Compared, float, int]:
    """DDIM-50 with the digits network and 50 of its forwards, batch 64; seconds of one forward; its parameters."""
    *_, network, params, levels, prediction = subject("digits")
    batch, shape = 64, (8, 8, 1)
    plan, labels = sampler.ddim(levels, schedule.trailing(levels, 50)), jnp.arange(batch) % 10
    keys = sampler.image_keys(jax.random.key(0), np.arange(batch))
    x, times = sampler.init_noise(plan, keys, shape), [jnp.full(batch, t - 1) for t in plan.level.t]

    @jax.jit
    def run(params: Any, rows: Plan, carry: Carry, keys: Array) -> Carry:
        denoise = denoiser.condition_on(denoiser.from_network(network, params, prediction), labels)
        return sampler.scan_plan(denoiser.clip(denoise), rows, carry, keys)

    forward = jax.jit(network)

    def forwards(times: list[Array]) -> Array:
        y = x
        for t in times:
            y = forward(params, y, t, labels)
        return y

    sampling = compare(lambda: sampler.sample(partial(run, params), plan, x, keys), lambda: forwards(times), pairs)
    once = compare(lambda: forwards(times[:1]), lambda: (), pairs).first
    return sampling, once, count_parameters(params)


def sweep() -> int:
    """Compilations that twelve plans of different samplers and lengths take, one after the other."""
    traced = 0

    def denoise(x: Array, level: Level) -> Array:
        nonlocal traced
        traced += 1
        return 0.5 * x

    run, levels = jax.jit(partial(sampler.scan_plan, denoise)), schedule.linear(1000)
    keys = sampler.image_keys(jax.random.key(0), np.arange(4))
    for name, steps in SWEEP:
        plan, _ = samplers.named(name, levels, schedule.trailing(levels, steps), "trailing")
        sampler.sample(run, plan, sampler.init_noise(plan, keys, (8, 8, 1)), keys)
    return traced
