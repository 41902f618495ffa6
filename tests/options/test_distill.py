"""Options of `diffjax distill`: the students, and what trains them."""

import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers import check_mistake

from diffjax import loss, process, schedule
from diffjax.cli import distill, main
from diffjax.config import flat_fields
from diffjax.inference.model import load_model
from diffjax.training import distill as distillation
from diffjax.training import trainer
from diffjax.training.trainer import TrainResult
from tests.options.observations import observes
from tests.options.probe import call, words_of, write_run
from tests.options.values import DATA, TRAIN, words_from

DONE = TrainResult("already_done", 5)


def students(run, *words):
    """The students that would be trained: name, configuration, teacher and keywords of each."""
    found, teacher = [], load_model(run)

    def open_session(config, workdir, **keywords):
        found.append(SimpleNamespace(name=workdir.name, config=config, **keywords))

    def load(source, *args):
        return load_model(source, *args) if args else teacher  # a student is none yet

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "open_session", open_session)
        patch.setattr(trainer, "run", lambda session: DONE)
        patch.setattr(distill, "load_model", load)
        main(words_of("distill", run, "--workdir", run / "students", *words))
    return found


@observes("distill teacher", "distill --weights", "distill --checkpoint")
def test_teacher(run, other_run):
    """The teacher has the parameters of the checkpoint and the average that are named."""
    cases = {"": 0.5, "--weights raw": 0.4, "--checkpoint 3 --weights 0.5": 0.3}
    for words, value in cases.items():
        found = students(run, "--method consistency --start 4", words)
        assert float(found[0].teacher.params["idle"]) == pytest.approx(value)
    found = students(other_run, "--method consistency --start 4")
    assert float(found[0].teacher.params["idle"]) == pytest.approx(0.95)


@observes(
    "distill --method",
    "distill --guidance",
    "distill --start",
    "distill --end",
    "distill --prediction",
)
def test_chain(run):
    """The students are those of the method, from its start to its end."""

    def chain(*words):
        return [
            (each.name, d.method, d.start, d.steps, d.guidance, each.config.diffusion.prediction)
            for each in students(run, *words)
            for d in [each.config.distillation]
        ]

    assert chain("--start 16 --end 4") == [
        ("8", "progressive", 16, 8, 1.0, "x0"),
        ("4", "progressive", 16, 4, 1.0, "x0"),
    ]
    assert chain("--start 8 --method consistency --guidance 3 --prediction v") == [
        ("any", "guidance", 0, 0, 3.0, "v"),
        ("consistency", "consistency", 8, 8, 3.0, "v"),
    ]
    assert chain("--method guidance --guidance 2.5") == [("any", "guidance", 0, 0, 2.5, "x0")]


def test_prediction_of_students(images, tmp_path):
    """The teacher's own, with what belongs to it; another needs a first stage, and v is that of a
    teacher of eps."""
    flow = {"schedule": "flow", "prediction": "flow", "shift": 2.0, "time_scale": 7.0}
    edm = {"schedule": "edm", "prediction": "edm", "sigma_data": 0.8}
    weighted = "--prediction x0 --train.weighting edm"
    cases = [  # teacher, words, then the names of students, their prediction and its arguments
        (flow, "", (["2"], "flow", 2.0, 7.0, 0.5)),
        (flow, "--prediction v", (["any", "2"], "v", 2.0, 1000.0, 0.5)),
        (edm, "", (["2"], "edm", 1.0, 1000.0, 0.8)),
        (edm, "--prediction x0", (["any", "2"], "x0", 1.0, 1000.0, 0.5)),
        (edm, weighted, (["any", "2"], "x0", 1.0, 1000.0, 0.8)),
        ({"prediction": "eps"}, "", (["any", "2"], "v", 1.0, 1000.0, 0.5)),
    ]
    for i, (diffusion, words, expected) in enumerate(cases):
        run = write_run(tmp_path / str(i), images, {1: (0.1, 0.2, 0.3)}, **diffusion)
        found = students(run, "--start 4 --end 2", words)
        d = found[-1].config.diffusion
        names = [each.name for each in found]
        assert (names, d.prediction, d.shift, d.time_scale, d.sigma_data) == expected
        found[-1].config.check()


@observes(
    "distill --workdir",
    "distill --tensorboard",
    *(f"distill --{name}" for name in (*DATA, *TRAIN) if name != "train.condition-dropout"),
)
def test_data_and_training(run, tmp_path, monkeypatch):
    """Every option of data and training is in the configuration of a student."""
    values = DATA | TRAIN
    del values["train.condition-dropout"]
    given = f"--start 20 --end 10 {words_from(values)}"
    monkeypatch.setattr(trainer, "run", lambda session: DONE)
    arrived = call((trainer, "open_session"), "distill", run, "--workdir", tmp_path, given)
    config, folder = arrived.args_
    assert (folder, arrived.kwargs["tensorboard"]) == (tmp_path / "10", False)
    found = flat_fields(config)
    expected = {name.replace("-", "_"): value for name, (_, value) in values.items()}
    assert {name: found[name] for name in expected} == expected
    others = students(run, "--start 16 --train.steps 7 --tensorboard")
    assert [each.config.train.steps for each in others] == [7, 7, 14, 14]
    assert all(each.tensorboard for each in others)


@observes("distill --train.condition-dropout")
def test_condition_dropout(run, tmp_path, capsys):
    """Students learn with every condition: only 0 is taken, whatever the teacher's is."""
    assert load_model(run).info.config.train.condition_dropout > 0
    assert students(run, "--start 2")[0].config.train.condition_dropout == 0
    command = f"distill {run} --workdir {tmp_path} --train.condition-dropout 0.2"
    check_mistake(main, command, ("train.condition_dropout", "0.2", "0"), capsys)


def test_training_of_a_student(run, tmp_path, monkeypatch):
    """The step has the student's own options: weights, levels, rate, averages, parts and seed."""
    built, build = [], distillation.StudentTrainer.build
    monkeypatch.setattr(
        distillation.StudentTrainer,
        "build",
        staticmethod(lambda *args: built.append(build(*args)) or built[0]),
    )
    words = "--start 8 --end 4 --train.weighting sigmoid --train.times antithetic"
    words += " --train.steps 10 --train.warmup 2 --train.learning-rate 0.4 --train.decay cosine"
    words += " --train.ema 0.8 0.6 --train.accumulate 2 --train.seed 9 --train.batch 32"
    arrived = call((trainer, "run"), "distill", run, "--workdir", tmp_path, words)
    arrived.args_[0].checkpoints.close()
    student, levels = built[0], schedule.cosine(20)
    t = schedule.trailing(levels, 4)
    weights = loss.sigmoid(levels, process.PREDICTIONS["x0"])[t]
    assert np.allclose(np.sort(student.objectives.weights), np.sort(weights))
    key, index = jax.random.key(1), np.arange(8, dtype=np.uint32)
    four = schedule.at(levels, t[::-1])
    drawn = student.objectives.times(key, index, four)
    assert np.array_equal(drawn, loss.antithetic(key, index, four))
    rates = [float(student.rate(n)) for n in range(4)]
    assert rates == pytest.approx([0, 0.2, 0.4, 0.2 * (1 + math.cos(math.pi / 8))])
    step = call_of_step(student, load_model(run).params, monkeypatch)
    assert step["args"] == ((0.8, 0.6), 9)
    assert (step["accumulate"], [float(step["rate"](n)) for n in range(4)]) == (2, rates)


def call_of_step(student, params, monkeypatch):
    """The parts of a step of a student."""
    found = {}

    def make(objective, optimizer, *args, **kwargs):
        found.update(kwargs, args=args)
        return lambda state, batch, axis_name: (state, {})

    monkeypatch.setattr(distillation, "make_train_step", make)
    state = jax.eval_shape(student.init, jax.random.key(0), params)
    student.train_step(state, {}, params)
    return found
