"""How a run goes on: from which checkpoint, whether it may, and putting it into the run's objects.

Process 0 chooses, as what it finds may change what the others would. All of them read the chosen one.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from hf_ddpm.config import TrainConfig
from hf_ddpm.runtime.processes import on_main_process
from hf_ddpm.training.batches import StepShare
from hf_ddpm.training.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, set_aside
from hf_ddpm.training.importance import LossSecondMoment
from hf_ddpm.training.sharding import restore_model, restore_optimizer

logger = logging.getLogger(__name__)

# What may change when a run goes on; a difference in anything else is refused.
FREE_TO_CHANGE = {
    *("max_steps", "output_dir", "resume", "checkpoint_every", "keep_checkpoints", "log_every", "trackers"),
    *("sample_every", "sample_num_images", "sample_steps", "num_workers", "max_loss"),
    *("push_to_hub", "push_every", "push_private", "license", "dataset_license", "dataset_id"),
    *("evaluate_every", "evaluate_split", "evaluate_num_images", "evaluate_num_evals"),
}


def find_checkpoint(config: TrainConfig, run: Path, accelerator: Accelerator) -> Checkpoint | None:
    """The checkpoint to go on from, None for a fresh start; all processes call it together.

    A damaged one is named in a warning and set aside, and the one before it is taken, unless `config.resume`
    names it. A run in the folder that itself went on from the named one just goes on.

    Raises:
        ValueError: no such checkpoint, a damaged one without another, a folder that holds something else, or
            a config that differs from the run's.
    """
    choice: tuple[Path, Checkpoint] | None = None

    def choose() -> str | None:
        nonlocal choice
        choice = _choose(config, run)
        return choice and str(choice[0])

    folder = on_main_process(accelerator, choose)
    if folder is None or choice is not None:
        return choice and choice[1]
    try:
        return load_checkpoint(Path(folder))
    except ValueError as error:
        raise ValueError(
            f"process {accelerator.process_index} can't read what process 0 could, in a folder that all must "
            f"see: {error}"
        ) from error


def _choose(config: TrainConfig, run: Path) -> tuple[Path, Checkpoint] | None:
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
    if named and not _began_there(found, config.resume):
        folder = Path(config.resume)
        _check_config(config, folder, (checkpoint := load_checkpoint(folder)).state)
        if found and not folder.samefile(found[-1][1]):
            raise ValueError(
                f"resume is {config.resume!r}, but output_dir {str(run)!r} holds a run at step "
                f"{found[-1][0]}; allowed: its newest checkpoint, or an output_dir without a run"
            )
        return folder, checkpoint

    damaged: list[tuple[Path, ValueError]] = []
    for _, folder in reversed(found):
        try:
            checkpoint = load_checkpoint(folder)
        except ValueError as error:
            damaged.append((folder, error))
            continue
        _check_config(config, folder, checkpoint.state)
        for bad, error in damaged:
            logger.warning("%s; set aside as %s; going on from %s", error, set_aside(bad).name, folder.name)
        return folder, checkpoint
    if damaged:
        raise ValueError(f"{damaged[0][1]}; none of the {len(damaged)} checkpoints is whole")
    return None


def _began_there(found: list[tuple[int, Path]], named: str) -> bool:
    """Whether the newest whole checkpoint is of a run that itself went on from the named one."""
    for _, folder in reversed(found):
        with contextlib.suppress(ValueError):
            return load_checkpoint(folder).state.get("config", {}).get("resume") == named
    return False


def _check_config(config: TrainConfig, folder: Path, state: Any) -> None:
    # What an older version did not know had its default's effect
    was, now = dataclasses.asdict(TrainConfig()) | state.get("config", {}), dataclasses.asdict(config)
    changed = [key for key in now if key not in FREE_TO_CHANGE and was.get(key) != now[key]]
    if changed:
        what = ", ".join(f"{key} {was.get(key)!r} -> {now[key]!r}" for key in changed)
        raise ValueError(
            f"checkpoint {str(folder)!r} is of another run ({what}); allowed: the same config, or another "
            "output_dir"
        )
    if config.lr_scheduler in ("linear", "cosine") and was["max_steps"] != now["max_steps"]:
        logger.warning(
            "max_steps %d -> %d moves the end of the %s schedule: the learning rate jumps",
            was["max_steps"],
            now["max_steps"],
            config.lr_scheduler,
        )


def share_steps(config: TrainConfig, accelerator: Accelerator, state: Mapping[str, Any]) -> StepShare:
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


def check_rows(counts: list[int], state: Mapping[str, Any]) -> None:
    """Refuse a data set that has changed since: a position would be another image's."""
    was = state.get("row_counts", counts)
    if was != counts:
        raise ValueError(
            f"the data set has {sum(counts)} rows in shards of {_some(counts)}, the run began with "
            f"{sum(was)} in shards of {_some(was)}; allowed: the same data, or another output_dir"
        )


def _some(counts: list[int]) -> str:
    return ", ".join(map(str, counts[:8])) + (", ..." if len(counts) > 8 else "")


def restore(
    start: Checkpoint,
    unet: nn.Module,
    averages: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    t_sampler: LossSecondMoment | None,
) -> None:
    """Put a checkpoint into the objects of a run; all processes call it together.

    Raises:
        ValueError: it is of another network, or lacks the losses that steps are drawn by.
    """
    if t_sampler is not None and "t_sampler" not in start.optimizer:
        raise ValueError(
            f"the checkpoint at step {start.step} has no losses to draw steps by; allowed: one of a run with "
            "t_sampler 'importance'"
        )
    try:
        restore_model(unet, start.model)
        for name, average in averages.items():
            restore_model(average, start.averages[name])
        restore_optimizer(unet, optimizer, start.optimizer["optimizer"])
        if scaler is not None:
            scaler.load_state_dict(start.optimizer["scaler"])
        if t_sampler is not None:
            t_sampler.load_state_dict(start.optimizer["t_sampler"])
    except (RuntimeError, ValueError, KeyError) as error:  # torch lists every tensor, on a line each
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the checkpoint at step {start.step} is of another network: {reason}") from error
