"""The forward process q of DDPM (arXiv:2006.11239) and the quantities that describe one noisy sample.

    x_t = alpha*x0 + sigma*eps          v = alpha*eps - sigma*x0

Arrays are numpy or JAX, of any dtype: the same lines build float64 tables on the host and run under jit. Leaves of
a level are scalars or [B]; they meet samples [B, ...] by appending axes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from diffjax.schedule import Level


def expand(leaf: Any, x: Any) -> Any:
    """Append axes to a leaf [B] of a level until it broadcasts against x [B, ...]. Scalars stay as they are."""
    missing = np.ndim(x) - np.ndim(leaf)
    return leaf[(...,) + (None,) * missing] if np.ndim(leaf) and missing > 0 else leaf


def q_sample(x0: Any, eps: Any, level: Level) -> Any:
    """x_t = alpha*x0 + sigma*eps: DDPM, equation 4."""
    return expand(level.alpha, x0) * x0 + expand(level.sigma, x0) * eps


def eps_from_x0(x_t: Any, x0: Any, level: Level) -> Any:
    """eps = (x_t - alpha*x0) / sigma, for sigma > 0."""
    return (x_t - expand(level.alpha, x_t) * x0) / expand(level.sigma, x_t)


def x0_from_eps(x_t: Any, eps: Any, level: Level) -> Any:
    """x0 = (x_t - sigma*eps) / alpha, for alpha > 0: the "predicted x0" of DDIM, equation 9 (arXiv:2010.02502)."""
    return (x_t - expand(level.sigma, x_t) * eps) / expand(level.alpha, x_t)


def x0_from_v(x_t: Any, v: Any, level: Level) -> Any:
    """x0 = (alpha*x_t - sigma*v) / (alpha**2 + sigma**2): progressive distillation, section 4 (arXiv:2202.00512)."""
    alpha, sigma = expand(level.alpha, x_t), expand(level.sigma, x_t)
    return (alpha * x_t - sigma * v) / (alpha**2 + sigma**2)


def v_from(x0: Any, eps: Any, level: Level) -> Any:
    """v = alpha*eps - sigma*x0 (arXiv:2202.00512, appendix D)."""
    return expand(level.alpha, x0) * eps - expand(level.sigma, x0) * x0


class Prediction(NamedTuple):
    """What a network is trained to say about a noisy sample, and how x0 is read from it."""

    target: Callable[[Any, Any, Level], Any]  # (x0, eps, level) -> what the network should say
    to_x0: Callable[[Any, Any, Level], Any]  # (x_t, what it said, level) -> x0


PREDICTIONS: dict[str, Prediction] = {
    "eps": Prediction(lambda x0, eps, level: eps, x0_from_eps),
    "x0": Prediction(lambda x0, eps, level: x0, lambda x_t, x0, level: x0),
    "v": Prediction(v_from, x0_from_v),
}


def snr_ratio(level_t: Level, level_s: Level) -> Any:
    """r = alpha_t*sigma_s / (alpha_s*sigma_t), in [0, 1) for t noisier than s: the root of SNR_t/SNR_s."""
    return level_t.alpha * level_s.sigma / (level_s.alpha * level_t.sigma)


def q_posterior(x_t: Any, x0: Any, level_t: Level, level_s: Level) -> tuple[Any, Any]:
    """Mean and standard deviation of q(x_s | x_t, x0), for any t noisier than s: DDPM, equations 6 and 7.

    mean = r*sigma_s/sigma_t * x_t + alpha_s*(1 - r**2) * x0        std = sigma_s*sqrt(1 - r**2)
    """
    r = snr_ratio(level_t, level_s)
    weight_t, weight_0 = r * level_s.sigma / level_t.sigma, level_s.alpha * (1 - r**2)
    mean = expand(weight_t, x_t) * x_t + expand(weight_0, x_t) * x0
    return mean, level_s.sigma * (1 - r**2) ** 0.5
