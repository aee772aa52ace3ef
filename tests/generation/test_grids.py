"""grids.py: where each pixel of a grid comes from, labels, PNG files."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_ddpm.generation.grids import GAP, TARGET, image_grid, plot_reconstructions, save_image, to_pil

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
    path = save_image(image, tmp_path / "new" / "image.png")
    read = Image.open(path)
    assert (read.format, read.mode) == ("PNG", mode)
    np.testing.assert_array_equal(np.asarray(read), np.asarray(image))


# Labelled rows of pictures


def opened(path, least=300):
    """A PNG file of a size to look at, that isn't blank."""
    with Image.open(path) as picture:
        assert picture.format == "PNG" and all(least < side < 4000 for side in picture.size)
        array = np.asarray(picture.convert("RGB"))
    assert array.std() > 1
    return array


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_reconstructions(mode, tmp_path):
    ink = {"L": [0, 255], "RGB": [(255, 0, 0), (0, 255, 0)]}[mode]
    rows = [[Image.new(mode, (6, 4), color)] * 2 for color in ink]
    array = opened(plot_reconstructions(rows, ["image", "t = 3"], tmp_path / "rows.png"), least=100)
    for color in ink:
        shown = (array == np.array(color)).all(2)
        assert shown.sum() > 2000  # two pictures of this colour, not smoothed into the others


def test_labels_of_rows_and_of_narrow_columns(tmp_path):
    def picture(size, columns, rows=()):
        count = max(len(rows), 1)
        images = [[Image.new("L", size, 0)] * len(columns)] * count
        return opened(plot_reconstructions(images, columns, tmp_path / "labels.png", rows), least=40)

    def ground(array):
        """Rows and columns of pixels above and left of the pictures' grey ground."""
        grey = (array == GROUND[0]).all(2)
        return (grey.sum(1) > 40).argmax(), (grey.sum(0) > 40).argmax()  # a label has single grey pixels

    above, left = ground(picture((8, 8), ["a", "b"]))
    assert left < 20
    assert ground(picture((8, 8), ["a", "b"], ["decoded", "x_t"]))[1] > left + 40  # room for the words
    narrow = picture((4, 16), ["t = 1000", "image"])
    assert ground(narrow)[0] > above + 30  # upright
    ink = (narrow < 100).any(2)[: ground(narrow)[0]]
    middle = narrow.shape[1] // 2
    assert ink[:, :middle].any() and ink[:, middle:].any() and not ink[:, [0, -1]].any()  # none cut off


def test_to_pil():
    for mode, image in (("L", pictures(1)[0]), ("RGB", pictures(1, mode="RGB")[0])):
        array = torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1)
        found = to_pil(array)
        assert found.mode == mode
        np.testing.assert_array_equal(np.asarray(found), np.asarray(image))
    five = torch.arange(5 * 2 * 3, dtype=torch.uint8).view(5, 2, 3)
    np.testing.assert_array_equal(np.asarray(to_pil(five)), five[0].numpy())  # the first, in grey
