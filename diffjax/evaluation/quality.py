"""How good a sampler's images are, beside the real ones that the network was trained on."""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from diffjax.build import load_data
from diffjax.config import Config
from diffjax.devices import parallel
from diffjax.evaluation import features, metrics
from diffjax.evaluation.features import Extractor
from diffjax.evaluation.metrics import Moments
from diffjax.evaluation.results import LEAST_BATCHES, QualityRow
from diffjax.inference.pipeline import (
    Guidance,
    Pipeline,
    Samples,
    TrainedModel,
    count_parameters,
    describe_devices,
    describe_weights,
)
from diffjax.interop import unet2d
from diffjax.sampler import Plan

LARGEST_BATCH = 100
MOST_NEIGHBOURS = 10_000  # images on either side whose neighbours are sought: their distances grow with the square
LEAST_IMAGES = 4  # whose third neighbour is another one
CHUNK = 1000  # images decoded and shown to the extractor at a time


class NotFiniteError(ValueError):
    """Images that no figure can be told of."""


class Reference(NamedTuple):
    """Real images, as an extractor sees them."""

    extractor: Extractor
    moments: Moments  # of all of them
    features: np.ndarray  # [N, D], of MOST_NEIGHBOURS at most
    name: str  # as in "digits, train, 1,597 images"


def read_reference(
    config: Config,
    image_shape: tuple[int, int, int],
    kind: str,
    split: str,
    cache: Path,
    weights: Path | None,
) -> Reference:
    """The real images of a configuration's data, which are to be of this shape.

    kind: features of "pixels", of a small "cnn" that is trained here on the train split, or of "inception" with these
    weights (None for those that are downloaded once); split: "train" or "held_out"; cache: folder of what is trained or
    downloaded once. ValueError or OSError for data or features that cannot be had.
    """
    if unet2d.is_source(str(config.data)):
        raise ValueError(
            f"{config.data} does not tell its images: make it a run folder with them, by diffjax convert"
            f" {config.data} FOLDER --data NAME"
        )
    data = load_data(config)
    if data.image_shape != tuple(image_shape):
        theirs, ours = ("x".join(map(str, shape)) for shape in (data.image_shape, image_shape))
        raise ValueError(f"the images of {config.data} are {theirs}, and the network's are {ours}: name other data")
    if kind == "pixels":
        extractor = features.pixels()
    elif kind == "inception":
        extractor = features.inception(weights)
    elif not data.classes:
        raise ValueError(f"{config.data} has no class labels, so no classifier can learn it: use --features inception")
    else:
        extractor = features.small_cnn(
            *_arrays(data.train, "train"), *_arrays(data.held_out, "held-out"), data.classes, cache, seed=0,
            data=f"{config.data} train split",
        )  # fmt: skip
    source = {"train": data.train, "held_out": data.held_out}[split]
    if len(source) < LEAST_IMAGES:
        raise ValueError(
            f"the split {split} of {config.data} holds {len(source)} images: comparing takes {LEAST_IMAGES} or more"
        )
    # Drawn from all of them: images may lie class by class.
    chosen = np.zeros(len(source), bool)
    chosen[np.random.default_rng(0).permutation(len(source))[:MOST_NEIGHBOURS]] = True
    moments = metrics.no_moments(extractor.extract(source[0]["image"][None]).features.shape[1])
    kept = []
    for images in _chunks(source, f"features of real images, {extractor.name}"):
        found = extractor.extract(images).features
        moments = metrics.add(moments, found)
        kept.append(found[chosen[moments.count - len(found) : moments.count]])
    name = f"{config.data}, {split.replace('_', ' ')}, {len(source):,} images"
    if len(source) > MOST_NEIGHBOURS:
        name += f" ({MOST_NEIGHBOURS:,} drawn for all but Frechet's distance)"
    return Reference(extractor, moments, np.concatenate(kept), name)


def timed_batch(num: int) -> int:
    """As many images at a time as leave enough batches for a median time, shared equally by all devices."""
    devices = jax.device_count()
    return max(devices, min(num // LEAST_BATCHES, LARGEST_BATCH) // devices * devices)


def check_batch(num: int, batch: int) -> None:
    """ValueError for batches too few for a median time, or too uneven for all devices."""
    parallel.check_divisible(batch, jax.device_count(), "--batch")
    if -(-num // batch) < LEAST_BATCHES:
        raise ValueError(
            f"--num {num} in batches of {batch} is fewer than {LEAST_BATCHES} batches, whose median is the time: ask"
            " for more images, or a smaller --batch"
        )


def describe_clipping(clip: bool) -> str:
    """What is done to estimates of x0."""
    return "clipped" if clip else "unclipped"


def measure(
    run: TrainedModel,
    generate: Pipeline,
    reference: Reference,
    plan: Plan,
    name: str,
    *,
    guidance: Guidance,
    num: int,
    batch: int,
    seed: int,
    clip: bool = True,
    progress: Callable[[int], Any] = lambda rows: None,
) -> tuple[QualityRow, Samples]:
    """Sample `num` images by a plan, every class as often as the others, and hold them against the real ones.

    name: of the sampler, with its dials; the other arguments as of Generator. NotFiniteError for images that are
    not finite.
    """
    classes = run.description.classes
    labels = np.resize(np.arange(classes, dtype=np.int32), num) if classes else None
    made = generate(
        run.params, plan, labels, num,
        guidance=guidance, seed=seed, batch=batch, clip=clip, progress=progress,
    )  # fmt: skip
    if not np.isfinite(made.x).all():
        raise NotFiniteError(f"{name} in {plan.steps} steps made images that are not finite: clip, or take other steps")
    outputs = [reference.extractor.extract(made.images[i : i + CHUNK]) for i in range(0, num, CHUNK)]
    seen = np.concatenate([output.features for output in outputs])
    likely = None
    if outputs[0].probabilities is not None:
        likely = np.concatenate([output.probabilities for output in outputs if output.probabilities is not None])
    kernel, kernel_error = metrics.kernel_distance(reference.features, seen[:MOST_NEIGHBOURS])
    precision, recall = metrics.precision_recall(reference.features, seen[:MOST_NEIGHBOURS])
    names = labels is not None and likely is not None and likely.shape[1] == classes
    milliseconds = 1e3 * np.array(made.batch_seconds) / batch
    low, median, high = np.quantile(milliseconds, [0.25, 0.5, 0.75])
    config, image_shape, _ = run.description
    row = QualityRow(
        sampler=name, clipping=describe_clipping(clip), steps=plan.steps, nfe=made.nfe,
        guidance=guidance.scale, guided=str(guidance),
        frechet=metrics.frechet_distance(reference.moments, metrics.add(metrics.no_moments(seen.shape[1]), seen)),
        kernel=kernel, kernel_error=kernel_error,
        inception=None if likely is None else metrics.inception_score(likely, splits=1)[0],
        precision=precision, recall=recall,
        recognised=float(np.mean(likely.argmax(1) == labels)) if names and likely is not None else None,
        extractor=reference.extractor.name, reference=reference.name, images=num, seed=seed,
        ms_per_image=float(median), spread=float((high - low) / 2 / median), batches=len(milliseconds), batch=batch,
        compile_seconds=made.compile_seconds, network=run.name, parameters=count_parameters(run.params),
        weights=describe_weights(run), image_size="x".join(map(str, image_shape)),
        device=describe_devices(), dtype=config.network.dtype, versions=versions(),
    )  # fmt: skip
    return row, made


def versions() -> str:
    """Of what a figure depends on."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("diffjax", "jax"))


def _chunks(source: Any, what: str) -> Any:
    """The images of a split, uint8 [n, H, W, C] at a time."""
    with tqdm(total=len(source), desc=what, unit="image", dynamic_ncols=True, leave=False) as bar:
        for first in range(0, len(source), CHUNK):
            images = np.stack([source[i]["image"] for i in range(first, min(first + CHUNK, len(source)))])
            bar.update(len(images))
            yield images


def _arrays(source: Any, what: str) -> tuple[np.ndarray, np.ndarray]:
    images = np.concatenate(list(_chunks(source, f"{what} images")))
    return images, np.array([source[i]["label"] for i in range(len(source))], np.int32)
