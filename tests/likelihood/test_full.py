"""likelihood/full.py, likelihood/bound.py: the exact bound against docs/maths.md and against linear algebra.

Expectations are exact where they can be: with a linear denoiser a KL is a quadratic of (x_0, ε), which four
pixels (±1, ±1) average without error.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from hf_ddpm.gaussian import discretized_gaussian_log_likelihood
from hf_ddpm.likelihood import bound_term, evaluate_bound, prior_kl
from hf_ddpm.parametrization import PREDICTION_TYPES, from_x0_eps
from hf_ddpm.process import DiffusionProcess
from tests.bound_oracles import (
    LN2,
    LinearModel,
    all_steps,
    answers,
    continuous_l0,
    draw,
    every_level,
    gaussian_denoiser,
    kl,
    levels,
    per_step,
    toy_model,
    trapezoid,
)
from tests.oracles import (
    STEPS,
    betas_by_definition,
    chain,
    expectation,
    log_probability,
    mse_of_gaussian,
    near,
    optimal_log_variance,
    spaced,
)

LINEAR = chain("linear")
SHORT = DiffusionProcess.from_betas([0.1, 0.3, 0.2, 0.5])
T_4, X_4, EPS_4 = torch.arange(4), levels(4, 1, 2, 3), draw(4, 1, 2, 3)
PLAIN = {"prediction_type": "sample", "clip_x0": False}
X, EPS = (torch.tensor(z).double().view(1, 1, 2, 2) for z in ([1, 1, -1, -1], [1, -1, 1, -1]))
VARIANCES = ["fixed_small", "fixed_large", "learned", "learned_range", "tensor"]
COSINE = "squaredcos_cap_v2"


# Closed forms


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("linear", 2.91129454203e-5),
        ("scaled_linear", 5.29239358283e-4),
        (COSINE, 1.7519849882548e-9),
        ("sigmoid", 2.86249503442e-5),
        ("constant", 1.0295489313177e-5),
    ],
)
def test_prior_at_plus_and_minus_one(name, bits):
    for x_0 in (X, X.float()):
        nats = prior_kl(chain(name), x_0.repeat(3, 2, 1, 1))
        assert (nats.shape, nats.dtype) == ((3,), torch.float64)
        assert_allclose(nats / (8 * LN2), bits, rtol=1e-10)


def test_prior_by_definition():
    linear, x_0 = LinearModel([0.1, 0.3, 0.2], [0, 1, 2], 4), levels(3, 2, 1, 2)
    last, unit = linear.s[2] ** 2 * np.eye(4), (np.zeros(4), np.eye(4))
    expected = [kl(linear.a[2] * x, last, *unit) for x in x_0.flatten(1).numpy()]
    assert_allclose(prior_kl(linear.process, x_0), expected, rtol=1e-12)
    # Zero terminal SNR: the chain ends in N(0, I) itself.
    assert (prior_kl(DiffusionProcess.from_betas([0.1, 1.0]), x_0) == 0).all()


@pytest.mark.parametrize(
    ("t", "small", "large", "optimal"),
    [
        (1, 109.052846851, 49.711617084, 2.69477711652),
        (500, 1.86079010462e-5, 1.87757853146e-5, 1.86075548008e-5),
    ],
)
def test_kl_at_mse_0_04(t, small, large, optimal):
    x_0, noise, steps = torch.full((2, 1, 2, 3), 0.25).double(), draw(2, 1, 2, 3), torch.tensor([t, t])
    model, best = answers(x_0 + 0.2 * EPS[0, 0, 0].view(2, 1, 1, 1)), optimal_log_variance(LINEAR, 0.04)
    for variance_type, expected in [("fixed_small", small), ("fixed_large", large), (best, optimal)]:
        term = bound_term(LINEAR, model, x_0, steps, noise, variance_type=variance_type, **PLAIN)
        assert {z.dtype for z in (term.nats, term.x0_mse, term.eps_mse)} == {torch.float64}
        assert_allclose(term.nats / 6, expected, rtol=2e-10)
        assert_allclose(term.x0_mse, 0.04, rtol=1e-12)
        assert_allclose(term.eps_mse, 0.04 * LINEAR.snr[t].item(), rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "variance_type", "interior", "saturated"),
    [
        ("linear", "fixed_small", 1.305377656, 0.509825070),
        ("linear", "fixed_large", 1.305377656, 0.509825070),
        (COSINE, "fixed_small", 0.739002762, 0.322691696),
        ("linear", "log β", 1.712846020, 0.615886423),
        ("constant", "fixed_small", 6.735172281, 0.986521074),
    ],
)
def test_floor_of_l0(name, variance_type, interior, saturated):
    x_0, t = every_level(), torch.zeros(256, dtype=torch.int64)
    variance_type = chain(name).log_betas if variance_type == "log β" else variance_type
    term = bound_term(chain(name), answers(x_0), x_0, t, draw(256, 1), variance_type=variance_type, **PLAIN)
    assert_allclose(term.nats[1:-1] / LN2, interior, atol=1e-9)
    assert_allclose(term.nats[[0, -1]] / LN2, saturated, atol=1e-9)


@pytest.mark.parametrize(("first", "variance"), [("spaced", 9.99308760e-5), ("full", 5.45318766130e-5)])
def test_first_entry_of_a_respaced_chain(first, variance):
    process, x_0 = LINEAR.respaced(spaced("linear", 10).timesteps, first), levels(1, 1, 2, 3)
    expected = -sum(log_probability(x, x + 0.01, math.sqrt(variance))[0] for x in x_0.flatten().tolist())
    for variance_type in ("fixed_small", "fixed_large"):
        bound = evaluate_bound(process, answers(x_0 + 0.01), x_0, variance_type=variance_type, **PLAIN)
        assert bound.distortion_bpd.item() * 6 * LN2 == near(expected, rel=2e-9)


@pytest.mark.parametrize(
    ("name", "variance_type", "gap", "own"),
    [
        ("linear", "fixed_large", 0.113702526520, 0),
        ("linear", "fixed_small", 0.578594845267, 0.464892318747),
        (COSINE, "fixed_large", 0.127816128685, None),
        (COSINE, "fixed_small", 0.534457322844, None),
        ("constant", "fixed_large", 0.106106667549, None),
        ("constant", "fixed_small", 0.257093450159, None),
    ],
)
def test_bound_of_standard_normal_data(name, variance_type, gap, own):
    # Bound − entropy in nats/dim with a continuous L_0, whose σ_0² is our tables' or β_0.
    process, exact_eps = chain(name), per_step(name, lambda x_t, abar: (1 - abar).sqrt() * x_t)
    term = all_steps(process, exact_eps, X, EPS, variance_type=variance_type, clip_x0=False)
    rate = (prior_kl(process, X) + term.nats[1:].sum()).item() / 4
    tables = process.log_variance(variance_type), process.log_betas
    for (log_variance, *_), expected in zip(tables, (gap, own), strict=True):
        excess = rate + continuous_l0(term.x0_mse[0], log_variance) - 0.5 * math.log(2 * math.pi * math.e)
        assert expected is None or excess.item() == pytest.approx(expected, abs=2e-11)
    if name == "linear":
        kls = {"fixed_large": 4.60515000643, "fixed_small": 5.07004232518}[variance_type]
        assert term.nats[1:].sum().item() / 4 == near(kls, rel=2e-12)


@pytest.mark.parametrize(
    ("name", "count", "large", "small"),
    [
        ("linear", 10, 0.597679464, 310.233393097),
        ("linear", 50, 0.144340467, 38.438907465),
        ("linear", 1000, 0.170653764, 0.798177770),
        (COSINE, 10, 0.368145820, 391.758797254),
        (COSINE, 50, 0.078805137, 29.556012785),
        (COSINE, 1000, 0.187974487, 0.752635067),
    ],
)
def test_optimal_variance_of_gaussian_data_attains_the_entropy(name, count, large, small):
    # docs/maths.md 8: I2, x_0 ~ N(0, 0.25²); the network is told the full chain's steps.
    process, model = spaced(name, count), gaussian_denoiser(name, 1 / 16)
    best = optimal_log_variance(process, mse_of_gaussian(process, 1 / 16))
    later, first = torch.arange(1, count), torch.zeros(1, dtype=torch.int64)
    x_0, noise = ((X / 4).expand(count - 1, 1, 2, 2), EPS.expand(count - 1, 1, 2, 2))
    found = model(process.q_sample(X / 4, EPS, first), process.timesteps_at(first))
    mse = (found - X / 4).square().mean()
    for variance_type, gap in [(best, 0), ("fixed_large", large), ("fixed_small", small)]:
        log_variance = process.log_variance("fixed_small") if gap else best
        term = bound_term(process, model, x_0, later, noise, variance_type=variance_type, **PLAIN)
        rate = (prior_kl(process, X / 4) + term.nats.sum()) / 4
        nats = rate + continuous_l0(mse, log_variance[0]) + math.log(127.5)
        assert nats.item() / LN2 - 7.041449022039 == pytest.approx(gap, abs=2e-9)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_a_point_mass_costs_no_kl(kind):
    # fixed_small is its true reverse variance (docs/maths.md 2).
    x_0, noise, t = levels(1, 1, 2, 3), draw(1, 1, 2, 3), torch.arange(1000)
    output = from_x0_eps(LINEAR, kind, *(z.expand(1000, 1, 2, 3) for z in (x_0, noise)), t)
    options = {"variance_type": "fixed_small", "prediction_type": kind, "model_output": output}
    assert_allclose(all_steps(LINEAR, None, x_0, noise, **options).nats[1:], 0, atol=1e-15)


@pytest.mark.parametrize("clip_x0", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_fixed_small_is_the_fall_of_snr_times_the_error(name, clip_x0):
    # docs/maths.md 8: I1, whatever the model.
    options = {"variance_type": "fixed_small", "clip_x0": clip_x0}
    term = all_steps(chain(name), toy_model, levels(1, 3, 2, 1), draw(1, 3, 2, 1), **options)
    abar = np.cumprod(1 - betas_by_definition(name))
    snr, mse = abar / (1 - abar), term.x0_mse.numpy()
    assert_allclose(term.nats[1:], 0.5 * 6 * (snr[:-1] - snr[1:]) * mse[1:], rtol=2e-9)
    assert_allclose(term.eps_mse, snr * mse, rtol=1e-9)


def test_zero_terminal_snr():
    process, x_0, noise = DiffusionProcess.from_betas([0.1, 0.5, 1.0]), levels(1, 1, 2, 2), draw(1, 1, 2, 2)
    for kind in ("v_prediction", "sample"):
        term = all_steps(process, toy_model, x_0, noise, variance_type="fixed_small", prediction_type=kind)
        assert term.nats[2].item() == near(0.5 * 4 * 0.45 / 0.55 * term.x0_mse[2].item(), rel=1e-12)
        assert term.eps_mse[2] == 0
    with pytest.raises(ValueError, match="alphas_cumprod is 0"):
        all_steps(process, toy_model, x_0, noise, variance_type="fixed_small")


@pytest.mark.parametrize(
    ("name", "small", "large", "optimal"),
    [
        ("linear", 1.006840855, 1.487182879, 1.004938123),
        (COSINE, 1.003742087, 1.432728136, 1.002612902),
        ("constant", 1.276588385, 1.134494788, 1.128943729),
    ],
)
def test_price_of_one_pixel(name, small, large, optimal):
    # docs/maths.md 5.1: a fair coin ±1 with its exact denoiser, in bits; by symmetry x_0 = 1.
    process, (z, weight) = chain(name), trapezoid(321)
    t, noise = torch.arange(len(process)).repeat_interleave(321), z.repeat(len(process))[:, None]
    x_0, model = torch.ones_like(noise), per_step(name, lambda x, abar: (abar.sqrt() / (1 - abar) * x).tanh())

    def expected(variance_type):
        options = {"variance_type": variance_type, "prediction_type": "sample"}
        term = bound_term(process, model, x_0, t, noise, **options)
        return ((y.view(-1, 321) * weight).sum(1) for y in (term.nats, term.x0_mse))

    nats, mse = expected("fixed_small")
    large_nats, best_nats = (next(expected(v)) for v in ("fixed_large", optimal_log_variance(process, mse)))
    a, s = (getattr(process, f"sqrt_{table}alphas_cumprod")[0].item() for table in ("", "one_minus_"))
    unsure = expectation(lambda z: np.logaddexp(0, -2 * a * (a + s * z) / s**2))  # H(x_0 | x_{t=0})
    rest = prior_kl(process, x_0[:1]).item() + unsure
    for terms, bits in [(nats, small), (large_nats, large), (best_nats, optimal)]:
        assert (terms[1:].sum().item() + rest) / LN2 == pytest.approx(bits, abs=1e-9)


def test_bound_of_a_finite_set_is_at_least_its_entropy():
    # docs/maths.md 8: I3. 4 images of 4 pixels hold 2 bits. Five standard errors; σ_0 is tiny, so L_0 ≈ 0.
    process, images = spaced("linear", 100), levels(4, 1, 2, 2)
    points = images.flatten(1)

    def mean_of_the_set(x_t, abar):
        dot, abar = abar.flatten(1).sqrt() * x_t.flatten(1) @ points.T, abar.flatten(1)
        weight = ((dot - 0.5 * abar * points.square().sum(1)) / (1 - abar)).softmax(1)
        return (weight @ points).view_as(x_t)

    table = torch.cat([torch.tensor([math.log(1e-6)]).double(), process.log_variance("fixed_small")[1:]])
    options = {"variance_type": table, "generator": torch.Generator().manual_seed(0), **PLAIN}
    model, x_0 = per_step("linear", mean_of_the_set), images.repeat(100, 1, 1, 1)
    bound = evaluate_bound(process, model, x_0, **options)
    excess, stderr = bound.total_bpd.mean() - 0.5, bound.total_bpd.std() / 20
    assert -5 * stderr < excess < 0.1
    assert bound.distortion_bpd.max() < 1e-3


# Linear algebra


@pytest.mark.parametrize("variance_type", VARIANCES)
@pytest.mark.parametrize("kept", [[0, 1, 2, 3, 4], [0, 2, 4], [1, 4]], ids=["full", "respaced", "two"])
def test_terms_by_brute_force(kept, variance_type):
    linear, t = LinearModel([0.1, 0.3, 0.2, 0.5, 0.4], kept, 4), torch.arange(len(kept)).repeat(2)
    x_0, noise = levels(len(t), 2, 1, 2), 0.7 * draw(len(t), 2, 1, 2)
    log_variance, argument, second = linear.log_variance(variance_type)
    expected = linear.terms(x_0, t, noise, log_variance)
    for kind, clip_x0 in itertools.product(PREDICTION_TYPES, (False, True)):
        options = {"variance_type": argument, "prediction_type": kind, "clip_x0": clip_x0}
        term = bound_term(linear.process, linear.network(kind, second), x_0, t, noise, **options)
        for got, want in zip((term.nats, term.x0_mse, term.eps_mse), expected, strict=True):
            assert_allclose(got, want, rtol=1e-9)


@pytest.mark.parametrize("variance_type", VARIANCES)
@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [0, 3]], ids=["full", "respaced"])
def test_bound_is_minus_log_p_plus_the_kl_of_the_paths(kept, variance_type):
    # An equality with the L_0 of a continuous image; E over ε by 4 points ±√2 e_i, exact for quadratics.
    linear = LinearModel([0.1, 0.3, 0.2, 0.5], kept, 2)
    linear.v[0] = linear.v[0, 0]  # one σ_0 for both pixels
    log_variance, argument, second = linear.log_variance(variance_type)
    x_0, points = levels(3, 1, 1, 2).repeat_interleave(4, 0), torch.cat([torch.eye(2), -torch.eye(2)])
    noise = math.sqrt(2) * points.double().view(4, 1, 1, 2).repeat(3, 1, 1, 1)
    options = {"variance_type": argument, "clip_x0": False, "noise_fn": lambda t: noise}
    bound = evaluate_bound(linear.process, linear.network("epsilon", second), x_0, **options)
    nats = 2 * LN2 * bound.rate_bpd + 2 * continuous_l0(bound.x0_mse[:, 0], log_variance[0, 0])
    for x, got in zip(x_0[::4].flatten(1).numpy(), nats.view(3, 4).mean(1).tolist(), strict=True):
        log_p, gap = linear.log_p_and_gap(x, log_variance)
        assert got == near(-log_p + gap, rel=1e-9)


@pytest.mark.parametrize("optimal", [True, False], ids=["optimal", "fixed_large"])
def test_bound_of_every_level_is_at_least_its_code_length(optimal):
    # One pixel: P(level) is the mass of p_θ(x_0) in its bin. Σ exp(−bound) ≤ 1, and nearly 1 for p = q.
    linear, x_0, (z, weight) = LinearModel([0.3, 0.5, 0.7, 0.99], range(4), 1), every_level(), trapezoid(121)
    process, mse = linear.process, mse_of_gaussian(linear.process, 1 / 16)
    log_variance = process.log_variance("fixed_large")
    if optimal:  # the exact denoiser of N(0, 0.25²)
        linear.A[:, 0, 0], linear.b[:] = mse * process.snr / process.alphas_cumprod.sqrt(), 0
        log_variance = optimal_log_variance(process, mse)
    options = {"variance_type": log_variance, "noise_fn": lambda t: z.repeat(256)[:, None], **PLAIN}
    bound = evaluate_bound(process, linear.network("sample", None), x_0.repeat_interleave(121, 0), **options)
    nats = LN2 * (bound.total_bpd.view(256, 121) * weight).sum(1)
    mean, cov = linear.reverse(log_variance.numpy()[:, None])
    length = [-log_probability(x, mean[0], math.sqrt(cov[0, 0]))[0] for x in x_0[:, 0].tolist()]
    assert (nats.numpy() - length).min() > 0
    assert (0.998 if optimal else 0) < torch.exp(-nats).sum().item() < 1


# Options


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_clip_x0_acts_on_the_prediction_and_precedes_the_errors(kind):
    guess = X_4 + draw(4, 1, 2, 3, seed=1)
    assert (guess.abs() > 1).any() and (guess.abs() < 1).any()
    eps = SHORT.predict_eps(SHORT.q_sample(X_4, EPS_4, T_4), guess, T_4)
    output = from_x0_eps(SHORT, kind, guess, eps, T_4)
    args, options = (SHORT, None, X_4, T_4, EPS_4), {"variance_type": "fixed_large"}
    cut = guess.clamp(-1, 1)
    for clip, seen in [({}, cut), ({"clip_x0": True}, cut), ({"clip_x0": False}, guess)]:
        term = bound_term(*args, prediction_type=kind, model_output=output, **options, **clip)
        plain = bound_term(*args, model_output=seen, **options, **PLAIN)
        mse = (seen - X_4).square().flatten(1).mean(1)
        assert_allclose(term.nats, plain.nats, rtol=1e-10)
        assert_allclose(term.x0_mse, mse, rtol=1e-10)
        assert_allclose(term.eps_mse, SHORT.snr * mse, rtol=1e-10)


def test_tanh_decoder_is_the_published_one_at_t_0_only():
    got = {}
    for decoder in ("exact", "tanh"):
        options = {"variance_type": "fixed_small", "decoder": decoder, **PLAIN}
        term = bound_term(SHORT, answers(X_4 + 0.3), X_4, T_4, EPS_4, **options)
        log_variance = SHORT.log_variance("fixed_small")[0]
        log_p = discretized_gaussian_log_likelihood(X_4, X_4 + 0.3, log_variance, decoder).flatten(1).sum(1)
        assert term.nats[0].item() == near(-log_p[0].item(), rel=1e-12)
        bound = evaluate_bound(SHORT, answers(X_4 + 0.3), X_4, **options)
        assert_allclose(bound.distortion_bpd, -log_p / (6 * LN2), rtol=1e-12)
        got[decoder] = term.nats
    assert torch.equal(got["exact"][1:], got["tanh"][1:]) and abs(got["exact"][0] - got["tanh"][0]) > 1e-6


def test_no_images_and_a_table_of_numpy_are_refused_in_one_line():
    process, x_0 = chain("linear"), levels(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"^there are no images; allowed: at least one$"):
        evaluate_bound(process, toy_model, x_0[:0], variance_type="fixed_small")
    with pytest.raises(
        ValueError,
        match=r"^variance_type is a float64 NumPy array of shape \(1000,\); allowed: .*, or a \(T,\) tensor$",
    ):
        evaluate_bound(process, toy_model, x_0, variance_type=np.zeros(1000))  # type: ignore[arg-type]


def test_ends_of_the_learned_variances():
    mean = toy_model(SHORT.q_sample(X_4, EPS_4, T_4), T_4)

    def nats(variance_type, *second):
        options = {"variance_type": variance_type, "model_output": torch.cat([mean, *second], 1)}
        return bound_term(SHORT, None, X_4, T_4, EPS_4, **options).nats

    one, log_betas = torch.ones_like(X_4), SHORT.log_betas.view(4, 1, 1, 1).expand_as(X_4)
    small, large, betas = nats("fixed_small"), nats("fixed_large"), nats(SHORT.log_betas)
    assert_allclose(nats("learned_range", -one), small, rtol=1e-12)
    assert_allclose(nats("learned_range", one), betas, rtol=1e-12)  # β_0 at t = 0, not β̃_2
    assert_allclose(nats("learned", log_betas), betas, rtol=1e-12)
    assert_allclose(betas[1:], large[1:], rtol=1e-12)
    assert small[0] == large[0]
    middle = 0.5 * (SHORT.log_variance("fixed_small") + SHORT.log_betas)
    assert_allclose(nats("learned_range", 0 * one), nats(middle), rtol=1e-12)
    assert torch.equal(nats(middle.float()), nats(middle.float().double()))


@pytest.mark.parametrize("variance_type", ["fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_gradient_reaches_the_network(variance_type, kind):
    x_0, noise, t = levels(3, 1, 1, 2), draw(3, 1, 1, 2), torch.tensor([0, 1, 3])
    channels = 1 if variance_type == "fixed_large" else 2
    output = (0.5 * draw(3, channels, 1, 2, seed=1)).requires_grad_()
    options = {"variance_type": variance_type, "prediction_type": kind, "clip_x0": False}

    def nats(z):
        return bound_term(SHORT, None, x_0, t, noise, model_output=z, **options).nats

    assert torch.autograd.gradcheck(nats, output)
    assert (torch.autograd.grad(nats(output).sum(), output)[0] != 0).all()
