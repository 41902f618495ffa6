import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffjax.training import curve


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=120))
def test_smoothing_keeps_lines_as_they_are_and_means_of_neighbours(values):
    values = np.array(values)
    half = max(1, round(0.03 * len(values) / 2))
    expected = [values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))]
    np.testing.assert_allclose(curve.smoothed(values), expected, atol=1e-12)


def test_the_curve_is_drawn_of_whatever_was_logged(tmp_path):
    lines = [
        {"step": n, "loss": 1 / n, "loss_q1": float("nan") if n % 2 else 0.5, "loss_q4": 0.1} for n in range(1, 30)
    ]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 20, "held_out_loss": 0.2}]))
    curve.draw(metrics, tmp_path / "curve.png", "x")
    assert Image.open(tmp_path / "curve.png").size[0] > 400
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.png", "metrics.jsonl"]
    with pytest.raises(OSError, match="nowhere"):
        curve.draw(tmp_path / "nowhere", tmp_path / "curve.png")
