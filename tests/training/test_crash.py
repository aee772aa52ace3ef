"""The real script, stopped at random moments and started again, against a run that was left alone."""

import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from hf_ddpm import TrainConfig, train
from hf_ddpm.runtime.signals import EXIT_CODE
from tests.launching import SCRIPT, environment, finish, flags, results, start

# Short steps and much to save: a moment chosen at random is often one in a checkpoint, a grid or a bound.
PLAN = {
    **{
        "model": "tiny",
        "dataset": "digits",
        "output_dir": "run",
        "seed": 4,
        "max_steps": 40,
        "batch_size": 4,
    },
    **{"gradient_accumulation_steps": 2, "dropout": 0.1, "horizontal_flip": True, "shuffle_memory": 200},
    **{"learning_rate": 1e-3, "lr_warmup_steps": 5, "lr_scheduler": "cosine", "ema_decay": "0.99,0.9"},
    **{"checkpoint_every": 3, "keep_checkpoints": 2, "log_every": 7, "num_workers": 1},
    **{"sample_every": 10, "sample_num_images": 3, "sample_steps": 5},
    **{"evaluate_every": 10, "evaluate_num_images": 4, "evaluate_num_evals": 4},
}
COMMAND = [str(SCRIPT), *flags(**PLAN)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # the config holds the folder's name
        train(TrainConfig(**PLAN))
    return results(folder / "run")


def really(folder) -> subprocess.Popen:
    with (folder / "output").open("ab") as output:
        command = [sys.executable, *COMMAND]
        return subprocess.Popen(command, cwd=folder, env=environment(), stdout=output, stderr=output)


class Forked:
    """What `Popen` can, of a fork of an interpreter that has imported the package."""

    def __init__(self, folder):
        (self.process,) = start(COMMAND, folder)
        self.pid = self.process.pid

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout):
        return finish([self.process], timeout)[0]


def stop_at_random(folder, launch, seed: int, kinds: list[signal.Signals], longest: float) -> list[int]:
    """Launch the script and stop it, once for each kind of signal, then leave it alone; the exit codes."""
    rng, codes = random.Random(seed), []
    log = folder / "run" / "log.jsonl"
    for kind in kinds:
        before = log.stat().st_mtime_ns if log.exists() else 0
        process = launch(folder)
        while process.poll() is None and not (log.exists() and log.stat().st_mtime_ns > before):
            time.sleep(0.002)  # it is still starting
        time.sleep(rng.uniform(0, longest))
        if process.poll() is None:
            os.kill(process.pid, kind)
        codes.append(process.wait(timeout=60))
    assert launch(folder).wait(timeout=120) == 0, (folder / "output").read_text()
    return codes


def check(folder, unbroken, kinds, codes) -> None:
    told = (folder / "output").read_text()
    for kind, code in zip(kinds, codes, strict=True):
        # 0 if the run was over before the signal came
        assert code in (0, -kind if kind == signal.SIGKILL else EXIT_CODE), told
    # A data loader may print a traceback of its own when its parent is killed, with nothing of ours in it
    assert "damaged" not in told and not re.search(r'File ".*hf_ddpm/[\w/]+\.py"', told), told
    found = results(folder / "run")
    assert found.keys() == unbroken.keys()
    assert [name for name in found if found[name] != unbroken[name]] == []


def signals(seed: int, kills: int) -> list[signal.Signals]:
    kinds = [signal.SIGKILL] * kills + [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    random.Random(seed).shuffle(kinds)
    return kinds


def test_a_run_that_is_stopped_many_times(tmp_path, unbroken):
    kinds = signals(0, 3)
    codes = stop_at_random(tmp_path, Forked, 0, kinds, longest=0.4)
    check(tmp_path, unbroken, kinds, codes)
    assert codes.count(-signal.SIGKILL) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_the_real_script_stopped_many_times(tmp_path, unbroken, seed):
    kinds = signals(seed, 12)
    codes = stop_at_random(tmp_path, really, seed, kinds, longest=0.4)
    check(tmp_path, unbroken, kinds, codes)
    assert codes.count(-signal.SIGKILL) >= 5
