"""What a trained run is worth.

diffjax evaluate RUN --num 10000 --sampler ddim --steps 50     its images beside the real ones
diffjax evaluate RUN --bits-per-dim                            how probable it finds held-out images

The first appends a complete row to evaluations.jsonl in the run folder. Of the second, less is better: by the
probability flow, the exact density of images with uniform noise of one grey value, its divergence estimated by random
probes and the whole repeated with others; and by the variational bound of DDPM over all levels. It needs diffrax: pip
install diffjax[diffrax].
"""

import functools
import importlib.util
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from diffjax import likelihood, sampler, schedule
from diffjax.build import load_data
from diffjax.cli import common
from diffjax.config import load_config
from diffjax.data.batches import first_images
from diffjax.denoiser import Condition, from_network
from diffjax.devices import parallel
from diffjax.evaluation import features, quality
from diffjax.evaluation.results import LikelihoodRow, markdown
from diffjax.inference import samplers
from diffjax.inference.pipeline import (
    Guidance,
    Pipeline,
    TrainedModel,
    check_guidance,
    check_seed,
    count_parameters,
    default_sampler,
    default_steps,
    distillation_warning,
    load_model,
    output_folder,
    require_undistilled,
)
from diffjax.schedule import Level

PROGRAM = "diffjax evaluate"
STAGES, BEGINNING = 6, 1  # evaluations of a step of the solver, and before the first one


@dataclass(frozen=True)
class Options:
    """Measure a trained run: its images, or, with --bits-per-dim, how probable it finds held-out ones."""

    run: tyro.conf.Positional[str]
    """Run folder, as train.py leaves it."""
    bits_per_dim: bool = False
    """Likelihood by the probability flow, and the variational bound."""
    num: int | None = None
    """Images to be sampled, 1000 if None; or held-out images, the first ones, 64 if None."""
    sampler: str | None = None
    """A sampler with its dials, as in ddim, ddim(eta=0.5) or ddpm(variance=fixed_large, spacing=leading). None for
    ddim, or what a student was distilled for."""
    steps: int | None = None
    """Levels visited; None for all T with ddpm and 50 with others, or what a student was distilled for."""
    guidance: float = 1.0
    """0 unconditional, 1 conditional, more is guided."""
    batch: int | None = None
    """Images sampled at a time; None for a fifth of --num, and 100 at most."""
    clip: bool = True
    """Estimates of x0 to the range of images, while sampling."""
    features: Literal["cnn", "pixels", "inception"] = "cnn"
    """What images are compared by: a small network trained here on the real ones, their pixels, or Inception-v3."""
    reference: Literal["train", "held_out"] = "train"
    """Split of the real images that the sampled ones are compared with."""
    inception: str | None = None
    """File of Inception-v3's weights; None for those downloaded once."""
    data: str | None = None
    """A configuration whose images are the real ones, as in cifar10, for a network from elsewhere; None for the run's
    own."""
    labels: bool = True
    """Bits per dimension: tell the network the images' labels, if it knows any."""
    probes: int = 1
    """Random probes of the flow's divergence, per image."""
    repeats: int = 3
    """Evaluations of the flow with different probes, whose spread is told."""
    tolerance: float = 1e-4
    """Of the solver, relative and absolute."""
    evaluations: int | None = 200
    """Of the network per image, for the bound: levels drawn at random, all of them if None."""
    variance: str = "fixed_large"
    """Noise of the bound's chain: fixed_large, fixed_small, or a number of 0 to 1 between them."""
    seed: int = 0
    """Of all that is drawn."""
    weights: Literal["ema", "raw"] = "ema"
    """The moving average of the parameters, or the parameters as trained."""
    checkpoint: int | None = None
    """Training step of the checkpoint; None for the latest."""
    out: str | None = None
    """The table's rows as a file (.json); None for evaluation.json in the run folder."""


def main(arguments: list[str]) -> None:
    """Parse, measure, write, print."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    options = common.parse(Options, PROGRAM, arguments)
    with common.user_errors(PROGRAM):
        check_seed(options.seed)
        run = load_model(options.run, options.checkpoint, options.weights)
    if options.bits_per_dim:
        of_likelihood(options, run)
    else:
        of_images(options, run)


def of_images(options: Options, run: TrainedModel) -> None:
    """Sample, compare, print one row and append it to the run's."""
    num = 1000 if options.num is None else options.num
    with common.user_errors(PROGRAM):
        if options.repeats != 3 or options.probes != 1 or options.out is not None:
            raise ValueError("--repeats, --probes and --out belong to --bits-per-dim: leave them out, or say it too")
        plan, name = make_plan(options, run)
        guidance = Guidance(options.guidance)
        check_guidance(run, guidance)
        batch = quality.timed_batch(num) if options.batch is None else options.batch
        quality.check_batch(num, batch)
        out = common.check_output(output_folder(options.run) / "evaluations.jsonl", ".jsonl")
        config = run.description.config if options.data is None else load_config(options.data)
        weights = None if options.inception is None else Path(options.inception)
        reference = quality.read_reference(
            config, run.description.image_shape, options.features, options.reference, features.cache_folder(), weights
        )
    if doubt := distillation_warning(run, plan):
        print(f"{run.name} {doubt}")
    generate = Pipeline.of(run)
    with tqdm(total=plan.steps * -(-num // batch), desc=name, unit="step", dynamic_ncols=True) as bar:
        try:
            row, _ = quality.measure(
                run, generate, reference, plan, name, guidance=guidance, num=num, batch=batch, seed=options.seed,
                clip=options.clip, progress=bar.update,
            )  # fmt: skip
        except quality.NotFiniteError as error:
            common.exit_with_error(PROGRAM, error)
    print(markdown([row]))
    with common.user_errors(PROGRAM), out.open("a") as file:
        file.write(json.dumps(asdict(row)) + "\n")
    print(f"appended to {out}")


def make_plan(options: Options, run: TrainedModel) -> tuple[sampler.Plan, str]:
    """The plan that is asked for, and its full name. ValueError as of `plans.requests` and `plans.at_steps`."""
    task = run.description.config.distillation
    request, *more = samplers.requests(options.sampler or default_sampler(task, run.schedule)[0])
    if more:
        raise ValueError(f"--sampler is {options.sampler!r}: name one, or sweep them by diffjax frontier")
    steps = default_steps(task, run.schedule, request.name) if options.steps is None else options.steps
    return samplers.at_steps(request, run.schedule, steps)


def of_likelihood(options: Options, run: TrainedModel) -> None:
    """Both measures, as a table and as a file."""
    num = 64 if options.num is None else options.num
    with common.user_errors(PROGRAM):
        if importlib.util.find_spec("diffrax") is None:
            raise ValueError("likelihoods need diffrax: pip install 'diffjax[diffrax]'")
        check(options, num)
        require_undistilled(run)
        T, config = schedule.length(run.schedule), run.description.config
        if options.evaluations is not None and not 1 <= options.evaluations <= T - 1:
            raise ValueError(f"--evaluations is {options.evaluations}: this chain takes 1 to {T - 1}, or None for all")
        std = samplers.std_named(options.variance)
        images, labels = first_images(load_data(config).held_out, num)
        labels = make_labels(options, run, labels, num)
        out = common.check_output(Path(options.out or output_folder(options.run) / "evaluation.json"), ".json")
    rows = bits_per_dim(options, run, std, images, labels)
    with common.user_errors(PROGRAM):
        out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print(markdown(rows))
    print(f"wrote {out}")


def check(options: Options, num: int) -> None:
    """ValueError, naming the option, for values that mean nothing."""
    if num < 2:
        raise ValueError(f"--num is {num}: a mean and its error take two images or more")
    for name in ("probes", "repeats"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} is {getattr(options, name)}: use 1 or more")
    if not 0 < options.tolerance <= 0.01:
        raise ValueError(f"--tolerance is {options.tolerance}: use a number above 0, and at most 0.01; 1e-4 is usual")


def make_labels(options: Options, run: TrainedModel, labels: np.ndarray | None, num: int) -> np.ndarray | None:
    """What the network is told of each image. ValueError for no label where it was trained with all of them."""
    classes = run.description.classes
    if not classes:
        return None
    if options.labels:
        return labels
    if run.description.config.train.label_dropout == 0:
        raise ValueError(
            f"{run.name} was trained with train.label_dropout 0, so it does not know images without a label: leave out"
            " --no-labels"
        )
    return np.full(num, classes, np.int32)


def bits_per_dim(
    options: Options, run: TrainedModel, std: sampler.Std, images: np.ndarray, labels: np.ndarray | None
) -> list[LikelihoodRow]:
    """The flow's row and the bound's."""
    config, shape, classes = run.description
    levels, prediction = run.schedule, run.prediction
    batch = parallel.default_batch(len(images))
    key, T = jax.random.key(options.seed), schedule.length(levels)

    def flow(params: Any, x0: Array, condition: Condition, keys: Array) -> Any:
        for_bin, for_probes = keys
        x0 = likelihood.dequantise(x0, for_bin)
        return likelihood.log_density(
            from_network(run.network, params, prediction), levels, x0, condition, for_probes, options.probes,
            options.tolerance,
        )  # fmt: skip

    def bound(params: Any, x0: Array, condition: Condition, keys: Array) -> Any:
        def clipped(x_t: Array, level: Level, condition: Condition) -> Array:
            return jnp.clip(from_network(run.network, params, prediction)(x_t, level, condition), -1, 1)

        t = schedule.trailing(levels, T)
        return likelihood.variational_bound(clipped, levels, t, x0, condition, keys, std, options.evaluations)

    def keys_of(number: int, index: np.ndarray) -> Array:
        return sampler.image_keys(jax.random.fold_in(key, number), index)

    over, calls = over_devices(run, images, labels, batch), -(-len(images) // batch)
    with tqdm(total=calls * (options.repeats + 1), desc="bits per dim", unit="batch", dynamic_ncols=True) as bar:
        # The same noise in the bins every time: what spreads are the probes.
        found = [
            over(flow, lambda i, n=n: (keys_of(0, i), keys_of(n + 2, i)), bar.update) for n in range(options.repeats)
        ]
        bounds = over(bound, lambda i: keys_of(1, i), bar.update)
    nats, steps, solved = (np.stack(parts) for parts in zip(*found, strict=True))
    if not solved.all():
        image = int(np.argmin(solved.all(0)))
        common.exit_with_error(PROGRAM, f"the flow of image {image} took too many steps: use a larger --tolerance")
    by_flow = likelihood.bits_per_dim(nats, shape, density=True)
    by_bound = likelihood.bits_per_dim(bounds, shape, density=False)
    context: dict[str, Any] = {
        "given": "labels" if classes and options.labels else "no labels", "images": len(images),
        "data": f"{config.data}, held out", "network": run.name, "parameters": count_parameters(run.params),
        "weights": f"{run.weights}, step {run.step}", "image_size": "x".join(map(str, shape)),
        "dtype": config.network.dtype,
    }  # fmt: skip
    evaluations = STAGES * float(steps.mean()) + BEGINNING
    probes = f"{options.probes} probe{'s' * (options.probes > 1)}"
    return [
        LikelihoodRow(
            measure=f"probability flow, tsit5 to {options.tolerance:g}, {probes}",
            bits_per_dim=float(by_flow.mean()), error=standard_error(by_flow.mean(0)),
            spread=float(by_flow.mean(1).std(ddof=1)) if options.repeats > 1 else None, repeats=options.repeats,
            evaluations=evaluations, derivatives=evaluations * options.probes, **context,
        ),
        LikelihoodRow(
            measure=f"variational bound, ddpm({options.variance}) in {T} steps, clipped",
            bits_per_dim=float(by_bound.mean()), error=standard_error(by_bound), spread=None, repeats=1,
            evaluations=1.0 + (options.evaluations or T - 1), derivatives=0.0, **context,
        ),
    ]  # fmt: skip


def over_devices(run: TrainedModel, images: np.ndarray, labels: np.ndarray | None, batch: int) -> Callable[..., Any]:
    """over(function, keys, progress): function(params, x0, condition, keys) of all images, batch by batch, each shared
    out over all devices; its results on the host. keys: of the images' indices.
    """
    mesh, num = parallel.device_mesh(), len(images)
    whole, split = parallel.replicated(mesh), parallel.batch_sharding(mesh)
    params = jax.device_put(run.params, whole)

    @functools.cache
    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        specs = (P(), P(parallel.AXIS), P(parallel.AXIS), P(parallel.AXIS))
        return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs[1], check_vma=False))

    def over(function: Callable[..., Any], keys: Callable[[np.ndarray], Any], progress: Callable[[int], Any]) -> Any:
        found = []
        for first in range(0, num, batch):
            index = np.arange(first, first + batch)
            x0, condition = jax.tree.map(lambda leaf, index=index: leaf[index % num], (images, labels))
            arguments = jax.device_put((x0, condition, keys(index)), split)
            found.append(jax.device_get(compiled(function)(params, *arguments)))
            progress(1)
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:num], *found)

    return over


def standard_error(values: np.ndarray) -> float:
    """Of the mean of one value per image."""
    return float(values.std(ddof=1) / len(values) ** 0.5)
