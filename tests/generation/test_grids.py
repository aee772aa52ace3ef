"""grids.py: where each pixel of a grid comes from, labels, PNG files."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_ddpm.generation.grids import (
    GAP,
    TARGET,
    image_grid,
    labelled_grid,
    plot_reconstructions,
    save_image,
    to_pil,
)

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
        ((pictures(1), 1.5), "columns is 1.5; allowed: whole numbers >= 1"),
        ((np.zeros((1, 8, 8), int),), "int64 NumPy array"),
        (([],), "there are no images; allowed: at least one"),
        ((pictures(1) + pictures(1, (2, 3)),), r"sizes \[\(2, 3\), \(3, 2\)\]; allowed: all of one size"),
        ((pictures(1), 0), "columns is 0; allowed: whole numbers >= 1"),
        ((pictures(1), 1, -1), "scale is -1; allowed: whole numbers >= 1"),
        ((pictures(1), True), "columns is True; allowed: whole numbers >= 1"),
        ((Image.new("I;16", (8, 8), 60000),), "PIL mode I;16; allowed: modes of 8 bits, such as L and RGB"),
        (([Image.new("F", (8, 8), 0.5)],), "PIL mode F; allowed: modes of 8 bits"),
        (
            (np.zeros((3, 2, 8, 8), np.uint8),),
            "allowed: 1, 3 or 4 channels, or any number of them as floating",
        ),
    ],
    ids=[
        "fraction",
        "int64",
        "none",
        "two sizes",
        "columns",
        "scale",
        "bool",
        "16 bits",
        "floats",
        "2 channels",
    ],
)
def test_bad_argument(arguments, words):
    with pytest.raises(ValueError, match=words):
        image_grid(*arguments)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_grids_of_every_form(mode):
    images = pictures(3, (9, 7), mode)
    expected = np.asarray(image_grid(images))
    arrays = [np.asarray(image) for image in images]
    tensors = [torch.from_numpy(np.atleast_3d(array).transpose(2, 0, 1).copy()) for array in arrays]
    batch = torch.stack(tensors)
    for form in (arrays, tensors, iter(tensors), batch, batch.numpy(), batch / 127.5 - 1, iter(images)):
        np.testing.assert_array_equal(np.asarray(image_grid(form)), expected)
    np.testing.assert_array_equal(np.asarray(image_grid(images[0])), np.asarray(image_grid(arrays[:1])))
    with pytest.raises(ValueError, match=r"may be \(C, H, W\) or .*; allowed: PIL images"):
        image_grid(np.zeros((3, 20, 20), np.uint8))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_saved_as_lossless_png(mode, tmp_path):
    (image,) = pictures(1, mode=mode)
    path = save_image(image, tmp_path / "new" / "image.png")
    read = Image.open(path)
    assert (read.format, read.mode) == ("PNG", mode)
    np.testing.assert_array_equal(np.asarray(read), np.asarray(image))


def test_a_name_says_the_kind_of_file(tmp_path):
    image = pictures(1, mode="RGB")[0]
    for name, kind in (("a.jpg", "JPEG"), ("a.webp", "WEBP"), ("a.TIF", "TIFF")):
        with Image.open(save_image(image, str(tmp_path / name))) as found:
            assert found.format == kind
    with pytest.raises(
        ValueError, match=r"PIL mode RGBA can't be a .jpg file; allowed: .png, or image.convert"
    ):
        save_image(image.convert("RGBA"), tmp_path / "b.jpg")
    with pytest.raises(ValueError, match=r"ends in .png, .jpg, .jpeg, .webp, .tif, .tiff$"):
        save_image(image, tmp_path / "b.pdf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.TIF", "a.jpg", "a.webp"]


# Labelled rows of pictures


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", [(28, 28), (8, 8), (5, 3), (200, 120), (64, 4), (4, 64), (1, 1)], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 5), (4, 2)])
def test_a_sheet_has_labels_and_no_white_band(mode, size, rows, columns):
    images = [[Image.new(mode, size, 0 if mode == "L" else (90, 0, 0))] * columns] * rows
    labels = [f"t = {100 * i}" for i in range(columns)]
    sheet = labelled_grid(images, labels, ["original", "x_t", "x̂_0", "decoded"][:rows])
    grey = (np.asarray(sheet) == GROUND).all(2)
    across, down = (np.flatnonzero(grey.sum(axis) > 20) for axis in (1, 0))  # letters have few grey pixels
    top, left = across[0], down[0]
    assert across[-1] == sheet.height - 1  # no band below the images,
    assert down[-1] == sheet.width - 1  # nor beside them
    ink = np.asarray(sheet.convert("L")) < 128
    assert 15 < top < 120 and left > 15 and not ink[0].any() and not ink[:, 0].any()  # no label is cut off
    height, width = (sheet.height - top) / rows, (sheet.width - left) / columns
    for i in range(rows):
        assert ink[int(top + height * i) : int(top + height * (i + 1)), : left - 2].any(1).sum() >= 7
    for i in range(columns):
        assert ink[: top - 2, int(left + width * i) : int(left + width * (i + 1))].any(0).sum() >= 7


def test_without_labels_there_is_no_margin():
    images = [[Image.new("L", (28, 28))] * 3] * 2
    sheet = labelled_grid(images, ["", "", ""], ["", ""])
    assert sheet.size == image_grid(images[0] * 2, 3).size


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
