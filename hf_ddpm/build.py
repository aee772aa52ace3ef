"""From a TrainConfig to the objects of a run: accelerator, scheduler, batches, network, optimizer.

It knows which key feeds which argument, and nothing of what the trainer does with the objects.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.utils.torch_utils import get_device
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, IterableDataset

from hf_ddpm.config import TrainConfig
from hf_ddpm.data import ImageStream, load_stream
from hf_ddpm.models import PRESETS, create_model
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.scheduler import DDPMScheduler

logger = logging.getLogger(__name__)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Devices, processes, precision and trackers.

    Raises:
        ValueError: an unknown tracker, a precision that the device lacks, or a launch whose processes work
            alone or share out the network.
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
        # as an object, because ACCELERATE_GRADIENT_ACCUMULATION_STEPS would overrule a number
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        log_with=trackers or None,  # type: ignore[arg-type]
        project_dir=config.output_dir,
    )
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("mixed_precision is 'fp16', but the device is a CPU; allowed there: no, bf16")
    launched = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if launched != accelerator.num_processes:
        raise ValueError(
            f"the launch started {launched} processes, but accelerate sees {accelerator.num_processes}; "
            "ACCELERATE_USE_CPU=true joins processes on a CPU"
        )
    kinds = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if accelerator.distributed_type in kinds:
        raise ValueError(
            f"the launch asks for {accelerator.distributed_type.value}; allowed: one process, or several "
            "with the whole network each"
        )
    return accelerator


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


def open_stream(config: TrainConfig, rank: int = 0, world_size: int = 1) -> ImageStream:
    """This rank's share of the run's images."""
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
        rank=rank,
        world_size=world_size,
    )


class _Batches(IterableDataset):
    """The stream's batches, each with the stream's count of skipped images; an error comes as an item.

    A DataLoader may run it in another process, which has its own copy of the stream and whose exceptions
    arrive as a printed traceback.
    """

    def __init__(self, stream: ImageStream, batch_size: int, start: int):
        self.stream, self.batch_size, self.start = stream, batch_size, start

    def __iter__(self) -> Iterator[tuple[Tensor | ValueError, int]]:
        try:
            for images in self.stream.batches(self.batch_size, self.start):
                yield images, self.stream.skipped
        except ValueError as error:
            yield error, self.stream.skipped


def make_batches(
    stream: ImageStream, config: TrainConfig, device: torch.device, start: int
) -> Iterator[Tensor]:
    """Batches of uint8 images from the `start`-th one on, without end; decoded ahead if the config says so.

    Raises:
        ValueError: an image that can't be read.
    """
    loader = DataLoader(
        _Batches(stream, config.batch_size, start),
        batch_size=None,
        num_workers=config.num_workers,
        pin_memory=device.type == "cuda",
    )
    for images, stream.skipped in loader:
        if isinstance(images, ValueError):
            raise images
        yield images


def make_model(config: TrainConfig, stream: ImageStream, scheduler: DDPMScheduler) -> nn.Module:
    """The preset for the stream's images, freshly initialised from the seed; or the network of a pipeline.

    Raises:
        ValueError: neither, or a `dropout` for a network that has its own.
    """
    channels, height, width = stream.shape
    if config.model in PRESETS or not ("/" in config.model or Path(config.model).is_dir()):
        torch.manual_seed(config.seed)
        size = height if height == width else (height, width)
        return create_model(config.model, image_size=size, channels=channels, dropout=config.dropout)
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
    model: nn.Module, config: TrainConfig, stream: ImageStream, device: torch.device
) -> nn.Module:
    """The network as it is trained: on its device, with float32 master weights and the run's options.

    Raises:
        ValueError: a U-Net for other images, or an option that the network doesn't have.
    """
    if isinstance(model, UNet2DModel):
        answers, channels, size = (
            model.config[key] for key in ("out_channels", "in_channels", "sample_size")
        )
        wanted = (channels, *np.broadcast_to(np.array(size), 2).tolist())
        if wanted != stream.shape:
            raise ValueError(f"the network is for images {wanted} (C, H, W), these are {stream.shape}")
        if answers != channels:
            raise ValueError(
                f"the network answers {answers} channels; allowed: {channels}, as it learns no variance here"
            )
    model = model.float().to(device).train()  # type: ignore[arg-type]
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.gradient_checkpointing:
        if not hasattr(model, "enable_gradient_checkpointing"):
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
