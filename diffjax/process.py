"""The forward process q of DDPM (arXiv:2006.11239) and the quantities that describe one noisy sample.

    x_t = alpha*x0 + sigma*eps          v = alpha*eps - sigma*x0

Arrays are numpy or JAX, of any dtype: the same lines build float64 tables on the host and run under jit. Leaves of
a level are scalars or [B]; they meet samples [B, ...] by appending axes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from diffjax.schedule import Level


def append_dims(leaf: Any, x: Any) -> Any:
    """Append axes to a leaf [B] of a level until it broadcasts against x [B, ...]. Scalars stay as they are."""
    missing = np.ndim(x) - np.ndim(leaf)
    return leaf[(...,) + (None,) * missing] if np.ndim(leaf) and missing > 0 else leaf


def q_sample(x0: Any, eps: Any, level: Level) -> Any:
    """x_t = alpha*x0 + sigma*eps: DDPM, equation 4."""
    return append_dims(level.alpha, x0) * x0 + append_dims(level.sigma, x0) * eps


def eps_from_x0(x_t: Any, x0: Any, level: Level) -> Any:
    """eps = (x_t - alpha*x0) / sigma, for sigma > 0."""
    return (x_t - append_dims(level.alpha, x_t) * x0) / append_dims(level.sigma, x_t)


def x0_from_eps(x_t: Any, eps: Any, level: Level) -> Any:
    """x0 = (x_t - sigma*eps) / alpha, for alpha > 0: the "predicted x0" of DDIM, equation 9 (arXiv:2010.02502)."""
    return (x_t - append_dims(level.sigma, x_t) * eps) / append_dims(level.alpha, x_t)


def v_from(x0: Any, eps: Any, level: Level) -> Any:
    """v = alpha*eps - sigma*x0 (arXiv:2202.00512, appendix D)."""
    return append_dims(level.alpha, x0) * eps - append_dims(level.sigma, x0) * x0


def x0_from_v(x_t: Any, v: Any, level: Level) -> Any:
    """x0 = (alpha*x_t - sigma*v) / (alpha**2 + sigma**2): progressive distillation, section 4 (arXiv:2202.00512)."""
    alpha, sigma = append_dims(level.alpha, x_t), append_dims(level.sigma, x_t)
    return (alpha * x_t - sigma * v) / (alpha**2 + sigma**2)


def score_from_eps(eps: Any, level: Level) -> Any:
    """score = grad log q(x_t | x0) = -eps/sigma, for sigma > 0 (arXiv:2011.13456)."""
    return -eps / append_dims(level.sigma, eps)


def x0_from_score(x_t: Any, score: Any, level: Level) -> Any:
    """x0 = (x_t + sigma**2*score) / alpha, for alpha > 0: Tweedie's formula."""
    return (x_t + append_dims(level.sigma, x_t) ** 2 * score) / append_dims(level.alpha, x_t)


class Prediction(NamedTuple):
    """A way of saying what a noisy sample holds. x0 is the hub: every one gives x0, and is given by x0 and eps."""

    target: Callable[[Any, Any, Level], Any]  # (x0, eps, level) -> what a network should say
    to_x0: Callable[[Any, Any, Level], Any]  # (x_t, what it said, level) -> x0
    gain: Callable[[Level], Any]  # level -> (change of what it says / change of x0)**2 at a given x_t


PREDICTIONS: dict[str, Prediction] = {
    "eps": Prediction(lambda x0, eps, level: eps, x0_from_eps, lambda level: (level.alpha / level.sigma) ** 2),
    "x0": Prediction(lambda x0, eps, level: x0, lambda x_t, x0, level: x0, lambda level: 0 * level.alpha + 1),
    "v": Prediction(v_from, x0_from_v, lambda level: ((level.alpha**2 + level.sigma**2) / level.sigma) ** 2),
    "score": Prediction(
        lambda x0, eps, level: score_from_eps(eps, level),
        x0_from_score,
        lambda level: (level.alpha / level.sigma**2) ** 2,
    ),
}


def convert(x_t: Any, output: Any, level: Level, source: Prediction, target: Prediction) -> Any:
    """What `target` says where `source` says `output`, through x0. For sigma > 0, and alpha > 0 if the source is eps or
    score. x_t, output: [B, ...]; level: scalar leaves or [B].
    """
    x0 = source.to_x0(x_t, output, level)
    return target.target(x0, eps_from_x0(x_t, x0, level), level)


def check_prediction(prediction: Prediction, levels: Level) -> None:
    """ValueError where a prediction says nothing of x0 at one of the noisy levels, of a schedule or of a plan: eps or
    score without signal.
    """
    noisy = Level(*(leaf[levels.sigma > 0] for leaf in levels))
    silent = prediction.gain(noisy) == 0
    if silent.any():
        t = noisy.t[silent][0]
        raise ValueError(
            f"level {t} has no signal (alpha is 0), so this prediction (eps or score) says nothing of x0 there:"
            " predict v or x0"
        )


def sqrt_snr_ratio(level_t: Level, level_s: Level) -> Any:
    """r = alpha_t*sigma_s / (alpha_s*sigma_t), in [0, 1) for t noisier than s: the root of SNR_t/SNR_s."""
    return level_t.alpha * level_s.sigma / (level_s.alpha * level_t.sigma)


def q_posterior(x_t: Any, x0: Any, level_t: Level, level_s: Level) -> tuple[Any, Any]:
    """Mean and standard deviation of q(x_s | x_t, x0), for any t noisier than s: DDPM, equations 6 and 7.

    mean = r*sigma_s/sigma_t * x_t + alpha_s*(1 - r**2) * x0        std = sigma_s*sqrt(1 - r**2)
    """
    r = sqrt_snr_ratio(level_t, level_s)
    weight_t, weight_0 = r * level_s.sigma / level_t.sigma, level_s.alpha * (1 - r**2)
    mean = append_dims(weight_t, x_t) * x_t + append_dims(weight_0, x_t) * x0
    return mean, level_s.sigma * (1 - r**2) ** 0.5
