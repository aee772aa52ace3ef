"""Asking a run to stop: SIGTERM, SIGINT and SIGUSR1 become a flag that all processes read at the same step.

SIGUSR1 is what SLURM's `--signal=USR1@60` sends ahead of a pre-emption or the time limit.
"""

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, try again


class TrainingStopped(Exception):
    """A signal ended the run, whose checkpoint is safe; the same command goes on with it."""


class StopSignals:
    """While in this context, the signals don't end the process: `agreed` and `check` tell of them.

    Outside a process's main thread no signal can be caught, and none is.

    Attributes:
        name: the first signal that came, such as "SIGTERM"; None if none did.
    """

    def __init__(self, num_processes: int):
        self.name: str | None = None
        self._before: dict[int, Any] = {}
        # On CPUs, so that asking waits for the other processes' Python, never for a device
        self._group: Any = dist.new_group(backend="gloo") if num_processes > 1 else None

    def __enter__(self) -> "StopSignals":
        try:
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as of Ctrl-C in a background job
                    self._before[number] = signal.signal(number, self._note)
        except ValueError:  # not in the main thread
            pass
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():  # None: of a C library, and not to be had back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name

    def agreed(self) -> bool:
        """Whether any process was told to stop; all call it at the same step, and get the same answer."""
        if self._group is None:
            return self.name is not None
        number = torch.tensor(getattr(signal, self.name) if self.name else 0)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self._group)
        if not number:  # a signal that came since waits for the next step, as the others don't know of it
            return False
        self.name = self.name or signal.Signals(int(number)).name
        return True

    def check(self) -> None:
        """Ask in long work with nothing to save; all processes do, as many times.

        Raises:
            TrainingStopped: a process was told to stop.
        """
        if self.agreed():
            raise TrainingStopped


def ignore_signals(*_: object) -> None:
    """For a helper process: the one that it works for says when to stop."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
