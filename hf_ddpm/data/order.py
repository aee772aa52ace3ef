"""The order of images: which row of which shard stands at place q of epoch e. It knows integers only.

    shards, permuted, end to end ─► rotated by a random offset ─► cut into 8 strips, the lanes
    place q  =  lane q mod 8, index q div 8 in it;  inside a lane, blocks of rows are permuted

The order is a pure function of (row counts of the shards, shuffle_buffer, seed, epoch): the same for any
number of processes, and any place of it is found without those before it, so that resuming is a seek. Each
epoch has each row once. A batch mixes 8 distant parts of the data, and whoever reads the order holds one
block of each lane, in all about `shuffle_buffer` rows. A process that takes every W-th place needs only the
lanes that these places lie in, which are 8 / gcd(8, W) of the 8: all if W is odd, one if 8 divides W.

With shuffle_buffer 0 there is one lane and nothing is permuted: the order is the source's, each epoch.

Changing anything here changes the order of every run: a golden test guards it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hf_ddpm.seeds import Use

LANES = 8

# A position in a batch where there is no image
EMPTY = -1

# Rows of a block when nothing is permuted; the order does not depend on it
_PLAIN_BLOCK = 64


class Place(NamedTuple):
    """Where a place lies: its lane, the block of that lane, and the index in that block."""

    lane: int
    block: int
    offset: int


class Stretch(NamedTuple):
    """Rows `start` to `stop` - 1 of a shard."""

    shard: int
    start: int
    stop: int


class _Sequence(NamedTuple):
    """An epoch's shards in their order, where each ends when they lie end to end, and the rotation."""

    shards: np.ndarray
    ends: np.ndarray
    offset: int


class Order:
    """The order of every epoch.

    Args:
        counts: rows of each shard; some may be 0.
        shuffle_buffer: 0 for the source's order, else about how many rows are permuted among themselves.
        seed: of the order, at least 0.

    Attributes:
        num_rows: rows, and so places, of an epoch.
        lanes: 8, or 1 without shuffling.
    """

    def __init__(self, counts: Sequence[int], shuffle_buffer: int, seed: int):
        self._counts = np.array(counts, dtype=np.int64)
        self._seed, self._shuffled = seed, shuffle_buffer > 0
        self.num_rows = int(self._counts.sum())
        self.lanes = LANES if self._shuffled else 1
        self._block = -(-shuffle_buffer // LANES) or _PLAIN_BLOCK
        # The last epoch's shards, drawn once for its many blocks
        self._drawn: tuple[int, _Sequence] | None = None

    def find(self, place: int) -> Place:
        """Where a place lies, which is the same in each epoch.

        Args:
            place: 0 to `num_rows` − 1.

        Raises:
            ValueError: there is no such place.
        """
        if not 0 <= place < self.num_rows:
            raise ValueError(f"no place {place} in an epoch; allowed: 0 to {self.num_rows - 1}")
        index, lane = divmod(place, self.lanes)
        return Place(lane, *divmod(index, self._block))

    def block(self, epoch: int, lane: int, block: int) -> tuple[list[Stretch], np.ndarray]:
        """A block of a lane.

        Args:
            epoch: zero-based.
            lane: 0 to `lanes` − 1.
            block: zero-based, in that lane.

        Returns:
            Its rows as stretches of shards, end to end, and the order in which they are taken: the row at
            index i of the block's order is the `permutation[i]`-th of the stretches' rows.
        """
        whole, longer = divmod(self.num_rows, self.lanes)
        # The first lanes have one row more
        begin = lane * whole + min(lane, longer)
        end = begin + whole + (lane < longer)
        begin = begin + block * self._block
        length = min(self._block, end - begin)
        permutation = np.arange(length)
        if self._shuffled and length > 1:
            np.random.default_rng([Use.ROWS, self._seed, epoch, lane, block]).shuffle(permutation)
        return self._stretches(epoch, begin, begin + length), permutation

    def row(self, epoch: int, place: int) -> tuple[int, int]:
        """The shard and the number in it of the row at a place."""
        lane, block, index = self.find(place)
        stretches, permutation = self.block(epoch, lane, block)
        rows = [(shard, row) for shard, start, stop in stretches for row in range(start, stop)]
        return rows[permutation[index]]

    def _stretches(self, epoch: int, begin: int, end: int) -> list[Stretch]:
        """Rows `begin` to `end` − 1 of the rotated sequence."""
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = epoch, self._draw(epoch)
        shards, ends, offset = self._drawn[1]
        found = []
        at, left = (begin + offset) % self.num_rows, end - begin
        while left:
            # From the right, which passes over empty shards
            k = int(np.searchsorted(ends, at, side="right"))
            start = at - int(ends[k] - self._counts[shards[k]])
            taken = min(left, int(ends[k]) - at)
            found.append(Stretch(int(shards[k]), start, start + taken))
            at, left = (at + taken) % self.num_rows, left - taken
        return found

    def _draw(self, epoch: int) -> _Sequence:
        shards, offset = np.arange(len(self._counts)), 0
        if self._shuffled:
            rng = np.random.default_rng([Use.SHARDS, self._seed, epoch])
            rng.shuffle(shards)
            offset = int(rng.integers(self.num_rows))
        return _Sequence(shards, np.cumsum(self._counts[shards]), offset)
