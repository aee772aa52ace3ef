"""schedules.py: every β by definition, the table of docs/maths.md 1, diffusers' own; the cost of each.

The second half is the bound L_T + Σ L_t + L_0 of each schedule on data whose denoiser is known.
"""

import math

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from numpy.testing import assert_allclose
from scipy.interpolate import CubicSpline

from hf_ddpm.gaussian import bits_per_dim, normal_kl
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.schedules import SCHEDULES, make_betas, rescale_zero_terminal_snr
from tests.oracles import (
    STEPS,
    betas_by_definition,
    chain,
    expectation,
    mse_of_gaussian,
    near,
    optimal_log_variance,
    spaced,
    step_kl,
)


@pytest.mark.parametrize("name", STEPS)
def test_betas_by_definition(name):
    assert_allclose(chain(name).betas, betas_by_definition(name), rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "last_alpha_bar", "second_variance", "prior_bits"),
    [
        ("linear", 4.03582976538e-5, 5.45318766130e-5, 2.91129454203e-5),
        ("scaled_linear", 7.33412459581e-4, 5.0656004274e-5, 5.29239358283e-4),
        ("squaredcos_cap_v2", 2.42876690703e-9, 2.17894961457e-5, 1.751984988e-9),
        ("sigmoid", 3.96818199053e-5, 7.47561767313e-5, 2.86249503442e-5),
        ("constant", 0.8**50, 1 / 9, 1.02954893e-5),
    ],
)
def test_table_of_section_1(name, last_alpha_bar, second_variance, prior_bits):
    process = chain(name)
    assert process.alphas_cumprod[-1].item() == near(last_alpha_bar, rel=1e-11)
    assert process.posterior_variance[1].item() == near(second_variance, rel=2e-11)
    # L_T of a pixel at ±1, as the KL it is and as the process reports it.
    zero = torch.zeros((), dtype=torch.float64)
    kl = normal_kl(process.sqrt_alphas_cumprod[-1], process.one_minus_alphas_cumprod[-1].log(), zero, zero)
    assert bits_per_dim(kl, 1).item() == near(prior_bits, rel=5e-9)
    # 1 − ᾱ is a float64 near 1, so its logarithm is known to 1e-16 only.
    assert process.prior_bpd_at_edges == pytest.approx(prior_bits, rel=5e-9, abs=1e-16)


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
    assert after[0] == near(before[0], rel=1e-14)
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
    with pytest.raises(
        ValueError, match=r"'linaer' is unknown \(did you mean 'linear'\?\); allowed: linear, "
    ):
        make_betas("linaer", 10)
    with pytest.raises(ValueError, match="'zzz' is unknown; allowed"):
        make_betas("zzz", 10)


@pytest.mark.parametrize("steps", [0, -3, 10.0, True, None])
def test_number_of_steps_is_a_positive_int(steps):
    with pytest.raises(ValueError, match=f"num_train_timesteps is {steps}"):
        make_betas("linear", steps)


@pytest.mark.parametrize(("name", "bits"), [("linear", 0.023), ("constant", 0.008)])
def test_what_an_encoding_to_the_end_can_keep(name, bits):
    # docs/maths.md 6: I(x_0; x_{T−1}) ≤ D/2 log2(1 + SNR), for D = 784 and data of variance at most 1.
    p = chain(name)
    snr = (p.alphas_cumprod / p.one_minus_alphas_cumprod)[-1].item()
    assert 784 / 2 * math.log2(1 + snr) == pytest.approx(bits, abs=5e-4)
    assert p.prior_bpd_at_edges == near(0.5 * math.log2(1 + snr), rel=1e-9)


LINEAR = chain("linear")
ZERO = torch.zeros((), dtype=torch.float64)

# Exact bounds: L_T + Σ L_t + L_0 on data whose denoiser is known


def gaussian_bound(process, log_variance, variance=1.0):
    """(L_T, Σ_{t≥1} L_t, L_0) on N(0, variance) with its exact denoiser, L_0 continuous; nats per dim."""
    mse = mse_of_gaussian(process, variance)
    signal = math.sqrt(variance) * process.sqrt_alphas_cumprod[-1]
    prior = normal_kl(
        signal, process.one_minus_alphas_cumprod[-1].log(), ZERO, ZERO
    )  # KL is quadratic in the mean
    last = 0.5 * (math.log(2 * math.pi) + log_variance[0] + mse[0] / log_variance[0].exp())
    return prior.item(), step_kl(process, log_variance, mse)[1:].sum().item(), last.item()


def entropy(variance):
    return 0.5 * math.log(2 * math.pi * math.e * variance)


@pytest.mark.parametrize(
    ("name", "large", "small"),
    [
        ("linear", 0.113702526520, 0.578594845267),
        ("squaredcos_cap_v2", 0.127816128685, 0.534457322844),
        ("constant", 0.106106667549, 0.257093450159),
    ],
)
def test_bound_minus_entropy_on_normal_data(name, large, small):
    p = chain(name)
    for variance_type, gap in [("fixed_large", large), ("fixed_small", small)]:
        total = sum(gaussian_bound(p, p.log_variance(variance_type)))
        assert total - entropy(1) == pytest.approx(gap, abs=2e-12)


def test_bound_on_normal_data_in_parts():
    small, large = LINEAR.log_variance("fixed_small"), LINEAR.log_variance("fixed_large")
    prior, large_sum, _ = gaussian_bound(LINEAR, large)
    assert prior == near(2.01795560359e-5, rel=1e-11)
    assert large_sum == near(4.60515000643, rel=1e-11)
    assert gaussian_bound(LINEAR, small)[1] == near(5.07004232518, rel=1e-11)
    second, beta_0 = small[0].exp().item(), LINEAR.betas[0].item()
    gap = 0.5 * (math.log(second / beta_0) + beta_0 / second - 1)
    assert sum(gaussian_bound(LINEAR, large)) - entropy(1) == pytest.approx(gap, abs=1e-12)
    # With σ_0² = β_0 in the first entry `fixed_large` is exact: q(x_prev | x_t) = N(√α_t x_t, β_t).
    for log_variance, expected in [(large, 0), (small, 0.464892318747)]:
        own = torch.cat([LINEAR.betas[:1].log(), log_variance[1:]])
        assert sum(gaussian_bound(LINEAR, own)) - entropy(1) == pytest.approx(expected, abs=2e-12)


@pytest.mark.parametrize(
    ("name", "count", "large", "small"),
    [
        ("linear", 10, 0.597679464, 310.233393097),
        ("linear", 50, 0.144340467, 38.438907465),
        ("linear", 1000, 0.170653764, 0.798177770),
        ("squaredcos_cap_v2", 10, 0.368145820, 391.758797254),
        ("squaredcos_cap_v2", 50, 0.078805137, 29.556012785),
        ("squaredcos_cap_v2", 1000, 0.187974487, 0.752635067),
    ],
)
def test_i2_optimal_variance_reaches_the_entropy(name, count, large, small):
    p, variance = spaced(name, count), 0.25**2

    def bits(log_variance):  # continuous bins of width 2/255
        return (sum(gaussian_bound(p, log_variance, variance)) + math.log(127.5)) / math.log(2)

    target = (entropy(variance) + math.log(127.5)) / math.log(2)
    assert target == pytest.approx(7.041449022039, abs=1e-12)
    assert bits(optimal_log_variance(p, mse_of_gaussian(p, variance))) == pytest.approx(target, abs=1e-9)
    assert bits(p.log_variance("fixed_large")) - target == pytest.approx(large, abs=2e-9)
    assert bits(p.log_variance("fixed_small")) - target == pytest.approx(small, abs=2e-9)


@pytest.mark.parametrize("name", STEPS)
def test_why_two_variances(name):
    # docs/maths.md 2: β̃ is optimal for a point, β for N(0, 1), and N(0, 4) needs more than β.
    p = chain(name)
    for variance, expected in [(0.0, p.posterior_variance), (1.0, p.betas)]:
        assert_allclose(optimal_log_variance(p, mse_of_gaussian(p, variance)).exp(), expected, rtol=1e-10)
    assert (optimal_log_variance(p, mse_of_gaussian(p, 0.3)).exp() < p.betas * (1 + 1e-12)).all()
    assert (optimal_log_variance(p, mse_of_gaussian(p, 4.0)).exp() > p.betas)[:-1].all()


@pytest.mark.parametrize(
    ("name", "variance_type", "expected"),
    [
        ("linear", "fixed_large", 0.9999),
        ("linear", "fixed_small", 0.991067376353),
        ("squaredcos_cap_v2", "fixed_small", 0.995098096301),
        ("constant", "fixed_small", 0.652683913252),
    ],
)
def test_variance_after_exact_sampling_on_normal_data(name, variance_type, expected):
    # ε*(x_t) = √(1 − ᾱ_t) x_t makes every step linear; no noise at the last.
    p, variance = chain(name), 1.0
    sigma = p.sigma_large if variance_type == "fixed_large" else p.sigma_small
    x = torch.ones(1, 1, dtype=torch.float64)
    for t in reversed(range(len(p))):
        eps = math.sqrt(p.one_minus_alphas_cumprod[t].item()) * x
        slope = p.q_posterior_mean(p.predict_x0(x, eps, t), x, t).item()
        variance = slope**2 * variance + sigma[t].item() ** 2
    assert variance == near(expected, rel=1e-11)


# One pixel x_0 = ±1: x̂_0 = tanh(√ᾱ x_t/(1 − ᾱ)), and √ᾱ x_t/(1 − ᾱ) = SNR + √SNR z given x_0 = 1


def two_point_bits(process, variance_type):
    """(Σ_{t≥1} L_t, L_T + H(x_0 | x_{t=0})) in bits."""
    snr = (process.alphas_cumprod / process.one_minus_alphas_cumprod).numpy()[:, None]
    mse = torch.from_numpy(expectation(lambda z: 1 - np.tanh(snr + np.sqrt(snr) * z), points=3001))
    log_variance = (
        optimal_log_variance(process, mse)
        if variance_type == "optimal"
        else process.log_variance(variance_type)
    )
    doubt = expectation(lambda z: np.logaddexp(0, -2 * (snr[0] + np.sqrt(snr[0]) * z))) / math.log(2)
    return step_kl(process, log_variance, mse)[1:].sum().item() / math.log(
        2
    ), process.prior_bpd_at_edges + doubt


@pytest.mark.parametrize(
    ("name", "small", "large", "best"),
    [
        ("linear", 1.006840855, 1.487182879, 1.004938123),
        ("squaredcos_cap_v2", 1.003742087, 1.432728136, 1.002612902),
        ("constant", 1.276588385, 1.134494788, 1.128943729),
    ],
)
def test_price_of_a_gaussian_kernel(name, small, large, best):
    for variance_type, expected in [("fixed_small", small), ("fixed_large", large), ("optimal", best)]:
        assert sum(two_point_bits(chain(name), variance_type)) == pytest.approx(expected, abs=2e-9)


@pytest.mark.parametrize(
    ("count", "small", "best"), [(10, 40.6264, 4.3340), (50, 1.1557, 1.1081), (1000, 1.006812, 1.004909)]
)
def test_even_steps_on_two_points(count, small, best):
    # docs/maths.md 7: levels 1 + round(i·999/K), i = 0..K, are K KL terms.
    p = spaced("linear", min(count + 1, 1000))
    tolerance = 6e-7 if count == 1000 else 6e-5
    assert two_point_bits(p, "fixed_small")[0] == pytest.approx(small, abs=tolerance)
    assert two_point_bits(p, "optimal")[0] == pytest.approx(best, abs=tolerance)


def test_gaussian_kernel_on_two_points_at_large_beta():
    # docs/maths.md 5.1 (d): `fixed_small`, β = 0.2, T = 50, by the density of the sampler's x_t on a grid.
    p, x = chain("constant"), np.linspace(-6, 6, 801)
    abar, sigma = p.alphas_cumprod.numpy(), p.sigma_small.numpy()

    def normal(z, scale=1.0):
        return np.exp(-0.5 * (z / scale) ** 2) / (scale * np.sqrt(2 * np.pi))

    def denoise(t):
        return torch.from_numpy(np.tanh(np.sqrt(abar[t]) * x / (1 - abar[t])))

    density = normal(x)
    for t in reversed(range(1, 50)):
        mean = p.q_posterior_mean(denoise(t), torch.from_numpy(x), t).numpy()
        density = normal(x[:, None] - mean, sigma[t]) @ density * (x[1] - x[0])
    true = sum(0.5 * normal(x - sign * np.sqrt(0.8), np.sqrt(0.2)) for sign in (-1, 1))
    total_variation = 0.5 * np.abs(density - true).sum() * (x[1] - x[0])
    assert total_variation == pytest.approx(0.100, abs=5e-4)
    # P(|x̂_0| < 0.9) = P(|x| < the point where tanh is 0.9).
    edge = math.atanh(0.9) * 0.2 / math.sqrt(0.8)
    assert CubicSpline(x, density).integrate(-edge, edge) == pytest.approx(0.177764, abs=1e-6)
    assert CubicSpline(x, true).integrate(-edge, edge) == pytest.approx(0.100026, abs=1e-6)
