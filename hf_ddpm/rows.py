"""Rows: the shards of a `datasets` stream, read in an `Order` with one open reader for each of its lanes.

Rows stay arrow tables until their block is due, and encoded images until someone decodes them. A lane holds
the rows of one block and one reader, which goes on where the last block ended or seeks: to another shard, or
further on in this one. What it doesn't know: pixels, crops, which places anyone wants.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetsError

from hf_ddpm.order import Order, Stretch
from hf_ddpm.pixels import one_line
from hf_ddpm.sources import count_parquet_rows

_ROWS_PER_READ = 256


class Row(NamedTuple):
    """One row: where it is, and what its image column holds."""

    shard: int
    number: int
    value: Any  # {"bytes": ..., "path": ...} or nested lists of grey levels


class Shards:
    """The shards of a stream, by number.

    Args:
        dataset: a stream of undecoded rows.
        column: the column to read.
        names: what messages call the shards.
    """

    def __init__(self, dataset: datasets.IterableDataset, column: str, names: list[str]):
        self._dataset = dataset.select_columns([column]).with_format("arrow")
        self._column, self.names = column, names

    @cached_property
    def counts(self) -> list[int]:
        """Rows of each shard: from the footers of parquet files, else by reading all of them once.

        Raises:
            ValueError: a shard that can't be read.
        """
        if all(name.endswith(".parquet") for name in self.names):
            return count_parquet_rows(self.names)
        return [sum(map(len, self.read(shard))) for shard in range(len(self.names))]

    def read(self, shard: int, start: int = 0) -> Generator[pa.ChunkedArray, None, None]:
        """The column's values from row `start` of a shard on, some hundred at a time.

        Raises:
            ValueError: the shard can't be read.
        """
        part = self._dataset.shard(len(self.names), shard)
        try:
            for table in (part.skip(start) if start else part).iter(_ROWS_PER_READ):
                yield table[self._column]
        except (pa.ArrowInvalid, DatasetsError) as error:
            raise ValueError(f"can't read {self.names[shard]}: {one_line(error)}") from error

    def rows(self) -> Iterator[Row]:
        """All rows in the order of the source."""
        for shard in range(len(self.names)):
            values = (value for part in self.read(shard) for value in part.to_pylist())
            yield from (Row(shard, number, value) for number, value in enumerate(values))

    def __str__(self) -> str:
        return ", ".join(sorted(set(self.names)))

    def name(self, row: Row) -> str:
        """What messages call a row."""
        path = row.value.get("path") if isinstance(row.value, dict) else None
        own = f" ({path})" if path and path != self.names[row.shard] else ""
        return f"row {row.number} of {self.names[row.shard]}{own}"


class OrderedRows:
    """The rows at places of an order. Ascending places are read in one pass; any other costs a seek."""

    def __init__(self, shards: Shards, order: Order):
        self._order = order
        self._readers = [_Reader(shards) for _ in range(order.lanes)]
        self._blocks: list[tuple[tuple[int, int], list[Row]]] = [((-1, -1), [])] * order.lanes

    def row(self, epoch: int, place: int) -> Row:
        """The row at a place of an epoch.

        Raises:
            ValueError: no such place, a shard that can't be read, or one that ends before its count of rows.
        """
        lane, block, index = self._order.find(place)
        if self._blocks[lane][0] != (epoch, block):
            self._blocks[lane] = (-1, -1), []  # one block is held, not two
            stretches, permutation = self._order.block(epoch, lane, block)
            rows = [row for stretch in stretches for row in self._readers[lane].take(stretch)]
            self._blocks[lane] = (epoch, block), [rows[i] for i in permutation.tolist()]
        return self._blocks[lane][1][index]

    def __enter__(self) -> OrderedRows:
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of open files: a parquet reader left open can abort the interpreter at its exit."""
        for reader in self._readers:
            reader.close()


class _Reader:
    """One shard at a time, open, read forwards."""

    def __init__(self, shards: Shards):
        self._shards = shards
        self.close()

    def close(self) -> None:
        self._shard, self._at = -1, 0
        self._values: Generator[pa.ChunkedArray, None, None] | None = None  # dropped, it closes its file
        self._rest: pa.ChunkedArray | None = None  # read, but not taken; its first row is number `_at`

    def take(self, stretch: Stretch) -> list[Row]:
        shard, start, stop = stretch
        if shard != self._shard or start < self._at:
            self.close()
            self._shard, self._at, self._values = shard, start, self._shards.read(shard, start)
        rows: list[Row] = []
        while self._at < stop:
            if not self._rest:
                self._rest = next(self._values, None) if self._values else None
            if not self._rest:
                name, count = self._shards.names[shard], self._shards.counts[shard]
                raise ValueError(f"{name} ends after {self._at} rows; when they were counted it had {count}")
            passed = min(len(self._rest), max(0, start - self._at))
            taken = min(len(self._rest), stop - self._at) - passed
            numbers = range(self._at + passed, self._at + passed + taken)
            rows += map(Row, [shard] * taken, numbers, self._rest.slice(passed, taken).to_pylist())
            self._rest = self._rest.slice(passed + taken)
            self._at += passed + taken
        if stop == self._shards.counts[shard]:
            self.close()
        return rows
