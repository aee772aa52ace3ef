"""parametrization.py: the five meanings of an output, by round trip and by Bayes' rule (docs/maths.md 3).

At the end: shapes, dtypes, steps and devices of every equation on images, process.py's included.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from hf_ddpm.parametrization import PREDICTION_TYPES, from_x0_eps, output_scale, to_eps, to_score, to_x0
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.variances import learned_range_log_variance
from tests.oracles import betas_by_definition, chain, law, near, random_betas, spaced

LINEAR = chain("linear")
BETAS = np.linspace(1e-4, 0.02, 1000)
ABAR = np.cumprod(1 - BETAS)
ENDS = [0, 1, 500, 998, 999]
SET = torch.tensor([-1, 0, 0.5], dtype=torch.float64)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pixel(value):
    return torch.full((1, 1, 1, 1), value, dtype=torch.float64)


def test_names():
    assert PREDICTION_TYPES == ("epsilon", "sample", "v_prediction", "mean", "score")


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2", "constant"])
def test_round_trip_at_both_ends(kind, name):
    process = chain(name)
    for t in (0, 1, len(process) // 2, len(process) - 2, len(process) - 1):
        x_0, eps = draw(2, 3, 4, 5), draw(2, 3, 4, 5, seed=1)
        x_t = process.q_sample(x_0, eps, t)
        output = from_x0_eps(process, kind, x_0, eps, t)
        # The largest factors are 2.03e4 (cosine, 1/√ᾱ) and its square (`mean`, 1/c0).
        assert_allclose(
            to_x0(process, kind, output, x_t, t), x_0, rtol=0, atol=3e-7 if kind == "mean" else 1e-10
        )
        assert_allclose(to_eps(process, kind, output, x_t, t), eps, rtol=0, atol=1e-11)


def test_mean_keeps_its_digits_where_a_step_adds_almost_nothing():
    """c0 = √ᾱ_prev β/(1 − ᾱ) is 1.4e-12 beside c_t a = 0.7: their difference would keep four digits."""
    process, m, x = DiffusionProcess.from_betas([0.5, 1e-12]), draw(1, 1, 2, 2), draw(1, 1, 2, 2, seed=1)
    beta, abar = 1e-12, 0.5 * (1 - 1e-12)
    assert_allclose(output_scale(process, "mean", 1, x), 0.5 * beta**2 / (1 - abar) ** 2, rtol=1e-13)
    expected = math.sqrt(1 - abar) / beta * (x - math.sqrt(1 - beta) * m)
    assert_allclose(to_eps(process, "mean", m, x, 1), expected, rtol=1e-11)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_noise_is_finite_in_float32_late_in_a_long_chain(kind):
    """√ᾱ is 1e-48 at the end of `constant` with T = 1000, which float32 can't hold."""
    process = DiffusionProcess.from_betas([0.2] * 1000)
    m, x = draw(2, 1, 2, 2), draw(2, 1, 2, 2, seed=1)
    last = torch.tensor([999, 999])
    found = to_eps(process, kind, m.float(), x.float(), last)
    assert_allclose(found, to_eps(process, kind, m, x, 999), rtol=1e-5, atol=1e-6)


@law
@given(st.data(), random_betas(terminal=False, high=0.5), st.sampled_from(PREDICTION_TYPES))
def test_round_trip_on_any_chain(data, betas, kind):
    process = DiffusionProcess.from_betas(betas)
    t = torch.tensor(data.draw(st.lists(st.integers(0, len(betas) - 1), min_size=2, max_size=2)))
    x_0, eps = draw(2, 2, 1, 3), draw(2, 2, 1, 3, seed=1)
    x_t = process.q_sample(x_0, eps, t)
    output = from_x0_eps(process, kind, x_0, eps, t)
    assert_allclose(to_x0(process, kind, output, x_t, t), x_0, rtol=0, atol=1e-6 if kind == "mean" else 1e-10)
    assert_allclose(to_eps(process, kind, output, x_t, t), eps, rtol=0, atol=1e-9)


@law
@given(st.data(), random_betas(terminal=False, high=0.5))
def test_any_output_gives_a_pair_that_makes_x_t(data, betas):
    # x_t = √ᾱ x̂_0 + √(1 − ᾱ) ε̂ whatever the network says.
    process = DiffusionProcess.from_betas(betas)
    t = data.draw(st.integers(0, len(betas) - 1))
    x_t, output = draw(1, 2, 2, 2), draw(1, 2, 2, 2, seed=1)
    for kind in PREDICTION_TYPES:
        x_0, eps = (f(process, kind, output, x_t, t) for f in (to_x0, to_eps))
        scale = 1 + x_0.abs().max().item() + eps.abs().max().item()
        assert_allclose(process.q_sample(x_0, eps, t), x_t, rtol=0, atol=1e-13 * scale)


def test_values_of_section_8():
    x_0, eps = pixel(0.25), pixel(-1.5)
    expected = {
        "epsilon": -1.5,
        "sample": 0.25,
        "mean": -1.361895229377,
        "score": 1.561988791949,
        "v_prediction": -0.658459332332,
    }
    for kind, value in expected.items():
        output = from_x0_eps(LINEAR, kind, x_0, eps, 500)
        assert output.item() == pytest.approx(value, abs=1e-12)
        score = to_score(LINEAR, kind, output, pixel(-1.370741152685), 500)
        assert score.item() == pytest.approx(expected["score"], abs=1e-9)  # `mean` divides by β = 0.01


@pytest.mark.parametrize("t", ENDS)
def test_posterior_mean_of_each(t):
    # docs/maths.md 3, the second table: the reverse mean written in each output.
    x_t, m, beta, abar = draw(1, 3, 2, 2), draw(1, 3, 2, 2, seed=1), BETAS[t], ABAR[t]
    prev = ABAR[t - 1] if t else 1.0
    alpha, s2 = 1 - beta, 1 - abar
    c0, ct = np.sqrt(prev) * beta / s2, np.sqrt(alpha) * (1 - prev) / s2
    expected = {
        "epsilon": (x_t - beta / np.sqrt(s2) * m) / np.sqrt(alpha),
        "sample": c0 * m + ct * x_t,
        "v_prediction": c0 * (np.sqrt(abar) * x_t - np.sqrt(s2) * m) + ct * x_t,
        "mean": m,
        "score": (x_t + beta * m) / np.sqrt(alpha),
    }
    for kind, mean in expected.items():
        x_0 = to_x0(LINEAR, kind, m, x_t, t)
        assert_allclose(LINEAR.q_posterior_mean(x_0, x_t, t), mean, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("t", ENDS)
def test_mean_squared_error_in_units_of_x0(t):
    # Two outputs that mean x̂_0 apart by 1 at the same x_t.
    abar, beta = ABAR[t], BETAS[t]
    snr = abar / (1 - abar)
    expected = {
        "epsilon": snr,
        "sample": 1,
        "v_prediction": snr + 1,
        "mean": beta**2 / ((1 - beta) * (1 - abar)) * snr,
        "score": abar / (1 - abar) ** 2,
    }
    x_t, x_0 = pixel(0.7), pixel(0.1)
    for kind, square in expected.items():
        a, b = (from_x0_eps(LINEAR, kind, x, LINEAR.predict_eps(x_t, x, t), t) for x in (x_0, x_0 + 1))
        assert (b - a).item() ** 2 == near(square, rel=1e-9)
        assert output_scale(LINEAR, kind, t, x_0) == near(square, rel=1e-9)
        assert output_scale(LINEAR, kind, torch.tensor([t]), x_0).item() == near(square, rel=1e-9)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_a_respaced_chain_reads_what_the_full_one_taught(kind):
    # A network learns its output on the full chain; a shorter one must read the same x̂_0 from it.
    kept = spaced("linear", 50)
    for process in (kept, kept.respaced(kept.timesteps[::7])):
        for index, step in enumerate(process.timesteps.tolist()):
            x_t, output = draw(2, 1, 2, 2), draw(2, 1, 2, 2, seed=1)
            for t, s in ((index, step), (torch.tensor([index] * 2), torch.tensor([step] * 2))):
                assert_allclose(
                    to_x0(process, kind, output, x_t, t), to_x0(LINEAR, kind, output, x_t, s), rtol=1e-12
                )
                assert_allclose(
                    to_eps(process, kind, output, x_t, t), to_eps(LINEAR, kind, output, x_t, s), rtol=1e-12
                )
                assert_allclose(
                    from_x0_eps(process, kind, x_t, output, t), from_x0_eps(LINEAR, kind, x_t, output, s)
                )
                scales = (output_scale(p, kind, i, x_t) for p, i in ((process, t), (LINEAR, s)))
                assert_allclose(*scales, rtol=1e-12)


@pytest.mark.parametrize(
    ("f", "kind", "t", "factor"),
    [
        (to_x0, "epsilon", 999, 157.407),  # √(1/ᾱ − 1)
        (to_x0, "mean", 999, 7791.1),  # 1/c0
        (to_eps, "sample", 0, 99.995),  # √SNR
        (to_eps, "mean", 0, 99.995),  # √(α(1 − ᾱ))/β
        (to_eps, "mean", 999, 49.50),
        (to_x0, "mean", 0, 1),
    ],
)
def test_dangerous_ends(f, kind, t, factor):
    grown = f(LINEAR, kind, pixel(1.0), pixel(0.0), t) - f(LINEAR, kind, pixel(0.0), pixel(0.0), t)
    assert abs(grown.item()) == near(factor, rel=6e-6 if factor > 50 else 1e-4)


def test_dangerous_ends_of_cosine_and_score():
    grown = to_x0(chain("squaredcos_cap_v2"), "epsilon", pixel(1.0), pixel(0.0), 999)
    assert abs(grown.item()) == near(2.03e4, rel=2e-3)
    assert from_x0_eps(LINEAR, "score", pixel(0.0), pixel(-1.0), 0).item() == near(100, rel=1e-9)
    x_0, eps = draw(1, 1, 2, 2), draw(1, 1, 2, 2, seed=1)
    assert torch.equal(from_x0_eps(LINEAR, "mean", x_0, eps, 0), x_0)


# Tweedie: the marginal score of known data against the posterior mean by Bayes' rule


def exact_denoiser(points, x, t):
    """(E[x_0 | x_t = x], ∇ log q(x)) of the uniform distribution on `points`; the score by autograd."""
    x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    log_joint = -0.5 * (x - np.sqrt(ABAR[t]) * points) ** 2 / (1 - ABAR[t])
    score = torch.autograd.grad(log_joint.logsumexp(0), x)[0]
    return (log_joint.detach().softmax(0) * points).sum(), score


@pytest.mark.parametrize(
    ("t", "x_0", "eps"),
    [
        (100, 0.285034753635, 0.093642398614),
        (500, -0.122921564409, 0.348099976968),
        (999, -0.165921162758, 0.301060142163),
    ],
)
def test_tweedie_on_a_finite_set(t, x_0, eps):
    mean, score = exact_denoiser(SET, 0.3, t)
    assert mean.item() == pytest.approx(x_0, abs=1e-11)
    assert LINEAR.predict_eps(pixel(0.3), mean, t).item() == pytest.approx(eps, abs=1e-12)
    assert to_x0(LINEAR, "score", score, pixel(0.3), t).item() == pytest.approx(x_0, abs=1e-11)
    assert to_eps(LINEAR, "score", score, pixel(0.3), t).item() == pytest.approx(eps, abs=1e-12)


@pytest.mark.parametrize("t", ENDS)
def test_tweedie_on_gaussian_data_and_two_points(t):
    # N(0, 1): q(x_t) = N(0, 1), so the score is −x_t and E[x_0 | x_t] = √ᾱ x_t.
    x_t = draw(1, 2, 3, 1)
    assert_allclose(to_x0(LINEAR, "score", -x_t, x_t, t), np.sqrt(ABAR[t]) * x_t, rtol=1e-9)
    # ±1: x̂_0 = tanh(√ᾱ x_t/(1 − ᾱ)).
    score = exact_denoiser(torch.tensor([-1.0, 1.0]).double(), 0.2, t)[1]
    expected = np.tanh(np.sqrt(ABAR[t]) * 0.2 / (1 - ABAR[t]))
    assert to_x0(LINEAR, "score", score, pixel(0.2), t).item() == near(expected, rel=1e-9)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2", "constant"])
def test_score_of_gaussian_data(kind, name):
    # x_0 ~ N(μ, v): q(x_t) = N(√ᾱ μ, ᾱ v + 1 − ᾱ), and E[x_0 | x_t] by the product of two Gaussians in x_0.
    process, mean, variance, x_t = chain(name), 0.3, 0.0625, draw(2, 1, 3, 4)
    abar = np.cumprod(1 - betas_by_definition(name))
    for t in (0, 1, len(process) // 2, len(process) - 2, len(process) - 1):
        score = -(x_t - np.sqrt(abar[t]) * mean) / (abar[t] * variance + 1 - abar[t])
        precision = 1 / variance + abar[t] / (1 - abar[t])
        x_0 = (mean / variance + np.sqrt(abar[t]) / (1 - abar[t]) * x_t) / precision
        eps = (x_t - np.sqrt(abar[t]) * x_0) / np.sqrt(1 - abar[t])
        output = from_x0_eps(process, kind, x_0, eps, t)
        # 1 − ᾱ of the oracle has lost 4 digits at t = 0, and the score multiplies them by 100.
        assert_allclose(to_score(process, kind, output, x_t, t), score, rtol=1e-7, atol=1e-8)
        assert_allclose(to_x0(process, "score", score, x_t, t), x_0, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_score_is_the_same_on_a_respaced_chain(kind):
    full, short = LINEAR, spaced("linear", 10)
    x_t, output = draw(1, 2, 2, 2), draw(1, 2, 2, 2, seed=1)
    for t in (0, 4, 9):
        expected = to_score(full, kind, output, x_t, int(short.timesteps[t]))
        assert_allclose(to_score(short, kind, output, x_t, t), expected, rtol=1e-9)


# Borders


def test_zero_terminal_snr():
    process = DiffusionProcess.from_betas(np.array([0.1, 0.5, 1.0]))
    x_0, eps = draw(2, 1, 2, 2), draw(2, 1, 2, 2, seed=1)
    for kind in ("epsilon", "score"):
        for t in (2, torch.tensor([0, 2])):
            with pytest.raises(
                ValueError, match=r"alphas_cumprod is 0 at step 2.*'sample', 'v_prediction', 'mean'"
            ):
                to_x0(process, kind, eps, eps, t)
        assert to_x0(process, kind, eps, eps, 1).isfinite().all()
    # ᾱ = 0: x_t = ε and v = −x_0; `mean` is √ᾱ_prev x_0.
    v = from_x0_eps(process, "v_prediction", x_0, eps, 2)
    assert torch.equal(v, -x_0)
    for kind in ("v_prediction", "sample", "mean"):
        output = from_x0_eps(process, kind, x_0, eps, 2)
        assert_allclose(to_x0(process, kind, output, eps, 2), x_0, rtol=1e-14)
    for kind in PREDICTION_TYPES:
        assert_allclose(
            to_eps(process, kind, from_x0_eps(process, kind, x_0, eps, 2), eps, 2), eps, rtol=1e-14
        )
        # q(x_t) = N(0, I), whose score is −x_t; three of the five know it without the network.
        output = from_x0_eps(process, kind, x_0, eps, 2)
        assert_allclose(to_score(process, kind, output, eps, 2), -eps, rtol=1e-14)
    for kind in ("sample", "v_prediction", "mean"):
        assert_allclose(to_score(process, kind, draw(2, 1, 2, 2, seed=5), eps, 2), -eps, rtol=1e-14)


# Learned variance (Nichol & Dhariwal 2021, eq. 15)


@pytest.mark.parametrize(
    "process", [LINEAR, spaced("linear", 10), chain("constant")], ids=["1000", "10", "0.2"]
)
def test_learned_range_is_geometric_between_the_two_sigmas(process):
    betas = process.betas.numpy()
    variance = process.posterior_variance.clone().numpy()
    variance[0] = variance[1]
    for t in (0, 1, len(process) - 1):
        at = {v: learned_range_log_variance(process, pixel(float(v)), t).exp().item() for v in (-1, 0, 1, 3)}
        assert at[-1] == near(variance[t], rel=1e-12)
        assert at[1] == near(betas[t], rel=1e-12)  # β_0 at t = 0 too
        assert at[0] == near(np.sqrt(variance[t] * betas[t]), rel=1e-12)
        assert at[3] == near(betas[t] ** 2 / variance[t], rel=1e-12)  # v is not bounded


def test_learned_range_is_float32_or_wider():
    v = draw(2, 3, 4, 4)
    t = torch.tensor([0, 999])
    assert learned_range_log_variance(LINEAR, v, t).dtype == torch.float64
    half = learned_range_log_variance(LINEAR, v.half(), t)
    assert half.dtype == torch.float32
    assert torch.equal(half, learned_range_log_variance(LINEAR, v.half().float(), t))
    with pytest.raises(ValueError, match="T >= 2"):
        learned_range_log_variance(DiffusionProcess.from_betas(np.array([0.1])), v, 0)


# Every equation on images: shapes, dtypes, steps, devices

CHAIN_EQUATIONS = ("q_sample", "predict_x0", "predict_eps", "q_posterior_mean")
EQUATIONS = {  # name -> f(process, images, images, t)
    **{name: getattr(DiffusionProcess, name) for name in CHAIN_EQUATIONS},
    **{
        f"{f.__name__}-{kind}": lambda process, x, y, t, f=f, kind=kind: f(process, kind, x, y, t)
        for f in (to_x0, to_eps, to_score, from_x0_eps)
        for kind in PREDICTION_TYPES
    },
}
each_equation = pytest.mark.parametrize("f", EQUATIONS.values(), ids=EQUATIONS)


@each_equation
@pytest.mark.parametrize("shape", [(3, 8, 4), (1, 1, 1), (2, 3, 4, 5), (7,), ()], ids=str)
def test_shapes_of_images_and_steps(f, shape):
    x, y = draw(2, *shape), draw(2, *shape, seed=1)
    alone = [f(LINEAR, x[i : i + 1], y[i : i + 1], t) for i, t in enumerate((3, 700))]
    assert_allclose(f(LINEAR, x, y, torch.tensor([3, 700])), torch.cat(alone), rtol=1e-14)
    for t in (torch.tensor(3), torch.tensor([3]), torch.tensor([3, 3], dtype=torch.int32), 3):
        got = f(LINEAR, x, y, t)
        assert got.shape == x.shape
        assert_allclose(got[:1], alone[0], rtol=1e-14)


@each_equation
@pytest.mark.parametrize("t", [torch.tensor([0, 999]), 500], ids=str)
def test_half_precision_is_computed_in_float32_and_cast_once(f, t):
    x, y = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    exact = f(LINEAR, x, y, t)
    single = f(LINEAR, x.float(), y.float(), t)
    assert (exact.dtype, single.dtype) == (torch.float64, torch.float32)
    # In float64 from the float32 images, so that only the arithmetic differs, not the input.
    reference = f(LINEAR, x.float().double(), y.float().double(), t)
    assert_allclose(single, reference, rtol=2e-6, atol=3e-7 * reference.abs().max().item())
    for half in (torch.float16, torch.bfloat16):
        x_half, y_half = x.to(half), y.to(half)
        got = f(LINEAR, x_half, y_half, t)
        assert got.dtype == half
        assert torch.equal(got, f(LINEAR, x_half.float(), y_half.float(), t).to(half))


def test_dtype_follows_the_images_not_the_noise():
    x, y = draw(2, 3, 4, 4).half(), draw(2, 3, 4, 4)
    assert LINEAR.q_sample(x, y, 5).dtype == torch.float16
    assert LINEAR.q_posterior_mean(y, x, 5).dtype == torch.float16
    assert to_x0(LINEAR, "v_prediction", y, x, 5).dtype == torch.float16
    assert from_x0_eps(LINEAR, "v_prediction", x, y, 5).dtype == torch.float16


@pytest.mark.parametrize(("kind", "sign"), [("epsilon", -1), ("score", 1), ("mean", 1)])
def test_float16_saturates_where_an_early_prediction_overflows(kind, sign):
    x, output = torch.zeros(1, 1, 1, 2), torch.tensor([1000.0, -1000.0]).view(1, 1, 1, 2)
    got = to_x0(LINEAR, kind, output.half(), x.half(), 999)
    assert got.flatten().tolist() == [sign * 65504, -sign * 65504]
    assert to_x0(LINEAR, kind, output.bfloat16(), x.bfloat16(), 999).abs().min() > 1.5e5


@pytest.mark.parametrize("f", EQUATIONS.values(), ids=EQUATIONS)
@pytest.mark.parametrize(
    "t", [-1, 1000, 1.0, None, *map(torch.tensor, [[0, 1000], [-1, 0], 1000, [0.0, 1.0]])], ids=str
)
def test_steps_outside_the_chain_are_refused(f, t):
    with pytest.raises(ValueError, match=r"step t = .* not in the chain.*0\.\.999"):
        f(LINEAR, draw(2, 1, 2, 2), draw(2, 1, 2, 2), t)


def test_only_the_first_wrong_step_of_a_batch_is_named():
    t = torch.arange(1002).repeat(4)
    with pytest.raises(ValueError, match=r"^step t = 1000 is not in the chain; allowed: .* 0\.\.999$"):
        LINEAR.timesteps_at(t)
    with pytest.raises(ValueError, match=r"^step t = 0\.5 is not"):
        LINEAR.timesteps_at(t + 0.5)


@pytest.mark.parametrize("f", [to_x0, to_eps, to_score, from_x0_eps])
def test_unknown_prediction_type_is_refused(f):
    with pytest.raises(ValueError, match=r"'eps'; allowed: epsilon, sample, v_prediction, mean, score"):
        f(LINEAR, "eps", pixel(0.0), pixel(0.0), 0)


@each_equation
@pytest.mark.parametrize("betas", [[0.1, 0.5, 0.9], [0.1, 0.5, 1.0]], ids=["linear", "zero-snr"])
def test_nothing_is_read_back_from_a_device(f, betas):
    # A meta tensor raises wherever its values are asked for, so this passes only if the host never waits.
    process = DiffusionProcess.from_betas(np.array(betas))
    x = torch.empty(2, 3, 4, 5, device="meta", dtype=torch.float16)
    steps = [torch.empty(shape, device="meta", dtype=torch.int64) for shape in ((2,), ())]
    for t in (*steps, 1, torch.tensor([0, 1])):
        got = f(process, x, x, t)
        assert (got.device.type, got.shape, got.dtype) == ("meta", x.shape, torch.float16)
    assert process.timesteps_at(steps[0]).shape == process.index_of(steps[0]).shape == (2,)
