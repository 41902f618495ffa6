"""The row that cannot be ambiguous: no step count without its sampler, no time without its context."""

from collections.abc import Sequence
from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Sampling:
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


_COLUMNS = {
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


def markdown(rows: Sequence[Sampling]) -> str:
    """A table of rows, every row with its whole context."""
    cells = [list(_COLUMNS)] + [[str(cell(row)) for cell in _COLUMNS.values()] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(_COLUMNS))]
    lines = ["| " + " | ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def as_dict(row: Sampling) -> dict[str, object]:
    """For JSON."""
    return {f.name: getattr(row, f.name) for f in fields(row)} | {"images_per_second": row.images_per_second}
