"""From a TrainConfig to the objects of a run: accelerator, scheduler, batches, network, optimizer.

It knows which key feeds which argument, and nothing of what the trainer does with the objects.
"""

import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, GradientAccumulationPlugin, parse_flag_from_env
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.utils.torch_utils import get_device
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hf_ddpm.background import BackgroundPush
from hf_ddpm.config import TrainConfig
from hf_ddpm.data import ImageStream, load_stream
from hf_ddpm.models import NETWORKS, PRESETS, create_model
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.processes import on_main_process
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.share import StepShare
from hf_ddpm.stop import ignore_signals

logger = logging.getLogger(__name__)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Devices, processes, precision and trackers.

    Raises:
        ValueError: an unknown tracker, a precision that the device lacks, or a launch whose processes work
            alone or share out the network in a way that isn't supported.
    """
    trackers = [name.strip() for name in config.trackers.split(",") if name.strip()]
    available = sorted(str(name) for name in get_available_trackers())
    for name in trackers:
        if name not in available:
            raise ValueError(
                f"tracker {name!r} is unknown or not installed; available: {', '.join(available) or 'none'}"
            )
    if is_initialized():
        AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    accelerator = Accelerator(
        cpu=get_device() == "cpu",  # else two processes on a CPU would each believe to be alone
        mixed_precision=config.mixed_precision,
        # The trainer accumulates by itself. ACCELERATE_GRADIENT_ACCUMULATION_STEPS would overrule a number.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        log_with=trackers or None,  # type: ignore[arg-type]
        project_dir=config.output_dir,
    )
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("mixed_precision is 'fp16', but the device is a CPU; allowed there: no, bf16")
    if accelerator.device.type == "mps" and config.objective in ("bound", "hybrid", "sddpm"):
        raise ValueError(
            f"objective is {config.objective!r}, which wants float64; allowed on MPS: simple, min-snr, "
            "score-matching"
        )
    _check_launch(accelerator)
    return accelerator


def _check_launch(accelerator: Accelerator) -> None:
    """Refuse a launch that isn't what was asked for, or can't be served."""
    world, env = accelerator.num_processes, os.environ
    launched = int(env.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in env else 1
    if launched != world:
        raise ValueError(
            f"the launch started {launched} processes, but accelerate sees {world}; ACCELERATE_USE_CPU=true "
            "joins processes on a CPU"
        )
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if world == 1 and int(env.get(name, 1)) > 1:
            raise ValueError(
                f"{name} is {env[name]}, but this process works alone, and so would the others; start one "
                "launcher a machine (torchrun, accelerate launch --multi_gpu), or set RANK, LOCAL_RANK and "
                "WORLD_SIZE, or unset it where runs of their own are meant"
            )
    # `accelerate launch --num_processes 2` without --multi_gpu starts one process, with the address for two
    if (
        world == 1
        and "RANK" not in env
        and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"} <= env.keys()
    ):
        raise ValueError(
            "accelerate launch was asked for several processes and started one; add --multi_gpu (on CPUs "
            "too), or ask for one (and unset MASTER_ADDR if that is set)"
        )
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(f"the launch asks for {kind.value}; allowed: one process, DDP or FSDP")
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("the launch asks for FSDP 1; allowed: --fsdp_version 2")
    if kind != DistributedType.FSDP and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise ValueError(f"the launch asks for FSDP, which accelerate doesn't do here (it is {kind.value})")


def make_scheduler(config: TrainConfig) -> DDPMScheduler:
    """The scheduler of a run: its process trains, its config is saved."""
    constant = (
        config.beta_schedule == "constant"
    )  # diffusers has no word for it, but a linear one can be flat
    return DDPMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule="linear" if constant else config.beta_schedule,  # type: ignore[arg-type]
        beta_start=config.beta_start,
        beta_end=config.beta_start if constant else config.beta_end,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        prediction_type=config.prediction_type,  # type: ignore[arg-type]
        variance_type=config.variance_type,  # type: ignore[arg-type]
        clip_sample=config.clip_sample,
    )


def open_stream(config: TrainConfig) -> ImageStream:
    """The run's images, in the order that all processes share."""
    return load_stream(
        config.dataset,
        config.split,
        config.size,
        config.channels,
        column=config.image_column,
        fit=config.fit,  # type: ignore[arg-type]
        horizontal_flip=config.horizontal_flip,
        shuffle_buffer=config.shuffle_buffer,
        seed=config.seed,
        skip_corrupt=config.skip_corrupt,
    )


class Batch(NamedTuple):
    """One process's images of a micro-step.

    Attributes:
        positions: of the slots in the run's sequence, (B,); `share.EMPTY` where a slot has none.
        images: uint8, (B, C, H, W), all zeros where there is none.
        present: whether a slot holds an image, (B,), bool, on the CPU.
    """

    positions: list[int]
    images: Tensor
    present: Tensor


class _Batches(IterableDataset):
    """The batches of a share of the stream; an error comes as an item.

    A DataLoader may run it in other processes, of which each makes every k-th batch, and whose exceptions
    arrive as a printed traceback.
    """

    def __init__(self, stream: ImageStream, share: StepShare, first_step: int):
        self.stream, self.share, self.first_step = stream, share, first_step

    def __iter__(self) -> Iterator[Batch | ValueError]:
        worker = get_worker_info()
        mine = (0, None, 1) if worker is None else (worker.id, None, worker.num_workers)
        asked, wanted = itertools.tee(itertools.islice(self.share.slots(self.first_step), *mine))
        try:
            for positions, (images, present) in zip(asked, self.stream.slots(wanted), strict=True):
                yield Batch(positions, images, present)
        except ValueError as error:
            yield error


def make_batches(
    stream: ImageStream, config: TrainConfig, share: StepShare, device: torch.device, first_step: int
) -> Iterator[Batch]:
    """This process's batches from the step `first_step` on, without end; made ahead if the config says so.

    Raises:
        ValueError: an image that can't be read.
    """
    loader = DataLoader(
        _Batches(stream, share, first_step),
        batch_size=None,
        num_workers=config.num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals,
    )
    for batch in loader:
        if isinstance(batch, ValueError):
            raise batch
        yield batch


def make_model(config: TrainConfig, stream: ImageStream, scheduler: DDPMScheduler) -> nn.Module:
    """The preset for the stream's images, freshly initialised from the seed; or the network of a pipeline.

    Raises:
        ValueError: neither, or a `dropout` for a network that has its own.
    """
    channels, height, width = stream.shape
    if config.model in PRESETS or not ("/" in config.model or Path(config.model).is_dir()):
        torch.manual_seed(config.seed)
        size = height if height == width else (height, width)
        answers = channels * (2 if config.variance_type == "learned_range" else 1)
        return create_model(
            config.model,
            image_size=size,
            channels=channels,
            out_channels=answers,
            dropout=config.dropout,
        )
    if config.dropout is not None:
        raise ValueError(
            f"dropout is {config.dropout}, but the network of {config.model!r} has its own; allowed: none"
        )
    pipeline = DDPMPipeline.from_pretrained(config.model)
    for key in ("prediction_type", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end"):
        was, now = pipeline.scheduler.config[key], scheduler.config[key]
        if was != now:
            logger.warning("%s was trained with %s %r, this run has %r", config.model, key, was, now)
    return pipeline.unet


def prepare_model(
    model: nn.Module, config: TrainConfig, stream: ImageStream, accelerator: Accelerator
) -> nn.Module:
    """The network as it is trained: on its device, with float32 master weights and the run's options.

    Raises:
        ValueError: a U-Net for other images, or an option that the network or the launch doesn't have.
    """
    if config.channels_last and accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("channels_last is True, which FSDP can't share out; allowed with it: false")
    if isinstance(model, tuple(NETWORKS.values())) and isinstance(model, ConfigMixin):
        answers, channels, size = (
            model.config[key] for key in ("out_channels", "in_channels", "sample_size")
        )
        wanted = (channels, *np.broadcast_to(np.array(size), 2).tolist())
        if wanted != stream.shape:
            raise ValueError(f"the network is for images {wanted} (C, H, W), these are {stream.shape}")
        if answers != (allowed := channels * (2 if config.variance_type == "learned_range" else 1)):
            raise ValueError(
                f"the network answers {answers} channels; allowed with variance_type "
                f"{config.variance_type!r}: {allowed}"
            )
    model = model.float().to(accelerator.device).train()  # type: ignore[arg-type]
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.gradient_checkpointing:
        able = hasattr(model, "enable_gradient_checkpointing")  # which all of diffusers' have
        if not getattr(model, "_supports_gradient_checkpointing", able):
            raise ValueError(f"gradient_checkpointing is True, which {type(model).__name__} doesn't have")
        model.enable_gradient_checkpointing()  # type: ignore[operator,call-arg]
    return model


def make_optimizer(config: TrainConfig, model: nn.Module) -> AdamW:
    """AdamW over all weights of the network."""
    return AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )


def make_schedule(config: TrainConfig, optimizer: AdamW, step: int) -> LRScheduler:
    """The learning rate from `step` steps on; it is a function of the step, so it has no state to save."""
    if config.lr_scheduler != "constant" and config.lr_warmup_steps >= config.max_steps:
        logger.warning(
            "lr_warmup_steps is %d in a run of max_steps %d: the learning rate never reaches its peak",
            config.lr_warmup_steps,
            config.max_steps,
        )
    for group in optimizer.param_groups:
        group["initial_lr"] = config.learning_rate
    return get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_steps,
        last_epoch=step - 1,
    )


def start_pushing(config: TrainConfig, model: nn.Module, accelerator: Accelerator) -> BackgroundPush | None:
    """What uploads the run's folder in the background, on process 0 if it is asked for; None elsewhere.

    Raises:
        ValueError: a bad repository id or licence, or a network that no pipeline can be saved of.
    """
    if config.push_to_hub is None:
        return None
    if not isinstance(model, ModelMixin):
        raise ValueError(f"push_to_hub needs a diffusers network, this is {type(model).__name__}")
    started = []

    def begin() -> None:
        options = {key: getattr(config, key) for key in ("license", "dataset_license", "dataset_id")}
        run, private = Path(config.output_dir), config.push_private
        started.append(BackgroundPush(run, str(config.push_to_hub), private=private, **options))

    on_main_process(accelerator, begin)
    return started[0] if started else None
