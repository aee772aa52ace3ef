"""Checkpoints: folders that are either whole or not there, and hold everything a run goes on from.

    RUN/checkpoints/step-00000500/   model.safetensors  ema_0.9999.safetensors  optimizer.pt  state.json
                                     SHA256SUMS

A folder is written beside its place, forced to the disk and renamed, so that a killed run or machine leaves
no half checkpoint under a good name. What is read is compared with SHA256SUMS first (`sha256sum -c` reads it
too). Nothing here is unpickled: tensors are safetensors, and the optimizer's state is read with
`weights_only=True`. The file knows files; what the tensors in them mean is said in run.py.
"""

import hashlib
import json
import logging
import math
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_ddpm.folders.layout import CHECKPOINTS, STEP, STEPS, step_name
from hf_ddpm.runtime.disk import free_path, named, write_folder
from hf_ddpm.runtime.messages import one_line
from hf_ddpm.runtime.untrusted import check_regular
from hf_ddpm.shown import fields_line

logger = logging.getLogger(__name__)

SUMS = "SHA256SUMS"
SUM = re.compile(r"([0-9a-f]{64})  ([\w.-]+)")
EMA = re.compile(r"ema_(.+)\.safetensors")


def _count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < 2**63


def _numbers(value: Any) -> bool:
    """Whether it is a finite number, or a list of such lists."""
    if isinstance(value, list):
        return all(map(_numbers, value))
    return type(value) in (int, float) and math.isfinite(value)


# What the entries of a state must be, those that say how a run goes on
STATE: Mapping[str, Callable[[Any], bool]] = {
    "step": _count,
    "num_processes": lambda value: _count(value, 1),
    "images_per_step": lambda value: _count(value, 1),
    "skipped": _count,
    "skipped_rows": lambda value: isinstance(value, list) and all(map(_count, value)),
    "pending": lambda value: isinstance(value, list) and _numbers(value),
    "data": lambda value: isinstance(value, dict),
    "versions": lambda value: isinstance(value, dict),
    "config": lambda value: isinstance(value, dict),
    "log": lambda value: (
        isinstance(value, dict) and _count(value.get("lines")) and isinstance(value.get("sha256"), str)
    ),
    "own_objective": lambda value: isinstance(value, str),
}


@dataclass(frozen=True)
class Checkpoint:
    """What a run goes on from.

    Attributes:
        step: optimizer steps done.
        model: weights of the network, by name.
        averages: for each decay, as text, the averaged weights by name.
        optimizer: states of the optimizer and of what goes with it.
        state: plain numbers and strings (JSON).
    """

    step: int
    model: Mapping[str, Tensor]
    averages: Mapping[str, Mapping[str, Tensor]]
    optimizer: Mapping[str, Any]
    state: Mapping[str, Any]

    __repr__ = fields_line


def save_checkpoint(run: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint; when it is safe on the disk, delete all but the newest `keep` ones.

    Args:
        run: the run's folder.
        checkpoint: what is saved.
        keep: how many checkpoints stay, at least 1.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: it can't be written, and is not there; those from before stand.
    """
    folder = run / CHECKPOINTS / step_name(checkpoint.step)

    def fill(place: Path) -> None:
        with named(place / "model.safetensors") as file:
            save_file(_plain(checkpoint.model), file)
        for decay, average in checkpoint.averages.items():
            with named(place / f"ema_{decay}.safetensors") as file:
                save_file(_plain(average), file)
        # Given a path instead of a stream, torch.save would hide what the system said
        with named(place / "optimizer.pt") as file, file.open("wb") as stream:
            torch.save(dict(checkpoint.optimizer), stream)
        with named(place / "state.json") as file:
            state = {"step": checkpoint.step, **checkpoint.state}
            file.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        with named(place / SUMS) as file:
            sums = [f"{_sha256(path)}  {path.name}\n" for path in sorted(place.iterdir()) if path != file]
            file.write_text("".join(sums), encoding="utf-8")

    write_folder(folder, fill)
    # What a run left that was killed while it wrote or deleted a checkpoint
    for left in folder.parent.glob(f".{STEPS}"):
        shutil.rmtree(left, ignore_errors=True)
    # Renamed before it is deleted, so that a kill in between leaves no half of a checkpoint
    for _, old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old.rename(old.with_name(f".{old.name}.old")))
    return folder


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's folder.

    Raises:
        ValueError: the folder is not there, or a file in it is missing or damaged; the message names it.
    """
    if not folder.is_dir():
        raise ValueError(f"checkpoint {str(folder)!r} does not exist")
    path = folder / SUMS
    try:
        check_regular(path)
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        matches = [SUM.fullmatch(line.removesuffix("\n")) for line in lines]
        if not all(matches) or not all(line.endswith("\n") for line in lines):
            raise ValueError("it is not a list of sums and names")
        sums = {match[2]: match[1] for match in matches if match}
        for name in ("model.safetensors", "optimizer.pt", "state.json", *sums):
            if name not in sums:
                path = folder / SUMS
                raise ValueError(f"it lacks {name}")
            check_regular(path := folder / name)  # a pipe or a device would never end
            if _sha256(path) != sums[name]:
                raise ValueError(f"its content is not what {SUMS} says")
        state = json.loads((path := folder / "state.json").read_text(encoding="utf-8"))
        if not isinstance(state, dict) or "step" not in state:
            raise ValueError("it has no step")
        for key, allowed in STATE.items():
            if key in state and not allowed(state[key]):
                raise ValueError(f"its {key} is {str(state[key])[:60]!r}")
        if (name := STEP.fullmatch(folder.name)) and int(name[1]) != state["step"]:
            raise ValueError(f"its step is {state['step']}, which is not the folder's")
        model = load_file(path := folder / "model.safetensors")
        averages = {m[1]: load_file(path := folder / m[0]) for m in map(EMA.fullmatch, sums) if m}
        optimizer = torch.load(path := folder / "optimizer.pt", map_location="cpu", weights_only=True)
        if not isinstance(optimizer, dict):
            raise ValueError(f"it holds {type(optimizer).__name__}, not dict")
        return Checkpoint(state.pop("step"), model, averages, optimizer, state)
    # What safetensors and torch.load raise on foreign bytes has no common class
    except Exception as error:
        # torch's own words on such a file advise to unpickle it all the same
        unsafe = isinstance(error, pickle.UnpicklingError)
        reason = "it is not a file of tensors and plain values" if unsafe else one_line(error)
        raise ValueError(f"checkpoint file {str(path)!r} is missing or damaged: {reason}") from error


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that it can be examined and is never chosen; returns its new path."""
    return folder.rename(free_path(folder.with_name(f"damaged-{folder.name}")))


def set_newer_aside(run: Path, step: int) -> None:
    """Set every checkpoint past a step aside, where a run goes on from that one: they are damaged."""
    for found, folder in list_checkpoints(run):
        if found > step:
            logger.warning("damaged checkpoint %s set aside as %s", folder.name, set_aside(folder).name)


def list_checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint under `run`/checkpoints, oldest first."""
    paths = (run / CHECKPOINTS).glob(STEPS)
    return sorted((int(m[1]), path) for path in paths if (m := STEP.fullmatch(path.name)))


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU: safetensors refuses tensors that share memory, as tied weights do."""
    layout = torch.contiguous_format
    return {name: tensor.detach().cpu().clone(memory_format=layout) for name, tensor in tensors.items()}


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
