"""Costs of pairs of steps and the best chains: closed forms, brute force, and `bound_term`."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_ddpm.likelihood import bound_term, prior_kl
from hf_ddpm.likelihood.chains import (
    best_chains,
    chain_nats,
    log_posterior_variances,
    optimal_log_variances,
    pair_nats,
    prior_nats,
    smoothed_groups,
    smoothed_mse,
    snr_gaps,
    step_nats,
)
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.schedules import make_betas, quadratic_steps, rescale_zero_terminal_snr
from tests.bound_oracles import LN2, draw, levels, trapezoid
from tests.oracles import chain, law, near

SMALL = DiffusionProcess.from_betas(make_betas("linear", 40, 1e-3, 0.3))
ZERO_SNR = DiffusionProcess.from_betas(rescale_zero_terminal_snr(make_betas("linear", 40, 1e-3, 0.3)))


def later_pairs(process):
    return itertools.combinations(range(len(process)), 2)


def gaussian_mse(process, variance):
    """The error of E[x_0 | x_t] for x_0 ~ N(0, variance)."""
    return 1 / (1 / variance + process.snr)


def two_point_mse(process):
    """The error of E[x_0 | x_t] = tanh(√ᾱ x_t / (1 − ᾱ)) for x_0 = ±1 with equal chances."""
    eps, weight = trapezoid(4001)
    abar = process.alphas_cumprod[:, None]
    x_t = abar.sqrt() + (1 - abar).sqrt() * eps
    return ((1 - torch.tanh(abar.sqrt() * x_t / (1 - abar))).square() * weight).sum(1)


def from_image(total):
    """Tables by which every chain goes from the last step to step 0, and only the steps between cost."""
    first, prior = torch.full((2, total), torch.inf, dtype=torch.float64)
    first[0] = prior[-1] = 0
    return first, prior


@pytest.mark.parametrize("process", [SMALL, ZERO_SNR], ids=["linear", "zero terminal SNR"])
def test_every_pair_has_the_constants_of_the_chain_of_these_two_steps(process):
    gaps, posterior = snr_gaps(process), log_posterior_variances(process)
    for s, t in later_pairs(process):
        pair = process.respaced([s, t])
        c0, variance = pair.posterior_mean_coef_x0[1].item(), pair.posterior_variance[1].item()
        assert gaps[s, t].item() == near(c0**2 / variance, 1e-9)
        assert posterior[s, t].exp().item() == near(variance, 1e-12)
    assert (torch.tril(gaps) == 0).all() and (torch.tril(posterior.exp()) == 0).all()


@pytest.mark.parametrize("name, declared", [("fixed_small", 0.0), ("fixed_large", None), ("optimal", 0.07)])
def test_a_step_costs_what_bound_term_says(name, declared):
    mse, x_0 = 0.07, levels(1, 1, 4, 4)
    answer = x_0 + math.sqrt(mse)
    for s, t in [(0, 1), (0, 39), (5, 6), (11, 30)]:
        pair = SMALL.respaced([s, t])
        table = optimal_log_variances(SMALL, torch.full((40,), mse, dtype=torch.float64))[[s, s], [t, t]]
        term = bound_term(
            pair,
            lambda x_t, steps: answer,
            x_0,
            1,
            draw(1, 1, 4, 4),
            variance_type=table if name == "optimal" else name,
            prediction_type="sample",
            clip_x0=False,
        )
        own = (
            SMALL.one_minus_alphas_cumprod[t]
            if declared is None
            else torch.tensor(declared, dtype=torch.float64)
        )
        cost = step_nats(snr_gaps(SMALL)[s, t], torch.tensor(mse, dtype=torch.float64), own)
        assert cost.item() == near(term.nats.item() / 16, 1e-9)


def test_no_other_variance_costs_less_than_the_optimal_one():
    gap, mse = snr_gaps(SMALL), gaussian_mse(SMALL, 0.3)
    best = step_nats(gap, mse)
    for factor in (0.0, 0.5, 0.9, 0.999, 1.001, 1.1, 3.0):
        assert (step_nats(gap, mse, factor * mse) >= best - 1e-15).all()


def test_gaussian_data_cost_the_same_by_every_chain():
    variance = 0.3
    pairs = pair_nats(SMALL, gaussian_mse(SMALL, variance))
    level = (1 / variance + SMALL.snr).log()
    for s, t in later_pairs(SMALL):
        assert pairs[s, t].item() == near(0.5 * (level[s] - level[t]).item(), 1e-10)
    found = best_chains(*from_image(40)[:1], pairs, from_image(40)[1], 40)
    assert found.nats[0] == torch.inf
    assert torch.allclose(found.nats[1:], 0.5 * (level[0] - level[-1]), rtol=1e-12)


def test_groups_with_the_same_error_cost_what_one_table_does():
    mse, shares = gaussian_mse(SMALL, 0.3), torch.rand(40, 5, dtype=torch.float64)
    shares /= shares.sum(1, keepdim=True)
    grouped = pair_nats(SMALL, mse[:, None].expand(40, 5), shares)
    assert torch.allclose(grouped, pair_nats(SMALL, mse), rtol=1e-12)
    # Jensen: to know the group of a pixel can only help
    apart = mse[:, None] * torch.linspace(0.1, 1.9, 5, dtype=torch.float64)
    even = torch.full((40, 5), 0.2, dtype=torch.float64)
    upper = torch.triu(torch.ones(40, 40), 1) > 0
    assert (pair_nats(SMALL, apart, even) < pair_nats(SMALL, mse))[upper].all()


# docs/maths.md, section 7: bits of x_0 = ±1 from t = 999 to 0, even steps and the best ones
@pytest.mark.parametrize(
    "count, variance, even, best",
    [
        (10, "fixed_small", 40.6264, 1.3070),
        (10, "optimal", 4.3340, 1.1329),
        (50, "fixed_small", 1.1557, 1.0470),
        (50, "optimal", 1.1081, 1.0233),
    ],
)
def test_best_steps_of_the_two_point_prior(count, variance, even, best):
    process = chain("linear")
    mse = two_point_mse(process)
    pairs = pair_nats(process, mse, declared=torch.zeros_like(mse) if variance == "fixed_small" else None)
    first, prior = from_image(1000)
    steps = np.round(np.arange(count + 1) * 999 / count).astype(int).tolist()
    assert chain_nats(steps, first, pairs, prior) / LN2 == pytest.approx(even, abs=1e-4)
    found = best_chains(first, pairs, prior, count + 1)
    assert found.nats[count].item() / LN2 == pytest.approx(best, abs=1e-4)
    chosen = found.steps(count + 1)
    assert len(chosen) == count + 1 and chosen[0] == 0 and chosen[-1] == 999
    assert chain_nats(chosen, first, pairs, prior) == near(found.nats[count].item(), 1e-12)


tables = st.integers(1, 7).flatmap(
    lambda n: st.tuples(
        *(
            st.lists(st.floats(0, 10) | st.just(math.inf), min_size=size, max_size=size)
            for size in (n, n * n, n)
        )
    )
)


@law
@given(tables)
def test_best_chains_are_those_of_brute_force(values):
    first, pairs, prior = (torch.tensor(z, dtype=torch.float64) for z in values)
    total = len(first)
    pairs = pairs.view(total, total)
    found = best_chains(first, pairs, prior, total + 3)
    assert len(found.nats) == total
    for count in range(1, total + 1):
        costs = [
            chain_nats(steps, first, pairs, prior) for steps in itertools.combinations(range(total), count)
        ]
        assert found.nats[count - 1].item() == pytest.approx(min(costs), rel=1e-12)
        if math.isfinite(min(costs)):
            chosen = found.steps(count)
            assert len(chosen) == count
            assert chain_nats(chosen, first, pairs, prior) == pytest.approx(min(costs), rel=1e-12)
        else:
            with pytest.raises(ValueError, match="of which there is a chain"):
                found.steps(count)


@law
@given(st.integers(1, 400), st.data())
def test_quadratic_steps_ascend_from_0_to_the_last(total, data):
    count = data.draw(st.integers(1, total))
    steps = quadratic_steps(total, count)
    assert len(steps) == count and steps[-1] == total - 1
    assert all(a < b for a, b in itertools.pairwise(steps))
    if count > 1:
        gaps = np.diff(steps)
        assert steps[0] == 0
        assert (np.diff(gaps) >= -1).all()  # they widen, but for the rounding


def test_a_chain_of_a_chain_costs_what_the_same_steps_of_the_whole_one_do():
    part = SMALL.respaced([0, 3, 8, 20, 39])
    index = part.timesteps
    mse = gaussian_mse(SMALL, 0.3)
    whole = pair_nats(SMALL, mse)[index][:, index]
    assert torch.allclose(pair_nats(part, mse[index]), whole, rtol=1e-10)


def test_two_steps_have_one_pair_and_one_step_has_none():
    two = SMALL.respaced([0, 39])
    pairs = pair_nats(two, torch.tensor([0.1, 0.2]))
    assert pairs.isfinite().tolist() == [[False, True], [False, False]]
    one = DiffusionProcess.from_betas([0.5])
    found = best_chains(torch.tensor([1.5]), pair_nats(one, torch.tensor([0.1])), prior_nats(one, 1.0), 1)
    assert found.steps(1) == [0]
    assert found.nats.item() == near(1.5 + 0.5 * math.log(2), 1e-12)  # L_0 − ½ ln(1 − ½)


def test_what_a_start_from_noise_costs():
    x_0 = levels(3, 1, 4, 4)
    found = prior_nats(SMALL, x_0.square().mean().item())
    for t in (3, 39):
        assert found[t].item() == near(prior_kl(SMALL.respaced([0, t]), x_0).mean().item() / 16, 1e-10)
    assert prior_nats(ZERO_SNR, 0.4)[-1] == 0


# Smoothing


def noisy_sums(mse, each, seed=0):
    """Sums over `each` images of 64 pixels, whose errors have a spread of half their mean, and pixels."""
    spread = np.random.default_rng(seed).gamma(4, 1 / 4, (each, len(mse))).sum(0)
    return 64 * mse * torch.from_numpy(spread), torch.full_like(mse, 64.0 * each)


def test_smoothing_takes_noise_off_and_leaves_the_curve():
    process = chain("linear")
    mse = two_point_mse(process) + 1e-4
    exact = smoothed_mse(process, 64 * mse, torch.full_like(mse, 64))
    assert (exact / mse).log().abs().max() < 0.25  # where it falls by 3 nats within one nat of SNR
    squared, pixels = noisy_sums(mse, 10)
    raw, smooth = (squared / pixels / mse).log(), (smoothed_mse(process, squared, pixels) / mse).log()
    dense = slice(100, 1000)  # where steps lie closer than the width of the average
    assert smooth[dense].square().mean().sqrt() < 0.35 * raw[dense].square().mean().sqrt()


def test_steps_far_apart_keep_their_own_error():
    process = chain("linear").respaced([0, 10, 100, 400, 999])
    mse = torch.tensor([1e-4, 0.02, 0.01, 0.3, 0.2], dtype=torch.float64)
    assert torch.allclose(smoothed_mse(process, 64 * mse, torch.full((5,), 64.0)), mse, rtol=1e-3)


def test_a_step_without_images_gets_the_error_of_its_neighbours():
    process = chain("linear")
    mse = gaussian_mse(process, 0.25)
    pixels = torch.full((1000,), 64.0, dtype=torch.float64)
    pixels[[1, 500, 998, 999]] = 0
    assert torch.allclose(smoothed_mse(process, mse * pixels, pixels), mse, rtol=0.05)


def test_groups_add_up_to_the_whole_and_unseen_ones_have_its_error():
    process = chain("linear")
    mse = gaussian_mse(process, 0.25)
    share = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    factor = torch.tensor([0.4, 1.0, 2.5, 9.0], dtype=torch.float64)
    pixels = 1e6 * share.expand(1000, 4)
    found, shares = smoothed_groups(process, pixels * factor * mse[:, None], pixels)
    assert torch.allclose(shares, share.expand(1000, 4), atol=1e-9)
    assert torch.allclose((found * shares).sum(1), mse, rtol=0.01)
    assert torch.allclose(found / mse[:, None], torch.tensor([0.4, 1, 2.5, 1]).double(), rtol=0.02)


def test_an_error_of_0_everywhere_is_smooth():
    zeros = torch.zeros(40)
    assert (smoothed_mse(SMALL, zeros, torch.ones(40)) < 1e-9).all()
    assert (smoothed_mse(SMALL, torch.full((40,), 5e-324).double(), torch.full((40,), 9.0)) < 1e-9).all()
    assert (smoothed_mse(ZERO_SNR, torch.ones(40), torch.ones(40)) == 1).all()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: snr_gaps(chain("linear").betas), "process is"),
        (lambda: snr_gaps(DiffusionProcess.from_betas(torch.full((5000,), 1e-3))), "at most 4096"),
        (lambda: pair_nats(SMALL, torch.ones(39)), "mse is"),
        (lambda: pair_nats(SMALL, -torch.ones(40)), "mse is"),
        (lambda: pair_nats(SMALL, torch.full((40,), math.nan)), "mse is"),
        (lambda: pair_nats(SMALL, torch.ones(40, 3)), "shares"),
        (lambda: pair_nats(SMALL, torch.ones(40), declared=torch.ones(40, 2)), "declared is"),
        (lambda: smoothed_mse(SMALL, torch.zeros(40), torch.zeros(40)), "no error"),
        (lambda: smoothed_groups(SMALL, torch.ones(40, 2), torch.ones(40, 3)), "differ in shape"),
        (lambda: best_chains(torch.ones(3), torch.ones(3, 2), torch.ones(3), 2), "pairs is"),
        (lambda: best_chains(torch.tensor([math.nan]), torch.ones(1, 1), torch.ones(1), 2), "first is"),
        (lambda: best_chains(torch.ones(1), torch.ones(1, 1), torch.ones(1), 0), "most is 0"),
        (lambda: quadratic_steps(10, 11), "count is 11; allowed: at most 10"),
        (lambda: chain_nats([1, 0], torch.ones(2), torch.ones(2, 2), torch.ones(2)), "ascending"),
    ],
)
def test_refused_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()
