"""The file of compressed images: what it says of itself, and all that is refused before it is believed.

    0    8   89 48 46 44 43 0D 0A 1A ("HFDC")
    8    2   version, little-endian
    10   4   n, the length of the header, little-endian
    14   32  SHA-256 of all other bytes
    46   n   the header: canonical JSON of `Header`
    …        names and labels: zlib of JSON, where there are any
    …        the words of each chunk, uint32, little-endian

The sum is compared before anything behind it is read. A stranger can write a right sum, so that every
number of the header is looked at too, before anything is made of it. This file knows bytes, and neither
chains nor networks.
"""

import dataclasses
import hashlib
import json
import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from hf_ddpm.compression.chunks import MOST_IMAGES, MOST_OWN, Chunk
from hf_ddpm.compression.plain import KINDS
from hf_ddpm.data.files import MOST_BYTES, read_regular
from hf_ddpm.runtime.disk import whole_file
from hf_ddpm.runtime.messages import one_line
from hf_ddpm.runtime.messages import shown as shown_value
from hf_ddpm.runtime.untrusted import parse_json
from hf_ddpm.shown import fields_line

MAGIC = b"\x89HFDC\r\n\x1a"
VERSION = 1
START = 46  # of the header
MOST_HEADER = 2**20  # bytes
MOST_FILES = 10**7  # images
MOST_DIMS = 2**24  # numbers of an image
MOST_BATCH = 4096
MOST_CHAIN = 4096  # steps
MOST_SIDE = 2**28  # bytes of names and labels, unpacked
DTYPES = ("float64", "float32")
DIGEST = re.compile(r"[0-9a-f]{16}")
PIXELS = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, eq=False)
class Header:
    """What a file says of its images and of how they were coded.

    Attributes:
        shape: (C, H, W) of the images.
        steps: of the chain, ascending, as the network counts.
        variance: of the reverse steps, by name.
        decoder: of L_0, by name.
        clip_x0: whether x̂_0 was clipped.
        conditioned: whether the network was told the labels.
        dtype: in which the network was asked.
        bin_width: r, see scheme.py.
        parts: M.
        weights: digest of the network, 16 hex digits like all others.
        process: of the process that the network was trained for.
        errors: of the measured errors; null if nothing was made of them.
        tables: of all numbers that the coder's laws are made of.
        answers: of the network's answers.
        sizes: the sizes of the batches that these were asked in.
        made_with: versions of programs, and what the machine was, for people.
    """

    shape: list[int]
    steps: list[int]
    variance: str
    decoder: str
    clip_x0: bool
    conditioned: bool
    dtype: str
    bin_width: float
    parts: int
    weights: str
    process: str
    errors: str | None
    tables: str
    answers: str
    sizes: list[int]
    made_with: dict[str, Any]

    __repr__ = fields_line


@dataclass(frozen=True, eq=False)
class Side:
    """What comes back beside the pixels.

    Attributes:
        names: of each image, relative paths with "/"; None where they have none.
        labels: of each image, a whole number; None where they have none.
        classes: the labels' names, from 0 on; None where nobody knows them.
    """

    names: list[str] | None = None
    labels: list[int] | None = None
    classes: list[str] | None = None

    __repr__ = fields_line


@dataclass(frozen=True, eq=False)
class Content:
    """A whole file.

    Attributes:
        header: what it says.
        side: names and labels.
        chunks: the images.
        side_bytes: how many bytes the names and labels take.
        header_bytes: how many all that stands before them takes.
    """

    header: Header
    side: Side
    chunks: list[Chunk]
    side_bytes: int = 0
    header_bytes: int = 0

    __repr__ = fields_line

    @property
    def images(self) -> int:
        """How many images it holds."""
        return sum(chunk.images for chunk in self.chunks)


def to_bytes(header: Header, side: Side, chunks: list[Chunk]) -> tuple[bytes, int]:
    """The file's bytes, and how many of them are names and labels."""
    facts = {key: value for key, value in dataclasses.asdict(side).items() if value is not None}
    packed = zlib.compress(_canonical(facts), 9) if facts else b""
    described = [
        [chunk.own, chunk.kind, chunk.own_bytes, chunk.spare, chunk.runs, len(chunk.words), chunk.pixels]
        for chunk in chunks
    ]
    values = dataclasses.asdict(header) | {"chunks": described, "side": len(packed)}
    text = _canonical(values)
    words = b"".join(chunk.words.astype("<u4").tobytes() for chunk in chunks)
    numbers = VERSION.to_bytes(2, "little") + len(text).to_bytes(4, "little")
    rest = text + packed + words
    return MAGIC + numbers + hashlib.sha256(numbers + rest).digest() + rest, len(packed)


def write_content(path: Path, header: Header, side: Side, chunks: list[Chunk]) -> tuple[int, int]:
    """Write the file, whole or not at all.

    Returns:
        How many bytes the names and labels take, and how many the whole file has.

    Raises:
        OSError: it can't be written.
    """
    data, side_bytes = to_bytes(header, side, chunks)
    with whole_file(path) as partial:
        partial.write_bytes(data)
    return side_bytes, len(data)


def read_content(path: Path) -> Content:
    """Read a file.

    Raises:
        ValueError: it is missing or not ours, of a newer version, cut off or damaged, or says what can't be.
    """
    name = repr(one_line(str(path), 120))
    try:
        data = read_regular(str(path), MOST_BYTES)
    except OSError as error:
        raise ValueError(f"can't read {name}: {error.strerror}") from None
    try:
        return of_bytes(data)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


def of_bytes(data: bytes) -> Content:
    """The content of a file's bytes; errors as in `read_content`, without the file's name."""
    if not data.startswith(MAGIC):
        cut = MAGIC.startswith(data)
        raise ValueError(f"is cut off after {len(data)} bytes" if cut else "is no file of hf-ddpm compress")
    if len(data) < START:
        raise ValueError(f"is cut off after {len(data)} bytes; allowed: whole files of hf-ddpm compress")
    version, length = (int.from_bytes(data[a:b], "little") for a, b in ((8, 10), (10, 14)))
    if version > VERSION:
        raise ValueError(f"is of version {version}; allowed: up to {VERSION}, or a newer hf_ddpm")
    if hashlib.sha256(data[8:14] + data[START:]).digest() != data[14:START]:
        raise ValueError("is cut off or damaged: its checksum is another one")
    if version < 1 or length > min(MOST_HEADER, len(data) - START):
        raise ValueError(
            f"has a header of {length} bytes; allowed: at most {MOST_HEADER}, as long as the file"
        )
    values = parse_json(data[START : START + length], "its header")
    header, chunks, side_length = _checked(values)
    at = START + length
    wanted = side_length + 4 * sum(words for *_, words in chunks)
    if len(data) - at != wanted:
        raise ValueError(f"has {len(data) - at} bytes behind its header, which says {wanted}")
    packed, at = data[at : at + side_length], at + side_length
    found = []
    for chunk, words in chunks:
        found.append(
            dataclasses.replace(chunk, words=np.frombuffer(data, "<u4", words, at).astype(np.uint32))
        )
        at += 4 * words
    side = _read_side(packed, sum(chunk.images for chunk in found))
    return Content(header, side, found, side_length, START + length)


def _canonical(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _require(allowed: bool, key: str, value: Any) -> None:
    if not allowed:
        raise ValueError(f"says {key} {shown_value(value, 60)}, which can't be")


def _count(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _counts(value: Any, least: int, most: int, longest: int) -> bool:
    return (
        isinstance(value, list) and 0 < len(value) <= longest and all(_count(n, least, most) for n in value)
    )


def _checked(values: dict[str, Any]) -> tuple[Header, list[tuple[Chunk, int]], int]:
    """The header, chunks without their words with the number of these, and the length of names and labels."""
    keys = {*get_type_hints(Header), "chunks", "side"}
    if values.keys() != keys:
        raise ValueError(f"has a header of other keys: {shown_value(sorted(values.keys() ^ keys), 80)}")
    chunks, side = values.pop("chunks"), values.pop("side")
    rules = {
        "shape": lambda v: _counts(v, 1, MOST_DIMS, 3) and len(v) == 3 and math.prod(v) <= MOST_DIMS,
        "steps": lambda v: _counts(v, 0, 2**31, MOST_CHAIN) and v == sorted(set(v)),
        "variance": lambda v: isinstance(v, str) and len(v) <= 40,
        "decoder": lambda v: isinstance(v, str) and len(v) <= 40,
        "clip_x0": lambda v: isinstance(v, bool),
        "conditioned": lambda v: isinstance(v, bool),
        "dtype": lambda v: v in DTYPES,
        "bin_width": lambda v: isinstance(v, float) and 2.0**-10 <= v <= 16.0,
        "parts": lambda v: _count(v, 1, 2**20),
        "sizes": lambda v: v == [] or (_counts(v, 1, MOST_BATCH, MOST_BATCH) and v == sorted(set(v))),
        "made_with": lambda v: isinstance(v, dict),
        "errors": lambda v: v is None or (isinstance(v, str) and DIGEST.fullmatch(v)),
    }
    for key, value in values.items():
        rule = rules.get(key, lambda v: isinstance(v, str) and DIGEST.fullmatch(v))
        _require(bool(rule(value)), key, value)
    _require(isinstance(chunks, list) and 0 < len(chunks) <= MOST_FILES, "chunks", chunks)
    _require(_count(side, 0, MOST_BYTES), "side", side)
    header = Header(**values)
    found = [_checked_chunk(chunk) for chunk in chunks]
    batches = sorted({size for chunk, _ in found for size in chunk.batches})
    _require(batches == header.sizes, "sizes", header.sizes)
    return header, found, side


def _checked_chunk(values: Any) -> tuple[Chunk, int]:
    """A chunk without its words, and how many they are."""
    _require(isinstance(values, list) and len(values) == 7, "chunk", values)
    own, kind, own_bytes, spare, runs, words, pixels = values
    _require(_count(own, 1, MOST_OWN), "own", own)
    _require(kind in KINDS, "kind", kind)
    _require(_count(words, 1, MOST_BYTES // 4), "words", words)
    _require(_count(own_bytes, 1, 4 * words), "own_bytes", own_bytes)
    _require(_count(spare, 0, words), "spare", spare)
    _require(isinstance(runs, list) and len(runs) <= MOST_IMAGES, "batches", runs)
    batches: list[int] = []
    for run in runs:
        _require(_counts(run, 1, MOST_BATCH, 2) and len(run) == 2, "batches", run)
        _require(run[0] * run[1] + sum(batches) <= MOST_IMAGES, "batches", runs)
        batches += [run[0]] * run[1]
    _require(own + sum(batches) <= MOST_IMAGES, "batches", runs)
    _require(isinstance(pixels, str) and bool(PIXELS.fullmatch(pixels)), "pixels", pixels)
    return Chunk(own, kind, own_bytes, spare, batches, np.empty(0, np.uint32), pixels), words


def _read_side(packed: bytes, number: int) -> Side:
    """Names and labels of so many images."""
    if not packed:
        return Side()
    unpacking = zlib.decompressobj()
    try:
        text = unpacking.decompress(packed, MOST_SIDE)
    except zlib.error:
        raise ValueError("has names and labels that can't be read") from None
    _require(unpacking.eof and not unpacking.unused_data, "side", len(packed))
    values = parse_json(text, "the list of its names")
    _require(values.keys() <= get_type_hints(Side).keys(), "side", sorted(values))
    side = Side(**values)
    if side.names is not None:
        check_names(side.names, number)
    if side.labels is not None:
        _require(
            _counts(side.labels, -(2**63), 2**63 - 1, number) and len(side.labels) == number, "labels", ""
        )
    if side.classes is not None:
        texts = isinstance(side.classes, list) and all(isinstance(name, str) for name in side.classes)
        _require(texts and side.labels is not None and len(side.classes) <= MOST_FILES, "classes", "")
    return side


def check_names(names: Any, number: int) -> None:
    """Refuse names that are not those of so many files within a folder.

    Raises:
        ValueError: the message names the culprit.
    """
    if not isinstance(names, list) or len(names) != number:
        raise ValueError(f"has other names than one for each of its {number} images")
    folders = set()
    for name in names:
        parts = name.split("/") if isinstance(name, str) and name.isprintable() else [""]
        plain = all(part.strip() and part not in (".", "..") and len(part.encode()) <= 200 for part in parts)
        if not plain or len(parts) > 20 or "\\" in name or not name.lower().endswith(".png"):
            raise ValueError(
                f"has the name {shown_value(name, 60)}; allowed: of files within a folder that end in .png"
            )
        folders.update("/".join(parts[:depth]) for depth in range(1, len(parts)))
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"has two images of the name {shown_value(twice, 60)}; allowed: a name for each")
    if both := folders & set(names):
        raise ValueError(f"has the name {shown_value(min(both), 60)} for an image and for a folder of others")
