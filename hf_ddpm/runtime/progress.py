"""What long work shows: one bar, redrawn rarely where it goes to a log file."""

import sys
from typing import Any

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
