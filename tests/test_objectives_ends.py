"""objectives.py, gaussian.py: losses and gradients far out, where one term of a batch could spoil another."""

import math

import pytest
import torch

from hf_ddpm.gaussian import discretized_gaussian_log_likelihood
from hf_ddpm.likelihood import bound_term
from hf_ddpm.objectives import hybrid_loss, make_objective
from hf_ddpm.parametrization import PREDICTION_TYPES
from tests.bound_oracles import LN2, draw
from tests.oracles import chain

LINEAR = chain("linear")
T = torch.tensor([0, 1, 2, 500, 998, 999])
X = (torch.randint(256, (6, 1, 4, 4), generator=torch.Generator().manual_seed(0)) / 127.5 - 1).float()
NOISES = [draw(6, 1, 4, 4, seed=seed).float() for seed in (1, 2)]


def lossy(name, kind, v, dtype=torch.float32):
    """Losses of a network that answers little noise and v, and the gradients of its output."""
    objective = make_objective(name, kind, "learned_range")
    m = 0.1 * draw(6, 1, 4, 4, seed=3)
    output = torch.cat([m, torch.full_like(m, v)], 1).to(dtype).requires_grad_()
    losses = objective.loss(LINEAR, lambda x_t, t: output, X, T, *NOISES[: objective.noises])
    (gradient,) = torch.autograd.grad(losses.sum(), output)
    return losses.detach(), gradient


@pytest.mark.parametrize("v", [-1e4, -1e3, -200.0, -150.0, 150.0, 200.0, 1e3, 1e4])
@pytest.mark.parametrize("name", ["bound", "hybrid", "sddpm"])
def test_any_learned_variance_has_finite_losses_and_gradients(name, v):
    for kind in PREDICTION_TYPES:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            losses, gradient = lossy(name, kind, v, dtype)
            assert losses.isfinite().all() and gradient.isfinite().all(), (kind, dtype)
        # Towards where the loss falls, at the first steps and at the last, where v counts as well
        ends = gradient[[0, 1, 2, 5], 1:].mean((1, 2, 3))
        assert (ends[:3].sign() == math.copysign(1, v)).all()


@pytest.mark.parametrize("v", [-1e4, -150.0, 0.3, 150.0, 1e4])
def test_gradients_are_those_of_closed_forms_where_the_terms_are_finite(v):
    # KL by log σ²: ½ (1 − (β̃ + (c0 e)²)/σ²) per dimension; by v, times (log β − log β̃)/2
    _, gradient = lossy("bound", "sample", v, torch.float64)
    m = 0.1 * draw(6, 1, 4, 4, seed=3)
    low, high = LINEAR.log_variance("fixed_small"), LINEAR.log_betas
    for row, t in ((3, 500), (4, 998), (5, 999)):
        f = (v + 1) / 2
        log_variance = f * high[t] + (1 - f) * low[t]
        square = (LINEAR.posterior_mean_coef_x0[t] * (m[row] - X[row].double())) ** 2
        slope = 0.5 * (1 - (LINEAR.posterior_variance[t] + square) * torch.exp(-log_variance))
        wanted = slope * (high[t] - low[t]) / 2 * 1000 / (16 * LN2)
        torch.testing.assert_close(gradient[row, 1:], wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("v", [-150.0, -30.0, 0.0, 50.0, 200.0, 1e4])
def test_the_decoders_gradient_is_the_slope_of_its_value(v):
    def loss(value):
        out = torch.cat([0 * X[:1].double(), torch.full_like(X[:1].double(), value)], 1)
        options = {"variance_type": "learned_range", "model_output": out}
        return bound_term(LINEAR, None, X[:1], 0, NOISES[0][:1], **options).nats.item()

    out = torch.cat([0 * X[:1], torch.full_like(X[:1], v)], 1).double().requires_grad_()
    t = torch.tensor([0])
    bound_term(
        LINEAR, None, X[:1], t, NOISES[0][:1], variance_type="learned_range", model_output=out
    ).nats.sum().backward()
    step = 1e-4 * max(1, abs(v)) ** 0.5
    slope = (loss(v + step) - loss(v - step)) / (2 * step)
    assert out.grad is not None and out.grad[:, 1:].sum().item() == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("log_variance", [8.0, 9.0, 20.0, 60.0, 700.0, 3000.0])
def test_a_wide_decoder_is_a_density_times_a_bin(log_variance):
    log_variance = torch.tensor(log_variance, dtype=torch.float64, requires_grad=True)
    x, mean = torch.tensor([1 / 255], dtype=torch.float64), torch.tensor([0.4], dtype=torch.float64)
    found = discretized_gaussian_log_likelihood(x, mean, log_variance)
    z2 = (x - mean) ** 2 * torch.exp(-log_variance.detach())
    wanted = math.log(2 / 255) - 0.5 * (math.log(2 * math.pi) + log_variance.detach() + z2)
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-9, atol=1e-7)
    found.sum().backward()
    torch.testing.assert_close(log_variance.grad, (0.5 * (z2 - 1)).squeeze(), rtol=1e-7, atol=1e-9)


def test_a_narrow_decoder_far_off_has_the_slope_of_its_tail():
    mean = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    for log_variance in (-30.0, -60.0, -200.0, -600.0):
        found = discretized_gaussian_log_likelihood(
            torch.tensor([1 / 255]).double(), mean, torch.tensor(log_variance)
        )
        (slope,) = torch.autograd.grad(found, mean)
        gap = 0.3 - 2 / 255
        assert found.item() == pytest.approx(-0.5 * gap**2 * math.exp(-log_variance), rel=1e-6)
        assert slope.item() == pytest.approx(-gap * math.exp(-log_variance), rel=1e-6)


@pytest.mark.parametrize("kind", ["sample", "mean"])
def test_the_first_steps_of_hybrid_drown_nothing(kind):
    # λ T = 1: a row is its square and its bits, which the published clamp at 1e-12 bounds by 39.9
    zero = torch.zeros(6, 2, 4, 4)
    losses = hybrid_loss(LINEAR, lambda x_t, t: zero, X, T, NOISES[0], kind)
    assert (losses < 39.87 + 1).all() and (losses[:2] > 5).all()
    # A mean that is good counts as it is
    good = torch.cat([X, torch.zeros_like(X)], 1)
    options = {"variance_type": "learned_range", "prediction_type": "sample", "clip_x0": False}
    exact = bound_term(LINEAR, None, X, T, NOISES[0], model_output=good, **options).nats / (16 * LN2)
    found = hybrid_loss(LINEAR, lambda x_t, t: good, X, T, NOISES[0], "sample")
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "score"])
def test_hybrid_of_noise_is_as_published(kind):
    output = torch.cat([5 * draw(6, 1, 4, 4, seed=3), draw(6, 1, 4, 4, seed=4)], 1)
    found = hybrid_loss(LINEAR, lambda x_t, t: output, X, T, NOISES[0], kind)
    square = make_objective("simple", kind).loss(LINEAR, lambda x_t, t: output[:, :1], X, T, NOISES[0])
    options = {"variance_type": "learned_range", "prediction_type": kind, "clip_x0": False}
    bits = bound_term(LINEAR, None, X, T, NOISES[0], model_output=output, **options).nats / (16 * LN2)
    torch.testing.assert_close(found, square + bits, rtol=1e-12, atol=0)
