"""Images as arrays and as files."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from diffjax.data.files import atomic_path

CAPTION_WIDTH = 120  # pixels, of a picture in a grid
LAID_OVER = "laid over white"  # the change to transparent images
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # of Pillow
# How to turn an image upright, by its orientation in EXIF data.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_COMMENTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # chunks of comments and colour profiles


def to_float(images: np.ndarray) -> np.ndarray:
    """Convert uint8 0..255 to float32 in [-1, 1], x/127.5 - 1."""
    return images.astype(np.float32) / np.float32(127.5) - 1


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Convert [-1, 1] to uint8 0..255, round((x + 1)*127.5) clipped.

    It is the inverse of `to_float` on images of 8 bits.
    """
    return np.clip(np.round((np.asarray(images, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)


def grid(
    images: np.ndarray,
    captions: Sequence[str] | None = None,
    columns: int | None = None,
    titles: Sequence[str] | None = None,
) -> Image.Image:
    """Images in rows, each with its caption above it.

    images: uint8 [N, H, W, C]. captions: N strings. columns: None for a grid as square as possible.
    titles: one string per row, at its left. Small images are enlarged by an integer factor to 48
    pixels or more, without smoothing. Columns are as wide as the longest caption, up to 120 pixels;
    longer ones are cut.

    Raises: ValueError unless C is 1 or 3.
    """
    n, height, width, channels = images.shape
    if channels not in (1, 3):
        raise ValueError(f"images have {channels} channels, expected 1 (grey) or 3 (RGB)")
    columns = columns or int(np.ceil(np.sqrt(n)))
    zoom, gap, header = max(1, -(-48 // max(height, width))), 4, 14 if captions else 0
    font = ImageFont.load_default(12)
    captions = [_cut(caption, font) for caption in captions or ()]
    inside = max(width * zoom, *(int(np.ceil(font.getlength(text))) for text in captions), 0)
    cell_w, cell_h = inside + gap, height * zoom + header + gap
    margin = gap + int(max((font.getlength(title) + gap for title in titles or ()), default=0))
    sheet = Image.new("RGB", (margin + columns * cell_w, -(-n // columns) * cell_h + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for row, title in enumerate(titles or ()):
        center = gap + header + row * cell_h + height * zoom / 2
        draw.text((gap, center), title, fill="black", font=font, anchor="lm")
    for i, image in enumerate(images):
        x, y = margin + i % columns * cell_w, gap + i // columns * cell_h
        if captions:
            draw.text((x + inside / 2, y), captions[i], fill="black", font=font, anchor="ma")
        tile = Image.fromarray(image[..., 0] if channels == 1 else image)
        tile = tile.resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
        sheet.paste(tile, (x + (inside - tile.width) // 2, y + header))
    return sheet


def _cut(caption: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The caption, or as much of it as has room, and an ellipsis."""
    if font.getlength(caption) <= CAPTION_WIDTH:
        return caption
    cut = (f"{caption[:n]}…" for n in range(len(caption), 0, -1))
    return next((text for text in cut if font.getlength(text) <= CAPTION_WIDTH), "…")


def read(path: Path, shape: tuple[int, int, int]) -> tuple[np.ndarray, str]:
    """Read an image file as uint8 [H, W, C], with `fit`, and describe the changes.

    The description is a sentence that names the file, or "" for an image that was as expected. What
    the file holds beside its pixels, comments and EXIF data, may be damaged or of any length.

    Raises: OSError for a file that cannot be read; ValueError for one that is no image, or has more
    than 8 bits.
    """
    try:
        image = _open(path)
        pixels, changes = fit(image, shape)
    except UnidentifiedImageError:
        raise ValueError(f"{path} is no image that can be read: use a PNG or JPEG file") from None
    except IMAGE_ERRORS as error:
        if isinstance(error, OSError) and error.errno:  # an error of the file, which names it
            raise
        raise ValueError(
            f"{path} cannot be read as an image ({error}): use a PNG or JPEG file of 8 bits"
        ) from error
    was = f"{path} is {image.width}x{image.height} {image.mode}"
    return pixels, f"{was}: {', '.join(changes)}" if changes else ""


def _open(path: Path) -> Image.Image:
    """The image of a file, as viewers show it."""
    try:
        return _decode(path)
    except IMAGE_ERRORS:
        content = path.read_bytes()
        pixels = _without_comments(content)
        if pixels == content:
            raise
        return _decode(io.BytesIO(pixels))


def _decode(file: Path | io.BytesIO) -> Image.Image:
    with warnings.catch_warnings():
        # A large photograph is welcome, and so is one with damaged EXIF data.
        warnings.simplefilter("ignore")
        with Image.open(file) as image:
            image.load()
            try:
                turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
            except Exception:  # damaged EXIF data, for which libraries raise anything
                turn = None
            return image.copy() if turn is None else image.transpose(turn)


def _without_comments(content: bytes) -> bytes:
    """A PNG file without chunks that viewers pass over; other content as it is.

    Pillow reads no file with a comment or colour profile that is damaged, or of a megabyte.
    """
    start = len(PNG_SIGNATURE)
    if content[:start] != PNG_SIGNATURE:
        return content
    kept = [PNG_SIGNATURE]
    while start < len(content):
        length = int.from_bytes(content[start : start + 4], "big")
        stop = start + 12 + length  # of the chunk: length, name, content, checksum
        if content[start + 4 : start + 8] not in PNG_COMMENTS:
            kept.append(content[start:stop])
        start = stop
    return b"".join(kept)


def fit(image: Image.Image, shape: tuple[int, int, int]) -> tuple[np.ndarray, list[str]]:
    """Convert an image to uint8 [H, W, C], grey or RGB, and list the changes.

    Transparency is laid over white; the image is cropped to its center and resized.

    Raises: ValueError for pixels of more than 8 bits.
    """
    height, width, channels = shape
    mode, changes = {1: "L", 3: "RGB"}[channels], []
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"pixels of more than 8 bits, mode {image.mode}")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
        changes.append(LAID_OVER)
    if image.width * height != image.height * width:
        changes.append("cut to its middle")
    if image.size != (width, height):
        changes.append(f"resized to {width}x{height}")
    if image.mode != mode:
        changes.append("made grey" if channels == 1 else "made RGB")
    fitted = ImageOps.fit(image.convert(mode), (width, height), Image.Resampling.BOX)
    return np.asarray(fitted).reshape(shape), changes


def save_png(path: Path, picture: Image.Image) -> None:
    """Write a picture, whole or not at all: others may read it while it is written."""
    with atomic_path(path) as part:
        picture.save(part, "png")


def save_image(path: Path, image: np.ndarray) -> None:
    """Write one image as PNG, pixel by pixel. image: uint8 [H, W, C], grey or RGB."""
    save_png(path, Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image))


def save_gif(path: Path, frames: Sequence[Image.Image], seconds: float = 4.0) -> None:
    """Write an animation of about `seconds` that rests on its last picture."""
    each = max(20, round(1000 * seconds / len(frames)))
    durations = [each] * (len(frames) - 1) + [2000]
    first, *others = frames
    options = {"save_all": True, "append_images": others, "duration": durations, "loop": 0}
    with atomic_path(path) as part:
        first.save(part, "gif", **options)
