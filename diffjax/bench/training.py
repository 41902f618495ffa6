"""What training costs beside its steps: one step in a dispatch beside ten, real data beside a constant batch, saves."""

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from diffjax.bench.timing import context, in_turns
from diffjax.build import load_data
from diffjax.checkpoint import Checkpoints, silence_orbax, tree_sha256
from diffjax.config import Config, load_config
from diffjax.data.batches import READ_AHEAD, batch_stream
from diffjax.data.dataset import Dataset
from diffjax.devices import parallel
from diffjax.inference.pipeline import ModelInfo, count_parameters
from diffjax.training import loop
from diffjax.training.setup import build_training
from diffjax.training.step import TrainState

REPEATS = 9  # at most: a step of mnist_small takes most of a second on two cores
BLOCK = 10  # steps of a turn
DISPATCHED = 10  # steps in one dispatch
DRAWN = 2 * READ_AHEAD  # batches of a turn that only draws them: more than may lie ready
RANDOM = 2000  # images, where there are no real ones


class Trainer:
    """A configuration's training as train.py runs it, on all devices of this process, with its own data."""

    def __init__(self, name: str, config: Config, dataset: Dataset, images: str) -> None:
        """images: what they are. ValueError for data, a batch and a network that do not fit each other."""
        self.name, self.config, self.images = name, config, images
        mode, batch, labels = config.train.parallel, config.train.batch, config.data.labels
        self.description = ModelInfo(config, dataset.image_shape, dataset.classes if labels else 0)
        self._mesh = parallel.device_mesh()
        parallel.check_divisible(batch, self._mesh.size, "train.batch", config.train.accumulate)
        self.real = batch_stream(dataset.train, batch, config.train.seed, labels=labels, flip=config.data.flip)
        self.constant = itertools.repeat(next(self.real))
        training = build_training(*self.description)
        home = parallel.state_mesh(self._mesh, mode)
        begin = jax.jit(lambda seed: training.init(jax.random.key(seed)), out_shardings=parallel.replicated(home))
        self.state: TrainState = begin(np.uint32(config.train.seed))
        step = parallel.parallelize(self._mesh, mode, training.step, axis=1, donate=True)
        self._step = lambda state, batches: step(state, parallel.shard_batch(self._mesh, mode, batches, axis=1))

    def train(
        self, batches: Iterator[Any], steps: int, per_dispatch: int = 1, every: tuple[loop.PeriodicAction, ...] = ()
    ) -> TrainState:
        """So many steps more."""
        self.state = loop.fit(
            self._step, self.state, batches, int(self.state.step) + steps, lambda step, **metrics: None,
            self.config.train.log_every, every, per_dispatch=per_dispatch, quiet=True,
        )  # fmt: skip
        return self.state

    def draw(self) -> None:
        """DRAWN batches, and nothing done with them."""
        for _ in range(DRAWN):
            next(self.real)

    def save(self, checkpoints: Checkpoints) -> float:
        """A checkpoint after one step more, on disk when this returns: the seconds for which training stood still."""
        seconds = 0.0

        def save(state: TrainState) -> None:
            nonlocal seconds
            jax.block_until_ready(state)
            began = time.perf_counter()
            checkpoints.save(parallel.on_mesh(self._mesh, state), self.description.to_dict())
            seconds = time.perf_counter() - began

        self.train(self.constant, 1, every=(loop.PeriodicAction(1, save),))
        checkpoints.wait()  # as in training, where the next one is far
        return seconds

    def __str__(self) -> str:
        """The columns of a row that tell what was trained."""
        size = "x".join(map(str, self.description.image_shape))
        batch = f"{self.config.train.batch} of {size}"
        return f"{self.name}, {count_parameters(self.state.params):,} parameters | {batch} | {self.images}"


def trainers(npz: Path | None) -> list[Trainer]:
    """Of digits, and of mnist_small: on an .npz file of images, else on tensorflow-datasets' MNIST, else, where this
    cannot be had, on random images of its size. ValueError for an .npz file that cannot be trained on.
    """
    small, large = load_config("digits"), load_config("mnist_small")
    made = [Trainer("digits", small, load_data(small), str(small.data))]
    if npz is None:
        try:
            dataset, images = load_data(large), str(large.data)
        except ValueError:
            dataset, images = random_images(large), f"{RANDOM:,} random images, no {large.data} here"
    else:
        dataset, images = load_data(of_npz(large, npz)), npz.name
    return [*made, Trainer("mnist_small", large, dataset, images)]


def of_npz(config: Config, path: Path) -> Config:
    """The same, on the images of a file."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, source="npz", path=str(path)))


def random_images(config: Config) -> Dataset:
    """RANDOM of 28x28 grey values and labels of 0 to 9, by way of an .npz file."""
    r = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.npz"
        np.savez(path, x=r.integers(0, 256, (RANDOM, 28, 28), np.uint8), y=r.integers(0, 10, RANDOM))
        return load_data(of_npz(config, path))


class Figure(NamedTuple):
    """A median and its spread."""

    median: float
    spread: float  # half the distance of the quartiles, as a share of the median

    def show(self, text: str, times: float = 1.0) -> str:
        """Two cells of a table; text: how the median is written, as in "{:.1f} ms"."""
        return f"{text.format(times * self.median)} | {self.spread:.0%}"


def figure(values: np.ndarray) -> Figure:
    """Of the values of all turns, [repeats]."""
    median, quartiles = np.median(values), np.quantile(values, (0.25, 0.75))
    return Figure(float(median), float(np.ptp(quartiles) / 2 / median))


def bench_training(made: list[Trainer], pairs: int) -> str:
    """The table of all figures."""
    repeats, lines = min(pairs, REPEATS), []
    silence_orbax()
    with tqdm(total=len(made) * 6 * (repeats + 1), desc="bench training", unit="turn", dynamic_ncols=True) as bar:
        for trainer in made:
            bar.set_postfix_str(trainer.name)
            lines += [f"| {trainer} | {row} |" for row in measure(trainer, repeats, bar.update)]
    return (
        f"{context(repeats)} turns of {BLOCK} steps, ± half the distance of the quartiles\n\n"
        "| network | batch | images | what | figure | ± | goal |\n|---|---|---|---|---|---|---|\n" + "\n".join(lines)
    )


def measure(trainer: Trainer, repeats: int, done: Callable[[], Any]) -> list[str]:
    """The rows of one configuration, from what was measured on."""

    def told(function: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            value = jax.block_until_ready(function())
            done()
            return value

        return run

    ways = (
        lambda: trainer.train(trainer.constant, BLOCK), lambda: trainer.train(trainer.real, BLOCK),
        lambda: trainer.train(trainer.real, BLOCK, DISPATCHED),
    )  # fmt: skip
    constant, real, dispatched = in_turns([told(way) for way in ways], repeats).T / BLOCK
    drawn = in_turns([told(trainer.draw)], repeats)[:, 0] / DRAWN
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder))
        save = told(lambda: trainer.save(checkpoints))
        blocked = np.array([save() for _ in range(repeats + 1)][1:])
        checkpoints.close()
    digested = in_turns([told(lambda: tree_sha256(trainer.state))], repeats)[:, 0]
    every = trainer.config.train.save_every
    goal = "at most 1.10" if trainer.name == "mnist_small" else ""  # where a step is long enough to hide the reading
    return [
        f"step, 1 per dispatch | {figure(real).show('{:.1f} ms', 1e3)} | ",
        f"step, {DISPATCHED} per dispatch | {figure(dispatched).show('{:.1f} ms', 1e3)} | ",
        f"{DISPATCHED} per dispatch / 1 per dispatch | {figure(dispatched / real).show('{:.2f}')} | ",
        f"step on a constant batch | {figure(constant).show('{:.1f} ms', 1e3)} | ",
        f"images read / constant batch | {figure(real / constant).show('{:.2f}')} | {goal}",
        f"a batch, read and not trained on | {figure(drawn).show('{:.1f} ms', 1e3)} | ",
        f"a save, while training stands still | {figure(blocked).show('{:.1f} ms', 1e3)} | ",
        f"of it, the digests of its arrays | {figure(digested).show('{:.1f} ms', 1e3)} | ",
        f"a save / the {every} steps from one to the next | "
        f"{figure(blocked / (every * np.median(real))).show('{:.2f}%', 1e2)} | at most 3%",
    ]
