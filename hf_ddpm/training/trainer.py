"""Training, Ho et al. 2020, algorithm 1, under Accelerate: data → q_sample → model → objective → folder.

Which image stands at a position of the run, its t, noise, crop and flip depend on (seed, position) alone, and
a step has the same positions on any number of processes. So no generator needs saving: a stopped run goes on
with what the unbroken one would have drawn. The run's folder is its pipeline's folder too (EMA weights),
beside `checkpoints/`, `samples/`, `heldout/`, `log.jsonl`, `training.png` and `train_config.json`.

A checkpoint is saved before a step's pictures and held-out bound are made, so a run that is stopped meanwhile
loses nothing: when it goes on it makes what is missing.
"""

import contextlib
import copy
import dataclasses
import gc
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import DistributedType, broadcast
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn

from hf_ddpm.config import TrainConfig, make_scheduler
from hf_ddpm.data.order import EMPTY
from hf_ddpm.data.pixels import to_float
from hf_ddpm.denoiser import as_denoiser
from hf_ddpm.objectives import make_objective
from hf_ddpm.process import PRIOR_WARNING
from hf_ddpm.publishing.upload import PublishError
from hf_ddpm.runtime.processes import on_main_process
from hf_ddpm.runtime.signals import StopSignals, TrainingStopped
from hf_ddpm.seeds import derive_seed
from hf_ddpm.training.averages import average_of, decay_at, update_average
from hf_ddpm.training.batches import make_batches, open_stream
from hf_ddpm.training.checkpoint import Checkpoint, RunLock, save_checkpoint
from hf_ddpm.training.curve import draw_curve
from hf_ddpm.training.draws import draw_noise, draw_t, draw_uniform
from hf_ddpm.training.exports import write_pipeline
from hf_ddpm.training.heldout import HeldOut
from hf_ddpm.training.importance import LossSecondMoment
from hf_ddpm.training.launch import make_accelerator, start_pushing
from hf_ddpm.training.log import QUARTILES, Record
from hf_ddpm.training.network import make_model, make_optimizer, make_schedule, prepare_model
from hf_ddpm.training.resume import check_rows, find_checkpoint, restore, share_steps
from hf_ddpm.training.sharding import all_finite, gather_model, gather_optimizer, reshard, whole

logger = logging.getLogger(__name__)

STOPPED_PUSH_SECONDS = 10  # that a run which was told to stop waits for an upload


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

    SIGTERM, SIGINT and SIGUSR1 end the run after a checkpoint (main thread only). With several processes
    their group ends with the run, so nothing that they do together can follow in the same program.

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
        PublishError: the run is done, but its last push is not on the Hub; the message says how to bring it
            there.
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
    share = share_steps(config, accelerator, state)

    # With what: process, data, network and its averages, optimizer
    scheduler = make_scheduler(config)
    process = scheduler.process
    if process.prior_bpd_at_edges > PRIOR_WARNING:
        logger.warning("the schedule ends %.3g bits/dim short of pure noise", process.prior_bpd_at_edges)
    stream = open_stream(config)
    check_rows(stream.row_counts, state)
    heldout = HeldOut(config, run, accelerator, stream.shape) if config.evaluate_every else None
    options = {"variance_type": config.variance_type, "prediction_type": config.prediction_type}
    objective = make_objective(
        config.objective, **options, snr_gamma=config.snr_gamma, hybrid_weight=config.hybrid_weight
    )
    t_sampler = LossSecondMoment(len(process), device) if config.t_sampler == "importance" else None
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
        restore(start, unet, averages, optimizer, accelerator.scaler, t_sampler)
    del start  # it holds a copy of everything

    def save_pipeline(states: dict[str, dict[str, torch.Tensor]]) -> None:
        on_main_process(accelerator, lambda: write_pipeline(run, averages, shell, states, scheduler))

    def save() -> None:
        noted = record.state()  # which raises where the loss can't be right
        for average in averages.values():
            for buffer in average.buffers():  # not shared by DDP in what it leaves behind: process 0's count
                broadcast(buffer)
        finite: torch.Tensor = accelerator.reduce(all_finite(unet), "mean")  # type: ignore[assignment]
        if finite != 1:
            raise RuntimeError(f"the weights are not finite at step {step}; checkpoints from before stand")
        states = {name: gather_model(average) for name, average in averages.items()}
        scaler = {} if accelerator.scaler is None else accelerator.scaler.state_dict()
        optimizers = {"optimizer": gather_optimizer(unet, optimizer), "scaler": scaler}
        if t_sampler is not None:
            optimizers["t_sampler"] = t_sampler.state_dict()
        facts = {"num_processes": world, "images_per_step": share.per_step, **noted}
        facts["row_counts"] = stream.row_counts
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
    push = start_pushing(config, unet, accelerator)
    batches = make_batches(stream, config, share, device, first)
    cost = objective.cost_of_zero(process).float().to(device)
    record = Record(run, accelerator, config, first, share.per_step, stream.num_rows(), state)
    stop, stopped, done = StopSignals(world), False, False
    with stop, record, contextlib.suppress(TrainingStopped):
        with record.paused():
            show()
        while step < config.max_steps and not stopped:
            seen = []  # positions, steps and losses, for the sampler of steps
            for micro in range(share.micro_steps):
                positions, images, present = next(batches)
                x_0 = to_float(images.to(device, non_blocking=True))
                present = present.to(device, non_blocking=True)
                if t_sampler is None:
                    t = draw_t(config.seed, positions, len(process)).to(device, non_blocking=True)
                else:
                    t = t_sampler.draw(draw_uniform(config.seed, positions).to(device, non_blocking=True))
                noises = [
                    draw_noise(config.seed, positions, stream.shape, device, number)
                    for number in range(objective.noises)
                ]
                torch.manual_seed(derive_seed(config.seed, step, micro, rank))  # of dropout
                if config.channels_last:
                    x_0 = x_0.contiguous(memory_format=torch.channels_last)
                last = micro == share.micro_steps - 1
                with contextlib.nullcontext() if last else accelerator.no_sync(network):
                    losses = objective.loss(process, denoiser, x_0, t, *noises)
                    weights = torch.ones_like(losses)
                    if t_sampler is not None:
                        places = torch.tensor(positions).to(device, non_blocking=True)
                        seen.append((torch.where(present, places, EMPTY), t, losses.detach()))
                        weights = t_sampler.weights(t)
                    losses = losses * weights
                    # The mean over the step's images, once the processes' gradients are averaged
                    accelerator.backward((losses * present).sum() * (world / share.per_step))
                quartiles = torch.where(present, t * QUARTILES // len(process), -1)
                record.add(losses, weights, cost[t], quartiles)
            if t_sampler is not None:
                t_sampler.add(*accelerator.gather([torch.cat(column) for column in zip(*seen, strict=True)]))
            norm = accelerator.clip_grad_norm_(network.parameters(), config.max_grad_norm or math.inf)
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
                pushes = config.push_to_hub is not None and due(config.push_every)
                if stopped or shows or pushes or due(config.checkpoint_every):
                    save()
                if shows and not stopped:
                    show()
                if (shows or pushes or step == config.max_steps) and not stopped:
                    on_main_process(accelerator, lambda: draw_curve(run))
                if push is not None and pushes and not stopped:
                    push.push(step)
        if step == first:  # the run had ended, but maybe between its last checkpoint and its pipeline
            save_pipeline({name: gather_model(average) for name, average in averages.items()})
            on_main_process(accelerator, lambda: draw_curve(run))
            if push is not None and not stopped:
                push.push(step)
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
    if push is not None and done:
        push.finish()
    if not done:
        if push is not None:
            with contextlib.suppress(PublishError):  # the run that goes on pushes again
                push.finish(STOPPED_PUSH_SECONDS)
        raise TrainingStopped(
            f"stopped by {stop.name} at step {step} of {config.max_steps}, saved in {str(run)!r}; the same "
            "command goes on"
        )
    return TrainResult(run, step, step * share.per_step, record.loss, record.images_per_second)
