import dataclasses
import json
import re
import shutil
import signal

import jax
import numpy as np
import pytest
from helpers import naming
from PIL import Image

from diffjax.build import describe_model
from diffjax.config import Data
from diffjax.inference.model import load_model
from diffjax.nn.conditioning import UNCONDITIONAL, Fields, Vector
from diffjax.training import trainer
from diffjax.training.preview import COLUMNS, NUM, preview_conditions
from diffjax.training.trainer import TrainResult, open_session, resume, run, train

from .conftest import CONFIG, LABEL, student_of, with_train, write_run

pytestmark = [pytest.mark.usefixtures("in_suite_data"), pytest.mark.slow]
SHORT = with_train(CONFIG, steps=3, eval_every=2, preview_every=3)


def metrics(folder):
    """The lines of metrics.jsonl but for rates."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "steps_per_second"} for line in lines]


def params(folder, weights="raw"):
    return jax.device_get(load_model(folder, weights=weights).params)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir):
    """A run folder of three steps, and what was reported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(data_dir))
        folder, reported = tmp_path_factory.mktemp("trained") / "run", []
        assert train(SHORT, folder, report=reported.append) == TrainResult("done", 3)
    return folder, reported


def test_a_run_folder(trained):
    folder, reported = trained
    names = ["checkpoints", "curve.png", "metrics.jsonl", "previews"]
    assert sorted(path.name for path in folder.iterdir()) == names
    lines = metrics(folder)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert [line["step"] for line in lines if "held_out_loss" in line] == [2, 3]
    (sentence,) = reported
    assert all(word in sentence for word in (str(folder), "step 0 of 3", "digits", "batch 8"))


def test_previews_have_their_captions(trained):
    folder, _ = trained
    picture = Image.open(folder / "previews" / "0000003.png")
    width, height = picture.size
    assert (width // COLUMNS, height // (NUM // COLUMNS)) >= (48, 48 + 14)


def test_a_run_that_is_done_stays(trained):
    folder, _ = trained
    before, reported = (folder / "metrics.jsonl").read_bytes(), []
    (folder / "curve.png").unlink()
    gone = dataclasses.replace(SHORT, data=dataclasses.replace(SHORT.data, dir="/nowhere"))
    assert train(gone, folder, report=reported.append) == TrainResult("already_done", 3)
    assert (folder / "curve.png").exists()
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert not [text for text in reported if "data.dir" not in text]


def test_fewer_steps_than_done(trained):
    """A run that has done more steps than are asked for is done."""
    folder, _ = trained
    fewer = dataclasses.replace(SHORT, train=dataclasses.replace(SHORT.train, steps=2))
    assert train(fewer, folder, report=lambda text: None) == TrainResult("already_done", 3)


def test_resuming_is_exact(trained, tmp_path):
    """Three steps are one step and then two, in another mode and in dispatches of two."""
    first = with_train(SHORT, steps=1, decay="none")
    train(first, tmp_path / "run", report=lambda text: None)
    reported = []
    rest = with_train(first, steps=3, parallel="shard_map", steps_per_dispatch=2)
    assert train(rest, tmp_path / "run", report=reported.append).status == "done"
    train(with_train(first, steps=3), tmp_path / "whole", report=lambda text: None)
    pairs = (params(tmp_path / "run"), params(tmp_path / "whole"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *pairs)
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 2, 3]
    changes = [text for text in reported if "changed" in text]
    assert len(changes) == 3
    for names in (("train.steps", 1, 3), ("train.parallel", "shard_map")):
        assert any(all(str(name) in text for name in names) for text in changes)
    assert "step 1 of 3" in reported[-1]


def test_damaged_checkpoints_are_quarantined(tmp_path):
    """Those before them are used."""
    folder, reported = tmp_path / "run", []
    config = with_train(CONFIG, steps=3)
    train(config, folder, report=lambda text: None)
    expected = params(folder)
    for step in (2, 3):
        shutil.rmtree(folder / "checkpoints" / str(step) / "ema")
    assert train(config, folder, report=reported.append).status == "done"
    jax.tree.map(np.testing.assert_array_equal, params(folder), expected)
    assert sorted(path.name for path in (folder / "damaged").iterdir()) == ["2", "3"]
    for step, text in zip((3, 2), reported, strict=False):
        assert re.search(naming(step, folder / "damaged" / str(step), 1), text)


def test_without_a_whole_checkpoint_nothing_is_touched(tmp_path):
    folder = write_run(tmp_path / "run", CONFIG)
    shutil.rmtree(folder / "checkpoints" / "3" / "ema")
    with pytest.raises(ValueError, match=naming(folder / "checkpoints" / "3")):
        train(with_train(CONFIG, steps=4), folder)
    assert not (folder / "damaged").exists()
    assert resume(trainer.Checkpoints(tmp_path / "empty"), CONFIG) is None


def test_a_signal_ends_a_run_in_order(tmp_path):
    config = with_train(CONFIG, steps=50, preview_every=2, save_every=40)
    session = open_session(config, tmp_path, report=lambda text: None)

    def interrupted(params):
        signal.raise_signal(signal.SIGTERM)
        return Image.new("RGB", (8, 8))

    session.preview = interrupted
    assert run(session) == TrainResult("interrupted", 2, signal.SIGTERM)
    assert load_model(tmp_path).step == 2
    assert not (tmp_path / "curve.png").exists()


def test_non_finite_gradients_end_a_run(tmp_path):
    config = with_train(CONFIG, steps=20, warmup=0, learning_rate=1e30, max_skipped=2)
    with pytest.raises(FloatingPointError, match=naming(2, 3, "inf")):
        train(config, tmp_path, report=lambda text: None)
    assert load_model(tmp_path).step >= 1


def test_mistakes_are_named(tmp_path, data_dir):
    (tmp_path / "file").write_text("")
    np.savez(tmp_path / "more.npz", x=np.zeros((40, 8, 8, 1), np.uint8), y=np.arange(40) % 4)
    other = Data(source="npz", path=str(tmp_path / "more.npz"))
    for config, folder, names in (
        (with_train(CONFIG, steps=0), "new", ("train.steps", 0)),
        (with_train(CONFIG, batch=12), "new", ("train.batch", 12, 8)),
        (with_train(CONFIG, accumulate=2), "new", ("train.batch", 8, 16)),
        (CONFIG, "file", ("workdir", tmp_path / "file")),
        (with_train(dataclasses.replace(CONFIG, data=other), batch=48), "new", (48, 36)),
    ):
        with pytest.raises(ValueError, match=naming(*names)):
            train(config, tmp_path / folder, report=lambda text: None)
        assert not (tmp_path / "new").exists()


def test_other_data_are_named(tmp_path):
    """The same file with other images in it."""
    path = tmp_path / "data.npz"
    np.savez(path, x=np.zeros((100, 8, 8, 1), np.uint8), y=np.arange(100) % 4)
    config = dataclasses.replace(CONFIG, data=Data(source="npz", path=str(path)))
    train(with_train(config, steps=1), tmp_path / "run", report=lambda text: None)
    np.savez(path, x=np.zeros((100, 8, 8, 1), np.uint8), y=np.arange(100) % 5)
    with pytest.raises(ValueError, match=naming(tmp_path / "run", "4 classes", "5 classes")):
        train(with_train(config, steps=2), tmp_path / "run", report=lambda text: None)


def test_vectors_are_trained_and_previewed(tmp_path):
    """Conditions that cannot be enumerated are those of the first held-out examples."""
    r = np.random.default_rng(0)
    path = tmp_path / "data.npz"
    x = r.integers(0, 255, (100, 8, 8, 1)).astype(np.uint8)
    np.savez(path, x=x, y=np.arange(100) % 4, pose=r.normal(size=(100, 3)))
    data = Data(source="npz", path=str(path), conditions=("label", "pose"))
    config = with_train(dataclasses.replace(CONFIG, data=data), steps=2, preview_every=2)
    assert train(config, tmp_path / "run", report=lambda text: None).status == "done"
    assert (tmp_path / "run" / "previews" / "0000002.png").exists()
    info = describe_model(config)
    assert load_model(tmp_path / "run").info.conditioning == info.conditioning
    assert isinstance(info.conditioning, Fields)


def test_preview_conditions():
    num, labels = preview_conditions(LABEL, [])
    assert (num, labels.tolist()) == (NUM, [i % 10 for i in range(NUM)])
    assert preview_conditions(UNCONDITIONAL, []) == (NUM, None)
    held_out = [{"image": np.zeros((8, 8, 1), np.uint8), "vector": np.full(2, i)} for i in range(3)]
    num, vectors = preview_conditions(Vector(2), held_out)
    assert (num, vectors.tolist()) == (3, [[0, 0], [1, 1], [2, 2]])


def test_a_student_is_trained(teacher_run, tmp_path):
    """From its teacher's weights; the rest of the run is like any other."""
    teacher = load_model(teacher_run)
    config = with_train(student_of("progressive", 2, 3.0), steps=2, eval_every=1, preview_every=2)
    for steps in (1, 2):
        result = train(
            with_train(config, steps=steps),
            tmp_path / "run",
            teacher=teacher,
            tensorboard=True,
            report=lambda text: None,
        )
        assert result == TrainResult("done", steps)
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "held_out_loss" in line] == [1, 2]
    student = load_model(tmp_path / "run")
    assert student.info.conditioning == teacher.info.conditioning
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 2
