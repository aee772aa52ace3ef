"""The steps that a sampler visits: the chain of a tensor of steps, which may be assigned or changed.

This module knows steps, their values and their places, and nothing of what is done at a step.
"""

from bisect import bisect_left
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.checks import described
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.shown import count, summary


@dataclass(frozen=True, eq=False)
class Visited:
    """The chain of a tensor of steps, and what the tensor held when the chain was made. `visit` makes it.

    Attributes:
        steps: the tensor itself, (K,).
        values: what it held, (K,), on the CPU.
        version: how often torch had changed it in place, or None where torch doesn't count.
        chain: the process that visits these steps.
        given: the steps as a list, in their order.
        ascending: the same, sorted: `chain.timesteps`.
    """

    steps: Tensor
    values: Tensor
    version: int | None
    chain: DiffusionProcess
    given: list[int]
    ascending: list[int]

    def __repr__(self) -> str:
        return summary(self, lambda: [count(len(self.given), "step"), f"{self.given[0]}..{self.given[-1]}"])

    def holds(self, steps: Any) -> bool:
        """Whether these are the same steps still. A tensor on a device is not read: torch counts changes."""
        if steps is not self.steps:
            return False
        if steps.device.type == "cpu":
            return torch.equal(steps, self.values)
        return _version(steps) == self.version

    def index(self, step: int) -> int:
        """The place of a step in the chain.

        Raises:
            ValueError: it is not in the chain.
        """
        place = bisect_left(self.ascending, step)
        if place == len(self.ascending) or self.ascending[place] != step:
            span = f"{len(self.ascending)} steps in {self.ascending[0]}..{self.ascending[-1]}"
            raise ValueError(f"timestep {step} is not in the chain; allowed: its {span}")
        return place


def visit(process: DiffusionProcess, steps: Any, values: Tensor | None = None) -> Visited:
    """The chain that visits the given steps of a process.

    Args:
        process: the full process.
        steps: a tensor of whole numbers, (K,), in any order.
        values: the same on the CPU; by default they are read, which waits for the device once.

    Raises:
        ValueError: it is something else, or has no step, a repeated one, or one that the process lacks.
    """
    if not isinstance(steps, Tensor) or steps.ndim != 1 or not is_whole(steps):
        raise ValueError(f"timesteps is {described(steps)}; allowed: a tensor of shape (K,), int64")
    values = steps.detach().cpu() if values is None else values
    chain = process.respaced(values)
    if len(chain) == len(process):
        chain = process
    return Visited(steps, values.clone(), _version(steps), chain, values.tolist(), chain.timesteps.tolist())


def _version(steps: Tensor) -> int | None:
    return None if steps.is_inference() else steps._version


def place_of(element: Tensor, steps: Tensor) -> int | None:
    """Where in `steps` an element of it stands, by its address; None if it is none, or torch knows none."""
    if element.dtype != steps.dtype or element.device != steps.device or element.device.type == "meta":
        return None
    # An element is a view: its address tells its place, and so its value
    width = steps.element_size() * max(steps.stride(0), 1)  # 0 if expanded
    place, inside = divmod(element.data_ptr() - steps.data_ptr(), width)
    return place if inside == 0 and 0 <= place < steps.shape[0] else None


def chosen_steps(timesteps: Any) -> Tensor:
    """Steps that somebody chose one by one, in a list, an array or a tensor, as a tensor (K,), int64.

    Raises:
        ValueError: they are not whole numbers in descending order.
    """
    try:
        array = np.array(timesteps.detach().cpu() if isinstance(timesteps, Tensor) else timesteps)
    except (TypeError, ValueError, RuntimeError):
        array = np.array(None)
    rule = "allowed: whole numbers in strictly descending order"
    if array.size and (array.ndim != 1 or array.dtype.kind not in "iu"):
        raise ValueError(f"timesteps is {described(timesteps)}; {rule}")
    rises = (np.diff(array) >= 0).nonzero()[0] if array.size else array
    if rises.size:
        place = int(rises[0])
        raise ValueError(f"timesteps has {array[place + 1]} after {array[place]}; {rule}")
    return torch.from_numpy(array.astype(np.int64))


def whole_number(timestep: Any) -> int:
    """A step that the host knows, as an int; a float such as 3.0 is one.

    Raises:
        ValueError: it is no whole number.
    """
    if not is_number(timestep) or not float(timestep).is_integer():
        raise ValueError(
            f"timestep is {described(timestep)}; allowed: whole numbers, the steps of self.timesteps"
        )
    return int(timestep)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a real number; True and False are none."""
    kind = type(value)
    return kind is int or kind is float or (isinstance(value, Real) and kind is not bool)


def is_whole(steps: Tensor) -> bool:
    """Whether a tensor's dtype is one of whole numbers."""
    return not (steps.is_floating_point() or steps.is_complex() or steps.dtype == torch.bool)
