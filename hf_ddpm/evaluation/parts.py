"""Work in numbered parts that survive a kill and are shared among processes: one safetensors file a part.

    OUT/.parts-<key>/00000.safetensors, 00001.safetensors, ...

The key is a hash of everything that a part's content depends on, so that only the same work finds a part
again. A part holds a sum of its content beside the key and its own number; one that is damaged or of another
place is named and made anew. Processes on several machines need a folder that all of them see. This file
knows options, files and tensors, not what the tensors mean.
"""

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.folders.layout import PARTS
from hf_ddpm.runtime.disk import load_tensors, save_tensors
from hf_ddpm.runtime.processes import process_state

logger = logging.getLogger(__name__)

# The options that are not in the key; all others are, so that a new option can't be forgotten there. No part
# depends on these, but for the model, of which `facts` has digests of the weights and the process instead of
# the name.
NOT_IN_KEY = frozenset({"model", "out", "overwrite", "compare_with", "reference"})

Work = Callable[[Sequence[int]], Generator[Mapping[str, Tensor], None, None]]


def pieces(count: int, size: int) -> list[range]:
    """The numbers 0..count−1 in pieces of `size`; the last one may be shorter."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


class Parts:
    """The parts of one piece of work.

    Args:
        folder: where the work's results go; it is made when missing.
        config: the evaluation. All of its options but `NOT_IN_KEY` are in the key.
        facts: plain values of everything else that the parts' content depends on, such as digests of the
            model's weights and of the images.

    Attributes:
        folder: of the parts.
    """

    def __init__(self, folder: Path, config: EvaluationConfig, facts: Mapping[str, Any]):
        options = {k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_IN_KEY}
        text = json.dumps({"options": options, "facts": dict(facts)}, sort_keys=True, default=str)
        self._key = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.folder = folder / f"{PARTS}{self._key}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def __contains__(self, number: int) -> bool:
        """Whether a part is there and whole; one that is damaged is named in a warning."""
        if not self._path(number).exists():
            return False
        try:
            self._load(number)
        except ValueError as error:
            logger.warning("%s; this part of the work is done anew", error)
            return False
        return True

    def absent(self, count: int) -> list[int]:
        """Those of the parts 0..count−1 that are this process's to make and are not there."""
        return [number for number in self._mine(count) if not self._path(number).exists()]

    def complete(self, count: int, work: Work) -> dict[str, Tensor]:
        """Make the parts 0..count−1 that are missing, shared among the processes, and load all of them.

        Args:
            count: how many parts there are.
            work: a generator function. It is called once, with the ascending numbers of the parts that this
                process has to make, and yields the tensors of each of them in this order.

        Returns:
            Each tensor, concatenated over all parts, on every process.

        Raises:
            OSError: a part can't be written.
            RuntimeError: a part is missing or damaged.
        """
        state = process_state()
        state.wait_for_everyone()
        missing = [number for number in self._mine(count) if number not in self]
        with closing(work(missing)) as made:
            for number, tensors in zip(missing, made, strict=True):
                self.save(number, tensors)
        state.wait_for_everyone()
        found = self.load(count)
        state.wait_for_everyone()
        return found

    def save(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a part, whole or not at all."""
        save_tensors(self._path(number), tensors, self._place(number))

    def load(self, count: int) -> dict[str, Tensor]:
        """The parts 0..count−1, each tensor concatenated over them.

        Raises:
            RuntimeError: a part is missing or damaged.
        """
        try:
            found = [self._load(number) for number in range(count)]
        except ValueError as error:
            raise RuntimeError(f"{error}; start again, in a folder that every process sees") from error
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

    @staticmethod
    def clear(folder: Path) -> None:
        """Delete the parts of finished work in this folder, and of work that was killed and never resumed."""
        for parts in folder.glob(f"{PARTS}*"):
            shutil.rmtree(parts, ignore_errors=True)

    def _mine(self, count: int) -> range:
        state = process_state()
        return range(state.process_index, count, state.num_processes)

    def _load(self, number: int) -> dict[str, Tensor]:
        """A part that is whole; ValueError for any other, with its path."""
        tensors, place = load_tensors(self._path(number))
        if place != self._place(number):
            raise ValueError(f"{str(self._path(number))!r} is another part, {place.get('part')!r}")
        return tensors

    def _place(self, number: int) -> dict[str, str]:
        """What a part says of itself."""
        return {"part": f"{number} of {self._key}"}

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"
