"""How `hf-ddpm train` and `evaluate` read images with alpha, of another depth, and of other channels."""

import json

import numpy as np
import pytest
import torch

from hf_ddpm import DDPMPipeline, DDPMScheduler, TrainConfig, create_model
from hf_ddpm.cli import main
from hf_ddpm.data.pixels import image_digest
from hf_ddpm.evaluation.images import fingerprint
from hf_ddpm.pictures import open_image
from tests.commands import sample
from tests.evaluation.commands import grey, refused, run, write_images

FEW = ("--num-evals-per-image", 2)


def model_of(folder, num_channels, **record):
    """An untrained pipeline; with the record of a run if there is something to record."""
    torch.manual_seed(0)
    scheduler = DDPMScheduler(20)
    DDPMPipeline(create_model("tiny", channels=num_channels).eval(), scheduler).save_pretrained(folder)
    if record:
        config = TrainConfig(num_train_timesteps=20, **record)
        (folder / "train_config.json").write_text(config.to_json())
    return folder


def train(tmp_path, data, *flags):
    """One step, into tmp_path / "run"."""
    words = ["--dataset", data, "--model", "tiny", "--max-steps", 1, "--batch-size", 2, *flags]
    words += ["--num-train-timesteps", 4, "--output-dir", tmp_path / "run"]
    main(["train", *(str(word) for word in words)])


def print_of(images):
    """What an evaluation calls images (N, H, W, C)."""
    tensors = torch.from_numpy(images).permute(0, 3, 1, 2)
    return fingerprint(torch.tensor([image_digest(image) for image in tensors]))


def on(ground, images):
    """Images (N, H, W, 4) on a ground."""
    alpha = images[..., 3:].astype(float)
    return np.floor((images[..., :3] * alpha + ground * (255 - alpha)) / 255 + 0.5).astype(np.uint8)


def test_the_ground_is_that_of_the_training(tmp_path, caplog):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 4), dtype=np.uint8)
    data = write_images(tmp_path / "data", images)
    model = model_of(tmp_path / "model", 3, background="black")
    report, _ = run(model, tmp_path / "a", *FEW, dataset=data)
    assert report["data"]["background"] == "black" and report["data"]["shape"] == [3, 8, 8]
    assert report["data"]["fingerprint"] == print_of(on(0, images))
    assert "background" not in caplog.text
    report, _ = run(model, tmp_path / "b", "--background", "#ffffff", *FEW, dataset=data)
    assert "background is #ffffff, the model was trained on black" in caplog.text
    assert report["data"]["fingerprint"] == print_of(on(255, images))
    report, _ = run(model_of(tmp_path / "plain", 3), tmp_path / "c", *FEW, dataset=data)
    assert report["data"]["fingerprint"] == print_of(on(255, images))


def test_alpha_is_kept_for_a_model_that_has_it(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 4), dtype=np.uint8)
    data = write_images(tmp_path / "data", images)
    report, _ = run(model_of(tmp_path / "model", 4), tmp_path / "out", *FEW, dataset=data)
    assert report["data"]["fingerprint"] == print_of(images) and report["data"]["channels"] == 4


def test_channels_are_those_of_the_training(tmp_path, capfd):
    images = grey(3)
    data = write_images(tmp_path / "data", images)
    report, _ = run(model_of(tmp_path / "model", 3, channels=3), tmp_path / "out", *FEW, dataset=data)
    assert report["data"]["fingerprint"] == print_of(np.repeat(images[..., None], 3, axis=3))
    plain = model_of(tmp_path / "plain", 3)
    words = "3 images of 8x8, mode L, for a network of 3x8x8 (CxHxW): add --channels 3"
    assert words in refused(capfd, plain, data, "--out", tmp_path / "b")
    run(plain, tmp_path / "b", "--channels", 3, *FEW, dataset=data)


def test_deep_images_are_converted_if_asked(tiny_folder, tmp_path, capsys):
    deep = grey(4, dtype=np.uint16, top=65536)
    data = write_images(tmp_path / "data", deep)
    report, _ = run(tiny_folder, tmp_path / "a", "--to-8-bit", *FEW, dataset=data)
    assert report["data"]["to_8_bit"] is True and "converted to 8 bits" in capsys.readouterr().out
    wanted = np.floor(deep / 257 + 0.5).astype(np.uint8)[..., None]
    assert report["data"]["fingerprint"] == print_of(wanted)


@pytest.mark.parametrize("bad", ["red", "#12345"])
def test_grounds_that_are_none(tiny_folder, tmp_path, capfd, bad):
    line = refused(capfd, tiny_folder, "digits", "--out", tmp_path / "out", "--background", bad)
    assert f"background is '{bad}'; allowed: white, black, or a colour as in '#ff8000'" in line


def test_interpolation_reads_as_the_training_did(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 4), dtype=np.uint8)
    data = write_images(tmp_path / "data", images)
    for channels, background, wanted in [(3, "black", on(0, images)), (4, "white", images)]:
        found = open_image(f"{data}:test:0", (channels, 8, 8), background=background)
        assert torch.equal(found, torch.from_numpy(wanted[0]).permute(2, 0, 1))


def test_a_model_with_alpha_is_trained_and_sampled(tmp_path):
    data = write_images(tmp_path / "data", grey(8), split="train")
    train(tmp_path, data, "--channels", 2, "--sample-every", 1, "--sample-num-images", 2)
    assert (tmp_path / "run" / "samples" / "step-00000001.png").is_file()
    images = sample(tmp_path / "run", tmp_path / "out", "--num-images", 2, "--steps", 2)
    assert images["00001.png"].shape == (8, 8, 2) and images["grid.png"].shape[2] == 3


def test_training_on_deep_images_is_refused_or_recorded(tmp_path, capfd):
    data = write_images(tmp_path / "data", grey(8, dtype=np.uint16, top=256), split="train")
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, data, "--skip-corrupt")
    words = "train: error: 8 images of 8x8, mode 16-bit L: add --to-8-bit\n"
    assert stop.value.code == 2 and capfd.readouterr().err.endswith(words)
    train(tmp_path, data, "--to-8-bit", "--background", "#ff8000", "--channels", 4, "--sample-every", 0)
    record = json.loads((tmp_path / "run" / "train_config.json").read_text())
    assert record["to_8_bit"] is True and record["background"] == "#ff8000"
    images = sample(tmp_path / "run", tmp_path / "out", "--num-images", 2, "--steps", 2)
    assert images["00001.png"].shape == (8, 8, 4) and images["grid.png"].shape[2] == 3
