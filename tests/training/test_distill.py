import dataclasses
import itertools
import re
import signal
import time
import typing
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import QUICK, check_mistake, free_port, naming, of_steps
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffjax import distillation, loss, process, sampler, schedule, testing
from diffjax.build import build_optimizer, build_schedule, build_unet, init_params
from diffjax.checkpoint import Checkpoints
from diffjax.cli import demo, edit, evaluate, frontier, sample, train
from diffjax.config import (
    Config,
    Data,
    Diffusion,
    Distillation,
    Train,
    UNetConfig,
    check_config,
    check_resume,
)
from diffjax.denoiser import classifier_free_guidance, clip, condition_on, from_network
from diffjax.devices import parallel
from diffjax.inference import samplers
from diffjax.inference.pipeline import (
    Guidance,
    ModelInfo,
    Pipeline,
    TrainedModel,
    default_sampler,
    describe_weights,
    distillation_warning,
    load_model,
    require_undistilled,
)
from diffjax.interop import unet2d
from diffjax.schedule import Level
from diffjax.training.step import init_state, make_train_step, step_key

# ---------------------------------------------------------------------------------------------- targets


def curved(x, level):
    """A teacher that is no straight line, neither in x nor in the level."""
    return np.tanh(
        process.append_dims(1 + level.alpha, x) * x + process.append_dims(level.sigma, x) ** 2
    )


def at_row(rows, level):
    """The row that is called at this level."""
    i = list(rows[0].t).index(level.t)
    return jax.tree.map(lambda leaf: leaf[i], rows)


@st.composite
def grids(draw, least=1, **kinds):
    """A schedule and a number of steps that it can be visited in, `least` times over."""
    levels = draw(
        testing.schedules(**kinds).filter(lambda levels: schedule.length(levels) >= least)
    )
    return levels, draw(st.integers(1, min(64, schedule.length(levels) // least)))


@given(grids(least=2, exploding=True, terminal=True), st.integers(0, 99))
def test_a_student_given_the_target_takes_one_step_where_its_teacher_takes_two(grid, seed):
    (levels, steps), x = grid, np.random.default_rng(seed).normal(size=(3, 2, 2))
    rows = distillation.halving_levels(levels, steps)

    def student(teacher):
        return lambda x_t, level: distillation.progressive_target(
            teacher, x_t, *at_row(rows, level)
        )

    testing.assert_halving(student, curved, levels, steps, x)
    # A level per image, as training has them, is no other arithmetic.
    n = min(3, steps)
    together = distillation.progressive_target(
        curved, x[:n], *jax.tree.map(lambda leaf: leaf[:n], rows)
    )
    for i in range(n):
        alone = distillation.progressive_target(
            curved, x[i : i + 1], *at_row(rows, Level(rows[0].t[i], 0, 0))
        )
        np.testing.assert_allclose(together[i : i + 1], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", typing.get_args(typing.get_type_hints(Diffusion)["schedule"]))
@pytest.mark.parametrize("emptied", [False, True])
def test_the_whole_chain_of_perfect_students_is_the_teacher(name, emptied):
    """From 64 steps to 1 the target of the target of ... is DDIM in 64 steps, on every schedule that can be trained
    on, with no signal at level T too; 100 levels are not even divisible by 64."""
    levels = build_schedule(
        Config(diffusion=Diffusion(schedule=name, T=100, zero_terminal_snr=emptied))
    )
    x = np.random.default_rng(0).normal(size=(2, 2, 2))
    end = testing.run_plan(curved, sampler.ddim(levels, schedule.trailing(levels, 64)), x)
    student = curved
    for steps in (32, 16, 8, 4, 2, 1):
        rows = distillation.halving_levels(levels, steps)
        student = lambda x_t, level, s=student, rows=rows: distillation.progressive_target(
            s, x_t, *at_row(rows, level)
        )  # noqa: E731
        plan = sampler.ddim(levels, schedule.trailing(levels, steps))
        np.testing.assert_allclose(testing.run_plan(student, plan, x), end, rtol=0, atol=1e-9)


@given(grids(exploding=True, terminal=True), st.integers(0, 99))
@settings(max_examples=30)
def test_where_the_path_ends_is_a_fixed_point_of_consistency(grid, seed):
    (levels, steps), x = grid, np.random.default_rng(seed).normal(size=(3, 2, 2))
    rows = distillation.adjacent_levels(levels, steps)

    def target(student, teacher):
        return lambda x_t, level: distillation.consistency_target(
            student, teacher, x_t, *at_row(rows, level)
        )

    with jax.enable_x64(True):
        testing.assert_consistency(target, curved, levels, steps, x)


# ---------------------------------------------------------------------------------------------- the objective

LEVELS = schedule.cosine(20)
MEANS = np.array([-0.5, 0.5, 0.0])  # by label, the last for none


def knowing(x, level, label):
    """The denoiser of Gaussian data whose mean is their label's."""
    return testing.gaussian_denoiser(process.append_dims(jnp.asarray(MEANS)[label], x), 0.3)(
        x, level
    )


def batch(indices):
    image = np.random.default_rng(0).uniform(-1, 1, (64, 2, 2, 1))[indices]
    return {
        "image": image,
        "label": np.asarray(indices) % 2,
        "index": np.asarray(indices, np.uint32),
    }


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_the_student_that_says_guided_estimates_at_its_scale_has_no_loss(x64, prediction):
    """Told label and scale, x0_null + scale*(x0_label - x0_null); one of a fixed scale has a loss."""
    said, rows, scales = process.PREDICTIONS[prediction], distillation.all_levels(LEVELS), []

    def network(guided, x, t, condition, keys):
        label, scale = condition
        level = jax.tree.map(lambda leaf: jnp.asarray(leaf)[jnp.asarray(t, int) + 1], LEVELS)
        null = knowing(x, level, jnp.full_like(label, 2))
        weight = process.append_dims(scale[:, 0], x) if guided is None else guided
        scales.append(np.asarray(scale))
        x0 = null + weight * (knowing(x, level, label) - null)
        return said.target(x0, process.eps_from_x0(x, x0, level), level)

    def target(condition, x_t, level):
        label, scale = condition
        return classifier_free_guidance(knowing, label, 2, scale[:, 0])(x_t, level)

    weights = loss.truncated_snr(LEVELS, said)[rows[0].t]
    objective = distillation.distillation_loss(
        network, said, rows, weights, target, loss.uniform, largest=3.0
    )
    assert (
        objective(None, batch(range(64)), jax.random.key(0)).max() < 1e-10
    )  # squares of float32's rounding: tables
    assert objective(2.0, batch(range(64)), jax.random.key(0)).max() > 1e-3
    drawn = scales[0]
    assert drawn.shape == (64, 1)
    assert ((drawn >= 1) & (drawn < 3)).all()
    assert (
        np.histogram(drawn, 4, (1, 3))[0].min() >= 5
    )  # of 16 expected: a chance of one in a hundred at most
    # What an example draws is its own, in whatever batch it is.
    part = objective(2.0, batch(range(16, 32)), jax.random.key(0))
    np.testing.assert_allclose(
        part, objective(2.0, batch(range(64)), jax.random.key(0))[16:32], rtol=1e-12
    )


def test_nothing_is_learned_through_the_target_and_a_step_is_the_same_on_eight_devices():
    """Consistency asks a copy of the student itself, which is held still."""
    rows, said = distillation.adjacent_levels(LEVELS, 4), process.PREDICTIONS["v"]
    weights = loss.truncated_snr(LEVELS, said)[rows[0].t]

    def network(params, x, t, condition, keys=None):
        return params["w"] * x + params["b"] * process.append_dims(t / 20, x)

    def objective(own, target_params):
        def target(condition, x_t, level, after):
            student = condition_on(from_network(network, target_params(own), said), condition)
            return distillation.consistency_target(
                student, lambda x, level: knowing(x, level, condition), x_t, level, after
            )

        return distillation.distillation_loss(network, said, rows, weights, target, loss.uniform)

    params = {"w": jnp.float32(0.3), "b": jnp.float32(0.1)}
    images = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32 if leaf.dtype == np.float64 else leaf.dtype),
                          batch(range(64)))  # fmt: skip
    slopes = [
        jax.grad(lambda p, f=f: objective(p, f)(p, images, jax.random.key(0)).mean())(params)
        for f in (lambda own: own, lambda own: params)
    ]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), *slopes)

    optimizer = build_optimizer(Config(train=Train(warmup=0)))[0]

    def step(state, batch, frozen, axis_name=None):
        made = make_train_step(objective(None, lambda _: frozen), optimizer, (0.9,), 5)
        return made(state, batch, axis_name)

    def taken(devices, mode):
        mesh = parallel.device_mesh(jax.devices()[:devices])
        home = parallel.replicated(parallel.state_mesh(mesh, mode))
        state = jax.device_put(init_state(params, optimizer), home)
        run = parallel.parallelize(mesh, mode, step, frozen=True)
        return jax.device_get(
            run(state, parallel.shard_batch(mesh, mode, images), jax.device_put(params, home))
        )

    expected = taken(1, "pmap")
    assert abs(expected[0].params["w"] - 0.3) > 1e-4
    for mode in typing.get_args(parallel.Mode):
        found = taken(8, mode)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected
        )


def test_weights_are_one_per_row():
    with pytest.raises(ValueError, match=naming(20, "weights", (3,))):
        distillation.distillation_loss(
            lambda *_: None, process.PREDICTIONS["v"], distillation.all_levels(LEVELS), np.ones(3), lambda *_: None,
            loss.uniform,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------- runs

SHAPE, CLASSES = (8, 8, 1), 10
NETWORK = UNetConfig(channels=4, norm_groups=1, multipliers=(1,), attention=(), heads=1)
TEACHER = Config(
    data=Data(name="digits"), network=NETWORK, diffusion=Diffusion(schedule="cosine", T=20),
    train=Train(batch=8, save_every=1, log_every=1),
)  # fmt: skip


def write_run(folder, config, classes=CLASSES, seed=0):
    """A run folder of a network with random weights, none of them zero, of step 3."""
    params = init_params(build_unet(config, SHAPE, classes), SHAPE, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    params = tree.unflatten(
        [
            leaf + 0.1 * jax.random.normal(key, leaf.shape)
            for key, leaf in zip(keys, leaves, strict=True)
        ]
    )
    state = init_state(params, build_optimizer(config)[0])
    checkpoints = Checkpoints(folder)
    checkpoints.save(
        state._replace(step=state.step + 3), ModelInfo(config, SHAPE, classes).to_dict()
    )
    checkpoints.close()
    return folder


def student_of(method, steps, guidance=1.0):
    task = Distillation(method, "a teacher", 4, steps, guidance)
    return dataclasses.replace(
        TEACHER, distillation=task, diffusion=dataclasses.replace(TEACHER.diffusion, prediction="v"),
        train=dataclasses.replace(TEACHER.train, label_dropout=0.0, weighting="truncated_snr"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a teacher, of students of it, and of a run without labels."""
    home = tmp_path_factory.mktemp("distilled")
    unlabelled = dataclasses.replace(TEACHER, data=Data(name="digits", labels=False))
    undropped = dataclasses.replace(
        TEACHER, train=dataclasses.replace(TEACHER.train, label_dropout=0.0)
    )
    write_run(home / "teacher", TEACHER)
    write_run(home / "two", student_of("progressive", 2, 3.0))
    write_run(home / "whole", student_of("guidance", 0, 3.0), seed=5)
    write_run(home / "consistent", student_of("consistency", 4))
    write_run(home / "unlabelled", unlabelled, classes=0)
    write_run(home / "undropped", undropped)
    (home / "other").mkdir()
    (home / "other" / "notes.txt").write_text("")
    return home


def test_a_student_begins_as_its_teacher_whatever_scale_it_is_told(runs):
    """A pass of what will be told the scale is a pass of the teacher, to the rounding of float32."""
    teacher, config = load_model(runs / "teacher"), student_of("guidance", 0, 3.0)
    training = distillation.build_training(config, SHAPE, CLASSES, teacher)
    params = training.init(jax.random.key(7), teacher.params).params
    x, t, label = jnp.ones((2, *SHAPE)), jnp.array([3, 12]), jnp.array([1, 7])
    scale = jnp.array([[1.0], [2.5]])
    np.testing.assert_allclose(
        training.network(params, x, t, (label, scale)),
        teacher.network(teacher.params, x, t, label),
        atol=1e-5,
    )
    with pytest.raises(ValueError, match=naming(teacher.name, SHAPE, (8, 8, 3))):
        distillation.build_training(config, (8, 8, 3), CLASSES, teacher)
    with pytest.raises(ValueError, match=naming("a", (2,))):
        distillation.init_from_teacher({"a": jnp.zeros(3)}, {"a": jnp.zeros(2)})


@pytest.mark.parametrize(
    ("method", "steps"), [("guidance", 0), ("progressive", 2), ("consistency", 4)]
)
@pytest.mark.parametrize("told", [False, True])
def test_a_step_of_training_has_the_loss_of_the_paper(runs, method, steps, told):
    """Written out with the weights, levels and networks as they are, for a teacher of two passes and of one."""
    teacher = load_model(runs / ("whole" if told else "teacher"))
    config, levels = student_of(method, steps, 3.0), teacher.schedule
    training = distillation.build_training(config, SHAPE, CLASSES, teacher)
    own, averaged = (load_model(runs / name).params for name in ("two", "whole"))
    state = init_state(own, build_optimizer(config)[0])._replace(ema=(averaged,))
    images = np.random.default_rng(5).uniform(-1, 1, (16, *SHAPE)).astype(np.float32)
    batch = {"image": images, "label": np.arange(16) % 10, "index": np.arange(16, dtype=np.uint32)}
    batches = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], batch)
    found = jax.jit(training.step)(state, batches, teacher.params)[1]["loss"][0]

    t, _ = levels_of(method, levels, steps)
    drawn = loss.add_noise_to_batch(
        batch, step_key(config.train.seed, 0), loss.uniform, (schedule.at(levels, np.sort(t)),)
    )
    scale = jax.vmap(lambda key: jax.random.uniform(key, (1,), minval=1.0, maxval=3.0))(
        drawn.for_condition
    )

    def says(network, params, x, level, *condition):
        """x0 of one network, of v."""
        output = network(params, x, level.t - 1, condition[0] if len(condition) == 1 else condition)
        return (
            process.append_dims(level.alpha, x) * x - process.append_dims(level.sigma, x) * output
        )

    def teaches(x, level):
        if told:
            return jnp.clip(
                says(teacher.network, teacher.params, x, level, batch["label"], scale), -1, 1
            )
        conditional = from_network(teacher.network, teacher.params, teacher.prediction)
        named, unnamed = (
            conditional(x, level, label) for label in (batch["label"], np.full(16, CLASSES))
        )
        return jnp.clip(unnamed + process.append_dims(scale[:, 0], x) * (named - unnamed), -1, 1)

    def after(level, count):
        """The levels that many places further on the teacher's way."""
        _, way = levels_of(method, levels, steps)
        places = [list(way).index(int(t)) + count for t in level.t]
        return schedule.at(levels, np.append(way, 0)[places])

    def moved(x, x0, level, to):
        alpha, sigma, alpha_to, sigma_to = (
            process.append_dims(v, x) for v in (level.alpha, level.sigma, *to[1:])
        )
        return alpha_to * x0 + sigma_to * (x - alpha * x0) / sigma

    (level,), x = drawn.row, drawn.x_t
    goal = teaches(x, level)
    if method == "consistency":
        to = after(level, 1)
        there = moved(x, goal, level, to)
        own_words = jnp.clip(
            says(training.network, averaged, there, to, batch["label"], scale), -1, 1
        )
        goal = jnp.where(process.append_dims(to.t, x) > 0, own_words, there)
    elif method == "progressive":
        middle, to = after(level, 1), after(level, 2)
        x_m = moved(x, goal, level, middle)
        x_s = moved(x_m, teaches(x_m, middle), middle, to)
        alpha, sigma, alpha_s, sigma_s = (
            process.append_dims(v, x) for v in (level.alpha, level.sigma, *to[1:])
        )
        goal = (x_s - sigma_s / sigma * x) / (alpha_s - sigma_s / sigma * alpha)
    v = (
        process.append_dims(level.alpha, x)
        * (x - process.append_dims(level.alpha, x) * goal)
        / process.append_dims(level.sigma, x)
    )
    v -= process.append_dims(level.sigma, x) * goal
    snr = (level.alpha / level.sigma) ** 2
    weight = jnp.maximum(snr, 1) / (snr + 1)  # truncated SNR of x0, as it weighs v
    output = training.network(own, x, level.t - 1, (batch["label"], scale))
    expected = (weight * ((output - v) ** 2).mean((1, 2, 3))).mean()
    assert float(found) == pytest.approx(float(expected), rel=2e-4)  # float32


def levels_of(method, levels, steps):
    """Where the student is called, and where its teacher is."""
    if method == "guidance":
        return np.arange(1, schedule.length(levels) + 1), None
    return schedule.trailing(levels, steps), schedule.trailing(
        levels, steps * (2 if method == "progressive" else 1)
    )


def test_a_student_is_sampled_as_it_was_distilled_with_its_scale_in_one_pass(runs):
    run = load_model(runs / "two")
    assert default_sampler(run.description.config.distillation, run.schedule) == ("ddim", 2)
    plan, _ = samplers.named("ddim", run.schedule, schedule.trailing(run.schedule, 2), "trailing")
    labels = np.array([3, 8], np.int32)
    made = [
        Pipeline.of(run)(run.params, plan, labels, 2, guidance=Guidance(scale), seed=1, batch=8)
        for scale in (1.5, 3)
    ]
    assert [m.nfe for m in made] == [2, 2]
    keys = sampler.image_keys(jax.random.key(1), np.arange(2))
    for scale, m in zip((1.5, 3), made, strict=True):
        conditional = from_network(run.network, run.params, run.prediction)
        denoise = clip(condition_on(conditional, (labels, jnp.full((2, 1), scale))))
        expected = testing.run_plan(denoise, plan, sampler.init_noise(plan, keys, SHAPE))
        np.testing.assert_allclose(m.x, expected, atol=1e-4)
    assert np.abs(made[0].x - made[1].x).max() > 1e-2


def test_a_plan_that_a_student_was_not_distilled_for_is_told(runs):
    two, consistent, teacher = (
        load_model(runs / name) for name in ("two", "consistent", "teacher")
    )
    levels = two.schedule

    def said(run, name, t, **dials):
        return distillation_warning(run, samplers.named(name, levels, t, "trailing", **dials)[0])

    right = schedule.trailing(levels, 2)
    assert said(two, "ddim", right) == said(two, "euler", right) == ""
    for name, t, dials in [
        ("ddim", schedule.trailing(levels, 4), {}),
        ("ddim", schedule.leading(levels, 2), {}),
        ("ddim", right, {"eta": 1.0}),
        ("dpm_solver_pp_2m", schedule.trailing(levels, 4), {}),
    ]:
        assert re.search(naming("ddim", 2, "trailing"), said(two, name, t, **dials))
        assert said(teacher, name, t, **dials) == ""
    for steps in (1, 2, 4):
        assert said(consistent, "consistency", schedule.trailing(levels, steps)) == ""
    every = schedule.trailing(levels, 4)  # Heun calls there twice
    for name, t in [
        ("consistency", schedule.trailing(levels, 5)),
        ("ddim", right),
        ("heun", every),
    ]:
        assert re.search(naming("consistency", 4), said(consistent, name, t))


def chain(runs, teacher="teacher", **options):
    run = load_model(runs / teacher)
    given = distillation.Options(teacher, "", **{"start": 16, **options})
    return distillation.stages(distillation.defaults(given, run), run)


def test_the_stages_lead_from_the_teacher_to_the_last_student(runs):
    found = chain(runs, guidance=2.0)
    assert [stage.name for stage in found] == ["any", "8", "4", "2", "1"]
    assert [stage.config.distillation.steps for stage in found] == [0, 8, 4, 2, 1]
    assert [stage.config.train.steps for stage in found] == [2000, 2000, 2000, 4000, 4000]
    for stage in found:
        check_config(stage.config)
        assert (stage.config.diffusion.prediction, stage.config.distillation.guidance) == ("v", 2.0)
    assert [stage.name for stage in chain(runs, guidance=2.0, method="guidance")] == ["any"]
    assert [stage.name for stage in chain(runs, "unlabelled", method="consistency")] == [
        "any",
        "consistency",
    ]
    assert [stage.name for stage in chain(runs, guidance=2.0, method="guidance", start=64)] == [
        "any"
    ]
    # A student that says v, and is told its scale, may teach without a stage before.
    assert [stage.name for stage in chain(runs, "two", start=2)] == ["1"]


def test_a_teacher_from_diffusers_does_not_tell_its_images(runs, tmp_path):
    teacher = load_model(runs / "teacher")
    unet2d.save(tmp_path / "theirs", *teacher.description, teacher.params, "ema", 3)
    run = load_model(f"hf:{tmp_path / 'theirs'}")
    options = distillation.defaults(
        distillation.Options("hf:theirs", "", guidance=2.0, start=16), run
    )
    with pytest.raises(ValueError, match=naming("hf:theirs")):
        distillation.stages(options, run)
    found = distillation.stages(dataclasses.replace(options, data=Data(name="digits")), run)
    assert [stage.name for stage in found] == ["any", "8", "4", "2", "1"]
    training = distillation.build_training(found[0].config, SHAPE, CLASSES, run)
    state = jax.eval_shape(training.init, jax.random.key(0), run.params)
    like = {
        "image": np.zeros((8, *SHAPE), np.float32),
        "label": np.zeros(8, int),
        "index": np.zeros(8, np.uint32),
    }
    assert jax.eval_shape(training.eval_step, state.params, like, run.params).shape == ()


def test_what_takes_a_whole_network_refuses_a_student(runs, tmp_path):
    two, consistent, teacher = (
        load_model(runs / name) for name in ("two", "consistent", "teacher")
    )
    require_undistilled(teacher)
    for student in (two, consistent):
        with pytest.raises(ValueError, match=naming(student.name)):
            require_undistilled(student)
    # What goes to diffusers and back knows its steps.
    unet2d.save(tmp_path / "few", *consistent.description, consistent.params, "ema", 3)
    back = load_model(f"hf:{tmp_path / 'few'}")
    assert back.description.config.distillation == consistent.description.config.distillation
    with pytest.raises(ValueError, match=naming("UNet2DModel", "guidance")):
        unet2d.save(tmp_path / "theirs", *two.description, two.params, "ema", 3)


MISTAKES = [
    ("--teacher {runs}/gone --workdir {new}", "{runs}/gone"),
    ("--teacher {runs}/teacher --workdir {new} --method magic", ("method", "magic")),
    ("--teacher {runs}/teacher --workdir {new} --start 12", ("start", "12", "end", "1")),
    ("--teacher {runs}/teacher --workdir {new} --start 16 --end 3", ("start", "16", "end", "3")),
    ("--teacher {runs}/teacher --workdir {new} --start 4 --end 4", ("start", "end", "4")),
    (
        "--teacher {runs}/teacher --workdir {new} --start 4 --end 2 --method consistency",
        ("end", "consistency"),
    ),
    ("--teacher {runs}/teacher --workdir {new} --start 4 --end 0", ("start", "4", "end", "0")),
    ("--teacher {runs}/teacher --workdir {new}", ("start", "64", "2", "20")),
    ("--teacher {runs}/teacher --workdir {new} --start 4 --guidance 0.5", ("guidance", "0.5")),
    ("--teacher {runs}/teacher --workdir {new} --start 4 --guidance nan", ("guidance", "nan")),
    (
        "--teacher {runs}/unlabelled --workdir {new} --start 4 --guidance 2",
        ("unlabelled", "guidance"),
    ),
    (
        "--teacher {runs}/undropped --workdir {new} --start 4 --guidance 2",
        ("undropped", "label_dropout", "0"),
    ),
    (
        "--teacher {runs}/teacher --workdir {new} --method guidance",
        ("method", "guidance", "unet of teacher", "1"),
    ),
    (
        "--teacher {runs}/two --workdir {new} --method guidance",
        ("method", "guidance", "{runs.name}/two"),
    ),
    (
        "--teacher {runs}/teacher --workdir {new} --start 4 --train.label-dropout 0.1",
        "label_dropout",
    ),
    (
        "--teacher {runs}/two --workdir {new} --start 2 --guidance 2",
        ("{runs.name}/two", "guidance", "1", "3"),
    ),
    ("--teacher {runs}/two --workdir {new} --start 4", ("{runs.name}/two", "start", "2")),
    (
        "--teacher {runs}/two --workdir {new} --start 2 --prediction x0",
        ("{runs.name}/two", "prediction", "v"),
    ),
    ("--teacher {runs}/consistent --workdir {new} --start 4", "{runs.name}/consistent"),
    ("--teacher {runs}/teacher --workdir {runs}/teacher --start 4", ("{runs}/teacher", "workdir")),
    (
        "--teacher {runs}/teacher --workdir {runs}/other/notes.txt --start 4",
        ("{runs}/other/notes.txt", "workdir"),
    ),
    ("--teacher {runs}/teacher --workdir {new} --start 4 --train.steps 0", ("steps", "0")),
]


@pytest.mark.parametrize(("command", "names"), MISTAKES)
def test_mistakes_are_named_in_one_line(runs, in_suite_data, tmp_path, capsys, command, names):
    check_mistake(train.main, f"distill {command}", names, capsys, runs=runs, new=tmp_path / "new")


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("{runs}/two --guidance 4", ("{runs.name}/two", "guidance", "4", "1", "3")),
        ("{runs}/two --guidance 2 --negative 3", ("{runs.name}/two", "guidance")),
        ("{runs}/consistent --guidance 2", ("{runs.name}/consistent", "guidance")),
        (
            "{runs}/consistent --guidance 2 --worse {runs}/teacher",
            ("{runs.name}/consistent", "guidance"),
        ),
        ("{runs}/teacher --guidance 2 --worse {runs}/two", "{runs.name}/two"),
    ],
)
def test_guidance_that_a_student_cannot_have_is_named_in_one_line(runs, capsys, command, names):
    check_mistake(sample.main, command, names, capsys, runs=runs)


@pytest.mark.parametrize(
    ("main", "command", "student"),
    [
        (edit.main, "reconstruct {runs}/two", "{runs.name}/two"),
        (demo.main, "{runs}/two", "{runs.name}/two"),
        (evaluate.main, "{runs}/consistent --bits-per-dim", "{runs.name}/consistent"),
    ],
)
def test_programs_that_need_every_level_say_so(runs, in_suite_data, capsys, main, command, student):
    check_mistake(main, command, student, capsys, runs=runs)


def test_programs_say_what_a_student_was_not_distilled_for(runs, in_suite_data, tmp_path, capsys):
    two = load_model(runs / "two")
    said = distillation_warning(two, sampler.ddim(two.schedule, schedule.trailing(two.schedule, 3)))
    assert re.search(naming("ddim", 2, "trailing"), said)
    few = ["--features", "pixels", "--num", "40", "--batch", "8"]
    for steps, told in (("2", 0), ("3", 1)):
        sample.main(
            [str(runs / "two"), "--num", "8", "--steps", steps, "--out", str(tmp_path / "a.png")]
        )
        assert capsys.readouterr().out.count(said) == told
        evaluate.main([str(runs / "two"), "--steps", steps, *few])
        assert capsys.readouterr().out.count(said) == told
    frontier.main(
        [
            str(runs / "two"),
            "--samplers",
            "ddim:3",
            "--guidance",
            "1,3",
            *few,
            "--out",
            str(tmp_path),
        ]
    )
    assert capsys.readouterr().out.count(said) == 1


def test_a_sweep_takes_students_as_they_were_made(runs):
    names = ("teacher", "two", "consistent")
    options = frontier.Options(names, steps="2,20", samplers=None)
    alone = frontier.combine(options, [load_model(runs / name) for name in names[1:]])
    assert [(c.run.name.split("/")[1], c.sampler, c.plan.steps, c.scale) for c in alone] == [
        ("two", "ddim(eta=0, trailing)", 2, 1.0), ("consistent", "consistency(trailing)", 2, 1.0),
        ("two", "ddim(eta=0, trailing)", 2, 3.0),
    ]  # fmt: skip
    asked = frontier.combine(
        dataclasses.replace(options, samplers="ddim"), [load_model(runs / name) for name in names]
    )
    assert {(c.run.name, c.plan.steps) for c in asked} == {
        (load_model(runs / n).name, k) for n in names for k in (2, 20)
    }


def test_the_usual_plan_of_a_student_raises_no_doubt():
    levels = schedule.linear(1000)
    for method, steps in itertools.product(("progressive", "consistency"), range(1, 65)):
        config = student_of(method, steps)
        name, many = default_sampler(config.distillation, levels)
        run = open_fake(config, levels)
        assert (
            distillation_warning(
                run, samplers.named(name, levels, schedule.trailing(levels, many), "trailing")[0]
            )
            == ""
        )


def open_fake(config, levels):
    """A run without a network, of which only the task and the schedule are asked."""
    return TrainedModel(
        "",
        ModelInfo(config, SHAPE, CLASSES),
        lambda *_: None,
        None,
        process.PREDICTIONS["v"],
        levels,
        "ema",
        3,
    )


def test_a_chain_killed_within_a_stage_ends_as_if_never_interrupted(
    runs, program, run_program, tmp_path, capsys
):
    """Real processes: guidance and two halvings, killed in the middle of the first halving."""
    options = ["--teacher", runs / "teacher", "--start", 4, "--guidance", 2, "--train.steps", 6]
    options += ["--train.preview-every", 0, "--train.eval-every", 0, "--train.save-every", 1]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, out, err = run_program("train.py", "distill", *options, "--workdir", whole, flags=QUICK)
    assert code == 0, err
    for name, steps in (("any", 6), ("2", 12), ("1", 12)):
        assert re.search(of_steps(whole / name, 0, steps), out)
    process = program("train.py", "distill", *options, "--workdir", killed, flags=QUICK)
    while process.poll() is None and not (killed / "2" / "checkpoints" / "3").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "1").exists()
    code, out, err = run_program("train.py", "distill", *options, "--workdir", killed, flags=QUICK)
    assert code == 0, err
    assert not re.search(of_steps(killed / "any", 0, 6), out)
    assert re.search(rf"{re.escape(str(killed / 'any'))}\D+\b6\b", out)
    assert int(re.search(of_steps(killed / "2", r"(\d+)", 12), out)[1]) >= 3
    taught = [
        load_model(whole / name).description.config.distillation.teacher for name in ("2", "1")
    ]
    assert taught == [
        f"{run.name}, {describe_weights(run)}"
        for run in map(load_model, (whole / "any", whole / "2"))
    ]
    for name in ("any", "2", "1"):
        for weights in ("raw", "ema"):
            pair = [load_model(folder / name, weights=weights).params for folder in (whole, killed)]
            jax.tree.map(np.testing.assert_array_equal, *pair)
    before, after = (load_model(whole / name).params for name in ("2", "1"))
    assert any(
        (a != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    )
    # Another chain does not go on there.
    command = f"distill --teacher {runs / 'teacher'} --start 4 --guidance 3 --train.steps 6 --workdir {whole}"
    check_mistake(train.main, command, ("guidance", "2", "3"), capsys)


def test_a_student_does_not_go_on_with_another_teacher(runs):
    """One that has learned more since, or stands in its place."""
    first, second = (load_model(runs / name) for name in ("teacher", "undropped"))
    config = student_of("progressive", 2)
    ours = distillation.taught(config, first)
    assert check_resume(ours, distillation.taught(config, load_model(runs / "teacher"))) == []
    more = first._replace(params=jax.tree.map(lambda leaf: leaf + 1, first.params))
    for other in (second, more, first._replace(step=4)):
        theirs = distillation.taught(config, other)
        names = naming("teacher", ours.distillation.teacher, theirs.distillation.teacher)
        with pytest.raises(ValueError, match=names):
            check_resume(ours, theirs)


def test_two_processes_of_four_devices_distill_what_one_of_eight_does(
    runs, program, data_dir, tmp_path
):
    """Guidance in one pass and, from it, consistency, with a picture of each."""
    options = [
        "distill",
        "--teacher",
        runs / "teacher",
        "--method",
        "consistency",
        "--start",
        4,
        "--guidance",
        2,
    ]
    options += [
        "--train.steps",
        2,
        "--train.preview-every",
        2,
        "--train.eval-every",
        0,
        "--data.dir",
        data_dir,
    ]
    together = ["--distributed", f"localhost:{free_port()}", "--processes", 2, "--process"]
    flags = f"{QUICK} --xla_force_host_platform_device_count=4"
    hosts = [
        program("train.py", *options, "--workdir", tmp_path / "two", *together, i, flags=flags)
        for i in range(2)
    ]
    told = [host.communicate(timeout=400) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], told
    assert "8 x cpu" in told[0][0]
    train.main([*map(str, options), "--workdir", str(tmp_path / "one")])
    for name in ("any", "consistency"):
        one, two = (
            load_model(tmp_path / folder / name, weights="raw").params for folder in ("one", "two")
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), one, two)
        pictures = [
            Image.open(tmp_path / folder / name / "previews" / "0000002.png")
            for folder in ("one", "two")
        ]
        assert np.abs(np.subtract(*(np.asarray(picture, int) for picture in pictures))).max() <= 2
