"""What lies in a local folder: image files, parquet files, and what is neither; and which splits they make.

Every file is listed by its name as it stands, so that no character of a name means anything. Paths are
relative to the folder, with "/" between their parts, sorted as text: the same on every machine.

    hidden files and folders (names that begin with "." or "__")  are left out
    links to files     are followed, wherever they lead, to regular files
    links to folders   are left out, as they may lead round in a circle or to the rest of the disk

An image is told by its suffix, or by its first bytes where the suffix says nothing. This file decodes none.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from datasets.config import REPOCARD_FILENAME, REPOYAML_FILENAME
from PIL import features

from hf_ddpm.data.files import open_regular, shown
from hf_ddpm.shown import fields_line

# What the suffix says of a file: the format by PIL's name
SUFFIXES = {
    **dict.fromkeys((".png", ".apng"), "PNG"),
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), "JPEG"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".ppm", ".pgm", ".pbm", ".pnm", ".pfm"), "PPM"),
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".avif": "AVIF",
}
# Not looked into, as a folder of images may hold one for each image
_OTHER_SUFFIXES = {".txt", ".json", ".jsonl", ".xml", ".csv", ".tsv", ".npy", ".md", ".yaml", ".yml"}
_FIRST_BYTES = [
    ("PNG", re.compile(rb"\x89PNG\r\n\x1a\n")),
    ("JPEG", re.compile(rb"\xff\xd8\xff")),
    ("GIF", re.compile(rb"GIF8[79]a")),
    ("WEBP", re.compile(rb"RIFF....WEBP", re.DOTALL)),
    ("AVIF", re.compile(rb"....ftypavi[fs]", re.DOTALL)),
    ("BMP", re.compile(rb"BM.{4}\0{4}.{4}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.DOTALL)),
    ("PPM", re.compile(rb"P[1-6]\s+(#[^\n]*\n\s*)*\d+\s+\d+\s")),
    ("TIFF", re.compile(rb"II[*+]\0|MM\0[*+]")),
]
_LOOKED_AT = 64
# Levels of folders below which no folder is taken for a split
_DEEPEST = 8

# What may say which files are which split (beside.py)
CARDS = (REPOCARD_FILENAME, REPOYAML_FILENAME)
# Names of splits, as `datasets` knows them
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# A shard's number as datasets, or a person, writes it behind the name of a split: -00000-of-00008, _1, 3
_NUMBER = r"(?:[-_. ]?\d+(?:[-_. ]of[-_. ]\d+)?)?(?:-[0-9a-f]{16})?"
_WORD = "|".join(SPLITS)
_SPLIT_NAME = re.compile(rf"({_WORD}){_NUMBER}", re.IGNORECASE)
_PREFIXED = re.compile(rf"(.*[-_. ])({_WORD}){_NUMBER}", re.IGNORECASE | re.DOTALL)
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}(?:-[0-9a-f]{16})?")

UNREADABLE = "no images that can be read here"
HIDDEN = "hidden"
LINKED = "links to folders"
BROKEN_LINK = "links that lead to no file"
SPECIAL = "no regular files"
CLOSED = "folders that can't be opened"


@dataclass
class Listing:
    """The files of a folder.

    Attributes:
        images: image files, relative to the folder, sorted.
        parquet: parquet files, likewise; no metadata.parquet.
        metadata: files metadata.csv, metadata.jsonl and metadata.parquet.
        left_out: everything else, by the reason why it is left out.
    """

    images: list[str] = field(default_factory=list)
    parquet: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    __repr__ = fields_line

    def leave_out(self, why: str, *names: str) -> None:
        """Count files, if any, among those that are left out."""
        if names:
            self.left_out.setdefault(why, []).extend(names)


def list_folder(root: str) -> Listing:
    """List a folder and the folders in it.

    Raises:
        ValueError: the folder itself can't be opened.
    """
    listing = Listing()
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    name = f"{folder}/{entry.name}" if folder else entry.name
                    if _list_entry(listing, entry, name):
                        folders.append(name)
        except OSError as error:
            if not folder:
                raise ValueError(f"can't open the folder {shown(root)}: {error.strerror}") from error
            listing.leave_out(CLOSED, folder)
    for names in (listing.images, listing.parquet, listing.metadata, *listing.left_out.values()):
        names.sort()
    return listing


def _list_entry(listing: Listing, entry: os.DirEntry[str], name: str) -> bool:
    """Put a file where it belongs; True for a folder that is to be listed itself."""
    if name in CARDS:
        pass
    elif entry.name.startswith((".", "__")):
        listing.leave_out(HIDDEN, name)
    elif entry.is_dir(follow_symlinks=False):
        return True
    elif entry.is_dir():
        listing.leave_out(LINKED, name)
    elif not entry.is_file():
        listing.leave_out(BROKEN_LINK if entry.is_symlink() else SPECIAL, name)
    elif entry.name.lower() in ("metadata.csv", "metadata.jsonl", "metadata.parquet"):
        listing.metadata.append(name)
    elif entry.name.lower().endswith(".parquet"):
        listing.parquet.append(name)
    elif _is_image(entry.path):
        listing.images.append(name)
    else:
        listing.leave_out(UNREADABLE, name)
    return False


def _is_image(path: str) -> bool:
    suffix = os.path.splitext(path)[1].lower()
    kind = SUFFIXES.get(suffix)
    if kind is None and suffix not in _OTHER_SUFFIXES:
        kind = _kind_by_content(path)
        # Photographs in a camera's own format begin like a TIFF, of which PIL would read a small preview
        if kind == "TIFF" and suffix.strip(".").isalnum() and not suffix.strip(".").isdigit():
            return False
    return kind is not None and (kind not in ("WEBP", "AVIF") or bool(features.check(kind.lower())))


def _kind_by_content(path: str) -> str | None:
    try:
        with open_regular(path) as file:
            start = file.read(_LOOKED_AT)
    except (OSError, ValueError):
        return None
    return next((kind for kind, form in _FIRST_BYTES if form.match(start)), None)


def split_by_folder(files: Sequence[str], depth: int = _DEEPEST) -> tuple[dict[str, list[str]], list[str]]:
    """The splits that folders make.

    A folder has splits where all folders in it are named as splits, or where it holds folders alone and all
    of these have splits. Files that lie beside the folders of splits belong to none.

    Args:
        files: paths relative to the folder.
        depth: how many levels of folders are looked into.

    Returns:
        The files of each split, and those that belong to none; no splits if the folder has none.
    """
    folders: dict[str, list[str]] = {}
    beside = []
    for file in files:
        first, slash, rest = file.partition("/")
        if slash:
            folders.setdefault(first, []).append(rest)
        else:
            beside.append(file)
    found: dict[str, list[str]] = {}
    loose = bool(beside)
    for folder, names in folders.items():
        split = SPLITS.get(folder.lower())
        if split is not None and all(name.lower() in SPLITS for name in folders):
            found.setdefault(split, []).extend(f"{folder}/{name}" for name in names)
            continue
        inner, none = split_by_folder(names, depth - 1) if depth and not loose else ({}, [])
        if not inner:
            return {}, []
        for split, names in inner.items():
            found.setdefault(split, []).extend(f"{folder}/{name}" for name in names)
        beside += [f"{folder}/{name}" for name in none]
    return _sorted(found), beside if found else []


def split_by_name(files: Sequence[str]) -> dict[str, list[str]]:
    """The splits that names of parquet files make, where every name is that of a split.

    Such names are a split's with a number ("train-00000-of-00008", "test_1"), or several splits' behind
    words that are the same for all ("mnist-train", "mnist-test").

    Returns:
        The files of each split; empty if names make none.
    """
    stems = {file: PurePosixPath(file).stem for file in files}
    plain = {file: _SPLIT_NAME.fullmatch(stem) for file, stem in stems.items()}
    if all(plain.values()):
        return _grouped({file: SPLITS[match[1].lower()] for file, match in plain.items() if match})
    shards = {file: match[1] for file, stem in stems.items() if (match := _SHARD.fullmatch(stem))}
    if len(shards) == len(stems) and any(name.lower() in SPLITS for name in shards.values()):
        return _grouped({file: SPLITS.get(name.lower(), name) for file, name in shards.items()})
    named = {file: _PREFIXED.fullmatch(stem) for file, stem in stems.items()}
    found = {file: SPLITS[match[2].lower()] for file, match in named.items() if match}
    prefixes = {match[1] for match in named.values() if match}
    if len(found) == len(stems) and len(prefixes) == 1 and len(set(found.values())) > 1:
        return _grouped(found)
    return {}


def _grouped(splits: dict[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for file, split in splits.items():
        found.setdefault(split, []).append(file)
    return _sorted(found)


def _sorted(splits: dict[str, list[str]]) -> dict[str, list[str]]:
    first = ("train", "validation", "test")
    known = [name for name in first if name in splits]
    return {name: sorted(splits[name]) for name in (*known, *sorted(set(splits) - set(first)))}


def unused_splits(files: Sequence[str]) -> list[str]:
    """A sentence if some, but not all, folders or files at the top are named as splits; else nothing."""
    tops = sorted({file.partition("/")[0] for file in files if "/" in file}) or list(files)
    named = [top for top in tops if _SPLIT_NAME.fullmatch(PurePosixPath(top).stem)]
    others = [top for top in tops if top not in named]
    if not named or not others or not any("/" in file or file.endswith(".parquet") for file in files):
        return []
    first, other = shown(named[0]), shown(others[0])
    return [f'all is one split, "train": {first} is not taken for a split, as {other} is none']
