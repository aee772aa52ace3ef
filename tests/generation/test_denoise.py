"""DDPMPipeline.denoise: x_0 given the x_t of any step."""

import re

import numpy as np
import pytest
import torch

from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.generation.samplers import swap_scheduler
from hf_ddpm.scheduler import DDPMScheduler
from tests.generation.networks import ABAR, gaussian, quiet, seeds, short, tiny

# numpy tells diffusers' schedulers what numpy 3 will want of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*(copy keyword|__array_wrap__):DeprecationWarning")


def visited(pipeline, t, steps=None):
    """The steps that `denoise` executes."""
    seen = []
    pipeline.denoise(
        torch.zeros(1, 1, 8, 8),
        t,
        num_inference_steps=steps,
        callback_on_step_end=lambda owner, step, t, kept: seen.append(int(t)),
    )
    return seen


def test_denoise_visits_the_steps_from_t_down():
    pipeline = quiet(DDPMPipeline(tiny(), short()))
    assert visited(pipeline, 7) == [7, 6, 5, 4, 3, 2, 1, 0]
    assert visited(pipeline, 0) == [0]
    # Five of twenty are 17, 13, 9, 4, 0: at 16 the images are not yet forgotten.
    for t, steps in {10: [10, 9, 4, 0], 8: [8, 4, 0], 2: [2, 0], 19: [19, 17, 13, 9, 4, 0]}.items():
        assert visited(pipeline, t, 5) == steps
    assert visited(pipeline, 3, 1) == [3]


@pytest.mark.parametrize("steps", [None, 5])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_denoise_from_noise_is_a_call(steps, variance_type):
    pipeline = quiet(DDPMPipeline(tiny(), short(variance_type=variance_type)))
    images = pipeline(3, seeds(3), steps, "pt").images
    first, generators = int(pipeline.scheduler.timesteps[0]), seeds(3)
    noise = torch.cat([torch.randn(1, 1, 8, 8, generator=generator) for generator in generators])
    x_0 = pipeline.denoise(noise, first, generators, steps)
    np.testing.assert_allclose((x_0 / 2 + 0.5).clamp(0, 1), images, atol=1e-6)
    for generator in (seeds(1)[0], None):
        assert pipeline.denoise(noise, 10, generator).shape == noise.shape


@pytest.mark.parametrize("steps", [None, 20])
@pytest.mark.parametrize("t", [0, 100, 500])
def test_denoise_of_a_gaussian_has_the_posterior_mean(t, steps):
    # Each step's mean is linear in x_t and exact, so the mean after all of them is E[x_0 | x_t] for any σ.
    mean, std, value = 0.2, 0.25, 0.7
    pipeline = quiet(DDPMPipeline(gaussian(mean, std), DDPMScheduler(clip_sample=False)))
    x_0 = pipeline.denoise(torch.full((1, 1, 64, 64), value), t, seeds(1)[0], steps)
    expected = (mean / std**2 + ABAR[t] ** 0.5 / (1 - ABAR[t]) * value) / (
        1 / std**2 + ABAR[t] / (1 - ABAR[t])
    )
    assert abs(x_0.double().mean() - expected) < 5 * x_0.std() / 64 + 1e-5  # rounding, at t = 0
    if t == 500 and steps is None:
        spread = (1 / (1 / std**2 + ABAR[t] / (1 - ABAR[t]))) ** 0.5
        assert x_0.std().item() == pytest.approx(spread, rel=0.06)  # five standard errors of 4096 pixels


def test_equal_seeds_are_equal_noise():
    pipeline = quiet(DDPMPipeline(gaussian(0.2, 0.25), DDPMScheduler(clip_sample=False)))
    x_t = torch.stack([torch.full((1, 4, 4), value) for value in (0.0, 1.0, 1.0)])
    same = [torch.Generator().manual_seed(7) for _ in range(3)]
    a, b, c = pipeline.denoise(x_t, 300, same)
    assert torch.equal(b, c)
    assert (b - a).std() < 1e-5 < (b - a).mean()  # the network is linear, so the noise cancels
    d, e = pipeline.denoise(x_t[1:], 300, seeds(2))
    assert (d - e).std() > 0.01


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"t": 20}, "t is 20; allowed: whole numbers in 0..19"),
        ({"t": -1}, "t is -1; allowed: whole numbers in 0..19"),
        ({"t": 2.0}, "t is 2.0; allowed: whole numbers in 0..19"),
        (
            {"x_t": torch.zeros(8, 8)},
            "x_t is a float32 tensor of shape (8, 8); allowed: floating point, (B, C, H, W)",
        ),
        ({"x_t": torch.zeros(1, 3, 8, 8)}, "(3, 8, 8); allowed: (1, H, W) with H and W multiples of 2"),
        ({"generator": seeds(3)}, "3 generators for a batch of 2; allowed: one, or one per image"),
        ({"num_inference_steps": 21}, "num_inference_steps is 21; allowed: whole numbers in 1..20"),
    ],
    ids=lambda part: part if isinstance(part, str) else ", ".join(part),
)
def test_denoise_refuses(arguments, words):
    pipeline = quiet(DDPMPipeline(tiny(), short()))
    with pytest.raises(ValueError, match=re.escape(words)):
        pipeline.denoise(**{"x_t": torch.zeros(2, 1, 8, 8), "t": 5, **arguments})


def test_other_samplers_cannot_start_in_the_middle():
    pipeline = quiet(DDPMPipeline(tiny(), short()))
    swap_scheduler(pipeline, "ddim")
    with pytest.raises(
        ValueError, match=r"the scheduler is 'DDIMScheduler'; allowed: DDPMScheduler \(ddpm\)"
    ):
        pipeline.denoise(torch.zeros(1, 1, 8, 8), 5)
