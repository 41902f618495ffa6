"""Options of `diffjax train`: runs of the probe beside twenty lines of numpy.

The loss of the probe, which predicts x0 as a row of its table, is weight[t] * mean((x0 - row)**2).
"""

import dataclasses
import json
import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from helpers import check_told
from PIL import Image

from diffjax import loss, process, schedule
from diffjax.cli import main
from diffjax.inference.model import load_model
from diffjax.training import trainer
from diffjax.training.state import step_key
from tests.options.observations import observes
from tests.options.probe import CLASSES, SHAPE, TRACED, call, is_same, opened, words_of

LEVELS, X0 = schedule.cosine(16), process.PREDICTIONS["x0"]
NOISY = schedule.level_at(LEVELS, slice(1, None))
RUNS = {
    "a": "--train.steps 7 --train.batch 16 --train.learning-rate 0.05 --train.warmup 3"
    " --train.decay cosine --train.weight-decay 0.2 --train.clip 0.02 --train.ema 0.9 0.05"
    " --train.weighting truncated_snr --train.times stratified --train.condition-dropout 0"
    " --train.seed 5 --train.accumulate 2 --train.parallel shard_map --train.steps-per-dispatch 2"
    " --train.log-every 1 --train.eval-every 4 --train.preview-every 6 --train.save-every 3"
    " --train.keep 2 --tensorboard",
    "b": "--train.steps 5 --train.batch 32 --train.learning-rate 0.03 --train.warmup 0"
    " --train.decay none --train.weight-decay 0.1 --train.clip 1000 --train.ema 0.1"
    " --train.weighting edm --train.times antithetic --train.condition-dropout 0 --train.seed 6"
    " --train.accumulate 1 --train.parallel pmap --train.steps-per-dispatch 3 --train.log-every 2"
    " --train.eval-every 0 --train.preview-every 0 --train.save-every 1 --train.keep 4",
}


@pytest.fixture(scope="module", params=RUNS)
def trained(request, probe_config, tmp_path_factory):
    """One of the runs: its folder, final state, batches that it read, and calls of the step."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    found = SimpleNamespace(name=request.param, folder=folder, batches=[], dispatches=[])
    TRACED.clear()

    def stream(*args, **kwargs):
        for batch in STREAM(*args, **kwargs):
            found.batches.append(batch)
            yield batch

    def step(session, state, batches):
        found.session = session
        found.dispatches.append(len(batches["index"]))
        return STEP(session, state, batches)

    def fit(*args):
        found.state = FIT(*args)
        return found.state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "batch_stream", stream)
        patch.setattr(trainer.Session, "step", step)
        patch.setattr(trainer, "fit", fit)
        main(words_of("train", probe_config, "--workdir", folder, FILL, RUNS[found.name]))
    found.traced = set(TRACED)
    text = (folder / "metrics.jsonl").read_text()
    found.lines = [json.loads(line) for line in text.splitlines()]
    return found


FILL = "--network.fill 0.05"
STREAM, STEP, FIT = trainer.batch_stream, trainer.Session.step, trainer.fit


def rates(name):
    """The learning rate of each step."""
    if name == "b":
        return [0.03] * 5
    warm = [0.05 * n / 3 for n in range(3)]
    return warm + [0.05 * (1 + math.cos(math.pi * n / 4)) / 2 for n in range(4)]


def replica(name, batches):
    """The steps of a run in numpy: the state, and the metrics of each step."""
    a = name == "a"
    weights = (loss.truncated_snr if a else loss.edm)(LEVELS, X0)
    seed, decay, clip, limits = (5, 0.2, 0.02, (0.9, 0.05)) if a else (6, 0.1, 1000, (0.1,))
    table = np.full((CLASSES + 1, *SHAPE), 0.05)
    first, second, idle = np.zeros_like(table), np.zeros_like(table), 1.0
    averages, metrics, held = [table for _ in limits], [], {0: table}
    for n, (rate, batch) in enumerate(zip(rates(name), batches, strict=False)):
        index, labels = batch["index"], batch["condition"]
        t = (
            loss.stratified(jax.random.fold_in(step_key(seed, n), 0), index, NOISY, 16)
            if a
            else loss.antithetic(jax.random.fold_in(step_key(seed, n), 0), index, NOISY)
        )
        w, error = weights[np.asarray(t)], batch["x"] - table[labels]
        gradient = np.zeros_like(table)
        np.add.at(gradient, labels, -2 * w.reshape(-1, 1, 1, 1) * error / error.size)
        norm = np.sqrt((gradient**2).sum())
        metrics.append(
            {"loss": np.mean(w * (error**2).mean((1, 2, 3))), "grad_norm": norm,
             "learning_rate": rate}
        )  # fmt: skip
        gradient = gradient * min(1, clip / norm)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        mean, square = first / (1 - 0.9 ** (n + 1)), second / (1 - 0.999 ** (n + 1))
        table = table - rate * (mean / (np.sqrt(square) + 1e-8) + decay * table)
        idle *= 1 - rate * decay
        keep = [min(limit, (1 + n) / (10 + n)) for limit in limits]
        averages = [k * old + (1 - k) * table for k, old in zip(keep, averages, strict=True)]
        held[n + 1] = averages[0]
    moment = np.sqrt((first**2).sum())
    return SimpleNamespace(
        table=table, idle=idle, averages=averages, metrics=metrics, held=held, moment=moment
    )


@observes(
    "train config",
    "train --train.steps",
    "train --train.batch",
    "train --train.learning-rate",
    "train --train.warmup",
    "train --train.decay",
    "train --train.weight-decay",
    "train --train.clip",
    "train --train.ema",
    "train --train.log-every",
)
def test_steps(trained):
    """Parameters, averages and metrics are those of numpy, whose gradients are in closed form."""
    expected = replica(trained.name, trained.batches)
    state = trained.state
    batch = 16 if trained.name == "a" else 32
    assert {len(each["x"]) for each in trained.batches} == {batch}
    assert int(state.step) == len(expected.metrics)
    assert np.isclose(state.params["idle"], expected.idle, rtol=1e-6)
    assert np.allclose(state.params["table"], expected.table, atol=2e-5)
    assert len(state.ema) == len(expected.averages)
    for average, ours in zip(expected.averages, state.ema, strict=True):
        assert np.allclose(ours["table"], average, atol=2e-5)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if np.shape(leaf) == (11, *SHAPE)]
    assert np.isclose(np.linalg.norm(moments[0]), expected.moment, rtol=1e-4)
    logged = [line for line in trained.lines if "loss" in line]
    every = 1 if trained.name == "a" else 2
    last = len(expected.metrics)
    assert [line["step"] for line in logged] == sorted({*range(every, last + 1, every), last})
    for line in logged:
        ours = {name: line[name] for name in ("loss", "grad_norm", "learning_rate")}
        assert ours == pytest.approx(expected.metrics[line["step"] - 1], rel=1e-4, abs=1e-9)


@observes("train --train.accumulate", "train --train.steps-per-dispatch")
def test_parts_and_dispatches(trained):
    """The network sees a device's part of a batch; calls of the step end where something is due."""
    assert trained.traced == ({1} if trained.name == "a" else {4})
    assert trained.dispatches == ([2, 1, 1, 2, 1] if trained.name == "a" else [1] * 5)


@observes(
    "train --workdir",
    "train --tensorboard",
    "train --train.eval-every",
    "train --train.preview-every",
    "train --train.save-every",
    "train --train.keep",
)
def test_files(trained):
    """Each file is there at its steps, and at the last one."""
    folder, is_a = trained.folder, trained.name == "a"
    saved = sorted(int(path.name) for path in (folder / "checkpoints").iterdir())
    assert saved == ([6, 7] if is_a else [2, 3, 4, 5])
    previews = folder / "previews"
    names = sorted(path.name for path in previews.iterdir()) if previews.exists() else []
    assert names == (["0000006.png", "0000007.png"] if is_a else [])
    assert (folder / "tensorboard").exists() == is_a
    found = {
        line["step"]: line["held_out_loss"] for line in trained.lines if "held_out_loss" in line
    }
    assert list(found) == ([4, 7] if is_a else [])
    if is_a:
        assert Image.open(previews / names[0]).size[0] > 400
        board = (folder / "tensorboard").glob("events*")
        assert b"held_out_loss" in b"".join(path.read_bytes() for path in board)
        check_held_out(trained, found)


def check_held_out(trained, found):
    """The loss is that of the first average, unweighted, on images that are not trained on."""
    held, averages = trained.session.held_out, replica("a", trained.batches).held
    x = np.concatenate([np.asarray(batch["x"]).reshape(-1, *SHAPE) for batch in held])
    labels = np.concatenate([np.asarray(batch["condition"]).reshape(-1) for batch in held])
    seen = {image.tobytes() for batch in trained.batches for image in batch["x"]}
    assert not seen & {image.tobytes() for image in x}
    expected = {step: np.mean((x - averages[step][labels]) ** 2) for step in found}
    assert found == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------- the objective


class Given(NamedTuple):
    """What `train` gives to the loss."""

    network: Any
    parameterization: Any
    schedule: Any
    weighting: Any
    times: Any
    null: Any
    drop_rate: float


def loss_of(config, folder, *words):
    """What a command line gives to the loss."""
    place = loss, "denoising_loss"
    return Given(*call(place, "train", config, "--workdir", folder / "run", *words).args_)


def values_of(objective, num, table=None, key=0):
    """The losses of examples 0, 1, ... of x 1, whose labels are in turn."""
    table = np.zeros((CLASSES + 1, *SHAPE), np.float32) if table is None else table
    index = np.arange(num, dtype=np.uint32)
    batch = {"x": np.ones((num, *SHAPE), np.float32), "index": index}
    batch["condition"] = (index % CLASSES).astype(np.int32)
    params = {"table": table, "idle": np.float32(1)}
    return np.asarray(jax.jit(objective)(params, batch, jax.random.key(key)).value)


@observes("train --train.weighting", "train --train.times")
def test_weighting_and_times(probe_config, tmp_path):
    """The loss of an example is its weight, at the level that is drawn for it."""
    key, index = jax.random.fold_in(jax.random.key(0), 0), np.arange(32, dtype=np.uint32)
    times = {
        "uniform": loss.uniform(key, index, NOISY),
        "stratified": loss.stratified(key, index, NOISY, 32),
        "antithetic": loss.antithetic(key, index, NOISY),
    }
    pairs = [("simple", "uniform"), ("min_snr", "stratified"), ("truncated_snr", "antithetic")]
    for weighting, time in [*pairs, ("sigmoid", "uniform"), ("edm", "stratified")]:
        words = f"--train.weighting {weighting} --train.times {time} --train.batch 32"
        given = loss_of(probe_config, tmp_path, words)
        assert np.array_equal(given.weighting(LEVELS, X0), getattr(loss, weighting)(LEVELS, X0))
        assert np.array_equal(given.times(key, index, NOISY), times[time])
    values, weights = values_of(loss.denoising_loss(*given), 32), loss.edm(LEVELS, X0)
    assert np.allclose(values, weights[times["stratified"]], rtol=1e-5)


@observes("train --train.times-mean", "train --train.times-std")
def test_log_normal_times(probe_config, tmp_path):
    """log(sigma/alpha) of the levels that are drawn has this mean and standard deviation."""
    words = "--train.times log_normal --train.times-mean -0.8 --train.times-std 0.6"
    words += " --diffusion.T 400 --diffusion.schedule edm"
    given = loss_of(probe_config, tmp_path, words)
    index, noisy = np.arange(4000), schedule.level_at(given.schedule, slice(1, None))
    t = np.asarray(given.times(jax.random.key(0), index, noisy))
    drawn = -schedule.logsnr(schedule.at(given.schedule, t)) / 2
    assert drawn.mean() == pytest.approx(-0.8, abs=0.05)  # 4 standard deviations, and the levels
    assert drawn.std() == pytest.approx(0.6, abs=0.04)


@observes("train --train.condition-dropout")
def test_condition_dropout(probe_config, tmp_path):
    """The share of null conditions that the network sees, within four standard deviations."""
    num, table = 4000, np.zeros((CLASSES + 1, *SHAPE), np.float32)
    table[-1] = 3  # of the null label: an error of -2 in place of 1
    for rate in (0, 0.3):
        given = loss_of(probe_config, tmp_path, f"--train.condition-dropout {rate}")
        values = values_of(loss.denoising_loss(*given), num, table)
        assert set(np.round(values, 4)) == {1.0, 4.0} if rate else {1.0}
        share = np.mean(values > 2)
        assert abs(share - rate) <= 4 * math.sqrt(rate * (1 - rate) / num)


@observes("train --train.seed")
def test_seed(probe_config, tmp_path):
    """The initial parameters, the order of images and the draws of a step are those of the seed."""

    def parts(folder, seed):
        words = f"--network.spread 1 --train.seed {seed}"
        found = opened(probe_config, tmp_path / folder, words)
        batch = next(found.session.batches)
        return found.session.state.params["table"], batch["x"], np.uint32(found.step.args[3])

    first, same, other = parts("a", 3), parts("b", 3), parts("c", 4)
    for ours, again, differs in zip(first, same, other, strict=True):
        assert np.array_equal(ours, again)
        assert not np.array_equal(ours, differs)
    # The same images, in another order: no split depends on the seed.
    assert first[2] == 3


@observes("train --train.parallel")
def test_parallel(probe_config, tmp_path, monkeypatch):
    """The step and the evaluation are compiled by the mode that is asked for."""
    counts = {"pmap": 0, "shard_map": 0}
    for name in counts:
        original = getattr(jax, name)

        def counted(*args, name=name, original=original, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(jax, name, counted)
    found = {}
    for mode in ("pmap", "shard_map", "jit"):
        counts |= {"pmap": 0, "shard_map": 0}
        opened(probe_config, tmp_path / mode, "--train.parallel", mode)
        found[mode] = (counts["pmap"], counts["shard_map"])
    assert found == {"pmap": (2, 0), "shard_map": (0, 2), "jit": (0, 0)}


@observes("train --train.max-skipped")
def test_max_skipped(probe_config, tmp_path, capsys):
    """Training ends after so many steps without finite gradients."""
    words = "--network.fill nan --train.max-skipped 3 --train.steps 9"
    with pytest.raises(SystemExit) as end:
        main(words_of("train", probe_config, "--workdir", tmp_path / "run", words))
    check_told(end.value.code, capsys.readouterr().err, "3", after_progress=True)


# ------------------------------------------------------------------------------- diffusion


@observes(
    "train --diffusion.schedule",
    "train --diffusion.betas",
    "train --diffusion.shift",
    "train --diffusion.zero-terminal-snr",
    "train --diffusion.T",
)
def test_schedule(probe_config, tmp_path):
    """The levels of the loss are those of the schedule."""
    betas = np.linspace(0.01, 0.3, 12)
    ratio = np.arange(1, 13) / np.arange(11, -1, -1).clip(1e-300)  # sigma/alpha of flow
    cases = {
        "linear --diffusion.T 30": schedule.rescaled_linear(30).alpha,
        "cosine --diffusion.T 12": schedule.cosine(12).alpha,
        "scaled_linear --diffusion.T 40": schedule.scaled_linear(40, 0.85 / 40, 0.3).alpha,
        "sigmoid --diffusion.T 12": schedule.sigmoid(12).alpha,
        "edm --diffusion.T 12": schedule.variance_preserving(schedule.edm(12)).alpha,
        "flow --diffusion.T 12 --diffusion.shift 3": 1 / np.hypot(1, 3 * ratio),
        "linear --diffusion.T 12 --diffusion.betas 0.01 0.3": np.sqrt(np.cumprod(1 - betas)),
    }
    for words, alpha in cases.items():
        levels = loss_of(probe_config, tmp_path, "--diffusion.schedule", words).schedule
        assert np.allclose(levels.alpha[-len(betas) :], alpha[-len(betas) :], rtol=1e-9), words
        assert schedule.length(levels) == int(words.split()[2])
        assert (levels.alpha[-1] == 0) == words.startswith("flow")
    levels = loss_of(probe_config, tmp_path, "--diffusion.zero-terminal-snr").schedule
    assert levels.alpha[-1] == 0


@observes(
    "train --diffusion.prediction", "train --diffusion.time-scale", "train --diffusion.sigma-data"
)
def test_prediction(probe_config, tmp_path):
    """The target of the network is what it predicts, which also decides its time and its input."""
    r = np.random.default_rng(0)
    x0, eps, level = r.normal(size=5), r.normal(size=5), schedule.at(LEVELS, np.array(7))
    alpha, sigma = level.alpha, level.sigma
    straight, n = 1 / (alpha + sigma), np.hypot(sigma, 0.8 * alpha)
    cases = {  # target, time and scale of the input
        "x0": (x0, 6, 1),
        "eps": (eps, 6, 1),
        "v": (alpha * eps - sigma * x0, 6, 1),
        "flow": (eps - x0, 1000 * sigma * straight, straight),
        "flow --diffusion.time-scale 7": (eps - x0, 7 * sigma * straight, straight),
        "sit": (x0 - eps, alpha * straight, straight),
        "edm --diffusion.sigma-data 0.8": (
            (sigma / 0.8 * x0 - 0.8 * alpha * eps) / n, np.log(sigma / alpha) / 4, 1 / n,
        ),
    }  # fmt: skip
    for words, expected in cases.items():
        given = loss_of(probe_config, tmp_path, "--diffusion.prediction", words).parameterization
        found = given.prediction.target(x0, eps, level), given.network_time(level)
        for a, b in zip((*found, given.input_scale(level)), expected, strict=True):
            assert np.allclose(a, b, rtol=1e-5), words
    words = "--train.weighting edm --diffusion.sigma-data 0.8"
    weighting = loss_of(probe_config, tmp_path, words).weighting
    assert np.allclose(weighting(LEVELS, X0), loss.edm(LEVELS, X0, 0.8))


# ------------------------------------------------------------------------------- processes


@pytest.mark.parametrize("command", ["train", "distill"])
@observes(
    *(
        f"{command} {option}"
        for command in ("train", "distill")
        for option in ("--distributed", "--processes", "--process")
    )
)
def test_processes(command, probe_config, run, tmp_path):
    """They arrive in JAX, which connects the processes."""
    place = jax.distributed, "initialize"
    first = probe_config if command == "train" else run
    words = command, first, "--workdir", tmp_path / "run"
    address = call(place, *words, "--distributed host:123 --processes 5 --process 3")
    assert (address.args_, address.kwargs) == (("host:123", 5, 3), {})
    automatic = call(place, *words, "--distributed auto")
    assert (automatic.args_, automatic.kwargs) == ((), {})


@observes("train --resume")
def test_resume(trained):
    """A run goes on with its own configuration, but for what is named."""
    before, folder = trained.session.info.config, trained.folder
    arrived = call((trainer, "run"), "train --resume", folder, "--train.steps 9")
    session = arrived.args_[0]
    session.checkpoints.close()
    assert session.workdir == folder
    assert int(session.state.step) == before.train.steps
    assert is_same(session.state.params, load_model(folder, weights="raw").params)
    train = dataclasses.replace(before.train, steps=9)
    assert session.info.config == dataclasses.replace(before, train=train)
