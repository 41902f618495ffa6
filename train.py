"""Train a diffusion model.

    python train.py CONFIG --workdir FOLDER [--train.steps 2000 ...]

The same command again resumes from the last checkpoint. `python train.py CONFIG --help` lists every field of a
configuration with its default.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from diffjax import cli, experiment, loss, picture, sampler, schedule
from diffjax.run import Description, Generator, Guidance, count_parameters, describe_devices
from diffjax.training import data, loop, parallel
from diffjax.training.checkpoint import FOLDER, Checkpoints
from diffjax.training.sources import UnreadableError
from diffjax.training.step import TrainState, init_state, make_eval_step, make_train_step

PROGRAM = "train.py"
HELD_OUT_BATCHES = 10  # at most, per evaluation
PREVIEW_STEPS, PREVIEW_SCALE, PREVIEW_SEED, PREVIEW_IMAGES = 50, 2.0, 0, 40  # by DDIM


@dataclass(frozen=True)
class Options:
    """Train a diffusion model. The same command again resumes from the last checkpoint."""

    workdir: str
    """Run folder: checkpoints, metrics.jsonl, preview pictures."""
    config: Annotated[experiment.Config, tyro.conf.arg(name="")]


def main(arguments: list[str]) -> None:
    """Parse and train."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells every save at length
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{__doc__}\nconfigurations: {', '.join(experiment.names())}")
        return
    with cli.one_sentence(PROGRAM):
        config = experiment.named(arguments[0])
    options = cli.parse(Options, f"{PROGRAM} {arguments[0]}", arguments[1:], Options(tyro.MISSING, config))
    train(options.config, Path(options.workdir))


def train(config: experiment.Config, workdir: Path) -> None:
    """Train a configuration in a run folder, from its last checkpoint if it holds one."""
    steps, batch, seed = config.train.steps, config.train.batch, config.train.seed
    devices = jax.device_count()
    with cli.one_sentence(PROGRAM):
        experiment.check(config)
        parallel.check_divisible(batch, devices, "train.batch")
        checkpoints = Checkpoints(workdir, config.train.keep) if (workdir / FOLDER).is_dir() else None
        saved = checkpoints.steps() if checkpoints else []
        start, stored = max(saved, default=0), None
        if checkpoints and saved:  # of step 0: a network from elsewhere
            stored = Description.from_dict(checkpoints.config(start))
            for change in experiment.check_resume(stored.config, config):
                print(f"changed since the checkpoint: {change}")
        if start >= steps:
            print(f"{workdir} has done its {start} steps: sample from it, or go on with a higher --train.steps")
            return
        dataset = experiment.load_data(config)
        if config.data.labels and not dataset.classes:
            raise ValueError(f"{config.data} has no class labels: train with --data.no-labels")
        description = Description(config, dataset.image_shape, dataset.classes if config.data.labels else 0)
        if stored and stored[1:] != description[1:]:
            raise ValueError(
                f"{workdir} was trained on images and classes {stored[1:]}, now they are {description[1:]}"
            )
        batches = data.batches(dataset.train, batch, seed, start, labels=config.data.labels, flip=config.data.flip)
        held_out = data.first_batches(dataset.held_out, batch, devices, HELD_OUT_BATCHES, labels=config.data.labels)
        levels, prediction = experiment.build_schedule(config), experiment.build_prediction(config)
        unet = experiment.build_unet(config, description.image_shape, description.classes)
        network, null, drop_rate = (
            experiment.build_network(config, unet),
            description.classes,
            config.train.label_dropout,
        )
        weighting, times = experiment.build_weighting(config), experiment.build_times(config)
        objective = loss.denoising(network, prediction, levels, weighting, times, null, drop_rate)
        # The held-out loss is L_simple over independent levels whatever the weighting, so that runs compare.
        held_out_objective = loss.denoising(lambda *inputs: network(*inputs[:-1]), prediction, levels)
        params = experiment.init_params(unet, description.image_shape, jax.random.key(seed))
        optimizer, rate = experiment.build_optimizer(config)
        # Whole on every device from the start, so that the first step can reuse its memory like every other.
        everywhere = parallel.whole(parallel.device_mesh())
        state = init_state(params, optimizer)
        if checkpoints is None:
            workdir.mkdir(parents=True, exist_ok=True)
            checkpoints = Checkpoints(workdir, config.train.keep)
        state = checkpoints.restore(start, state, everywhere) if saved else jax.device_put(state, everywhere)
        metrics = loop.MetricsFile(workdir / "metrics.jsonl", start)

    train_step = parallel.pmap(make_train_step(objective, optimizer, config.train.ema, seed), donate=True)
    eval_step = parallel.pmap(make_eval_step(held_out_objective, seed))

    def evaluate(state: TrainState) -> None:
        losses = [float(eval_step(state.ema, parallel.shard(b, devices))) for b in held_out]
        metrics.write(int(state.step), held_out_loss=np.mean(losses))

    def log(step: int, **values: Any) -> None:
        metrics.write(step, learning_rate=rate(step - 1), **values)

    print(
        f"{'resuming' if start else 'training'} {workdir} at step {start} of {steps}: {config.data}, "
        f"{count_parameters(params):,} parameters, batch {batch}, {describe_devices()}, {config.network.dtype}"
    )
    every = (
        loop.Every(config.train.eval_every, evaluate),
        loop.Every(config.train.preview_every, preview(workdir, network, description)),
        loop.Every(config.train.save_every, lambda state: checkpoints.save(state, description.to_dict())),
    )
    shards = (parallel.shard(b, devices) for b in batches)
    try:
        with loop.interruptible() as stop:
            state = loop.fit(train_step, state, shards, steps, log, config.train.log_every, every, stop)
        if state.step < steps:
            checkpoints.save(state, description.to_dict())
    except FloatingPointError as error:
        cli.stop(PROGRAM, f"{error}: start again from the last checkpoint with a lower --train.learning-rate")
    except UnreadableError as error:
        cli.stop(PROGRAM, error)
    finally:
        checkpoints.close()
    if state.step < steps:
        print(f"interrupted: the same command goes on from step {state.step}", file=sys.stderr)
        raise SystemExit(130)
    print(f"done: sample with 'python sample.py {workdir}'")


def preview(workdir: Path, network: Any, description: Description) -> Callable[[TrainState], None]:
    """Writes previews/STEP.png: the same seeds every time, from the moving average."""
    config, image_shape, classes = description
    levels = experiment.build_schedule(config)
    plan = sampler.ddim(levels, schedule.trailing(levels, min(PREVIEW_STEPS, schedule.length(levels))))
    generate = Generator(network, experiment.build_prediction(config), image_shape, classes)
    devices, num = jax.device_count(), PREVIEW_IMAGES
    labels = np.arange(num, dtype=np.int32) % classes if classes else None
    scale = PREVIEW_SCALE if classes and config.train.label_dropout > 0 else 1.0

    def write(state: TrainState) -> None:
        batch = parallel.round_up(num, devices)
        made = generate(state.ema, plan, labels, num, guidance=Guidance(scale), seed=PREVIEW_SEED, batch=batch)
        captions = None if labels is None else [str(label) for label in labels]
        sheet = picture.grid(made.images, captions, columns=10)
        picture.save_png(workdir / "previews" / f"{int(state.step):07d}.png", sheet)

    return write


if __name__ == "__main__":
    cli.main(main)
