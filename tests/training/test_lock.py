"""Two trainings in one run folder are told of each other."""

import errno
import json
import os
import socket
import time

import pytest
from helpers import naming

from diffjax.training import lock
from diffjax.training.lock import RunLock, take_lock

HOST, PROCESS = socket.gethostname(), os.getpid()


def leave(folder, host, process):
    """The lock of a training that was killed."""
    (folder / "lock").write_text(json.dumps({"host": host, "process": process}))


def holder(folder):
    return json.loads((folder / "lock").read_text())


@pytest.fixture
def reported():
    return []


def test_the_second_is_told_of_the_first(tmp_path, reported):
    first = RunLock(tmp_path, reported.append)
    assert holder(tmp_path) == {"host": HOST, "process": PROCESS}
    for _ in range(2):
        with pytest.raises(ValueError, match=naming(tmp_path, HOST, PROCESS)):
            RunLock(tmp_path, reported.append)
    first.release()
    first.release()
    assert list(tmp_path.iterdir()) == []
    RunLock(tmp_path, reported.append)  # dropped
    RunLock(tmp_path, reported.append).release()
    assert reported == []


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"host": 1}', None])
def test_what_a_kill_leaves_is_taken_over(text, tmp_path, reported):
    """On the same host at once, since the kernel knows that the holder is gone."""
    leave(tmp_path, HOST, 1)  # a process that is there, and does not train
    if text is not None:
        (tmp_path / "lock").write_text(text)
    taken = RunLock(tmp_path, reported.append)
    assert holder(tmp_path) == {"host": HOST, "process": PROCESS}
    assert reported == []
    taken.release()


def test_another_host_that_is_silent_is_dead(tmp_path, reported, monkeypatch):
    leave(tmp_path, "elsewhere", 12345)
    now = iter(range(1000))
    monkeypatch.setattr(lock.time, "monotonic", lambda: float(next(now)))
    waited = []
    monkeypatch.setattr(lock.time, "sleep", waited.append)
    taken = RunLock(tmp_path, reported.append)
    assert lock.WATCH - 2 <= len(waited) <= lock.WATCH
    assert lock.WATCH > 3 * lock.BEAT
    (sentence,) = reported
    assert all(str(name) in sentence for name in (tmp_path, "elsewhere", 12345))
    assert holder(tmp_path)["host"] == HOST
    taken.release()


def test_another_host_that_beats_is_not_disturbed(tmp_path, reported, monkeypatch):
    leave(tmp_path, "elsewhere", 12345)
    before = (tmp_path / "lock").read_bytes()
    os.utime(tmp_path / "lock", (1, 1))
    monkeypatch.setattr(lock.time, "sleep", lambda _: os.utime(tmp_path / "lock"))
    with pytest.raises(ValueError, match=naming(tmp_path, "elsewhere", 12345)):
        RunLock(tmp_path, reported.append)
    assert (tmp_path / "lock").read_bytes() == before


def test_a_holder_beats(tmp_path, reported, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    taken, end = RunLock(tmp_path, reported.append), time.monotonic() + 60
    os.utime(tmp_path / "lock", (1, 1))
    while (tmp_path / "lock").stat().st_mtime == 1 and time.monotonic() < end:
        time.sleep(0.01)
    assert (tmp_path / "lock").stat().st_mtime > 1
    taken.release()


def test_a_lock_that_was_replaced_stays(tmp_path, reported):
    taken = RunLock(tmp_path, reported.append)
    (tmp_path / "lock").unlink()
    leave(tmp_path, "elsewhere", 12345)
    taken.release()
    assert holder(tmp_path)["host"] == "elsewhere"


@pytest.mark.parametrize(("number", "told"), [(errno.EROFS, False), (errno.EIO, True)])
def test_a_folder_that_is_read_only_needs_none(number, told, tmp_path, reported, monkeypatch):
    def fail(*_):
        raise OSError(number, os.strerror(number), str(tmp_path / "lock"))

    monkeypatch.setattr(lock.os, "open", fail)
    if told:
        with pytest.raises(OSError, match="lock"):
            take_lock(tmp_path, reported.append)
    else:
        assert take_lock(tmp_path, reported.append) is None
