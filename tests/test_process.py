"""process.py: tables against 50 digits and a brute-force joint Gaussian, laws of every chain, respacing.

Shapes, dtypes, steps and devices of its equations are tested with those of parametrization.py.
"""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from hf_ddpm.process import DiffusionProcess
from tests.oracles import STEPS, chain, law, near, random_betas, spaced, spaced_steps, subset, tables_by_bayes

from_betas = DiffusionProcess.from_betas
T = 1000


def images(*shape, seed=0, dtype=torch.float64):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Tables


@pytest.mark.parametrize("name", STEPS)
def test_tables_to_the_last_digits(name):
    process = chain(name)
    exact = tables_by_bayes(process.betas.numpy())
    for table, key in [
        ("alphas_cumprod", "abar"),
        ("one_minus_alphas_cumprod", "one_minus_abar"),
        ("posterior_variance", "posterior_variance"),
        ("posterior_mean_coef_x0", "c0"),
        ("posterior_mean_coef_xt", "ct"),
    ]:
        got = getattr(process, table)
        assert (got.dtype, got.shape) == (torch.float64, (STEPS[name],))
        assert_allclose(got, exact[key], rtol=2e-13, err_msg=table)
    assert_allclose(process.sqrt_alphas_cumprod**2, exact["abar"], rtol=2e-13)
    assert_allclose(process.sqrt_one_minus_alphas_cumprod**2, exact["one_minus_abar"], rtol=2e-13)
    assert_allclose(process.sqrt_alphas**2, 1 - process.betas, rtol=2e-13)
    assert torch.equal(process.timesteps, torch.arange(STEPS[name]))


def test_values_of_section_8():
    process = chain("linear")
    for table, steps, values in [
        (
            "alphas_cumprod",
            [0, 1, 10, 100, 500],
            [0.9999, 0.999780092072, 0.997806572508, 0.895141590898, 0.0777966583650],
        ),
        (
            "posterior_variance",
            [1, 10, 100, 500, 999],
            [5.45318766130e-5, 2.58463620408e-4, 2.05455352997e-3, 1.00513357789e-2, 1.99999835266e-2],
        ),
        ("posterior_mean_coef_x0", [0, 1, 500], [1, 0.545291499510, 3.05805707563e-3]),
        ("posterior_mean_coef_xt", [0, 1, 500], [0, 0.454708498991, 0.994104350757]),
        ("posterior_variance", [0], [0]),
    ]:
        assert_allclose(getattr(process, table)[steps], values, rtol=1e-11)


@law
@given(random_betas(min_steps=2, max_steps=8))
def test_posterior_is_that_of_the_joint_gaussian(betas):
    # Eq. 7 by brute force: (x_0, x_1, ...) given x_0 is a linear map of independent noises; then condition.
    process, count = from_betas(betas), len(betas)
    slope, noise = np.ones(count), np.zeros((count, count))
    for t, beta in enumerate(betas):
        before, mixed = (1.0, np.zeros(count)) if t == 0 else (slope[t - 1], noise[t - 1])
        slope[t], noise[t] = np.sqrt(1 - beta) * before, np.sqrt(1 - beta) * mixed
        noise[t, t] = np.sqrt(beta)
    cov = noise @ noise.T
    assert_allclose(process.sqrt_alphas_cumprod, slope, rtol=1e-12)
    assert_allclose(process.one_minus_alphas_cumprod, np.diag(cov), rtol=1e-12)
    for t in range(1, count):
        ct = cov[t - 1, t] / cov[t, t]
        assert process.posterior_mean_coef_xt[t].item() == near(ct, rel=1e-10)
        assert process.posterior_mean_coef_x0[t].item() == near(slope[t - 1] - ct * slope[t], rel=1e-8)
        variance = cov[t - 1, t - 1] - ct * cov[t, t - 1]
        assert process.posterior_variance[t].item() == near(variance, rel=1e-8)
    # q(x_t | x_s), docs/maths.md 1, is the step of the chain that skips from s to t.
    s, t = 0, count - 1
    jump = process.respaced([s, t])
    assert jump.sqrt_alphas[1].item() == near(cov[s, t] / cov[s, s], rel=1e-10)
    assert jump.betas[1].item() == near(cov[t, t] - cov[s, t] ** 2 / cov[s, s], rel=1e-8)


@law
@given(random_betas())
def test_identities_of_section_2(betas):
    p = from_betas(betas)
    abar, prev = p.alphas_cumprod, p.alphas_cumprod_prev
    c0, ct, variance = p.posterior_mean_coef_x0, p.posterior_mean_coef_xt, p.posterior_variance
    assert_allclose(abar, np.cumprod(1 - betas), rtol=1e-12)
    assert_allclose(variance + ct**2 * (1 - abar), 1 - prev, rtol=1e-10, atol=1e-15)
    assert_allclose(c0 + ct * abar.sqrt(), prev.sqrt(), rtol=1e-12)
    assert (ct[0], variance[0], prev[0]) == (0, 0, 1)
    assert c0[0].item() == pytest.approx(1, abs=5e-16)
    snr, snr_prev = (z / (1 - z) for z in (abar[1:], prev[1:]))
    assert_allclose(c0[1:] ** 2 / variance[1:], snr_prev - snr, rtol=1e-7)
    assert (variance <= p.betas).all()  # β̃ ≤ β: the lower end of the two


@law
@given(random_betas(min_steps=2))
def test_log_variance_is_finite_and_shares_its_first_entry(betas):
    p = from_betas(betas)
    small, large = p.log_variance("fixed_small"), p.log_variance("fixed_large")
    assert small.dtype == large.dtype == torch.float64
    assert small.isfinite().all() and large.isfinite().all()
    assert small[0] == large[0] == p.posterior_variance[1].log()
    assert_allclose(small[1:].exp(), p.posterior_variance[1:], rtol=1e-13)
    assert_allclose(large[1:].exp(), betas[1:], rtol=1e-13)
    # The sampler's σ: no noise at its last step, the same elsewhere.
    assert p.sigma_small[0] == p.sigma_large[0] == 0
    assert_allclose(p.sigma_small[1:], (0.5 * small[1:]).exp(), rtol=1e-13)
    assert_allclose(p.sigma_large[1:], (0.5 * large[1:]).exp(), rtol=1e-13)


def test_snr_falls_slowly_in_linear():
    # docs/maths.md 5.1: the ratio says how far from Gaussian the reverse kernel of a finite set can be.
    for name, least, second in [("linear", 1.00996, 2.199), ("constant", 1.25, 2.25)]:
        p = chain(name)
        snr = p.alphas_cumprod / p.one_minus_alphas_cumprod
        ratio = snr[:-1] / snr[1:]
        assert ratio.min().item() == pytest.approx(least, abs=2e-5)
        assert ratio[0].item() == pytest.approx(second, abs=5e-4)


# Construction


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_from_betas_keeps_every_digit(kind):
    # A list of Python floats is float64 too: 0.2 must not pass through float32.
    betas = torch.tensor([0.1, 0.2], dtype=torch.float64) if kind is torch.tensor else kind([0.1, 0.2])
    assert from_betas(betas).betas.tolist() == [0.1, 0.2]


def test_from_betas_of_a_list_is_the_chain_of_the_article():
    assert from_betas([0.2] * 50).alphas_cumprod[-1].item() == near(1.42724769271e-5, rel=1e-11)


def test_from_betas_widens_float32_and_copies():
    betas = torch.tensor([0.1, 0.2], dtype=torch.float32)
    process = from_betas(betas)
    assert torch.equal(process.betas, betas.double())
    source = np.array([0.1, 0.2])
    process = from_betas(source)
    source[0] = 0.9
    assert process.betas[0] == 0.1
    with pytest.raises(dataclasses.FrozenInstanceError):
        process.betas = torch.zeros(2)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([0.5, -0.25, 0.0], r"betas\[1\] is -0.25;"),
        ([0.5, 0.25, 0.0], r"betas\[2\] is 0.0;"),
        ([0.5, 1.5], r"betas\[1\] is 1.5;"),
        ([0.5, 1.0, 0.5], r"betas\[1\] is 1.0;.*beta = 1 at the last step"),
        ([float("nan"), 0.5], r"betas\[0\] is nan;"),
        ([0.5, float("inf")], r"betas\[1\] is inf;"),
        ([], r"shape \(0,\)"),
        (0.5, r"shape \(\)"),
        ([[0.5, 0.25]], r"shape \(1, 2\)"),
    ],
)
def test_from_betas_names_the_culprit(betas, message):
    with pytest.raises(ValueError, match=message):
        from_betas(np.array(betas))


def test_a_chain_of_one_step():
    process = from_betas(np.array([0.36]))
    x = images(1, 1, 1)
    assert len(process) == 1
    assert_allclose(process.q_sample(x, 2 * x, 0), (0.8 + 2 * 0.6) * x, rtol=1e-14)
    assert_allclose(process.q_posterior_mean(x, 5 * x, 0), x)
    for variance_type in ("fixed_small", "fixed_large"):
        with pytest.raises(ValueError, match="T >= 2"):
            process.log_variance(variance_type)
    with pytest.raises(ValueError, match=r"'fixed_medium'.*'fixed_small', 'fixed_large'"):
        chain("linear").log_variance("fixed_medium")  # pyright: ignore[reportArgumentType]


# Respacing


@law
@given(st.data(), random_betas(min_steps=2))
def test_respacing_keeps_q_and_composes(data, betas):
    full = from_betas(betas)
    kept = data.draw(subset(range(len(betas))))
    process = full.respaced(kept)
    assert process.timesteps.tolist() == sorted(kept)
    for table in ("alphas_cumprod", "one_minus_alphas_cumprod", "sqrt_alphas_cumprod"):
        assert torch.equal(getattr(process, table), getattr(full, table)[process.timesteps])
    # Its own β' are a chain with the same products.
    assert_allclose(np.cumprod(1 - process.betas.numpy()), process.alphas_cumprod, rtol=1e-9, atol=1e-16)
    again = data.draw(subset(kept))
    twice, once = process.respaced(torch.tensor(again)), full.respaced(again)
    assert torch.equal(twice.timesteps, once.timesteps)
    for table in ("betas", "alphas_cumprod", "posterior_variance", "posterior_mean_coef_x0", "sqrt_alphas"):
        assert torch.equal(getattr(twice, table), getattr(once, table))


def test_respacing_to_all_steps_changes_nothing():
    full = chain("linear")
    process = full.respaced(range(T))
    assert torch.equal(process.alphas_cumprod, full.alphas_cumprod)
    assert_allclose(process.betas, full.betas, rtol=1e-11)
    assert_allclose(process.posterior_variance, full.posterior_variance, rtol=1e-11)


def test_a_jump_of_section_8():
    jump = chain("linear").respaced([100, 500])
    assert jump.alphas[1].item() == near(0.0869098913022, rel=1e-11)
    assert jump.betas[1].item() == near(0.913090108698, rel=1e-11)


def test_a_jump_to_almost_pure_noise_keeps_its_digits():
    # β' is 1 − 2.4e-9 here: √(1 − β') would keep 8 digits.
    p = chain("squaredcos_cap_v2")
    jump, exact = p.respaced([0, 999]), tables_by_bayes(p.betas.numpy())["abar"]
    assert jump.sqrt_alphas[1].item() ** 2 == near(exact[999] / exact[0], rel=1e-12)


def test_first_entry_of_a_respaced_chain_has_two_conventions():
    full, steps = chain("linear"), spaced_steps(10)
    own, kept = full.respaced(steps), full.respaced(steps, "full")
    assert own.log_variance("fixed_small")[0].exp().item() == near(9.99308760e-5, rel=1e-9)
    assert own.log_variance("fixed_large")[0].exp().item() == near(9.99308760e-5, rel=1e-9)
    for variance_type in ("fixed_small", "fixed_large"):
        log_variance = kept.log_variance(variance_type)
        assert log_variance[0].exp().item() == near(5.45318766e-5, rel=1e-9)
        assert torch.equal(log_variance[1:], own.log_variance(variance_type)[1:])
    # The full chain's entry survives further respacing; the spaced one is each chain's own.
    assert (
        kept.respaced(steps[::3], "full").log_variance("fixed_small")[0]
        == full.log_variance("fixed_small")[0]
    )
    third = own.respaced(steps[::3])
    assert third.log_variance("fixed_small")[0] == third.posterior_variance[1].log()
    assert torch.equal(kept.posterior_variance, own.posterior_variance)  # the sampler never reads that entry


@pytest.mark.parametrize(
    ("steps", "message"),
    [([], "empty"), ([3, 3], "timestep 3 is repeated"), ([0, 1000], "1000"), ([-1], "-1"), ([0.5], "0.5")],
)
def test_respacing_refuses(steps, message):
    with pytest.raises(ValueError, match=message):
        chain("linear").respaced(steps)
    with pytest.raises(ValueError, match=r"'half'.*'spaced', 'full'"):
        chain("linear").respaced([1, 2], "half")  # pyright: ignore[reportArgumentType]


def test_the_network_gets_the_original_steps():
    process, steps = spaced("linear", 10), spaced_steps(10)
    t = torch.tensor([[0, 9], [3, 3]])
    assert process.timesteps_at(t).tolist() == steps[t.numpy()].tolist()
    assert process.timesteps_at(torch.tensor(4)) == 444
    assert torch.equal(process.index_of(process.timesteps), torch.arange(10))
    assert process.index_of(444) == 4
    assert isinstance(process.index_of(444), int)
    for missing in (443, torch.tensor([444, 1000]), -1):
        with pytest.raises(ValueError, match=r"443|1000|-1"):
            process.index_of(missing)
    x, e = images(3, 2, 2)[:2]
    for i, step in enumerate(steps):
        assert torch.equal(process.q_sample(x, e, i), chain("linear").q_sample(x, e, int(step)))


# Equations on images


@law
@given(st.data(), random_betas(terminal=True))
def test_a_step_after_the_state_before_it_is_the_state(data, betas):
    # x_t = √α_t (√ᾱ_prev x_0 + √(1 − ᾱ_prev) z) + √β_t z': the mean and the variance of q(x_t | x_0).
    process = DiffusionProcess.from_betas(betas)
    t = data.draw(st.integers(0, len(betas) - 1))
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    mean = process.q_step(process.q_sample_prev(one, 0 * one, t), 0 * one, t)
    by_first = process.q_step(process.q_sample_prev(0 * one, one, t), 0 * one, t)
    by_second = process.q_step(0 * one, one, t)
    abar = np.prod(1 - betas[: t + 1])
    assert_allclose(mean.item(), np.sqrt(abar), rtol=1e-9, atol=1e-12)
    assert_allclose(by_first.item() ** 2 + by_second.item() ** 2, 1 - abar, rtol=1e-9)
    assert_allclose(by_second.item() ** 2, betas[t], rtol=1e-12)
    if t == 0:
        assert process.q_sample_prev(one, one, torch.tensor([0])).item() == 1
    else:
        assert_allclose(process.q_sample_prev(one, one, t), process.q_sample(one, one, t - 1), rtol=1e-15)


def test_q_sample_and_mean_of_section_8():
    process = chain("linear")
    x_0, eps = torch.full((1, 1, 1, 1), 0.25, dtype=torch.float64), torch.full((1, 1, 1, 1), -1.5).double()
    x_t = process.q_sample(x_0, eps, torch.tensor([500]))
    assert x_t.item() == pytest.approx(-1.370741152685, abs=1e-12)
    assert process.q_posterior_mean(x_0, x_t, 500).item() == pytest.approx(-1.361895229377, abs=1e-12)


@law
@given(st.data(), random_betas(terminal=False, high=0.5))
def test_predictions_invert_q_sample(data, betas):
    process = from_betas(betas)
    t = torch.tensor(data.draw(st.lists(st.integers(0, len(betas) - 1), min_size=2, max_size=2)))
    x_0, eps = images(2, 3, 1), images(2, 3, 1, seed=1)
    x_t = process.q_sample(x_0, eps, t)
    assert_allclose(process.predict_x0(x_t, eps, t), x_0, rtol=1e-10, atol=1e-10)
    assert_allclose(process.predict_eps(x_t, x_0, t), eps, rtol=1e-10, atol=1e-10)


def test_mean_at_the_first_step_is_the_image_and_in_terms_of_eps():
    process = chain("linear")
    x_0, eps = images(1, 2, 2), images(1, 2, 2, seed=1)
    assert torch.equal(process.q_posterior_mean(x_0, eps, 0), x_0)
    # Ho et al. eq. 11: (x_t − β_t/√(1 − ᾱ_t) ε)/√α_t.
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, T))
    for t in (0, 1, 500, 999):
        x_t, beta = process.q_sample(x_0, eps, t), np.linspace(1e-4, 0.02, T)[t]
        expected = (x_t - beta / np.sqrt(1 - abar[t]) * eps) / np.sqrt(1 - beta)
        assert_allclose(process.q_posterior_mean(x_0, x_t, t), expected, rtol=1e-9, atol=1e-12)


def test_zero_terminal_snr_has_no_x0_in_eps():
    process = from_betas(np.array([0.1, 0.5, 1.0]))
    x = images(1, 2, 2)
    for t in (2, torch.tensor(2), torch.tensor([0, 2])):
        with pytest.raises(
            ValueError, match=r"alphas_cumprod is 0 at step 2: .*allowed: steps where it is positive"
        ):
            process.predict_x0(x, x, t)
    assert process.predict_x0(x, x, torch.tensor([0, 1])).isfinite().all()
    assert torch.equal(process.q_sample(x, 2 * x, 2), 2 * x)
    assert torch.equal(process.predict_eps(x, x, 2), x)
    assert_allclose(process.q_posterior_mean(x, 9 * x, 2), np.sqrt(0.45) * x, rtol=1e-14)
