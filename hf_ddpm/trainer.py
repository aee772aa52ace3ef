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
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn

from hf_ddpm.build import make_loader, make_model, make_scheduler, open_stream
from hf_ddpm.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, save_checkpoint, update_folder
from hf_ddpm.config import TrainConfig
from hf_ddpm.models import as_denoiser
from hf_ddpm.objectives import simple_loss
from hf_ddpm.pipeline import PIL_CHANNELS, DDPMPipeline
from hf_ddpm.pixels import to_float
from hf_ddpm.plots import image_grid, save_image
from hf_ddpm.record import Record
from hf_ddpm.scheduler import PRIOR_WARNING, DDPMScheduler

logger = logging.getLogger(__name__)

# What may change when a run goes on; a difference in anything else is refused.
FREE_TO_CHANGE = {
    *("max_steps", "output_dir", "resume", "checkpoint_every", "keep_checkpoints", "log_every", "trackers"),
    *("sample_every", "sample_num_images", "sample_steps", "num_workers"),
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
        model: the network, by default the one that `config.model` names. A module that is not a diffusers
            model is trained and checkpointed, but no pipeline folder can be written for it.

    Raises:
        ValueError: bad input: data, model, folder, or a config that differs from the run to go on from.
        RuntimeError: the loss is not finite; the last checkpoint stands.
    """
    # What to do: the folder, the checkpoint to go on from, the process
    run = Path(config.output_dir)
    _check_trackers(config)
    start = _find_checkpoint(config, run)
    _make_writable(run)
    scheduler = make_scheduler(config)
    process = scheduler.process
    if process.prior_bpd_at_edges > PRIOR_WARNING:
        logger.warning("the schedule ends %.3g bits/dim short of pure noise", process.prior_bpd_at_edges)

    # Where to do it: devices, data, network, optimizer
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=_trackers(config) or None,  # type: ignore[arg-type]
        project_dir=str(run),
    )
    device, world = accelerator.device, accelerator.num_processes
    per_step = config.batch_size * config.gradient_accumulation_steps
    stream = open_stream(config, accelerator.process_index, world)
    unet = (model if model is not None else make_model(config, stream)).to(device).train()
    if config.channels_last:
        unet = unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()  # type: ignore[operator]
    averaged = copy.deepcopy(unet).eval().requires_grad_(False)
    ema = EMAModel(averaged.parameters(), decay=config.ema_decay, foreach=True)
    ema.shadow_params = list(averaged.parameters())  # one copy: the averaged network is the average
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )
    schedule = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_steps,
    )
    if start is not None:
        if start.state["num_processes"] != world:
            raise ValueError(
                f"the run has {start.state['num_processes']} processes, this launch {world}; allowed: equal"
            )
        unet.load_state_dict(start.model)
        averaged.load_state_dict(start.ema)
        ema.optimization_step = start.step
        optimizer.load_state_dict(start.optimizer["optimizer"])
        schedule.load_state_dict(start.optimizer["schedule"])
    step = first = 0 if start is None else start.step
    network, prepared = accelerator.prepare(torch.compile(unet) if config.compile else unet, optimizer)
    if start is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(start.optimizer["scaler"])
    denoiser = as_denoiser(network)

    def save() -> None:
        if accelerator.is_main_process:
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else {}
            states = {
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "scaler": scaler,
            }
            facts = {"num_processes": world, "config": dataclasses.asdict(config)}
            checkpoint = Checkpoint(step, unet.state_dict(), averaged.state_dict(), states, facts)
            save_checkpoint(run, checkpoint, config.keep_checkpoints)
            if hasattr(averaged, "save_pretrained"):
                pipeline = DDPMPipeline(averaged, scheduler)
                update_folder(run, pipeline.save_pretrained, last="model_index.json")
        accelerator.wait_for_everyone()

    # The loop: each step draws from its own seed, nothing is read back from the device but when logging
    record = Record(run, accelerator, first, config)
    batches = iter(make_loader(stream, config, device, first * per_step))
    saved = first
    while step < config.max_steps:
        for micro in range(config.gradient_accumulation_steps):
            x_0 = to_float(next(batches).to(device, non_blocking=True))
            if config.channels_last:
                x_0 = x_0.contiguous(memory_format=torch.channels_last)
            _seed(config.seed, step * config.gradient_accumulation_steps + micro, accelerator.process_index)
            t = torch.randint(len(process), (len(x_0),), device=device)
            noise = torch.randn_like(x_0)
            with accelerator.accumulate(network):
                loss = simple_loss(process, denoiser, x_0, t, noise, config.prediction_type).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients and config.max_grad_norm > 0:
                    record.grad_norm = accelerator.clip_grad_norm_(network.parameters(), config.max_grad_norm)
                prepared.step()
                prepared.zero_grad(set_to_none=True)
            record.add(loss)
        schedule.step()
        ema.step(unet.parameters())
        step += 1
        record.advance(step)

        if step % config.log_every == 0 or step == config.max_steps:
            record.log(float(schedule.get_last_lr()[0]))
        with record.paused():
            if step % config.checkpoint_every == 0:
                save()
                saved = step
            if config.sample_every and step % config.sample_every == 0:
                _save_grid(accelerator, averaged, scheduler, stream.shape, config, run, step)

    # The end: what was not saved on the way, and the iterator let go before the interpreter exits
    with record.paused():
        if saved != step:
            save()
        if config.sample_every and step % config.sample_every and step > first:
            _save_grid(accelerator, averaged, scheduler, stream.shape, config, run, step)
    record.close()
    if stream.skipped:
        logger.warning("%d images could not be read and were skipped", stream.skipped)
    del batches
    gc.collect()  # a parquet reader left to the interpreter's exit can abort it
    accelerator.end_training()
    return TrainResult(run, step, step * per_step * world, record.loss, record.images_per_second)


def _seed(seed: int, draw: int, rank: int) -> None:
    """Seed every device's generator for one micro-step."""
    torch.manual_seed(int(np.random.SeedSequence((seed, draw, rank)).generate_state(1, np.uint64)[0] >> 1))


def _save_grid(
    accelerator: Accelerator,
    model: nn.Module,
    scheduler: DDPMScheduler,
    shape: tuple[int, int, int],
    config: TrainConfig,
    run: Path,
    step: int,
) -> None:
    """Sample with the averaged weights, always from the same noise, and show the grid."""
    if not accelerator.is_main_process:
        return
    pipeline = DDPMPipeline(model, scheduler)
    pipeline.set_progress_bar_config(
        desc="sample", leave=False, mininterval=0.5 if sys.stderr.isatty() else 15.0
    )
    as_picture = shape[0] in PIL_CHANNELS
    with accelerator.autocast():
        images: Any = pipeline(
            batch_size=config.sample_num_images,
            generator=torch.Generator().manual_seed(config.seed),
            num_inference_steps=config.sample_steps,
            output_type="pil" if as_picture else "np",
            return_dict=False,
            max_batch_size=config.batch_size,
            image_shape=shape,
        )[0]
    if not as_picture:
        np.save(run / "samples" / f"step-{step:08d}.npy", images)
        return
    grid = image_grid(images)
    save_image(grid, run / "samples" / f"step-{step:08d}.png")
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            tracker.log_images({"samples": np.asarray(grid)[None]}, step=step)


def _find_checkpoint(config: TrainConfig, run: Path) -> Checkpoint | None:
    """The checkpoint to go on from, None for a fresh start."""
    found = list_checkpoints(run)
    if config.resume == "never" and found:
        raise ValueError(
            f"output_dir {str(run)!r} holds a run at step {found[-1][0]}; resume 'auto' goes on with it"
        )
    if config.resume in ("auto", "never"):
        if not found:
            return None
        folder = found[-1][1]
    else:
        folder = Path(config.resume)
    checkpoint = load_checkpoint(folder)
    was, now = checkpoint.state["config"], dataclasses.asdict(config)
    changed = [key for key in now if key not in FREE_TO_CHANGE and was.get(key) != now[key]]
    if changed:
        what = ", ".join(f"{key} {was.get(key)!r} -> {now[key]!r}" for key in changed)
        raise ValueError(
            f"output_dir {str(run)!r} holds another run ({what}); allowed: the same config, or another folder"
        )
    return checkpoint


def _make_writable(run: Path) -> None:
    try:
        (run / "samples").mkdir(parents=True, exist_ok=True)
        probe = run / ".write-test"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output_dir {str(run)!r} can't be written: {error.strerror}") from None


def _trackers(config: TrainConfig) -> list[str]:
    return [name.strip() for name in config.trackers.split(",") if name.strip()]


def _check_trackers(config: TrainConfig) -> None:
    available = sorted(str(name) for name in get_available_trackers())
    for name in _trackers(config):
        if name not in available:
            raise ValueError(
                f"tracker {name!r} is unknown or not installed; available: {', '.join(available) or 'none'}"
            )
