"""Where images come from: the name of a data set becomes a `datasets` stream and its image column.

This file knows paths, the Hub and columns. It looks at no image.
"""

from __future__ import annotations

import os
from pathlib import Path
from dataclasses import dataclass
from typing import Any, Literal

import datasets
from datasets import Array2D, Array3D, LargeList, List, Value

from hf_ddpm.runtime.messages import one_line


@dataclass(frozen=True)
class Source:
    """For now; the helper `files` has the real one."""

    name: str
    split: str
    kind: Literal["images", "parquet", "stream"]
    files: list[str]
    features: datasets.Features
    dataset: datasets.IterableDataset | None = None
    root: str | None = None


def open_source(source: str | os.PathLike[str], split: str) -> Source:
    dataset, files = _open_source(source, split)
    parquet = bool(files) and all(file.endswith(".parquet") for file in files)
    images = bool(files) and all(file.endswith((".png", ".jpg")) for file in files)
    kind = "parquet" if parquet else "images" if images else "stream"
    root = os.path.abspath(source) if os.path.isdir(source) else None
    return Source(os.fspath(source), split, kind, files, dataset.features or datasets.Features(), dataset.decode(False) if kind == "stream" else None, root)


def _open_source(source: str | os.PathLike[str], split: str) -> tuple[datasets.IterableDataset, list[str]]:
    """The split's stream and its data files.

    Args:
        source: "digits" (embedded), a folder of images or of parquet files, a parquet file, or a Hub id.
        split: name of the split.

    Returns:
        The stream, and the paths or addresses of its files.

    Raises:
        ValueError: nothing there that can be read, or no such split.
    """
    if not isinstance(source, (str, os.PathLike)) or not os.fspath(source):
        raise ValueError(f"the data set must be 'digits', a path or a Hub id, got {source!r}")
    name = os.fspath(source)
    path = Path(__file__).parent / "digits" if name == "digits" else Path(name).expanduser()
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(f"{name} is a file, but not a .parquet file: give a .parquet file or a folder")
    like_a_path = path.is_absolute() or name[0] == "." or path.suffix == ".parquet" or name.count("/") > 1
    if not path.exists() and like_a_path:
        raise ValueError(f"no file or folder {name} (it looks like a path, so the Hub was not asked)")
    try:
        if path.is_file():
            builder = datasets.load_dataset_builder("parquet", data_files=str(path.resolve()))
        else:
            builder = datasets.load_dataset_builder(str(path.resolve()) if path.is_dir() else name)
        splits: Any = builder.as_streaming_dataset()
    # What `datasets`, the Hub client, fsspec and pyarrow raise has no common class
    except Exception as error:
        tried = "" if path.exists() else "no such folder, and from the Hub: "
        raise ValueError(f"can't read {name!r} as a data set: {tried}{one_line(error)}") from error
    if split not in splits:
        raise ValueError(f"no split {split!r} in {name}; it has {', '.join(map(str, splits))}")
    return splits[split], [str(file) for file in (builder.config.data_files or {}).get(split, [])]


def find_column(features: datasets.Features, column: str | None) -> str:
    """The column of the images: the given one, or the only one that holds images.

    Args:
        dataset: the stream.
        column: a column's name, None for the only one that holds images.

    Raises:
        ValueError: no such column, or not exactly one that holds images.
    """
    columns = ", ".join(features) or "no known columns"
    if column is not None:
        if column not in features:
            raise ValueError(f"no column {column!r}; there are: {columns}")
        return column
    found = [name for name, feature in features.items() if _holds_images(feature)]
    if not found:
        raise ValueError(f"no image column; there are: {columns}")
    if len(found) > 1:
        raise ValueError(f"several image columns, choose one with column=: {', '.join(found)}")
    return found[0]


def _holds_images(feature: Any) -> bool:
    if isinstance(feature, (Array2D, Array3D)):
        return feature.dtype == "uint8"
    depth = 0
    while isinstance(feature, (List, LargeList)):
        feature, depth = feature.feature, depth + 1
    if depth:
        return depth in (2, 3) and isinstance(feature, Value) and feature.dtype == "uint8"
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)
