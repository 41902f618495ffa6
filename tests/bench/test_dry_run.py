"""A dry run compiles the real programs: its figures must agree with what is known otherwise."""

import dataclasses
import functools
import importlib.util
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import naming
from jax.sharding import PartitionSpec as P

from diffjax.bench import dry_run
from diffjax.build import ModelInfo, abstract_params, build_module, count_parameters
from diffjax.config import Config, Train
from diffjax.devices import parallel
from diffjax.nn.conditioning import UNCONDITIONAL, ClassLabel, Fields, Vector
from diffjax.nn.dit import DiTConfig
from diffjax.nn.unet import UNetConfig

NETWORK = UNetConfig(channels=16, multipliers=(1,), attention=(), middle_attention=False)
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


def info_of(conditioning=ClassLabel(10), network=NETWORK, **train):  # noqa: B008 (frozen)
    return ModelInfo(Config(network=network, train=Train(**train)), (4, 4, 1), conditioning)


def parameters(info):
    return count_parameters(abstract_params(info, build_module(info)))


@functools.cache
def cost_of_step(devices, conditioning=ClassLabel(10), **train):  # noqa: B008
    info, mesh = info_of(conditioning, **train), parallel.device_mesh(devices)
    lowered = dry_run.lower_step(info, mesh)
    return dry_run.compile_cost(lowered, math.inf, info.config.train.accumulate)


@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
def test_a_step_sends_its_gradients_once_and_nothing_else(mode):
    """Four bytes a parameter, and the nine numbers of its metrics.

    XLA sends two gradients that are equal, as those of two biases that are added, once.
    """
    cost = cost_of_step(tuple(jax.devices()), batch=16, parallel=mode)
    assert {c.kind for c in cost.collectives} == {"all-reduce"}
    expected = 4 * parameters(info_of())
    assert sum(c.bytes for c in cost.collectives) == pytest.approx(expected, rel=1e-3)
    assert cost.fits


@pytest.mark.parametrize(
    "conditioning", [UNCONDITIONAL, Fields((ClassLabel(4), Vector(3, "pose")))]
)
def test_programs_take_any_condition(conditioning):
    cost = cost_of_step(tuple(jax.devices()), conditioning, batch=16, parallel="shard_map")
    info = info_of(conditioning, batch=16)
    sent = sum(c.bytes for c in cost.collectives)
    assert sent == pytest.approx(4 * parameters(info), rel=1e-2)
    lowered = dry_run.lower_sampler(info, parallel.device_mesh())
    assert dry_run.compile_cost(lowered, math.inf).collectives == ()


def test_a_device_computes_the_same_however_many_there_are():
    """With the same share of the batch, all that grows is the number that is summed over."""
    few, many = (
        cost_of_step(tuple(jax.devices()[:n]), batch=batch, parallel="shard_map")
        for n, batch in ((2, 4), (8, 16))
    )
    assert many.flops == pytest.approx(few.flops, rel=0.01)


def test_parts_of_a_batch_cost_the_same_and_need_less_memory():
    whole, parts = (
        cost_of_step(tuple(jax.devices()[:2]), batch=64, accumulate=n, parallel="shard_map")
        for n in (1, 4)
    )
    # The optimizer's share counts in every part.
    assert parts.flops == pytest.approx(whole.flops, rel=0.15)
    assert parts.peak < whole.peak


def test_the_sampler_is_guided_and_its_devices_do_not_communicate():
    """Two evaluations of the network per row, or one where there is nothing to guide with."""
    mesh = parallel.device_mesh()
    guided, plain = (
        dry_run.compile_cost(dry_run.lower_sampler(info, mesh), math.inf)
        for info in (info_of(batch=64), info_of(batch=64, condition_dropout=0.0))
    )
    assert guided.collectives == plain.collectives == ()
    assert 1.9 < guided.flops / plain.flops < 2.1


def test_collectives_of_a_known_program_are_counted():
    mesh = parallel.device_mesh()

    def communicate(x):
        gathered = jax.lax.all_gather(x, parallel.AXIS)  # [8, 4, 6] float32
        ring = [(i, (i + 1) % 8) for i in range(8)]
        moved = jax.lax.ppermute(x.astype(jnp.int8), parallel.AXIS, ring)
        return jax.lax.psum((x.sum(), gathered.sum(0)), parallel.AXIS), moved

    program = jax.shard_map(
        communicate,
        mesh=mesh,
        in_specs=P(parallel.AXIS),
        out_specs=(P(), P(parallel.AXIS)),
        check_vma=False,
    )
    compiled = jax.jit(program).lower(np.zeros((32, 6), np.float32)).compile()
    collectives = {c.kind: c for c in dry_run.find_collectives(compiled.as_text())}
    assert collectives["all-gather"] == ("all-gather", 1, 8 * 4 * 6 * 4)
    assert collectives["collective-permute"] == ("collective-permute", 1, 4 * 6)
    assert collectives["all-reduce"].bytes == 4 + 4 * 6 * 4


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "%a = f32[3,4]{1,0:T(8,128)} all-reduce(f32[3,4] %b), channel_id=1",
            ("all-reduce", 1, 48),
        ),
        (
            "%a = (f32[2]{0:T(128)S(1)}, /*index=1*/bf16[4]{0}) all-reduce(%b, %c)",
            ("all-reduce", 1, 16),
        ),
        (
            "%a = (f32[2]{0}, f32[]) all-reduce-start(%b)\n%d = f32[2] all-reduce-done(%a)",
            ("all-reduce", 1, 12),
        ),
        ("%a = (f32[2]{0}, f32[16]{0}) all-gather-start(f32[2] %b)", ("all-gather", 1, 64)),
    ],
)
def test_collectives_are_found_in_the_text_of_the_compiler(line, expected):
    assert dry_run.find_collectives(line) == (expected,)
    nothing = "%f = f32[2] get-tuple-element(%all-reduce.1), index=0"
    assert dry_run.find_collectives(nothing) == ()


@pytest.mark.parametrize(
    ("message", "needs", "has"),
    [
        ("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded", 20.5, 15.75),
        (
            "total memory required for HLO temporaries (74.72G) exceeds available HBM (15.75G)",
            74.72,
            15.75,
        ),
        ("Used 512.00M of 1.00G hbm", 0.5, 1.0),
        ("something else", math.nan, math.nan),
    ],
)
def test_an_error_message_has_the_memory(message, needs, has):
    np.testing.assert_allclose(np.array(dry_run.parse_oom(message)) / dry_run.GIB, [needs, has])


def test_units_of_memory():
    """A message may count in bytes or in any binary multiple of them."""
    for power, unit in enumerate(("", "K", "M", "G", "T")):
        needed, limit = dry_run.parse_oom(f"Used 1.50{unit} of 3.00{unit} hbm")
        assert (needed, limit) == (1.5 * 1024**power, 3 * 1024**power)


class Refused:
    """A program that the compiler fails to compile."""

    def __init__(self, reason):
        self._reason = reason

    def compile(self):
        raise jax.errors.JaxRuntimeError(self._reason)


def test_a_program_that_is_refused_for_its_memory_does_not_fit():
    cost = dry_run.compile_cost(
        Refused("RESOURCE_EXHAUSTED: Used 58.50G of 15.75G hbm."), 16.0 * dry_run.GIB
    )
    sizes = cost.peak / dry_run.GIB, cost.memory_limit / dry_run.GIB
    assert (*sizes, cost.fits) == (58.5, 15.75, False)
    assert not dry_run.compile_cost(Refused("RESOURCE_EXHAUSTED: no more"), math.inf).fits
    with pytest.raises(jax.errors.JaxRuntimeError, match="another reason"):
        dry_run.compile_cost(Refused("INTERNAL: another reason"), math.inf)


class Device(NamedTuple):
    """A device of a topology."""

    device_kind: str
    coords: tuple[int, ...]
    platform: str = "tpu"


@pytest.mark.parametrize(
    ("kind", "cores", "gib"),
    [
        ("TPU v2", 2, 8),
        ("TPU v3", 2, 16),
        ("TPU v4", 2, 16),
        ("TPU v4", 1, 32),
        ("TPU v5 lite", 1, 16),
        ("TPU v5", 1, 95),
        ("TPU v6 lite", 1, 32),
    ],
)
def test_memory_of_a_device(kind, cores, gib):
    """That of a chip, which its cores share."""
    devices = [Device(kind, (x, 0, 0)) for x in range(3) for _ in range(cores)]
    assert dry_run.sharing(devices) == cores
    assert dry_run.memory_limit(devices[0], cores) == gib * dry_run.GIB


def test_memory_that_is_not_known():
    """Nobody can tell then whether a program fits."""
    assert math.isnan(dry_run.memory_limit(Device("TPU v99", (0, 0, 0)), 1))
    cost = dry_run.Cost(1.0, 1.0, 2.0 * dry_run.GIB, math.nan, (), 0.0)
    assert cost.fits is None
    assert cost._replace(memory_limit=math.inf, peak=math.nan).fits is None
    assert cost._replace(out_of_memory=True).fits is False
    assert cost._replace(memory_limit=2.0 * dry_run.GIB).fits is True


def test_unknown_is_no_yes(monkeypatch):
    monkeypatch.setattr(dry_run, "memory_limit", lambda device, count: math.nan)
    cost = dry_run.Cost(1.0, 1.0, 2.0 * dry_run.GIB, math.nan, (), 0.0)
    monkeypatch.setattr(dry_run, "compile_cost", lambda *arguments: cost)
    table, too_large = dry_run.report(info_of(batch=8), "cpu")
    line = next(line for line in table.splitlines() if line.startswith("| fits"))
    assert [cell.strip() for cell in line.split("|")[2:-1]] == ["unknown", "unknown"]
    assert too_large == ""


# ------------------------------------------------------------------------------- report


def test_the_report_has_a_table():
    table, too_large = dry_run.report(info_of(batch=16), "cpu")
    for cell in ("8 x cpu", "| guided DDIM, a row", "all-reduce", "4x4x1", "| yes "):
        assert cell in table
    assert f"{parameters(info_of()):,}" in table
    assert too_large == ""


def test_a_program_that_does_not_fit_has_remedies(monkeypatch):
    """The real step, on devices of too little memory."""
    monkeypatch.setattr(dry_run, "memory_limit", lambda device, count: 2.0**17)
    table, too_large = dry_run.report(info_of(batch=16), "cpu")
    words = "network.remat", "train.accumulate", 2, "train.batch", 8
    assert re.search(naming(*words), too_large)
    assert "| no " in table


def test_loops_within_networks_are_counted(monkeypatch):
    """All blocks but one, of a device's share: twice the batch if guided, thrice to train."""
    found = []
    cost = dry_run.Cost(1.0, 1.0, 1.0, 2.0, (), 0.0)
    monkeypatch.setattr(
        dry_run, "compile_cost", lambda *arguments: found.append(arguments[2:]) or cost
    )
    network = DiTConfig(width=16, depth=3, heads=2)
    for scan in (False, True):
        looped = dataclasses.replace(network, scan=scan)
        dry_run.report(info_of(network=looped, batch=32, accumulate=2), "cpu")
    block = 2 * 12 * 16**2 * 4 + 2 * 2 * 4**2 * 16 + 2 * 6 * 16**2  # of four patches
    assert [(loops, beside.flops) for loops, beside in found] == [
        (2, 0), (1, 0), (2, 3 * 4 * 2 * block), (1, 2 * 4 * 2 * block),
    ]  # fmt: skip


def test_remedies_are_what_is_left(monkeypatch):
    """With remat, and one example a device, only a smaller network is."""
    cost = dry_run.Cost(1.0, 1.0, 2.0 * dry_run.GIB, dry_run.GIB, (), 0.0)
    monkeypatch.setattr(dry_run, "compile_cost", lambda *arguments: cost)
    remat = dataclasses.replace(NETWORK, remat=True)
    _, too_large = dry_run.report(info_of(network=remat, batch=8), "cpu")
    assert not re.search(naming("network.remat"), too_large)
    assert re.search(naming("smaller", "network"), too_large)


@pytest.mark.parametrize(
    ("train", "names"),
    [
        ({"batch": 12}, ("train.batch", 12, 8)),
        ({"batch": 64, "accumulate": 3}, ("train.batch", 64, 8, 3, 24)),
    ],
)
def test_batches_that_cannot_be_shared_are_named(train, names):
    with pytest.raises(ValueError, match=naming(*names)):
        dry_run.report(info_of(**train), "cpu")


@pytest.mark.parametrize("target", ["v5e:2x2", "gpu"])
def test_tpus_need_libtpu(target, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name)
    )
    with pytest.raises(ValueError, match=naming("target", target, "libtpu", "diffjax[pod]")):
        dry_run.report(info_of(batch=16), target)


# ------------------------------------------------------------------------------- TPUs


@needs_libtpu
def test_a_chip_costs_the_same_among_4_and_256():
    costs = []
    for target, number in [("v5e:2x2", 4), ("v5e:16x16", 256)]:
        devices = dry_run.find_devices(target)
        assert len(devices) == number
        costs.append(cost_of_step(tuple(devices), batch=4 * number, parallel="shard_map"))
        gradients = sum(c.bytes for c in costs[-1].collectives)
        assert gradients == pytest.approx(4 * parameters(info_of()), rel=1e-3)
    assert costs[1].flops == pytest.approx(costs[0].flops, rel=0.01)


@needs_libtpu
def test_a_program_that_a_chip_has_no_memory_for_has_remedies():
    network = dataclasses.replace(NETWORK, heads=1)
    info = info_of(network=network, batch=65536, parallel="shard_map")._replace(x_shape=(64, 64, 1))
    _, too_large = dry_run.report(info, "v5e:2x2")
    words = "15.75", "network.remat", "train.accumulate", 4, "train.batch", 16384
    assert re.search(naming(*words), too_large)


@needs_libtpu
@pytest.mark.parametrize("target", ["v5e:3x5", "v9:2x2", "tpu"])
def test_a_tpu_that_does_not_exist_is_named(target):
    with pytest.raises(ValueError, match=naming("target", target, "cpu")):
        dry_run.find_devices(target)
