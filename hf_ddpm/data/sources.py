"""Where images come from: the name of a data set becomes a list of files, or a `datasets` stream.

A local folder is listed by us (listing.py), so that nothing in a name or in a page beside the images means
anything; `datasets` is asked for what lies on the Hub, and for local files that are neither images nor
parquet. This file knows paths, the Hub and columns. It looks at no image.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow.parquet as pq
from datasets import Array2D, Array3D, LargeList, List, Value
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.packaged_modules.arrow.arrow import Arrow
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from huggingface_hub.utils import HFValidationError, validate_repo_id

from hf_ddpm.data.beside import read_metadata, split_by_card
from hf_ddpm.data.files import shown
from hf_ddpm.data.listing import (
    SPLITS,
    UNREADABLE,
    Listing,
    list_folder,
    split_by_folder,
    split_by_name,
    unused_splits,
)
from hf_ddpm.runtime.hub import asking_the_hub, looks_like_path, or_near, quiet_client
from hf_ddpm.runtime.messages import one_line
from hf_ddpm.shown import fields_line
from hf_ddpm.spelling import did_you_mean

PARQUET = ".parquet"
BESIDE = "beside the folders of the splits"
NO_IMAGES_READ, NO_PARQUET_READ = "images beside parquet files", "parquet files beside images"
UNNAMED = "not named by the card's data_files"
NO_LINE = "without a line in the metadata"
_NAMED = 3
_IMAGE = datasets.Features({"image": datasets.Image()})
# What `datasets` reads of a local folder in which there are no image files and no parquet files
_OTHERS: dict[str, Any] = {
    ".zip": ImageFolder,
    ".tar": WebDataset,
    ".arrow": Arrow,
}


class NoSplit(ValueError):
    """A data set has no split of the name that was given; `splits` are those that it has."""

    def __init__(self, words: str, splits: Sequence[str] = ()):
        super().__init__(words)
        self.splits = list(splits)


@dataclass(frozen=True)
class Source:
    """One split of a data set: which rows there are, and where.

    Attributes:
        name: what messages call the data set.
        split: name of the split.
        kind: "images": each file is a row. "parquet": the rows of parquet files, local or on the Hub.
            "stream": the rows of `dataset`.
        files: of the split: image files, or parquet files, by absolute paths (or addresses on the Hub), in
            the order of the rows; of a stream its data files, as far as they are known.
        features: the columns.
        dataset: the stream, undecoded; None for the other kinds.
        root: the folder that paths in rows are confined to; None where rows may name no file.
        left_out: names of what lies in the folder and is no row, by the reason.
        notes: what else a person should know of the choice of rows, in sentences.
        lost: lines of metadata files that name an image which is not there, in words.
        columns: for image files with several columns of images, the files of each.
        metadata: metadata files beside image files, relative to `root`.
        by_folder: whether the split is that of a folder that is named as one.
    """

    name: str
    split: str
    kind: Literal["images", "parquet", "stream"]
    files: list[str]
    features: datasets.Features
    dataset: datasets.IterableDataset | None = None
    root: str | None = None
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    lost: Sequence[str] = ()
    columns: Mapping[str, list[str]] = field(default_factory=dict)
    metadata: Sequence[str] = ()
    by_folder: bool = False

    __repr__ = fields_line

    @property
    def title(self) -> str:
        """What messages call this split."""
        return f"{shown(self.name)} ({self.split})"

    def select_column(self, column: str | None) -> tuple[Source, str]:
        """The source, read for the images of one column, and that column's name; see `find_column`."""
        column = find_column(self.features, column)
        return replace(self, files=self.columns.get(column, self.files)), column


def open_source(source: str | os.PathLike[str], split: str) -> Source:
    """One split of a data set.

    Args:
        source: "digits" (embedded), a folder of images or of parquet files, a parquet file, or a Hub id.
        split: name of the split.

    Raises:
        ValueError: nothing there that can be read, or no such split.
    """
    if not isinstance(source, (str, os.PathLike)) or not os.fspath(source):
        raise ValueError(f"the data set must be 'digits', a path or a Hub id, got {source!r}")
    name = os.fsdecode(source)
    path = str(Path(__file__).parent / "digits") if name == "digits" else os.path.expanduser(name)
    if os.path.isdir(path):
        return _open_folder(name, os.path.abspath(path), split)
    like_parquet = path.lower().endswith(PARQUET)
    if os.path.isfile(path):
        if not like_parquet:
            hint = ", such as one with this file in it" if path.lower().endswith(tuple(_OTHERS)) else ""
            raise ValueError(
                f"{shown(name)} is a file, but not a .parquet file: give a .parquet file or a folder{hint}"
            )
        _check_split(name, split, ["train"])
        return _parquet_source(name, "train", [os.path.abspath(path)], os.path.dirname(os.path.abspath(path)))
    if os.path.lexists(path):
        raise ValueError(f"{shown(name)} is neither a folder nor a regular file")
    if looks_like_path(name) or like_parquet:
        raise ValueError(
            f"no file or folder {shown(name)}{or_near(name, PARQUET)}; it looks like a path, so the Hub was "
            "not asked"
        )
    return _open_hub(name, split)


def _open_hub(name: str, split: str) -> Source:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"no folder {shown(name)}{or_near(name, PARQUET)}, and no data set of the Hub can have this name"
        ) from error
    if "/" not in name and importlib.util.find_spec(f"datasets.packaged_modules.{name}"):
        raise ValueError(f"no folder {name}: it is the name of a file format, not of a data set")
    asking_the_hub(name, PARQUET)
    try:
        with quiet_client():  # which would print a line for each of its tries
            builder = datasets.load_dataset_builder(name)
            splits: Any = builder.as_streaming_dataset()
    # What `datasets`, the Hub client, fsspec and pyarrow raise has no common class
    except Exception as error:
        raise ValueError(
            f"can't read {name!r} as a data set: no such folder{or_near(name, PARQUET)}, and from the Hub: "
            f"{one_line(error, 150)}"
        ) from error
    split = _check_split(name, split, list(map(str, splits)))
    files = [str(file) for file in (builder.config.data_files or {}).get(split, [])]
    dataset = splits[split]
    kind = "parquet" if files and all(file.endswith(".parquet") for file in files) else "stream"
    if dataset.features is None:
        raise ValueError(f"can't read {name!r}: `datasets` doesn't know its columns before reading all of it")
    return Source(name, split, kind, files, dataset.features, dataset.decode(False))


def _open_folder(name: str, root: str, split: str) -> Source:
    listing = list_folder(root)
    if not listing.images and not listing.parquet:
        return _open_other(name, root, split, listing)
    splits = split_by_card(root, sorted(listing.images + listing.parquet))
    named = [file for files in splits.values() for file in files]
    if named:
        parquet = named[0] in set(listing.parquet)
    else:
        parquet = bool(listing.parquet) and (not listing.images or _images_in_parquet(root, listing))
    files, others = listing.parquet, listing.images
    if not parquet:
        files, others = others, files
    listing.leave_out(NO_IMAGES_READ if parquet else NO_PARQUET_READ, *others)
    if named:
        splits = {split: [file for file in some if file in set(files)] for split, some in splits.items()}
        listing.leave_out(UNNAMED, *sorted(set(files) - set(named)))
    else:
        splits, beside = split_by_folder(files)
        listing.leave_out(BESIDE, *beside)
    by_folder = bool(splits) and not named
    splits = splits or (split_by_name(files) if parquet else {})
    notes = [] if splits else unused_splits(files)
    splits = splits or {"train": files}
    split = _check_split(name, split, list(splits), listing)
    paths = [os.path.join(root, file) for file in splits[split]]
    if parquet:
        return _parquet_source(name, split, paths, root, listing.left_out, notes)
    source = Source(name, split, "images", paths, _IMAGE, None, root, listing.left_out, notes)
    source = replace(source, metadata=listing.metadata, by_folder=by_folder)
    return _with_metadata(source, listing, splits[split]) if listing.metadata else source


def _with_metadata(source: Source, listing: Listing, files: list[str]) -> Source:
    """A folder's images, and what its metadata files say of them."""
    assert source.root is not None
    lines = [line for file in listing.metadata for line in read_metadata(source.root, file)]
    known, mine = set(listing.images), set(files)
    lost = [f"{line.where} names {shown(line.name)!r}, and no such image is here" for line in lines]
    lost = [words for words, line in zip(lost, lines, strict=True) if line.file not in known]
    named = {line.file for line in lines}
    unnamed = [file for file in files if file not in named]
    where = shown(listing.metadata[0])
    names = list(dict.fromkeys(line.column for line in lines))
    if names in ([], ["image"]):
        note = [
            f"{len(unnamed):,} of {len(files):,} images have no line in {where}, and are read all the same"
        ]
        return replace(source, lost=lost, notes=[*source.notes, *note[: len(unnamed)]])
    columns = {
        name: [
            os.path.join(source.root, line.file)
            for line in lines
            if line.column == name and line.file in mine
        ]
        for name in names
    }
    left_out = {**source.left_out, NO_LINE: unnamed} if unnamed else source.left_out
    features = datasets.Features({name: datasets.Image() for name in names})
    return replace(source, features=features, columns=columns, lost=lost, left_out=left_out)


def _open_other(name: str, root: str, split: str, listing: Listing) -> Source:
    """A folder without image files and parquet files: what else `datasets` reads."""
    unread = listing.left_out.get(UNREADABLE, [])
    found = {suffix: [file for file in unread if file.lower().endswith(suffix)] for suffix in _OTHERS}
    suffix = next((suffix for suffix, files in found.items() if files), None)
    if suffix is None:
        reason = describe_left_out(listing.left_out) or "it is empty"
        heic = any(file.lower().endswith((".heic", ".heif")) for file in unread)
        hint = "; HEIC isn't read: save the images as JPEG or PNG" if heic else ""
        raise ValueError(f"no images in {shown(name)}: {reason}{hint}")
    files = found[suffix]
    rest = sorted(set(listing.left_out.pop(UNREADABLE)) - set(files))
    listing.leave_out(UNREADABLE, *rest)
    splits = split_by_folder(files)[0] or split_by_name(files) or {"train": files}
    split = _check_split(name, split, list(splits))
    paths = [os.path.join(root, file) for file in splits[split]]
    odd = [path for path in paths if "::" in path or "://" in path]
    if odd:
        raise ValueError(
            f"{shown(odd[0])}: '::' and '://' in the path of a {suffix} file can't be read; rename it"
        )
    try:
        builder = _OTHERS[suffix](data_files=DataFilesDict({split: DataFilesList(paths, [()] * len(paths))}))
        streams: Any = builder.as_streaming_dataset()
        dataset = streams[split]
        features, dataset = dataset.features, dataset.decode(False)
    # What `datasets`, fsspec and pyarrow raise has no common class
    except Exception as error:
        raise ValueError(f"can't read {shown(name)!r} as a data set: {one_line(error, 150)}") from error
    return Source(name, split, "stream", paths, features, dataset, root, listing.left_out)


def _images_in_parquet(root: str, listing: Listing) -> bool:
    """Whether a folder of both, images and parquet files, is a data set of parquet files."""
    features = _features_of(os.path.join(root, listing.parquet[0]))
    return any(_holds_images(feature) for feature in features.values())


def same_place(one: str, other: str) -> bool:
    """Whether two names of data sets mean the same folder, file or repository."""
    places = [os.path.realpath(os.path.expanduser(name)) for name in (one, other)]
    return one == other or (places[0] == places[1] and os.path.exists(places[0]))


def describe_left_out(left_out: Mapping[str, Sequence[str]]) -> str:
    """What is left out, counted and named; empty if it is nothing."""
    found = [f"{why}: {len(names):,} ({some(names)})" for why, names in left_out.items()]
    return f"left out: {'; '.join(found)}" if found else ""


def some(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    first = ", ".join(shown(name) for name in names[:_NAMED])
    return first if len(names) <= _NAMED else f"{first} and {len(names) - _NAMED:,} more"


def _check_split(name: str, split: str, splits: list[str], listing: Listing | None = None) -> str:
    """The split's name as the data set has it: "val" is found as "validation"."""
    if split in splits:
        return split
    same = SPLITS.get(str(split).lower())
    if same in splits:
        return same
    beside = listing.left_out.get(BESIDE) if listing else None
    also = f"; {len(beside):,} images lie beside the folders of its splits" if beside else ""
    hint = did_you_mean(split, splits)
    words = f"no split {shown(str(split))!r} in {shown(name)}{hint}; it has {some(splits)}{also}"
    raise NoSplit(words, splits)


def _parquet_source(
    name: str,
    split: str,
    files: list[str],
    root: str,
    left_out: Mapping[str, Sequence[str]] | None = None,
    notes: Sequence[str] = (),
) -> Source:
    return Source(name, split, "parquet", files, _features_of(files[0]), None, root, left_out or {}, notes)


def _features_of(file: str) -> datasets.Features:
    try:
        with pq.ParquetFile(file) as parquet:
            return datasets.Features.from_arrow_schema(parquet.schema_arrow)
    # The schema may hold anything, for which `datasets` has no common error
    except Exception as error:
        raise ValueError(f"can't read {shown(file)}: {one_line(error, 150)}") from error


def find_column(features: Mapping[str, Any], column: str | None) -> str:
    """The column of the images: the given one, or the only one that holds images.

    Args:
        features: the columns.
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
