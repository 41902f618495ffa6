import re
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import naming

from diffjax.checkpoint import Checkpoints, ema_key
from diffjax.config import Distillation
from diffjax.inference.model import describe_weights, load_model, output_folder


def write_run(folder, model, step=5, averages=1):
    """A run folder whose parameters are those of the model, plus 1, 2, ... in its averages."""
    checkpoints = Checkpoints(folder)
    trees = {
        ema_key(i): jax.tree.map(lambda leaf, i=i: leaf + 1 + i, model.params)
        for i in range(averages)
    }
    trees |= {"params": model.params, "rest": {"step": np.int32(step)}}
    checkpoints.save(step, trees, model.info.to_dict())
    checkpoints.close()
    return folder


def difference(model, other):
    """The number by which all parameters differ."""
    return jax.tree.reduce(
        max, jax.tree.map(lambda a, b: float(np.abs(a - b).max()), model.params, other.params)
    )


@pytest.mark.parametrize("kind", ["label", "fields", "unconditional"])
def test_a_run_folder_has_all_of_a_model(kind, tiny_model, tmp_path):
    model = tiny_model(kind)
    loaded = load_model(write_run(tmp_path / "run", model))
    assert loaded.info == model.info
    assert (loaded.name, loaded.weights, loaded.step) == ("tiny of run", "ema", 5)
    x = np.ones((2, 4, 4, 1), np.float32)
    condition = model.info.conditioning.zeros(2)
    expected = model.network(loaded.params, x, np.ones(2), condition)
    np.testing.assert_array_equal(loaded.network(loaded.params, x, np.ones(2), condition), expected)
    for ours, theirs in zip(loaded.schedule, model.schedule, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_each_of_the_weights_can_be_loaded(tiny_model, tmp_path):
    model = tiny_model(averages=(0.9, 0.1))
    folder = write_run(tmp_path / "run", model, averages=2)
    for weights, expected in (("raw", 0), ("ema", 1), ("0.9", 1), ("0.1", 2)):
        loaded = load_model(folder, weights=weights)
        assert (loaded.weights, difference(loaded, model)) == (weights, pytest.approx(expected))
    with pytest.raises(ValueError, match=naming("weights", "best", "ema", "raw", "0.9", "0.1")):
        load_model(folder, weights="best")


def test_the_latest_or_a_given_step_is_loaded(tiny_model, tmp_path):
    folder = write_run(tmp_path / "run", tiny_model(), step=3)
    write_run(folder, tiny_model(seed=1), step=4)
    assert load_model(folder).step == 4
    assert load_model(folder, 3).step == 3
    assert difference(load_model(folder, 3, "raw"), tiny_model()) == 0


def test_distilled_models_have_the_name_of_their_folder_too(tiny_model, tmp_path):
    model = tiny_model(distillation=Distillation(method="progressive", steps=2))
    assert load_model(write_run(tmp_path / "few" / "2", model)).name == "tiny of few/2"


def test_missing_runs_are_named(tiny_model, tmp_path):
    with pytest.raises(FileNotFoundError, match=naming(tmp_path / "nowhere")):
        load_model(tmp_path / "nowhere")
    write_run(tmp_path / "run", tiny_model())
    with pytest.raises(FileNotFoundError, match=naming(tmp_path / "run", 7, 5)):
        load_model(tmp_path / "run", 7)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_weights_that_are_not_finite_are_refused(tiny_model, tmp_path, value, weights):
    """The layer is named, of the weights that are asked for only."""
    model = tiny_model()
    params = jax.tree.map(np.array, model.params)
    params["Dense_1"]["bias"][3] = value
    spoilt = {"raw": params, "ema": jax.tree.map(lambda leaf: leaf - 1, params)}[weights]
    folder = write_run(tmp_path / "run", model._replace(params=spoilt))
    with pytest.raises(ValueError, match=naming("tiny of run", "Dense_1/bias")):
        load_model(folder, weights=weights)


@pytest.mark.parametrize("channels", [2, 4])
def test_models_of_other_channels_are_refused(tiny_model, tmp_path, channels):
    folder = write_run(tmp_path / "run", tiny_model("unconditional", shape=(4, 4, channels)))
    with pytest.raises(ValueError, match=naming("tiny of run", channels, 1, 3)):
        load_model(folder)


@pytest.mark.parametrize("kind", ["ema", "raw", "unknown"])
def test_a_converted_run_keeps_the_kind_of_its_weights(tiny_model, tmp_path, kind):
    """Its averages are what was imported; of an average there are no weights as trained."""
    model = tiny_model()
    imported = model._replace(info=model.info._replace(imported=kind))
    folder = write_run(tmp_path / "run", imported)
    for asked in ("ema", "0.999"):
        loaded = load_model(folder, weights=asked)
        assert (loaded.weights, loaded.info.imported) == (kind, kind)
    if kind == "ema":
        with pytest.raises(ValueError, match=naming("weights", "raw", "ema")):
            load_model(folder, weights="raw")
    else:
        assert load_model(folder, weights="raw").weights == kind


def test_published_folders_have_one_set_of_weights(tmp_path):
    for options, names in (
        ({"weights": "0.9"}, ("weights", "0.9")),
        ({"step": 7}, ("checkpoint", 7)),
    ):
        with pytest.raises(ValueError, match=naming(*names)):
            load_model(f"hf:{tmp_path}", **options)


def test_weights_are_described_with_their_checksum(tiny_model):
    text = describe_weights(tiny_model())
    assert re.fullmatch(r"ema, step 7, sha256:[0-9a-f]{8}", text)
    assert text != describe_weights(tiny_model(seed=1))


def test_pictures_have_a_folder():
    assert output_folder("runs/digits") == Path("runs/digits")
    assert output_folder("hf:some/where/model") == Path("runs/model")
