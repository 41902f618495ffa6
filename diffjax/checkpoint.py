"""Checkpoints of a run, with Orbax: trees of arrays, configuration and checksums.

A save is written beside the others and renamed when it is complete, so that a kill leaves all or
nothing of it. Orbax does not detect corrupted files on restore; the stored SHA-256 does.
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
from orbax.checkpoint.options import MultiprocessingOptions

FOLDER = "checkpoints"
QUARANTINE_DIR = "damaged"  # beside FOLDER
PROBE = ".probe-"  # of a file that is written and removed before a save

# Errors that say nothing about the checkpoint, which may be intact: raised as they are.
TRANSIENT_ERRORS = (
    PermissionError,
    InterruptedError,
    TimeoutError,
    MemoryError,
    jax.errors.JaxRuntimeError,
)


class SaveError(OSError):
    """A checkpoint could not be written; earlier ones are intact."""


@functools.cache
def silence_orbax() -> None:
    """Silence Orbax's logs, and its threads' duplicate tracebacks of a failed save."""
    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    sys.excepthook = functools.partial(_skip_orbax_threads, sys.excepthook)
    sys.unraisablehook = functools.partial(_skip_orbax_threads, sys.unraisablehook)
    threading.excepthook = functools.partial(_skip_orbax_threads, threading.excepthook)


def _skip_orbax_threads(hook: Callable[..., Any], *arguments: Any) -> None:
    # Either (type, value, traceback), or one object that describes an error in a thread or a
    # finalizer.
    uncaught = len(arguments) == 3
    trace = arguments[-1] if uncaught else arguments[0].exc_traceback
    modules = {
        frame.f_globals.get("__name__", "").split(".")[0] for frame, _ in traceback.walk_tb(trace)
    }
    in_main_thread = uncaught and threading.current_thread() is threading.main_thread()
    if in_main_thread or not modules & {"orbax", "asyncio"}:
        hook(*arguments)


class Checkpoints:
    """The checkpoints of one run folder, by training step.

    Saves run in the background; `close` waits for them.
    """

    def __init__(
        self,
        workdir: Path,
        keep: int | None = 3,
        *,
        folder: str = FOLDER,
        clean: bool = False,
        read_only: bool = False,
    ) -> None:
        """Open the checkpoints of a run folder, which is created if need be.

        keep: number of latest checkpoints to keep, None for all. folder: the name of their folder
        in the run folder. clean: remove what killed saves have left; only
        for the one program that writes, since a save under way in another looks the same.
        read_only: write nothing, for a folder that exists.
        """
        self._workdir, self._home = workdir.resolve(), workdir.resolve() / folder
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.LatestN(keep),
            cleanup_tmp_directories=clean,
            create=not read_only,
            read_only=read_only,
            # Two folders of a run save the same step at once: their processes meet apart.
            multiprocessing_options=MultiprocessingOptions(barrier_sync_key_prefix=folder),
        )
        self._manager = ocp.CheckpointManager(self._home, options=options)
        # Orbax would ask the processes about a SIGTERM by the training step, where
        # `loop.catch_signals` asks by the number of the call: by two counts they never agree.
        self._manager.reached_preemption = lambda step: False

    def steps(self) -> list[int]:
        """The training steps of the checkpoints on disk, in order."""
        return sorted(self._manager.all_steps())

    def strays(self) -> list[str]:
        """The names of entries that are no checkpoints, which are never touched."""
        steps = [str(step) for step in self.steps()]
        names = (path.name for path in self._home.iterdir())
        return sorted(name for name in names if name not in steps and not _is_temporary(name))

    def save(self, step: int, trees: dict[str, Any], config: dict[str, Any]) -> None:
        """Copy the named trees of arrays, and write them in the background.

        config: any JSON. A step that is on disk already is not written again.

        Raises: SaveError if this checkpoint, or the one before it, cannot be written.
        """
        if step in self._manager.all_steps():
            return
        digests = {name: tree_sha256(tree) for name, tree in trees.items()}
        stored = {"config": config, "digests": digests}
        stored |= {"digest": _json_sha256(stored)}
        items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        args = ocp.args.Composite(**items, config=ocp.args.JsonSave(stored))

        def write() -> None:
            self._probe()
            self._manager.save(step, args=args)

        self._write(write)

    def config(self, step: int) -> dict[str, Any]:
        """The configuration that checkpoint `step` was saved with.

        Raises: ValueError if it is missing or damaged.
        """
        return self._stored(step)["config"]

    def restore(self, step: int, like: dict[str, Any], sharding: Sharding) -> dict[str, Any]:
        """The trees of checkpoint `step` that `like` names, placed by a sharding.

        like: trees of arrays or ShapeDtypeStructs, which give the structure.

        Raises: ValueError for a checkpoint that is damaged, or of another structure.
        """
        folder = self._folder(step)
        digests = self._stored(step)["digests"]
        args = {name: ocp.args.StandardRestore(_placed(like[name], sharding)) for name in like}
        try:
            trees = self._manager.restore(step, args=ocp.args.Composite(**args))
        except TRANSIENT_ERRORS:
            raise
        except Exception as error:  # Orbax raises any type for files that are missing or cut short
            raise ValueError(
                f"checkpoint {folder} does not fit the network of its configuration: it is damaged,"
                " or from another version of diffjax"
            ) from error
        if any(digests.get(name) != tree_sha256(trees[name]) for name in like):
            raise _damaged(folder)
        return {name: trees[name] for name in like}

    def restore_weights(self, step: int, key: str, like: Any, sharding: Sharding) -> Any:
        """One tree of checkpoint `step`: "params", or a moving average by its `ema_key`.

        Raises: ValueError as `restore`.
        """
        return self.restore(step, {key: like}, sharding)[key]

    def quarantine(self, step: int) -> Path:
        """Move checkpoint `step` into the folder of damaged ones, and return where it is."""
        place = self._workdir / QUARANTINE_DIR / str(step)
        if jax.process_index() == 0:
            shutil.rmtree(place, ignore_errors=True)
            place.parent.mkdir(exist_ok=True)
            shutil.move(self._folder(step), place)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"quarantine {step}")
        self._manager.reload()
        return place

    def delete_after(self, step: int) -> None:
        """Delete the checkpoints of later training steps."""
        for later in self.steps():
            if later > step:
                self._manager.delete(later)

    def wait(self) -> None:
        """Wait until every save is on disk.

        Raises: SaveError if one could not be written.
        """
        self._write(self._manager.wait_until_finished)

    def close(self) -> None:
        """Wait until every save is on disk, and release the manager.

        Raises: SaveError if one could not be written.
        """
        try:
            self.wait()
        finally:
            self._manager.close()

    def _folder(self, step: int) -> Path:
        return self._home / str(step)

    def _probe(self) -> None:
        # Orbax finds a missing folder or a full disk too, but then a thread of it keeps the process
        # alive for five minutes.
        probe = self._home / f"{PROBE}{jax.process_index()}"
        try:
            probe.write_bytes(bytes(4096))
        finally:
            probe.unlink(missing_ok=True)

    def _stored(self, step: int) -> dict[str, Any]:
        return _read_stored(self._folder(step))

    def _write(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:  # for a full disk Orbax raises OSError, ValueError or others
            raise SaveError(
                f"a checkpoint could not be written to {self._home} ({_reason(error)})"
            ) from error


def _is_temporary(name: str) -> bool:
    # Orbax writes a checkpoint under such a name before it renames it.
    return ".orbax-checkpoint-tmp" in name or name.startswith(PROBE)


def _damaged(folder: Path) -> ValueError:
    return ValueError(f"checkpoint {folder} is damaged: remove it, and an earlier one is used")


def _reason(error: Exception) -> str:
    code = re.search(r"os_error_code='(\d+)'", str(error))
    number = int(code[1]) if code else getattr(error, "errno", None)
    if number:
        return os.strerror(number)
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def ema_key(index: int) -> str:
    """The name of a moving average in a checkpoint, by its position in train.ema."""
    return f"ema_{index}" if index else "ema"


def tree_sha256(tree: Any) -> str:
    """The SHA-256, in hexadecimal, of all arrays: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {leaf.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def open_checkpoint(workdir: Path, step: int | None = None) -> tuple[Checkpoints, int]:
    """The checkpoints of an existing run, and the chosen or latest training step.

    Raises: FileNotFoundError for a folder that does not exist, or has no such checkpoint.
    """
    if not workdir.is_dir():
        raise FileNotFoundError(f"run folder {workdir} does not exist: train a model there first")
    has_folder = (workdir / FOLDER).is_dir()
    checkpoints = Checkpoints(workdir, read_only=True) if has_folder else None
    steps = checkpoints.steps() if checkpoints else []
    if not checkpoints or not steps:
        raise FileNotFoundError(f"{workdir} has no checkpoint: train a model there first")
    if step is not None and step not in steps:
        raise FileNotFoundError(
            f"{workdir} has no checkpoint of step {step}: it has {', '.join(map(str, steps))}"
        )
    return checkpoints, steps[-1] if step is None else step


def step_folder(workdir: Path, step: int) -> Path:
    """The folder of the checkpoint of a training step."""
    return workdir / FOLDER / str(step)


def stored_steps(workdir: Path) -> list[int]:
    """The training steps of a run folder's checkpoints, in order."""
    folder = workdir / FOLDER
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]*", name))


def latest_config(workdir: Path) -> dict[str, Any]:
    """The configuration of the latest checkpoint whose configuration is readable.

    It is read without JAX, which must not start before processes have found each other.

    Raises: FileNotFoundError for a folder without checkpoints; ValueError if all are damaged.
    """
    if not workdir.is_dir():
        raise FileNotFoundError(f"run folder {workdir} does not exist: train a model there first")
    damaged: ValueError | None = None
    for step in reversed(stored_steps(workdir)):
        try:
            return _read_stored(step_folder(workdir, step))["config"]
        except ValueError as error:
            damaged = damaged or error
    raise damaged or FileNotFoundError(f"{workdir} has no checkpoint: train a model there first")


def _read_stored(folder: Path) -> dict[str, Any]:
    try:
        stored = json.loads((folder / "config" / "metadata").read_text())
    except TRANSIENT_ERRORS:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(
            f"checkpoint {folder} is incomplete: remove it, and an earlier one is used"
        ) from error
    if not isinstance(stored, dict) or stored.pop("digest", None) != _json_sha256(stored):
        raise _damaged(folder)
    return stored


def _json_sha256(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _placed(tree: Any, sharding: Sharding) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )
