"""How a step t is chosen for an image: uniformly, or by how much each step contributes to the loss.

Both ways have the same methods, so that training knows no difference:

    draw(uniforms) → t       weights(t) → 1 / (T p_t)
    note(positions, t, present, losses) in each micro-step, and update(gather) at the end of the step

Importance sampling is that of Nichol & Dhariwal 2021, section 3.3:

    p_t ∝ √(mean of the last 10 L_t²), mixed with 0.001 of uniform;   the loss is divided by T p_t

The file knows numbers and devices. Nothing is read back from the device, whatever the batch holds.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_ddpm.data.order import EMPTY

HISTORY = 10  # losses remembered of each step
UNIFORM = 1e-3  # share of the uniform distribution


class UniformSteps:
    """Steps t ~ U{0, …, T − 1}: every loss counts once, and none is remembered.

    Args:
        num_steps: T.
        device: where t goes.
    """

    def __init__(self, num_steps: int, device: torch.device | str = "cpu"):
        self.num_steps, self._device = num_steps, device

    def draw(self, uniforms: Tensor) -> Tensor:
        """Steps for uniform numbers in [0, 1), (B,) float64 on the CPU; (B,) int64 on the device."""
        t = (uniforms * self.num_steps).long().clamp(max=self.num_steps - 1)
        return t.to(self._device, non_blocking=True)

    def weights(self, t: Tensor) -> Tensor:
        """1 / (T p_t), which is 1, float32, shape of t."""
        return torch.ones(t.shape, device=t.device)

    def note(self, positions: Sequence[int], t: Tensor, present: Tensor, losses: Tensor) -> None:
        """Nothing is noted."""

    def update(self, gather: Callable[[list[Tensor]], Any]) -> None:
        """Nothing is learned."""

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing is remembered."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing is remembered."""


class LossSecondMoment:
    """Steps drawn in proportion to the root mean square of the last ten losses at each.

    The distribution is uniform until every step has ten. Every process must `add` the same losses, which
    `update` sees to; then all draw from the same distribution.

    Args:
        num_steps: T.
        device: where the losses come from, and t goes.
    """

    def __init__(self, num_steps: int, device: torch.device | str = "cpu"):
        self.num_steps, self._device = num_steps, device
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        # One row more than steps: an empty slot's loss is written there, and never read
        self._losses = torch.zeros(num_steps + 1, HISTORY, dtype=torch.float64, device=device)
        self._counts = torch.zeros(num_steps + 1, dtype=torch.int64, device=device)
        self._set_probabilities()

    def draw(self, uniforms: Tensor) -> Tensor:
        """Steps for uniform numbers in [0, 1), (B,) float64 on the CPU: where they fall in the cumulated p_t.

        Returns:
            (B,) int64, on the device.
        """
        uniforms = uniforms.to(self._device, non_blocking=True)
        cumulative = self.probabilities.cumsum(0)
        found = torch.searchsorted(cumulative, uniforms * cumulative[-1], right=True)
        return found.clamp(max=self.num_steps - 1)

    def weights(self, t: Tensor) -> Tensor:
        """1 / (T p_t), float64, shape of t: with it a loss has the mean that it has under uniform t."""
        return 1 / (self.num_steps * self.probabilities[t])

    def note(self, positions: Sequence[int], t: Tensor, present: Tensor, losses: Tensor) -> None:
        """Keep the losses of a micro-step for the end of the step.

        Args:
            positions: of this process's images in the run, (B,).
            t: their steps, (B,).
            present: whether there is an image, (B,).
            losses: not weighted, (B,).
        """
        places = torch.tensor(positions).to(self._device, non_blocking=True)
        self._seen.append((torch.where(present, places, EMPTY), t, losses.detach()))

    def update(self, gather: Callable[[list[Tensor]], Any]) -> None:
        """Learn from what all processes noted in this step.

        Args:
            gather: joins each tensor of a list with those of the other processes; all call it together.
        """
        self.add(*gather([torch.cat(column) for column in zip(*self._seen, strict=True)]))
        self._seen.clear()

    def add(self, positions: Tensor, t: Tensor, losses: Tensor) -> None:
        """Remember the losses of a step.

        Args:
            positions: of the images in the run, (N,), which order them; `EMPTY` where there is no image.
            t: their steps, (N,).
            losses: not weighted, (N,).
        """
        t = torch.where(positions == EMPTY, self.num_steps, t)
        order = positions.argsort(stable=True)
        order = order[t[order].argsort(stable=True)]
        t, losses = t[order], losses[order].detach().to(self._losses)
        # The place of each loss among those of the same t, of which only the last ten are kept
        first, after = (torch.searchsorted(t, t, right=right) for right in (False, True))
        place = torch.arange(len(t), device=t.device) - first
        row = torch.where(place < after - first - HISTORY, self.num_steps, t)
        self._losses[row, (self._counts[t] + place) % HISTORY] = losses
        self._counts.index_add_(0, t, torch.ones_like(t))
        self._set_probabilities()

    def _set_probabilities(self) -> None:
        size = self._losses[:-1].square().mean(1).sqrt()
        learned = (1 - UNIFORM) * size / size.sum() + UNIFORM / self.num_steps
        ready = (self._counts[:-1] >= HISTORY).all() & (size.sum() > 0)
        self.probabilities = torch.where(ready, learned, 1 / self.num_steps)

    def state_dict(self) -> dict[str, Tensor]:
        """All that is remembered, on the CPU."""
        return {"losses": self._losses[:-1].cpu().clone(), "counts": self._counts[:-1].cpu().clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            ValueError: it is empty, or of another number of steps.
        """
        shapes = (self._losses[:-1].shape, self._counts[:-1].shape)
        if tuple(state[name].shape for name in ("losses", "counts") if name in state) != shapes:
            count = len(state.get("losses", ()))
            raise ValueError(f"the checkpoint has losses of {count} steps; allowed: of {self.num_steps}")
        self._losses[:-1], self._counts[:-1] = state["losses"], state["counts"]
        self._set_probabilities()
