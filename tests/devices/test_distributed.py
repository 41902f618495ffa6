import jax
import pytest
from helpers import naming

from diffjax.devices import distributed
from diffjax.devices.distributed import (
    DistributedOptions,
    first_process_first,
    initialize_distributed,
)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"processes": 2}, ["processes", 2, "distributed"]),
        ({"distributed": "auto", "process": 1}, ["process", 1, "distributed", "auto"]),
        ({"distributed": "localhost"}, ["distributed", "localhost", "HOST:PORT"]),
        ({"distributed": "localhost:1"}, ["processes", "process", "None"]),
        ({"distributed": "localhost:1", "processes": 2, "process": 2}, ["processes", "process", 2]),
    ],
)
def test_contradictions(options, names):
    with pytest.raises(ValueError, match=naming(*names)):
        initialize_distributed(DistributedOptions(**options))


def test_nothing_without_an_address(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments: pytest.fail("called"))
    initialize_distributed(DistributedOptions())


def test_address_is_passed_on(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments: calls.append(arguments))
    initialize_distributed(DistributedOptions("auto"))
    initialize_distributed(DistributedOptions("10.0.0.1:1234", 4, 3))
    assert calls == [(), ("10.0.0.1:1234", 4, 3)]


@pytest.mark.parametrize(
    ("index", "count", "expected"),
    [(0, 1, ["load"]), (0, 2, ["load", "wait"]), (1, 2, ["wait", "load"])],
)
def test_process_0_is_first(monkeypatch, index, count, expected):
    calls = []
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(
        distributed.multihost_utils, "sync_global_devices", lambda name: calls.append("wait")
    )
    assert first_process_first("data", lambda: calls.append("load") or 5) == 5
    assert calls == expected


@pytest.mark.parametrize(
    ("address", "error", "names"),
    [
        ("auto", ValueError("coordinator_address should be defined"), ["distributed", "HOST:PORT"]),
        ("10.0.0.1:1234", RuntimeError("timed out\nand more"), ["10.0.0.1:1234", "timed out"]),
    ],
)
def test_failure(monkeypatch, address, error, names):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    count = () if address == "auto" else (2, 0)
    with pytest.raises(ValueError, match=naming(*names)):
        initialize_distributed(DistributedOptions(address, *count))
