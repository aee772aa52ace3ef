"""Estimates of memory: what can't fit into this machine is refused before it is tried.

A machine that is asked for too much swaps, or ends some other program. This file knows bytes, and no model.
"""

import os
from pathlib import Path

CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # a container's limit


def total_memory() -> int | None:
    """Bytes that this process can have at most: of the machine, its container, or `ulimit -v`.

    None where the system doesn't say.
    """
    limits = []
    try:
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        import resource

        limits += [limit for limit in resource.getrlimit(resource.RLIMIT_AS)[:1] if limit > 0]
    except (ImportError, AttributeError, ValueError, OSError):  # Windows
        pass
    for file in CGROUPS:
        try:
            limits.append(int(Path(file).read_text()))
        except (OSError, ValueError):  # no such file, or the word "max"
            continue
    return min(limits, default=None)


def check_memory(option: str, value: int, each: int, what: str) -> None:
    """Refuse a number of things that together take more memory than there is.

    Args:
        option: the option that says how many.
        value: how many.
        each: the least number of bytes that one takes.
        what: what one is, for the message.

    Raises:
        ValueError: the message names the option and its limit here.
    """
    limit = total_memory()
    if limit is not None and value * each > limit:
        raise ValueError(
            f"{option} is {value}: at least {_size(value * each)}, by {_size(each)} for each {what}, where "
            f"there are {_size(limit)} of memory; allowed here: <= {limit // each}"
        )


def _size(number: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.4g} TB"
