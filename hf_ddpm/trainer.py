"""Training, Ho et al. 2020, algorithm 1, under Accelerate: data → q_sample → model → objective → folder.

Everything random in a step is drawn from a seed made of (seed, step, rank), and the data's order from (seed,
epoch, rank), so a resumed run draws what the unbroken one would have drawn and no generator needs saving.
The run's folder is its pipeline's folder too (EMA weights), beside `checkpoints/`, `samples/`, `log.jsonl`
and `train_config.json`.
"""

import copy
import dataclasses
import gc
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.training_utils import EMAModel
from torch import nn

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
from hf_ddpm.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, save_checkpoint, update_folder
from hf_ddpm.config import TrainConfig
from hf_ddpm.heldout import HeldOut
from hf_ddpm.models import as_denoiser
from hf_ddpm.objectives import simple_loss
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.pixels import to_float
from hf_ddpm.record import Record
from hf_ddpm.scheduler import PRIOR_WARNING
from hf_ddpm.seeds import derive_seed

logger = logging.getLogger(__name__)

# What may change when a run goes on; a difference in anything else is refused.
FREE_TO_CHANGE = {
    *("max_steps", "output_dir", "resume", "checkpoint_every", "keep_checkpoints", "log_every", "trackers"),
    *("sample_every", "sample_num_images", "sample_steps", "num_workers"),
    *("evaluate_every", "evaluate_split", "evaluate_num_images", "evaluate_num_evals"),
}


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

    Args:
        config: the run.
        model: the network, by default the one that `config.model` names. It is trained in place, in float32.
            A module that is not a diffusers model is trained and checkpointed, but no pipeline folder can be
            written for it.

    Raises:
        ValueError: bad input: data, model, folder, or a config that differs from the run to go on from.
        RuntimeError: the loss or the weights are not finite; checkpoints from before stand.
    """
    # What to do, where: precision, devices, the folder, the checkpoint to go on from
    precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    config = dataclasses.replace(config, mixed_precision=precision)
    run = Path(config.output_dir)
    accelerator = make_accelerator(config)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    start = _find_checkpoint(config, run, world)
    step = first = 0 if start is None else start.step
    _make_writable(run)

    # With what: process, data, network and its average, optimizer
    scheduler = make_scheduler(config)
    process = scheduler.process
    if process.prior_bpd_at_edges > PRIOR_WARNING:
        logger.warning("the schedule ends %.3g bits/dim short of pure noise", process.prior_bpd_at_edges)
    stream = open_stream(config, rank, world)
    heldout = HeldOut(config, run, accelerator, stream.shape) if config.evaluate_every else None
    options = {"variance_type": config.variance_type, "prediction_type": config.prediction_type}
    unet = model if model is not None else make_model(config, stream, scheduler)
    unet = prepare_model(unet, config, stream, device)
    averaged = copy.deepcopy(unet).eval().requires_grad_(False)
    ema = EMAModel([], decay=config.ema_decay, foreach=True)
    ema.shadow_params = list(averaged.parameters())  # one copy: the averaged network is the average
    ema.optimization_step = first
    optimizer = make_optimizer(config, unet)
    schedule = make_schedule(config, optimizer, first)
    network, prepared = accelerator.prepare(torch.compile(unet) if config.compile else unet, optimizer)
    denoiser = as_denoiser(network)
    if start is not None:
        # After `prepare`, which would move AdamW's step counters to the device, to be read back at each step
        _restore(start, unet, averaged, optimizer, accelerator.scaler)
        for group, lr in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
            group["lr"] = lr  # not the saved one: a new max_steps may have moved it
    del start  # it holds a copy of everything

    def save_pipeline() -> None:
        if accelerator.is_main_process and isinstance(averaged, ModelMixin):
            pipeline = DDPMPipeline(averaged, scheduler)
            update_folder(run, pipeline.save_pretrained, last="model_index.json")
        accelerator.wait_for_everyone()

    def save() -> None:
        if not all(weight.isfinite().all() for weight in unet.parameters()):
            raise RuntimeError(f"the weights are not finite at step {step}; checkpoints from before stand")
        if accelerator.is_main_process:
            scaler = {} if accelerator.scaler is None else accelerator.scaler.state_dict()
            states = {"optimizer": optimizer.state_dict(), "scaler": scaler}
            facts = {"num_processes": world, "config": dataclasses.asdict(config)}
            checkpoint = Checkpoint(step, unet.state_dict(), averaged.state_dict(), states, facts)
            save_checkpoint(run, checkpoint, config.keep_checkpoints)
        save_pipeline()

    # The loop: each step draws from its own seed, nothing is read back from the device but when logging
    micro_steps = config.gradient_accumulation_steps
    per_step = config.batch_size * micro_steps
    batches = make_batches(stream, config, device, first * per_step)
    with Record(run, accelerator, first, config) as record:
        while step < config.max_steps:
            for micro in range(micro_steps):
                x_0 = to_float(next(batches).to(device, non_blocking=True))
                torch.manual_seed(derive_seed(config.seed, step * micro_steps + micro, rank))
                t = torch.randint(len(process), (len(x_0),), device=device)
                noise = torch.randn_like(x_0)
                if config.channels_last:
                    x_0 = x_0.contiguous(memory_format=torch.channels_last)
                with accelerator.accumulate(network):
                    loss = simple_loss(process, denoiser, x_0, t, noise, config.prediction_type).mean()
                    accelerator.backward(loss)
                    if accelerator.sync_gradients and config.max_grad_norm > 0:
                        weights = network.parameters()
                        record.grad_norm = accelerator.clip_grad_norm_(weights, config.max_grad_norm)
                    prepared.step()
                    prepared.zero_grad(set_to_none=True)
                record.add(loss)
            lr = schedule.get_last_lr()[0]
            schedule.step()
            ema.step(unet.parameters())
            for mine, theirs in zip(averaged.buffers(), unet.buffers(), strict=True):
                mine.copy_(theirs)
            step += 1
            record.advance(step)

            ends = step == config.max_steps
            if ends or step % config.log_every == 0:
                record.log(float(lr))
            with record.paused():
                if heldout and (ends or step % config.evaluate_every == 0):  # a checkpoint has its line
                    record.note(heldout.evaluate(averaged, process, step, options))
                if ends or step % config.checkpoint_every == 0:
                    save()
                if config.sample_every and (ends or step % config.sample_every == 0):
                    record.save_grid(averaged, scheduler, stream.shape)
    if step == first:
        save_pipeline()  # the run had ended, but maybe between its last checkpoint and this

    # The end: the iterator goes before the interpreter does, whose exit a parquet reader can abort, and DDP
    # before its process group, which it would else destroy under Python's lock while a thread waits for that
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(network, keep_fp32_wrapper=False)  # a caller's module computes as before
    del batches, network, denoiser
    accelerator.free_memory()
    gc.collect()
    if stream.skipped:
        logger.warning("%d images could not be read and were skipped", stream.skipped)
    accelerator.end_training()
    return TrainResult(run, step, step * per_step * world, record.loss, record.images_per_second)


def _find_checkpoint(config: TrainConfig, run: Path, world: int) -> Checkpoint | None:
    """The checkpoint to go on from, None for a fresh start."""
    found = list_checkpoints(run)
    named = config.resume not in ("auto", "never")
    if not found and (run / "model_index.json").exists():
        raise ValueError(
            f"output_dir {str(run)!r} holds a pipeline, but no checkpoint to go on from; allowed: another one"
        )
    if found and config.resume == "never":
        raise ValueError(
            f"output_dir {str(run)!r} holds a run at step {found[-1][0]}; resume 'auto' goes on with it"
        )
    if not found and not named:
        return None
    folder = Path(config.resume) if named else found[-1][1]
    checkpoint = load_checkpoint(folder)
    if found and not folder.samefile(found[-1][1]):
        raise ValueError(
            f"resume is {config.resume!r}, but output_dir {str(run)!r} holds a run at step {found[-1][0]}; "
            "allowed: its newest checkpoint, or an output_dir without a run"
        )
    was, now = checkpoint.state.get("config", {}), dataclasses.asdict(config)
    changed = [key for key in now if key not in FREE_TO_CHANGE and was.get(key) != now[key]]
    if changed:
        what = ", ".join(f"{key} {was.get(key)!r} -> {now[key]!r}" for key in changed)
        raise ValueError(
            f"checkpoint {str(folder)!r} is of another run ({what}); allowed: the same config, or another "
            "output_dir"
        )
    processes = checkpoint.state.get("num_processes")
    if processes != world:
        raise ValueError(f"the run has {processes} processes, this launch {world}; allowed: equal")
    if config.lr_scheduler in ("linear", "cosine") and was["max_steps"] != now["max_steps"]:
        logger.warning(
            "max_steps %d -> %d moves the end of the %s schedule: the learning rate jumps",
            was["max_steps"],
            now["max_steps"],
            config.lr_scheduler,
        )
    return checkpoint


def _restore(
    start: Checkpoint,
    unet: nn.Module,
    averaged: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
) -> None:
    try:
        unet.load_state_dict(start.model)
        averaged.load_state_dict(start.ema)
        optimizer.load_state_dict(start.optimizer["optimizer"])
        if scaler is not None:
            scaler.load_state_dict(start.optimizer["scaler"])
    except (RuntimeError, ValueError, KeyError) as error:  # torch lists every tensor, on a line each
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the checkpoint at step {start.step} is of another network: {reason}") from error


def _make_writable(run: Path) -> None:
    try:
        (run / "samples").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run):
            pass
    except OSError as error:
        raise ValueError(f"output_dir {str(run)!r} can't be written: {error.strerror}") from None
