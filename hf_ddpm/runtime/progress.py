"""The progress bar of long work, which is redrawn rarely where it goes to a log file.

A terminal that is closed takes neither the bar nor the work with it.
"""

import sys
from typing import Any

from tqdm.auto import tqdm

from hf_ddpm.runtime.lasting import Lasting

# Seconds between two drawings: a terminal is redrawn often, and a log file gets a line now and then.
REFRESH = 0.5 if sys.stderr is not None and sys.stderr.isatty() else 15.0


def progress(what: str, total: int, unit: str, show: bool, leave: bool = True, initial: int = 0) -> Any:
    """A progress bar, used as a context; its `update(n)` counts n more units.

    Args:
        what: the word in front of the bar.
        total: how many units there are.
        unit: what is counted, such as "image".
        show: whether it is drawn; True on one process only.
        leave: whether it stays on the screen when it is full.
        initial: how many units are done already.
    """
    return tqdm(
        file=Lasting(sys.stderr),
        total=total,
        initial=initial,
        desc=what,
        unit=unit,
        leave=leave,
        mininterval=REFRESH,
        dynamic_ncols=True,
        disable=not show,
    )
