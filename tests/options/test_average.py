"""Averages by power functions: stored by runs of the probe, and of any length by `average`."""

import shutil

import jax
import numpy as np
import pytest
from helpers import check_mistake

from diffjax.cli import main
from diffjax.inference.model import load_model
from diffjax.training.averages import make_average
from tests.options.observations import observes
from tests.options.probe import is_same, words_of

OPTIONS = (
    "--network.fill 0.05 --network.spread 0.3 --train.learning-rate 0.2 --train.warmup 0"
    " --train.steps 20 --train.save-every 2 --train.ema 0.9 --train.decay none"
)


def trained(config, folder, lengths, more=""):
    main(
        words_of("train", config, "--workdir", folder, OPTIONS, "--train.power-ema", lengths, more)
    )
    return folder


@pytest.fixture(scope="module")
def stored(probe_config, tmp_path_factory):
    """A run that has stored averages of the lengths 0.05 and 0.1."""
    return trained(probe_config, tmp_path_factory.mktemp("average") / "run", "0.05 0.1")


def distance(tree, other):
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)


@observes("train --train.power-ema")
def test_an_average_of_another_length_is_the_tracked_one(probe_config, stored, tmp_path):
    """Those of the lengths that are stored come out as they are."""
    other = trained(probe_config, tmp_path / "other", "0.075")
    tracked = make_average(other, 0.075)
    assert tracked.stored == 10
    assert tracked.error < 1e-6
    made = make_average(stored, 0.075)
    assert (made.stored, made.step) == (20, 20)
    moved = distance(tracked.params, load_model(other, weights="raw").params)
    assert moved > 0.01
    assert distance(made.params, tracked.params) < 0.01 * moved
    nearest = min(
        distance(make_average(stored, each).params, tracked.params) for each in (0.05, 0.1)
    )
    assert distance(made.params, tracked.params) < 0.1 * nearest


@observes("average run", "average --length", "average --out", "average --checkpoint")
def test_an_average_is_a_run_of_its_own(stored, tmp_path, capsys):
    out = tmp_path / "mean"
    words = "--length", "0.08", "--checkpoint", "16", "--out", out
    main(words_of("average", stored, *words))
    assert str(out) in capsys.readouterr().out
    model = load_model(out)
    assert (model.step, model.weights) == (16, "average of 0.08")
    assert is_same(model.params, make_average(stored, 0.08, 16).params)
    assert not is_same(model.params, make_average(stored, 0.08).params)
    with pytest.raises(ValueError, match="raw"):
        load_model(out, weights="raw")
    main(words_of("sample", out, "--num 10 --steps 2 --out", tmp_path / "samples.png"))
    assert (tmp_path / "samples.png").exists()


def test_saves_without_a_step_between_them_are_one(stored, tmp_path):
    """Where all steps between two saves are skipped, the averages are the same."""
    folder = shutil.copytree(stored, tmp_path / "run")
    shutil.copytree(folder / "averages/20", folder / "averages/22")
    assert is_same(make_average(folder, 0.08).params, make_average(stored, 0.08).params)


def test_a_resumed_run_stores_the_same(probe_config, stored, tmp_path):
    """What a killed session has stored after its last checkpoint is not used."""
    folder = trained(probe_config, tmp_path / "run", "0.05 0.1", "--train.steps 10")
    for step in (12, 14):
        shutil.copytree(folder / "averages/10", folder / f"averages/{step}")
    main(words_of("train --resume", folder, "--train.steps 20"))
    steps = sorted(int(path.name) for path in (folder / "averages").iterdir())
    assert steps == list(range(2, 21, 2))
    assert is_same(make_average(folder, 0.1).params, make_average(stored, 0.1).params)


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("average {run} --length 0.3 --out {tmp}/a", ("length", "0.3")),
        ("average {run} --length 0 --out {tmp}/a", ("length", 0)),
        ("average {run} --length 0.1 --out {run}", ("{run}",)),
        ("average {run} --length 0.1 --out {tmp}/a --checkpoint 3", ("step", 3, 2, 20)),
        ("average {tmp} --length 0.1 --out {tmp}/a", ("{tmp}",)),
        ("average {plain} --length 0.1 --out {tmp}/a", ("{plain}", "train.power_ema")),
        ("train {config} --workdir {tmp}/b --train.power-ema 0.3", ("train.power_ema",)),
        ("train {config} --workdir {tmp}/b --train.power-ema 0.1 0.1", ("train.power_ema",)),
        ("train --resume {run} --train.power-ema 0.2 --train.steps 30", ("train.power_ema",)),
    ],
)
def test_mistakes(command, names, stored, run, probe_config, tmp_path, capsys):
    places = {"run": str(stored), "plain": str(run), "tmp": str(tmp_path)}
    check_mistake(main, command, tuple(map(str, names)), capsys, config=str(probe_config), **places)
