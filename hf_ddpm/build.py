"""From a TrainConfig to the objects of a run: scheduler, stream, batches, network.

It knows which key feeds which argument, and nothing of what the trainer does with the objects.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from hf_ddpm.config import TrainConfig
from hf_ddpm.data import ImageStream, load_stream
from hf_ddpm.models import PRESETS, create_model
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.scheduler import DDPMScheduler


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
    """The stream's batches from a position on, for a DataLoader that may decode them in another process."""

    def __init__(self, stream: ImageStream, batch_size: int, start: int):
        self.stream, self.batch_size, self.start = stream, batch_size, start

    def __iter__(self) -> Iterator[Tensor]:
        return self.stream.batches(self.batch_size, self.start)


def make_loader(stream: ImageStream, config: TrainConfig, device: torch.device, start: int) -> DataLoader:
    """Batches of uint8 images from the `start`-th one on, decoded ahead if the config says so."""
    batches = _Batches(stream, config.batch_size, start)
    return DataLoader(
        batches, batch_size=None, num_workers=config.num_workers, pin_memory=device.type == "cuda"
    )


def make_model(config: TrainConfig, stream: ImageStream) -> nn.Module:
    """The preset for the stream's images, freshly initialised from the seed; or the network of a pipeline.

    Raises:
        ValueError: neither, or a network for images of another shape.
    """
    channels, height, width = stream.shape
    if config.model in PRESETS or not ("/" in config.model or Path(config.model).is_dir()):
        torch.manual_seed(config.seed)
        size = height if height == width else (height, width)
        return create_model(config.model, image_size=size, channels=channels, dropout=config.dropout)
    pipeline = DDPMPipeline.from_pretrained(config.model)
    if pipeline.image_shape != stream.shape:
        raise ValueError(
            f"model {config.model!r} is for images {pipeline.image_shape}, these are {stream.shape}"
        )
    return pipeline.unet
