"""The decoder by grey levels: closed forms, gradients, and the bounds that take it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_ddpm.decoders import DECODERS, NAMED, LevelsDecoder, decoder_name, smoothed_levels
from hf_ddpm.gaussian import log_decoder
from hf_ddpm.likelihood import bound_term, estimate_bound, evaluate_bound
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.schedules import make_betas
from hf_ddpm.variances import VALUE_BINS
from tests.bound_oracles import answers, draw, levels
from tests.oracles import law, near

SMALL = DiffusionProcess.from_betas(make_betas("linear", 40, 1e-3, 0.3))


def some(channels=1, log_sigma=-3.0, seed=0):
    """A decoder with random frequencies of the levels, some of them tiny."""
    drawn = torch.randn(channels, 256, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return LevelsDecoder(8 * drawn, torch.tensor(log_sigma))


@law
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6), st.floats(-20, 20))
def test_the_probabilities_of_a_pixel_add_up_to_1(means, log_sigma):
    found = some(2, log_sigma).log_probabilities(torch.tensor(means, dtype=torch.float64).expand(1, 2, 1, -1))
    assert found.shape == (1, 2, 1, len(means), 256)
    assert ((found.exp().sum(-1) - 1).abs() < 1e-12).all() and not found.isnan().any()


def test_two_levels_have_the_odds_of_the_formula():
    table = torch.full((1, 256), -700.0, dtype=torch.float64)
    table[0, [51, 204]] = torch.tensor([0.2, 0.8], dtype=torch.float64).log()
    low, high, sigma = 51 / 127.5 - 1, 204 / 127.5 - 1, 0.5
    mean = torch.tensor([[-0.3, 0.0, 0.9]], dtype=torch.float64).view(1, 1, 1, 3)
    found = LevelsDecoder(table, torch.tensor(math.log(sigma))).log_probabilities(mean).exp()[0, 0, 0]
    odds = 4 * torch.exp(((mean - low) ** 2 - (mean - high) ** 2) / (2 * sigma**2)).flatten()
    assert torch.allclose(found[:, 204], odds / (1 + odds), rtol=1e-12)


def test_the_ends_of_sigma_are_the_frequencies_and_the_nearest_level():
    x = levels(2, 3, 4, 4)
    wide, narrow = some(3, 12.0), some(3, -12.0)
    index = ((x + 1) * 127.5).round().long()
    g = wide.log_levels[torch.arange(3).view(3, 1, 1).expand(3, 4, 4), index]
    assert torch.allclose(wide.log_likelihood(x, 0 * x), g, atol=1e-9)
    assert (narrow.log_likelihood(x, x + 1e-4) > -1e-9).all()


def test_the_likelihood_is_the_probability_of_the_level_and_so_is_its_gradient():
    decoder = LevelsDecoder(some(3).log_levels, torch.linspace(-5, -1, VALUE_BINS))
    x, mean = levels(2, 3, 5, 4), levels(2, 3, 5, 4, seed=2).clone().requires_grad_()
    index = ((x + 1) * 127.5).round().long()[..., None]
    values = (
        decoder.log_likelihood(x, mean),
        decoder.log_probabilities(mean).gather(-1, index)[..., 0],
    )
    gradients = [torch.autograd.grad(z.sum(), mean)[0] for z in values]
    assert torch.allclose(*values, rtol=1e-12, atol=1e-12)
    assert torch.allclose(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("log_sigma", [-20.0, -6.0, 20.0])
def test_gradients_are_finite_however_far_the_mean_lies(log_sigma):
    mean = torch.tensor([-1e6, -1.0, 0.001, 1.0, 3e4], dtype=torch.float64).view(1, 1, 1, 5).requires_grad_()
    found = some(1, log_sigma).log_likelihood(levels(1, 1, 1, 5), mean)
    (gradient,) = torch.autograd.grad(found.sum(), mean)
    assert found.isfinite().all() and gradient.isfinite().all()


def test_pieces_do_not_matter():
    x, mean = levels(1, 1, 60, 60), levels(1, 1, 60, 60, seed=4)  # more pixels than are looked at at once
    whole = some().log_likelihood(x, mean)
    assert torch.equal(whole[..., 7:9, :], some().log_likelihood(x[..., 7:9, :], mean[..., 7:9, :]))


# Of the levels


def test_no_level_is_impossible_and_none_becomes_likely():
    counts = torch.zeros(2, 256, dtype=torch.int64)
    counts[0, :3] = torch.tensor([10, 1, 1])
    counts[1, 255] = 7
    found = smoothed_levels(counts).exp()
    assert torch.allclose(found.sum(1), torch.ones(2).double(), rtol=1e-12) and (found > 0).all()
    assert found[0, 100].item() == near(3 / 256 / 15, 1e-12)  # two levels were seen once
    assert found[1, 255].item() == near((7 + 1 / 256) / 8, 1e-12)


# In a bound


def test_every_bound_takes_it_in_the_place_of_the_first_term():
    x, noise, t = levels(5, 2, 4, 4), draw(5, 2, 4, 4), torch.tensor([0, 1, 7, 0, 39])
    answer = levels(1, 2, 4, 4, seed=3)
    decoder = some(2)
    how = {"prediction_type": "sample"}
    ours = bound_term(SMALL, answers(answer), x, t, noise, decoder=decoder, **how)
    theirs = bound_term(SMALL, answers(answer), x, t, noise, **how)
    assert torch.equal(ours.nats[t > 0], theirs.nats[t > 0])
    own = -decoder.log_likelihood(x, answer.double().expand_as(x)).flatten(1).sum(1)
    assert torch.allclose(ours.nats[t == 0], own[t == 0], rtol=1e-12)
    for variance in ("fixed_small", torch.full((40,), 7.0)):  # it has a σ of its own
        one = bound_term(SMALL, answers(answer), x, 0, noise, decoder=decoder, variance_type=variance, **how)
        assert torch.allclose(one.nats, own, rtol=1e-12)
    full = evaluate_bound(SMALL, answers(answer), x, decoder=decoder, **how)
    estimate = estimate_bound(SMALL, answers(answer), x, decoder=decoder, num_evals_per_image=12, **how)
    assert torch.allclose(full.distortion_bpd, own / (32 * math.log(2)), rtol=1e-9)
    assert torch.allclose(estimate.decoder_bpd.mean(1), full.distortion_bpd, rtol=1e-9)


def test_gradients_reach_a_network_of_half_precision():
    output = levels(3, 1, 4, 4, seed=4).bfloat16().requires_grad_()
    t = torch.tensor([0, 4, 0])
    term = bound_term(
        SMALL,
        None,
        levels(3, 1, 4, 4),
        t,
        draw(3, 1, 4, 4),
        model_output=output,
        prediction_type="sample",
        decoder=some(),
    )
    (gradient,) = torch.autograd.grad(term.nats.sum(), output)
    assert gradient.dtype == torch.bfloat16 and gradient.isfinite().all() and (gradient[t == 0] != 0).any()


def test_names():
    assert NAMED == ("exact", "tanh") and tuple(DECODERS) == (*NAMED, "levels")
    assert decoder_name("tanh") == "tanh" and decoder_name(some()) == "levels"
    x, mean = levels(2, 1, 3, 3), levels(2, 1, 3, 3, seed=5).double()
    for name in NAMED:
        assert torch.equal(DECODERS[name](x, mean, -4.0), log_decoder(x, mean, -4.0, name))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: LevelsDecoder(torch.zeros(256), torch.tensor(0.0)), "log_levels is"),
        (lambda: LevelsDecoder(torch.zeros(0, 256), torch.tensor(0.0)), "log_levels is"),
        (lambda: LevelsDecoder(torch.zeros(1, 256).log(), torch.tensor(0.0)), "log_levels is"),
        (lambda: LevelsDecoder("levels", torch.tensor(0.0)), "log_levels is 'levels'; allowed: finite num"),
        (lambda: LevelsDecoder(torch.zeros(1, 256), torch.zeros(31)), "log_sigma is"),
        (lambda: LevelsDecoder(torch.zeros(1, 256), torch.tensor(math.nan)), "log_sigma is"),
        (lambda: LevelsDecoder(torch.zeros(1, 256), torch.tensor(-21.0)), "between −20 and 20"),
        (lambda: some().log_probabilities(levels(1, 3, 2, 2)), "have 3 channels, and .* of 1; allowed"),
        (lambda: some().log_probabilities([1.0]), "mean_x0 is a list"),
        (lambda: some().log_likelihood(levels(1, 1, 2, 2), levels(1, 1, 2, 3)), "tensors of one shape"),
        (lambda: bounded("levels"), "decoder is 'levels', which needs numbers that hf-ddpm plan measures; a"),
        (lambda: bounded("Exact"), "decoder is 'Exact'; allowed: exact, tanh, or a LevelsDecoder"),
        (lambda: bounded(None), "decoder is None; allowed"),
        (lambda: bounded(["exact"]), "decoder is a list; allowed"),
        (lambda: bounded(some(3)), "the images have 1 channels, and the decoder levels has grey levels of 3"),
    ],
)
def test_refused_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def bounded(decoder):
    x = levels(1, 1, 2, 2)
    return bound_term(SMALL, answers(x), x, 0, draw(1, 1, 2, 2), prediction_type="sample", decoder=decoder)
