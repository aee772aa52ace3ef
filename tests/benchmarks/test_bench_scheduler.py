"""`step` against the stock scheduler's, given the tensors of `scheduler.timesteps` as pipelines do."""

import itertools

import diffusers
import pytest
import torch

from hf_ddpm.scheduler import DDPMScheduler

from .conftest import interleave

pytestmark = pytest.mark.bench


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (16, 1, 32, 32), (16, 3, 32, 32)], ids=str)
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_step(shape, variance_type, report):
    x, output = torch.randn(shape), torch.randn(shape)

    def stepper(scheduler):
        scheduler.set_timesteps(1000)
        timesteps = itertools.cycle(scheduler.timesteps)
        noise = torch.Generator().manual_seed(0)
        return lambda: scheduler.step(output, next(timesteps), x, generator=noise)

    ours, stock = (stepper(c(variance_type=variance_type)) for c in (DDPMScheduler, diffusers.DDPMScheduler))
    with torch.no_grad():
        figures = interleave(ours, stock)
    threads = torch.get_num_threads()
    report(benchmark="scheduler.step", shape=shape, variance_type=variance_type, threads=threads, **figures)
