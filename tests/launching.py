"""Starting the training script from a test: really, or in a process forked from one that has imported it.

A real start imports diffusers for seconds of both cores. `start` is therefore a fork of the standard
library's fork server, with its own working directory, environment, standard output and arguments; `run` is a
real one.
"""

import faulthandler
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_scripts" / "train.py"

TIMES = {"images_per_second", "seconds"}  # what of a log line tells the time

FORKS = multiprocessing.get_context("forkserver")
JOURNEYS = ["training.trainer", "generation.sample", "evaluation.evaluate", "publishing.publish", "pictures"]
FORKS.set_forkserver_preload([*(f"hf_ddpm.{name}" for name in ("cli", *JOURNEYS)), "tests.launching"])


def environment(**changes: str) -> dict[str, str]:
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER_"))}
    return {**alone, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), **changes}


def flags(**values) -> list[str]:
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def run(command: list, cwd: Path, timeout: float = 240, **changes: str) -> subprocess.CompletedProcess:
    """A real start, to its end."""
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def torchrun(processes: int) -> list[str]:
    """The launcher's words; a free port each time."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def as_launched(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun says in the environment; nothing for a process alone."""
    if processes == 1:
        return {}
    facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    facts |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in facts.items()}


def start(command: list, cwd: Path, processes: int = 1, errors: str = "output") -> list[BaseProcess]:
    """Python processes that run a script, each rank of a launch one; they print to `output` and `errors`."""
    started, port = [], free_port()
    for rank in range(processes):
        env = environment(**as_launched(rank, processes, port))
        process = FORKS.Process(target=_script, args=([str(word) for word in command], str(cwd), env, errors))
        process.start()
        started.append(process)
    return started


def finish(started: list[BaseProcess], timeout: float = 120) -> list[int | None]:
    """Their exit codes, None for one that did not end in time (it is killed)."""
    for process in started:
        process.join(timeout)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
        process.join()
    return codes


def forked(command: list, cwd: Path, processes: int = 2) -> subprocess.CompletedProcess:
    """What `run` gives of a launch, without the launcher and the imports."""
    cwd.mkdir(exist_ok=True)
    codes = finish(start(command, cwd, processes, "errors"))
    told = [(cwd / name).read_text() if (cwd / name).exists() else "" for name in ("output", "errors")]
    return subprocess.CompletedProcess(command, max(code or 0 for code in codes), *told)


def _script(command: list[str], cwd: str, env: dict[str, str], errors: str) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for stream, name in ((1, "output"), (2, errors)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    multiprocessing.set_start_method(None, force=True)  # the default again, for data loaders
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def together(folder: Path, work: Callable, *args, processes: int = 2, timeout: float = 240) -> list:
    """What `work(*args)`, of a module, returns in each process, by rank; all must end well.

    gloo or torch was once seen to crash in an all-gather, in CI and in none of 40 repetitions under load:
    processes of which one is killed by a signal are started once more.
    """
    torch.save(args, folder / ".args.pt")  # sent through a pipe, tensors would be shared between processes
    for _ in range(2):
        codes, answers = _together(folder, work, processes, timeout)
        if all(code is None or code >= 0 for code in codes):
            break
        print(f"processes ended with {codes}", file=sys.stderr)
    assert all(error is None for _, error in answers), "\n".join(str(error) for _, error in answers)
    assert codes == [0] * processes
    return [answer for answer, _ in answers]


def _together(folder: Path, work: Callable, processes: int, timeout: float) -> tuple[list, list]:
    """Their exit codes, and what each returned and raised."""
    places, port = [folder / f".rank{rank}.pt" for rank in range(processes)], free_port()
    for place in places:
        place.unlink(missing_ok=True)
    started = []
    for rank, place in enumerate(places):
        env = environment(**as_launched(rank, processes, port))
        process = FORKS.Process(target=_work, args=(env, place, work))
        process.start()
        started.append(process)
    codes = finish(started, timeout)
    silent = [(None, f"rank {rank} ended with {code} and said nothing") for rank, code in enumerate(codes)]
    answers = [
        torch.load(place, weights_only=False) if place.exists() else silence
        for place, silence in zip(places, silent, strict=True)
    ]
    return codes, answers


def _work(env: dict[str, str], place: Path, work: Callable) -> None:
    os.environ.clear()
    os.environ.update(env)
    faulthandler.enable()  # a native crash says where
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


def results(run_folder: Path) -> dict[str, object]:
    """Every file of a run that doesn't tell the time, by its path: log lines without it, others as bytes."""
    found: dict[str, object] = {}
    for path in sorted(run_folder.rglob("*")):
        name = path.relative_to(run_folder).as_posix()
        if path.name == "log.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
        elif path.is_file():
            found[name] = path.read_bytes()
    return found
