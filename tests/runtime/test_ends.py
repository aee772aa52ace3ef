"""ends.py and lasting.py: commands that signals end, and readers that leave."""

import errno
import io
import os
import signal
import subprocess
import sys

import pytest

from hf_ddpm.runtime.arguments import run
from hf_ddpm.runtime.lasting import Lasting
from hf_ddpm.runtime.signals import Interrupted, interruptible
from tests.launching import ROOT

# A command that writes a file, prints and says what it did to a file that nobody can close.
COMMAND = """
import os, sys
from contextlib import suppress
from pathlib import Path
from hf_ddpm.runtime.arguments import run
from hf_ddpm.runtime.progress import progress

def command(argv, prog):
    first = open("first", "w")
    with progress("work", 30, "line", True) as bar:
        for _ in range(3000):
            print("x" * 100)
            with suppress(BrokenPipeError):  # what libraries write to the descriptor is theirs
                os.write(1, b"from a library")
            bar.update()
    print("to the end", file=sys.stderr)
    Path("done").write_text(str(first.fileno()))

run(command, [], "prog")
"""


def shell(line, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = f"{sys.executable} command.py {line}; echo ${{PIPESTATUS[0]}} >&2"
    (folder / "command.py").write_text(COMMAND)
    return subprocess.run(["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "streams", ["| head -1", "| true", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2> >(true)", "2>/dev/full"]
)
def test_a_reader_that_leaves_stops_nothing(streams, tmp_path):
    done = shell(streams, tmp_path)
    assert done.stderr.splitlines()[-1] == "0" and "Error" not in done.stderr
    assert int((tmp_path / "done").read_text()) > 2  # no file of the program's became its standard output
    assert (tmp_path / "first").read_bytes() == b""


def test_output_on_a_full_disk_is_told_when_the_work_is_done(tmp_path):
    done = shell(">/dev/full", tmp_path)
    assert done.stderr.splitlines()[-2:] == [
        "prog: failed: can't write to standard output: No space left on device",
        "1",
    ]
    assert (tmp_path / "done").exists() and "Traceback" not in done.stderr


class Broken(io.StringIO):
    """A stream whose reader has left, or whose disk is full."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def write(self, text):
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize(("number", "told"), [(errno.EPIPE, False), (errno.EIO, False), (errno.ENOSPC, True)])
def test_what_cannot_be_written_is_dropped(number, told):
    stream = Lasting(Broken(number))
    print("lost", file=stream)
    stream.flush()
    assert (stream.error is not None) == told
    print("nowhere", file=Lasting(None))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_ends_a_command_with_a_line(name, capsys):
    cleaned = []

    def command(argv, prog):
        try:
            os.kill(os.getpid(), getattr(signal, name))
        except Exception:
            pytest.fail("libraries must not catch it")
        finally:
            cleaned.append(True)

    with pytest.raises(SystemExit) as stop:
        run(command, [], "prog")
    assert stop.value.code == 75 and cleaned
    assert capsys.readouterr().err == f"prog: stopped by {name}; the same command goes on\n"
    assert signal.getsignal(getattr(signal, name)) is not command


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with interruptible() as came:
            os.kill(os.getpid(), signal.SIGHUP)
        assert came == []
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_whose_error_is_dropped_is_remembered():
    class Dropping:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    with interruptible() as came:
        Dropping()
        assert came == ["SIGTERM"]
    with pytest.raises(Interrupted), interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
