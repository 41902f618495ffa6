"""Parameterizations: the only place where a network meets the schedule.

A parameterization fixes what a network predicts, and what it is given of a noise level:

    network output = network(params, input_scale(level)*x_t, network_time(level), condition)
    x0             = prediction.to_x0(x_t, network output, level)

A trained network is used with the parameterization that it was trained with; samplers, guidance and
distillation only see the estimate of x0 that follows from it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from diffjax.process import Prediction, append_dims, prediction_of
from diffjax.schedule import Level


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
