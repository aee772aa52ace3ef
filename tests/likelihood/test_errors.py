"""Measured errors: sums that the bound agrees with, variances in closed form, and a prediction that holds."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_ddpm.decoders import smoothed_levels
from hf_ddpm.gaussian import log_decoder
from hf_ddpm.likelihood import bound_term, estimate_bound, evaluate_bound
from hf_ddpm.likelihood.errors import COSTED, LOG_SIGMAS, Errors, error_sums, steps_to_measure
from hf_ddpm.likelihood.levels import LevelSums, decoder_steps
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.schedules import make_betas, quadratic_steps, rescale_zero_terminal_snr
from hf_ddpm.variances import VALUE_BINS, VarianceByValue, value_bins
from tests.bound_oracles import LN2, answers, draw, gaussian_denoiser, levels
from tests.oracles import chain, law, near

SMALL = DiffusionProcess.from_betas(make_betas("linear", 40, 1e-3, 0.3))
FLAT = torch.ones(1, 256, dtype=torch.int64)


def of_mse(process, mse, sigma=0.02):
    """Errors of a network whose m_t is known, spread evenly over the bins; L_0 as of N(0, σ²) errors."""
    pixels = torch.full((len(process), VALUE_BINS), 10**6)
    squared = pixels * mse[:, None]
    log_sigmas = torch.tensor(LOG_SIGMAS)
    nats = log_sigmas + 0.5 * sigma**2 * torch.exp(-2 * log_sigmas) + 10  # least at σ
    return Errors(process, squared, pixels, (10**6 * nats).expand(VALUE_BINS, -1), FLAT)


def measured(process, model, images, evaluations, seed=0, **how):
    """What `steps_to_measure` and `error_sums` make of a set of images."""
    generator = torch.Generator().manual_seed(seed)
    steps = steps_to_measure(process, evaluations)
    squared = torch.zeros(len(process), VALUE_BINS, dtype=torch.float64)
    pixels = torch.zeros(len(process), VALUE_BINS, dtype=torch.int64)
    decoder = torch.zeros(VALUE_BINS, len(LOG_SIGMAS), dtype=torch.float64)
    counts = torch.bincount(((images + 1) * 127.5).round().long().flatten(), minlength=256)[None]
    ends, sums = decoder_steps(process), LevelSums(smoothed_levels(counts))
    by_levels = torch.zeros(len(ends), VALUE_BINS, len(LOG_SIGMAS), dtype=torch.float64)
    for t in steps.split(500):
        x_0 = images[torch.randint(len(images), t.shape, generator=generator)]
        noise = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype)
        found = error_sums(process, model, x_0, t, noise, level_sums=sums, **how)
        by_levels.index_add_(0, torch.searchsorted(ends, t[torch.isin(t, ends)]), found.levels_nats)
        squared.index_add_(0, t, found.squared)
        pixels.index_add_(0, t, found.pixels)
        decoder += found.decoder_nats
    return Errors(process, squared, pixels, decoder, counts, by_levels)


# By value


@law
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=20))
def test_bins_are_even_and_know_the_ends(values):
    x = torch.tensor(values, dtype=torch.float64)
    bins = value_bins(x)
    assert torch.equal(bins, value_bins(x.clamp(-1, 1)))
    for value, found in zip(values, bins.tolist(), strict=True):
        if -1 < value < 1:
            low = -1 + (found - 1) * 2 / 30
            assert 1 <= found <= 30 and low - 1e-12 <= value <= low + 2 / 30 + 1e-12
        else:
            assert found == (0 if value <= -1 else 31)


def test_one_value_for_all_bins_is_the_plain_table():
    x_0, noise, t = levels(5, 1, 4, 4), draw(5, 1, 4, 4), torch.tensor([0, 1, 7, 0, 39])
    table = -3 * torch.rand(40, dtype=torch.float64)
    by_value = VarianceByValue(table[:, None].expand(40, VALUE_BINS))
    how = {"prediction_type": "sample"}
    model = answers(levels(1, 1, 4, 4, seed=3))
    a, b = (bound_term(SMALL, model, x_0, t, noise, variance_type=v, **how) for v in (table, by_value))
    assert torch.allclose(a.nats, b.nats, rtol=1e-12)
    for i in range(5):
        one = bound_term(
            SMALL, model, x_0[i : i + 1], int(t[i]), noise[i : i + 1], variance_type=by_value, **how
        )
        assert torch.allclose(one.nats, a.nats[i : i + 1], rtol=1e-12)


def test_each_pixel_gets_the_variance_of_its_predicted_value():
    x_0, answer = levels(1, 1, 2, 2), torch.tensor([[[[-1.0, -0.98], [0.31, 1.7]]]], dtype=torch.float64)
    table = -torch.arange(40 * VALUE_BINS, dtype=torch.float64).view(40, VALUE_BINS) / 400
    how = {"variance_type": VarianceByValue(table), "prediction_type": "sample"}
    clipped = answer.clamp(-1, 1)
    bins = [0, 1, 1 + math.floor((0.31 + 1) * 15), 31]
    at_0 = bound_term(SMALL, answers(answer), x_0, 0, draw(1, 1, 2, 2), **how)
    expected = -log_decoder(x_0.flatten(), clipped.flatten(), table[0, bins]).sum()
    assert at_0.nats.item() == near(expected.item(), 1e-12)
    later = bound_term(SMALL, answers(answer), x_0, 5, draw(1, 1, 2, 2), **how)
    beta, c0 = SMALL.posterior_variance[5], SMALL.posterior_mean_coef_x0[5]
    own = table[5, bins].exp()
    shift = c0 * (clipped - x_0).flatten()
    expected = 0.5 * (own.log() - beta.log() - 1 + (beta + shift**2) / own).sum()
    assert later.nats.item() == near(expected.item(), 1e-9)


def test_every_bound_takes_it_and_gradients_pass():
    x_0 = levels(3, 1, 4, 4)
    variance = of_mse(SMALL, 0.1 + 0 * SMALL.betas).variance(SMALL, "by-value")
    how = {"variance_type": variance, "prediction_type": "sample"}
    model = answers(levels(1, 1, 4, 4, seed=3))
    full = evaluate_bound(SMALL, model, x_0, **how)
    estimate = estimate_bound(SMALL, model, x_0, num_evals_per_image=40, **how)
    assert torch.allclose(estimate.decoder_bpd.mean(1), full.distortion_bpd, rtol=1e-9)  # the answer is fixed
    output = levels(3, 1, 4, 4, seed=4).requires_grad_()
    t = torch.tensor([0, 4, 9])
    term = bound_term(SMALL, None, x_0, t, draw(3, 1, 4, 4), model_output=output, **how)
    (gradient,) = torch.autograd.grad(term.nats.sum(), output)
    assert gradient.isfinite().all() and (gradient != 0).any()


# What is measured


@pytest.mark.parametrize("clip", [True, False])
def test_sums_are_those_of_the_bound(clip):
    x_0, noise, t = levels(4, 2, 3, 3), draw(4, 2, 3, 3), torch.tensor([0, 0, 7, 39])
    answer = 1.5 * levels(4, 2, 3, 3, seed=5)
    how = {"prediction_type": "sample", "clip_x0": clip}
    found = error_sums(SMALL, lambda x_t, steps: answer, x_0, t, noise, **how)
    term = bound_term(SMALL, lambda x_t, steps: answer, x_0, t, noise, **how)
    assert torch.allclose(found.squared.sum(1), 18 * term.x0_mse, rtol=1e-12)
    assert (found.pixels.sum(1) == 18).all()
    for i in (3, 20, 32):
        table = torch.full((40,), 2 * LOG_SIGMAS[i], dtype=torch.float64)
        term = bound_term(
            SMALL,
            lambda x_t, steps: answer[:2],
            x_0[:2],
            0,
            noise[:2],
            variance_type=table,
            **how,
        )
        assert found.decoder_nats[:, i].sum().item() == near(term.nats.sum().item(), 1e-12)


def test_of_a_network_that_learns_variances_the_first_half_counts():
    x_0, noise, t = levels(2, 1, 3, 3), draw(2, 1, 3, 3), torch.tensor([0, 7])
    answer = levels(2, 1, 3, 3, seed=5)
    plain = error_sums(SMALL, lambda x, s: answer, x_0, t, noise, prediction_type="sample")
    both = torch.cat([answer, draw(2, 1, 3, 3, seed=8)], 1)
    double = error_sums(SMALL, lambda x, s: both, x_0, t, noise, prediction_type="sample")
    assert torch.equal(plain.squared, double.squared)
    with pytest.raises(ValueError, match=r"the model answered .*\(2, 3, 3, 3\)"):
        error_sums(SMALL, lambda x, s: both[:, :1].expand(2, 3, 3, 3), x_0, t, noise)


@pytest.mark.parametrize("evaluations", [201, 500, 10_000])
@pytest.mark.parametrize(
    "process",
    [
        SMALL,
        chain("linear"),
        chain("linear").respaced([0, 999]),
        DiffusionProcess.from_betas(rescale_zero_terminal_snr(make_betas("linear", 40, 1e-3, 0.3))),
    ],
    ids=["40", "1000", "2", "zero terminal SNR"],
)
def test_steps_to_measure(process, evaluations):
    steps = steps_to_measure(process, evaluations)
    assert len(steps) == evaluations and (steps.diff() >= 0).all()
    counts = torch.bincount(steps, minlength=len(process))
    assert len(counts) == len(process) and counts[0] >= 200
    ends = decoder_steps(process)
    later = counts[ends[-1] + 1 :]
    if evaluations >= 30 * len(process):
        assert (counts[ends] > 0).all() and (later > 0).all()
        assert counts[: ends[-1] + 1].sum() == counts[ends].sum()  # where a chain may end, only these
    if len(process) == 1000 and evaluations == 10_000:
        assert counts[0] == 500 and later.min() >= 4 and counts[ends].min() > 50


# What follows from it


def test_variances_are_the_closed_form_at_every_spacing():
    process = chain("linear")
    mse = 1 / (1 / 0.09 + process.snr)
    errors = of_mse(process, mse, sigma=0.03)
    assert errors.decoder_sigma == near(0.03, 3e-3)
    assert errors.decoder_sigma_by_value.tolist() == pytest.approx([0.03] * 32, rel=3e-3)
    for steps in ([0, 999], [0, 1, 2, 3], list(range(0, 1000, 37)), range(1000)):
        part = process.respaced(list(steps))
        table, by_value = errors.variance(part, "optimal"), errors.variance(part, "by-value")
        exact = part.posterior_variance + part.posterior_mean_coef_x0**2 * mse[part.timesteps]
        assert table[0].exp().item() == near(0.03**2, 6e-3)
        assert torch.allclose(table[1:].exp(), exact[1:], rtol=0.01)
        assert torch.allclose(by_value.log_variance, table[:, None].expand(-1, 32), atol=1e-6)
    again = process.respaced(list(range(0, 1000, 37))).respaced([0, 111, 370])
    assert torch.allclose(
        errors.variance(again, "optimal"), errors.variance(process.respaced([0, 111, 370]), "optimal")
    )


def test_a_chain_that_begins_later_gets_a_wider_decoder():
    process = chain("linear")
    errors = of_mse(process, 1 / (1 / 0.09 + process.snr), sigma=0.03)
    later = errors.variance(process.respaced([19, 500]), "optimal")[0]
    ratio = (errors.x0_mse[19] / errors.x0_mse[0]).item()
    assert later.exp().item() == near(errors.decoder_sigma**2 * ratio, 1e-9)
    with pytest.raises(ValueError, match="the chain begins at step 19; allowed with the decoder exact: 0"):
        errors.predicted_bpd(process.respaced([19, 500]), "optimal")


def test_zero_terminal_snr_and_two_steps():
    process = DiffusionProcess.from_betas(rescale_zero_terminal_snr(make_betas("linear", 40, 1e-3, 0.3)))
    errors = of_mse(process, 1 / (1 / 0.09 + process.snr))
    for kind in ("optimal", "by-value", "fixed_small", "fixed_large"):
        best = errors.best_chains(kind, 40)
        assert best.nats[1:].isfinite().all()
        assert best.steps(2)[0] == 0
    two = process.respaced([0, 39])
    assert torch.as_tensor(errors.variance(two, "optimal")).isfinite().all()


def test_a_fixed_variance_has_no_chain_of_one_step():
    errors, one = of_mse(SMALL, 1 / (1 / 0.09 + SMALL.snr)), SMALL.respaced([0])
    for kind in ("fixed_small", "fixed_large"):
        best = errors.best_chains(kind, 2)
        assert best.nats[0] == math.inf and best.nats[1].isfinite()
        with pytest.raises(ValueError, match=f"the chain has one step; allowed with {kind}: at least 2"):
            errors.predicted_bpd(one, kind)
    assert errors.predicted_bpd(one, "optimal") == near(
        errors.best_chains("optimal", 1).nats.item() / LN2, 1e-12
    )


def test_the_prediction_is_within_two_standard_errors_of_the_bound_on_held_out_images():
    process = chain("linear").respaced(range(0, 1000, 5))
    model, how = gaussian_denoiser("linear", 0.0625), {"prediction_type": "sample"}

    def images(count, seed):
        drawn = 0.25 * draw(count, 1, 6, 6, seed=seed)
        return ((drawn.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1

    errors = measured(process, model, images(2000, 1), 10_000, **how)
    held_out, of_table = images(150, 2), 0.03  # what a table of 10,000 evaluations of 36 pixels errs itself
    for kind, name in itertools.product(("fixed_small", "fixed_large", "optimal", "by-value"), COSTED):
        best = errors.best_chains(kind, 25, name)
        chosen = process.respaced(process.timesteps[best.steps(25)])
        assert errors.predicted_bpd(chosen, kind, name) == near(best.nats[24].item() / LN2, 1e-12)
        # Of Gaussian data every chain costs the same, so that the chosen one is that of the luckiest errors
        for part, optimism in (
            (process.respaced(process.timesteps[quadratic_steps(200, 25)]), 0.0),
            (chosen, 0.04),
        ):
            variance = kind if kind.startswith("fixed") else errors.variance(part, kind)
            decoder = name if name == "exact" else errors.decoder(part, name)
            generator = torch.Generator().manual_seed(3)
            bound = evaluate_bound(
                part, model, held_out, variance_type=variance, decoder=decoder, generator=generator, **how
            )
            excess = bound.total_bpd - errors.predicted_bpd(part, kind, name)
            error = 2 * math.hypot(excess.std().item() / math.sqrt(150), of_table / 2)
            assert -error < excess.mean().item() < error + optimism, (kind, name)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"process": None}, "process is"),
        ({"squared": torch.ones(39, 32)}, "squared is"),
        ({"squared": torch.full((40, 32), math.inf)}, "squared is"),
        ({"squared": -torch.ones(40, 32)}, "squared is"),
        ({"pixels": torch.ones(40, 31)}, "pixels is"),
        ({"pixels": torch.zeros(40, 32)}, "at t = 0"),
        ({"decoder_nats": torch.ones(32, 32)}, "decoder_nats is"),
        ({"levels": torch.ones(256)}, "levels is"),
        ({"levels": torch.zeros(1, 256)}, "at t = 0"),
        ({"process": DiffusionProcess.from_betas(torch.full((5000,), 1e-3))}, "at most 4096"),
    ],
)
def test_refused_tables(change, words):
    good = of_mse(SMALL, torch.ones(40))
    fields = {
        name: getattr(good, name) for name in ("process", "squared", "pixels", "decoder_nats", "levels")
    }
    with pytest.raises(ValueError, match=words):
        Errors(**(fields | change))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda errors: errors.variance(SMALL, "fixed_small"), "variance is 'fixed_small'; allowed: optimal"),
        (lambda errors: errors.costs("learned"), "allowed: fixed_small, fixed_large, optimal, by-value"),
        (lambda errors: errors.variance(chain("linear"), "optimal"), "not in the chain"),
        (
            lambda errors: errors.variance(
                DiffusionProcess.from_betas(make_betas("linear", 40, 1e-3, 0.2)), "optimal"
            ),
            "process is not a chain of the one",
        ),
        (lambda errors: errors.variance(None, "optimal"), "process is None"),
        (lambda errors: steps_to_measure(SMALL, 200), "evaluations is 200; allowed: whole numbers >= 201"),
        (lambda errors: VarianceByValue(torch.ones(40, 31)), "log_variance is"),
        (lambda errors: VarianceByValue(torch.full((40, 32), math.nan)), "log_variance is"),
        (
            lambda errors: evaluate_bound(
                SMALL.respaced([0, 1]),
                answers(levels(1, 1, 2, 2)),
                levels(1, 1, 2, 2),
                variance_type=errors.variance(SMALL, "by-value"),
            ),
            "variance_type has values for 40 steps; allowed: the chain's 2",
        ),
    ],
)
def test_refused_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call(of_mse(SMALL, torch.ones(40)))
