"""Asking a program to stop: an error where nothing has to be saved, and else a flag that is looked at.

In the loop of a training, SIGTERM, SIGINT, SIGHUP and SIGUSR1 become a flag that all processes read at the
same step. Anywhere else they end the work at once, by an error that cleans up. SIGHUP is what a terminal
sends that is closed, SIGUSR1 what SLURM's `--signal=USR1@60` sends before it pre-empts a job or its time is
over. torch is imported only where several processes have to agree, so that the command line loads without it.
"""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, try again


class TrainingStopped(Exception):
    """A signal ended the run; what it had done is saved, and the same command continues it."""


class Interrupted(BaseException):
    """A signal came while nothing had to be saved. Like KeyboardInterrupt, it is no `Exception`."""


@contextmanager
def interruptible(numbers: Sequence[int] = SIGNALS) -> Iterator[list[str]]:
    """While in this context, the signals raise `Interrupted` wherever the program is.

    Python catches signals in a process's main thread only; in any other thread this does nothing. A signal
    that is ignored, as `nohup` lets a program ignore SIGHUP, stays so.

    Args:
        numbers: the signals.

    Returns:
        The names of those that came. Where Python drops an error, as in a destructor, this still tells of it.
    """
    came: list[str] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        came.append(signal.Signals(number).name)
        raise Interrupted(f"stopped by {came[0]}")

    before = _handle(numbers, interrupt)
    try:
        yield came
    finally:
        _restore(before)


def _handle(numbers: Sequence[int], handler: Any) -> dict[int, Any]:
    """Set a handler for signals that are not ignored; what each of them had before."""
    before: dict[int, Any] = {}
    try:
        for number in numbers:
            # A shell lets its background jobs ignore Ctrl-C, and it should stay so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    except ValueError:  # not in the main thread
        pass
    return before


def _restore(before: dict[int, Any]) -> None:
    for number, handler in before.items():
        # None stands for the handler of a C library, which Python can't set again.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


class StopSignals:
    """While in this context, the signals don't end the process: `agreed` and `check` tell of them.

    Python catches signals in a process's main thread only; in any other thread this does nothing.

    Attributes:
        name: the first signal that came, such as "SIGTERM"; None if none did.
    """

    def __init__(self, num_processes: int):
        self.name: str | None = None
        self._before: dict[int, Any] = {}
        self._group: Any = None
        if num_processes > 1:
            from torch import distributed

            # On CPUs, so that asking waits for the other processes' Python, never for a device
            self._group = distributed.new_group(backend="gloo")

    def __enter__(self) -> "StopSignals":
        self._before = _handle(SIGNALS, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        _restore(self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name

    def agreed(self) -> bool:
        """Whether any process was told to stop.

        All processes call it at the same step and get the same answer.
        """
        if self._group is None:
            return self.name is not None
        import torch
        from torch import distributed

        number = torch.tensor(getattr(signal, self.name) if self.name else 0)
        distributed.all_reduce(number, distributed.ReduceOp.MAX, group=self._group)
        # A signal that came in the meantime waits for the next step: the other processes don't know of it.
        if not number:
            return False
        self.name = self.name or signal.Signals(int(number)).name
        return True

    def check(self) -> None:
        """End long work that has nothing to save, if asked to; all processes call it equally often.

        Raises:
            TrainingStopped: a process was told to stop.
        """
        if self.agreed():
            raise TrainingStopped


def ignore_signals(*_: object) -> None:
    """For a helper process, which ends when the process that it works for says so."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
