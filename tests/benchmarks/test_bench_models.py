"""What a training step of each preset costs on this machine: seconds and memory, as a table.

Each preset is trained for a few steps in a process of its own, on random images of its size, with the whole
step that a training takes: forward, backward, clipping, AdamW and the average. The time is the median of the
steps after the first; the memory is the most that the process held, less what it held before the network was
made. The paper's preset for 256x256 is left out, unless MODELS names it.

    OMP_NUM_THREADS=2 .venv/bin/python -m pytest -n 0 -m bench -s tests/benchmarks/test_bench_models.py

BATCH (16), STEPS (4) and MODELS (names with commas between) change it.
"""

import json
import multiprocessing
import os
import resource
import statistics
import time

import pytest
import torch

from hf_ddpm.models import create_model
from hf_ddpm.models.presets import UNETS
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.training.averages import average_of, update_average

pytestmark = pytest.mark.bench

BATCH, STEPS = int(os.environ.get("BATCH", "16")), int(os.environ.get("STEPS", "4"))
MODELS = os.environ.get("MODELS", ",".join(row.name for row in UNETS if row.name not in ("tiny", "256")))


def held() -> float:
    """The most memory that this process has held so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(name: str, batch: int, steps: int) -> dict:
    """A few training steps of a preset."""
    (row,) = (row for row in UNETS if row.name == name)
    before, process = held(), DDPMScheduler().process
    model = create_model(name).train()
    average, optimizer = average_of(model), torch.optim.AdamW(model.parameters(), lr=2e-4)
    x_0, times = torch.rand(batch, row.channels, row.size, row.size) * 2 - 1, []
    for step in range(steps + 1):
        start = time.perf_counter()
        noise, t = torch.randn_like(x_0), torch.randint(len(process), (batch,))
        (model(process.q_sample(x_0, noise, t), t).sample - noise).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_average(average, model, 0.999, step)
        times.append(time.perf_counter() - start)
    return {
        "preset": name,
        "image": f"{row.size}x{row.size}x{row.channels}",
        "widths": "-".join(map(str, row.widths)),
        "blocks": row.blocks,
        "attention at": row.attention_at,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "batch": batch,
        "seconds a step": round(statistics.median(times[1:]), 2),
        "GiB": round(held() - before, 2),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
    }


def test_a_step_of_each_preset(report):
    lines = []
    for name in MODELS.split(","):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            lines.append(pool.apply(measure, (name, BATCH, STEPS)))
        report(**lines[-1])
    keys = [key for key in lines[0] if key not in ("batch", "threads", "load")]
    table = [keys, ["---"] * len(keys), *([line[key] for key in keys] for line in lines)]
    report(table=json.dumps(["| " + " | ".join(map(str, row)) + " |" for row in table]))
