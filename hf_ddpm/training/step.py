"""One step of Ho et al. 2020, algorithm 1: micro-steps → gradients → weights → averages.

Each image draws t and its noise from its own seed, and nothing is read back from the device. Of a run with
classes, `class_gain` tells between steps whether the network makes use of them.
"""

import contextlib
import logging
import math

import torch

from hf_ddpm.data.pixels import to_float
from hf_ddpm.guidance import Conditioned
from hf_ddpm.likelihood import mean_and_stderr
from hf_ddpm.seeds import derive_seed
from hf_ddpm.training.averages import update_average
from hf_ddpm.training.classes import LastImages, hide_labels
from hf_ddpm.training.draws import draw_noise, draw_uniform
from hf_ddpm.training.log import QUARTILES, RunLog
from hf_ddpm.training.run import Run
from hf_ddpm.training.sharding import whole

logger = logging.getLogger(__name__)

DRAWS = 4  # steps and noises of an image by which `class_gain` judges
SURE = 2  # standard errors


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


@torch.no_grad()
def class_gain(run: Run) -> dict[str, float]:
    """By how much the loss of the last images is higher with a wrong class than with their own.

    The averaged network is asked twice for the same x_t. All processes call it together.

    Returns:
        For log.jsonl: "class_gain" with its standard error over images, in the unit of the loss; empty where
        there are fewer than two images.
    """
    assert run.last is not None and run.class_names is not None
    positions, x_0, present, labels = run.last
    count, classes, steps = len(x_0), len(run.class_names), len(run.process)
    places = torch.arange(count, device=x_0.device)
    wrong = torch.full_like(labels, classes)  # of a single class the wrong one is none
    if classes > 1:
        wrong = (labels + 1 + places % (classes - 1)) % classes
    totals = []
    with run.accelerator.autocast():
        for draw in range(DRAWS):
            # All t alike, each image at others in each draw
            t = ((places * DRAWS + draw) % (count * DRAWS) * steps // (count * DRAWS)).roll(
                draw * count // DRAWS
            )
            numbers = range(draw * run.objective.noises, (draw + 1) * run.objective.noises)
            noises = [draw_noise(run.config.seed, positions, run.shape, x_0.device, n) for n in numbers]
            right, other = (
                run.objective.loss(run.process, Conditioned(run.averaged, y), x_0, t, *noises).double()
                for y in (labels.clamp(max=classes), wrong)
            )
            totals.append(torch.stack([other - right, right]))
    found = run.accelerator.gather((torch.stack(totals).mean(0).T.contiguous(), present))
    (values, there) = found  # type: ignore[misc]
    gains, losses = values.cpu()[there.cpu()].T
    if len(gains) < 2:
        return {}
    gain, stderr = mean_and_stderr(gains)
    if gain <= SURE * stderr and run.accelerator.is_main_process:
        logger.warning(
            "step %d: the network makes no use of the classes so far: its loss is %.4g with the right ones, "
            "and %.2g ± %.1g higher with wrong ones",
            *(run.step, losses.mean().item(), gain, stderr),
        )
    return {"class_gain": gain, "class_gain_stderr": stderr} if math.isfinite(gain + stderr) else {}
