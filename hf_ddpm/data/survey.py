"""What a data set holds, told before a run begins: its images, their sizes and modes, and what is left out.

The survey reads the heads of some images, evenly spaced over all rows where rows can be read alone and else
the first ones; it decodes none.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image as PILImage

from hf_ddpm.data.encoded import FORMATS
from hf_ddpm.data.shards import Row, Shards
from hf_ddpm.data.sources import Source, describe_left_out
from hf_ddpm.runtime.progress import progress
from hf_ddpm.shown import fields_line

logger = logging.getLogger(__name__)

# The most images whose heads are read: of a folder, and of rows that can only be read one after the other
MOST_FILES, MOST_ROWS = 10_000, 64
# After so many seconds the survey ends with what it has
_SECONDS = 20.0
# How many sizes or modes are named
_NAMED = 3


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
        looked_at: images whose heads were read.
        sizes: how many of these have each size, (H, W).
        modes: how many have each of Pillow's modes, as "mode RGB", or of an array's, as "3 channels".
        unreadable: how many are no images that can be read.
        spread: whether those that were looked at are spread over all rows; else they are the first ones.
    """

    title: str
    total: int | None
    looked_at: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    unreadable: int = 0
    spread: bool = False

    __repr__ = fields_line

    def __str__(self) -> str:
        """One line for people."""
        total = f"{self.looked_at if self.total is None else self.total:,} image{'s' * (self.total != 1)}"
        if self.looked_at != self.total:
            which = f"{self.looked_at:,} of them" if self.spread else f"the first {self.looked_at:,}"
            total += " looked at" if self.total is None else f", {which} looked at"
        sizes = Counter({f"{height}x{width}": n for (height, width), n in self.sizes.items()})
        words = [total]
        if sizes:
            order = " (HxW)" * any(height != width for height, width in self.sizes)
            words += [f"size{'s' * (len(sizes) > 1)} {_most_common(sizes)}{order}", _most_common(self.modes)]
        if self.unreadable:
            words.append(f"{self.unreadable:,} can't be read")
        return f"{self.title}: {'; '.join(words)}"


def _most_common(found: Counter[str]) -> str:
    """The most common of some sizes or modes, with how many images have it where there are several."""
    if len(found) == 1:
        return next(iter(found))
    first = ", ".join(f"{name} ({n:,})" for name, n in found.most_common(_NAMED))
    more = f" and {len(found) - _NAMED:,} more" if len(found) > _NAMED else ""
    return first + more


def survey(shards: Shards, show: bool = False) -> Survey:
    """Read the heads of some images.

    Args:
        shards: the rows.
        show: whether a progress bar is drawn.

    Raises:
        ValueError: a shard that can't be read.
    """
    total = None if shards.passes_over else sum(shards.counts)
    found = Survey(shards.source.title, total, spread=shards.addressable)
    until = time.monotonic() + _SECONDS
    most = MOST_FILES if shards.addressable else MOST_ROWS
    expected = min(most, total or most)
    with progress("look at images", expected, "image", show and expected > MOST_ROWS * 8, leave=False) as bar:
        for row in itertools.islice(_some_rows(shards, most), most):
            found.looked_at += 1
            try:
                (height, width), mode = _head(shards, row)
                found.sizes[height, width] += 1
                found.modes[mode] += 1
            # Pillow has a dozen kinds of error for broken data
            except Exception:
                found.unreadable += 1
            bar.update()
            if time.monotonic() > until:
                break
    return found


def _some_rows(shards: Shards, most: int) -> Iterator[Row]:
    if not shards.addressable:
        return shards.rows()
    total = sum(shards.counts)
    return map(shards.image_file, range(0, total, -(-total // most)))


def _head(shards: Shards, row: Row) -> tuple[tuple[int, int], str]:
    """An image's (H, W), and its mode or channels."""
    file = shards.head(row)
    if file is None:
        shape = np.asarray(row.value).shape
        count = shape[2] if len(shape) == 3 else 1
        return (shape[0], shape[1]), f"{count} channel{'s' * (count != 1)}"
    with file, PILImage.open(file, formats=FORMATS) as image:
        return (image.height, image.width), f"mode {image.mode}"
