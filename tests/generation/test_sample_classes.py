"""`hf-ddpm sample --class`: which image is of which class, the grid, and what is refused."""

import numpy as np
import pytest
import torch
from torch import nn

from hf_ddpm import DDPMPipeline, create_model
from hf_ddpm.seeds import image_generators
from tests.commands import refused, same_images, sample
from tests.generation.networks import short

FEW = ("--num-images", 5, "--steps", 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    network = create_model("tiny", num_classes=2).eval()
    nn.init.normal_(network.class_embedding.weight, std=4)
    pipeline = DDPMPipeline(network, short())
    pipeline.id2label = {0: "boot", 1: "bag"}
    pipeline.save_pretrained(folder := tmp_path_factory.mktemp("classes") / "model")
    return folder


def test_a_class_and_guidance(folder, tmp_path):
    none = sample(folder, tmp_path / "none", *FEW)
    assert same_images(none, sample(folder, tmp_path / "said", *FEW, "--class", "none"))
    bags = sample(folder, tmp_path / "bags", *FEW, "--class", "bag", "--guidance", 2, "--batch-size", 2)
    pipeline = DDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(5, image_generators(0, range(5)), 4, class_labels=1, guidance_scale=2).images
    for i, image in enumerate(expected):
        assert np.abs(np.asarray(image).astype(int) - bags[f"{i:05d}.png"]).max() <= 1
    assert not same_images(none, bags)


def test_every_class_in_turn(folder, tmp_path):
    every = sample(folder, tmp_path / "all", *FEW, "--class", "all")
    of_class = [sample(folder, tmp_path / name, *FEW, "--class", name) for name in ("boot", "bag")]
    for i in range(5):
        name = f"{i:05d}.png"
        assert np.abs(every[name] - of_class[i % 2][name]).max() <= 1
    grid = every["grid.png"]  # rows of 3 and 2, after the names
    left = grid.shape[1] - (3 * 100 + 4)
    assert left > 20 and grid.shape[0] == 2 * 100 + 4
    for i in range(5):
        row, column = 4 + i % 2 * 100, left + 4 + i // 2 * 100
        np.testing.assert_array_equal(
            grid[row : row + 96 : 12, column : column + 96 : 12, 0], every[f"{i:05d}.png"]
        )
    again = sample(folder, tmp_path / "all", *FEW, "--class", "all", "--overwrite")
    assert same_images(again, every)


def test_other_classes_are_another_drawing(folder, tmp_path, capfd):
    sample(folder, tmp_path / "out", *FEW, "--class", "boot")
    capfd.readouterr()
    for flags in (["--class", "bag"], ["--class", "boot", "--guidance", 2], []):
        err = refused(capfd, "sample", folder, "--out", tmp_path / "out", *FEW, *flags)
        assert "holds samples already" in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--class", "bot"], "--class is 'bot' (did you mean 'boot'?); allowed: 0 to 1, none, boot, bag"),
        (["--class", "2"], "--class is 2; allowed: 0 to 1, none, boot, bag"),
        (["--guidance", "2"], "--guidance is 2, but no class is given; allowed: with a class"),
        (["--class", "boot", "--guidance", "-1"], "--guidance is -1.0; allowed: finite numbers >= 0"),
        (
            ["--class", "boot", "--guidance-interval", "3"],
            "--guidance-interval has length 1; allowed: (lo, hi)",
        ),
        (["--class", "boot", "--guidance-interval", "3,21"], "--guidance-interval is (3, 21); allowed"),
    ],
)
def test_refused(folder, tmp_path, capfd, flags, words):
    err = refused(capfd, "sample", folder, "--out", tmp_path / "out", *flags)
    assert err.startswith(f"hf-ddpm sample: error: {words}")
    assert not (tmp_path / "out").exists()


def test_a_model_without_classes(tiny_folder, tmp_path, capfd):
    for flags, words in (
        (["--class", "all"], "--class is 'all', but the network knows no classes"),
        (["--guidance", "2"], "--guidance is 2, but the network knows no classes"),
    ):
        assert words in refused(capfd, "sample", tiny_folder, "--out", tmp_path / "out", *flags)


def test_a_class_that_is_named_as_a_word_of_the_command(folder, tmp_path, capfd):
    pipeline = DDPMPipeline.from_pretrained(folder)
    pipeline.id2label = {0: "all", 1: "none"}
    pipeline.save_pretrained(tmp_path / "odd")
    for word in ("all", "none"):
        err = refused(capfd, "sample", tmp_path / "odd", "--out", tmp_path / "out", "--class", word)
        assert f"class '{word}' may be the one of that name" in err
    assert sample(tmp_path / "odd", tmp_path / "out", *FEW, "--class", "0")
