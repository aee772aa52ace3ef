"""Checkpoints: folders that are either whole or not there, and hold everything a run goes on from.

    RUN/checkpoints/step-00000500/   model.safetensors  ema.safetensors  optimizer.pt  state.json

A folder is written beside its place and renamed, so that a killed run leaves no half checkpoint under a good
name. Nothing here is unpickled: tensors are safetensors, and the optimizer's state is read with
`weights_only=True`. The file knows files; what the numbers mean is the trainer's.
"""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FOLDER = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """What a run goes on from.

    Attributes:
        step: optimizer steps done.
        model: weights of the network, by name.
        ema: averaged weights, by name.
        optimizer: `state_dict` of the optimizer.
        state: plain numbers and strings (JSON).
    """

    step: int
    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    state: Mapping[str, Any]


def save_checkpoint(run: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write the checkpoint under `run`/checkpoints, then drop all but the newest `keep` ones."""
    folder = run / "checkpoints" / f"step-{checkpoint.step:08d}"

    def fill(place: Path) -> None:
        save_file(_plain(checkpoint.model), place / "model.safetensors")
        save_file(_plain(checkpoint.ema), place / "ema.safetensors")
        torch.save(dict(checkpoint.optimizer), place / "optimizer.pt")
        (place / "state.json").write_text(
            json.dumps({"step": checkpoint.step, **checkpoint.state}, indent=2) + "\n"
        )

    write_folder(folder, fill)
    for _, old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    for left in folder.parent.glob(".step-*.tmp"):  # of a run killed while it saved
        shutil.rmtree(left, ignore_errors=True)
    return folder


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's folder.

    Raises:
        ValueError: it is not there, or a file in it is missing or damaged; the message names the file.
    """
    if not folder.is_dir():
        raise ValueError(f"checkpoint {str(folder)!r} does not exist")
    path = folder
    try:
        state = json.loads((path := folder / "state.json").read_text(encoding="utf-8"))
        if not isinstance(state, dict) or not isinstance(state.get("step"), int):
            raise ValueError("it has no step")
        model = load_file(path := folder / "model.safetensors")
        ema = load_file(path := folder / "ema.safetensors")
        optimizer = torch.load(path := folder / "optimizer.pt", map_location="cpu", weights_only=True)
        if not isinstance(optimizer, dict):
            raise ValueError(f"it holds {type(optimizer).__name__}, not dict")
        return Checkpoint(state.pop("step"), model, ema, optimizer, state)
    except Exception as error:  # what safetensors and torch.load raise on foreign bytes has no common class
        unsafe = isinstance(
            error, pickle.UnpicklingError
        )  # torch's own words advise to unpickle all the same
        reason = "it is not a file of tensors and plain values" if unsafe else _one_line(error)
        raise ValueError(f"checkpoint file {str(path)!r} is missing or damaged: {reason}") from error


def list_checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint under `run`/checkpoints, oldest first."""
    parent = run / "checkpoints"
    found = [(int(m[1]), path) for path in parent.glob("step-*") if (m := FOLDER.fullmatch(path.name))]
    return sorted(found)


def write_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Make `folder` hold what `fill(place)` writes: all of it, or, if that fails, what was there before."""
    with _scratch(folder.with_name(f".{folder.name}.tmp")) as place:
        fill(place)
        if folder.exists():
            shutil.rmtree(folder)
        place.rename(folder)


def update_folder(folder: Path, fill: Callable[[Path], object], last: str) -> None:
    """Like `write_folder`, for a folder that holds other files too: each written file replaces its namesake.

    Every replacement is atomic, the file `last` comes last, and a reader of files whose content did not
    change in between sees the old or the new ones, never half of one.
    """
    with _scratch(folder / ".new.tmp") as place:
        fill(place)
        files = [path.relative_to(place) for path in place.rglob("*") if path.is_file()]
        for file in sorted(files, key=lambda path: path.as_posix() == last):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(place / file, folder / file)


@contextmanager
def _scratch(place: Path) -> Iterator[Path]:
    """An empty folder that is gone afterwards; what a killed process left under its name goes first."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        yield place
    except SafetensorError as error:  # a full disk, in safetensors' words
        raise OSError(f"can't write {str(place)!r}: {_one_line(error)}") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU: safetensors refuses tensors that share memory, as tied weights do."""
    layout = torch.contiguous_format
    return {name: tensor.detach().cpu().clone(memory_format=layout) for name, tensor in tensors.items()}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
