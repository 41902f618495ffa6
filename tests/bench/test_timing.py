import re

import numpy as np

from diffjax.bench import timing


def test_comparisons_are_interleaved():
    calls = []
    times = timing.compare(lambda: calls.append("a"), lambda: calls.append("b"), 3)
    assert calls == ["a", "b"] * 4  # the first of each is not timed
    assert times.ratio > 0


def test_short_functions_fill_a_block():
    calls = []
    seconds = timing.interleaved([lambda: calls.append(0)], 2, block=1e-3)
    assert seconds.shape == (2, 1)
    assert len(calls) > 2 * 10
    assert (seconds < 1e-3).all()


def test_a_budget_leaves_the_least_repeats():
    assert len(timing.interleaved([lambda: ()], 100, budget=0.0)) == timing.LEAST_REPEATS
    assert len(timing.interleaved([lambda: ()], 2, budget=0.0)) == 2


def test_ratios_are_of_pairs(monkeypatch):
    seconds = np.array([[1.0, 2.0], [6.0, 3.0], [8.0, 2.0]])
    monkeypatch.setattr(timing, "interleaved", lambda functions, pairs: seconds)
    assert timing.compare(lambda: (), lambda: (), 3) == (6.0, 2.0, 2.0)


def test_the_context_is_described():
    text = timing.describe_context(7)
    assert re.match(r"8 x cpu \(\d+ cores\), float32, jax [\d.]+\D+\b7\b", text)
