import itertools
import json

import jax.numpy as jnp
import pytest

from diffjax.training.loop import Every, MetricsFile, fit
from diffjax.training.step import TrainState


def count(state, batch):
    """A step whose loss is the batch."""
    return state._replace(step=state.step + 1), {"loss": jnp.float32(batch)}


def state(step=0):
    return TrainState(jnp.int32(step), None, None, None)


def test_every_step_is_logged_with_its_own_metrics_and_actions_follow():
    seen = []
    every = tuple(Every(n, lambda s, n=n: seen.append((f"every {n}", int(s.step)))) for n in (3, 4, 0))
    log = lambda step, **metrics: seen.append((float(metrics["loss"]), step))  # noqa: E731
    end = fit(count, state(2), itertools.count(3), 10, log, 1, every)
    assert int(end.step) == 10
    assert [s for name, s in seen if name == "every 3"] == [3, 6, 9, 10]
    assert [s for name, s in seen if name == "every 4"] == [4, 8, 10]
    assert [entry for entry in seen if not isinstance(entry[0], str)] == [(float(n), n) for n in range(3, 11)]
    # An action at step n comes after the metrics of step n.
    assert seen.index(("every 3", 6)) > seen.index((6.0, 6))


def test_a_loss_that_is_no_number_stops_before_it_is_acted_on():
    saved = []
    every = (Every(1, lambda s: saved.append(int(s.step))),)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 3"):
        fit(count, state(), iter([1.0, 1.0, jnp.nan, 1.0]), 4, lambda step, **metrics: None, 1, every)
    assert saved == [1, 2]


def test_metrics_beyond_the_checkpoint_and_lines_cut_short_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, 0)
    for step in (1, 2, 3):
        metrics.write(step, loss=jnp.float32(step))
    path.write_text(path.read_text() + '{"step": 4, "lo')
    MetricsFile(path, 2).write(3, loss=9)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 9.0}]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
