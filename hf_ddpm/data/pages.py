"""What a parquet file unpacks to, by the sizes that its footer and the headers of its pages declare.

A page is a compressed block of values of one column. pyarrow allocates what a page's header declares, and
repeats values of a dictionary as often as the page says, so that two kilobytes may become gigabytes. Here the
headers alone are read, before anything is allocated.

    page header, Thrift's compact protocol:  1 type, 2 bytes unpacked, 3 bytes in the file, 7 dictionary

Images are compressed already: a page that unpacks to far more than it takes in the file holds none.
https://parquet.apache.org/docs/file-format/, https://github.com/apache/thrift/blob/master/doc/specs/
"""

from __future__ import annotations

from typing import Any, BinaryIO, NamedTuple

import pyarrow.parquet as pq

# How much larger than in the file a large page, or the numbers of a row group, may be in memory
MOST_EXPANSION = 50
# What is always allowed: bytes of a page, of a row group of pages, and of numbers in lists: in a row, in a
# row group
PAGE_BYTES, GROUP_BYTES, ROW_BYTES, LIST_BYTES = 16 << 20, 256 << 20, 64 << 20, 1 << 30
# What one read may hold
READ_BYTES = 64 << 20
# Of a file on the Hub only so much is read before reading it
_REMOTE_BYTES = 8 << 20
_DICTIONARY_PAGE = 2
_HEADER_BYTES = (1 << 10, 1 << 16, 16 << 20)
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 12}


class _Page(NamedTuple):
    """Of a page's header: whether it is a dictionary, bytes in memory, bytes in the file."""

    is_dictionary: bool
    unpacked: int
    packed: int


def rows_per_read(
    parquet: pq.ParquetFile, file: BinaryIO, group: int, column: str, most: int, local: bool = True
) -> int:
    """How many rows of a row group may be read at once.

    Args:
        parquet: the file.
        file: the same file's bytes.
        group: number of the row group.
        column: the column that is to be read, with all that is nested in it.
        most: the most rows that anyone wants.
        local: whether reading costs little; else the headers of large row groups are believed to be honest.

    Returns:
        1 to `most`.

    Raises:
        ValueError: it unpacks to more than is allowed, or a header is damaged.
    """
    rows = parquet.metadata.row_group(group)
    for i in range(rows.num_columns):
        chunk = rows.column(i)
        if not f"{chunk.path_in_schema}.".startswith(f"{column}."):
            continue
        packed, unpacked = chunk.total_compressed_size, chunk.total_uncompressed_size
        largest = 0
        if local or packed <= _REMOTE_BYTES:
            start = chunk.data_page_offset
            if chunk.dictionary_page_offset:
                start = min(start, chunk.dictionary_page_offset)
            pages = _pages(file, start, packed)
            for page in pages:
                _check("a page", page.unpacked, page.packed, PAGE_BYTES)
            largest = max((page.unpacked for page in pages if page.is_dictionary), default=0)
            packed, unpacked = sum(page.packed for page in pages), sum(page.unpacked for page in pages)
        if chunk.physical_type == "BYTE_ARRAY":
            # Each row may repeat the largest value of the dictionary
            most = max(1, min(most, READ_BYTES // max(1, largest)))
            _check("a row group", unpacked, packed, GROUP_BYTES)
            if parquet.schema.column(i).max_repetition_level:
                _check("a row group", chunk.num_values * largest, packed, LIST_BYTES)
        else:
            width = _WIDTHS.get(chunk.physical_type, parquet.schema.column(i).length or 16)
            _check("a row group", chunk.num_values * width, packed, LIST_BYTES)
            per_row = chunk.num_values * width // max(1, rows.num_rows)
            _check("a row", per_row, packed, ROW_BYTES)
            most = max(1, min(most, READ_BYTES // max(1, per_row)))
    return most


def _check(what: str, unpacked: int, packed: int, allowed: int) -> None:
    most = max(allowed, MOST_EXPANSION * packed)
    if unpacked < 0 or packed < 0 or unpacked > most:
        raise ValueError(
            f"{what} of {packed:,} bytes unpacks to {unpacked:,}; allowed: {allowed:,}, or {MOST_EXPANSION} "
            "times its size in the file"
        )


def _pages(file: BinaryIO, start: int, size: int) -> list[_Page]:
    """The headers of the pages that lie in `size` bytes of a file."""
    found, at = [], start
    while at < start + size:
        page, length = _header(file, at)
        found.append(page)
        at += length + page.packed
    return found


def _header(file: BinaryIO, at: int) -> tuple[_Page, int]:
    """The header at a place of a file, and its length."""
    for size in _HEADER_BYTES:
        file.seek(at)
        data = file.read(size)
        try:
            fields, length = _struct(data, 0)
            page = _Page(fields[1] == _DICTIONARY_PAGE, int(fields[2]), int(fields[3]))
            if min(page.unpacked, page.packed) < 0:
                break
            return page, length
        except IndexError:
            if len(data) < size:
                break
        except (KeyError, TypeError, ValueError, RecursionError):
            break
    raise ValueError(f"damaged: no page begins at byte {at:,}")


def _struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    fields: dict[int, Any] = {}
    number = 0
    while head := data[at]:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _integer(data, at)
        fields[number], at = _value(head & 15, data, at)
    return fields, at + 1


def _value(kind: int, data: bytes, at: int) -> tuple[Any, int]:
    if kind in (1, 2):
        return kind == 1, at
    if kind == 3:
        return data[at], at + 1
    if kind in (4, 5, 6):
        return _integer(data, at)
    if kind == 7:
        return None, at + 8
    if kind == 8:
        length, at = _varint(data, at)
        return None, at + length
    if kind in (9, 10):
        length, of = data[at] >> 4, data[at] & 15
        at += 1
        if length == 15:
            length, at = _varint(data, at)
        for _ in range(length):
            # In a list a truth value takes a byte
            _, at = _value(3 if of in (1, 2) else of, data, at)
            if at > len(data):
                raise IndexError(at)
        return None, at
    if kind == 12:
        return _struct(data, at)
    raise ValueError(f"no type of Thrift: {kind}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _integer(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at
