"""lock.py: one process at a time has a folder, and a process that is gone has none."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

import hf_ddpm.runtime.lock
from hf_ddpm.runtime.lock import FolderLock, file_lock
from tests.launching import ROOT

# Locks a folder, says so, and waits: for a line, or in a process forked from the one that has the lock, which
# says first that it is there.
HOLD = """
import os, sys, time
from pathlib import Path
from hf_ddpm.runtime.lock import FolderLock
FolderLock(Path(sys.argv[1]), ".lock").acquire()
if sys.argv[2] == "fork":
    there, say = os.pipe()
    if os.fork() == 0:
        os.write(say, b".")
        time.sleep(60)
    os.read(there, 1)
print("held", flush=True)
input()
"""


def holder(folder, how="wait"):
    command = [sys.executable, "-c", HOLD, str(folder), how]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    other = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    return other


def refused(folder):
    with pytest.raises(ValueError, match=r"^is in use by ") as error:
        FolderLock(folder, ".lock").acquire()
    return str(error.value)


def no_lock(number):
    raise OSError(9, "Bad file descriptor")


def test_one_at_a_time(tmp_path):
    lock = FolderLock(tmp_path, ".lock")
    lock.acquire()
    assert refused(tmp_path) == f"is in use by process {os.getpid()}"
    assert not list(tmp_path.iterdir())  # nothing to delete by hand
    lock.release()
    again = FolderLock(tmp_path, ".lock")
    again.acquire()
    again.release()


def test_another_process_is_named_and_its_end_frees_the_folder(tmp_path):
    other = holder(tmp_path)
    assert refused(tmp_path) == f"is in use by process {other.pid}"
    other.kill()
    other.wait()
    FolderLock(tmp_path, ".lock").acquire()


def test_a_process_that_a_killed_one_forked_does_not_hold_the_folder(tmp_path):
    other = holder(tmp_path, "fork")
    other.kill()
    other.wait()
    FolderLock(tmp_path, ".lock").acquire()
    os.killpg(other.pid, signal.SIGKILL)


def test_where_folders_cannot_be_locked_a_file_is(tmp_path, monkeypatch):
    flock = hf_ddpm.runtime.lock.fcntl.flock

    def files_only(number, how):
        if os.path.isdir(f"/proc/self/fd/{number}"):
            raise OSError(9, "Bad file descriptor")  # as NFS says
        flock(number, how)

    monkeypatch.setattr(hf_ddpm.runtime.lock.fcntl, "flock", files_only)
    lock = FolderLock(tmp_path / "new", ".lock")
    lock.acquire()
    assert [path.name for path in (tmp_path / "new").iterdir()] == [".lock"]
    assert refused(tmp_path / "new") == f"is in use by process {os.getpid()}"
    lock.release()
    assert not (tmp_path / "new").exists()


def test_where_nothing_can_be_locked_a_warning_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(hf_ddpm.runtime.lock, "_lock_whole", no_lock)
    monkeypatch.setattr(hf_ddpm.runtime.lock, "_lock_byte", no_lock)
    FolderLock(tmp_path, ".lock").acquire()
    assert f"{tmp_path} can't be locked: start no second command that writes there" in caplog.text


def test_a_folder_that_was_made_in_vain_goes(tmp_path):
    lock = FolderLock(tmp_path / "a" / "b", ".lock")
    lock.acquire()
    assert (tmp_path / "a" / "b").is_dir()
    lock.release()
    assert not (tmp_path / "a").exists()
    lock.acquire()
    (tmp_path / "a" / "mine").touch()
    lock.release()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("moved", [False, True])
def test_a_folder_that_is_gone_is_noticed(tmp_path, moved, replaced):
    folder = tmp_path / "run"
    lock = FolderLock(folder, ".lock")
    lock.acquire()
    lock.check()
    folder.rename(tmp_path / "elsewhere") if moved else shutil.rmtree(folder)
    if replaced:
        folder.mkdir()
    with pytest.raises(OSError, match=r"^the folder '.*run' was moved or deleted while it was in use; "):
        lock.check()


@pytest.mark.parametrize("place", ["/proc/x", "/proc/self", "file", "file/below", "a" * 300])
def test_what_cannot_be_written(place, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        FolderLock(tmp_path / place, ".lock").acquire()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_is_locked_by_another_that_is_gone_afterwards(tmp_path):
    with file_lock(tmp_path / "a.png"):
        with pytest.raises(ValueError, match=rf"a.png' is in use by process {os.getpid()}$"):
            with file_lock(tmp_path / "a.png"):
                pass
        with file_lock(tmp_path / "b.png"):
            pass
    assert not list(tmp_path.iterdir())
    (tmp_path / ".a.png.claim").touch()  # of a process that was killed
    with file_lock(tmp_path / "a.png"):
        pass
    assert not list(tmp_path.iterdir())
