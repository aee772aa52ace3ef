"""Fixtures that several test files share, and one thread per test process: pytest-xdist starts two."""

import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch, and for processes that tests start

import pytest
import torch

from hf_ddpm.models import create_model
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.scheduler import DDPMScheduler


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A saved pipeline of untrained weights, to be read only: 8x8 grey images, 20 steps, fixed_large."""
    torch.manual_seed(0)
    scheduler = DDPMScheduler(20, beta_end=0.5, variance_type="fixed_large")
    folder = tmp_path_factory.mktemp("tiny") / "model"
    DDPMPipeline(create_model("tiny").eval(), scheduler).save_pretrained(folder)
    return folder


@pytest.fixture
def no_hub(monkeypatch):
    """No test asks the Hub: whatever would, gets the answer of a machine without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture
def open_folder():
    """A folder that everyone can reach, unlike tmp_path."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)
