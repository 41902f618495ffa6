"""Edit images with a trained model."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro

from diffjax import sampler, schedule
from diffjax.build import load_data
from diffjax.cli import common
from diffjax.cli.options import (
    DataOptions,
    File,
    Files,
    Model,
    Numbers,
    Text,
    WeightsOptions,
)
from diffjax.data import image_io
from diffjax.data.batches import first_examples
from diffjax.evaluation.quality import image_shape
from diffjax.inference.defaults import check_seed
from diffjax.inference.editing import Editor, EditRequest, Progress, check_mask, trailing_from
from diffjax.inference.guidance import Guidance, can_be_guided, check_guidance
from diffjax.inference.model import TrainedModel, load_model, output_folder
from diffjax.nn.conditioning import Condition

DESCRIPTION = "Edit image files, or held-out images of the model's data."
SHOWN = 12  # images, or pairs of them, in a picture
REGIONS = ("left", "right", "top", "bottom", "center")
# The error of table 2 of arXiv:2010.02502, by the number of steps.
TABLE_2 = {10: 0.014, 20: 0.0065, 50: 0.0023, 100: 0.0009, 200: 0.0004, 500: 0.0001, 1000: 0.0001}

# ------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class ImageOptions:
    """Images to edit."""

    images: Files = ()
    """Image files of any size; none for held-out images of the model's data."""
    num: int = 10
    """Number of held-out images, 1 or more, where no files are given."""
    condition: Text = None
    """Conditions, repeated over the images: for classes as in 3 or 0,1,2.
    None for no condition."""
    seed: int = 0
    """Seed of the noise, from 0."""
    out: File = None
    """Picture of the images before and after (.png); None for a name in the run folder."""


@dataclass(frozen=True)
class EditOptions:
    """Options of all edits."""

    model: Model
    """Run folder, or hf:FOLDER or hf:OWNER/NAME for a published model."""
    image: tyro.conf.OmitArgPrefixes[ImageOptions] = field(default_factory=ImageOptions)
    data: DataOptions = field(default_factory=DataOptions)
    weight: tyro.conf.OmitArgPrefixes[WeightsOptions] = field(default_factory=WeightsOptions)


@dataclass(frozen=True)
class Reconstruct(EditOptions):
    """Encode images to noise and decode them, by DDIM (arXiv:2010.02502, table 2)."""

    steps: Numbers = "10,20,50,100"
    """Steps of encoding, and of decoding; several are separated by commas."""


@dataclass(frozen=True)
class Interpolate(EditOptions):
    """Interpolate between the two images of each pair, through their noise, by DDIM."""

    steps: int = 50
    """Steps of encoding, and of decoding."""
    between: int = 7
    """Number of images between the two of a pair, 1 or more."""


@dataclass(frozen=True)
class Vary(EditOptions):
    """Noise images up to a level, and sample from there (SDEdit, arXiv:2108.01073)."""

    start: Numbers = "300,500,700"
    """Noise levels to start from, 1 to T: the higher, the less of the images is left."""
    steps: int = 50
    """Steps from level T; from lower levels in proportion."""
    eta: float = 0.0
    """Noise of DDIM, 0 (none) to 1 (that of DDPM)."""
    guidance: Annotated[float, tyro.conf.arg(metavar="SCALE")] = 1.0
    """Guidance scale: 0 is unconditional, 1 conditional, and more is guided."""


@dataclass(frozen=True)
class Inpaint(EditOptions):
    """Generate a part of each image, and keep the rest exactly."""

    mask: Annotated[str, tyro.conf.arg(metavar="REGION|FILE")] = "right"
    """Part to generate: left, right, top, bottom or center, or the white pixels of an image
    file."""
    steps: int = 50
    """Noise levels that the sampler visits, from 1 to T."""
    eta: float = 1.0
    """Noise of DDIM, 0 (none) to 1 (that of DDPM)."""
    resample: int = 5
    """Times that every step is taken, 1 or more, so that the two parts fit together
    (arXiv:2201.09865)."""
    guidance: Annotated[float, tyro.conf.arg(metavar="SCALE")] = 1.0
    """Guidance scale: 0 is unconditional, 1 conditional, and more is guided."""


Options = (
    Annotated[Reconstruct, tyro.conf.subcommand("reconstruct")]
    | Annotated[Interpolate, tyro.conf.subcommand("interpolate")]
    | Annotated[Vary, tyro.conf.subcommand("vary")]
    | Annotated[Inpaint, tyro.conf.subcommand("inpaint")]
)

# ------------------------------------------------------------------------------- edits


class Scene(NamedTuple):
    """The model, images and conditions that an edit starts from."""

    model: TrainedModel
    editor: Editor
    images: np.ndarray  # float32 [N, H, W, C] in [-1, 1]
    condition: Condition  # a pytree [N, ...]; None for none

    def __str__(self) -> str:
        """A description, as in "10 images of 8x8x1, unet of digits (ema, step 1000)"."""
        size = "x".join(map(str, self.images.shape[1:]))
        name = f"{self.model.name} ({self.model.weights}, step {self.model.step})"
        return f"{len(self.images)} images of {size}, {name}"


Rows = dict[str, np.ndarray]  # of the picture, by title: float32 [columns, H, W, C]


class Job(NamedTuple):
    """An edit whose options were checked."""

    rows: int  # rows of plans to run for each batch
    run: Callable[[Progress], tuple[Rows, str]]  # returns the picture and the report


def parse(program: str, arguments: list[str]) -> Any:
    """Parse the options of one of the edits."""
    return common.parse(Options, program, arguments, description=DESCRIPTION)


def run(options: Any) -> None:
    """Edit, write, print. options: one of the union `Options`."""
    name = type(options).__name__.lower()
    with common.user_errors():
        scene = open_scene(options)
        job = PREPARE[type(options)](scene, options)
        out = options.image.out or output_folder(options.model) / "edits" / f"{name}.png"
        out = common.check_output(Path(out), ".png")
    sets = 2 if isinstance(options, Interpolate) else 1
    total = job.rows * scene.editor.batches(len(scene.images) // sets)
    with common.progress_bar(total, name) as bar:
        rows, report = job.run(bar.update)
    columns = max(len(row) for row in rows.values())
    images = image_io.to_uint8(np.concatenate(list(rows.values())))
    with common.user_errors():
        image_io.save_png(out, image_io.grid(images, columns=columns, titles=list(rows)))
    print(report)
    shown = f", of the first {sets * SHOWN} images" if len(scene.images) > sets * SHOWN else ""
    print(f"wrote {out}{shown}")


def open_scene(options: EditOptions) -> Scene:
    """The model, its images and their condition; prints how files were made to fit.

    Raises: ValueError or OSError for what cannot be opened.
    """
    asked = options.image
    model = load_model(options.model, options.weight.checkpoint, options.weight.weights)
    editor, conditioning = Editor(model), model.info.conditioning
    check_seed(asked.seed)
    if asked.images:
        images = _read_images(asked.images, model)
    else:
        config = options.data.locate(model.info.config)
        images, _ = first_examples(load_data(config).held_out, asked.num)
    condition = None
    if asked.condition is not None:
        condition = conditioning.parse(asked.condition, len(images))
    elif conditioning.is_conditional and not can_be_guided(model.info):
        raise ValueError(
            f"condition is not given, and {model.name} was trained with train.condition_dropout"
            " 0, so it needs one"
        )
    return Scene(model, editor, images, condition)


def _read_images(names: tuple[str, ...], model: TrainedModel) -> np.ndarray:
    height, width, channels = image_shape(model)
    images = []
    for name in names:
        image, changes = image_io.read(Path(name), (height, width, channels))
        if changes:
            print(changes)
        images.append(image)
    return image_io.to_float(np.stack(images))


def prepare_reconstruct(scene: Scene, options: Reconstruct) -> Job:
    """Reconstruct in each number of steps."""
    steps = common.parse_integers("steps", options.steps)
    for each in steps:
        scene.editor.levels(each)
    return Job(2 * sum(steps), partial(_reconstruct, scene, steps))


def _reconstruct(scene: Scene, steps: list[int], progress: Progress) -> tuple[Rows, str]:
    rows = {"original": scene.images[:SHOWN]}
    lines = [
        f"| steps of DDIM, either way | mean squared error in [0, 1], {scene}"
        " | DDIM, table 2: CIFAR-10 |",
        "|---|---|---|",
    ]
    for each in steps:
        edit = EditRequest(each, scene.condition, progress)
        found = scene.editor.reconstruct(scene.images, edit)
        rows[f"{each} steps and back"] = found[:SHOWN]
        error = np.mean((found - scene.images) ** 2) / 4
        lines.append(f"| {each} | {error:.2g} | {TABLE_2.get(each, '')} |")
    return rows, "\n".join(lines)


def prepare_interpolate(scene: Scene, options: Interpolate) -> Job:
    """Interpolate between pairs, which share a condition."""
    if len(scene.images) % 2:
        raise ValueError(f"there are {len(scene.images)} images: use an even number, for pairs")
    leaves = jax.tree.leaves(scene.condition)
    if any(not np.array_equal(leaf[::2], leaf[1::2]) for leaf in leaves):
        raise ValueError(
            f"condition is {options.image.condition!r}: use one for both images of a pair, as 3 or"
            " 3,3,8,8"
        )
    if options.between < 1:
        raise ValueError(f"between is {options.between}: use 1 or more")
    scene.editor.levels(options.steps)
    weights = np.linspace(0, 1, options.between + 2)
    job = partial(_interpolate, scene, options.steps, weights)
    return Job((2 + len(weights)) * options.steps, job)


def _interpolate(
    scene: Scene, steps: int, weights: np.ndarray, progress: Progress
) -> tuple[Rows, str]:
    first, second = scene.images[::2], scene.images[1::2]
    condition = jax.tree.map(lambda leaf: leaf[::2], scene.condition)
    edit = EditRequest(steps, condition, progress)
    found = scene.editor.interpolate(first, second, edit, weights)
    rows = {
        f"pair {i + 1}": np.concatenate([first[i : i + 1], found[:, i], second[i : i + 1]])
        for i in range(min(len(first), SHOWN))
    }
    report = (
        f"{len(first)} pairs of {scene}, encoded and decoded by DDIM in {steps} steps; the"
        " outer two of each row are the images themselves"
    )
    return rows, report


def prepare_vary(scene: Scene, options: Vary) -> Job:
    """Vary from each level."""
    guidance = make_guidance(scene, options.guidance)
    sampler.check_eta(options.eta)
    levels = common.parse_integers("start", options.start)
    schedule.trailing(scene.model.schedule, options.steps)
    T = schedule.length(scene.model.schedule)
    steps = [max(1, options.steps * level // T) for level in levels]
    for level, n in zip(levels, steps, strict=True):
        trailing_from(scene.model.schedule, level, n)
    return Job(sum(steps), partial(_vary, scene, options, guidance, levels, steps))


def _vary(
    scene: Scene,
    options: Vary,
    guidance: Guidance,
    levels: list[int],
    steps: list[int],
    progress: Progress,
) -> tuple[Rows, str]:
    rows = {"original": scene.images[:SHOWN]}
    for level, n in zip(levels, steps, strict=True):
        edit = EditRequest(n, scene.condition, progress)
        varied = scene.editor.vary(
            scene.images,
            edit,
            level=level,
            seed=options.image.seed,
            eta=options.eta,
            guidance=guidance,
        )
        rows[f"from level {level}"] = varied[:SHOWN]
    report = f"{scene}, by DDIM with eta {options.eta:g} in {steps} steps, guidance {guidance}"
    return rows, report


def prepare_inpaint(scene: Scene, options: Inpaint) -> Job:
    """Inpaint the part that a mask names."""
    guidance = make_guidance(scene, options.guidance)
    sampler.check_eta(options.eta)
    if options.resample < 1:
        raise ValueError(f"resample is {options.resample}: use 1 or more")
    schedule.trailing(scene.model.schedule, options.steps)
    mask = check_mask(read_mask(options.mask, scene.images.shape[1:]), scene.images.shape)
    rows = options.steps * options.resample
    return Job(rows, partial(_inpaint, scene, options, guidance, mask))


def _inpaint(
    scene: Scene, options: Inpaint, guidance: Guidance, mask: np.ndarray, progress: Progress
) -> tuple[Rows, str]:
    found = scene.editor.inpaint(
        scene.images,
        mask,
        EditRequest(options.steps, scene.condition, progress),
        seed=options.image.seed,
        eta=options.eta,
        resamples=options.resample,
        guidance=guidance,
    )
    all_rows = {"original": scene.images, "known": scene.images * mask, "inpainted": found}
    rows = {title: row[:SHOWN] for title, row in all_rows.items()}
    known = (mask == 1).all(-1)  # pixels
    changed = ((found != scene.images).any(-1) & known).sum()
    report = (
        f"{scene}, by DDIM with eta {options.eta:g} in {options.steps} steps, each taken"
        f" {options.resample} times, guidance {guidance}; {changed} of {known.sum()} known pixels"
        " changed"
    )
    return rows, report


PREPARE: dict[type, Callable[[Scene, Any], Job]] = {
    Reconstruct: prepare_reconstruct,
    Interpolate: prepare_interpolate,
    Vary: prepare_vary,
    Inpaint: prepare_inpaint,
}


def make_guidance(scene: Scene, scale: float) -> Guidance:
    """Guidance of a scale.

    Raises: ValueError for one that the model cannot have, or without a condition.
    """
    guidance = Guidance(scale)
    check_guidance(scene.model, guidance)
    if scale != 1 and scene.condition is None:
        raise ValueError(
            f"guidance is {scale:g} and condition is not given: give the condition to guide to"
        )
    return guidance


def read_mask(text: str, shape: tuple[int, ...]) -> np.ndarray:
    """The known pixels as 1 and those to generate as 0, float32 [H, W, 1].

    text: a region's name, or an image file of black and white, which is resized if need be.

    Raises: ValueError for a text that is neither, and for a transparent image.
    """
    if text not in REGIONS:
        return _read_mask_file(text, shape)
    height, width, _ = shape
    mask = np.ones((height, width, 1), np.float32)
    y, x = slice(None), slice(None)
    if text in ("left", "right"):
        x = slice(0, width // 2) if text == "left" else slice(width // 2, None)
    elif text in ("top", "bottom"):
        y = slice(0, height // 2) if text == "top" else slice(height // 2, None)
    else:
        y, x = (slice(n // 4, n - n // 4) for n in (height, width))
    mask[y, x] = 0
    return mask


def _read_mask_file(text: str, shape: tuple[int, ...]) -> np.ndarray:
    if not Path(text).is_file():
        raise ValueError(f"mask is {text!r}: use an image file, or one of {', '.join(REGIONS)}")
    white, changes = image_io.read(Path(text), (shape[0], shape[1], 1))
    if image_io.LAID_OVER in changes:
        raise ValueError(f"mask {text} is transparent in parts: use only white and black")
    if changes:
        print(changes)
    if ((white > 0) & (white < 255)).any():
        print(f"{text} has greys: those from the middle one on count as white")
    return (white < 128).astype(np.float32)
