"""A command is attacked: it runs in a forked child under limits, and what it did is told as an `Outcome`.

    outcome = attack(["train", "--batch-size", "10" * 5000], cwd=tmp_path)
    assert not outcome.faults({2})

The child has the parent's imports, so a command line that is refused early takes milliseconds. `attack_call`
does the same with a function, which ends as a command does.
"""

import gc
import os
import re
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_ddpm.cli import main
from hf_ddpm.runtime.arguments import run

LONGEST_LINE = 300  # characters
MOST_MEMORY = 1_500_000_000  # bytes that a command may take on top of what the parent has
SECRET = re.compile(r"hf_[A-Za-z0-9]{16,}|hf_(oauth|jwt)_[\w.-]{8,}|s3cret-token")


@dataclass(frozen=True)
class Outcome:
    """What a command did.

    Attributes:
        argv: its words; the name of a function.
        code: its exit code; negative for the signal that ended it, as of `subprocess`.
        out: what it printed to standard output.
        err: what it printed to standard error.
        seconds: how long it took.
        memory: the most bytes that it had at once, beyond what it began with.
        hung: whether it was killed as it did not end in time.
    """

    argv: Sequence[str]
    code: int
    out: str
    err: str
    seconds: float
    memory: int
    hung: bool = field(default=False)

    @property
    def lines(self) -> list[str]:
        """Every line that it printed; what a progress bar draws over is a line."""
        return re.split(r"[\n\r]", self.out + "\n" + self.err)

    def faults(self, codes: Iterable[int] = (0, 2), memory: int = MOST_MEMORY) -> list[str]:
        """What of the promises was broken; an empty list if nothing was.

        Args:
            codes: the exit codes that are right.
            memory: bytes that it may take.
        """
        last = self.err.rstrip("\n").rpartition("\n")[2]
        found = {
            "a hang": self.hung,
            f"exit code {self.code}, not {sorted(codes)}": self.code not in codes,
            "a traceback": "Traceback (most recent" in self.out + self.err,
            "an over-long line": any(len(line) > LONGEST_LINE for line in self.lines),
            "a token": bool(SECRET.search(self.out + self.err)),
            "a control character": bool(re.search(r"[\x00-\x08\x0b-\x0c\x0e-\x1a\x1c-\x1f]", self.err)),
            "no line that says why": self.code == 2 and "error: " not in last,
            f"{self.memory:,} bytes of memory": self.memory > memory,
        }
        return [name for name, broken in found.items() if broken]


def attack(
    argv: Sequence[str],
    cwd: Path,
    env: Mapping[str, str | None] | None = None,
    seconds: float = 60,
    memory: int = MOST_MEMORY,
) -> Outcome:
    """Run `hf-ddpm ARGV` in a forked child.

    Args:
        argv: the words after `hf-ddpm`; any text, even such that no shell would pass.
        cwd: where it runs.
        env: environment variables to set; None unsets one.
        seconds: after which it is killed.
        memory: bytes that it may allocate beyond what the parent has; further allocations fail in it.
    """
    return _fork(lambda: main(list(argv)), argv, cwd, env or {}, seconds, memory)


def attack_call(
    call: Callable[[], None], cwd: Path, seconds: float = 60, memory: int = MOST_MEMORY
) -> Outcome:
    """Call a function in a forked child; its errors end it as they end a command, with a line and a code.

    Args:
        call: the function.
        cwd: where it runs.
        seconds: after which it is killed.
        memory: bytes that it may allocate beyond what the parent has; further allocations fail in it.
    """
    return _fork(lambda: run(lambda *_: call(), [], "call"), ["call"], cwd, {}, seconds, memory)


def _fork(
    call: Callable[[], None],
    words: Sequence[str],
    cwd: Path,
    env: Mapping[str, str | None],
    seconds: float,
    memory: int,
) -> Outcome:
    start, read, write = time.monotonic(), *os.pipe()
    files = [cwd / f".attack-{name}-{os.getpid()}" for name in ("out", "err")]
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.close(read)
            os.chdir(cwd)
            code = _run(call, files, env, memory, write)
        finally:
            os._exit(code)
    os.close(write)
    hung = threading.Event()

    def kill() -> None:
        hung.set()
        os.kill(child, signal.SIGKILL)

    timer = threading.Timer(seconds, kill)
    timer.start()
    _, status = os.waitpid(child, 0)
    timer.cancel()
    with os.fdopen(read) as pipe:
        grown = int(pipe.read() or 0)
    out, err = (file.read_bytes().decode(errors="replace") for file in files)
    for file in files:
        file.unlink()
    code = os.waitstatus_to_exitcode(status)
    return Outcome(words, code, out, err, time.monotonic() - start, grown, hung.is_set())


def _run(
    call: Callable[[], None], files: Sequence[Path], env: Mapping[str, str | None], memory: int, write: int
) -> int:
    """The child: call the function, and write how much memory it took to the pipe."""
    for number, file in zip((1, 2), files, strict=True):
        place = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(place, number)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    for name, value in env.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    gc.freeze()  # what the parent holds need not be gone through again
    before = _size("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (_size("VmSize") + memory, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    code = 0
    try:
        call()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(write, str(max(0, _size("VmHWM") - before)).encode())
    return code


def _size(name: str) -> int:
    """A number of /proc/self/status, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 0 if found is None else int(found[1]) * 1024
