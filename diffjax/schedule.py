"""Noise schedules and the levels that a sampler visits.

A schedule is the table of all noise levels of the forward process x_t = alpha*x0 + sigma*eps. Index 0 is data
(alpha 1, sigma 0), index T is noise, so that a sampler's last step needs no special case. Tables are numpy
float64 on the host: 1 - alpha**2 loses all its digits near the data when it is formed in float32.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Level(NamedTuple):
    """A noise level (scalar leaves), a batch of them ([B]) or a table of them ([N])."""

    t: Any  # index on the schedule: 0 is data, 1..T are noisy
    alpha: Any  # amplitude of the data, in [0, 1]
    sigma: Any  # standard deviation of the noise, at least 0


Schedule = Level  # with leaves [T+1], in numpy float64
Spacing = Callable[[Schedule, int], np.ndarray]  # (schedule, steps) -> decreasing int64 [steps], each in 1..T


def length(schedule: Schedule) -> int:
    """T, the number of noisy levels."""
    return len(schedule.t) - 1


def logsnr(level: Level) -> np.ndarray:
    """2*log(alpha/sigma) of levels on the host: +inf on data, decreasing with t."""
    with np.errstate(divide="ignore"):
        return 2 * np.log(level.alpha / level.sigma)


def at(schedule: Schedule, t: Any) -> Level:
    """The levels with index t: an int or an int array of any shape. Respacing a schedule is indexing it.

    ValueError for an index that is no integer or outside 0..T, since JAX would clamp it silently.
    """
    index, last = np.asarray(t), length(schedule)
    if index.dtype.kind not in "iu":
        raise ValueError(f"levels are counted in integers 0..{last}, got {index.dtype} {t}")
    if index.size and (index.min() < 0 or index.max() > last):
        raise ValueError(
            f"level {index.min() if index.min() < 0 else index.max()} is not on the schedule: use 0..{last}"
        )
    return Level(*(np.asarray(leaf)[index] for leaf in schedule))


# ---------------------------------------------------------------------------------------------- schedules


def from_betas(betas: Sequence[float] | np.ndarray) -> Schedule:
    """The variance-preserving schedule with the given betas: alpha_t**2 = prod_{i<=t} (1 - beta_i), equation 4
    of DDPM (arXiv:2006.11239).

    betas: [T], each strictly between 0 and 1 (else ValueError).
    """
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or not len(betas):
        raise ValueError(f"betas are a list of at least one number, got shape {betas.shape}")
    wrong = ~((betas > 0) & (betas < 1))
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ValueError(f"beta_{i + 1} is {betas[i]}: every beta lies strictly between 0 and 1")
    log_alpha2 = np.concatenate([[0.0], np.cumsum(np.log1p(-betas))])
    # expm1 keeps the digits of sigma where alpha is nearly 1; 0 - x is never -0.0.
    return Level(np.arange(len(betas) + 1), np.exp(log_alpha2 / 2), np.sqrt(0 - np.expm1(log_alpha2)))


def linear(T: int = 1000, first: float = 1e-4, last: float = 0.02) -> Schedule:
    """Betas from `first` to `last` in equal steps: DDPM, section 4 (arXiv:2006.11239).

    The defaults belong to T = 1000: a shorter chain with the same betas does not reach noise.
    """
    return from_betas(np.linspace(first, last, _positive(T)))


def cosine(T: int = 1000, offset: float = 0.008, largest: float = 0.999) -> Schedule:
    """alpha_t**2 = f(t)/f(0), f(t) = cos((t/T + offset)/(1 + offset) * pi/2)**2, each beta at most `largest`:
    equation 17 of improved DDPM (arXiv:2102.09672).
    """
    t = np.arange(_positive(T) + 1) / T
    f = np.cos((t + offset) / (1 + offset) * np.pi / 2) ** 2
    return from_betas(np.minimum(1 - f[1:] / f[:-1], largest))


# ---------------------------------------------------------------------------------------------- spacings


def trailing(schedule: Schedule, steps: int) -> np.ndarray:
    """T, T - T/steps, ...: starts at pure noise (arXiv:2305.08891). In integers: T*(steps-i) // steps."""
    T = _check_steps(schedule, steps)
    return T * (steps - np.arange(steps)) // steps


def leading(schedule: Schedule, steps: int) -> np.ndarray:
    """1 + k*(T // steps), k = steps-1..0: the "linear" grid of DDIM (arXiv:2010.02502, D.2). Ends at level 1, but
    starts below T (at 981 for 50 of 1000 steps), where images are not quite noise yet.
    """
    T = _check_steps(schedule, steps)
    return 1 + (T // steps) * np.arange(steps)[::-1]


def linspace(schedule: Schedule, steps: int) -> np.ndarray:
    """T..1 in equal distances, both ends included, rounded (half to even)."""
    T = _check_steps(schedule, steps)
    return np.round(np.linspace(T, 1, steps)).astype(np.int64)


def quadratic(schedule: Schedule, steps: int) -> np.ndarray:
    """1 + floor(linspace(0, sqrt(0.8*T), steps)**2): the CIFAR-10 grid of DDIM (arXiv:2010.02502, D.2), dense near
    the data and from 0.8*T at the most. Where two of its integers coincide, the upper is pushed one level up.

    ValueError for more steps than the 1 + floor(0.8*T) levels of its range.
    """
    T = _check_steps(schedule, steps)
    if steps > 1 + int(0.8 * T):
        raise ValueError(
            f"quadratic spacing has room for {1 + int(0.8 * T)} of {T} levels, not for {steps} steps: use trailing"
        )
    # The last of several steps is 0.8*T in exact arithmetic; float64's square of a root may fall just short.
    squares = np.linspace(0, np.sqrt(0.8 * T), steps) ** 2
    levels = 1 + np.floor(squares + 1e-9).astype(np.int64)
    for i in range(1, steps):
        levels[i] = max(levels[i], levels[i - 1] + 1)
    return levels[::-1].copy()


SPACINGS: dict[str, Spacing] = {f.__name__: f for f in (trailing, leading, linspace, quadratic)}


def check_levels(schedule: Schedule, t: Any) -> np.ndarray:
    """t as int64 [N], N >= 1, or a ValueError: levels that a sampler visits are strictly decreasing, in 1..T."""
    t = np.asarray(t)
    if t.ndim != 1 or not len(t):
        raise ValueError(f"a sampler visits a list of at least one level, got shape {t.shape}")
    at(schedule, t)
    if t.min() < 1:
        raise ValueError("a sampler starts from noise: level 0 is data, name levels 1..T only")
    if (np.diff(t) >= 0).any():
        i = int(np.argmax(np.diff(t) >= 0))
        raise ValueError(f"levels must decrease strictly, got {t[i]} before {t[i + 1]}")
    return t.astype(np.int64)


def _positive(T: int) -> int:
    if T < 1:
        raise ValueError(f"a schedule has at least one noisy level, got T = {T}")
    return T


def _check_steps(schedule: Schedule, steps: int) -> int:
    T = length(schedule)
    if not 1 <= steps <= T:
        raise ValueError(f"steps is {steps}: this schedule takes 1 to {T}")
    return T
