"""The forward process q of DDPM (arXiv:2006.11239), and kinds of predictions.

    x_t = alpha*x0 + sigma*eps          v = alpha*eps - sigma*x0          flow = eps - x0

Arrays are numpy or JAX, of any dtype: the same lines build float64 tables on the host and run
under jit. Leaves of a level are scalars or [B]; axes are appended to them where they meet samples
[B, ...].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from diffjax.schedule import Level, level_at


def append_dims(leaf: Any, x: Any) -> Any:
    """Append axes to a leaf [B] of a level until it broadcasts against x [B, ...].

    Scalars stay as they are.
    """
    missing = np.ndim(x) - np.ndim(leaf)
    return leaf[(...,) + (None,) * missing] if np.ndim(leaf) and missing > 0 else leaf


def q_sample(x0: Any, eps: Any, level: Level) -> Any:
    """x_t = alpha*x0 + sigma*eps: DDPM, equation 4."""
    return append_dims(level.alpha, x0) * x0 + append_dims(level.sigma, x0) * eps


def eps_from_x0(x_t: Any, x0: Any, level: Level) -> Any:
    """eps = (x_t - alpha*x0) / sigma, for sigma > 0."""
    return (x_t - append_dims(level.alpha, x_t) * x0) / append_dims(level.sigma, x_t)


def x0_from_eps(x_t: Any, eps: Any, level: Level) -> Any:
    """x0 = (x_t - sigma*eps) / alpha, for alpha > 0.

    The "predicted x0" of DDIM, equation 9 (arXiv:2010.02502).
    """
    return (x_t - append_dims(level.sigma, x_t) * eps) / append_dims(level.alpha, x_t)


def v_from(x0: Any, eps: Any, level: Level) -> Any:
    """v = alpha*eps - sigma*x0 (arXiv:2202.00512, appendix D)."""
    return append_dims(level.alpha, x0) * eps - append_dims(level.sigma, x0) * x0


def x0_from_v(x_t: Any, v: Any, level: Level) -> Any:
    """x0 = (alpha*x_t - sigma*v) / (alpha**2 + sigma**2).

    Progressive distillation, section 4 (arXiv:2202.00512).
    """
    alpha, sigma = append_dims(level.alpha, x_t), append_dims(level.sigma, x_t)
    return (alpha * x_t - sigma * v) / (alpha**2 + sigma**2)


def x0_from_flow(x_t: Any, flow: Any, level: Level) -> Any:
    """x0 = (x_t - sigma*flow) / (alpha + sigma), with flow = eps - x0.

    Flow matching (arXiv:2210.02747): where alpha = 1 - sigma, it is the velocity dx/dsigma.
    """
    alpha, sigma = append_dims(level.alpha, x_t), append_dims(level.sigma, x_t)
    return (x_t - sigma * flow) / (alpha + sigma)


def score_from_eps(eps: Any, level: Level) -> Any:
    """score = grad log q(x_t | x0) = -eps/sigma, for sigma > 0 (arXiv:2011.13456)."""
    return -eps / append_dims(level.sigma, eps)


def x0_from_score(x_t: Any, score: Any, level: Level) -> Any:
    """x0 = (x_t + sigma**2*score) / alpha, for alpha > 0: Tweedie's formula."""
    return (x_t + append_dims(level.sigma, x_t) ** 2 * score) / append_dims(level.alpha, x_t)


class Prediction(NamedTuple):
    """The quantity that a network outputs, and its conversions to and from x0.

    x0 is the hub: every prediction determines it, and follows from it and eps.
    """

    target: Callable[[Any, Any, Level], Any]  # (x0, eps, level) -> the right output
    to_x0: Callable[[Any, Any, Level], Any]  # (x_t, output, level) -> x0
    # level -> (change of the output / change of x0)**2 at a given x_t
    output_sensitivity: Callable[[Level], Any]


def edm(sigma_data: float = 0.5) -> Prediction:
    """EDM's output F, of unit variance for data of this standard deviation.

    Table 1 of arXiv:2206.00364 for any alpha, with n = sqrt(sigma**2 + (alpha*sigma_data)**2):

        x0 = alpha*sigma_data**2/n**2 * x_t + sigma*sigma_data/n * F
        F  = (sigma/sigma_data*x0 - alpha*sigma_data*eps)/n

    With sigma_data 1 it is -v on a variance-preserving schedule.

    Raises: ValueError unless sigma_data > 0.
    """
    if not 0 < sigma_data < np.inf:
        raise ValueError(f"sigma_data is {sigma_data}: use a number above 0")

    def target(x0: Any, eps: Any, level: Level) -> Any:
        alpha, sigma = append_dims(level.alpha, x0), append_dims(level.sigma, x0)
        n = edm_scale(level, sigma_data)
        return (sigma / sigma_data * x0 - alpha * sigma_data * eps) / append_dims(n, x0)

    def to_x0(x_t: Any, output: Any, level: Level) -> Any:
        alpha, sigma = append_dims(level.alpha, x_t), append_dims(level.sigma, x_t)
        n = append_dims(edm_scale(level, sigma_data), x_t)
        return alpha * (sigma_data / n) ** 2 * x_t + sigma * sigma_data / n * output

    def output_sensitivity(level: Level) -> Any:
        return (edm_scale(level, sigma_data) / (level.sigma * sigma_data)) ** 2

    return Prediction(target, to_x0, output_sensitivity)


def edm_scale(level: Level, sigma_data: float) -> Any:
    """sqrt(sigma**2 + (alpha*sigma_data)**2), the standard deviation of x_t."""
    return (level.sigma**2 + (level.alpha * sigma_data) ** 2) ** 0.5


PREDICTIONS: dict[str, Prediction] = {
    "eps": Prediction(
        target=lambda x0, eps, level: eps,
        to_x0=x0_from_eps,
        output_sensitivity=lambda level: (level.alpha / level.sigma) ** 2,
    ),
    "x0": Prediction(
        target=lambda x0, eps, level: x0,
        to_x0=lambda x_t, x0, level: x0,
        output_sensitivity=lambda level: 0 * level.alpha + 1,
    ),
    "v": Prediction(
        target=v_from,
        to_x0=x0_from_v,
        output_sensitivity=lambda level: ((level.alpha**2 + level.sigma**2) / level.sigma) ** 2,
    ),
    "score": Prediction(
        target=lambda x0, eps, level: score_from_eps(eps, level),
        to_x0=x0_from_score,
        output_sensitivity=lambda level: (level.alpha / level.sigma**2) ** 2,
    ),
    "flow": Prediction(
        target=lambda x0, eps, level: eps - x0,
        to_x0=x0_from_flow,
        output_sensitivity=lambda level: ((level.alpha + level.sigma) / level.sigma) ** 2,
    ),
    # The opposite direction, from noise to data (arXiv:2401.08740).
    "sit": Prediction(
        target=lambda x0, eps, level: x0 - eps,
        to_x0=lambda x_t, output, level: x0_from_flow(x_t, -output, level),
        output_sensitivity=lambda level: ((level.alpha + level.sigma) / level.sigma) ** 2,
    ),
    "edm": edm(),
}


def prediction_of(prediction: Prediction | str) -> Prediction:
    """The prediction of a name of PREDICTIONS, or the one that is given.

    Raises: ValueError for a name that does not exist.
    """
    if isinstance(prediction, str):
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction is {prediction!r}: use one of {', '.join(PREDICTIONS)}")
        return PREDICTIONS[prediction]
    return prediction


def convert(
    x_t: Any,
    output: Any,
    level: Level,
    source: Prediction | str,
    target: Prediction | str,
) -> Any:
    """The output of a network of another prediction, through x0.

    source: the prediction of `output`; target: that of the result; either may be a name, as in
    "eps". For sigma > 0, and alpha > 0 if the source is eps or score. x_t, output: [B, ...]; level:
    scalar leaves or [B].
    """
    x0 = prediction_of(source).to_x0(x_t, output, level)
    return prediction_of(target).target(x0, eps_from_x0(x_t, x0, level), level)


def check_prediction(prediction: Prediction | str, levels: Level) -> None:
    """Check that a prediction determines x0 at all noisy levels.

    levels: those of a schedule or a plan.

    Raises: ValueError for eps or score with a level without signal.
    """
    noisy = level_at(levels, levels.sigma > 0)
    undetermined = prediction_of(prediction).output_sensitivity(noisy) == 0
    if undetermined.any():
        raise ValueError(
            "prediction does not determine x0 (it is eps or score) at level"
            f" {noisy.t[undetermined][0]}, where alpha is 0: predict v, x0 or flow"
        )


def sqrt_snr_ratio(level_t: Level, level_s: Level) -> Any:
    """r = alpha_t*sigma_s / (alpha_s*sigma_t), the square root of SNR_t/SNR_s.

    It is in [0, 1) for t noisier than s, and 0 if s is data.
    """
    return level_t.alpha * level_s.sigma / (level_s.alpha * level_t.sigma)


def q_posterior(x_t: Any, x0: Any, level_t: Level, level_s: Level) -> tuple[Any, Any]:
    """Mean and standard deviation of q(x_s | x_t, x0), for any t noisier than s.

    DDPM, equations 6 and 7, with r the `sqrt_snr_ratio`:

        mean = r*sigma_s/sigma_t * x_t + alpha_s*(1 - r**2) * x0        std = sigma_s*sqrt(1 - r**2)
    """
    r = sqrt_snr_ratio(level_t, level_s)
    weight_t, weight_0 = r * level_s.sigma / level_t.sigma, level_s.alpha * (1 - r**2)
    mean = append_dims(weight_t, x_t) * x_t + append_dims(weight_0, x_t) * x0
    return mean, level_s.sigma * (1 - r**2) ** 0.5
