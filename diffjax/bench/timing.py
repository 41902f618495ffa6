"""Median times after a warm-up.

Functions that are compared are timed in turns, so that a busy machine slows all of them.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from diffjax.inference.pipeline import describe_devices

LEAST_REPEATS = 3
# Seconds. Shorter functions are called several times a turn, lest the clock and the turns count.
BLOCK = 0.05


def describe_context(repeats: int) -> str:
    """The devices, dtype and versions that times are measured with."""
    return f"{describe_devices()}, float32, jax {jax.__version__}, medians of {repeats}"


def interleaved(
    functions: Sequence[Callable[[], Any]],
    repeats: int,
    block: float = 0.0,
    budget: float = math.inf,
) -> np.ndarray:
    """Time functions in turns: seconds of a call, float64 [repeats, functions].

    The first call of each is not timed. A turn takes as many calls as fill `block` seconds, and
    counts their mean. There are fewer repeats, but at least LEAST_REPEATS, where more would take
    longer than `budget` seconds.
    """
    calls = [1] * len(functions)
    for j, function in enumerate(functions):
        _time(function, 1)
        calls[j] = math.ceil(block / _time(function, 1)) if block else 1
    rounds, began = [], time.perf_counter()
    while len(rounds) < repeats and (
        len(rounds) < LEAST_REPEATS or time.perf_counter() - began < budget
    ):
        rounds.append([_time(*turn) for turn in zip(functions, calls, strict=True)])
    return np.array(rounds)


def _time(function: Callable[[], Any], calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(function())
    return (time.perf_counter() - began) / calls


class Comparison(NamedTuple):
    """Two functions timed in turns."""

    first: float  # median seconds
    second: float
    ratio: float  # median of first/second, pair by pair


def compare(first: Callable[[], Any], second: Callable[[], Any], pairs: int) -> Comparison:
    """Time two functions in turns; the first call of each is not timed."""
    seconds = interleaved((first, second), pairs)
    medians = np.median(seconds, axis=0)
    ratio = np.median(seconds[:, 0] / seconds[:, 1])
    return Comparison(float(medians[0]), float(medians[1]), float(ratio))
