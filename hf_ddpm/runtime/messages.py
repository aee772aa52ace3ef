"""Words for people: an error in one line, the name that was meant, and text without secrets.

Text that is written down, printed or raised goes through `redact` where it may hold a token. This file knows
what the Hub's tokens and passwords in addresses look like, and where the Hub's client takes its token from.
It imports the standard library and spelling.py; of the client it asks what it has loaded, and never loads it.
"""

import functools
import os
import re
import stat
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from hf_ddpm.spelling import did_you_mean as did_you_mean
from hf_ddpm.spelling import nearest as nearest

# The kinds of token that the Hub gives out; those with a second underscore hold dots and dashes
TOKENS = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:hf|api_org)_[A-Za-z0-9]{16,}|hf_(?:oauth|jwt|refresh|org)_[\w.-]{8,})"
)
IN_HEADER = re.compile(
    r"(?i)(\bbearer\s+(?=\S*\d)|\bauthorization['\"]?\s*[:=]\s*['\"]?(?:(?:bearer|basic|token)\s+)?)"
    r"[\w.~+/=-]{8,}"
)
IN_ADDRESS = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")  # scheme://user:password@host
IN_QUERY = re.compile(
    r"(?i)([?&;][\w.%-]*(?:token|key|secret|password|passwd|signature|sig|credential)=)[^&#\s'\"<>]+"
)
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_ID_TOKEN", "WANDB_API_KEY")
STORED = "stored_tokens"  # the client's file of all tokens that were ever logged in with
HIDDEN = "***"
LEAST = 8  # a shorter secret could be an ordinary word
LARGEST_FILE = 100_000  # bytes of a file of tokens that is read
LIMIT = 300  # characters of a line
# What could move a terminal's cursor, break a line in two or turn its order round
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def redact(text: str, *secrets: Any) -> str:
    """The text with every token and password replaced by ***.

    Known are the tokens that the Hub's client would use now, wherever it takes them from, whatever has the
    form of a token, and passwords and keys in addresses and headers.

    Args:
        text: any text.
        *secrets: further secrets to look for, such as a token that was passed as an argument; anything that
            is not text is ignored.
    """
    for secret in (*secrets, *_known_tokens()):
        if isinstance(secret, str) and len(secret) >= LEAST:
            for form in {secret, repr(secret)[1:-1], quote(secret), quote(secret, safe="")}:
                text = text.replace(form, HIDDEN)
    for pattern in (IN_QUERY, IN_HEADER):
        text = pattern.sub(rf"\1{HIDDEN}", text)
    return TOKENS.sub(HIDDEN, IN_ADDRESS.sub(HIDDEN, text))


def _known_tokens() -> Iterator[str]:
    """The tokens that the Hub's client may use: of the environment, of its files, and those it has loaded."""
    for name in VARIABLES:
        yield os.environ.get(name, "").strip()
    for path in _token_files():
        try:
            found = os.stat(path)
            if stat.S_ISREG(found.st_mode):  # reading a pipe would take the token away from the client
                yield from _tokens_in(path, found.st_mtime_ns, found.st_size)
        except (OSError, ValueError):
            continue
    client = sys.modules.get("huggingface_hub.utils._auth")
    yield getattr(client, "_GOOGLE_COLAB_SECRET", None) or ""
    yield (getattr(client, "_OIDC_TOKEN_CACHE", None) or {}).get("token", "")


def _token_files() -> set[str]:
    """Where the client keeps tokens: as it read the environment when it was loaded, and as that is now."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    home = os.environ.get("HF_HOME") or os.path.join(home, "huggingface")
    now = os.environ.get("HF_TOKEN_PATH") or os.path.join(home, "token")
    files = {os.path.expandvars(os.path.expanduser(now))}
    if (constants := sys.modules.get("huggingface_hub.constants")) is not None:
        files.add(constants.HF_TOKEN_PATH)
    return files | {os.path.join(os.path.dirname(file), STORED) for file in files}


@functools.lru_cache(maxsize=16)
def _tokens_in(path: str, changed: int, size: int) -> list[str]:
    """The tokens of a file, read anew when it has changed: one alone, or lines `... token = ...`."""
    with open(path, "rb") as file:
        text = file.read(LARGEST_FILE).decode(errors="replace")
    if os.path.basename(path) != STORED:
        return ["".join(text.splitlines()).strip()]
    lines = (line.partition("=") for line in text.splitlines())
    return [value.strip() for key, _, value in lines if "token" in key]


def one_line(error: object, limit: int | None = LIMIT) -> str:
    """The words of an error, or a text, in one line that any terminal can show, without secrets.

    Args:
        error: an exception, or text.
        limit: the most characters that are kept, of the beginning and the end; None keeps all.

    Returns:
        One line; the name of the exception's class where it has no words. Characters that a terminal would
        obey are written as Python writes them in a `repr`.
    """
    no_words = type(error).__name__ if isinstance(error, BaseException) else ""
    text = " ".join(redact(str(error)).split()) or no_words
    return shorten(CONTROL.sub(_escape, text), limit)


def _escape(found: re.Match[str]) -> str:
    return repr(found.group())[1:-1]


def shorten(text: str, limit: int | None) -> str:
    """A text's beginning and end, with "..." between them where that is more than `limit` characters."""
    if limit is None or len(text) <= limit:
        return text
    end = (limit - 5) // 2
    return f"{text[: limit - 5 - end]} ... {text[len(text) - end :]}"


def shown(value: object, limit: int = 80) -> str:
    """A bad value as an error names it: its `repr`, shortened, without secrets."""
    try:
        return shorten(redact(repr(value)), limit)
    except (ValueError, RecursionError):  # whole numbers of thousands of digits, lists in lists
        return f"{type(value).__name__} too large to print"
