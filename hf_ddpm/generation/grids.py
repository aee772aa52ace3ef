"""Grids of pictures for people, enlarged so that small images can be judged, and written as PNG files."""

from collections.abc import Sequence
from pathlib import Path

# Never pyplot: no window is opened, and no global state is kept
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from hf_ddpm.runtime.disk import whole_file

TARGET = 96  # pixels that an image's longer side should have at least in a grid
GAP = 4  # pixels between images
NOTE = "hf_ddpm"  # key of the note in a PNG file
LETTER = 10  # pixels of a grid that a letter of a label takes


def image_grid(
    images: Sequence[Image.Image], columns: int | None = None, scale: int | None = None
) -> Image.Image:
    """One picture of many images, row by row on a grey ground, which is seen where they are transparent.

    Args:
        images: PIL images of one size.
        columns: images in a row, by default as near to a square as possible.
        scale: whole-number enlargement without smoothing, by default so that an image has at least 96 pixels
            a side.

    Raises:
        ValueError: no images, images of several sizes, fewer than one column or a scale below one.
    """
    sizes = sorted({image.size for image in images})
    if len(sizes) != 1:
        raise ValueError(f"a grid of images of sizes {sizes}; allowed: at least one image, all of one size")
    for name, value in (("columns", columns), ("scale", scale)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value!r}; allowed: whole numbers >= 1")
    width, height = sizes[0]
    scale = scale or max(1, -(-TARGET // max(width, height)))
    columns = columns or next(n for n in range(1, len(images) + 1) if n * n >= len(images))
    rows = -(-len(images) // columns)
    cell = (width * scale + GAP, height * scale + GAP)
    grid = Image.new("RGB", (columns * cell[0] + GAP, rows * cell[1] + GAP), (127, 127, 127))
    for i, image in enumerate(images):
        large = image.convert("RGBA").resize((width * scale, height * scale), Image.Resampling.NEAREST)
        grid.paste(large, (GAP + i % columns * cell[0], GAP + i // columns * cell[1]), mask=large)
    return grid


def to_pil(image_uint8: Tensor) -> Image.Image:
    """One uint8 image (C, H, W) as a picture, alpha included; if C is above 4, its first channel in grey."""
    pixels = image_uint8.cpu().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels if 1 < pixels.shape[2] <= 4 else pixels[:, :, 0])


def save_image(image: Image.Image, path: Path, note: str | None = None) -> Path:
    """Write a PNG file, whole or not at all, making its folder; returns the path.

    Args:
        image: the picture.
        path: the file.
        note: text that is kept in the file, for `read_note`; None for none.

    Raises:
        OSError: it can't be written.
    """
    texts = PngInfo()
    if note is not None:
        texts.add_text(NOTE, note)
    with whole_file(path) as file:
        image.save(file, format="PNG", pnginfo=texts)
    return path


def read_note(path: Path) -> str | None:
    """The note that `save_image` put into a file; None for any other file. Pixels are not looked at."""
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


def plot_reconstructions(
    rows: Sequence[Sequence[Image.Image]],
    labels: Sequence[str],
    path: Path,
    row_labels: Sequence[str] = (),
) -> Path:
    """Rows of pictures of one size under column labels, and beside row labels if given; returns the path.

    Args:
        rows: PIL images, row by row.
        labels: one per column; they stand upright if an image is too narrow for the longest one.
        path: a PNG file.
        row_labels: one per row.
    """
    pictures = [image for row in rows for image in row]
    grid = image_grid(pictures, columns=len(labels))
    cell, height = (grid.width - GAP) / len(labels), (grid.height - GAP) / len(rows)
    longest = max(len(line) for label in labels for line in label.split("\n"))
    beside, upright = max(map(len, row_labels), default=0), cell < LETTER * longest
    above = longest if upright else 5
    size = (grid.width + LETTER * beside, grid.height + LETTER * above)
    figure = Figure(figsize=(size[0] / 110, size[1] / 110 + 0.1), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(grid, interpolation="nearest")
    centers = [GAP / 2 + cell * (i + 0.5) for i in range(len(labels))]
    axes.set_xticks(centers, labels, rotation=90 if upright else 0)
    axes.set_yticks([GAP / 2 + height * (i + 0.5) for i in range(len(row_labels))], row_labels)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG file, whole or not at all, making its folder; returns the path.

    Raises:
        OSError: it can't be written.
    """
    with whole_file(path) as file:
        figure.savefig(file, dpi=130, format="png")
    return path
