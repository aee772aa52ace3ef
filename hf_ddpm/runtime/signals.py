"""Asking a run to stop: SIGTERM, SIGINT and SIGUSR1 become a flag that all processes read at the same step.

SIGUSR1 is what SLURM's `--signal=USR1@60` sends before it pre-empts a job or its time is over. torch is
imported only where several processes have to agree, so that the command line loads without it.
"""

import signal
from types import FrameType
from typing import Any

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, try again


class TrainingStopped(Exception):
    """A signal ended the run after its checkpoint was saved; the same command continues it."""


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
        try:
            for number in SIGNALS:
                # A shell lets its background jobs ignore Ctrl-C, and it should stay so.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        except ValueError:  # not in the main thread
            pass
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            # None stands for the handler of a C library, which Python can't set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

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
