"""Rows: where the rows of a data set are, and how they are read in an `Order`.

Images stay encoded until someone decodes them. A row of a folder of images is a file, which is read when it
is asked for, in any order. Rows of parquet files and of streams come in groups that can only be read from
their beginning: a window of the order is read in one pass over the files, and held as Arrow arrays, which are
as large as the encoded images.

Parquet files are read by pyarrow, not through the stream: `IterableDataset.skip` reads all that it passes
over, and its reader (datasets 5.2, pyarrow 26) keeps what it has read of a file until the file ends. Here a
seek goes to the row group, one column is read, a page of the file and a megabyte are held beside the rows,
and no thread of pyarrow is left that would abort the interpreter at its exit.

This file doesn't know pixels, crops, or which places anyone wants.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import logging
import math
import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from datasets.exceptions import DatasetsError
from datasets.table import table_cast

from hf_ddpm.data.order import Order
from hf_ddpm.data.sources import Source
from hf_ddpm.runtime.messages import one_line

logger = logging.getLogger(__name__)

_ROWS_PER_READ = 64
_BYTES_PER_READ = 1 << 20
# What a row in memory takes beside its image: offsets, and its place in the order
_BYTES_PER_ROW = 64
# Places of an order without windows that are looked up together, as one alone costs as much
_PLACES_PER_LOOK = 1024


class Row(NamedTuple):
    """One row.

    Attributes:
        shard: number of its shard.
        number: of the row in that shard.
        value: what its image column holds: {"bytes": ..., "path": ...}, or nested lists of grey levels.
    """

    shard: int
    number: int
    value: Any


class Layout(NamedTuple):
    """What is known of the rows before any is read.

    Attributes:
        counts: rows of each shard.
        groups: rows of each group that can be read from its beginning alone, in the order of the rows.
        num_bytes: of all rows in memory, undecoded: by the footers of parquet files, else as they were read.
    """

    counts: list[int]
    groups: list[int]
    num_bytes: int


class Shards:
    """The rows of a source, by shard and number. A folder of images is one shard.

    Args:
        source: where the rows are.
        column: the column to read.
    """

    def __init__(self, source: Source, column: str):
        self._source, self._column = source, column
        self._schema = Features({column: source.features[column]}).arrow_schema
        self._stream = None if source.dataset is None else source.dataset.select_columns([column])
        if source.kind == "images":
            self.names = [source.name]
        elif source.kind == "parquet" or (self._stream and len(source.files) == self._stream.num_shards):
            self.names = source.files
        else:
            self.names = [f"split {source.split!r}"] * (self._stream.num_shards if self._stream else 0)

    @property
    def addressable(self) -> bool:
        """Whether any row can be read alone."""
        return self._source.kind == "images"

    @property
    def passes_over(self) -> bool:
        """Whether rows can be passed over only by reading them."""
        return self._source.kind == "stream"

    @property
    def counts(self) -> list[int]:
        """Rows of each shard, see `layout`."""
        return self.layout.counts

    @cached_property
    def layout(self) -> Layout:
        """From the footers of parquet files; a stream is read once.

        Raises:
            ValueError: a shard that can't be read.
        """
        if self.addressable:
            return Layout([len(self._source.files)], [len(self._source.files)], 0)
        # In threads, as reading a remote footer is mostly waiting
        with ThreadPoolExecutor(8 if self._source.kind == "parquet" else 1) as threads:
            found = list(threads.map(self._lay_out, range(len(self.names))))
        counts, num_bytes = [sum(groups) for groups, _ in found], sum(size for _, size in found)
        groups = list(itertools.chain.from_iterable(groups for groups, _ in found))
        return Layout(counts, groups, num_bytes + _BYTES_PER_ROW * sum(counts))

    def order(self, memory: float, seed: int) -> Order:
        """The order of these rows.

        Args:
            memory: MB (2^20 bytes) that the undecoded rows of a window may take; 0 for the source's order.
            seed: of the order, at least 0.
        """
        counts, groups, num_bytes = self.layout
        rows = sum(counts)
        window = int(memory * 2**20 * rows / max(num_bytes, 1)) or int(memory > 0)
        if self.addressable and memory:
            window = rows
        # Where passing over rows costs as much as reading them, a shard is read from its beginning to its end
        order = Order(groups, window, seed, **({"parts": 1} if self.passes_over else {}))
        if self.passes_over and order.lanes > 1:
            logger.warning(
                "the %d rows of %s can only be read one after the other, and %d of them fit in shuffle_memory "
                "(%g MB): what is sorted by class stays so in part; save it as parquet files, or raise "
                "shuffle_memory to %d",
                *(rows, one_line(str(self))[:80], window, memory, math.ceil(num_bytes / 2**20)),
            )
        return order

    def _lay_out(self, shard: int) -> tuple[list[int], int]:
        """Rows of each group of a shard, and the bytes of all."""
        if self._source.kind == "stream":
            sizes = [(len(chunk), chunk.nbytes) for chunk in self.chunks(shard)]
            return [sum(rows for rows, _ in sizes)], sum(size for _, size in sizes)
        with self._named_errors(shard), _open_parquet(self.names[shard]) as parquet:
            groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
            width = _leaf_width(parquet.schema_arrow.field(self._column).type)
            return [group.num_rows for group in groups], sum(
                leaf.num_values * width if width else leaf.total_uncompressed_size
                for group in groups
                for leaf in map(group.column, range(group.num_columns))
                if leaf.path_in_schema.split(".")[0] == self._column
            )

    def chunks(self, shard: int, start: int = 0) -> Generator[pa.Array, None, None]:
        """The column's values from row `start` of a shard on, some rows at a time.

        Raises:
            ValueError: the shard can't be read.
        """
        with self.opened(shard) as chunks_from:
            yield from chunks_from(start)

    @contextmanager
    def opened(self, shard: int) -> Iterator[Callable[[int], Generator[pa.Array, None, None]]]:
        """A shard's `chunks`, any number of times, while its file is open.

        Raises:
            ValueError: the shard can't be read.
        """
        with contextlib.ExitStack() as stack:
            with self._named_errors(shard):
                parquet = self._source.kind == "parquet"
                file = stack.enter_context(_open_parquet(self.names[shard])) if parquet else None

            def chunks_from(start: int) -> Generator[pa.Array, None, None]:
                with self._named_errors(shard):
                    if file is not None:
                        yield from self._read_parquet(file, start)
                    elif self.addressable:
                        yield from self._list_files(start)
                    else:
                        yield from self._read_stream(shard, start)

            yield chunks_from

    def _list_files(self, start: int) -> Iterator[pa.Array]:
        for first in range(start, len(self._source.files), _ROWS_PER_READ):
            paths = self._source.files[first : first + _ROWS_PER_READ]
            yield pa.array([{"bytes": None, "path": path} for path in paths], self._schema.field(0).type)

    def _read_stream(self, shard: int, start: int) -> Iterator[pa.Array]:
        assert self._stream is not None
        part = self._stream.shard(len(self.names), shard)
        for batch in part.skip(start).iter(_ROWS_PER_READ):
            yield from pa.Table.from_pydict(batch, schema=self._schema)[self._column].chunks

    def _read_parquet(self, parquet: pq.ParquetFile, start: int) -> Iterator[pa.Array]:
        sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        ends = list(itertools.accumulate(sizes))
        groups = list(range(bisect.bisect_right(ends, start), len(ends)))
        passed = start - sum(sizes[: groups[0]]) if groups else 0
        for batch in parquet.iter_batches(_ROWS_PER_READ, groups, [self._column], use_threads=False):
            if passed < len(batch):
                table = pa.Table.from_batches([batch.slice(passed)])
                yield from table_cast(table, self._schema)[self._column].chunks
            passed = max(0, passed - len(batch))

    @contextmanager
    def _named_errors(self, shard: int) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, DatasetsError, OSError) as error:
            raise ValueError(f"can't read {self.names[shard]}: {one_line(error)}") from error

    def image_file(self, number: int) -> Row:
        """A row of a folder of images."""
        return Row(0, number, {"bytes": None, "path": self._source.files[number]})

    def rows(self) -> Iterator[Row]:
        """All rows in the order of the source."""
        for shard in range(len(self.names)):
            values = itertools.chain.from_iterable(chunk.to_pylist() for chunk in self.chunks(shard))
            yield from (Row(shard, number, value) for number, value in enumerate(values))

    def __str__(self) -> str:
        return ", ".join(sorted(set(self.names)))

    def name(self, row: Row) -> str:
        """What messages call a row."""
        path = row.value.get("path") if isinstance(row.value, dict) else None
        own = f" ({path})" if path and path != self.names[row.shard] else ""
        return f"row {row.number} of {self.names[row.shard]}{own}"


def _leaf_width(kind: pa.DataType) -> int:
    """Bytes of each number in nested lists of numbers; 0 for what has no such width."""
    while isinstance(kind, (pa.ListType, pa.LargeListType, pa.FixedSizeListType, pa.ExtensionType)):
        kind = kind.storage_type if isinstance(kind, pa.ExtensionType) else kind.value_type
    return -(-kind.bit_width // 8) if pa.types.is_primitive(kind) else 0


@contextmanager
def _open_parquet(name: str) -> Iterator[pq.ParquetFile]:
    with fsspec.open(name, "rb") as file:
        yield pq.ParquetFile(file, pre_buffer=False, buffer_size=_BYTES_PER_READ)


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
    """A lane's part of a window, held in memory: the row at index i is the `order[i]`-th of the runs' rows."""

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
                raise ValueError(f"{self._shards.names[shard]} has lost rows since they were counted")
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
