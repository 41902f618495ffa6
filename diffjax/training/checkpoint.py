"""Checkpoints of a run, with Orbax: the training state and the configuration that it belongs to."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Sharding
from orbax.checkpoint.checkpoint_managers import preservation_policy

from diffjax.training.step import TrainState

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of one run folder, by number of steps done. Saves in the background: `close` waits for them."""

    def __init__(self, workdir: Path, keep: int = 3) -> None:
        """keep: how many of the latest to keep."""
        options = ocp.CheckpointManagerOptions(preservation_policy=preservation_policy.LatestN(keep))
        self._manager = ocp.CheckpointManager(
            (workdir / FOLDER).resolve(), options=options, item_names=("params", "ema", "rest", "config")
        )

    def steps(self) -> list[int]:
        """Those on disk, in order."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, config: dict[str, Any]) -> None:
        """Copy the state and write it in the background; nothing if this step is there already."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = {
            "params": ocp.args.StandardSave(state.params),
            "ema": ocp.args.StandardSave(state.ema),
            "rest": ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
            "config": ocp.args.JsonSave(config),
        }
        self._manager.save(step, args=ocp.args.Composite(**items))

    def config(self, step: int) -> dict[str, Any]:
        """The configuration of checkpoint `step`, as it was saved. ValueError where there is none."""
        try:
            return self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]
        except (KeyError, FileNotFoundError) as error:
            folder = self._manager.directory / str(step)
            raise ValueError(f"checkpoint {folder} is incomplete: remove it, and an earlier one is used") from error

    def restore(self, step: int, like: TrainState, sharding: Sharding) -> TrainState:
        """Checkpoint `step` as a state of the structure of `like` (arrays or ShapeDtypeStructs), placed by sharding."""
        trees = {"params": like.params, "ema": like.ema, "rest": {"step": like.step, "opt_state": like.opt_state}}
        args = {name: ocp.args.StandardRestore(_placed(tree, sharding)) for name, tree in trees.items()}
        items = self._restore(step, args)
        return TrainState(items["rest"]["step"], items["params"], items["ema"], items["rest"]["opt_state"])

    def restore_weights(self, step: int, weights: str, like: Any, sharding: Sharding) -> Any:
        """Only the parameters of checkpoint `step`, "ema" or "params", of the structure of `like`."""
        args = {weights: ocp.args.StandardRestore(_placed(like, sharding))}
        return self._restore(step, args)[weights]

    def _restore(self, step: int, args: dict[str, Any]) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**args))
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"checkpoint {self._manager.directory / str(step)} does not fit the network of its configuration: it is"
                " damaged, or from another version of diffjax"
            ) from error

    def close(self) -> None:
        """Wait until every save is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def open_checkpoint(workdir: Path, step: int | None = None) -> tuple[Checkpoints, int]:
    """The checkpoints of an existing run and the chosen step, the latest if None.

    FileNotFoundError for a folder that is not there, holds no checkpoint, or not this one.
    """
    if not workdir.is_dir():
        raise FileNotFoundError(
            f"there is no run folder {workdir}: train one with 'python train.py CONFIG --workdir {workdir}'"
        )
    checkpoints = Checkpoints(workdir) if (workdir / FOLDER).is_dir() else None
    steps = checkpoints.steps() if checkpoints else []
    if not checkpoints or not steps:
        raise FileNotFoundError(
            f"{workdir} holds no checkpoint: train one with 'python train.py CONFIG --workdir {workdir}'"
        )
    if step is not None and step not in steps:
        raise FileNotFoundError(f"{workdir} holds no checkpoint of step {step}: it has {', '.join(map(str, steps))}")
    return checkpoints, steps[-1] if step is None else step


def _placed(tree: Any, sharding: Sharding) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
