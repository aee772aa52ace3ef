"""Runs that several tests of training look at."""

from pathlib import Path

import pytest

from hf_ddpm import train
from tests.training.helpers import again


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A run of four steps with checkpoints 2 and 4; treat it as read-only, or copy it."""
    folder = tmp_path_factory.mktemp("finished")
    train(again(folder))
    return folder


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    for path in finished.rglob("*"):
        if path.is_file():
            target = tmp_path / "run" / path.relative_to(finished)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path / "run"
