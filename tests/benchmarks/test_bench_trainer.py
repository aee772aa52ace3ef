"""A step of the trainer against one of a bare loop: the fashion-mnist preset, 64 images, the same network.

The bare loop has its batches in memory, and does forward, backward, clip and optimizer step; the trainer
reads and decodes its images, draws noise by position, averages the weights and logs every 10 steps, here.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Features, Image
from torch import nn

from hf_ddpm import TrainConfig, create_model, load_stream, train
from hf_ddpm.data.pixels import to_float

from .test_bench_data import png, smooth_images

pytestmark = pytest.mark.bench

BATCH, IMAGES = 64, 2048


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Grey 28x28 PNGs in one parquet file."""
    folder = tmp_path_factory.mktemp("data")
    values = [{"bytes": png(image), "path": None} for image in smooth_images(IMAGES)]
    schema = Features({"image": Image()}).arrow_schema
    pq.write_table(pa.Table.from_pydict({"image": values}, schema=schema), folder / "train.parquet")
    return folder


def config(data: Path, run: Path, steps: int) -> TrainConfig:
    return TrainConfig(
        dataset=str(data),
        output_dir=str(run),
        model="fashion-mnist",
        batch_size=BATCH,
        max_steps=steps,
        shuffle_memory=1000,
        channels_last=True,
        log_every=10,
        sample_every=0,
        checkpoint_every=steps,
    )


class BareLoop:
    """Algorithm 1 and nothing else."""

    def __init__(self, data: Path):
        torch.manual_seed(0)
        self.model = create_model("fashion-mnist").to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-4, weight_decay=0.0)
        stream = load_stream(data).batches(BATCH)
        layout = torch.channels_last
        self.batches = [to_float(next(stream)).contiguous(memory_format=layout) for _ in range(8)]
        self.alphas_cumprod = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))).float()
        self.steps = 0

    def step(self) -> None:
        x_0 = self.batches[self.steps % len(self.batches)]
        t, noise = torch.randint(1000, (BATCH,)), torch.randn_like(x_0)
        abar = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        output = self.model(abar.sqrt() * x_0 + (1 - abar).sqrt() * noise, t).sample
        (output - noise).square().mean().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1


def test_time_of_a_step(folder, tmp_path, report):
    bare, rounds, warm_up = BareLoop(folder), 34, 4
    marks, ours, theirs = [], [], []

    def interleaved(run):
        """Between two steps of the trainer one of the bare loop."""
        if marks:
            ours.append(time.perf_counter() - marks[-1])
        start = time.perf_counter()
        bare.step()
        marks.append(time.perf_counter())
        theirs.append(marks[-1] - start)

    train(config(folder, tmp_path / "run", rounds), after_step=interleaved)
    # a step of the trainer with the bare ones before and after it
    pairs = [2 * own / (theirs[i] + theirs[i + 1]) for i, own in enumerate(ours)][warm_up:]
    low, middle, high = statistics.quantiles(pairs, n=4)
    report(
        benchmark="a training step, fashion-mnist, against a bare loop",
        threads=torch.get_num_threads(),
        ours_ms=round(statistics.median(ours[warm_up:]) * 1e3, 1),
        peer_ms=round(statistics.median(theirs[warm_up:]) * 1e3, 1),
        time_ratio=round(middle, 3),
        quartiles=[round(low, 3), round(high, 3)],
        total_ratio=round(sum(ours[warm_up:]) / sum(theirs[warm_up + 1 :]), 3),
    )


MEMORY = """
import json, resource, sys
from pathlib import Path
from tests.benchmarks.test_bench_trainer import BareLoop, config, train

who, data, run, steps = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
if who == "bare":
    loop = BareLoop(data)
    for _ in range(steps):
        loop.step()
else:
    train(config(data, run, steps))
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
"""


def test_peak_memory(folder, tmp_path, report):
    peaks = {}
    for who in ("bare", "trainer"):
        command = [sys.executable, "-c", MEMORY, who, str(folder), str(tmp_path / "run"), "6"]
        root = Path(__file__).resolve().parents[2]
        done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
        peaks[who] = json.loads(done.stdout.splitlines()[-1])
    ema = sum(weight.nbytes for weight in create_model("fashion-mnist").parameters()) / 2**20
    report(
        benchmark="peak RSS of a process, training and a checkpoint, fashion-mnist, against a bare loop",
        ours_mib=round(peaks["trainer"]),
        ema_mib=round(ema, 1),
        peer_mib=round(peaks["bare"]),
        memory_ratio=round((peaks["trainer"] - ema) / peaks["bare"], 3),
    )
