"""Several processes that act as one: process 0 does what is done once, and tells the others what came of it.

accelerate starts and counts the processes; this file knows nothing of what they do.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from diffusers.utils.torch_utils import get_device

from hf_ddpm.runtime.environment import DEVICE_VARIABLE, asked_of_accelerate, check_environment
from hf_ddpm.runtime.messages import one_line

T = TypeVar("T")
KINDS = {kind.__name__: kind for kind in (ValueError, OSError, RuntimeError)}


@contextlib.contextmanager
def held_back(*loggers: str) -> Iterator[list[str]]:
    """Keep what some loggers say in this context from being printed; yields the lines, as they come.

    What each of several processes would say can so be told once.

    Args:
        *loggers: their names.
    """
    lines: list[str] = []
    handler, found = logging.Handler(), [logging.getLogger(name) for name in loggers]
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    for logger in found:
        logger.propagate = False
        logger.addHandler(handler)
    try:
        yield lines
    finally:
        for logger in found:
            logger.propagate = True
            logger.removeHandler(handler)


def on_main_process(accelerator: Accelerator | PartialState, work: Callable[[], T]) -> T:
    """Call `work` on process 0 alone, and return what it returns, or raise what it raises, on all processes.

    All processes call this function, and wait in it until the work is done.

    Args:
        accelerator: the processes.
        work: what is to be done once; what it returns is small and can be pickled.

    Raises:
        ValueError, OSError, RuntimeError: `work` raised it on process 0. An error of another kind is raised
            there as it is, and on the other processes as a RuntimeError.
    """
    answer: list[Any] = [None, None, ()]
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            answer[0] = work()
        except Exception as caught:
            error = caught
            known = [name for name, kind in KINDS.items() if isinstance(error, kind)]
            answer[1] = known[0] if known else "RuntimeError"
            answer[2] = (str(error) if known else f"{type(error).__name__}: {error}",)
            if isinstance(error, OSError) and error.errno is not None:
                answer[2] = error.errno, error.strerror, error.filename, None, error.filename2
    broadcast_object_list(answer)
    if error is not None:
        raise error
    if answer[1] is not None:
        raise KINDS[answer[1]](*answer[2])
    return answer[0]


def process_state() -> PartialState:
    """The processes of this launch and the device of this one; the same object at every call.

    Raises:
        ValueError: accelerate can't start as the environment asks; the message names the variables.
    """
    with as_launched():
        # Without `cpu=True`, accelerate takes each of several processes on CPUs for a launch of its own.
        on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or get_device() == "cpu"
        return PartialState(cpu=on_cpu)


@contextlib.contextmanager
def as_launched() -> Iterator[None]:
    """Within, accelerate looks at the environment; what it can't do with that is a ValueError.

    Raises:
        ValueError: the message names the variables of the launch.
    """
    check_environment()
    try:
        yield
        if (name := os.environ.get(DEVICE_VARIABLE)) is not None:
            torch.empty(1, device=name)
    # The environment decides which class of accelerate or torch meets what it can't do
    except Exception as error:
        raise ValueError(
            f"accelerate can't start: {one_line(error, 120)}; the environment says {asked_of_accelerate()}"
        ) from error
