"""Times as medians after a warm-up; what is compared is timed in turns, so that a busy machine slows all of it."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from diffjax.inference.pipeline import describe_devices

LEAST = 3  # repeats
BLOCK = 0.05  # seconds: what takes less is called several times in a row, lest the clock and the change of turns count


def context(repeats: int) -> str:
    """Where figures were taken."""
    return f"{describe_devices()}, float32, jax {jax.__version__}, medians of {repeats}"


def in_turns(
    functions: Sequence[Callable[[], Any]], repeats: int, block: float = 0.0, budget: float = math.inf
) -> np.ndarray:
    """Seconds of a call of each function, float64 [repeats, functions], after a call of each that does not count. A
    turn takes as many calls as fill `block` seconds, and gives their mean. There are fewer repeats, but LEAST, where
    more would take longer than `budget` seconds.
    """
    calls = [1] * len(functions)

    def turn(j: int) -> float:
        began = time.perf_counter()
        for _ in range(calls[j]):
            jax.block_until_ready(functions[j]())
        return (time.perf_counter() - began) / calls[j]

    for j in range(len(functions)):
        turn(j)  # whatever happens only once
        calls[j] = math.ceil(block / turn(j)) if block else 1
    rounds, began = [], time.perf_counter()
    while len(rounds) < repeats and (len(rounds) < LEAST or time.perf_counter() - began < budget):
        rounds.append([turn(j) for j in range(len(functions))])
    return np.array(rounds)


class Compared(NamedTuple):
    """Two ways timed in turns."""

    first: float  # median seconds
    second: float
    ratio: float  # median of first/second, pair by pair


def compare(first: Callable[[], Any], second: Callable[[], Any], pairs: int) -> Compared:
    """Time two functions in turns, after a call of each that does not count."""
    seconds = in_turns((first, second), pairs)
    medians = np.median(seconds, axis=0)
    return Compared(float(medians[0]), float(medians[1]), float(np.median(seconds[:, 0] / seconds[:, 1])))
