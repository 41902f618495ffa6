"""`diffjax convert`: run folders and Hugging Face folders, both ways."""

import numpy as np
import pytest
from helpers import check_mistake

from diffjax.cli import main
from diffjax.inference.model import load_model


@pytest.fixture(scope="module")
def hub_folder(unconditional_run, tmp_path_factory):
    """A Hugging Face folder of a trained model."""
    folder = tmp_path_factory.mktemp("hub") / "theirs"
    main(["convert", str(unconditional_run), f"hf:{folder}"])
    return folder


def test_both_ways(hub_folder, tmp_path, monkeypatch, capsys):
    """Each of the three models samples the same images; notes are printed."""
    monkeypatch.chdir(tmp_path)
    source = f"hf:{hub_folder}"
    options = ["--steps", "3", "--num", "8", "--seed", "4"]
    main(["sample", source, *options, "--save", "a.npz"])
    out = capsys.readouterr().out
    notes = load_model(source).notes
    assert notes
    assert all(note in out for note in notes)
    assert (tmp_path / "runs" / "theirs" / "samples").is_dir()
    main(["convert", source, "runs/mine", "--data", "digits"])
    assert all(note in capsys.readouterr().out for note in notes)
    main(["sample", "runs/mine", *options, "--save", "b.npz"])
    main(["convert", "runs/mine", "hf:again"])
    main(["sample", "hf:again", *options, "--save", "c.npz"])
    a, b, c = (np.load(tmp_path / f"{name}.npz")["images"] for name in "abc")
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a, c)
    model = load_model("runs/mine")
    assert (model.info.config.data.name, model.step) == ("digits", 3)
    capsys.readouterr()
    check_mistake(main, f"convert {source} runs/mine", "runs/mine", capsys)
    check_mistake(main, "convert runs/mine hf:again", "config.json", capsys)


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("runs/a runs/b", "hf:"),
        ("hf:a hf:b", "hf:"),
        ("hf:{tmp}/nowhere runs/x", "{tmp}/nowhere"),
        ("runs/a hf:b --data mnist", ("data", "mnist", "runs/a")),
        ("{tmp} hf:b", "{tmp}"),
        ("hf:{hub} hf:{hub}/x --checkpoint 3", "hf:"),
        ("hf:{hub} {tmp}/new --checkpoint 3", ("hf:{hub}", "checkpoint")),
    ],
)
def test_mistakes(hub_folder, tmp_path, capsys, command, names):
    places = {"tmp": tmp_path, "hub": hub_folder}
    check_mistake(main, f"convert {command}", names, capsys, **places)
