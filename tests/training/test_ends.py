"""How a training ends that the world around it ends: signals, terminals, folders and helpers that go away."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import hf_ddpm.training.trainer
from hf_ddpm import TrainingStopped, train
from hf_ddpm.data.stream import ImageStream
from tests.launching import SCRIPT, environment, finish, flags, results, start
from tests.training.helpers import Conv, again, checkpoint, folder_of_images, log, refused, small

PLAN = {"model": "tiny", "dataset": "digits", "output_dir": "run", "batch_size": 4, "lr_warmup_steps": 0}
QUICK = {**PLAN, "max_steps": 12, "checkpoint_every": 4, "log_every": 2, "sample_every": 0}


def script(**changes):
    return [SCRIPT, *flags(**(QUICK | changes))]


def wait_for(path, process):
    while process.is_alive() and not path.exists():
        time.sleep(0.01)


def told(folder):
    return (folder / "output").read_text().replace("\r", "\n")


# A start that is refused, and one that is stopped


@pytest.mark.parametrize(
    "changes",
    [{"dataset": "/nowhere"}, {"image_size": 9}, {"resume": "/nowhere"}],
    ids=str,
)
def test_a_refused_start_leaves_nothing(changes, tmp_path):
    refused(small(tmp_path / "a" / "run", **changes))
    assert not list(tmp_path.iterdir())


def test_a_folder_of_photos_is_refused_and_as_it_was(tmp_path):
    data = folder_of_images(tmp_path / "data", 3, (8, 8))
    before = sorted(path.name for path in data.rglob("*"))
    for folder in (data, data / "train"):
        assert f"output_dir '{folder}' holds other things, such as " in refused(small(folder))
    assert sorted(path.name for path in data.rglob("*")) == before


def test_a_run_keeps_what_a_user_puts_beside_it(tmp_path):
    train(small(tmp_path, max_steps=1), Conv())
    (tmp_path / "holiday.jpg").write_text("mine")
    assert train(small(tmp_path, max_steps=2), Conv()).step == 2
    assert (tmp_path / "holiday.jpg").read_text() == "mine"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT", "SIGUSR1"])
def test_a_signal_while_the_data_is_opened(name, tmp_path, monkeypatch):
    def asked(self):
        os.kill(os.getpid(), getattr(signal, name))

    with (
        monkeypatch.context() as patch,
        pytest.raises(TrainingStopped, match=rf"^stopped by {name} with not"),
    ):
        patch.setattr(ImageStream, "num_rows", asked)
        train(small(tmp_path / "run"), Conv())
    assert not (tmp_path / "run").exists()
    assert train(small(tmp_path / "run"), Conv()).step == 3


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.3, 1, 2, 3])
def test_a_signal_while_the_real_script_starts(seconds, tmp_path):
    with (tmp_path / "output").open("w") as output:
        command = [sys.executable, *map(str, script(max_steps=100_000))]
        process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=output, stderr=output)
        time.sleep(seconds)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    assert "stopped by SIGTERM" in told(tmp_path) and "Traceback" not in told(tmp_path)


# While it trains


def test_the_reader_of_what_it_prints_goes(tmp_path, monkeypatch):
    """`hf-ddpm train 2>&1 | head -1`: the run goes on to its end."""
    for way in ("pipe", "closed"):
        place = tmp_path / way
        place.mkdir()
        code = (
            "import os, runpy, sys\n"
            "reader, writer = os.pipe()\n"
            "os.close(reader)\n"
            "[os.dup2(writer, n) if sys.argv[1] == 'pipe' else os.close(n) for n in (1, 2)]\n"
            "sys.argv = sys.argv[2:]\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        )
        (place / "probe.py").write_text(code)
        (process,) = start(["probe.py", way, *script()], place)
        assert finish([process]) == [0]
        assert checkpoint(place / "run", 12).is_dir() and log(place / "run", "step") == [2, 4, 6, 8, 10, 12]
        # Nothing was printed into a file of the run
        lines = (place / "run" / "log.jsonl").read_text().splitlines()
        assert all(json.loads(line) for line in lines)


@pytest.mark.parametrize("moved", [True, False], ids=["moved", "deleted"])
@pytest.mark.parametrize("replaced", [True, False], ids=["replaced", "gone"])
def test_a_folder_that_is_gone_ends_the_run(moved, replaced, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"

    def gone(now):
        if now.step == 3:
            run.rename(other) if moved else shutil.rmtree(run)
            if replaced:
                run.mkdir()

    config = small(run, max_steps=6, checkpoint_every=2, log_every=100)
    text = refused(config, Conv(), kind=OSError, after_step=gone)
    assert text.startswith(f"the folder '{run}' was moved or deleted while it was in use; ")
    assert run.exists() == replaced and not (replaced and list(run.iterdir()))
    assert not moved or checkpoint(other, 2).is_dir()


def test_a_second_training_is_refused_though_the_lock_file_is_deleted(tmp_path):
    seen = []

    def second(now):
        (tmp_path / ".lock").unlink(missing_ok=True)
        if now.step == 1:
            seen.append(refused(small(tmp_path), Conv()))

    train(small(tmp_path, max_steps=2), Conv(), after_step=second)
    assert seen == [
        f"output_dir '{tmp_path}' is in use by process {os.getpid()}; allowed: another folder, or later"
    ]


def test_a_killed_process_of_the_data_loader(tmp_path):
    (process,) = start(script(num_workers=1, max_steps=100_000), tmp_path)
    wait_for(tmp_path / "run" / "log.jsonl", process)
    wait_for(checkpoint(tmp_path / "run", 4), process)
    children = subprocess.run(
        ["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True
    )
    workers = [int(word) for word in children.stdout.split()]
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    assert finish([process]) == [1] and workers
    last = told(tmp_path).splitlines()[-1]
    named = rf"the process {workers[0]} that reads images was ended \((Killed|unexpectedly)\), as systems do"
    assert re.search(named, last), last
    assert "can't write" not in last and "Traceback" not in told(tmp_path)


def test_a_worker_that_dies_while_a_file_is_written(tmp_path, monkeypatch):
    words = "DataLoader worker (pid 17) is killed by signal: Killed. "

    def died(*_):
        raise RuntimeError(words)

    monkeypatch.setattr(hf_ddpm.training.checkpoint, "save_file", died)
    text = refused(small(tmp_path), Conv(), kind=RuntimeError)
    assert text.startswith(
        "the process 17 that reads images was ended (Killed), as systems do where memory is"
    )


def test_a_terminal_that_is_closed(tmp_path):
    (process,) = start(script(max_steps=100_000), tmp_path)
    wait_for(checkpoint(tmp_path / "run", 4), process)
    os.kill(process.pid or 0, signal.SIGHUP)
    assert finish([process]) == [75]
    assert "stopped by SIGHUP at step " in told(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="needs a disk of its own")
@pytest.mark.parametrize("left", [0, 40_000, 400_000])
def test_a_disk_that_fills_up(tmp_path, left):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], capture_output=True
    ).returncode:
        pytest.skip("can't mount a disk")
    try:
        run, filler = disk / "run", disk / "filler"

        def fill(now):
            if now.step == 3:
                free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
                filler.write_bytes(bytes(max(free - left, 0)))

        config = small(run, max_steps=6, checkpoint_every=2, log_every=1)
        text = refused(config, kind=OSError, after_step=fill)
        assert text.startswith("can't write '") and "No space left on device" in text and len(text) < 300
        newest = max(checkpoint(run, 2).parent.glob("step-*"))
        filler.unlink()
        assert train(config).step == 6
        torch.load(checkpoint(run, 6) / "optimizer.pt", weights_only=True)
        assert newest.name == "step-00000002"
    finally:
        subprocess.run(["umount", disk], check=True)


def test_the_same_command_again_changes_nothing(tmp_path):
    train(again(tmp_path / "run"))
    before = results(tmp_path / "run")
    train(again(tmp_path / "run"))
    assert results(tmp_path / "run") == before
