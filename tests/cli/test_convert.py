"""`diffjax convert`: run folders and Hugging Face folders, both ways."""

import dataclasses
import re
import shlex

import jax
import numpy as np
import pytest
from helpers import QUIET, check_mistake

from diffjax.build import ModelInfo, build_module, init_params
from diffjax.cli import main
from diffjax.cli.convert import run_config
from diffjax.cli.train import parse
from diffjax.config import Config, Data, check_resume
from diffjax.inference.model import load_model
from diffjax.interop import hub
from diffjax.nn.conditioning import ClassLabel
from diffjax.nn.unet import UNetConfig


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


def test_the_kind_of_weights_survives(unconditional_run, tmp_path, monkeypatch):
    """Raw weights are raw in the run made of them, and in the folder made of that."""
    monkeypatch.chdir(tmp_path)
    main(["convert", str(unconditional_run), "hf:raw", "--weights", "raw"])
    main(["convert", "hf:raw", "run"])
    main(["convert", "run", "hf:again"])
    kinds = [load_model(name).weights for name in ("hf:raw", "run", "hf:again")]
    assert kinds == ["raw"] * 3


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder of a network of ten classes without a null label, whose weights are of no kind."""
    network = UNetConfig(channels=4, multipliers=(1,), norm_groups=1, middle_attention=False)
    label = ClassLabel(10, has_null_label=False)
    info = ModelInfo(Config(network=network), (8, 8, 1), label)
    params = init_params(info, build_module(info), jax.random.key(0))
    folder = tmp_path_factory.mktemp("published") / "theirs"
    hub.save(folder, info, params, "unknown", 0)
    return folder


NAMES = tuple("abcdefghij")


def write_letters(folder):
    """A configuration of data whose ten classes have names; returns its path."""
    np.savez(folder / "letters.npz", x=np.zeros((40, 8, 8, 1), np.uint8), y=np.tile(NAMES, 4))
    path = folder / "letters.py"
    path.write_text(
        "from diffjax.config import Config, Data\n"
        f"config = Config(data=Data(source='npz', path='{folder / 'letters.npz'}'))"
    )
    return str(path)


def printed_command(out):
    """The words of the training command that `diffjax convert` prints."""
    return shlex.split(re.search(r"diffjax (train .+)", out)[1])


def test_a_converted_run_is_trained_further_by_the_command_that_is_printed(
    published, tmp_path, monkeypatch, capsys
):
    """As printed, but for fewer steps; its averages are averages again, and its classes named."""
    monkeypatch.chdir(tmp_path)
    main(["convert", f"hf:{published}", "my run", "--data", write_letters(tmp_path)])
    words = printed_command(capsys.readouterr().out)
    model = load_model("my run")
    assert (model.weights, model.step, model.info.imported) == ("unknown", 0, "unknown")
    main([*words, "--train.steps", "1", "--train.batch", "8", *QUIET])
    trained = load_model("my run")
    assert (trained.weights, trained.step, trained.info.imported) == ("ema", 1, "")
    assert trained.info.conditioning == ClassLabel(10, has_null_label=False, names=NAMES)
    assert load_model("my run", weights="raw").weights == "raw"


def test_unknown_data_are_named_in_the_command_that_is_printed(
    published, tmp_path, monkeypatch, capsys
):
    """The name is the user's to give, and no other data are bound."""
    monkeypatch.chdir(tmp_path)
    main(["convert", f"hf:{published}", "run"])
    words = printed_command(capsys.readouterr().out)
    assert words[-2:] == ["--data.name", "NAME"]
    options = parse("diffjax train", [*words[1:-1], "digits"])
    stored = load_model("run").info.config
    (change,) = check_resume(stored, options.experiment)
    assert change == "data.name: hf:theirs -> digits"


def test_the_data_of_a_run(hub_folder, tmp_path):
    """Those of a configuration, by name or path, or of tfds; conditions are the model's."""
    model = load_model(f"hf:{hub_folder}")
    path = tmp_path / "mine.py"
    path.write_text(
        "from diffjax.config import Config, Data\n"
        "config = Config(data=Data(source='folder', path='photos', size=8, flip=True))"
    )
    expected = {
        "mnist": Data(name="mnist", pad=2),
        "kmnist": Data(name="kmnist"),
        str(path): Data(source="folder", path="photos", size=8, flip=True),
    }
    for name, data in expected.items():
        config = run_config(model, name)
        assert config.data == dataclasses.replace(data, conditions=())
        assert config.train.steps > model.step
    assert not run_config(model, None).data.known


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
