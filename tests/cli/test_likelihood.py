"""`diffjax likelihood`: bits per dimension of held-out digits."""

import json
import re

import pytest
from helpers import check_mistake, check_told, naming

from diffjax.cli import main
from diffjax.evaluation import bits_per_dim


@pytest.mark.slow
def test_digits(digits_run, tmp_path, capsys, in_suite_data):
    """Both measures are below the 8 bits of a uniform model, and other probes hardly matter."""
    out = tmp_path / "bits.json"
    options = ["--num", "8", "--repeats", "2", "--tolerance", "1e-2", "--evaluations", "30"]
    main(["likelihood", str(digits_run), *options, "--out", str(out)])
    flow, bound = json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert re.search(naming("tsit5", "0.01", "8x8x1", "digits", "426,961"), printed)
    assert 3 < flow["bits_per_dim"] < 7
    assert 3 < bound["bits_per_dim"] < 7
    assert flow["spread"] < 0.3  # of eight images; of sixty-four, after the whole training: 0.01
    evaluations = bound["evaluations"], bound["derivatives"], bound["given"]
    assert evaluations == (31, 0, "condition")
    assert flow["evaluations"] == flow["derivatives"] > 6


def test_unsolved(unconditional_run, tmp_path, capsys, monkeypatch, in_suite_data):
    """A flow that takes too many steps is named by its image; nothing is written."""

    def measure(*arguments, **options):
        raise bits_per_dim.UnsolvedError("tolerance is 0.0001, image 1")

    monkeypatch.setattr(bits_per_dim, "measure_bits_per_dim", measure)
    out = tmp_path / "a.json"
    with pytest.raises(SystemExit) as end:
        main(["likelihood", str(unconditional_run), "--num", "2", "--out", str(out)])
    check_told(end.value.code, capsys.readouterr().err, ("1", "tolerance"), after_progress=True)
    assert not out.exists()


BAD = {
    "{tmp}/nowhere": "{tmp}/nowhere",
    "{unconditional} --num 1": ("num", "1"),
    "{unconditional} --num 298": ("298", "297"),
    "{unconditional} --probes 0": ("probes", "0"),
    "{unconditional} --repeats 0": ("repeats", "0"),
    "{unconditional} --tolerance 0": ("tolerance", "0", "0.01"),
    "{unconditional} --tolerance 0.1": ("tolerance", "0.1", "0.01"),
    "{unconditional} --weights average": ("weights", "average"),
    "{unconditional} --evaluations 1000": ("evaluations", "1000", "999"),
    "{unconditional} --variance big": ("variance", "big"),
    "{unconditional} --seed=-1": ("seed", "-1"),
    "{unconditional} --out {tmp}/a.txt": ("{tmp}/a.txt", ".json"),
    "{unconditional} --sampler ddim": ("--sampler",),
}


@pytest.mark.parametrize("command", BAD)
def test_mistakes(command, unconditional_run, tmp_path, capsys, in_suite_data):
    places = {"unconditional": unconditional_run, "tmp": tmp_path}
    check_mistake(main, f"likelihood {command}", BAD[command], capsys, **places)


def test_without_diffrax(unconditional_run, capsys, monkeypatch, in_suite_data):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    names = ("diffrax", "diffjax[diffrax]")
    check_mistake(main, f"likelihood {unconditional_run}", names, capsys)
