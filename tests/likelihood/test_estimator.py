"""estimator.py and what reads its results: unbiased, the right standard error, the same draws everywhere.

Where a network acts on each pixel alone, the expectation of every term over the noise is a sum of
one-dimensional integrals: the truth that estimates are held to has no Monte Carlo error.
"""

import math

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from hf_ddpm.likelihood import (
    default_proposal,
    estimate_bound,
    evaluate_bound,
    image_noise,
    mean_and_stderr,
    pilot_proposal,
    rate_distortion,
)
from hf_ddpm.likelihood.bound import bound_term
from hf_ddpm.models import create_model
from hf_ddpm.process import DiffusionProcess
from tests.bound_oracles import (
    CHAINS,
    LN2,
    answers,
    expected_bound,
    gaussian_denoiser,
    levels,
    pixelwise,
    toy_learned,
    toy_model,
    trapezoid,
)
from tests.oracles import chain, mse_of_gaussian, optimal_log_variance, step_kl
from tests.toy import mixture_denoiser, mixture_images

VARIANCES = ["fixed_small", "fixed_large", "learned_range"]
SHORT = DiffusionProcess.from_betas([0.1, 0.3, 0.2, 0.5, 0.4, 0.6])
FIELDS = ("image_indices", "prior_bpd", "decoder_bpd", "decoder_x0_mse", "t", "terms_bpd", "x0_mse")
IMAGES = levels(5, 1, 2, 2)
OPTIONS = {"variance_type": "fixed_large", "prediction_type": "sample"}


def family(count, seed=0):
    """Images of 3x3 pixels from one of three classes of levels, and the classes: a population to sample."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.tensor([[0, 3, 9, 30], [40, 120, 128, 200], [90, 250, 254, 255]]).double() / 127.5 - 1
    kind = torch.randint(3, (count,), generator=generator)
    pick = torch.randint(4, (count, 9), generator=generator)
    return classes[kind[:, None], pick].view(count, 1, 3, 3), classes


def rows(estimate, order):
    """An estimate's tensors with its images in another order."""
    return {field: getattr(estimate, field)[order] for field in FIELDS}


# Expectation and spread


@pytest.mark.parametrize("variance_type", VARIANCES)
@pytest.mark.parametrize("which", CHAINS)
def test_unbiased_for_each_image(which, variance_type):
    (name, process), x_0, repeats = CHAINS[which], levels(3, 1, 2, 2, seed=5), 200
    model = pixelwise(name, variance_type)
    options = {"variance_type": variance_type, "prediction_type": "sample"}
    truth, many = expected_bound(process, model, x_0, **options), x_0.repeat(repeats, 1, 1, 1)
    pilot = pilot_proposal(process, model, levels(8, 1, 2, 2, seed=6), num_steps=6, **options)
    for k, proposal in enumerate((None, torch.ones(len(process)), pilot)):
        for n_0 in (1, 3):
            counts = {"num_evals_per_image": n_0 + 5, "num_decoder_evals": n_0, "batch_size": 4096}
            estimate = estimate_bound(process, model, many, seed=k, proposal=proposal, **counts, **options)
            values = estimate.per_image_bpd.view(repeats, 3)
            assert ((values.mean(0) - truth).abs() < 5 * values.std(0) / math.sqrt(repeats)).all()


@pytest.mark.parametrize("clip_x0", [False, True])
def test_unbiased_for_each_image_that_is_cut(clip_x0):
    # x̂_0 = 1.5 x_t leaves [−1, 1] often; the decoder of the published code; a table of variances.
    x_0, table = levels(2, 3, 1, 1, seed=1), SHORT.log_variance("fixed_large") + 0.2
    options = {"variance_type": table, "prediction_type": "sample", "clip_x0": clip_x0, "decoder": "tanh"}
    truth = expected_bound(SHORT, lambda x_t, steps: 1.5 * x_t, x_0, **options)
    many = x_0.repeat(1000, 1, 1, 1)
    estimate = estimate_bound(SHORT, lambda x_t, steps: 1.5 * x_t, many, num_evals_per_image=3, **options)
    values = estimate.per_image_bpd.view(1000, 2)
    assert ((values.mean(0) - truth).abs() < 5 * values.std(0) / math.sqrt(1000)).all()


@pytest.mark.parametrize(
    ("count", "evals", "variance_type"), [(50, 8, "fixed_large"), (50, 3, "fixed_small")]
)
def test_the_95_percent_interval_covers(count, evals, variance_type):
    # Fresh images and fresh draws in each repetition; the truth is the population's, by quadrature.
    (name, process), repeats = CHAINS["full"], 300
    x_0, classes = family(count * repeats)
    model, options = gaussian_denoiser(name, 0.25), {**OPTIONS, "variance_type": variance_type}
    truth = expected_bound(process, model, classes.reshape(12, 1, 1, 1), **options).mean().item()
    counts = {"num_evals_per_image": evals, "batch_size": 8192}
    estimate = estimate_bound(process, model, x_0, **counts, **options)
    values = [mean_and_stderr(one) for one in estimate.per_image_bpd.view(repeats, count)]
    mean, stderr = np.array(values).T
    covered = (np.abs(mean - truth) < 1.96 * stderr).mean()
    assert 0.90 < covered < 0.99
    # The same without counting: the spread of the 300 means is what their standard errors say.
    assert mean.std(ddof=1) / np.sqrt((stderr**2).mean()) == pytest.approx(1, abs=5 / math.sqrt(2 * repeats))


def test_error_of_few_evaluations_is_near_that_of_all_steps():
    # docs/maths.md 4.1: 20 of 1000 evaluations cost no precision; the draws of 64 images blur that a little.
    process, model, x_0 = chain("linear"), mixture_denoiser(), mixture_images(64)
    noise = image_noise(0, range(64), x_0)
    full = mean_and_stderr(evaluate_bound(process, model, x_0, noise_fn=noise, **OPTIONS).total_bpd)
    few = estimate_bound(process, model, x_0, **OPTIONS)
    uniform = estimate_bound(process, model, x_0, proposal=torch.ones(1000), **OPTIONS)
    assert few.t.shape == (64, 17) and few.decoder_bpd.shape == (64, 3)
    assert few.stderr / full[1] == pytest.approx(1, abs=0.1)
    assert uniform.stderr > 2 * full[1]
    monte_carlo = 0.25 * math.sqrt(1 / 64 + 1 / 64)  # 0.24 bits/dim per image for either
    assert abs(few.bpd - full[0]) < 5 * monte_carlo


# Strata


@pytest.mark.parametrize(("evals", "n_0"), [(2, 1), (5, 2), (40, 1), (9, None), (16, None), (100, None)])
def test_one_step_in_each_of_n_equally_likely_parts(evals, n_0):
    process, x_0, asked = chain("constant"), levels(20, 1, 1, 1), []

    def model(x_t, steps):
        asked.append(steps)
        return 0.3 * x_t

    for proposal in (None, torch.ones(50), torch.linspace(1, 1e-3, 50) ** 4, torch.eye(50)[7] + 1e-9):
        asked.clear()
        counts = {"num_evals_per_image": evals, "num_decoder_evals": n_0, "batch_size": 20}
        estimate = estimate_bound(process, model, x_0, proposal=proposal, **counts, **OPTIONS)
        first = estimate.decoder_bpd.shape[1]
        n = evals - first
        assert first == (n_0 or max(1, round(evals / 6))) and estimate.t.shape == (20, n)
        assert torch.bincount(torch.cat(asked))[0] == 20 * first and len(torch.cat(asked)) == 20 * evals
        assert estimate.t.min() >= 1 and estimate.t.max() <= 49
        # t shares probability with the j-th part of [0, 1] where it is the j-th draw.
        cdf, t = np.concatenate([[0], np.cumsum(estimate.proposal.numpy())]), estimate.t.numpy()
        low, part = np.arange(n) / n, 1 / n
        assert (cdf[t] < low + part + 1e-12).all() and (cdf[t + 1] > low - 1e-12).all()


def test_steps_come_as_often_as_proposed():
    # 3000 images, 3 strata: counts are sums of independent indicators with Σ of probabilities = n p_t.
    p = torch.tensor([5, 3, 1, 1, 4, 0.5])
    x_0 = torch.full((3000, 1, 2, 2), 1 / 255).double()
    counts = {"num_evals_per_image": 4, "num_decoder_evals": 1, "batch_size": 3000}
    estimate = estimate_bound(SHORT, toy_model, x_0, proposal=p, **counts, **OPTIONS)
    assert_allclose(estimate.proposal, torch.cat([torch.zeros(1), p[1:] / 9.5]), rtol=1e-7)
    share = torch.bincount(estimate.t.flatten(), minlength=6) / 9000
    assert ((share - estimate.proposal).abs() <= 5 * (estimate.proposal / 9000).sqrt()).all()
    # Fresh noise for every draw: no two errors agree.
    errors = torch.cat([estimate.decoder_x0_mse, estimate.x0_mse], 1).flatten()
    assert len(errors.unique()) == 12000


@pytest.mark.parametrize(("steps", "evals"), [(2, 2), (2, 9), (1, 1), (1, 5)])
def test_shortest_chains(steps, evals):
    process, x_0 = DiffusionProcess.from_betas([0.3, 0.9][:steps]), levels(2, 1, 2, 2).repeat(300, 1, 1, 1)
    table = torch.tensor([-2.0, -1.0][:steps]).double()
    options = {"variance_type": table, "prediction_type": "sample"}
    truth = expected_bound(process, toy_model, x_0[:2], **options)
    kinds = (None, torch.ones(steps), pilot_proposal(process, toy_model, x_0[:2], **options))
    for proposal in kinds:
        counts = {"num_evals_per_image": evals, "proposal": proposal, "batch_size": 600}
        estimate = estimate_bound(process, toy_model, x_0, **counts, **options)
        assert estimate.decoder_bpd.shape[1] + estimate.t.shape[1] == evals
        assert (estimate.t == 1).all() and estimate.t.shape[1] >= steps - 1
        if steps == 1:
            assert torch.equal(estimate.per_image_rate_bpd, estimate.prior_bpd)
        values = estimate.per_image_bpd.view(300, 2)
        assert ((values.mean(0) - truth).abs() < 5 * values.std(0) / math.sqrt(300)).all()
        curve = rate_distortion(estimate)
        assert curve.t.tolist() == list(range(steps)) and curve.bpd[-1] == near_mean(estimate.prior_bpd)


def near_mean(values):
    return pytest.approx(values.mean().item(), rel=1e-12)


@pytest.mark.parametrize(
    ("process", "counts"),
    [
        (SHORT, {"num_evals_per_image": 1}),
        (SHORT, {"num_evals_per_image": 0}),
        (SHORT, {"num_evals_per_image": 4, "num_decoder_evals": 4}),
        (SHORT, {"num_evals_per_image": 4, "num_decoder_evals": 0}),
        (SHORT, {"num_evals_per_image": 4, "num_decoder_evals": -1}),
        (SHORT, {"batch_size": 0}),
        (SHORT, {"image_indices": [0, 1, 2]}),
        (DiffusionProcess.from_betas([0.5]), {"num_evals_per_image": 0}),
    ],
    ids=str,
)
def test_counts_that_cannot_be(process, counts):
    with pytest.raises(ValueError, match="allowed") as error:
        estimate_bound(process, toy_model, IMAGES, **counts, variance_type=torch.zeros(len(process)))
    assert "\n" not in str(error.value)


# Draws


def test_draws_depend_on_seed_and_index_alone():
    (name, process), x_0 = CHAINS["respaced"], levels(25, 1, 3, 5)
    model, options = pixelwise(name, "learned_range"), {**OPTIONS, "variance_type": "learned_range"}
    state = torch.get_rng_state()
    whole = estimate_bound(process, model, x_0, seed=3, **options)
    expected = rows(whole, slice(None))
    assert expected["image_indices"].tolist() == list(range(25))

    def compare(order, *parts):
        for field in FIELDS:
            got = torch.cat([getattr(part, field) for part in parts])
            assert_allclose(got, expected[field][order], rtol=1e-12, atol=1e-13, err_msg=field)

    for batch_size in (1, 7, 1000):
        compare(slice(None), estimate_bound(process, model, x_0, seed=3, batch_size=batch_size, **options))
    order = torch.randperm(25, generator=torch.Generator().manual_seed(0))
    for indices in (order, order.tolist(), order.numpy()):
        args = {"image_indices": indices, "seed": 3, "batch_size": 16}
        compare(order, estimate_bound(process, model, x_0[order], **args, **options))
    halves = [
        estimate_bound(process, model, x_0[half], image_indices=half, seed=3, **options)
        for half in (torch.arange(11), torch.arange(11, 25))
    ]
    compare(slice(None), *halves)
    assert torch.equal(torch.get_rng_state(), state)

    other = estimate_bound(process, model, x_0, seed=4, **options)
    assert (other.decoder_bpd != whole.decoder_bpd).all() and not torch.equal(other.t, whole.t)
    assert torch.equal(other.prior_bpd, whole.prior_bpd)
    assert [whole.decoder_bpd.shape, whole.terms_bpd.shape] == [(25, 3), (25, 17)]
    dtypes = {field: getattr(whole, field).dtype for field in (*FIELDS, "proposal")}
    assert {dtypes.pop("t"), dtypes.pop("image_indices")} == {torch.int64}
    assert set(dtypes.values()) == {torch.float64}


def test_a_network_in_float32_is_batched_as_one_likes():
    torch.manual_seed(0)
    model = create_model("tiny").eval()
    x_0, process = levels(5, 1, 8, 8).float(), chain("linear")
    state, options = torch.get_rng_state(), {"variance_type": "fixed_large", "num_evals_per_image": 5}

    def network(x_t, steps):
        assert x_t.dtype == torch.float32 and len(x_t) <= size
        return model(x_t, steps).sample

    estimates = []
    for size in (1, 7, 64):
        estimates.append(estimate_bound(process, network, x_0, batch_size=size, **options))
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = estimate_bound(process, network, x_0[order], image_indices=order, **options)
    for other in (*estimates[1:], moved):
        at = other.image_indices.argsort()
        assert torch.equal(other.t[at], estimates[0].t)
        assert_allclose(other.terms_bpd[at], estimates[0].terms_bpd, rtol=1e-5)
        assert_allclose(other.per_image_bpd[at], estimates[0].per_image_bpd, rtol=1e-6)
    assert torch.equal(torch.get_rng_state(), state)


def test_each_term_is_bound_term_at_its_draw():
    x_0, seen = levels(3, 2, 2, 1), []

    def model(x_t, steps):
        seen.append((x_t, steps))
        return toy_model(x_t, steps)

    estimate = estimate_bound(SHORT, model, x_0, num_evals_per_image=6, num_decoder_evals=2, **OPTIONS)
    x_t, steps = (torch.cat(z) for z in zip(*seen, strict=True))
    images = x_0.repeat_interleave(6, 0)
    noise = SHORT.predict_eps(x_t, images, steps)
    term = bound_term(SHORT, toy_model, images, steps, noise, **OPTIONS)
    bpd, mse = (z.view(3, 6) for z in (term.nats / (4 * LN2), term.x0_mse))
    assert torch.equal(steps.view(3, 6)[:, 2:], estimate.t) and (steps.view(3, 6)[:, :2] == 0).all()
    assert_allclose(torch.cat([estimate.decoder_bpd, estimate.terms_bpd], 1), bpd, rtol=1e-9)
    assert_allclose(torch.cat([estimate.decoder_x0_mse, estimate.x0_mse], 1), mse, rtol=1e-9)


@pytest.mark.parametrize("shape", [(3, 1, 2, 2), (1, 3, 3, 1), (4, 6)], ids=str)
def test_noise_of_an_image(shape):
    like = levels(*shape)
    indices = [10, 3, 7, 8][: shape[0]]
    state, noise = torch.get_rng_state(), image_noise(2, indices, like)
    drawn = [noise(t) for t in reversed(range(50))]
    assert {(z.shape, z.dtype) for z in drawn} == {(like.shape, torch.float64)}
    for i, index in enumerate(indices):
        alone = image_noise(2, [index], like[i : i + 1])
        assert all(
            torch.equal(alone(t), z[i : i + 1]) for t, z in zip(reversed(range(50)), drawn, strict=True)
        )
    values = torch.stack(drawn).flatten()
    assert len(values.unique()) == len(values)
    assert abs(values.mean()) < 5 / math.sqrt(len(values))
    assert abs(values.var() - 1) < 5 * math.sqrt(2 / len(values))
    assert image_noise(2, indices, like.float())(0).dtype == torch.float32
    assert not (image_noise(3, indices, like)(0) == drawn[0]).any()
    assert torch.equal(torch.get_rng_state(), state)


def test_exact_bound_of_a_split_batch():
    x_0, options = levels(7, 1, 2, 3), {"variance_type": "learned_range"}
    whole = evaluate_bound(SHORT, toy_learned, x_0, noise_fn=image_noise(1, range(7), x_0), **options)
    parts = [
        evaluate_bound(SHORT, toy_learned, x_0[i], noise_fn=image_noise(1, i, x_0[i]), **options)
        for i in ([0, 1, 2], [3, 4, 5, 6])
    ]
    for field in ("terms_bpd", "prior_bpd", "x0_mse", "eps_mse", "total_bpd"):
        got = torch.cat([getattr(part, field) for part in parts])
        assert_allclose(got, getattr(whole, field), rtol=1e-12)


# Proposals


def check_proposal(p, steps):
    assert (p.shape, p.dtype) == ((steps,), torch.float64)
    assert p[0] == 0 and p.sum().item() == pytest.approx(1, rel=1e-12)
    assert (p[1:] > 0).all() and (1 / p[1:]).max() <= 10 * (steps - 1) * (1 + 1e-12)


@pytest.mark.parametrize(
    "process",
    [chain("linear"), chain("squaredcos_cap_v2"), *(process for _, process in CHAINS.values()), SHORT],
    ids=["linear", "cosine", "constant", "respaced", "short"],
)
def test_default_proposal_is_the_kl_of_gaussian_data(process):
    # The exact denoiser of N(0, 1/4) at its best variance, whose errors and KL the oracles know.
    mse, p = mse_of_gaussian(process, 0.25), default_proposal(process)
    check_proposal(p, len(process))
    weights = step_kl(process, optimal_log_variance(process, mse), mse)[1:]
    assert_allclose(p[1:], 0.9 * weights / weights.sum() + 0.1 / len(weights), rtol=1e-9)


def test_default_proposal_is_the_same_for_all_models_and_variances():
    for model, variance_type in [(toy_model, "fixed_small"), (toy_learned, "learned_range")]:
        estimate = estimate_bound(SHORT, model, IMAGES, num_evals_per_image=3, variance_type=variance_type)
        assert torch.equal(estimate.proposal, default_proposal(SHORT))
    assert default_proposal(DiffusionProcess.from_betas([0.4])).tolist() == [0]
    check_proposal(default_proposal(DiffusionProcess.from_betas([0.4, 0.5, 1.0])), 3)


def test_pilot_proposal_is_the_root_mean_square_of_the_terms():
    # One pixel, every step: E L_t² and E L_t⁴ by quadrature; five standard errors of √mean.
    (name, process), x_0 = CHAINS["full"], levels(4, 1, 1, 1).repeat(2000, 1, 1, 1)
    model, (z, weight) = gaussian_denoiser(name, 0.25), trapezoid(801)
    p = pilot_proposal(process, model, x_0, num_steps=10_000, **OPTIONS)
    check_proposal(p, 50)
    single, noise = x_0[:4, 0, 0].repeat_interleave(801, 0), z.repeat(4)[:, None]
    nats = torch.stack([bound_term(process, model, single, t, noise, **OPTIONS).nats for t in range(1, 50)])
    second, fourth = ((nats**k).view(49, 4, 801).mean(1) @ weight for k in (2, 4))
    rms, error = second.sqrt(), ((fourth / second**2 - 1) / 8000).sqrt() / 2
    got, want = p[1:] - 0.1 / 49, 0.9 * rms / rms.sum()
    assert ((got / want - 1).abs() < 10 * error.max()).all() and 10 * error.max() < 0.3


@pytest.mark.parametrize("num_steps", [1, 2, 5, 20])
def test_pilot_is_interpolated_and_costs_what_it_says(num_steps):
    process, calls = chain("linear"), []

    def model(x_t, steps):
        calls.extend(steps.tolist())
        return 0.3 * x_t

    state = torch.get_rng_state()
    p = pilot_proposal(process, model, IMAGES, num_steps=num_steps, **OPTIONS)
    check_proposal(p, 1000)
    assert 0 not in calls and len(calls) <= len(IMAGES) * num_steps
    grid = np.unique(calls)
    assert grid[0] == 1 and (num_steps == 1 or grid[-1] == 999)
    log_w, log_t = np.log(p[1:].numpy() - 0.1 / 999), np.log(np.arange(1, 1000))
    assert_allclose(log_w, np.interp(log_t, np.log(grid), log_w[grid - 1]), atol=1e-6)
    assert torch.equal(p, pilot_proposal(process, model, IMAGES, num_steps=num_steps, **OPTIONS))
    other = pilot_proposal(process, model, IMAGES, num_steps=num_steps, seed=1, **OPTIONS)
    assert num_steps == 1 or not torch.equal(p, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_pilot_of_terms_that_are_zero():
    x_0 = IMAGES[:1]
    options = {"variance_type": "fixed_small", "prediction_type": "sample"}
    p = pilot_proposal(SHORT, answers(x_0), x_0, **options)
    check_proposal(p, 6)
    estimate = estimate_bound(SHORT, answers(x_0), x_0, proposal=p, **options)
    assert_allclose(estimate.per_image_rate_bpd, estimate.prior_bpd, atol=1e-12)


def test_proposals_are_taken_up_to_a_factor():
    p = torch.tensor([math.nan, 1, 2, 3, 4, 5])
    made = [estimate_bound(SHORT, toy_model, IMAGES, proposal=c * p, **OPTIONS) for c in (1, 8, 1 / 1024)]
    assert_allclose(made[0].proposal, np.arange(6) / 15, rtol=1e-12)
    for other in made[1:]:
        assert torch.equal(other.t, made[0].t) and torch.equal(other.per_image_bpd, made[0].per_image_bpd)
    assert p[0].isnan() and p[1:].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([0, 1, 1, -1, 1, 1], r"proposal\[3\] is -1.0; allowed: finite and positive"),
        ([0, 1, 1, 1, math.nan, -1], r"proposal\[4\] is nan; allowed"),
        ([0, math.inf, 1, 1, 1, 1], r"proposal\[1\] is inf; allowed"),
        ([1, 1, 1, 1, 1, 0], r"proposal\[5\] is 0.0; allowed"),
        ([0, 1, 1, 1, 1], r"proposal has shape \(5,\); allowed: \(6,\)"),
        ([[0, 1, 1, 1, 1, 1]], r"proposal has shape \(1, 6\); allowed: \(6,\)"),
    ],
)
def test_wrong_proposals(bad, message):
    with pytest.raises(ValueError, match=message) as error:
        estimate_bound(SHORT, toy_model, IMAGES, proposal=torch.tensor(bad), **OPTIONS)
    assert "\n" not in str(error.value)


def test_draws_do_not_depend_on_the_default_dtype():
    a = estimate_bound(SHORT, toy_model, IMAGES, **OPTIONS)
    noise = image_noise(0, range(5), IMAGES)(0)
    try:
        torch.set_default_dtype(torch.float64)
        b = estimate_bound(SHORT, toy_model, IMAGES, **OPTIONS)
        again = image_noise(0, range(5), IMAGES)(0)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(a.per_image_bpd, b.per_image_bpd, rtol=1e-6, atol=0)
    assert torch.equal(a.t, b.t) and torch.equal(noise, again)
