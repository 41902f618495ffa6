import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import socket
import types
from contextlib import ExitStack, nullcontext

import jax
import numpy as np
import pytest
from helpers import naming
from PIL import Image

from diffjax.build import ModelInfo, describe_model
from diffjax.config import Data
from diffjax.data.dataset import Dataset, UnreadableError
from diffjax.inference.model import load_model
from diffjax.inference.pipeline import NotFiniteError
from diffjax.nn.conditioning import LISTED, UNCONDITIONAL, ClassLabel, Fields, Vector
from diffjax.training import trainer
from diffjax.training.lock import RunLock
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
    data, warmup, run = reported
    assert re.search(naming("digits", 1500, "8x8x1", 297, "10 classes"), data)
    assert re.search(naming("train.warmup", 100, 3), warmup)
    assert all(word in run for word in (str(folder), "step 0 of 3", "digits", "batch 8"))


def test_previews_have_their_captions(trained):
    folder, _ = trained
    picture = Image.open(folder / "previews" / "0000003.png")
    width, height = picture.size
    assert (width // COLUMNS, height // (NUM // COLUMNS)) >= (48, 48 + 14)


def test_a_preview_that_is_not_finite_does_not_end_a_run(tmp_path):
    """It is told, and left out."""

    def preview(params):
        raise NotFiniteError("sample 3 is not finite")

    reported, state = [], types.SimpleNamespace(step=7, ema=[None])
    parts: tuple = None, tmp_path, state, None, None, reported.append
    session = trainer.Session(*parts, preview=preview)
    session.draw_preview(state)
    (text,) = reported
    assert re.search(naming("step", 7, 3), text)
    assert not list(tmp_path.iterdir())


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


def test_strays_are_ignored_and_named(trained, tmp_path):
    """Copies, notes and files of a desktop beside the checkpoints stay as they are."""
    folder, reported = tmp_path / "run", []
    shutil.copytree(trained[0], folder)
    places = [folder / "checkpoints" / name for name in ("backup", "3 (copy)", "007", "3.old")]
    for place in places:
        shutil.copytree(folder / "checkpoints" / "3", place)
    files = [folder / "checkpoints" / name for name in (".DS_Store", "9")]
    for file in files:
        file.write_text("")
    more = with_train(SHORT, steps=4, keep=1, eval_every=0, preview_every=0)
    assert train(more, folder, report=reported.append) == TrainResult("done", 4)
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == sorted(["4", *(path.name for path in (*places, *files))])
    assert (load_model(folder).step, trainer.stored_config(folder)) == (4, more)
    (told,) = [text for text in reported if "backup" in text]
    assert re.search(naming(folder / "checkpoints", *(p.name for p in (*places, *files))), told)


def test_a_second_training_is_told_of_the_first(trained, tmp_path):
    """It changes nothing; a training that fails to start holds no lock."""
    folder, more = tmp_path / "run", with_train(SHORT, steps=4, eval_every=0, preview_every=0)
    shutil.copytree(trained[0], folder)
    with pytest.raises(ValueError, match=naming("train.steps", 0)):
        open_session(with_train(more, steps=0), folder, report=lambda text: None)
    other = dataclasses.replace(more, data=dataclasses.replace(more.data, name="lfw"))
    with pytest.raises(ValueError, match=naming("data.name", "lfw")):
        open_session(other, folder, report=lambda text: None)
    session = open_session(more, folder, report=lambda text: None)
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match=naming(folder, socket.gethostname(), os.getpid())):
        open_session(more, folder, report=lambda text: None)
    assert sorted(folder.rglob("*")) == before
    assert folder / "lock" in before
    assert run(session) == TrainResult("done", 4)
    assert not (folder / "lock").exists()
    assert train(more, folder, report=lambda text: None) == TrainResult("already_done", 4)
    assert not (folder / "lock").exists()


def test_a_folder_that_another_training_has_begun_in(tmp_path, monkeypatch):
    """Between the look for checkpoints and the lock."""
    folder = tmp_path / "run"
    prepare = trainer.ParallelTraining.init_state

    def init_state(*args):
        write_run(folder, CONFIG)
        return prepare(*args)

    monkeypatch.setattr(trainer.ParallelTraining, "init_state", init_state)
    with pytest.raises(ValueError, match=naming(folder)):
        train(CONFIG, folder, report=lambda text: None)
    assert not (folder / "metrics.jsonl").exists()
    assert not (folder / "lock").exists()


@pytest.mark.parametrize(("index", "refused"), [(0, True), (1, True), (1, False)])
def test_one_process_locks_and_all_learn_of_it(index, refused, tmp_path, monkeypatch):
    asked = []

    def broadcast(value):
        asked.append(bool(value))
        return np.array(refused)

    monkeypatch.setattr(trainer.jax, "process_count", lambda: 2)
    monkeypatch.setattr(trainer.jax, "process_index", lambda: index)
    monkeypatch.setattr(trainer.multihost_utils, "broadcast_one_to_all", broadcast)
    first = RunLock(tmp_path, print) if refused else None
    told = pytest.raises(ValueError, match=naming(tmp_path)) if refused else nullcontext()
    with told, ExitStack() as lock:
        trainer._lock(tmp_path, print, lock)
    assert asked == [refused and index == 0]
    assert (tmp_path / "lock").exists() == (first is not None)


@pytest.mark.parametrize("done", [0, 2])
def test_what_was_trained_before_a_damaged_image_is_saved(done, tmp_path):
    """Nothing is saved where it is the first one."""
    reported, config = [], with_train(CONFIG, steps=50, save_every=40, steps_per_dispatch=2)
    session = open_session(config, tmp_path, report=reported.append)
    batches = session.batches

    def cut():
        yield from itertools.islice(batches, done + 1)
        raise UnreadableError("5.png is damaged")

    session.batches, session.damaged = cut(), {"b.png", "a.png"}
    with pytest.raises(UnreadableError, match=naming("5.png")):
        run(session)
    saved = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert saved == ([str(done)] if done else [])
    assert not (tmp_path / "lock").exists()
    assert re.search(naming(2, "a.png"), reported[-1])  # that were skipped


def test_few_images_are_trained_on(tmp_path):
    """Held-out images are needed where an evaluation is asked for, and not elsewhere."""
    np.savez(tmp_path / "few.npz", x=np.zeros((20, 8, 8, 1), np.uint8), y=np.arange(20) % 10)
    data = Data(source="npz", path=str(tmp_path / "few.npz"))
    config = dataclasses.replace(CONFIG, data=data)
    session = open_session(config, tmp_path / "run", report=lambda text: None)
    assert session.held_out == []
    assert next(session.batches)["x"].shape == (8, 8, 8, 1)
    session.lock.close()
    with pytest.raises(ValueError, match=naming("train.eval_every", 5, 8)):
        open_session(with_train(config, eval_every=5), tmp_path / "new", report=lambda text: None)


def test_classes_are_told_by_their_names():
    data = Dataset(range(70), range(8), (8, 8, 1), {})
    for names, told in (("cat", "dog"), True), (tuple(f"c{i}" for i in range(21)), False):
        info = ModelInfo(CONFIG, (8, 8, 1), ClassLabel(len(names), names=names))
        sentence = trainer._describe_data(info, data)
        found = [name for name in names if re.search(naming(name), sentence)]
        assert found == list(names[:LISTED])
        assert re.search(naming(70, 8, f"{len(names)} classes"), sentence)
        assert sentence.endswith(", ...)") != told


def test_warm_up_that_swallows_a_run_is_told():
    for warmup, steps, start, told in ((100, 3, 0, "all"), (25, 100, 0, "25"), (24, 100, 0, "")):
        config = with_train(CONFIG, warmup=warmup, steps=steps)
        sentences = trainer._warm_up(config, start)
        assert [re.search(naming(told, steps), text) is not None for text in sentences] == (
            [True] if told else []
        )
        assert trainer._warm_up(config, warmup) == []


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
        (with_train(dataclasses.replace(CONFIG, data=other), batch=48), "new", (48, 38)),
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
    with pytest.raises(ValueError, match=naming(tmp_path / "run", "class '4'")):
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
