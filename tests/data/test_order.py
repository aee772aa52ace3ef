import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ddpm.data.order import LANES, Order

COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=10).filter(any)
BUFFERS = st.integers(0, 70)
SEEDS = st.integers(0, 2**40)
EPOCHS = st.integers(0, 1000)
GOLDEN = (
    [
        (3, 2),
        (2, 1),
        (2, 4),
        (0, 0),
        (4, 0),
        (4, 2),
        (4, 4),
        (4, 5),
        (3, 1),
        (2, 2),
        (2, 5),
        (0, 1),
        (0, 3),
        (4, 1),
        (4, 3),
        (3, 0),
        (2, 0),
        (2, 3),
        (2, 6),
        (0, 2),
    ],
    [
        (2, 5),
        (4, 1),
        (4, 4),
        (0, 1),
        (3, 0),
        (2, 0),
        (2, 1),
        (2, 3),
        (2, 6),
        (4, 2),
        (4, 5),
        (0, 2),
        (3, 1),
        (3, 2),
        (2, 2),
        (2, 4),
        (4, 0),
        (4, 3),
        (0, 0),
        (0, 3),
    ],
)


def rows_of(order, epoch=0):
    return [order.row(epoch, place) for place in range(order.num_rows)]


def source(counts):
    return [(shard, row) for shard, count in enumerate(counts) for row in range(count)]


@given(COUNTS, BUFFERS, SEEDS, EPOCHS)
def test_every_row_once_per_epoch(counts, buffer, seed, epoch):
    order = Order(counts, buffer, seed)
    assert order.num_rows == sum(counts)
    assert sorted(rows_of(order, epoch)) == source(counts)


@given(COUNTS, SEEDS, EPOCHS)
def test_without_a_buffer_the_order_is_the_sources(counts, seed, epoch):
    assert rows_of(Order(counts, 0, seed), epoch) == source(counts)


@given(COUNTS, BUFFERS, SEEDS, st.randoms(use_true_random=False))
def test_the_order_does_not_depend_on_what_was_asked_before(counts, buffer, seed, random):
    asked = [(epoch, place) for epoch in range(3) for place in range(sum(counts))]
    expected = {(epoch, place): Order(counts, buffer, seed).row(epoch, place) for epoch, place in asked}
    random.shuffle(asked)
    order = Order(counts, buffer, seed)
    assert {key: order.row(*key) for key in asked} == expected


@given(COUNTS, st.integers(1, 70), SEEDS, EPOCHS)
def test_places_go_round_the_lanes(counts, buffer, seed, epoch):
    """Each lane's places, taken in turn, are its blocks in turn; its blocks are a strip of the sequence."""
    order = Order(counts, buffer, seed)
    for lane in range(LANES):
        found = [order.find(place) for place in range(lane, order.num_rows, LANES)]
        size = -(-buffer // LANES)
        assert found == [(lane, index // size, index % size) for index in range(len(found))]
        blocks = [order.block(epoch, lane, block) for block in range(-(-len(found) // size))]
        assert [len(permutation) for _, permutation in blocks] == [
            min(size, len(found) - begin) for begin in range(0, len(found), size)
        ]
        for stretches, permutation in blocks:
            assert sorted(permutation) == list(range(sum(stop - start for _, start, stop in stretches)))


@given(COUNTS, st.integers(1, 70), SEEDS, EPOCHS)
def test_rows_move_by_less_than_their_share_of_the_buffer(counts, buffer, seed, epoch):
    """Against shuffle_buffer 1, whose blocks are single rows: the same lane, less than a block away."""
    plain, order = rows_of(Order(counts, 1, seed), epoch), rows_of(Order(counts, buffer, seed), epoch)
    for lane in range(LANES):
        strip = plain[lane::LANES]
        moved = [strip.index(row) - index for index, row in enumerate(order[lane::LANES])]
        assert max(map(abs, moved), default=0) < -(-buffer // LANES)


@given(COUNTS, SEEDS, EPOCHS)
def test_lanes_are_strips_of_whole_shards_end_to_end(counts, seed, epoch):
    plain = rows_of(Order(counts, 1, seed), epoch)
    strips = [plain[lane::LANES] for lane in range(LANES)]
    assert max(map(len, strips)) - min(map(len, strips)) <= 1
    sequence = list(itertools.chain(*strips))
    start = next(i for i, (_, row) in enumerate(sequence) if row == 0)
    shards = [
        shard for shard, _ in itertools.groupby(sequence[start:] + sequence[:start], lambda row: row[0])
    ]
    assert sorted(shards) == [shard for shard, count in enumerate(counts) if count]
    assert sequence[start:] + sequence[:start] == [(s, row) for s in shards for row in range(counts[s])]


def test_epochs_and_seeds_differ():
    orders = [rows_of(Order([30, 30], 16, seed), epoch) for seed in range(3) for epoch in range(3)]
    assert len(set(map(tuple, orders))) == 9


@pytest.mark.parametrize("buffer", [1, 16])
def test_each_place_is_equally_likely(buffer):
    order, epochs = Order([5, 3, 8], buffer, 0), 600
    hits = np.zeros((16, 16))
    for epoch in range(epochs):
        for place, (shard, row) in enumerate(rows_of(order, epoch)):
            hits[[0, 5, 8][shard] + row, place] += 1
    error = np.sqrt(epochs * 1 / 16 * 15 / 16)
    assert abs(hits - epochs / 16).max() < 5 * error


@pytest.mark.parametrize(
    ("world_size", "lanes"), [(1, 8), (2, 4), (3, 8), (4, 2), (6, 4), (8, 1), (12, 2), (16, 1)]
)
def test_ranks_meet_only_their_lanes(world_size, lanes):
    order = Order([100, 77], 24, 0)
    for rank in range(world_size):
        assert len({order.find(place).lane for place in range(rank, 177, world_size)}) == lanes


def test_golden_order():
    """If this fails, every user's runs have changed their order: say so in the changelog, or undo it."""
    order = Order([4, 0, 7, 3, 6], 16, 7)
    assert rows_of(order, 0) == GOLDEN[0]
    assert rows_of(order, 1) == GOLDEN[1]


def test_a_place_that_an_epoch_does_not_have():
    for place in (-1, 5):
        with pytest.raises(ValueError, match=f"^no place {place} in an epoch; allowed: 0 to 4$"):
            Order([3, 2], 4, 0).find(place)


@settings(max_examples=20)
@given(st.integers(10**9, 10**12), st.integers(0, 10**6), SEEDS)
def test_a_place_is_found_without_those_before_it(count, buffer, seed):
    """A thousand shards of a billion rows: nothing may run over the rows of more than one block."""
    order = Order([count] * 1000, min(buffer, 4000), seed)
    place = order.num_rows * 2 // 3
    shard, row = order.row(12345, place)
    assert 0 <= shard < 1000 and 0 <= row < count
