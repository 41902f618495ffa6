"""Ratios and medians of times that are known: by an injected clock, or in place of measurements."""

from types import SimpleNamespace

import numpy as np
import pytest

from diffjax.bench import diffusers_baseline, guidance, networks, sampling, timing
from diffjax.bench.models import BenchModel
from diffjax.bench.networks import Case, CaseVariant, CompiledProgram
from diffjax.bench.timing import Comparison
from tests.colours import colour_model


class Clock:
    """Seconds that pass where a test says so, and functions that take them."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def function(self, *seconds):
        """A function whose first calls take these seconds, and others the last of them."""
        calls = iter(seconds)
        last = seconds[-1]

        def run():
            self.now += next(calls, last)

        return run


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=clock))
    return clock


def test_first_over_second(clock):
    """The slower function first: more than 1. The first call, which compiles, does not count."""
    slow, quick = clock.function(1000.0, 6.0), clock.function(1000.0, 2.0)
    assert timing.compare(slow, quick, 3) == Comparison(6.0, 2.0, 3.0)
    slow, quick = clock.function(1000.0, 6.0), clock.function(1000.0, 2.0)
    assert timing.compare(quick, slow, 3) == Comparison(2.0, 6.0, pytest.approx(1 / 3))


def test_medians_of_turns(clock):
    function = clock.function(1000.0, 1.0, 5.0, 2.0)
    np.testing.assert_array_equal(timing.interleaved([function], 3), [[1.0], [5.0], [2.0]])


def test_the_device_is_waited_for(clock, monkeypatch):
    """A result that is still computed takes its time inside of the measurement."""
    monkeypatch.setattr(
        timing.jax, "block_until_ready", lambda result: setattr(clock, "now", clock.now + result)
    )
    np.testing.assert_array_equal(timing.interleaved([lambda: 3.0], 2), [[3.0], [3.0]])


@pytest.fixture
def colours(monkeypatch):
    """The model that is measured has a network of no operations."""
    model = colour_model()
    bench_model = BenchModel(
        "digits", model.info, model.network, model.params, model.schedule, model.parameterization
    )
    for module in (networks, guidance):
        monkeypatch.setattr(module, "bench_model", lambda *arguments: bench_model)


@pytest.mark.parametrize("steps", [1, 10])
def test_a_peer_that_is_slower_has_a_ratio_above_1(colours, monkeypatch, steps):
    """Its seconds over ours, turn by turn; seconds of a run of several steps are those of one."""
    turns = np.array([[1.0, 4.0], [2.0, 4.0], [3.0, 24.0]]) * [steps, 1]
    monkeypatch.setattr(networks, "interleaved", lambda *arguments: turns)
    program = CompiledProgram(None, 6.0, 9, 5.0, 1.0)
    variant = CaseVariant("train step", None, program, steps, steps)
    monkeypatch.setitem(networks.VARIANTS, "forward", lambda model, case: [variant])
    monkeypatch.setattr(networks, "baseline", lambda model, case: None)
    for name, value in (("is_available", True), ("versions", "peer 1")):
        monkeypatch.setattr(diffusers_baseline, name, lambda value=value: value)
    (row,) = networks.measure_case(Case("digits", "forward", 2), 3, 12.0)
    assert (row.seconds, row.peer_seconds, row.ratio) == (2.0, 4.0, 4.0)
    assert (row.compile_seconds, row.cached_seconds) == (5.0, 1.0)
    assert row.mfu == 6.0 / 2.0 / 12.0


def test_ratios_of_the_sampling_loop(monkeypatch):
    """A row beside the barest one, and DDIM beside its forward passes."""
    monkeypatch.setattr(sampling, "compare_rows", lambda *arguments: Comparison(2.0, 0.5, 4.0))
    forwards = Comparison(0.3, 0.2, 1.5), 0.004, 7
    monkeypatch.setattr(sampling, "compare_forwards", lambda pairs: forwards)
    monkeypatch.setattr(sampling, "count_compilations", lambda: 4)
    lines = [line.split("|") for line in sampling.bench_sampler(3).splitlines()]
    cells = {line[1].strip(): line[2].strip() for line in lines if len(line) > 3}
    assert cells["row / bare row"] == "4.00"
    assert cells["DDIM-50 / 50 forwards"] == "1.500"
    assert cells["row / forward"] == "50.00%"  # 2 ms of 4


def test_ratios_of_guidance(colours, monkeypatch):
    """The guided run beside the plain one, whose time stands above."""
    compared = []

    def compare(guided, plain, pairs):
        compared.append((guided.args[0], plain.args[0]))
        return Comparison(0.3, 0.1, 3.0)

    monkeypatch.setattr(guidance, "compare", compare)
    monkeypatch.setattr(guidance, "_compile", lambda build, network: build)
    lines = [line.split("|") for line in guidance.bench_guidance(3).splitlines()]
    rows = {
        line[1].strip(): [cell.strip() for cell in line[3:5]] for line in lines if len(line) > 4
    }
    assert rows["plain conditional"] == ["100.0 ms", "1"]
    assert rows["scale 2, one pass"] == ["300.0 ms", "3.00"]
    for programs, alone in compared:
        assert programs[0] == alone
        assert programs[1] != alone
