"""Parameterizations: the only place where a network meets the schedule.

A parameterization fixes what a network predicts, and what it is given of a noise level:

    network output = network(params, input_scale(level)*x_t, network_time(level), condition)
    x0             = prediction.to_x0(x_t, network output, level)

A trained network is used with the parameterization that it was trained with; samplers, guidance and
distillation only see the estimate of x0 that follows from it.

The presets `flow`, `sit` and `edm` are functions of sigma/alpha alone: a network of theirs serves
every rescaled form of its path (`schedule.variance_preserving`), with the same images.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffjax import process
from diffjax.process import Prediction, append_dims, check_prediction, prediction_of
from diffjax.schedule import Level, level_at


class Parameterization(NamedTuple):
    """The relation between a network's inputs and outputs and a noise level."""

    prediction: Prediction  # what the output of the network is
    network_time: Callable[[Level], Any]  # level -> the time that the network is given
    input_scale: Callable[[Level], Any]  # level -> the factor of x_t in its input

    def inputs(self, x_t: Array, level: Level) -> tuple[Array, Array]:
        """The network's inputs (input_scale*x_t [B, ...], network_time [B]) at a level.

        x_t: [B, ...]; leaves of the level: scalars or [B].
        """
        time = jnp.broadcast_to(jnp.asarray(self.network_time(level)), x_t.shape[:1])
        return append_dims(self.input_scale(level), x_t) * x_t, time

    def check(self, levels: Level) -> None:
        """Check that a network can be called at all noisy levels.

        levels: those of a schedule or a plan, on the host.

        Raises: ValueError for a level where the prediction does not determine x0, as
        `process.check_prediction`, or where the network's time or input scale is not finite.
        """
        check_prediction(self.prediction, levels)
        noisy = level_at(levels, levels.sigma > 0)
        with jax.ensure_compile_time_eval(), np.errstate(divide="ignore"):
            values = {
                "network_time": np.asarray(self.network_time(noisy)),
                "input_scale": np.asarray(self.input_scale(noisy)),
            }
        for name, value in values.items():
            wrong = ~np.isfinite(np.broadcast_to(value, np.shape(noisy.t)))
            if wrong.any():
                raise ValueError(
                    f"{name} of the parameterization is not finite at level {noisy.t[wrong][0]},"
                    f" where alpha is {noisy.alpha[wrong][0]:g}: use a schedule with signal at"
                    " every level"
                )


def ddpm(prediction: Prediction | str) -> Parameterization:
    """DDPM's parameterization (arXiv:2006.11239): x_t as it is, and time t - 1.

    DDPM's code counts noisy levels from 0 to T - 1, so level t is time t - 1 to the network.
    prediction: one of process.PREDICTIONS, or its name, as in "eps".

    Raises: ValueError for a name that does not exist.
    """
    return Parameterization(prediction_of(prediction), lambda level: level.t - 1, lambda level: 1.0)


def variance_preserving(prediction: Prediction | str) -> Parameterization:
    """DDPM's parameterization for any scale of x_t.

    input_scale = 1/sqrt(alpha**2 + sigma**2): a network trained on a variance-preserving schedule
    so serves every rescaled form of the same path, such as EDM's, where alpha is 1
    (arXiv:2206.00364). For predictions whose target does not depend on that scale: eps and x0.
    """

    def scale(level: Level) -> Any:
        return (level.alpha**2 + level.sigma**2) ** -0.5

    return Parameterization(prediction_of(prediction), lambda level: level.t - 1, scale)


def flow(time_scale: float = 1000.0) -> Parameterization:
    """Flow matching's parameterization (arXiv:2210.02747, arXiv:2209.03003).

    The network predicts eps - x0, from x_t as it is where alpha + sigma = 1:

        network_time = time_scale*sigma/(alpha + sigma)        input_scale = 1/(alpha + sigma)

    time_scale: 1000 as in arXiv:2403.03206, or 1.

    Raises: ValueError unless time_scale > 0.
    """
    if not 0 < time_scale < np.inf:
        raise ValueError(f"time_scale is {time_scale}: use a number above 0")

    def time(level: Level) -> Any:
        return time_scale * level.sigma / (level.alpha + level.sigma)

    return Parameterization(prediction_of("flow"), time, _straight_scale)


def sit() -> Parameterization:
    """SiT's parameterization (arXiv:2401.08740): the other direction of `flow`.

    The network predicts x0 - eps, and its time goes from 0, noise, to 1, data:

        network_time = alpha/(alpha + sigma)        input_scale = 1/(alpha + sigma)
    """

    def time(level: Level) -> Any:
        return level.alpha / (level.alpha + level.sigma)

    return Parameterization(prediction_of("sit"), time, _straight_scale)


def _straight_scale(level: Level) -> Any:
    return 1 / (level.alpha + level.sigma)


def edm(sigma_data: float = 0.5) -> Parameterization:
    """EDM's preconditioning (arXiv:2206.00364, table 1), for any alpha.

    The network predicts `process.edm(sigma_data)`, which holds c_skip and c_out, from an input of
    unit variance for data of this standard deviation:

        network_time = log(sigma/alpha)/4
        input_scale = 1/sqrt(sigma**2 + (alpha*sigma_data)**2)

    It needs signal at every level, which `Parameterization.check` checks.

    Raises: ValueError unless sigma_data > 0.
    """
    return Parameterization(
        process.edm(sigma_data),
        lambda level: jnp.log(level.sigma / level.alpha) / 4,
        lambda level: 1 / process.edm_scale(level, sigma_data),
    )
