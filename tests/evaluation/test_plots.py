"""plots.py: that the curves of the bound are drawn."""

import pytest
import torch

from hf_ddpm.evaluation.plots import plot_bits_per_step, plot_rate_distortion
from hf_ddpm.likelihood import estimate_bound, evaluate_bound, rate_distortion
from hf_ddpm.scheduler import DDPMScheduler
from tests.generation.test_grids import opened


def results(steps=12, images=3):
    """The exact bound and an estimate of a network that answers 0."""
    process = DDPMScheduler(steps, beta_end=0.5).process
    x_0 = torch.randint(0, 256, (images, 1, 4, 4), generator=torch.Generator().manual_seed(0)) / 127.5 - 1
    options = {"variance_type": "fixed_large"}

    def zero(x_t, t):
        return torch.zeros_like(x_t)

    exact = evaluate_bound(process, zero, x_0, generator=torch.Generator().manual_seed(0), **options)
    return exact, estimate_bound(process, zero, x_0, num_evals_per_image=5, **options)


@pytest.mark.parametrize("kind", [0, 1], ids=["bound", "estimate"])
def test_curves(kind, tmp_path, recwarn):
    curve = rate_distortion(results()[kind])
    path = tmp_path / "new" / "bits.png"
    assert plot_bits_per_step(curve, path) == path
    opened(path)
    opened(plot_rate_distortion(curve, tmp_path / "rate.png"))
    assert not list(recwarn)  # such as of zeros on a logarithmic axis


def test_curve_of_two_steps_and_one_image(tmp_path):
    curve = rate_distortion(results(2, 1)[0])
    opened(plot_bits_per_step(curve, tmp_path / "bits.png"))
    opened(plot_rate_distortion(curve, tmp_path / "rate.png"))
