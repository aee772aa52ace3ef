"""A run goes on with the images that it began with, wherever they lie, and with no others."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from hf_ddpm import TrainConfig, train
from hf_ddpm.data.stream import load_stream
from hf_ddpm.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from hf_ddpm.training.resume import check_data, find_checkpoint, open_data
from tests.data.pictures import grey_folder, noise, picture_folder, png, write_parquet
from tests.launching import together
from tests.training.helpers import Conv, assert_same, checkpoint, refused, small, weights


def parquet(folder: Path, count: int = 30, seed: int = 0, **changes) -> Path:
    values = [png(image) for image in noise(count, seed=seed)]
    return write_parquet(folder, values, shards=3, **changes)


def fingerprint(folder: Path) -> dict:
    """As it comes back from a checkpoint."""
    return json.loads(json.dumps(load_stream(folder, shuffle_memory=1).fingerprint()))


def differs(before: dict, folder: Path) -> str:
    with pytest.raises(ValueError) as error:
        check_data(fingerprint(folder), {"data": before})
    told = str(error.value)
    assert "\n" not in told and len(told) < 300
    assert told.startswith("the images are not those that the run began with (")
    assert told.endswith("where --model with this run's folder goes on from its weights")
    return told[len("the images are not those that the run began with (") : told.index("); allowed")]


@pytest.mark.parametrize(
    "make", [parquet, lambda folder: picture_folder(folder, 30)], ids=["parquet", "folder"]
)
def test_the_same_files_elsewhere_and_later_are_the_same(tmp_path, make):
    before = fingerprint(make(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b c" / "d")
    for file in (tmp_path / "b c" / "d").iterdir():
        file.touch()
    assert fingerprint(tmp_path / "b c" / "d") == before
    check_data(fingerprint(tmp_path / "b c" / "d"), {"data": before})
    check_data(before, {})  # a new run


def test_what_differs_is_named(tmp_path):
    before = fingerprint(parquet(tmp_path / "a"))
    assert differs(before, parquet(tmp_path / "more", 31)).startswith(
        "31 rows in shards of 11, 10, 10, then 30"
    )
    assert "train-00000-of-00003.parquet of" in differs(before, parquet(tmp_path / "other", seed=1))
    before = fingerprint(picture_folder(tmp_path / "folder", 30))
    (tmp_path / "folder" / "007.png").rename(tmp_path / "folder" / "007x.png")
    assert "007x.png" in differs(before, tmp_path / "folder")
    assert "the checkpoint doesn't say" in differs({}, tmp_path / "folder")


def test_images_of_the_same_size_are_told_apart(tmp_path):
    """Raw grey levels: names, sizes and rows are the same."""
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(noise(200, seed=seed)):
            Image.fromarray(image).save(tmp_path / name / f"{i:03d}.bmp")
    before = fingerprint(tmp_path / "a")
    assert differs(before, tmp_path / "b") == "000.bmp is another image"
    # One image in three is looked at: a change elsewhere is not promised to be seen
    for seen, number in ((True, 0), (True, 199), (False, 1)):
        shutil.copytree(tmp_path / "a", tmp_path / "c")
        shutil.copy(tmp_path / "b" / f"{number:03d}.bmp", tmp_path / "c")
        assert (fingerprint(tmp_path / "c") != before) == seen
        shutil.rmtree(tmp_path / "c")


def test_a_row_of_raw_levels_is_looked_at(tmp_path):
    from datasets import List, Value

    feature = List(List(Value("uint8")))
    first, second = noise(2000), noise(2000)
    second[0, 0, 0] ^= 1
    before = fingerprint(write_parquet(tmp_path / "a", first.tolist(), feature=feature))
    (tmp_path / "b").mkdir()
    now = fingerprint(write_parquet(tmp_path / "b" / "x", second.tolist(), feature=feature))
    assert before["rows"] == now["rows"] and before["sample"][0] != now["sample"][0]
    assert before["sample"][1:] == now["sample"][1:] and len(now["sample"]) == 64


def test_a_run_goes_on_where_its_data_moved_and_nowhere_else(tmp_path, caplog):
    data = parquet(tmp_path / "data")
    plan = {"dataset": str(data), "shuffle_memory": 0.002, "checkpoint_every": 2}
    train(small(tmp_path / "whole", **plan, max_steps=4), Conv())
    train(small(tmp_path / "run", **plan, max_steps=2), Conv())
    parquet(data, seed=1)
    told = refused(small(tmp_path / "run", **plan, max_steps=4), Conv())
    assert "the images are not those that the run began with (train-00000-of-00003.parquet" in told
    parquet(tmp_path / "moved" / "data")
    plan["dataset"] = str(tmp_path / "moved" / "data")
    with caplog.at_level(logging.WARNING):
        train(small(tmp_path / "run", **plan, max_steps=4), Conv())
    assert "other libraries" not in caplog.text
    assert_same(weights(tmp_path / "run", 4), weights(tmp_path / "whole", 4))


def test_other_versions_of_libraries_are_said(tmp_path, caplog):
    train(small(tmp_path, max_steps=2), Conv())
    place = checkpoint(tmp_path, 2)
    found = load_checkpoint(place)
    assert set(found.state["versions"]) == {"torch", "diffusers", "numpy", "datasets", "pillow", "pyarrow"}
    state = {**found.state, "versions": {**found.state["versions"], "numpy": "1.0", "gone": "2"}}
    shutil.rmtree(place)
    save_checkpoint(tmp_path, Checkpoint(2, found.model, found.averages, found.optimizer, state), keep=1)
    with caplog.at_level(logging.WARNING):
        train(small(tmp_path, max_steps=3), Conv())
    (line,) = (text for text in caplog.messages if "other libraries" in text)
    assert f"not bit for bit: numpy 1.0 -> {np.__version__}" in line


def test_a_checkpoint_of_the_old_order_is_refused_but_its_folder_is_not(tmp_path):
    config = small(tmp_path)
    state = {"config": {**json.loads(config.to_json()), "shuffle_buffer": 1000}}
    save_checkpoint(tmp_path, Checkpoint(2, {}, {}, {}, state), keep=1)
    with pytest.raises(ValueError) as error:
        find_checkpoint(config, tmp_path, Accelerator(cpu=True))
    assert "is of a run with shuffle_buffer, whose order of images is gone; allowed: another" in str(
        error.value
    )
    record = tmp_path / "train_config.json"
    record.write_text(json.dumps(state["config"]))
    with pytest.raises(
        ValueError, match=r"there is no key 'shuffle_buffer' any more; allowed: shuffle_memory"
    ):
        TrainConfig.load(record)
    assert TrainConfig.of_run(record) == config


def opened(folders: list[Path]):
    """What a process comes to, that sees a folder of its own."""
    accelerator = Accelerator(cpu=True)
    config = small(folders[0], dataset=str(folders[accelerator.process_index]))
    try:
        return open_data(config, {}, accelerator, torch.nn.Identity())[1]["rows"]
    except ValueError as error:
        return str(error)


@pytest.mark.distributed
def test_processes_that_see_other_data_all_end_with_a_line(tmp_path):
    grey_folder(tmp_path / "a", 30, shards=2)
    grey_folder(tmp_path / "b", 31, shards=2)
    assert together(tmp_path, opened, [tmp_path / "a"] * 2) == [[15, 15]] * 2
    told = together(tmp_path, opened, [tmp_path / "a", tmp_path / "b"])
    assert told[0] == told[1] and told[0].startswith("process 1 sees 31 images in 2 shards")
    mixed = picture_folder(tmp_path / "mixed", 3)
    Image.new("RGB", (9, 9)).save(mixed / "9.png")
    told = together(tmp_path, opened, [mixed] * 2)
    line = "4 images of 2 sizes (6x5 to 9x9, HxW), modes L 3, RGB 1: add --image-size 5 --fit resize_crop"
    assert told == [f"{line} --channels 3"] * 2  # process 0 looked, and process 1 heard of it
    first, second = together(tmp_path, opened, [tmp_path / "a", tmp_path / "none"])
    assert first == f"process 1: {second}" and "no file or folder" in second
