"""What an object says of itself: one short line in a terminal, a picture in a notebook.

A line says kinds, shapes and a few numbers, and never prints what tensors hold. Neither the line nor the
picture can fail, whatever the object holds: it may be half made, empty, not finite, or on the "meta" device.
The file knows no class of this package. Whoever draws pictures is named here and imported when a notebook
asks for one, so that the mathematics needs no library of pictures.
"""

import dataclasses
import math
import pkgutil
from collections.abc import Callable, Iterable, Sized
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor

LONGEST = 190  # characters of a line
LONGEST_VALUE = 40  # characters of a number or a text in it
PAINTERS = {"RateDistortion": "hf_ddpm.evaluation.plots:curve_png"}  # class -> function that gives a PNG file


def summary(owner: Any, facts: Callable[[], Iterable[str]] | None = None) -> str:
    """A `repr` of one line: the name of the class, and in parentheses what the object is.

    Args:
        owner: a dataclass or a named tuple.
        facts: gives the words in parentheses. Where it fails, or by default, they are the fields and, of
            arrays and lists, no more than the kind and the shape or number.
    """
    words = None
    if facts is not None:
        try:
            words = ", ".join(facts())
        # Of what an object may hold instead of what it should, nobody knows the errors
        except Exception:
            words = None
    if words is None:
        words = ", ".join(f"{name}={_kind(owner, name)}" for name in _names(owner))
    words = " ".join(words.split())
    name = type(owner).__name__
    room = max(3, LONGEST - len(name) - 2)
    if len(words) > room:
        words = f"{words[: room - 3]}..."
    return f"{name}({words})"


def fields_line(self: Any) -> str:
    """`summary` of an object's fields, to be assigned to `__repr__` in the class."""
    return summary(self)


def with_error(value: float, stderr: float, unit: str) -> str:
    """A mean with its standard error, as "3.532 ± 0.045 bits/dim"; without one where it is not known."""
    error = "" if math.isnan(stderr) and not math.isnan(value) else f" ± {stderr:.2g}"
    return f"{value:.4g}{error} {unit}"


def count(number: int, what: str) -> str:
    """A number of things, as "1 image" and "1,437 images"."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def painted(owner: Any) -> bytes | None:
    """The PNG file that shows an object in a notebook, by the function that `PAINTERS` names for its class.

    Returns:
        The file's bytes; None where it can't be drawn, so that the notebook shows the line instead.
    """
    return or_none(lambda: pkgutil.resolve_name(PAINTERS[type(owner).__name__])(owner))


def or_none(draw: Callable[[], bytes]) -> bytes | None:
    """What a function draws; None where it fails: a notebook asks for a picture of whatever it shows."""
    try:
        return draw()
    except Exception:
        return None


def _names(owner: Any) -> list[str]:
    """The fields that a `repr` names."""
    if dataclasses.is_dataclass(owner):
        return [field.name for field in dataclasses.fields(owner) if field.repr]
    return list(getattr(owner, "_fields", ()))


def _kind(owner: Any, name: str) -> str:
    """What a field holds, in a word or two."""
    try:
        value = getattr(owner, name)
        if isinstance(value, Tensor | np.ndarray):
            place = "" if not isinstance(value, Tensor) or value.device.type == "cpu" else f" {value.device}"
            return f"{str(value.dtype).removeprefix('torch.')} {_cut(str(tuple(value.shape)))}{place}"
        if value is None or isinstance(value, str | bool | Real):
            return _cut(repr(value))
        kind = type(value).__name__
        if isinstance(value, list | tuple | dict | set | frozenset | bytes):
            return f"{kind} of {len(value)}"
        return f"{kind} of {len(value)}" if isinstance(value, Sized) and not callable(value) else kind
    except Exception:  # as above
        return "?"


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."
