"""Rows: the shards of a `datasets` stream, read in an `Order` with one open reader for each of its lanes.

Images stay encoded until someone decodes them. A lane holds the rows of one block and one reader, which reads
on where the last block ended, or seeks.

Parquet files are read by pyarrow, not through the stream: `IterableDataset.skip` reads all that it passes
over, and its reader (datasets 5.2, pyarrow 26) keeps what it has read of a file until the file ends, which
eight lanes would do eight times. Here a seek goes to the row group, one column is read, a lane holds a page
of the file and a megabyte beside its rows, and no thread of pyarrow is left that would abort the interpreter
at its exit.

This file doesn't know pixels, crops, or which places anyone wants.
"""

from __future__ import annotations

import itertools
import re
import weakref
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetsError
from datasets.table import table_cast

from hf_ddpm.data.files import MOST_BYTES, inside, read_regular, shown
from hf_ddpm.data.order import Order, Stretch
from hf_ddpm.data.sources import Source
from hf_ddpm.runtime.messages import one_line

_ROWS_PER_READ = 64
_BYTES_PER_READ = 1 << 20


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


class Shards:
    """The shards of a source, by number.

    Images that are files are one shard; each parquet file is one.

    Args:
        source: the rows.
        column: the column to read.
    """

    def __init__(self, source: Source, column: str):
        self._source, self._column = source, column
        self._schema = datasets.Features({column: source.features[column]}).arrow_schema
        if source.kind == "parquet":
            self.names = source.files
        elif source.dataset is None:
            self.names = [source.name]
        else:
            self._dataset = source.dataset.select_columns([column])
            count = source.dataset.num_shards
            whole = len(source.files) == count
            self.names = source.files if whole else [f"{source.name}, split {source.split!r}"] * count

    @cached_property
    def counts(self) -> list[int]:
        """Rows of each shard: from the footers of parquet files, or of a stream by reading all of it once.

        Raises:
            ValueError: a shard that can't be read.
        """
        if self._source.kind == "images":
            return [len(self._source.files)]
        if self._source.kind == "stream":
            return [sum(1 for _ in self.read(shard)) for shard in range(len(self.names))]
        # In threads, as reading a remote footer is mostly waiting
        with ThreadPoolExecutor(8) as threads:
            return list(threads.map(self._count_in_footer, range(len(self.names))))

    def _count_in_footer(self, shard: int) -> int:
        with self._named_errors(shard), self._open_parquet(shard) as parquet:
            return parquet.metadata.num_rows

    def read(self, shard: int, start: int = 0) -> Generator[Any, None, None]:
        """The column's values from row `start` of a shard on.

        Raises:
            ValueError: the shard can't be read.
        """
        if self._source.kind == "images":
            yield from (
                {"bytes": None, "path": file} for file in itertools.islice(self._source.files, start, None)
            )
            return
        with self._named_errors(shard):
            for values in (self._read_stream if self._source.dataset else self._read_parquet)(shard, start):
                yield from values

    def _read_stream(self, shard: int, start: int) -> Iterator[list[Any]]:
        part = self._dataset.shard(len(self.names), shard)
        for batch in part.skip(start).iter(_ROWS_PER_READ):
            yield batch[self._column]

    def _read_parquet(self, shard: int, start: int) -> Iterator[list[Any]]:
        with self._open_parquet(shard) as parquet:
            sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
            ends = list(itertools.accumulate(sizes))
            groups = [i for i, end in enumerate(ends) if end > start]
            passed = start - sum(sizes[: groups[0]]) if groups else 0
            for batch in parquet.iter_batches(_ROWS_PER_READ, groups, [self._column], use_threads=False):
                if passed < len(batch):
                    table = pa.Table.from_batches([batch.slice(passed)])
                    yield table_cast(table, self._schema)[self._column].to_pylist()
                passed = max(0, passed - len(batch))

    @contextmanager
    def _open_parquet(self, shard: int) -> Iterator[pq.ParquetFile]:
        name = self.names[shard]
        # A local path is no address, whatever characters are in it
        with open(name, "rb") if self._source.root else fsspec.open(name, "rb") as file:
            yield pq.ParquetFile(file, pre_buffer=False, buffer_size=_BYTES_PER_READ)

    @contextmanager
    def _named_errors(self, shard: int) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, DatasetsError, OSError) as error:
            raise ValueError(f"can't read {shown(self.names[shard])}: {one_line(error, 150)}") from error

    def encoded(self, row: Row) -> Any:
        """A row's value with the bytes of its image, which are read where the row names a file.

        Args:
            row: one of these shards'.

        Returns:
            Bytes, nested lists of grey levels, or None if the row holds nothing.

        Raises:
            ValueError: the row names a file outside of the data set, or no regular file.
            OSError: the file can't be opened: a lost disk or connection is not a corrupt image.
        """
        value = row.value
        if not isinstance(value, dict):
            return value
        if value.get("bytes") is not None or not value.get("path"):
            return value.get("bytes")
        return self._read_file(str(value["path"]))

    def _read_file(self, path: str) -> bytes:
        source = self._source
        if source.kind == "images":
            return read_regular(path)
        if source.kind == "stream" and (found := _in_archive(path, source)):
            with fsspec.open(found, "rb") as file:
                data = file.read(MOST_BYTES + 1)  # pyright: ignore[reportAttributeAccessIssue]
            if len(data) > MOST_BYTES:
                raise ValueError(
                    f"{shown(path)} has more than {MOST_BYTES:,} bytes, which is what is allowed"
                )
            return data
        if source.root is None:
            raise ValueError(f"the row holds no image but the path {shown(path)!r}, which is not opened")
        return read_regular(inside(path, source.root))

    def rows(self) -> Iterator[Row]:
        """All rows in the order of the source."""
        for shard in range(len(self.names)):
            yield from (Row(shard, number, value) for number, value in enumerate(self.read(shard)))

    def __str__(self) -> str:
        names = sorted(set(self.names))
        return shown(names[0]) if len(names) == 1 else f"{shown(names[0])} and {len(names) - 1:,} more files"

    def name(self, row: Row) -> str:
        """What messages call a row."""
        path = row.value.get("path") if isinstance(row.value, dict) else None
        if path and self._source.kind == "images":
            return shown(path)
        own = f" ({shown(path)})" if path and path != self.names[row.shard] else ""
        return f"row {row.number} of {shown(self.names[row.shard])}{own}"


def _in_archive(path: str, source: Source) -> str | None:
    """The address of an image that `datasets` found in the files of a stream; None if it lies elsewhere."""
    *archives, last = path.split("::")
    if not all(re.match(r"(zip|tar|gzip|bz2|xz|zstd|lz4)://", part) for part in archives):
        return None
    home = f"hf://datasets/{source.name}"
    if source.root is None:
        return path if last.startswith((f"{home}@", f"{home}/")) and "/../" not in last else None
    return path if archives and last in source.files else None


class OrderedRows:
    """The rows at places of an order, a context that closes its files at its end.

    Ascending places are read in one pass; any other place costs a seek.

    Args:
        shards: where the rows are.
        order: which row is at which place.
    """

    def __init__(self, shards: Shards, order: Order):
        self._order = order
        self._readers = [_Reader(shards) for _ in range(order.lanes)]
        # A generator may still be open when the interpreter exits: this closes its files before modules go.
        self._close = weakref.finalize(self, _close_all, self._readers)
        self._blocks: list[tuple[tuple[int, int], list[Row]]] = [((-1, -1), [])] * order.lanes

    def row(self, epoch: int, place: int) -> Row:
        """The row at a place of an epoch.

        Raises:
            ValueError: no such place, a shard that can't be read, or one that ends before its count of rows.
        """
        lane, block, index = self._order.find(place)
        if self._blocks[lane][0] != (epoch, block):
            # The old block goes before the new one comes, so that one block is held and not two
            self._blocks[lane] = (-1, -1), []
            stretches, permutation = self._order.block(epoch, lane, block)
            rows = [row for stretch in stretches for row in self._readers[lane].take(stretch)]
            self._blocks[lane] = (epoch, block), [rows[i] for i in permutation.tolist()]
        return self._blocks[lane][1][index]

    def __enter__(self) -> OrderedRows:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()


def _close_all(readers: list[_Reader]) -> None:
    for reader in readers:
        reader.close()


class _Reader:
    """Reads stretches of shards: one shard is open at a time, and is read forwards."""

    def __init__(self, shards: Shards):
        self._shards = shards
        self._shard, self._at = -1, 0
        # The shard's values from row `_at` on
        self._values: Generator[Any, None, None] | None = None

    def close(self) -> None:
        if self._values is not None:
            self._values.close()
        self._values = None

    def take(self, stretch: Stretch) -> list[Row]:
        shard, start, stop = stretch
        if self._values is None or shard != self._shard or start < self._at:
            self.close()
            self._shard, self._at, self._values = shard, start, self._shards.read(shard, start)
        values = list(itertools.islice(self._values, start - self._at, stop - self._at))
        self._at = stop
        if len(values) < stop - start:
            self.close()
            raise ValueError(f"{shown(self._shards.names[shard])} has lost rows since they were counted")
        if stop == self._shards.counts[shard]:
            self.close()
        return list(map(Row, itertools.repeat(shard), range(start, stop), values))
