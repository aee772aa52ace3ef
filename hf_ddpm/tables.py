"""Where tables meet images: a coefficient is gathered in float64, cast once and shaped to multiply a batch.

The file knows indices, dtypes and devices, and no formula. No other file indexes a table.
"""

from functools import cached_property

import numpy as np
import torch
from torch import Tensor


def add_scaled(x: Tensor, b: Tensor | float, y: Tensor) -> Tensor:
    """X + b·y, in one pass over the images where b is a float."""
    return torch.add(x, y, alpha=b) if isinstance(b, float) else x + b * y


class Tables:
    """Base of a chain whose attributes are tables of shape (T,), float64."""

    timesteps: Tensor  # (T,) int64, ascending: the step that the network gets for each index

    def at(self, t: Tensor | int, like: Tensor, *tables: str | Tensor) -> list:
        """The named coefficients at t, ready to multiply images shaped `like`.

        Args:
            t: an int gives plain floats (the fast path of a sampler); a tensor of shape (B,) or () gives
                tensors of shape (B, 1, 1, 1), gathered in float64 and cast once to float32 or to `like`'s
                dtype, the wider.
            like: images, shape (B, ...).
            tables: names of tables of this class, or tables from elsewhere, shape (T,) float64.

        Raises:
            ValueError: t is out of 0..T−1. A tensor on an accelerator is trusted: reading it would stall the
                device.
        """
        self._check_index(t)
        if not isinstance(t, Tensor):
            return [self._floats(z)[t] if isinstance(z, str) else z[t].item() for z in tables]
        dtype, view = wide_dtype(like.dtype), (-1, *[1] * (like.ndim - 1))
        index = t.reshape(-1).to(like.device, torch.int64)
        found = (self._table(z, like.device) if isinstance(z, str) else z.to(like.device) for z in tables)
        return [table.index_select(0, index).to(dtype).view(view) for table in found]

    def index_of(self, timesteps: Tensor | int) -> Tensor | int:
        """The index in this chain of steps in the network's numbering: the inverse of `timesteps[index]`.

        Raises:
            ValueError: a step is not in the chain; a tensor on an accelerator is trusted.
        """
        steps = torch.as_tensor(timesteps)
        index = torch.searchsorted(self._table("timesteps", steps.device), steps)
        if steps.device.type == "cpu" and steps.numel():
            missing = self.timesteps[index.clamp(max=self.timesteps.shape[0] - 1)] != steps
            if missing.any():
                span = f"{self.timesteps.shape[0]} steps in {self.timesteps[0]}..{self.timesteps[-1]}"
                raise ValueError(
                    f"timestep {steps[missing].view(-1)[0]} is not in the chain; allowed: its {span}"
                )
        return index if isinstance(timesteps, Tensor) else int(index)

    def timesteps_at(self, t: Tensor) -> Tensor:
        """`timesteps[t]`, what the network gets for index t, on t's device; shape of t, int64."""
        self._check_index(t)
        return self._table("timesteps", t.device).index_select(0, t.reshape(-1)).view(t.shape)

    def _check_index(self, t: Tensor | int) -> None:
        if isinstance(t, Tensor):
            if t.device.type != "cpu" or t.numel() == 0:
                return
            whole, low, high = not (t.is_floating_point() or t.dtype == torch.bool), t.amin(), t.amax()
        else:
            whole, low, high = isinstance(t, int | np.integer) and not isinstance(t, bool), t, t
        if not (whole and low >= 0 and high < self.timesteps.shape[0]):
            got = t.tolist() if isinstance(t, Tensor) else t
            raise ValueError(
                f"step t = {got} is not in the chain; allowed: whole numbers 0..{self.timesteps.shape[0] - 1}"
            )

    def _table(self, name: str, device: torch.device) -> Tensor:
        if (name, device) not in self._copies:
            table = getattr(self, name)
            # Apple's MPS has no float64: there the one cast comes before the move.
            if device.type == "mps" and table.dtype == torch.float64:
                table = table.float()
            self._copies[name, device] = table.to(device)
        return self._copies[name, device]

    def _floats(self, name: str) -> list[float]:
        if name not in self._copies:
            self._copies[name] = getattr(self, name).tolist()
        return self._copies[name]

    @cached_property
    def _copies(self) -> dict:
        """Tables on devices and as floats, made when first asked for."""
        return {}


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float32, or `dtype` where that is wider."""
    return torch.promote_types(dtype, torch.float32)


def wide(x: Tensor) -> Tensor:
    """`x` in float32 or wider."""
    return x if x.dtype.itemsize >= 4 else x.float()


def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` cast to `dtype`; float16 saturates at ±65504, where a plain cast of an early x̂_0 would overflow."""
    if dtype == torch.float16:
        limit = torch.finfo(dtype).max
        x = x.clamp(-limit, limit)
    return x if x.dtype == dtype else x.to(dtype)
