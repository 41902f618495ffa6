"""Images that are there already: `diffjax edit COMMAND RUN`, each with a picture of before and after.

    diffjax edit reconstruct runs/digits --steps 10,20,50,100
    diffjax edit interpolate runs/digits --images a.png b.png
    diffjax edit vary runs/digits --levels 200,400,600 --labels 8 --guidance 2
    diffjax edit inpaint runs/digits --images photo.jpg --mask mask.png --resample 10

Images are files, of any size, or the first held-out images that the run was not trained on. Without --labels the
network is asked about images without a label.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tyro
from tqdm import tqdm

from diffjax import sampler, schedule
from diffjax.build import load_data
from diffjax.cli import common
from diffjax.config import suggest
from diffjax.data import image_io
from diffjax.data.batches import first_images
from diffjax.inference import editing
from diffjax.inference.editing import Editor, Progress, trailing_from
from diffjax.inference.pipeline import (
    Guidance,
    TrainedModel,
    check_guidance,
    check_seed,
    load_model,
    output_folder,
    read_labels,
)

PROGRAM = "diffjax edit"
SHOWN = 12  # images, or pairs of them, in a picture
REGIONS = ("left", "right", "top", "bottom", "center")
# Reconstruction error of arXiv:2010.02502, table 2, by the number of steps.
TABLE_2 = {10: 0.014, 20: 0.0065, 50: 0.0023, 100: 0.0009, 200: 0.0004, 500: 0.0001, 1000: 0.0001}


@dataclass(frozen=True)
class Common:
    """What all commands ask for."""

    run: tyro.conf.Positional[str]
    """Run folder, as train.py leaves it."""
    images: tuple[str, ...] = ()
    """Image files of any size; none for held-out images of the run's data."""
    num: int = 10
    """Held-out images, where no files are named."""
    labels: str | None = None
    """Comma-separated labels, repeated over the images; None for no label."""
    seed: int = 0
    """Of what noise is drawn."""
    weights: Literal["ema", "raw"] = "ema"
    """The moving average of the parameters, or the parameters as trained."""
    checkpoint: int | None = None
    """Training step of the checkpoint; None for the latest."""
    out: str | None = None
    """Picture of before and after (.png); None for a name in the run folder."""


@dataclass(frozen=True)
class Reconstruct(Common):
    """Encode images to noise and decode them, by DDIM: the error falls with the steps (arXiv:2010.02502, table 2)."""

    steps: str = "10,20,50,100"
    """Steps of either way, one number or several separated by commas."""


@dataclass(frozen=True)
class Interpolate(Common):
    """From each image to the next of its pair, through their noise: encode, slerp, decode, by DDIM."""

    steps: int = 50
    """Steps of either way."""
    between: int = 7
    """Images between the two of a pair."""


@dataclass(frozen=True)
class Vary(Common):
    """Noise images up to a level and sample from there: the higher, the less of them is left (arXiv:2108.01073)."""

    levels: str = "300,500,700"
    """Where to start, of 1 to T, one number or several separated by commas."""
    steps: int = 50
    """Steps from level T; from lower ones in proportion."""
    eta: float = 0.0
    """Noise of DDIM."""
    guidance: float = 1.0
    """Guidance scale."""


@dataclass(frozen=True)
class Inpaint(Common):
    """Make a part of images anew and keep the rest, to the last bit."""

    mask: str = "right"
    """What is made anew: the white pixels of an image file, or left, right, top, bottom or center."""
    steps: int = 50
    """Levels visited."""
    eta: float = 1.0
    """Noise of DDIM; 1 has the variance of DDPM."""
    resample: int = 5
    """How often every step is taken, so that what is made fits what is known (arXiv:2201.09865)."""
    guidance: float = 1.0
    """Guidance scale."""


class Scene(NamedTuple):
    """What an edit starts from."""

    run: TrainedModel
    editor: Editor
    images: np.ndarray  # float32 [N, H, W, C] in [-1, 1]
    labels: np.ndarray | None  # int [N]; None for a network without classes, or for no label


Rows = dict[str, np.ndarray]  # of the picture, by their titles: float32 [columns, H, W, C]
# How many rows of plans there are to run for each batch, and what runs them: picture and report.
Job = tuple[int, Callable[[Progress], tuple[Rows, str]]]


def main(arguments: list[str]) -> None:
    """Parse, open, edit, write, print."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{__doc__}\n'{PROGRAM} COMMAND --help' lists the options of {', '.join(COMMANDS)}")
        return
    command = arguments[0]
    if command not in COMMANDS:
        common.exit_with_error(PROGRAM, f"there is no command {command!r}: {suggest(command, list(COMMANDS))}")
    kind, prepare = COMMANDS[command]
    options = common.parse(kind, f"{PROGRAM} {command}", arguments[1:])
    with common.user_errors(PROGRAM):
        scene = open_scene(options)
        steps, edit = prepare(scene, options)
        out = common.check_output(Path(options.out or output_folder(options.run) / "edits" / f"{command}.png"), ".png")
    total = steps * scene.editor.batches(len(scene.images) // (2 if command == "interpolate" else 1))
    with tqdm(total=total, desc=command, unit="step", dynamic_ncols=True) as bar:
        rows, report = edit(bar.update)
    columns = max(len(row) for row in rows.values())
    sheet = image_io.grid(image_io.to_uint8(np.concatenate(list(rows.values()))), columns=columns, titles=list(rows))
    with common.user_errors(PROGRAM):
        image_io.save_png(out, sheet)
    print(report)
    most = 2 * SHOWN if command == "interpolate" else SHOWN
    shown = f", of the first {most} images" if len(scene.images) > most else ""
    print(f"wrote {out}{shown}")


def open_scene(options: Common) -> Scene:
    """The run, its images and labels; says what was done to files to make them fit."""
    run = load_model(options.run, options.checkpoint, options.weights)
    editor, (config, shape, classes) = Editor(run), run.description
    check_seed(options.seed)
    if options.images:
        read = [image_io.read(Path(name), shape) for name in options.images]
        for _, said in read:
            if said:
                print(said)
        images = image_io.to_float(np.stack([image for image, _ in read]))
    else:
        images, _ = first_images(load_data(config).held_out, options.num)
    labels = None
    if options.labels is not None:
        labels = read_labels(run, options.labels, len(images))
    elif classes and config.train.label_dropout == 0:
        raise ValueError(f"{run.name} was trained with train.label_dropout 0, so it asks for labels: name --labels")
    return Scene(run, editor, images, labels)


def prepare_reconstruct(scene: Scene, options: Reconstruct) -> Job:
    """Rows: the images, and for every number of steps the images again."""
    steps = whole_numbers("--steps", options.steps)
    for S in steps:
        scene.editor.levels(S)

    def edit(progress: Progress) -> tuple[Rows, str]:
        rows, lines = {"original": scene.images[:SHOWN]}, []
        for S in steps:
            again = scene.editor.reconstruct(scene.images, scene.labels, S, progress)
            rows[f"{S} steps and back"] = again[:SHOWN]
            error = np.mean((again - scene.images) ** 2) / 4
            lines.append(f"| {S} | {error:.2g} | {TABLE_2.get(S, '')} |")
        head = f"mean squared error in [0, 1], {describe(scene)} | DDIM, table 2: CIFAR-10 |\n|---|---|---|\n"
        return rows, f"| steps of DDIM, either way | {head}" + "\n".join(lines)

    return 2 * sum(steps), edit


def prepare_interpolate(scene: Scene, options: Interpolate) -> Job:
    """Rows: one per pair."""
    if len(scene.images) % 2:
        raise ValueError(f"there are {len(scene.images)} images: interpolation takes pairs, give an even number")
    if scene.labels is not None and (scene.labels[::2] != scene.labels[1::2]).any():
        raise ValueError(
            f"--labels is {options.labels!r}: both images of a pair are asked about under one label, as 3 or 3,3,8,8"
        )
    if options.between < 1:
        raise ValueError(f"--between is {options.between}: ask for at least one image")
    scene.editor.levels(options.steps)
    weights = np.linspace(0, 1, options.between + 2)

    def edit(progress: Progress) -> tuple[Rows, str]:
        first, second = scene.images[::2], scene.images[1::2]
        labels = None if scene.labels is None else scene.labels[::2]
        found = scene.editor.interpolate(first, second, labels, options.steps, weights, progress)
        rows = {
            f"pair {i + 1}": np.concatenate([first[i : i + 1], found[:, i], second[i : i + 1]])
            for i in range(min(len(first), SHOWN))
        }
        return rows, (
            f"{len(first)} pairs of {describe(scene)}, encoded and decoded by DDIM in {options.steps} steps; the outer"
            " two of each row are the images themselves"
        )

    return (2 + len(weights)) * options.steps, edit


def prepare_vary(scene: Scene, options: Vary) -> Job:
    """Rows: the images, and for every level what it makes of them."""
    guidance = make_guidance(scene, options.guidance)
    sampler.check_eta(options.eta)
    T = schedule.length(scene.run.schedule)
    levels = whole_numbers("--levels", options.levels)
    schedule.trailing(scene.run.schedule, options.steps)
    steps = [max(1, options.steps * level // T) for level in levels]
    for level, n in zip(levels, steps, strict=True):
        trailing_from(scene.run.schedule, level, n)

    def edit(progress: Progress) -> tuple[Rows, str]:
        rows = {"original": scene.images[:SHOWN]}
        for level, n in zip(levels, steps, strict=True):
            varied = scene.editor.vary(
                scene.images, scene.labels, level, n,
                eta=options.eta, guidance=guidance, seed=options.seed, progress=progress,
            )  # fmt: skip
            rows[f"from level {level}"] = varied[:SHOWN]
        return rows, f"{describe(scene)}, by DDIM of eta {options.eta:g} in {steps} steps, guidance {guidance}"

    return sum(steps), edit


def prepare_inpaint(scene: Scene, options: Inpaint) -> Job:
    """Rows: the images, what is known of them (grey where it is not), and the images made whole."""
    guidance = make_guidance(scene, options.guidance)
    sampler.check_eta(options.eta)
    if options.resample < 1:
        raise ValueError(f"--resample is {options.resample}: take every step once or more")
    schedule.trailing(scene.run.schedule, options.steps)
    mask = editing.check_mask(read_mask(options.mask, scene.images.shape[1:]), scene.images.shape)

    def edit(progress: Progress) -> tuple[Rows, str]:
        found = scene.editor.inpaint(
            scene.images, mask, scene.labels, options.steps,
            eta=options.eta, times=options.resample, guidance=guidance, seed=options.seed, progress=progress,
        )  # fmt: skip
        all_rows = {"original": scene.images, "known": scene.images * mask, "inpainted": found}
        rows = {title: row[:SHOWN] for title, row in all_rows.items()}
        known = (mask == 1).all(-1)  # pixels
        changed = ((found != scene.images).any(-1) & known).sum()
        return rows, (
            f"{describe(scene)}, by DDIM of eta {options.eta:g} in {options.steps} steps, each taken {options.resample}"
            f" times, guidance {guidance}; {changed} of {known.sum()} known pixels changed"
        )

    return options.steps * options.resample, edit


COMMANDS: dict[str, tuple[type[Common], Callable[[Scene, Any], Job]]] = {
    "reconstruct": (Reconstruct, prepare_reconstruct),
    "interpolate": (Interpolate, prepare_interpolate),
    "vary": (Vary, prepare_vary),
    "inpaint": (Inpaint, prepare_inpaint),
}


def whole_numbers(option: str, text: str) -> list[int]:
    """As written in an option, "10" or "10,20". ValueError, naming it, for anything else."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} is {text!r}: write whole numbers, separated by commas") from None


def make_guidance(scene: Scene, scale: float) -> Guidance:
    """Guidance as asked for. ValueError for such without a label, which has nothing to lead to."""
    guidance = Guidance(scale)
    check_guidance(scene.run, guidance)
    if scale != 1 and scene.labels is None:
        raise ValueError(f"--guidance is {scale:g}, but without a label there is nothing to lead to: name --labels")
    return guidance


def read_mask(text: str, shape: tuple[int, ...]) -> np.ndarray:
    """What is known, 1, and what is to be made, 0, as float32 [H, W, 1]: a region by name, or the black and the white
    of an image file, resized if need be. ValueError for another text that is no file.
    """
    height, width, _ = shape
    mask = np.ones((height, width, 1), np.float32)
    y, x = slice(None), slice(None)
    if text in ("left", "right"):
        x = slice(0, width // 2) if text == "left" else slice(width // 2, None)
    elif text in ("top", "bottom"):
        y = slice(0, height // 2) if text == "top" else slice(height // 2, None)
    elif text == "center":
        y, x = slice(height // 4, height - height // 4), slice(width // 4, width - width // 4)
    else:
        if not Path(text).is_file():
            raise ValueError(f"--mask is {text!r}: name an image file, or one of {', '.join(REGIONS)}")
        white, said = image_io.read(Path(text), (height, width, 1))
        if image_io.LAID_OVER in said:
            raise ValueError(f"{text} is transparent in parts: a mask is white where images are made anew, else black")
        if said:
            print(said)
        if ((white > 0) & (white < 255)).any():
            print(f"{text} has greys: from the middle one on they count as white")
        return (white < 128).astype(np.float32)
    mask[y, x] = 0
    return mask


def describe(scene: Scene) -> str:
    """As in "10 images of 8x8x1, unet of digits (ema, step 1000)"."""
    run, size = scene.run, "x".join(map(str, scene.images.shape[1:]))
    return f"{len(scene.images)} images of {size}, {run.name} ({run.weights}, step {run.step})"
