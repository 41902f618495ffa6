import dataclasses
import re

import pytest
from helpers import naming

from diffjax.bench import training
from diffjax.config import Data, Train


@pytest.fixture
def small(tiny, monkeypatch, in_suite_data):
    """Digits, and a file that is not there in place of MNIST, in batches of 8 and turns of 2."""
    config = dataclasses.replace(tiny, train=Train(batch=8))
    nowhere = Data(source="npz", path="nowhere.npz", pad=2)
    configs = {"digits": config, "mnist_small": dataclasses.replace(config, data=nowhere)}
    monkeypatch.setattr(training, "load_config", configs.get)
    monkeypatch.setattr(training, "BLOCK", 2)
    monkeypatch.setattr(training, "DISPATCHED", 2)


def test_costs_are_measured_with_their_context(small):
    digits, random = training.trainers(None)
    assert re.fullmatch(r"digits, [\d,]+ parameters \| 8 of 8x8x1 \| digits", str(digits))
    head, _, *table = training.bench_training([random], 2).splitlines()
    assert re.search(r"8 x cpu \(\d+ cores\), float32, jax [\d.]+\D+\b2\b\D+\b2\b", head)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[2:]]
    for network, batch, images, _, value, spread, _ in rows:
        assert re.fullmatch(r"mnist_small, [\d,]+ parameters", network)
        assert (batch, images) == ("8 of 32x32x1", "2,000 random images, no nowhere.npz here")
        assert float(value.split()[0].rstrip("%")) > 0
        assert re.fullmatch(r"\d+%", spread)
    figures = {what: float(value.split()[0].rstrip("%")) for _, _, _, what, value, *_ in rows}
    assert len(figures) == 9
    assert [goal for *_, goal in rows if goal] == ["at most 1.10", "at most 3%"]
    # A ratio of medians, both rounded to three digits.
    share = figures["a save, while training stands still"] / (200 * figures["step, 1 per dispatch"])
    saves = figures["a save / the 200 steps from one to the next"]
    assert saves == pytest.approx(100 * share, rel=0.02)
    # Two turns after a first, of three kinds of two steps, and as many saves.
    assert int(random.state.step) == 3 * 3 * 2 + 3


def test_a_file_that_cannot_be_trained_on_is_named(small, tmp_path):
    with pytest.raises(ValueError, match=naming(tmp_path / "gone.npz")):
        training.trainers(tmp_path / "gone.npz")
