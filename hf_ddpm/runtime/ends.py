"""How a command ends that the world around it ends: by a signal, or by closing its terminal.

Files that were half written are deleted on the way, and what a command had done stays, for the same command
to go on from.
"""

import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hf_ddpm.runtime.lasting import lasting_streams
from hf_ddpm.runtime.signals import EXIT_CODE, SIGNALS, Interrupted, interruptible


@contextmanager
def orderly_end(prog: str) -> Iterator[None]:
    """While in this context, SIGTERM, SIGHUP and SIGUSR1 end the program with one line and exit code 75.

    A training handles them by itself while it has something to save, and Ctrl-C is left to Python. Lines that
    nobody reads any more are dropped. Of several processes of a launch, the first prints the line.

    Args:
        prog: the program's name, for the line.

    Raises:
        SystemExit: a signal came, or what was printed to standard output could not be written there.
    """
    numbers = [number for number in SIGNALS if number != signal.SIGINT]
    with lasting_streams() as out, interruptible(numbers):
        try:
            yield
        except Interrupted as asked:
            if os.environ.get("RANK", "0") == "0":
                print(f"{prog}: {asked}; the same command goes on", file=sys.stderr)
            sys.exit(EXIT_CODE)
        out.flush()
        if out.error is not None:
            print(f"{prog}: failed: can't write to standard output: {out.error.strerror}", file=sys.stderr)
            sys.exit(1)


def orderly(run: Callable[..., None]):
    """A decorator of the function that runs commands, by which all of them have an `orderly_end`."""

    @functools.wraps(run)
    def wrapped(
        command: Callable[[Sequence[str], str], None], argv: Sequence[str] | None = None, prog: str = ""
    ) -> None:
        with orderly_end(prog or Path(sys.argv[0]).name):
            run(command, argv, prog)

    return wrapped
