"""Targets, levels and objective of distillation against their laws and closed forms."""

import typing
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import naming
from hypothesis import given, settings
from hypothesis import strategies as st

from diffjax import distillation, loss, parameterization, process, sampler, schedule, testing
from diffjax.denoiser import condition_on, from_network
from diffjax.devices import parallel
from diffjax.guidance import classifier_free_guidance
from diffjax.schedule import Level, level_at
from diffjax.training.state import init_state
from diffjax.training.step import make_train_step

# ----------------------------------------------------------------------------- targets


def curved(x, level):
    """A teacher that is no straight line, neither in x nor in the level."""
    alpha, sigma = process.append_dims(level.alpha, x), process.append_dims(level.sigma, x)
    return np.tanh((1 + alpha) * x + sigma**2)


def at_row(rows, level):
    """The row that is called at this level."""
    i = list(rows[0].t).index(level.t)
    return jax.tree.map(lambda leaf: leaf[i], rows)


@st.composite
def grids(draw, least=1, **kinds):
    """A schedule, and a number of steps that it can be visited in, `least` times over."""
    drawn = testing.schedules(**kinds).filter(lambda levels: schedule.length(levels) >= least)
    levels = draw(drawn)
    return levels, draw(st.integers(1, min(64, schedule.length(levels) // least)))


@given(grids(least=2, exploding=True, terminal=True, flow=True), st.integers(0, 99))
def test_progressive_target_is_two_steps_in_one(grid, seed):
    (levels, steps), x = grid, np.random.default_rng(seed).normal(size=(3, 2, 2))
    rows = distillation.halving_levels(levels, steps)
    target = partial(distillation.progressive_target, curved)

    def student(teacher):
        return lambda x_t, level: target(x_t, *at_row(rows, level))

    testing.assert_halving(student, curved, levels, steps, x)
    # A level per image, as training has them, is no other arithmetic.
    n = min(3, steps)
    together = target(x[:n], *jax.tree.map(lambda leaf: leaf[:n], rows))
    for i in range(n):
        alone = target(x[i : i + 1], *at_row(rows, Level(rows[0].t[i], 0, 0)))
        np.testing.assert_allclose(together[i : i + 1], alone, rtol=1e-12, atol=1e-12)


SCHEDULES = ("linear", "rescaled_linear", "scaled_linear", "cosine", "sigmoid", "flow")


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("emptied", [False, True])
def test_chain_of_perfect_students_is_the_teacher(name, emptied):
    """From 64 steps to 1 the target of the target of ... is DDIM in 64 steps.

    With no signal at level T too; 100 levels are not even divisible by 64.
    """
    levels = getattr(schedule, name)(100)
    levels = schedule.variance_preserving(levels)
    levels = schedule.zero_terminal_snr(levels) if emptied else levels
    x = np.random.default_rng(0).normal(size=(2, 2, 2))
    end = testing.run_plan(curved, sampler.ddim(levels, schedule.trailing(levels, 64)), x)

    def student_of(teacher, rows):
        def student(x_t, level):
            return distillation.progressive_target(teacher, x_t, *at_row(rows, level))

        return student

    student = curved
    for steps in (32, 16, 8, 4, 2, 1):
        student = student_of(student, distillation.halving_levels(levels, steps))
        plan = sampler.ddim(levels, schedule.trailing(levels, steps))
        np.testing.assert_allclose(testing.run_plan(student, plan, x), end, rtol=0, atol=1e-9)


@given(grids(exploding=True, terminal=True, flow=True), st.integers(0, 99))
@settings(max_examples=30)
def test_end_of_the_path_is_a_fixed_point_of_consistency(grid, seed):
    (levels, steps), x = grid, np.random.default_rng(seed).normal(size=(3, 2, 2))
    rows = distillation.adjacent_levels(levels, steps)

    def target(student, teacher):
        def at_level(x_t, level):
            return distillation.consistency_target(student, teacher, x_t, *at_row(rows, level))

        return at_level

    with jax.enable_x64(True):
        testing.assert_consistency(target, curved, levels, steps, x)


def test_broken_targets_are_caught():
    levels, x = schedule.cosine(20), np.random.default_rng(0).normal(size=(3, 2, 2))
    with pytest.raises(AssertionError, match=naming("student", "level")):
        testing.assert_halving(lambda teacher: teacher, curved, levels, 4, x)
    with pytest.raises(AssertionError, match=naming("target", "level")):
        testing.assert_consistency(lambda student, teacher: teacher, curved, levels, 4, x)


# ----------------------------------------------------------------------------- levels


@given(testing.schedules(exploding=True, terminal=True, flow=True))
def test_all_levels_are_those_of_the_schedule(levels):
    (found,) = distillation.all_levels(levels)
    for leaf, expected in zip(found, level_at(levels, slice(1, None)), strict=True):
        np.testing.assert_array_equal(leaf, expected)


@given(grids(least=2, exploding=True, terminal=True, flow=True))
def test_students_are_called_where_trailing_calls_them(grid):
    """The least noisy level first; a teacher's are twice as many, and every other one a
    student's."""
    levels, steps = grid
    trailing = schedule.trailing(levels, steps)[::-1]
    t, s = distillation.adjacent_levels(levels, steps)
    np.testing.assert_array_equal(t.t, trailing)
    np.testing.assert_array_equal(s.t, [0, *trailing[:-1]])
    t, m, s, share = distillation.halving_levels(levels, steps)
    np.testing.assert_array_equal(t.t, trailing)
    np.testing.assert_array_equal(s.t, [0, *trailing[:-1]])
    teacher = schedule.trailing(levels, 2 * steps)[::-1]
    np.testing.assert_array_equal(m.t, teacher[::2])
    assert (share >= 0).all()
    assert (share < 1).all()
    assert share[0] == 0


@pytest.mark.parametrize("steps", [0, 11])
def test_bad_steps_are_named(steps):
    with pytest.raises(ValueError, match=naming("steps", 2 * steps, 20)):
        distillation.halving_levels(schedule.linear(20), steps)


# ----------------------------------------------------------------------------- the objective

LEVELS = schedule.cosine(20)
MEANS = np.array([-0.5, 0.5, 0.0])  # by label, the last for none


def knowing(x, level, label):
    """The denoiser of Gaussian data whose mean is their label's."""
    mean = process.append_dims(jnp.asarray(MEANS)[label], x)
    return testing.gaussian_denoiser(mean, 0.3)(x, level)


def batch(indices):
    x = np.random.default_rng(0).uniform(-1, 1, (64, 2, 2, 1))[indices]
    index = np.asarray(indices, np.uint32)
    return {"x": x, "condition": np.asarray(indices) % 2, "index": index}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["v", "x0"])
def test_a_student_of_guidance_has_no_loss(name):
    """If it outputs x0_null + scale*(x0_label - x0_null) for its scale; one of a fixed scale has
    a loss."""
    prediction, scales = process.PREDICTIONS[name], []
    rows, parameters = distillation.all_levels(LEVELS), parameterization.ddpm(prediction)

    def network(fixed, x, t, condition, keys):
        label, scale = condition
        level = jax.tree.map(lambda leaf: jnp.asarray(leaf)[jnp.asarray(t, int) + 1], LEVELS)
        null = knowing(x, level, jnp.full_like(label, 2))
        weight = process.append_dims(scale[:, 0], x) if fixed is None else fixed
        scales.append(np.asarray(scale))
        x0 = null + weight * (knowing(x, level, label) - null)
        return prediction.target(x0, process.eps_from_x0(x, x0, level), level)

    def target(condition, x_t, level):
        label, scale = condition
        return classifier_free_guidance(knowing, label, 2, scale[:, 0])(x_t, level)

    weights = loss.truncated_snr(LEVELS, prediction)[rows[0].t]
    objective = distillation.distillation_loss(
        network, parameters, rows, weights, target, loss.uniform, max_guidance=3.0
    )

    def losses(fixed, indices):
        return objective(fixed, batch(indices), jax.random.key(0)).value

    assert losses(None, range(64)).max() < 1e-10  # squares of float32's rounding: tables
    assert losses(2.0, range(64)).max() > 1e-3
    drawn = scales[0]
    assert drawn.shape == (64, 1)
    assert ((drawn >= 1) & (drawn < 3)).all()
    # 16 of 64 are expected in each quarter: a chance of one in a hundred at most.
    assert np.histogram(drawn, 4, (1, 3))[0].min() >= 5
    # What an example draws is its own, in whatever batch it is.
    part, whole = losses(2.0, range(16, 32)), losses(2.0, range(64))
    np.testing.assert_allclose(part, whole[16:32], rtol=1e-12)


def linear_network(params, x, t, condition, keys=None):
    return params["w"] * x + params["b"] * process.append_dims(t / 20, x)


PARAMS = {"w": jnp.float32(0.3), "b": jnp.float32(0.1)}


def consistency_objective(target_params):
    """The objective of consistency, whose target calls the student with these parameters."""
    prediction = process.PREDICTIONS["v"]
    rows, parameters = distillation.adjacent_levels(LEVELS, 4), parameterization.ddpm(prediction)
    weights = loss.truncated_snr(LEVELS, prediction)[rows[0].t]
    student = from_network(linear_network, target_params, parameters)

    def target(condition, x_t, level, after):
        denoisers = condition_on(student, condition), condition_on(knowing, condition)
        return distillation.consistency_target(*denoisers, x_t, level, after)

    return distillation.distillation_loss(
        linear_network, parameters, rows, weights, target, loss.uniform
    )


def images_in_float32():
    images = batch(range(64))
    return images | {"x": images["x"].astype(np.float32)}


def test_no_gradient_flows_through_the_target():
    """The student's copy in it is held constant."""
    images = images_in_float32()

    def mean_loss(params, target_params):
        return consistency_objective(target_params)(params, images, jax.random.key(0)).value.mean()

    through = jax.grad(lambda params: mean_loss(params, params))(PARAMS)
    held = jax.grad(lambda params: mean_loss(params, PARAMS))(PARAMS)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), through, held)
    assert abs(held["w"]) > 1e-3


@pytest.mark.parametrize("mode", typing.get_args(parallel.Mode))
def test_a_step_on_eight_devices(mode):
    """It is that on one, with the parameters of the target as an argument of the step."""
    optimizer = optax.adamw(1e-3)

    def step(state, batch, target_params, axis_name=None):
        objective = consistency_objective(target_params)
        return make_train_step(objective, optimizer, (0.9,), 5)(state, batch, axis_name)

    def taken(devices, mode):
        mesh = parallel.device_mesh(jax.devices()[:devices])
        home = parallel.replicated(parallel.state_mesh(mesh, mode))
        state = jax.device_put(init_state(PARAMS, optimizer), home)
        run = parallel.parallelize(mesh, mode, step, extra_args=1)
        images = parallel.shard_batch(mesh, mode, images_in_float32())
        return jax.device_get(run(state, images, jax.device_put(PARAMS, home)))

    expected, found = taken(1, "pmap"), taken(8, mode)
    assert abs(expected[0].params["w"] - 0.3) > 1e-4
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), found, expected)


def test_pytree_conditions_reach_network_and_target():
    """As (condition, scale) where a scale is drawn, and as they are where none is."""
    seen, rows = [], distillation.all_levels(LEVELS)
    parameters = parameterization.ddpm(process.PREDICTIONS["x0"])
    condition = {"label": np.arange(8), "vector": np.ones((8, 3), np.float32)}
    index = np.arange(8, dtype=np.uint32)
    images = {"x": np.zeros((8, 2), np.float32), "index": index, "condition": condition}

    def network(params, x, t, condition, keys):
        seen.append(condition)
        return x

    def target(condition, x_t, level):
        seen.append(condition)
        return x_t

    for max_guidance in (1.0, 2.0):
        objective = distillation.distillation_loss(
            network, parameters, rows, np.ones(20), target, loss.uniform, max_guidance
        )
        objective(None, images, jax.random.key(0))
    for found in (*seen[:2], seen[2][0], seen[3][0]):
        jax.tree.map(np.testing.assert_array_equal, found, condition)
    np.testing.assert_array_equal(seen[2][1], seen[3][1])


def test_weights_are_one_per_row():
    parameters, rows = (
        parameterization.ddpm(process.PREDICTIONS["v"]),
        distillation.all_levels(LEVELS),
    )
    with pytest.raises(ValueError, match=naming("weights", "(20,)", "(3,)")):
        distillation.distillation_loss(
            lambda *_: None, parameters, rows, np.ones(3), lambda *_: None, loss.uniform
        )


# ----------------------------------------------------------------------------- initial parameters


def test_init_from_teacher():
    fresh = {"a": jnp.zeros(3), "b": {"c": jnp.ones(2), "d": jnp.full(1, 2.0)}}
    teacher = {"a": jnp.arange(3.0), "b": {"c": jnp.array([5.0, 6.0])}}
    found = distillation.init_from_teacher(fresh, teacher)
    expected = {"a": np.arange(3), "b": {"c": np.array([5, 6]), "d": np.array([2])}}
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    with pytest.raises(ValueError, match=naming("a", "(2,)")):
        distillation.init_from_teacher({"a": jnp.zeros(3)}, {"a": jnp.zeros(2)})
    with pytest.raises(ValueError, match=naming("e", "(1,)")):
        distillation.init_from_teacher(fresh, teacher | {"e": jnp.zeros(1)})
