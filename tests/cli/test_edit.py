"""`diffjax edit`: a picture and a report of each edit."""

import re
import shutil

import numpy as np
import pytest
from helpers import check_mistake, check_told, naming
from PIL import Image

from diffjax.cli import edit, main


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "names", "rows"),
    [
        (
            "reconstruct {run} --steps 5,20 --num 3",
            ["5", "20", "0.0065", "3", "8x8x1"],
            3,
        ),
        ("interpolate {run} --num 4 --steps 10 --between 2", ["2", "4", "10"], 2),
        (
            "vary {run} --num 3 --start 100,900 --steps 10 --condition 4,5 --guidance 2",
            ["[1, 9]"],
            3,
        ),
        (
            "inpaint {run} --images {photo} {photo} --mask {mask} --steps 5 --resample 2",
            ["640x480", "RGB", "8x8", "0", "96"],
            3,
        ),
    ],
)
def test_picture_and_report(digits_run, tmp_path, capsys, in_suite_data, command, names, rows):
    photo, mask = tmp_path / "photo.jpg", tmp_path / "mask.png"
    Image.effect_noise((640, 480), 90).convert("RGB").save(photo)
    lower = np.arange(16)[:, None] >= 12
    Image.fromarray(np.where(lower, np.full((16, 16), 255), 0).astype(np.uint8)).save(mask)
    out = tmp_path / "new" / "picture.png"
    places = {"run": digits_run, "photo": photo, "mask": mask}
    words = [word.format(**places) for word in command.split()]
    main(["edit", *words, "--out", str(out)])
    printed = capsys.readouterr().out
    assert [name for name in (*names, out) if not re.search(naming(name), printed)] == [], printed
    assert np.asarray(Image.open(out)).shape[0] == rows * 52 + 4
    wide = [line for line in printed.splitlines() if len(line) > 120]
    assert [line for line in wide if str(tmp_path) not in line and "dataset" not in line] == []


def test_moved_data(painter_run, photos, tmp_path, capsys):
    """Held-out images are read where they are now, and must be there."""
    (tmp_path / "moved").symlink_to(photos)
    words = ["edit", "vary", str(painter_run), "--num", "1", "--steps", "1", "--start", "100"]
    words += ["--out", str(tmp_path / "a.png"), "--data.path"]
    main([*words, str(tmp_path / "moved")])
    assert (tmp_path / "a.png").is_file()
    with pytest.raises(SystemExit) as end:
        main([*words, str(tmp_path / "gone")])
    check_told(end.value.code, capsys.readouterr().err, ("data.path", str(tmp_path / "gone")), True)


@pytest.mark.parametrize(
    ("command", "done"),
    [
        (
            "vary {run} --start 1,60 --steps 5 --variants 2 --seed 3",
            [f"level-{level}-seed-{seed}" for level in (1, 60) for seed in (3, 4)],
        ),
        ("reconstruct {run} --steps 1,2", ["1-steps", "2-steps"]),
        ("inpaint {run} --steps 2 --variants 2", ["inpainted-seed-0", "inpainted-seed-1"]),
    ],
)
def test_edited_images(painter_run, tmp_path, capsys, command, done):
    """One file for each image and each thing that is done to it, and none is replaced."""
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f'{name}<&".png')
    folder, report = tmp_path / "edited", tmp_path / "report.md"
    words = ["edit", *command.format(run="{run}").split()]
    words[words.index("{run}")] = str(painter_run)
    words += [
        "--condition",
        "0,1",
        "--images",
        *(str(tmp_path / f'{n}<&".png') for n in ("red", "blue")),
    ]
    words += ["--out-dir", str(folder)]
    main([*words, "--report", str(report)])
    names = [
        f'{i:05}-{name}<&"-{each}.png' for i, name in enumerate(("red", "blue")) for each in done
    ]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    for name in names:
        image = np.asarray(Image.open(folder / name), float)
        assert image.shape == (8, 8, 3)
        assert (image[..., 0] > image[..., 2]).all() == ("red" in name)
    assert "2 images of 8x8x3" in report.read_text()
    assert not (painter_run / "edits").exists()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(words)
    check_told(end.value.code, capsys.readouterr().err, (str(folder), "overwrite"))
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_variants_are_those_of_their_seeds(painter_run, tmp_path):
    """Variant v of seed s is the one of seed s + v, and variants differ."""
    words = ["edit", "vary", str(painter_run), "--num", "1", "--start", "90", "--steps", "2"]
    main([*words, "--variants", "2", "--out-dir", str(tmp_path / "both")])
    main([*words, "--seed", "1", "--out-dir", str(tmp_path / "second")])
    names = [f"00000-held-out-level-90-seed-{seed}.png" for seed in (0, 1)]
    first, second = (np.asarray(Image.open(tmp_path / "both" / name)) for name in names)
    assert (first != second).any()
    assert (np.asarray(Image.open(tmp_path / "second" / names[1])) == second).all()


def test_interpolated_images(painter_run, tmp_path):
    """From the first of a pair to its second."""
    words = ["edit", "interpolate", str(painter_run), "--num", "2", "--steps", "1"]
    main([*words, "--between", "1", "--out-dir", str(tmp_path / "new")])
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        f"00000-held-out-to-00001-held-out-{weight}.png" for weight in ("0.000", "0.500", "1.000")
    ]


def test_pictures_are_kept(painter_run, tmp_path, capsys):
    """Neither a picture of before, nor an image to edit."""
    photo = tmp_path / "photo.png"
    Image.new("RGB", (8, 8), "red").save(photo)
    words = [
        "edit",
        "vary",
        str(painter_run),
        "--steps",
        "1",
        "--start",
        "9",
        "--images",
        str(photo),
    ]
    main(words)
    main(words)
    folder = painter_run / "edits"
    assert sorted(path.name for path in folder.iterdir()) == ["vary-2.png", "vary.png"]
    shutil.rmtree(folder)
    pixels = photo.read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([*words, "--out", str(photo)])
    check_told(end.value.code, capsys.readouterr().err, str(photo))
    assert photo.read_bytes() == pixels


@pytest.mark.parametrize(
    ("name", "generated"),
    [("left", 20), ("right", 20), ("top", 20), ("bottom", 20), ("center", 12)],
)
def test_regions(name, generated):
    mask = edit.read_mask(name, (8, 5, 3))
    assert (mask.shape, mask.dtype) == ((8, 5, 1), np.float32)
    assert abs((mask == 0).sum() - generated) <= 4  # an odd middle
    inside = {"left": (0, 0), "right": (0, 4), "top": (0, 0), "bottom": (7, 0), "center": (4, 2)}
    assert mask[inside[name]] == 0


BAD = {
    "inpaint {tmp}/nowhere": "{tmp}/nowhere",
    "inpaint {run} --mask lefft": ("mask", "lefft", "left", "center"),
    "inpaint {run} --mask {tmp}/file": "{tmp}/file",
    "inpaint {run} --mask {tmp}/white.png": ("mask", "black"),
    "inpaint {run} --mask {tmp}/black.png": ("mask", "white"),
    "inpaint {run} --mask {tmp}/clear.png": "{tmp}/clear.png",
    "inpaint {run} --resample 0": ("resample", "0"),
    "inpaint {run} --eta 2": ("eta", "2"),
    "inpaint {run} --steps 0": ("steps", "0", "1000"),
    "inpaint {run} --guidance 2": ("guidance", "2", "condition"),
    "inpaint {run} --guidance nan --condition 3": ("guidance", "nan"),
    "inpaint {run} --condition 10": ("condition", "10", "9"),
    "inpaint {run} --images {tmp}/none.png": "{tmp}/none.png",
    "inpaint {run} --images {tmp}/file": "{tmp}/file",
    "inpaint {run} --images {tmp}": "{tmp}",
    "inpaint {run} --out {tmp}/a.jpg": ("{tmp}/a.jpg", ".png"),
    "inpaint {run} --seed=-1": ("seed", "-1"),
    "vary {run} --start 0": ("level", "0", "1000"),
    "vary {run} --start 1001": ("level", "1001", "1000"),
    "vary {run} --start high": ("start", "high"),
    "vary {run} --num 0": ("0", "297"),
    "reconstruct {run} --steps 10,1001": ("steps", "1001", "1000"),
    "reconstruct {run} --steps ten": ("steps", "ten"),
    "reconstruct {run} --num 1000": ("1000", "297"),
    "reconstruct {run} --stepps 10": ("stepps", "steps"),
    "interpolate {run} --num 2 --condition 3,8": ("condition", "3,8"),
    "interpolate {run} --num 3": ("images", "3"),
    "interpolate {run} --between 0": ("between", "0"),
    "vary {run} --variants 0": ("variants", "0"),
    "vary {run} --variants 2 --seed 4294967295": ("seed", "4294967296"),
    "inpaint {run} --variants=-1": ("variants", "-1"),
    "vary {run} --out-dir {tmp}/file": "{tmp}/file",
    "vary {run} --out-dir {tmp}/file/new": "{tmp}/file/new",
    "vary {run} --overwrite": ("overwrite", "out_dir"),
    "vary {run} --report {tmp}/a.txt": ("{tmp}/a.txt", ".md"),
    "vary {run} --data.path {tmp}": ("data.path", "{tmp}", "digits"),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", BAD)
def test_mistakes(command, digits_run, tmp_path, capsys, in_suite_data):
    (tmp_path / "file").write_text("")
    for name in ("white", "black"):
        Image.new("L", (8, 8), name).save(tmp_path / f"{name}.png")
    Image.new("RGBA", (8, 8), (255, 255, 255, 90)).save(tmp_path / "clear.png")
    places = {"run": digits_run, "tmp": tmp_path}
    check_mistake(main, f"edit {command}", BAD[command], capsys, **places)
    assert not (digits_run / "edits").exists()
