"""Options of data: the images and conditions that training reads."""

import math
import shutil

import numpy as np
import pytest
from PIL import Image

from diffjax.build import load_data
from diffjax.config import load_config
from diffjax.data import image_io, tfds
from diffjax.data.batches import batch_stream
from diffjax.data.dataset import UnreadableError
from diffjax.nn.conditioning import UNCONDITIONAL, ClassLabel, Fields, Vector
from diffjax.training import trainer
from tests.options.observations import observes
from tests.options.probe import SHAPE, call

LABEL, POSE = ClassLabel(10), Vector(3, "pose")
COLOURS = {"one": (200, 40, 0), "two": (0, 60, 220)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of 12x12 pixels in two classes, of one colour each."""
    path = tmp_path_factory.mktemp("data") / "photos"
    for name, colour in COLOURS.items():
        (path / name).mkdir(parents=True)
        for i in range(40):
            image = Image.new("RGB", (12, 12), colour)
            image.putpixel((0, 0), (i, i, i))  # no two files are the same
            image.save(path / name / f"{i}.png")
    return path


def images_of(path):
    """The images of a file as a model has them, float32 [N, H, W, C] in [-1, 1]."""
    return image_io.to_float(np.load(path)["x"])


def batch_of(config, folder, *words):
    """A batch of training, and the conditioning of the model."""
    place = trainer, "batch_stream"
    given = call(place, "train", config, "--workdir", folder / "run --train.batch 64", *words)
    return next(batch_stream(*given.args_, **given.kwargs)), given.kwargs["conditioning"]


@observes("train --data.flip")
def test_flip(probe_config, images, tmp_path):
    """Half of the images are mirrored left to right, to the pixel, or none."""
    known = {image.tobytes() for image in images_of(images)}
    shares = {}
    for option in ("--data.flip", "--data.no-flip"):
        batch, _ = batch_of(probe_config, tmp_path, option)
        plain = [image.tobytes() in known for image in batch["x"]]
        mirrored = [image[:, ::-1].tobytes() in known for image in batch["x"]]
        assert all(a != b for a, b in zip(plain, mirrored, strict=True))
        shares[option] = np.mean(mirrored)
    assert shares["--data.no-flip"] == 0
    assert abs(shares["--data.flip"] - 0.5) <= 4 * math.sqrt(0.25 / 64)


@observes("train --data.size", "train --data.pad")
def test_size_and_pad(probe_config, images, tmp_path):
    """Images are resized by the means of their pixels, and framed in black."""
    blocks = images_of(images).reshape(-1, 4, 2, 4, 2, 1).mean((2, 4))
    batch, _ = batch_of(probe_config, tmp_path, "--data.size 4 --data.pad 3")
    assert batch["x"].shape[1:] == (10, 10, 1)
    inner = batch["x"][:, 3:-3, 3:-3]
    assert (np.abs(inner[:, None] - blocks).max((2, 3, 4)).min(1) < 1 / 127).all()
    frame = np.ones((10, 10), bool)
    frame[3:-3, 3:-3] = False
    assert (batch["x"][:, frame] == -1).all()


@observes("train --data.source", "train --data.path", "train --data.grey")
def test_folder(probe_config, folder, images, tmp_path):
    """Images are those of the folder or the file, in colour or in grey."""
    words = f"--data.source folder --data.path {folder} --data.size 12"
    for option in ("--data.no-grey", "--data.grey"):
        batch, conditioning = batch_of(probe_config, tmp_path, words, option)
        colours = np.array(list(COLOURS.values())) / 127.5 - 1
        if option == "--data.grey":  # ITU-R 601
            colours = (colours @ [0.299, 0.587, 0.114])[:, None]
        assert batch["x"].shape[1:] == (12, 12, len(colours[0]))
        assert conditioning.classes == 2
        error = batch["x"][:, 5, 5] - colours[batch["condition"]]
        assert np.abs(error).max() < 1.1 / 127.5
        assert sorted(set(batch["condition"].tolist())) == [0, 1]
    path, grey = tmp_path / "rgb.npz", colours.ravel()  # those of the last option
    x = np.tile(np.uint8(list(COLOURS.values()))[:, None, None], (40, 8, 8, 1))
    x[:, 0, 0] = np.arange(80)[:, None]  # no two images are the same
    np.savez(path, x=x, y=np.arange(80) % 2)
    batch, _ = batch_of(probe_config, tmp_path, f"--data.path {path} --data.grey")
    assert batch["x"].shape[1:] == (8, 8, 1)
    assert np.abs(batch["x"][:, 5, 5, 0] - grey[batch["condition"]]).max() < 1.1 / 127.5
    source = load_data(load_config(str(probe_config))).train
    assert {source[i]["image"].tobytes() for i in range(9)} <= {
        image.tobytes() for image in np.load(images)["x"]
    }


@observes("train --data.conditions")
def test_conditions(probe_config, images, tmp_path):
    """The network gets the fields that are named, of the image that it gets."""
    stored, known = np.load(images), [image.tobytes() for image in images_of(images)]
    cases = {
        "": UNCONDITIONAL,
        "label": LABEL,
        "pose": POSE,
        "label pose": Fields((LABEL, POSE)),
    }
    for words, conditioning in cases.items():
        batch, found = batch_of(probe_config, tmp_path, "--data.conditions", words)
        assert str(found) == str(conditioning)
        rows = [known.index(image.tobytes()) for image in batch["x"]]
        columns = {"label": stored["y"][rows], "pose": stored["pose"][rows]}
        condition = batch.get("condition")
        fields = condition if isinstance(condition, dict) else {words: condition}
        assert {name for name in fields if name} == set(words.split())
        for name in words.split():
            assert np.array_equal(fields[name], columns[name])


@observes("train --data.name", "train --data.dir")
def test_tfds(tmp_path):
    """The data set is looked for by its name, in the folder."""
    words = f"--data.name digits --data.dir {tmp_path}/prepared --data.size 6"
    arrived = call((tfds, "load_tfds"), "train digits --workdir", tmp_path / "run", words)
    assert arrived.args_[:2] == ("digits", f"{tmp_path}/prepared")
    builder = tfds._builder(*arrived.args_[:2])
    assert builder.name == "digits"
    assert str(builder.data_dir).startswith(f"{tmp_path}/prepared/")
    named = call((tfds, "load_tfds"), "train digits --workdir x --data.name mnist")
    assert named.args_[:2] == ("mnist", None)
    assert tfds.describe_tfds(*arrived.args_)[0] == (6, 6, SHAPE[2])


@observes("train --data.skip-damaged")
def test_skip_damaged(probe_config, folder, tmp_path):
    """A file that is no image ends training, or the next file is read for it."""
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    for path in list(damaged.glob("one/*.png"))[1:4]:
        path.write_text("no image")
    words = f"--data.source folder --data.path {damaged} --data.size 12"
    batch, _ = batch_of(probe_config, tmp_path, words, "--data.skip-damaged")
    assert batch["x"].shape == (64, 12, 12, 3)
    with pytest.raises(UnreadableError):
        batch_of(probe_config, tmp_path, words, "--data.no-skip-damaged")
