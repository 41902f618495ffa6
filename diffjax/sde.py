"""The continuous view of a schedule: SDE, reverse SDE, probability-flow ODE.

After arXiv:2011.13456. Time is u = log(sigma/alpha) = -logsnr/2, which grows with the noise. In
it all variance-preserving schedules are the same equation, and a schedule only determines the u
of its levels t:

    dx = -sigma**2*x du + sqrt(2)*sigma dw
    alpha**2 = 1/(1 + exp(2u))        sigma**2 = 1/(1 + exp(-2u))

Denoisers estimate x0, so the ODE and the reverse SDE are functions of it, as the steps of
sampler.py are: DDIM is the exponential Euler step of the one, DDPM an Euler-Maruyama step of the
other in the limit of small steps.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.process import append_dims, eps_from_x0, score_from_eps
from diffjax.schedule import Level, Schedule, check_variance_preserving, logsnr


def noise_time(level: Level) -> np.ndarray:
    """u = log(sigma/alpha) of levels on the host.

    It is -inf on data, and +inf where there is no signal.
    """
    return -logsnr(level) / 2


def level_of_noise_time(schedule: Schedule) -> Callable[[Any], Level]:
    """The function u -> level of a variance-preserving schedule.

    u: of any shape, traced or not. t is interpolated linearly between levels, the inverse of
    `schedule.at`; beyond level 1 and level T it stays there, alpha and sigma do not.

    Raises: ValueError for a schedule that is not variance-preserving.
    """
    check_variance_preserving(schedule, "the continuous view")
    u_of_t, t_of_u = noise_time(schedule)[1:], schedule.t[1:]
    if np.isinf(u_of_t[-1]):
        u_of_t, t_of_u = u_of_t[:-1], t_of_u[:-1]

    def level(u: Any) -> Level:
        u = jnp.asarray(u, jnp.result_type(float, u))
        t = jnp.interp(u, jnp.asarray(u_of_t, u.dtype), jnp.asarray(t_of_u, u.dtype))
        return Level(t, jnp.sqrt(jax.nn.sigmoid(-2 * u)), jnp.sqrt(jax.nn.sigmoid(2 * u)))

    return level


def score(x_t: Any, x0: Any, level: Level) -> Any:
    """grad log q(x_t) = -eps/sigma = (alpha*x0 - x_t)/sigma**2, with x0 = E[x0 | x_t]."""
    return score_from_eps(eps_from_x0(x_t, x0, level), level)


def drift(x_t: Any, level: Level) -> Any:
    """f(x, u) = -sigma**2*x of the forward SDE.

    x_t: [B, ...]; level: scalar leaves or [B].
    """
    return -(append_dims(level.sigma, x_t) ** 2) * x_t


def diffusion(level: Level) -> Any:
    """g(u) = sqrt(2)*sigma of the forward SDE, and of the reverse SDE."""
    return 2**0.5 * level.sigma


def probability_flow(x_t: Any, x0: Any, level: Level) -> Any:
    """dx/du = f - g**2/2*score = alpha**2*x - alpha*x0.

    Equation 13 of arXiv:2011.13456. It is computed in the last form, since f and g**2/2*score
    nearly cancel where there is little noise.
    """
    alpha = append_dims(level.alpha, x_t)
    return alpha * (alpha * x_t - x0)


def reverse_drift(x_t: Any, x0: Any, level: Level) -> Any:
    """f - g**2*score = (1 + alpha**2)*x - 2*alpha*x0.

    Equation 6 of arXiv:2011.13456. With g it is the SDE that runs u downwards, from noise to data.
    """
    alpha = append_dims(level.alpha, x_t)
    return (1 + alpha**2) * x_t - 2 * alpha * x0
