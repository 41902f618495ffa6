import io
import struct
import zlib

import numpy as np
import pytest
from helpers import naming
from PIL import Image, ImageSequence

from diffjax.data import image_io


def test_eight_bits_round_trip():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    floats = image_io.to_float(images)
    assert (floats.min(), floats.max(), floats.dtype) == (-1, 1, np.float32)
    assert (image_io.to_uint8(floats) == images).all()
    assert image_io.to_uint8(np.array([-9.0, 9.0])).tolist() == [0, 255]


def test_eight_bits_are_rounded():
    for shift in (-0.4, 0.4):
        levels = np.arange(256) + shift
        assert image_io.to_uint8(levels / 127.5 - 1).tolist() == [*range(256)]


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_places_every_image(channels):
    images = np.random.default_rng(0).integers(0, 255, (7, 60, 50, channels), np.uint8)
    sheet = np.asarray(
        image_io.grid(images, [str(i) for i in range(7)], columns=3, titles=["a", "bb", "ccc"])
    )
    for i, image in enumerate(images):
        found = [
            (y, x)
            for y in range(sheet.shape[0] - 59)
            for x in range(sheet.shape[1] - 49)
            if (sheet[y, x] == image[0, 0]).all() and (sheet[y : y + 60, x : x + 50] == image).all()
        ]
        assert len(found) == 1
        assert found[0][0] // 70 == i // 3


def test_grid_writes_titles_and_captions():
    """Dark on white: titles at the left of their rows, captions above their images."""
    images = np.full((4, 50, 50, 1), 255, np.uint8)
    plain = np.asarray(image_io.grid(images, columns=2))
    assert (plain == 255).all()
    for row, titles in enumerate((["title", ""], ["", "title"])):
        dark = np.argwhere((np.asarray(image_io.grid(images, None, 2, titles)) < 64).all(-1))
        assert len(dark)
        assert (dark[:, 0] // 54 == row).all()
        assert dark[:, 1].max() < image_io.grid(images, None, 2, titles).width - 2 * 54
    for i in range(4):
        captions = ["word" if i == j else "" for j in range(4)]
        dark = np.argwhere((np.asarray(image_io.grid(images, captions, 2)) < 64).all(-1))
        assert len(dark)
        assert (dark[:, 0] // 68 == i // 2).all()
        assert (dark[:, 0] % 68 < 18).all()
        assert ((dark[:, 1] - 4) // 54 == i % 2).all()


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [("0", 52, 52), ("automobile", 60, 80), ("a very long name of a class indeed", 110, 124)],
)
def test_captions_have_room(text, least, most):
    """They touch no other, and images stand below the middle of theirs."""
    images = np.full((6, 8, 8, 1), 90, np.uint8)
    sheet = np.asarray(image_io.grid(images, [text] * 6, columns=3).convert("L"))
    header, row = sheet[4:18], sheet[24:66]
    is_written, is_image = ((part < 200).any(0) for part in (header, row))
    starts = np.flatnonzero(np.diff(is_image.astype(int)) == 1) + 1
    stops = np.flatnonzero(np.diff(is_image.astype(int)) == -1) + 1
    assert (stops - starts).tolist() == [48] * 3
    (pitch,) = {*np.diff(starts)}
    assert least <= pitch <= most
    cells = [is_written[start - (pitch - 48) // 2 :][: pitch - 1] for start in starts]
    for cell in cells:
        np.testing.assert_array_equal(cell, cells[0])
        written = np.flatnonzero(cell)
        assert written[0] + written[-1] == pytest.approx(pitch - 4, abs=6)
        assert written[-1] - written[0] < pitch - 2


def test_grid_of_two_channels():
    with pytest.raises(ValueError, match=naming("channels", "2", "1", "3")):
        image_io.grid(np.zeros((1, 4, 4, 2), np.uint8))


def written(tmp_path, image, name="a.png"):
    image.save(tmp_path / name)
    return tmp_path / name


def test_fitting_image_is_unchanged(tmp_path):
    for mode, shape in [("L", (6, 4, 1)), ("RGB", (6, 4, 3))]:
        pixels = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
        path = written(tmp_path, Image.fromarray(pixels.squeeze(), mode))
        found, described = image_io.read(path, shape)
        assert (found == pixels).all()
        assert described == ""


@pytest.mark.parametrize(
    ("image", "name", "described"),
    [
        (
            Image.new("RGB", (640, 480), "red"),
            "a.jpg",
            "640x480 RGB: cut to its middle, resized to 8x8, made grey",
        ),
        (Image.new("L", (16, 16), 7), "a.png", "16x16 L: resized to 8x8"),
        (Image.new("P", (8, 8)), "a.gif", "8x8 P: made grey"),
        (
            Image.new("1", (24, 8), 1),
            "a.png",
            "24x8 1: cut to its middle, resized to 8x8, made grey",
        ),
        (Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "a.png", "8x8 RGBA: laid over white, made grey"),
        (Image.new("CMYK", (8, 8)), "a.jpg", "8x8 CMYK: made grey"),
    ],
)
def test_changes_are_described(tmp_path, image, name, described):
    path = written(tmp_path, image, name)
    found, sentence = image_io.read(path, (8, 8, 1))
    assert (found.shape, found.dtype) == ((8, 8, 1), np.uint8)
    assert sentence == f"{path} is {described}"
    assert name != "a.png" or image.mode != "RGBA" or found.min() == 255


# What a viewer shows of pixels [H, W, C], by their orientation (Exif 2.3, table 6).
SHOWN = {
    None: lambda a: a,
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
    0: lambda a: a,
    9: lambda a: a,
}


@pytest.mark.parametrize("kind", ["png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", SHOWN)
def test_exif_rotation(tmp_path, orientation, kind):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 3), np.uint8)
    shown = SHOWN[orientation](pixels)
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    options = {"lossless": True} if kind == "webp" else {}
    Image.fromarray(pixels).save(tmp_path / f"a.{kind}", exif=exif, **options)
    found, described = image_io.read(tmp_path / f"a.{kind}", shown.shape)
    np.testing.assert_array_equal(found, shown)
    assert described == ""


DAMAGED_EXIF = [
    b"no EXIF at all",
    b"Exif\0\0",
    b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",  # of 65535 entries, none is there
    b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\2\0\xff\xff\xff\xff\xff\xff\xff\xff",  # a text, far away
]


@pytest.mark.parametrize("content", DAMAGED_EXIF)
@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_damaged_exif(tmp_path, content, kind):
    Image.new("RGB", (8, 4), (200, 0, 0)).save(tmp_path / f"a.{kind}", exif=content)
    found, described = image_io.read(tmp_path / f"a.{kind}", (4, 8, 3))
    assert np.abs(found.astype(int) - [200, 0, 0]).max() <= 4
    assert described == ""


def png_with(pixels, *chunks, after=False):
    """A PNG file with chunks (name, content, checksum) before its pixels, or after them."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    content = file.getvalue()
    place = content.index(b"IEND") - 4 if after else content.index(b"IDAT") - 4
    added = b"".join(
        struct.pack(">I", len(data))
        + name
        + data
        + struct.pack(">I", zlib.crc32(name + data) ^ bad)
        for name, data, bad in chunks
    )
    return content[:place] + added + content[place:]


LONG = zlib.compress(bytes(5_000_000))
COMMENTS = {
    "compressed": (b"zTXt", b"Comment\0\0" + LONG, 0),
    "international": (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG, 0),
    "profile": (b"iCCP", b"icc\0\0" + LONG, 0),
    "damaged": (b"tEXt", b"Comment\0hello", 1),
}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", COMMENTS)
def test_comments_of_png(tmp_path, name, after):
    """Files that viewers show are read, whatever their comments."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 3), np.uint8)
    path = tmp_path / "a.png"
    path.write_bytes(png_with(pixels, COMMENTS[name], after=after))
    if not (after and name == "damaged"):
        with pytest.raises((ValueError, OSError)), Image.open(path) as image:
            image.load()
    found, described = image_io.read(path, (4, 8, 3))
    np.testing.assert_array_equal(found, pixels)
    assert described == ""


def test_files_that_are_no_images(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(ValueError, match=naming(tmp_path / "a.png", "PNG", "JPEG")):
        image_io.read(tmp_path / "a.png", (8, 8, 1))
    path = written(tmp_path, Image.new("RGB", (99, 99), "red"), "b.png")
    path.write_bytes(path.read_bytes()[:80])
    with pytest.raises(ValueError, match=naming(path, "PNG", "JPEG")) as raised:
        image_io.read(path, (8, 8, 1))
    assert str(raised.value.__cause__) in str(raised.value)  # the reason, as the decoder has it
    path = written(tmp_path, Image.fromarray(np.full((8, 8), 40000, np.uint16)), "c.png")
    with pytest.raises(ValueError, match=naming(path, "8", "I;16")):
        image_io.read(path, (8, 8, 1))
    with pytest.raises(FileNotFoundError, match=naming(tmp_path / "none.png")):
        image_io.read(tmp_path / "none.png", (8, 8, 1))


def test_animation_rests_on_the_last_frame(tmp_path):
    frames = [image_io.grid(np.full((1, 8, 8, 1), value, np.uint8)) for value in (0, 90, 180)]
    image_io.save_gif(tmp_path / "folder" / "a.gif", frames)
    animation = Image.open(tmp_path / "folder" / "a.gif")
    shown = [
        (f.convert("L").getpixel((20, 20)), f.info["duration"])
        for f in ImageSequence.Iterator(animation)
    ]
    assert [value for value, _ in shown] == [0, 90, 180]
    assert shown[-1][1] == 2000
    assert animation.info["loop"] == 0


def test_png_is_whole_or_unchanged(tmp_path):
    image_io.save_png(tmp_path / "a.png", Image.new("L", (3, 3)))
    before = (tmp_path / "a.png").read_bytes()

    class Torn:
        def save(self, path, kind):
            path.write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        image_io.save_png(tmp_path / "a.png", Torn())
    assert (tmp_path / "a.png").read_bytes() == before
