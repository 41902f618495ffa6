"""Plans as people meet them: by the name of a sampler, in a file, in a picture."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from diffjax import sampler, solvers
from diffjax.sampler import Plan, Std, check_plan
from diffjax.schedule import SPACINGS, Level, Schedule, at, check_levels, logsnr

# ---------------------------------------------------------------------------------------------- by name


class Sampler(NamedTuple):
    """A sampler with its dials."""

    make: Callable[..., Plan]  # (schedule, t, **dials) -> plan
    dials: dict[str, Any]  # name -> value if not given


def std_named(text: str) -> Std:
    """The noise of DDPM by name: fixed_small, fixed_large, or a number v of 0 to 1 between them (else ValueError)."""
    if text in sampler.VARIANCES:
        return sampler.VARIANCES[text]
    try:
        v = float(text)
    except ValueError:
        raise ValueError(f"variance is {text!r}: use fixed_small, fixed_large, or a number of 0 to 1 between") from None
    return sampler.interpolated_variance(v)


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(lambda schedule, t, name: sampler.ddpm(schedule, t, std_named(name)), {"variance": "fixed_small"}),
    "sigma_hat": Sampler(sampler.sigma_hat, {}),
    "ddim": Sampler(sampler.ddim, {"eta": 0.0}),
    "euler": Sampler(sampler.euler, {}),
    "heun": Sampler(solvers.heun, {}),
    "dpm_solver_pp_2m": Sampler(solvers.dpm_solver_pp_2m, {"eta": 0.0}),
    "dpm_solver_pp_3m": Sampler(solvers.dpm_solver_pp_3m, {}),
    "exponential_ab3": Sampler(solvers.exponential_ab3, {}),
    "unipc_2": Sampler(solvers.unipc_2, {}),
    "edm": Sampler(solvers.edm, {"churn": 40.0}),
    "consistency": Sampler(solvers.consistency, {}),
}


def named(name: str, schedule: Schedule, t: Any, spacing: str, **dials: Any) -> tuple[Plan, str]:
    """The plan of a sampler over the levels t, and its full name, as in "ddim(eta=0, trailing)": every dial, the
    spacing's name, and the number of levels where a level takes more than one row.

    dials: by name, None for those not given. ValueError for a sampler that does not exist, and a dial it does not have.
    """
    if name not in SAMPLERS:
        raise ValueError(f"there is no sampler {name!r}: choose from {', '.join(SAMPLERS)}")
    make, defaults = SAMPLERS[name]
    for dial, value in dials.items():
        if value is not None and dial not in defaults:
            owners = " and ".join(other for other in SAMPLERS if dial in SAMPLERS[other].dials) or "no sampler"
            mine = ", ".join(f"--{own}" for own in defaults) or "none"
            raise ValueError(f"--{dial} belongs to {owners}: the dials of {name} are {mine}")
    values = {dial: default if dials.get(dial) is None else dials[dial] for dial, default in defaults.items()}
    t = check_levels(schedule, t)
    plan = make(schedule, t, *values.values())
    told = [str(value) if isinstance(value, str) else f"{dial}={value:g}" for dial, value in values.items()]
    told += [spacing] + ([f"{len(t)} levels"] if plan.steps != len(t) else [])
    return plan, f"{name}({', '.join(told)})"


class Request(NamedTuple):
    """A sampler as it is asked for in a list of samplers."""

    name: str
    dials: dict[str, Any]
    spacing: str = "trailing"
    steps: int | None = None  # None: those of the whole list


def requests(text: str) -> list[Request]:
    """Samplers as a user lists them, each NAME, NAME(dial=value, spacing=NAME) or either with :STEPS behind it, as in
    "ddim,ddim(eta=0.5),ddpm(variance=fixed_large):1000". ValueError for what is none of these.
    """
    found = []
    for part in re.split(r",\s*(?![^(]*\))", text):
        match = re.fullmatch(r"(\w+)(?:\(([^()]*)\))?(?::(\d+))?", part.strip())
        pairs = [] if match is None or not match[2] else [word.partition("=") for word in match[2].split(",")]
        if match is None or any(not value for _, _, value in pairs):
            raise ValueError(f"{part.strip()!r} is no sampler: write them as in ddim,ddim(eta=0.5),ddpm:1000")
        dials = {dial.strip(): value.strip() for dial, _, value in pairs}
        spacing = dials.pop("spacing", "trailing")
        for dial, value in dials.items():
            if dial not in _DIALS:
                raise ValueError(f"there is no dial {dial!r} in {part.strip()!r}: use {', '.join(_DIALS)} or spacing")
            if dial != "variance" and not _is_number(value):
                raise ValueError(f"{dial} is {value!r} in {part.strip()!r}: use a number")
        values: dict[str, Any] = {dial: value if dial == "variance" else float(value) for dial, value in dials.items()}
        found.append(Request(match[1], values, spacing, int(match[3]) if match[3] else None))
    return found


_DIALS = sorted({dial for made in SAMPLERS.values() for dial in made.dials})


def at_steps(request: Request, schedule: Schedule, steps: int) -> tuple[Plan, str]:
    """The plan of a request over so many levels, or over its own, and its full name. ValueError as of `load_config`, and for
    a spacing that does not exist.
    """
    if request.spacing not in SPACINGS:
        raise ValueError(f"there is no spacing {request.spacing!r}: choose from {', '.join(SPACINGS)}")
    t = SPACINGS[request.spacing](schedule, steps if request.steps is None else request.steps)
    return named(request.name, schedule, t, request.spacing, **request.dials)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# ---------------------------------------------------------------------------------------------- in a file


def save(path: Path, plan: Plan, name: str = "") -> None:
    """Write a plan: as a picture under its name to a .png file, and else as JSON, every digit of it."""
    if path.suffix.lower() == ".png":
        plot(plan, name).savefig(path)
        return
    columns = {name: np.asarray(column).tolist() for name, column in plan.level._asdict().items()}
    columns |= {"a": plan.a.tolist(), "b": plan.b.tolist(), "c": plan.c.tolist()}
    columns |= {"d": None if plan.d is None else plan.d.tolist(), "number": plan.number.tolist()}
    path.write_text("{\n" + ",\n".join(f'"{name}": {json.dumps(column)}' for name, column in columns.items()) + "\n}\n")


def load(path: Path) -> Plan:
    """A plan from JSON, as `save` wrote it. ValueError for a file that is no plan, naming what is wrong with it."""
    try:
        columns = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    names = ("t", "alpha", "sigma", "a", "b", "c", "d", "number")
    if not isinstance(columns, dict) or set(columns) != set(names):
        raise ValueError(f"{path} is not a plan: it needs the columns {', '.join(names)} and no others")
    try:
        t = np.asarray(columns["t"])
        level = Level(t if t.dtype.kind == "i" else t.astype(np.float64), *_floats(columns, "alpha", "sigma"))
        a, b, c = _floats(columns, "a", "b", "c")
        d = None if columns["d"] is None else np.asarray(columns["d"], np.float64)
        plan = Plan(level, a, b, c, d, np.asarray(columns["number"]))
        check_plan(plan)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a plan: {error}") from None
    return plan._replace(number=plan.number.astype(np.int32))


def check_fits(plan: Plan, schedule: Schedule) -> None:
    """ValueError for a plan whose levels are not those of the schedule: the network would see noise unlike its own."""
    expected = at(schedule, plan.level.t)
    if np.min(plan.level.t) < 1:
        raise ValueError("the plan calls the network at level 0, which is data: its levels are 1..T")
    for name, found, right in zip(("alpha", "sigma"), plan.level[1:], expected[1:], strict=True):
        off = np.abs(found - right) > 1e-6 * np.abs(right)
        if off.any():
            i = int(np.argmax(off))
            raise ValueError(
                f"the plan belongs to another schedule: {name} at level {plan.level.t[i]:g} is {found[i]:.6g} there and"
                f" {right[i]:.6g} here"
            )


def _floats(columns: dict[str, Any], *names: str) -> list[np.ndarray]:
    return [np.asarray(columns[name], np.float64) for name in names]


# ---------------------------------------------------------------------------------------------- in a picture


def plot(plan: Plan, title: str = "") -> Figure:
    """Where the rows of a plan are called, and what they do there: logsnr and the coefficients, by row."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    rows = np.arange(1, plan.steps + 1)
    marker = "." if plan.steps <= 100 else ""
    above.plot(rows, logsnr(plan.level), marker=marker, color="black")
    above.set(ylabel="logsnr where called", title=title)
    columns = {"a": plan.a, "b": plan.b, "c1": plan.c[:, 0], "c2": plan.c[:, 1], "d": plan.d}
    for name, column in columns.items():
        if column is not None and np.any(column):
            below.plot(rows, column, marker=marker, label=name)
    below.set(xlabel="row", ylabel="coefficient")
    below.legend(ncols=5)
    for axes in (above, below):
        axes.grid(alpha=0.3)
    return figure
