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
from hf_ddpm.data.order import Order
from hf_ddpm.data.shards import Row, Shards

logger = logging.getLogger(__name__)

# Places of an order without windows that are looked up together, as one alone costs as much
_PLACES_PER_LOOK = 1024


def make_order(shards: Shards, memory: float, seed: int) -> Order:
    """The order of the rows of some shards.

    Args:
        shards: where the rows are.
        memory: MB (2^20 bytes) that the undecoded rows of a window may take; 0 for the source's order.
        seed: of the order, at least 0.
    """
    counts, groups, num_bytes = shards.layout
    rows = sum(counts)
    window = int(memory * 2**20 * rows / max(num_bytes, 1)) or int(memory > 0)
    if shards.addressable and memory:
        window = rows
    # Where passing over rows costs as much as reading them, a shard is read from its beginning to its end
    order = Order(groups, window, seed, **({"parts": 1} if shards.passes_over else {}))
    if shards.passes_over and order.lanes > 1:
        logger.warning(
            "the %d rows of %s can only be read one after the other, and %d of them fit in shuffle_memory "
            "(%g MB): what is sorted by class stays so in part; save it as parquet files, or raise "
            "shuffle_memory to %d",
            *(rows, shards, window, memory, math.ceil(num_bytes / 2**20)),
        )
    return order


class OrderedRows:
    """The rows at places of an order, a context that closes its file at its end.

    Ascending places are read in one pass over each window; any other place costs a seek.

    Args:
        shards: where the rows are.
        order: which row is at which place.
    """

    def __init__(self, shards: Shards, order: Order):
        self._shards, self._order = shards, order
        self._reader = _Reader(shards)
        # A generator may still be open when the interpreter exits: this closes its file before modules go.
        self._close = weakref.finalize(self, self._reader.close)
        self._parts: list[_Part | None] = [None] * order.lanes
        self._looked: tuple[tuple[int, int], list[int]] = (-1, -1), []

    def row(self, epoch: int, place: int) -> Row:
        """The row at a place of an epoch.

        Raises:
            ValueError: no such place, a shard that can't be read, or one that ends before its count of rows.
        """
        window, lane, index = self._order.find(place)
        if self._shards.addressable:
            return self._shards.image_file(self._look_up(epoch, place))
        part = self._parts[lane]
        if part is None or part.key != (epoch, window):
            # The old part goes before the new one comes, so that one is held and not two
            part = self._parts[lane] = None
            stretches, order = self._order.part(epoch, window, lane)
            runs = [run for stretch in stretches for run in self._reader.take(*stretch)]
            part = self._parts[lane] = _Part((epoch, window), order, runs)
        return part.row(index)

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
    """Rows of a shard that follow each other, from number `first` on."""

    shard: int
    first: int
    values: pa.Array


class _Part:
    """A lane's part of a window, in memory: the row at index i is the `order[i]`-th of the runs' rows."""

    def __init__(self, key: tuple[int, int], order: np.ndarray, runs: list[_Run]):
        self.key, self._order, self._runs = key, order, runs
        self._ends = list(itertools.accumulate(len(run.values) for run in runs))
        # Field by field, as pyarrow takes 5 µs to make a dict of one row of a struct
        self._fields = [
            {field.name: run.values.field(i) for i, field in enumerate(run.values.type)}
            if isinstance(run.values, pa.StructArray)
            else None
            for run in runs
        ]

    def row(self, index: int) -> Row:
        number = int(self._order[index])
        k = bisect.bisect_right(self._ends, number)
        shard, first, values = self._runs[k]
        i, fields = number - self._ends[k] + len(values), self._fields[k]
        if fields is None:
            return Row(shard, first + i, values.slice(i, 1).to_pylist()[0])
        return Row(shard, first + i, {name: column[i].as_py() for name, column in fields.items()})


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

    def take(self, start: int, stop: int) -> list[_Run]:
        """Rows `start` to `stop` − 1 of the source, which are in one group."""
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
            taken = min(last - self._at, len(rest)) - passed
            if taken > 0:
                # A copy, as a slice would keep in memory all that was read with it
                values = pa.concat_arrays([rest.slice(passed, taken)])
                runs.append(_Run(shard, self._at + passed, values))
            self._at += passed + max(0, taken)
            left = rest.slice(passed + max(0, taken))
            self._rest = left if len(left) else None
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
