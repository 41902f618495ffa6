import itertools
import re

import pytest
from helpers import naming

from diffjax import schedule
from diffjax.config import Config, Distillation
from diffjax.inference.defaults import (
    check_seed,
    default_sampler,
    default_steps,
    distillation_warning,
    require_undistilled,
)
from diffjax.inference.samplers import make_plan, parse_sampler

NONE = Distillation()
TWO = Distillation(method="progressive", steps=2)
CONSISTENT = Distillation(method="consistency", steps=4)


@pytest.mark.parametrize(
    ("distillation", "T", "expected"),
    [
        (NONE, 1000, ("ddim", 50)),
        (NONE, 20, ("ddim", 20)),
        (Distillation(method="guidance", guidance=3.0), 1000, ("ddim", 50)),
        (TWO, 1000, ("ddim", 2)),
        (CONSISTENT, 1000, ("consistency", 2)),
        (Distillation(method="consistency", steps=5), 1000, ("consistency", 1)),
    ],
)
def test_default_sampler(distillation, T, expected):
    assert default_sampler(distillation, schedule.cosine(T)) == expected


@pytest.mark.parametrize(
    ("distillation", "name", "steps"),
    [
        (NONE, "ddim", 50), (NONE, "ddpm", 100), (NONE, "heun", 50), (TWO, "ddim", 2),
        (TWO, "heun", 50), (CONSISTENT, "consistency", 2), (CONSISTENT, "ddpm", 100),
    ],
)  # fmt: skip
def test_default_steps(distillation, name, steps):
    assert default_steps(distillation, schedule.linear(100), name) == steps


def warning(model, text):
    return distillation_warning(model, make_plan(parse_sampler(text), model.schedule, 50)[0])


def test_plans_of_the_training_raise_no_warning(tiny_model):
    two, consistent = tiny_model(distillation=TWO), tiny_model(distillation=CONSISTENT)
    assert warning(two, "ddim:2") == warning(two, "euler:2") == ""
    for steps in (1, 2, 4):
        assert warning(consistent, f"consistency:{steps}") == ""


def test_other_plans_raise_a_warning(tiny_model):
    two, consistent = tiny_model(distillation=TWO), tiny_model(distillation=CONSISTENT)
    for text in ("ddim:4", "ddim(spacing=leading):2", "ddim(eta=1):2", "dpm_solver_pp_2m:4"):
        assert re.search(naming(two.name, "ddim", 2, "trailing"), warning(two, text))
        assert warning(tiny_model(), text) == ""
    for text in ("consistency:5", "ddim:2", "heun:4"):  # Heun calls the network twice a level
        assert re.search(naming(consistent.name, "consistency", 4), warning(consistent, text))


def test_defaults_raise_no_warning(tiny_model):
    model = tiny_model()._replace(schedule=schedule.linear())
    for method, steps in itertools.product(("progressive", "consistency"), range(1, 65)):
        distillation = Distillation(method=method, steps=steps)
        config = Config(distillation=distillation)
        model = model._replace(info=model.info._replace(config=config))
        name, default = default_sampler(distillation, model.schedule)
        assert warning(model, f"{name}:{default}") == ""


def test_distilled_models_are_refused(tiny_model):
    require_undistilled(tiny_model())
    for distillation in (TWO, CONSISTENT, Distillation(method="guidance", guidance=3.0)):
        model = tiny_model(distillation=distillation)
        with pytest.raises(ValueError, match=naming(model.name, "teacher")):
            require_undistilled(model)


def test_seeds_are_of_32_bits():
    check_seed(0)
    check_seed(2**32 - 1)
    for seed in (-1, 2**32, 9223372036854775808):
        with pytest.raises(ValueError, match=naming("seed", seed)):
            check_seed(seed)
