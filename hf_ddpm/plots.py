"""Pictures for people: grids of samples, enlarged so that small images can be judged."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

TARGET = 96  # pixels an image's longer side should at least have in a grid
GAP = 4  # pixels between images


def image_grid(
    images: Sequence[Image.Image], columns: int | None = None, scale: int | None = None
) -> Image.Image:
    """One picture of many images, row by row on a grey ground.

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
        large = image.convert("RGB").resize((width * scale, height * scale), Image.Resampling.NEAREST)
        grid.paste(large, (GAP + i % columns * cell[0], GAP + i // columns * cell[1]))
    return grid


def save_image(image: Image.Image, path: Path) -> Path:
    """Write a PNG file, making its folder; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="PNG")
    return path
