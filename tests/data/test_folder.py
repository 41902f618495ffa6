import re
import shutil
import unicodedata

import numpy as np
import pytest
from helpers import naming
from PIL import Image

from diffjax.build import load_data
from diffjax.config import Config, Data
from diffjax.data.batches import batch_stream
from diffjax.data.dataset import UnreadableError, label_fields
from diffjax.data.folder import SUFFIXES, load_folder


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
    assert (loaded.image_shape, loaded.fields) == ((8, 8, 3), label_fields(2, ["ant", "zebra"]))
    assert len(loaded.train) + len(loaded.held_out) == 30
    assert 0 < len(loaded.held_out) < 10
    # The number of a file is in its colour.
    numbers = [np.round(colours(split)[:, 0] / 8).astype(int) for split in loaded[:2]]
    assert sorted(np.concatenate(numbers)) == [*range(30)]
    for split, its in zip(loaded[:2], numbers, strict=True):
        assert [split[n]["label"] for n in range(len(split))] == [i % 2 for i in its]
        expected = [[8 * i, 0, 255 - 8 * i] for i in its]
        assert np.abs(colours(split) - expected).max() <= 4  # JPEG and WebP round
    again = load_folder(photos.rename(photos.parent / "moved"), 8)
    assert (colours(again.held_out)[:, 0] / 8).round().tolist() == numbers[1].tolist()


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


def test_files_are_held_out_by_name(tmp_path):
    """The name is the path below the folder; see `test_dataset.test_about_a_tenth_is_held_out`."""
    for i in range(40):
        paint(tmp_path / f"{i}.png", "white")
    assert [path.name for path in files(load_folder(tmp_path, 4).held_out)] == ["26.png", "11.png"]


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


def files(split):
    return [path for path, _ in split._source]


def test_classes_are_in_natural_order(tmp_path):
    for name in ("10", "2", "b10", "b9", "1"):
        for i in range(4):
            paint(tmp_path / name / f"{i}.png", "red")
    loaded = load_folder(tmp_path, 4)
    names = ["1", "2", "10", "b9", "b10"]
    assert loaded.fields == label_fields(5, names)
    labels = {path.parent.name: label for path, label in loaded.train._source}
    assert labels == {name: label for label, name in enumerate(names)}


def test_links_are_followed(tmp_path):
    """To files and folders, each folder of a class once."""
    folder, disk = tmp_path / "photos", tmp_path / "disk"
    for i in range(10):
        paint(folder / "cat" / f"{i}.png", "red")
        paint(disk / "more" / f"{i}.png", "green")
        paint(tmp_path / "dogs" / f"{i}.png", "blue")
    paint(tmp_path / "one.png", "green")
    (folder / "dog").symlink_to(tmp_path / "dogs")
    (folder / "cat" / "one.png").symlink_to(tmp_path / "one.png")
    (folder / "cat" / "disk").symlink_to(disk)
    (folder / "cat" / "again").symlink_to(disk / "more")
    (disk / "more" / "circle").symlink_to(disk)
    (folder / "cat" / "up").symlink_to(folder)
    loaded = load_folder(folder, 4)
    sources = [*loaded.train._source, *loaded.held_out._source]
    assert sorted(label for _, label in sources) == [0] * 21 + [1] * 10
    assert len({path.resolve() for path, _ in sources}) == 31


def test_files_of_all_kinds(tmp_path):
    """An animation is its first picture."""
    for suffix in SUFFIXES:
        for i in range(2):
            paint(tmp_path / f"{i}{suffix}", "red", format="JPEG" if suffix == ".jfif" else None)
    frames = [Image.new("RGB", (12, 9), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "0.gif", save_all=True, append_images=frames[1:])
    loaded = load_folder(tmp_path, 8)
    found = np.concatenate([colours(loaded.train), colours(loaded.held_out)])
    assert len(found) == 2 * len(SUFFIXES) == 18
    assert np.abs(found - [255, 0, 0]).max() <= 4
    assert loaded.notes == ()


def test_what_is_left_out_is_noted(photos):
    (photos / "ant" / "empty.png").write_bytes(b"")
    (photos / "ant" / "empty.gif").write_bytes(b"")
    (photos / "zebra" / "gone.png").symlink_to(photos / "nowhere")
    (photos / "zebra" / "raw.cr2").write_text("")
    loaded = load_folder(photos, 8)
    assert len(loaded.train) + len(loaded.held_out) == 30
    for words in (
        (2, "notes.txt"),
        (2, "empty", "ant/empty.gif"),
        (1, "broken link", "zebra/gone.png"),
    ):
        found = [note for note in loaded.notes if re.search(naming(photos, *words), note)]
        assert len(found) == 1, loaded.notes
    assert len(loaded.notes) == 3


def test_a_new_file_moves_no_other(photos):
    before = load_folder(photos, 8)
    for i in range(5):
        paint(photos / "ant" / f"new{i}.png", "red")
    after = load_folder(photos, 8)
    for old, new in zip(before[:2], after[:2], strict=True):
        assert set(files(old)) <= set(files(new))


def test_names_are_the_same_on_every_system(tmp_path):
    """Those of macOS have accents apart from their letters."""
    held_out = []
    for form in ("NFC", "NFD"):
        for i in range(100):
            paint(tmp_path / form / unicodedata.normalize(form, f"é{i:02}.png"), "red", (1, 1))
        held_out.append(
            [path.name[-6:] for path in files(load_folder(tmp_path / form, 1).held_out)]
        )
    assert held_out[0] == held_out[1]
    assert len(held_out[0]) > 3


def test_one_image_of_a_class_is_trained_on(tmp_path):
    """Whatever its name."""
    for i in range(40):
        paint(tmp_path / f"{i}" / "a.png", "red")
    for i in range(20):
        paint(tmp_path / "0" / f"{i}.png", "red")
    loaded = load_folder(tmp_path, 4)
    assert {label for _, label in loaded.train._source} == {*range(40)}
    assert {label for _, label in loaded.held_out._source} == {0}


def test_damaged_files_are_skipped(tmp_path):
    """The next one stands for them, whatever the number of processes."""
    for i in range(40):
        paint(tmp_path / f"{i}.png", (6 * i, 0, 0))
    config = Config(data=Data(source="folder", path=str(tmp_path), size=8, skip_damaged=True))
    clean = load_data(config)
    kept = [colours(split)[:, 0].tolist() for split in clean[:2]]
    assert clean.damaged == set()
    bad = [files(split._source)[i] for split in clean[:2] for i in (0, -1)][:3]
    for path in bad:
        path.write_bytes(b"no image")
    loaded = load_data(config)
    train, held_out = (colours(split)[:, 0].tolist() for split in loaded[:2])
    assert train == [kept[0][1], *kept[0][1:-1], kept[0][1]]
    assert held_out == [kept[1][1], *kept[1][1:]]
    assert len(loaded.damaged) == 3
    for path in bad:
        assert any(re.search(naming(path), error) for error in loaded.damaged)
    whole = next(batch_stream(loaded.train, 8, seed=0))["x"]
    shares = [
        next(batch_stream(loaded.train, 8, seed=0, process_index=i, process_count=2))["x"]
        for i in range(2)
    ]
    np.testing.assert_array_equal(np.concatenate(shares), whole)
    with pytest.raises(UnreadableError, match=naming(bad[0])):
        load_folder(tmp_path, 8)


BAD_FOLDERS = [
    ([], ["{folder}"]),
    (["notes.txt"], ["{folder}", "PNG", "JPEG", "WebP"]),
    (["a.png", "cats/b.png"], ["{folder}", "a.png"]),
    (["cats/notes.txt", "dogs/a.png"], ["{folder}/cats"]),
    ([f"{i}/a.png" for i in range(12)], ["{folder}", "class"]),
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
