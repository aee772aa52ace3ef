"""The order of images: which row of the source stands at place q of epoch e. It knows integers only.

The source's rows are numbered end to end. Groups are stretches of rows that can be read from their beginning
alone, such as the row groups of parquet files.

    all rows fit in the window:   place q is row π(q), with one permutation π of all rows

    otherwise:   groups, cut into units ─► units in an order that takes each next one from another
                 part of the source ─► cut into windows of rows ─► each window dealt out to 8 lanes
                 place q of a window  =  lane q mod 8, index q div 8 in it; inside a lane, rows are permuted

The order is a pure function of (rows of the groups, rows of a window, seed, epoch): the same for any number
of processes, and any place of it is found without those before it, so that resuming is a seek. Each epoch has
each row once. A permutation of rows is computed where it is asked for (`permuted`), so that the order of a
billion rows takes no memory; of the units, two numbers each are kept for an epoch.

Whoever reads all places of the order holds a window of rows. A process that takes every W-th place needs only
the lanes that these places lie in, which are 8 / gcd(8, W) of the 8: all if W is odd, one if 8 divides W.

A window takes its units from all over the source, about one from each of as many equal parts. So where the
source is sorted by class, a window has the classes in their right proportions as far as its number of units
allows. Whoever reads a window passes over each group once, up to the last unit that he takes of it. If an
epoch has more than 8 windows, a group is therefore cut no finer than in 8, which costs reading half of it for
each unit; if it has fewer, each window may read all.

With a window of 0 rows nothing is permuted: the order is the source's, each epoch.

Changing anything here changes the order of every run: a golden test guards it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hf_ddpm.seeds import Use

LANES = 8

# A position in a batch where there is no image
EMPTY = -1

# Rows that are read at once when nothing is permuted; the order does not depend on it
_PLAIN_WINDOW = 64
# Units of a window that are enough to mix it, and into how many a group may be cut to come near that, if an
# epoch has more than so many windows
_UNITS, _PARTS, _FEW = 512, 8, 8
# With fewer than twelve rounds, counting finds a bias in permutations of five or six things
_ROUNDS = 12


class Place(NamedTuple):
    """Where a place lies: its window, its lane in that, and the index in the lane's part of the window."""

    window: int
    lane: int
    offset: int


class Stretch(NamedTuple):
    """Rows `start` to `stop` - 1 of the source, inside one group."""

    start: int
    stop: int


class Order:
    """The order of every epoch.

    Args:
        groups: rows of each group of the source, in the source's order; some may be 0.
        window: 0 for the source's order, else how many rows are permuted among themselves at most.
        seed: of the order, at least 0.
        cut: whether groups may be cut into units; not where passing over rows costs as much as reading them.

    Attributes:
        num_rows: rows, and so places, of an epoch.
        shuffled: whether anything is permuted.
        whole: whether all rows are permuted among themselves.
        lanes: 8, or 1 where nothing or everything is permuted.
        units: from how many places of the source the rows of a window come, about.
    """

    def __init__(self, groups: Sequence[int], window: int, seed: int, cut: bool = True):
        rows = np.array([count for count in groups if count], dtype=np.int64)
        self.num_rows, self._seed = int(rows.sum()), seed
        self.shuffled, self.whole = window > 0, window >= self.num_rows
        self.lanes = LANES if self.shuffled and not self.whole else 1
        # A multiple of the lanes, so that a place's lane is the same in each window
        self._window = max(LANES, window // LANES * LANES) if self.lanes > 1 else max(1, self.num_rows)
        if not self.shuffled:
            self._window = _PLAIN_WINDOW
        cuts = np.ones_like(rows)
        if self.lanes > 1 and cut:
            most = rows if self.num_rows <= _FEW * self._window else np.minimum(rows, _PARTS)
            cuts = np.clip(-(-rows * _UNITS // self._window), 1, most)
        # Unit k of a group of r rows that is cut in n begins at row k r div n
        within = np.arange(cuts.sum()) - np.repeat(np.cumsum(cuts) - cuts, cuts)
        first, r, n = (np.repeat(x, cuts) for x in (np.cumsum(rows) - rows, rows, cuts))
        self._starts = first + within * r // n
        self._sizes = first + (within + 1) * r // n - self._starts
        self.units = len(rows) if not len(rows) else len(first) * min(1.0, self._window / self.num_rows)
        # The last epoch's units in their order and where each ends, drawn once for its many windows
        self._drawn: tuple[int, np.ndarray, np.ndarray] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of a window, and units: orders of the same groups and seed that agree in them are the same."""
        return self._window, len(self._starts)

    def find(self, place: int) -> Place:
        """Where a place lies, which is the same in each epoch.

        Args:
            place: 0 to `num_rows` − 1.

        Raises:
            ValueError: there is no such place.
        """
        if not 0 <= place < self.num_rows:
            raise ValueError(f"no place {place} in an epoch; allowed: 0 to {self.num_rows - 1}")
        window, within = divmod(place, self._window)
        index, lane = divmod(within, self.lanes)
        return Place(window, lane, index)

    def part(self, epoch: int, window: int, lane: int) -> tuple[list[Stretch], np.ndarray]:
        """A lane's part of a window.

        Args:
            epoch: zero-based.
            window: zero-based.
            lane: 0 to `lanes` − 1.

        Returns:
            Its rows as stretches, ascending, and the order in which they are taken, int64: the row at index i
            is the `order[i]`-th of the stretches' rows.
        """
        begin = window * self._window
        whole, longer = divmod(min(self._window, self.num_rows - begin), self.lanes)
        # The first lanes have one row more
        begin += lane * whole + min(lane, longer)
        size = whole + (lane < longer)
        order = np.arange(size)
        if self.shuffled:
            order = permuted(order, size, (Use.ROWS, self._seed, epoch, window, lane))
        return self._stretches(epoch, begin, begin + size), order

    def places(self, window: int, lane: int) -> np.ndarray:
        """The places of a lane's part of a window, ascending, int64."""
        begin = window * self._window
        return np.arange(begin + lane, min(begin + self._window, self.num_rows), self.lanes)

    def rows(self, epoch: int, first: int, last: int) -> np.ndarray:
        """The rows at places `first` to `last` − 1 where nothing or everything is permuted, int64.

        Raises:
            ValueError: rows are permuted in windows.
        """
        if self.lanes > 1:
            raise ValueError("rows are permuted in windows; allowed: `part`")
        places = np.arange(first, last)
        if not self.shuffled:
            return places
        return permuted(places, self.num_rows, (Use.ROWS, self._seed, epoch, 0, 0))

    def row(self, epoch: int, place: int) -> int:
        """The row at a place."""
        window, lane, index = self.find(place)
        stretches, order = self.part(epoch, window, lane)
        left = int(order[index])
        for start, stop in stretches:
            if left < stop - start:
                return start + left
            left -= stop - start
        raise AssertionError("a part's order has the rows of its stretches")

    def _stretches(self, epoch: int, begin: int, end: int) -> list[Stretch]:
        """Rows `begin` to `end` − 1 of the epoch's units end to end."""
        if self._drawn is None or self._drawn[0] != epoch:
            units = self._draw(epoch) if self.lanes > 1 else np.arange(len(self._sizes))
            self._drawn = epoch, units, np.cumsum(self._sizes[units])
        _, units, ends = self._drawn
        met = slice(np.searchsorted(ends, begin, side="right"), np.searchsorted(ends, end) + 1)
        ends, starts, sizes = ends[met], self._starts[units[met]], self._sizes[units[met]]
        stops = starts + sizes - np.maximum(ends - end, 0)
        starts = starts + np.maximum(begin - (ends - sizes), 0)
        return sorted(map(Stretch, starts.tolist(), stops.tolist()))

    def _draw(self, epoch: int) -> np.ndarray:
        """The order of an epoch's units.

        As many neighbours as there are windows are a stratum. A stratum's units are permuted and spread
        evenly over the epoch, so that each window meets one of them.
        """
        rng, count = np.random.default_rng([Use.SHARDS, self._seed, epoch]), len(self._sizes)
        windows = math.ceil(self.num_rows / self._window)
        stratum = (np.arange(count) + rng.integers(windows)) // windows
        rank_key, within = rng.random((2, count))
        sizes = np.bincount(stratum)
        rank = np.empty(count)
        rank[np.lexsort((rank_key, stratum))] = np.arange(count) - (np.cumsum(sizes) - sizes)[stratum]
        return np.argsort((rank + within) / sizes[stratum])


def permuted(indices: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """π(i) for each index i, of a permutation π of 0..size − 1 that the key chooses.

    A Feistel network on pairs (l, r) of Z_a × Z_b, a b >= size, whose rounds add a hash of one to the other
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). An answer past the end is put in again
    until it is none, which is the cycle walk. Nothing is stored, and any index costs the same.

    Args:
        indices: each 0 to size − 1, int64.
        size: how many things are permuted, up to 2^62.
        key: whole numbers ≥ 0.

    Returns:
        Shape of `indices`, int64.
    """
    a = math.isqrt(max(size - 1, 0)) + 1
    b = -(-size // a) or 1
    keys, found = _round_keys(key), indices.astype(np.uint64)
    walking = np.arange(len(found))
    while len(walking):
        left, right = np.divmod(found[walking], np.uint64(b))
        for i in range(0, _ROUNDS, 2):
            left = (left + hashed(right + keys[i]) % np.uint64(a)) % np.uint64(a)
            right = (right + hashed(left + keys[i + 1]) % np.uint64(b)) % np.uint64(b)
        found[walking] = left * np.uint64(b) + right
        walking = walking[found[walking] >= size]
    return found.astype(np.int64)


@functools.lru_cache(maxsize=64)
def _round_keys(key: tuple[int, ...]) -> np.ndarray:
    # One array for each round, as numpy warns of a scalar's overflow, which is meant here
    return np.random.SeedSequence(list(key)).generate_state(_ROUNDS, np.uint64)[:, None]


def hashed(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014), uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
