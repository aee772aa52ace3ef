"""The Fréchet distance and its jackknife error: closed forms, brute force, repeated draws."""

import math

import numpy as np
import pytest
import torch

from hf_ddpm.metrics import Features, FrechetDistance, frechet_distance, frechet_label, sample_metrics
from hf_ddpm.metrics.frechet import jackknife_stderr

WIDTH = 3
MIXING = torch.tensor([[1.0, 0.3, 0.0], [0.0, 0.7, -0.5], [0.2, 0.0, 2.0]])


def features(x):
    return Features("toy", torch.as_tensor(x, dtype=torch.float32))


def draws(count, seed, scale=1.0, shift=0.0, width=WIDTH):
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return features((x @ MIXING if width == WIDTH else x) * scale + shift)


def by_hand(x, y):
    """Heusel et al. 2017, eq. 6, with the square root of a matrix, in NumPy."""
    x, y = x.features.double().numpy(), y.features.double().numpy()
    products = np.linalg.eigvals(np.cov(x.T) @ np.cov(y.T)).real.clip(0)
    traces = np.trace(np.cov(x.T)) + np.trace(np.cov(y.T))
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + traces - 2 * np.sqrt(products).sum()


def without(x, rows):
    kept = torch.ones(len(x), dtype=torch.bool)
    kept[rows] = False
    return features(x.features[kept])


def test_one_number_of_each_image():
    """In one dimension it is (μ − μ_r)² + (σ − σ_r)²."""
    x, y = features([[0.0], [2.0], [7.0]]), features([[1.0], [5.0]])
    sigma, other = math.sqrt(13), math.sqrt(8)
    assert frechet_distance(x, y).value == pytest.approx((3 - 3) ** 2 + (sigma - other) ** 2, rel=1e-12)


@pytest.mark.parametrize(("samples", "reference", "width"), [(40, 60, 3), (12, 30, 20), (30, 9, 20)])
def test_it_is_that_of_torchmetrics(samples, reference, width):
    """Also where there are fewer images than features, of either kind."""
    x, y = draws(samples, 0, 1.3, 4.0, width), draws(reference, 1, 1.0, 4.5, width)
    found = frechet_distance(x, y).value
    assert found == pytest.approx(sample_metrics(x, y).frechet_distance, rel=1e-5, abs=1e-6)
    assert found == pytest.approx(by_hand(x, y), rel=1e-5, abs=1e-5)


def test_leaving_one_out_is_the_brute_force():
    x, y = draws(30, 0, 1.2), draws(50, 1)
    found = frechet_distance(x, y)
    assert found.left_out.shape == (30,) and found.num_samples == 30
    expected = np.array([by_hand(without(x, [i]), y) for i in range(30)])
    np.testing.assert_allclose(found.left_out.numpy(), expected, rtol=1e-7)
    stderr = math.sqrt(29 / 30 * ((expected - expected.mean()) ** 2).sum())  # Tukey 1958
    assert found.stderr == pytest.approx(stderr, rel=1e-6)


@pytest.mark.parametrize("count", [20, 23])
def test_leaving_groups_out_is_the_brute_force(count):
    """Groups of 5, or of 5 and 6, for which Busing et al. 1999 have another formula than Tukey."""
    x, y = draws(count, 0, 1.2), draws(50, 1)
    found = frechet_distance(x, y, groups=4)
    rows = [list(range(g, count, 4)) for g in range(4)]
    left_out = [by_hand(without(x, group), y) for group in rows]
    np.testing.assert_allclose(found.left_out.numpy(), left_out, rtol=1e-7)
    whole = by_hand(x, y)
    mean = 4 * whole - sum((1 - len(group) / count) * one for group, one in zip(rows, left_out, strict=True))
    terms = []
    for group, one in zip(rows, left_out, strict=True):
        h = count / len(group)
        terms.append((h * whole - (h - 1) * one - mean) ** 2 / (h - 1))
    assert found.stderr == pytest.approx(math.sqrt(np.mean(terms)), rel=1e-6)
    if count == 20:
        left_out = np.array(left_out)
        assert found.stderr == pytest.approx(
            math.sqrt(3 / 4 * ((left_out - left_out.mean()) ** 2).sum()), rel=1e-6
        )


def test_the_error_of_a_mean_is_known():
    """For the mean, the jackknife gives s/√N exactly."""
    x = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left_out = (x.sum() - x) / 199
    found = jackknife_stderr(x.mean().item(), left_out, 200)
    assert found == pytest.approx(x.std().item() / math.sqrt(200), rel=1e-9)


@pytest.mark.parametrize("groups", [20, 300])
def test_the_error_is_that_of_repeated_draws(groups):
    """Over 300 sets of samples the distances scatter as the errors say, within five standard errors."""
    reference, number = draws(500, 1), 300
    found = [frechet_distance(draws(300, 10 + i, 1.3, 0.2), reference, groups) for i in range(number)]
    scatter = np.std([one.value for one in found], ddof=1)
    errors = np.array([one.stderr for one in found])
    told = math.sqrt((errors**2).mean())
    allowed = 5 * math.hypot(scatter / math.sqrt(2 * number), errors.std() / math.sqrt(number))
    assert abs(told - scatter) < allowed + 0.05 * scatter  # the jackknife is a little too large


def test_a_paired_difference_is_known_better():
    """Samples that differ little and have one origin: the error is that of repeated draws, and small."""
    reference, pairs = draws(500, 1), []
    for i in range(200):
        x, noise = draws(300, 10 + i, 1.3), draws(300, 5000 + i, 0.1)
        pairs.append((x, features(x.features + noise.features)))
    both = [[frechet_distance(one, reference, 50) for one in pair] for pair in pairs]
    found = [b.minus(a) for a, b in both]
    scatter = np.std([value for value, _ in found], ddof=1)
    told = math.sqrt(np.mean([error**2 for _, error in found]))
    apart = math.sqrt(np.mean([a.stderr**2 + b.stderr**2 for a, b in both]))
    assert abs(told - scatter) < 0.3 * scatter and told < apart / 3
    a = both[0][0]
    assert a.minus(a) == (0, 0)


def test_what_is_refused():
    x, y = draws(10, 0), draws(20, 1)
    with pytest.raises(ValueError, match="10 and 20 samples are not compared; allowed: equal numbers"):
        frechet_distance(x, y).minus(frechet_distance(y, y))
    with pytest.raises(ValueError, match="samples: 2 images; allowed: at least 3"):
        frechet_distance(draws(2, 0), y)
    with pytest.raises(ValueError, match="reference: 1 images; allowed: at least 2"):
        frechet_distance(x, draws(1, 0))
    with pytest.raises(ValueError, match="samples are by toy, the reference is by other"):
        frechet_distance(x, Features("other", y.features))
    with pytest.raises(ValueError, match="features are 3 wide, the reference's 4"):
        frechet_distance(x, draws(20, 0, width=4))
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="samples: the features of toy are not finite"):
            frechet_distance(features(x.features * bad), y)
    with pytest.raises(ValueError, match="groups is 1; allowed: at least 2"):
        frechet_distance(x, y, groups=1)


def test_words():
    found = FrechetDistance(2.5, torch.tensor([2.4, 2.6]), 1000)
    assert repr(found) == "FrechetDistance(2.5 ± 0.1, 1,000 samples)"
    assert frechet_label("inception-v3") == "FID (inception-v3)"
    assert frechet_label("digits@12ab") == "FD (digits@12ab)"
