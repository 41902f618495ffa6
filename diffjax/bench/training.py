"""The cost of training beside its steps: dispatches, real data, and saves."""

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from diffjax.bench.timing import describe_context, interleaved
from diffjax.build import count_parameters, load_data, model_info
from diffjax.checkpoint import Checkpoints, silence_orbax, tree_sha256
from diffjax.config import Config, load_config
from diffjax.data.batches import READ_AHEAD, batch_stream
from diffjax.data.dataset import Dataset
from diffjax.devices import parallel
from diffjax.evaluation.results import median_and_spread
from diffjax.training import loop
from diffjax.training.setup import ParallelTraining, build_training
from diffjax.training.state import TrainState, state_to_trees

MAX_REPEATS = 9  # a step of mnist_small takes most of a second on two cores
BLOCK = 10  # steps of a turn
DISPATCHED = 10  # steps in one dispatch
DRAWN = 2 * READ_AHEAD  # batches of a turn that only reads them: more than may lie ready
RANDOM_IMAGES = 2000  # where there are no real ones


class Trainer:
    """A configuration's training on all devices of this process, with its own data."""

    def __init__(self, name: str, config: Config, dataset: Dataset, images: str) -> None:
        """Nothing is compiled yet. images: a description of the data.

        Raises: ValueError for data, a batch and a network that do not fit each other.
        """
        train = config.train
        self.name, self.config, self.images = name, config, images
        self.info = model_info(config, dataset)
        parallel.check_divisible(train.batch, jax.device_count(), "train.batch", train.accumulate)
        self.real_batches = batch_stream(
            dataset.train,
            train.batch,
            train.seed,
            conditioning=self.info.conditioning,
            flip=config.data.flip,
        )
        self.constant_batches = itertools.repeat(next(self.real_batches))
        self._training = ParallelTraining(build_training(self.info), train)
        self.state = self._training.init_state(train.seed)

    def train(
        self,
        batches: Iterator[Any],
        steps: int,
        per_dispatch: int = 1,
        actions: tuple[loop.PeriodicAction, ...] = (),
    ) -> TrainState:
        """Train some steps more."""
        options = loop.LoopOptions(
            steps=int(self.state.step) + steps,
            log_every=self.config.train.log_every,
            per_dispatch=per_dispatch,
            progress=False,
        )
        self.state = loop.fit(
            self._training.step, self.state, batches, _log_nothing, options, actions
        )
        return self.state

    def read(self) -> None:
        """Read DRAWN batches, and do nothing with them."""
        for _ in range(DRAWN):
            next(self.real_batches)

    def save(self, checkpoints: Checkpoints) -> float:
        """Save after one step more: the seconds for which training stands still.

        The checkpoint is on disk when this returns.
        """
        action = _TimedSave(checkpoints, self._training, self.info.to_dict())
        self.train(self.constant_batches, 1, actions=(loop.PeriodicAction(1, action),))
        checkpoints.wait()  # as in training, where the next one is far
        return action.seconds

    def __str__(self) -> str:
        """The columns of a row that describe what is trained."""
        parameters = count_parameters(self.state.params)
        batch = f"{self.config.train.batch} of {self.info.describe_x()}"
        return f"{self.name}, {parameters:,} parameters | {batch} | {self.images}"


def _log_nothing(step: int, **metrics: Any) -> None:
    pass


class _TimedSave:
    """A save as an action of the training loop, timed."""

    def __init__(
        self, checkpoints: Checkpoints, training: ParallelTraining, info: dict[str, Any]
    ) -> None:
        self._checkpoints, self._training, self._info = checkpoints, training, info
        self.seconds = 0.0

    def __call__(self, state: TrainState) -> None:
        jax.block_until_ready(state)
        began = time.perf_counter()
        trees = state_to_trees(self._training.global_state(state))
        self._checkpoints.save(int(state.step), trees, self._info)
        self.seconds = time.perf_counter() - began


# ------------------------------------------------------------------------------- data


def trainers(npz: Path | None) -> list[Trainer]:
    """The trainings that are measured: digits, and mnist_small.

    npz: a file of images for mnist_small; None for MNIST of tensorflow-datasets, or random images
    of its size where it cannot be had.

    Raises: ValueError for a file that cannot be trained on.
    """
    small, large = load_config("digits"), load_config("mnist_small")
    digits = Trainer("digits", small, load_data(small), str(small.data))
    if npz is not None:
        dataset, images = load_data(with_npz(large, npz)), npz.name
    else:
        try:
            dataset, images = load_data(large), str(large.data)
        except ValueError:
            dataset = random_images(large)
            images = f"{RANDOM_IMAGES:,} random images, no {large.data} here"
    return [digits, Trainer("mnist_small", large, dataset, images)]


def with_npz(config: Config, path: Path) -> Config:
    """The configuration on the images of a file."""
    data = dataclasses.replace(config.data, source="npz", path=str(path))
    return dataclasses.replace(config, data=data)


def random_images(config: Config) -> Dataset:
    """A data set of random grey images of 28x28 and labels of 0 to 9."""
    r = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.npz"
        images = r.integers(0, 256, (RANDOM_IMAGES, 28, 28), np.uint8)
        np.savez(path, x=images, y=r.integers(0, 10, RANDOM_IMAGES))
        return load_data(with_npz(config, path))


# ------------------------------------------------------------------------------- figures


def bench_training(trainers: list[Trainer], pairs: int) -> str:
    """The table of all figures.

    pairs: turns of each, at most MAX_REPEATS.
    """
    repeats, lines = min(pairs, MAX_REPEATS), []
    silence_orbax()
    total = len(trainers) * 6 * (repeats + 1)
    with tqdm(total=total, desc="bench training", unit="turn", dynamic_ncols=True) as bar:
        for trainer in trainers:
            bar.set_postfix_str(trainer.name)
            lines += [f"| {trainer} | {row} |" for row in measure(trainer, repeats, bar.update)]
    return (
        f"{describe_context(repeats)} turns of {BLOCK} steps, ± half the distance of the quartiles"
        "\n\n| network | batch | images | what | figure | ± | goal |\n"
        "|---|---|---|---|---|---|---|\n" + "\n".join(lines)
    )


def measure(trainer: Trainer, repeats: int, progress: Callable[[], Any]) -> list[str]:
    """The rows of one training.

    progress: called after every turn.
    """

    def counted(function: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            value = jax.block_until_ready(function())
            progress()
            return value

        return run

    turns = (
        lambda: trainer.train(trainer.constant_batches, BLOCK),
        lambda: trainer.train(trainer.real_batches, BLOCK),
        lambda: trainer.train(trainer.real_batches, BLOCK, DISPATCHED),
    )
    constant, real, dispatched = interleaved([counted(turn) for turn in turns], repeats).T / BLOCK
    read = interleaved([counted(trainer.read)], repeats)[:, 0] / DRAWN
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder))
        save = counted(lambda: trainer.save(checkpoints))
        blocked = np.array([save() for _ in range(repeats + 1)][1:])
        checkpoints.close()
    checksum = interleaved([counted(lambda: tree_sha256(trainer.state))], repeats)[:, 0]
    every = trainer.config.train.save_every
    # Only where a step is long enough to hide the reading.
    goal = "at most 1.10" if trainer.name == "mnist_small" else ""
    ms = "{:.1f} ms"
    rows = [
        ("step, 1 per dispatch", _cells(1e3 * real, ms), ""),
        (f"step, {DISPATCHED} per dispatch", _cells(1e3 * dispatched, ms), ""),
        (f"{DISPATCHED} per dispatch / 1 per dispatch", _cells(dispatched / real, "{:.2f}"), ""),
        ("step on a constant batch", _cells(1e3 * constant, ms), ""),
        ("images read / constant batch", _cells(real / constant, "{:.2f}"), goal),
        ("a batch, read and not trained on", _cells(1e3 * read, ms), ""),
        ("a save, while training stands still", _cells(1e3 * blocked, ms), ""),
        ("of it, the checksums of its arrays", _cells(1e3 * checksum, ms), ""),
        (
            f"a save / the {every} steps from one to the next",
            _cells(1e2 * blocked / (every * np.median(real)), "{:.2f}%"),
            "at most 3%",
        ),
    ]
    return [" | ".join(row) for row in rows]


def _cells(values: np.ndarray, text: str) -> str:
    """Two cells of a table: the median, written as in "{:.1f} ms", and the spread."""
    median, spread = median_and_spread(values)
    return f"{text.format(median)} | {spread:.0%}"
