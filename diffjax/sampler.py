"""DDPM (arXiv:2006.11239) and DDIM (arXiv:2010.02502), and the one compiled loop that runs both.

A sampler is a function of two neighbouring levels: `ddpm_step`, `ddim_step`. Both are linear in the noisy sample, the
estimate of x0 and the drawn noise, so a whole sampler is a table of their coefficients, a `Plan`, read off the step
function itself in float64. `advance` scans the rows of any plan; `sample` feeds it a plan in pieces, so that two
compiled programs serve every sampler at every number of steps.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffjax.denoiser import Denoiser, Network
from diffjax.process import eps_from_x0, expand, q_posterior, snr_ratio
from diffjax.schedule import Level, Schedule, at, check_levels

# ---------------------------------------------------------------------------------------------- the equations

Std = Callable[[Level, Level], Any]  # (level_t, level_s) -> standard deviation of the noise that a step adds


def fixed_small(level_t: Level, level_s: Level) -> Any:
    """sigma_s*sqrt(1 - r**2): the noise of the posterior q(x_s | x_t, x0), DDPM's beta-tilde, right at any stride."""
    return level_s.sigma * (1 - snr_ratio(level_t, level_s) ** 2) ** 0.5


def fixed_large(level_t: Level, level_s: Level) -> Any:
    """sigma_t*sqrt(1 - r**2), 0 onto data: DDPM's beta on its full chain, for variance-preserving schedules. Strided it
    is the sigma-hat of DDIM (arXiv:2010.02502, appendix D.3), and leaves noise in the images.
    """
    return level_t.sigma * (1 - snr_ratio(level_t, level_s) ** 2) ** 0.5 * (level_s.sigma > 0)


VARIANCES: dict[str, Std] = {f.__name__: f for f in (fixed_small, fixed_large)}


def ddpm_step(x_t: Any, x0: Any, level_t: Level, level_s: Level, z: Any, std: Std = fixed_small) -> Any:
    """One step of DDPM, Algorithm 2 in terms of x0: x_s = mean of q(x_s | x_t, x0) + std*z.

    x_t, x0, z: [B, ...], z standard normal; levels: scalar leaves or [B], t noisier than s. Onto data (s = 0) the
    result is x0.
    """
    mean, _ = q_posterior(x_t, x0, level_t, level_s)
    return mean + expand(std(level_t, level_s), x_t) * z


def ddim_step(x_t: Any, x0: Any, level_t: Level, level_s: Level, eta: Any = 0.0, z: Any = 0.0) -> Any:
    """One step of DDIM, equation 12: x_s = alpha_s*x0 + sqrt(sigma_s**2 - std**2)*eps + std*z,

    with eps = (x_t - alpha_t*x0)/sigma_t and std = eta * (the posterior's), equation 16. eta 0 is deterministic, eta 1
    is DDPM. x_t, x0, z: [B, ...], z standard normal; levels: scalar leaves or [B], t noisier than s.
    """
    eps = eps_from_x0(x_t, x0, level_t)
    std = eta * fixed_small(level_t, level_s)
    # sigma_s**2 - std**2 without the cancellation: it is never negative, however small r is.
    direction = level_s.sigma * (1 - eta**2 + (eta * snr_ratio(level_t, level_s)) ** 2) ** 0.5
    return expand(level_s.alpha, x0) * x0 + expand(direction, eps) * eps + expand(std, eps) * z


# ---------------------------------------------------------------------------------------------- samplers as tables


class Plan(NamedTuple):
    """A sampler as a table, numpy float64. Row i calls the denoiser at its level and lands on the level of row i+1,
    the last row on data:

        x <- a*x + b*x0 + c[0]*x0_1 + c[1]*x0_2 + d*z,    z ~ N(0, I) from fold_in(image key, number)

    where x0_1 and x0_2 are the estimates of the previous two rows.
    """

    level: Level  # [N]
    a: Any  # [N]
    b: Any  # [N]
    c: Any  # [N, 2]
    d: Any  # [N], or None: nothing is drawn
    number: Any  # [N] int, 1..N; the noise that the first row starts from has number 0

    @property
    def steps(self) -> int:
        """Calls of the denoiser. Network evaluations are counted apart, by `count_nfe`."""
        return len(self.a)


def ddpm(schedule: Schedule, t: Any, std: Std = fixed_small) -> Plan:
    """DDPM over the levels t, strictly decreasing in 1..T (else ValueError), and onto data. All of T..1 is the
    thousand-step chain; fewer are the respaced one.
    """
    return _read_off(lambda x_t, x0, level_t, level_s, z: ddpm_step(x_t, x0, level_t, level_s, z, std), schedule, t)


def ddim(schedule: Schedule, t: Any, eta: float = 0.0) -> Plan:
    """DDIM over the levels t, strictly decreasing in 1..T, and onto data; eta in [0, 1] as in equation 16 of the
    paper. ValueError for other levels or another eta.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}: DDIM takes 0 (deterministic) to 1 (the variance of DDPM)")
    return _read_off(lambda x_t, x0, level_t, level_s, z: ddim_step(x_t, x0, level_t, level_s, eta, z), schedule, t)


def _read_off(step: Callable[..., Any], schedule: Schedule, t: Any) -> Plan:
    # A step is linear in (x_t, x0, z): at the unit vectors it gives its own coefficients.
    t = check_levels(schedule, t)
    level_t, level_s = at(schedule, t), at(schedule, np.append(t[1:], 0))
    a, b, d = (np.broadcast_to(step(x_t, x0, level_t, level_s, z), t.shape) for x_t, x0, z in np.eye(3))
    number = np.arange(1, len(t) + 1, dtype=np.int32)
    return Plan(level_t, a, b, np.zeros((len(t), 2)), d if d.any() else None, number)


# ---------------------------------------------------------------------------------------------- running a plan

Carry = tuple[Array, Array, Array]  # x and the previous two estimates of x0, each [B, ...]


def image_keys(key: Array, index: Any) -> Array:
    """One key per image, [B], from the global indices of the images: image i is the same in any batch, on any number
    of devices.
    """
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(index, jnp.uint32))


def noise(keys: Array, shape: tuple[int, ...], number: Any = 0, dtype: Any = jnp.float32) -> Array:
    """Standard normal noise [B, *shape], image i's from fold_in(keys[i], number). Number 0 is x_T."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), shape, dtype))(keys)


def advance(denoise: Denoiser, rows: Plan, carry: Carry, keys: Array) -> Carry:
    """Run rows of a plan, one `lax.scan`. To be compiled by the caller together with the denoiser; rows are an
    argument, so another plan of the same number of rows does not compile again.

    carry: x, and the previous two estimates of x0 (zeros at first); keys: [B], one per image.
    """

    def body(carry: Carry, row: Plan) -> tuple[Carry, None]:
        x, x0_1, x0_2 = carry
        x0 = denoise(x, row.level)
        x_s = row.a * x + row.b * x0 + row.c[0] * x0_1 + row.c[1] * x0_2
        if row.d is not None:
            x_s += row.d * noise(keys, x.shape[1:], row.number, x.dtype)
        return (x_s, x0, x0_1), None

    return jax.lax.scan(body, carry, rows)[0]


CHUNK = 10  # rows per call: two programs, of ten rows and of one, run a plan of any length


def chunks(plan: Plan, dtype: Any, size: int = CHUNK) -> list[Plan]:
    """The plan in pieces of `size` rows, then of one row: float64 cast once to the dtype of x (t to float32 at least,
    since bfloat16 cannot count to a thousand).
    """
    cast = partial(np.asarray, dtype=dtype)
    t = np.asarray(plan.level.t, jnp.promote_types(dtype, jnp.float32))
    table = Plan(
        level=Level(t, cast(plan.level.alpha), cast(plan.level.sigma)),
        a=cast(plan.a),
        b=cast(plan.b),
        c=cast(plan.c),
        d=None if plan.d is None else cast(plan.d),
        number=plan.number,
    )

    def rows(start: int, stop: int) -> Plan:
        return jax.tree.map(lambda leaf: leaf[start:stop], table)

    tens = plan.steps // size * size
    cuts = [*range(0, tens, size), *range(tens, plan.steps + 1)]
    return [rows(start, stop) for start, stop in itertools.pairwise(cuts)]


def sample(
    run: Callable[[Plan, Carry, Array], Carry],
    plan: Plan,
    x: Array,
    keys: Array,
    each: Callable[[int, Carry], None] = lambda rows, carry: None,
) -> Array:
    """Run a plan from the noise x [B, ...] down to images, ten rows a call.

    run: `advance` with its denoiser, compiled: jax.jit(functools.partial(advance, denoise)). keys: [B]. each: called
    with (rows done now, carry) after every call, for progress bars and previews.
    """
    # Two arrays, not one twice: a compiled `run` may reuse the memory of each part of the carry.
    carry = x, jnp.zeros_like(x), jnp.zeros_like(x)
    for rows in chunks(plan, x.dtype):
        carry = run(rows, carry, keys)
        each(rows.steps, carry)
    return carry[0]


def count_nfe(build: Callable[[Network], Denoiser], network: Network, plan: Plan, x: Any) -> int:
    """Network evaluations per image of a plan, counted: the denoiser is traced with a network that counts the rows of
    its batch. x: [B, ...], or its ShapeDtypeStruct.
    """
    seen = []

    def counting(params: Any, x: Array, t: Array, condition: Any) -> Array:
        seen.append(x.shape[0])
        return network(params, x, t, condition)

    level = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((), jnp.float32), Level(0, 0, 0))
    jax.eval_shape(build(counting), x, level)
    return plan.steps * sum(seen) // x.shape[0]
