"""DDPM and DDIM, and the one compiled loop that runs every sampler.

A sampler is a function of two neighbouring levels: `ddpm_step` (arXiv:2006.11239), `ddim_step`
(arXiv:2010.02502). Both are linear in the noisy sample, the estimate of x0 and the drawn noise,
so a whole sampler is a table of their coefficients, a `Plan`, read off the step function itself
in float64. `scan_plan` scans the rows of any plan; `sample` feeds it a plan in segments, so that
two compiled programs serve every sampler at every number of steps. Samplers of higher order are
tables of the same kind, in solvers.py.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffjax.denoiser import Denoiser, Network
from diffjax.process import append_dims, eps_from_x0, q_posterior, q_sample, sqrt_snr_ratio
from diffjax.schedule import (
    Level,
    Schedule,
    at,
    check_levels,
    check_variance_preserving,
    level_at,
    logsnr,
)

# ----------------------------------------------------------------------------- the equations

# (level_t, level_s) -> standard deviation of the noise that a step adds
Std = Callable[[Level, Level], Any]


def fixed_small(level_t: Level, level_s: Level) -> Any:
    """sigma_s*sqrt(1 - r**2): the noise of the posterior q(x_s | x_t, x0).

    It is DDPM's beta-tilde, and the right one at any stride.
    """
    return level_s.sigma * (1 - sqrt_snr_ratio(level_t, level_s) ** 2) ** 0.5


def fixed_large(level_t: Level, level_s: Level) -> Any:
    """sigma_t*sqrt(1 - r**2), 0 onto data: DDPM's beta on its full chain.

    For variance-preserving schedules. Strided it is the sigma-hat of DDIM (arXiv:2010.02502,
    appendix D.3), and leaves noise in the images.
    """
    return level_t.sigma * (1 - sqrt_snr_ratio(level_t, level_s) ** 2) ** 0.5 * (level_s.sigma > 0)


def interpolated_variance(v: float) -> Std:
    """fixed_small**(1 - v) * fixed_large**v: between the two in log variance.

    As in classifier-free guidance with v = 0.3 (arXiv:2207.12598, section 4).

    Raises: ValueError unless v is in [0, 1].
    """
    if not 0 <= v <= 1:
        raise ValueError(f"v is {v}: use 0 (fixed_small) to 1 (fixed_large)")
    return lambda level_t, level_s: (
        fixed_small(level_t, level_s) ** (1 - v) * fixed_large(level_t, level_s) ** v
    )


VARIANCES: dict[str, Std] = {f.__name__: f for f in (fixed_small, fixed_large)}


def ddpm_step(
    x_t: Any, x0: Any, level_t: Level, level_s: Level, z: Any, std: Std = fixed_small
) -> Any:
    """One step of DDPM: x_s = mean of q(x_s | x_t, x0) + std*z.

    Algorithm 2 of arXiv:2006.11239 in terms of x0. x_t, x0, z: [B, ...], z standard normal;
    levels: scalar leaves or [B], t noisier than s. Onto data (s = 0) the result is x0.
    """
    mean, _ = q_posterior(x_t, x0, level_t, level_s)
    return mean + append_dims(std(level_t, level_s), x_t) * z


def ddim_step(
    x_t: Any, x0: Any, level_t: Level, level_s: Level, eta: Any = 0.0, z: Any = 0.0
) -> Any:
    """One step of DDIM: x_s = alpha_s*x0 + sqrt(sigma_s**2 - std**2)*eps + std*z.

    Equation 12 of arXiv:2010.02502. eps = (x_t - alpha_t*x0)/sigma_t, and std = eta * (that of
    the posterior), equation 16. eta 0 is deterministic, eta 1 is DDPM. x_t, x0, z: [B, ...], z
    standard normal; levels: scalar leaves or [B], t noisier than s.
    """
    eps = eps_from_x0(x_t, x0, level_t)
    std = eta * fixed_small(level_t, level_s)
    # sigma_s**2 - std**2 without the cancellation: it is never negative, however small r is.
    direction = level_s.sigma * (1 - eta**2 + (eta * sqrt_snr_ratio(level_t, level_s)) ** 2) ** 0.5
    return (
        append_dims(level_s.alpha, x0) * x0
        + append_dims(direction, eps) * eps
        + append_dims(std, eps) * z
    )


# ----------------------------------------------------------------------------- plans


class Plan(NamedTuple):
    """A sampler as a table, numpy float64.

    Row i calls the denoiser at its level and lands on the level of row i+1, the last row on data
    (of `encode`, on its noisiest level):

        x <- a*x + b*x0 + c[0]*x0_1 + c[1]*x0_2 + d*z,    z ~ N(0, I) from fold_in(key, noise_index)

    where x0_1 and x0_2 are the estimates of the previous two rows.
    """

    level: Level  # [N]
    a: Any  # [N]
    b: Any  # [N]
    c: Any  # [N, 2]
    d: Any  # [N], or None: nothing is drawn
    noise_index: Any  # [N] int, 1..N; the noise that the first row starts from has index 0

    @property
    def steps(self) -> int:
        """Calls of the denoiser. Network evaluations are counted by `count_nfe`."""
        return len(self.a)

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of x_T, sqrt(alpha**2 + sigma**2) at the first level.

        It is 1 for variance-preserving schedules.
        """
        return float(np.hypot(self.level.alpha[0], self.level.sigma[0]))

    def __str__(self) -> str:
        """The table for reading; for a long plan, its beginning and its end."""
        level, d = self.level, np.zeros(self.steps) if self.d is None else self.d
        columns = {
            "t": level.t, "alpha": level.alpha, "sigma": level.sigma, "logsnr": logsnr(level),
            "a": self.a, "b": self.b, "c1": self.c[:, 0], "c2": self.c[:, 1], "d": d,
        }  # fmt: skip
        lines = ["row " + "".join(f"{name:>11}" for name in columns)]
        for i in range(self.steps):
            numbers = "".join(f"{column[i]:>11.5g}" for column in columns.values())
            lines.append(f"{i + 1:<4}{numbers}")
        if self.steps > 40:
            lines[21:-20] = ["..."]
        return "\n".join(lines)


def ddpm(schedule: Schedule, t: Any, std: Std = fixed_small) -> Plan:
    """DDPM over the levels t and onto data.

    t: strictly decreasing in 1..T, or a spacing in words, as in "trailing:50"; so for all samplers
    (`schedule.check_levels`). All of T..1 is the thousand-step chain; fewer are the respaced
    one.

    Raises: ValueError for other levels, and for any std but fixed_small on a schedule that is not
    variance-preserving.
    """
    if std is not fixed_small:
        check_variance_preserving(schedule, "a larger variance than fixed_small")

    def step(x_t: Any, x0: Any, level_t: Level, level_s: Level, z: Any) -> Any:
        return ddpm_step(x_t, x0, level_t, level_s, z, std)

    return _plan_from_step(step, schedule, t)


def sigma_hat(schedule: Schedule, t: Any) -> Plan:
    """The "sigma-hat" of DDIM's table 1 (arXiv:2010.02502, appendix D.3).

    It is DDPM with fixed_large, over any levels.
    """
    return ddpm(schedule, t, fixed_large)


def ddim(schedule: Schedule, t: Any, eta: float = 0.0) -> Plan:
    """DDIM over the levels t and onto data.

    t: strictly decreasing in 1..T, or as "trailing:50"; eta: in [0, 1], as in equation 16 of
    arXiv:2010.02502.

    Raises: ValueError for other levels, or another eta.
    """
    check_eta(eta)

    def step(x_t: Any, x0: Any, level_t: Level, level_s: Level, z: Any) -> Any:
        return ddim_step(x_t, x0, level_t, level_s, eta, z)

    return _plan_from_step(step, schedule, t)


def euler(schedule: Schedule, t: Any) -> Plan:
    """Euler's method for the probability flow in sigma/alpha (arXiv:2206.00364).

    Another name of DDIM with eta 0.
    """
    return ddim(schedule, t)


def encode(schedule: Schedule, t: Any) -> Plan:
    """DDIM backwards, from data to the noisiest of the levels t.

    `ddim(schedule, t)` decodes. Section 4.3 of arXiv:2010.02502. t: strictly decreasing in 1..T.
    Run it without clipping, which cannot be inverted.

    The first row is called at the least noisy level with the data as they are, x = alpha*x +
    sigma*eps, since no network is trained at level 0. At a level T without signal it ends in eps
    itself, from which the flow leads back all the same.

    Raises: ValueError for other levels.
    """
    t = check_levels(schedule, t)[::-1]
    level_t, level_s = at(schedule, np.append(t[:1], t[:-1])), at(schedule, t)

    def step(x_t: Any, x0: Any, level_t: Level, level_s: Level, z: Any) -> Any:
        return q_sample(x0, eps_from_x0(x_t, x0, level_t), level_s)

    a, b, _ = _coefficients(step, level_t, level_s)
    a[0], b[0] = 1 + level_s.alpha[0], -level_s.alpha[0]
    return make_plan(level_t, a, b)


def check_eta(eta: float) -> None:
    """Check eta. Raises: ValueError unless it is in [0, 1]."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}: use 0 (deterministic) to 1 (the variance of DDPM)")


def level_pairs(schedule: Schedule, t: Any) -> tuple[Level, Level]:
    """The levels t of a sampler, and the levels that it steps to from them.

    These are the next ones of t, and data at last.

    Raises: ValueError unless t is strictly decreasing in 1..T.
    """
    t = check_levels(schedule, t)
    return at(schedule, t), at(schedule, np.append(t[1:], 0))


def make_plan(level: Level, a: Any, b: Any, c: Any = None, d: Any = None) -> Plan:
    """The plan with these columns, its rows numbered.

    c: zeros if None; d: a column of zeros is None.

    Raises: ValueError as `check_plan`.
    """
    n = len(a)
    c = np.zeros((n, 2)) if c is None else c + 0.0  # no -0.0
    d = d if d is not None and np.any(d) else None
    plan = Plan(level, a, b, c, d, np.arange(1, n + 1, dtype=np.int32))
    check_plan(plan)
    return plan


def _plan_from_step(step: Callable[..., Any], schedule: Schedule, t: Any) -> Plan:
    level_t, level_s = level_pairs(schedule, t)
    a, b, d = _coefficients(step, level_t, level_s)
    return make_plan(level_t, a, b, d=d)


def _coefficients(step: Callable[..., Any], level_t: Level, level_s: Level) -> np.ndarray:
    # A step is linear in (x_t, x0, z): at the unit vectors it gives its own coefficients.
    return np.stack(
        [
            np.broadcast_to(step(x_t, x0, level_t, level_s, z), level_t.t.shape)
            for x_t, x0, z in np.eye(3)
        ]
    )


def check_plan(plan: Plan) -> None:
    """Check the columns of a plan.

    Raises: ValueError, naming the column, unless all columns have the plan's number of rows, one at
    least, and are finite; d is 0 or more; and noise_index has different integers from 1 on, since
    equal ones would draw the same noise twice, and 0 is the noise of x_T.
    """
    n = np.size(plan.a)
    if not n:
        raise ValueError("plan has no row: use at least one")
    columns = plan.level._asdict() | plan._asdict()
    del columns["level"]
    for name, column in columns.items():
        if column is not None:
            _check_column(name, column, (n, 2) if name == "c" else (n,))
    if plan.d is not None and np.min(plan.d) < 0:
        raise ValueError(f"column d of the plan has {np.min(plan.d)}: use numbers of 0 or more")
    index = np.asarray(plan.noise_index)
    if index.dtype.kind not in "iu" or index.min() < 1 or len(np.unique(index)) < n:
        raise ValueError("column noise_index of the plan: use different integers from 1 on")


def _check_column(name: str, column: Any, shape: tuple[int, ...]) -> None:
    if np.shape(column) != shape:
        raise ValueError(
            f"column {name} of the plan has shape {np.shape(column)}, expected {shape}"
        )
    finite = np.isfinite(column)
    if not finite.all():
        i = int(np.argwhere(~finite)[0][0])
        raise ValueError(
            f"column {name} of the plan is {column[i]} in row {i + 1}: use finite numbers"
        )


# ----------------------------------------------------------------------------- running a plan

Carry = tuple[Array, Array, Array]  # x and the previous two estimates of x0, each [B, ...]


def image_keys(key: Array, index: Any) -> Array:
    """One key per image, [B], from the global indices of the images.

    Image i is the same in any batch, on any number of devices.

    Raises: ValueError for several keys in place of one, and for an index that is not [B].
    """
    check_key(key)
    if np.ndim(index) != 1:
        raise ValueError(f"index is {index}: use one for each image, as range(16)")
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(index, jnp.uint32))


def check_key(key: Any) -> None:
    """Check that a key is one. Raises: ValueError for several, or for something else."""
    if _keys_shape("key", key) != ():
        raise ValueError(f"key has shape {_keys_shape('key', key)}: use one key")


def check_keys(keys: Any, batch: int | None = None) -> None:
    """Check that keys are a batch of them, of this size unless it is None.

    Raises: ValueError for one key, which all samples would share, another number, or what is none.
    """
    shape = _keys_shape("keys", keys)
    if len(shape) != 1:
        raise ValueError(
            f"keys has shape {shape}: use one for each sample, as image_keys(key, range(16))"
        )
    if batch is not None and shape[0] != batch:
        raise ValueError(f"keys has length {shape[0]}, expected {batch}, one for each image")


def _keys_shape(name: str, keys: Any) -> tuple[int, ...]:
    dtype = getattr(keys, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return keys.shape
    if dtype == jnp.uint32 and keys.shape[-1:] == (2,):  # of jax.random.PRNGKey
        return keys.shape[:-1]
    raise ValueError(f"{name} is of type {type(keys).__name__}: use jax.random.key(seed)")


def noise(keys: Array, shape: tuple[int, ...], index: Any = 0, dtype: Any = jnp.float32) -> Array:
    """Standard normal noise [B, *shape], for image i from fold_in(keys[i], index).

    Index 0 is the noise of x_T.

    Raises: ValueError for one key in place of a batch of them.
    """
    check_keys(keys)
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape, dtype))(
        keys
    )


def init_noise(plan: Plan, keys: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """x_T [B, *shape], where a plan starts.

    It is noise of standard deviation `plan.init_noise_sigma`: 1 for variance-preserving
    schedules, as in DDPM, and about sigma for variance-exploding ones.
    """
    return noise(keys, shape, 0, dtype) * jnp.asarray(plan.init_noise_sigma, dtype)


def noise_to_level(plan: Plan, x0: Array, keys: Array) -> Array:
    """Images x0 [B, ...] noised to the first level of a plan, alpha*x0 + sigma*eps.

    With a plan over the lower levels only, t[t <= t_start], sampling keeps what of x0 that much
    noise leaves: SDEdit (arXiv:2108.01073).
    """
    return q_sample(x0, noise(keys, x0.shape[1:], 0, x0.dtype), level_at(plan.level, 0))


def scan_plan(denoise: Denoiser, rows: Plan, carry: Carry, keys: Array) -> Carry:
    """Run rows of a plan, as one `lax.scan`.

    To be compiled by the caller together with the denoiser. Rows are an argument, so another plan
    of the same number of rows does not compile again. carry: x, and the previous two estimates of
    x0, zeros at first; keys: [B], one per image.

    Raises: ValueError, when traced, for another number of keys where noise is drawn: several images
    would get the same noise.
    """
    if rows.d is not None:
        check_keys(keys, len(carry[0]))

    def body(carry: Carry, row: Plan) -> tuple[Carry, None]:
        x, x0_1, x0_2 = carry
        x0 = denoise(x, row.level)
        x_s = row.a * x + row.b * x0 + row.c[0] * x0_1 + row.c[1] * x0_2
        if row.d is not None:
            x_s += row.d * noise(keys, x.shape[1:], row.noise_index, x.dtype)
        return (x_s, x0, x0_1), None

    return jax.lax.scan(body, carry, rows)[0]


SEGMENT = 10  # rows per call: two programs, of ten rows and of one, run a plan of any length
Program = Callable[[Plan, Carry, Array], Carry]  # `scan_plan` with its denoiser, compiled


def segments(
    plan: Plan, dtype: Any, boundaries: Iterable[int] = (), size: int = SEGMENT
) -> list[Plan]:
    """The plan in segments of `size` rows or of one.

    dtype: that of x, to which the table is cast once from float64. boundaries: numbers of rows
    before which a segment must begin; those beyond the plan are ignored.

    Raises: ValueError for a plan that is not finite.
    """
    check_plan(plan)
    cast = partial(np.asarray, dtype=dtype)
    table = Plan(
        level=Level(*(cast(leaf) for leaf in plan.level)),
        a=cast(plan.a),
        b=cast(plan.b),
        c=cast(plan.c),
        d=None if plan.d is None else cast(plan.d),
        noise_index=plan.noise_index,
    )
    inner = {int(row) for row in boundaries if 0 < row < plan.steps}
    cuts = [0]
    for end in sorted(inner | {plan.steps}):
        while cuts[-1] < end:
            cuts.append(cuts[-1] + (size if end - cuts[-1] >= size else 1))
    return [
        jax.tree.map(lambda leaf, i=i, j=j: leaf[i:j], table) for i, j in itertools.pairwise(cuts)
    ]


def every_rows(plan: Plan, every: int) -> range:
    """The boundaries at each multiple of `every` rows.

    Raises: ValueError for `every` below 1.
    """
    if every < 1:
        raise ValueError(f"every is {every}: use 1 or more rows")
    return range(every, plan.steps, every)


def sample(
    program: Program,
    plan: Plan,
    x: Array,
    keys: Array,
    callback: Callable[[int, Carry], None] = lambda rows, carry: None,
    boundaries: Iterable[int] = (),
) -> Array:
    """Run a plan from the noise x [B, ...] to data, ten rows a call.

    It runs in float32 at least. program: `scan_plan` with its denoiser, compiled:
    jax.jit(functools.partial(scan_plan, denoise)). keys: [B], one per sample. callback: called
    with (rows done, carry) after every call, for progress bars and previews; carry[0] is x,
    carry[1] the last estimate of x0. boundaries: numbers of rows after which a call must end.

    Within one program samples are reproduced bit for bit, for any batch size and number of
    devices if the estimates of the denoiser are. Other boundaries make segments of other sizes,
    across which samples agree to float32 rounding: compilers round scans of one row and of ten
    differently.
    """
    index = np.zeros(plan.steps, np.int64)
    return sample_switching([program], index, plan, x, keys, callback, boundaries)


def sample_switching(
    programs: Sequence[Program],
    program_index: Any,
    plan: Plan,
    x: Array,
    keys: Array,
    callback: Callable[[int, Carry], None] = lambda rows, carry: None,
    boundaries: Iterable[int] = (),
) -> Array:
    """Run a plan with several programs, row i by programs[program_index[i]].

    All else is as in `sample`. Rows outside of a guidance interval so do without a second network
    evaluation. program_index: int [N].

    Raises: ValueError for an index of another shape, or out of range.
    """
    index = np.asarray(program_index)
    if index.shape != (plan.steps,) or not ((index >= 0) & (index < len(programs))).all():
        raise ValueError(
            f"program_index is {index}: use 0..{len(programs) - 1} for each of {plan.steps} rows"
        )
    # bfloat16 has three digits: small steps of x would be lost in it. Networks cast for themselves.
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # Two arrays, not one twice: a compiled program may reuse the memory of each part of the carry.
    carry = x, jnp.zeros_like(x), jnp.zeros_like(x)
    done, switches = 0, np.flatnonzero(np.diff(index)) + 1
    for rows in segments(plan, x.dtype, [*boundaries, *switches]):
        carry = programs[index[done]](rows, carry, keys)
        done += rows.steps
        callback(rows.steps, carry)
    return carry[0]


def trajectory(
    program: Program, plan: Plan, x: Array, keys: Array, every: int
) -> tuple[np.ndarray, np.ndarray]:
    """(x, estimates of x0), [M, B, ...] each on the host, along a plan.

    They are those after every `every` rows, and after the last. The rows between are not kept.
    The last x is the sample, to float32 rounding: see `sample`.

    Raises: ValueError for `every` below 1.
    """
    done, kept = 0, []

    def keep(rows: int, carry: Carry) -> None:
        nonlocal done
        done += rows
        if done % every == 0 or done == plan.steps:
            kept.append(jax.device_get(carry[:2]))

    sample(program, plan, x, keys, keep, every_rows(plan, every))
    xs, x0s = zip(*kept, strict=True)
    return np.stack(xs), np.stack(x0s)


def slerp(x: Array, y: Array, weight: Any) -> Array:
    """Spherical interpolation from x (weight 0) to y (weight 1), image by image.

    Equation 67 of DDIM (arXiv:2010.02502), which keeps the length of noise:

        sin((1 - w)*angle)/sin(angle)*x + sin(w*angle)/sin(angle)*y

    x, y: [B, ...]; weight: scalar or [B]. Where the sine vanishes it is a straight line.
    """
    axes = tuple(range(1, x.ndim))
    norm = jnp.sqrt(jnp.sum(x**2, axes) * jnp.sum(y**2, axes))
    cosine = jnp.sum(x * y, axes) / jnp.where(norm > 0, norm, 1)
    angle, weight = jnp.arccos(jnp.clip(cosine, -1, 1)), jnp.broadcast_to(weight, cosine.shape)
    sine = jnp.sin(angle)
    straight = sine < 1e-4
    safe = jnp.where(straight, 1, sine)
    weight_x = jnp.where(straight, 1 - weight, jnp.sin((1 - weight) * angle) / safe)
    weight_y = jnp.where(straight, weight, jnp.sin(weight * angle) / safe)
    return append_dims(weight_x, x) * x + append_dims(weight_y, y) * y


def count_evaluations(build: Callable[[Callable[[Network], Network]], Denoiser], x: Any) -> int:
    """Network evaluations per sample of one call of a denoiser, counted by tracing it.

    The denoiser is traced with networks that count the rows of their batch. x: [B, ...], or its
    ShapeDtypeStruct. build: makes the denoiser; every network that is to count goes through the
    function that it is given, as in lambda counted: condition_on(from_network(counted(network),
    params, parameterization), condition).
    """
    seen = []

    def counted(network: Network) -> Network:
        def counting(params: Any, x: Array, t: Array, condition: Any) -> Array:
            seen.append(x.shape[0])
            return network(params, x, t, condition)

        return counting

    level = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((), jnp.float32), Level(0, 0, 0))
    jax.eval_shape(build(counted), x, level)
    return sum(seen) // x.shape[0]


def count_nfe(build: Callable[[Callable[[Network], Network]], Denoiser], plan: Plan, x: Any) -> int:
    """Network evaluations per sample (NFE) of a plan, as in `count_evaluations`."""
    return plan.steps * count_evaluations(build, x)
