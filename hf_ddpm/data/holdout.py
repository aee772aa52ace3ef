"""Which rows of a split are read: a slice of it, the images held out of that, or those to train on.

    train[10%:90%], holdout 0.05    ─►   rows of the slice  =  held-out rows  +  rows to train on

A row is held out if its hash is among the k smallest of the slice. The hash is a function of (seed, row)
alone, so the choice knows no processes, workers or orders, and where a row is added at the end of the data,
hardly any other row changes sides. Rows are numbered over all of the split, its files end to end.

This file knows whole numbers and the spelling of slices. It opens nothing.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

import numpy as np
from datasets import ReadInstruction

from hf_ddpm.data.order import hashed
from hf_ddpm.runtime.messages import one_line, shown
from hf_ddpm.seeds import Use

Part = Literal["train", "held-out", "all"]
PARTS: tuple[Part, ...] = get_args(Part)
SLICES = "train[:90%], train[90%:], train[100:200] or train[-500:]"
# The key, in what a run leaves, of the runs that its network had been trained in before: see `rows_before`
BEFORE = "before"
# Rows that are hashed at once
_AT_ONCE = 1 << 20


def name_of_split(split: str) -> str:
    """The split that a slice is cut of: "train" of "train[:90%]", and of "train"."""
    return split.partition("[")[0]


def _slice(split: str) -> ReadInstruction | None:
    """The slice in a split's text, of a split that is called "rows"; None for a split as a whole.

    Raises:
        ValueError: there is something in brackets that is no slice.
    """
    name, bracket, inner = split.partition("[")
    if not bracket:
        return None
    bounds = [bound for bound in inner.partition("]")[0].split(":") if bound]
    try:
        # `datasets` takes rows and per cents together for per cents, and allows fewer names than there are
        if len({bound.endswith("%") for bound in bounds}) != 1 or not name or "+" in inner:
            raise ValueError("mixed, empty, or several")
        return ReadInstruction.from_spec(f"rows[{inner}")
    except ValueError as error:
        raise ValueError(f"split is {shown(split)}; allowed: a split's name, or a slice: {SLICES}") from error


def slice_of(split: str, total: int) -> range:
    """The rows that the text of a split means.

    Args:
        split: a split's name, or a slice in the spelling of `datasets`, of rows or of whole per cents, which
            are rounded to the closest row.
        total: rows of the split.

    Returns:
        The rows, at least one; a slice that reaches beyond the split ends with it.

    Raises:
        ValueError: the text is no such slice, or the slice is empty.
    """
    found = _slice(split)
    if found is None:
        return range(total)
    try:
        (bounds,) = found.to_absolute({"rows": total})
    except ValueError as error:  # of a rounding that is not for so few rows
        raise ValueError(f"split is {shown(split)}: {error}") from error
    rows = range(bounds.from_, bounds.to)
    if not rows:
        raise ValueError(
            f"split is {shown(split)}, which is none of the {total:,} rows of {shown(name_of_split(split))}"
        )
    return rows


def check_holdout(name: str, value: float) -> None:
    """Refuse what is neither a share of the images nor a number of images.

    Raises:
        ValueError: the message names the option and what is allowed.
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not (0 < value < 1 or (2 <= value < math.inf and value == math.floor(value))):
        said = shown(int(value) if number and value == value // 1 else value)
        raise ValueError(
            f"{name} is {said}; allowed: a share of the images, above 0 and below 1, or how many, 2 or more"
        )


def titled(title: str, words: str) -> str:
    """A title such as "photos/ (train)" with more words in its brackets."""
    return f"{title.removesuffix(')')}{words})"


@dataclass(frozen=True)
class Choice:
    """Which rows of a split are wanted, said without knowing how many it has.

    Attributes:
        split: a split's name, or a slice of it; see `slice_of`.
        holdout: the share of the slice's rows that are held out, rounded to the closest number of rows, or
            how many; None for none.
        part: "train" for all rows but those, "held-out" for those; "all" for the whole slice.
        seed: of the choice of held-out rows.

    Raises:
        ValueError: no slice, or an impossible holdout or part.
    """

    split: str
    holdout: float | None = None
    part: Part = "train"
    seed: int = 0

    def __post_init__(self) -> None:
        _slice(self.split)
        if self.part not in PARTS:
            raise ValueError(f"part is {shown(self.part)}; allowed: {', '.join(PARTS)}")
        if self.holdout is not None:
            check_holdout("holdout", self.holdout)
        elif self.part == "held-out":
            raise ValueError("part is 'held-out', but without holdout no image is; allowed: train, all")

    @property
    def whole(self) -> bool:
        """Whether it is all rows of the split, for any number of rows."""
        return self.split == name_of_split(self.split) and (self.holdout is None or self.part == "all")

    def title(self, source: str) -> str:
        """What messages call the rows, of a split that they call `source`, as in "photos/ (train)"."""
        words = self.split.removeprefix(name_of_split(self.split))
        if self.holdout is not None and self.part != "all":
            words += f", {'held-out images' if self.part == 'held-out' else 'those to train on'}"
        return titled(source, words)

    def rows(self, total: int) -> Rows:
        """The wanted rows of a split of `total` rows.

        Raises:
            ValueError: no slice, an empty slice, or a holdout of no row or of all rows.
        """
        span = slice_of(self.split, total)
        if self.holdout is None or self.part == "all":
            return Rows(span)
        held = held_out(span, self.holdout, self.seed)
        return Rows(span, held) if self.part == "train" else Rows(span, held, listed=True)


def rows_before(runs: Any, total: int) -> list[Rows]:
    """The rows that earlier runs trained on.

    Args:
        runs: a list of {"split", "holdout", "seed"}, the values that each run had; None for none. It is read
            from a file that may be a stranger's.
        total: rows of the split.

    Raises:
        ValueError: it is something else.
    """
    try:
        return [
            Choice(str(one["split"]), one["holdout"], seed=int(one["seed"])).rows(total) for one in runs or []
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the record of what was trained on before can't be read: {one_line(error, 100)}"
        ) from None


def count_of(holdout: float, rows: int) -> int:
    """How many of some rows are held out.

    Raises:
        ValueError: none or all of them.
    """
    count = math.floor(holdout * rows + 0.5) if holdout < 1 else int(holdout)
    if not 0 < count < rows:
        what = f"none of the {rows:,}" if count == 0 else f"not fewer than the {rows:,}"
        raise ValueError(
            f"holdout is {holdout:g}, {what} images; allowed: what makes 1 to {rows - 1:,} of them"
        )
    return count


def held_out(span: range, holdout: float, seed: int) -> np.ndarray:
    """The held-out rows of a slice, ascending, int64.

    Args:
        span: the slice's rows.
        holdout: which share of them, or how many.
        seed: of the choice, at least 0.

    Raises:
        ValueError: that is none or all of them.
    """
    count = count_of(holdout, len(span))
    # The hash is a bijection of 64 bits, so that no two rows are equal in it
    first, second = np.random.SeedSequence([Use.HOLDOUT, seed]).generate_state(2, np.uint64)[:, None]
    rows, keys = np.empty(0, np.int64), np.empty(0, np.uint64)
    for start in range(span.start, span.stop, _AT_ONCE):
        block = np.arange(start, min(start + _AT_ONCE, span.stop))
        rows = np.concatenate([rows, block])
        keys = np.concatenate([keys, hashed(hashed(block.astype(np.uint64) + first) + second)])
        if len(keys) > count:
            least = np.argpartition(keys, count - 1)[:count]
            rows, keys = rows[least], keys[least]
    return np.sort(rows)


class Rows:
    """Some rows of a source, in its order, numbered anew from 0.

    Args:
        span: rows of the source.
        some: ascending rows among them, int64.
        listed: whether it is `some` alone; else it is all others of the span.
    """

    def __init__(self, span: range, some: np.ndarray | None = None, listed: bool = False):
        self._span, self._listed = span, listed
        self._some = np.empty(0, np.int64) if some is None else some
        # How many of the others lie before each of `some`
        self._before = self._some - span.start - np.arange(len(self._some))

    def __len__(self) -> int:
        return len(self._some) if self._listed else len(self._span) - len(self._some)

    @property
    def left_out(self) -> int:
        """How many rows between the first and the last of the slice are not among them."""
        return len(self._span) - len(self)

    @property
    def all(self) -> np.ndarray:
        """The source's rows, ascending, int64."""
        return self.of(np.arange(len(self)))

    @property
    def others(self) -> Rows:
        """The rows of the slice that are not among them."""
        return Rows(self._span, self._some, not self._listed)

    def of(self, numbers: Any) -> np.ndarray:
        """The source's rows with these numbers, int64; each number is 0 to `len` − 1."""
        numbers = np.asarray(numbers, np.int64)
        if self._listed:
            return self._some[numbers]
        return self._span.start + numbers + np.searchsorted(self._before, numbers, side="right")

    def count_before(self, rows: Any) -> np.ndarray:
        """How many of them lie before each of these rows of the source, int64."""
        passed = np.searchsorted(self._some, rows)
        if self._listed:
            return passed
        return np.clip(rows, self._span.start, self._span.stop) - self._span.start - passed

    def without(self, numbers: Any) -> Rows:
        """The same rows but those with these numbers."""
        if self._listed:
            return Rows(self._span, np.delete(self._some, numbers), listed=True)
        return Rows(self._span, np.union1d(self._some, self.of(numbers)).astype(np.int64))

    def both(self, others: Rows) -> Rows:
        """The rows that are among these and those."""
        few, many = sorted((self, others), key=len)
        rows = few.all
        return Rows(self._span, rows[many.has(rows)], listed=True)

    def has(self, rows: np.ndarray) -> np.ndarray:
        """Whether rows of the source are among them, bool, shape of `rows`."""
        at = np.searchsorted(self._some, rows)
        found = np.zeros(len(rows), np.bool_)
        inside = at < len(self._some)
        found[inside] = self._some[at[inside]] == rows[inside]
        return found if self._listed else ~found & (rows >= self._span.start) & (rows < self._span.stop)

    @property
    def digest(self) -> str:
        """Sixteen hex digits that tell these rows from others."""
        found = hashlib.blake2b(repr((self._span, self._listed)).encode(), digest_size=8)
        found.update(self._some.tobytes())
        return found.hexdigest()
