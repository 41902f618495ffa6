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
    FolderOptions,
    Model,
    Numbers,
    ReportOptions,
    Text,
    WeightsOptions,
)
from diffjax.data import image_io
from diffjax.data.batches import first_examples
from diffjax.evaluation.results import cells_markdown, escape_markdown
from diffjax.inference.defaults import check_seed
from diffjax.inference.editing import (
    Editor,
    EditRequest,
    Progress,
    check_mask,
    mask_of_x,
    trailing_from,
)
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
class OutputOptions(FolderOptions, ReportOptions):
    """Files to write. A file that an option names is replaced, others never are."""

    out: File = None
    """Picture of the images before and after (.png); None for a new name in the run folder, or
    for no picture with --out-dir."""


@dataclass(frozen=True)
class ImageOptions:
    """Images to edit."""

    images: Files = ()
    """Image files of any size; none for held-out images of the model's data."""
    num: int = 10
    """Number of held-out images, 1 or more, where no files are given."""
    condition: Text = None
    """Conditions, repeated over the images: for classes as in cat or 0,1,2.
    None for no condition."""


@dataclass(frozen=True)
class EditOptions:
    """Options of all edits."""

    model: Model
    """Run folder, or hf:FOLDER or hf:OWNER/NAME for a published model."""
    image: tyro.conf.OmitArgPrefixes[ImageOptions] = field(default_factory=ImageOptions)
    data: DataOptions = field(default_factory=DataOptions)
    output: tyro.conf.OmitArgPrefixes[OutputOptions] = field(default_factory=OutputOptions)
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
    seed: int = 0
    """Seed of the noise, from 0."""
    variants: int = 1
    """Variants of each image from each level, 1 or more; the next has the next seed."""
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
    seed: int = 0
    """Seed of the noise, from 0."""
    variants: int = 1
    """Variants of each image, 1 or more; the next has the next seed."""
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
    names: list[str]  # of the images, each different, as in "00003-cat"
    condition: Condition  # a pytree [N, ...]; None for none

    def __str__(self) -> str:
        """A description, as in "10 images of 8x8x1, unet of digits (ema, step 1000)"."""
        size = "x".join(map(str, self.images.shape[1:]))
        name = f"{self.model.name} ({self.model.weights}, step {self.model.step})"
        count = len(self.images)
        return f"{count} image{'s' * (count != 1)} of {size}, {name}"


class Edited(NamedTuple):
    """The result of an edit."""

    rows: dict[str, np.ndarray]  # of the picture, by title: float32 [columns, H, W, C]
    images: list[np.ndarray]  # all edited images: float32 [H, W, C]
    report: str  # in Markdown


class Job(NamedTuple):
    """An edit whose options were checked."""

    rows: int  # rows of plans to run for each batch
    names: list[str]  # of the edited images, each different, as in "00003-cat-level-300-seed-0"
    run: Callable[[Progress], Edited]


def parse(program: str, arguments: list[str]) -> Any:
    """Parse the options of one of the edits."""
    return common.parse(Options, program, arguments, description=DESCRIPTION)


def run(options: Any) -> None:
    """Edit, write, print. options: one of the union `Options`."""
    name = type(options).__name__.lower()
    sets = 2 if isinstance(options, Interpolate) else 1
    with common.user_errors():
        scene = open_scene(options)
        job = PREPARE[type(options)](scene, options)
        outputs = check_outputs(options, name, job)
    total = job.rows * scene.editor.batches(len(scene.images) // sets)
    with common.progress_bar(total) as bar:
        edited = job.run(common.compiling(bar, name))
        bar.set_description("writing")
        with common.user_errors():
            write(outputs, edited, job.names)
    common.print_report(edited.report, outputs.report)
    if outputs.picture:
        shown = f", of the first {sets * SHOWN} images" if len(scene.images) > sets * SHOWN else ""
        print(f"wrote {outputs.picture}{shown}")
    if outputs.folder:
        print(f"wrote {len(job.names)} images to {outputs.folder}")


class Outputs(NamedTuple):
    """Paths of the files to write, all of which were checked."""

    picture: Path | None
    report: Path | None
    folder: Path | None  # of the edited images


def check_outputs(options: EditOptions, name: str, job: Job) -> Outputs:
    """The files to write. name: of the edit.

    Raises: ValueError for one that cannot be written, or is an image to edit.
    """
    output = options.output
    report = output.check_report()
    folder = output.check_folder([f"{each}.png" for each in job.names])
    # Last, since its folder may be created.
    return Outputs(picture_path(options, name), report, folder)


def picture_path(options: EditOptions, name: str) -> Path | None:
    """The path of the picture of all images, None for no picture.

    Raises: ValueError for one that cannot be written, or is an image to edit.
    """
    output = options.output
    if output.out:
        out = common.check_output(Path(output.out), ".png")
        if any(out.resolve() == Path(image).resolve() for image in options.image.images):
            raise ValueError(f"output file {out} is one of the images to edit: name another file")
        return out
    if output.out_dir is not None:
        return None
    own = output_folder(options.model) / "edits" / f"{name}.png"
    return common.check_output(common.free_path(own), ".png")


def write(outputs: Outputs, edited: Edited, names: list[str]) -> None:
    """Write all files. names: of the edited images."""
    if outputs.folder:
        for name, image in zip(names, edited.images, strict=True):
            image_io.save_image(outputs.folder / f"{name}.png", image_io.to_uint8(image))
    if outputs.picture:
        columns = max(len(row) for row in edited.rows.values())
        images = image_io.to_uint8(np.concatenate(list(edited.rows.values())))
        picture = image_io.grid(images, columns=columns, titles=list(edited.rows))
        image_io.save_png(outputs.picture, picture)


def open_scene(options: EditOptions) -> Scene:
    """The model, its images and their condition; prints how files were made to fit.

    Raises: ValueError or OSError for what cannot be opened.
    """
    asked = options.image
    model = load_model(options.model, options.weight.checkpoint, options.weight.weights)
    editor, conditioning = Editor(model), model.info.conditioning
    if asked.images:
        images = _read_images(asked.images, model)
        words = [common.file_word(Path(name).stem) for name in asked.images]
    else:
        config = options.data.locate(model.info.config)
        images, _ = first_examples(load_data(config).held_out, asked.num)
        words = ["held-out"] * len(images)
    condition = None
    if asked.condition is not None:
        condition = conditioning.parse(asked.condition, len(images))
    elif conditioning.is_conditional and not can_be_guided(model.info):
        raise ValueError(
            f"condition is not given, and {model.name} was trained with train.condition_dropout"
            " 0, so it needs one"
        )
    names = [f"{i:05}-{word}" for i, word in enumerate(words)]
    return Scene(model, editor, images, names, condition)


def _read_images(names: tuple[str, ...], model: TrainedModel) -> np.ndarray:
    height, width, channels = model.image_shape
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
    names = [f"{name}-{each}-steps" for each in steps for name in scene.names]
    return Job(2 * sum(steps), names, partial(_reconstruct, scene, steps))


def _reconstruct(scene: Scene, steps: list[int], progress: Progress) -> Edited:
    rows, images = {"original": scene.images[:SHOWN]}, []
    heads = "steps of DDIM, either way", "mean squared error in [0, 1]", "DDIM, table 2: CIFAR-10"
    lines = [[*heads, "of"]]
    for each in steps:
        edit = EditRequest(each, scene.condition, progress)
        found = scene.editor.reconstruct(scene.images, edit)
        rows[f"{each} steps and back"] = found[:SHOWN]
        images += list(found)
        error = np.mean((found - scene.images) ** 2) / 4
        lines.append([str(each), f"{error:.2g}", str(TABLE_2.get(each, "")), str(scene)])
    return Edited(rows, images, cells_markdown(lines))


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
    pairs = list(zip(scene.names[::2], scene.names[1::2], strict=True))
    names = [f"{a}-to-{b}-{weight:.3f}" for weight in weights for a, b in pairs]
    job = partial(_interpolate, scene, options.steps, weights)
    return Job((2 + len(weights)) * options.steps, names, job)


def _interpolate(scene: Scene, steps: int, weights: np.ndarray, progress: Progress) -> Edited:
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
    return Edited(rows, [image for row in found for image in row], escape_markdown(report))


def prepare_vary(scene: Scene, options: Vary) -> Job:
    """Vary from each level, by each seed."""
    guidance, seeds = make_guidance(scene, options.guidance), variant_seeds(options)
    sampler.check_eta(options.eta)
    levels = common.parse_integers("start", options.start)
    schedule.trailing(scene.model.schedule, options.steps)
    T = schedule.length(scene.model.schedule)
    steps = {level: max(1, options.steps * level // T) for level in levels}
    for level, n in steps.items():
        trailing_from(scene.model.schedule, level, n)
    names = [
        f"{name}-level-{level}-seed-{seed}"
        for level in levels
        for seed in seeds
        for name in scene.names
    ]
    job = partial(_vary, scene, options, guidance, steps, seeds)
    return Job(sum(steps.values()) * len(seeds), names, job)


def _vary(
    scene: Scene,
    options: Vary,
    guidance: Guidance,
    steps: dict[int, int],
    seeds: range,
    progress: Progress,
) -> Edited:
    rows, images = {"original": scene.images[:SHOWN]}, []
    for level, n in steps.items():
        for seed in seeds:
            varied = scene.editor.vary(
                scene.images,
                EditRequest(n, scene.condition, progress),
                level=level,
                seed=seed,
                eta=options.eta,
                guidance=guidance,
            )
            rows[f"from level {level}{_by_seed(seed, seeds)}"] = varied[:SHOWN]
            images += list(varied)
    report = (
        f"{scene}, by DDIM with eta {options.eta:g} in {list(steps.values())} steps, guidance"
        f" {guidance}"
    )
    return Edited(rows, images, escape_markdown(report))


def variant_seeds(options: Vary | Inpaint) -> range:
    """The seeds of the variants.

    Raises: ValueError for less than one variant, or seeds that are too large.
    """
    if options.variants < 1:
        raise ValueError(f"variants is {options.variants}: use 1 or more")
    seeds = range(options.seed, options.seed + options.variants)
    check_seed(seeds[0])
    check_seed(seeds[-1])
    return seeds


def _by_seed(seed: int, seeds: range) -> str:
    return f", seed {seed}" if len(seeds) > 1 else ""


def prepare_inpaint(scene: Scene, options: Inpaint) -> Job:
    """Inpaint the part that a mask names."""
    guidance, seeds = make_guidance(scene, options.guidance), variant_seeds(options)
    sampler.check_eta(options.eta)
    if options.resample < 1:
        raise ValueError(f"resample is {options.resample}: use 1 or more")
    schedule.trailing(scene.model.schedule, options.steps)
    shape = scene.images.shape
    mask = check_mask(read_mask(options.mask, shape[1:]), shape)
    mask_of_x(mask, (len(scene.images), *scene.model.info.x_shape))
    rows = options.steps * options.resample * len(seeds)
    names = [f"{name}-inpainted-seed-{seed}" for seed in seeds for name in scene.names]
    return Job(rows, names, partial(_inpaint, scene, options, guidance, mask, seeds))


def _inpaint(
    scene: Scene,
    options: Inpaint,
    guidance: Guidance,
    mask: np.ndarray,
    seeds: range,
    progress: Progress,
) -> Edited:
    rows = {"original": scene.images[:SHOWN], "known": (scene.images * mask)[:SHOWN]}
    images = []
    for seed in seeds:
        found = scene.editor.inpaint(
            scene.images,
            mask,
            EditRequest(options.steps, scene.condition, progress),
            seed=seed,
            eta=options.eta,
            resamples=options.resample,
            guidance=guidance,
        )
        rows[f"inpainted{_by_seed(seed, seeds)}"] = found[:SHOWN]
        images += list(found)
    known = np.tile((mask == 1).all(-1), (len(seeds), 1, 1))  # pixels
    differ = (np.stack(images) != np.tile(scene.images, (len(seeds), 1, 1, 1))).any(-1)
    changed = (differ & known).sum()
    report = (
        f"{scene}, by DDIM with eta {options.eta:g} in {options.steps} steps, each taken"
        f" {options.resample} times, guidance {guidance}; {changed} of {known.sum()} known pixels"
        " changed"
    )
    return Edited(rows, images, escape_markdown(report))


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
