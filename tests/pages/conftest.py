"""The folder in which the pages' blocks are run: a clone's root, with photos and small models in it."""

import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
from PIL import Image

from hf_ddpm import DDPMPipeline, DDPMScheduler, TrainConfig, create_model, train
from tests.pages.reading import ROOT

# Not of a clone, or made by the blocks
OWN = {"runs", "data", "site", "dist", ".venv", ".git"}
SIZES = [(40, 32), (32, 48), (64, 64), (33, 50), (80, 45), (32, 32), (50, 70), (36, 36)] * 10


def draw_photos(folder: Path) -> None:
    """Photos as people have them: of many sizes, JPEG and PNG, one of them grey."""
    folder.mkdir(parents=True)
    draws = np.random.default_rng(0)
    for number, (width, height) in enumerate(SIZES):
        colours = draws.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        photo = Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)
        (photo.convert("L") if number == 3 else photo).save(folder / f"{number}.{('jpg', 'png')[number % 2]}")


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """What the blocks find: photos, and runs of two steps of the smallest network."""
    root = tmp_path_factory.mktemp("made")
    for photos in ("photos", "photos-test"):
        draw_photos(root / photos)
    small = {"model": "tiny", "max_steps": 2, "batch_size": 4, "sample_every": 0}
    train(TrainConfig(dataset="digits", output_dir=str(root / "runs" / "digits"), **small))
    photos = {
        "dataset": str(root / "photos"),
        "image_size": "32",
        "fit": "resize_crop",
        "channels": 3,
        "holdout": 0.05,
    }
    train(TrainConfig(output_dir=str(root / "runs" / "photos"), **photos, **small))
    shutil.copytree(root / "runs" / "photos", root / "runs" / "other")
    network = create_model("tiny", image_size=32, channels=3)
    diffusers.DDPMPipeline(network, diffusers.DDPMScheduler()).save_pretrained(root / "my-model")
    pipeline = DDPMPipeline(create_model("tiny", num_classes=2), DDPMScheduler())
    pipeline.id2label = {0: "boot", 1: "bag"}
    pipeline.save_pretrained(root / "runs" / "clothes")
    Image.fromarray(np.eye(8, dtype=bool)).save(root / "mask.png")
    (root / "run.toml").write_text('dataset = "digits"\n')
    return root


@pytest.fixture
def clone(made, tmp_path, monkeypatch):
    """The root of a clone, which is the current folder: `made`, and links to all that the repository has."""
    for path in ROOT.iterdir():
        if path.name not in OWN:
            (tmp_path / path.name).symlink_to(path)
    for name in ("runs", "my-model"):
        shutil.copytree(made / name, tmp_path / name)
    for name in ("photos", "photos-test", "run.toml", "mask.png"):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path
