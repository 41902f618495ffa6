import itertools
import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import naming
from tensorboardX.proto import event_pb2

from diffjax.training.loop import JsonlWriter, PeriodicAction, TensorBoard, fit
from diffjax.training.step import TrainState


def count(state, batches):
    """Steps whose losses are their batches; those that are no numbers are skipped."""
    losses = np.asarray(batches, np.float32)
    skipped = state.skipped + np.cumsum(~np.isfinite(losses))
    state = state._replace(step=state.step + len(losses), skipped=skipped[-1])
    return state, {"loss": losses, "skipped": skipped, "learning_rate": np.full(len(losses), 0.25)}


def state(step=0):
    return TrainState(jnp.int32(step), jnp.int32(0), None, None, None)


@pytest.mark.parametrize("per_dispatch", [1, 2, 5, 100])
def test_every_step_is_logged_with_its_own_metrics_and_actions_follow(per_dispatch):
    seen = []
    every = tuple(PeriodicAction(n, lambda s, n=n: seen.append((f"every {n}", int(s.step)))) for n in (3, 4, 0))
    log = lambda step, **metrics: seen.append((float(metrics["loss"]), step))  # noqa: E731
    end = fit(count, state(2), itertools.count(3), 10, log, 1, every, per_dispatch=per_dispatch)
    assert int(end.step) == 10
    assert [s for name, s in seen if name == "every 3"] == [3, 6, 9, 10]
    assert [s for name, s in seen if name == "every 4"] == [4, 8, 10]
    assert [entry for entry in seen if not isinstance(entry[0], str)] == [(float(n), n) for n in range(3, 11)]
    # An action at step n comes after the metrics of step n.
    assert seen.index(("every 3", 6)) > seen.index((6.0, 6))


@pytest.mark.parametrize("per_dispatch", [1, 4])
def test_skipped_steps_in_a_row_stop_the_training(per_dispatch):
    fine, bad = 1.0, float("nan")
    losses = [fine, bad, bad, fine, 2.0, bad, bad, bad, fine, fine]
    with pytest.raises(FloatingPointError, match=naming(3, 8, 0.25, "nan")):
        fit(count, state(), iter(losses), 10, lambda *_, **__: None, 1, per_dispatch=per_dispatch, max_skipped=3)
    end = fit(count, state(), iter(losses), 10, lambda *_, **__: None, 1, per_dispatch=per_dispatch, max_skipped=4)
    assert (int(end.step), int(end.skipped)) == (10, 5)


def test_metrics_beyond_the_checkpoint_and_lines_cut_short_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = JsonlWriter(path, 0)
    for step in (1, 2, 3):
        metrics.write(step, loss=jnp.float32(step))
    path.write_text(path.read_text() + '{"step": 4, "lo')
    JsonlWriter(path, 2).write(3, loss=9, empty=float("nan"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 9.0, "empty": None}]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def events(folder):
    """What a TensorBoard folder tells: records of a length (8 bytes), its checksum (4), an event, and its checksum."""
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            yield from ((event.step, value) for value in event.summary.value)
            data = data[16 + length :]


def test_tensorboard_shows_the_same_metrics_and_the_pictures(tmp_path):
    board = TensorBoard(tmp_path, 0)
    board.write(3, loss=jnp.float32(0.25), skipped=0)
    board.picture(3, "samples", np.zeros((8, 16, 3), np.uint8))
    board.close()
    (*scalars, (at, picture)) = events(tmp_path)
    assert [(step, value.tag, value.simple_value) for step, value in scalars] == [(3, "loss", 0.25), (3, "skipped", 0)]
    assert (at, picture.tag, picture.image.height, picture.image.width) == (3, "samples", 8, 16)
