"""Grids of pictures for people, enlarged so that small images can be judged, with labels, as files."""

import io
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib

# Never pyplot: no window is opened, and no global state is kept
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from hf_ddpm.checks import check_count, described
from hf_ddpm.data.pixels import to_uint8
from hf_ddpm.generation.given import as_pictures
from hf_ddpm.runtime.disk import whole_file
from hf_ddpm.runtime.messages import shorten

TARGET = 96  # pixels that an image's longer side should have at least in a grid
GAP = 4  # pixels between images
MARGIN = 6  # pixels around a label
LINE = 20  # pixels that a label's line needs
LONGEST_NAME = 24  # characters of a class's name beside its row
LARGEST = 1024  # pixels of an image's longer side that it is enlarged to for that
NOTE = "hf_ddpm"  # key of the note in a PNG file
# Kinds of file that a picture is written as, by the end of its name; PIL writes the first, matplotlib both
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}
DRAWINGS = {**FORMATS, ".pdf": "PDF", ".svg": "SVG"}
FLAT = ("1", "L", "RGB", "CMYK")  # PIL's modes that a JPEG file can have


def image_grid(images: Any, columns: int | None = None, scale: int | None = None) -> Image.Image:
    """One picture of many images, row by row on a grey ground, which is seen where they are transparent.

    Args:
        images: PIL images of one size, of any mode of 8 bits a channel; or arrays or tensors, as in
            `as_pictures`: uint8, or floating point in [−1, 1]. One image, a batch, or any iterable of images.
        columns: images in a row, by default as near to a square as possible.
        scale: whole-number enlargement without smoothing, by default so that an image has at least 96 pixels
            a side.

    Raises:
        ValueError: no images, images of several sizes or more bits, fewer than one column or a scale below
            one, or images that `as_pictures` refuses.
    """
    pictures = _pictures(images)
    sizes = sorted({image.size for image in pictures})
    if not pictures:
        raise ValueError("there are no images; allowed: at least one")
    if len(sizes) > 1:
        some = f"{sizes[:4]}{' and more' * (len(sizes) > 4)}"
        raise ValueError(f"a grid of images of sizes {some}; allowed: all of one size")
    for name, value in (("columns", columns), ("scale", scale)):
        if value is not None:
            check_count(name, value)
    width, height = sizes[0]
    scale = scale or max(1, -(-TARGET // max(width, height)))
    columns = columns or next(n for n in range(1, len(pictures) + 1) if n * n >= len(pictures))
    rows = -(-len(pictures) // columns)
    cell = (width * scale + GAP, height * scale + GAP)
    grid = Image.new("RGB", (columns * cell[0] + GAP, rows * cell[1] + GAP), (127, 127, 127))
    for i, image in enumerate(pictures):
        large = image.convert("RGBA").resize((width * scale, height * scale), Image.Resampling.NEAREST)
        grid.paste(large, (GAP + i % columns * cell[0], GAP + i // columns * cell[1]), mask=large)
    return grid


def _pictures(images: Any) -> list[Image.Image]:
    """Images in any form as PIL images; those that are PIL images already stay as they are."""
    images = [images] if isinstance(images, Image.Image) else images
    if isinstance(images, Iterable) and not isinstance(images, Tensor | str | bytes | dict):
        images = images if hasattr(images, "dtype") else list(images)
        if isinstance(images, list) and all(isinstance(image, Image.Image) for image in images):
            # PIL cuts the numbers of deep images off at 255, so that nearly all of them would be white
            if deep := [image.mode for image in images if image.mode.startswith(("I", "F"))]:
                raise ValueError(
                    f"an image has PIL mode {deep[0]}; allowed: modes of 8 bits, such as L and RGB"
                )
            return images
    return [to_pil(image) for image in to_uint8(as_pictures(images))]


def to_pil(image_uint8: Tensor) -> Image.Image:
    """One uint8 image (C, H, W) as a picture, alpha included; if C is above 4, its first channel in grey."""
    pixels = image_uint8.cpu().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels if 1 < pixels.shape[2] <= 4 else pixels[:, :, 0])


def save_image(image: Image.Image, path: str | os.PathLike[str], note: str | None = None) -> Path:
    """Write a picture to a file, whole or not at all, making its folder; returns the path.

    Args:
        image: the picture.
        path: the file; the end of its name, one of `FORMATS`, says which kind.
        note: text that is kept in a PNG file, for `read_note`; None for none.

    Raises:
        ValueError: the path is none, its end is none of `FORMATS`, or a JPEG file can't have such pixels.
        OSError: it can't be written.
    """
    path = checked_path(path)
    kind = FORMATS[path.suffix.lower()]
    if kind == "JPEG" and image.mode not in FLAT:
        raise ValueError(
            f"a picture of PIL mode {image.mode} can't be a {path.suffix} file; allowed: .png, or "
            "image.convert('RGB')"
        )
    with whole_file(path) as file:
        image.save(file, **_options(kind, note))
    return path


def _options(kind: str, note: str | None) -> dict[str, Any]:
    """How PIL writes a kind of file: without a loss where that is possible."""
    if kind == "PNG":
        texts = PngInfo()
        if note is not None:
            texts.add_text(NOTE, note)
        return {"format": kind, "pnginfo": texts}
    return {"format": kind} | {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(kind, {})


def checked_path(path: str | os.PathLike[str], formats: Sequence[str] = tuple(FORMATS)) -> Path:
    """The path of a picture.

    Args:
        path: the file, a text or a path; "~" is the home folder.
        formats: ends of the names that are allowed.

    Raises:
        ValueError: it is no path, or its name has another end.
    """
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"path is {described(path)}; allowed: the name of a file, such as 'sheet.png'")
    try:
        found = Path(path).expanduser()
        ends = found.suffix.lower()
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"path {described(str(path))} is no path of a file: {error}") from error
    if "\0" in str(found):
        raise ValueError(f"path is {described(str(path))}; allowed: a name without zero bytes")
    if ends not in formats:
        raise ValueError(f"path is {described(str(path))}; allowed: a name that ends in {', '.join(formats)}")
    return found


def png(image: Image.Image) -> bytes:
    """A picture as the content of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def figure_png(figure: Figure) -> bytes:
    """A figure as the content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=80, format="png")
    return buffer.getvalue()


def read_note(path: str | os.PathLike[str]) -> str | None:
    """The note that `save_image` put into a file; None for any other file. Pixels are not looked at."""
    path = Path(path)
    if not path.is_file():
        return None
    try:
        with Image.open(path, formats=["PNG"]) as image:
            note = image.info.get(NOTE)
    # What PIL raises on foreign bytes has no common class
    except Exception:
        return None
    return note if isinstance(note, str) else None


def is_whole(path: Path) -> bool:
    """Whether all sums in a PNG file, which has one for each of its parts, are those of its content."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
        return True
    except Exception:  # as above
        return False


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]], labels: Sequence[str], row_labels: Sequence[str] = ()
) -> Image.Image:
    """Rows of pictures of one size under column labels, and beside row labels if given.

    Args:
        rows: PIL images, row by row.
        labels: one per column, of one or more lines; they stand upright if one is wider than an image.
        row_labels: one per row; the font fits into the height of an image.

    Returns:
        The picture: labels on white, and the images of `image_grid`, each pixel enlarged equally.
    """
    pictures = [image for row in rows for image in row]
    scale = _enough(*pictures[0].size) if pictures else None
    grid = image_grid(pictures, len(labels), scale)
    width, height = (grid.width - GAP) // len(labels), (grid.height - GAP) // len(rows)
    side = min(width, height)
    above = _drawn(labels, _font(min(32, max(13, side // 7))))
    if max(label.width for label in above) > width - GAP:
        above = [label.transpose(Image.Transpose.ROTATE_90) for label in above]
    beside = _drawn(row_labels, _font(min(32, max(13, side // 7), max(7, height - GAP - 4))))
    top = max((label.height for label in above if label.width), default=0)
    left = max((label.width for label in beside), default=0)
    # A column of narrow images may be narrower than a line of its label is high
    right = max(0, (max(label.width for label in above) - width) // 2)
    top, left = top + 2 * MARGIN * bool(top), max(right, left + 2 * MARGIN * bool(left))
    sheet = Image.new("RGB", (left + grid.width + right, top + grid.height), "white")
    sheet.paste(grid, (left, top))
    for i, label in enumerate(above):
        middle = left + GAP // 2 + width * i + width // 2
        sheet.paste(label, (middle - label.width // 2, top - MARGIN - label.height))
    for i, label in enumerate(beside):
        middle = top + GAP // 2 + height * i + height // 2
        sheet.paste(label, (left - MARGIN - label.width, middle - label.height // 2))
    return sheet


def class_grid(images: Any, classes: Sequence[str]) -> Image.Image:
    """Images in rows, one for each class, with its name beside it.

    Args:
        images: as in `image_grid`.
        classes: the name of each image's class; the rows have the order in which the classes come first.
    """
    pictures = _pictures(images)
    rows: dict[str, list[Image.Image]] = {}
    for picture, name in zip(pictures, classes, strict=True):
        rows.setdefault(name, []).append(picture)
    columns = max(len(row) for row in rows.values())
    empty = Image.new("RGBA", pictures[0].size)
    filled = [row + [empty] * (columns - len(row)) for row in rows.values()]
    return labelled_grid(filled, [""] * columns, [shorten(name, LONGEST_NAME) for name in rows])


def _enough(width: int, height: int) -> int:
    """The enlargement of images under labels: a row or column is to be as high or wide as a line of text."""
    least = min(-(-LINE // min(width, height)), max(1, LARGEST // max(width, height)))
    return max(least, -(-TARGET // max(width, height)))


def plot_reconstructions(
    rows: Sequence[Sequence[Image.Image]],
    labels: Sequence[str],
    path: str | os.PathLike[str],
    row_labels: Sequence[str] = (),
) -> Path:
    """Write `labelled_grid` to a file; returns the path. Errors are those of `save_image`."""
    return save_image(labelled_grid(rows, labels, row_labels), path)


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """The font of labels, which has the letters of formulas; matplotlib brings it."""
    return ImageFont.truetype(
        os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size
    )


def _drawn(labels: Sequence[str], font: ImageFont.FreeTypeFont) -> list[Image.Image]:
    """Labels in black on white, cut to their widths, all lines of one height; an empty one has no width."""
    pen, height = ImageDraw.Draw(Image.new("RGB", (1, 1))), sum(font.getmetrics())
    drawn = []
    for label in labels:
        lines = max(1, len(label.splitlines()))
        width = int(pen.multiline_textbbox((0, 0), label, font, spacing=2)[2]) + 1 if label.strip() else 0
        image = Image.new("RGB", (width, height * lines + 2 * (lines - 1)), "white")
        if width:
            ImageDraw.Draw(image).multiline_text((0, 0), label, "black", font, spacing=2, align="center")
        drawn.append(image)
    return drawn


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure to a file, whole or not at all, making its folder; returns the path.

    Args:
        figure: the figure.
        path: the file; the end of its name, one of `DRAWINGS`, says which kind.

    Raises:
        ValueError: the path is none, or its end is none of `DRAWINGS`.
        OSError: it can't be written.
    """
    path = checked_path(path, tuple(DRAWINGS))
    with whole_file(path) as file:
        figure.savefig(file, dpi=130, format=DRAWINGS[path.suffix.lower()].lower())
    return path
