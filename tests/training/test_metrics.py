import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import naming
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tensorboardX.proto import event_pb2

from diffjax.training.metrics import JsonlWriter, TensorBoard, plot_curve, running_mean


def test_lines_beyond_the_checkpoint_are_dropped(tmp_path):
    """So is a line that was cut short."""
    path = tmp_path / "metrics.jsonl"
    metrics = JsonlWriter(path, 0)
    for step in (1, 2, 3):
        metrics.write(step, loss=jnp.float32(step))
    path.write_text(path.read_text() + '{"step": 4, "lo')
    JsonlWriter(path, 2).write(3, loss=9, empty=float("nan"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": 9.0, "empty": None},
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def events(folder):
    """The values in a TensorBoard folder, as (step, value).

    A record has a length (8 bytes), its checksum (4), an event, and the event's checksum (4).
    """
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            yield from ((event.step, value) for value in event.summary.value)
            data = data[16 + length :]


def test_tensorboard(tmp_path):
    board = TensorBoard(tmp_path, 0)
    board.write(3, loss=jnp.float32(0.25), skipped=0)
    board.write_picture(3, "samples", np.zeros((8, 16, 3), np.uint8))
    board.close()
    (*scalars, (step, picture)) = events(tmp_path)
    assert [(step, value.tag, value.simple_value) for step, value in scalars] == [
        (3, "loss", 0.25),
        (3, "skipped", 0),
    ]
    assert (step, picture.tag, picture.image.height, picture.image.width) == (3, "samples", 8, 16)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=120))
def test_running_mean(values):
    values = np.array(values)
    half = max(1, round(0.03 * len(values) / 2))
    expected = [values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))]
    np.testing.assert_allclose(running_mean(values), expected, atol=1e-12)


def test_curve(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(metrics, 0)
    for n in range(1, 30):
        writer.write(n, loss=1 / n, loss_q1=float("nan") if n % 2 else 0.5, loss_q4=0.1)
    writer.write(20, held_out_loss=0.2)
    assert "null" in metrics.read_text()
    plot_curve(metrics, tmp_path / "curve.png", "x")
    assert Image.open(tmp_path / "curve.png").size[0] > 400
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.png", "metrics.jsonl"]


def test_curve_without_quartiles(tmp_path):
    """As of a student of few levels."""
    JsonlWriter(tmp_path / "metrics.jsonl", 0).write(1, loss=0.5)
    plot_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").exists()
    with pytest.raises(OSError, match=naming(tmp_path / "nowhere")):
        plot_curve(tmp_path / "nowhere", tmp_path / "curve.png")
