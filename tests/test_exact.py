"""exact.py, docs/maths.md 5.1: closed forms, limits, what sampling with it returns, the price of p."""

import functools
import math

import numpy as np
import pytest
import torch

from hf_ddpm.data.pixels import to_float, to_uint8
from hf_ddpm.data.stream import load_stream
from hf_ddpm.exact import ExactDenoiser
from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.likelihood import estimate_bound, evaluate_bound
from hf_ddpm.likelihood.bound import bound_term, prior_kl
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.scheduler import DDPMScheduler
from tests.bound_oracles import LN2, answers, draw, trapezoid
from tests.oracles import chain, spaced, spaced_steps

SE = 5  # standard errors


def points(*values):
    """Images of one pixel, float64."""
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


def steps(t, count=1):
    return torch.full((count,), t)


def two(process):
    return ExactDenoiser(process, points(-1, 1))


@functools.lru_cache
def digits(count):
    return to_float(torch.stack(list(load_stream("digits", "train").select(range(count)))))


# (a) Values


@pytest.mark.parametrize("chunk_size", [1, 2, 100])
@pytest.mark.parametrize(
    ("t", "x_0", "eps"),
    [
        (100, 0.285034753635, 0.093642398614),
        (500, -0.122921564409, 0.348099976968),
        (999, -0.165921162758, 0.301060142163),
    ],
)
def test_three_points(t, x_0, eps, chunk_size):
    process = chain("linear")
    answer = ExactDenoiser(process, points(-1, 0, 0.5), chunk_size=chunk_size)(points(0.3), steps(t))
    assert answer.item() == pytest.approx(x_0, abs=1e-12)
    assert process.predict_eps(points(0.3), answer, t).item() == pytest.approx(eps, abs=1e-12)


@pytest.mark.parametrize("t", [0, 1, 10, 100, 500, 999])
def test_two_points_are_a_tanh(t):
    process, x = chain("linear"), torch.linspace(-2, 2, 81, dtype=torch.float64).view(-1, 1, 1, 1)
    abar = process.alphas_cumprod[t]
    expected = torch.tanh(abar.sqrt() * x / (1 - abar))
    torch.testing.assert_close(two(process)(x, steps(t, 81)), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("t", [0, 3, 200, 999])
def test_by_the_definition(t):
    """Bayes' rule in numpy, from the squared distances, for images of several pixels with weights."""
    process, generator = chain("linear"), np.random.default_rng(0)
    images, pi = generator.uniform(-1, 1, (7, 2, 3, 4)), np.arange(1, 8.0)
    abar = float(process.alphas_cumprod[t])
    x = np.sqrt(abar) * images[[2, 5]] + np.sqrt(1 - abar) * generator.normal(size=(2, 2, 3, 4))
    distance = ((x[:, None] - np.sqrt(abar) * images) ** 2).sum((2, 3, 4))
    log_w = np.log(pi) - distance / (2 * (1 - abar))
    w = np.exp(log_w - log_w.max(1, keepdims=True))
    w /= w.sum(1, keepdims=True)
    for chunk_size in (1, 3, 7, 4096):
        exact = ExactDenoiser(process, torch.tensor(images), torch.tensor(pi), chunk_size)
        np.testing.assert_allclose(exact.weights(torch.tensor(x), steps(t, 2)), w, rtol=1e-6, atol=1e-12)
        answer = exact(torch.tensor(x), steps(t, 2))
        np.testing.assert_allclose(answer, np.einsum("bi,ichw->bchw", w, images), rtol=1e-6, atol=1e-9)


def test_steps_may_differ_within_a_batch():
    exact, x = ExactDenoiser(chain("linear"), digits(5)), draw(3, 1, 8, 8).float()
    together = exact(x, torch.tensor([0, 500, 999]))
    for i, t in enumerate((0, 500, 999)):
        torch.testing.assert_close(exact(x[i : i + 1], torch.tensor(t))[0], together[i])
    assert together.dtype == torch.float32 and exact(x.half(), steps(5, 3)).dtype == torch.float16


# (c) Both ends of the schedule


def test_pure_noise_says_nothing():
    process = DiffusionProcess.from_betas([0.1, 0.5, 1.0])  # zero terminal SNR
    pi = torch.tensor([1.0, 2.0, 5.0])
    exact, x = ExactDenoiser(process, points(-1, 0, 0.5), pi), points(-3, 40)
    torch.testing.assert_close(exact.weights(x, steps(2, 2)), (pi / 8).double().expand(2, 3))
    torch.testing.assert_close(exact(x, steps(2, 2)), points(1.5 / 8, 1.5 / 8))
    # And nearly nothing where ᾱ is nearly 0: the mean up to √ᾱ
    near = DiffusionProcess.from_betas([0.5, 1 - 1e-12])
    assert ExactDenoiser(near, points(-1, 0, 0.5), pi)(points(1), steps(1)).item() == pytest.approx(
        1.5 / 8, abs=1e-5
    )


def test_no_noise_says_all():
    process = DiffusionProcess.from_betas([1e-9, 0.5])
    images = digits(50)
    exact = ExactDenoiser(process, images, chunk_size=7)
    x_t = process.q_sample(images, draw(50, 1, 8, 8).float(), 0)
    assert torch.equal(exact(x_t, steps(0, 50)), images)
    far = torch.full((1, 1, 8, 8), 1e4)  # nothing overflows far from every image
    assert exact(far, steps(0)).isfinite().all() and exact.weights(far, steps(0)).sum() == 1


# (b) Sampling with it returns the images


@pytest.mark.parametrize("weights", [None, (1, 2, 5)], ids=str)
def test_samples_are_the_images_as_often_as_they_should_be(weights):
    scheduler = DDPMScheduler(1000, prediction_type="sample", variance_type="fixed_small")
    pi = torch.ones(3) if weights is None else torch.tensor(weights)
    images, count = points(-1, 0, 0.5), 2000
    pipeline = DDPMPipeline(ExactDenoiser(scheduler.process, images, pi), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        count, torch.Generator().manual_seed(0), output_type="pt", return_dict=False, image_shape=(1, 1, 1)
    )[0]
    distance = (2 * drawn - 1 - images.view(1, -1).view(1, 3, 1, 1)).abs().view(count, 3)
    assert distance.amin(1).max() < 1e-6
    p = (pi / pi.sum()).numpy()
    share = np.bincount(distance.argmin(1), minlength=3) / count
    assert (np.abs(share - p) < SE * np.sqrt(p * (1 - p) / count)).all()


@pytest.mark.parametrize("num_steps", [1000, 50])
def test_resampling_digits(num_steps):
    scheduler = DDPMScheduler(1000, prediction_type="sample")
    images = digits(20)
    pipeline = DDPMPipeline(ExactDenoiser(scheduler.process, images), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    options = {"output_type": "pt", "return_dict": False, "image_shape": (1, 8, 8)}
    drawn = pipeline(40, torch.Generator().manual_seed(0), num_steps, **options)[0]
    same = (to_uint8(2 * drawn - 1)[:, None] == to_uint8(images)).flatten(2).all(2)
    assert (same.sum(1) == 1).all() and same.any(0).sum() > 10


# (d) The mixture kernel, and the Gaussian one


def flat(x):
    return x.view(-1, 1, 1, 1)


def test_the_mixture_kernel_is_right_where_the_gaussian_is_not():
    """β = 0.2, T = 50, ±1, both chains by quadrature from N(0, I) on."""
    process = chain("constant")
    exact = two(process)
    x = torch.linspace(-6, 6, 481, dtype=torch.float64)
    dx = float(x[1] - x[0])

    def normal(mean, variance):
        return torch.exp(-0.5 * (x - mean) ** 2 / variance) / math.sqrt(2 * math.pi * variance)

    gaussian = mixture = normal(0, 1)
    for t in range(49, 0, -1):
        variance = process.posterior_variance[t].item()
        x_hat, w = exact(flat(x), steps(t, len(x))), exact.weights(flat(x), steps(t, len(x)))
        mean = process.q_posterior_mean(x_hat, flat(x), t).view(-1, 1)
        gaussian = (gaussian[:, None] * normal(mean, variance)).sum(0) * dx
        ends = (process.q_posterior_mean(flat(x) * 0 + end, flat(x), t).view(-1, 1) for end in (-1, 1))
        kernel = sum(w[:, i, None] * normal(mean, variance) for i, mean in enumerate(ends))
        mixture = (mixture[:, None] * kernel).sum(0) * dx
    a, s2 = process.sqrt_alphas_cumprod[0].item(), process.one_minus_alphas_cumprod[0].item()
    q = (normal(-a, s2) + normal(a, s2)) / 2

    def undecided(density):  # the probability of |x̂_0| = |tanh(√ᾱ x / (1 − ᾱ))| < 0.9
        edge = math.atanh(0.9) * s2 / a
        below = np.interp((-edge, edge), x[1:], torch.cumulative_trapezoid(density, x))
        return below[1] - below[0]

    assert 0.5 * (gaussian - q).abs().sum() * dx == pytest.approx(0.100, abs=5e-4)
    assert undecided(gaussian) == pytest.approx(0.1775, abs=5e-4)
    assert undecided(q) == pytest.approx(0.0998, abs=5e-4)
    # It starts from N(0, 1) and not from q(x_T): the total variation can only fall from there
    assert 0.5 * (mixture - q).abs().sum() * dx < 1e-3


def test_step_draws_from_the_mixture():
    process, count = chain("constant"), 40_000
    exact, generator = two(process), torch.Generator().manual_seed(0)
    x_0 = flat(torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0).double())
    x = process.q_sample(x_0, draw(count, 1, 1, 1), 49)
    for t in range(49, 0, -1):
        x = exact.step(x, steps(t, count), generator)
        if t - 1 in (0, 3, 10):
            a, s = process.sqrt_alphas_cumprod[t - 1], process.one_minus_alphas_cumprod[t - 1].sqrt()
            for low, high in ((-0.5, 0.5), (0.5, 1), (-9, -1)):
                edges = [[(edge - sign * a) / s for edge in (low, high)] for sign in (-1, 1)]
                cdf = torch.special.ndtr(torch.tensor(edges, dtype=torch.float64))
                p = float((cdf[:, 1] - cdf[:, 0]).mean())
                found = float(((x > low) & (x < high)).double().mean())
                assert abs(found - p) < SE * math.sqrt(p * (1 - p) / count)
    # The Gaussian chain would not pass: its x_{t=0} is too often between the two
    assert 0.1775 - 0.0998 > 10 * SE * math.sqrt(0.1 * 0.9 / count)
    last = exact.step(x, steps(0, count), generator)
    assert set(last.flatten().tolist()) == {-1.0, 1.0}
    plus = float((last > 0).double().mean())
    assert abs(plus - 0.5) < SE * math.sqrt(0.25 / count)


def test_draws_are_as_often_as_their_weights():
    process, count = chain("linear"), 20_000
    exact = ExactDenoiser(process, points(-1, 0, 0.5, 0.6), torch.tensor([1, 2, 3, 4]), chunk_size=3)
    x, t = points(0.3).expand(count, 1, 1, 1), steps(400, count)
    p = exact.weights(x[:1], t[:1])[0].numpy()
    found = np.bincount(exact.draw(x, t, torch.Generator().manual_seed(0)), minlength=4) / count
    assert (np.abs(found - p) < SE * np.sqrt(p * (1 - p) / count)).all() and (p > 0.05).all()


def test_step_on_a_respaced_chain():
    """x_prev is at the step before in that chain: from its last step to its first marginal in one go."""
    process, count = spaced("linear", 10), 40_000
    exact, generator = two(process), torch.Generator().manual_seed(0)
    x = process.q_sample(points(-1, 1).repeat(count // 2, 1, 1, 1), draw(count, 1, 1, 1), 9)
    for t in spaced_steps(10)[:1:-1]:
        x = exact.step(x, steps(int(t), count), generator)
    square, s2 = x.square().mean(), process.one_minus_alphas_cumprod[1]
    a2 = process.alphas_cumprod[1]
    spread = math.sqrt(2 * s2**2 + 4 * a2 * s2)  # of x², given x_0
    assert abs(float(square - a2 - s2)) < SE * spread / math.sqrt(count)
    with pytest.raises(ValueError, match="timestep 1 is not in the chain"):
        exact(points(0), steps(1))


# An oracle of the bound


@pytest.mark.parametrize(
    ("name", "small", "large", "optimal"),
    [
        ("linear", 1.006840855, 1.487182879, 1.004938123),
        ("squaredcos_cap_v2", 1.003742087, 1.432728136, 1.002612902),
        ("constant", 1.276588385, 1.134494788, 1.128943729),
    ],
)
def test_the_price_of_a_gaussian_kernel(name, small, large, optimal):
    """One pixel ±1, entropy 1 bit: L_T + Σ L_t + H(x_0 | x_{t=0}) by quadrature over the noise."""
    process = chain(name)
    exact, (z, weight) = two(process), trapezoid(641)
    x_0 = torch.ones(len(process) * len(z), 1, 1, 1, dtype=torch.float64)  # −1 by symmetry
    t = torch.arange(len(process)).repeat_interleave(len(z))
    noise = flat(z.repeat(len(process)))

    def sum_of(variance):
        options = {"variance_type": variance, "prediction_type": "sample"}
        term = bound_term(process, exact, x_0, t, noise, **options)
        return term.nats.view(-1, len(z)) @ weight, term.x0_mse.view(-1, len(z)) @ weight

    _, mse = sum_of("fixed_small")
    log_optimal = (process.posterior_variance + process.posterior_mean_coef_x0**2 * mse).log()
    x = process.q_sample(x_0[: len(z)], flat(z), 0)
    p = exact.weights(x, steps(0, len(z))).clamp(min=1e-300)
    entropy = float(-(p * p.log()).sum(1) @ weight)
    prior = float(prior_kl(process, x_0[:1]))
    for variance, expected in (("fixed_small", small), ("fixed_large", large), (log_optimal, optimal)):
        total = (prior + float(sum_of(variance)[0][1:].sum()) + entropy) / LN2
        assert total == pytest.approx(expected, abs=2e-9)


@pytest.mark.parametrize("spacing", [None, 25], ids=str)
def test_the_bound_is_above_the_entropy(spacing):
    """I3: log2(M) / D bits/dim for M equally likely images, and a network that knows them is near it."""
    process, images = chain("linear"), digits(4)[..., ::4, ::4].contiguous()  # 4 pixels
    exact = ExactDenoiser(process, images)
    scored = process if spacing is None else process.respaced(spaced_steps(spacing))
    options = {"variance_type": "fixed_small", "prediction_type": "sample"}
    batch = images.repeat(8, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    bound = evaluate_bound(scored, exact, batch, generator=generator, **options).total_bpd
    stderr = float(bound.std() / math.sqrt(len(bound)))
    assert float(bound.mean()) > math.log2(4) / 4 - SE * stderr
    estimate = estimate_bound(scored, exact, batch, num_evals_per_image=10, seed=0, **options).per_image_bpd
    both = math.hypot(stderr, float(estimate.std() / math.sqrt(len(estimate))))
    assert abs(float(estimate.mean() - bound.mean())) < SE * both
    # And far below that of the mean, the best constant answer
    constant = evaluate_bound(
        scored, answers(images.mean(0)), batch, generator=generator, **options
    ).total_bpd
    assert float(constant.mean()) > 2 * float(bound.mean())


# What is refused


def test_bad_arguments():
    process = chain("linear")
    for images in (torch.zeros(3, 8, 8), torch.zeros(0, 1, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"^images are torch\.\w+ of shape .*; allowed: floating point"):
            ExactDenoiser(process, images)
    for weights in ([1.0], [1.0, 0.0], [1.0, -1.0], [1.0, math.nan]):
        with pytest.raises(ValueError, match=r"^weights have shape .*; allowed: 2 positive numbers$"):
            ExactDenoiser(process, points(-1, 1), torch.tensor(weights))
    with pytest.raises(ValueError, match=r"^chunk_size is 0; allowed"):
        ExactDenoiser(process, points(-1, 1), chunk_size=0)
    with pytest.raises(ValueError, match=r"^x_t has shape \(1, 1, 1, 2\); allowed: \(B, 1, 1, 1\)$"):
        two(process)(torch.zeros(1, 1, 1, 2), steps(0))
