"""survey.py: what a data set holds, as a person reads it before a run."""

import pytest
from datasets import List, Value
from PIL import Image as PILImage

from hf_ddpm import TrainConfig, train
from hf_ddpm.data.stream import load_stream
from tests.data.pictures import noise, png, truncated, write_parquet


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
