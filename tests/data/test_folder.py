import shutil

import numpy as np
import pytest
from helpers import naming
from PIL import Image

from diffjax.data.dataset import UnreadableError
from diffjax.data.folder import load_folder


def paint(path, colour, size=(12, 9), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


@pytest.fixture
def photos(tmp_path):
    """Two classes of files of several kinds and sizes; what is no image, or hidden, is none."""
    folder = tmp_path / "photos"
    for i in range(30):
        name = f"{i:02}" + (".png", ".JPG", ".webp")[i % 3]
        paint(
            folder / ("zebra" if i % 2 else "ant") / "deep" / name,
            (8 * i, 0, 255 - 8 * i),
            (12 + i, 9),
        )
    (folder / "notes.txt").write_text("no image")
    (folder / ".cache").mkdir()
    return folder


def colours(split):
    return np.array([split[i]["image"][4, 4] for i in range(len(split))]).astype(int)


def test_sub_folders_are_classes(photos):
    loaded = load_folder(photos, 8)
    assert (loaded.image_shape, loaded.classes) == ((8, 8, 3), 2)
    assert (len(loaded.train), len(loaded.held_out)) == (27, 3)
    # The number of a file is in its colour.
    numbers = [np.round(colours(split)[:, 0] / 8).astype(int) for split in loaded[:2]]
    assert sorted(np.concatenate(numbers)) == [*range(30)]
    for split, its in zip(loaded[:2], numbers, strict=True):
        assert [split[n]["label"] for n in range(len(split))] == [i % 2 for i in its]
        expected = [[8 * i, 0, 255 - 8 * i] for i in its]
        assert np.abs(colours(split) - expected).max() <= 4  # JPEG and WebP round
    again = load_folder(photos, 8)
    assert (colours(again.held_out) == colours(loaded.held_out)).all()


def test_train_and_test_are_splits(photos, tmp_path):
    photos.rename(tmp_path / "train")
    for name in ("ant", "zebra"):
        paint(tmp_path / "test" / name / "a.png", "red")
    loaded = load_folder(tmp_path, 8)
    assert (len(loaded.train), len(loaded.held_out), loaded.classes) == (30, 2, 2)
    assert colours(loaded.held_out).tolist() == [[255, 0, 0]] * 2


def test_no_sub_folders_no_labels(tmp_path):
    for i in range(10):
        paint(tmp_path / f"{i}.png", "white")
    loaded = load_folder(tmp_path, 4, grey=True)
    assert (loaded.image_shape, loaded.classes, loaded.train[0].keys()) == ((4, 4, 1), 0, {"image"})


def test_images_are_cropped_rotated_and_opaque(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # to be turned upside down
    image = Image.new("RGBA", (16, 8), (0, 0, 255, 255))
    image.paste((255, 0, 0, 255), (4, 0, 12, 4))  # the middle: red above, then nothing
    image.paste((0, 0, 0, 0), (4, 4, 12, 8))
    for i in range(10):
        image.save(tmp_path / f"{i}.png", exif=exif)
    image_read = load_folder(tmp_path, 8).train[0]["image"]
    assert (image_read[:4] == 255).all()
    assert (image_read[4:] == [255, 0, 0]).all()


def test_damaged_file_is_loaded_when_read(photos):
    bad = sorted((photos / "zebra").rglob("*.png"))[0]
    bad.write_bytes(bad.read_bytes()[:45])
    loaded = load_folder(photos, 8)
    names = [path for path, _ in loaded.train._source]
    assert loaded.train[names.index(bad) - 1]["image"].shape == (8, 8, 3)
    with pytest.raises(UnreadableError, match=naming(bad)):
        loaded.train[names.index(bad)]
    bad.unlink()
    with pytest.raises(UnreadableError, match=naming(bad)):
        loaded.train[names.index(bad)]


@pytest.mark.parametrize("name", ["test", "validation", "val"])
def test_held_out_folder(photos, name):
    (photos / "train").mkdir()
    for label in ("ant", "zebra"):
        (photos / label).rename(photos / "train" / label)
    with pytest.raises(ValueError, match=naming(photos, "train", "test", "validation", "val")):
        load_folder(photos, 8)
    shutil.copytree(photos / "train", photos / name)
    loaded = load_folder(photos, 8)
    assert (loaded.classes, len(loaded.train), len(loaded.held_out)) == (2, 30, 30)
    # The first ones are of both classes.
    assert len({loaded.held_out[i]["label"] for i in range(8)}) == 2


BAD_FOLDERS = [
    ([], ["{folder}"]),
    (["notes.txt"], ["{folder}", "PNG", "JPEG", "WebP"]),
    (["a.png", "cats/b.png"], ["{folder}", "a.png"]),
    (["cats/notes.txt", "dogs/a.png"], ["{folder}/cats"]),
    (["a.png", "b.png", "c.png"], ["{folder}", "3", "10"]),
    (
        ["train/cats/a.png", "train/dogs/a.png", "test/cats/a.png"],
        ["dogs", "{folder}/train", "{folder}/test"],
    ),
    ([f"{i}.txt.png" for i in range(10)], ["{folder}/0.txt.png"]),
]


@pytest.mark.parametrize(("files", "names"), BAD_FOLDERS)
def test_unusable_folder(tmp_path, files, names):
    folder = tmp_path / "images"
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("no image") if ".txt" in name else paint(folder / name, "red")
    with pytest.raises(ValueError, match=naming(*(name.format(folder=folder) for name in names))):
        load_folder(folder, 8)
