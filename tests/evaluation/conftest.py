"""What the tests of `hf-ddpm evaluate` watch: pictures that are plotted, and what the networks are asked."""

from pathlib import Path

import pytest

import hf_ddpm.evaluation.evaluate
import hf_ddpm.evaluation.memorisation
import hf_ddpm.evaluation.plots
import hf_ddpm.evaluation.sweep
from hf_ddpm.denoiser import Counted
from hf_ddpm.metrics import Extractor


@pytest.fixture
def real_pictures():
    """Asked for by a test that wants the plots, which take seconds."""


@pytest.fixture(autouse=True)
def pictures(request, monkeypatch):
    """What is plotted, by the file's name, instead of plotting; the files are there, and empty."""
    seen = {}

    def plot(*what):
        (path,) = (argument for argument in what if isinstance(argument, Path))
        seen[path.name] = tuple(argument for argument in what if argument is not path)
        path.touch()
        return path

    if "real_pictures" not in request.fixturenames:
        for module, name in (
            (hf_ddpm.evaluation.evaluate, "plot_bits_per_step"),
            (hf_ddpm.evaluation.evaluate, "plot_rate_distortion"),
            (hf_ddpm.evaluation.sweep, "plot_sweep"),
            (hf_ddpm.evaluation.plots, "plot_reconstructions"),
            (hf_ddpm.evaluation.memorisation, "plot_reconstructions"),
        ):
            monkeypatch.setattr(module, name, plot)
    return seen


@pytest.fixture
def evaluations(monkeypatch):
    """Images that the network is asked about while scoring, one entry per call."""
    seen, call = [], Counted.__call__

    def counted(self, x_t, t):
        seen.append(len(x_t))
        return call(self, x_t, t)

    monkeypatch.setattr(Counted, "__call__", counted)
    return seen


@pytest.fixture
def extracted(monkeypatch):
    """Batches that the feature network looks at."""
    seen, call = [], Extractor.__call__

    def watched(self, images_uint8):
        seen.append(images_uint8)
        return call(self, images_uint8)

    monkeypatch.setattr(Extractor, "__call__", watched)
    return seen
