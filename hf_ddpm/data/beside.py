"""What lies beside the images: metadata files with a line for each image, and a card that names data files.

A metadata file (metadata.csv, .jsonl or .parquet, as `datasets` knows them) names images in its column
file_name. It adds nothing to the rows, which are the files of the folder, and takes none away; but a name
without an image is a fault that is told. Columns like mask_file_name make image columns of their own, whose
rows are the lines of the metadata.

A card (README.md, .huggingface.yaml) may say which files are which split. Its patterns choose among the files
of the folder, so that they can't lead out of it, and are never opened as addresses.
"""

from __future__ import annotations

import csv
import fnmatch
import io
import json
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import yaml

from hf_ddpm.data.files import read_regular, shown
from hf_ddpm.data.listing import CARDS
from hf_ddpm.data.pages import rows_per_read
from hf_ddpm.runtime.messages import one_line

_MOST_METADATA, _MOST_CARD = 1 << 30, 4 << 20
_ENDING = "file_name"
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)
# Parts of a pattern that reach any number of folders; each multiplies the work
_MOST_DEEP = 3


class Named(NamedTuple):
    """An image that a line of a metadata file names.

    Attributes:
        column: "image" for the column file_name, else what stands before "_file_name".
        file: the image's path relative to the folder; empty if the line leads out of it or names none.
        where: the line and the file, for messages.
        name: as the line has it.
    """

    column: str
    file: str
    where: str
    name: str


def read_metadata(root: str, file: str) -> list[Named]:
    """The images that a metadata file names.

    Args:
        root: the folder.
        file: the metadata file, relative to the folder.

    Raises:
        ValueError: it can't be read, or has no column of names.
    """
    path = os.path.join(root, file)
    found, columns = [], False
    try:
        for where, row in _READERS[posixpath.splitext(file)[1].lower()](path, None):
            for key, value in row.items():
                if isinstance(key, str) and (key == _ENDING or key.endswith(f"_{_ENDING}")):
                    columns = True
                    column = key[: -len(_ENDING) - 1] or "image"
                    name = value if isinstance(value, str) else ""
                    found.append(Named(column, _inside(file, name), f"{where} of {shown(file)}", name))
                columns |= key == "file_names" or str(key).endswith("_file_names")
    # pyarrow, csv, json and the text's encoding have no common error
    except Exception as error:
        raise ValueError(f"can't read {shown(path)}: {one_line(error, 120)}") from error
    if not columns:
        raise ValueError(f"{shown(path)} has no column file_name, so that nobody knows which images it means")
    return found


def read_column(root: str, files: Sequence[str], column: str) -> dict[str, Any] | None:
    """What a column of the metadata says of each image that a line names, by the image's path.

    Args:
        root: the folder.
        files: its metadata files, relative to the folder.
        column: such as a label.

    Returns:
        By paths relative to the folder; None if no file has the column.

    Raises:
        ValueError: a file can't be read, or lines say different things of one image.
    """
    found: dict[str, Any] = {}
    there = False
    for file in files:
        path = os.path.join(root, file)
        try:
            for where, row in _READERS[posixpath.splitext(file)[1].lower()](path, column):
                there |= column in row
                names = [value for key, value in row.items() if str(key).endswith(_ENDING)]
                for name in (_inside(file, name) for name in names if isinstance(name, str)):
                    value = row.get(column)
                    if found.setdefault(name, value) != value:
                        raise ValueError(f"{where} says something else of {shown(name)} than a line before")
        # As in `read_metadata`
        except Exception as error:
            raise ValueError(f"can't read {shown(path)}: {one_line(error, 120)}") from error
    return found if there else None


def _inside(file: str, name: str) -> str:
    """The path relative to the folder of an image that a metadata file names, or nothing."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(file), name.replace("\\", "/")))
    return "" if not name or path.startswith(("../", "/")) or path in (".", "..") else path


def _csv_rows(path: str, column: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(read_regular(path, _MOST_METADATA).decode("utf-8-sig"), newline=""))
    for row in reader:
        yield f"line {reader.line_num}", row


def _json_rows(path: str, column: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(read_regular(path, _MOST_METADATA).split(b"\n"), 1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no object")
            yield f"line {number}", row


def _parquet_rows(path: str, column: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, "rb") as file:
        parquet = pq.ParquetFile(file, pre_buffer=False)
        names = parquet.schema_arrow.names
        columns = [name for name in names if name == column or re.search(rf"(^|_){_ENDING}s?$", name)]
        number = 0
        for group in range(parquet.num_row_groups):
            for name in columns:
                rows_per_read(parquet, file, group, name, 1)
            for batch in parquet.iter_batches(64, [group], columns, use_threads=False):
                for row in batch.to_pylist():
                    yield f"row {number}", row
                    number += 1


_READERS = {".csv": _csv_rows, ".jsonl": _json_rows, ".parquet": _parquet_rows}


def split_by_card(root: str, files: Sequence[str]) -> dict[str, list[str]]:
    """The splits that a card in the folder makes.

    Args:
        root: the folder.
        files: what lies in it, relative to it.

    Returns:
        The files of each split; empty if there is no card that names data files.

    Raises:
        ValueError: a card that can't be read, that describes several data sets, or names files that aren't
            there or that lie outside of the folder.
    """
    for card in CARDS:
        path = os.path.join(root, card)
        if os.path.isfile(path):
            try:
                text = read_regular(path, _MOST_CARD).decode("utf-8", "replace")
                match = _FRONT_MATTER.match(text) if card.endswith(".md") else None
                said = yaml.safe_load(match[1] if match else "" if card.endswith(".md") else text)
            # YAML has a dozen kinds of errors, deep nesting among them
            except Exception as error:
                raise ValueError(f"can't read {shown(path)}: {one_line(error, 120)}") from error
            patterns = _data_files(path, said.get("configs") if isinstance(said, dict) else None)
            if patterns:
                return {split: _matching(path, some, files) for split, some in patterns.items()}
    return {}


def _data_files(path: str, configs: Any) -> dict[str, list[str]]:
    """The patterns of each split in the `configs` of a card."""
    if not isinstance(configs, list) or not all(isinstance(config, dict) for config in configs):
        return {}
    configs = [config for config in configs if config.get("data_files") or config.get("data_dir")]
    default = [c for c in configs if c.get("default") is True or c.get("config_name") == "default"]
    if len(configs) > 1 and len(default) != 1:
        raise ValueError(
            f"{shown(path)} describes {len(configs)} data sets; give the folder, or files, of one"
        )
    if not configs:
        return {}
    config = (default or configs)[0]
    folder, said = config.get("data_dir") or "", config.get("data_files") or "**"
    if isinstance(said, list) and all(isinstance(item, dict) for item in said):
        said = {item.get("split"): item.get("path") for item in said}
    if not isinstance(said, dict):
        said = {"train": said}
    found: dict[str, list[str]] = {}
    for split, patterns in said.items():
        patterns = patterns if isinstance(patterns, list) else [patterns]
        if not all(isinstance(text, str) for text in (split, folder, *patterns)):
            raise ValueError(
                f"{shown(path)}: data_files must name a path, or a list of paths, for each split"
            )
        found[split] = [posixpath.join(folder, pattern) for pattern in patterns]
    return found


def _matching(path: str, patterns: list[str], files: Sequence[str]) -> list[str]:
    """The files that any of the patterns means, each once."""
    found: dict[str, None] = {}
    for pattern in patterns:
        parts = [part for part in pattern.split("/") if part not in ("", ".")]
        if pattern.endswith("/"):
            parts.append("**")
        if ".." in parts or pattern.startswith("/") or re.search(r"::|://|\\|^[A-Za-z]:", pattern):
            raise ValueError(f"{shown(path)} names data files outside of the folder: {shown(pattern)!r}")
        if parts.count("**") > _MOST_DEEP:
            raise ValueError(f"{shown(path)}: {shown(pattern)!r} has '**' more than {_MOST_DEEP} times")
        matching = [file for file in files if _matches(parts, file.split("/"))]
        if not matching:
            raise ValueError(f"{shown(path)} names data files that are not there: {shown(pattern)!r}")
        found.update(dict.fromkeys(matching))
    return list(found)


def _matches(pattern: list[str], path: list[str]) -> bool:
    if not pattern or not path:
        return not path and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        return any(_matches(pattern[1:], path[i:]) for i in range(len(path) + 1))
    return fnmatch.fnmatchcase(path[0], pattern[0]) and _matches(pattern[1:], path[1:])
