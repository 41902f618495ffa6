"""Samplers of higher order, and stochastic ones, as plans for one scan.

With lambda = log(alpha/sigma) and h = lambda_s - lambda_t, the probability flow from t to s is,
exactly,

    x_s = sigma_s/sigma_t * x_t
        + alpha_s * integral over l from lambda_t to lambda_s of exp(l - lambda_s) * x0(l)

and a solver is an assumption of how x0 changes between two levels: DDIM holds it constant, the
solvers here extrapolate it from the last two or three estimates. DDIM's eta applies to all of
them: k, the share of the old noise direction that is kept, changes the coefficient of x_t, and
nothing else.

Every row keeps the mean: b follows from a*alpha_t + b + c1 + c2 = alpha_s. Where h is infinite
(onto data, or from a level without signal) nothing can be extrapolated, and a row is of first
order.
"""

import math
from typing import Any

import numpy as np

from diffjax.process import sqrt_snr_ratio
from diffjax.sampler import Plan, check_eta, fixed_small, level_pairs, make_plan
from diffjax.schedule import Level, Schedule, at, level_at, logsnr, t_of_logsnr

# Of Heun's method: all of EDM's own 18 steps are below it (arXiv:2206.00364, table 1).
LARGEST_CORRECTION = 1.4
# Limits of infinite distances are taken by hand.
_limits = np.errstate(divide="ignore", invalid="ignore")


@_limits
def dpm_solver_pp_2m(schedule: Schedule, t: Any, eta: float = 0.0) -> Plan:
    """DPM-Solver++ 2M (arXiv:2211.01095, Algorithm 2); with eta > 0 its SDE form.

    x0 is extrapolated in a straight line through the last two estimates, to the middle of the step.
    eta 1 is SDE-DPM-Solver++ 2M. t: strictly decreasing in 1..T; eta: in [0, 1], as in DDIM.

    Raises: ValueError for other levels, or another eta.
    """
    check_eta(eta)
    level_t, level_s = level_pairs(schedule, t)
    k = np.sqrt(1 - eta**2 + (eta * sqrt_snr_ratio(level_t, level_s)) ** 2)
    a = k * level_s.sigma / level_t.sigma
    h, h_1, _ = _distances(level_t, level_s)
    q = _finite(h / (2 * h_1), h)
    c = np.stack([-(level_s.alpha - a * level_t.alpha) * q, 0 * q], axis=1)
    return _plan(level_t, level_s, a, c, eta * fixed_small(level_t, level_s))


@_limits
def exponential_ab3(schedule: Schedule, t: Any) -> Plan:
    """Exponential Adams-Bashforth of order 3.

    The integral above over the parabola through the last three estimates, exactly. The first two
    rows have less history, and are of order 1 and 2: from exact history it converges at order 3,
    and a whole plan, with its own first rows, at order 2. t: strictly decreasing in 1..T.
    """
    level_t, level_s = level_pairs(schedule, t)
    h, h_1, _ = _distances(level_t, level_s)
    return _third(level_t, level_s, slope=_moments(h)[1] / h_1, curvature=1.0)


@_limits
def dpm_solver_pp_3m(schedule: Schedule, t: Any) -> Plan:
    """DPM-Solver++ 3M as its authors' code has it (arXiv:2211.01095).

    It is the parabola of `exponential_ab3` with half its second difference, which leaves order 2.
    t: strictly decreasing in 1..T.
    """
    level_t, level_s = level_pairs(schedule, t)
    h, h_1, _ = _distances(level_t, level_s)
    return _third(level_t, level_s, slope=-np.expm1(-h) * h / (2 * h_1), curvature=0.5)


@_limits
def unipc_2(schedule: Schedule, t: Any) -> Plan:
    """UniPC of order 2 with B_2(h) = exp(h) - 1, predicting x0 (arXiv:2302.04867).

    Each call of the denoiser also corrects the x that it was called with. Predictor and corrector
    share the coefficient of x, so that both fit in one row. t: strictly decreasing in 1..T.
    """
    level_t, level_s = level_pairs(schedule, t)
    h, h_1, h_2 = _distances(level_t, level_s)
    a = level_s.sigma / level_t.sigma
    # Predictor: 2M.
    q = _finite(h / (2 * h_1), h)
    # Corrector of the step that arrived here, over h_1: x += on_0*(x0 - x0_1) + on_1*(x0_1 -
    # x0_2). Its weights rho make the parabola through the three estimates exact; the first step
    # has only two, and takes the mean of them.
    m_0, m_1, m_2 = _moments(h_1)
    total, last = m_1 / (h_1 * m_0), m_2 / (h_1**2 * m_0)
    rho_1 = _finite((total - last) * h_1 / (h_1 + h_2), h_1 + h_2)
    rho_0 = np.where(np.isfinite(h_2), total - rho_1, 0.5)
    on_0 = _finite(level_t.alpha * m_0 * rho_0, h_1)
    on_1 = _finite(level_t.alpha * m_0 * (rho_1 - 0.5) * h_1 / h_2, h_1 + h_2)
    c = np.stack([a * (on_1 - on_0) - (level_s.alpha - a * level_t.alpha) * q, -a * on_1], axis=1)
    return _plan(level_t, level_s, a, c)


def heun(schedule: Schedule, t: Any) -> Plan:
    """Heun's method in sigma/alpha: EDM, Algorithm 1 (arXiv:2206.00364).

    N levels take 2N - 1 rows: a DDIM row from each to the next and a correction called there, but
    none onto data. t: strictly decreasing in 1..T.

    With r the `sqrt_snr_ratio` of a step, the correction adds the change of the estimate of x0
    times alpha_s*(1 - r)/(2*r), and at most alpha_s*LARGEST_CORRECTION. The bound is reached by
    steps that shrink sigma/alpha by 3.8x or more, as few levels do. In the paper's algorithm the
    weight has no bound: Gaussian data come out up to 1/(5*r) times too wide.
    """
    return _heun(*level_pairs(schedule, t))


def edm(
    schedule: Schedule,
    t: Any,
    s_churn: float = 40.0,
    s_tmin: float = 0.05,
    s_tmax: float = 50.0,
    s_noise: float = 1.003,
) -> Plan:
    """EDM's stochastic sampler, Algorithm 2 (arXiv:2206.00364): Heun with churn.

    Each level with s_tmin <= sigma/alpha <= s_tmax is first noised up by the factor 1 +
    min(s_churn/N, sqrt(2) - 1), with noise of standard deviation s_noise. The defaults are those
    of ImageNet-64; s_churn 0 is Heun. t: strictly decreasing in 1..T.

    Levels above T do not exist: churn stops there, and the first one goes into x_T.

    Raises: ValueError for a negative s_churn, an s_noise that is not above 0, other levels, or a
    schedule without signal at level T.
    """
    if not s_churn >= 0:
        raise ValueError(f"s_churn is {s_churn}: use 0 or more")
    if not s_noise > 0:
        raise ValueError(f"s_noise is {s_noise}: use a number above 0")
    level_t, level_s = level_pairs(schedule, t)
    ratio = np.exp(-logsnr(level_t) / 2)  # sigma/alpha
    churned = (s_tmin <= ratio) & (ratio <= s_tmax)
    gamma = np.where(churned, min(s_churn / len(ratio), np.sqrt(2) - 1), 0.0)
    t_hat = t_of_logsnr(schedule, logsnr(level_t) - 2 * np.log1p(gamma))
    hat = at(schedule, np.where(gamma > 0, t_hat, level_t.t))
    plan = _heun(hat, level_s)
    # The last row before each churned level takes x up to it. b and c go with a, since all of x is
    # scaled.
    up = level_at(_with_data(hat), slice(1, None))
    scale = up.alpha / level_s.alpha
    added = s_noise * np.sqrt(np.maximum(0, up.sigma**2 - (scale * level_s.sigma) ** 2))
    ends = np.cumsum(1 + (level_s.sigma > 0)) - 1
    factor, d = np.ones(plan.steps), np.zeros(plan.steps)
    factor[ends], d[ends] = scale, added
    return make_plan(plan.level, factor * plan.a, factor * plan.b, factor[:, None] * plan.c, d)


def consistency(schedule: Schedule, t: Any) -> Plan:
    """Multistep consistency sampling, Algorithm 1 of arXiv:2303.01469.

    Each row noises the estimate of x0 afresh to the next level: for networks distilled to output
    the end of the flow. Data are level 0 here, without noise; the paper's data have sigma 0.002,
    which it subtracts from the noise that it adds. t: strictly decreasing in 1..T.
    """
    level_t, level_s = level_pairs(schedule, t)
    return make_plan(level_t, 0 * level_s.alpha, level_s.alpha, d=level_s.sigma)


def repaint(plan: Plan, resamples: int, jump_length: int = 1) -> Plan:
    """RePaint's resampling (arXiv:2201.09865, section 4.2), for inpainting.

    Every block of `jump_length` rows is run `resamples` times, with noise added in between to get
    back up to where it began, so that the generated part adapts to the known one.

    The last row of a block that is repeated lands on s and is churned up to the block's first
    level t: all of it times alpha_t/alpha_s, and noise of variance sigma_t**2 -
    (alpha_t/alpha_s*sigma_s)**2.

    Raises: ValueError for resamples or jump_length below 1, and for a plan with history, which has
    none after a jump, or one that goes upwards.
    """
    if not resamples >= 1:
        raise ValueError(f"resamples is {resamples}: use 1 or more")
    if not jump_length >= 1:
        raise ValueError(f"jump_length is {jump_length}: use 1 or more")
    if np.any(plan.c) or np.any(np.diff(plan.level.t) >= 0):
        raise ValueError(
            "plan has history, several rows a level, or rising levels: use one of ddim or ddpm"
        )
    rows: list[int] = []
    # The level where each row ends: the next one, or that of its block's first row.
    ups: list[int] = []
    for first in range(0, plan.steps, jump_length):
        block = range(first, min(first + jump_length, plan.steps))
        for left in range(resamples, 0, -1):
            rows += block
            ups += [row + 1 for row in block[:-1]] + [first if left > 1 else block[-1] + 1]
    level = _with_data(plan.level)
    level_t, s, up = (level_at(level, i) for i in (rows, np.add(rows, 1), ups))
    scale = up.alpha / s.alpha
    d = 0.0 if plan.d is None else scale * plan.d[rows]
    d = np.sqrt(d**2 + np.maximum(0, up.sigma**2 - (scale * s.sigma) ** 2))
    return make_plan(level_t, scale * plan.a[rows], scale * plan.b[rows], d=d)


# ----------------------------------------------------------------------------- rows


def _plan(
    level_t: Level, level_s: Level, a: np.ndarray, c: np.ndarray, d: np.ndarray | None = None
) -> Plan:
    return make_plan(level_t, a, level_s.alpha - a * level_t.alpha - c.sum(1), c, d)


def _with_data(level: Level) -> Level:
    """A table of levels, and data after it."""
    return Level(*(np.append(leaf, end) for leaf, end in zip(level, (0, 1.0, 0.0), strict=True)))


def _distances(level_t: Level, level_s: Level) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """h of every row, of the row before, and of the one before that.

    Infinite where there is no such row.
    """
    h = (logsnr(level_s) - logsnr(level_t)) / 2
    return h, np.append(np.inf, h)[:-1], np.append([np.inf, np.inf], h)[: len(h)]


def _finite(values: np.ndarray, *distances: np.ndarray) -> np.ndarray:
    """The values, and 0 where one of the distances that they rest on is infinite."""
    return np.where(np.all(np.isfinite(distances), axis=0), values, 0.0)


@_limits
def _moments(h: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integrals over l from 0 to h of exp(l - h) * l**n, n = 0, 1, 2.

    They are h**n - n*(the one before), and for small h, where that cancels, the series
    h**(n+1) * sum over k of (-h)**k * n!/(n+k+1)!
    """
    small, m_0 = np.where(h < 0.5, h, 0.0), -np.expm1(-h)
    series = [
        small ** (n + 1)
        * sum((-small) ** k * math.factorial(n) / math.factorial(n + k + 1) for k in range(14))
        for n in (1, 2)
    ]
    m_1 = np.where(h < 0.5, series[0], h - m_0)
    return m_0, m_1, np.where(h < 0.5, series[1], h**2 - 2 * m_1)


@_limits
def _third(level_t: Level, level_s: Level, slope: np.ndarray, curvature: float) -> Plan:
    """The plan that extrapolates x0 by a line, then by a parabola.

    With two estimates x0 + slope*(x0 - x0_1); from three on the parabola in Newton's form, its
    square term times `curvature`.
    """
    h, h_1, h_2 = _distances(level_t, level_s)
    _, m_1, m_2 = _moments(h)
    two, three = np.isfinite(h) & np.isfinite(h_1), np.isfinite(h + h_1 + h_2)
    second = np.where(three, (m_1 * h_1 + curvature * m_2) / (h_1 + h_2), 0.0)
    on_0 = np.where(three, (m_1 + second) / h_1, np.where(two, slope, 0.0))  # of x0 - x0_1
    on_1 = -second / h_2  # of x0_1 - x0_2
    c = level_s.alpha[:, None] * np.stack([on_1 - on_0, -on_1], axis=1)
    return _plan(level_t, level_s, level_s.sigma / level_t.sigma, c)


@_limits
def _heun(level_t: Level, level_s: Level) -> Plan:
    r = sqrt_snr_ratio(level_t, level_s)
    g = level_s.alpha * np.minimum((1 - r) / (2 * r), LARGEST_CORRECTION)
    ddim = level_s.sigma / level_t.sigma
    # The rows of each level, [N, 2].
    keep = np.stack([np.ones(len(r), bool), level_s.sigma > 0], axis=1)

    def rows(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return np.stack([first, second], axis=1)[keep]

    level = Level(*(rows(leaf_t, leaf_s) for leaf_t, leaf_s in zip(level_t, level_s, strict=True)))
    zero = np.zeros_like(g)
    c = np.stack([rows(zero, -g), rows(zero, zero)], axis=1)
    return make_plan(level, rows(ddim, zero + 1), rows(level_s.alpha - ddim * level_t.alpha, g), c)
