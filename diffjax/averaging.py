"""Moving averages of parameters, with lengths that may be chosen afterwards.

An average after update n is average <- beta*average + (1 - beta)*params. An average by a power
function (EDM2, arXiv:2312.02696) takes beta = (1 - 1/n)**(gamma + 1), so that update k of n has
weight proportional to k**gamma: it forgets the start by itself, and its length grows with the
training. Its relative length is the standard deviation of that profile as a share of n. Stored
averages of two lengths combine to one of any other length.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

# Of the uniform average, gamma = 0, which is the longest.
LONGEST = 12**-0.5


def ema_decay(step: Any, limit: float) -> Array:
    """The decay of a moving average with warm-up, min(limit, (1 + step)/(10 + step)).

    Without it, an average with decay 0.9999 would still hold 37% of the random initial parameters
    after 10,000 steps. step: updates before this one.
    """
    step = jnp.asarray(step, jnp.float32)
    return jnp.minimum(limit, (1 + step) / (10 + step))


def power_decay(step: Any, length: float) -> Array:
    """The decay (1 - 1/n)**(gamma + 1), n = step + 1, for a relative length.

    Section 3.1 of arXiv:2312.02696. step: updates before this one; the first decay is 0.

    Raises: ValueError as `gamma_of_length`.
    """
    n = jnp.asarray(step, jnp.float32) + 1
    return jnp.exp((gamma_of_length(length) + 1) * jnp.log1p(-1 / n))


def gamma_of_length(length: float) -> float:
    """The exponent gamma of the profile of a relative length.

    The root of length**2 = (gamma + 1)/((gamma + 2)**2 * (gamma + 3)), the variance of the profile.

    Raises: ValueError unless length is above 0 and at most LONGEST.
    """
    if not 0 < length <= LONGEST:
        raise ValueError(f"length is {length}: use a number above 0, and at most {LONGEST:.4f}")
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class Profiles(NamedTuple):
    """The profiles of averages by power functions, numpy [N] each, or scalars for one."""

    updates: Any  # updates until then, 1 or more
    gamma: Any

    @staticmethod
    def of(updates: Any, lengths: Any) -> "Profiles":
        """The profiles of averages of relative lengths after numbers of updates.

        Raises: ValueError as `gamma_of_length`.
        """
        gamma = np.vectorize(gamma_of_length, otypes=[np.float64])(lengths)
        return Profiles(np.asarray(updates, np.float64), gamma)


class Combination(NamedTuple):
    """The linear combination of stored averages that is nearest to another one."""

    weights: np.ndarray  # float64 [N], one per stored average
    error: float  # distance of the profiles, relative to the norm of the one that is asked for


def combine(stored: Profiles, target: Profiles) -> Combination:
    """Combine stored averages to the profile that is nearest to the target.

    Least squares over profiles, section 3.2 of arXiv:2312.02696: weights = A^-1 b for the inner
    products A of the stored profiles, and b of these with the target. stored: [N], all different;
    target: one.

    Raises: ValueError for a target of more updates than any that is stored.
    """
    if target.updates > np.max(stored.updates):
        raise ValueError(
            f"updates is {target.updates:g}, and averages are stored up to"
            f" {np.max(stored.updates):g}: use fewer"
        )
    column = Profiles(*(leaf[:, None] for leaf in stored))
    products = inner_product(stored, target)
    weights = np.linalg.solve(inner_product(column, stored), products)
    missing = 1 - weights @ products / inner_product(target, target)
    return Combination(weights, float(np.sqrt(max(missing, 0.0))))


def inner_product(first: Profiles, second: Profiles) -> np.ndarray:
    """The integral of the product of two profiles, broadcast against each other.

    The profile of n updates is (gamma + 1)*t**gamma/n**(gamma + 1) for t in 0..n, so the integral
    over the shorter one is, for n <= m:

        (gamma_n + 1)*(gamma_m + 1)/((gamma_n + gamma_m + 1)*m) * (n/m)**gamma_m
    """
    is_shorter = first.updates <= second.updates
    n, m = np.minimum(first.updates, second.updates), np.maximum(first.updates, second.updates)
    gamma_m = np.where(is_shorter, second.gamma, first.gamma)
    factors = (first.gamma + 1) * (second.gamma + 1) / (first.gamma + second.gamma + 1)
    return factors / m * (n / m) ** gamma_m
