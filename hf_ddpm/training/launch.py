"""The launch: devices, processes, precision and trackers, checked against what was asked for."""

import os
from pathlib import Path

from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, GradientAccumulationPlugin, parse_flag_from_env
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import get_device
from torch import nn

from hf_ddpm.config import TrainConfig
from hf_ddpm.publishing.background import BackgroundPush
from hf_ddpm.runtime.processes import as_launched, on_main_process


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
    # An earlier run in this process may have had another precision
    if is_initialized():
        AcceleratorState._reset_state()
    # The trainer accumulates gradients by itself. The plugin keeps the environment's variable
    # ACCELERATE_GRADIENT_ACCUMULATION_STEPS, which would overrule a number, out of it. Without `cpu`, two
    # processes on a CPU would each believe to be alone.
    with as_launched():
        accelerator = Accelerator(
            cpu=get_device() == "cpu",
            mixed_precision=config.mixed_precision,
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
    """Refuse a launch that isn't what was asked for, or can't be served.

    Raises:
        ValueError: the message names the mistake and what to do about it.
    """
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


def start_pushing(config: TrainConfig, model: nn.Module, accelerator: Accelerator) -> BackgroundPush | None:
    """What uploads the run's folder in the background: on process 0, if the config asks for it; else None.

    Raises:
        ValueError: a bad repository id or licence, or a network that no pipeline can be saved of.
    """
    if config.push_to_hub is None:
        return None
    if not isinstance(model, ModelMixin):
        raise ValueError(
            f"push_to_hub needs a diffusers network, this is {type(model).__name__}; allowed: a ModelMixin "
            "that hf_ddpm.models.register_network knows"
        )
    started = []

    def begin() -> None:
        options = {key: getattr(config, key) for key in ("license", "dataset_license", "dataset_id")}
        run, private = Path(config.output_dir), config.push_private
        started.append(BackgroundPush(run, str(config.push_to_hub), private=private, **options))

    on_main_process(accelerator, begin)
    return started[0] if started else None
