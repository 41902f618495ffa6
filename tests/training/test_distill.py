import dataclasses
import typing
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import naming

from diffjax import loss, schedule
from diffjax.build import ModelInfo, build_optimizer
from diffjax.config import Data, check_resume
from diffjax.denoiser import from_network
from diffjax.devices import parallel
from diffjax.inference.model import load_model
from diffjax.interop import hub
from diffjax.nn.conditioning import UNCONDITIONAL, ClassLabel, Fields, Vector
from diffjax.nn.unet import UNetConfig
from diffjax.process import append_dims
from diffjax.training import distill
from diffjax.training.distill import (
    DistillOptions,
    build_distillation,
    check_workdir,
    default_options,
    plan_chain,
    student_info,
    with_teacher,
)
from diffjax.training.setup import ParallelTraining
from diffjax.training.state import init_state, step_key

from .conftest import CONFIG, LABEL, SHAPE, student_of, with_train, write_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A teacher, students of it, an unconditional model, and one without a trained null."""
    home = tmp_path_factory.mktemp("runs")
    unconditional = dataclasses.replace(CONFIG, data=Data(name="digits", conditions=()))
    write_run(home / "teacher", CONFIG)
    write_run(home / "two", student_of("progressive", 2, 3.0))
    write_run(home / "guided", student_of("guidance", 0, 3.0), seed=5)
    write_run(home / "consistent", student_of("consistency", 4))
    write_run(home / "unconditional", unconditional, UNCONDITIONAL)
    write_run(home / "undropped", with_train(CONFIG, condition_dropout=0.0))
    return {path.name: load_model(path) for path in home.iterdir()}


def info_of(config, conditioning=LABEL, shape=SHAPE):
    return ModelInfo(config, shape, conditioning)


# ------------------------------------------------------------------------------- training


def test_a_student_starts_as_its_teacher(models):
    """At any scale its output is the teacher's, to the rounding of float32."""
    teacher = models["teacher"]
    training = build_distillation(info_of(student_of("guidance", 0, 3.0)), teacher)
    params = training.init(jax.random.key(7), teacher.params).params
    x, t, label = jnp.ones((2, *SHAPE)), jnp.array([3, 12]), jnp.array([1, 7])
    scale = jnp.array([[1.0], [2.5]])
    np.testing.assert_allclose(
        training.network(params, x, t, (label, scale)),
        teacher.network(teacher.params, x, t, label),
        atol=1e-5,
    )


def x0_of(network, params, x, level, condition):
    """The estimate of x0 by a network that predicts v."""
    v = network(params, x, level.t - 1, condition)
    return append_dims(level.alpha, x) * x - append_dims(level.sigma, x) * v


def ddim(x, x0, level, to):
    """One DDIM step, as in the paper."""
    alpha, sigma, alpha_to, sigma_to = (
        append_dims(v, x) for v in (level.alpha, level.sigma, to.alpha, to.sigma)
    )
    return alpha_to * x0 + sigma_to * (x - alpha * x0) / sigma


def levels_of(method, levels, steps):
    """The levels of the student, and those of the teacher."""
    if method == "guidance":
        return np.arange(1, schedule.length(levels) + 1), None
    teacher_steps = steps * (2 if method == "progressive" else 1)
    return schedule.trailing(levels, steps), schedule.trailing(levels, teacher_steps)


@pytest.mark.parametrize(
    ("method", "steps"), [("guidance", 0), ("progressive", 2), ("consistency", 4)]
)
@pytest.mark.parametrize("name", ["teacher", "guided"])
def test_the_loss_is_that_of_the_paper(models, method, steps, name):
    """Written out for a teacher with two evaluations for guidance, and for one with one."""
    teacher, config = models[name], student_of(method, steps, 3.0)
    own, averaged = models["two"].params, models["guided"].params
    training, levels = build_distillation(info_of(config), teacher), teacher.schedule
    state = init_state(own, build_optimizer(config)[0])._replace(ema=(averaged,))
    data = np.random.default_rng(5).uniform(-1, 1, (16, *SHAPE)).astype(np.float32)
    label = np.arange(16) % 10
    batch = {"x": data, "condition": label, "index": np.arange(16, dtype=np.uint32)}
    batches = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], batch)
    found = jax.jit(training.step)(state, batches, teacher.params)[1]["loss"][0]

    t, path = levels_of(method, levels, steps)
    table = (schedule.at(levels, np.sort(t)),)
    key = step_key(config.train.seed, 0)
    noisy = loss.add_noise_to_batch(batch, key, loss.uniform, table)
    draw = partial(jax.random.uniform, shape=(1,), minval=1.0, maxval=3.0)
    scale = jax.vmap(draw)(noisy.condition_keys)

    def teacher_x0(x, level):
        if name == "guided":
            x0 = x0_of(teacher.network, teacher.params, x, level, (label, scale))
            return jnp.clip(x0, -1, 1)
        conditional = from_network(teacher.network, teacher.params, teacher.parameterization)
        x0, x0_null = (conditional(x, level, c) for c in (label, np.full(16, 10)))
        return jnp.clip(x0_null + append_dims(scale[:, 0], x) * (x0 - x0_null), -1, 1)

    def later(level, count):
        """The levels that many steps of the teacher later."""
        places = [list(path).index(int(t)) + count for t in level.t]
        return schedule.at(levels, np.append(path, 0)[places])

    (level,), x = noisy.row, noisy.x_t
    target = teacher_x0(x, level)
    if method == "consistency":
        to = later(level, 1)
        x_to = ddim(x, target, level, to)
        estimate = x0_of(training.network, averaged, x_to, to, (label, scale))
        target = jnp.where(append_dims(to.t, x) > 0, jnp.clip(estimate, -1, 1), x_to)
    elif method == "progressive":
        middle, to = later(level, 1), later(level, 2)
        x_m = ddim(x, target, level, middle)
        x_s = ddim(x_m, teacher_x0(x_m, middle), middle, to)
        alpha, sigma, alpha_s, sigma_s = (
            append_dims(v, x) for v in (level.alpha, level.sigma, to.alpha, to.sigma)
        )
        target = (x_s - sigma_s / sigma * x) / (alpha_s - sigma_s / sigma * alpha)
    alpha, sigma = append_dims(level.alpha, x), append_dims(level.sigma, x)
    v = alpha * (x - alpha * target) / sigma - sigma * target
    snr = (level.alpha / level.sigma) ** 2
    weight = jnp.maximum(snr, 1) / (snr + 1)  # truncated SNR of x0, as a weight of v
    output = training.network(own, x, level.t - 1, (label, scale))
    expected = (weight * ((output - v) ** 2).mean((1, 2, 3))).mean()
    assert float(found) == pytest.approx(float(expected), rel=2e-4)  # float32


@pytest.mark.parametrize("mode", typing.get_args(parallel.Mode))
def test_devices_and_modes(models, mode):
    """All devices train as one, with the teacher's parameters as an argument that is only read.

    The norm of the gradient is that before Adam, which would hide a constant.
    """
    teacher, config = (
        models["teacher"],
        with_train(student_of("consistency", 4, 3.0), parallel=mode),
    )
    training = build_distillation(info_of(config), teacher)
    index = np.arange(8, dtype=np.uint32)
    x = np.random.default_rng(5).uniform(-1, 1, (1, 8, *SHAPE)).astype(np.float32)
    batch = {"x": x, "condition": (index % 10).astype(np.int32)[None], "index": index[None]}
    parts = ParallelTraining(training, config.train, teacher.params)
    state = parts.init_state(7)
    assert jax.tree.map(jnp.shape, state.ema[0]) == jax.tree.map(jnp.shape, state.params)
    _, metrics = parts.step(state, batch)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(teacher.params))
    alone = jax.jit(training.init)(jax.random.key(7), teacher.params)
    _, expected = jax.jit(training.step)(alone, batch, teacher.params)
    for name in ("loss", "grad_norm"):
        assert float(metrics[name][0]) == pytest.approx(float(expected[name][0]), rel=1e-4)


@pytest.mark.parametrize("conditioning", [Vector(3), Fields((ClassLabel(4), Vector(2, "pose")))])
def test_any_condition_is_distilled(conditioning, tmp_path):
    """The teacher's null is that of its conditioning."""
    teacher = load_model(write_run(tmp_path / "teacher", CONFIG, conditioning))
    info = info_of(student_of("guidance", 0, 3.0), conditioning)
    training = build_distillation(info, teacher)
    state = jax.eval_shape(training.init, jax.random.key(0), teacher.params)
    batch = {
        "x": jnp.zeros((1, 8, *SHAPE)),
        "index": jnp.zeros((1, 8), jnp.uint32),
        "condition": jax.tree.map(lambda leaf: leaf[None], conditioning.zeros(8)),
    }
    _, metrics = jax.eval_shape(training.step, state, batch, teacher.params)
    assert metrics["loss"].shape == (1,)


def test_data_of_another_kind_are_named(models):
    teacher, config = models["teacher"], student_of("guidance", 0, 3.0)
    for info in (
        info_of(config, shape=(8, 8, 3)),
        info_of(config, ClassLabel(11)),
        info_of(config, ClassLabel(10, field="kind")),
        info_of(config, UNCONDITIONAL),
    ):
        with pytest.raises(ValueError, match=naming(teacher.name, str(info.x_shape))):
            build_distillation(info, teacher)


def test_a_student_has_its_teachers_null(models):
    """A teacher of another library may have none, where the data allows one."""
    without = ClassLabel(10, has_null_label=False)
    teacher = models["teacher"]._replace(info=info_of(CONFIG, without))
    assert student_info(info_of(CONFIG), teacher).conditioning == without


# ------------------------------------------------------------------------------- chains


def chain(teacher, **options):
    given = DistillOptions(**{"start": 16, **options})
    return plan_chain(default_options(given, teacher), teacher)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("teacher", {"guidance": 2.0}, ["any", "8", "4", "2", "1"]),
        ("teacher", {"guidance": 2.0, "end": 4}, ["any", "8", "4"]),
        ("teacher", {"guidance": 2.0, "method": "guidance"}, ["any"]),
        ("teacher", {"guidance": 2.0, "method": "guidance", "start": 64}, ["any"]),
        ("unconditional", {"method": "consistency"}, ["any", "consistency"]),
        # A student that predicts v, and takes a scale, teaches without a stage before.
        ("two", {"start": 2}, ["1"]),
        ("guided", {"method": "consistency"}, ["consistency"]),
    ],
)
def test_stages(models, name, options, expected):
    assert [stage.name for stage in chain(models[name], **options)] == expected


def test_stages_are_configured(models):
    stages = chain(models["teacher"], guidance=2.0)
    assert [stage.config.distillation.steps for stage in stages] == [0, 8, 4, 2, 1]
    assert [stage.config.train.steps for stage in stages] == [2000, 2000, 2000, 4000, 4000]
    for stage in stages:
        stage.config.check()
        distillation = stage.config.distillation
        assert (stage.config.diffusion.prediction, distillation.guidance) == ("v", 2.0)
        assert stage.config.train.learning_rate == CONFIG.train.learning_rate / 3
        assert stage.config.train.batch == CONFIG.train.batch
        assert stage.config.data == CONFIG.data


@pytest.mark.parametrize(
    ("name", "options", "names"),
    [
        ("teacher", {"start": 12}, ("start", 12, "end", 1)),
        ("teacher", {"end": 3}, ("start", 16, "end", 3)),
        ("teacher", {"start": 4, "end": 4}, ("start", "end", 4)),
        ("teacher", {"start": 4, "end": 0}, ("start", 4, "end", 0)),
        ("teacher", {"end": 2, "method": "consistency"}, ("end", 2, "consistency")),
        ("teacher", {"start": 64}, ("start", 64, 2, 20)),
        ("teacher", {"guidance": 0.5}, ("guidance", 0.5)),
        ("teacher", {"guidance": float("nan")}, ("guidance", "nan")),
        ("teacher", {"method": "guidance"}, ("method", "guidance", "small of teacher", 1)),
        ("unconditional", {"guidance": 2.0}, ("guidance", 2, "small of unconditional")),
        ("undropped", {"guidance": 2.0}, ("small of undropped", "train.condition_dropout", 0)),
        ("two", {"start": 2, "guidance": 2.0}, ("two", "guidance", 2, 1, 3)),
        ("two", {"start": 2, "method": "guidance"}, ("two", "method", "guidance")),
        ("two", {"start": 4}, ("two", "start", 4, 2)),
        ("two", {"start": 2, "prediction": "x0"}, ("two", "prediction", "x0", "v")),
        ("consistent", {"start": 4}, ("consistent", "teacher")),
    ],
)
def test_mistakes_are_named(models, name, options, names):
    with pytest.raises(ValueError, match=naming(*names)) as error:
        chain(models[name], **options)
    assert "--" not in str(error.value)


def test_students_learn_with_every_condition(models):
    options = default_options(DistillOptions(start=16), models["teacher"])
    dropped = dataclasses.replace(
        options, train=dataclasses.replace(options.train, condition_dropout=0.1)
    )
    with pytest.raises(ValueError, match=naming("train.condition_dropout", 0.1, 0)):
        plan_chain(dropped, models["teacher"])


def test_levels_of_students_are_uniform(models):
    """A teacher's normal log(sigma/alpha) would hardly draw the noisiest of few levels."""
    teacher = models["teacher"]
    train = dataclasses.replace(
        teacher.info.config.train, times="log_normal", times_mean=-1.2, times_std=1.2
    )
    config = dataclasses.replace(teacher.info.config, train=train)
    edm = teacher._replace(info=teacher.info._replace(config=config))
    for stage in plan_chain(default_options(DistillOptions(start=16), edm), edm):
        stage.config.check()
        assert stage.config.train.times == "uniform"


def test_a_published_teacher_has_unknown_data(tmp_path):
    unet = UNetConfig(channels=4, norm_groups=1, multipliers=(1,), attention=(), heads=1)
    config = dataclasses.replace(CONFIG, network=unet)
    teacher = load_model(write_run(tmp_path / "teacher", config))
    hub.save(tmp_path / "theirs", teacher.info, teacher.params, "ema", 3)
    published = load_model(f"hf:{tmp_path / 'theirs'}")
    options = default_options(DistillOptions(guidance=2.0, start=16), published)
    assert options.train.learning_rate == distill.FOREIGN_LEARNING_RATE
    with pytest.raises(ValueError, match=naming("data.name", published.name)):
        plan_chain(options, published)
    stages = plan_chain(dataclasses.replace(options, data=Data(name="digits")), published)
    assert [stage.name for stage in stages] == ["any", "8", "4", "2", "1"]
    training = build_distillation(info_of(stages[0].config), published)
    state = jax.eval_shape(training.init, jax.random.key(0), published.params)
    batch = {
        "x": np.zeros((8, *SHAPE), np.float32),
        "condition": np.zeros(8, int),
        "index": np.zeros(8, np.uint32),
    }
    found = jax.eval_shape(training.eval_step, state.params, batch, published.params)
    assert found.shape == ()


def test_another_teacher_is_refused(models):
    """One that was trained further, or stands in its place."""
    first, config = models["teacher"], student_of("progressive", 2)
    ours = with_teacher(config, first)
    assert check_resume(ours, with_teacher(config, first)) == []
    further = first._replace(params=jax.tree.map(lambda leaf: leaf + 1, first.params))
    for other in (models["undropped"], further, first._replace(step=4)):
        theirs = with_teacher(config, other)
        names = naming("teacher", ours.distillation.teacher, theirs.distillation.teacher)
        with pytest.raises(ValueError, match=names):
            check_resume(ours, theirs)


def test_students_need_a_folder_of_their_own(teacher_run, tmp_path):
    check_workdir(tmp_path / "new")
    check_workdir(tmp_path)
    (tmp_path / "file").write_text("")
    for workdir in (teacher_run, tmp_path / "file"):
        with pytest.raises(ValueError, match=naming("workdir", workdir)):
            check_workdir(workdir)
