"""The decoder by grey levels, measured: a network whose x̂_0 is x_0 and noise has it in closed form."""

import math

import numpy as np
import pytest
import torch

from hf_ddpm.decoders import LevelsDecoder, smoothed_levels
from hf_ddpm.exact import ExactDenoiser
from hf_ddpm.likelihood import evaluate_bound
from hf_ddpm.likelihood.curves import LOG_SIGMAS
from hf_ddpm.likelihood.errors import error_sums, steps_to_measure
from hf_ddpm.likelihood.levels import LevelSums, decoder_steps
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.schedules import make_betas, rescale_zero_terminal_snr
from hf_ddpm.variances import value_bins
from tests.bound_oracles import LN2, draw, levels
from tests.likelihood.test_errors import measured, of_mse
from tests.oracles import chain, near

SMALL = DiffusionProcess.from_betas(make_betas("linear", 40, 1e-3, 0.3))
ZERO_SNR = DiffusionProcess.from_betas(rescale_zero_terminal_snr(make_betas("linear", 40, 1e-3, 0.3)))
FOUR = torch.tensor([0, 85, 170, 255])
FREQUENCIES = torch.tensor([0.5, 0.25, 0.15, 0.1])


def four_levels(count, seed):
    """Images of independent pixels of four levels."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(FREQUENCIES, count * 36, replacement=True, generator=generator)
    return (FOUR[drawn].view(count, 1, 6, 6) / 127.5 - 1).double()


def unscaled(process):
    """A network that answers x_t/√ᾱ_t, which is x_0 and N(0, 1/SNR_t): all that is known of a pixel."""

    def model(x_t, t):
        index = process.index_of(t)
        return x_t / process.sqrt_alphas_cumprod[index].view(-1, 1, 1, 1)

    return model


def entropy_given(process, t):
    """H(x_0 | x_t) of a pixel of `four_levels` in nats, by the trapezoid rule."""
    sigma, value = process.snr[t].item() ** -0.5, (FOUR / 127.5 - 1).double()
    x = torch.linspace(-1 - 8 * sigma, 1 + 8 * sigma, 40_001, dtype=torch.float64)[:, None]
    joint = (
        FREQUENCIES.double() * torch.exp(-0.5 * ((x - value) / sigma) ** 2) / sigma / math.sqrt(2 * math.pi)
    )
    nats = -(joint * (joint / joint.sum(1, keepdim=True)).clamp(min=1e-300).log()).sum(1)
    return torch.trapezoid(nats, x[:, 0]).item()


@pytest.mark.parametrize(
    "process",
    [SMALL, ZERO_SNR, chain("linear"), SMALL.respaced([0, 39]), DiffusionProcess.from_betas([0.5])],
    ids=["40", "zero terminal SNR", "1000", "2", "1"],
)
def test_where_a_chain_may_end(process):
    steps = decoder_steps(process)
    snr = process.snr[steps].clamp(min=1e-300).log()
    assert steps[0] == 0 and (steps.diff() > 0).all() and (snr.diff() <= -0.25).all()
    assert (process.snr[steps[1:]] >= 1).all()
    if len(process) == 1000:
        assert 25 <= len(steps) <= 40


def test_sums_are_those_of_the_decoder_at_every_sigma():
    log_levels = smoothed_levels(torch.randint(1, 1000, (2, 256), generator=torch.Generator().manual_seed(1)))
    x = levels(3, 2, 5, 5)
    mean = x.double() + 0.02 * draw(3, 2, 5, 5)
    mean[0, 0, 0] = torch.tensor([-1.2, -1.0, 1.0, 1.3, 0.0])
    found = LevelSums(log_levels)(x.double(), mean)
    bins = value_bins(mean).flatten(1)
    for i in range(8, 33, 4):
        exact = -LevelsDecoder(log_levels, torch.tensor(LOG_SIGMAS[i])).log_likelihood(x, mean).flatten(1)
        apart = torch.zeros(3, 32, dtype=torch.float64).scatter_add_(1, bins, exact)
        assert torch.allclose(found[..., i], apart, rtol=2e-3, atol=2e-2)


def test_only_steps_where_a_chain_may_end_are_summed():
    x, t = levels(4, 1, 3, 3), torch.tensor([39, 0, 39, int(decoder_steps(SMALL)[1])])
    how = {"prediction_type": "sample"}
    sums = LevelSums(torch.full((1, 256), 1 / 256).double().log())
    found = error_sums(SMALL, lambda x_t, t: x, x, t, draw(4, 1, 3, 3), level_sums=sums, **how)
    assert found.levels_nats.shape == (2, 32, 33)
    assert error_sums(SMALL, lambda x_t, t: x, x, t, draw(4, 1, 3, 3), **how).levels_nats.shape == (0, 32, 33)


def test_of_independent_pixels_the_decoder_costs_their_entropy():
    process = chain("linear").respaced(range(0, 1000, 10))
    how = {"prediction_type": "sample", "clip_x0": False}
    model = unscaled(process)
    errors = measured(process, model, four_levels(500, 1), 6000, **how)
    held_out, generator = four_levels(400, 2), torch.Generator().manual_seed(3)
    for t in (4, 9, 14):
        part = process.respaced(process.timesteps[[t, 60, 99]])
        decoder = errors.decoder(part, "levels")
        assert decoder.log_sigma[10].exp().item() == pytest.approx(process.snr[t].item() ** -0.5, rel=0.2)
        exact = entropy_given(process, t)
        first = errors.costs("optimal", "levels")[0][t].item()
        assert first == pytest.approx(exact, rel=0.15, abs=2e-3)
        variance = errors.variance(part, "optimal")
        bound = evaluate_bound(
            part, model, held_out, variance_type=variance, decoder=decoder, generator=generator, **how
        )
        scored = bound.distortion_bpd * LN2
        assert abs(scored.mean().item() - exact) < 4 * scored.std().item() / 20 + 0.01 * exact


def test_the_best_chain_ends_where_the_levels_are_still_told_apart():
    """Of images of four far levels the Gaussian decoder has to start at step 0, and this one later."""
    process = chain("linear").respaced(range(0, 1000, 10))
    images = four_levels(12, 5)
    exact, how = ExactDenoiser(process, images), {"prediction_type": "sample"}
    errors = measured(process, exact, images, 3000, **how)
    for kind in ("fixed_small", "fixed_large", "optimal", "by-value"):
        best = errors.best_chains(kind, 10, "levels")
        assert best.steps(10)[0] > 0 and best.nats[9] < errors.best_chains(kind, 10).nats[9] - 1
        at_3 = errors.best_chains(kind, 10, "levels", last_step=3)
        assert at_3.steps(10)[0] == 3 and at_3.nats[9] >= best.nats[9]
        part = process.respaced(process.timesteps[best.steps(10)])
        assert errors.predicted_bpd(part, kind, "levels") == near(best.nats[9].item() / LN2, 1e-12)


def test_two_steps_and_zero_terminal_snr():
    how = {"prediction_type": "sample"}
    for process in (ZERO_SNR, SMALL.respaced([0, 39])):
        errors = measured(process, lambda x, t: x.clamp(-1, 1), four_levels(50, 1), 600, **how)
        for kind in ("fixed_small", "fixed_large", "optimal", "by-value"):
            best = errors.best_chains(kind, 2, "levels")
            part = process.respaced(process.timesteps[best.steps(2)])
            assert best.nats[1].isfinite() and errors.decoder(part).log_sigma.isfinite().all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda old, new: old.decoder(SMALL), "by an earlier version, without the decoder levels; allowed: "),
        (lambda old, new: old.costs("optimal", "levels"), "measure them anew with hf-ddpm plan"),
        (lambda old, new: new.decoder(SMALL, "exact"), "decoder is 'exact'; allowed: levels"),
        (
            lambda old, new: new.decoder(SMALL.respaced([39])),
            "begins at step 39; allowed with the decoder lev",
        ),
        (lambda old, new: new.costs("optimal", "tanh"), "decoder is 'tanh'; allowed: exact, levels"),
        (
            lambda old, new: new.costs("optimal", "exact", 3),
            "allowed with the decoder exact: 0, where it was",
        ),
        (lambda old, new: new.best_chains("optimal", 5, "levels", 39), "begins at step 39; allowed with"),
        (lambda old, new: new.best_chains("optimal", 5, "levels", -1), "last_step is -1"),
        (lambda old, new: new.best_chains("optimal", 5, "levels", 1.5), "last_step is 1.5"),
        (lambda old, new: new.decoder(chain("linear")), "not in the chain"),
        (lambda old, new: steps_to_measure(SMALL, 3), "evaluations is 3"),
    ],
)
def test_refused_arguments(call, words):
    old = of_mse(SMALL, torch.ones(40))
    rows = len(decoder_steps(SMALL))
    new = type(old)(**{**vars_of(old), "levels_nats": torch.ones(rows, 32, 33)})
    with pytest.raises(ValueError, match=words):
        call(old, new)


def vars_of(errors):
    return {
        name: getattr(errors, name) for name in ("process", "squared", "pixels", "decoder_nats", "levels")
    }


def test_tables_of_another_shape_are_refused():
    old = of_mse(SMALL, torch.ones(40))
    for wrong in (torch.ones(1, 32, 33), torch.full((len(decoder_steps(SMALL)), 32, 33), np.nan)):
        with pytest.raises(ValueError, match="levels_nats is"):
            type(old)(**{**vars_of(old), "levels_nats": wrong})
