"""plots.py: where each pixel of a grid comes from."""

import numpy as np
import pytest
from PIL import Image

from hf_ddpm.plots import GAP, TARGET, image_grid, save_image

GROUND = (127, 127, 127)


def pictures(count, size=(3, 2), mode="L"):
    """Images of distinct pixels: size is (width, height), as PIL has it."""
    bands = len(mode)
    values = np.arange(count * size[0] * size[1] * bands, dtype=np.uint8)
    arrays = values.reshape(count, size[1], size[0], *([bands] if bands > 1 else []))
    return [Image.fromarray(array) for array in arrays]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_every_image_is_where_it_belongs(mode):
    images, scale = pictures(5, mode=mode), 7
    grid = np.asarray(image_grid(images, columns=3, scale=scale))
    assert grid.shape == (2 * (2 * scale + GAP) + GAP, 3 * (3 * scale + GAP) + GAP, 3)
    covered = np.zeros(grid.shape[:2], bool)
    for i, image in enumerate(images):
        top, left = GAP + i // 3 * (2 * scale + GAP), GAP + i % 3 * (3 * scale + GAP)
        place = np.s_[top : top + 2 * scale, left : left + 3 * scale]
        pixels = np.asarray(image.convert("RGB"))
        np.testing.assert_array_equal(grid[place], np.kron(pixels, np.ones((scale, scale, 1), np.uint8)))
        covered[place] = True
    assert (grid[~covered] == GROUND).all()


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (4, 2), (5, 3), (9, 3), (64, 8), (100, 10)])
def test_grids_are_nearly_square(count, columns):
    width, height = image_grid(pictures(count, (4, 4)), scale=1).size
    assert (width - GAP) // (4 + GAP) == columns
    assert (height - GAP) // (4 + GAP) == -(-count // columns)


@pytest.mark.parametrize(
    ("size", "scale"), [((8, 8), 12), ((28, 28), 4), ((32, 8), 3), ((96, 96), 1), ((256, 2), 1)]
)
def test_small_images_are_enlarged(size, scale):
    grid = image_grid(pictures(1, size))
    assert grid.size == (size[0] * scale + 2 * GAP, size[1] * scale + 2 * GAP)
    assert max(size) * scale >= TARGET > max(size) * (scale - 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([],), r"sizes \[\]; allowed: at least one image, all of one size"),
        ((pictures(1) + pictures(1, (2, 3)),), r"sizes \[\(2, 3\), \(3, 2\)\]; allowed: at least one image"),
        ((pictures(1), 0), "columns is 0; allowed: whole numbers >= 1"),
        ((pictures(1), 1, -1), "scale is -1; allowed: whole numbers >= 1"),
    ],
    ids=["none", "two sizes", "columns", "scale"],
)
def test_bad_argument(arguments, words):
    with pytest.raises(ValueError, match=words):
        image_grid(*arguments)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_saved_as_lossless_png(mode, tmp_path):
    (image,) = pictures(1, mode=mode)
    path = save_image(image, tmp_path / "new" / "folder" / "image.png")
    read = Image.open(path)
    assert (read.format, read.mode) == ("PNG", mode)
    np.testing.assert_array_equal(np.asarray(read), np.asarray(image))
