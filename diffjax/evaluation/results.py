"""The row that cannot be ambiguous: no step count without its sampler, no time without its context."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class SamplingRow:
    """One timed run of a sampler. Every field is needed: a row without its context cannot be built."""

    sampler: str  # with its parameters, as in "ddim(eta=0, trailing)"
    steps: int  # calls of the denoiser
    nfe: int  # network evaluations per image, counted: guidance takes two a step
    guidance: float  # 0 unconditional, 1 conditional, more is guided
    guided: str  # the scale with all else that guides, as in "2 in 0.3..5 rescaled 0.7"
    compile_seconds: float  # spent compiling for this row; 0 where earlier rows had compiled it all
    run_seconds: float  # for all images, compilation apart
    images: int
    batch: int
    network: str
    parameters: int
    weights: str  # with the training step
    image_size: str
    device: str  # with the number of devices
    dtype: str

    @property
    def images_per_second(self) -> float:
        """Throughput, compilation apart."""
        return self.images / self.run_seconds


_COLUMNS: dict[str, Callable[[Any], Any]] = {
    "sampler": lambda row: row.sampler,
    "steps": lambda row: row.steps,
    "NFE": lambda row: row.nfe,
    "guidance": lambda row: row.guided,
    "compile s": lambda row: f"{row.compile_seconds:.2f}",
    "run s": lambda row: f"{row.run_seconds:.2f}",
    "images/s": lambda row: f"{row.images_per_second:.1f}",
    "network": lambda row: f"{row.network}, {row.parameters:,} parameters",
    "weights": lambda row: row.weights,
    "images": lambda row: f"{row.images} of {row.image_size}",
    "batch": lambda row: row.batch,
    "device": lambda row: row.device,
    "dtype": lambda row: row.dtype,
}


@dataclass(frozen=True, kw_only=True)
class LikelihoodRow:
    """How probable a network finds held-out images. Every field is needed."""

    measure: str  # with its parameters, as in "probability flow, tsit5 to 0.0001, 1 probe"
    bits_per_dim: float  # mean over images, and repeats
    error: float  # standard error over images
    spread: float | None  # standard deviation of that mean over repeats with other probes; None if not repeated
    repeats: int
    evaluations: float  # of the network, per image and repeat
    derivatives: float  # of the network along a direction, per image and repeat
    given: str  # what the network was told: "labels", "no labels"
    images: int
    data: str  # with its split
    network: str
    parameters: int
    weights: str
    image_size: str
    dtype: str


_BITS_COLUMNS: dict[str, Callable[[Any], Any]] = {
    "measure": lambda row: row.measure,
    "bits/dim": lambda row: f"{row.bits_per_dim:.3f} ± {row.error:.3f}",
    "spread over repeats": lambda row: "" if row.spread is None else f"{row.spread:.4f} of {row.repeats}",
    "evaluations": lambda row: f"{row.evaluations:.0f}",
    "derivatives": lambda row: f"{row.derivatives:.0f}",
    "given": lambda row: row.given,
    "images": lambda row: f"{row.images} of {row.image_size}, {row.data}",
    "network": lambda row: f"{row.network}, {row.parameters:,} parameters",
    "weights": lambda row: row.weights,
    "dtype": lambda row: row.dtype,
}


@dataclass(frozen=True, kw_only=True)
class TimingRow:
    """What one computation costs. Every field is needed."""

    what: str  # "forward", "train step", or the sampler with its parameters
    steps: int | None  # of the sampler; None for what is none
    nfe: int | None
    guidance: str
    seconds: float  # median over the repeats
    spread: float  # half the distance of its quartiles, as a share of the median
    repeats: int
    flops: float | None  # of one such computation, as XLA counts them
    ceiling: float  # FLOP/s of the machine's own matrix product, of the same dtype, measured in the same run
    peak_bytes: int  # arguments, results and temporaries at their most
    compile_seconds: float
    cached_seconds: float  # to take the compiled program from the persistent cache
    peer: str  # what it was timed beside, with versions; "" for nothing
    peer_seconds: float | None
    ratio: float | None  # the peer's seconds over these: the median of what each turn says
    network: str
    parameters: int
    batch: int
    image_size: str
    device: str
    dtype: str

    @property
    def mfu(self) -> float | None:
        """Share of the ceiling that was reached."""
        return None if self.flops is None else self.flops / self.seconds / self.ceiling


@dataclass(frozen=True, kw_only=True)
class QualityRow:
    """How good and how quick the images of one sampler are. Every field is needed, and ValueError tells of those that
    say nothing: a figure without its context cannot be built.
    """

    sampler: str  # with its dials and its spacing, as in "ddim(eta=0, trailing)"
    clipping: str  # of estimates of x0: "clipped", "unclipped", or as in "thresholded 0.995"
    steps: int  # calls of the denoiser
    nfe: int  # network evaluations per image, counted
    guidance: float
    guided: str  # the scale with all else that guides
    frechet: float  # distance, of Gaussians through the features
    kernel: float  # distance, unbiased
    kernel_error: float  # its standard error
    inception: float | None  # score; None for features without classes
    precision: float
    recall: float
    recognised: float | None  # share of images whose label the extractor reads; None where either has none
    extractor: str  # of the features
    reference: str  # the real images, with their split and number
    images: int
    seed: int
    ms_per_image: float  # median over the batches, compilation apart
    spread: float  # half the distance of the batches' quartiles, as a share of the median
    batches: int
    batch: int
    compile_seconds: float  # spent for this row; 0 where earlier rows had compiled it all
    network: str
    parameters: int
    weights: str  # with the training step
    image_size: str
    device: str  # with the number of devices
    dtype: str
    versions: str

    def __post_init__(self) -> None:
        """ValueError for what a reader could misunderstand."""
        for name in ("sampler", "clipping", "guided", *NETWORK, *CONTEXT):
            if getattr(self, name) in ("", None):
                raise ValueError(f"a row without its {name} says nothing: give it")
        if "(" not in self.sampler:
            raise ValueError(f"sampler {self.sampler!r} is ambiguous: name its dials, as in 'ddim(eta=0, trailing)'")
        if self.batches < LEAST_BATCHES:
            raise ValueError(f"a time of {self.batches} batches is no median: time {LEAST_BATCHES} or more")
        if min(self.steps, self.nfe, self.images) < 1 or not self.ms_per_image > 0:
            raise ValueError("steps, NFE, images and milliseconds are above 0")


LEAST_BATCHES = 5  # behind a median time
# What two rows share that may stand on one axis, their network apart.
CONTEXT = ("images", "reference", "extractor", "image_size", "batch", "device", "dtype", "versions")
NETWORK = ("network", "parameters", "weights")

_QUALITY_COLUMNS: dict[str, Callable[[Any], Any]] = {
    "sampler": lambda row: row.sampler,
    "steps": lambda row: row.steps,
    "NFE": lambda row: row.nfe,
    "guidance": lambda row: row.guided,
    "ms/image": lambda row: f"{row.ms_per_image:.3g} ± {row.spread:.0%}",
    "Frechet": lambda row: f"{row.frechet:.4g}",
    "kernel": lambda row: f"{row.kernel:.3g} ± {row.kernel_error:.1g}",
    "inception": lambda row: _optional("{:.2f}", row.inception),
    "precision": lambda row: f"{row.precision:.3f}",
    "recall": lambda row: f"{row.recall:.3f}",
    "recognised": lambda row: _optional("{:.1%}", row.recognised),
    "images": lambda row: f"{row.images} of {row.image_size}",
    "seed": lambda row: row.seed,
    "features": lambda row: row.extractor,
    "real images": lambda row: row.reference,
    "clipping": lambda row: row.clipping,
    "network": lambda row: f"{row.network}, {row.parameters:,} parameters",
    "weights": lambda row: row.weights,
    "batch": lambda row: f"{row.batches} of {row.batch}",
    "compile s": lambda row: f"{row.compile_seconds:.2f}",
    "device": lambda row: row.device,
    "dtype": lambda row: row.dtype,
    "versions": lambda row: row.versions,
}


def _optional(text: str, value: float | None) -> str:
    return "" if value is None else text.format(value)


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


_TIMING_COLUMNS: dict[str, Callable[[Any], Any]] = {
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


_ALL_COLUMNS = {
    SamplingRow: _COLUMNS, LikelihoodRow: _BITS_COLUMNS, TimingRow: _TIMING_COLUMNS, QualityRow: _QUALITY_COLUMNS
}  # fmt: skip


Row = SamplingRow | LikelihoodRow | TimingRow | QualityRow


def markdown(rows: Sequence[Row]) -> str:
    """A table of rows of one kind, every row with its whole context."""
    return table(cells(rows))


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The heads of such a table, and the texts of its lines."""
    columns = _ALL_COLUMNS[type(rows[0])]
    return [list(columns)] + [[str(cell(row)) for cell in columns.values()] for row in rows]


def table(lines: Sequence[Sequence[str]]) -> str:
    """Markdown of cells, line by line, the first of them the heads."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = ["| " + " | ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *rows[1:]])


def as_dict(row: SamplingRow) -> dict[str, object]:
    """For JSON."""
    return {f.name: getattr(row, f.name) for f in fields(row)} | {"images_per_second": row.images_per_second}
