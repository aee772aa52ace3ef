import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ddpm.data.order import LANES, Order, permuted

GROUPS = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any)
WINDOWS = st.integers(0, 500)
SEEDS = st.integers(0, 2**40)
EPOCHS = st.integers(0, 1000)


def rows_of(order, epoch=0):
    """The rows at all places, read part by part as a reader would."""
    found = np.full(order.num_rows, -1)
    window = 0
    while (order.places(window, 0)).size:
        for lane in range(order.lanes):
            stretches, inside = order.part(epoch, window, lane)
            rows = [row for start, stop in stretches for row in range(start, stop)]
            if rows:
                found[order.places(window, lane)] = np.array(rows)[inside]
        window += 1
    return found.tolist()


@given(GROUPS, WINDOWS, SEEDS, EPOCHS)
def test_every_row_once_per_epoch(groups, window, seed, epoch):
    order = Order(groups, window, seed)
    assert order.num_rows == sum(groups)
    assert sorted(rows_of(order, epoch)) == list(range(sum(groups)))


@given(GROUPS, SEEDS, EPOCHS)
def test_without_a_window_the_order_is_the_sources(groups, seed, epoch):
    order = Order(groups, 0, seed)
    assert rows_of(order, epoch) == order.rows(epoch, 0, sum(groups)).tolist() == list(range(sum(groups)))
    assert not order.shuffled and order.lanes == 1


@settings(deadline=None)
@given(GROUPS, WINDOWS, SEEDS, st.randoms(use_true_random=False))
def test_the_order_does_not_depend_on_what_was_asked_before(groups, window, seed, random):
    asked = [(epoch, place) for epoch in range(2) for place in range(0, sum(groups), 7)]
    expected = {(epoch, place): Order(groups, window, seed).row(epoch, place) for epoch, place in asked}
    random.shuffle(asked)
    order = Order(groups, window, seed)
    assert {key: order.row(*key) for key in asked} == expected
    for epoch in range(2):
        rows = rows_of(order, epoch)
        assert all(rows[place] == row for (e, place), row in expected.items() if e == epoch)


@given(GROUPS, WINDOWS, SEEDS, EPOCHS)
def test_stretches_ascend_and_lie_in_one_group_each(groups, window, seed, epoch):
    """So that a window is one pass over the files."""
    order, ends = Order(groups, window, seed), np.cumsum(groups)
    for place in range(0, sum(groups), 11):
        number, lane, offset = order.find(place)
        assert order.places(number, lane)[offset] == place
        stretches, inside = order.part(epoch, number, lane)
        flat = [edge for stretch in stretches for edge in stretch]
        assert flat == sorted(flat) and all(start < stop for start, stop in stretches)
        for start, stop in stretches:
            assert np.searchsorted(ends, start, "right") == np.searchsorted(ends, stop - 1, "right")
        size = sum(stop - start for start, stop in stretches)
        assert sorted(inside) == list(range(size))
        if order.lanes > 1:
            assert size <= -(-max(window, LANES) // LANES)  # what a lane holds of the window


@given(st.integers(1, 300), SEEDS, EPOCHS)
def test_what_fits_is_permuted_as_a_whole_and_groups_don_t_matter(count, seed, epoch):
    whole = Order([count], count, seed)
    assert whole.whole and whole.lanes == 1
    assert rows_of(whole, epoch) == whole.rows(epoch, 0, count).tolist()
    assert rows_of(Order([1] * count, count + 99, seed), epoch) == rows_of(whole, epoch)


def test_windows_have_no_order_of_places_alone():
    with pytest.raises(ValueError, match=r"^rows are permuted in windows; allowed: `part`$"):
        Order([20], 10, 0).rows(0, 0, 5)


@pytest.mark.parametrize("window", [12, 60, 1000])
def test_epochs_and_seeds_differ(window):
    orders = [rows_of(Order([30, 30], window, seed), epoch) for seed in range(3) for epoch in range(3)]
    assert len(set(map(tuple, orders))) == 9


@pytest.mark.parametrize("window", [8, 12, 16])
def test_each_place_is_equally_likely(window):
    order, epochs = Order([4, 4, 4, 4], window, 0), 600
    hits = np.zeros((16, 16))
    for epoch in range(epochs):
        hits[rows_of(order, epoch), np.arange(16)] += 1
    error = np.sqrt(epochs * 1 / 16 * 15 / 16)
    assert abs(hits - epochs / 16).max() < 5 * error


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000, 4099])
def test_permuted_is_a_permutation(size):
    found = permuted(np.arange(size), size, (1, 2, 3))
    assert sorted(found.tolist()) == list(range(size)) and found.dtype == np.int64
    some = np.random.default_rng(0).integers(0, size, 9)
    assert permuted(some, size, (1, 2, 3)).tolist() == found[some].tolist()


def test_permutations_of_four_are_equally_likely():
    """Every one of the 24, and so each pair of neighbours."""
    found = [tuple(permuted(np.arange(4), 4, (key,)).tolist()) for key in range(1, 2401)]
    counts = np.array([found.count(one) for one in itertools.permutations(range(4))])
    assert abs(counts - 100).max() < 5 * np.sqrt(100 * 23 / 24)


@pytest.mark.parametrize(
    ("world_size", "lanes"), [(1, 8), (2, 4), (3, 8), (4, 2), (6, 4), (8, 1), (12, 2), (16, 1)]
)
def test_ranks_meet_only_their_lanes(world_size, lanes):
    order = Order([100, 77], 50, 0)
    for rank in range(world_size):
        assert len({order.find(place).lane for place in range(rank, 177, world_size)}) == lanes


def test_golden_order():
    """If this fails, every user's runs have changed their order: say so in the changelog, or undo it."""
    assert rows_of(Order([12], 12, 7), 1) == GOLDEN_WHOLE
    assert rows_of(Order([4, 0, 7, 3, 16], 16, 7), 1) == GOLDEN_WINDOWS


GOLDEN_WHOLE = [11, 5, 7, 6, 2, 3, 10, 0, 4, 9, 1, 8]
GOLDEN_WINDOWS = [
    *(2, 26, 8, 10, 3, 12, 28, 29, 13, 5, 15, 19, 21, 17, 23, 0),
    *(16, 1, 6, 9, 20, 22, 7, 14, 4, 25, 27, 11, 24, 18),
]


def test_a_place_that_an_epoch_does_not_have():
    for place in (-1, 5):
        with pytest.raises(ValueError, match=f"^no place {place} in an epoch; allowed: 0 to 4$"):
            Order([3, 2], 4, 0).find(place)


@settings(max_examples=20)
@given(st.integers(10**9, 10**12), st.integers(8, 10**5), SEEDS)
def test_a_place_is_found_without_those_before_it(count, window, seed):
    """A thousand groups of a billion rows: nothing may run over the rows of more than one window."""
    order = Order([count] * 1000, window, seed)
    place = order.num_rows * 2 // 3
    assert 0 <= order.row(12345, place) < order.num_rows
    whole = Order([count] * 1000, count * 1000, seed)
    assert 0 <= whole.rows(12345, place, place + 1)[0] < order.num_rows


# How well it mixes: a source sorted by class, and the classes of each batch


def chi2(rows, classes, batch):
    """Each batch's chi-square of class counts over its expectation, as a permutation has 1."""
    total = len(rows)
    labels = np.array(rows) * classes // total
    batches = labels[: total // batch * batch].reshape(-1, batch)
    counts = np.stack([(batches == c).sum(1) for c in range(classes)], axis=1)
    expected = batch / classes
    # Drawn without replacement, a class's count varies by so much less
    scale = (classes - 1) * (total - batch) / (total - 1)
    return ((counts - expected) ** 2 / expected).sum(1) / scale, counts - expected


@pytest.mark.parametrize("batch", [64, 256])
@pytest.mark.parametrize("classes", [10, 100, 1000])
def test_a_sorted_folder_is_mixed_as_by_a_permutation(classes, batch):
    values, counts = chi2(rows_of(Order([20_000], 20_000, 3)), classes, batch)
    assert 0.8 < values.mean() < 1.2
    # What is missing in a batch is not missing in the next
    error = 5 / np.sqrt(counts[1:].size)
    assert abs((counts[1:] * counts[:-1]).mean() / (counts**2).mean()) < error + batch / 20_000


@pytest.mark.parametrize("groups", [[100] * 200, [1000] * 20, [20_000]])
def test_a_sorted_parquet_is_mixed_from_all_over(groups):
    """A window of a quarter of the rows, in row groups of 100, of 1000, and of all rows."""
    values, counts = chi2(rows_of(Order(groups, 5000, 3)), 10, 64)
    assert 0.8 < values.mean() < 1.2
    assert abs((counts[1:] * counts[:-1]).mean() / (counts**2).mean()) < 0.1
