"""Several processes that gloo joins, on CPUs, without the seconds that a launcher's imports take."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["hf_ddpm.trainer"])


def together(folder: Path, work: Callable, *args, processes: int = 2, timeout: float = 240) -> list:
    """What `work(*args)`, of a module, returns in each process, by rank; all must end well."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    places = [folder / f".rank{rank}.pt" for rank in range(processes)]
    for place in places:
        place.unlink(missing_ok=True)
    torch.save(args, folder / ".args.pt")  # sent through a pipe, tensors would be shared between processes
    running = [
        _context.Process(target=_run, args=(rank, processes, port, place, work), daemon=True)
        for rank, place in enumerate(places)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(timeout)
    for process in running:
        process.kill()
    answers = [torch.load(place, weights_only=False) if place.exists() else (None, "") for place in places]
    assert all(error is None for _, error in answers), "\n".join(str(error) for _, error in answers)
    assert [process.exitcode for process in running] == [0] * processes
    return [answer for answer, _ in answers]


def _run(rank: int, processes: int, port: int, place: Path, work: Callable) -> None:
    """The child: what a launcher says in the environment, then the work."""
    facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    facts |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
    if processes > 1:
        os.environ |= {name: str(value) for name, value in facts.items()}
    torch.set_num_threads(1)
    answer, error = None, None
    try:
        answer = work(*torch.load(place.with_name(".args.pt"), weights_only=False))
    except BaseException:
        error = traceback.format_exc()
    torch.save((answer, error), place)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os._exit(error is not None)
