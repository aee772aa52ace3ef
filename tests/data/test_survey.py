"""survey.py: what a data set holds, as a person reads it before a run."""

import json
import os
import zipfile

import pytest
from datasets import List, Value
from PIL import Image as PILImage

from hf_ddpm import TrainConfig, train
from hf_ddpm.data.encoded import read_head
from hf_ddpm.data.stream import load_stream
from tests.data.pictures import noise, picture_folder, png, truncated, write_parquet


def test_sizes_and_modes_of_a_folder(tmp_path):
    for i, (size, mode) in enumerate([((8, 6), "RGB")] * 3 + [((6, 8), "RGB"), ((8, 6), "L")]):
        PILImage.new(mode, size).save(tmp_path / f"{i}.png")
    (tmp_path / "9.png").write_text("no image")
    found = load_stream(tmp_path).survey()
    assert (found.total, found.looked_at, found.unreadable) == (6, 6, 1)
    assert found.sizes == {(6, 8): 4, (8, 6): 1} and found.modes == {"RGB": 4, "L": 1}
    line = "6 images of 2 sizes (6x8 to 8x6, HxW), modes RGB 4, L 1, 1 can't be read (9.png)"
    assert str(found).endswith(f"(train): {line}")


def test_all_images_are_looked_at_and_what_is_cut_is_found(tmp_path):
    image = noise(1, 200, 200)[0]
    for i in range(600):  # more than are looked at together
        (tmp_path / f"{i:03d}.png").write_bytes(png(image))
    (tmp_path / "900.png").write_bytes(truncated(image))
    for kind in ("JPEG", "WEBP"):
        PILImage.fromarray(image).save(tmp_path / f"{kind}.{kind.lower()}")
        data = (tmp_path / f"{kind}.{kind.lower()}").read_bytes()
        (tmp_path / f"cut.{kind.lower()}").write_bytes(data[: len(data) // 2])
    found = load_stream(tmp_path).survey()
    assert found.sizes == {(200, 200): 602} and found.unreadable == 3
    assert found.named == ["900.png", "cut.jpeg", "cut.webp"]


@pytest.mark.parametrize(
    ("channels", "lists", "words"),
    [(3, False, "mode RGB"), (1, False, "mode L"), (3, True, "3 channels"), (1, True, "1 channel")],
)
def test_parquet_files(tmp_path, channels, lists, words):
    images = noise(100, channels=channels)
    feature = Value("uint8")
    for _ in range(images.ndim - 1):
        feature = List(feature)
    values = images.tolist() if lists else [png(image) for image in images]
    write_parquet(tmp_path, values, feature=feature if lists else None)
    line = str(load_stream(tmp_path).survey())
    assert line.endswith(f"(train): 100 images of 6x5 (HxW), {words}")


def test_a_run_says_what_its_data_holds(tmp_path, caplog):
    for i in range(4):
        PILImage.new("L", (8, 8)).save(tmp_path / f"{i}.png")
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    config = TrainConfig(
        dataset=str(tmp_path),
        output_dir=str(tmp_path / ".run"),
        model="tiny",
        max_steps=1,
        batch_size=2,
        sample_every=0,
    )
    train(config)
    lines = [record.getMessage() for record in caplog.records]
    assert any(line.endswith("(train): 4 images of 8x8, mode L") for line in lines)
    assert any("no images that can be read here: 1 (a.heic)" in line for line in lines)


def test_a_run_does_not_write_among_its_images(tmp_path):
    PILImage.new("L", (8, 8)).save(tmp_path / "0.png")
    config = TrainConfig(dataset=str(tmp_path), output_dir=str(tmp_path / "runs" / "a"), model="tiny")
    with pytest.raises(ValueError, match=r"^output_dir '.*runs/a' lies in the folder of the images, '"):
        train(config)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own, in which every survey is kept; and how many images were looked at since."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("hf_ddpm.data.survey.KEPT_SECONDS", -1.0)
    looked_at = []
    monkeypatch.setattr(
        "hf_ddpm.data.survey.read_head", lambda file: looked_at.append(file) or read_head(file)
    )
    return tmp_path / "home", looked_at


def test_a_survey_is_kept_for_the_same_files(tmp_path, cache):
    home, looked_at = cache
    data = picture_folder(tmp_path / "data", 5)
    (data / "bad.png").write_text("no image")
    first = load_stream(data).survey()
    assert len(looked_at) == 6 and sorted(path.name for path in data.iterdir()) == [
        *map("{:03d}.png".format, range(5)),
        "bad.png",
    ]
    assert load_stream(data).survey() == first and len(looked_at) == 6
    for change in (
        lambda: (data / "new.png").write_bytes(png(noise(1, 9, 9)[0])),
        lambda: (data / "bad.png").unlink(),
        lambda: os.utime(data / "000.png", (1, 1)),
        lambda: (data / "000.png").write_bytes(png(noise(1, 7, 7)[0])),
    ):
        change()
        before = len(looked_at)
        assert load_stream(data).survey() != first or len(looked_at) > before
        assert len(looked_at) > before
    assert len(list(home.rglob("*.json"))) == 1  # the newest takes the place of the one before


@pytest.mark.parametrize("other", range(9))
def test_a_damaged_survey_is_ignored(tmp_path, cache, other):
    home, looked_at = cache
    data = picture_folder(tmp_path / "data", 5)
    first = load_stream(data).survey()
    (file,) = home.rglob("*.json")
    kept, count = json.loads(file.read_text()), len(looked_at)
    head = kept["heads"][0]
    file.write_text(
        [
            "",
            "[]",
            file.read_text()[:-9],
            json.dumps(kept | {"state": "0" * 64}),
            json.dumps(kept | {"heads": []}),
            json.dumps(kept | {"heads": [[*head[:-1], 6]]}),
            json.dumps(kept | {"heads": [["6", *head[1:]]]}),
            json.dumps(kept | {"unreadable": -1}),
            json.dumps(kept | {"heads": [[*head[:-1], float("nan")]]}),
        ][other]
    )
    assert load_stream(data).survey() == first and len(looked_at) == count + 5
    assert json.loads(file.read_text()) == kept  # made anew


def test_no_cache_is_needed(tmp_path, cache):
    home, looked_at = cache
    home.write_text("no folder")
    data = picture_folder(tmp_path / "data", 3)
    assert load_stream(data).survey() == load_stream(data).survey() and len(looked_at) == 6


def test_what_is_quick_is_not_kept(tmp_path, cache, monkeypatch):
    home, _ = cache
    monkeypatch.setattr("hf_ddpm.data.survey.KEPT_SECONDS", 1000.0)
    load_stream(picture_folder(tmp_path / "data", 3)).survey()
    assert not home.exists()


def test_rows_of_an_archive_are_the_first_ones(tmp_path):
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        for i, image in enumerate(noise(70)):
            archive.writestr(f"{i:03d}.png", png(image))
    line = "the first 64 images, which were looked at, of 6x5 (HxW), mode L"
    assert load_stream(tmp_path).survey().facts == line
