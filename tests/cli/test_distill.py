"""`diffjax distill`, and students in all commands."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from helpers import QUIET, check_mistake, naming

from diffjax import sampler, schedule
from diffjax.build import ModelInfo, build_module, build_optimizer, init_params
from diffjax.checkpoint import Checkpoints
from diffjax.cli import distill, main
from diffjax.config import Config, Data, Diffusion, Distillation, Train
from diffjax.inference.defaults import distillation_warning
from diffjax.inference.model import describe_weights, load_model
from diffjax.nn import registry
from diffjax.nn.conditioning import UNCONDITIONAL, ClassLabel
from diffjax.training.state import init_state, state_to_trees
from tests.plugin.small import SmallConfig

registry.register("small", SmallConfig)
LABELS = ClassLabel(10)
TEACHER = Config(
    data=Data(name="digits"),
    network=SmallConfig(),
    diffusion=Diffusion(schedule="cosine", T=20),
    train=Train(batch=8, save_every=1, log_every=1),
)


def write_run(folder, config, conditioning=LABELS):
    """A run folder of a network with random weights, none of them zero, of step 3."""
    info = ModelInfo(config, (8, 8, 1), conditioning)
    params = init_params(info, build_module(info), jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    state = init_state(tree.unflatten(noisy), build_optimizer(config)[0])
    checkpoints = Checkpoints(folder)
    checkpoints.save(3, state_to_trees(state._replace(step=state.step + 3)), info.to_dict())
    checkpoints.close()


def student_of(method, steps, guidance=1.0):
    return dataclasses.replace(
        TEACHER,
        distillation=Distillation(method, "a teacher", 4, steps, guidance),
        diffusion=dataclasses.replace(TEACHER.diffusion, prediction="v"),
        train=dataclasses.replace(TEACHER.train, condition_dropout=0.0, weighting="truncated_snr"),
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a teacher, of students of it, and of runs that are never guided."""
    home = tmp_path_factory.mktemp("distilled")
    unconditional = dataclasses.replace(TEACHER, data=Data(name="digits", conditions=()))
    undropped = dataclasses.replace(TEACHER.train, condition_dropout=0.0)
    write_run(home / "teacher", TEACHER)
    write_run(home / "two", student_of("progressive", 2, 3.0))
    write_run(home / "consistent", student_of("consistency", 4))
    write_run(home / "unlabelled", unconditional, UNCONDITIONAL)
    write_run(home / "undropped", dataclasses.replace(TEACHER, train=undropped))
    (home / "other").mkdir()
    (home / "other" / "notes.txt").write_text("")
    return home


MISTAKES = {
    "{runs}/gone --workdir {new}": "{runs}/gone",
    "{runs}/teacher": "--workdir",
    "{runs}/teacher --workdir {new} --method magic": ("method", "magic"),
    "{runs}/teacher --workdir {new} --start 12": ("start", "12", "end", "1"),
    "{runs}/teacher --workdir {new} --start 16 --end 3": ("start", "16", "end", "3"),
    "{runs}/teacher --workdir {new} --start 4 --end 4": ("start", "end", "4"),
    "{runs}/teacher --workdir {new} --start 4 --end 2 --method consistency": ("end", "consistency"),
    "{runs}/teacher --workdir {new} --start 4 --end 0": ("start", "4", "end", "0"),
    "{runs}/teacher --workdir {new}": ("start", "64", "2", "20"),
    "{runs}/teacher --workdir {new} --start 4 --guidance 0.5": ("guidance", "0.5"),
    "{runs}/teacher --workdir {new} --start 4 --guidance nan": ("guidance", "nan"),
    "{runs}/unlabelled --workdir {new} --start 4 --guidance 2": ("unlabelled", "guidance"),
    "{runs}/undropped --workdir {new} --start 4 --guidance 2": (
        "undropped", "condition_dropout", "0",
    ),
    "{runs}/teacher --workdir {new} --method guidance": (
        "method", "guidance", "small of teacher", "1",
    ),
    "{runs}/two --workdir {new} --method guidance": ("method", "guidance", "{runs.name}/two"),
    "{runs}/teacher --workdir {new} --start 4 --train.condition-dropout 0.1": "condition_dropout",
    "{runs}/teacher --workdir {new} --start 4 --train.stepz 3": ("train.stepz", "train.steps"),
    "{runs}/two --workdir {new} --start 2 --guidance 2": ("{runs.name}/two", "guidance", "1", "3"),
    "{runs}/two --workdir {new} --start 4": ("{runs.name}/two", "start", "2"),
    "{runs}/two --workdir {new} --start 2 --prediction x0": ("{runs.name}/two", "prediction", "v"),
    "{runs}/consistent --workdir {new} --start 4": "{runs.name}/consistent",
    "{runs}/teacher --workdir {runs}/teacher --start 4": ("{runs}/teacher", "workdir"),
    "{runs}/teacher --workdir {runs}/other/notes.txt --start 4": (
        "{runs}/other/notes.txt", "workdir",
    ),
    "{runs}/teacher --workdir {new} --start 4 --train.steps 0": ("steps", "0"),
}  # fmt: skip


@pytest.mark.parametrize("command", MISTAKES)
def test_mistakes(runs, in_suite_data, tmp_path, capsys, command):
    places = {"runs": runs, "new": tmp_path / "new"}
    check_mistake(main, f"distill {command}", MISTAKES[command], capsys, **places)


def test_defaults_of_the_teacher(runs):
    """What is not given is the teacher's, whatever the order of options."""
    words = [str(runs / "teacher"), "--train.warmup", "7", "--workdir", "x", "--guidance", "2"]
    request = distill.parse("diffjax distill", words)
    assert request.options.chain.train.batch == Train().batch
    chain = distill.parse_with_teacher(request, load_model(runs / "teacher")).chain
    assert (chain.train.batch, chain.train.warmup, chain.guidance) == (8, 7, 2.0)
    assert chain.data == TEACHER.data


def test_help(capsys):
    """Defaults that are the teacher's are not shown as values."""
    with pytest.raises(SystemExit) as end:
        main(["distill", "--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert "from the teacher" in " ".join(out.split())
    assert "tfds)" not in out
    assert "default: 2000" in out


@pytest.mark.slow
def test_chain(runs, in_suite_data, tmp_path, capsys):
    """Guidance and one halving, each the teacher of the next; then there is nothing to do."""
    words = ["distill", str(runs / "teacher"), "--workdir", str(tmp_path), *QUIET]
    words += ["--start", "4", "--end", "2", "--guidance", "2", "--train.steps", "2"]
    main(words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "any"]
    first, last = load_model(tmp_path / "any"), load_model(tmp_path / "2")
    name = f"{first.name}, {describe_weights(first)}"
    assert last.info.config.distillation == Distillation("progressive", name, 4, 2, 2.0)
    assert last.step == 4  # the last two halvings take twice the steps
    capsys.readouterr()
    main(words)
    out = capsys.readouterr().out
    assert all(re.search(rf"{re.escape(str(tmp_path / n))}\D+\b\d\b", out) for n in ("any", "2"))
    again = load_model(tmp_path / "2").params
    jax.tree.map(np.testing.assert_array_equal, again, last.params)
    # Another chain does not continue there.
    command = " ".join(words).replace("--guidance 2", "--guidance 3")
    check_mistake(main, command, ("guidance", "2", "3"), capsys)


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("{runs}/two --guidance 4", ("{runs.name}/two", "guidance", "4", "1", "3")),
        ("{runs}/two --guidance 2 --negative 3", ("{runs.name}/two", "guidance")),
        ("{runs}/consistent --guidance 2", ("{runs.name}/consistent", "guidance")),
        (
            "{runs}/consistent --guidance 2 --autoguide-with {runs}/teacher",
            ("{runs.name}/consistent", "guidance"),
        ),
        ("{runs}/teacher --guidance 2 --autoguide-with {runs}/two", "{runs.name}/two"),
    ],
)
def test_guidance_of_students(runs, capsys, command, names):
    check_mistake(main, f"sample {command}", names, capsys, runs=runs)


@pytest.mark.parametrize(
    ("command", "student"),
    [
        ("edit reconstruct {runs}/two", "{runs.name}/two"),
        ("demo {runs}/two", "{runs.name}/two"),
        ("likelihood {runs}/consistent", "{runs.name}/consistent"),
    ],
)
def test_commands_that_need_every_level(runs, in_suite_data, capsys, command, student):
    check_mistake(main, command, student, capsys, runs=runs)


@pytest.mark.slow
def test_warnings(runs, in_suite_data, tmp_path, capsys):
    """Commands warn of plans that a student was not distilled for, once."""
    two = load_model(runs / "two")
    plan = sampler.ddim(two.schedule, schedule.trailing(two.schedule, 3))
    warning = distillation_warning(two, plan)
    assert re.search(naming("ddim", 2, "trailing"), warning)
    few, out = ["--features", "pixels", "--num", "40", "--batch", "8"], str(tmp_path / "a.png")
    for steps, count in (("2", 0), ("3", 1)):
        main(["sample", str(runs / "two"), "--num", "8", "--steps", steps, "--out", out])
        assert capsys.readouterr().out.count(warning) == count
        main(["evaluate", str(runs / "two"), "--steps", steps, *few])
        assert capsys.readouterr().out.count(warning) == count
    sweep = ["--sampler", "ddim:3", "--guidance", "1,3", *few, "--out", str(tmp_path)]
    main(["frontier", str(runs / "two"), *sweep])
    assert capsys.readouterr().out.count(warning) == 1
