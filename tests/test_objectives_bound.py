"""objectives.py, what is made of the bound: means and gradients by closed forms (docs/maths.md 4, 5)."""

import math

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from hf_ddpm.objectives import (
    OBJECTIVES,
    Choices,
    Objective,
    bound_loss,
    hybrid_loss,
    make_objective,
    min_snr_loss,
    register_objective,
    score_matching_loss,
    sddpm_loss,
)
from hf_ddpm.parametrization import PREDICTION_TYPES, from_x0_eps
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.training.importance import LossSecondMoment
from tests.bound_oracles import LN2, draw
from tests.oracles import chain, log_probability, mse_of_gaussian, near, tables_by_bayes

LINEAR, CONSTANT = chain("linear"), chain("constant")
BETAS = np.array([0.001, 0.05, 0.3, 0.6])
SHORT = DiffusionProcess.from_betas(BETAS)
COUNT = 60_000


def reads(process, kind, guess):
    """The network whose output, read as `kind`, means x̂_0 = guess(x_t, t)."""

    def model(x_t, t):
        x_0 = guess(x_t, t)
        return from_x0_eps(process, kind, x_0, process.predict_eps(x_t, x_0, t), t)

    return model


def within(values, expected, errors: float = 5):
    """The mean of independent values is the expected one within that many standard errors of it."""
    return abs(values.mean().item() - expected) < errors * values.std().item() / math.sqrt(len(values))


# The bound of one pixel and its gradient, by hand: x̂_0 = θ_t x_t, θ of its own at each t

THETA = torch.tensor([0.97, 0.3, 0.1, 1.5], dtype=torch.float64)
PIXELS = torch.tensor([-1.0, 51 / 127.5 - 1, 200 / 127.5 - 1, 1.0], dtype=torch.float64)


def exact_terms(variance_type: str) -> tuple[np.ndarray, np.ndarray]:
    """E_ε L_t in bits and its derivative by θ_t, mean over `PIXELS`, (4,): moments; quadrature at t = 0."""
    q, theta, x = tables_by_bayes(BETAS), THETA.numpy(), PIXELS.numpy()[:, None]
    small, s2, abar = q["posterior_variance"], q["one_minus_abar"], q["abar"]
    sigma2 = (small if variance_type == "fixed_small" else BETAS).copy()
    sigma2[0] = small[1]
    square = theta**2 * (abar * x**2 + s2) - 2 * theta * np.sqrt(abar) * x**2 + x**2  # E(θ x_t − x_0)²
    slope = 2 * theta * (abar * x**2 + s2) - 2 * np.sqrt(abar) * x**2
    with np.errstate(divide="ignore", invalid="ignore"):
        value = 0.5 * (np.log(sigma2 / small) - 1 + small / sigma2 + q["c0"] ** 2 * square / sigma2)
    by_theta = 0.5 * q["c0"] ** 2 * slope / sigma2
    z = np.linspace(-9, 9, 181)
    weight = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi) * (z[1] - z[0])
    for i, pixel in enumerate(x[:, 0]):
        x_t = np.sqrt(abar[0]) * pixel + np.sqrt(s2[0]) * z
        found = np.array([log_probability(pixel, theta[0] * y, math.sqrt(sigma2[0]))[:2] for y in x_t])
        value[i, 0], by_theta[i, 0] = -(found[:, 0] * weight).sum(), -(found[:, 1] * x_t * weight).sum()
    return value.mean(0) / LN2, by_theta.mean(0) / LN2


def sampled(loss, t, *noises, variance_type="fixed_large", kind="sample", weights=1.0):
    """Losses of random pixels and their derivatives by θ, one per example, (N,) and (N, 4)."""
    theta = THETA.repeat(len(t), 1).requires_grad_()
    rows = torch.arange(len(t))
    model = reads(SHORT, kind, lambda x_t, t: theta[rows, t].view(-1, 1, 1, 1) * x_t)
    x_0 = PIXELS[torch.arange(len(t)) % 4].view(-1, 1, 1, 1)
    losses = loss(SHORT, model, x_0, t, *noises, prediction_type=kind, variance_type=variance_type) * weights
    (gradients,) = torch.autograd.grad(losses.sum(), theta)
    return losses.detach(), gradients


def uniform_steps(count=COUNT, seed=3):
    return torch.randint(4, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("name", ["bound", "sddpm"])
def test_mean_and_gradient_are_those_of_the_exact_bound(name, variance_type):
    value, by_theta = exact_terms(variance_type)
    loss, noises = {"bound": (bound_loss, 1), "sddpm": (sddpm_loss, 2)}[name]
    t = uniform_steps()
    draws = [draw(len(t), 1, 1, 1, seed=seed) for seed in range(noises)]
    losses, gradients = sampled(loss, t, *draws, variance_type=variance_type)
    assert within(losses, value.sum())
    for step in range(4):
        assert within(losses[t == step], 4 * value[step])  # of one step: times T
        assert within(gradients[:, step], by_theta[step])
        assert abs(by_theta[step]) > 10 * gradients[:, step].std() / math.sqrt(COUNT)  # it could have failed


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_what_the_network_predicts_changes_nothing(kind):
    t = uniform_steps(64)
    noises = [draw(64, 1, 1, 1, seed=seed) for seed in range(2)]
    for loss, number in ((bound_loss, 1), (sddpm_loss, 2)):
        same, other = (sampled(loss, t, *noises[:number], kind=k) for k in ("sample", kind))
        for one, two in zip(same, other, strict=True):
            assert_allclose(one, two, rtol=1e-6, atol=1e-9)


def test_importance_sampled_steps_have_the_same_mean_and_gradient():
    value, by_theta = exact_terms("fixed_large")
    sampler = LossSecondMoment(4)
    t = torch.arange(4).repeat(10)
    sampler.add(torch.arange(40), t, sampled(bound_loss, t, draw(40, 1, 1, 1, seed=9))[0])
    assert sampler.probabilities.max() > 0.4
    uniforms = torch.rand(COUNT, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t = sampler.draw(uniforms)
    losses, gradients = sampled(bound_loss, t, draw(COUNT, 1, 1, 1), weights=sampler.weights(t))
    assert within(losses, value.sum())
    assert all(within(gradients[:, step], by_theta[step]) for step in range(4))
    assert losses.var() < 0.5 * sampled(bound_loss, uniform_steps(), draw(COUNT, 1, 1, 1))[0].var()


# docs/maths.md 5.1: SDDPM against Ho et al., on N(0, 1) data with weights θ_t of their own


def gaussian_gradients(loss, process, step, factor, *noises):
    """Derivative of T · L_t by θ_t at factor · θ*, one per example of one pixel; the optimum is θ* = √ᾱ_t."""
    count = len(noises[0])
    theta = (factor * process.sqrt_alphas_cumprod[step]).repeat(count).requires_grad_()
    model = reads(process, "sample", lambda x_t, t: theta.view(-1, 1, 1, 1) * x_t)
    x_0, t = draw(count, 1, 1, 1, seed=7), torch.full((count,), step)
    losses = loss(
        process, model, x_0, t, *noises, prediction_type="sample", variance_type="fixed_small"
    ) / len(process)
    return torch.autograd.grad(losses.sum(), theta)[0] * LN2


@pytest.mark.parametrize(
    ("process", "step", "ratio"),
    [(CONSTANT, 1, 1.25), (CONSTANT, 2, 2.81), (CONSTANT, 5, 10.3), (LINEAR, 1, 0.834), (LINEAR, 10, 6.34)],
)
def test_one_minimiser_and_the_noise_of_the_gradients(process, step, ratio):
    first, second = draw(COUNT, 1, 1, 1), draw(COUNT, 1, 1, 1, seed=1)
    ours, theirs = (
        [gaussian_gradients(loss, process, step, factor, *noises) for factor in (0.8, 1.0, 1.2)]
        for loss, noises in ((bound_loss, (first,)), (sddpm_loss, (first, second)))
    )
    for below, at, above in (ours, theirs):
        assert within(at, 0.0)
        error = at.std() / math.sqrt(COUNT)
        assert below.mean() < -5 * error and above.mean() > 5 * error
    # Item 4: the noise is 1 + β̃/(c0² mse) as much; the error of a ratio of means of squares
    a, b = theirs[1].square(), ours[1].square()
    found = a.mean() / b.mean()
    error = found / math.sqrt(COUNT) * math.hypot(a.std() / a.mean(), b.std() / b.mean())
    mse = mse_of_gaussian(process, 1.0)[step]
    exact = (process.posterior_variance[step] / (process.posterior_mean_coef_x0[step] ** 2 * mse)).item()
    assert exact == near(ratio, rel=5e-3)
    assert abs(found - 1 - exact) < 5 * error < 0.5 * exact


def test_a_learned_variance_has_the_bounds_gradient_in_sddpm_too():
    # KL by log σ² of one pixel: ½ − ½ (β̃ + (c0 (x̂_0 − x_0))²)/σ², per dimension, times T/ln 2.
    step, count = 2, COUNT
    v = torch.full((count, 1, 1, 1), 0.3, dtype=torch.float64, requires_grad=True)
    x_0, t = draw(count, 1, 1, 1, seed=7), torch.full((count,), step)
    q, a = tables_by_bayes(BETAS), np.sqrt(np.cumprod(1 - BETAS))[step]
    noises = draw(count, 1, 1, 1), draw(count, 1, 1, 1, seed=1)
    how = {"prediction_type": "sample", "variance_type": "learned_range"}
    losses = sddpm_loss(SHORT, lambda x_t, t: torch.cat([a * x_t, v], 1), x_0, t, *noises, **how)
    gradients = torch.autograd.grad(losses.sum(), v)[0].flatten()
    low, high = math.log(q["posterior_variance"][step]), math.log(BETAS[step])
    sigma2 = math.exp(0.65 * high + 0.35 * low)
    spread = q["posterior_variance"][step] + q["c0"][step] ** 2 * (1 - a**2)  # E, at the optimum of N(0, 1)
    assert within(gradients, 4 / LN2 * 0.5 * (1 - spread / sigma2) * (high - low) / 2)


# Hybrid


def test_hybrid_is_simple_plus_a_bound_that_trains_the_variance_alone():
    x_0 = torch.randint(256, (5, 2, 3, 3), generator=torch.Generator().manual_seed(0)).double() / 127.5 - 1
    noise, t = draw(5, 2, 3, 3), torch.tensor([0, 1, 2, 3, 0])
    output = (0.3 * draw(5, 4, 3, 3, seed=2)).requires_grad_()
    loss = hybrid_loss(SHORT, lambda x_t, t: output, x_0, t, noise, "epsilon", weight=0.02)
    simple = (output[:, :2] - noise).square().mean((1, 2, 3))
    options = {"prediction_type": "epsilon", "variance_type": "learned_range"}
    bound = bound_loss(SHORT, lambda x_t, t: output, x_0, t, noise, **options)
    assert_allclose(loss.detach(), (simple + 0.02 * bound).detach(), rtol=1e-12)
    (got,) = torch.autograd.grad(loss.sum(), output)
    (of_simple,) = torch.autograd.grad(simple.sum(), output, retain_graph=True)
    (of_bound,) = torch.autograd.grad(bound.sum(), output)
    assert_allclose(got[:, :2], of_simple[:, :2], rtol=1e-12)
    assert_allclose(got[:, 2:], 0.02 * of_bound[:, 2:], rtol=1e-12)
    assert (of_bound[:, :2].abs() > 0).all() and (got[:, 2:].abs() > 0).all()


# Weights


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_min_snr_in_every_parametrisation(kind):
    # min(SNR, 5) on x_0; on ε min(SNR, 5)/SNR, on v min(SNR, 5)/(SNR + 1).
    t, x_0, noise = torch.tensor([0, 1, 300, 500, 999]), draw(5, 1, 2, 3), draw(5, 1, 2, 3, seed=1)
    model = reads(LINEAR, kind, lambda x_t, t: 0.4 * torch.tanh(x_t))
    loss = min_snr_loss(LINEAR, model, x_0, t, noise, kind)
    abar = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))[t].view(-1, 1, 1, 1)
    snr = (abar / (1 - abar)).flatten()
    error = 0.4 * torch.tanh(abar.sqrt() * x_0 + (1 - abar).sqrt() * noise) - x_0
    square = error.square().mean((1, 2, 3))
    assert_allclose(loss, snr.clamp(max=5) * square, rtol=1e-7)
    assert (snr < 5).any() and (snr > 5).any()
    unbounded = min_snr_loss(LINEAR, model, x_0, t, noise, kind, gamma=1e9)
    assert_allclose(unbounded, snr * square, rtol=1e-7)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize(
    ("variance_type", "weights"),
    [
        ("fixed_small", [0.916986606841, 0.599671512159, 0.0789765416112, 0.0101783834195, 0.00551446195964]),
        (
            "fixed_large",
            [0.916986606841, 0.272692084278, 0.0682239889905, 0.00999623022646, 0.00550973453343],
        ),
    ],
)
def test_score_matching_has_the_bounds_weights(kind, variance_type, weights):
    # docs/maths.md 8: w_t on the mean square of ε; T/ln 2 makes it bits.
    t, x_0, noise = torch.tensor([0, 1, 10, 100, 500]), draw(5, 1, 2, 3), draw(5, 1, 2, 3, seed=1)
    model = reads(LINEAR, kind, lambda x_t, t: 0.4 * torch.tanh(x_t))
    loss = score_matching_loss(LINEAR, model, x_0, t, noise, kind, variance_type)
    abar = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))[t].view(-1, 1, 1, 1)
    x_t = abar.sqrt() * x_0 + (1 - abar).sqrt() * noise
    eps = (x_t - abar.sqrt() * 0.4 * torch.tanh(x_t)) / (1 - abar).sqrt()
    expected = np.array(weights) * (eps - noise).square().mean((1, 2, 3)).numpy() * 1000 / LN2
    assert_allclose(loss, expected, rtol=1e-7)


def test_the_conditional_score_trains_towards_the_marginal_one():
    # On N(0, v) data the minimiser over s_θ = −θ x_t is the score of q(x_t), though the target is another.
    variance, t = 0.25, torch.full((COUNT,), 300)
    marginal = 1 / (LINEAR.alphas_cumprod[300] * variance + LINEAR.one_minus_alphas_cumprod[300])
    theta = marginal.repeat(COUNT).requires_grad_()
    x_0, noise = math.sqrt(variance) * draw(COUNT, 1, 1, 1), draw(COUNT, 1, 1, 1, seed=1)
    how = {"prediction_type": "score", "variance_type": "fixed_small"}
    for factor in (0.8, 1.0, 1.2):
        losses = score_matching_loss(
            LINEAR, lambda x, t, k=factor: -k * theta.view(-1, 1, 1, 1) * x, x_0, t, noise, **how
        )
        gradient = torch.autograd.grad(losses.sum(), theta)[0]
        assert within(gradient, 0.0) == (factor == 1.0)


# By name


def test_names_and_what_they_need():
    assert tuple(OBJECTIVES) == ("simple", "bound", "hybrid", "min-snr", "score-matching", "sddpm")
    for name in OBJECTIVES:
        variance = "learned_range" if name == "hybrid" else "fixed_small"
        objective = make_objective(name, "v_prediction", variance)
        assert objective.noises == (2 if name == "sddpm" else 1)
        assert objective.outputs == (2 if name == "hybrid" else 1)
        x_0, t = torch.zeros(3, 1, 8, 8), torch.tensor([0, 1, 3])
        output = torch.zeros(3, objective.outputs, 8, 8, requires_grad=True)
        noises = [draw(3, 1, 8, 8, seed=seed).float() for seed in range(objective.noises)]
        losses = objective.loss(SHORT, lambda x_t, t, output=output: output, x_0, t, *noises)
        assert losses.shape == (3,) and losses.isfinite().all()
        losses.sum().backward()
        assert output.grad is not None and output.grad.isfinite().all()


def test_what_doesnt_fit_is_refused():
    for name, variance, words in [
        ("simplest", "fixed_large", "objective is 'simplest'; allowed: simple, bound, hybrid"),
        ("hybrid", "fixed_small", "variance_type is 'fixed_small', but objective 'hybrid' trains one"),
        ("simple", "learned_range", "which objective 'simple' doesn't train"),
        ("min-snr", "learned_range", "which objective 'min-snr' doesn't train"),
        ("bound", "learned", "variance_type is 'learned'; allowed: fixed_small, fixed_large, learned_range"),
    ]:
        with pytest.raises(ValueError, match=words):
            make_objective(name, "epsilon", variance)


def test_what_guessing_zero_costs():
    cost = {kind: make_objective("simple", kind).cost_of_zero(LINEAR) for kind in PREDICTION_TYPES}
    assert all(values.shape == (1000,) for values in cost.values())
    assert cost["epsilon"].mean() == pytest.approx(1, abs=0.03) and (cost["sample"] == 1).all()
    assert_allclose(cost["score"] * LINEAR.one_minus_alphas_cumprod, cost["epsilon"], rtol=1e-4)
    bound = make_objective("bound", "epsilon", "fixed_small").cost_of_zero(LINEAR)
    assert bound.mean() == pytest.approx(10.17 / LN2 + 2, rel=0.2)  # Σ w_t bits, and some of the decoder's


# The ends

LONG = DiffusionProcess.from_betas(np.linspace(1e-4, 0.02, 4000))  # ᾱ of 2.7e-18 at its end
VANISHING = DiffusionProcess.from_betas([0.2] * 1000)  # 1e-97, no float32
TERMINAL = DiffusionProcess.from_betas([*np.linspace(1e-4, 0.02, 999), 1.0])
ENDS = [
    *((process, kind) for process in (LINEAR, LONG) for kind in PREDICTION_TYPES),
    *((TERMINAL, kind) for kind in ("sample", "v_prediction", "mean")),
]


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(("process", "kind"), ENDS)
def test_losses_and_gradients_are_finite_at_both_ends(process, kind, name):
    # In one batch, as x̂_0 at the last step is far beyond what the decoder of the first one can take.
    objective = make_objective(name, kind, "learned_range" if name == "hybrid" else "fixed_large")
    last = len(process) - 1
    t = torch.tensor([0, 1, last // 2, last - 1, last] * 4)
    x_0 = torch.ones(len(t), 1, 4, 4)
    noises = [draw(*x_0.shape, seed=seed).float() for seed in range(objective.noises)]
    output = draw(len(t), objective.outputs, 4, 4, seed=5).float().requires_grad_()
    losses = objective.loss(process, lambda x_t, steps: output, x_0, t, *noises)
    assert losses.isfinite().all()
    (gradient,) = torch.autograd.grad(losses.sum(), output)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", [min_snr_loss, score_matching_loss])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "score"])
def test_weights_of_a_signal_too_faint_for_float32(loss, kind):
    more = {} if loss is min_snr_loss else {"variance_type": "fixed_small"}
    x_0, t = torch.ones(2, 1, 2, 2), torch.tensor([998, 999])
    values = loss(VANISHING, lambda x_t, steps: 0 * x_t, x_0, t, draw(2, 1, 2, 2).float(), kind, **more)
    assert values.isfinite().all()


def test_noise_of_another_shape_does_not_broadcast():
    x_0, narrow = torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4)
    for name in ("simple", "bound", "sddpm"):
        objective = make_objective(name)
        with pytest.raises(ValueError, match=r"noise has shape \(2, 1, 4, 4\); allowed: that of x_0"):
            noises = [narrow] * objective.noises
            objective.loss(SHORT, lambda x_t, t: x_t, x_0, torch.tensor([0, 1]), *noises)


# Objectives of one's own


def own_loss(process, model, x_0, t, noise):
    x_t = process.q_sample(x_0, noise, t)
    return (model(x_t, process.timesteps_at(t)) - noise).abs().flatten(1).mean(1)


def test_an_objective_of_ones_own():
    x_0, noise, t = draw(2, 1, 2, 2), draw(2, 1, 2, 2, seed=1), torch.tensor([3, 900])
    for objective in (make_objective(own_loss), make_objective(Objective(own_loss))):
        assert (objective.noises, objective.outputs) == (1, 1)
        got = objective.loss(LINEAR, lambda x_t, t: 0 * x_t, x_0, t, noise)
        assert torch.equal(got, noise.abs().flatten(1).mean(1))
        assert objective.cost_of_zero(LINEAR).shape == (1000,)


@pytest.mark.parametrize(
    "mine", [own_loss, Objective(own_loss), "own"], ids=["function", "Objective", "name"]
)
def test_an_own_objective_that_trains_no_variance_is_refused_with_a_learned_one(mine, monkeypatch):
    monkeypatch.setattr("hf_ddpm.objectives.OBJECTIVES", dict(OBJECTIVES))
    register_objective("own", lambda how: Objective(own_loss))
    assert make_objective(mine, variance_type="fixed_small").outputs == 1
    with pytest.raises(ValueError, match=r"'learned_range', which objective .* doesn't train"):
        make_objective(mine, variance_type="learned_range")


def test_a_registered_objective_gets_the_choices_of_the_run(monkeypatch):
    monkeypatch.setattr("hf_ddpm.objectives.OBJECTIVES", dict(OBJECTIVES))
    seen = []

    def make(how):
        seen.append(how)
        return Objective(own_loss, variance="any")

    register_objective("own", make)
    register_objective("own", make)  # again, as when a notebook's cell is run twice
    assert make_objective("own", "sample", "learned_range", 3.0, 0.5).outputs == 2
    assert seen == [Choices("sample", "learned_range", 3.0, 0.5)]
    with pytest.raises(ValueError, match="'simple' can't be registered; allowed: a name that is not taken"):
        register_objective("simple", make)
    with pytest.raises(ValueError, match="make is 3"):
        register_objective("three", 3)


def test_the_cost_of_zero_is_asked_in_the_shape_of_the_images():
    """A loss of one's own may hold a mask, or a network, that takes no other images."""
    mask = torch.arange(12.0).view(3, 2, 2)

    def masked(process, model, x_0, t, noise):
        return (mask * (model(x_0, t) - noise).square()).flatten(1).mean(1)

    assert make_objective(masked).cost_of_zero(SHORT, (3, 2, 2)).shape == SHORT.betas.shape


def test_a_cost_of_zero_by_which_no_loss_can_be_judged_sets_no_limit():
    for value in (0.0, -1.0, math.nan):
        objective = make_objective(lambda process, model, x_0, t, noise, v=value: x_0.new_full(t.shape, v))
        assert (objective.cost_of_zero(SHORT) == 1e30).all()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"loss": None}, "loss is a NoneType"),
        ({"loss": own_loss, "noises": -1}, "noises is -1"),
        ({"loss": own_loss, "variance": "Fixed"}, "variance is 'Fixed'; allowed: 'fixed', 'any', 'learned'"),
    ],
    ids=["loss", "noises", "variance"],
)
def test_an_objective_that_is_none(wrong, named):
    with pytest.raises(ValueError, match=named):
        Objective(**wrong)


def test_a_registered_function_that_gives_no_objective(monkeypatch):
    monkeypatch.setattr("hf_ddpm.objectives.OBJECTIVES", dict(OBJECTIVES))
    register_objective("own", lambda how: 5)
    with pytest.raises(ValueError, match="'own' was registered with a function that gave int; allowed"):
        make_objective("own")


@pytest.mark.parametrize("wrong", [lambda *_: torch.tensor(1.0), lambda *_: 1.0], ids=["mean", "float"])
def test_a_loss_that_is_not_one_value_per_example_is_refused(wrong):
    x = draw(2, 1, 2, 2)
    with pytest.raises(
        ValueError, match=r"the objective's loss gave .*; allowed: one value per example, shape \(2,\)"
    ):
        make_objective(wrong).loss(LINEAR, None, x, torch.tensor([0, 1]), x)


@pytest.mark.parametrize("wrong", ["simpel", 3, None, Objective], ids=str)
def test_what_is_no_objective(wrong):
    with pytest.raises(ValueError, match=r"allowed: simple, bound, .*, an Objective, or a function"):
        make_objective(wrong)
