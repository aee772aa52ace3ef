"""Checkpoints: folders that are either whole or not there, and hold everything a run goes on from.

    RUN/checkpoints/step-00000500/   model.safetensors  ema_0.9999.safetensors  optimizer.pt  state.json
                                     SHA256SUMS

A folder is written beside its place, forced to the disk and renamed, so that a killed run or machine leaves
no half checkpoint under a good name. What is read is compared with SHA256SUMS first (`sha256sum -c` reads it
too). Nothing here is unpickled: tensors are safetensors, and the optimizer's state is read with
`weights_only=True`. The file knows files; what the numbers mean is the trainer's.
"""

import hashlib
import json
import logging
import pickle
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_ddpm.runtime.disk import free_path, named, write_folder

try:
    import fcntl
except ModuleNotFoundError:  # Windows: nobody is kept out
    fcntl = None

logger = logging.getLogger(__name__)

FOLDER = re.compile(r"step-(\d{8,})")
SUMS = "SHA256SUMS"
SUM = re.compile(r"([0-9a-f]{64})  ([\w.-]+)")
EMA = re.compile(r"ema_(.+)\.safetensors")


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


class RunLock:
    """At most one training in a run's folder: held from `acquire` to `release`, or to the process's end."""

    def __init__(self, run: Path):
        self.run, self._file = run, None

    def acquire(self) -> None:
        """Make the folder, and hold it.

        Raises:
            ValueError: it can't be written, or another training holds it.
        """
        try:
            self.run.mkdir(parents=True, exist_ok=True)
            self._file = (self.run / ".lock").open("a")
        except OSError as error:
            raise ValueError(f"output_dir {str(self.run)!r} can't be written: {error.strerror}") from None
        if fcntl is None:
            return
        try:
            fcntl.lockf(
                self._file, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # which data loaders' processes don't inherit
        except (BlockingIOError, PermissionError):
            raise ValueError(f"output_dir {str(self.run)!r} is in use by another training") from None
        except OSError as error:
            logger.warning("%s has no locks (%s): start no second training there", self.run, error.strerror)

    def release(self) -> None:
        """Let the next one have it."""
        if self._file is not None:
            self._file.close()


def save_checkpoint(run: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write the checkpoint under `run`/checkpoints; when it is safe, drop all but the newest `keep` ones."""
    folder = run / "checkpoints" / f"step-{checkpoint.step:08d}"

    def fill(place: Path) -> None:
        with named(place / "model.safetensors") as file:
            save_file(_plain(checkpoint.model), file)
        for decay, average in checkpoint.averages.items():
            with named(place / f"ema_{decay}.safetensors") as file:
                save_file(_plain(average), file)
        with named(place / "optimizer.pt") as file, file.open("wb") as stream:
            torch.save(dict(checkpoint.optimizer), stream)  # which, given a path, hides what the system said
        with named(place / "state.json") as file:
            state = {"step": checkpoint.step, **checkpoint.state}
            file.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        with named(place / SUMS) as file:
            sums = [f"{_sha256(path)}  {path.name}\n" for path in sorted(place.iterdir()) if path != file]
            file.write_text("".join(sums), encoding="utf-8")

    write_folder(folder, fill)
    for left in folder.parent.glob(".step-*"):  # of a run killed while it saved or dropped one
        shutil.rmtree(left, ignore_errors=True)
    for _, old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old.rename(old.with_name(f".{old.name}.old")))  # a kill leaves no half of it
    return folder


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's folder.

    Raises:
        ValueError: it is not there, or a file in it is missing or damaged; the message names the file.
    """
    if not folder.is_dir():
        raise ValueError(f"checkpoint {str(folder)!r} does not exist")
    path = folder / SUMS
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        matches = [SUM.fullmatch(line.removesuffix("\n")) for line in lines]
        if not all(matches) or not all(line.endswith("\n") for line in lines):
            raise ValueError("it is not a list of sums and names")
        sums = {match[2]: match[1] for match in matches if match}
        for name in ("model.safetensors", "optimizer.pt", "state.json", *sums):
            if name not in sums:
                path = folder / SUMS
                raise ValueError(f"it lacks {name}")
            if _sha256(path := folder / name) != sums[name]:
                raise ValueError(f"its content is not what {SUMS} says")
        state = json.loads((path := folder / "state.json").read_text(encoding="utf-8"))
        if not isinstance(state, dict) or not isinstance(state.get("step"), int):
            raise ValueError("it has no step")
        model = load_file(path := folder / "model.safetensors")
        averages = {m[1]: load_file(path := folder / m[0]) for m in map(EMA.fullmatch, sums) if m}
        optimizer = torch.load(path := folder / "optimizer.pt", map_location="cpu", weights_only=True)
        if not isinstance(optimizer, dict):
            raise ValueError(f"it holds {type(optimizer).__name__}, not dict")
        return Checkpoint(state.pop("step"), model, averages, optimizer, state)
    except Exception as error:  # what safetensors and torch.load raise on foreign bytes has no common class
        unsafe = isinstance(
            error, pickle.UnpicklingError
        )  # torch's own words advise to unpickle all the same
        reason = "it is not a file of tensors and plain values" if unsafe else _one_line(error)
        raise ValueError(f"checkpoint file {str(path)!r} is missing or damaged: {reason}") from error


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that it is kept for a look and never chosen; returns its new name."""
    return folder.rename(free_path(folder.with_name(f"damaged-{folder.name}")))


def list_checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint under `run`/checkpoints, oldest first."""
    parent = run / "checkpoints"
    found = [(int(m[1]), path) for path in parent.glob("step-*") if (m := FOLDER.fullmatch(path.name))]
    return sorted(found)


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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
