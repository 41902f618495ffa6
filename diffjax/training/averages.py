"""Stored averages by power functions, and averages of any length from them.

Every save of a run with `train.power_ema` stores them in the folder `averages` of the run, where
all are kept: what an average of another length needs is spread over the whole training
(arXiv:2312.02696).
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diffjax.averaging import Profiles, combine
from diffjax.build import ModelInfo, abstract_params, build_module
from diffjax.checkpoint import Checkpoints, ema_key, latest_config
from diffjax.devices import parallel
from diffjax.training.state import TrainState

FOLDER = "averages"


class StoredAverages:
    """The averages by power functions of a run, one set for each save."""

    def __init__(self, workdir: Path, lengths: tuple[float, ...], start: int) -> None:
        """Open the folder of a run that begins or resumes at step `start`.

        What a killed session has stored of later steps is deleted, since it may train otherwise.
        """
        self._lengths = lengths
        self._stored = Checkpoints(workdir, None, folder=FOLDER, clean=True)
        self._stored.delete_after(start)

    def save(self, state: TrainState) -> None:
        """Store the averages of a state in the background.

        state: over all devices of all processes.

        Raises: SaveError if these, or those before them, cannot be written.
        """
        averages = state.ema[len(state.ema) - len(self._lengths) :]
        trees = {ema_key(i): tree for i, tree in enumerate(averages)}
        step, skipped = int(state.step), int(state.skipped)
        if step > skipped:  # before the first update there is no average
            self._stored.save(step, trees, {"updates": step - skipped, "lengths": self._lengths})

    def wait(self) -> None:
        """Wait until all are on disk. Raises: SaveError if some could not be written."""
        self._stored.wait()

    def close(self) -> None:
        """Wait, and release the folder. Raises: SaveError as `wait`."""
        self._stored.close()


class Average(NamedTuple):
    """An average of parameters over a training, as of one of its steps."""

    info: ModelInfo  # of the run
    params: Any  # float32, on the host
    step: int
    stored: int  # number of stored averages that it was made from
    error: float  # of its profile, relative


class _Snapshot(NamedTuple):
    step: int
    key: str  # of the tree
    updates: int
    length: float


def make_average(workdir: Path, length: float, step: int | None = None) -> Average:
    """The average of a relative length over a run, up to a step.

    length: the standard deviation of its profile, as a share of the training, above 0 and at most
    0.288. step: one that was saved, None for the last.

    Raises: FileNotFoundError for a folder without checkpoints; ValueError for a run that has stored
    no averages, none of this step, or of a length that cannot be.
    """
    info = ModelInfo.from_dict(latest_config(workdir))
    if not (workdir / FOLDER).is_dir():
        raise ValueError(
            f"{workdir} has stored no averages: train with train.power_ema, as 0.05 0.1"
        )
    stored = Checkpoints(workdir, folder=FOLDER, read_only=True)
    snapshots = _list_snapshots(stored)
    steps = sorted({each.step for each in snapshots})
    if not steps or (step is not None and step not in steps):
        asked = "" if step is None else f" of step {step}"
        found = ", ".join(map(str, steps)) or "none"
        raise ValueError(f"{workdir} has no averages{asked}: use one of its steps, {found}")
    last = steps[-1] if step is None else step
    snapshots = [each for each in snapshots if each.step <= last]
    updates = np.array([each.updates for each in snapshots])
    profiles = Profiles.of(updates, [each.length for each in snapshots])
    weights, error = combine(profiles, Profiles.of(updates.max(), length))
    params = _weighted_sum(stored, info, snapshots, weights)
    stored.close()
    return Average(info, params, last, len(snapshots), error)


def _list_snapshots(stored: Checkpoints) -> list[_Snapshot]:
    found = {}
    for step in stored.steps():
        config = stored.config(step)
        for i, length in enumerate(config["lengths"]):
            # Between two saves all steps may be skipped: the averages are the same, and so is one.
            found[config["updates"], length] = _Snapshot(
                step, ema_key(i), config["updates"], length
            )
    return list(found.values())


def _weighted_sum(
    stored: Checkpoints, info: ModelInfo, snapshots: list[_Snapshot], weights: np.ndarray
) -> Any:
    """The weighted sum of stored averages, of which one is in memory at a time."""
    like = abstract_params(info, build_module(info))
    sharding = parallel.replicated(parallel.device_mesh())
    total = jax.tree.map(lambda leaf: np.zeros(leaf.shape), like)
    for each, weight in zip(snapshots, weights, strict=True):
        tree = jax.device_get(stored.restore_weights(each.step, each.key, like, sharding))
        total = jax.tree.map(lambda sum_, leaf, w=weight: sum_ + w * leaf, total, tree)
    return jax.tree.map(np.float32, total)
