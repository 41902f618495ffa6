"""`diffjax edit`: a picture and a report of each edit."""

import re

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
            ["| 5 |", "| 20 |", "| 0.0065 |", "3", "8x8x1"],
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
