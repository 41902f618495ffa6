"""Noise schedules and the levels that a sampler visits.

A schedule is the table of all noise levels of the forward process x_t = alpha*x0 + sigma*eps.
Index 0 is data (alpha 1, sigma 0) and index T is noise, so that a sampler's last step needs no
special case. Tables are numpy float64 on the host: 1 - alpha**2 loses all its digits near the
data when it is formed in float32.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Level(NamedTuple):
    """A noise level (scalar leaves), a batch of levels ([B]) or a table of them ([N])."""

    t: Any  # index on the schedule: 0 is data, 1..T are noisy; fractional between two of them
    alpha: Any  # amplitude of the data, 0 or more
    sigma: Any  # standard deviation of the noise, 0 or more


Schedule = Level  # with leaves [T+1], in numpy float64
# (schedule, steps) -> strictly decreasing [steps], each in 1..T
Spacing = Callable[[Schedule, int], np.ndarray]


def length(schedule: Schedule) -> int:
    """T, the number of noisy levels. Raises: ValueError for what is no schedule."""
    check_schedule(schedule)
    return len(schedule.t) - 1


def check_schedule(schedule: Any) -> None:
    """Check that something is a table of levels.

    Raises: ValueError for a number of levels, and for anything else.
    """
    if not isinstance(schedule, Level) or np.ndim(schedule.t) != 1:
        given = schedule if np.ndim(schedule) == 0 else type(schedule).__name__
        raise ValueError(f"schedule is {given}: use a table of levels, as schedule.linear(1000)")


def level_at(level: Level, i: Any) -> Level:
    """Row i of a table of levels.

    i: an index; or a slice, a mask or an array of indices, for several rows.
    """
    return Level(*(leaf[i] for leaf in level))


def logsnr(level: Level) -> np.ndarray:
    """2*log(alpha/sigma) of levels on the host.

    It is +inf on data, decreases with t, and is -inf where there is no signal.
    """
    with np.errstate(divide="ignore"):
        return 2 * (np.log(level.alpha) - np.log(level.sigma))


def at(schedule: Schedule, t: Any) -> Level:
    """The levels with index t, a number or an array of any shape.

    Whole numbers give rows of the table, so that respacing a schedule is indexing it. Between two
    noisy rows log(alpha/sigma) is interpolated linearly in t.

    Raises: ValueError for t outside 0..T, since JAX would clamp it silently; for t between data and
    level 1; and for t between the last two levels if the last has no signal, where nothing can be
    interpolated.
    """
    index, T = np.asarray(t), length(schedule)
    if index.dtype.kind not in "iuf":
        raise ValueError(f"t is {t} of dtype {index.dtype}: use a level from 0 to {T}")
    if index.size and not (index.min() >= 0 and index.max() <= T):
        wrong = index[~((index >= 0) & (index <= T))].flat[0]
        raise ValueError(f"t is {wrong}: use a level from 0 to {T}")
    lower = np.floor(index).astype(np.int64)
    table = Level(*(np.asarray(leaf)[lower] for leaf in schedule))
    if (lower == index).all():
        return table
    ends = (index > 0) & (index < 1) | ((index > T - 1) & (index < T) & (schedule.alpha[-1] == 0))
    if ends.any():
        raise ValueError(
            f"t is {index[ends].flat[0]}, next to a level of infinite logsnr: use a whole level"
        )
    between = _interpolate(schedule, index)
    return Level(
        index,
        *(np.where(lower == index, a, b) for a, b in zip(table[1:], between[1:], strict=True)),
    )


def _interpolate(schedule: Schedule, t: np.ndarray) -> Level:
    noisy = level_at(schedule, slice(1, None))
    half = np.interp(t, noisy.t, logsnr(noisy) / 2)
    if is_variance_preserving(schedule):
        return _from_logsnr(t, 2 * half)
    with np.errstate(divide="ignore"):
        alpha = np.exp(np.interp(t, noisy.t, np.log(noisy.alpha)))
    return Level(t, alpha, alpha * np.exp(-half))


def t_of_logsnr(schedule: Schedule, value: Any) -> np.ndarray:
    """The t in 1..T, fractional in general, at which the schedule has this logsnr.

    The inverse of `logsnr(at(schedule, t))`. Values beyond the ends give 1 or T.

    Raises: ValueError for a schedule without signal at level T, whose logsnr is not finite.
    """
    _check_signal(schedule)
    return np.interp(-np.asarray(value, np.float64), -logsnr(schedule)[1:], schedule.t[1:])


def _check_signal(schedule: Schedule) -> None:
    if schedule.alpha[-1] == 0:
        raise ValueError(
            f"schedule has no signal at level {length(schedule)}, so that logsnr is infinite there:"
            " use trailing spacing"
        )


# ----------------------------------------------------------------------------- schedules


def from_betas(betas: Sequence[float] | np.ndarray) -> Schedule:
    """The variance-preserving schedule with the given betas.

    alpha_t**2 = prod_{i<=t} (1 - beta_i), equation 4 of DDPM (arXiv:2006.11239). betas: [T].

    Raises: ValueError unless every beta is strictly between 0 and 1, and neither so small that
    logsnr stays the same in float64 nor so many that alpha becomes 0.
    """
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or not len(betas):
        raise ValueError(f"betas have shape {betas.shape}: use a list of at least one number")
    wrong = ~((betas > 0) & (betas < 1))
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ValueError(f"beta_{i + 1} is {betas[i]}: use a number strictly between 0 and 1")
    log_alpha2 = np.cumsum(np.log1p(-betas))
    # expm1 keeps the digits of sigma where alpha is nearly 1.
    return _checked(np.exp(log_alpha2 / 2), np.sqrt(-np.expm1(log_alpha2)))


def from_alphas(
    alpha: Sequence[float] | np.ndarray, sigma: Sequence[float] | np.ndarray | None = None
) -> Schedule:
    """The schedule with the given amplitudes, and noise, at levels 1..T.

    alpha, sigma: [T]. The paper's alpha-bar, or `alphas_cumprod`, is alpha**2. Without sigma the
    schedule is variance-preserving: sigma = sqrt(1 - alpha**2).

    Raises: ValueError unless all are finite, alpha is 0 or more (0 at level T only) and, without
    sigma, below 1, sigma is above 0, and the signal-to-noise ratio decreases at every level.
    """
    alpha = np.asarray(alpha, np.float64)
    if alpha.ndim != 1 or not len(alpha):
        raise ValueError(f"alpha has shape {alpha.shape}: use a list of at least one number")
    if sigma is None:
        _check_each(
            "alpha", alpha, (alpha >= 0) & (alpha < 1), "of 0 or more and below 1; level 0 is added"
        )
        sigma = np.sqrt((1 - alpha) * (1 + alpha))
    sigma = np.asarray(sigma, np.float64)
    if sigma.shape != alpha.shape:
        raise ValueError(f"sigma has shape {sigma.shape}, expected that of alpha, {alpha.shape}")
    return _checked(alpha, sigma)


def from_logsnr(function: Callable[[np.ndarray], np.ndarray], T: int = 1000) -> Schedule:
    """The variance-preserving schedule with logsnr = function(t/T) at t = 1..T.

    alpha**2 = sigmoid(logsnr), the continuous view of variational diffusion models
    (arXiv:2107.00630). function: takes an array [T] in (0, 1].

    Raises: ValueError unless the values are finite and strictly decreasing.
    """
    t = np.arange(1, _positive(T) + 1)
    value = np.broadcast_to(np.asarray(function(t / T), np.float64), t.shape)
    _check_each("logsnr", value, np.isfinite(value), "that is finite")
    return _checked(*_from_logsnr(t, value)[1:])


def _from_logsnr(t: np.ndarray, value: np.ndarray) -> Level:
    with np.errstate(over="ignore"):
        return Level(t, (1 + np.exp(-value)) ** -0.5, (1 + np.exp(value)) ** -0.5)


def linear(T: int = 1000, first: float = 1e-4, last: float = 0.02) -> Schedule:
    """Betas from `first` to `last` in equal steps: DDPM, section 4 (arXiv:2006.11239).

    The defaults belong to T = 1000: a shorter chain with the same betas does not reach noise, and
    `rescaled_linear` does.
    """
    return from_betas(_even(first, last, T))


def rescaled_linear(T: int = 1000, first: float = 1e-4, last: float = 0.02) -> Schedule:
    """`linear` with its betas times 1000/T: improved DDPM (arXiv:2102.09672).

    It reaches the same noise at any T.

    Raises: ValueError if a beta becomes 1 or more: with the defaults, for T of 20 and less.
    """
    return linear(T, first * 1000 / _positive(T), last * 1000 / T)


def scaled_linear(T: int = 1000, first: float = 0.00085, last: float = 0.012) -> Schedule:
    """Betas whose roots go from sqrt(first) to sqrt(last) in equal steps.

    The schedule of latent diffusion (arXiv:2112.10752).
    """
    return from_betas(_even(first**0.5, last**0.5, T) ** 2)


def cosine(T: int = 1000, offset: float = 0.008, largest: float = 0.999) -> Schedule:
    """The cosine schedule of improved DDPM, equation 17 (arXiv:2102.09672).

    alpha_t**2 = f(t)/f(0), f(t) = cos((t/T + offset)/(1 + offset) * pi/2)**2, with each beta at
    most `largest`.
    """
    return _from_curve(
        np.cos((np.arange(_positive(T) + 1) / T + offset) / (1 + offset) * np.pi / 2) ** 2, largest
    )


def sigmoid(
    T: int = 1000,
    start: float = -3.0,
    end: float = 3.0,
    temperature: float = 1.0,
    largest: float = 0.999,
) -> Schedule:
    """The sigmoid schedule, algorithm 1 of arXiv:2301.10972.

    alpha_t**2 = (f(T) - f(t))/(f(T) - f(0)), with each beta at most `largest`, and

        f(t) = 1/(1 + exp(-(start + t/T*(end - start))/temperature))

    Raises: ValueError unless start < end and temperature > 0.
    """
    if not (start < end and temperature > 0):
        raise ValueError(
            f"start is {start}, end {end} and temperature {temperature}: use start below end, and a"
            " temperature above 0"
        )
    ramp = np.linspace(start, end, _positive(T) + 1) / temperature
    return _from_curve(1 / (1 + np.exp(-ramp[-1])) - 1 / (1 + np.exp(-ramp)), largest)


def _from_curve(alpha2: np.ndarray, largest: float) -> Schedule:
    # Up to a factor: only ratios count. A curve that ends at 0 would take a beta of 1.
    return from_betas(np.minimum(1 - alpha2[1:] / alpha2[:-1], largest))


def edm(
    T: int = 1000, smallest: float = 0.002, largest: float = 80.0, rho: float = 7.0
) -> Schedule:
    """The variance-exploding schedule of EDM, equation 5 (arXiv:2206.00364).

    alpha is 1, and sigma**(1/rho) goes in equal steps from `smallest` at level 1 to `largest` at T.

    Raises: ValueError unless 0 < smallest < largest and rho > 0.
    """
    if not (0 < smallest < largest and rho > 0):
        raise ValueError(
            f"smallest is {smallest}, largest {largest} and rho {rho}: use 0 < smallest < largest,"
            " and rho above 0"
        )
    return from_alphas(np.ones(_positive(T)), _ramp(smallest, largest, T, rho))


def flow(T: int = 1000, shift: float = 1.0) -> Schedule:
    """The straight path of flow matching, alpha = 1 - sigma (arXiv:2210.02747).

    sigma = shift*s/(1 + (shift - 1)*s) with s = t/T: level T is pure noise, without signal. A shift
    multiplies sigma/alpha, so that more levels are noisy; 3 is that of arXiv:2403.03206, equation
    23, for images of 1024 pixels a side.

    Raises: ValueError unless shift > 0.
    """
    if not 0 < shift < np.inf:
        raise ValueError(f"shift is {shift}: use a number above 0")
    s = np.arange(1, _positive(T) + 1) / T
    total = (1 - s) + shift * s
    return _checked((1 - s) / total, shift * s / total)


def _ramp(first: float, last: float, n: int, rho: float) -> np.ndarray:
    return _even(first ** (1 / rho), last ** (1 / rho), n) ** rho


def _even(first: float, last: float, n: int) -> np.ndarray:
    # One level alone is the noisiest.
    return np.linspace(first, last, _positive(n)) if n > 1 else np.full(_positive(n), last)


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """The schedule rescaled to have no signal at level T.

    alpha_t <- (alpha_t - alpha_T)*alpha_1/(alpha_1 - alpha_T), algorithm 1 of arXiv:2305.08891.
    Networks for it predict v or x0, since eps does not determine x0 at level T.

    Raises: ValueError for a schedule that is not variance-preserving, or has only one noisy level.
    """
    check_variance_preserving(schedule, "zero_terminal_snr")
    if length(schedule) < 2:
        raise ValueError(
            f"schedule has T = {length(schedule)}: zero_terminal_snr needs T of 2 or more"
        )
    alpha, sigma = schedule.alpha[1:], schedule.sigma[1:]
    # In terms of 1 - alpha = sigma**2/(1 + alpha), which keeps its digits near the data.
    missing = sigma**2 / (1 + alpha)
    stretch = alpha[0] / (missing[-1] - missing[0])
    rescaled = (missing[-1] - missing) * stretch
    return _checked(
        rescaled, np.sqrt((missing[0] + (missing - missing[0]) * stretch) * (1 + rescaled))
    )


def is_variance_preserving(schedule: Schedule) -> bool:
    """True if alpha**2 + sigma**2 is 1 at every level, to one part in a million."""
    check_schedule(schedule)
    return bool(np.abs(schedule.alpha**2 + schedule.sigma**2 - 1).max() < 1e-6)


def check_variance_preserving(schedule: Schedule, user: str) -> None:
    """Check that a schedule is variance-preserving.

    user: the name of what needs it to be.

    Raises: ValueError unless alpha**2 + sigma**2 is 1, naming the level that is farthest off.
    """
    if not is_variance_preserving(schedule):
        total = schedule.alpha**2 + schedule.sigma**2
        i = int(np.argmax(np.abs(total - 1)))
        raise ValueError(
            f"schedule has alpha**2 + sigma**2 = {total[i]:.6g} at level {schedule.t[i]}, but"
            f" {user} needs a variance-preserving one: use schedule.variance_preserving"
        )


def variance_preserving(level: Level) -> Level:
    """The levels (or schedule) divided by sqrt(alpha**2 + sigma**2)."""
    scale = np.hypot(level.alpha, level.sigma)
    return Level(level.t, level.alpha / scale, level.sigma / scale)


def variance_exploding(level: Level) -> Level:
    """The levels (or schedule) divided by alpha, so that alpha is 1.

    Raises: ValueError for levels without signal, where sigma would be infinite.
    """
    if not np.all(level.alpha):
        raise ValueError("level has an alpha of 0: sigma would be infinite for an alpha of 1")
    return Level(level.t, np.ones_like(level.alpha), level.sigma / level.alpha)


def _checked(alpha: np.ndarray, sigma: np.ndarray) -> Schedule:
    """The schedule with data before these levels, checked."""
    first = np.arange(len(alpha)) < len(alpha) - 1
    _check_each(
        "alpha", alpha, np.isfinite(alpha) & ((alpha > 0) | ((alpha == 0) & ~first)), "above 0"
    )
    _check_each("sigma", sigma, np.isfinite(sigma) & (sigma > 0), "above 0")
    schedule = Level(np.arange(len(alpha) + 1), np.append(1.0, alpha), np.append(0.0, sigma))
    stays = np.diff(logsnr(schedule)) >= 0
    if stays.any():
        i = int(np.argmax(stays))
        raise ValueError(
            f"logsnr does not decrease from level {i} to level {i + 1}: every level must be noisier"
            " than the one before"
        )
    return schedule


def _check_each(name: str, values: np.ndarray, right: np.ndarray, rule: str) -> None:
    if not right.all():
        i = int(np.argmin(right))
        raise ValueError(f"{name}_{i + 1} is {values[i]}: use a number {rule}")


# ----------------------------------------------------------------------------- spacings


def trailing(schedule: Schedule, steps: int) -> np.ndarray:
    """T, T - T/steps, ...: a grid that starts at pure noise (arXiv:2305.08891).

    In integers: T*(steps-i) // steps.
    """
    T = _check_steps(schedule, steps)
    return T * (steps - np.arange(steps)) // steps


def leading(schedule: Schedule, steps: int) -> np.ndarray:
    """1 + k*(T // steps), k = steps-1..0: the "linear" grid of DDIM.

    From arXiv:2010.02502, D.2. It ends at level 1, but starts below T (at 981 for 50 of 1000
    steps, at 1 for one step), where images are not quite noise yet.
    """
    T = _check_steps(schedule, steps)
    return 1 + (T // steps) * np.arange(steps)[::-1]


def linspace(schedule: Schedule, steps: int) -> np.ndarray:
    """T..1 in equal distances, both ends included, rounded half to even."""
    T = _check_steps(schedule, steps)
    return np.round(np.linspace(T, 1, steps)).astype(np.int64)


def quadratic(schedule: Schedule, steps: int) -> np.ndarray:
    """1 + floor(linspace(0, sqrt(0.8*T), steps)**2): the CIFAR-10 grid of DDIM.

    As the authors of arXiv:2010.02502 (D.2) compute it: dense near the data, and from 0.8*T at
    most; one step alone is level 1. Where two of its integers coincide, the upper is moved one
    level up.

    Raises: ValueError for more steps than the 1 + floor(0.8*T) levels of its range.
    """
    T = _check_steps(schedule, steps)
    if steps > 1 + int(0.8 * T):
        raise ValueError(
            f"steps is {steps}: quadratic spacing takes at most {1 + int(0.8 * T)} of {T} levels,"
            " use trailing"
        )
    # The last of several steps is 0.8*T in exact arithmetic; float64's square of a root may fall
    # just short.
    squares = np.linspace(0, np.sqrt(0.8 * T), steps) ** 2
    levels = 1 + np.floor(squares + 1e-9).astype(np.int64)
    for i in range(1, steps):
        levels[i] = max(levels[i], levels[i - 1] + 1)
    return levels[::-1].copy()


def karras(schedule: Schedule, steps: int, rho: float = 7.0) -> np.ndarray:
    """(sigma/alpha)**(1/rho) in equal steps from level T to level 1, both included.

    The grid of EDM, equation 5 (arXiv:2206.00364), on any schedule. Fractional in general.

    Raises: ValueError for a rho that is not above 0, and for a schedule without signal at level T.
    """
    if not 0 < rho < np.inf:
        raise ValueError(f"rho is {rho}: use a number above 0")
    first, last = np.exp(-_ends(schedule, steps) / 2)
    return _by_logsnr(schedule, -2 * np.log(_ramp(first, last, steps, rho)))


def uniform_logsnr(schedule: Schedule, steps: int) -> np.ndarray:
    """Equal steps in logsnr from level T to level 1, both included.

    The grid of DPM-Solver (arXiv:2206.00927). Fractional in general.

    Raises: ValueError for a schedule without signal at level T.
    """
    first, last = _ends(schedule, steps)
    return _by_logsnr(schedule, np.linspace(first, last, steps))


def _ends(schedule: Schedule, steps: int) -> np.ndarray:
    T = _check_steps(schedule, steps)
    _check_signal(schedule)
    return logsnr(at(schedule, [T, 1]))


def _by_logsnr(schedule: Schedule, values: np.ndarray) -> np.ndarray:
    t = t_of_logsnr(schedule, values)
    t[-1], t[0] = 1, length(schedule)  # exactly; one step alone starts at noise
    return t


SPACINGS: dict[str, Spacing] = {
    f.__name__: f for f in (trailing, leading, linspace, quadratic, karras, uniform_logsnr)
}


def check_levels(schedule: Schedule, t: Any) -> np.ndarray:
    """The levels that a sampler visits, as int64 or float64 [N], checked.

    t: any list of levels, strictly decreasing and in 1..T; or a spacing and a number of levels in
    words, as in "trailing:50".

    Raises: ValueError for other levels or words, and for a schedule whose row 0 is not data.
    """
    check_schedule(schedule)
    if isinstance(t, str):
        t = _spaced(schedule, t)
    t = np.asarray(t)
    if t.ndim == 0:
        raise ValueError(f't is {t}: use a list of levels, or for {t} of them "trailing:{t}"')
    if t.ndim != 1 or not len(t):
        raise ValueError(f"t has shape {t.shape}: use a list of at least one level")
    at(schedule, t)
    if (schedule.alpha[0], schedule.sigma[0]) != (1, 0):
        raise ValueError(
            f"schedule has alpha {schedule.alpha[0]} and sigma {schedule.sigma[0]} in row 0: use"
            " alpha 1 and sigma 0, which is data"
        )
    # Differences of unsigned integers would wrap round.
    t = t.astype(np.float64 if t.dtype.kind == "f" else np.int64)
    if t.min() < 1:
        raise ValueError(
            f"t is {t.min()}: level 0 is data, and a sampler starts from levels 1 to T"
        )
    if (np.diff(t) >= 0).any():
        i = int(np.argmax(np.diff(t) >= 0))
        raise ValueError(f"t is {t[i]} before {t[i + 1]}: levels must decrease strictly")
    return t


def _spaced(schedule: Schedule, text: str) -> np.ndarray:
    name, _, steps = (word.strip() for word in text.partition(":"))
    if name not in SPACINGS or not steps.isdecimal():
        raise ValueError(
            f"t is {text!r}: use a list of levels, or one of {', '.join(SPACINGS)} with a number of"
            ' levels, as in "trailing:50"'
        )
    return SPACINGS[name](schedule, int(steps))


def _positive(T: int) -> int:
    if not isinstance(T, int | np.integer) or T < 1:
        raise ValueError(f"T is {T}: use a whole number of 1 or more")
    return T


def _check_steps(schedule: Schedule, steps: int) -> int:
    T = length(schedule)
    if not isinstance(steps, int | np.integer) or not 1 <= steps <= T:
        raise ValueError(f"steps is {steps}: use a whole number from 1 to {T}")
    return T
