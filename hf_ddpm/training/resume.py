"""From which checkpoint a run goes on, and whether it may.

Process 0 chooses, and warns of damaged checkpoints; all processes read the chosen one. Nothing is written
here. How it is put into the run's objects is said in run.py.
"""

import contextlib
import dataclasses
import importlib.metadata
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from hf_ddpm.config import GONE, OLD_DEFAULTS, TrainConfig
from hf_ddpm.data.fingerprint import compare_fingerprints
from hf_ddpm.data.stream import ImageStream
from hf_ddpm.folders.layout import INDEX
from hf_ddpm.models.presets import AUTO
from hf_ddpm.runtime.processes import on_main_process
from hf_ddpm.training.batches import check_new_images, open_stream
from hf_ddpm.training.checkpoint import Checkpoint, list_checkpoints, load_checkpoint
from hf_ddpm.training.classes import known_names
from hf_ddpm.training.network import network_needs

logger = logging.getLogger(__name__)

_LIBRARIES = ("torch", "diffusers", "numpy", "datasets", "pillow", "pyarrow")

# What may change when a run goes on; a difference in anything else is refused. The same data may have moved.
FREE_TO_CHANGE = {
    *(
        "dataset",
        "max_steps",
        "output_dir",
        "resume",
        "checkpoint_every",
        "keep_checkpoints",
        "log_every",
        "trackers",
    ),
    *("sample_every", "sample_num_images", "sample_steps", "num_workers", "max_loss"),
    *("push_to_hub", "push_every", "push_private", "license", "dataset_license", "dataset_id"),
    *("evaluate_every", "evaluate_split", "evaluate_num_images", "evaluate_num_evals"),
}


def find_checkpoint(config: TrainConfig, run: Path, accelerator: Accelerator) -> Checkpoint | None:
    """The checkpoint to go on from, None for a fresh start; all processes call it together.

    A damaged checkpoint is named in a warning, and the one before it is taken, unless `config.resume` names
    the damaged one. If `config.resume` names a checkpoint that the run in the folder
    began with, the newest checkpoint of that run is taken, so that the same command goes on.

    Args:
        config: the run.
        run: its folder.
        accelerator: the processes.

    Raises:
        ValueError: no such checkpoint, none that is whole, a folder that holds something else, or a config
            that differs from the run's.
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
    if not found and (run / INDEX).exists():
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

    damaged: list[ValueError] = []
    for _, folder in reversed(found):
        try:
            checkpoint = load_checkpoint(folder)
        except ValueError as error:
            damaged.append(error)
            continue
        _check_config(config, folder, checkpoint.state)
        for error in damaged:
            logger.warning("%s; going on from %s", error, folder.name)
        return folder, checkpoint
    if damaged:
        raise ValueError(f"{damaged[0]}; none of the {len(damaged)} checkpoints is whole")
    return None


def _began_there(found: list[tuple[int, Path]], named: str) -> bool:
    """Whether the run whose checkpoints these are began with the checkpoint of this name."""
    for _, folder in reversed(found):
        with contextlib.suppress(ValueError):
            return load_checkpoint(folder).state.get("config", {}).get("resume") == named
    return False


def _check_config(config: TrainConfig, folder: Path, state: Any) -> None:
    if gone := [key for key in GONE if key in state.get("config", {})]:
        raise ValueError(
            f"checkpoint {str(folder)!r} is of a run with {gone[0]}, whose order of images is gone; allowed: "
            "another output_dir, where --model with this run's folder goes on from its weights"
        )
    # An option that is newer than the checkpoint had the effect of its default then
    was = dataclasses.asdict(TrainConfig()) | OLD_DEFAULTS | state.get("config", {})
    now = dataclasses.asdict(config)
    if config.model == AUTO:  # goes on with the network that the run began with
        now["model"] = was["model"]
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


def open_data(
    config: TrainConfig,
    state: Mapping[str, Any],
    accelerator: Accelerator,
    model: nn.Module | None = None,
) -> tuple[ImageStream, dict[str, Any]]:
    """The run's images, which are those that it began with; all processes call it together.

    Args:
        config: the run.
        state: of the checkpoint that the run goes on from; empty for a new run.
        accelerator: the processes.
        model: the caller's network, if there is one.

    Returns:
        The images, and their fingerprint.

    Raises:
        ValueError: data that can't be read on some process, that differ between processes, that a new run
            would need other flags for, or that have changed since the run began: positions would hold other
            images.
    """
    stream, error, facts, refused = None, None, None, None

    def check(stream: ImageStream) -> None:
        nonlocal refused
        if accelerator.is_main_process and not state:
            try:
                check_new_images(stream, config, network_needs(config, model))
            except ValueError as caught:
                refused = str(caught)
                raise

    try:
        stream = open_stream(config, check, known_names(config, state))
        facts = stream.shape, stream.row_counts
    except ValueError as caught:
        error = caught
    told = gather_object([(None if error is None else str(error), facts, refused)])
    if told[0][2] is not None:  # process 0 has looked at all images, and the others hear of it
        raise ValueError(told[0][2])
    if error is not None:
        raise error
    for rank, (failure, its, _) in enumerate(told):
        if failure is not None:
            raise ValueError(f"process {rank}: {failure}")
        if its != told[0][1]:
            raise ValueError(
                f"process {rank} sees {sum(its[1])} images in {len(its[1])} shards, the first of (C, H, W) = "
                f"{its[0]}, process 0 {sum(told[0][1][1])} in {len(told[0][1][1])}, the first of "
                f"{told[0][1][0]}; allowed: the same data on all machines"
            )
    assert stream is not None

    def compared() -> dict[str, Any]:
        now = stream.fingerprint()
        check_data(now, state)
        _compare_versions(state)
        return now

    return stream, on_main_process(accelerator, compared)


def check_data(now: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Refuse a data set that has changed since the run began.

    Args:
        now: its fingerprint.
        state: of the checkpoint that the run goes on from; empty for a new run.

    Raises:
        ValueError: the message names what differs first.
    """
    if not state:
        return
    try:
        differs = compare_fingerprints(state["data"], now)
    except (KeyError, TypeError, ValueError):
        differs = "the checkpoint doesn't say what they were"
    if differs is not None:
        raise ValueError(
            f"the images are not those that the run began with ({differs[:120]}); allowed: the same data, or "
            "another output_dir, where --model with this run's folder goes on from its weights"
        )


def versions() -> dict[str, str]:
    """The libraries that a run's numbers depend on, and their versions."""
    return {name: importlib.metadata.version(name) for name in _LIBRARIES}


def _compare_versions(state: Mapping[str, Any]) -> None:
    was, now = state.get("versions", {}), versions()
    differ = [f"{name} {was[name]} -> {now[name]}" for name in now if was.get(name, now[name]) != now[name]]
    if differ:
        logger.warning("the run goes on with other libraries, and so not bit for bit: %s", ", ".join(differ))


def check_objective(name: str | None, state: Mapping[str, Any]) -> None:
    """Refuse to go on with another objective than the run began with, where a caller handed one over.

    Args:
        name: of the caller's objective; None if it is the config's.
        state: of the checkpoint that the run goes on from; empty for a new run.

    Raises:
        ValueError: the names differ.
    """
    was = state.get("own_objective")
    if state and was != name:
        raise ValueError(
            f"the objective is {name or 'the one of the config'}, the run began with "
            f"{was or 'the one of the config'}; allowed: the same, or another output_dir"
        )
