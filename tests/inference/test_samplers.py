import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from helpers import naming
from hypothesis import given
from hypothesis import strategies as st

from diffjax import sampler, schedule, solvers
from diffjax.inference import samplers
from diffjax.inference.samplers import (
    SamplerRequest,
    check_plan_fits,
    load_plan,
    make_plan,
    make_plan_at,
    parse_sampler,
    parse_samplers,
    save_plan,
)
from diffjax.testing import CHURNING, EXCESSIVE, MAKERS, schedules, visits

LEVELS = schedule.linear(1000)


def plan_of(text, steps=20, levels=LEVELS):
    return make_plan(parse_sampler(text), levels, steps)


def same(plan, other):
    flat = zip((*plan.level, *plan[1:]), (*other.level, *other[1:]), strict=True)
    return all(a is b is None or (np.array_equal(a, b) and a.dtype == b.dtype) for a, b in flat)


# ------------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    ("text", "request_"),
    [
        ("ddim", SamplerRequest("ddim")),
        (" ddpm : 1000 ", SamplerRequest("ddpm", {}, None, 1000)),
        ("ddim()", SamplerRequest("ddim")),
        ("ddim(eta=0.5):50", SamplerRequest("ddim", {"eta": 0.5}, None, 50)),
        ("ddim(eta=1, spacing=karras)", SamplerRequest("ddim", {"eta": 1.0}, "karras")),
        ("ddpm(variance=fixed_large)", SamplerRequest("ddpm", {"variance": "fixed_large"})),
        ("ddpm( variance = 0.3 )", SamplerRequest("ddpm", {"variance": "0.3"})),
        ("edm(s_churn=1e1)", SamplerRequest("edm", {"s_churn": 10.0})),
    ],
)
def test_samplers_are_parsed(text, request_):
    assert parse_sampler(text) == request_


def test_lists_are_parsed():
    text = "ddim, ddim(eta=0.5, spacing=karras):7,ddpm(variance=fixed_large):1000"
    requests = parse_samplers(text)
    assert requests == [
        SamplerRequest("ddim"),
        SamplerRequest("ddim", {"eta": 0.5}, "karras", 7),
        SamplerRequest("ddpm", {"variance": "fixed_large"}, None, 1000),
    ]
    plans, names = zip(*(make_plan(request, LEVELS, 20) for request in requests), strict=True)
    assert [plan.steps for plan in plans] == [20, 7, 1000]
    assert names == (
        "ddim(eta=0, trailing)",
        "ddim(eta=0.5, karras)",
        "ddpm(fixed_large, trailing)",
    )


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("huen", ["sampler", "huen", "heun"]),
        ("zzz", ["sampler", "zzz", *samplers.SAMPLERS]),
        ("", ["sampler"]),
        ("ddim(eta)", ["sampler", "ddim(eta)"]),
        ("ddim(eta=)", ["sampler", "ddim(eta=)"]),
        ("ddim:many", ["sampler", "ddim:many"]),
        ("ddim(eta=0", ["sampler", "ddim(eta=0"]),
        ("ddim(eta=high)", ["eta", "high", "ddim(eta=high)"]),
        ("ddim(etta=0)", ["ddim", "etta", "eta"]),
        ("heun(eta=0.5)", ["eta", "heun", "ddim", "dpm_solver_pp_2m"]),
        ("edm(churn=3)", ["edm", "churn", "s_churn"]),
        ("ddim(variance=fixed_large)", ["ddim", "variance", "ddpm"]),
        ("heun(rho=7)", ["rho", "heun", "spacing"]),
        ("ddim(spacing=karas)", ["spacing", "ddim", "karas", "karras"]),
    ],
)
def test_a_text_that_is_no_sampler_is_named(text, names):
    with pytest.raises(ValueError, match=naming(*names)):
        parse_samplers(text)


# ------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("name", samplers.SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_every_sampler_makes_a_plan(name, steps, tmp_path):
    plan, full_name = plan_of(name, steps)
    sampler.check_plan(plan)
    assert full_name.startswith(f"{name}(")
    assert "trailing" in full_name
    assert (f"{steps} levels" in full_name) == (plan.steps != steps)
    save_plan(tmp_path / "plan.png", plan, full_name)
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"


def test_options_reach_their_sampler():
    t = schedule.trailing(LEVELS, 20)
    halfway = sampler.ddpm(LEVELS, t, sampler.interpolated_variance(0.5))
    fixed_large = sampler.ddpm(LEVELS, t, sampler.fixed_large)
    karras = sampler.ddim(LEVELS, schedule.karras(LEVELS, 20))
    for text, plan in (
        ("ddim(eta=0.5)", sampler.ddim(LEVELS, t, 0.5)),
        ("ddim(spacing=karras)", karras),
        ("euler", sampler.ddim(LEVELS, t)),
        ("ddpm", sampler.ddpm(LEVELS, t)),
        ("ddpm(variance=fixed_large)", fixed_large),
        ("sigma_hat", fixed_large),
        ("ddpm(variance=0.5)", halfway),
        ("dpm_solver_pp_2m(eta=1)", solvers.dpm_solver_pp_2m(LEVELS, t, 1.0)),
        ("edm", solvers.edm(LEVELS, t)),
        ("edm(s_churn=0)", solvers.edm(LEVELS, t, s_churn=0.0)),
    ):
        assert same(plan_of(text)[0], plan), text


@pytest.mark.parametrize(
    ("text", "full_name"),
    [
        ("ddim", "ddim(eta=0, trailing)"),
        ("ddim(eta=0.25)", "ddim(eta=0.25, trailing)"),
        ("ddpm(variance=0.3)", "ddpm(0.3, trailing)"),
        ("heun(spacing=karras)", "heun(karras, 20 levels)"),
        ("edm", "edm(s_churn=40, trailing, 20 levels)"),
        ("euler", "euler(trailing)"),
    ],
)
def test_full_names_have_every_option(text, full_name):
    assert plan_of(text)[1] == full_name


def test_steps_of_a_request_come_before_the_default():
    assert plan_of("ddim:7", 20)[0].steps == 7
    assert plan_of("ddim", 20)[0].steps == 20


def test_explicit_levels_are_visited():
    plan, full_name = make_plan_at(parse_sampler("ddim(eta=0.5)"), LEVELS, [1000, 600.5, 100])
    assert same(plan, sampler.ddim(LEVELS, [1000, 600.5, 100], 0.5))
    assert full_name == "ddim(eta=0.5, explicit)"
    assert make_plan_at(parse_sampler("heun"), LEVELS, [900, 500, 20])[1] == (
        "heun(explicit, 3 levels)"
    )


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: plan_of("ddim:0"), ["steps", 0, 1000]),
        (lambda: plan_of("ddim:1001"), ["steps", 1001, 1000]),
        (lambda: plan_of("ddim(eta=1.5)"), ["eta", 1.5]),
        (lambda: plan_of("edm(s_churn=-1)"), ["s_churn", -1]),
        (lambda: plan_of("ddpm(variance=large)"), ["variance", "large", "fixed_small"]),
        (lambda: plan_of("ddpm(variance=1.5)"), ["variance", "1.5", "fixed_small", "fixed_large"]),
        (lambda: plan_of("ddpm(variance=nan)"), ["variance", "nan", "fixed_large"]),
        (lambda: make_plan(SamplerRequest("huen"), LEVELS, 5), ["huen", "heun"]),
        (lambda: make_plan_at(parse_sampler("ddim"), LEVELS, [5, 10]), ["levels", 5, 10]),
        (lambda: make_plan_at(parse_sampler("ddim"), LEVELS, [1000, 0]), ["level", 0]),
        (lambda: make_plan_at(parse_sampler("ddim:3"), LEVELS, [5]), ["steps", "ddim", 3]),
        (
            lambda: make_plan_at(parse_sampler("ddim(spacing=karras)"), LEVELS, [5]),
            ["spacing", "ddim", "karras"],
        ),
    ],
)
def test_plans_that_cannot_be_made_are_named(make, names):
    with pytest.raises(ValueError, match=naming(*names)):
        make()


# ------------------------------------------------------------------------------- files


@given(schedules(), st.data())
def test_a_file_keeps_every_digit(levels, data):
    t = data.draw(visits(levels, fractions=True))
    make = data.draw(st.sampled_from(list((MAKERS | CHURNING | EXCESSIVE).values())))
    plan = make(levels, t)
    with tempfile.TemporaryDirectory() as folder:
        save_plan(Path(folder) / "plan.json", plan)
        loaded = load_plan(Path(folder) / "plan.json")
    assert same(loaded, plan)
    check_plan_fits(loaded, levels)


@pytest.mark.parametrize(
    ("levels", "names"),
    [
        (schedule.cosine(), ["alpha", 1000]),
        (schedule.linear(1000, 1e-4, 0.0201), ["alpha", 1000]),
        (schedule.linear(100), ["level", 1000, 100]),
    ],
)
def test_a_plan_of_another_schedule_is_named(levels, names):
    plan, _ = plan_of("ddim", 5)
    with pytest.raises(ValueError, match=naming(*names)):
        check_plan_fits(plan, levels)


COLUMNS = ["t", "alpha", "sigma", "a", "b", "c", "d", "noise_index"]


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda plan: "{", ["JSON"]),
        (lambda plan: "[1]", COLUMNS),
        (lambda plan: json.dumps(plan | {"e": 1}), COLUMNS),
        (lambda plan: json.dumps(plan | {"a": "many"}), ["many"]),
        (lambda plan: json.dumps(plan | {"a": [[1], [2, 3]]}), []),
        (lambda plan: json.dumps(plan | {"b": [float("nan")] * 3}), ["b", "nan", 1]),
        (lambda plan: json.dumps(plan | {"c": [0, 0, 0]}), ["c", (3,), (3, 2)]),
        (lambda plan: json.dumps(plan | {"a": None}), []),
        (lambda plan: json.dumps(plan | {"a": 1.0}), []),
        (lambda plan: json.dumps({name: [] for name in plan} | {"d": None}), ["row"]),
        (lambda plan: json.dumps(plan | {"d": [0, -1, 0]}), ["d", -1]),
        (lambda plan: json.dumps(plan | {"noise_index": [1, 1, 2]}), ["noise_index", 1]),
        (lambda plan: json.dumps(plan | {"noise_index": [0, 1, 2]}), ["noise_index", 1]),
        (lambda plan: json.dumps(plan | {"noise_index": [1.5, 2, 3]}), ["noise_index", 1]),
        (lambda plan: json.dumps(plan | {"d": [0, 0]}), ["d", (2,), (3,)]),
    ],
)
def test_a_file_that_is_no_plan_is_named(change, names, tmp_path):
    file = tmp_path / "plan.json"
    save_plan(file, sampler.ddim(LEVELS, [1000, 500, 1]))
    file.write_text(change(json.loads(file.read_text())))
    with pytest.raises(ValueError, match=naming(file, *names)):
        load_plan(file)
