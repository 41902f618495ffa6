"""Samplers by name, as text, and plans as files and pictures."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from diffjax import sampler, solvers
from diffjax.config import suggest
from diffjax.sampler import Plan, Std, check_plan
from diffjax.schedule import SPACINGS, Level, Schedule, at, check_levels, logsnr

# ------------------------------------------------------------------------------- registry


class Sampler(NamedTuple):
    """A sampler with its options."""

    make: Callable[..., Plan]  # (schedule, t, **options) -> plan
    options: Mapping[str, Any]  # name -> default


def parse_variance(text: str) -> Std:
    """The noise of DDPM's steps by name.

    text: fixed_small, fixed_large, or a number v of 0 to 1 between them.

    Raises: ValueError for another text.
    """
    if text in sampler.VARIANCES:
        return sampler.VARIANCES[text]
    if not _is_number(text) or not 0 <= float(text) <= 1:
        raise ValueError(
            f"variance is {text!r}: use fixed_small, fixed_large, or a number of 0 to 1 between"
        )
    return sampler.interpolated_variance(float(text))


def _ddpm(schedule: Schedule, t: Any, variance: str) -> Plan:
    return sampler.ddpm(schedule, t, parse_variance(variance))


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(_ddpm, {"variance": "fixed_small"}),
    "sigma_hat": Sampler(sampler.sigma_hat, {}),
    "ddim": Sampler(sampler.ddim, {"eta": 0.0}),
    "euler": Sampler(sampler.euler, {}),
    "heun": Sampler(solvers.heun, {}),
    "dpm_solver_pp_2m": Sampler(solvers.dpm_solver_pp_2m, {"eta": 0.0}),
    "dpm_solver_pp_3m": Sampler(solvers.dpm_solver_pp_3m, {}),
    "exponential_ab3": Sampler(solvers.exponential_ab3, {}),
    "unipc_2": Sampler(solvers.unipc_2, {}),
    "edm": Sampler(solvers.edm, {"s_churn": 40.0}),
    "consistency": Sampler(solvers.consistency, {}),
}
DEFAULT_SPACING = "trailing"
TEXT_OPTIONS = ("variance",)  # all others are numbers


# ------------------------------------------------------------------------------- requests


class SamplerRequest(NamedTuple):
    """A sampler as it is asked for, before the schedule is known."""

    name: str
    options: Mapping[str, Any] = {}  # those that are given; defaults for the others
    spacing: str | None = None  # of the levels; None for DEFAULT_SPACING
    steps: int | None = None  # number of levels; None for the caller's default

    def check(self) -> None:
        """Check the names of the sampler, its options and its spacing.

        Raises: ValueError with the nearest name, or the samplers that have the option.
        """
        if self.name not in SAMPLERS:
            raise ValueError(f"sampler is {self.name!r}: {suggest(self.name, list(SAMPLERS))}")
        for option in self.options:
            if option not in SAMPLERS[self.name].options:
                raise ValueError(
                    f"sampler {self.name} has no option {option!r}: {self._suggest(option)}"
                )
        if self.spacing is not None and self.spacing not in SPACINGS:
            raise ValueError(
                f"spacing of sampler {self.name} is {self.spacing!r}:"
                f" {suggest(self.spacing, list(SPACINGS))}"
            )

    def _suggest(self, option: str) -> str:
        owners = [name for name, other in SAMPLERS.items() if option in other.options]
        if owners:
            return f"use it with {' or '.join(owners)}"
        return suggest(option, [*SAMPLERS[self.name].options, "spacing"])


def parse_sampler(text: str) -> SamplerRequest:
    """Parse a sampler, as "ddim", "ddim(eta=0.5, spacing=karras)" or "ddpm:1000".

    Raises: ValueError for another text, or a name or option that does not exist.
    """
    text = text.strip()
    match = re.fullmatch(r"(\w+)\s*(?:\(([^()]*)\))?\s*(?::\s*(\d+))?", text)
    pairs = [word.partition("=") for word in match[2].split(",")] if match and match[2] else []
    if match is None or not all(name.strip() and value.strip() for name, _, value in pairs):
        raise ValueError(f"sampler is {text!r}: write it as in ddim, ddim(eta=0.5) or ddpm:1000")
    words = {name.strip(): value.strip() for name, _, value in pairs}
    spacing = words.pop("spacing", None)
    steps = None if match[3] is None else int(match[3])
    SamplerRequest(match[1], words, spacing, steps).check()
    options = {name: _parse_option(text, name, value) for name, value in words.items()}
    return SamplerRequest(match[1], options, spacing, steps)


def parse_samplers(text: str) -> list[SamplerRequest]:
    """Parse a list of samplers, as "ddim, ddim(eta=0.5), ddpm:1000".

    Raises: ValueError as `parse_sampler`.
    """
    return [parse_sampler(part) for part in re.split(r",(?![^(]*\))", text)]


def _parse_option(text: str, name: str, value: str) -> Any:
    if name in TEXT_OPTIONS:
        return value
    if not _is_number(value):
        raise ValueError(f"{name} of sampler {text} is {value!r}: use a number")
    return float(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# ------------------------------------------------------------------------------- plans


def make_plan(
    request: SamplerRequest | str, schedule: Schedule, default_steps: int = 50
) -> tuple[Plan, str]:
    """The plan of a request, and the sampler's full name, as "ddim(eta=0, trailing)".

    The full name has every option, the spacing, and the number of levels where a level takes more
    than one row. request: also in words, as in "ddim(eta=0.5):50". default_steps: the number of
    levels where the request names none.

    Raises: ValueError for names, options or a number of steps that cannot be used.
    """
    request = parse_sampler(request) if isinstance(request, str) else request
    request.check()
    spacing = request.spacing or DEFAULT_SPACING
    steps = default_steps if request.steps is None else request.steps
    return _make(request, schedule, SPACINGS[spacing](schedule, steps), spacing)


def make_plan_at(
    request: SamplerRequest, schedule: Schedule, t: Sequence[float] | np.ndarray
) -> tuple[Plan, str]:
    """The plan of a request over explicit levels t, and the sampler's full name.

    The full name is as in "heun(explicit, 3 levels)".
    t: strictly decreasing in 1..T, where fractions lie between the levels of the schedule.

    Raises: ValueError for names, options or levels that cannot be used, and for a request with a
    spacing or steps of its own.
    """
    request.check()
    for name, value in (("spacing", request.spacing), ("steps", request.steps)):
        if value is not None:
            raise ValueError(
                f"{name} of sampler {request.name} is {value}: explicit levels take none"
            )
    return _make(request, schedule, t, "explicit")


def _make(request: SamplerRequest, schedule: Schedule, t: Any, spacing: str) -> tuple[Plan, str]:
    make, defaults = SAMPLERS[request.name]
    options = {**defaults, **request.options}
    t = check_levels(schedule, t)
    plan = make(schedule, t, **options)
    words = [
        value if isinstance(value, str) else f"{name}={value:g}" for name, value in options.items()
    ]
    words += [spacing] + ([f"{len(t)} levels"] if plan.steps != len(t) else [])
    return plan, f"{request.name}({', '.join(words)})"


# ------------------------------------------------------------------------------- files


def save_plan(path: Path, plan: Plan, name: str = "") -> None:
    """Write a plan as JSON, with every digit, or as a picture to a .png file."""
    if path.suffix.lower() == ".png":
        plot_plan(plan, name).savefig(path)
        return
    columns = {name: np.asarray(column).tolist() for name, column in plan.level._asdict().items()}
    columns |= {name: getattr(plan, name).tolist() for name in ("a", "b", "c")}
    columns |= {"d": None if plan.d is None else plan.d.tolist()}
    columns |= {"noise_index": plan.noise_index.tolist()}
    lines = (f'"{name}": {json.dumps(column)}' for name, column in columns.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def load_plan(path: Path) -> Plan:
    """The plan of a JSON file that `save_plan` wrote.

    Raises: ValueError for a file that is not a plan.
    """
    try:
        columns = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    names = ("t", "alpha", "sigma", "a", "b", "c", "d", "noise_index")
    if not isinstance(columns, dict) or set(columns) != set(names):
        raise ValueError(f"{path} is not a plan: it needs exactly the columns {', '.join(names)}")
    try:
        plan = _plan_of_columns(columns)
        check_plan(plan)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a plan: {error}") from None
    return plan._replace(noise_index=plan.noise_index.astype(np.int32))


def _plan_of_columns(columns: dict[str, Any]) -> Plan:
    floats = {
        name: np.asarray(columns[name], np.float64) for name in ("alpha", "sigma", "a", "b", "c")
    }
    t = np.asarray(columns["t"])
    t = t if t.dtype.kind == "i" else t.astype(np.float64)
    d = None if columns["d"] is None else np.asarray(columns["d"], np.float64)
    return Plan(
        level=Level(t, floats.pop("alpha"), floats.pop("sigma")),
        **floats,
        d=d,
        noise_index=np.asarray(columns["noise_index"]),
    )


def check_plan_fits(plan: Plan, schedule: Schedule) -> None:
    """Check that a plan's levels are those of a schedule.

    A network knows the noise of the schedule that it was trained on.

    Raises: ValueError for a plan of another schedule.
    """
    expected = at(schedule, plan.level.t)
    if np.min(plan.level.t) < 1:
        raise ValueError("the plan calls the network at level 0, which is data: use levels of 1..T")
    for name, ours, theirs in zip(("alpha", "sigma"), plan.level[1:], expected[1:], strict=True):
        differs = np.abs(ours - theirs) > 1e-6 * np.abs(theirs)
        if differs.any():
            i = int(np.argmax(differs))
            raise ValueError(
                f"the plan belongs to another schedule: its {name} at level {plan.level.t[i]:g} is"
                f" {ours[i]:.6g}, and the model's is {theirs[i]:.6g}"
            )


def plot_plan(plan: Plan, title: str = "") -> Figure:
    """The figure of a plan: logsnr of its levels and its coefficients, by row."""
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
