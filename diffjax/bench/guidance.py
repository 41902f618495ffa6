"""What every kind of guidance costs, each beside plain conditional sampling."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from diffjax import denoiser, sampler, schedule
from diffjax.bench.subject import subject
from diffjax.bench.timing import compare, context
from diffjax.denoiser import ConditionalDenoiser, Denoiser, Network
from diffjax.inference.pipeline import count_parameters

Build = Callable[[Network], Denoiser]


def bench_guidance(pairs: int) -> str:
    """DDIM-20 with the digits network, guided in every way, each in turns with plain conditional sampling."""
    *_, network, params, levels, prediction = subject("digits")
    batch, shape, null = 64, (8, 8, 1), 10
    labels, worse = jnp.arange(batch) % 10, jax.tree.map(lambda leaf: 0.9 * leaf, params)
    plan = sampler.ddim(levels, schedule.trailing(levels, 20))
    keys = sampler.image_keys(jax.random.key(0), np.arange(batch))
    x = sampler.init_noise(plan, keys, shape)

    def conditional(network: Network, params: Any) -> ConditionalDenoiser:
        return denoiser.from_network(network, params, prediction)

    def plain(network: Network) -> Denoiser:
        return denoiser.condition_on(conditional(network, params), labels)

    def guided(scale: Any = 2.0, null: Any = null, rescale: float = 0.0, two_passes: bool = False) -> Build:
        return lambda network: denoiser.classifier_free_guidance(
            conditional(network, params), labels, null, scale, rescale, two_passes
        )

    def autoguided(network: Network) -> Denoiser:
        return denoiser.autoguidance(plain(network), denoiser.condition_on(conditional(network, worse), labels), 2.0)

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
        "scale 2, thresholded 0.995": (
            lambda network: denoiser.dynamic_threshold(guided()(network), 0.995),
            everywhere,
        ),
        "autoguidance 2, same size": (autoguided, everywhere),
    }

    def compiled(build: Build) -> sampler.Program:
        return jax.jit(partial(sampler.scan_plan, build(network)))

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
