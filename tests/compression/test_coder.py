"""coder.py: numbers go on a stack and come off again, and take as many bits as their laws say."""

import numpy as np
import pytest
import torch

from hf_ddpm.compression.coder import (
    LARGEST_NUMBER,
    BinnedNormal,
    Categories,
    Exhausted,
    GridNormal,
    Stack,
)
from hf_ddpm.compression.scheme import PixelLaws
from hf_ddpm.decoders import LevelsDecoder
from hf_ddpm.gaussian import discretized_gaussian_log_likelihood


def stack(words=20_000, seed=0):
    return Stack(np.random.default_rng(seed).integers(0, 2**32, words, dtype=np.uint32), sealed=True)


def normal(n, seed=0, std=(0.5, 4.0), parts=16):
    rng = np.random.default_rng(seed)
    std = rng.uniform(*std, n)
    return GridNormal(rng.integers(-(10**6), 10**6, n), parts, std, int(np.ceil(8 * std.max())) + 2)


def masses(law, numbers):
    """The mass of each number's bin, by the law's definition."""
    mean, std = torch.from_numpy(law.mean / law.parts), torch.from_numpy(law.std)
    ends = [torch.special.ndtr((torch.from_numpy(numbers) + side - mean) / std) for side in (-0.5, 0.5)]
    return (ends[1] - ends[0]).numpy()


def test_what_is_pushed_is_popped_and_the_words_are_back():
    one = stack()
    begun, words = one.initial_words(), len(one)
    laws = [normal(1000, seed) for seed in range(3)]
    rng = np.random.default_rng(5)
    pushed = [law.base + np.rint(rng.normal(size=1000) * law.std).astype(int) for law in laws]
    for numbers, law in zip(pushed, laws, strict=True):
        one.push(numbers, law)
    ideal = -sum(np.log2(masses(law, numbers)).sum() for numbers, law in zip(pushed, laws, strict=True))
    assert 32 * (len(one) - words) == pytest.approx(ideal, abs=64 + 0.001 * ideal)
    for numbers, law in zip(pushed[::-1], laws[::-1], strict=True):
        assert np.array_equal(one.pop(law), numbers)
    assert np.array_equal(one.initial_words(), begun)


def test_what_is_drawn_is_undrawn():
    one, law = stack(), normal(2000)
    begun = one.words
    drawn = one.draw(law)
    assert len(one) < len(begun)
    one.undraw(drawn, law)
    assert np.array_equal(one.words, begun)


def test_drawn_numbers_have_their_law():
    law = GridNormal(np.full(100_000, 7), 16, np.full(100_000, 1.5), 14)
    drawn = stack(50_000).draw(law)
    seen = np.bincount(drawn + 20, minlength=41) / 100_000
    wanted = masses(GridNormal(np.full(41, 7), 16, np.full(41, 1.5), 14), np.arange(-20, 21))
    assert (abs(seen - wanted) < 5 * np.sqrt(wanted / 100_000) + 1e-4).all()
    assert abs(drawn - 7 / 16).max() <= 14 + 1


@pytest.mark.parametrize("offset", [0, 33, 34, -34, -33, 35, -35, 1000, -(2**29), 2**29])
def test_a_number_far_from_its_mean_is_escaped(offset):
    one, law = stack(100), GridNormal(np.array([3, 160]), 16, np.array([4.0, 4.0]), 34)
    begun, numbers = one.words, law.base + np.array([offset, 1])
    one.push(numbers, law)
    assert len(one) - len(begun) <= 4
    assert np.array_equal(one.pop(law), numbers)
    assert np.array_equal(one.words, begun)


def test_the_edges_of_the_window_are_drawn_too_and_have_no_escape():
    law = GridNormal(np.zeros(3, int), 1, np.full(3, 2.0), 18)
    one = stack(100)
    one.undraw(np.array([18, -18, 0]), law)
    assert np.array_equal(one.draw(law), [18, -18, 0])


@pytest.mark.parametrize("mean", [-20.0, 3.0, 128.2, 254.0, 275.0])
def test_the_library_does_not_renormalise_the_tails(mean):
    """constriction's documentation says that it does; if it did, this would not be the exact decoder."""
    u, std, times = np.array([0, 1, 51, 128, 204, 254, 255]), 30.0, 5000
    x, at = torch.from_numpy(u / 127.5 - 1), torch.tensor(mean / 127.5 - 1)
    bits = -discretized_gaussian_log_likelihood(x, at, 2 * np.log(std / 127.5)).numpy() / np.log(2)
    law = BinnedNormal(np.full(times, mean), np.full(times, std))
    for level, exact in zip(u, bits, strict=True):
        if exact < 14:  # beyond, that each level has at least 2^-24 is seen
            one = stack(10)
            before = len(one)
            one.push(np.full(times, level), law)
            assert 32 * (len(one) - before) / times == pytest.approx(exact, abs=0.015)


def test_categories_take_as_many_bits_as_they_say():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(256, 0.3), 3000)
    u = np.array([rng.choice(256, p=row) for row in p])
    one = stack()
    before = len(one)
    one.push(u, Categories(p))
    ideal = -np.log2(p[np.arange(3000), u]).sum()
    assert 32 * (len(one) - before) == pytest.approx(ideal, abs=64 + 0.001 * ideal)
    assert np.array_equal(one.pop(Categories(p)), u)


def test_a_level_of_probability_0_can_be_coded():
    p = np.zeros((1, 256))
    p[0, 7] = 1.0
    one = stack(10)
    one.push(np.array([200]), Categories(p))
    assert one.pop(Categories(p))[0] == 200


def test_an_empty_stack_is_no_source_of_numbers():
    law = normal(1000)
    with pytest.raises(Exhausted):
        stack(20).draw(law)
    with pytest.raises(Exhausted):
        stack(20).pop(law)


def test_the_lowest_is_what_was_needed():
    one, law = stack(1000), normal(1000)
    one.lowest = len(one)
    one.undraw(one.draw(law), law)
    needed = len(one) - one.lowest
    again = Stack(one.words[-(needed + 3) :], sealed=False)
    again.draw(law)
    with pytest.raises(Exhausted):
        Stack(one.words[-(needed + 2) :], sealed=False).draw(law)


def test_zeros_at_the_end_of_the_words_are_kept():
    words = np.array([5, 0, 0], np.uint32)
    assert np.array_equal(Stack(words, sealed=True).initial_words(), words)
    with pytest.raises(ValueError, match="these are no words of a stack"):
        Stack(words, sealed=False)


def test_a_stack_that_holds_more_does_not_end():
    one = stack(100)
    one.push(np.array([3] * 50), Categories(np.full((50, 256), 1 / 256)))
    with pytest.raises(ValueError, match="does not end at its initial words"):
        one.initial_words()


@pytest.mark.parametrize(
    "make",
    [
        lambda: GridNormal(np.array([2 * LARGEST_NUMBER]), 1, np.array([1.0]), 10),
        lambda: GridNormal(np.array([0]), 1, np.array([1e9]), 2**33),
        lambda: stack(10).push(np.array([LARGEST_NUMBER + 1]), normal(1)),
    ],
    ids=["mean", "std", "number"],
)
def test_numbers_that_are_too_large_are_refused(make):
    with pytest.raises(ValueError, match="allowed"):
        make()


def test_the_law_of_a_place_is_that_of_the_decoder():
    decoder = LevelsDecoder(torch.randn(3, 256, dtype=torch.float64), torch.tensor(-4.0))
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    x = x.clamp(-1, 1)
    law = PixelLaws(decoder, np.ones(1)).at(x.numpy(), np.zeros(x.shape, int))
    exact = decoder.log_probabilities(x).exp().reshape(-1, 256).numpy()
    assert law.probabilities.sum(1) == pytest.approx(np.ones(120))
    # σ = e^−4 is 2.3 levels, of which x̂_0 is at most 1/128 off
    assert abs(law.probabilities - exact).max() < 0.005
    at_ends = (x.abs() == 1).flatten().numpy()
    assert at_ends.sum() > 5 and abs(law.probabilities - exact)[at_ends].max() < 1e-12


def test_without_the_package_one_line_says_what_installs_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "constriction", None)
    with pytest.raises(ValueError, match=r"pip install 'hf_ddpm\[codec\]'"):
        stack(3)
