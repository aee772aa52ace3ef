"""Which flags a command lacks for the images that it was given: all of them at once, by a survey.

This file knows how images are read, and of a network no more than which images it takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from hf_ddpm.data.encoded import EIGHT_BITS
from hf_ddpm.data.pixels import parse_background
from hf_ddpm.data.survey import Survey
from hf_ddpm.runtime.messages import LIMIT, one_line
from hf_ddpm.shown import fields_line

# The way of fitting images that is advised: nothing is stretched, and no image is too small for it
ADVISED_FIT = "resize_crop"
# Characters of the line, before which a command's name stands; more than twice those of all flags
_LONGEST = LIMIT - 30
# The part of the images that may be smaller than the size that is advised, and so be enlarged
_SMALLER = 0.05

Size = tuple[int, int]


@dataclass(frozen=True)
class Reading:
    """How a command reads images, as `load_stream` is told.

    Attributes:
        size: (H, W); None for the first image's.
        channels: of the images; None for the first image's.
        fit: what is done with images of another size.
        background: what transparent pixels are laid on.
        to_8_bit: whether images of more than 8 bits are converted.
        skip_corrupt: whether images that can't be read are passed over; None if the command can't.
    """

    size: Size | None = None
    channels: int | None = None
    fit: str = "exact"
    background: str = "white"
    to_8_bit: bool = False
    skip_corrupt: bool | None = False


@dataclass(frozen=True)
class Needs:
    """Which images a network takes.

    Attributes:
        takes: whether it takes images of a size (H, W).
        most: the largest side of square images that is advised.
        shape: (C, H, W) of the only images that it takes; None if it is made for the images.
    """

    takes: Callable[[int, int], bool] = lambda height, width: True
    most: int = 64
    shape: tuple[int, int, int] | None = None

    __repr__ = fields_line


def check_images(found: Survey, reading: Reading, needs: Needs) -> None:
    """Refuse images that can't all be read as they are to be.

    Raises:
        ValueError: one line with what the images are and all flags to add, in their spelling on a command
            line. With them the same images are not refused.
    """
    if not found.heads:
        raise ValueError(f"{found}; allowed: at least one that can be")
    if flags := missing_flags(found, reading, needs):
        taker = "" if needs.shape is None else ", for a network of {}x{}x{} (CxHxW)".format(*needs.shape)
        if reading.size is not None and needs.shape is None and not needs.takes(*reading.size):
            taker = ", for a network that takes no {}x{}".format(*reading.size)
        raise ValueError(one_line(f"{found.facts}{taker}: add {' '.join(flags)}", _LONGEST))


def missing_flags(found: Survey, reading: Reading, needs: Needs) -> list[str]:
    """The flags to add, each with its value; none if all images can be read.

    Where the images need another size, it is the largest side up to `needs.most` that the network takes and
    that the smaller sides of all images but 5 % reach, so that few are enlarged. In place of a size that was
    asked for and that the network doesn't take comes one near it, unless nothing else is wrong: then the
    network's own error says more.

    Args:
        found: the images; at least one can be read.
        reading: how they are to be read.
        needs: which images the network takes.
    """
    if found.arrays and not {head.channels for head in found.heads} <= {1, 3, reading.channels}:
        return []  # their axes may have another order, which is told where they are read
    first, size = next(iter(found.sizes)), _wanted_size(found, reading, needs)
    flags = []
    mixed = len(found.sizes) > 1 and reading.fit == "exact"
    if size != (reading.size or first) or (reading.size is None and mixed):
        flags.append(f"--image-size {size[0]}" + (f"x{size[1]}" if size[0] != size[1] else ""))
    fit = reading.fit if _fits(found, size, reading) else ADVISED_FIT
    if fit != reading.fit:
        flags.append(f"--fit {fit}")
    channels = _wanted_channels(found, reading, needs)
    if channels != reading.channels:
        flags.append(f"--channels {channels}")
    deep = any(head.storage != EIGHT_BITS for head in found.heads)
    if deep and fit == "exact" and not reading.to_8_bit:
        flags.append("--to-8-bit")
    if found.unreadable and reading.skip_corrupt is False:
        flags.append("--skip-corrupt")
    own_error = reading.size not in (None, size) and needs.shape is None and reading.fit != "exact"
    return [] if own_error and len(flags) == 1 else flags


def _wanted_size(found: Survey, reading: Reading, needs: Needs) -> Size:
    if needs.shape is not None:
        return needs.shape[1:]
    if reading.size is not None:
        return _taken_near(reading.size, needs)
    first = next(iter(found.sizes))
    if needs.takes(*first) and (len(found.sizes) == 1 or reading.fit != "exact"):
        return first
    side = _advised_side(found, needs)
    return side, side


def _taken_near(size: Size, needs: Needs) -> Size:
    """A size itself if the network takes it, else the nearest one of even parts; itself if there is none."""
    parts = [2**power for power in range(11)]
    below = [tuple(side // part * part for side in size) for part in parts]
    above = [tuple(-(-side // part) * part for side in size) for part in parts]
    return next(((h, w) for h, w in below + above if min(h, w) > 0 and needs.takes(h, w)), size)


def _advised_side(found: Survey, needs: Needs) -> int:
    smaller: Counter[int] = Counter()
    for size, count in found.sizes.items():
        smaller[min(size)] += count
    sides = sorted(smaller.elements())
    reached = sides[int(_SMALLER * len(sides))]
    taken = [side for side in range(1, needs.most + 1) if needs.takes(side, side)] or [needs.most]
    return max((side for side in taken if side <= reached), default=taken[0])


def _fits(found: Survey, size: Size, reading: Reading) -> bool:
    """Whether all images fit, or those that don't are passed over, as somebody asked for."""
    height, width = size
    if reading.fit == "exact":
        fitting = [size == other for other in found.sizes]
    elif reading.fit.endswith("_crop") and reading.fit != ADVISED_FIT:
        fitting = [h >= height and w >= width for h, w in found.sizes]
    else:
        return True
    return all(fitting) or bool(reading.skip_corrupt and reading.size == size and any(fitting))


def _wanted_channels(found: Survey, reading: Reading, needs: Needs) -> int | None:
    taken = None if needs.shape is None else needs.shape[0]
    if reading.channels is not None:
        return taken or reading.channels
    if found.arrays:
        counts = {head.channels for head in found.heads}
    else:
        counts = {1 if head.channels <= 2 else 3 for head in found.heads}
        ground = set(parse_background(reading.background))
        if len(ground) > 1 and any(head.channels == 2 for head in found.heads):
            counts.add(3)  # grey on a coloured ground
    plain = counts in ({1}, {3})
    return None if plain and taken in (None, *counts) else taken or max(counts)
