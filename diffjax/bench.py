"""What sampling costs beside its network, and what guidance costs: `python -m diffjax.bench sampler`, `... guidance`.

Times are medians after a warm-up, and what is compared is timed in turns, so that a busy machine slows both.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array
from tqdm import tqdm

from diffjax import cli, denoiser, experiment, plans, sampler, schedule
from diffjax.denoiser import ConditionalDenoiser, Denoiser, Network
from diffjax.process import Prediction
from diffjax.run import count_parameters, describe_devices
from diffjax.sampler import Carry, Plan
from diffjax.schedule import Level, Schedule

PROGRAM = "diffjax.bench"
Build = Callable[[Network], Denoiser]
ROWS = 1000  # of the plan whose rows are timed without a network
SWEEP = [  # twelve plans of every kind, of 7 to 100 levels
    ("ddpm", 100), ("ddim", 50), ("ddim", 7), ("euler", 20), ("sigma_hat", 33), ("heun", 18), ("dpm_solver_pp_2m", 10),
    ("dpm_solver_pp_3m", 25), ("exponential_ab3", 15), ("unipc_2", 8), ("edm", 12), ("consistency", 9),
]  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Measure what sampling, or guidance, costs."""

    what: tyro.conf.Positional[Literal["sampler", "guidance"]] = "sampler"
    """The compiled sampling loop beside its network, or every kind of guidance beside none."""
    pairs: int = 15
    """Times that each comparison is repeated, its two sides in turns."""


def main(arguments: list[str]) -> None:
    """Measure and print."""
    options = cli.parse(Options, PROGRAM, arguments)
    with cli.one_sentence(PROGRAM):
        if options.pairs < 1:
            raise ValueError(f"--pairs is {options.pairs}: measure once or more")
    print({"sampler": bench_sampler, "guidance": bench_guidance}[options.what](options.pairs))


def context(pairs: int) -> str:
    """Where figures were taken."""
    return f"{describe_devices()}, float32, jax {jax.__version__}, medians of {pairs}"


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


def bench_guidance(pairs: int) -> str:
    """DDIM-20 with the digits network, guided in every way, each in turns with plain conditional sampling."""
    network, params, levels, prediction = digits_network()
    batch, shape, null = 64, (8, 8, 1), 10
    labels, worse = jnp.arange(batch) % 10, jax.tree.map(lambda leaf: 0.9 * leaf, params)
    plan = sampler.ddim(levels, schedule.trailing(levels, 20))
    keys = sampler.image_keys(jax.random.key(0), np.arange(batch))
    x = sampler.start(plan, keys, shape)

    def conditional(network: Network, params: Any) -> ConditionalDenoiser:
        return denoiser.from_network(network, params, prediction)

    def plain(network: Network) -> Denoiser:
        return denoiser.condition_on(conditional(network, params), labels)

    def guided(scale: Any = 2.0, null: Any = null, rescale: float = 0.0, two_passes: bool = False) -> Build:
        return lambda network: denoiser.guide(conditional(network, params), labels, null, scale, rescale, two_passes)

    def autoguided(network: Network) -> Denoiser:
        return denoiser.autoguide(plain(network), denoiser.condition_on(conditional(network, worse), labels), 2.0)

    inside = sampler.within(plan, 0.3, 5.0)
    everywhere = np.ones(plan.steps, bool)
    kinds: dict[str, tuple[Build, np.ndarray]] = {
        "scale 2, one pass": (guided(), everywhere),
        "scale 2, two passes": (guided(two_passes=True), everywhere),
        "scale per image": (guided(jnp.linspace(1, 4, batch)), everywhere),
        "scale by level, 1 + 2*sigma": (guided(lambda level: 1 + 2 * level.sigma), everywhere),
        f"scale 2 in sigma/alpha 0.3..5 ({inside.sum()} of {plan.steps} rows)": (guided(), inside),
        "scale 2, rescaled 0.7": (guided(rescale=0.7), everywhere),
        "scale 2, away from another label": (guided(null=(labels + 1) % 10), everywhere),
        "scale 2, thresholded 0.995": (lambda network: denoiser.threshold(guided()(network), 0.995), everywhere),
        "autoguidance 2, same size": (autoguided, everywhere),
    }

    def compiled(build: Build) -> sampler.Run:
        return jax.jit(partial(sampler.advance, build(network)))

    without, lines, alone = compiled(plain), [], []
    for name, (build, where) in tqdm(kinds.items(), desc="bench guidance", dynamic_ncols=True):
        both = [without, compiled(build)]
        each = compare(
            lambda both=both, where=where: sampler.sample(both, plan, x, keys, which=where.astype(int)),
            lambda: sampler.sample(without, plan, x, keys),
            pairs,
        )
        more = sampler.count_nfe(lambda counted, build=build: build(counted(network)), plan, x) // plan.steps - 1
        nfe = plan.steps + more * int(where.sum())
        lines.append(f"| {name} | {nfe} | {1e3 * each.first:.1f} ms | {each.ratio:.2f} |")
        alone.append(each.second)
    lines.insert(0, f"| plain conditional | {plan.steps} | {1e3 * np.median(alone):.1f} ms | 1 |")
    return (
        f"{context(pairs)}; digits network ({count_parameters(params):,} parameters), DDIM-20, 64x8x8x1\n\n"
        "| guidance | NFE | run | run / plain, in turns |\n|---|---|---|---|\n" + "\n".join(lines)
    )


def digits_network() -> tuple[Network, Any, Schedule, Prediction]:
    """The network of `digits` with fresh parameters, since what they are does not change what they cost."""
    config = experiment.named("digits")
    unet = experiment.build_unet(config, (8, 8, 1), 10)
    params = experiment.init_params(unet, (8, 8, 1), jax.random.key(0))
    return (
        experiment.build_network(config, unet),
        params,
        experiment.build_schedule(config),
        experiment.build_prediction(config),
    )


class Compared(NamedTuple):
    """Two ways timed in turns."""

    first: float  # median seconds
    second: float
    ratio: float  # median of first/second, pair by pair


def compare(first: Callable[[], Any], second: Callable[[], Any], pairs: int) -> Compared:
    """Time two functions in turns, after a call of each that does not count."""
    seconds = np.empty((pairs + 1, 2))
    for i, j in np.ndindex(*seconds.shape):
        began = time.perf_counter()
        jax.block_until_ready((first, second)[j]())
        seconds[i, j] = time.perf_counter() - began
    seconds = seconds[1:]
    first, second = np.median(seconds, axis=0)
    return Compared(first, second, float(np.median(seconds[:, 0] / seconds[:, 1])))


def row_and_bare_row(pairs: int, make: Callable[..., Plan]) -> Compared:
    """ROWS rows of a plan whose denoiser is 0.5*x, and as many of the barest scan of the same shape."""
    levels, shape = schedule.linear(ROWS), (16, 32, 32, 3)
    keys = sampler.image_keys(jax.random.key(0), np.arange(shape[0]))
    x, y = sampler.noise(keys, shape[1:]), sampler.noise(keys, shape[1:], 1)
    zero, run = jnp.zeros_like(x), jax.jit(partial(sampler.advance, lambda x, level: 0.5 * x))
    (rows,) = jax.device_put(sampler.chunks(make(levels, schedule.trailing(levels, ROWS)), x.dtype, size=ROWS))

    @jax.jit
    def bare(a: Array, b: Array, x: Array, y: Array) -> Array:
        return jax.lax.scan(lambda x, row: (row[0] * x + row[1] * y, None), x, (a, b))[0]

    return compare(lambda: run(rows, (x, zero, zero), keys), lambda: bare(rows.a, rows.b, x, y), pairs)


def sampling_and_forwards(pairs: int) -> tuple[Compared, float, int]:
    """DDIM-50 with the digits network and 50 of its forwards, batch 64; seconds of one forward; its parameters."""
    network, params, levels, prediction = digits_network()
    batch, shape = 64, (8, 8, 1)
    plan, labels = sampler.ddim(levels, schedule.trailing(levels, 50)), jnp.arange(batch) % 10
    keys = sampler.image_keys(jax.random.key(0), np.arange(batch))
    x, times = sampler.start(plan, keys, shape), [jnp.full(batch, t - 1) for t in plan.level.t]

    @jax.jit
    def run(params: Any, rows: Plan, carry: Carry, keys: Array) -> Carry:
        denoise = denoiser.condition_on(denoiser.from_network(network, params, prediction), labels)
        return sampler.advance(denoiser.clip(denoise), rows, carry, keys)

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

    run, levels = jax.jit(partial(sampler.advance, denoise)), schedule.linear(1000)
    keys = sampler.image_keys(jax.random.key(0), np.arange(4))
    for name, steps in SWEEP:
        plan, _ = plans.named(name, levels, schedule.trailing(levels, steps), "trailing")
        sampler.sample(run, plan, sampler.start(plan, keys, (8, 8, 1)), keys)
    return traced


if __name__ == "__main__":
    cli.main(main)
