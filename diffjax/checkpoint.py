"""Checkpoints of a run, with Orbax: the training state, the configuration that it belongs to, and a digest of both.

A save is written beside the others and renamed when it is whole, so that a kill leaves all or nothing of it. What disks
do to it later, Orbax does not notice; the digest does.
"""

import functools
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from orbax.checkpoint.checkpoint_managers import preservation_policy

from diffjax.training.step import TrainState

FOLDER = "checkpoints"
QUARANTINE_DIR = "damaged"  # beside it: what could not be read, out of the way


@functools.cache
def silence_orbax() -> None:
    """Let Orbax say nothing of its own: neither every save at length, nor, of one that fails, the traceback of each of
    its threads, where it raises the same error in ours.
    """
    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)

    def without_threads(before: Callable[..., Any]) -> Callable[..., None]:
        def hook(*arguments: Any) -> None:
            # One argument that tells of a thread or of something that was ignored, or type, value, and traceback.
            trace = arguments[-1] if len(arguments) == 3 else arguments[0].exc_traceback
            modules = {frame.f_globals.get("__name__", "").split(".")[0] for frame, _ in traceback.walk_tb(trace)}
            ours = len(arguments) == 3 and threading.current_thread() is threading.main_thread()
            if ours or not modules & {"orbax", "asyncio"}:
                before(*arguments)

        return hook

    sys.excepthook = without_threads(sys.excepthook)
    sys.unraisablehook = without_threads(sys.unraisablehook)
    threading.excepthook = without_threads(threading.excepthook)


# A checkpoint that could not be read for one of these may be well.
TRANSIENT_ERRORS = (PermissionError, InterruptedError, TimeoutError, MemoryError, jax.errors.JaxRuntimeError)


class SaveError(OSError):
    """A checkpoint could not be written; those before it are as they were."""


class Checkpoints:
    """The checkpoints of one run folder, by number of steps done. Saves in the background: `close` waits for them."""

    def __init__(self, workdir: Path, keep: int = 3, *, clean: bool = False) -> None:
        """keep: how many of the latest to keep. clean: remove what kills have left of saves; for the one program that
        writes, since a save of another that is under way looks the same.
        """
        self._workdir = workdir.resolve()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.LatestN(keep), cleanup_tmp_directories=clean
        )
        self._manager = ocp.CheckpointManager(self._workdir / FOLDER, options=options)
        # Orbax would ask the hosts about a SIGTERM by the number of the step, where `loop.catch_signals` asks by the
        # number of the call: asked by two counts, they would never agree.
        self._manager.reached_preemption = lambda step: False

    def steps(self) -> list[int]:
        """Those on disk, in order."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, config: dict[str, Any]) -> None:
        """Copy the state and write it in the background; nothing if this step is there already. SaveError if this one
        cannot be written, or the one before it could not be.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        trees = _trees(state)
        stored = {"config": config, "digests": {name: tree_sha256(tree) for name, tree in trees.items()}}
        stored |= {"digest": _of_json(stored)}
        items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        args = ocp.args.Composite(**items, config=ocp.args.JsonSave(stored))

        def write() -> None:
            # A folder that is not there any more, or is full, Orbax finds too, but a thread of it then keeps the
            # process alive for five minutes.
            probe = self._workdir / FOLDER / f".probe-{jax.process_index()}"
            try:
                probe.write_bytes(bytes(4096))
            finally:
                probe.unlink(missing_ok=True)
            self._manager.save(step, args=args)

        self._writing(write)

    def config(self, step: int) -> dict[str, Any]:
        """The configuration of checkpoint `step`, as it was saved. ValueError where there is none, or a damaged one."""
        return self._stored(step)["config"]

    def restore(self, step: int, like: TrainState, sharding: Sharding) -> TrainState:
        """Checkpoint `step` as a state of the structure of `like` (arrays or ShapeDtypeStructs), placed by sharding.
        ValueError where it is damaged, or not of this structure.
        """
        items = self._restore(step, _trees(like), sharding)
        rest, ema = items["rest"], tuple(items[ema_key(i)] for i in range(len(like.ema)))
        return TrainState(rest["step"], rest["skipped"], items["params"], ema, rest["opt_state"])

    def restore_weights(self, step: int, weights: str, like: Any, sharding: Sharding) -> Any:
        """Only the parameters of checkpoint `step`, "params" or as `ema_key` names them, of the structure of `like`."""
        return self._restore(step, {weights: like}, sharding)[weights]

    def set_aside(self, step: int) -> Path:
        """Move checkpoint `step` out of the way, into the run's folder of damaged ones. Returns where it is."""
        place = self._workdir / QUARANTINE_DIR / str(step)
        if jax.process_index() == 0:
            shutil.rmtree(place, ignore_errors=True)
            place.parent.mkdir(exist_ok=True)
            shutil.move(self._workdir / FOLDER / str(step), place)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"set aside {step}")
        self._manager.reload()
        return place

    def wait(self) -> None:
        """Wait until every save is on disk. SaveError where one could not be written."""
        self._writing(self._manager.wait_until_finished)

    def close(self) -> None:
        """Wait until every save is on disk, and end. SaveError where one could not be written."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _stored(self, step: int) -> dict[str, Any]:
        folder = self._workdir / FOLDER / str(step)
        try:
            stored = self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]
        except TRANSIENT_ERRORS:
            raise
        except Exception as error:  # whatever Orbax may raise of files that are not there, or cut short
            raise ValueError(f"checkpoint {folder} is incomplete: remove it, and an earlier one is used") from error
        if "digest" not in stored:  # from before there were digests: the configuration alone
            return {"config": stored, "digests": {}}
        if stored.pop("digest") != _of_json(stored):
            raise ValueError(f"checkpoint {folder} is damaged: remove it, and an earlier one is used")
        return stored

    def _restore(self, step: int, trees: dict[str, Any], sharding: Sharding) -> Any:
        folder = self._workdir / FOLDER / str(step)
        digests = self._stored(step)["digests"]
        args = {name: ocp.args.StandardRestore(_placed(tree, sharding)) for name, tree in trees.items()}
        try:
            items = self._manager.restore(step, args=ocp.args.Composite(**args))
        except TRANSIENT_ERRORS:
            raise
        except Exception as error:  # as above
            raise ValueError(
                f"checkpoint {folder} does not fit the network of its configuration: it is damaged, or from another"
                " version of diffjax"
            ) from error
        if any(
            digests.get(name, found) != found for name, found in ((name, tree_sha256(items[name])) for name in trees)
        ):
            raise ValueError(f"checkpoint {folder} is damaged: remove it, and an earlier one is used")
        return items

    def _writing(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:  # Orbax raises of a full disk what its parts raise: OSError, ValueError or others
            code = re.search(r"os_error_code='(\d+)'", str(error))
            known = int(code[1]) if code else getattr(error, "errno", None)
            reason = os.strerror(known) if known else (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SaveError(f"a checkpoint could not be written to {self._workdir / FOLDER} ({reason})") from error


def ema_key(index: int) -> str:
    """The name of a moving average in a checkpoint, by its position in TrainState.ema."""
    return f"ema_{index}" if index else "ema"


def tree_sha256(tree: Any) -> str:
    """Of the names, types, shapes and bytes of all arrays, as hexadecimal digits."""
    whole = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        whole.update(f"{jax.tree_util.keystr(path)} {array.dtype} {leaf.shape}".encode())
        whole.update(array.reshape(-1).view(np.uint8).data)
    return whole.hexdigest()


def open_checkpoint(workdir: Path, step: int | None = None) -> tuple[Checkpoints, int]:
    """The checkpoints of an existing run and the chosen step, the latest if None.

    FileNotFoundError for a folder that is not there, holds no checkpoint, or not this one.
    """
    if not workdir.is_dir():
        raise FileNotFoundError(
            f"there is no run folder {workdir}: train one with 'diffjax train CONFIG --workdir {workdir}'"
        )
    checkpoints = Checkpoints(workdir) if (workdir / FOLDER).is_dir() else None
    steps = checkpoints.steps() if checkpoints else []
    if not checkpoints or not steps:
        raise FileNotFoundError(
            f"{workdir} holds no checkpoint: train one with 'diffjax train CONFIG --workdir {workdir}'"
        )
    if step is not None and step not in steps:
        raise FileNotFoundError(f"{workdir} holds no checkpoint of step {step}: it has {', '.join(map(str, steps))}")
    return checkpoints, steps[-1] if step is None else step


def _trees(state: TrainState) -> dict[str, Any]:
    rest = {"step": state.step, "skipped": state.skipped, "opt_state": state.opt_state}
    return {"params": state.params, "rest": rest} | {ema_key(i): tree for i, tree in enumerate(state.ema)}


def _of_json(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _placed(tree: Any, sharding: Sharding) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
