"""The class of each image: a column of the data, or the folders of a folder of images, becomes numbers.

    ClassLabel       its names, numbered as it numbers them
    text             the different texts, sorted
    whole numbers    the different numbers, ascending; their names are these numbers
    image files      the name of the folder that a file lies in, or a column of the metadata beside the files

The number of a class is a function of the names alone, not of the order in which files or rows are read. A
split that is compared with another one takes the other's names, so that equal names have equal numbers. All
labels are read before the first image is. This file knows names and rows. It decodes no image.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import datasets
import numpy as np
import pyarrow as pa

from hf_ddpm.data.beside import read_column
from hf_ddpm.data.files import shown as shown_path
from hf_ddpm.data.listing import SPLITS
from hf_ddpm.data.shards import Shards
from hf_ddpm.denoiser import MAX_CLASSES
from hf_ddpm.runtime.messages import CONTROL, did_you_mean, shorten, shown
from hf_ddpm.shown import fields_line

LONGEST_LABEL = 120  # characters of a class's name
LABEL_RULE = f"text of 1 to {LONGEST_LABEL} characters that can be printed in a line"
FOLDERS = "label"  # what `datasets` calls the names of the folders that image files lie in
MISSING = -1  # the label of a row that has none, as `datasets` marks it
KINDS = "allowed: a ClassLabel, whole numbers or text"


def is_label(name: Any) -> bool:
    """Whether something can be the name of a class: text of a line, without spaces around it."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= LONGEST_LABEL
        and name == name.strip()
        and not CONTROL.search(name)
    )


@dataclass(frozen=True, eq=False)
class Labels:
    """The classes of a split's images.

    Attributes:
        names: of the classes, by their numbers.
        ids: the class of each row of the whole split, int64; −1 of a row that isn't looked at, as it lies
            outside of the slice that is read.
        column: where they come from.
    """

    names: tuple[str, ...]
    ids: np.ndarray
    column: str

    __repr__ = fields_line

    @property
    def digest(self) -> str:
        """Sixteen hex digits of the names and of each row's class."""
        found = hashlib.blake2b(json.dumps(self.names).encode(), digest_size=8)
        found.update(self.ids.astype("<i8").tobytes())
        return found.hexdigest()

    def counts(self, rows: np.ndarray) -> list[int]:
        """How many of some rows of the split each class has."""
        return np.bincount(self.ids[rows], minlength=len(self.names)).tolist()


def read_labels(shards: Shards, column: str, names: Sequence[str] | None = None) -> Labels:
    """The classes of a split's images, those held out among them.

    Args:
        shards: the rows that are read.
        column: of the labels; for image files "label" means the names of their folders, unless the metadata
            beside them has a column of that name.
        names: of the classes that labels may name, in the order of their numbers; None for those that the
            rows have.

    Raises:
        ValueError: no such column, labels of another kind, or a row whose label is missing, is −1 or is none
            of `names`; the message names the row.
    """
    rows = shards.with_held_out.chosen.all
    whole = shards.whole
    if shards.source.kind == "images":
        found, known = _of_files(whole, column), None
    else:
        found, known = _of_column(whole, column)
    codes, values = _numbered(found, rows)
    if bad := rows[codes == MISSING].tolist():
        more = f" (nor have {len(bad) - 1:,} more)" if len(bad) > 1 else ""
        raise ValueError(f"{_row(whole, bad[0])} has no label in column {shown(column)}{more}")

    def refuse(value: Any, why: str, name: str | None = None) -> NoReturn:
        first = rows[codes == values.index(value)].tolist()[0]
        raise ValueError(f"{_row(whole, first)} has the label {shown(value if name is None else name)}{why}")

    if known is not None:  # a ClassLabel's numbers
        if wrong := [value for value in values if not 0 <= value < len(known)]:
            refuse(wrong[0], f"; allowed in column {shown(column)}: 0 to {len(known) - 1}, as it has names")
        texts = [known[value] for value in values]
    else:
        if wrong := [value for value in values if type(value) is int and value < 0]:
            refuse(wrong[0], "; allowed: whole numbers >= 0, as numbers below 0 mark what has no label")
        texts = [_text(value) for value in values]
    own = known if known is not None else [_text(value) for value in sorted(values)]
    for text, value in zip(texts, values, strict=True):
        if not is_label(text):
            refuse(value, f"; allowed: {LABEL_RULE}")
    if len(own) > MAX_CLASSES:
        raise ValueError(f"column {shown(column)} has {len(own):,} classes; allowed: at most {MAX_CLASSES:,}")
    numbers = {name: number for number, name in enumerate(own if names is None else names)}
    for text, value in zip(texts, values, strict=True):
        if text not in numbers:
            some = shorten(", ".join(numbers), 60)
            refuse(value, f"{did_you_mean(text, numbers)}; allowed: {some}", text if known else None)
    ids = np.full(sum(whole.counts), MISSING, np.int64)
    ids[rows] = np.array([numbers[text] for text in texts], np.int64)[codes]
    return Labels(tuple(numbers), ids, column)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _row(shards: Shards, row: int) -> str:
    """What messages call a row of the whole split."""
    if shards.addressable:
        return shown_path(shards.source.files[row])
    ends = np.cumsum(shards.counts)
    shard = int(np.searchsorted(ends, row, side="right"))
    return f"row {row - ends[shard] + shards.counts[shard]} of {shown_path(shards.names[shard])}"


def _numbered(found: Sequence[Any], rows: np.ndarray) -> tuple[np.ndarray, list[Any]]:
    """Numbers of the values at some rows, and the value of each number; `MISSING` where there is none.

    Args:
        found: pieces of the column, end to end: a list of values, or arrays of codes with the values.
        rows: of the whole split, ascending.
    """
    numbers: dict[Any, int] = {}
    codes, start = [], 0
    for piece, values in found:
        mine = rows[np.searchsorted(rows, start) : np.searchsorted(rows, start + len(piece))] - start
        start += len(piece)
        used, inverse = np.unique(piece[mine], return_inverse=True)
        new = [
            MISSING if code == MISSING else numbers.setdefault(values[code], len(numbers)) for code in used
        ]
        codes.append(np.array(new, np.int64)[inverse])
    return np.concatenate(codes) if codes else np.empty(0, np.int64), list(numbers)


# Columns


def _of_column(shards: Shards, column: str) -> tuple[list[tuple[np.ndarray, list[Any]]], list[str] | None]:
    """A column's values, as codes of different values, and the names of a ClassLabel."""
    features = shards.source.features
    if column not in features:
        columns = shorten(", ".join(features), 120)
        raise ValueError(
            f"no column {shown(column)} of labels{did_you_mean(column, features)}; there are: {columns}"
        )
    feature: Any = features[column]
    known = list(feature.names or []) if isinstance(feature, datasets.ClassLabel) else None
    plain = datasets.Value("int64") if known is not None else feature
    source = replace(shards.source, features=datasets.Features({column: plain}))
    labels = Shards(source, column)
    for number, name in enumerate(known or ()):
        if not is_label(name):
            raise ValueError(
                f"class {number} of column {shown(column)} is named {shown(name)}; allowed: {LABEL_RULE}"
            )
    parquet = source.kind == "parquet"

    def read(shard: int) -> list[tuple[np.ndarray, list[Any]]]:
        if parquet:
            _check_same(feature, labels.feature_of(shard), column, labels.names[shard])
        return [_encoded(chunk, column, labels.names[shard]) for chunk in labels.chunks(shard)]

    # In threads, as reading a remote column is mostly waiting
    with ThreadPoolExecutor(8 if parquet else 1) as threads:
        pieces = [piece for some in threads.map(read, range(len(labels.names))) for piece in some]
    return pieces, known


def _kind(feature: Any) -> Any:
    return list(feature.names or []) if isinstance(feature, datasets.ClassLabel) else None


def _check_same(first: Any, other: Any, column: str, file: str) -> None:
    """Refuse files whose ClassLabels differ: their numbers would mean different classes."""
    if _kind(first) != _kind(other):
        raise ValueError(
            f"{shown_path(file)} has other classes in column {shown(column)} than the first file, or in "
            "another order; allowed: the same ClassLabel in all files, or text"
        )


def _encoded(chunk: pa.Array, column: str, file: str) -> tuple[np.ndarray, list[Any]]:
    """Values as codes, int64, and the different values; `MISSING` for none and for empty text."""
    kind = chunk.type
    if pa.types.is_dictionary(kind):
        chunk, kind = chunk.dictionary_decode(), kind.value_type
    if pa.types.is_null(kind):
        return np.full(len(chunk), MISSING, np.int64), []
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not (text or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise ValueError(
            f"column {shown(column)} of {shown_path(file)} holds {shorten(str(kind), 40)}; {KINDS}"
        )
    coded = chunk.dictionary_encode()
    values = coded.dictionary.to_pylist()
    codes = coded.indices.fill_null(MISSING).to_numpy(zero_copy_only=False).astype(np.int64)
    for absent in ("", MISSING):
        if absent in values:
            codes[codes == values.index(absent)] = MISSING
    return codes, values


# Folders of image files, and the metadata beside them


def _of_files(shards: Shards, column: str) -> list[tuple[np.ndarray, list[Any]]]:
    """The label of each image file."""
    source = shards.source
    assert source.root is not None
    files = [shards.relative(file) for file in source.files]
    beside = read_column(source.root, source.metadata, column)
    if beside is not None:
        found: list[Any] = [beside.get(file) for file in files]
    elif column == FOLDERS:
        found = [_folder(file, source.split if source.by_folder else None) for file in files]
    else:
        metadata = ", and the columns of the metadata" * bool(source.metadata)
        raise ValueError(
            f"no column {shown(column)} of labels; there are: {FOLDERS}, the names of the folders{metadata}"
        )
    # The text -1, as a CSV file knows no types
    found = [None if value in ("", MISSING, str(MISSING)) else value for value in found]
    kinds = {type(value) for value in found if value is not None}
    if len(kinds) > 1 or not kinds <= {str, int, bool}:
        words = " and ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(f"column {shown(column)} of the metadata holds {shorten(words, 60)}; {KINDS}")
    numbers: dict[Any, int] = {}
    codes = [MISSING if value is None else numbers.setdefault(value, len(numbers)) for value in found]
    return [(np.array(codes, np.int64), list(numbers))]


def _folder(file: str, split: str | None) -> str | None:
    """The name of the folder that a file lies in, below that of its split; None if there is none."""
    folders = os.path.dirname(file).split("/") if "/" in file else []
    if split is not None:
        named = [SPLITS.get(folder.lower()) == split for folder in folders]
        folders = folders[named.index(True) + 1 :] if any(named) else folders
    return folders[-1] if folders else None
