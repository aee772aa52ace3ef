"""Words for people: errors in one line, the name that was meant, and text without secrets.

Whatever is written down, printed or raised goes through `redact` where a token may be in it. It knows how the
Hub's tokens and passwords in addresses look, and the token of the environment.
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
LEAST = 8  # shorter values of a variable could be ordinary words


def redact(text: str, *secrets: Any) -> str:
    """The text with every token and password replaced by ***.

    Args:
        text: any.
        *secrets: further secrets to look for, such as a token that was passed as an argument; what is no text
            is left alone.
    """
    for secret in (*secrets, *(os.environ.get(name) for name in VARIABLES)):
        if isinstance(secret, str) and len(secret) >= LEAST:
            text = text.replace(secret, HIDDEN)
    return TOKENS.sub(HIDDEN, IN_ADDRESS.sub(HIDDEN, IN_QUERY.sub(rf"\1{HIDDEN}", text)))


def one_line(error: Exception) -> str:
    """The error's words without line breaks, for a message of one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word that is most like this one; None if none is (as `difflib.get_close_matches` judges)."""
    return next(iter(difflib.get_close_matches(word, list(known), 1, cutoff)), None)


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """The words "(did you mean 'linear'?)" after a space; nothing if no known word is like the given one."""
    near = nearest(str(word), known)
    return f" (did you mean {near!r}?)" if near else ""
