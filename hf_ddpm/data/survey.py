"""What a data set holds, told before a run begins: its images, their sizes and modes, and what is left out.

The survey reads the heads of images and decodes none that is whole by its head:

    image files           all of them
    local parquet files   all rows, or as many as are read in `_SECONDS`
    other rows            the first `MOST_ROWS`, as finding more of them means fetching or unpacking them

What took long is kept in the cache of the Hugging Face libraries, and holds for the same files: by their
paths, sizes and times of change. Nothing is written beside anybody's images.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from huggingface_hub import constants

from hf_ddpm.data.encoded import Head, read_head
from hf_ddpm.data.files import shown
from hf_ddpm.data.pixels import array_storage
from hf_ddpm.data.shards import Row, Shards
from hf_ddpm.data.sources import Source, describe_left_out
from hf_ddpm.runtime.disk import whole_file
from hf_ddpm.runtime.progress import progress
from hf_ddpm.shown import fields_line

logger = logging.getLogger(__name__)

# Rows that are read of what can only be read one after the other, from afar or out of an archive
MOST_ROWS = 64
# After so many seconds the survey of local parquet files ends with what it has
_SECONDS = 20.0
# Image files whose heads are read at once, as that is waiting on many disks
_THREADS, _FILES_AT_ONCE = 8, 512
# Images that are looked at without a progress bar
_SHOWN = 5000
# A survey that took so many seconds is kept; and where, below the cache of the Hugging Face libraries
KEPT_SECONDS = 1.0
_CACHE = ("hf_ddpm", "surveys")
# Changed when a survey would find something else in the same files
_VERSION = 1
# The most bytes of a kept survey that is read
_LARGEST = 64 << 20
# How many modes, and how many images that can't be read, are named
_NAMED = 4


def tell(source: Source, skip_corrupt: bool) -> None:
    """Say what of a data set is left out, once, on process 0.

    Args:
        source: one split.
        skip_corrupt: whether lines of a metadata file that name lost images are passed over.

    Raises:
        ValueError: there are such lines, and they are not to be passed over.
    """
    if source.lost and not skip_corrupt:
        more = f" (and {len(source.lost) - 1:,} more such lines)" if len(source.lost) > 1 else ""
        raise ValueError(f"{source.lost[0]}{more}; skip_corrupt would pass over them")
    parts = [describe_left_out(source.left_out), *source.notes]
    if source.lost:
        parts.append(f"lines without an image, passed over: {len(source.lost):,} ({source.lost[0]})")
    for part in filter(None, parts):
        _say(f"{source.title}: {part}")


@functools.lru_cache(maxsize=1024)
def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        logger.warning(line)


@dataclass
class Survey:
    """What was found in the heads of images.

    Attributes:
        title: of the data set.
        total: rows; None where counting them means reading them.
        looked_at: images whose heads were read: all, or the first ones.
        heads: how many of these have each head that can be read.
        unreadable: how many are no images that can be read.
        named: names of the first of these.
        arrays: whether the images are arrays, whose channels mean nothing by themselves.
    """

    title: str
    total: int | None
    looked_at: int = 0
    heads: Counter[Head] = field(default_factory=Counter)
    unreadable: int = 0
    named: list[str] = field(default_factory=list)
    arrays: bool = False

    @property
    def sizes(self) -> Counter[tuple[int, int]]:
        """How many images have each size (H, W), as they are shown."""
        return self._count(lambda head: (head.height, head.width))

    @property
    def modes(self) -> Counter[str]:
        """How many images have each of Pillow's modes, or an array's, as "3 channels"."""
        return self._count(lambda head: head.mode)

    def _count(self, part: Any) -> Counter[Any]:
        found: Counter[Any] = Counter()
        for head, count in self.heads.items():
            found[part(head)] += count
        return found

    @property
    def facts(self) -> str:
        """How many images there are, their sizes and modes, and what can't be read, for people."""
        count = self.looked_at if self.total is None else self.total
        words = f"{count:,} image{'s' * (count != 1)}"
        if self.looked_at != self.total:
            words = f"the first {self.looked_at:,}" + (
                f" of {words}" if self.total is not None else " images"
            )
            words += ", which were looked at"
        found = [_describe_sizes(self.sizes), _describe_modes(self.modes)] if self.heads else []
        if self.unreadable:
            more = f" and {self.unreadable - 1:,} more" if self.unreadable > 1 else ""
            found.append(f"{self.unreadable:,} can't be read ({self.named[0]}{more})")
        comma = "" if self.heads and self.looked_at == self.total else ","
        return f"{words}{comma}{' of' if self.heads else ''} {', '.join(found)}"

    __repr__ = fields_line

    def __str__(self) -> str:
        """One line for people."""
        return f"{self.title}: {self.facts}"


def _describe_sizes(sizes: Counter[tuple[int, int]]) -> str:
    order = ", HxW" * any(height != width for height, width in sizes)
    if len(sizes) == 1:
        return "{}x{}".format(*next(iter(sizes))) + (f" ({order[2:]})" if order else "")
    by_area = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    return "{:,} sizes ({}x{} to {}x{}{})".format(len(sizes), *by_area[0], *by_area[-1], order)


def _describe_modes(modes: Counter[str]) -> str:
    if len(modes) == 1:
        name = next(iter(modes))
        return name if "channel" in name else f"mode {name}"
    first = ", ".join(f"{name} {count:,}" for name, count in modes.most_common(_NAMED))
    return f"modes {first}" + (f" and {len(modes) - _NAMED:,} more" if len(modes) > _NAMED else "")


def survey(shards: Shards, show: bool = False) -> Survey:
    """Read the heads of images, or a survey of the same files that was kept.

    Args:
        shards: the rows.
        show: whether a progress bar is drawn, where there are many.

    Raises:
        ValueError: a shard that can't be read.
    """
    total = None if shards.passes_over else sum(shards.counts)
    storage = array_storage(shards.source.features[shards.column])
    state = _state(shards) if shards.local else None
    found = Survey(shards.title, total, arrays=storage is not None)
    if state is not None and _recall(found, _kept_file(shards), state):
        return found
    whole = shards.local and not shards.passes_over
    expected = total if whole and total is not None else min(MOST_ROWS, total or MOST_ROWS)
    started = time.monotonic()
    with progress("look at images", expected, "image", show and expected > _SHOWN, leave=False) as bar:
        for row, head in itertools.islice(_heads(shards, storage), expected):
            found.looked_at += 1
            if head is not None:
                found.heads[head] += 1
            else:
                found.unreadable += 1
                found.named += [_name(shards, row)] if len(found.named) < _NAMED else []
            bar.update()
            if not shards.addressable and time.monotonic() - started > _SECONDS:
                break
    if state is not None and time.monotonic() - started > KEPT_SECONDS:
        _keep(found, _kept_file(shards), state)
    return found


def _heads(shards: Shards, storage: str | None) -> Iterator[tuple[Row, Head | None]]:
    """Each row with what the head of its image says, None where that can't be read."""
    look = functools.partial(_head, shards, storage)
    rows = iter(shards.rows())
    if not shards.addressable:
        yield from ((row, look(row)) for row in rows)
        return
    with ThreadPoolExecutor(_THREADS) as threads:
        while some := list(itertools.islice(rows, _FILES_AT_ONCE)):
            yield from zip(some, threads.map(look, some), strict=True)


def _head(shards: Shards, storage: str | None, row: Row) -> Head | None:
    # Pillow has a dozen kinds of error for broken data
    with suppress(Exception):
        file = shards.head(row)
        if file is not None:
            with file:
                return read_head(file)
        height, width, *channels = np.asarray(row.value).shape
        (count,) = channels or [1]
        mode = f"{count} channel{'s' * (count != 1)}"
        if storage in (None, "uint8"):
            return Head(height, width, mode, count)
        return Head(height, width, f"{mode} of {storage}", count, storage)
    return None


def _name(shards: Shards, row: Row) -> str:
    if shards.addressable:
        return shown(shards.relative(row.value["path"]), 40)
    return f"row {shards.number(row)} of {shown(os.path.basename(shards.names[row.shard]), 40)}"


def _kept_file(shards: Shards) -> Path:
    """Where a survey of a data set is kept: one place for each folder, split and column."""
    source = shards.source
    words = [str(source.root), source.split, source.kind, shards.column, shards.title]
    name = hashlib.sha256("\0".join(words).encode(errors="surrogateescape")).hexdigest()[:32]
    return Path(constants.HF_HOME, *_CACHE, f"{name}.json")


def _state(shards: Shards) -> str:
    """A digest of the files (paths, sizes, times of change), of the rows read, and of what reads them."""
    digest = hashlib.sha256(f"{_VERSION} {PIL.__version__}".encode())
    if shards.whole is not shards:
        digest.update(shards.chosen.digest.encode())
    for file in shards.files:
        found = os.stat(file)
        words = f"\0{file}\0{found.st_size}\0{found.st_mtime_ns}"
        digest.update(words.encode(errors="surrogateescape"))
    return digest.hexdigest()


def _recall(found: Survey, file: Path, state: str) -> bool:
    """Take over what was kept of the same files; False where there is nothing, or it is damaged."""
    # What is in a foreign or damaged file can be anything
    with suppress(Exception):
        if not file.is_file() or file.stat().st_size > _LARGEST:
            return False
        kept = json.loads(file.read_text(encoding="utf-8"))
        heads = Counter({_known_head(*head): _known_count(n) for *head, n in kept["heads"]})
        unreadable = _known_count(kept["unreadable"], 0)
        named = [shown(str(name)) for name in kept["named"]][:_NAMED]
        looked_at = sum(heads.values()) + unreadable
        right = found.total is not None and 0 < looked_at <= found.total and bool(named) == bool(unreadable)
        if kept["state"] == state and right:
            found.looked_at, found.heads, found.unreadable, found.named = looked_at, heads, unreadable, named
            return True
    return False


def _known_head(height: Any, width: Any, mode: Any, channels: Any, storage: Any) -> Head:
    assert isinstance(mode, str) and isinstance(storage, str)
    return Head(_known_count(height), _known_count(width), mode[:40], _known_count(channels), storage[:40])


def _known_count(value: Any, least: int = 1) -> int:
    assert type(value) is int and value >= least
    return value


def _keep(found: Survey, file: Path, state: str) -> None:
    """Keep a survey for the next time, where the cache can be written."""
    kept = {"state": state, "heads": [[*head, count] for head, count in found.heads.items()]}
    kept |= {"unreadable": found.unreadable, "named": found.named}
    with suppress(OSError, ValueError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as place:
            place.write_text(json.dumps(kept), encoding="utf-8")
