"""images.py: files, folders and data sets in, with names and labels, and out; nothing is lost in silence."""

import shutil

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_ddpm.compression.container import Side
from hf_ddpm.compression.images import check_out, open_images, write_images
from hf_ddpm.data.stream import load_stream

SHAPE = (1, 8, 8)


def pixels(seed, shape=SHAPE):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, levels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = levels.transpose(1, 2, 0)
    Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else values).save(path, **options)
    return str(path)


@pytest.fixture
def folder(tmp_path):
    for place, name in enumerate(["b/x.png", "b/y.bmp", "a.png", "train/0.png", "test/0.tif"]):
        save(tmp_path / "in" / name, pixels(place))
    (tmp_path / "in" / "notes.txt").write_text("no image")
    return tmp_path / "in"


def test_a_folder_whole_with_its_folders(folder):
    found = open_images([str(folder)], SHAPE)
    assert found.side.names == ["a.png", "b/x.png", "b/y.bmp.png", "test/0.tif.png", "train/0.png"]
    assert np.array_equal(found.images, np.stack([pixels(i) for i in (2, 0, 1, 4, 3)]))


def test_files_in_the_order_given(folder):
    found = open_images([str(folder / "b/y.bmp"), str(folder / "a.png")], SHAPE)
    assert found.side.names == ["y.bmp.png", "a.png"]
    assert np.array_equal(found.images, np.stack([pixels(1), pixels(2)]))


def test_numbered_files_need_no_names(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i:05d}.png", pixels(i))
    assert open_images([str(tmp_path)], SHAPE).side.names is None


@pytest.mark.parametrize(
    "words, rows",
    [
        ("test", range(300)),
        ("test:0-4", range(5)),
        ("test:17", [17]),
        ("test[:3]", range(3)),
        ("test:5-5", [5]),
    ],
)
def test_a_data_set_with_its_labels(words, rows):
    found = open_images([f"digits:{words}"], SHAPE)
    whole = [image.numpy() for image in load_stream("digits", "test").images()]
    assert np.array_equal(found.images, np.stack([whole[i] for i in rows]))
    assert len(found.side.labels) == len(rows) and set(found.side.labels) <= set(range(10))


@pytest.mark.parametrize("out", ["back", "deep/back", "back.parquet"])
def test_out_and_in_again(folder, tmp_path, out):
    first = open_images([str(folder)], SHAPE)
    side = Side(first.side.names, [0, 1, 1, 0, 1], ["no", "yes"])
    write_images(check_out(str(tmp_path / out)), first.images, side)
    if out.endswith("parquet"):
        again = open_images([f"{tmp_path / out}:train"], SHAPE)
        assert again.side.labels == side.labels and again.side.classes == side.classes
        rows = datasets.load_dataset("parquet", data_files=str(tmp_path / out), split="train")
        assert rows.cast_column("image", datasets.Image(decode=False))[1]["image"]["path"] == "b/x.png"
    else:
        again = open_images([str(tmp_path / out)], SHAPE)
        assert again.side.names == side.names
        lines = (tmp_path / out / "metadata.csv").read_text().splitlines()
        assert lines[:3] == ["file_name,label", "a.png,no", "b/x.png,yes"]
    assert np.array_equal(again.images, first.images)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_every_number_of_channels(tmp_path, channels):
    images = np.stack([pixels(i, (channels, 5, 7)) for i in range(3)])
    write_images(tmp_path / "x", images, Side())
    assert np.array_equal(open_images([str(tmp_path / "x")], (channels, 5, 7)).images, images)


def test_five_channels_have_no_png(tmp_path):
    with pytest.raises(ValueError, match="5 channels; allowed in a PNG: 1 to 4"):
        write_images(tmp_path / "x", pixels(0, (2, 5, 4, 4)), Side())


# What would lose something


def refused(places, shape=SHAPE):
    with pytest.raises(ValueError) as error:
        open_images([str(place) for place in places], shape)
    assert len(str(error.value)) < 300
    return str(error.value)


def test_what_would_not_come_back(tmp_path):
    deep = tmp_path / "deep.png"
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 999).save(deep)
    assert "16 bits; allowed: 8 bits" in refused([deep])
    size = save(tmp_path / "size.png", pixels(0, (1, 8, 9)))
    assert "(1, 8, 9) (C, H, W); allowed: the model's (1, 8, 8)" in refused([size])
    colour = save(tmp_path / "colour.png", pixels(0, (3, 8, 8)))
    assert "(3, 8, 8)" in refused([colour])
    alpha = save(tmp_path / "alpha.png", pixels(0, (4, 8, 8)))
    assert "(4, 8, 8)" in refused([alpha], (3, 8, 8))
    moving = tmp_path / "moving.gif"
    frames = [Image.fromarray(pixels(i)[0]) for i in range(3)]
    frames[0].save(moving, save_all=True, append_images=frames[1:])
    assert "several frames" in refused([moving])
    broken = tmp_path / "broken.png"
    broken.write_bytes(deep.read_bytes()[:40])
    assert "can't be read" in refused([broken])


def test_places_that_are_none(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "has no images" in refused([tmp_path / "empty"])
    assert "no file and no folder" in refused([tmp_path / "nothing.png"])
    assert "a folder among other images" in refused([folder / "a.png", folder])
    assert "two images of the name 'a.png'" in refused([folder / "a.png", folder / "a.png"])
    shutil.copy(folder / "a.png", folder / "b" / "y.bmp.png")
    assert "two images of the name" in refused([folder])


@pytest.mark.parametrize(
    "words",
    ["test:5-2", "test:900-901", "test:-3", "test[:3]:1", "nosplit", "test:0-400", "test:999999999999999"],
)
def test_rows_that_are_none(words):
    refused([f"digits:{words}"])


def test_nothing_that_is_there_is_written_over(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "there.parquet").write_text("mine")
    for name in ("full", "there.parquet"):
        with pytest.raises(ValueError, match="there already"):
            check_out(str(tmp_path / name))
    (tmp_path / "empty").mkdir()
    write_images(check_out(str(tmp_path / "empty")), pixels(0, (1, 1, 4, 4)), Side())
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["00000.png"]
