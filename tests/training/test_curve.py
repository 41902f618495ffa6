import numpy as np
import pytest
from helpers import naming
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffjax.training import curve, loop


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=120))
def test_smoothing_keeps_lines_as_they_are_and_means_of_neighbours(values):
    values = np.array(values)
    half = max(1, round(0.03 * len(values) / 2))
    expected = [values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))]
    np.testing.assert_allclose(curve.smoothed(values), expected, atol=1e-12)


def test_the_curve_is_drawn_of_whatever_was_logged(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    written = loop.JsonlWriter(metrics, 0)
    for n in range(1, 30):
        written.write(n, loss=1 / n, loss_q1=float("nan") if n % 2 else 0.5, loss_q4=0.1)
    written.write(20, held_out_loss=0.2)
    assert "null" in metrics.read_text()
    curve.draw(metrics, tmp_path / "curve.png", "x")
    assert Image.open(tmp_path / "curve.png").size[0] > 400
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.png", "metrics.jsonl"]
    metrics.unlink()
    loop.JsonlWriter(metrics, 0).write(1, loss=0.5)  # of a student of few levels, which has no quarters
    curve.draw(metrics, tmp_path / "curve.png")
    with pytest.raises(OSError, match=naming(tmp_path / "nowhere")):
        curve.draw(tmp_path / "nowhere", tmp_path / "curve.png")
