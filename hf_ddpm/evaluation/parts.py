"""Work in numbered parts that survive a kill and are shared among processes: one safetensors file a part.

    OUT/.parts-<key>/00000.safetensors, 00001.safetensors, ...

The key is a hash of everything that a part's content depends on, so that a part is only found again by the
same work. Processes on several machines need a folder that all of them see. The file knows files and
tensors, not what they mean.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


class Parts:
    """The parts of one piece of work.

    Args:
        folder: where the work's results go.
        settings: plain values that the parts' content depends on.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        text = json.dumps(settings, sort_keys=True, default=str)
        self._folder = folder / f".parts-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        self._folder.mkdir(parents=True, exist_ok=True)

    def __contains__(self, number: int) -> bool:
        return self._path(number).exists()

    def save(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a part, whole or not at all."""
        partial = self._path(number).with_suffix(f".{os.getpid()}.tmp")
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        except SafetensorError as error:  # a full disk, in safetensors' words
            partial.unlink(missing_ok=True)
            raise OSError(f"can't write {str(partial)!r}: {error}") from error
        os.replace(partial, self._path(number))

    def load(self, count: int) -> dict[str, Tensor]:
        """The parts 0..count−1, each tensor concatenated over them.

        Raises:
            RuntimeError: a part is missing or damaged.
        """
        found: list[dict[str, Tensor]] = []
        for path in map(self._path, range(count)):
            try:
                found.append(load_file(path))
            except (OSError, SafetensorError) as error:
                raise RuntimeError(
                    f"{path} is missing or damaged ({error}): delete it and start again, in a folder that "
                    "every process sees"
                ) from error
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

    @staticmethod
    def clear(folder: Path) -> None:
        """Delete the parts of finished work in this folder, and of work that was killed and never resumed."""
        for parts in folder.glob(".parts-*"):
            shutil.rmtree(parts, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:05d}.safetensors"
