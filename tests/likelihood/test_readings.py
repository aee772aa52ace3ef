"""What is read from an evaluation: means, differences, the other variance, the progressive curve."""

import math

import pytest
import torch
from numpy.testing import assert_allclose

from hf_ddpm.likelihood import (
    Estimate,
    estimate_bound,
    evaluate_bound,
    image_noise,
    mean_and_stderr,
    paired_difference,
    rate_distortion,
    with_variance,
)
from hf_ddpm.likelihood.bound import prior_kl
from hf_ddpm.process import DiffusionProcess
from tests.bound_oracles import (
    CHAINS,
    LN2,
    expected_terms,
    gaussian_denoiser,
    levels,
    toy_model,
)
from tests.oracles import chain, spaced
from tests.toy import mixture_denoiser, mixture_images

SHORT = DiffusionProcess.from_betas([0.1, 0.3, 0.2, 0.5, 0.4, 0.6])
IMAGES = levels(5, 1, 2, 2)
OPTIONS = {"variance_type": "fixed_large", "prediction_type": "sample"}


# Means, differences


def made(decoder, terms, t, **changes):
    """An estimate of two images put together by hand."""
    decoder, terms, t = torch.tensor(decoder).double(), torch.tensor(terms).double(), torch.tensor(t)
    fields = {
        "image_indices": torch.arange(len(decoder)),
        "prior_bpd": torch.full((len(decoder),), 0.25).double(),
        "decoder_bpd": decoder,
        "decoder_x0_mse": torch.zeros_like(decoder),
        "t": t,
        "terms_bpd": terms,
        "x0_mse": torch.full_like(terms, 0.01),
        "proposal": torch.tensor([0, 0.5, 0.25, 0.25]).double(),
        "seed": 0,
    }
    return Estimate(**{**fields, **changes})


def test_sums_by_hand():
    estimate = made([[2.0, 4.0], [1.0, 1.0]], [[1.0, 3.0], [0.5, 2.0]], [[1, 3], [1, 2]])
    # (1/n) Σ L/p: (1/0.5 + 3/0.25)/2 = 7 and (0.5/0.5 + 2/0.25)/2 = 4.5.
    assert estimate.per_image_rate_bpd.tolist() == [7.25, 4.75]
    assert estimate.per_image_distortion_bpd.tolist() == [3, 1]
    assert estimate.per_image_bpd.tolist() == [10.25, 5.75]
    assert (estimate.bpd, estimate.rate_bpd, estimate.distortion_bpd) == (8, 6, 2)
    assert estimate.stderr == pytest.approx(2.25, rel=1e-12)  # std(ddof=1) = 4.5/√2, over √2

    curve = rate_distortion(estimate, num_bins=1000)
    assert curve.t.tolist() == [0, 1, 2, 3]
    # Sums over four draws with weight 1/(4 p): t=1: (1 + 0.5)/2, t=2: 2, t=3: 3.
    assert_allclose(curve.step_bpd, [2, 0.75, 2, 3], rtol=1e-12)
    assert_allclose(curve.bpd, [6, 5.25, 3.25, 0.25], rtol=1e-12)
    assert_allclose(curve.rmse_255, [0, 12.75, 12.75, 12.75], rtol=1e-12)
    assert (curve.rate_bpd, curve.distortion_bpd) == (6, 2)


def test_mean_and_stderr():
    values = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    mean, stderr = mean_and_stderr(values)
    assert mean == pytest.approx(3, rel=1e-12) and stderr == pytest.approx(math.sqrt(7 / 3), rel=1e-12)
    mean, stderr = mean_and_stderr(values[2:])
    assert mean == 6 and math.isnan(stderr)
    alone = estimate_bound(SHORT, toy_model, IMAGES[:1], **OPTIONS)
    assert math.isfinite(alone.bpd) and math.isnan(alone.stderr)
    estimate = estimate_bound(SHORT, toy_model, IMAGES, **OPTIONS)
    assert (estimate.bpd, estimate.stderr) == mean_and_stderr(estimate.per_image_bpd)
    parts = estimate.per_image_rate_bpd + estimate.per_image_distortion_bpd
    assert_allclose(parts, estimate.per_image_bpd, rtol=1e-13)
    assert estimate.rate_bpd + estimate.distortion_bpd == pytest.approx(estimate.bpd, rel=1e-12)


def test_paired_difference():
    process, x_0, full = spaced("linear", 100), mixture_images(128), []
    models = mixture_denoiser(), mixture_denoiser(factor=0.99)
    a, b = (estimate_bound(process, model, x_0, **OPTIONS) for model in models)
    redrawn = estimate_bound(process, models[1], x_0, seed=1, **OPTIONS)
    mean, stderr = paired_difference(a, b)
    difference = a.per_image_bpd - b.per_image_bpd
    assert mean == pytest.approx(difference.mean().item(), rel=1e-12)
    assert stderr == pytest.approx(difference.numpy().std(ddof=1) / math.sqrt(128), rel=1e-12)
    assert paired_difference(a, a) == (0, 0)
    # The exact denoiser is better, by what the full loop with one noise for both says.
    for model in models:
        noise = image_noise(0, range(128), x_0)
        full.append(evaluate_bound(process, model, x_0, noise_fn=noise, **OPTIONS).total_bpd)
    gap, gap_error = mean_and_stderr(difference - (full[0] - full[1]))
    assert abs(gap) < 5 * gap_error and mean < -5 * stderr
    # Section 4.1: the error is far below that of fresh draws, and further below that of other images.
    _, fresh = mean_and_stderr(a.per_image_bpd - redrawn.per_image_bpd)
    assert stderr < 0.75 * fresh and fresh < 0.5 * math.hypot(a.stderr, b.stderr)


def test_paired_difference_of_what_cannot_be_paired():
    def made_with(images=IMAGES, **options):
        return estimate_bound(SHORT, toy_model, images, **options, **OPTIONS)

    a = made_with()
    others = {
        "image_indices": [made_with(IMAGES[:4]), made_with(image_indices=range(1, 6))],
        "t": [made_with(seed=1), made_with(num_evals_per_image=8), made_with(proposal=torch.ones(6))],
    }
    for name, estimates in others.items():
        for other in estimates:
            with pytest.raises(ValueError, match=f"differ in {name}; allowed"):
                paired_difference(a, other)


# The other variance, the progressive curve


@pytest.mark.parametrize("clip_x0", [False, True])
@pytest.mark.parametrize(
    "ends", [("fixed_small", "fixed_large"), ("fixed_large", "fixed_small")], ids="-".join
)
@pytest.mark.parametrize("which", CHAINS)
def test_with_variance_is_a_second_evaluation(which, ends, clip_x0):
    (name, process), x_0 = CHAINS[which], levels(4, 1, 2, 3)
    model, p = gaussian_denoiser(name, 0.25), torch.ones(len(process))

    def evaluations(variance_type):
        options = {"variance_type": variance_type, "prediction_type": "sample", "clip_x0": clip_x0}
        noise = image_noise(0, range(4), x_0)
        yield evaluate_bound(process, model, x_0, noise_fn=noise, **options)
        yield estimate_bound(process, model, x_0, proposal=p, **options)

    for first, second in zip(*map(evaluations, ends), strict=True):
        got = with_variance(first, process, ends[1])
        assert type(got) is type(first) and not torch.equal(got.terms_bpd, first.terms_bpd)
        for field in vars(first):
            assert_allclose(getattr(got, field), getattr(second, field), rtol=1e-9, err_msg=field)
        back = with_variance(got, process, ends[0])
        assert_allclose(back.terms_bpd, first.terms_bpd, rtol=1e-9)
        same = with_variance(first, process, ends[0])
        assert_allclose(same.terms_bpd, first.terms_bpd, rtol=1e-9)


def test_with_variance_of_an_unknown_one():
    bound = evaluate_bound(SHORT, toy_model, IMAGES, **OPTIONS)
    with pytest.raises(ValueError, match="variance_type is 'learned'; allowed"):
        with_variance(bound, SHORT, "learned")


@pytest.mark.parametrize("num_bins", [1, 3, 40, 10**9])
def test_ends_of_the_curve(num_bins):
    (name, process), x_0 = CHAINS["respaced"], levels(40, 1, 2, 2)
    estimate = estimate_bound(process, gaussian_denoiser(name, 0.25), x_0, **OPTIONS)
    curve = rate_distortion(estimate, num_bins)
    assert {len(curve.t), len(curve.step_bpd), len(curve.bpd), len(curve.rmse_255)} == {len(curve.t)}
    assert 2 <= len(curve.t) <= 1 + min(num_bins, 24)
    for value in (curve.t, curve.step_bpd, curve.bpd, curve.rmse_255):
        assert value.dtype == torch.float64 and value.isfinite().all()
    assert curve.t[0] == 0 and (curve.t.diff() > 0).all() and (curve.bpd.diff() < 0).all()
    assert curve.step_bpd[0].item() == pytest.approx(estimate.distortion_bpd, rel=1e-12)
    assert curve.bpd[0].item() == pytest.approx(estimate.rate_bpd, rel=1e-12)
    assert curve.rmse_255[0] == 127.5 * estimate.decoder_x0_mse.mean().sqrt()
    parts = curve.rate_bpd, curve.distortion_bpd
    assert parts == (estimate.rate_bpd, estimate.distortion_bpd)
    if num_bins == 10**9:  # every step that was drawn is a bin of its own, and the rest is 0
        assert curve.t[1:].tolist() == estimate.t.unique().tolist()
        total = estimate.prior_bpd.mean() + curve.step_bpd[1:].sum()
        assert total.item() == pytest.approx(estimate.rate_bpd, rel=1e-12)


def bins_of(curve, steps):
    """First and last step of each bin, from the middles of bins that follow one another."""
    first, out = 0, []
    for middle in curve.t.tolist():
        last = round(2 * middle - first)
        out.append((first, last))
        first = last + 1
    assert first == steps and out[0] == (0, 0)
    return out


@pytest.mark.parametrize("which", CHAINS)
def test_curve_of_an_estimate_agrees_with_the_exact_one(which):
    # In expectation a bin is the mean of the exact curve over its steps; the exact one by quadrature.
    (name, process), x_0, repeats = CHAINS[which], levels(10, 1, 2, 2), 60
    model, count = gaussian_denoiser(name, 0.25), len(process)
    terms, mse = expected_terms(process, model, x_0, **OPTIONS).mean(1)
    received = prior_kl(process, x_0).mean() / (4 * LN2) + terms.flip(0).cumsum(0).flip(0) - terms
    counts = {"num_evals_per_image": 40, "batch_size": 1000}
    curves = [
        rate_distortion(estimate_bound(process, model, x_0, seed=seed, **counts, **OPTIONS), num_bins=8)
        for seed in range(repeats)
    ]
    bins = bins_of(curves[0], count)
    assert 6 <= len(bins) <= 9 and {tuple(curve.t.tolist()) for curve in curves} == {
        tuple(curves[0].t.tolist())
    }
    for field, exact in (("step_bpd", terms), ("bpd", received)):
        values = torch.stack([getattr(curve, field) for curve in curves])
        wanted = torch.stack([exact[low : high + 1].mean() for low, high in bins])
        error = values.std(0) / math.sqrt(repeats)
        assert ((values.mean(0) - wanted).abs() <= 5 * error + 1e-12).all(), field
    # A root of a ratio is biased by less than its own spread: five standard deviations of one curve.
    values = torch.stack([curve.rmse_255 for curve in curves])
    wanted = torch.stack([127.5 * mse[low : high + 1].mean().sqrt() for low, high in bins])
    assert ((values.mean(0) - wanted).abs() < 5 * values.std(0)).all()
    assert (values.std(0) < 0.2 * wanted).all()


def test_curve_of_one_image_and_two_evaluations():
    for index in range(30):
        options = {"num_evals_per_image": 2, "image_indices": [index], **OPTIONS}
        estimate = estimate_bound(chain("constant"), toy_model, IMAGES[:1], **options)
        curve = rate_distortion(estimate)
        assert len(curve.t) == 2
        for value in (curve.t, curve.step_bpd, curve.bpd, curve.rmse_255):
            assert value.isfinite().all()


def test_differences_hidden_by_equal_steps():
    # Same t, other noise: another n_0 with the same n, and a chain whose t is always 1.
    two = DiffusionProcess.from_betas([0.3, 0.9])
    makers = [
        lambda k: estimate_bound(
            SHORT, toy_model, IMAGES, num_evals_per_image=16 + k, num_decoder_evals=2 + k, **OPTIONS
        ),
        lambda k: estimate_bound(two, toy_model, IMAGES, seed=k, **OPTIONS),
    ]
    for make in makers:
        with pytest.raises(ValueError, match="allowed"):
            paired_difference(make(0), make(1))


def test_no_bins():
    with pytest.raises(ValueError, match="num_bins is 0; allowed"):
        rate_distortion(estimate_bound(SHORT, toy_model, IMAGES, **OPTIONS), num_bins=0)
