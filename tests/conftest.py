"""Fixtures that several test files share, and one thread per test process: pytest-xdist starts two."""

import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch, and for processes that tests start
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell gives it to its background jobs
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests send it, to themselves and to processes

import pytest
import torch
from huggingface_hub import close_session
from PIL import Image

from hf_ddpm.config import TrainConfig
from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.evaluation.evaluate import evaluate
from hf_ddpm.generation.grids import save_image
from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.models import create_model
from hf_ddpm.scheduler import DDPMScheduler
from tests.local_hub import LocalHub


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A saved pipeline of untrained weights, to be read only: 8x8 grey images, 20 steps, fixed_large."""
    torch.manual_seed(0)
    scheduler = DDPMScheduler(20, beta_end=0.5, variance_type="fixed_large")
    folder = tmp_path_factory.mktemp("tiny") / "model"
    DDPMPipeline(create_model("tiny").eval(), scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def run_folder(tiny_folder, tmp_path_factory):
    """A run's folder, to be read only: `tiny_folder` beside what a run and its evaluation leave."""
    run = tmp_path_factory.mktemp("runs") / "tiny-run"
    shutil.copytree(tiny_folder, run)
    facts = {"num_train_timesteps": 20, "beta_end": 0.5, "ema_decay": "0.99,0.9", "batch_size": 4}
    config = TrainConfig(dataset="digits", model="tiny", output_dir=str(run), max_steps=6, **facts)
    (run / "train_config.json").write_text(config.to_json())
    lines = [
        {"step": 3, "images": 12, "loss": 0.9, "lr": 1e-4},
        {"step": 6, "images": 24, "loss": 0.75, "lr": 2e-4},
        {"step": 6, "heldout_images": 10, "heldout_bpd": 7.0, "heldout_stderr": 0.25},
    ]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "im')
    for step, grey in ((3, 50), (6, 200)):
        save_image(Image.new("L", (8, 8), grey), run / "samples" / f"step-{step:08d}.png")
    for name in ("checkpoints/step-00000006/optimizer.pt", "heldout/step-00000006.safetensors", "secret.txt"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(b"not for the Hub")
    other = DDPMPipeline.from_pretrained(tiny_folder).unet
    other.conv_out.bias.data += 1
    other.save_pretrained(run / "unet", variant="ema_0_9")
    classifier = Path(__file__).parents[1] / "train_scripts" / "classifiers" / "digits"
    measured = {"num_images": 8, "num_evals_per_image": 2, "extractor": str(classifier), "num_samples": 12}
    evaluate(
        EvaluationConfig(model=str(run), dataset="digits", **measured), "hf-ddpm evaluate runs/tiny digits"
    )
    return run


@pytest.fixture
def no_hub(monkeypatch):
    """No test asks the Hub: whatever would, gets the answer of a machine without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture
def local_hub(monkeypatch, tmp_path):
    """A Hub of its own for a test; the client of this process talks to it."""
    with LocalHub() as hub:
        hub.use(monkeypatch, tmp_path / "hub-home")
        yield hub
        close_session()  # a connection kept open would end with the server


@pytest.fixture
def open_folder():
    """A folder that everyone can reach, unlike tmp_path."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)
