"""Train a diffusion model.

    diffjax train CONFIG --workdir FOLDER [--train.steps 2000 ...]

    diffjax train CONFIG --dry-run v5e:2x2 [...]       # or cpu: only compile, and tell what a step costs

    diffjax train distill --teacher FOLDER --workdir FOLDER [--guidance 2 ...]      # into students of few steps

The same command again resumes from the last checkpoint. `diffjax train CONFIG --help` lists every field of a
configuration with its default.
"""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from PIL.Image import Image

from diffjax import checkpoint, schedule
from diffjax.bench import dry_run
from diffjax.build import build_prediction, build_schedule, describe_data, load_data
from diffjax.checkpoint import FOLDER, Checkpoints, SaveError
from diffjax.cli import common
from diffjax.config import Config, check_config, check_resume, config_names, load_config
from diffjax.data import image_io
from diffjax.data.batches import batch_stream, first_batches
from diffjax.data.dataset import UnreadableError
from diffjax.devices import parallel
from diffjax.inference import samplers
from diffjax.inference.pipeline import (
    Guidance,
    ModelInfo,
    Pipeline,
    TrainedModel,
    count_parameters,
    default_sampler,
    describe_devices,
    load_model,
)
from diffjax.training import curve, distill, loop
from diffjax.training.setup import Training, build_training
from diffjax.training.step import TrainState

PROGRAM = "diffjax train"
CURVE = "curve.png"
HELD_OUT_BATCHES = 10  # at most, per evaluation
PREVIEW_SCALE, PREVIEW_SEED, PREVIEW_IMAGES = 2.0, 0, 40


@dataclass(frozen=True)
class Options:
    """Train a diffusion model. The same command again resumes from the last checkpoint."""

    workdir: str
    """Run folder: checkpoints, metrics.jsonl, preview pictures."""
    dry_run: str | None = None
    """Only compile, for TPUs as in v5e:2x2 or for cpu, and tell what a step costs; needs no --workdir."""
    hosts: Annotated[parallel.DistributedOptions, tyro.conf.arg(name="")] = field(
        default_factory=parallel.DistributedOptions
    )
    tensorboard: bool = False
    """Also write the metrics and previews for TensorBoard, to the folder tensorboard of the run folder."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def main(arguments: list[str]) -> None:
    """Parse and train."""
    checkpoint.silence_orbax()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{__doc__}\nconfigurations: {', '.join(config_names())}")
        return
    if arguments[0] == "distill":
        distill_chain(arguments[1:])
        return
    with common.user_errors(PROGRAM):
        config = load_config(arguments[0])
    dry = any(word.replace("_", "-").startswith("--dry-run") for word in arguments)
    default = Options("" if dry else tyro.MISSING, config=config)
    options = common.parse(Options, f"{PROGRAM} {arguments[0]}", arguments[1:], default)
    if options.dry_run is not None:
        print_dry_run(options.config, options.dry_run)
        return
    with common.user_errors(PROGRAM):
        parallel.initialize_distributed(options.hosts)
    train(options.config, Path(options.workdir), options.tensorboard)


def print_dry_run(config: Config, target: str) -> None:
    """Print what the programs of a configuration would cost; exit code 2 where they do not fit."""
    with common.user_errors(PROGRAM):
        check_config(config)
        table, too_large = dry_run.report(config, target, *describe_data(config))
    print(table)
    if too_large:
        common.exit_with_error(PROGRAM, too_large)


def distill_chain(arguments: list[str]) -> None:
    """Parse, and train one student after the other, each the teacher of the next; those that are done stay."""
    program = f"{PROGRAM} distill"
    options = common.parse(distill.Options, program, arguments)
    with common.user_errors(program):
        parallel.initialize_distributed(options.hosts)
        teacher = load_model(options.teacher, options.checkpoint, options.weights)
    options = common.parse(distill.Options, program, arguments, distill.defaults(options, teacher))
    with common.user_errors(program):
        workdir, stages = Path(options.workdir), distill.stages(options, teacher)
        distill.check_workdir(workdir)
    for stage in stages:
        train(distill.taught(stage.config, teacher), workdir / stage.name, options.tensorboard, teacher)
        with common.user_errors(program):
            teacher = load_model(workdir / stage.name)


def train(config: Config, workdir: Path, tensorboard: bool = False, teacher: TrainedModel | None = None) -> None:
    """Train a configuration in a run folder, from its last checkpoint if it holds one; on all hosts that have joined,
    each of which calls this. teacher: of a configuration that is a student's.
    """
    steps, batch, seed, mode = config.train.steps, config.train.batch, config.train.seed, config.train.parallel
    host, hosts, labels = jax.process_index(), jax.process_count(), config.data.labels
    mesh = parallel.device_mesh()
    home = parallel.state_mesh(mesh, mode)
    build: Callable[..., Training] = build_training
    frozen: tuple[Any, ...] = ()
    if teacher is not None:
        build = partial(distill.build_training, teacher=teacher)
        frozen = (parallel.on_mesh(home, teacher.params),)
    with common.user_errors(PROGRAM):
        check_config(config)
        if workdir.is_file():
            raise ValueError(f"{workdir} is a file: name a folder as --workdir")
        parallel.check_divisible(batch, mesh.size, "train.batch", config.train.accumulate)
        checkpoints = open_checkpoints(workdir, config) if (workdir / FOLDER).is_dir() else None
        found = resume(checkpoints, config, mesh, build, frozen) if checkpoints else None
        start = int(found.state.step) if found else 0
        if start >= steps:
            if not (workdir / CURVE).exists():  # it may be in a folder that is not to be written to
                draw_curve(workdir, config)
            more = "" if teacher else ", or go on with a higher --train.steps"  # whose own students would learn anew
            say(f"{workdir} has done its {start} steps: sample from it{more}")
            return
        if host > 0:  # host 0 prepares the data, on a disk that the others may share
            multihost_utils.sync_global_devices("data")
        dataset = load_data(config)
        if host == 0 and hosts > 1:
            multihost_utils.sync_global_devices("data")
        description = ModelInfo(config, dataset.image_shape, dataset.classes if labels else 0)
        if found and found.description[1:] != description[1:]:
            raise ValueError(
                f"{workdir} was trained on images and classes {found.description[1:]}, now they are {description[1:]}"
            )
        batches = batch_stream(
            dataset.train, batch, seed, start, labels=labels, flip=config.data.flip, host=host, hosts=hosts
        )
        limit = HELD_OUT_BATCHES if config.train.eval_every else 0
        held_out = first_batches(dataset.held_out, batch, mesh.size, limit, labels=labels)
        held_out = [parallel.shard_batch(mesh, mode, parallel.process_slice(b, host, hosts)) for b in held_out]
        training = found.training if found else build(config, *description[1:])
        if found:  # whole on every device from the start, so that the first step can reuse its memory like every other
            state = parallel.on_mesh(home, found.state)
        else:
            init = lambda seed, *frozen: training.init(jax.random.key(seed), *frozen)  # noqa: E731
            state = jax.jit(init, out_shardings=parallel.replicated(home))(np.uint32(seed), *frozen)
        if checkpoints is None:
            workdir.mkdir(parents=True, exist_ok=True)
            checkpoints = open_checkpoints(workdir, config)
        metrics = loop.JsonlWriter(workdir / "metrics.jsonl", start) if host == 0 else None
        board = loop.TensorBoard(workdir / "tensorboard", start) if host == 0 and tensorboard else None
    train_step = parallel.parallelize(mesh, mode, training.step, axis=1, donate=True, frozen=bool(frozen))
    eval_step = parallel.parallelize(mesh, mode, training.eval_step, frozen=bool(frozen))

    def log(step: int, **values: Any) -> None:
        for sink in (metrics, board):
            if sink:
                sink.write(step, **values)

    def evaluate(state: TrainState) -> None:
        log(int(state.step), held_out_loss=np.mean([float(eval_step(state.ema[0], b, *frozen)) for b in held_out]))

    def save(state: TrainState) -> None:
        checkpoints.save(parallel.on_mesh(mesh, state), description.to_dict())

    def step(state: TrainState, batches: Any) -> Any:
        return train_step(state, parallel.shard_batch(mesh, mode, batches, axis=1), *frozen)

    say(
        f"{'resuming' if start else 'training'} {workdir} at step {start} of {steps}: {config.data}, "
        f"{count_parameters(state.params):,} parameters, batch {batch}, {describe_devices()}, {config.network.dtype}"
    )
    draw = preview(training.network, description)

    def show(state: TrainState) -> None:
        if host > 0:
            return
        step, sheet = int(state.step), draw(state)
        image_io.save_png(workdir / "previews" / f"{step:07d}.png", sheet)
        if board:
            board.picture(step, "samples", np.asarray(sheet.convert("RGB")))

    every = (
        loop.PeriodicAction(config.train.eval_every, evaluate),
        loop.PeriodicAction(config.train.preview_every, show),
        loop.PeriodicAction(config.train.save_every, save),
    )
    try:
        with loop.catch_signals(hosts) as stop:
            state = loop.fit(
                step, state, batches, steps, log, config.train.log_every, every, stop,
                config.train.steps_per_dispatch, config.train.max_skipped,
            )  # fmt: skip
            if state.step < steps:
                save(state)
            checkpoints.close()
    except FloatingPointError as error:
        with contextlib.suppress(SaveError):
            checkpoints.close()
        common.exit_with_error(
            PROGRAM, f"{error}: start again from the last checkpoint with a lower --train.learning-rate"
        )
    except UnreadableError as error:
        with contextlib.suppress(SaveError):
            checkpoints.close()
        common.exit_with_error(PROGRAM, error)
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}" if error.strerror and error.filename else error
        common.exit_with_error(
            PROGRAM, f"{reason}: put it right, and the same command goes on from the last checkpoint"
        )
    finally:
        if board:
            board.close()
    if state.step < steps:
        print(f"interrupted: the same command goes on from step {state.step}", file=sys.stderr)
        raise SystemExit(128 + stop())
    draw_curve(workdir, config)
    say(f"done: sample with 'diffjax sample {workdir}'")


def draw_curve(workdir: Path, config: Config) -> None:
    """Draw the losses of a run, from its metrics."""
    if jax.process_index() == 0 and (workdir / "metrics.jsonl").exists():
        with common.user_errors(PROGRAM):
            curve.draw(workdir / "metrics.jsonl", workdir / CURVE, f"{workdir.name}: {config.data}")


def say(text: str) -> None:
    """Print, once for all hosts."""
    if jax.process_index() == 0:
        print(text, flush=True)


def open_checkpoints(workdir: Path, config: Config) -> Checkpoints:
    """The checkpoints of this run, to be written."""
    return Checkpoints(workdir, config.train.keep, clean=True)


class Found(NamedTuple):
    """What a run goes on from."""

    description: ModelInfo  # as it was stored
    training: Training
    state: TrainState  # over all devices of all hosts


def resume(
    checkpoints: Checkpoints,
    config: Config,
    mesh: Mesh,
    build: Callable[..., Training] = build_training,
    frozen: tuple[Any, ...] = (),
) -> Found | None:
    """The latest checkpoint that is whole, None if there is none at all; later ones, which are not, are set aside.
    ValueError where none is whole, or the configuration is not one that can go on from it.
    """
    damaged: dict[int, ValueError] = {}
    for step in reversed(checkpoints.steps()):
        try:
            described = checkpoints.config(step)
        except ValueError as error:
            damaged[step] = error
            continue
        stored = ModelInfo.from_dict(described)  # of another version is not damaged
        changes = check_resume(stored.config, config)
        training = build(config, *stored[1:])
        like = jax.eval_shape(training.init, jax.random.key(0), *frozen)
        try:
            state = checkpoints.restore(step, like, parallel.replicated(mesh))
        except ValueError as error:
            damaged[step] = error
            continue
        for later in damaged:
            say(f"checkpoint {later} is damaged, and is now {checkpoints.set_aside(later)}: step {step} is used")
        for change in changes:
            say(f"changed since the checkpoint: {change}")
        return Found(stored, training, state)
    if damaged:
        raise damaged[max(damaged)]
    return None


def preview(network: Any, description: ModelInfo) -> Callable[[TrainState], Image]:
    """Draws a grid of samples on the devices of this host: the same seeds every time, from the first average."""
    config, image_shape, classes = description
    levels = build_schedule(config)
    task, (name, steps) = config.distillation, default_sampler(config.distillation, levels)
    plan, _ = samplers.named(name, levels, schedule.trailing(levels, steps), "trailing")
    mesh = parallel.device_mesh(jax.local_devices())
    generate = Pipeline(network, build_prediction(config), image_shape, classes, mesh, told=task.told)
    labels = np.arange(PREVIEW_IMAGES, dtype=np.int32) % classes if classes else None
    scale = PREVIEW_SCALE if classes and config.train.label_dropout > 0 else task.guidance

    def draw(state: TrainState) -> Image:
        params, batch = parallel.on_mesh(mesh, state.ema[0]), parallel.round_up(PREVIEW_IMAGES, mesh.size)
        made = generate(
            params, plan, labels, PREVIEW_IMAGES, guidance=Guidance(scale), seed=PREVIEW_SEED, batch=batch
        )  # fmt: skip
        return image_io.grid(made.images, None if labels is None else [str(label) for label in labels], columns=10)

    return draw
