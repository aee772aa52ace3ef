"""Where tables meet images: a coefficient is gathered in float64, cast once and shaped to multiply a batch.

The file knows indices, dtypes and devices, and no formula. No other file indexes a table.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.checks import as_numbers, described


def add_scaled(x: Tensor, b: Tensor | float, y: Tensor) -> Tensor:
    """The sum `x + b·y`, computed in one pass over the images where b is a float."""
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
            ValueError: t is not one step or one per image, is no whole number, or is out of 0..T−1. The
                numbers on an accelerator are trusted: reading them would stall the device.
        """
        self._check_index(t, like)
        if not isinstance(t, Tensor):
            return [self._floats(z)[t] if isinstance(z, str) else z[t].item() for z in tables]
        found = (
            self._table(z, like.device) if isinstance(z, str) else _moved(z, like.device) for z in tables
        )
        return _gathered(found, t, like)

    def at_groups(self, t: Tensor | int, groups: Tensor, table: Tensor) -> Tensor:
        """Coefficients that differ between groups of pixels: each pixel's, by its step and its group.

        Args:
            t: one step, or one for each image, as in `at`.
            groups: the group of each pixel, shape (B, ...), int64 in 0..G−1.
            table: a coefficient of each step and group, (T, G).

        Returns:
            `table[t, group]`, shape of `groups`, dtype of `table`, on the device of `groups`.

        Raises:
            ValueError: as in `at`.
        """
        self._check_index(t, groups)
        index = torch.as_tensor(t, device=groups.device).reshape(-1).expand(len(groups))
        rows = _moved(table, groups.device).index_select(0, index.long())
        return rows.gather(1, groups.flatten(1)).view(groups.shape)

    def computed_at(
        self, t: Tensor | int, like: Tensor, function: Callable[[Any], Tensor | tuple[Tensor, ...]]
    ) -> Sequence[Any]:
        """Coefficients that the chain doesn't name: a function of it computes their tables, once.

        Args:
            t: as in `at`.
            like: as in `at`.
            function: gives a table of shape (T,), float64, for this chain, or a tuple of them. It is called
                once, and what it gave is kept: pass the same function each time, not a new one.

        Returns:
            One coefficient for each table, as from `at`. A table that is 0 at every step, or 1 at every step,
            gives the float 0.0 or 1.0 for any t, so that the caller can leave the product out.

        Raises:
            ValueError: as in `at`.
        """
        self._check_index(t, like)
        if not isinstance(t, Tensor):
            if (rows := self._copies.get(function)) is None:
                tables = [table.tolist() for table in _tuple(function(self))]
                rows = self._copies[function] = list(zip(*tables, strict=True))
            return rows[t]
        if (found := self._copies.get((function, like.device))) is None:
            found = [_constant(table, _moved(table, like.device)) for table in _tuple(function(self))]
            self._copies[function, like.device] = found
        return _gathered(found, t, like)

    def first_zero(self, t: Tensor | int, function: Callable[[Any], Tensor]) -> int | None:
        """The first of the given steps at which a table is 0.

        Args:
            t: index into the chain, an int or a tensor of ints, within the chain.
            function: gives the table, shape (T,), for this chain; it is called once.

        Returns:
            The step in the network's numbering; None if there is none. Steps on an accelerator are not read,
            so for them it is always None.
        """
        if (zeros := self._copies.get((function, "zeros"))) is None:
            zeros = self._copies[function, "zeros"] = (function(self) == 0).nonzero().flatten().tolist()
        if not zeros or (isinstance(t, Tensor) and t.device.type != "cpu"):
            return None
        asked = t.reshape(-1).tolist() if isinstance(t, Tensor) else [t]
        return next((int(self.timesteps[i]) for i in asked if i in zeros), None)

    def index_of(self, timesteps: Tensor | int) -> Tensor | int:
        """The index in this chain of steps in the network's numbering: the inverse of `timesteps[index]`.

        Raises:
            ValueError: a step is not in the chain; a tensor on an accelerator is trusted.
        """
        steps = timesteps
        if not isinstance(steps, Tensor):
            steps = as_numbers("timesteps", timesteps, "whole numbers")
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
        index = t.reshape(-1).to(torch.int64)
        return self._table("timesteps", t.device).index_select(0, index).view(t.shape)

    def _check_index(self, t: Tensor | int, like: Tensor | None = None) -> None:
        """Refuse a t that is no index into the chain, or, given images, neither one step nor one for each."""
        if type(t) is int and 0 <= t < self._number:  # a sampler's, before anything that costs more
            return
        last = self._number - 1
        if not isinstance(t, Tensor):
            if isinstance(t, int | np.integer) and not isinstance(t, bool) and 0 <= t <= last:
                return
            raise ValueError(f"step t = {described(t)} is not in the chain; allowed: whole numbers 0..{last}")
        batch = None if like is None or like.ndim == 0 else like.shape[0]
        if batch is not None and t.numel() not in (1, batch):
            raise ValueError(
                f"step t = {described(t)} for {batch} images; allowed: one step, or one for each image"
            )
        whole = not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)
        if whole and (t.device.type != "cpu" or t.numel() == 0 or (t.amin() >= 0 and t.amax() <= last)):
            return
        shown = described(t)
        if t.device.type == "cpu" and t.numel():
            wrong = t[(t < 0) | (t > last)] if whole else t
            shown = str(wrong.flatten()[0].item())
        raise ValueError(f"step t = {shown} is not in the chain; allowed: whole numbers 0..{last}")

    def _table(self, name: str, device: torch.device) -> Tensor:
        if (name, device) not in self._copies:
            self._copies[name, device] = _moved(getattr(self, name), device)
        return self._copies[name, device]

    def _floats(self, name: str) -> list[float]:
        if name not in self._copies:
            self._copies[name] = getattr(self, name).tolist()
        return self._copies[name]

    @cached_property
    def _number(self) -> int:
        """T, for a check at every call: to ask a tensor for its shape is slow."""
        return self.timesteps.shape[0]

    @cached_property
    def _copies(self) -> dict:
        """Tables on devices and as floats, made when first asked for."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled or copied: everything but the tables on devices, which are made again."""
        return {key: value for key, value in self.__dict__.items() if key != "_copies"}


def _tuple(tables: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (tables,) if isinstance(tables, Tensor) else tables


def _moved(table: Tensor, device: torch.device) -> Tensor:
    """The table on a device. Apple's MPS has no float64: there the one cast comes before the move."""
    return table.to(device, torch.float32 if device.type == "mps" and table.dtype == torch.float64 else None)


def _constant(table: Tensor, moved: Tensor) -> Tensor | float:
    """The float 0.0 or 1.0 for a table that holds it everywhere, else `moved`."""
    value = table[0].item()
    return value if value in (0, 1) and bool((table == value).all()) else moved


def _gathered(tables: Iterable[Tensor | float], t: Tensor, like: Tensor) -> list:
    """Entries t of each table, cast once and shaped to multiply images; a float stays as it is."""
    dtype, view = wide_dtype(like.dtype), (-1, *[1] * (like.ndim - 1))
    index = t.reshape(-1).to(like.device, torch.int64)
    return [
        table.index_select(0, index).to(dtype).view(view) if isinstance(table, Tensor) else table
        for table in tables
    ]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float32, or `dtype` where that is wider."""
    return torch.promote_types(dtype, torch.float32)


def wide(x: Tensor) -> Tensor:
    """`x` in float32 or wider."""
    return x if x.dtype.itemsize >= 4 else x.float()


def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` cast to `dtype`; float16 saturates at ±65504, where a plain cast of an early x̂_0 would overflow.

    What is infinite already stays so: a network's infinite answer is to be seen.
    """
    if dtype == torch.float16:
        limit = torch.finfo(dtype).max
        x = torch.where(x.isinf(), x, x.clamp(-limit, limit))
    return x if x.dtype == dtype else x.to(dtype)
