"""schedules.py: every β against its definition, the table of maths.md section 1, and diffusers' own schedules."""

import math

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from numpy.testing import assert_allclose
from oracles import STEPS, betas_by_definition, chain

from hf_ddpm.gaussian import bits_per_dim, normal_kl
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.schedules import SCHEDULES, make_betas, rescale_zero_terminal_snr


@pytest.mark.parametrize("name", STEPS)
def test_betas_by_definition(name):
    assert_allclose(chain(name).betas, betas_by_definition(name), rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "last_alpha_bar", "second_variance", "prior_bits"),
    [
        ("linear", 4.03582976538e-5, 5.45318766130e-5, 2.91129454203e-5),
        ("scaled_linear", 7.33412459581e-4, 5.0656004274e-5, 5.29239358283e-4),
        ("squaredcos_cap_v2", 2.42876690703e-9, 2.17894961457e-5, 1.75198495e-9),
        ("sigmoid", 3.96818199053e-5, 7.47561767314e-5, 2.86249503442e-5),
        ("constant", 0.8**50, 1 / 9, 1.02954893e-5),
    ],
)
def test_table_of_section_1(name, last_alpha_bar, second_variance, prior_bits):
    process = chain(name)
    assert process.alphas_cumprod[-1].item() == pytest.approx(last_alpha_bar, rel=1e-11)
    assert process.posterior_variance[1].item() == pytest.approx(second_variance, rel=2e-11)
    # L_T of a pixel at ±1, as the KL it is and as the process reports it.
    zero = torch.zeros((), dtype=torch.float64)
    kl = normal_kl(process.sqrt_alphas_cumprod[-1], process.one_minus_alphas_cumprod[-1].log(), zero, zero)
    assert bits_per_dim(kl, 1).item() == pytest.approx(prior_bits, rel=5e-9)
    assert process.prior_bpd_at_edges == pytest.approx(prior_bits, rel=5e-9)


def test_linear_end_points_belong_to_a_thousand_steps():
    process = DiffusionProcess.from_betas(make_betas("linear", 50))
    assert process.alphas_cumprod[-1].item() == pytest.approx(0.603, abs=5e-4)
    assert process.prior_bpd_at_edges == pytest.approx(0.67, abs=5e-3)


@pytest.mark.parametrize("steps", [2, 50, 1000])
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
def test_agrees_with_diffusers(name, steps):
    theirs = DDPMScheduler(num_train_timesteps=steps, beta_schedule=name).betas  # a float32 table
    assert_allclose(make_betas(name, steps), theirs, rtol=1e-6)


def test_cosine_alpha_bar_is_the_cosine_until_the_cap():
    # Nichol & Dhariwal 2021, eq. 17: the product telescopes, so ᾱ_t = f(t + 1)/f(0) wherever no β is capped.
    u = np.arange(1, 1000) / 1000
    f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    process = chain("squaredcos_cap_v2")
    assert_allclose(process.alphas_cumprod[:-1], f, rtol=1e-9)
    assert process.betas[-1] == 0.999
    assert (process.betas[:-1] < 0.999).all()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_every_schedule_is_a_valid_chain_in_float64(name, steps):
    betas = make_betas(name, steps)
    assert (betas.dtype, betas.shape) == (torch.float64, (steps,))
    assert len(DiffusionProcess.from_betas(betas)) == steps


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "sigmoid"])
def test_end_points_are_the_arguments(name):
    betas = make_betas(name, 11, beta_start=0.003, beta_end=0.4)
    # sigmoid(±6) is 0.0025 short of its ends.
    slack = torch.sigmoid(torch.tensor(-6.0)).item() * 0.4 if name == "sigmoid" else 1e-15
    assert_allclose(betas[[0, -1]], [0.003, 0.4], atol=slack)
    assert (betas.diff() > 0).all()


def test_constant_is_its_first_argument():
    assert torch.equal(make_betas("constant", 4, 0.2, 0.9), torch.full((4,), 0.2, dtype=torch.float64))


@pytest.mark.parametrize("name", STEPS)
def test_zero_terminal_snr_is_an_affine_map_of_the_root(name):
    # Lin et al. 2023, algorithm 1: √ᾱ is shifted and scaled, its first value kept, its last sent to 0.
    before = np.sqrt(np.cumprod(1 - betas_by_definition(name)))
    process = DiffusionProcess.from_betas(rescale_zero_terminal_snr(chain(name).betas))
    after = process.sqrt_alphas_cumprod.numpy()
    assert process.betas[-1] == 1
    assert after[-1] == 0
    assert after[0] == pytest.approx(before[0], rel=1e-14)
    slopes = np.diff(after) / np.diff(before)
    assert_allclose(slopes, before[0] / (before[0] - before[-1]), rtol=1e-9)


def test_zero_terminal_snr_of_diffusers():
    theirs = DDPMScheduler(rescale_betas_zero_snr=True).betas
    # Their ᾱ is float32, and at late steps √ᾱ' is a small difference: 1 − ᾱ_t/ᾱ_prev keeps about 1e-6.
    assert_allclose(rescale_zero_terminal_snr(make_betas("linear", 1000)), theirs, rtol=0, atol=3e-6)


def test_zero_terminal_snr_needs_two_steps():
    with pytest.raises(ValueError, match="num_train_timesteps >= 2"):
        rescale_zero_terminal_snr(make_betas("linear", 1))
    assert_allclose(rescale_zero_terminal_snr(make_betas("linear", 2)), [1e-4, 1], rtol=1e-11)


def test_unknown_name_gets_the_nearest():
    with pytest.raises(ValueError, match=r"'linaer' is unknown \(did you mean 'linear'\?\); allowed: linear, "):
        make_betas("linaer", 10)
    with pytest.raises(ValueError, match="'zzz' is unknown; allowed"):
        make_betas("zzz", 10)


@pytest.mark.parametrize("steps", [0, -3, 10.0, True, None])
def test_number_of_steps_is_a_positive_int(steps):
    with pytest.raises(ValueError, match=f"num_train_timesteps is {steps}"):
        make_betas("linear", steps)


def test_prior_of_the_article_on_sddpm():
    assert 0.8**50 == pytest.approx(1.42724769271e-5, rel=1e-11)
    assert chain("constant").prior_bpd_at_edges == pytest.approx(-0.5 * math.log2(1 - 0.8**50), rel=1e-10)
