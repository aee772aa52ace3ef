"""Starting the training script from a test: really, or in a process forked from one that has imported it.

A real start imports diffusers for seconds of both cores. `start` is therefore a fork of the standard
library's fork server, with its own working directory, environment, standard output and arguments; `run` is a
real one.
"""

import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_scripts" / "train.py"

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["hf_ddpm.cli", "tests.launching"])


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


def start(command: list, cwd: Path, processes: int = 1) -> list[BaseProcess]:
    """Python processes that run a script, each rank of a launch one; they print to the file `output`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(processes):
        env = environment()
        if processes > 1:  # as torchrun sets it
            ranks = dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
            worlds = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
            env |= {**ranks, **worlds, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        process = FORKS.Process(target=_script, args=([str(word) for word in command], str(cwd), env))
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


def _script(command: list[str], cwd: str, env: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    multiprocessing.set_start_method(None, force=True)  # the default again, for data loaders
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def results(run_folder: Path) -> dict[str, object]:
    """Every file of a run that doesn't tell the time, by its path: log lines without it, others as bytes."""
    found: dict[str, object] = {}
    for path in sorted(run_folder.rglob("*")):
        name = path.relative_to(run_folder).as_posix()
        if path.name == "log.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]
        elif path.is_file():
            found[name] = path.read_bytes()
    return found
