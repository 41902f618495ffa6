"""`diffjax evaluate`: one complete row, appended to a file."""

import json
import re

import pytest
from helpers import check_mistake, check_told, naming

from diffjax.cli import main
from diffjax.evaluation import quality
from diffjax.evaluation.results import QualityRow
from diffjax.inference.pipeline import NotFiniteError

FEW = ["--features", "pixels", "--num", "40", "--batch", "8"]


def rows_of(run):
    lines = (run / "evaluations.jsonl").read_text().splitlines()
    return [QualityRow(**json.loads(line)) for line in lines]


@pytest.mark.slow
def test_rows(digits_run, capsys, in_suite_data):
    """Two seeds of one sampler, by the features of a small network that is trained here."""
    options = ["--num", "80", "--batch", "16", "--sampler", "ddim:10", "--guidance", "2"]
    for seed in (0, 1):
        main(["evaluate", str(digits_run), *options, "--seed", str(seed)])
    out = capsys.readouterr().out
    first, second = rows_of(digits_run)
    assert (first.seed, second.seed, first.nfe, first.guided) == (0, 1, 20, "2")
    assert first.class_accuracy is not None
    assert first.class_accuracy > 0.5  # after a fifth of the training: five times chance
    assert 1 < first.inception_score < 10
    assert second.fd != first.fd
    assert second.fd == pytest.approx(first.fd, rel=0.5)
    assert re.search(naming("cnn-64", "digits"), first.extractor)
    words = (first.extractor, first.reference, "426,961", "ddim(eta=0, trailing)", "float32")
    assert [word for word in words if word not in out] == []


def test_default_plan(unconditional_run, capsys, in_suite_data):
    """DDIM-50 without a sampler; --steps counts unless the sampler names its own."""
    for options in (["--steps", "2"], ["--sampler", "ddim:2", "--steps", "9"]):
        main(["evaluate", str(unconditional_run), *FEW, *options])
    rows = rows_of(unconditional_run)
    assert [(row.sampler, row.steps) for row in rows] == [("ddim(eta=0, trailing)", 2)] * 2
    assert rows[0].fd == rows[1].fd
    (unconditional_run / "evaluations.jsonl").unlink()


def test_not_finite(unconditional_run, capsys, monkeypatch, in_suite_data):
    def measure(*arguments, **options):
        raise NotFiniteError("ddim(eta=0, trailing) in 1 steps is not finite")

    monkeypatch.setattr(quality, "measure", measure)
    with pytest.raises(SystemExit) as end:
        main(["evaluate", str(unconditional_run), *FEW, "--steps", "1"])
    names = ("ddim(eta=0, trailing)", "1")
    check_told(end.value.code, capsys.readouterr().err, names, after_progress=True)
    assert not (unconditional_run / "evaluations.jsonl").exists()


BAD = {
    "{tmp}/nowhere": "{tmp}/nowhere",
    "{unconditional} --num 20 --batch 8": ("num", "20", "batch", "8", "5"),
    "{unconditional} --sampler ddim,heun": ("sampler", "ddim,heun"),
    "{unconditional} --sampler ddim --steps 0": ("steps", "0", "1000"),
    "{unconditional} --guidance=-1": ("guidance", "-1"),
    "{unconditional} --guidance 2": ("guidance", "2", "unconditional"),
    "{unconditional} --seed=-1": ("seed", "-1"),
    "{unconditional} --data.config cifar": ("cifar", "cifar10"),
    "{unconditional} --features cnn3": ("features", "cnn3"),
    "{unconditional} --features inception --inception {tmp}/no.safetensors": "{tmp}/no.safetensors",
}


@pytest.mark.parametrize("command", BAD)
def test_mistakes(command, unconditional_run, tmp_path, capsys, in_suite_data):
    places = {"unconditional": unconditional_run, "tmp": tmp_path}
    check_mistake(main, f"evaluate {command}", BAD[command], capsys, **places)
