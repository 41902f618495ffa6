"""The quality of generated images: how far they are from real ones, as one row."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from diffjax.build import ModelInfo, check_conditions, image_config, load_data
from diffjax.config import Config
from diffjax.data.batches import first_examples
from diffjax.data.dataset import Dataset
from diffjax.devices import parallel
from diffjax.evaluation import features, metrics
from diffjax.evaluation.features import Extractor, Outputs
from diffjax.evaluation.metrics import Moments
from diffjax.evaluation.results import (
    LEAST_BATCHES,
    BatchTiming,
    Context,
    QualityContext,
    QualityMetrics,
    QualityRow,
)
from diffjax.inference.model import TrainedModel
from diffjax.inference.pipeline import Hooks, NotFiniteError, Pipeline, Request, Samples
from diffjax.nn.conditioning import ClassLabel, Condition, Conditioning, Fields
from diffjax.sampler import Plan

LARGEST_BATCH = 100
MOST_NEIGHBOURS = 10_000  # images whose neighbours are sought: time grows with the square
LEAST_IMAGES = 4  # with which the third neighbour is another image
CHUNK = 1000  # images decoded and extracted at a time


# ------------------------------------------------------------------------------- real images


@dataclass(frozen=True)
class ReferenceOptions:
    """The real images that generated ones are compared with, and the features."""

    features: Literal["cnn", "pixels", "inception"] = "cnn"
    split: Literal["train", "held_out"] = "train"
    inception: Path | None = None  # file of Inception's weights; None for those in the cache
    cache: Path | None = None  # of trained and downloaded weights; None for the user's


class Reference(NamedTuple):
    """Real images, and their features."""

    extractor: Extractor
    moments: Moments  # of all images
    features: np.ndarray  # [N, D], of MOST_NEIGHBOURS images at most
    name: str  # as in "digits, train, 1,500 images, sha256:45f1fd30"
    source: Any  # the examples of the split
    held_out: Any  # the examples that are held out


def read_reference(
    config: Config,
    image_shape: tuple[int, ...],
    options: ReferenceOptions,
    trained: Sequence[ModelInfo] = (),
) -> Reference:
    """Read the real images of a configuration and extract their features.

    For a configuration of latents, they are the images that were encoded.

    image_shape: the shape [H, W, C] that they must have. trained: models that were trained on them,
    whose classes they must have.

    Raises: ValueError or OSError for data or features that cannot be used.
    """
    if not config.data.known:
        raise ValueError(
            f"{config.data} does not name its training images: name them by data, or convert it to"
            " a run folder with the data set's name"
        )
    config = image_config(config)
    dataset = load_data(config)
    if dataset.image_shape != tuple(image_shape):
        real, generated = ("x".join(map(str, each)) for each in (dataset.image_shape, image_shape))
        raise ValueError(
            f"data {config.data} has images of {real}, and the model's are {generated}: use data of"
            " the same size"
        )
    for info in trained:
        check_conditions(info, dataset)
    source = {"train": dataset.train, "held_out": dataset.held_out}[options.split]
    extractor = _build_extractor(dataset, str(config.data), options)
    if len(source) < LEAST_IMAGES:
        raise ValueError(
            f"reference {options.split} of {config.data} has {len(source)} images: use"
            f" {LEAST_IMAGES} or more"
        )
    moments, kept, digest = _extract_reference(extractor, source)
    # Folders of one name may have other images: a row of theirs is another row.
    split = options.split.replace("_", " ")
    name = f"{config.data}, {split}, {len(source):,} images, sha256:{digest[:8]}"
    if len(source) > MOST_NEIGHBOURS:
        name += f" ({MOST_NEIGHBOURS:,} drawn for all but FD)"
    return Reference(extractor, moments, kept, name, source, dataset.held_out)


def image_shape(model: TrainedModel) -> tuple[int, ...]:
    """The shape [H, W, C] of a model's images, which for latents is not that of x."""
    return model.image_shape


def _build_extractor(dataset: Dataset, name: str, options: ReferenceOptions) -> Extractor:
    cache = features.cache_folder() if options.cache is None else options.cache
    if options.features == "pixels":
        return features.pixels()
    if options.features == "inception":
        return features.inception(options.inception)
    if dataset.classes < 2:
        has = "one class" if dataset.classes else "no class labels"
        raise ValueError(
            f"features is 'cnn', and {name} has {has}, where a classifier needs two classes or"
            " more: use pixels or inception"
        )
    return features.small_cnn(
        dataset.train, dataset.held_out, dataset.classes, cache, 0, f"{name} train split"
    )


def _extract_reference(extractor: Extractor, source: Any) -> tuple[Moments, np.ndarray, str]:
    """The moments of all images, the features of MOST_NEIGHBOURS at most, and a checksum."""
    # Drawn from all of them: images may be sorted by class.
    chosen = np.zeros(len(source), bool)
    chosen[np.random.default_rng(0).permutation(len(source))[:MOST_NEIGHBOURS]] = True
    moments, kept = Moments.empty(extractor.extract(source[0]["image"][None]).features.shape[1]), []
    digest = hashlib.sha256()
    for images in _chunks(source, f"features of real images, {extractor.name}"):
        digest.update(images.data)
        extracted = extractor.extract(images).features
        moments = moments.update(extracted)
        kept.append(extracted[chosen[moments.count - len(extracted) : moments.count]])
    return moments, np.concatenate(kept), digest.hexdigest()


def _chunks(source: Any, title: str) -> Iterator[np.ndarray]:
    """The images of a split, uint8 [n, H, W, C] at a time."""
    with tqdm(total=len(source), desc=title, unit="image", dynamic_ncols=True, leave=False) as bar:
        for first in range(0, len(source), CHUNK):
            last = min(first + CHUNK, len(source))
            images = np.stack([source[i]["image"] for i in range(first, last)])
            bar.update(len(images))
            yield images


# ------------------------------------------------------------------------------- generated images


def timed_batch(num: int) -> int:
    """The default batch: small enough for a median time, and divisible by the devices."""
    devices = jax.device_count()
    return max(devices, min(num // LEAST_BATCHES, LARGEST_BATCH) // devices * devices)


def check_batch(num: int, batch: int) -> None:
    """Check that `num` images are enough batches for a median time.

    Raises: ValueError for fewer than `LEAST_BATCHES`, or a batch that the devices cannot share.
    """
    parallel.check_divisible(batch, jax.device_count())
    if -(-num // batch) < LEAST_BATCHES:
        raise ValueError(
            f"num is {num} and batch is {batch}: a median time needs {LEAST_BATCHES} batches or"
            " more, so use more images or a smaller batch"
        )


def evaluation_condition(conditioning: Conditioning, source: Any, num: int) -> Condition:
    """The conditions of images to be compared with real ones, a pytree [num, ...].

    All classes in turn; for what cannot be enumerated, the conditions of the first examples of
    `source`, repeated.

    Raises: ValueError for examples without a field of the condition.
    """
    try:
        return conditioning.spread(num)
    except ValueError:
        try:
            _, condition = first_examples(source, min(num, len(source)), conditioning)
        except KeyError as error:
            raise ValueError(
                f"the real images have no field {error}, which the model is conditioned on: use"
                " the data that it was trained on"
            ) from None
        return jax.tree.map(lambda leaf: leaf[np.arange(num) % len(leaf)], condition)


def quality_context(
    model: TrainedModel, plan: Plan, sampler_name: str, request: Request, reference: Reference
) -> QualityContext:
    """The context of the row that `measure` returns, known before anything is sampled."""
    context = Context.of(model, plan, sampler_name, request)
    return QualityContext(
        **vars(context), extractor=reference.extractor.name, reference=reference.name
    )


def measure(
    model: TrainedModel,
    pipeline: Pipeline,
    reference: Reference,
    plan: Plan,
    sampler_name: str,
    request: Request,
    hooks: Hooks | None = None,
) -> tuple[QualityRow, Samples]:
    """Generate images by a plan, and compare them with real ones.

    Without a condition, the request gets those of `evaluation_condition`.

    Raises: NotFiniteError for images that are not finite; ValueError as `Pipeline`.
    """
    conditioning = model.info.conditioning
    if request.condition is None:
        condition = evaluation_condition(conditioning, reference.source, request.num)
        request = replace(request, condition=condition)
    try:
        samples = pipeline(model.params, plan, request, hooks)
    except NotFiniteError as error:
        raise NotFiniteError(f"{sampler_name}: {error}") from error
    outputs = extract(reference.extractor, samples.images)
    row = QualityRow.join(
        quality_context(model, plan, sampler_name, request, reference),
        compare(reference, outputs, class_accuracy(conditioning, request.condition, outputs)),
        BatchTiming.of(samples, request.batch),
    )
    return row, samples


def compare(reference: Reference, generated: Outputs, accuracy: float | None) -> QualityMetrics:
    """The metrics of generated images. accuracy: of their classes, if known."""
    vectors, probabilities = generated
    moments = Moments.empty(vectors.shape[1]).update(vectors)
    few = vectors[:MOST_NEIGHBOURS]
    kd, kd_error = metrics.kernel_distance(reference.features, few)
    precision, recall = metrics.precision_recall(reference.features, few)
    score = None
    if probabilities is not None:
        score, _ = metrics.inception_score(probabilities, splits=1)
    return QualityMetrics(
        fd=metrics.frechet_distance(reference.moments, moments),
        kd=kd,
        kd_error=kd_error,
        inception_score=score,
        precision=precision,
        recall=recall,
        class_accuracy=accuracy,
        real_class_accuracy=reference.extractor.accuracy,
    )


def class_accuracy(
    conditioning: Conditioning, condition: Condition, outputs: Outputs
) -> float | None:
    """The share of images that are classified as their label.

    None without labels, or for a classifier of other classes.
    """
    labels, probabilities = conditioning.labels(condition), outputs.probabilities
    if labels is None or probabilities is None:
        return None
    if probabilities.shape[1] != _num_classes(conditioning):
        return None
    return float(np.mean(probabilities.argmax(1) == labels))


def _num_classes(conditioning: Conditioning) -> int | None:
    parts = conditioning.parts if isinstance(conditioning, Fields) else (conditioning,)
    return next((part.classes for part in parts if isinstance(part, ClassLabel)), None)


def extract(extractor: Extractor, images: np.ndarray) -> Outputs:
    """The outputs of an extractor for images, uint8 [N, H, W, C], some at a time."""
    chunks = [extractor.extract(images[i : i + CHUNK]) for i in range(0, len(images), CHUNK)]
    vectors = np.concatenate([chunk.features for chunk in chunks])
    probabilities = [chunk.probabilities for chunk in chunks if chunk.probabilities is not None]
    return Outputs(vectors, np.concatenate(probabilities) if probabilities else None)
