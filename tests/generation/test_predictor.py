"""predictor.py: x̂_0 and score of data that are known, from networks of all five prediction types."""

import re

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.generation.samplers import swap_scheduler
from hf_ddpm.parametrization import PREDICTION_TYPES
from hf_ddpm.scheduler import DDPMScheduler
from tests.oracles import betas_by_definition

MEAN, VARIANCE = 0.3, 0.0625
SCHEDULES = {
    "linear": {},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "constant": {"num_train_timesteps": 50, "beta_start": 0.2, "beta_end": 0.2},
}


def posterior_mean(x_t, abar):
    """E[x_0 | x_t] of x_0 ~ N(MEAN, VARIANCE): precisions add."""
    precision = 1 / VARIANCE + abar / (1 - abar)
    return (MEAN / VARIANCE + abar**0.5 / (1 - abar) * x_t) / precision


def marginal_score(x_t, abar):
    """∇ log N(x_t; √ᾱ MEAN, ᾱ VARIANCE + 1 − ᾱ)."""
    return -(x_t - abar**0.5 * MEAN) / (abar * VARIANCE + 1 - abar)


def exact_network(name, kind, learned=False):
    """The network of that prediction type whose x̂_0 is exact; μ̃ by its definition (docs/maths.md 2)."""
    beta = torch.from_numpy(betas_by_definition(name))
    abars = torch.cumprod(1 - beta, 0)

    def network(x_t, t):
        b, abar = (z[t].view(-1, 1, 1, 1) for z in (beta, abars))
        prev = torch.where(t > 0, abars[(t - 1).clamp(min=0)], 1.0).view(-1, 1, 1, 1)
        x_0, s2 = posterior_mean(x_t, abar), 1 - abar
        eps = (x_t - abar.sqrt() * x_0) / s2.sqrt()
        output = {
            "epsilon": eps,
            "sample": x_0,
            "v_prediction": abar.sqrt() * eps - s2.sqrt() * x_0,
            "mean": (prev.sqrt() * b * x_0 + (1 - b).sqrt() * (1 - prev) * x_t) / s2,
            "score": -eps / s2.sqrt(),
        }[kind]
        return torch.cat([output, torch.full_like(output, 7.0)], 1) if learned else output

    return network


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_gaussian_data_of_which_the_score_is_known(kind, name):
    scheduler = DDPMScheduler(**SCHEDULES[name], prediction_type=kind)
    pipeline, x_t = DDPMPipeline(exact_network(name, kind), scheduler), draw(3, 2, 3, 5)
    scheduler.set_timesteps(7)  # sampling's choice, which is none of its business
    abars, last = np.cumprod(1 - betas_by_definition(name)), len(scheduler) - 1
    for t in (0, 1, last // 2, last - 1, last):
        x_0, score, abar = pipeline.predict_x0(x_t, t), pipeline.score(x_t, t), abars[t]
        torch.testing.assert_close(x_0, posterior_mean(x_t, abar), rtol=0, atol=1e-6)  # 1/c0 of `mean`
        torch.testing.assert_close(score, marginal_score(x_t, abar), rtol=1e-7, atol=1e-8)
        # Tweedie both ways, with the definition's ᾱ.
        torch.testing.assert_close(x_t + (1 - abar) * score, abar**0.5 * x_0, rtol=0, atol=1e-9)
    assert len(scheduler.timesteps) == 7
    t = torch.tensor([0, last // 2, last])
    for asked in (pipeline.predict_x0, pipeline.score):
        alone = torch.cat([asked(x_t[i : i + 1], int(t[i])) for i in range(3)])
        torch.testing.assert_close(asked(x_t, t), alone, rtol=1e-9, atol=1e-9)


def test_the_score_is_the_mean_of_conditional_scores():
    # One pixel, T/2: the average of ∇ log q(x_t | x_0) over draws of x_0 given x_t, five standard errors.
    pipeline, x_t = DDPMPipeline(exact_network("linear", "epsilon"), DDPMScheduler()), draw(1, 1, 1, 1)
    abar = np.cumprod(1 - betas_by_definition("linear"))[500]
    spread = (1 / (1 / VARIANCE + abar / (1 - abar))) ** 0.5
    x_0 = posterior_mean(x_t, abar) + spread * draw(10_000, 1, 1, 1, seed=1)
    conditional = -(x_t - abar**0.5 * x_0) / (1 - abar)
    error = 5 * conditional.std() / len(conditional) ** 0.5
    assert abs(conditional.mean() - pipeline.score(x_t, 500).item()) < error
    assert conditional.std() > 0.05  # of which no single one is the score


def test_of_a_network_that_learns_variances_the_first_half_counts():
    scheduler = DDPMScheduler(variance_type="learned_range")
    learned = DDPMPipeline(exact_network("linear", "epsilon", learned=True), scheduler)
    plain = DDPMPipeline(exact_network("linear", "epsilon"), DDPMScheduler())
    x_t = draw(2, 3, 4, 4)
    for name in ("score", "predict_x0"):
        torch.testing.assert_close(getattr(learned, name)(x_t, 500), getattr(plain, name)(x_t, 500))


def test_other_samplers_and_dtypes():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.5, dtype=torch.bfloat16))

        def forward(self, x_t, t):
            assert x_t.dtype == torch.bfloat16
            return self.weight * x_t

    pipeline, x_t = DDPMPipeline(Half(), DDPMScheduler()), draw(2, 1, 2, 2).float()
    ours = pipeline.score(x_t, 10)
    assert ours.dtype == torch.float32 and not ours.requires_grad
    swap_scheduler(pipeline, "euler")
    assert type(pipeline.scheduler) is diffusers.EulerDiscreteScheduler
    torch.testing.assert_close(pipeline.score(x_t, 10), ours)


def test_zero_terminal_snr_has_a_score_and_no_x0():
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True)
    pipeline, x_t = DDPMPipeline(lambda x_t, t: x_t, scheduler), draw(1, 1, 2, 2)
    torch.testing.assert_close(pipeline.score(x_t, 999), -x_t)
    with pytest.raises(ValueError, match="alphas_cumprod is 0 at step 999"):
        pipeline.predict_x0(x_t, 999)


@pytest.mark.parametrize(
    ("x_t", "t", "words"),
    [
        (torch.zeros(2, 1, 2, 2), 1000, "step t = 1000 is not in the chain; allowed: whole numbers 0..999"),
        (torch.zeros(2, 1, 2, 2), -1, "step t = -1 is not in the chain"),
        (torch.zeros(2, 1, 2, 2), 0.5, "step t = 0.5 is not in the chain"),
        (torch.zeros(2, 1, 2, 2), torch.tensor([0, 1000]), "step t = 1000 is not in the chain"),
        (torch.zeros(2, 1, 2, 2), torch.zeros(3, dtype=torch.int64), "t has shape (3,) for 2 images"),
        (
            torch.zeros(2, 2),
            0,
            "x_t is a float32 tensor of shape (2, 2); allowed: floating point, (B, C, H, W)",
        ),
        (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), 0, "x_t is a uint8 tensor of shape"),
    ],
    ids=str,
)
def test_bad_argument(x_t, t, words):
    pipeline = DDPMPipeline(exact_network("linear", "epsilon"), DDPMScheduler())
    for asked in (pipeline.predict_x0, pipeline.score):
        with pytest.raises(ValueError, match=re.escape(words)) as error:
            asked(x_t, t)
        assert "\n" not in str(error.value)


def test_a_scheduler_that_says_no_process_is_refused():
    # `from_config` would fill in a schedule that the network was not trained with.
    pipeline = DDPMPipeline(lambda x_t, t: x_t, diffusers.EDMEulerScheduler())
    for ask in (pipeline.score, pipeline.predict_x0):
        with pytest.raises(ValueError, match="the scheduler, EDMEulerScheduler, has no beta_schedule"):
            ask(torch.zeros(1, 1, 2, 2), 500)
