"""Files that may come from a stranger: regular ones only, of a stated size, and none outside of a folder.

Nothing here takes a path for a pattern or an address. This file knows bytes and paths; it decodes nothing.
"""

from __future__ import annotations

import os
import stat
from typing import BinaryIO

# The most bytes of one encoded image, and of any file that is read whole
MOST_BYTES = 512 << 20
_LONGEST = 140


def open_regular(path: str) -> BinaryIO:
    """Open a file for reading.

    Args:
        path: a path, which is opened as it stands; a link is followed.

    Raises:
        ValueError: a folder, a pipe, a device or a socket.
        OSError: there is no such file, or it can't be opened.
    """
    # Without O_NONBLOCK opening a pipe would wait for somebody who writes into it
    opened = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if stat.S_ISREG(os.fstat(opened).st_mode):
        return open(opened, "rb")
    os.close(opened)
    raise ValueError(f"{shown(path)} is no regular file")


def read_regular(path: str, most: int = MOST_BYTES) -> bytes:
    """The bytes of a file, whole.

    Args:
        path: a path, which is opened as it stands; a link is followed.
        most: how many bytes the file may have.

    Raises:
        ValueError: a folder, a pipe, a device or a socket, or a larger file.
        OSError: there is no such file, or it can't be opened.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= most:
            try:
                data = file.read(most + 1)
            except OSError as error:  # a failing disk; the system's words name no file
                raise OSError(error.errno, error.strerror, shown(path)) from error
            if len(data) <= most:
                return data
    raise ValueError(f"{shown(path)} has {size:,} bytes; allowed: {most:,}")


def inside(path: str, root: str) -> str:
    """The path of a file that data names, which must lie in the folder of the data.

    Args:
        path: relative to `root`, or absolute.
        root: the folder. Links in `path` are followed, and must not lead out of it.

    Raises:
        ValueError: it leads out of the folder.
    """
    top = os.path.realpath(root)
    try:
        real = os.path.realpath(os.path.join(top, path))
        if os.path.commonpath([top, real]) == top and real != top:
            return real
    # A NUL in the path, or another drive
    except ValueError:
        pass
    raise ValueError("its path leads out of the folder of the data set, which is not followed")


def shown(path: str | os.PathLike[str], longest: int = _LONGEST) -> str:
    """A path as messages show it: in one line, printable and not longer than so many characters."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]}…{text[1 - half :]}"
