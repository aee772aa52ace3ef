"""objectives.py, and what it stands for: the weights and KLs of the true bound (docs/maths.md 4, 5, 7, 8)."""

import math

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from hf_ddpm import create_model
from hf_ddpm.gaussian import normal_kl
from hf_ddpm.objectives import simple_loss
from hf_ddpm.parametrization import PREDICTION_TYPES, from_x0_eps, to_eps, to_x0
from hf_ddpm.process import DiffusionProcess
from tests.oracles import (
    STEPS,
    chain,
    expectation,
    mse_of_gaussian,
    near,
    optimal_log_variance,
    spaced,
    step_kl,
    tables_by_bayes,
)

LINEAR = chain("linear")
T_8 = [1, 10, 100, 500, 999]  # the steps of docs/maths.md 8


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# L_simple


def toy_model(x_t, t):
    return 0.3 * x_t + 0.001 * t.double().view(-1, 1, 1, 1)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("process", [LINEAR, spaced("linear", 10)], ids=["full", "respaced"])
def test_simple_loss_in_numpy(kind, process):
    x_0, noise, t = (
        draw(4, 3, 5, 2),
        draw(4, 3, 5, 2, seed=1),
        torch.tensor([0, 1, len(process) // 2, len(process) - 1]),
    )
    steps = process.timesteps[t].numpy()
    full = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    bayes = tables_by_bayes(LINEAR.betas.numpy())  # `mean` is a step of the full chain
    expected = []
    for i, step in enumerate(steps):
        x, e = x_0[i].numpy(), noise[i].numpy()
        a, s = np.sqrt(full[step]), np.sqrt(1 - full[step])
        x_t = a * x + s * e
        target = {
            "epsilon": e,
            "sample": x,
            "v_prediction": a * e - s * x,
            "mean": bayes["c0"][step] * x + bayes["ct"][step] * x_t,
            "score": -e / s,
        }[kind]
        # The network is told the original step, whatever the chain.
        expected.append(np.mean((0.3 * x_t + 0.001 * step - target) ** 2))
    loss = simple_loss(process, toy_model, x_0, t, noise, kind)
    assert (loss.shape, loss.dtype) == ((4,), torch.float64)
    assert_allclose(loss, expected, rtol=1e-9)
    alone = [
        simple_loss(process, toy_model, x_0[i : i + 1], t[i : i + 1], noise[i : i + 1], kind)
        for i in range(4)
    ]
    assert_allclose(loss, torch.cat(alone), rtol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_simple_loss_of_narrow_images_is_float32(dtype):
    x_0, noise, t = draw(2, 1, 4, 4).to(dtype), draw(2, 1, 4, 4, seed=1).to(dtype), torch.tensor([3, 900])
    seen = []

    def model(x_t, t):
        seen.append((x_t.dtype, t.dtype))
        return toy_model(x_t, t).to(dtype)

    loss = simple_loss(LINEAR, model, x_0, t, noise, "epsilon")
    assert loss.dtype == torch.float32
    assert seen == [(dtype, torch.int64)]
    wide = simple_loss(LINEAR, toy_model, x_0.double(), t, noise.double(), "epsilon")
    assert_allclose(loss, wide, rtol={torch.float32: 1e-5}.get(dtype, 0.05))


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("variance", [1.0, 0.25])
def test_simple_loss_of_an_exact_denoiser(kind, variance):
    # Per t, E loss = (units of docs/maths.md 3) · E(x̂_0 − x_0)²; five standard errors over 4000 examples.
    t = torch.tensor([0, 10, 500, 999]).repeat_interleave(4000)
    abar = LINEAR.alphas_cumprod[t].view(-1, 1, 1, 1)

    def model(x_t, t):
        x_0 = abar.sqrt() * variance / (1 - abar + abar * variance) * x_t
        return from_x0_eps(LINEAR, kind, x_0, LINEAR.predict_eps(x_t, x_0, t), t)

    x_0, noise = math.sqrt(variance) * draw(len(t), 1, 2, 2), draw(len(t), 1, 2, 2, seed=1)
    loss = simple_loss(LINEAR, model, x_0, t, noise, kind).view(4, 4000)
    snr, c0 = LINEAR.alphas_cumprod / LINEAR.one_minus_alphas_cumprod, LINEAR.posterior_mean_coef_x0
    unit = {
        "epsilon": snr,
        "sample": snr**0,
        "v_prediction": snr + 1,
        "mean": c0**2,
        "score": snr / LINEAR.one_minus_alphas_cumprod,
    }[kind]
    expected = (unit * mse_of_gaussian(LINEAR, variance))[[0, 10, 500, 999]]
    stderr = loss.std(1) / math.sqrt(4000)
    assert ((loss.mean(1) - expected).abs() < 5 * stderr).all()


def test_one_weighting_has_one_gradient_in_every_parametrisation():
    # docs/maths.md 5: SNR_t · (loss on x_0) = loss on ε = SNR/(SNR + 1) · (loss on v), for one network.
    x_0, noise, t = draw(3, 1, 4, 4), draw(3, 1, 4, 4, seed=1), torch.tensor([1, 400, 999])
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    snr = (LINEAR.alphas_cumprod / LINEAR.one_minus_alphas_cumprod)[t]
    s2 = LINEAR.one_minus_alphas_cumprod[t]
    c0 = LINEAR.posterior_mean_coef_x0[t]
    factor = {
        "epsilon": 1,
        "sample": snr,
        "v_prediction": snr / (snr + 1),
        "mean": snr / c0**2,
        "score": s2,  # (1 − ᾱ_t) on the score is L_simple
    }
    values = []
    for kind, scale in factor.items():

        def model(x_t, t, kind=kind):
            x_0 = weight * torch.tanh(x_t)
            return from_x0_eps(LINEAR, kind, x_0, LINEAR.predict_eps(x_t, x_0, t), t)

        loss = scale * simple_loss(LINEAR, model, x_0, t, noise, kind)
        gradients = [torch.autograd.grad(z, weight, retain_graph=True)[0].item() for z in loss]
        values.append([*loss.tolist(), *gradients])
    assert_allclose(values, np.broadcast_to(values[0], np.shape(values)), rtol=1e-8)


def test_simple_loss_draws_what_is_left_out():
    process, x_0 = DiffusionProcess.linear(1000), draw(6, 1, 4, 4)

    def source():
        return torch.Generator().manual_seed(3)

    drawn = source()
    t = torch.randint(1000, (6,), generator=drawn)
    noise = torch.randn(6, 1, 4, 4, generator=drawn, dtype=torch.float64)
    wanted = simple_loss(process, toy_model, x_0, t, noise)
    assert torch.equal(simple_loss(process, toy_model, x_0, generator=source()), wanted)
    only_noise = torch.randn(6, 1, 4, 4, generator=source(), dtype=torch.float64)
    assert torch.equal(
        simple_loss(process, toy_model, x_0, t, generator=source()),
        simple_loss(process, toy_model, x_0, t, only_noise),
    )
    torch.manual_seed(3)
    assert torch.equal(simple_loss(process, toy_model, x_0), wanted)
    # t is uniform over all T steps: the mean of 20,000 is within five standard errors of 499.5
    seen = []
    simple_loss(
        process, lambda x_t, t: seen.extend(t.tolist()) or x_t, x_0[:1, :, :1, :1].expand(20000, 1, 1, 1)
    )
    assert (min(seen), max(seen)) == (0, 999)
    assert abs(np.mean(seen) - 499.5) < 5 * np.sqrt((1000**2 - 1) / 12 / 20000)


def test_simple_loss_of_one_step_for_all_and_of_a_network():
    x_0, noise = draw(3, 1, 8, 8).float(), draw(3, 1, 8, 8, seed=1).float()
    wanted = simple_loss(LINEAR, toy_model, x_0, torch.full((3,), 9), noise)
    assert torch.equal(simple_loss(LINEAR, toy_model, x_0, 9, noise), wanted)
    network = create_model("tiny")
    loss = simple_loss(LINEAR, network, x_0)
    loss.mean().backward()
    assert loss.shape == (3,) and all(p.grad is not None for p in network.parameters() if p.requires_grad)


def test_simple_loss_refuses():
    x = draw(2, 1, 2, 2)
    with pytest.raises(ValueError, match="'noise'"):
        simple_loss(LINEAR, toy_model, x, torch.tensor([0, 1]), x, "noise")
    with pytest.raises(ValueError, match=r"999"):
        simple_loss(LINEAR, toy_model, x, torch.tensor([0, 1000]), x, "epsilon")


# True weights and KLs


@pytest.mark.parametrize(
    ("variance_type", "values", "total"),
    [
        (
            "fixed_small",
            [0.599671512159, 0.0789765416112, 0.0101783834195, 0.00551446195964, 0.0102045018738],
            10.1704928738,
        ),
        (
            "fixed_large",
            [0.272692084278, 0.0682239889905, 0.00999623022646, 0.00550973453343, 0.0102044934686],
            9.36099698276,
        ),
    ],
)
def test_true_weights(variance_type, values, total):
    # w_t: what a unit error of ε adds to the KL, through x̂_0 and the posterior mean.
    log_variance = LINEAR.log_variance(variance_type)
    x_t, one = torch.full((1000, 1), 0.4, dtype=torch.float64), torch.ones(1000, 1, dtype=torch.float64)
    t = torch.arange(1000)
    means = [LINEAR.q_posterior_mean(LINEAR.predict_x0(x_t, e, t), x_t, t)[:, 0] for e in (0 * one, one)]
    log_posterior = LINEAR.posterior_variance.log()
    with_error, without = (normal_kl(m, log_posterior, means[0], log_variance) for m in means[::-1])
    weights = (with_error - without)[1:]
    assert_allclose(weights[[t - 1 for t in T_8]], values, rtol=2e-9)
    assert weights.sum().item() == near(total, rel=1e-10)
    exact = tables_by_bayes(LINEAR.betas.numpy())["w_small" if variance_type == "fixed_small" else "w_large"]
    assert_allclose(weights, exact[1:], rtol=2e-9)
    if variance_type == "fixed_small":  # w_t = ½(SNR_prev/SNR_t − 1)
        snr = (LINEAR.alphas_cumprod / LINEAR.one_minus_alphas_cumprod).numpy()
        assert_allclose(weights, 0.5 * (snr[:-1] / snr[1:] - 1), rtol=2e-9)


def test_weight_of_the_decoder_step():
    # w_0 = half the squared error of x̂_0 per unit error of ε, over σ_0².
    x = torch.zeros(1, 1, dtype=torch.float64)
    shift = LINEAR.predict_x0(x, x + 1, 0).item()
    for variance, expected in [
        (LINEAR.log_variance("fixed_small")[0].exp().item(), 0.916986606841),
        (LINEAR.betas[0].item(), 0.500050005001),
    ]:
        assert shift**2 / (2 * variance) == near(expected, rel=1e-11)


@pytest.mark.parametrize(
    ("t", "small", "large", "optimal"),
    [
        (1, 109.052846851, 49.711617084, 2.69477711652),
        (500, 1.86079010462e-5, 1.87757853146e-5, 1.86075548008e-5),
    ],
)
def test_kl_at_mse_0_04(t, small, large, optimal):
    best = optimal_log_variance(LINEAR, 0.04)
    for log_variance, expected in [
        (LINEAR.log_variance("fixed_small"), small),
        (LINEAR.log_variance("fixed_large"), large),
        (best, optimal),
    ]:
        assert step_kl(LINEAR, log_variance, 0.04)[t].item() == near(expected, rel=2e-10)


@pytest.mark.parametrize("name", STEPS)
def test_forms_of_the_kl(name):
    p, mse = chain(name), draw(STEPS[name]).abs()
    snr = p.alphas_cumprod / p.one_minus_alphas_cumprod
    gap = (snr[:-1] - snr[1:]).numpy()
    # docs/maths.md 8: I1, and section 7: its twin for the optimal variance.
    assert_allclose(
        step_kl(p, p.log_variance("fixed_small"), mse)[1:], 0.5 * gap * mse[1:].numpy(), rtol=1e-10
    )
    best = optimal_log_variance(p, mse)
    assert_allclose(step_kl(p, best, mse)[1:], 0.5 * np.log1p(gap * mse[1:].numpy()), rtol=1e-9)
    # No scalar variance does better than the optimal one.
    for log_variance in (
        best + 0.01,
        best - 0.01,
        p.log_variance("fixed_small"),
        p.log_variance("fixed_large"),
    ):
        assert (step_kl(p, log_variance, mse)[1:] >= step_kl(p, best, mse)[1:] * (1 - 1e-9)).all()
    # A point mass: every KL of fixed_small is 0.
    assert (step_kl(p, p.log_variance("fixed_small"), 0)[1:] == 0).all()


def test_constant_of_fixed_large():
    # ½[log(β/β̃) − 1 + β̃/β] per dim whatever the model.
    constant = step_kl(LINEAR, LINEAR.log_variance("fixed_large"), 0)[1:]
    assert constant[0].item() == near(0.121387264546, rel=1e-11)
    assert constant.sum().item() / math.log(2) == near(0.486419230044, rel=1e-11)


@pytest.mark.parametrize(
    ("name", "steps", "ratios"),
    [
        ("linear", [1, 10, 100, 500], [0.834, 6.34, 54.9, 1165]),
        ("constant", [1, 2, 5, 10], [1.25, 2.81, 10.3, 41.6]),
    ],
)
def test_sddpm_gradient_noise(name, steps, ratios):
    # docs/maths.md 5.1, item 5: β̃_t/(c0² mse_t) = 1/(2 KL_t) on N(0, 1).
    p = chain(name)
    mse = mse_of_gaussian(p, 1.0)
    ratio = (p.posterior_variance / (p.posterior_mean_coef_x0**2 * mse))[steps]
    assert_allclose(ratio, ratios, rtol=5e-3)
    assert_allclose(ratio, 1 / (2 * step_kl(p, p.log_variance("fixed_small"), mse)[steps]), rtol=1e-9)


def test_sddpm_objective_is_ours_plus_a_constant():
    # docs/maths.md 5.1, item 2: −E log q_r(x_prev | x_t) = L_t + ½ log(2πe β̃_t), by quadrature over x_prev.
    p, t, m = LINEAR, 10, 0.02
    mean, log_variance = p.posterior_mean_coef_x0[t] * 0.3, p.log_variance("fixed_large")[t]
    sigma, s2 = p.sigma_small[t].item(), log_variance.exp().item()
    cross = expectation(
        lambda z: 0.5 * (mean.item() + sigma * z - m) ** 2 / s2 + 0.5 * math.log(2 * math.pi * s2)
    )
    ours = normal_kl(mean, p.posterior_variance[t].log(), torch.tensor(m, dtype=torch.float64), log_variance)
    constant = 0.5 * math.log(2 * math.pi * math.e * sigma**2)
    assert cross == near(ours.item() + constant, rel=1e-10)


def test_reading_an_exact_denoiser_in_any_parametrisation_gives_one_mse():
    # Conversions and the closed form meet: x̂_0 and ε̂ of one network output, per prediction type.
    x_t, t = draw(1, 1, 2, 2), 500
    exact = LINEAR.sqrt_alphas_cumprod[t] * x_t  # N(0, 1) data
    for kind in PREDICTION_TYPES:
        output = from_x0_eps(LINEAR, kind, exact, LINEAR.predict_eps(x_t, exact, t), t)
        assert_allclose(to_x0(LINEAR, kind, output, x_t, t), exact, rtol=1e-8)
        assert_allclose(
            to_eps(LINEAR, kind, output, x_t, t), LINEAR.sqrt_one_minus_alphas_cumprod[t] * x_t, rtol=1e-8
        )


def test_an_answer_of_another_shape_does_not_broadcast():
    process, x = DiffusionProcess.from_betas([0.1, 0.2]), torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match=r"answered shape \(2, 2, 4, 4\); allowed: \(2, 1, 4, 4\)"):
        simple_loss(process, lambda x_t, t: torch.cat([x_t, x_t], 1), x, torch.tensor([0, 1]), x, "epsilon")
