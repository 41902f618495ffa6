"""Bits per dimension of held-out images: by the exact flow, and by the bound.

Lower is better; a uniform model of 8-bit images has 8. The probability flow gives the exact
density of images with uniform noise of one grey value, up to its divergence, which random probes
estimate; the variational bound is that of DDPM over all levels.

Latents are not of 8 bits: of a model of latents, both measure the density of the latents that the
images are encoded to, -log2 p(x) per number of x, which may be below 0 and cannot be compared with
bits of images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffjax import denoiser, likelihood, sampler, schedule
from diffjax.denoiser import Condition
from diffjax.devices import parallel
from diffjax.devices.parallel import BatchMapper
from diffjax.evaluation.results import LikelihoodRow, ModelContext
from diffjax.inference.defaults import check_seed, require_undistilled
from diffjax.inference.guidance import can_be_guided
from diffjax.inference.model import TrainedModel
from diffjax.inference.samplers import parse_variance
from diffjax.sampler import Std
from diffjax.schedule import Level

STAGES, INITIAL = 6, 1  # evaluations of a step of the solver, and before the first one


@dataclass(frozen=True)
class LikelihoodOptions:
    """How likelihoods are measured."""

    seed: int
    probes: int = 1  # of the flow's divergence, per image
    repeats: int = 3  # of the flow, with other probes
    tolerance: float = 1e-4  # of the solver, relative and absolute
    evaluations: int | None = 200  # of the network per image for the bound; None for all levels
    variance: str = "fixed_large"  # of the bound's chain, as `samplers.parse_variance` reads it


class UnsolvedError(ValueError):
    """An image whose flow takes too many steps."""


def check_likelihood(model: TrainedModel, options: LikelihoodOptions) -> None:
    """Check that a model has a likelihood, and that the options can be used.

    Raises: ValueError, naming the option, for values out of range; and for a distilled model.
    """
    require_undistilled(model)
    check_seed(options.seed)
    for name in ("probes", "repeats"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} is {getattr(options, name)}: use 1 or more")
    if not 0 < options.tolerance <= 0.01:
        raise ValueError(
            f"tolerance is {options.tolerance}: use more than 0, and at most 0.01; 1e-4 is usual"
        )
    T = schedule.length(model.schedule)
    if options.evaluations is not None and not 1 <= options.evaluations <= T - 1:
        raise ValueError(
            f"evaluations is {options.evaluations}: use 1 to {T - 1}, or None for all levels"
        )
    parse_variance(options.variance)


def likelihood_condition(model: TrainedModel, condition: Condition, num: int) -> Condition:
    """The conditions of `num` images: those given, or null conditions for None.

    Raises: ValueError for None where the model was trained with conditions only.
    """
    conditioning = model.info.conditioning
    if condition is not None or not conditioning.is_conditional:
        return condition
    if not can_be_guided(model.info):
        raise ValueError(
            f"condition is None, and {model.name} was trained with train.condition_dropout 0: it"
            " needs the condition of each image"
        )
    return conditioning.nulls(num)


def measure_bits_per_dim(
    model: TrainedModel,
    x: np.ndarray,
    condition: Condition,
    options: LikelihoodOptions,
    progress: Callable[[int], object] = lambda batches: None,
) -> list[LikelihoodRow]:
    """Measure held-out images by the probability flow and the variational bound.

    x: float32 [N, H, W, C] in [-1, 1], or the latents that images are encoded to, N of 2 or more.
    condition: a pytree [N, ...]; None for the null condition. progress: called as progress(1) after
    each of `num_batches` batches.

    Raises: ValueError as `check_likelihood` and `likelihood_condition`; UnsolvedError for an image
    whose flow takes too many steps; ImportError without diffrax.
    """
    check_likelihood(model, options)
    if len(x) < 2:
        raise ValueError(f"num is {len(x)}: a mean and its error need 2 images or more")
    given = "no condition" if condition is None else "condition"
    condition = likelihood_condition(model, condition, len(x))
    images = _Images(x, condition, jax.random.key(options.seed))
    context = vars(ModelContext.of_model(model)) | {
        "given": given,
        "images": len(x),
        "data": f"{'latents of ' * _is_of_latents(model)}{model.info.config.data}, held out",
    }
    flow = _measure_flow(model, images, options, progress)
    bound = _measure_bound(model, images, options, progress)
    return [LikelihoodRow(**context, **flow), LikelihoodRow(**context, **bound)]


def num_batches(num: int, repeats: int) -> int:
    """The number of batches that `measure_bits_per_dim` computes for `num` images."""
    return -(-num // parallel.default_batch(num)) * (repeats + 1)


@dataclass(frozen=True)
class _Images:
    """Images with their conditions, and the key of all that is drawn for them."""

    x: np.ndarray
    condition: Condition
    key: Array

    def keys(self, number: int) -> Array:
        """One key per image, others for each number."""
        return sampler.image_keys(jax.random.fold_in(self.key, number), np.arange(len(self.x)))


def _measure_flow(
    model: TrainedModel,
    images: _Images,
    options: LikelihoodOptions,
    progress: Callable[[int], object],
) -> dict[str, Any]:
    mapper = _mapper(model, partial(_flow, model, options), len(images.x))
    # The same noise in the bins every time: the spread is that of the probes.
    results = [
        mapper((images.x, images.condition, images.keys(0), images.keys(n + 2)), progress)
        for n in range(options.repeats)
    ]
    nats, steps, solved = (np.stack(parts) for parts in zip(*results, strict=True))
    if not solved.all():
        image = int(np.argmin(solved.all(0)))
        raise UnsolvedError(
            f"tolerance is {options.tolerance}, at which the flow of image {image} takes too many"
            " steps: use a larger one"
        )
    density = not _is_of_latents(model)
    bits = likelihood.bits_per_dim(nats, images.x.shape[1:], density=density)
    evaluations = STAGES * float(steps.mean()) + INITIAL
    probes = f"{options.probes} probe{'s' * (options.probes > 1)}"
    return {
        "measure": f"probability flow, tsit5 to {options.tolerance:g}, {probes}{_space(model)}",
        "bits_per_dim": float(bits.mean()),
        "error": _standard_error(bits.mean(0)),
        "spread": float(bits.mean(1).std(ddof=1)) if options.repeats > 1 else None,
        "repeats": options.repeats,
        "evaluations": evaluations,
        "derivatives": evaluations * options.probes,
    }


def _measure_bound(
    model: TrainedModel,
    images: _Images,
    options: LikelihoodOptions,
    progress: Callable[[int], object],
) -> dict[str, Any]:
    T, std = schedule.length(model.schedule), parse_variance(options.variance)
    mapper = _mapper(model, partial(_bound, model, std, options.evaluations), len(images.x))
    nats = mapper((images.x, images.condition, images.keys(1)), progress)
    bits = likelihood.bits_per_dim(nats, images.x.shape[1:], density=False)
    return {
        "measure": f"variational bound, ddpm({options.variance}) in {T} steps"
        f"{_space(model) or ', clipped'}",
        "bits_per_dim": float(bits.mean()),
        "error": _standard_error(bits),
        "spread": None,
        "repeats": 1,
        "evaluations": 1.0 + (options.evaluations or T - 1),
        "derivatives": 0.0,
    }


def _flow(
    model: TrainedModel,
    options: LikelihoodOptions,
    params: Any,
    x0: Array,
    condition: Condition,
    bin_keys: Array,
    probe_keys: Array,
) -> likelihood.Likelihood:
    denoise = denoiser.from_network(model.network, params, model.parameterization)
    if not _is_of_latents(model):
        x0 = likelihood.dequantise(x0, bin_keys)
    return likelihood.log_density(
        denoise, model.schedule, x0, condition, probe_keys, options.probes, options.tolerance
    )


def _bound(
    model: TrainedModel,
    std: Std,
    evaluations: int | None,
    params: Any,
    x0: Array,
    condition: Condition,
    keys: Array,
) -> Array:
    denoise = denoiser.from_network(model.network, params, model.parameterization)

    def clipped(x_t: Array, level: Level, condition: Condition) -> Array:
        return jnp.clip(denoise(x_t, level, condition), *model.codec.bounds or (None, None))

    t = schedule.trailing(model.schedule, schedule.length(model.schedule))
    bin_width = None if _is_of_latents(model) else likelihood.BIN
    return likelihood.variational_bound(
        clipped, model.schedule, t, x0, condition, keys, std, evaluations, bin_width
    )


def _is_of_latents(model: TrainedModel) -> bool:
    return model.codec.bounds is None


def _space(model: TrainedModel) -> str:
    return ", density of latents" if _is_of_latents(model) else ""


def _mapper(model: TrainedModel, function: Callable[..., Any], num: int) -> BatchMapper:
    mesh = parallel.device_mesh()
    return BatchMapper(function, model.params, parallel.default_batch(num), mesh)


def _standard_error(values: np.ndarray) -> float:
    """The standard error of the mean of one value per image."""
    return float(values.std(ddof=1) / len(values) ** 0.5)
