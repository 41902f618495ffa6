"""Log probability of data under a denoiser, exactly and by a variational bound.

Exactly by the probability-flow ODE (arXiv:2011.13456, section 4.3); as a bound by the chain of DDPM
(arXiv:2006.11239, section 3.3). Both in nats per image, which `bits_per_dim` converts.

Both measure images as the process has them: the flow gives the density of what it makes of noise,
followed down to level 1 and divided by alpha there; the chain decodes what it arrives at on level
1 by a Gaussian.
"""

from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffjax import sde
from diffjax.denoiser import Condition, ConditionalDenoiser
from diffjax.process import q_sample, sqrt_snr_ratio
from diffjax.sampler import Std, fixed_small, level_pairs, noise
from diffjax.schedule import Schedule, check_variance_preserving, level_at

BIN = 1 / 127.5  # distance of neighbours among the 256 values of images in [-1, 1]


class Likelihood(NamedTuple):
    """Log densities of a batch of images."""

    nats: Array  # [B], log density
    # [B], steps of the solver, rejected ones too. Each takes 6 evaluations, and the start one more.
    steps: Array
    solved: Array  # [B], true if the solver arrived within the steps that it may take


def log_density(
    denoise: ConditionalDenoiser,
    schedule: Schedule,
    x0: Array,
    condition: Condition,
    keys: Array,
    probes: int | None,
    tolerance: float = 1e-4,
) -> Likelihood:
    """The log density of images under the probability flow, by an adaptive solver.

    log p(x0) = log N(x_T; 0, 1) + integral of div(dx/du) du along the flow from level 1, where x
    is alpha*x0, up to the last level with signal; plus log alpha per dimension. To be jitted by
    the caller.

    x0: [B, ...]; condition: a pytree of arrays [B, ...], or None; keys: [B]. probes: random signs
    per image whose mean estimates the divergence (Hutchinson), the same all along the flow; None
    for the exact divergence, at as many derivatives as an image has numbers. tolerance: relative
    and absolute, of Tsitouras' 5(4) with adaptive steps, for each image alone. Errors add up
    along the flow, so the log density misses its limit by more than that, and differs as much
    between batches that round differently. Denoisers must not clip, which loses volume.

    Raises: ImportError without diffrax; ValueError for a schedule that is not variance-preserving.
    """
    diffrax = _diffrax()
    last = -1 if schedule.alpha[-1] else -2
    u_1, u_T = sde.noise_time(level_at(schedule, [1, last]))
    level_of, alpha_1 = sde.level_of_noise_time(schedule), schedule.alpha[1]

    def one(x0: Array, condition: Condition, key: Array) -> Likelihood:
        n = x0.size
        if probes is None:
            tangents = jnp.eye(n, dtype=x0.dtype).reshape(n, *x0.shape)
        else:
            # The mean over probes of e*(J e), as a sum.
            tangents = jax.random.rademacher(key, (probes, *x0.shape), x0.dtype) / probes**0.5
        batch_of_one = jax.tree.map(lambda leaf: leaf[None], condition)

        def field(u: Array, state: tuple[Array, Array], _: None) -> tuple[Array, Array]:
            level = level_of(u)

            def velocity(x: Array) -> Array:
                return sde.probability_flow(x, denoise(x[None], level, batch_of_one)[0], level)

            # e*(J e) = (e J)*e, and backwards, since XLA has fast convolutions of that way inside
            # loops on CPUs too.
            speed, back = jax.vjp(velocity, state[0])
            return speed, jnp.sum(jax.vmap(lambda e: jnp.sum(e * back(e)[0]))(tangents))

        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Tsit5(),
            t0=u_1,
            t1=u_T,
            dt0=0.01,
            y0=(alpha_1 * x0, jnp.zeros((), x0.dtype)),
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
            throw=False,  # or the host is called back from inside the program
        )
        x_T, volume = solution.ys[0][-1], solution.ys[1][-1]
        nats = -0.5 * jnp.sum(x_T**2) - 0.5 * n * np.log(2 * np.pi) + volume + n * np.log(alpha_1)
        solved = solution.result == diffrax.RESULTS.successful
        return Likelihood(nats, solution.stats["num_steps"], solved)

    return jax.vmap(one)(x0, condition, keys)


def variational_bound(
    denoise: ConditionalDenoiser,
    schedule: Schedule,
    t: Any,
    x0: Array,
    condition: Condition,
    keys: Array,
    std: Std = fixed_small,
    evaluations: int | None = None,
    bin_width: float | None = BIN,
) -> Array:
    """A lower bound [B] of log p(x0) for the DDPM over the levels t.

    It is minus equation 5 of arXiv:2006.11239:

        KL(q(x_T|x0) | noise) - log p(x0|x_1)
            + sum over steps t to s of KL(q(x_s|x_t, x0) | p(x_s|x_t))

    The noise of a step is `std`: fixed_small is the right one for data without spread, and
    fixed_large for standard normal data, where the bound is log p itself. The last step is a
    Gaussian of the standard deviation sigma of its level (DDPM's, beta_1 being its square) about
    the estimate, integrated over bins of `bin_width`, the outermost ones to infinity, or taken as
    a density if that is None. To be jitted by the caller.

    x0: [B, ...] in [-1, 1]; condition: a pytree of arrays [B, ...], or None; keys: [B]; t:
    strictly decreasing in 1..T. evaluations: of the denoiser besides the last step's, one per
    step if None; fewer are drawn from as many equal parts of the steps, for each image its own,
    and estimate the sum without bias.

    Raises: ValueError for a schedule that is not variance-preserving, other levels, or evaluations
    outside 1..len(t)-1.
    """
    check_variance_preserving(schedule, "the variational bound")
    level_t, level_s = level_pairs(schedule, t)
    N = len(level_t.t) - 1  # steps that do not decode
    M = N if evaluations is None else evaluations
    if not min(1, N) <= M <= N:
        raise ValueError(
            f"evaluations is {evaluations}: use 1 to {N}, the steps before the last one"
        )
    # KL of two Gaussians: constant + weight*|x0 - estimate|**2.
    inner_t, inner_s = (level_at(level, slice(None, -1)) for level in (level_t, level_s))
    r2 = sqrt_snr_ratio(inner_t, inner_s) ** 2
    noise_q, noise_p = fixed_small(inner_t, inner_s), std(inner_t, inner_s)
    weights = (inner_s.alpha * (1 - r2) / noise_p) ** 2 / 2
    constant = float(np.sum(np.log(noise_p / noise_q) + (noise_q / noise_p) ** 2 / 2 - 0.5))
    weights = jnp.asarray(np.append(weights, 0.0), x0.dtype)
    table = jax.tree.map(lambda leaf: jnp.asarray(leaf, x0.dtype), level_t)
    axes, size = tuple(range(1, x0.ndim)), x0[0].size

    def squared_error(rows: Array, number: Any) -> tuple[Array, Array]:
        level = level_at(table, rows)
        x_t = q_sample(x0, noise(keys, x0.shape[1:], number, x0.dtype), level)
        estimate = denoise(x_t, level, condition)
        return estimate, weights[rows] * jnp.sum((x0 - estimate) ** 2, axes)

    share = N / max(M, 1)
    # Where every step is evaluated, none may be taken for its neighbour by rounding.
    draw = jax.random.uniform if M < N else lambda key, dtype: jnp.zeros((), dtype)
    offsets = jax.vmap(lambda key: draw(jax.random.fold_in(key, 0), dtype=x0.dtype))(keys)

    def add(total: Array, j: Array) -> tuple[Array, None]:
        rows = jnp.minimum(((j + offsets) * share).astype(jnp.int32), N - 1)
        return total + share * squared_error(rows, j + 1)[1], None

    steps, _ = jax.lax.scan(add, jnp.zeros(len(x0), x0.dtype), jnp.arange(M))
    # The last step is the largest, and not left to chance.
    estimate, _ = squared_error(jnp.full(len(x0), N), M + 1)
    decoded = jnp.sum(_log_gaussian(x0, estimate, float(level_t.sigma[-1]), bin_width), axes)
    alpha_T, sigma_T = level_t.alpha[0], level_t.sigma[0]
    prior = jnp.sum(alpha_T**2 * x0**2 + sigma_T**2 - 1 - 2 * np.log(sigma_T), axes) / 2
    return decoded - steps - size * constant - prior


def _log_gaussian(x: Array, mean: Array, std: float, bin_width: float | None) -> Array:
    if bin_width is None:
        return -0.5 * ((x - mean) / std) ** 2 - 0.5 * np.log(2 * np.pi * std**2)
    half = bin_width / 2
    low = jnp.where(x < -1 + half, -jnp.inf, (x - half - mean) / std)
    high = jnp.where(x > 1 - half, jnp.inf, (x + half - mean) / std)
    # log(Phi(high) - Phi(low)), on the side where both are small.
    flip = low + high > 0
    low, high = jnp.where(flip, -high, low), jnp.where(flip, -low, high)
    below, above = jax.scipy.special.log_ndtr(low), jax.scipy.special.log_ndtr(high)
    return above + jnp.log1p(-jnp.exp(below - above))


def dequantise(images: Array, keys: Array) -> Array:
    """Images of 8 bits in [-1, 1], with uniform noise of one bin.

    The mean log density of these, plus log(BIN) per dimension, is at most the log probability of
    the images (arXiv:1511.01844, section 3.1).
    """

    def draw(key: Array) -> Array:
        return jax.random.uniform(key, images.shape[1:], minval=-BIN / 2, maxval=BIN / 2)

    return images + jax.vmap(draw)(keys)


def bits_per_dim(nats: Any, image_shape: tuple[int, ...], density: bool) -> np.ndarray:
    """-log2 of the probability of each number of an image.

    nats: [B], log probabilities, or, if `density`, log densities of dequantised images in [-1, 1].
    """
    log_bin = np.log(BIN) if density else 0.0
    per_dim = np.asarray(nats, np.float64) / np.prod(image_shape) + log_bin
    return -per_dim / np.log(2)


def _diffrax() -> ModuleType:
    try:
        import diffrax
    except ImportError as error:
        raise ImportError("likelihoods need diffrax: pip install diffjax[diffrax]") from error
    return diffrax
