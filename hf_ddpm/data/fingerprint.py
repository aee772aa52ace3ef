"""A data set's fingerprint: what is cheap to know of it, and differs if the data differ, in all likelihood.

Names and sizes of files, numbers of rows, and digests of some rows. No time and no place is in it: the same
files in another folder have the same fingerprint. A row that changes without changing the size of its file is
seen only if it is among those whose digests are taken. Of data on the Hub no row is fetched: what the footers
of its files say is taken instead.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hf_ddpm.data.files import shown
from hf_ddpm.data.order import Order
from hf_ddpm.data.ordered import OrderedRows
from hf_ddpm.data.shards import Row, Shards

# Rows whose digests are taken, and how much of the data is read for them at most
_ROWS, _BYTES = 64, 64 << 20
# Files that are named one by one, and files whose sizes are asked for
_NAMED, _SIZED = 256, 100_000


def take_fingerprint(shards: Shards, order: Order) -> dict[str, Any]:
    """The fingerprint of a source and of the order in which it is read, as plain values (JSON).

    Args:
        shards: where the rows are; the fingerprint is of all rows of the source, chosen or not.
        order: of the chosen rows.

    Returns:
        "rows": of each shard. "layout": a digest of the groups of rows and their bytes. "order": rows of a
        window, and units. "files": (name in the data's folder, bytes) of each file, where they are few.
        "all_files": a digest of these of all files. "sample": (name, digest) of some rows. "chosen": how many
        rows are read, and a digest of which, where not all are.

    Raises:
        ValueError: a shard that can't be read.
    """
    chosen = {} if shards.whole is shards else {"chosen": [len(shards.chosen), shards.chosen.digest]}
    shards = shards.whole
    layout, sizes = shards.layout, _sizes(shards)
    return chosen | {
        "rows": layout.counts,
        "layout": _digest(repr((layout.groups, layout.num_bytes)).encode()),
        "order": order.shape,
        "files": sizes if len(sizes) <= _NAMED else [],
        "all_files": _digest("\0".join(f"{name}\0{size}" for name, size in sizes).encode()),
        "sample": _sample(shards),
    }


def _sizes(shards: Shards) -> list[list[Any]]:
    """(name, size) of each file; the size is None where it would take long to find out."""
    asked = set(np.linspace(0, len(shards.files) - 1, min(_SIZED, len(shards.files))).astype(int).tolist())
    return [
        [shards.relative(file), os.stat(file).st_size if shards.local and i in asked else None]
        for i, file in enumerate(shards.files)
    ]


def _sample(shards: Shards) -> list[list[str]]:
    found = []
    with OrderedRows(shards, Order(shards.layout.groups, 0, 0)) as rows:
        for place in _sampled_places(shards):
            row = rows.row(0, place)
            name = row.value["path"] if shards.addressable else shards.names[row.shard]
            which = "" if shards.addressable else f"row {row.number} of "
            found.append([which + shards.relative(name), _row_digest(shards, row)])
    return found


def _sampled_places(shards: Shards) -> list[int]:
    """Rows spread over the source, near the beginnings of groups, as what lies before them is read too."""
    groups, num_bytes = shards.layout.groups, shards.layout.num_bytes
    if shards.addressable:
        return np.unique(np.linspace(0, groups[0] - 1, _ROWS).astype(int)).tolist()
    if not shards.local:
        return []
    rows = np.array(groups)
    first = (np.cumsum(rows) - rows)[rows > 0]
    rows = rows[rows > 0]
    met = np.unique(np.linspace(0, len(rows) - 1, min(_ROWS, len(rows))).astype(int))
    each = -(-_ROWS // len(met))
    reach = max(each, _BYTES * sum(groups) // max(num_bytes, 1) // len(met))
    places = [first[k] + np.linspace(0, min(rows[k], reach) - 1, min(each, rows[k])).astype(int) for k in met]
    return np.unique(np.concatenate(places)).tolist()


def _row_digest(shards: Shards, row: Row) -> str:
    try:
        value = shards.encoded(row)
    except (ValueError, OSError):
        return "unreadable"
    if isinstance(value, bytes):
        return _digest(value)
    try:
        array = np.asarray(value)
    except ValueError:
        return "ragged"
    return _digest(repr((array.shape, array.dtype.str)).encode() + array.tobytes())


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def digest_of(fingerprint: Mapping[str, Any]) -> str:
    """Sixteen hex digits of the data and of the rows that are read, in any order; they name no file."""
    parts = ("rows", "all_files", "sample", "chosen")
    said = json.dumps({part: fingerprint.get(part) for part in parts})
    return _digest(said.encode())


def compare_fingerprints(was: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What differs between two fingerprints, in a few words; None if nothing does."""
    if was["rows"] != now["rows"]:
        return f"{_rows(now['rows'])}, then {_rows(was['rows'])}"
    for before, after in zip(was["files"], now["files"], strict=False):
        if before != after:
            return f"{_file(after)}, then {_file(before)}"
    for (name, before), (same, after) in zip(was["sample"], now["sample"], strict=False):
        if name != same:
            return f"{shown(same)}, then {shown(name)}"
        if before != after:
            return f"{shown(name)} is another image"
    if (was["all_files"], was["files"]) != (now["all_files"], now["files"]):
        return "names or sizes of its files"
    if (was["layout"], was["sample"]) != (now["layout"], now["sample"]):
        return "how the rows lie in its files"
    if was.get("chosen") != now.get("chosen"):
        return "which of the rows are read"
    if was.get("labels") != now.get("labels"):
        return "the labels of its images"
    return None if list(was["order"]) == list(now["order"]) else "the order, as it was read from elsewhere"


def _rows(counts: Sequence[int]) -> str:
    some = ", ".join(map(str, counts[:8])) + (", ..." if len(counts) > 8 else "")
    return f"{sum(counts)} rows in shards of {some}"


def _file(file: Sequence[Any]) -> str:
    name, size = file
    return shown(name) if size is None else f"{shown(name)} of {size} bytes"
