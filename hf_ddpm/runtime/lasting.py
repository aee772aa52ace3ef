"""Standard output and error that may end before the program does: a closed terminal, `| head`, `>&-`.

What can't be written there is dropped, so that no work is lost for a line that nobody reads.
"""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

GONE = (errno.EPIPE, errno.EIO, errno.EBADF)  # whoever read the stream has left


class Lasting:
    """A text stream whose writes never fail.

    Args:
        stream: any text stream; None, as Python has it for a descriptor that was closed at the start, for one
            that takes everything and shows nothing.

    Attributes:
        error: why something could not be written, other than that its reader has left; None if nothing was.
    """

    def __init__(self, stream: Any):
        self._stream = open(os.devnull, "w") if stream is None else stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or drop the text."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        """Bring to its reader what was written, or drop it."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._drop(error)

    def _drop(self, error: OSError | ValueError) -> None:
        if isinstance(error, OSError) and error.errno not in GONE and self.error is None:
            self.error = error
        # What the stream still holds would fail again when the interpreter ends
        with suppress(OSError, ValueError):
            number, nowhere = self._stream.fileno(), os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


@contextmanager
def lasting_streams() -> Iterator[Lasting]:
    """While in this context, writing to standard output or error never fails.

    Returns:
        Standard output.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened would get the number, and what is printed
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    before = sys.stdout, sys.stderr
    out, err = Lasting(sys.stdout), Lasting(sys.stderr)
    sys.stdout, sys.stderr = out, err  # type: ignore[assignment]
    try:
        yield out
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before
