"""Bits per dimension of a trained run, as a command."""

import json
import re

import jax
import numpy as np
import pytest
from helpers import check_mistake, check_told, naming

from diffjax import likelihood, sampler
from diffjax.cli import evaluate
from diffjax.inference.pipeline import load_model


@pytest.mark.usefixtures("in_suite_data")
def test_bits_per_dim_of_held_out_digits(digits_run, tmp_path, capsys):
    """Both measures say what a digit is worth, less than the 8 bits of no knowledge, and other probes hardly matter."""
    out = tmp_path / "bits.json"
    arguments = [
        "--bits-per-dim",
        "--num",
        "8",
        "--repeats",
        "2",
        "--tolerance",
        "1e-2",
        "--evaluations",
        "30",
        "--out",
    ]
    evaluate.main([str(digits_run), *arguments, str(out)])
    flow, bound = json.loads(out.read_text())
    assert re.search(naming("tsit5", "0.01", "8x8x1", "digits", "426,961"), capsys.readouterr().out)
    assert 3 < flow["bits_per_dim"] < 7
    assert 3 < bound["bits_per_dim"] < 7
    assert flow["spread"] < 0.3  # of eight images; sixty-four and a whole training: 0.01
    assert (bound["evaluations"], bound["derivatives"], bound["given"]) == (31, 0, "labels")
    assert flow["evaluations"] == flow["derivatives"] > 6


@pytest.mark.usefixtures("in_suite_data")
def test_a_flow_that_does_not_end_is_named_by_its_image(digits_run, tmp_path, capsys, monkeypatch):
    def over(function, keys, progress):
        return likelihood.Likelihood(np.zeros(2), np.ones(2), np.array([True, False]))

    monkeypatch.setattr(evaluate, "over_devices", lambda *arguments: over)
    command = "{run} --bits-per-dim --num 2 --repeats 1"
    with pytest.raises(SystemExit) as end:
        evaluate.main([*command.format(run=digits_run).split(), "--out", str(tmp_path / "a.json")])
    check_told(end.value.code, capsys.readouterr().err, ("1", "tolerance"), after_progress=True)


def test_all_images_count_once_whatever_the_batch(digits_run):
    run = load_model(digits_run)
    images = np.arange(11.0, dtype=np.float32)[:, None] * np.ones((1, 2), np.float32)
    over = evaluate.over_devices(run, images, np.arange(11), 8)
    calls = []
    found = over(
        lambda params, x0, condition, keys: x0[:, 0] + 100 * condition + 0 * jax.random.uniform(keys[0]),
        lambda index: sampler.image_keys(jax.random.key(0), index),
        calls.append,
    )
    np.testing.assert_allclose(found, 101 * np.arange(11), rtol=1e-6)
    assert calls == [1, 1]


BAD = {
    "{run} --repeats 2": ("repeats", "bits_per_dim"),
    "{run} --num 20 --batch 8": ("num", "20", "batch", "8", "5"),
    "{run} --sampler ddim,heun": ("sampler", "ddim,heun"),
    "{run} --sampler ddim --steps 0": ("steps", "0", "1000"),
    "{run} --guidance=-1": ("guidance", "-1"),
    "{run} --data cifar": ("cifar", "cifar10"),
    "{tmp}/nowhere --bits-per-dim": "{tmp}/nowhere",
    "{run} --bits-per-dim --num 1": ("num", "1"),
    "{run} --bits-per-dim --num 298": ("298", "297"),
    "{run} --bits-per-dim --probes 0": ("probes", "0"),
    "{run} --bits-per-dim --repeats 0": ("repeats", "0"),
    "{run} --bits-per-dim --tolerance 0": ("tolerance", "0", "0.01"),
    "{run} --bits-per-dim --tolerance 0.1": ("tolerance", "0.1", "0.01"),
    "{run} --bits-per-dim --weights average": ("weights", "average"),
    "{run} --bits-per-dim --evaluations 1000": ("evaluations", "1000", "999"),
    "{run} --bits-per-dim --variance big": ("variance", "big"),
    "{run} --bits-per-dim --seed=-1": ("seed", "-1"),
    "{run} --bits-per-dim --out {tmp}/a.txt": ("{tmp}/a.txt", ".json"),
}


@pytest.mark.usefixtures("in_suite_data")
@pytest.mark.parametrize("command", BAD)
def test_a_mistake_in_evaluating_is_named_in_one_line(command, digits_run, tmp_path, capsys):
    check_mistake(evaluate.main, command, BAD[command], capsys, run=digits_run, tmp=tmp_path)


@pytest.mark.usefixtures("in_suite_data")
def test_without_diffrax_the_remedy_is_named(digits_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    names = ("diffrax", "diffjax[diffrax]")
    check_mistake(evaluate.main, "{run} --bits-per-dim", names, capsys, run=digits_run, tmp=tmp_path)
