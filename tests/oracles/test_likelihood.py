"""`diffjax likelihood` of an oracle: the density of Gaussian data, in bits."""

import json

import numpy as np
import pytest

from diffjax import build
from diffjax.cli import main
from diffjax.data.batches import first_examples
from diffjax.inference.model import load_model
from tests.oracles.oracle import MEANS, OracleConfig, configuration, write_run

BIN = 1 / 127.5


def bits(x, mean, spread, config, share):
    """Mean of -log2 of the density times BIN, of x with uniform noise of `share` bins."""
    levels = config.levels
    # The flow is followed to level 1, so that its noise is in the density.
    variance = spread**2 + (levels.sigma[1] / levels.alpha[1]) ** 2
    distance = (x - mean) ** 2 + share**2 * BIN**2 / 12
    nats = distance / (2 * variance) + np.log(2 * np.pi * variance) / 2 - np.log(BIN)
    return nats.mean() / np.log(2)


def test_bits_per_dimension(tmp_path):
    """Of images of few grey values about their class, which is narrow: without the uniform noise
    of dequantisation they would have a fifth of a bit less."""
    oracle = OracleConfig(first=1e-5, last=0.2, spread=0.003)
    r = np.random.default_rng(0)
    y = np.arange(160) % 2
    x = np.round((MEANS[y] + 1) * 127.5).astype(np.uint8)[..., 0]
    x.reshape(160, -1)[np.arange(160), r.integers(0, 16, 160)] += 1
    np.savez(tmp_path / "narrow.npz", x=x, y=y)
    run = write_run(tmp_path / "run", configuration(tmp_path / "narrow.npz", oracle))
    main(["likelihood", str(run), "--num", "8", "--repeats", "1", "--evaluations", "50"])
    flow, bound = json.loads((run / "likelihood.json").read_text())
    info = load_model(run).info
    held_out, label = first_examples(build.load_data(info.config).held_out, 8, info.conditioning)
    expected, without = (
        bits(held_out, MEANS[label], oracle.spread, oracle, share) for share in (1, 0)
    )
    assert expected - without > 0.15
    assert flow["bits_per_dim"] == pytest.approx(expected, abs=0.08)
    assert bound["bits_per_dim"] > flow["bits_per_dim"] - 0.08


def test_bits_of_flow_matching(images, tmp_path):
    """The density is that of the data with the noise of level 1, whatever the parameterization."""
    oracle = OracleConfig(predicts="flow", T=400)
    run = write_run(tmp_path / "run", configuration(images, oracle))
    main(["likelihood", str(run), "--num", "8", "--repeats", "1", "--evaluations", "399"])
    flow, bound = json.loads((run / "likelihood.json").read_text())
    info = load_model(run).info
    held_out, label = first_examples(build.load_data(info.config).held_out, 8, info.conditioning)
    expected = bits(held_out, MEANS[label], oracle.spread, oracle, 1)
    assert flow["bits_per_dim"] == pytest.approx(expected, abs=0.02)
    # The noise of the chain is drawn, and so the bound has an error of its own.
    assert abs(bound["bits_per_dim"] - expected) < 4 * bound["error"] < 0.6
