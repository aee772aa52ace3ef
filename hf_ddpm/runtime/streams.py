"""What a command prints: every line that leaves it is short, without secrets, and can't disturb a terminal.

`guard_streams` is called once, when a command begins. From then on standard output, standard error, log
records, warnings and tracebacks pass through here, whoever writes them.
"""

import logging
import os
import re
import sys
from typing import Any

from hf_ddpm.runtime.messages import CONTROL, LIMIT, one_line, redact, shorten

# What progress bars and coloured logs write is let through: line ends, tabs, colours, and cursor movements
OBEYED = re.compile(r"[\n\r\t]|\x1b\[(?:\d*[AK]|[\d;]*m)")
TRACEBACK = "HF_DDPM_TRACEBACK"  # with this variable set, errors are printed as Python prints them


class SafeStream:
    """A text stream whose writes are redacted, and escaped where a terminal would obey them.

    Args:
        stream: where the text goes.
        limit: the most characters of a line; None for any number.
    """

    def __init__(self, stream: Any, limit: int | None = None):
        self._stream, self._limit = stream, limit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text, and say that all of it was written."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        safe = _escaped(redact(text)).encode(encoding, "backslashreplace").decode(encoding)
        if self._limit is not None and len(safe) > self._limit:
            safe = "".join(_shortened(line, self._limit) for line in re.split(r"(?<=[\n\r])", safe))
        self._stream.write(safe)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write some texts."""
        for line in lines:
            self.write(line)


def _escaped(text: str) -> str:
    """The text with every control character written as an escape, but for those that are let through."""
    if not CONTROL.search(text):
        return text
    found, end = [], 0
    for kept in OBEYED.finditer(text):
        found += [_escape(text[end : kept.start()]), kept.group()]
        end = kept.end()
    return "".join([*found, _escape(text[end:])])


def _escape(text: str) -> str:
    return CONTROL.sub(lambda found: repr(found.group())[1:-1], text)


def _shortened(line: str, limit: int) -> str:
    words = line.rstrip("\n\r")
    return shorten(words, limit) + line[len(words) :]


class OneLine(logging.Formatter):
    """A log record as one line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's words, and those of its error."""
        error = record.exc_info[1] if record.exc_info else None
        return one_line(record.getMessage() + (f" ({one_line(error)})" if error is not None else ""))


def guard_streams() -> None:
    """Let all that this program prints from now on pass through here.

    With HF_DDPM_TRACEBACK set, lines have any length.
    """
    whole = bool(os.environ.get(TRACEBACK))
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, SafeStream):
            setattr(sys, name, SafeStream(stream, None if whole else LIMIT))
    if logging.lastResort is not None and not whole:
        logging.lastResort.setFormatter(OneLine())
