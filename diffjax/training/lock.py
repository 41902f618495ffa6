"""The lock of a run folder, so that no two trainings write to it at once."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAME = "lock"  # in the run folder, while it is trained in
BEAT = 10.0  # seconds between the times that a training touches its lock
WATCH = 45.0  # seconds without a touch, after which the training of another host is taken for dead
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


class RunLock:
    """The lock of a run folder, held until `release` or the end of this process.

    The file has the host and the process that hold it. The kernel locks it for the processes of a
    host, and unlocks it when the process ends, however it does. A file system that several hosts
    share may not tell the others: so the holder touches the file every BEAT seconds, and another
    host watches for WATCH seconds before it takes the lock over.
    """

    def __init__(self, workdir: Path, report: Callable[[str], Any]) -> None:
        """Take the lock.

        Raises: ValueError if another training holds it, naming its host and process; OSError if the
        file cannot be written.
        """
        path, stop = workdir / NAME, threading.Event()
        file = _open_locked(path)
        try:
            holder = _read(path)
            if holder and holder["host"] != socket.gethostname():
                _watch(path, holder, report)
            os.truncate(file, 0)
            holder = {"host": socket.gethostname(), "process": os.getpid()}
            os.pwrite(file, (json.dumps(holder) + "\n").encode(), 0)
        except BaseException:
            os.close(file)
            raise
        beats = threading.Thread(target=_beat, args=(file, stop), daemon=True)
        beats.start()
        # It also runs where the object is dropped, and at the end of the process.
        self._end = weakref.finalize(self, _release, path, file, stop, beats)

    def release(self) -> None:
        """Remove the file, for the next training; a second call does nothing."""
        self._end()


def take_lock(workdir: Path, report: Callable[[str], Any]) -> RunLock | None:
    """The lock of a run folder; None for one that cannot be written to.

    Raises: ValueError or OSError as RunLock.
    """
    try:
        return RunLock(workdir, report)
    except OSError as error:
        if error.errno in READ_ONLY:
            return None
        raise


def _open_locked(path: Path) -> int:
    """The open file, locked for this process among those of the host."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise _held(path, _read(path)) from None
        except OSError:
            pass  # a file system without locks: beats are what is left
        if _is_at(file, path):
            return file
        os.close(file)  # its holder has removed it in between


def _is_at(file: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), path.stat())
    return False


def _read(path: Path) -> dict[str, Any] | None:
    """The holder that a lock names; None for an empty one, or one cut short."""
    try:
        holder = json.loads(path.read_text())
        return {"host": holder["host"], "process": holder["process"]}
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _watch(path: Path, holder: dict[str, Any], report: Callable[[str], Any]) -> None:
    """Wait for a beat of the holder, which is of another host.

    Raises: ValueError if there is one.
    """
    report(
        f"process {holder['process']} on {holder['host']} has trained in {path.parent}: waiting up"
        f" to {WATCH:g} s for a sign of it"
    )
    before, end = _touched(path), time.monotonic() + WATCH
    while time.monotonic() < end:
        time.sleep(min(1, WATCH))
        if _touched(path) != before:
            raise _held(path, holder)


def _touched(path: Path) -> int:
    with path.open("rb") as file:  # opened anew, since NFS asks its server only then
        return os.fstat(file.fileno()).st_mtime_ns


def _held(path: Path, holder: dict[str, Any] | None) -> ValueError:
    who = f"process {holder['process']} on {holder['host']}" if holder else "another process"
    return ValueError(
        f"workdir is {path.parent}, where another training runs, {who}: end that one first, or use"
        " another run folder"
    )


def _release(path: Path, file: int, stop: threading.Event, beats: threading.Thread) -> None:
    stop.set()
    beats.join()
    if _is_at(file, path):
        path.unlink()
    os.close(file)


def _beat(file: int, stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        with contextlib.suppress(OSError):  # a disk that is away for a while ends no training
            os.utime(file)
