"""sources.py: what a data set may be, its image column, and what is refused."""

import io
import logging
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Array3D, ClassLabel, Features, Image, List, Value, load_dataset
from PIL import Image as PILImage

from hf_ddpm.data.sources import open_source
from hf_ddpm.data.stream import load_stream
from hf_ddpm.runtime import hub
from tests.data.pictures import as_set, every, grey_folder, noise, picture_folder, png, write_parquet
from tests.launching import ROOT

# the embedded digits


def test_digits_are_sklearns_digits():
    from sklearn.datasets import load_digits

    train, test = load_stream("digits"), load_stream("digits", "test")
    assert train.shape == test.shape == (1, 8, 8)
    parts = every(train), every(test)
    assert [len(part) for part in parts] == [1497, 300]
    assert len(torch.cat(parts).unique()) == 17
    levels = np.asarray(load_digits().images)
    theirs = torch.from_numpy((255 * levels / 16 + 0.5).astype(np.uint8))[:, None]
    assert as_set(torch.cat(parts)) == as_set(theirs)


def test_digits_are_small_stratified_and_decode_as_images():
    folder = ROOT / "hf_ddpm" / "data" / "digits"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 400 * 1024
    counts = []
    for split in ("train", "test"):
        data = load_dataset(str(folder), split=split, streaming=True)
        assert isinstance(data.features["image"], Image) and isinstance(data.features["label"], ClassLabel)
        assert next(iter(data))["image"].mode == "L"
        counts.append(np.bincount([row["label"] for row in data.select_columns(["label"])], minlength=10))
    assert abs(counts[1] - 300 / 1797 * (counts[0] + counts[1])).max() <= 1


# sources


def test_parquet_folder_and_single_file(tmp_path):
    images = grey_folder(tmp_path / "data", 10, shards=3)
    assert torch.equal(every(load_stream(tmp_path / "data")), images)
    file = tmp_path / "data" / "train-00001-of-00003.parquet"
    assert torch.equal(every(load_stream(str(file))), images[4:7])


def test_image_folder(tmp_path):
    images = noise(4, channels=3)
    for i, image in enumerate(images):
        folder = tmp_path / ("cats" if i < 2 else "dogs")
        folder.mkdir(exist_ok=True)
        PILImage.fromarray(image).save(folder / f"{i}.png")
    stream = load_stream(tmp_path)
    assert stream.shape == (3, 6, 5)
    assert torch.equal(every(stream), torch.from_numpy(images).permute(0, 3, 1, 2))


def test_images_in_an_archive(tmp_path):
    """Paths that only fsspec opens."""
    shutil.make_archive(str(tmp_path / "data" / "train"), "zip", picture_folder(tmp_path / "pictures", 12))
    stream = load_stream(tmp_path / "data", shuffle_memory=4)
    assert as_set(every(stream)) == as_set(torch.from_numpy(noise(12))[:, None])


def test_parquet_without_hugging_face_metadata(tmp_path):
    image = noise(1)[0]
    table = pa.table({"picture": [{"bytes": png(image), "path": None}], "name": ["a"]})
    pq.write_table(table, tmp_path / "train.parquet")
    assert torch.equal(every(load_stream(tmp_path)), torch.from_numpy(image)[None, None])


@pytest.mark.parametrize(
    ("feature", "channels"),
    [
        (List(List(Value("uint8"))), 1),
        (List(List(List(Value("uint8")))), 5),
        (Array3D(shape=(6, 5, 2), dtype="uint8"), 2),
    ],
)
def test_columns_of_arrays(tmp_path, feature, channels):
    images = noise(7, channels=channels)
    write_parquet(tmp_path, images.tolist(), shards=2, feature=feature)
    stream = load_stream(tmp_path, channels=channels, shuffle_memory=3)
    assert stream.shape == (channels, 6, 5)
    assert as_set(every(stream)) == as_set(
        torch.from_numpy(images.reshape(7, 6, 5, channels)).permute(0, 3, 1, 2)
    )
    resized = every(load_stream(tmp_path, image_size=(4, 8), channels=channels, fit="resize"))
    assert resized.shape == (7, channels, 4, 8)


def test_column_can_be_chosen(tmp_path):
    images = noise(2)
    features = Features({"a": Image(), "b": Image()})
    rows = [{"bytes": png(image), "path": None} for image in images]
    table = pa.Table.from_pydict({"a": rows[:1], "b": rows[1:]}, schema=features.arrow_schema)
    pq.write_table(table, tmp_path / "train.parquet")
    assert torch.equal(every(load_stream(tmp_path, column="b"))[0, 0], torch.from_numpy(images[1]))
    with pytest.raises(ValueError, match="several image columns, choose one with column=: a, b"):
        load_stream(tmp_path)


# what is refused


def test_a_file_that_datasets_cannot_read_is_named(tmp_path):
    write_parquet(tmp_path, [])  # one empty row group, which datasets 5.2 chokes on
    with pytest.raises(ValueError, match=r"(can't read|no usable image in) .*train-00000-of-00001\.parquet"):
        load_stream(tmp_path)


def test_sources_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"PAR1 and nothing more")
    for source, message in [
        (tmp_path / "missing", "no file or folder .*missing; it looks like a path, so the Hub was not asked"),
        ("./missing", "no file or folder ./missing"),
        (
            "somebody/no-such-set",
            "can't read 'somebody/no-such-set' as a data set: no such folder, and from the Hub: ",
        ),
        (tmp_path / "empty", "no images in .*empty: it is empty"),
        (tmp_path / "notes.txt", "notes.txt is a file, but not a .parquet file"),
        (tmp_path / "broken", "can't read .*broken/train.parquet: "),
        ("", "the data set must be 'digits', a path or a Hub id, got ''"),
        (3, "the data set must be 'digits', a path or a Hub id, got 3"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            load_stream(source)
        assert "\n" not in str(caught.value)


def test_a_mistyped_folder_is_told_before_the_hub_is_asked(tmp_path, monkeypatch, caplog):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    hub._say.cache_clear()

    def asked(name):
        logging.getLogger("huggingface_hub.utils").warning("Retrying in 1s [Retry 1/5].")
        ours = [record.message for record in caplog.records if record.name.startswith("hf_ddpm")]
        raise OSError(f"asked for {name} after {ours}")

    monkeypatch.setattr("datasets.load_dataset_builder", asked)
    printed = io.StringIO()
    handler = logging.StreamHandler(printed)
    logging.getLogger("huggingface_hub").addHandler(handler)
    told = "no folder 'phtos' here (did you mean 'photos'?); asking the Hub"
    with pytest.raises(ValueError) as error:
        open_source("phtos", "train")
    words = "can't read 'phtos' as a data set: no such folder (did you mean 'photos'?), and from the Hub: "
    assert str(error.value) == words + f"asked for phtos after {[told]}"
    logging.getLogger("huggingface_hub").removeHandler(handler)
    assert printed.getvalue() == ""  # what its client tries is not told between our lines
    for name in ("phtos/", "./phtos", "phtos/a/b", "~phtos", "phtos.parquet", str(tmp_path / "phtos")):
        with pytest.raises(ValueError, match="no file or folder ") as error:
            open_source(name, "train")
        assert "asked for" not in str(error.value)


def test_a_folder_of_heic_says_what_to_do(tmp_path):
    (tmp_path / "a.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    with pytest.raises(
        ValueError, match=r"no images in .*: 1 \(a.HEIC\); HEIC isn't read: save the images as"
    ):
        open_source(tmp_path, "train")


def test_unknown_split_and_columns(tmp_path):
    with pytest.raises(ValueError, match="no split 'validation' in digits; it has train, test"):
        load_stream("digits", "validation")
    with pytest.raises(ValueError, match="no column 'picture'; there are: image, label"):
        load_stream("digits", column="picture")
    pq.write_table(pa.table({"text": ["a"], "number": [1]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="no image column; there are: text, number"):
        load_stream(tmp_path)
