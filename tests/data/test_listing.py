"""listing.py, sources.py: every image of a folder is a row, whatever it is called, and the rest is told."""

import os
import shutil

import pytest
from PIL import Image as PILImage

from hf_ddpm.data.sources import open_source
from hf_ddpm.data.stream import load_stream
from tests.data.pictures import noise, png, write_parquet

PICTURE = png(noise(1, channels=3)[0])
# Folders, by the images in them, with the rows of split "train", or words of the error
FOLDERS = {
    "classes, one of them called train": (["car/1.png", "plane/1.png", "train/1.png"], 3),
    "names with words of splits": (["photo of a train.png", "crash test.png", "a.png"], 3),
    "only a name with a word of a split": (["crash test.png"], 1),
    "splits": (["train/a.png", "train/b/c.png", "test/a.png"], 2),
    "splits of classes": (["train/cat/1.png", "train/dog/1.png", "test/cat/1.png"], 2),
    "splits in capitals": (["Train/1.png", "TEST/1.png"], 1),
    "other words for splits": (["training/1.png", "val/1.png", "evaluation/1.png"], 1),
    "two words for a split": (["train/1.png", "val/1.png", "dev/1.png", "training/2.png"], 2),
    "splits one level deeper": (["data/train/1.png", "data/test/1.png"], 1),
    "classes with splits in them": (["cat/train/1.png", "cat/test/1.png", "dog/train/1.png"], 2),
    "splits and another folder": (["train/1.png", "test/1.png", "assets/1.png"], 3),
    "images beside splits": (["train/1.png", "test/1.png", "cover.png"], 1),
    "images beside a folder that has splits": (["1.png", "2.png", "more/test/1.png"], 3),
    "images beside one split": (["1.png", "2.png", "test/1.png"], "it has test; 2 images lie beside"),
    "one split": (["test/1.png"], "no split 'train' in .*; it has test$"),
    "patterns": (["photos [2023]/[1].png", "*/?.png", "{a,b}/c.png", "**/d.png"], 4),
    "addresses": (["a::b/zip::c.png", "hf:/x.png", "C:/y.png", "http:/z/1.png"], 4),
    "control characters": (["a\nb/c\nd.png", "e\tf.png", "\u202eg.png"], 3),
    "suffixes": (["a.PNG", "b.jpg", "c.jpeg", "d.Jfif", "e.webp", "f.bmp", "g.tiff", "h.pgm", "i.gif"], 9),
    "no suffixes": (["a", "b.2023", "c.jpg_large", "d.png.1"], 4),
    "hidden": (["a.png", ".b.png", ".git/c.png", "__MACOSX/._a.png"], 1),
    "deep": (["/".join("d" * 200) + "/a.png"], 1),
    "very many levels": (["/".join(["train"] * 200) + "/a.png"], 1),
}


def fill(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PICTURE)
    return folder


@pytest.mark.parametrize("case", FOLDERS)
def test_rows_of_a_folder(tmp_path, case):
    names, rows = FOLDERS[case]
    fill(tmp_path, names)
    if isinstance(rows, str):
        with pytest.raises(ValueError, match=rows):
            load_stream(tmp_path)
        return
    stream = load_stream(tmp_path)
    assert len(list(stream.images())) == stream.num_rows() == rows


def test_names_of_any_bytes_in_a_folder_of_any_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("photos [2023]", "a::b", "user/data", "mnist", os.fsdecode(b"\xff"), "hf:", "new\nline"):
        os.makedirs(folder)
        for name in (os.fsdecode(b"\xfe.png"), "1.png"):
            with open(os.path.join(folder, name), "wb") as file:
                file.write(PICTURE)
        for memory in (0, 1):
            assert len(list(load_stream(folder, shuffle_memory=memory).images())) == 2


def test_the_order_is_that_of_the_paths_as_text(tmp_path):
    names = ["a/1.png", "a.png", "a b/2.png", "10.png", "9.png", "Z.png", "é.png"]
    source = open_source(fill(tmp_path, names), "train")
    assert source.files == [os.path.join(tmp_path, name) for name in sorted(names)]


def test_other_splits_of_a_folder(tmp_path):
    fill(tmp_path, ["train/1.png", "val/1.png", "val/2.png", "eval/1.png"])
    for split, rows in {"validation": 2, "val": 2, "test": 1, "eval": 1, "training": 1}.items():
        assert load_stream(tmp_path, split).num_rows() == rows
    with pytest.raises(ValueError, match=r"no split 'extra' in .*; it has train, validation, test$"):
        load_stream(tmp_path, "extra")
    fill(tmp_path, ["cats/1.png"])
    with pytest.raises(ValueError, match=r"no split 'test' in .*; it has train$"):
        load_stream(tmp_path, "test")


def test_what_is_no_image_is_counted_and_named(tmp_path, caplog):
    fill(tmp_path, ["1.png", "2.png", ".3.png", "more/4.png"])
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    (tmp_path / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (tmp_path / "BMW.txt").write_text("BM is how a bitmap begins")
    (tmp_path / "raw.nef").write_bytes(b"II*\0" + bytes(60))
    (tmp_path / "cat.ico").write_bytes(b"\0\0\1\0" + bytes(60))
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe")
    os.symlink("/dev/zero", tmp_path / "zero.png")
    os.symlink(tmp_path, tmp_path / "more" / "loop")
    os.symlink(tmp_path / "1.png", tmp_path / "again.png")
    assert load_stream(tmp_path).num_rows() == 4
    (line,) = [record.getMessage() for record in caplog.records]
    for words in (
        "(train): left out: ",
        "no images that can be read here: 5 (BMW.txt, Thumbs.db, a.heic and 2 more)",
        "hidden: 1 (.3.png)",
        "no regular files: 2 (pipe, pipe.png)",
        "links that lead to no file: 1 (zero.png)",
        "links to folders: 1 (more/loop)",
    ):
        assert words in line
    load_stream(tmp_path)
    assert len(caplog.records) == 1  # said once


def test_splits_that_are_not_taken_for_splits_are_told(tmp_path, caplog):
    fill(tmp_path, ["train/1.png", "test/1.png", "assets/1.png"])
    assert load_stream(tmp_path).num_rows() == 3
    assert 'all is one split, "train": test is not taken for a split, as assets is none' in caplog.text


def test_avif_is_read_where_pillow_has_it(tmp_path, monkeypatch, caplog):
    image = PILImage.fromarray(noise(1, 16, 16, channels=3)[0])
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.avif")
    shutil.copy(tmp_path / "b.avif", tmp_path / "c")
    assert load_stream(tmp_path).num_rows() == 3
    monkeypatch.setattr("hf_ddpm.data.listing.features.check", lambda name: name != "avif")
    assert load_stream(tmp_path).num_rows() == 1
    assert "no images that can be read here: 2 (b.avif, c)" in caplog.text


def test_a_text_file_with_an_images_name_is_a_row(tmp_path):
    fill(tmp_path, ["a.png"])
    (tmp_path / "b.png").write_text("no image")
    (tmp_path / "c.png").touch()
    with pytest.raises(ValueError, match=r"/b\.png: corrupt image"):
        list(load_stream(tmp_path).images())
    stream = load_stream(tmp_path, skip_corrupt=True)
    assert len(list(stream.images())) == 1 and stream.skipped == 2


def test_folders_without_images(tmp_path):
    (tmp_path / "empty" / "train").mkdir(parents=True)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").touch()
    for name, words in [("empty", "it is empty"), ("text", r"left out: .*: 1 \(a.txt\)")]:
        with pytest.raises(ValueError, match=f"^no images in .*{name}: {words}$"):
            load_stream(tmp_path / name)


# parquet files


@pytest.mark.parametrize(
    ("names", "train"),
    [
        (["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"], 2),
        (["train_0", "train_1", "val"], 2),
        (["train-00000-of-00001-0123456789abcdef", "unsupervised-00000-of-00001-0123456789abcdef"], 1),
        (["train/0000", "test/0000"], 1),
        (["default/train/0000", "default/test/0000"], 1),
        (["mnist-train", "mnist-test"], 1),
        (["car", "plane", "train"], 3),
        (["crash test"], 1),
        (["photo-of-train", "photo-of-car"], 2),
        (["part-0", "part-1"], 2),
        (["a::b", "[x]*{}?"], 2),
    ],
)
def test_splits_of_parquet_files(tmp_path, names, train):
    write_parquet(tmp_path / "one", [PICTURE])
    (file,) = (tmp_path / "one").iterdir()
    for name in names:
        target = tmp_path / "data" / f"{name}.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    stream = load_stream(tmp_path / "data")
    assert stream.num_rows() == train and len(list(stream.images())) == train
    assert load_stream(target).num_rows() == 1


def test_parquet_files_among_images(tmp_path, caplog):
    import pyarrow as pa
    import pyarrow.parquet as pq

    fill(tmp_path / "photos", ["1.png", "2.png", "3.png"])
    pq.write_table(pa.table({"vector": [1.0]}), tmp_path / "photos" / "embeddings.parquet")
    assert load_stream(tmp_path / "photos").num_rows() == 3
    write_parquet(tmp_path / "set" / "data", [PICTURE] * 5)
    fill(tmp_path / "set", ["assets/logo.png"])
    assert load_stream(tmp_path / "set").num_rows() == 5
    assert "parquet files beside images: 1 (embeddings.parquet)" in caplog.text
    assert "images beside parquet files: 1 (assets/logo.png)" in caplog.text
