"""One step of Ho et al. 2020, algorithm 1: micro-steps → gradients → weights → averages.

Each image draws t and its noise from its own seed, and nothing is read back from the device.
"""

import contextlib
import math

import torch

from hf_ddpm.data.pixels import to_float
from hf_ddpm.guidance import Conditioned
from hf_ddpm.seeds import derive_seed
from hf_ddpm.training.averages import update_average
from hf_ddpm.training.classes import LastImages, hide_labels
from hf_ddpm.training.draws import draw_noise, draw_uniform
from hf_ddpm.training.log import QUARTILES, RunLog
from hf_ddpm.training.run import Run
from hf_ddpm.training.sharding import whole


def optimizer_step(run: Run, log: RunLog) -> None:
    """Take the run one step further, and note its losses; all processes call it together.

    Raises:
        ValueError: an image can't be read.
    """
    for micro in range(run.share.micro_steps):
        _micro_step(run, log, micro)
    run.steps.update(run.accelerator.gather)
    # The norm is logged where nothing is clipped too
    norm = run.accelerator.clip_grad_norm_(run.network.parameters(), run.config.max_grad_norm or math.inf)
    log.grad_norm = norm if norm is None else whole(norm)
    run.stepper.step()
    run.stepper.zero_grad(set_to_none=True)
    run.lr = float(run.schedule.get_last_lr()[0])
    run.schedule.step()
    for name, decay in run.config.ema_decays.items():
        update_average(run.averages[name], run.model, decay, run.step)
    run.step += 1
    log.advance(run.step)


def _micro_step(run: Run, log: RunLog, micro: int) -> None:
    """Add to the gradient what this process's images of a micro-step have to say."""
    config, device = run.config, run.accelerator.device
    rank, world = run.accelerator.process_index, run.accelerator.num_processes

    # Images, their steps and their noise
    positions, images, present, _, labels = next(run.batches)
    x_0 = to_float(images.to(device, non_blocking=True))
    present = present.to(device, non_blocking=True)
    t = run.steps.draw(draw_uniform(config.seed, positions))
    numbers = range(run.objective.noises)
    noises = [draw_noise(config.seed, positions, run.shape, device, number) for number in numbers]
    denoiser, given = run.denoiser, None
    if labels is not None and run.class_names is not None:
        given = hide_labels(config, labels, positions, len(run.class_names)).to(device, non_blocking=True)
        denoiser = Conditioned(run.network, given)
        run.last = LastImages(positions, x_0, present, labels.to(device, non_blocking=True))
    torch.manual_seed(derive_seed(config.seed, run.step, micro, rank))  # of dropout
    if config.channels_last:
        x_0 = x_0.contiguous(memory_format=torch.channels_last)

    # Loss and gradient; processes put their gradients together in the last micro-step only
    last = micro == run.share.micro_steps - 1
    with contextlib.nullcontext() if last else run.accelerator.no_sync(run.network):
        losses = run.objective.loss(run.process, denoiser, x_0, t, *noises)
        run.steps.note(positions, t, present, losses)
        weights = run.steps.weights(t)
        losses = losses * weights
        # The mean over the step's images, once the processes' gradients are averaged
        run.accelerator.backward((losses * present).sum() * (world / run.share.per_step))
    quartiles = torch.where(present, t * QUARTILES // len(run.process), -1)
    log.add(losses, weights, run.cost[t], quartiles, given)
