"""Steps t drawn in proportion to how much each contributes: Nichol & Dhariwal 2021, section 3.3.

    p_t ∝ √(mean of the last 10 L_t²), mixed with 0.001 of uniform;   the loss is divided by T p_t

It knows numbers and devices. All of it stays on the device: nothing is read back, whatever the batch holds.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_ddpm.data.order import EMPTY

HISTORY = 10  # losses remembered of each step
UNIFORM = 1e-3  # share of the uniform distribution


class LossSecondMoment:
    """The losses last seen at each step, and what they make of a uniform number. Uniform until all have ten.

    Every process must `add` the same losses; then all draw from the same distribution.

    Args:
        num_steps: T.
        device: where the losses come from.
    """

    def __init__(self, num_steps: int, device: torch.device | str = "cpu"):
        self.num_steps = num_steps
        # One row more, for what is no loss: its place is written and never read
        self._losses = torch.zeros(num_steps + 1, HISTORY, dtype=torch.float64, device=device)
        self._counts = torch.zeros(num_steps + 1, dtype=torch.int64, device=device)
        self._update()

    def draw(self, uniforms: Tensor) -> Tensor:
        """Steps for uniform numbers in [0, 1), (B,) float64: where they fall in the cumulated p_t."""
        cumulative = self.probabilities.cumsum(0)
        found = torch.searchsorted(cumulative, uniforms * cumulative[-1], right=True)
        return found.clamp(max=self.num_steps - 1)

    def weights(self, t: Tensor) -> Tensor:
        """1 / (T p_t), float64, shape of t: with it a loss has the mean that it has under uniform t."""
        return 1 / (self.num_steps * self.probabilities[t])

    def add(self, positions: Tensor, t: Tensor, losses: Tensor) -> None:
        """Remember the losses of a step.

        Args:
            positions: of the images in the run, (N,), which give their order; `EMPTY` where there is none.
            t: their steps, (N,).
            losses: not weighted, (N,).
        """
        t = torch.where(positions == EMPTY, self.num_steps, t)
        order = positions.argsort(stable=True)
        order = order[t[order].argsort(stable=True)]
        t, losses = t[order], losses[order].detach().to(self._losses)
        # Of the losses of one step, the place of each among them and their number
        first, after = (torch.searchsorted(t, t, right=right) for right in (False, True))
        place = torch.arange(len(t), device=t.device) - first
        row = torch.where(place < after - first - HISTORY, self.num_steps, t)  # ten newer ones come
        self._losses[row, (self._counts[t] + place) % HISTORY] = losses
        self._counts.index_add_(0, t, torch.ones_like(t))
        self._update()

    def _update(self) -> None:
        size = self._losses[:-1].square().mean(1).sqrt()
        learned = (1 - UNIFORM) * size / size.sum() + UNIFORM / self.num_steps
        ready = (self._counts[:-1] >= HISTORY).all() & (size.sum() > 0)
        self.probabilities = torch.where(ready, learned, 1 / self.num_steps)

    def state_dict(self) -> dict[str, Tensor]:
        """All that it remembers."""
        return {"losses": self._losses[:-1].cpu().clone(), "counts": self._counts[:-1].cpu().clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Remember what another one did.

        Raises:
            ValueError: it was for another number of steps.
        """
        if (
            state["losses"].shape != self._losses[:-1].shape
            or state["counts"].shape != self._counts[:-1].shape
        ):
            raise ValueError(f"losses of {len(state['losses'])} steps; allowed: of {self.num_steps}")
        self._losses[:-1], self._counts[:-1] = state["losses"], state["counts"]
        self._update()
