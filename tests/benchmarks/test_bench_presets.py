"""Which U-Net reaches the lowest loss on Fashion-MNIST in a given CPU time: how the preset was chosen.

Candidates of 1M to 4M parameters are trained on the same images in the same order, with the same seed and
one thread, until each has spent PRESET_MINUTES of CPU time (default 0.5); the learning rate warms up and
falls to zero over that time. The loss is that of the averaged weights on 1,024 training images set aside,
with the same t and noise for all; with more than 5 minutes the fastest come to train on these. Their speed
is that of training steps alone, in both memory formats and in float32 and bfloat16. As many
candidates run at once as there are cores.

    PRESET_MINUTES=5 .venv/bin/python -m pytest -n 0 -m bench -s tests/benchmarks/test_bench_presets.py
"""

import itertools
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from hf_ddpm.data.pixels import to_float
from hf_ddpm.data.stream import load_stream
from hf_ddpm.models.presets import unet_config
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.training.averages import average_of, update_average
from hf_ddpm.training.draws import draw_noise, draw_uniform
from hf_ddpm.training.importance import UniformSteps

pytestmark = pytest.mark.bench

DATA = Path(os.environ.get("FASHION_DATA", Path(__file__).parents[2] / "data" / "fashion-mnist"))
MINUTES = float(os.environ.get("PRESET_MINUTES", "0.5"))
SEED, BATCH, ASIDE, DECAY, RATE, WARM_UP = 0, 64, 1024, 0.99, 1e-3, 0.05
FAR = 10**9  # where the draws of the loss at the end begin

# name: widths of the levels 28, 14 and 7, and what else of the layout; the middle block attends in all
CANDIDATES = {
    "16-32-64, 2 layers, attention at 7": ((16, 32, 64), {"attention_at": 7, "norm_num_groups": 8}),
    "32-64-64, 1 layer, attention at 7": ((32, 64, 64), {"attention_at": 7, "layers_per_block": 1}),
    "32-64-64, 1 layer, attention at 14": ((32, 64, 64), {"attention_at": 14, "layers_per_block": 1}),
    "32-64-64, 2 layers, attention at 7": ((32, 64, 64), {"attention_at": 7}),
    "24-48-96, 2 layers, attention at 7": ((24, 48, 96), {"attention_at": 7, "norm_num_groups": 8}),
    "48-96-96, 1 layer, attention at 7": (
        (48, 96, 96),
        {"attention_at": 7, "layers_per_block": 1, "norm_num_groups": 16},
    ),
    "32-64-128, 1 layer, attention at 7": ((32, 64, 128), {"attention_at": 7, "layers_per_block": 1}),
    "32-64-128, 2 layers, attention at 7": ((32, 64, 128), {"attention_at": 7}),
}
CONTROL = "32-64-64, 1 layer, attention at 7"


class Trial:
    """A candidate, its average and its optimizer, with one thread."""

    def __init__(self, name: str, layout: torch.memory_format, precision: torch.dtype):
        torch.set_num_threads(1)
        torch.manual_seed(SEED)
        widths, others = CANDIDATES[name]
        config = unet_config(28, 1, widths, **others)
        del config["_class_name"]
        self.layout, self.precision = layout, precision
        self.model = UNet2DModel(**config).to(memory_format=layout)
        self.average = average_of(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=0.0)
        self.process, self.steps = DDPMScheduler().process, 0

    def losses(self, model: nn.Module, images: torch.Tensor, first: int) -> torch.Tensor:
        """The simple loss of images at these positions of the draws, (B,)."""
        positions = range(first, first + len(images))
        x_0, t = to_float(images), UniformSteps(len(self.process)).draw(draw_uniform(SEED, positions))
        noise = draw_noise(SEED, positions, x_0.shape[1:], x_0.device)
        x_t = self.process.q_sample(x_0, noise, t).contiguous(memory_format=self.layout)
        with torch.autocast("cpu", self.precision, enabled=self.precision != torch.float32):
            output = model(x_t, t).sample
        return (output.float() - noise).square().flatten(1).mean(1)

    def step(self, images: torch.Tensor, rate: float) -> None:
        self.optimizer.param_groups[0]["lr"] = rate
        self.losses(self.model, images, self.steps * BATCH).mean().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        update_average(self.average, self.model, DECAY, self.steps)
        self.steps += 1


def set_aside_and_rest():
    """The stream's first images, and the batches after them."""
    stream = load_stream(DATA, shuffle_memory=10_000, seed=SEED)
    batches = stream.batches(BATCH)
    return torch.cat(list(itertools.islice(batches, ASIDE // BATCH))), batches


def trial(name: str, minutes: float, layout: torch.memory_format, precision: torch.dtype) -> dict:
    """Train until the CPU time is spent; what was reached."""
    run = Trial(name, layout, precision)
    aside, batches = set_aside_and_rest()
    start, spent = time.process_time(), 0.0
    while spent < 1:
        run.step(next(batches), RATE * min((spent + 1e-3) / WARM_UP, (1 - spent) / (1 - WARM_UP)))
        spent = (time.process_time() - start) / (60 * minutes)
    run.precision = torch.float32
    pieces = [run.losses(run.average, z, FAR + i * BATCH) for i, z in enumerate(aside.split(BATCH))]
    loss = torch.cat(pieces)
    batches.close()
    return {
        "candidate": name,
        "cpu_minutes": minutes,
        "precision": str(precision).removeprefix("torch."),
        "parameters": sum(weight.numel() for weight in run.model.parameters()),
        "images": run.steps * BATCH,
        "loss": round(loss.mean().item(), 5),
    }


def speed(name: str, layout: torch.memory_format, precision: torch.dtype) -> float:
    """Images per second of CPU time, the median of five steps."""
    run, (aside, batches) = Trial(name, layout, precision), set_aside_and_rest()
    batches.close()
    times = []
    for _ in range(7):
        start = time.process_time()
        run.step(aside[:BATCH], 0.0)
        times.append(time.process_time() - start)
    return round(BATCH / statistics.median(times[2:]), 1)


@pytest.fixture(scope="module")
def pool():
    if not DATA.is_dir():
        pytest.skip(f"needs {DATA}, see train_scripts/convert_idx.py")
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        yield pool


def test_speed_in_both_memory_formats(pool, report):
    formats = (torch.contiguous_format, torch.channels_last)
    cases = list(itertools.product(CANDIDATES, formats, (torch.float32, torch.bfloat16)))
    found = dict(zip(cases, pool.map(speed, *zip(*cases, strict=True)), strict=True))
    for name in CANDIDATES:
        columns = {
            f"{str(precision)[6:]} {str(layout)[6:]}": images
            for (candidate, layout, precision), images in found.items()
            if candidate == name
        }
        report(benchmark="images per second of one core", candidate=name, **columns)


def test_loss_reached(pool, report):
    """Every candidate in bfloat16, and one of them in float32 as a control of it."""
    cases = [(name, torch.bfloat16) for name in CANDIDATES]
    cases.append((CONTROL, torch.float32))
    jobs = [pool.submit(trial, name, MINUTES, torch.contiguous_format, dtype) for name, dtype in cases]
    for job in jobs:
        report(benchmark="loss reached", **job.result())
