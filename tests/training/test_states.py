"""The state and the metrics of every step, beside twenty lines of numpy."""

import itertools
import json
from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.build import load_data
from diffjax.cli import main
from diffjax.config import Config, Data, Diffusion, Train
from diffjax.data.batches import batch_stream
from diffjax.inference.model import load_model
from diffjax.nn import registry

BATCH, WARMUP, RATE, DECAY, CLIP, AVERAGES = 8, 6, 0.05, 0.2, 0.1, (0.9, 0.3)


class Halves(nn.Module):
    """One number for each half of every image, which is not finite for label 1."""

    @nn.compact
    def __call__(self, x, t, condition=None, keys=None):
        """The output, float32 of the shape of x [B, 8, 8, 1]."""
        halves = self.param("halves", nn.initializers.constant(0.5), (2,))
        infinite = jnp.where(condition == 1, jnp.inf, 1.0)[:, None, None, None]
        return jnp.ones_like(x) * jnp.repeat(halves, 4)[:, None] * infinite


@dataclass(frozen=True)
class HalvesConfig(registry.NetworkConfig):
    """A network of two parameters."""

    def build(self, x_shape, conditioning):
        """The module."""
        return Halves()


registry.register("halves", HalvesConfig)
config = Config(
    data=Data(source="npz", path="set by the test"),
    network=HalvesConfig(),
    diffusion=Diffusion(schedule="cosine", T=20, prediction="x0"),
    train=Train(
        batch=BATCH, warmup=WARMUP, learning_rate=RATE, decay="none", weight_decay=DECAY, clip=CLIP,
        ema=AVERAGES, condition_dropout=0.0, log_every=1, eval_every=0, preview_every=0,
    ),
)  # fmt: skip


def replica(batches):
    """The parameters, their averages and the metrics of each step; loss is mean((x0 - w)**2)."""
    w, first, second, updates, skipped = np.full(2, 0.5), np.zeros(2), np.zeros(2), 0, 0
    averages, metrics = [w for _ in AVERAGES], []
    for n, batch in enumerate(batches):
        rate = RATE * min(1, updates / WARMUP)
        if (batch["condition"] == 1).any():
            skipped += 1
            metrics.append((None, None, skipped, rate))
            continue
        error = w[:, None] - batch["x"].reshape(BATCH, 8, 2, 4)
        gradient = 2 * error.sum((0, 1, 3)) / error.size
        norm = np.sqrt((gradient**2).sum())
        metrics.append(((error**2).mean(), norm, skipped, rate))
        gradient, updates = gradient * min(1, CLIP / norm), updates + 1
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        mean, square = first / (1 - 0.9**updates), second / (1 - 0.999**updates)
        w = w - rate * (mean / (np.sqrt(square) + 1e-8) + DECAY * w)
        keep = [min(limit, (1 + n) / (10 + n)) for limit in AVERAGES]
        averages = [k * old + (1 - k) * w for k, old in zip(keep, averages, strict=True)]
    return w, averages, metrics


@pytest.mark.slow
def test_steps_that_are_skipped_change_nothing(tmp_path):
    """Neither parameters, averages, moments nor the rate, in a run of two sittings."""
    r = np.random.default_rng(0)
    x = r.integers(0, 256, (40, 1, 2, 1)) + np.zeros((40, 8, 2, 4))
    label = np.zeros(40, int)
    label[3] = 1  # the only one of its class, which is trained on
    np.savez(tmp_path / "data.npz", x=x.reshape(40, 8, 8).astype(np.uint8), y=label)
    (tmp_path / "own.py").write_text("from tests.training.test_states import config\n")
    run, steps = tmp_path / "run", 14
    words = ["--workdir", str(run), "--data.path", str(tmp_path / "data.npz")]
    main(["train", str(tmp_path / "own.py"), *words, "--train.steps", "6"])
    main(["train", "--resume", str(run), "--train.steps", str(steps)])
    info = load_model(run).info
    images = load_data(info.config).train
    stream = batch_stream(images, BATCH, 0, conditioning=info.conditioning)
    w, averages, metrics = replica(itertools.islice(stream, steps))
    skipped = [skipped for _, _, skipped, _ in metrics]
    assert skipped[5] >= 1  # in the first sitting
    assert skipped[-2] > skipped[5]  # and in the second, with a step after it
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    names = "loss", "grad_norm", "skipped", "learning_rate"
    for line, expected in zip(lines, metrics, strict=True):
        ours = [line[name] for name in names]
        assert [value is None for value in ours] == [value is None for value in expected]
        pairs = [pair for pair in zip(ours, expected, strict=True) if None not in pair]
        np.testing.assert_allclose(*np.transpose(pairs), rtol=1e-4, atol=1e-7)
    for weights, expected in {"raw": w, "0.9": averages[0], "0.3": averages[1]}.items():
        ours = load_model(run, weights=weights).params["halves"]
        np.testing.assert_allclose(ours, expected, rtol=1e-4)
