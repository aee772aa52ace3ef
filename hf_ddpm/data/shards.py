"""Rows: where the rows of a source are, which of them can be read alone, and how the others are read.

Images stay encoded until someone decodes them.

Parquet files are read by pyarrow, not through the stream: `IterableDataset.skip` reads all that it passes
over, and its reader (datasets 5.2, pyarrow 26) keeps what it has read of a file until the file ends. Here a
seek goes to the row group, one column is read, a page of the file and a megabyte are held beside the rows,
and no thread of pyarrow is left that would abort the interpreter at its exit.

This file doesn't know pixels, crops, orders, or which places anyone wants.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import io
import itertools
import os
import re
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, BinaryIO, NamedTuple

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetsError
from datasets.table import table_cast

from hf_ddpm.data.files import MOST_BYTES, inside, open_regular, read_regular, shown
from hf_ddpm.data.holdout import Choice, Rows, titled
from hf_ddpm.data.pages import rows_per_read
from hf_ddpm.data.sources import Source
from hf_ddpm.runtime.messages import one_line
from hf_ddpm.shown import fields_line

_ROWS_PER_READ = 64
_BYTES_PER_READ = 1 << 20
# What a row in memory takes beside its image: offsets, and its place in the order
_BYTES_PER_ROW = 64


class Row(NamedTuple):
    """One row.

    Attributes:
        shard: number of its shard.
        number: of the row among those of that shard which were chosen.
        value: what its image column holds: {"bytes": ..., "path": ...}, or nested lists of grey levels.
    """

    shard: int
    number: int
    value: Any

    __repr__ = fields_line


class Layout(NamedTuple):
    """What is known of the rows before any is read.

    Attributes:
        counts: rows of each shard.
        groups: rows of each group that can be read from its beginning alone, in the order of the rows.
        sizes: bytes of each group's rows, undecoded: by the footers of parquet files, else as they were read.
    """

    counts: list[int]
    groups: list[int]
    sizes: list[int]

    __repr__ = fields_line

    @property
    def num_bytes(self) -> int:
        """What all rows take in memory, undecoded."""
        return sum(self.sizes) + _BYTES_PER_ROW * sum(self.counts)


class Shards:
    """The shards of a source, by number.

    Images that are files are one shard; each parquet file is one. Where rows are chosen, the shards are as if
    they had no others: these are numbered anew, and counts, groups and sizes are of these.

    Args:
        source: the rows.
        column: the column to read.
        choice: which rows; None for all of them.

    Attributes:
        source: as given.
        whole: the shards with all rows; itself where none are chosen.
        title: what messages call the rows.
    """

    def __init__(self, source: Source, column: str, choice: Choice | Rows | None = None):
        self.source, self._column, self._choice = source, column, choice
        self.whole = self if choice is None else Shards(source, column)
        self.title = source.title if not isinstance(choice, Choice) else choice.title(source.title)
        # Rows of each row group that may be read at once, where its headers have been looked at
        self._checked: dict[tuple[int, int], int] = {}
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

    @property
    def with_held_out(self) -> Shards:
        """The same shards with the rows that are held out of these."""
        if not isinstance(self._choice, Choice):
            return self
        choice = replace(self._choice, part="all")
        return self.whole if choice.whole else Shards(self.source, self._column, choice)

    @property
    def column(self) -> str:
        """The column that is read."""
        return self._column

    @property
    def addressable(self) -> bool:
        """Whether any row can be read alone."""
        return self.source.kind == "images"

    @property
    def files(self) -> list[str]:
        """Image files, parquet files, or the files of a stream as far as they are known."""
        return self.source.files

    def relative(self, file: str) -> str:
        """The name of a file in the data set's folder, or in its repository at any revision."""
        if self.source.root is not None:
            return os.path.relpath(file, self.source.root).replace(os.sep, "/")
        return re.sub(r"^hf://datasets/[^@]*@[^/]*/", "", file)

    @property
    def local(self) -> bool:
        """Whether the rows are files of this machine."""
        return self.source.root is not None

    @property
    def passes_over(self) -> bool:
        """Whether rows can be passed over only by reading them."""
        return self.source.kind == "stream"

    @property
    def counts(self) -> list[int]:
        """Rows of each shard, see `layout`."""
        return self.layout.counts

    @cached_property
    def chosen(self) -> Rows:
        """The rows, by their numbers in the source; it counts those of the source.

        Raises:
            ValueError: a shard that can't be read, or a choice that no row or every row is left by.
        """
        total = sum(self.whole.counts)
        if isinstance(self._choice, Rows):
            return self._choice
        return Rows(range(total)) if self._choice is None else self._choice.rows(total)

    def choose(self, rows: Rows, words: str = "") -> Shards:
        """The same shards with these rows of the source; `words` are added to the title."""
        found = Shards(self.source, self._column, rows)
        found.whole, found.title = self.whole, titled(self.title, words)
        return found

    @cached_property
    def layout(self) -> Layout:
        """From the footers of parquet files; a stream is read once.

        Raises:
            ValueError: a shard that can't be read, or a choice of rows that can't be made.
        """
        if self.whole is not self:
            _, groups, sizes = self.whole.layout
            left = np.diff(self.chosen.count_before(np.cumsum([0, *groups])))
            counts = np.diff(self.chosen.count_before(np.cumsum([0, *self.whole.counts])))
            shares = zip(sizes, left.tolist(), groups, strict=True)
            return Layout(counts.tolist(), left.tolist(), [size * n // max(of, 1) for size, n, of in shares])
        if self.addressable:
            return Layout([len(self.source.files)], [len(self.source.files)], [0])
        # In threads, as reading a remote footer is mostly waiting
        with ThreadPoolExecutor(8 if self.source.kind == "parquet" else 1) as threads:
            found = list(threads.map(self._lay_out, range(len(self.names))))
        groups, sizes = (list(itertools.chain.from_iterable(part)) for part in zip(*found, strict=True))
        return Layout([sum(rows) for rows, _ in found], groups, sizes)

    def _lay_out(self, shard: int) -> tuple[list[int], list[int]]:
        """Rows of each group of a shard, and their bytes."""
        if self.source.kind == "stream":
            sizes = [(len(chunk), chunk.nbytes) for chunk in self.chunks(shard)]
            return [sum(rows for rows, _ in sizes)], [sum(size for _, size in sizes)]
        with self._named_errors(shard), self._open_parquet(shard) as (parquet, _):
            if self._column not in parquet.schema_arrow.names:
                raise ValueError(f"{shown(self.names[shard])} has no column {shown(self._column)!r}")
            groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
            width = _leaf_width(parquet.schema_arrow.field(self._column).type)
            leaves = [
                [
                    leaf.num_values * width if width else leaf.total_uncompressed_size
                    for leaf in map(group.column, range(group.num_columns))
                    if leaf.path_in_schema.split(".")[0] == self._column
                ]
                for group in groups
            ]
            return [group.num_rows for group in groups], [sum(sizes) for sizes in leaves]

    def chunks(self, shard: int, start: int = 0) -> Generator[pa.Array, None, None]:
        """The column's values from row `start` of a shard on, some rows at a time; not of image files.

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
                parquet = self.source.kind == "parquet"
                file = stack.enter_context(self._open_parquet(shard)) if parquet else None

            def chunks_from(start: int) -> Generator[pa.Array, None, None]:
                with self._named_errors(shard):
                    if file is not None:
                        yield from self._read_parquet(shard, file, start)
                    else:
                        yield from self._read_stream(shard, start)

            if self.whole is self:
                yield chunks_from
            else:
                rows = self._chosen_of(shard)
                yield lambda start: _chosen_values(chunks_from, rows[start:])

    def _chosen_of(self, shard: int) -> np.ndarray:
        """The chosen rows of a shard, by their numbers among all of its rows."""
        before = sum(self.whole.counts[:shard])
        first, last = self.chosen.count_before([before, before + self.whole.counts[shard]])
        return self.chosen.of(np.arange(first, last)) - before

    def _read_stream(self, shard: int, start: int) -> Iterator[pa.Array]:
        part = self._dataset.shard(len(self.names), shard)
        for batch in part.skip(start).iter(_ROWS_PER_READ):
            yield from pa.Table.from_pydict(batch, schema=self._schema)[self._column].chunks

    def _read_parquet(self, shard: int, opened: tuple[pq.ParquetFile, Any], start: int) -> Iterator[pa.Array]:
        parquet, _ = opened
        sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        ends = list(itertools.accumulate(sizes))
        first = bisect.bisect_right(ends, start)
        passed = start - sum(sizes[:first])
        for group in range(first, len(ends)):
            rows = self._rows_per_read(shard, opened, group)
            for batch in parquet.iter_batches(rows, [group], [self._column], use_threads=False):
                if passed < len(batch):
                    table = pa.Table.from_batches([batch.slice(passed)])
                    yield from table_cast(table, self._schema)[self._column].chunks
                passed = max(0, passed - len(batch))

    def _rows_per_read(self, shard: int, opened: tuple[pq.ParquetFile, Any], group: int) -> int:
        if (shard, group) not in self._checked:
            local = self.source.root is not None
            rows = rows_per_read(*opened, group, self._column, _ROWS_PER_READ, local)
            self._checked[shard, group] = rows
        return self._checked[shard, group]

    def feature_of(self, shard: int) -> Any:
        """The column's feature by the schema of one parquet file, which may be another than the source's.

        Raises:
            ValueError: the file can't be read, or has no such column.
        """
        with self._named_errors(shard), self._open_parquet(shard) as (parquet, _):
            if self._column not in parquet.schema_arrow.names:
                raise ValueError(f"{shown(self.names[shard])} has no column {shown(self._column)!r}")
            return datasets.Features.from_arrow_schema(parquet.schema_arrow)[self._column]

    @contextmanager
    def _open_parquet(self, shard: int) -> Iterator[tuple[pq.ParquetFile, Any]]:
        name = self.names[shard]
        # A local path is no address, whatever characters are in it
        with open(name, "rb") if self.source.root else fsspec.open(name, "rb") as file:
            yield pq.ParquetFile(file, pre_buffer=False, buffer_size=_BYTES_PER_READ), file

    @contextmanager
    def _named_errors(self, shard: int) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, DatasetsError, OSError, ValueError) as error:
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

    def head(self, row: Row) -> BinaryIO | None:
        """A file of a row's image, of which little is read for its head; None if the row holds an array.

        Raises:
            ValueError, OSError: as `encoded`.
        """
        if self.addressable:
            return open_regular(row.value["path"])
        data = self.encoded(row)
        return io.BytesIO(data or b"") if isinstance(row.value, (dict, bytes)) else None

    def _read_file(self, path: str) -> bytes:
        source = self.source
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
            raise ValueError("it holds no image but a path, which is not opened")
        try:
            return read_regular(inside(path, source.root))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
                raise
            raise ValueError("its path names no file in the folder of the data set") from None

    def image_file(self, number: int) -> Row:
        """A row of a folder of images."""
        at = number if self.whole is self else int(self.chosen.of(number))
        return Row(0, number, {"bytes": None, "path": self.source.files[at]})

    def rows(self) -> Iterator[Row]:
        """All rows in the order of the source."""
        if self.addressable:
            yield from map(self.image_file, range(self.counts[0]))
            return
        for shard in range(len(self.names)):
            values = itertools.chain.from_iterable(chunk.to_pylist() for chunk in self.chunks(shard))
            yield from (Row(shard, number, value) for number, value in enumerate(values))

    def __str__(self) -> str:
        names = sorted(set(self.names))
        return shown(names[0]) if len(names) == 1 else f"{shown(names[0])} and {len(names) - 1:,} more files"

    def name(self, row: Row) -> str:
        """What messages call a row."""
        path = row.value.get("path") if isinstance(row.value, dict) else None
        if path and self.source.kind == "images":
            return shown(path)
        own = f" ({shown(path, 60)})" if path and path != self.names[row.shard] else ""
        return f"row {self.number(row)} of {shown(self.names[row.shard])}{own}"

    def number(self, row: Row) -> int:
        """The number of a row among all rows of its shard, chosen or not."""
        return row.number if self.whole is self else int(self._chosen_of(row.shard)[row.number])


def _chosen_values(
    chunks_from: Callable[[int], Generator[pa.Array, None, None]], rows: np.ndarray
) -> Generator[pa.Array, None, None]:
    """The values of some ascending rows of a shard; none is read before the first or after the last."""
    at = int(rows[0]) if len(rows) else 0
    for chunk in chunks_from(at) if len(rows) else ():
        first, last = np.searchsorted(rows, [at, at + len(chunk)])
        if last - first == len(chunk):
            yield chunk
        elif last > first:
            yield chunk.take(pa.array(rows[first:last] - at))
        at += len(chunk)
        if last == len(rows):
            return


def _in_archive(path: str, source: Source) -> str | None:
    """The address of an image that `datasets` found in the files of a stream; None if it lies elsewhere."""
    *archives, last = path.split("::")
    if not all(re.match(r"(zip|tar|gzip|bz2|xz|zstd|lz4)://", part) for part in archives):
        return None
    if source.root is not None:
        return path if archives and last in source.files else None
    home = re.match(r"hf://datasets/[^@]+@[^/]+/", source.files[0]) if source.files else None
    return path if home and last.startswith(home[0]) and ".." not in last.split("/") else None


def _leaf_width(kind: pa.DataType) -> int:
    """Bytes of each number in nested lists of numbers; 0 for what has no such width."""
    while isinstance(kind, (pa.ListType, pa.LargeListType, pa.FixedSizeListType, pa.ExtensionType)):
        kind = kind.storage_type if isinstance(kind, pa.ExtensionType) else kind.value_type
    return -(-kind.bit_width // 8) if pa.types.is_primitive(kind) else 0
