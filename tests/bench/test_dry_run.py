"""A dry run compiles the real programs: what it reads off them must agree with what is known of them otherwise."""

import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import check_mistake, check_told
from jax.sharding import PartitionSpec as P

from diffjax.bench import dry_run
from diffjax.build import build_unet, init_params
from diffjax.cli import train
from diffjax.config import Config, Train, UNetConfig
from diffjax.devices import parallel
from diffjax.inference.pipeline import count_parameters

SHAPE, CLASSES = (4, 4, 1), 10
NETWORK = UNetConfig(channels=16, multipliers=(1,), attention=(), middle_attention=False)
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def parameters():
    unet = build_unet(Config(network=NETWORK), SHAPE, CLASSES)
    return count_parameters(jax.eval_shape(lambda: init_params(unet, SHAPE, jax.random.key(0))))


@functools.cache
def of_step(devices, **options):
    config = Config(network=NETWORK, train=Train(**options))
    mesh = parallel.device_mesh(devices)
    return dry_run.cost(dry_run.lower_step(config, SHAPE, CLASSES, mesh), math.inf, config.train.accumulate)


@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
def test_a_step_sends_its_gradients_once_and_nothing_else(mode):
    """Four bytes a parameter, and the nine numbers of its metrics; XLA sends two gradients that are equal, as those of
    two biases that are added, once.
    """
    found = of_step(tuple(jax.devices()), batch=16, parallel=mode)
    assert {c.kind for c in found.collectives} == {"all-reduce"}
    assert sum(c.bytes for c in found.collectives) == pytest.approx(4 * parameters(), rel=1e-3)
    assert found.fits


def test_a_device_computes_the_same_however_many_there_are():
    """With the same share of the batch; all that grows is the number of devices that are summed over."""
    few, many = (of_step(tuple(jax.devices()[:n]), batch=batch, parallel="shard_map") for n, batch in ((2, 4), (8, 16)))
    assert many.flops == pytest.approx(few.flops, rel=0.01)


def test_parts_of_a_batch_cost_the_same_and_need_less_memory():
    whole, parts = (of_step(tuple(jax.devices()[:2]), batch=64, accumulate=n, parallel="shard_map") for n in (1, 4))
    assert parts.flops == pytest.approx(whole.flops, rel=0.15)  # the optimizer's share counts in every part
    assert parts.peak < whole.peak


def test_the_sampler_is_the_guided_one_and_its_devices_do_not_speak():
    """Two evaluations of the network per row, against one where there is nothing to guide with."""
    mesh = parallel.device_mesh()
    guided, plain = (
        dry_run.cost(dry_run.lower_sampler(Config(network=NETWORK, train=train), SHAPE, CLASSES, mesh), math.inf)
        for train in (Train(batch=64), Train(batch=64, label_dropout=0.0))
    )
    assert guided.collectives == plain.collectives == ()
    assert 1.9 < guided.flops / plain.flops < 2.1


def test_collectives_are_counted_in_a_program_that_is_known():
    mesh = parallel.device_mesh()

    def talk(x):
        gathered = jax.lax.all_gather(x, parallel.AXIS)  # [8, 4, 6] float32
        moved = jax.lax.ppermute(x.astype(jnp.int8), parallel.AXIS, [(i, (i + 1) % 8) for i in range(8)])
        return jax.lax.psum((x.sum(), gathered.sum(0)), parallel.AXIS), moved

    program = jax.shard_map(
        talk, mesh=mesh, in_specs=P(parallel.AXIS), out_specs=(P(), P(parallel.AXIS)), check_vma=False
    )
    compiled = jax.jit(program).lower(np.zeros((32, 6), np.float32)).compile()
    found = {c.kind: c for c in dry_run.collectives(compiled.as_text())}
    assert found["all-gather"] == ("all-gather", 1, 8 * 4 * 6 * 4)
    assert found["collective-permute"] == ("collective-permute", 1, 4 * 6)
    assert found["all-reduce"].bytes == 4 + 4 * 6 * 4


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("%a = f32[3,4]{1,0:T(8,128)} all-reduce(f32[3,4] %b), channel_id=1", ("all-reduce", 1, 48)),
        ("%a = (f32[2]{0:T(128)S(1)}, /*index=1*/bf16[4]{0}) all-reduce(%b, %c)", ("all-reduce", 1, 16)),
        (
            "%a = (f32[2]{0}, f32[]) all-reduce-start(%b)\n%d = (f32[2], f32[]) all-reduce-done(%a)",
            ("all-reduce", 1, 12),
        ),
        ("%a = (f32[2]{0}, f32[16]{0}) all-gather-start(f32[2] %b)", ("all-gather", 1, 64)),
    ],
)
def test_collectives_are_read_off_what_the_compiler_prints(line, expected):
    assert dry_run.collectives(line) == (expected,)
    assert dry_run.collectives("%f = f32[2] get-tuple-element(%all-reduce.1), index=0") == ()


def test_the_command_prints_a_table_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = "--network.channels=8 --network.multipliers=1 --network.attention --train.batch=16"
    train.main(["digits", "--dry-run", "cpu", *options.split()])
    said = capsys.readouterr().out
    for cell in ("8 x cpu", "| guided DDIM, a row", "all-reduce"):
        assert cell in said
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_says_by_how_much_and_what_would_help(monkeypatch, capsys):
    """The real step, on machines of too little memory."""
    monkeypatch.setattr(dry_run, "room", lambda device, number: 2.0**17)
    options = "--network.channels=8 --network.multipliers=1 --network.attention --train.batch=16 --dry-run cpu"
    with pytest.raises(SystemExit) as end:
        train.main(["digits", *options.split()])
    said = capsys.readouterr()
    check_told(end.value.code, said.err, ("network.remat", "train.accumulate", "2", "train.batch", "8"))
    assert "| no " in said.out


@pytest.mark.parametrize(
    ("message", "needs", "has"),
    [
        ("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded", 20.5, 15.75),
        ("total memory required for HLO temporaries (74.72G) exceeds available HBM (15.75G)", 74.72, 15.75),
        ("Used 512.00M of 1.00G hbm", 0.5, 1.0),
        ("something else", math.nan, math.nan),
    ],
)
def test_a_refusal_is_read(message, needs, has):
    found = np.array(dry_run.memory_of_refusal(message)) / dry_run.GIB
    np.testing.assert_allclose(found, [needs, has])


class Refused:
    """A program that the compiler says no to."""

    def __init__(self, reason):
        self._reason = reason

    def compile(self):
        raise jax.errors.JaxRuntimeError(self._reason)


def test_what_the_compiler_refuses_for_its_memory_does_not_fit():
    found = dry_run.cost(Refused("RESOURCE_EXHAUSTED: Used 58.50G of 15.75G hbm."), 16.0 * dry_run.GIB)
    assert (found.peak / dry_run.GIB, found.room / dry_run.GIB, found.fits) == (58.5, 15.75, False)
    assert not dry_run.cost(Refused("RESOURCE_EXHAUSTED: no more"), math.inf).fits
    with pytest.raises(jax.errors.JaxRuntimeError, match="another reason"):
        dry_run.cost(Refused("INTERNAL: another reason"), math.inf)


BAD = {
    "digits --dry-run v5e:2x2": ("dry_run", "v5e:2x2", "libtpu", "diffjax[pod]"),
    "digits --dry-run gpu": ("dry_run", "gpu", "libtpu"),
    "digits --dry-run": "dry_run",
    "digits --dry-run cpu --train.batch 12": ("batch", "12", "8"),
    "digits --dry-run cpu --train.accumulate 3": ("batch", "64", "8", "3", "24"),
    "digits --dry-run cpu --network.attention 5": ("attention", "5", "8", "4"),
    "digits --dry-run cpu --data.name cifar1": ("cifar1", "cifar10"),
    "digits --dry-run cpu --data.pad=-1": ("pad", "-1"),
    "digits --dry-run cpu --data.size 0": ("data.size", "0"),
    "digits --dry-run cpu --data.path {tmp}": ("data.path", "folder", "npz"),
    "digits --dry-run cpu --data.source npz": ("data.path", "npz"),
    "digits --dry-run cpu --data.source npz --data.path {tmp}/no.npz": "{tmp}/no.npz",
    "digits --dry-run cpu --data.source npz --data.path {tmp}/text.npz": "{tmp}/text.npz",
    "digits --dry-run cpu --data.source zip": ("data.source", "zip"),
    "folder --dry-run cpu --data.path {tmp}/none": "{tmp}/none",
    "folder --dry-run cpu --data.path {tmp}/empty": "{tmp}/empty",
    "folder --dry-run cpu --data.path {tmp}/flat": ("flat", "labels"),
    "folder --dry-run cpu --data.path {tmp}/flat --data.size 20 --data.no-labels": ("multipliers", "20x20", "8"),
}


@pytest.fixture
def places(tmp_path):
    from PIL import Image

    for name in ("empty", "flat", "damaged"):
        (tmp_path / name).mkdir()
    (tmp_path / "text.npz").write_text("x, y")
    for i in range(90):  # a tenth is held out, one for each device
        for name in ("flat", "damaged"):
            Image.new("RGB", (9, 9), (i, i, i)).save(tmp_path / name / f"{i:02}.png")
    (tmp_path / "damaged" / "05.png").write_text("no image")
    return {"tmp": tmp_path}


@pytest.mark.parametrize("command", BAD)
def test_a_mistake_is_named_in_one_line(command, places, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name))
    check_mistake(train.main, command, BAD[command], capsys, **places)


def test_a_damaged_image_ends_training_by_its_name(places, capsys):
    """It is met when it is its turn, after the progress bar."""
    options = "--data.no-labels --data.size 8 --network.channels=4 --network.multipliers=1 --network.attention"
    options += f" --network.head-width=4 --train.batch=8 --data.path {places['tmp']}/damaged"
    with pytest.raises(SystemExit) as end:
        train.main(["folder", "--workdir", str(places["tmp"] / "run"), *options.split()])
    check_told(end.value.code, capsys.readouterr().err, "{tmp}/damaged/05.png", after_progress=True, **places)


@needs_libtpu
def test_a_tpu_that_is_not_here_costs_the_same_per_chip_at_4_and_256():
    costs = []
    for target, number in [("v5e:2x2", 4), ("v5e:16x16", 256)]:
        devices = dry_run.devices(target)
        assert len(devices) == number
        costs.append(of_step(tuple(devices), batch=4 * number, parallel="shard_map"))
        gradients = sum(c.bytes for c in costs[-1].collectives)
        assert gradients == pytest.approx(4 * parameters(), rel=1e-3)
    assert costs[1].flops == pytest.approx(costs[0].flops, rel=0.01)


@needs_libtpu
def test_a_tpu_without_the_memory_is_told(capsys):
    options = "--train.batch 65536 --parallel shard_map --data.pad 28 --network.channels=16 --network.multipliers=1"
    options += " --network.attention --network.no-middle-attention --network.heads=1"
    with pytest.raises(SystemExit) as end:
        train.main(["digits", "--dry-run", "v5e:2x2", *options.split()])
    names = ("15.75", "network.remat", "train.accumulate", "4", "train.batch", "16384")
    check_told(end.value.code, capsys.readouterr().err, names)


@needs_libtpu
@pytest.mark.parametrize("target", ["v5e:3x5", "v9:2x2", "tpu"])
def test_a_tpu_that_does_not_exist_is_named(target, capsys):
    check_mistake(train.main, f"digits --dry-run {target}", ("dry_run", target, "cpu"), capsys)
