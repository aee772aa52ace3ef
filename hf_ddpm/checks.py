"""Arguments that can't be right, refused in one line that names them.

A message says what an argument is by its type, dtype and shape, and never prints what it holds.
"""

from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

LONGEST_TEXT = 40  # characters of a text argument that a message shows


def described(value: Any) -> str:
    """What an argument is, in a few words: a number or a short text itself, of all else the kind."""
    if isinstance(value, Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, Tensor) else "NumPy array"
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{_with_article(dtype)} {kind} of shape {_short(str(tuple(value.shape)))}"
    if value is None or isinstance(value, bool | Real):
        return _short(repr(value))
    if isinstance(value, str):
        return _short(repr(value))
    if isinstance(value, type):
        return f"the class {_short(value.__name__)}"
    return _with_article(_short(type(value).__name__))


def _with_article(noun: str) -> str:
    """A noun after "a" or "an"; what begins with a U is spoken as "you"."""
    return f"{'an' if noun[:1] in 'aeioAEIO' else 'a'} {noun}"


def check_images(order: str, **images: Any) -> None:
    """Refuse images that are not floating-point tensors of one shape; a single number goes with any.

    Args:
        order: the call with its arguments in their order, for the message.
        **images: the images by the names of their arguments.

    Raises:
        ValueError: an argument is something else; the message says which, and the order.
    """
    shape = None
    for name, x in images.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise ValueError(
                f"{name} is {described(x)}; allowed: a floating-point tensor of images; the order is {order}"
            )
        if shape is None:
            shape, first = x.shape, name
        elif x.shape != shape and x.ndim and shape:
            raise ValueError(
                f"{name} has shape {_short(str(tuple(x.shape)))}; allowed: that of {first}, "  # pyright: ignore[reportPossiblyUnboundVariable]
                f"{_short(str(tuple(shape)))}; the order is {order}"
            )


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Refuse what is not a whole number of at least `least`.

    Raises:
        ValueError: it is something else; the message names the argument.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
        raise ValueError(f"{name} is {described(value)}; allowed: whole numbers >= {least}")


def check_seed(seed: Any) -> None:
    """Refuse what no draws can be derived from.

    Raises:
        ValueError: it is not a whole number of at least 0.
    """
    check_count("seed", seed, 0)


def as_numbers(name: str, values: Any, allowed: str, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers in a list, an array or a tensor as a tensor on the CPU, without a gradient.

    Args:
        name: of the argument.
        values: the numbers.
        allowed: what the message says is allowed.
        dtype: of the tensor; by default that of the values.

    Raises:
        ValueError: they are no numbers.
    """
    try:
        if torch.is_tensor(values) and values.is_complex():
            raise ValueError
        if isinstance(values, np.ndarray):
            values = values.copy()  # torch takes no array that runs backwards
        # Given the dtype at once: torch would read the floats of a list as float32 first
        return torch.as_tensor(values, dtype=dtype).detach().cpu()
    # What torch raises of things that are no numbers has no common class, and may print all of them
    except Exception:
        raise ValueError(f"{name} is {described(values)}; allowed: {allowed}") from None


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 3]}..."
