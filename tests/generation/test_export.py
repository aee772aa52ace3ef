"""`hf-ddpm export`: a class baked into the time embedding, sampled by plain diffusers without hf_ddpm."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from hf_ddpm import DDPMPipeline, create_model
from hf_ddpm.cli import main
from hf_ddpm.generation.export import export, without_classes
from hf_ddpm.models import PRESETS
from tests.commands import refused
from tests.generation.networks import quiet, seeds, short
from tests.generation.test_portable import ELSEWHERE

UNETS = [name for name, config in PRESETS.items() if config["_class_name"] == "UNet2DModel"]


def classy(folder=None, names=("boot", "<b>bag</b>"), **changes):
    torch.manual_seed(0)
    network = create_model("tiny", num_classes=2).eval()
    nn.init.normal_(network.class_embedding.weight, std=4)
    pipeline = quiet(DDPMPipeline(network, short(**changes)))
    pipeline.id2label = dict(enumerate(names))
    if folder is not None:
        pipeline.save_pretrained(folder)
    return pipeline


@pytest.mark.parametrize("name", UNETS)
def test_the_network_answers_as_for_the_class(name):
    """Small numbers of channels: the structure is the preset's."""
    torch.manual_seed(0)
    config = dict(PRESETS[name])
    widths = tuple(16 * (1 + i % 2) for i in range(len(config["block_out_channels"])))
    side = 2 ** (len(widths) - 1) * 2
    small = {"block_out_channels": widths, "norm_num_groups": 4, "sample_size": side, "num_class_embeds": 4}
    network = type(create_model("tiny")).from_config(config | small).eval()
    x_t, t = torch.randn(2, config["in_channels"], side, side), torch.tensor([3, 900])
    for label in (1, 3):  # 3 is no class
        plain = without_classes(network, label)
        assert plain.config.num_class_embeds is None and plain.class_embedding is None and not plain.training
        with torch.no_grad():
            expected, found = network(x_t, t, torch.tensor([label] * 2)).sample, plain(x_t, t).sample
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_plain_diffusers_samples_it_where_hf_ddpm_is_not_installed(tmp_path):
    pipeline = classy(tmp_path / "model")
    main(["export", str(tmp_path / "model"), "--class", "boot", "--out", str(tmp_path / "deep" / "boots")])
    main(["export", str(tmp_path / "model"), "--class", "none", "--out", str(tmp_path / "none")])
    folders = [tmp_path / "deep" / "boots", tmp_path / "none"]
    files = {path.relative_to(folders[0]).as_posix() for path in folders[0].rglob("*") if path.is_file()}
    assert files == {
        "README.md",
        "model_index.json",
        "notes.md",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    subprocess.run([sys.executable, "-c", ELSEWHERE, *map(str, folders)], check=True)
    for folder, label in zip(folders, ("boot", None), strict=True):
        pipeline.scheduler.set_timesteps(20)
        wanted = pipeline(3, seeds(1)[0], 20, "np", class_labels=label).images
        ours = quiet(DDPMPipeline.from_pretrained(folder))(3, seeds(1)[0], 20, "np").images
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5)
        np.testing.assert_allclose(np.load(folder / "DDPMPipeline.npy"), wanted, rtol=0, atol=2e-4)


def test_its_card(tmp_path):
    classy(tmp_path / "model")
    card = (export(tmp_path / "model", 1, tmp_path / "bags") / "README.md").read_text()
    assert "The class “&#60;b&#62;bag&#60;/b&#62;” of the class-conditional model" in card
    assert "from diffusers import DDPMPipeline" in card and "<b>" not in card
    classy(tmp_path / "mean", prediction_type="mean")
    card = (export(tmp_path / "mean", "none", tmp_path / "mean-none") / "README.md").read_text()
    assert "The model without a class of the" in card and "from hf_ddpm import DDPMPipeline" in card


def test_half_precision_weights(tmp_path):
    pipeline = classy().to(torch.float16)
    pipeline.save_pretrained(tmp_path / "half")
    export(tmp_path / "half", 0, tmp_path / "boots")
    whole, plain = (DDPMPipeline.from_pretrained(tmp_path / name).unet for name in ("half", "boots"))
    x_t, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 900])
    with torch.no_grad():
        expected = whole(x_t, t, torch.tensor([0, 0])).sample
        torch.testing.assert_close(plain(x_t, t).sample, expected, rtol=0, atol=1e-5)


def test_refused(tmp_path, tiny_folder, capfd):
    classy(tmp_path / "model")
    quiet(DDPMPipeline(create_model("shallow-autoencoder", num_classes=2), short())).save_pretrained(
        tmp_path / "auto"
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.jpg").touch()
    (tmp_path / "file").touch()
    for words, said in (
        ((tmp_path / "model", "--class", "bot", "--out", "new"), "--class is 'bot' (did you mean 'boot'?)"),
        ((tmp_path / "model", "--class", "2", "--out", "new"), "--class is 2; allowed: 0 to 1, none, boot"),
        ((tiny_folder, "--class", "0", "--out", "new"), "knows no classes; allowed: a class-conditional one"),
        (
            (tmp_path / "auto", "--class", "0", "--out", "new"),
            "is a DenseAutoencoder; allowed: a UNet2DModel",
        ),
        (
            (tmp_path / "model", "--class", "0", "--out", tmp_path / "full"),
            "holds 'photo.jpg'; allowed: a new",
        ),
        ((tmp_path / "model", "--class", "0", "--out", tmp_path / "model"), "allowed: a new or an empty"),
        ((tmp_path / "model", "--class", "0", "--out", tmp_path / "file"), "can't be written: File exists"),
        ((tmp_path / "model", "--out", "new"), "required: --class"),
    ):
        assert said in refused(capfd, "export", *words)
    assert (tmp_path / "full" / "photo.jpg").exists()
