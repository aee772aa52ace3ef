"""Several processes: what each is given, what they come to, and how a run goes on with another number."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Array2D, Dataset, Features
from safetensors.torch import load_file
from torch import nn

from hf_ddpm import TrainConfig, train
from hf_ddpm.runtime.signals import EXIT_CODE
from hf_ddpm.training.checkpoint import list_checkpoints, load_checkpoint
from hf_ddpm.training.sample_grids import SampleGrids
from tests.launching import ROOT, SCRIPT, environment, finish, flags, results, run, start, together, torchrun

pytestmark = pytest.mark.distributed
NOTING = ROOT / "tests" / "distributed_script.py"


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """43 different images in seven parquet files of uneven sizes."""
    folder, pixels = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    for number, count in enumerate([1, 9, 5, 12, 2, 8, 6]):
        images = list(pixels.integers(0, 256, (count, 8, 8), dtype=np.uint8))
        data = Dataset.from_dict({"image": images}, features=Features({"image": Array2D((8, 8), "uint8")}))
        data.to_parquet(folder / f"train-{number:05d}-of-00007.parquet")
    return folder


def config(shards: Path, **changes) -> TrainConfig:
    plan = {
        **{"model": "tiny", "dataset": str(shards), "output_dir": "run", "max_steps": 26},
        **{"batch_size": 2, "gradient_accumulation_steps": 2, "shuffle_memory": 16, "horizontal_flip": True},
        **{"learning_rate": 1e-3, "lr_warmup_steps": 0, "log_every": 3, "checkpoint_every": 100, "seed": 1},
        **{"sample_every": 13, "sample_num_images": 3, "sample_steps": 2, "ema_decay": "0.99,0.5"},
        **{"evaluate_every": 0},
    }
    return TrainConfig(**plan | changes)


def go(folder: Path, plan: TrainConfig, processes: int, *stop, codes=(0,)) -> None:
    """Run the noting script in that many processes, to its end or to where it is told to stop."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(plan.to_json())
    found = finish(start([NOTING, folder / "config.json", folder, *stop], folder, processes))
    assert set(found) == set(codes), (folder / "output").read_text()


def seen(folder: Path) -> list[tuple[int, int, int]]:
    """(position, digest, digest but for mirroring) of each image that any process was given."""
    lines = [line for path in folder.glob("rank*.jsonl") for line in path.read_text().splitlines()]
    return sorted((p, own, image) for line in lines for p, own, image, present in json.loads(line) if present)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "run" / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, shards) -> Path:
    """One process, steps of the same eight images."""
    folder = tmp_path_factory.mktemp("alone")
    go(folder, config(shards, batch_size=8, gradient_accumulation_steps=1), 1)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory, shards) -> Path:
    """Two processes, two micro-steps of two images each."""
    folder = tmp_path_factory.mktemp("pair")
    go(folder, config(shards), 2)
    return folder


def assert_close(folder: Path, other: Path) -> None:
    """The same run but for rounding: what was seen, losses, weights and averages."""
    assert seen(folder) == seen(other)
    np.testing.assert_allclose(losses(folder), losses(other), rtol=1e-5)
    for name in ("model", "ema_0.99", "ema_0.5"):
        ours, theirs = (
            load_file(list_checkpoints(f / "run")[-1][1] / f"{name}.safetensors") for f in (folder, other)
        )
        # A key's bias shifts all logits alike: its gradient is rounding, which Adam scales up to a whole step
        moved = [key for key in ours if not key.endswith("to_k.bias")]
        torch.testing.assert_close(*({k: w[k] for k in moved} for w in (ours, theirs)), rtol=1e-3, atol=2e-5)


def test_importance_sampled_steps_are_the_same_on_any_number_of_processes(tmp_path, shards):
    changes = {"objective": "bound", "t_sampler": "importance", "num_train_timesteps": 4, "max_steps": 16}
    changes |= {"beta_schedule": "constant", "beta_start": 0.6, "sample_every": 0, "learning_rate": 1e-4}
    for name, processes, batch in (("one", 1, 8), ("two", 2, 2)):
        more = {"batch_size": batch, "gradient_accumulation_steps": 2 if processes == 2 else 1}
        go(tmp_path / name, config(shards, **changes, **more), processes)
    states = [
        load_checkpoint(list_checkpoints(tmp_path / name / "run")[-1][1]).optimizer["t_sampler"]
        for name in ("one", "two")
    ]
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)
    assert states[0]["counts"].sum() == 16 * 8 and states[0]["counts"].min() >= 10
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-4)


def test_each_epoch_has_each_image_once(pair):
    found = seen(pair)
    assert [p for p, *_ in found] == list(range(26 * 8))
    epochs = [Counter(image for p, _, image in found if p // 43 == epoch) for epoch in range(4)]
    assert all(len(epoch) == 43 and set(epoch.values()) == {1} for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_weights_and_averages_are_equal_on_both(pair):
    first, second = ((pair / f"weights{rank}").read_text() for rank in (0, 1))
    assert first == second and first.startswith("3 networks ")


def test_two_processes_do_what_one_does(pair, alone):
    assert_close(pair, alone)
    grids = [sorted((folder / "run" / "samples").iterdir()) for folder in (pair, alone)]
    assert [path.name for path in grids[0]] == ["step-00000013.png", "step-00000026.png"]


def test_two_then_one_then_two(tmp_path, shards, alone):
    for processes, steps in ((2, 5), (1, 12), (2, 26)):
        go(tmp_path, config(shards, max_steps=steps), processes)
    # the log has a line more at each end of a leg
    state = load_checkpoint(list_checkpoints(tmp_path / "run")[-1][1]).state
    assert state["images_per_step"] == 8
    assert (
        "the run has steps of 8 images; 1 processes share them, in 4 micro-steps of 2 each"
        in (tmp_path / "output").read_text()
    )
    assert seen(tmp_path) == seen(alone)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    unbroken = [json.loads(line) for line in (alone / "run" / "log.jsonl").read_text().splitlines()]
    common = {line["step"]: line["loss"] for line in lines}
    for line in unbroken:
        if line["step"] > 15:  # from there on, the intervals are the same again
            np.testing.assert_allclose(common[line["step"]], line["loss"], rtol=1e-5)


@pytest.mark.slow
def test_three_processes_share_steps_of_eight(tmp_path, shards, alone):
    go(tmp_path, config(shards, batch_size=8, gradient_accumulation_steps=1, max_steps=3), 1)
    go(tmp_path, config(shards, batch_size=8, gradient_accumulation_steps=1), 3)
    assert seen(tmp_path) == seen(alone)


@pytest.mark.parametrize(
    ("rank", "kind", "step"), [(1, "SIGUSR1", 7), (0, "SIGTERM", 13), (1, "SIGTERM", "grid")]
)
def test_a_signal_to_one_of_two_stops_both_and_loses_nothing(tmp_path, shards, pair, rank, kind, step):
    go(tmp_path, config(shards), 2, rank, kind, step, codes=[EXIT_CODE])
    step = 13 if step == "grid" else step
    assert [at for at, _ in list_checkpoints(tmp_path / "run")] == [step]
    told = (tmp_path / "output").read_text()
    assert (
        told.count(f"stopped by {kind} at step {step} of 26, saved in 'run'; the same command goes on") == 1
    )
    go(tmp_path, config(shards), 2)
    assert seen(tmp_path) == seen(pair)
    assert results(tmp_path / "run") == results(pair / "run")


# Real launches


def small(**changes) -> list[str]:
    plan = {"model": "tiny", "dataset": "digits", "output_dir": "run", "max_steps": 4, "batch_size": 2}
    return [str(SCRIPT), *flags(**plan | {"sample_every": 0, "learning_rate": 1e-3} | changes)]


def accelerate(*words) -> list[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"]
    return [*launcher, "--mixed_precision", "no", "--dynamo_backend", "no", *words]


def processes_of(folder: Path) -> int:
    return load_checkpoint(list_checkpoints(folder / "run")[-1][1]).state["num_processes"]


def test_accelerate_launch(tmp_path):
    port = str(20000 + os.getpid() % 20000)
    words = ["--multi_gpu", "--num_processes", "2", "--main_process_port", port]
    done = run([*accelerate(*words), *small()], tmp_path)
    assert done.returncode == 0, done.stderr
    assert processes_of(tmp_path) == 2
    assert "step 4, 16 images seen" in done.stdout


@pytest.mark.slow
def test_a_launch_of_one_process_where_two_were_asked_for(tmp_path):
    for words in (["--num_processes", "2"], ["--cpu", "--num_processes", "2"]):
        done = run([*accelerate(*words), *small()], tmp_path)
        assert done.returncode != 0
        assert "accelerate launch was asked for several processes and started one" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_twenty_launches_end_well(tmp_path):
    for number in range(20):
        done = run([*torchrun(2), *small(output_dir=f"run{number}")], tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"pipeline: run{number}" in done.stdout


@pytest.mark.slow
def test_a_signal_to_the_launcher(tmp_path):
    command = [*torchrun(2), *small(max_steps=100000, log_every=1)]
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=output, stderr=output)
    while not (tmp_path / "run" / "log.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) != 0
    ((step, _),) = list_checkpoints(tmp_path / "run")
    assert f"stopped by SIGTERM at step {step}" in (tmp_path / "output").read_text()
    done = run([*torchrun(2), *small(max_steps=step + 2, log_every=1)], tmp_path)
    assert done.returncode == 0 and f"step {step + 2}," in done.stdout


@pytest.mark.slow
def test_an_error_in_one_of_two_ends_both(tmp_path, shards):
    shutil.copytree(shards, tmp_path / "data")
    data = Dataset.from_dict(
        {"image": [np.zeros((8, 9), np.uint8)]}, features=Features({"image": Array2D((8, 9), "uint8")})
    )
    data.to_parquet(tmp_path / "data" / "train-00006-of-00007.parquet")
    start_time = time.time()
    done = run([*torchrun(2), *small(dataset="data", max_steps=50)], tmp_path)
    assert done.returncode != 0 and time.time() - start_time < 120
    assert "train-00006-of-00007.parquet: size 8x9 (HxW), wanted 8x8" in done.stderr


class Normed(nn.Module):
    """A network whose statistics training changes, each process's its own way."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1)

    def forward(self, x_t, t):
        return self.norm(self.conv(x_t))


def sampled_with(folder: Path, plan: TrainConfig) -> list[torch.Tensor]:
    """The statistics that this process draws its part of a grid with."""
    found, save = [], SampleGrids.save

    def watching(self, model, *args):
        found.extend(buffer.clone() for buffer in model.buffers())
        save(self, model, *args)

    SampleGrids.save = watching
    os.chdir(folder)
    torch.manual_seed(0)
    train(plan, Normed())
    return found


def test_statistics_of_a_network_are_process_0s_everywhere(tmp_path, shards):
    plan = config(shards, max_steps=3, sample_every=3, ema_decay="0.9")
    first, second = together(tmp_path, sampled_with, tmp_path, plan)
    assert len(first) == 3 and all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    saved = load_file(list_checkpoints(tmp_path / "run")[-1][1] / "ema_0.9.safetensors")
    assert torch.equal(saved["norm.running_mean"], first[0])
