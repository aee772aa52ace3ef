"""processes.py: what process 0 does and finds is told to all."""

import errno
import json
import os

import pytest
from accelerate import Accelerator

from hf_ddpm.runtime.processes import on_main_process
from tests.launching import together


def test_one_process_does_it_itself():
    accelerator = Accelerator(cpu=True)
    assert on_main_process(accelerator, lambda: {"a": [1, None]}) == {"a": [1, None]}
    assert on_main_process(accelerator, lambda: None) is None
    error = FileNotFoundError(errno.ENOENT, "No such file or directory", "x")

    def fail():
        raise error

    with pytest.raises(FileNotFoundError) as caught:
        on_main_process(accelerator, fail)
    assert caught.value is error


def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some/file")


def gone():
    open("/nowhere/at/all")


def moved():
    os.rename("/nowhere", "/nothing")


def words():
    raise OSError("can't write 'x': full")


def syntax():
    json.loads("{")


def value():
    raise ValueError("bad 'value'; allowed: good")


def runtime():
    raise NotImplementedError("a kind of RuntimeError")


def quiet():
    raise ValueError


def hear():
    """What this process is told of work that fails and of work that answers, and where that was done."""
    accelerator, found, done = Accelerator(cpu=True), [], []
    for work in (full, gone, moved, words, syntax, value, runtime, quiet):
        try:
            on_main_process(accelerator, work)
        except Exception as error:
            kind = next(k for k in (ValueError, OSError, RuntimeError) if isinstance(error, k)).__name__
            details = getattr(error, "strerror", None), getattr(error, "errno", None)
            found.append([work.__name__, kind, str(error), *details])

    def answer():
        done.append(accelerator.process_index)
        return {"folder": "a/b", "step": 3}

    found.append([on_main_process(accelerator, answer), on_main_process(accelerator, lambda: None)])
    return accelerator.num_processes, done, found


@pytest.mark.distributed
def test_two_processes_hear_what_the_first_found(tmp_path):
    (world, done, found), second = together(tmp_path, hear)
    assert (world, done) == (2, [0])
    assert second == (2, [], found)  # done once, told to both
    no_such, full = "No such file or directory", "No space left on device"
    assert found == [
        ["full", "OSError", f"[Errno {errno.ENOSPC}] {full}: 'some/file'", full, errno.ENOSPC],
        ["gone", "OSError", f"[Errno {errno.ENOENT}] {no_such}: '/nowhere/at/all'", no_such, errno.ENOENT],
        ["moved", "OSError", f"[Errno 2] {no_such}: '/nowhere' -> '/nothing'", no_such, errno.ENOENT],
        ["words", "OSError", "can't write 'x': full", None, None],
        [
            "syntax",
            "ValueError",
            "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
            None,
            None,
        ],
        ["value", "ValueError", "bad 'value'; allowed: good", None, None],
        ["runtime", "RuntimeError", "a kind of RuntimeError", None, None],
        ["quiet", "ValueError", "", None, None],
        [{"folder": "a/b", "step": 3}, None],
    ]
