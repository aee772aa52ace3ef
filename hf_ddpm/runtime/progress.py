"""What long work shows: one bar, redrawn rarely where it goes to a log file."""

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

# A log file wants a line of progress now and then.
REFRESH = 0.5 if sys.stderr.isatty() else 15.0


def progress(what: str, total: int, unit: str, show: bool, leave: bool = True, initial: int = 0) -> Any:
    """A bar of `total` units, a context; `show` on one process only."""
    return tqdm(
        total=total,
        initial=initial,
        desc=what,
        unit=unit,
        leave=leave,
        mininterval=REFRESH,
        dynamic_ncols=True,
        disable=not show,
    )


class Counted:
    """A denoiser that counts its calls, one per image and step, and shows them in `bar` if there is one."""

    def __init__(self, denoiser: Callable[[Tensor, Tensor], Tensor], bar: Any = None):
        self.denoiser, self.bar, self.count = denoiser, bar, 0

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The denoiser's answer."""
        self.count += len(x_t)
        if self.bar is not None:
            self.bar.update(len(x_t))
        return self.denoiser(x_t, t)
