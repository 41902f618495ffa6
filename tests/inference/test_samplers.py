import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from helpers import naming
from hypothesis import given
from hypothesis import strategies as st

from diffjax import sampler, schedule
from diffjax.inference import samplers
from diffjax.testing import CHURNING, EXCESSIVE, MAKERS, schedules, visits

LEVELS = schedule.linear(1000)


def same(plan, other):
    flat = zip((*plan.level, *plan[1:]), (*other.level, *other[1:]), strict=True)
    return all(a is b is None or (np.array_equal(a, b) and a.dtype == b.dtype) for a, b in flat)


@given(schedules(), st.data())
def test_a_plan_in_a_file_keeps_every_digit(levels, data):
    t = data.draw(visits(levels, fractions=True))
    make = data.draw(st.sampled_from(list((MAKERS | CHURNING | EXCESSIVE).values())))
    plan = make(levels, t)
    with tempfile.TemporaryDirectory() as folder:
        samplers.save(Path(folder) / "plan.json", plan)
        loaded = samplers.load(Path(folder) / "plan.json")
    assert same(loaded, plan)
    samplers.check_fits(loaded, levels)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_every_sampler_has_a_name_a_picture_and_a_full_name(name, steps, tmp_path):
    t = schedule.trailing(LEVELS, steps)
    plan, full = samplers.named(name, LEVELS, t, "trailing", eta=None, variance=None, churn=None)
    sampler.check_plan(plan)
    assert full.startswith(f"{name}(")
    assert "trailing" in full
    assert (f"{steps} levels" in full) == (plan.steps != steps)
    samplers.save(tmp_path / "plan.png", plan, full)
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"


def test_a_dial_reaches_its_sampler():
    t = schedule.trailing(LEVELS, 20)
    assert same(samplers.named("ddim", LEVELS, t, "trailing", eta=0.5)[0], sampler.ddim(LEVELS, t, 0.5))
    assert same(samplers.named("ddpm", LEVELS, t, "", variance="fixed_large")[0], sampler.sigma_hat(LEVELS, t))
    halfway = sampler.ddpm(LEVELS, t, sampler.interpolated_variance(0.5))
    assert same(samplers.named("ddpm", LEVELS, t, "", variance="0.5")[0], halfway)
    assert samplers.named("edm", LEVELS, t, "", churn=0.0)[0].d is None
    assert samplers.named("ddim", LEVELS, t, "trailing", eta=1)[1] == "ddim(eta=1, trailing)"
    assert samplers.named("ddim", LEVELS, t, "trailing", eta=0.25)[1] == "ddim(eta=0.25, trailing)"
    assert samplers.named("heun", LEVELS, t, "karras")[1] == "heun(karras, 20 levels)"


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda t: samplers.named("ddmi", LEVELS, t, ""), ["ddmi", *samplers.SAMPLERS]),
        (lambda t: samplers.named("heun", LEVELS, t, "", eta=0.5), ["eta", "heun", "ddim", "dpm_solver_pp_2m"]),
        (lambda t: samplers.named("heun", LEVELS, t, "", rho=7), ["rho", "heun"]),
        (lambda t: samplers.named("ddpm", LEVELS, t, "", variance="large"), ["variance", "large", "fixed_small"]),
        (lambda t: samplers.named("ddpm", LEVELS, t, "", variance="1.5"), ["1.5", "fixed_small", "fixed_large"]),
        (lambda t: samplers.check_fits(sampler.ddim(schedule.cosine(), t), LEVELS), ["alpha", 1000]),
        (lambda t: samplers.check_fits(sampler.ddim(schedule.linear(1000, 1e-4, 0.0201), t), LEVELS), ["alpha", 1000]),
        (lambda t: samplers.check_fits(sampler.ddim(LEVELS, t), schedule.linear(100)), ["level", 1000, 100]),
    ],
)
def test_bad_input_is_named(make, names):
    with pytest.raises(ValueError, match=naming(*names)):
        make(schedule.trailing(LEVELS, 5))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda plan: "{", ["JSON"]),
        (lambda plan: "[1]", ["t", "alpha", "sigma", "a", "b", "c", "d", "number"]),
        (lambda plan: json.dumps(plan | {"e": 1}), ["t", "alpha", "sigma", "a", "b", "c", "d", "number"]),
        (lambda plan: json.dumps(plan | {"a": "many"}), ["many"]),
        (lambda plan: json.dumps(plan | {"a": [[1], [2, 3]]}), []),
        (lambda plan: json.dumps(plan | {"b": [float("nan")] * 3}), ["b", "nan", 1]),
        (lambda plan: json.dumps(plan | {"c": [0, 0, 0]}), ["c", (3,), (3, 2)]),
        (lambda plan: json.dumps(plan | {"a": None}), []),
        (lambda plan: json.dumps(plan | {"a": 1.0}), []),
        (lambda plan: json.dumps({name: [] for name in plan} | {"d": None}), ["row"]),
        (lambda plan: json.dumps(plan | {"d": [0, -1, 0]}), ["d", -1]),
        (lambda plan: json.dumps(plan | {"number": [1, 1, 2]}), ["number", 1]),
        (lambda plan: json.dumps(plan | {"number": [0, 1, 2]}), ["number", 1]),
        (lambda plan: json.dumps(plan | {"number": [1.5, 2, 3]}), ["number", 1]),
        (lambda plan: json.dumps(plan | {"d": [0, 0]}), ["d", (2,), (3,)]),
    ],
)
def test_a_file_that_is_no_plan_is_named(change, names, tmp_path):
    file = tmp_path / "plan.json"
    samplers.save(file, sampler.ddim(LEVELS, [1000, 500, 1]))
    file.write_text(change(json.loads(file.read_text())))
    with pytest.raises(ValueError, match=naming(file, *names)):
        samplers.load(file)
