"""Several processes as one: what process 0 does and finds, told to all of them."""

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from diffusers.utils.torch_utils import get_device

T = TypeVar("T")
KINDS = {kind.__name__: kind for kind in (ValueError, OSError, RuntimeError)}


def on_main_process(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """What `work` returns on process 0, on all of them; they wait for it. What it raises there, all raise.

    Args:
        accelerator: the processes.
        work: something to be done once; its answer is small and plain.

    Raises:
        ValueError, OSError, RuntimeError: `work` raised it on process 0; other kinds are RuntimeError on the
            others.
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
    """The launch's processes and this one's device, joined on CPUs too."""
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or get_device() == "cpu"
    return PartialState(cpu=on_cpu)  # else two processes on CPUs each believe to be alone
