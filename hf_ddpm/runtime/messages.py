"""Words for people: an error in one line, the name that was meant, and text without secrets.

Text that is written down, printed or raised goes through `redact` where it may hold a token. This file knows
what the Hub's tokens and passwords in addresses look like, and which environment variables hold a token. It
imports the standard library only.
"""

import difflib
import os
import re
from collections.abc import Iterable
from typing import Any

TOKENS = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}")
IN_ADDRESS = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")  # scheme://user:password@host
IN_QUERY = re.compile(r"(?i)([?&](?:access_)?token=)[^&\s'\"]+")
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
HIDDEN = "***"
LEAST = 8  # a shorter value of a variable could be an ordinary word


def redact(text: str, *secrets: Any) -> str:
    """The text with every token and password replaced by ***.

    Args:
        text: any text.
        *secrets: further secrets to look for, such as a token that was passed as an argument; anything that
            is not text is ignored.
    """
    for secret in (*secrets, *(os.environ.get(name) for name in VARIABLES)):
        if isinstance(secret, str) and len(secret) >= LEAST:
            text = text.replace(secret, HIDDEN)
    return TOKENS.sub(HIDDEN, IN_ADDRESS.sub(HIDDEN, IN_QUERY.sub(rf"\1{HIDDEN}", text)))


def one_line(error: object, limit: int | None = 300) -> str:
    """The words of an error, or a text, without line breaks.

    Args:
        error: an exception, or text.
        limit: the most characters that are kept; None keeps all.

    Returns:
        One line; the name of the exception's class where it has no words.
    """
    no_words = type(error).__name__ if isinstance(error, BaseException) else ""
    return " ".join(str(error).split())[:limit] or no_words


def nearest(word: object, known: Iterable[object], cutoff: float = 0.6) -> str | None:
    """The known word that is most like this one.

    Args:
        word: what was typed.
        known: the words that are allowed.
        cutoff: how alike they must be, from 0 (anything) to 1 (equal), as `difflib.get_close_matches` counts.

    Returns:
        One of the known words; None if none is that much alike.
    """
    return next(iter(difflib.get_close_matches(str(word), [str(name) for name in known], 1, cutoff)), None)


def did_you_mean(word: object, known: Iterable[object]) -> str:
    """The words "(did you mean 'linear'?)" after a space; nothing if no known word is like the given one."""
    near = nearest(word, known)
    return "" if near is None else f" (did you mean {near!r}?)"
