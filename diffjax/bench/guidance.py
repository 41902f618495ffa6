"""The cost of every kind of guidance, each beside plain conditional sampling."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from diffjax import denoiser, guidance, sampler, schedule
from diffjax.bench.models import BenchModel, bench_model
from diffjax.bench.timing import compare, describe_context
from diffjax.build import count_parameters
from diffjax.denoiser import Denoiser, Network
from diffjax.sampler import Plan
from diffjax.schedule import Level

BATCH, STEPS, SCALE = 64, 20, 2.0


class Variant(NamedTuple):
    """One kind of guidance."""

    name: str
    build: Callable[[Network], Denoiser]
    interval: tuple[float, float] | None = None  # of sigma/alpha; None for all levels

    def rows(self, plan: Plan) -> np.ndarray:
        """The rows of a plan that are guided, bool [N]."""
        if self.interval is None:
            return np.ones(plan.steps, bool)
        return guidance.in_interval(plan.level, *self.interval)


class GuidedDenoisers:
    """The guided denoisers of a model, each a function of its network."""

    def __init__(self, model: BenchModel, batch: int) -> None:
        """The null condition is that of the model."""
        self._model, self._condition = model, model.condition(batch)
        self._null = model.info.conditioning.null

    def plain(self, network: Network, params: Any = None) -> Denoiser:
        """The denoiser for the conditions, not guided. params: those of the model if None."""
        params = self._model.params if params is None else params
        return self._model._replace(network=network).denoiser(params, self._condition)

    def classifier_free(
        self, network: Network, scale: guidance.Scale = SCALE, null: Any = None, **options: Any
    ) -> Denoiser:
        """Classifier-free guidance. null: that of the model if None."""
        model, null = self._model, self._null if null is None else null
        conditional = denoiser.from_network(network, model.params, model.parameterization)
        return guidance.classifier_free_guidance(
            conditional, self._condition, null, scale, **options
        )

    def thresholded(self, network: Network) -> Denoiser:
        """Classifier-free guidance with dynamic thresholding."""
        return denoiser.dynamic_threshold(self.classifier_free(network), 0.995)

    def autoguided(self, network: Network) -> Denoiser:
        """Autoguidance by a model of the same size."""
        worse = jax.tree.map(lambda leaf: 0.9 * leaf, self._model.params)
        return guidance.autoguidance(self.plain(network), self.plain(network, worse), SCALE)

    def variants(self, plan: Plan) -> list[Variant]:
        """Every kind of guidance."""
        guided, batch = self.classifier_free, len(jax.tree.leaves(self._condition)[0])
        another = jax.tree.map(lambda leaf: jnp.roll(leaf, -1, axis=0), self._condition)
        inside = Variant("", guided, (0.3, 5.0))
        count = int(inside.rows(plan).sum())
        return [
            Variant("scale 2, one pass", guided),
            Variant("scale 2, two passes", partial(guided, batched=False)),
            Variant("scale per image", partial(guided, scale=jnp.linspace(1, 4, batch))),
            Variant("scale by level, 1 + 2*sigma", partial(guided, scale=_scale_by_level)),
            inside._replace(name=f"scale 2 in sigma/alpha 0.3..5 ({count} of {plan.steps} rows)"),
            Variant("scale 2, rescaled 0.7", partial(guided, rescale=0.7)),
            Variant("scale 2, away from another label", partial(guided, null=another)),
            Variant("scale 2, thresholded 0.995", self.thresholded),
            Variant("autoguidance 2, same size", self.autoguided),
        ]


def _scale_by_level(level: Level) -> Any:
    return 1 + 2 * level.sigma


def bench_guidance(pairs: int) -> str:
    """The table of DDIM with the digits network, guided in every way.

    pairs: times that each comparison is repeated, in turns.
    """
    model = bench_model("digits")
    network, denoisers = model.network, GuidedDenoisers(model, BATCH)
    plan = sampler.ddim(model.schedule, schedule.trailing(model.schedule, STEPS))
    keys = sampler.image_keys(jax.random.key(0), np.arange(BATCH))
    x = sampler.init_noise(plan, keys, model.info.x_shape)
    plain = _compile(denoisers.plain, network)
    lines, alone = [], []
    for variant in tqdm(denoisers.variants(plan), desc="bench guidance", dynamic_ncols=True):
        programs, inside = [plain, _compile(variant.build, network)], variant.rows(plan)
        times = compare(
            partial(sampler.sample_switching, programs, inside.astype(int), plan, x, keys),
            partial(sampler.sample, plain, plan, x, keys),
            pairs,
        )
        nfe = plan.steps + (_count_evaluations(variant.build, network, x) - 1) * int(inside.sum())
        lines.append(f"| {variant.name} | {nfe} | {1e3 * times.first:.1f} ms | {times.ratio:.2f} |")
        alone.append(times.second)
    lines.insert(0, f"| plain conditional | {plan.steps} | {1e3 * np.median(alone):.1f} ms | 1 |")
    return (
        f"{describe_context(pairs)}; digits network ({count_parameters(model.params):,}"
        f" parameters), DDIM-{STEPS}, {BATCH}x{model.info.describe_x()}\n\n"
        "| guidance | NFE | run | run / plain, in turns |\n|---|---|---|---|\n" + "\n".join(lines)
    )


def _compile(build: Callable[[Network], Denoiser], network: Network) -> sampler.Program:
    return jax.jit(partial(sampler.scan_plan, build(network)))


def _count_evaluations(build: Callable[[Network], Denoiser], network: Network, x: Any) -> int:
    return sampler.count_evaluations(lambda counted: build(counted(network)), x)
