"""A stack of bits and the laws by which numbers go on and off it: the entropy coder.

    push    a number goes on the stack by a law, and takes −log2 of its probability in bits
    pop     the inverse: the last number that was pushed by this law comes off
    draw    a pop from bits that stand for something else: they become a number that has this law
    undraw  the inverse: the number is pushed, and the bits are back

The stack is an asymmetric numeral system (Duda 2009) of the library `constriction`, which holds 32-bit words.
It knows numbers and laws. It does not know what a chain, an image or a file is.
"""

import importlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hf_ddpm.shown import fields_line

LEVELS = 256
TAIL = (
    8.0  # standard deviations on either side of the mean within which a number has a probability of its own
)
LARGEST_WINDOW = 2**21  # each number in it takes 2^-24 of the probability
LARGEST_NUMBER = 2**30  # numbers go through 32 bits with their sign
SPARE_WORDS = 2  # the words of the coder's state, which are no bits that can be drawn from
HALF = 2**16


class Exhausted(ValueError):
    """There are too few bits on the stack to draw from, or others than were put there."""


def load_constriction() -> Any:
    """The library of the entropy coder.

    Raises:
        ValueError: it is not installed; the message says what installs it.
    """
    try:
        return importlib.import_module("constriction")
    except ImportError:
        raise ValueError(
            "the package constriction, the entropy coder, is not installed; allowed: after pip install "
            "'hf_ddpm[codec]'"
        ) from None


@dataclass(frozen=True, eq=False)
class GridNormal:
    """A Gaussian of whole numbers k, each of which has the mass of its bin of width 1.

    Where k is more than a window away from the mean, it is written in 32 bits after a mark.

    Attributes:
        mean: the means in units of 1/`parts`, (n,), int64.
        parts: into how many parts a bin is divided for the mean.
        std: the standard deviations in units of the bins, (n,), float64.
        window: how far from the mean a number may be, at least 1.

    Raises:
        ValueError: numbers that are too large to be coded.
    """

    mean: np.ndarray
    parts: int
    std: np.ndarray
    window: int

    __repr__ = fields_line

    def __post_init__(self) -> None:
        if not 1 <= self.window <= LARGEST_WINDOW:
            raise ValueError(
                f"a standard deviation has {self.window / TAIL:.2g} bins; allowed: {LARGEST_WINDOW // TAIL:g}"
            )
        if np.abs(self.base).max(initial=0) > LARGEST_NUMBER:
            raise ValueError(f"a mean lies beyond {LARGEST_NUMBER} bins; allowed: nearer to 0")

    @cached_property
    def base(self) -> np.ndarray:
        """The number next to each mean, (n,), int64."""
        return (self.mean + self.parts // 2) // self.parts

    @cached_property
    def parameters(self) -> tuple[np.ndarray, ...]:
        """What constriction's model gets: the mean and the standard deviation of k − base."""
        return (self.mean - self.base * self.parts) / self.parts, np.ascontiguousarray(self.std)

    def family(self, library: Any) -> Any:
        """The model of constriction."""
        return library.stream.model.QuantizedGaussian(-self.window, self.window)


@dataclass(frozen=True, eq=False)
class BinnedNormal:
    """The Gaussian cut into the 256 grey levels, open-ended at both ends: Ho et al. 2020, eq. 13.

    Attributes:
        mean: the means in grey levels, (n,), float64.
        std: the standard deviations in grey levels, (n,), float64.
    """

    mean: np.ndarray
    std: np.ndarray

    __repr__ = fields_line

    @property
    def parameters(self) -> tuple[np.ndarray, ...]:
        """What constriction's model gets."""
        return np.ascontiguousarray(self.mean), np.ascontiguousarray(self.std)

    def family(self, library: Any) -> Any:
        """The model of constriction, whose tails beyond the ends belong to the outermost levels."""
        return library.stream.model.QuantizedGaussian(0, LEVELS - 1)


@dataclass(frozen=True, eq=False)
class Categories:
    """Any law of the 256 grey levels.

    Attributes:
        probabilities: of each level, (n, 256), float64.
    """

    probabilities: np.ndarray

    __repr__ = fields_line

    @property
    def parameters(self) -> tuple[np.ndarray, ...]:
        """What constriction's model gets."""
        return (np.ascontiguousarray(self.probabilities),)

    def family(self, library: Any) -> Any:
        """The model of constriction, in which no level is impossible."""
        return library.stream.model.Categorical(perfect=False)


PixelLaw = BinnedNormal | Categories
Law = GridNormal | PixelLaw


class Stack:
    """A stack of bits.

    Args:
        words: what it holds, (n,), uint32.
        sealed: whether these are the initial words, to which a mark is added that keeps zeros at their end;
            or what `words` of another stack gave.

    Attributes:
        lowest: the fewest words that it had after a `draw` or a `pop` since this was last set.

    Raises:
        ValueError: constriction is not installed, or the words are not those of a stack.
    """

    def __init__(self, words: np.ndarray, sealed: bool):
        self._library = load_constriction()
        self._uniform = self._library.stream.model.Uniform(HALF)
        try:
            self._coder = self._library.stream.stack.AnsCoder(words.astype(np.uint32), seal=sealed)
        except ValueError as error:  # a last word of 0
            raise ValueError(f"these are no words of a stack: {error}") from None
        self.lowest = len(self)

    def __len__(self) -> int:
        """How many words it has."""
        return self._coder.num_words()

    def copy(self) -> "Stack":
        """Another stack that holds the same."""
        found = object.__new__(Stack)
        found.__dict__.update(self.__dict__, _coder=self._coder.clone())
        return found

    @property
    def words(self) -> np.ndarray:
        """What it holds, (n,), uint32."""
        return self._coder.get_compressed()

    def initial_words(self) -> np.ndarray:
        """The words that it began with, after all that was pushed has been popped, (n,), uint32.

        Raises:
            ValueError: it holds something else.
        """
        try:
            return self._coder.get_compressed(unseal=True)
        except Exception:  # constriction's errors have no common class
            raise ValueError("the stack does not end at its initial words") from None

    def draw(self, law: GridNormal) -> np.ndarray:
        """Numbers that have this law, made of the bits on top, (n,), int64.

        Raises:
            Exhausted: there are too few bits.
        """
        return law.base + self._decode(law)

    def undraw(self, numbers: np.ndarray, law: GridNormal) -> None:
        """Turn numbers that `draw` gave back into the bits that they were.

        Raises:
            Exhausted: a number that no draw by this law gives.
        """
        offsets = numbers - law.base
        if np.abs(offsets).max(initial=0) > law.window:
            raise Exhausted("a number was not drawn by its law")
        self._encode(offsets, law)

    def push(self, numbers: np.ndarray, law: Law) -> None:
        """Put numbers on the stack.

        Args:
            numbers: (n,), whole numbers: of a law of pixels grey levels, else within ±2^30.
            law: their law.

        Raises:
            ValueError: a number that is too large.
        """
        if isinstance(law, GridNormal):
            if np.abs(numbers).max(initial=0) > LARGEST_NUMBER:
                raise ValueError(f"a number lies beyond {LARGEST_NUMBER} bins; allowed: nearer to 0")
            offsets = numbers - law.base
            raw = numbers[np.abs(offsets) >= law.window] & 0xFFFFFFFF
            for half in (raw & (HALF - 1), raw >> 16):
                if len(half):
                    self._coder.encode_reverse(half.astype(np.int32), self._uniform)
            numbers = np.clip(offsets, -law.window, law.window)
        self._encode(numbers, law)

    def pop(self, law: Law) -> np.ndarray:
        """Take numbers off that were pushed by this law, (n,), int64.

        Raises:
            Exhausted: there are too few bits, so that it was not what was pushed.
        """
        found = self._decode(law)
        if not isinstance(law, GridNormal):
            return found
        escaped = np.abs(found) >= law.window
        found = law.base + found
        if count := int(escaped.sum()):
            high, low = (self._coder.decode(self._uniform, count).astype(np.int64) for _ in range(2))
            found[escaped] = (((high << 16) | low) ^ 0x80000000) - 0x80000000
            self._check()
        return found

    def _encode(self, symbols: np.ndarray, law: Law) -> None:
        self._coder.encode_reverse(symbols.astype(np.int32), law.family(self._library), *law.parameters)

    def _decode(self, law: Law) -> np.ndarray:
        found = self._coder.decode(law.family(self._library), *law.parameters).astype(np.int64)
        self._check()
        return found

    def _check(self) -> None:
        """An empty stack gives numbers all the same, which are not of the law."""
        self.lowest = min(self.lowest, len(self))
        if len(self) <= SPARE_WORDS:
            raise Exhausted("there are too few bits on the stack")
