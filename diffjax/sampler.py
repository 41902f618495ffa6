"""DDPM (arXiv:2006.11239) and DDIM (arXiv:2010.02502), and the one compiled loop that runs every sampler.

A sampler is a function of two neighbouring levels: `ddpm_step`, `ddim_step`. Both are linear in the noisy sample, the
estimate of x0 and the drawn noise, so a whole sampler is a table of their coefficients, a `Plan`, read off the step
function itself in float64. `scan_plan` scans the rows of any plan; `sample` feeds it a plan in pieces, so that two
compiled programs serve every sampler at every number of steps. Samplers of higher order are tables of the same kind, in
solvers.py.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffjax.denoiser import Denoiser, Network
from diffjax.process import append_dims, eps_from_x0, q_posterior, q_sample, sqrt_snr_ratio
from diffjax.schedule import Level, Schedule, at, check_levels, check_variance_preserving, logsnr

# ---------------------------------------------------------------------------------------------- the equations

Std = Callable[[Level, Level], Any]  # (level_t, level_s) -> standard deviation of the noise that a step adds


def fixed_small(level_t: Level, level_s: Level) -> Any:
    """sigma_s*sqrt(1 - r**2): the noise of the posterior q(x_s | x_t, x0), DDPM's beta-tilde, right at any stride."""
    return level_s.sigma * (1 - sqrt_snr_ratio(level_t, level_s) ** 2) ** 0.5


def fixed_large(level_t: Level, level_s: Level) -> Any:
    """sigma_t*sqrt(1 - r**2), 0 onto data: DDPM's beta on its full chain, for variance-preserving schedules. Strided it
    is the sigma-hat of DDIM (arXiv:2010.02502, appendix D.3), and leaves noise in the images.
    """
    return level_t.sigma * (1 - sqrt_snr_ratio(level_t, level_s) ** 2) ** 0.5 * (level_s.sigma > 0)


def interpolated_variance(v: float) -> Std:
    """fixed_small**(1 - v) * fixed_large**v, v in [0, 1] (else ValueError): between the two in log variance, as in
    classifier-free guidance with v = 0.3 (arXiv:2207.12598, section 4).
    """
    if not 0 <= v <= 1:
        raise ValueError(f"v is {v}: variances are interpolated from 0 (fixed_small) to 1 (fixed_large)")
    return lambda level_t, level_s: fixed_small(level_t, level_s) ** (1 - v) * fixed_large(level_t, level_s) ** v


VARIANCES: dict[str, Std] = {f.__name__: f for f in (fixed_small, fixed_large)}


def ddpm_step(x_t: Any, x0: Any, level_t: Level, level_s: Level, z: Any, std: Std = fixed_small) -> Any:
    """One step of DDPM, Algorithm 2 in terms of x0: x_s = mean of q(x_s | x_t, x0) + std*z.

    x_t, x0, z: [B, ...], z standard normal; levels: scalar leaves or [B], t noisier than s. Onto data (s = 0) the
    result is x0.
    """
    mean, _ = q_posterior(x_t, x0, level_t, level_s)
    return mean + append_dims(std(level_t, level_s), x_t) * z


def ddim_step(x_t: Any, x0: Any, level_t: Level, level_s: Level, eta: Any = 0.0, z: Any = 0.0) -> Any:
    """One step of DDIM, equation 12: x_s = alpha_s*x0 + sqrt(sigma_s**2 - std**2)*eps + std*z,

    with eps = (x_t - alpha_t*x0)/sigma_t and std = eta * (the posterior's), equation 16. eta 0 is deterministic, eta 1
    is DDPM. x_t, x0, z: [B, ...], z standard normal; levels: scalar leaves or [B], t noisier than s.
    """
    eps = eps_from_x0(x_t, x0, level_t)
    std = eta * fixed_small(level_t, level_s)
    # sigma_s**2 - std**2 without the cancellation: it is never negative, however small r is.
    direction = level_s.sigma * (1 - eta**2 + (eta * sqrt_snr_ratio(level_t, level_s)) ** 2) ** 0.5
    return append_dims(level_s.alpha, x0) * x0 + append_dims(direction, eps) * eps + append_dims(std, eps) * z


# ---------------------------------------------------------------------------------------------- samplers as tables


class Plan(NamedTuple):
    """A sampler as a table, numpy float64. Row i calls the denoiser at its level and lands on the level of row i+1,
    the last row on data (of `encode`, on its noisiest level):

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

    @property
    def start_std(self) -> float:
        """Standard deviation of x_T, sqrt(alpha**2 + sigma**2) at the first level: 1 if the variance is preserved."""
        return float(np.hypot(self.level.alpha[0], self.level.sigma[0]))

    def __str__(self) -> str:
        """The table for reading; of a long one, its beginning and its end."""
        d = np.zeros(self.steps) if self.d is None else self.d
        columns = {
            "t": self.level.t, "alpha": self.level.alpha, "sigma": self.level.sigma, "logsnr": logsnr(self.level),
            "a": self.a, "b": self.b, "c1": self.c[:, 0], "c2": self.c[:, 1], "d": d,
        }  # fmt: skip
        lines = ["row " + "".join(f"{name:>11}" for name in columns)]
        for i in range(self.steps):
            lines.append(f"{i + 1:<4}" + "".join(f"{column[i]:>11.5g}" for column in columns.values()))
        if self.steps > 40:
            lines[21:-20] = ["..."]
        return "\n".join(lines)


def ddpm(schedule: Schedule, t: Any, std: Std = fixed_small) -> Plan:
    """DDPM over the levels t, strictly decreasing in 1..T (else ValueError), and onto data. All of T..1 is the
    thousand-step chain; fewer are the respaced one. Every std but fixed_small asks for a variance-preserving schedule
    (else ValueError).
    """
    if std is not fixed_small:
        check_variance_preserving(schedule, "a larger variance than fixed_small")
    return _plan_from_step(
        lambda x_t, x0, level_t, level_s, z: ddpm_step(x_t, x0, level_t, level_s, z, std), schedule, t
    )


def sigma_hat(schedule: Schedule, t: Any) -> Plan:
    """The "sigma-hat" of DDIM's table 1 (arXiv:2010.02502, appendix D.3): DDPM with fixed_large, over any levels."""
    return ddpm(schedule, t, fixed_large)


def ddim(schedule: Schedule, t: Any, eta: float = 0.0) -> Plan:
    """DDIM over the levels t, strictly decreasing in 1..T, and onto data; eta in [0, 1] as in equation 16 of the
    paper. ValueError for other levels or another eta.
    """
    check_eta(eta)
    return _plan_from_step(
        lambda x_t, x0, level_t, level_s, z: ddim_step(x_t, x0, level_t, level_s, eta, z), schedule, t
    )


def euler(schedule: Schedule, t: Any) -> Plan:
    """Euler's method for the probability flow in sigma/alpha (arXiv:2206.00364): DDIM with eta 0 under another name."""
    return ddim(schedule, t)


def encode(schedule: Schedule, t: Any) -> Plan:
    """DDIM backwards, from data to the noisiest of the levels t: what `ddim(schedule, t)` decodes (section 4.3 of the
    paper). t: strictly decreasing in 1..T (else ValueError). Run it without clipping, which cannot be inverted.

    The first row is called at the least noisy level with the data as they are, x = alpha*x + sigma*eps: no network
    knows level 0. Where level T has no signal, what is encoded there cannot be told apart, and not be decoded.
    """
    t = check_levels(schedule, t)[::-1]
    level_t, level_s = at(schedule, np.append(t[:1], t[:-1])), at(schedule, t)
    a, b, _ = _coefficients(lambda x_t, x0, t, s, z: q_sample(x0, eps_from_x0(x_t, x0, t), s), level_t, level_s)
    a[0], b[0] = 1 + level_s.alpha[0], -level_s.alpha[0]
    return make_plan(level_t, a, b)


def check_eta(eta: float) -> None:
    """ValueError for an eta outside [0, 1]."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}: use 0 (deterministic) to 1 (the variance of DDPM)")


def level_pairs(schedule: Schedule, t: Any) -> tuple[Level, Level]:
    """The levels t of a sampler, and those that it goes to from them: the next of t, at last data. ValueError unless t
    is strictly decreasing in 1..T.
    """
    t = check_levels(schedule, t)
    return at(schedule, t), at(schedule, np.append(t[1:], 0))


def make_plan(level: Level, a: Any, b: Any, c: Any = None, d: Any = None) -> Plan:
    """The plan with these columns, its rows numbered; history that is not named is not used, and a noise column of
    zeros is none. ValueError as from `check_plan`.
    """
    n = len(a)
    c = np.zeros((n, 2)) if c is None else c + 0.0  # no -0.0
    plan = Plan(level, a, b, c, d if d is not None and np.any(d) else None, np.arange(1, n + 1, dtype=np.int32))
    check_plan(plan)
    return plan


def _plan_from_step(step: Callable[..., Any], schedule: Schedule, t: Any) -> Plan:
    level_t, level_s = level_pairs(schedule, t)
    a, b, d = _coefficients(step, level_t, level_s)
    return make_plan(level_t, a, b, d=d)


def _coefficients(step: Callable[..., Any], level_t: Level, level_s: Level) -> np.ndarray:
    # A step is linear in (x_t, x0, z): at the unit vectors it gives its own coefficients.
    return np.stack([np.broadcast_to(step(x_t, x0, level_t, level_s, z), level_t.t.shape) for x_t, x0, z in np.eye(3)])


def check_plan(plan: Plan) -> None:
    """ValueError, naming the column, unless all columns of a plan have its number of rows, one at least, and are
    finite; no noise is negative, and no two rows have one number, which would draw the same noise twice (0 is that of
    x_T).
    """
    n = np.size(plan.a)
    if not n:
        raise ValueError("a plan has at least one row")
    columns = plan.level._asdict() | {"a": plan.a, "b": plan.b, "c": plan.c, "d": plan.d, "number": plan.number}
    for name, column in columns.items():
        shape = (n, 2) if name == "c" else (n,)
        if column is not None and np.shape(column) != shape:
            raise ValueError(
                f"column {name} of the plan has shape {np.shape(column)}: a plan of {n} rows needs {shape}"
            )
        if column is not None and not np.isfinite(column).all():
            i = int(np.argwhere(~np.isfinite(column))[0][0])
            raise ValueError(f"column {name} of the plan is {column[i]} in row {i + 1}: every coefficient is finite")
    if plan.d is not None and np.min(plan.d) < 0:
        raise ValueError(f"column d of the plan is {np.min(plan.d)} somewhere: a standard deviation is 0 or more")
    number = np.asarray(plan.number)
    if number.dtype.kind not in "iu" or number.min() < 1 or len(np.unique(number)) < n:
        raise ValueError("column number of the plan: rows are numbered by different integers from 1 on")


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


def init_noise(plan: Plan, keys: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """x_T [B, *shape], where a plan starts: noise of standard deviation `plan.start_std`, which is 1 for
    variance-preserving schedules, as in DDPM, and about sigma for variance-exploding ones.
    """
    return noise(keys, shape, 0, dtype) * jnp.asarray(plan.start_std, dtype)


def noise_to_level(plan: Plan, x0: Array, keys: Array) -> Array:
    """Images x0 [B, ...] noised to the first level of a plan, alpha*x0 + sigma*eps: with a plan over the lower part of
    some levels, t[t <= t_start], sampling keeps what of x0 that much noise leaves (SDEdit, arXiv:2108.01073).
    """
    return q_sample(x0, noise(keys, x0.shape[1:], 0, x0.dtype), Level(*(leaf[0] for leaf in plan.level)))


def scan_plan(denoise: Denoiser, rows: Plan, carry: Carry, keys: Array) -> Carry:
    """Run rows of a plan, one `lax.scan`. To be compiled by the caller together with the denoiser; rows are an
    argument, so another plan of the same number of rows does not compile again.

    carry: x, and the previous two estimates of x0 (zeros at first); keys: [B], one per image (else ValueError, when
    traced: fewer would give several images the same noise).
    """
    if rows.d is not None and keys.shape[0] != carry[0].shape[0]:
        raise ValueError(f"there are {keys.shape[0]} keys for {carry[0].shape[0]} images: give one per image")

    def body(carry: Carry, row: Plan) -> tuple[Carry, None]:
        x, x0_1, x0_2 = carry
        x0 = denoise(x, row.level)
        x_s = row.a * x + row.b * x0 + row.c[0] * x0_1 + row.c[1] * x0_2
        if row.d is not None:
            x_s += row.d * noise(keys, x.shape[1:], row.number, x.dtype)
        return (x_s, x0, x0_1), None

    return jax.lax.scan(body, carry, rows)[0]


CHUNK = 10  # rows per call: two programs, of ten rows and of one, run a plan of any length


def segments(plan: Plan, dtype: Any, every: int | None = None, size: int = CHUNK, which: Any = None) -> list[Plan]:
    """The plan in pieces of `size` rows or of one, cut at every multiple of `every`, or of `size`, and
    wherever `which` [N] changes: float64 cast once to
    the dtype of x. ValueError for a plan that is not finite.
    """
    check_plan(plan)
    every = size if every is None else every
    if every < 1:
        raise ValueError(f"every is {every}: cut a plan after one row or more")
    cast = partial(np.asarray, dtype=dtype)
    table = Plan(
        level=Level(*(cast(leaf) for leaf in plan.level)),
        a=cast(plan.a),
        b=cast(plan.b),
        c=cast(plan.c),
        d=None if plan.d is None else cast(plan.d),
        number=plan.number,
    )

    def rows(start: int, stop: int) -> Plan:
        return jax.tree.map(lambda leaf: leaf[start:stop], table)

    cuts = [0]
    while cuts[-1] < plan.steps:
        here = cuts[-1]
        room = min(every - here % every, plan.steps - here)
        if which is not None:
            room = int(np.argmin(np.append(np.asarray(which)[here : here + room] == which[here], False)))
        cuts.append(here + (size if room >= size else 1))
    return [rows(init_noise, stop) for init_noise, stop in itertools.pairwise(cuts)]


Program = Callable[[Plan, Carry, Array], Carry]  # `scan_plan` with its denoiser, compiled


def sample(
    run: Program | Sequence[Program],
    plan: Plan,
    x: Array,
    keys: Array,
    each: Callable[[int, Carry], None] = lambda rows, carry: None,
    every: int | None = None,
    which: Any = None,
) -> Array:
    """Run a plan from the noise x [B, ...] down to images, ten rows a call, in float32 at least.

    run: `scan_plan` with its denoiser, compiled: jax.jit(functools.partial(advance, denoise)). keys: [B]. each: called
    with (rows done now, carry) after every call, for progress bars and previews: carry[0] is x, carry[1] the estimate
    of x0. every: calls end at its multiples, of ten if None. which: ints [N], where run is a sequence: row i is run by
    run[which[i]], so that some rows can do without a second evaluation.
    """
    runs = (run,) if callable(run) else run
    which = np.zeros(plan.steps, np.int64) if which is None else np.asarray(which)
    if which.shape != (plan.steps,) or not ((which >= 0) & (which < len(runs))).all():
        raise ValueError(f"which names one of {len(runs)} runs, from 0, for each of {plan.steps} rows, not {which}")
    # bfloat16 has three digits: small steps of x would be lost in it. Networks cast for themselves.
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # Two arrays, not one twice: a compiled `run` may reuse the memory of each part of the carry.
    carry = x, jnp.zeros_like(x), jnp.zeros_like(x)
    done = 0
    for rows in segments(plan, x.dtype, every, which=which):
        carry = runs[which[done]](rows, carry, keys)
        done += rows.steps
        each(rows.steps, carry)
    return carry[0]


def trajectory(run: Program, plan: Plan, x: Array, keys: Array, every: int) -> tuple[np.ndarray, np.ndarray]:
    """(x, estimates of x0), each [M, B, ...] on the host: after every `every` rows, and after the last. The rows
    between are not kept. The last x are the images. ValueError for `every` below 1.
    """
    done, kept = 0, []

    def keep(rows: int, carry: Carry) -> None:
        nonlocal done
        done += rows
        if done % every == 0 or done == plan.steps:
            kept.append(jax.device_get(carry[:2]))

    sample(run, plan, x, keys, keep, every)
    xs, x0s = zip(*kept, strict=True)
    return np.stack(xs), np.stack(x0s)


def slerp(x: Array, y: Array, weight: Any) -> Array:
    """Spherical interpolation from x (weight 0) to y (weight 1), image by image: equation 67 of DDIM
    (arXiv:2010.02502), sin((1 - w)*angle)/sin(angle)*x + sin(w*angle)/sin(angle)*y, which keeps noise as long as noise
    is. x, y: [B, ...]; weight: scalar or [B]. Where the sine vanishes it is a straight line.
    """
    axes = tuple(range(1, x.ndim))
    norm = jnp.sqrt(jnp.sum(x**2, axes) * jnp.sum(y**2, axes))
    cosine = jnp.sum(x * y, axes) / jnp.where(norm > 0, norm, 1)
    angle, weight = jnp.arccos(jnp.clip(cosine, -1, 1)), jnp.broadcast_to(weight, cosine.shape)
    sine = jnp.sin(angle)
    straight = sine < 1e-4
    safe = jnp.where(straight, 1, sine)
    of_x = jnp.where(straight, 1 - weight, jnp.sin((1 - weight) * angle) / safe)
    of_y = jnp.where(straight, weight, jnp.sin(weight * angle) / safe)
    return append_dims(of_x, x) * x + append_dims(of_y, y) * y


def within(plan: Plan, low: float, high: float) -> np.ndarray:
    """Which rows of a plan are called at a level with low <= sigma/alpha <= high, bool [N]: the interval of guidance
    (arXiv:2404.07724). ValueError unless low < high.
    """
    if not low < high:
        raise ValueError(f"the interval is {low} to {high} of sigma/alpha: its end lies above its start")
    ratio = np.exp(-logsnr(plan.level) / 2)
    return (low <= ratio) & (ratio <= high)


def count_nfe(build: Callable[[Callable[[Network], Network]], Denoiser], plan: Plan, x: Any) -> int:
    """Network evaluations per image of a plan, counted: the denoiser is traced with networks that count the rows of
    their batch. x: [B, ...], or its ShapeDtypeStruct.

    build: makes the denoiser; every network that is to count goes through the function that it is given, as in
    lambda counted: condition_on(from_network(counted(network), params, prediction), labels).
    """
    seen = []

    def counted(network: Network) -> Network:
        def counting(params: Any, x: Array, t: Array, condition: Any) -> Array:
            seen.append(x.shape[0])
            return network(params, x, t, condition)

        return counting

    level = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((), jnp.float32), Level(0, 0, 0))
    jax.eval_shape(build(counted), x, level)
    return plan.steps * sum(seen) // x.shape[0]
