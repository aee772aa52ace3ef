"""From a TrainConfig to the network, its optimizer and the schedule of the learning rate.

The file knows which key of the config feeds which argument; what is done with the objects is said in step.py.
"""

import dataclasses
import itertools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.configuration_utils import ConfigMixin
from diffusers.optimization import get_scheduler
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler

from hf_ddpm.config import TrainConfig
from hf_ddpm.data.advice import Needs
from hf_ddpm.data.stream import ImageStream
from hf_ddpm.folders.footprint import check_batch
from hf_ddpm.folders.index import part_folder
from hf_ddpm.folders.layout import CONFIG, UNET
from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.models import NETWORKS, PRESETS, add_classes, create_model, num_classes
from hf_ddpm.models.presets import AUTO, UNETS, choose_preset, names_preset, nearest_sizes, takes
from hf_ddpm.runtime.messages import did_you_mean, shown
from hf_ddpm.runtime.processes import process_state
from hf_ddpm.runtime.untrusted import read_json
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.variances import outputs

logger = logging.getLogger(__name__)

LARGEST_SIDE = 256  # of images that are trained on without being told to


def settle_model(
    config: TrainConfig, stream: ImageStream, state: Mapping[str, Any], own: bool
) -> TrainConfig:
    """The config with the name of a network in place of "auto", which is then what the run's files say.

    A run that goes on has the network that it began with, whatever "auto" would take today.

    Args:
        config: the run.
        stream: the run's images.
        state: of the checkpoint that the run goes on from; empty for a new run.
        own: whether the network is the caller's, of which "auto" says nothing.

    Raises:
        ValueError: no preset takes images of this size, or the run began with a network of its caller's.
    """
    if config.model != AUTO:
        return config
    if state:
        began = state["config"].get("model", AUTO)
        if began == AUTO and not own:
            raise ValueError(
                f"the run in {config.output_dir!r} began with a network of its own; allowed: "
                "hf_ddpm.train(config, model=...) with that network, or another output_dir"
            )
        return dataclasses.replace(config, model=began)
    if own:
        return config
    _, height, width = stream.shape
    chosen = choose_preset(height, width)
    if chosen is None:
        _refuse_size(config, height, width)
    return dataclasses.replace(config, model=chosen.name)


def describe_choice(name: str, model: nn.Module, shape: tuple[int, int, int]) -> str:
    """What a run says of the preset that "auto" took for its images (C, H, W): name, weights and why."""
    (row,) = (row for row in UNETS if row.name == name)
    count = sum(weight.numel() for weight in model.parameters()) / 1e6
    return (
        f"network: preset {name} ({count:.1f}M parameters), as auto takes it for images of "
        f"{shape[1]}x{shape[2]}: {row.reason}; --model NAME chooses another"
    )


def _refuse_size(config: TrainConfig, height: int, width: int) -> NoReturn:
    near = [str(h) if h == w else f"{h}x{w}" for h, w in nearest_sizes(config.model, height, width)]
    sizes = " or ".join(near)
    if config.image_size is not None:
        raise ValueError(
            f"image_size is {config.image_size}, which model {config.model!r} can't halve often enough; "
            f"allowed near it: {sizes}"
        )
    raise ValueError(
        f"images of {height}x{width} can't be halved as often as model {config.model!r} does; allowed near "
        f"it: image_size {sizes}, with a fit such as resize_crop"
    )


def _refuse_name(name: str) -> NoReturn:
    known = (AUTO, *PRESETS)
    hint = did_you_mean(name, known)
    raise ValueError(f"preset {shown(name)} is unknown{hint}; allowed: {', '.join(known)}")


def make_model(config: TrainConfig, stream: ImageStream, scheduler: DDPMScheduler) -> nn.Module:
    """The preset for the stream's images, freshly initialised from the seed; or the network of a pipeline.

    Args:
        config: the run, whose `model` names a preset, a pipeline's folder or one on the Hub.
        stream: the run's images, which say the preset's size and channels.
        scheduler: the run's; a pipeline that was trained with another process is pointed out.

    Raises:
        ValueError: the name is of neither, or `dropout` is given for a network that has its own.
    """
    channels, height, width = stream.shape
    classes = None if stream.class_names is None else len(stream.class_names)
    if names_preset(config.model):
        if config.model not in PRESETS:
            _refuse_name(config.model)
        if (height, width) not in nearest_sizes(config.model, height, width):
            _refuse_size(config, height, width)
        torch.manual_seed(config.seed)
        size = height if height == width else (height, width)
        answers = channels * outputs(config.variance_type)
        return create_model(
            config.model,
            image_size=size,
            channels=channels,
            out_channels=answers,
            dropout=config.dropout,
            num_classes=classes,
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
    unet: Any = pipeline.unet
    if classes is None or num_classes(unet) is not None:
        return unet
    return add_classes(unet, classes)


def check_classes(model: nn.Module, stream: ImageStream) -> None:
    """Refuse a network that knows other classes than the images have.

    Raises:
        ValueError: it does; or it has classes and the images have none, or the other way round.
    """
    knows, names = num_classes(model), stream.class_names
    if knows == (None if names is None else len(names)):
        return
    if names is None:
        raise ValueError(f"the network has {knows} classes, and no label_column says the images'")
    what = "no classes" if knows is None else f"{knows} classes"
    own = " (a module of yours says it by an attribute num_classes)" * (knows is None)
    raise ValueError(f"the network has {what}, but the images have {len(names)}{own}")


def network_needs(config: TrainConfig, model: nn.Module | None = None) -> Needs:
    """Which images the run's network takes, as far as it is known before the network is made.

    A preset takes sides up to `LARGEST_SIDE` that it can halve, and a preset that was asked for is advised
    its own size at most. A pipeline's folder, or a caller's network of diffusers, takes what it was made for.

    Args:
        config: the run.
        model: the caller's network, if there is one.

    Raises:
        ValueError: `config.model` is a folder whose config can't be read.
    """
    known: Mapping[str, Any] = getattr(model, "config", {})
    preset = model is None and names_preset(config.model)
    if model is None and not preset and Path(config.model).is_dir():
        known = read_json(part_folder(Path(config.model), UNET) / CONFIG)
    if not preset:
        size, channels = known.get("sample_size"), known.get("in_channels")
        sides = list(size) if isinstance(size, list | tuple) else [size, size]
        if len(sides) == 2 and all(type(number) is int and number > 0 for number in (channels, *sides)):
            return Needs(shape=(channels, *sides))  # type: ignore[arg-type]
        return Needs()  # a network on the Hub, or one of another kind
    if config.model not in (AUTO, *PRESETS):
        _refuse_name(config.model)

    def halves(height: int, width: int) -> bool:
        return max(height, width) <= LARGEST_SIDE and takes(config.model, height, width)

    side = PRESETS.get(config.model, {}).get("sample_size")  # `AUTO` has none, nor has every network
    return Needs(halves, side) if isinstance(side, int) else Needs(halves)


def prepare_model(
    model: nn.Module, config: TrainConfig, stream: ImageStream, accelerator: Accelerator
) -> nn.Module:
    """The network as it is trained: on its device, with float32 master weights and the run's options.

    Args:
        model: the network, which is changed in place.
        config: the run.
        stream: the run's images.
        accelerator: the launch.

    Raises:
        ValueError: the network is for images, classes or outputs of another kind, or the config has an option
            that the network or the launch can't serve.
    """
    for name, weight in itertools.chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(weight):
            raise ValueError(
                f"the network's {shown(name, 60)} has no shape yet, as of a lazy layer; allowed: a network "
                "that was called once, model(x_t, t)"
            )
    check_classes(model, stream)
    if config.channels_last and accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("channels_last is True, which FSDP can't share out; allowed with it: false")
    if isinstance(model, tuple(NETWORKS.values())) and isinstance(model, ConfigMixin):
        answers, channels, size = (
            model.config[key] for key in ("out_channels", "in_channels", "sample_size")
        )
        wanted = (channels, *np.broadcast_to(np.array(size), 2).tolist())
        if wanted != stream.shape:
            raise ValueError(f"the network is for images {wanted} (C, H, W), these are {stream.shape}")
        if answers != (allowed := channels * outputs(config.variance_type)):
            raise ValueError(
                f"the network answers {answers} channels; allowed with variance_type "
                f"{config.variance_type!r}: {allowed}"
            )
    if accelerator.device.type == "cpu":  # others refuse at once what they don't have
        check_batch("batch_size", config.batch_size, model, stream.shape)
    model = model.float().to(accelerator.device).train()  # type: ignore[arg-type]
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.gradient_checkpointing:
        # All of diffusers' networks have the method, some of them only to refuse
        able = hasattr(model, "enable_gradient_checkpointing")
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
    """The learning rate from the step `step` on; it is a function of the step, so it has no state to save."""
    short = config.lr_scheduler != "constant" and config.lr_warmup_steps >= config.max_steps
    if short and process_state().is_main_process:
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
