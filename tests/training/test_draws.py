"""draws.py: t and ε of an image depend on (seed, its position) alone, and are what they should be."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ddpm.data.order import EMPTY
from hf_ddpm.training.draws import draw_noise, draw_uniform
from hf_ddpm.training.importance import UniformSteps

CPU = torch.device("cpu")
SHAPE = (1, 4, 5)
positions = st.lists(st.integers(0, 2**40) | st.integers(0, 3000), min_size=1, max_size=6)


def draw_t(seed, where, num_steps):
    return UniformSteps(num_steps).draw(draw_uniform(seed, where))


def noise_of(seed, where, shape=SHAPE):
    return draw_noise(seed, where, shape, CPU)


@pytest.mark.parametrize("num_steps", [2, 7, 1000])
def test_t_is_uniform(num_steps):
    n = 40_000
    t = draw_t(3, range(n), num_steps)
    assert t.dtype == torch.int64 and t.min() == 0 and t.max() == num_steps - 1
    seen, expected = np.bincount(t.numpy(), minlength=num_steps), n / num_steps
    statistic = ((seen - expected) ** 2 / expected).sum()
    freedom = num_steps - 1
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)  # mean and variance of chi²


def test_noise_is_standard_normal():
    x = noise_of(1, range(4000), (3, 4, 4)).double()
    assert x.dtype == torch.float64 and noise_of(1, [0]).dtype == torch.float32
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):  # E x^k, Var x^k of N(0, 1)
        assert abs(x.pow(power).mean() - mean) < 5 * (variance / x.numel()) ** 0.5


def test_noise_of_one_image_is_independent_of_the_others():
    x = noise_of(1, range(3000), (16,)).double()
    error = 1 / len(x) ** 0.5
    assert (x[1:] * x[:-1]).mean(0).abs().max() < 5 * error  # from position to position
    assert (x[1:] * x[1:].roll(1, 1)).mean(0).abs().max() < 5 * error  # inside an image
    t = draw_t(1, range(3000), 1000)
    assert abs(np.corrcoef(t.numpy(), x[:, 0].numpy())[0, 1]) < 5 * error


@settings(max_examples=30)
@given(st.integers(0, 2**63 - 1), positions, st.randoms())
def test_the_grouping_changes_nothing(seed, where, random):
    t, noise = draw_t(seed, where, 1000), noise_of(seed, where)
    assert torch.equal(t, torch.cat([draw_t(seed, [p], 1000) for p in where]))
    assert torch.equal(noise, torch.cat([noise_of(seed, [p]) for p in where]))
    order = list(range(len(where)))
    random.shuffle(order)
    assert torch.equal(t[order], draw_t(seed, [where[i] for i in order], 1000))
    assert torch.equal(noise[order], noise_of(seed, [where[i] for i in order]))


def test_nothing_else_moves_the_draws():
    before = draw_t(0, [5], 1000), noise_of(0, [5])
    torch.manual_seed(9)
    np.random.seed(9)  # noqa: NPY002  the global generator is the point
    state = torch.get_rng_state()
    assert torch.equal(before[0], draw_t(0, [5], 1000)) and torch.equal(before[1], noise_of(0, [5]))
    assert torch.equal(state, torch.get_rng_state())  # nor do they move others


def test_positions_and_seeds_differ():
    where = [0, 1, 2, 1023, 1024, 1025, 2048, 10**9]
    images = [noise_of(seed, [p]).numpy().tobytes() for seed in (0, 1, 2**62) for p in where]
    assert len(set(images)) == len(images)
    t = torch.stack([draw_t(seed, range(64), 10**6) for seed in (0, 1, 2**62)])
    assert len(t.unique()) == t.numel()


def test_large_seeds_are_no_blocks_of_small_ones():
    """NumPy splits whole numbers into words of 32 bits, and joins the words of all numbers of a key."""
    for low in (0, 5):
        for block in (0, 1, 2):
            theirs = draw_t(low, range(1024 * block, 1024 * block + 8), 10**6)
            for high in (1, 2):
                assert not torch.equal(draw_t(low + (high << 32), range(8), 10**6), theirs)


def test_the_shape_is_the_images():
    assert noise_of(0, [1, 2, 3], (3, 2, 7)).shape == (3, 3, 2, 7)
    assert noise_of(0, [], (3, 2, 7)).shape == (0, 3, 2, 7) and draw_t(0, [], 5).shape == (0,)


def test_an_empty_slot_has_usable_draws():
    t, noise = draw_t(0, [EMPTY, 7, EMPTY], 1000), noise_of(0, [EMPTY, 7, EMPTY])
    assert 0 <= t.min() and t.max() < 1000 and noise.isfinite().all()
    assert t[1] == draw_t(0, [7], 1000)[0] and torch.equal(noise[1], noise_of(0, [7])[0])


def test_one_step():
    assert draw_t(0, range(50), 1).tolist() == [0] * 50


def test_golden():
    """Every user's run draws these: a change is a line "numbers change" in CHANGELOG.md."""
    assert draw_t(0, [0, 1, 1023, 1024, 123_456_789], 1000).tolist() == GOLDEN_T
    assert draw_t(2**40 + 7, [0, 1], 1000).tolist() == GOLDEN_T_LARGE_SEED
    noise = noise_of(0, [0, 1024], (1, 4, 4)).flatten(1)[:, :3]
    torch.testing.assert_close(noise, torch.tensor(GOLDEN_NOISE), rtol=1e-6, atol=1e-6)


GOLDEN_T = [538, 343, 644, 337, 961]
GOLDEN_T_LARGE_SEED = [463, 829]
GOLDEN_NOISE = [[1.4539217, -1.6062058, 0.8044840], [-1.6730140, 1.5062892, -0.3879748]]
