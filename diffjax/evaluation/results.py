"""Rows of results, each with its whole context, and tables of them.

A step count without its sampler, or a time without its device, cannot be written down: rows are
contexts with figures added, and contexts have no defaults.
"""

import functools
import importlib.metadata
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import jax
import numpy as np

from diffjax.build import count_parameters
from diffjax.inference.model import TrainedModel, describe_weights
from diffjax.inference.pipeline import (
    Bound,
    Clip,
    Request,
    Samples,
    describe_bound,
    describe_devices,
)
from diffjax.sampler import Plan

LEAST_BATCHES = 5  # behind a median time
LEAST_ACCURACY = 0.9  # of a classifier on held-out real images, for its verdict to count

# ------------------------------------------------------------------------------- contexts


@dataclass(frozen=True, kw_only=True)
class NetworkContext:
    """The network that a figure is measured on."""

    network: str
    parameters: int
    image_size: str  # of x, as in "32x32x3"
    dtype: str

    def __post_init__(self) -> None:
        """Check that nothing is missing.

        Raises: ValueError, naming the field, for an empty text or None.
        """
        _check_complete(self, NetworkContext)


@dataclass(frozen=True, kw_only=True)
class ModelContext(NetworkContext):
    """A trained network, and the machine and libraries that it is run by."""

    weights: str  # with training step and checksum, as in "ema, step 1000, sha256:45f1fd30"
    device: str  # with the number of devices
    versions: str

    def __post_init__(self) -> None:
        """Check that nothing is missing, as `NetworkContext`."""
        super().__post_init__()
        _check_complete(self, ModelContext)

    @staticmethod
    def of_model(model: TrainedModel) -> "ModelContext":
        """The context of a model. The checksum of its weights is computed once."""
        return ModelContext(
            network=model.name,
            parameters=count_parameters(model.params),
            image_size=model.info.describe_x(),
            dtype=model.info.config.network.dtype,
            weights=_describe_weights_once(model),
            device=describe_devices(),
            versions=versions(),
        )


@dataclass(frozen=True, kw_only=True)
class Context(ModelContext):
    """All that samples depend on: the model, the sampler, and what is requested."""

    sampler: str  # with its options and spacing, as in "ddim(eta=0, trailing)"
    clipping: str  # of estimates of x0: "clipped", "unclipped", or as in "thresholded 0.995"
    steps: int  # calls of the denoiser
    guidance: float  # 0 unconditional, 1 conditional, more is guided
    guided: str  # the scale with the rest of the guidance, as in "2 in 0.3..5 rescaled 0.7"
    images: int
    batch: int
    seed: int

    def __post_init__(self) -> None:
        """Check that nothing is missing, and that the sampler is named in full.

        Raises: ValueError, naming the field, for an empty text or None, a sampler without its
        options, or steps and images below 1.
        """
        super().__post_init__()
        _check_complete(self, Context)
        if "(" not in self.sampler:
            raise ValueError(
                f"sampler is {self.sampler!r}, without its options: use a full name such as"
                " 'ddim(eta=0, trailing)'"
            )
        for name in ("steps", "images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: use 1 or more")

    @staticmethod
    def of(model: TrainedModel, plan: Plan, sampler_name: str, request: Request) -> "Context":
        """The context of samples from a model by a plan."""
        return Context(
            **vars(ModelContext.of_model(model)),
            sampler=sampler_name,
            clipping=_describe_clipping(model, request.bound),
            steps=plan.steps,
            guidance=request.guidance.scale,
            guided=str(request.guidance),
            images=request.num,
            batch=request.batch,
            seed=request.seed,
        )


@dataclass(frozen=True, kw_only=True)
class QualityContext(Context):
    """All that quality depends on: the real images and the features too."""

    extractor: str  # of the features
    reference: str  # the real images, with their split and number

    def __post_init__(self) -> None:
        """Check that nothing is missing, as `Context`."""
        super().__post_init__()
        _check_complete(self, QualityContext)


@dataclass(frozen=True, kw_only=True)
class ReconstructionContext(ModelContext):
    """All that the quality of reconstructions depends on."""

    latent_size: str  # as in "8x8x4"
    scaling: float
    images: int
    batch: int
    data: str  # of the images, with their split
    extractor: str  # of the features
    reference: str  # the real images, with their split and number

    def __post_init__(self) -> None:
        """Check that nothing is missing, as `NetworkContext`."""
        super().__post_init__()
        _check_complete(self, ReconstructionContext)


@functools.cache
def versions() -> str:
    """The versions of the libraries that figures depend on."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("diffjax", "jax"))


def _check_complete(row: Any, context: type[NetworkContext]) -> None:
    for field in fields(context):
        if getattr(row, field.name) in ("", None):
            raise ValueError(f"{field.name} is empty: a row of results needs its whole context")


def _describe_clipping(model: TrainedModel, bound: Bound) -> str:
    # Where x has no bounds, a pipeline does not clip.
    unbounded = isinstance(bound, Clip) and model.codec.bounds is None
    return describe_bound(None if unbounded else bound)


_WEIGHTS: dict[tuple[Any, ...], str] = {}  # descriptions, by the identity of all arrays


def _describe_weights_once(model: TrainedModel) -> str:
    # A checksum takes seconds for large models, and rows of one model are many.
    leaves = jax.tree.leaves(model.params)
    key = model.weights, model.step, *map(id, leaves)
    if key not in _WEIGHTS:
        _WEIGHTS[key] = describe_weights(model)
        for leaf in leaves:  # another array may have the same identity later
            weakref.finalize(leaf, _WEIGHTS.pop, key, None)
    return _WEIGHTS[key]


# ------------------------------------------------------------------------------- figures


def median_and_spread(values: Any) -> tuple[float, float]:
    """The median of times, and half the distance of their quartiles as a share of it."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return float(median), float((high - low) / 2 / median)


@dataclass(frozen=True, kw_only=True)
class QualityMetrics:
    """How far generated images are from real ones."""

    fd: float  # Frechet distance of Gaussians through the features; FID for Inception's
    kd: float  # kernel distance, unbiased; KID for Inception's
    kd_error: float  # its standard error
    inception_score: float | None  # None for features without classes
    precision: float
    recall: float
    class_accuracy: float | None  # share of images whose label is recognised; None without labels
    real_class_accuracy: float | None  # the same of held-out real images, by a trained classifier


@dataclass(frozen=True, kw_only=True)
class BatchTiming:
    """The cost of images, timed batch by batch."""

    nfe: int  # network evaluations per image, counted: guidance takes two a step
    ms_per_image: float  # median over the batches, without compilation
    spread: float  # half the distance of the batches' quartiles, as a share of the median
    batches: int
    compile_seconds: float  # spent for this row; 0 where earlier rows had compiled it all

    def __post_init__(self) -> None:
        """Check that the times are a median.

        Raises: ValueError for fewer than `LEAST_BATCHES` batches, or an NFE or a time of 0.
        """
        if self.batches < LEAST_BATCHES:
            raise ValueError(
                f"batches is {self.batches}: a median time needs {LEAST_BATCHES} or more"
            )
        if self.nfe < 1:
            raise ValueError(f"nfe is {self.nfe}: use 1 or more")
        if not self.ms_per_image > 0:
            raise ValueError(f"ms_per_image is {self.ms_per_image}: use more than 0")

    @staticmethod
    def of(samples: Samples, batch: int) -> "BatchTiming":
        """The timing of samples that were made in batches of `batch`."""
        milliseconds = 1e3 * np.array(samples.batch_seconds) / batch
        median, spread = median_and_spread(milliseconds)
        return BatchTiming(
            nfe=samples.nfe,
            ms_per_image=median,
            spread=spread,
            batches=len(milliseconds),
            compile_seconds=samples.compile_seconds,
        )


# ------------------------------------------------------------------------------- rows


@dataclass(frozen=True, kw_only=True)
class SamplingRow(Context):
    """One timed run of a sampler."""

    nfe: int  # network evaluations per image, counted: guidance takes two a step
    compile_seconds: float  # spent for this row; 0 where earlier rows had compiled it all
    run_seconds: float  # for all images, without compilation

    @property
    def images_per_second(self) -> float:
        """Throughput, without compilation."""
        return self.images / self.run_seconds


def sampling_row(
    model: TrainedModel, samples: Samples, plan: Plan, sampler_name: str, request: Request
) -> SamplingRow:
    """The row of samples, with its whole context."""
    return SamplingRow(
        **vars(Context.of(model, plan, sampler_name, request)),
        nfe=samples.nfe,
        compile_seconds=samples.compile_seconds,
        run_seconds=samples.run_seconds,
    )


@dataclass(frozen=True, kw_only=True)
class QualityRow(BatchTiming, QualityMetrics, QualityContext):
    """The quality and the cost of one sampler's images."""

    def __post_init__(self) -> None:
        """Check the context and the timing.

        Raises: ValueError, naming the field, for what a reader could misunderstand.
        """
        QualityContext.__post_init__(self)
        BatchTiming.__post_init__(self)

    @property
    def context(self) -> QualityContext:
        """The context without the figures: rows that agree in it measure the same."""
        names = (field.name for field in fields(QualityContext))
        return QualityContext(**{name: getattr(self, name) for name in names})

    @classmethod
    def join(cls, context: QualityContext, metrics: QualityMetrics, timing: BatchTiming) -> Self:
        """The row of a context and its figures."""
        return cls(**vars(context), **vars(metrics), **vars(timing))


@dataclass(frozen=True, kw_only=True)
class LikelihoodRow(ModelContext):
    """How probable held-out images are under a model."""

    measure: str  # with its parameters, as in "probability flow, tsit5 to 0.0001, 1 probe"
    bits_per_dim: float  # mean over images, and repeats
    error: float  # standard error over images
    spread: float | None  # standard deviation over repeats with other probes; None for one
    repeats: int
    evaluations: float  # of the network, per image and repeat
    derivatives: float  # of the network along a direction, per image and repeat
    given: str  # "condition" or "no condition"
    images: int
    data: str  # with its split


@dataclass(frozen=True, kw_only=True)
class ReconstructionRow(QualityMetrics, ReconstructionContext):
    """How much of held-out images an autoencoder keeps.

    The distances are those of the reconstructions from the reference, as of generated images.
    """

    psnr: float  # dB, of the mean squared error of all images
    ssim: float | None  # mean over images; None for images smaller than its window
    images_fd: float  # of the images themselves from the reference
    latent_std: float  # of the means of their latents, without scaling


@dataclass(frozen=True, kw_only=True)
class TimingRow(NetworkContext):
    """The cost of one computation."""

    what: str  # "forward", "train step", or the sampler with its options
    steps: int | None  # of the sampler; None for other computations
    nfe: int | None
    guidance: str
    seconds: float  # median over the repeats
    spread: float  # half the distance of its quartiles, as a share of the median
    repeats: int
    flops: float | None  # of one such computation, as XLA counts them
    ceiling: float  # FLOP/s of a matrix product of the same dtype, measured in the same run
    peak_bytes: int  # arguments, results and temporaries at their most
    compile_seconds: float
    cached_seconds: float  # to load the compiled program from the persistent cache
    peer: str  # the library it is timed beside, with versions; "" for none
    peer_seconds: float | None
    ratio: float | None  # the peer's seconds over these: the median of the ratios of each turn
    batch: int
    device: str

    @property
    def mfu(self) -> float | None:
        """The share of the ceiling that is reached."""
        return None if self.flops is None else self.flops / self.seconds / self.ceiling


Row = SamplingRow | QualityRow | LikelihoodRow | ReconstructionRow | TimingRow


def as_dict(row: Row) -> dict[str, Any]:
    """All fields of a row for JSON, and what is derived from them."""
    derived: dict[str, Any] = {}
    if isinstance(row, SamplingRow):
        derived["images_per_second"] = row.images_per_second
    if isinstance(row, TimingRow):
        derived["mfu"] = row.mfu
    return asdict(row) | derived


def classifier_warning(rows: Sequence[QualityRow | ReconstructionRow]) -> str:
    """A warning if a classifier recognises too few real images, else ""."""
    known = [row for row in rows if row.real_class_accuracy is not None]
    worst = min(known, key=lambda row: row.real_class_accuracy or 0.0, default=None)
    if worst is None or (worst.real_class_accuracy or 0.0) >= LEAST_ACCURACY:
        return ""
    return (
        f"the classifier recognises {worst.real_class_accuracy:.1%} of held-out real images"
        f" ({worst.extractor}): below {LEAST_ACCURACY:.0%}, class accuracy and distances by its"
        " features say little; inception and pixels do not depend on it"
    )


# ------------------------------------------------------------------------------- tables

Column = Callable[[Any], object]


def _optional(text: str, value: float | None) -> str:
    return "" if value is None else text.format(value)


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def _network(row: NetworkContext) -> str:
    return f"{row.network}, {row.parameters:,} parameters"


_SAMPLING_COLUMNS: dict[str, Column] = {
    "sampler": lambda row: row.sampler,
    "steps": lambda row: row.steps,
    "NFE": lambda row: row.nfe,
    "guidance": lambda row: row.guided,
    "clipping": lambda row: row.clipping,
    "compile s": lambda row: f"{row.compile_seconds:.2f}",
    "run s": lambda row: f"{row.run_seconds:.2f}",
    "images/s": lambda row: f"{row.images_per_second:.1f}",
    "network": _network,
    "weights": lambda row: row.weights,
    "images": lambda row: f"{row.images} of {row.image_size}",
    "batch": lambda row: row.batch,
    "seed": lambda row: row.seed,
    "device": lambda row: row.device,
    "dtype": lambda row: row.dtype,
}

_DISTANCE_COLUMNS: dict[str, Column] = {  # beside FD
    "KD": lambda row: f"{row.kd:.3g} ± {row.kd_error:.1g}",
    "inception score": lambda row: _optional("{:.2f}", row.inception_score),
    "precision": lambda row: f"{row.precision:.3f}",
    "recall": lambda row: f"{row.recall:.3f}",
    "class accuracy": lambda row: _optional("{:.1%}", row.class_accuracy),
    "real class accuracy": lambda row: _optional("{:.1%}", row.real_class_accuracy),
}

_QUALITY_COLUMNS: dict[str, Column] = {
    "sampler": lambda row: row.sampler,
    "steps": lambda row: row.steps,
    "NFE": lambda row: row.nfe,
    "guidance": lambda row: row.guided,
    "ms/image": lambda row: f"{row.ms_per_image:.3g} ± {row.spread:.0%}",
    "FD": lambda row: f"{row.fd:.4g}",
    **_DISTANCE_COLUMNS,
    "images": lambda row: f"{row.images} of {row.image_size}",
    "seed": lambda row: row.seed,
    "features": lambda row: row.extractor,
    "real images": lambda row: row.reference,
    "clipping": lambda row: row.clipping,
    "network": _network,
    "weights": lambda row: row.weights,
    "batch": lambda row: f"{row.batches} of {row.batch}",
    "compile s": lambda row: f"{row.compile_seconds:.2f}",
    "device": lambda row: row.device,
    "dtype": lambda row: row.dtype,
    "versions": lambda row: row.versions,
}

_LIKELIHOOD_COLUMNS: dict[str, Column] = {
    "measure": lambda row: row.measure,
    "bits/dim": lambda row: f"{row.bits_per_dim:.3f} ± {row.error:.3f}",
    "spread over repeats": lambda row: (
        "" if row.spread is None else f"{row.spread:.4f} of {row.repeats}"
    ),
    "evaluations": lambda row: f"{row.evaluations:.0f}",
    "derivatives": lambda row: f"{row.derivatives:.0f}",
    "given": lambda row: row.given,
    "images": lambda row: f"{row.images} of {row.image_size}, {row.data}",
    "network": _network,
    "weights": lambda row: row.weights,
    "device": lambda row: row.device,
    "dtype": lambda row: row.dtype,
}

_RECONSTRUCTION_COLUMNS: dict[str, Column] = {
    "latents": lambda row: row.latent_size,
    "PSNR dB": lambda row: f"{row.psnr:.2f}",
    "SSIM": lambda row: _optional("{:.4f}", row.ssim),
    "FD": lambda row: f"{row.fd:.4g}",
    "FD of the images": lambda row: f"{row.images_fd:.4g}",
    **_DISTANCE_COLUMNS,
    "images": lambda row: f"{row.images} of {row.image_size}, {row.data}",
    "std of latents": lambda row: f"{row.latent_std:.4g}",
    "scaling": lambda row: f"{row.scaling:.5g}",
    "features": lambda row: row.extractor,
    "real images": lambda row: row.reference,
    "network": _network,
    "weights": lambda row: row.weights,
    "batch": lambda row: row.batch,
    "device": lambda row: row.device,
    "dtype": lambda row: row.dtype,
    "versions": lambda row: row.versions,
}

_TIMING_COLUMNS: dict[str, Column] = {
    "network": lambda row: f"{row.network}, {row.parameters:,}",
    "what": lambda row: row.what,
    "steps": lambda row: _optional("{}", row.steps),
    "NFE": lambda row: _optional("{}", row.nfe),
    "guidance": lambda row: row.guidance,
    "batch": lambda row: f"{row.batch} of {row.image_size}",
    "dtype": lambda row: row.dtype,
    "ms": lambda row: _milliseconds(row.seconds),
    "±": lambda row: f"{row.spread:.0%}",
    "of": lambda row: row.repeats,
    "diffusers ms": lambda row: _milliseconds(row.peer_seconds),
    "diffusers / diffjax": lambda row: _optional("{:.2f}", row.ratio),
    "GFLOP": lambda row: _optional("{:,.3f}", row.flops and row.flops / 1e9),
    "MFU": lambda row: _optional("{:.0%}", row.mfu),
    "peak MB": lambda row: f"{row.peak_bytes / 1e6:.0f}",
    "compile s": lambda row: f"{row.compile_seconds:.2f}",
    "from cache s": lambda row: f"{row.cached_seconds:.2f}",
}

_COLUMNS: dict[type, dict[str, Column]] = {
    SamplingRow: _SAMPLING_COLUMNS,
    QualityRow: _QUALITY_COLUMNS,
    LikelihoodRow: _LIKELIHOOD_COLUMNS,
    ReconstructionRow: _RECONSTRUCTION_COLUMNS,
    TimingRow: _TIMING_COLUMNS,
}


def metric_names(rows: Sequence[Any]) -> dict[str, str]:
    """The heads of the distances: FID and KID for Inception, else FD and KD.

    rows: those of QualityRow or ReconstructionRow.
    """
    if all(row.extractor.startswith("inception") for row in rows):
        return {"FD": "FID", "FD of the images": "FID of the images", "KD": "KID"}
    return {"FD": "FD", "KD": "KD"}


def table_markdown(rows: Sequence[Row]) -> str:
    """A Markdown table of rows of one kind, each with its whole context."""
    return cells_markdown(cells(rows))


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The texts of such a table, line by line, the heads first."""
    columns = _COLUMNS[type(rows[0])]
    heads = list(columns)
    if isinstance(rows[0], QualityRow | ReconstructionRow):
        names = metric_names([row for row in rows if isinstance(row, type(rows[0]))])
        heads = [names.get(head, head) for head in heads]
    return [heads] + [[str(cell(row)) for cell in columns.values()] for row in rows]


def escape_markdown(text: str) -> str:
    """The text with what Markdown would read as its own escaped."""
    return re.sub(r"([\\|<&])", r"\\\1", " ".join(text.splitlines()))


def cells_markdown(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells, line by line, the heads first."""
    lines = [[escape_markdown(text) for text in line] for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = [
        "| " + " | ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    return "\n".join([rows[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *rows[1:]])
