"""Training, Ho et al. 2020, algorithm 1, under Accelerate: data → q_sample → model → objective → folder.

Which image stands at a position of the run, its t, noise, crop and flip depend on (seed, position) alone, and
a step has the same positions on any number of processes. So no generator needs saving: a stopped run goes on
with what the unbroken one would have drawn. The run's folder is its pipeline's folder too (EMA weights),
beside `checkpoints/`, `samples/`, `heldout/`, `log.jsonl` and `train_config.json`.

A checkpoint is saved before a step's pictures and held-out bound are made, so a run that is stopped meanwhile
loses nothing: when it goes on it makes what is missing.
"""

import contextlib
import copy
import dataclasses
import gc
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from hf_ddpm.averages import average_of, decay_at, update_average
from hf_ddpm.build import (
    make_accelerator,
    make_batches,
    make_model,
    make_optimizer,
    make_schedule,
    make_scheduler,
    open_stream,
    prepare_model,
)
from hf_ddpm.checkpoint import Checkpoint, RunLock, save_checkpoint, update_folder
from hf_ddpm.config import TrainConfig
from hf_ddpm.draws import draw_noise, draw_t
from hf_ddpm.heldout import HeldOut
from hf_ddpm.models import as_denoiser
from hf_ddpm.objectives import simple_loss
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.pixels import to_float
from hf_ddpm.processes import on_main_process
from hf_ddpm.record import QUARTILES, Record
from hf_ddpm.resume import find_checkpoint
from hf_ddpm.scheduler import PRIOR_WARNING, DDPMScheduler
from hf_ddpm.seeds import derive_seed
from hf_ddpm.share import StepShare
from hf_ddpm.states import (
    all_finite,
    gather_model,
    gather_optimizer,
    reshard,
    restore_model,
    restore_optimizer,
    whole,
)
from hf_ddpm.stop import StopSignals, TrainingStopped

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        output_dir: the run's folder, which `DDPMPipeline.from_pretrained` loads.
        step: optimizer steps done in all.
        images: images seen in all, over every process.
        loss: mean loss of the last logged interval, NaN if this call logged none.
        images_per_second: throughput of this call, without sampling and saving; NaN if it took no step.
    """

    output_dir: Path
    step: int
    images: int
    loss: float
    images_per_second: float


def train(config: TrainConfig, model: nn.Module | None = None) -> TrainResult:
    """Train, and leave a pipeline in `config.output_dir`.

    SIGTERM, SIGINT and SIGUSR1 end the run after a checkpoint (main thread only).

    Args:
        config: the run.
        model: the network, by default the one that `config.model` names. It is trained in place, in float32.
            A module that is not a diffusers model is trained and checkpointed, but no pipeline folder can be
            written for it.

    Raises:
        ValueError: bad input: data, model, folder, or a config that differs from the run to go on from.
        RuntimeError: the loss or the weights are not finite, or the loss exploded; checkpoints from before
            stand.
        OSError: the folder can't be written any more; checkpoints from before stand.
        TrainingStopped: a signal came, and everything is saved.
    """
    # What to do, where: precision, devices, the folder, the checkpoint to go on from
    precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    config = dataclasses.replace(config, mixed_precision=precision)
    run = Path(config.output_dir)
    accelerator = make_accelerator(config)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    lock = RunLock(run)  # until this function ends, however it does
    on_main_process(accelerator, lock.acquire)
    start = find_checkpoint(config, run, accelerator)
    state = {} if start is None else start.state
    step = first = 0 if start is None else start.step
    share = _share_steps(config, accelerator, state)

    # With what: process, data, network and its averages, optimizer
    scheduler = make_scheduler(config)
    process = scheduler.process
    if process.prior_bpd_at_edges > PRIOR_WARNING:
        logger.warning("the schedule ends %.3g bits/dim short of pure noise", process.prior_bpd_at_edges)
    stream = open_stream(config)
    heldout = HeldOut(config, run, accelerator, stream.shape) if config.evaluate_every else None
    options = {"variance_type": config.variance_type, "prediction_type": config.prediction_type}
    unet = model if model is not None else make_model(config, stream, scheduler)
    unet = prepare_model(unet, config, stream, accelerator)
    sharded = accelerator.distributed_type == DistributedType.FSDP
    shell = copy.deepcopy(unet).cpu() if sharded else None  # what a gathered average is saved from
    averages = {name: average_of(unet) for name in config.ema_decays}
    optimizer = make_optimizer(config, unet)
    schedule = make_schedule(config, optimizer, first)
    network, prepared = accelerator.prepare(torch.compile(unet) if config.compile else unet, optimizer)
    if sharded:
        averages = {name: fsdp2_prepare_model(accelerator, average) for name, average in averages.items()}
    averaged = next(iter(averages.values()))  # the pipeline's
    denoiser = as_denoiser(network)
    if start is not None:
        _restore(start, unet, averages, optimizer, accelerator.scaler)
    del start  # it holds a copy of everything

    def save_pipeline(states: dict[str, dict[str, torch.Tensor]]) -> None:
        on_main_process(accelerator, lambda: _write_pipeline(run, averages, shell, states, scheduler))

    def save() -> None:
        noted = record.state()  # which raises where the loss can't be right
        finite: torch.Tensor = accelerator.reduce(all_finite(unet), "mean")  # type: ignore[assignment]
        if finite != 1:
            raise RuntimeError(f"the weights are not finite at step {step}; checkpoints from before stand")
        states = {name: gather_model(average) for name, average in averages.items()}
        scaler = {} if accelerator.scaler is None else accelerator.scaler.state_dict()
        optimizers = {"optimizer": gather_optimizer(unet, optimizer), "scaler": scaler}
        facts = {"num_processes": world, "images_per_step": share.per_step, **noted}
        facts["config"] = dataclasses.asdict(config)
        checkpoint = Checkpoint(step, gather_model(unet), states, optimizers, facts)
        on_main_process(accelerator, lambda: save_checkpoint(run, checkpoint, config.keep_checkpoints))
        save_pipeline(states)

    def due(every: int) -> bool:
        return every > 0 and step > 0 and (step == config.max_steps or step % every == 0)

    def show() -> None:
        """Held-out bound and grid of this step, if they are due and not there yet."""
        if heldout and due(config.evaluate_every):
            if step > first or not on_main_process(accelerator, lambda: record.has(step, "heldout_bpd")):
                record.note(heldout.evaluate(averaged, process, step, options, stop.check))
        if due(config.sample_every):
            path = record.grid_path(stream.shape)
            if step > first or not on_main_process(accelerator, path.exists):
                record.save_grid(averaged, scheduler, stream.shape, stop.check)
        reshard(averaged)

    # The loop: each image draws from its own seed, nothing is read back from the device but when logging
    batches = make_batches(stream, config, share, device, first)
    record = Record(run, accelerator, config, first, share.per_step, state)
    stop, stopped, done = StopSignals(world), False, False
    with stop, record, contextlib.suppress(TrainingStopped):
        with record.paused():
            show()
        while step < config.max_steps and not stopped:
            for micro in range(share.micro_steps):
                positions, images, present = next(batches)
                x_0 = to_float(images.to(device, non_blocking=True))
                t = draw_t(config.seed, positions, len(process))
                quartiles = torch.where(present, t * QUARTILES // len(process), -1)
                t, quartiles, present = (
                    tensor.to(device, non_blocking=True) for tensor in (t, quartiles, present)
                )
                noise = draw_noise(config.seed, positions, stream.shape, device)
                torch.manual_seed(derive_seed(config.seed, step, micro, rank))  # of dropout
                if config.channels_last:
                    x_0 = x_0.contiguous(memory_format=torch.channels_last)
                last = micro == share.micro_steps - 1
                with contextlib.nullcontext() if last else accelerator.no_sync(network):
                    losses = simple_loss(process, denoiser, x_0, t, noise, config.prediction_type)
                    # The mean over the step's images, once the processes' gradients are averaged
                    accelerator.backward((losses * present).sum() * (world / share.per_step))
                record.add(losses, quartiles)
            if config.max_grad_norm > 0:
                norm = accelerator.clip_grad_norm_(network.parameters(), config.max_grad_norm)
                record.grad_norm = norm if norm is None else whole(norm)
            prepared.step()
            prepared.zero_grad(set_to_none=True)
            lr = schedule.get_last_lr()[0]
            schedule.step()
            for name, average in averages.items():
                update_average(average, unet, config.ema_decays[name], step)
            step += 1
            record.advance(step)

            stopped = stop.agreed()
            if due(config.log_every):
                record.log(float(lr), decay_at(next(iter(config.ema_decays.values())), step - 1))
            with record.paused():
                shows = due(config.sample_every) or (heldout and due(config.evaluate_every))
                if stopped or shows or due(config.checkpoint_every):
                    save()
                if shows and not stopped:
                    show()
        if step == first:  # the run had ended, but maybe between its last checkpoint and its pipeline
            save_pipeline({name: gather_model(average) for name, average in averages.items()})
        done = not stopped

    # The end: the iterator goes before the interpreter does, whose exit a parquet reader can abort, and DDP
    # before its process group, which it would else destroy under Python's lock while a thread waits for that
    if done:
        accelerator.wait_for_everyone()
    accelerator.unwrap_model(network, keep_fp32_wrapper=False)  # a caller's module computes as before
    del batches, network, denoiser
    accelerator.free_memory()
    gc.collect()
    if record.skipped:
        logger.warning("%d images could not be read and were skipped", record.skipped)
    accelerator.end_training()
    lock.release()
    if not done:
        raise TrainingStopped(
            f"stopped by {stop.name} at step {step} of {config.max_steps}, saved in {str(run)!r}; the same "
            "command goes on"
        )
    return TrainResult(run, step, step * share.per_step, record.loss, record.images_per_second)


def _share_steps(config: TrainConfig, accelerator: Accelerator, state) -> StepShare:
    """This process's part of each step, whose images are as many as when the run began."""
    world = accelerator.num_processes
    per_step = config.batch_size * config.gradient_accumulation_steps * world
    share = StepShare(
        state.get("images_per_step", per_step), config.batch_size, accelerator.process_index, world
    )
    if share.per_step != per_step and accelerator.is_main_process:
        logger.warning(
            "the run has steps of %d images; %d processes share them, in %d micro-steps of %d each",
            share.per_step,
            world,
            share.micro_steps,
            share.micro_batch,
        )
    return share


def _write_pipeline(
    run: Path,
    averages: dict[str, nn.Module],
    shell: nn.Module | None,
    states: dict[str, dict[str, torch.Tensor]],
    scheduler: DDPMScheduler,
) -> None:
    """The first average as the run's pipeline, the others beside it as diffusers' variants of the weights."""
    if not isinstance(next(iter(averages.values())), ModelMixin):
        return

    def fill(place: Path) -> None:
        for number, (name, average) in enumerate(averages.items()):
            if shell is not None:  # the averages are shared out
                shell.load_state_dict(states[name])
                average = shell
            if number == 0:
                DDPMPipeline(average, scheduler).save_pretrained(place)
            else:
                average.save_pretrained(place / "unet", variant=f"ema_{name}")  # type: ignore[operator]

    update_folder(run, fill, last="model_index.json")


def _restore(
    start: Checkpoint,
    unet: nn.Module,
    averages: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
) -> None:
    try:
        restore_model(unet, start.model)
        for name, average in averages.items():
            restore_model(average, start.averages[name])
        restore_optimizer(unet, optimizer, start.optimizer["optimizer"])
        if scaler is not None:
            scaler.load_state_dict(start.optimizer["scaler"])
    except (RuntimeError, ValueError, KeyError) as error:  # torch lists every tensor, on a line each
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the checkpoint at step {start.step} is of another network: {reason}") from error
