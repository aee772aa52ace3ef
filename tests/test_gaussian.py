"""gaussian.py: the KL by definition, the decoder against 50-digit arithmetic and docs/maths.md 4."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy.special import ndtr

from hf_ddpm.gaussian import bits_per_dim, discretized_gaussian_log_likelihood, normal_kl
from tests.oracles import chain, expectation, law, log_probability, near

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1
LEVEL = LEVELS[128].item()  # an interior one
SIGMA_0 = 0.00738457017118  # √β̃_2 of `linear`
LOG_VARIANCE_0 = 2 * math.log(SIGMA_0)


def decoder(x, mean, sigma, method="exact"):
    """Scalars or tensors in, float64 out."""
    x, mean, sigma = (torch.as_tensor(z, dtype=torch.float64) for z in (x, mean, sigma))
    x, mean, sigma = torch.broadcast_tensors(x, mean, sigma)
    return discretized_gaussian_log_likelihood(x, mean, 2 * sigma.log(), method)


# KL


@pytest.mark.parametrize(
    ("mean1", "sigma1", "mean2", "sigma2"),
    [(0, 1, 0, 1), (0.3, 0.5, -0.2, 0.8), (1, 2, -1, 0.7), (0, 0.01, 0.02, 0.05), (-3, 1.5, 2, 10)],
)
def test_kl_by_definition(mean1, sigma1, mean2, sigma2):
    def log_ratio(z):  # log p − log q at x = mean1 + sigma1 z
        x = mean1 + sigma1 * z
        return 0.5 * ((x - mean2) / sigma2) ** 2 + math.log(sigma2) - 0.5 * z**2 - math.log(sigma1)

    args = (mean1, 2 * math.log(sigma1), mean2, 2 * math.log(sigma2))
    kl = normal_kl(*(torch.tensor(z, dtype=torch.float64) for z in args))
    assert kl.item() == pytest.approx(expectation(log_ratio), rel=1e-12, abs=1e-14)


FINITE = st.floats(-20, 20)


@law
@given(FINITE, FINITE, FINITE, FINITE)
def test_kl_is_not_negative_and_agrees_with_torch(mean1, log_variance1, mean2, log_variance2):
    args = [torch.tensor(z, dtype=torch.float64) for z in (mean1, log_variance1, mean2, log_variance2)]
    p = torch.distributions.Normal(args[0], (0.5 * args[1]).exp())
    q = torch.distributions.Normal(args[2], (0.5 * args[3]).exp())
    kl = normal_kl(*args)
    assert kl >= 0
    assert normal_kl(args[0], args[1], args[0], args[1]) == 0
    assert_allclose(kl, torch.distributions.kl_divergence(p, q), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("d", [1e-3, 1e-5, 1e-7])
def test_kl_of_nearly_equal_variances_keeps_its_digits(d):
    # e^d − 1 − d = d²/2 + d³/6 + ...; half of it is the KL.
    expected = d**2 / 4 + d**3 / 12 + d**4 / 48
    kl = normal_kl(
        torch.tensor(0.0), torch.tensor(d, dtype=torch.float64), torch.tensor(0.0), torch.tensor(0.0)
    )
    assert kl.item() == near(expected, rel=3e-8)


def test_kl_broadcasts_and_computes_half_precision_in_float64():
    mean1, mean2 = torch.randn(2, 3, 4, 5).half(), torch.randn(2, 3, 1, 1).half()
    log_variance1, log_variance2 = torch.randn(2, 1, 1, 1).half(), torch.tensor(-0.5)
    kl = normal_kl(mean1, log_variance1, mean2, log_variance2)
    wide = normal_kl(mean1.double(), log_variance1.double(), mean2.double(), log_variance2.double())
    assert kl.shape == (2, 3, 4, 5)
    assert torch.equal(kl, wide)


def test_bits_per_dim_of_fair_coins():
    assert_allclose(bits_per_dim(torch.tensor([7 * math.log(2), 0.0], dtype=torch.float64), 7), [1, 0])


# Decoder: the table of docs/maths.md 4 (interior pixel, d = |x − mean| / σ_0)


@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize(
    ("d", "exact", "tanh_error"),
    [
        (0, -0.904818841519, 2.0e-4),
        (2, -2.729729367209, 5.1e-3),
        (3, -5.025465039115, 1.86e-2),
        (4, -8.261339315066, 0.258),
        (5, -12.450876435890, 1.05),
        (6, -17.605196974412, 2.79),
        (7, -23.732739536900, 3.90),
        (10, -48.008353144916, 20.4),
    ],
)
def test_decoder_table(d, exact, tanh_error, side):
    mean = LEVEL + side * d * SIGMA_0
    got = decoder(LEVEL, mean, SIGMA_0).item()
    assert got == pytest.approx(exact, abs=2e-11)
    error = abs(decoder(LEVEL, mean, SIGMA_0, "tanh").item() - got)
    assert error == near(tanh_error, rel=0.03)


@pytest.mark.parametrize("sigma", [SIGMA_0, 0.5, 1e-4])
@pytest.mark.parametrize("d", [-40, -10, -9, -8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2.5, 5, 10, 40])
@pytest.mark.parametrize("level", [0, 1, 128, 254, 255])
def test_decoder_is_exact_to_the_last_digits(level, d, sigma):
    x = LEVELS[level].item()
    mean = x + d * sigma
    expected = log_probability(x, mean, sigma)[0]
    # x − mean is rounded to 1e-16 and divided by σ: that alone moves log p by up to (|d| + 1/(255σ)) 1e-16/σ.
    rounding = 4e-16 * (abs(d) + 1 / (255 * sigma) + 1) / sigma
    assert decoder(x, mean, sigma).item() == pytest.approx(expected, rel=1e-13, abs=rounding)


@pytest.mark.parametrize("edge", [-1, 1])
def test_decoder_at_the_edges(edge):
    assert decoder(edge, edge, SIGMA_0).item() == pytest.approx(-0.353383809998, abs=2e-12)
    assert decoder(edge, edge, SIGMA_0, "tanh").item() == pytest.approx(-0.353441208664, abs=2e-12)
    inside = edge - edge * 3 * SIGMA_0
    assert decoder(edge, inside, SIGMA_0).item() == pytest.approx(-4.994443783557, abs=2e-11)
    # A mean far outside costs nothing: the bin is open-ended.
    assert decoder(edge, 3 * edge, SIGMA_0).item() == 0


@pytest.mark.parametrize("mean", [0.3, -1.2, 1.5, 0])
def test_decoder_sums_over_256_levels(mean):
    assert decoder(LEVELS, mean, SIGMA_0).exp().sum().item() == pytest.approx(1, abs=5e-15)
    log_p = decoder(LEVELS, mean, SIGMA_0, "tanh")
    excess = log_p.exp().sum().item() - 1
    assert excess == pytest.approx(2.43e-10 if mean in (0.3, 0) else 2.55e-10, abs=6e-13)
    clamped = (log_p == math.log(1e-12)).sum().item()
    assert excess == near(1e-12 * clamped, rel=0.01)


@law
@given(st.floats(-3, 3), st.floats(-9, 4))
def test_decoder_sums_to_one_for_any_mean_and_sigma(mean, log_sigma):
    assert abs(decoder(LEVELS, mean, math.exp(log_sigma)).logsumexp(0).item()) < 1e-12


def test_tanh_clamps_undercharges_and_has_no_gradient_there():
    def loss(d, method):
        mean = torch.tensor(LEVEL + d * SIGMA_0, dtype=torch.float64, requires_grad=True)
        x = torch.tensor(LEVEL, dtype=torch.float64)
        nats = -discretized_gaussian_log_likelihood(x, mean, torch.tensor(LOG_VARIANCE_0), method)
        return nats.item(), torch.autograd.grad(nats, mean)[0].item()

    clamp = -math.log(1e-12)
    assert (clamp, clamp / math.log(2)) == pytest.approx((27.631, 39.863), abs=5e-4)
    assert loss(6.80, "tanh")[0] < clamp - 1e-3
    assert loss(6.82, "tanh") == (pytest.approx(clamp), 0)
    # From 3σ it over-charges, beyond 7.565σ it is no bound.
    for d in (3, 5, 7, 7.564):
        assert loss(d, "tanh")[0] > loss(d, "exact")[0]
    for d in (7.566, 8, 20):
        assert loss(d, "tanh")[0] < loss(d, "exact")[0]
        assert loss(d, "exact")[1] == near(d / SIGMA_0, rel=0.1)


def test_tanh_approximates_the_cdf_within_1_789e_4():
    # At x = −1 the decoder is Φ((1/255 + x − mean)/σ) itself.
    z = torch.linspace(-6, 6, 24001, dtype=torch.float64)
    cdf = decoder(-1, -1 + 1 / 255 - z, 1, "tanh").exp()
    assert np.abs(cdf.numpy() - ndtr(z.numpy())).max() == pytest.approx(1.789e-4, abs=5e-8)


@pytest.mark.parametrize(("method", "bits"), [("exact", 1.963018473), ("tanh", 1.962981178)])
def test_decoder_on_calibrated_errors(method, bits):
    mean_bits = expectation(
        lambda z: -decoder(LEVEL, LEVEL + SIGMA_0 * z, SIGMA_0, method).numpy(), points=20001
    )
    assert mean_bits / math.log(2) == pytest.approx(bits, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "sigma_0", "interior", "saturated"),
    [
        ("linear", "β̃_2", 1.305377656, 0.509825070),
        ("squaredcos_cap_v2", "β̃_2", 0.739002762, 0.322691696),
        ("linear", "β_0", 1.712846020, 0.615886423),
        ("constant", "β̃_2", 6.735172281, 0.986521074),
    ],
)
def test_floor_of_l0(name, sigma_0, interior, saturated):
    process = chain(name)
    log_variance = process.log_variance("fixed_small")[0] if sigma_0 == "β̃_2" else process.betas[0].log()
    x = torch.tensor([LEVEL, -1, 1], dtype=torch.float64)
    bits = -bits_per_dim(discretized_gaussian_log_likelihood(x, x, log_variance), 1)
    assert_allclose(bits, [interior, saturated, saturated], atol=1e-9)


@pytest.mark.parametrize("level", [0, 1, 77, 254, 255])
@pytest.mark.parametrize("sigma", [SIGMA_0, 0.05, 1.0])
def test_exact_decoder_has_a_finite_gradient_of_the_right_value(level, sigma):
    d = torch.linspace(-40, 40, 161, dtype=torch.float64)
    x = LEVELS[level].expand_as(d)
    mean = (x + d * sigma).requires_grad_()
    log_variance = torch.full_like(d, 2 * math.log(sigma), requires_grad=True)
    log_p = discretized_gaussian_log_likelihood(x, mean, log_variance)
    grads = torch.autograd.grad(log_p.sum(), (mean, log_variance))
    assert all(g.isfinite().all() for g in grads)
    for i in range(0, 161, 8):
        _, by_mean, by_log_variance = log_probability(x[i].item(), mean[i].item(), sigma)
        assert grads[0][i].item() == pytest.approx(by_mean, rel=1e-8, abs=1e-9)
        assert grads[1][i].item() == pytest.approx(by_log_variance, rel=1e-8, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_decoder_takes_narrow_predictions_and_computes_in_float64(dtype):
    x = LEVELS.float()[:, None].expand(256, 3)
    mean, log_variance = torch.randn(3).to(dtype), torch.tensor([-4.0, -1.0, 0.0]).to(dtype)
    got = discretized_gaussian_log_likelihood(x, mean, log_variance)
    assert (got.dtype, got.shape) == (torch.float64, (256, 3))
    assert torch.equal(
        got, discretized_gaussian_log_likelihood(x.double(), mean.double(), log_variance.double())
    )


def test_float32_levels_still_sum_to_one():
    x = (torch.arange(256) / 127.5 - 1).float()
    total = (
        discretized_gaussian_log_likelihood(x, torch.tensor(0.3), torch.tensor(LOG_VARIANCE_0)).exp().sum()
    )
    assert total.item() == pytest.approx(1, abs=1e-5)


def test_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"'erf'.*'exact', 'tanh'"):
        discretized_gaussian_log_likelihood(LEVELS, LEVELS, torch.tensor(0.0), "erf")  # pyright: ignore[reportArgumentType]
