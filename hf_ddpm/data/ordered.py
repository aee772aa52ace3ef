"""Rows in an order: which are read together, what is held of them in memory, and what is left open.

A row of a folder of images is a file, which is read when it is asked for, in any order. Rows of parquet files
and of streams come in groups that can only be read from their beginning. So a window of the order is read in
one pass over the files, and held as Arrow arrays, which are as large as the encoded images.

This file doesn't know pixels, crops, or which places anyone wants.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import logging
import math
import weakref
from collections.abc import Callable, Generator
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from hf_ddpm.data.files import shown
from hf_ddpm.data.order import Order, Stretch
from hf_ddpm.data.shards import Row, Shards

logger = logging.getLogger(__name__)

Wanted = Callable[[np.ndarray], np.ndarray]  # see `OrderedRows`

# Places of the source that a window should have rows from
_FEW_UNITS = 16
# Places of an order without windows that are looked up together, as one alone costs as much
_PLACES_PER_LOOK = 1024
# How much larger rows may be in memory than the footers of their groups say, and what is always allowed
_MOST_REPEATED, _ALLOWED_BYTES = 2, 256 << 20


def make_order(shards: Shards, memory: float, seed: int) -> Order:
    """The order of the rows of some shards.

    Args:
        shards: where the rows are.
        memory: MB (2^20 bytes) that the undecoded rows of a window may take; 0 for the source's order.
        seed: of the order, at least 0.
    """
    groups, num_bytes = shards.layout.groups, shards.layout.num_bytes
    rows = sum(groups)
    window = int(memory * 2**20 * rows / max(num_bytes, 1)) or int(memory > 0)
    if shards.addressable and memory:
        window = rows
    order = Order(groups, window, seed, cut=shards.local and not shards.passes_over)
    if order.lanes > 1 and order.units < _FEW_UNITS:
        logger.warning(
            "shuffle_memory (%g MB) holds rows from about %d places of %s at once, as they are stored in "
            "pieces of %.3g MB: what is sorted by class stays so in part; save it as local parquet files of "
            "smaller row groups, or raise shuffle_memory to %d",
            *(memory, max(1, round(order.units)), shards, num_bytes / 2**20 / len(groups)),
            math.ceil(num_bytes / 2**20),
        )
    return order


class OrderedRows:
    """The rows at places of an order, a context that closes its file at its end.

    Ascending places are read in one pass over each window; any other place costs a seek.

    Args:
        shards: where the rows are.
        order: which row is at which place.
        wanted: which positions of the run, epoch · rows + place, are going to be asked for, (n,) int64 → (n,)
            bool; the rows at others are read, but not held. None: all of them.
    """

    def __init__(self, shards: Shards, order: Order, wanted: Wanted | None = None):
        self._shards, self._order, self._wanted = shards, order, wanted
        self._reader = _Reader(shards)
        # A generator may still be open when the interpreter exits: this closes its file before modules go.
        self._close = weakref.finalize(self, self._reader.close)
        self._window: _Window | None = None
        self._looked: tuple[tuple[int, int], list[int]] = (-1, -1), []

    def row(self, epoch: int, place: int) -> Row:
        """The row at a place of an epoch.

        Raises:
            ValueError: no such place, one that isn't `wanted`, a shard that can't be read, or one that ends
                before its count of rows.
        """
        if self._shards.addressable:
            return self._shards.image_file(self._look_up(epoch, place))
        window = self._order.find(place).window
        if self._window is None or self._window.key != (epoch, window):
            # The old window goes before the new one comes, so that one is held and not two
            self._window = None
            self._window = self._read(epoch, window)
        return self._window.row(place)

    def _read(self, epoch: int, window: int) -> _Window:
        """The wanted rows of a window, in one pass over the source."""
        order = self._order
        met: list[Stretch] = []
        places: list[np.ndarray] = []
        rows: list[np.ndarray] = []
        for lane in range(order.lanes):
            at = order.places(window, lane)
            wanted = np.ones(len(at), np.bool_)
            if self._wanted is not None:
                wanted = self._wanted(epoch * order.num_rows + at)
            if wanted.any():
                stretches, inside = order.part(epoch, window, lane)
                met += stretches
                places.append(at[wanted])
                rows.append(np.concatenate([np.arange(*s) for s in stretches])[inside[wanted]])
        held = np.sort(np.concatenate(rows)) if rows else np.empty(0, np.int64)
        begin = int(order.places(window, 0)[0])
        index = np.full(sum(len(order.places(window, lane)) for lane in range(order.lanes)), -1)
        for at, row in zip(places, rows, strict=True):
            index[at - begin] = np.searchsorted(held, row)
        return _Window((epoch, window), begin, index, self._take(sorted(met), held))

    def _take(self, stretches: list[Stretch], held: np.ndarray) -> list[_Run]:
        """Those rows of some stretches that are among `held` (ascending), unless they fill the memory.

        Parquet stores a value that is repeated once, so that rows may take far more than their file.
        """
        sizes, ends = self._shards.layout.sizes, np.cumsum(self._shards.layout.groups)
        groups = set(np.searchsorted(ends, [stretch.start for stretch in stretches], side="right").tolist())
        allowed = _ALLOWED_BYTES + _MOST_REPEATED * sum(sizes[group] for group in groups)
        runs: list[_Run] = []
        taken = 0
        for stretch in stretches:
            for run in self._reader.take(stretch.start, stretch.stop, held):
                runs.append(run)
                taken += run.values.nbytes
                if taken > allowed and not self._shards.passes_over:
                    raise ValueError(
                        f"{shown(self._shards.names[run.shard])} repeats rows, which take more than "
                        f"{allowed >> 20:,} MB in memory: lower shuffle_memory or save it with no dictionary"
                    )
        return runs

    def _look_up(self, epoch: int, place: int) -> int:
        block, index = divmod(place, _PLACES_PER_LOOK)
        if self._looked[0] != (epoch, block):
            first = place - index
            last = min(first + _PLACES_PER_LOOK, self._order.num_rows)
            self._looked = (epoch, block), self._order.rows(epoch, first, last).tolist()
        return self._looked[1][index]

    def __enter__(self) -> OrderedRows:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()


class _Run(NamedTuple):
    """Some rows of a shard, by their numbers in it, ascending."""

    shard: int
    numbers: np.ndarray
    values: pa.Array


class _Window:
    """A window's rows in memory.

    Args:
        key: epoch and window.
        begin: its first place.
        index: of each of its places, the number of its row in `runs`, end to end; -1 if it is not held.
        runs: the rows that are held.
    """

    def __init__(self, key: tuple[int, int], begin: int, index: np.ndarray, runs: list[_Run]):
        self.key, self._begin, self._index, self._runs = key, begin, index, runs
        self._ends = list(itertools.accumulate(len(run.values) for run in runs))
        # Field by field, as pyarrow takes 5 µs to make a dict of one row of a struct
        self._fields = [
            {field.name: run.values.field(i) for i, field in enumerate(run.values.type)}
            if isinstance(run.values, pa.StructArray)
            else None
            for run in runs
        ]

    def row(self, place: int) -> Row:
        at = int(self._index[place - self._begin])
        if at < 0:
            raise ValueError(f"the row at place {place} was not wanted; allowed: positions that are")
        k = bisect.bisect_right(self._ends, at)
        shard, numbers, values = self._runs[k]
        i, fields = at - self._ends[k] + len(values), self._fields[k]
        if fields is None:
            value = values.slice(i, 1).to_pylist()[0]
        else:
            value = {name: column[i].as_py() for name, column in fields.items()}
        return Row(shard, int(numbers[i]), value)


class _Reader:
    """Reads stretches of the source: one shard is open at a time, and is read forwards."""

    def __init__(self, shards: Shards):
        self._shards = shards
        self._shard, self._at = -1, 0
        self._file = contextlib.ExitStack()
        self._chunks_from: Callable[[int], Generator[pa.Array, None, None]] | None = None
        # The shard's values from row `_at` on: those that were read already, and the others
        self._rest: pa.Array | None = None
        self._chunks: Generator[pa.Array, None, None] | None = None

    @cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(self._shards.counts))

    @cached_property
    def _group_ends(self) -> list[int]:
        return list(itertools.accumulate(self._shards.layout.groups))

    def close(self) -> None:
        if self._chunks is not None:
            self._chunks.close()
        self._chunks = self._rest = self._chunks_from = None
        self._file.close()

    def take(self, start: int, stop: int, held: np.ndarray) -> list[_Run]:
        """Those of rows `start` to `stop` − 1, which are in one group, that are among `held` (ascending)."""
        held = held[np.searchsorted(held, start) : np.searchsorted(held, stop)]
        shard = bisect.bisect_right(self._ends, start)
        before = self._ends[shard] - self._shards.counts[shard]
        first, last = start - before, stop - before
        if self._chunks_from is None or shard != self._shard:
            self.close()
            self._shard, self._chunks_from = shard, self._file.enter_context(self._shards.opened(shard))
        if self._chunks is None or not self._on_the_way(before, first):
            if self._chunks is not None:
                self._chunks.close()
            self._at, self._rest, self._chunks = first, None, self._chunks_from(first)
        runs: list[_Run] = []
        while self._at < last:
            rest = self._rest if self._rest is not None else next(self._chunks, None)
            if rest is None:
                self.close()
                raise ValueError(f"{shown(self._shards.names[shard])} has lost rows since they were counted")
            passed = min(max(0, first - self._at), len(rest))
            taken = max(0, min(last - self._at, len(rest)) - passed)
            begin = self._at + passed
            chosen = held - before
            chosen = chosen[np.searchsorted(chosen, begin) : np.searchsorted(chosen, begin + taken)]
            if len(chosen):
                # A copy, as a slice would keep in memory all that was read with it
                runs.append(_Run(shard, chosen, rest.take(pa.array(chosen - self._at))))
            self._at = begin + taken
            rest = rest.slice(passed + taken)
            self._rest = rest if len(rest) else None
        if last == self._shards.counts[shard]:
            self.close()
        return runs

    def _on_the_way(self, before: int, first: int) -> bool:
        """Whether reading on comes to row `first` of the open shard no later than a seek would."""
        if first < self._at:
            return False
        if self._shards.passes_over:
            return True
        group = bisect.bisect_right(self._group_ends, before + self._at)
        # A seek goes to the beginning of the group
        return before + first < self._group_ends[group] or before + first == before + self._at
