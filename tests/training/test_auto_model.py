"""`model` "auto": which network a run gets, what it says of it, and how it goes on with it."""

import json

import pytest

from hf_ddpm import TrainConfig, train
from hf_ddpm.config import OLD_DEFAULTS
from tests.training.helpers import Conv, checkpoint, folder_of_images, log, refused, small


def record(folder):
    return json.loads((folder / "train_config.json").read_text())


def auto(folder, **changes):
    return small(folder, **{"model": "auto", "max_steps": 1, "batch_size": 2} | changes)


def test_the_run_says_which_and_its_files_name_it(tmp_path, caplog):
    assert TrainConfig().model == "auto"
    data = folder_of_images(tmp_path / "data", 4, (20, 20, 3))
    train(auto(tmp_path / "run", dataset=str(data)))
    (line,) = (text for text in caplog.messages if text.startswith("network: "))
    assert line.startswith(
        "network: preset fashion-mnist (1.1M parameters), as auto takes it for images of 20x20: "
    )
    assert line.endswith("; --model NAME chooses another") and len(line) < 300
    state = json.loads((checkpoint(tmp_path / "run", 1) / "state.json").read_text())
    assert record(tmp_path / "run")["model"] == state["config"]["model"] == "fashion-mnist"


@pytest.mark.parametrize("began", ["auto", "tiny"])
def test_a_run_goes_on_with_the_network_that_it_began_with(began, tmp_path, caplog):
    train(auto(tmp_path / "run", model=began))
    caplog.clear()
    assert train(auto(tmp_path / "run", max_steps=2)).step == 2
    name = {"auto": "digits", "tiny": "tiny"}[began]
    assert record(tmp_path / "run")["model"] == name and "network: " not in caplog.text
    train(TrainConfig.load(tmp_path / "run" / "train_config.json", max_steps=3))
    assert len(log(tmp_path / "run")) == 3
    other = {"digits": "tiny", "tiny": "digits"}[name]
    assert f"model {name!r} -> {other!r}" in refused(auto(tmp_path / "run", model=other))


def test_a_record_of_before_had_the_preset_digits(tmp_path):
    assert OLD_DEFAULTS == {"model": "digits"}
    (tmp_path / "train_config.json").write_text("{}")
    assert TrainConfig.of_run(tmp_path / "train_config.json").model == "digits"


def test_a_network_of_the_callers(tmp_path):
    train(auto(tmp_path / "run"), Conv())
    assert record(tmp_path / "run")["model"] == "auto"
    assert train(auto(tmp_path / "run", max_steps=2), Conv()).step == 2
    assert "began with a network of its own" in refused(auto(tmp_path / "run", max_steps=3))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {},
            "as often as model 'auto' does; allowed near it: image_size 28 or 32",
        ),
        (
            {"image_size": 100, "fit": "resize"},
            "image_size is 100, which model 'auto' can't halve often enough",
        ),
        ({"model": "cifar10"}, "images of 30x30 can't be halved as often as model 'cifar10' does"),
    ],
    ids=["images", "option", "preset"],
)
def test_sizes_that_are_refused(changes, words, tmp_path):
    data = folder_of_images(tmp_path / "data", 3, (30, 30))
    assert words in refused(auto(tmp_path / "run", dataset=str(data), **changes))
    assert not (tmp_path / "run").exists()


def test_the_end_says_what_to_do_next(tmp_path):
    data = folder_of_images(tmp_path / "it's mine", 4, (8, 8))
    result = train(auto(tmp_path / "a run", dataset=str(data)))
    sample, evaluate = result.next_steps
    run = f"'{tmp_path}/a run'"
    assert sample == f"hf-ddpm sample {run} --num-images 16 --out '{tmp_path}/a run-samples'"
    quoted = str(data).replace("'", "'\"'\"'")
    assert evaluate == f"hf-ddpm evaluate {run} '{quoted}' --split train  # images that it was trained on"
    assert train(auto(tmp_path / "digits")).next_steps[1] == f"hf-ddpm evaluate {tmp_path}/digits digits"


def test_the_end_of_a_network_of_the_callers(tmp_path, caplog):
    lines = train(auto(tmp_path / "run"), Conv()).next_steps
    assert f"hf_ddpm.load_run({str(tmp_path / 'run')!r}, model=...)  # a Conv" in lines[0]
    assert [text for text in caplog.messages if text.startswith("next: ")] == [
        f"next: {line}" for line in lines
    ]
