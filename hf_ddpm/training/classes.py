"""Training with classes: whose names they have, when one is hidden, and the loss of each.

An image's class is hidden with the probability `label_dropout`, so that the network learns "no class" too.
Whether it is depends on (seed, position) alone. Nothing is hidden where the loss is only measured.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_ddpm.config import TrainConfig
from hf_ddpm.data.stream import ImageStream
from hf_ddpm.folders.index import fetch
from hf_ddpm.folders.labels import read_labels
from hf_ddpm.models.presets import names_preset
from hf_ddpm.runtime.messages import shorten
from hf_ddpm.runtime.processes import process_state
from hf_ddpm.shown import fields_line
from hf_ddpm.training.draws import draw_hidden

logger = logging.getLogger(__name__)

NAMES = "class_names"  # key of a checkpoint's state
MOST_LOGGED = 100  # classes whose losses are logged one by one


class LastImages(NamedTuple):
    """The images of the last micro-step, with the class of each.

    Attributes:
        positions: in the run, (B,).
        x_0: on the device, (B, C, H, W).
        present: whether there is one, (B,), bool.
        labels: none of them hidden, (B,), int64.
    """

    positions: Sequence[int]
    x_0: Tensor
    present: Tensor
    labels: Tensor

    __repr__ = fields_line


def known_names(config: TrainConfig, state: Mapping[str, Any]) -> Sequence[str] | None:
    """The names of the classes, where the run or the network that it goes on from has numbered them.

    Args:
        config: the run.
        state: of the checkpoint that the run goes on from; empty for a new run.

    Raises:
        ValueError: the network's folder has a file of names that can't be read.
    """
    if config.label_column is None:
        return None
    if state:
        return state.get(NAMES)
    if names_preset(config.model):
        return None
    folder = Path(config.model).expanduser()
    found = read_labels(folder if folder.is_dir() else fetch(config.model))
    return None if found is None else list(found.values())


def tell_classes(config: TrainConfig, stream: ImageStream) -> None:
    """Say, on process 0, which classes the images have, and what of them can't be learned."""
    names, counts = stream.class_names, stream.class_counts
    if names is None or counts is None or not process_state().is_main_process:
        return
    logger.warning(
        "%d class%s (%s), of %s to %s images to train on",
        *(len(names), "es" * (len(names) > 1), shorten(", ".join(names), 80)),
        *(f"{min(counts):,}", f"{max(counts):,}"),
    )
    if config.label_dropout == 0:
        logger.warning('label_dropout is 0: "no class" is not learned, and nothing can be guided')


def hide_labels(config: TrainConfig, labels: Tensor, positions: Sequence[int], num_classes: int) -> Tensor:
    """The labels (B,) with "no class", C, in the place of those that are hidden at these positions."""
    hidden = draw_hidden(config.seed, positions, config.label_dropout)
    return torch.where(hidden, num_classes, labels)


class ClassLosses:
    """Mean losses by class since the last line of the log; those of hidden classes are "no class".

    Args:
        num_classes: C.
        state: what `state` gave; empty for a new run.
        device: where losses are.

    Raises:
        ValueError: the state is of another number of classes.
    """

    def __init__(self, num_classes: int, state: Sequence[Any], device: torch.device):
        # Beside "no class": each class, or all of them together
        self._rows = num_classes + 1 if num_classes <= MOST_LOGGED else 2
        self._none = num_classes
        self._sums = torch.zeros(2, self._rows, device=device)
        self._steps: list[Tensor] = []
        found = torch.tensor(state or [[0.0] * self._rows] * 2, dtype=torch.float64)
        if found.shape != (2, self._rows):
            raise ValueError("the checkpoint's state has losses of another number of classes")
        self._table = found

    def add(self, loss: Tensor, weight: Tensor, labels: Tensor, present: Tensor) -> None:
        """Note a micro-step: weighted losses, weights and labels (B,), and whether there is an image."""
        rows = torch.where(labels == self._none, self._rows - 1, labels if self._rows > 2 else 0)
        chosen = (rows == torch.arange(self._rows, device=rows.device)[:, None]) & present
        columns = [z.detach().float() for z in (loss, weight)]
        self._sums += torch.stack([torch.where(chosen, z, 0.0) for z in columns]).sum(-1)

    def advance(self) -> None:
        """Note that an optimizer step is done."""
        self._steps.append(self._sums)
        self._sums = torch.zeros_like(self._sums)

    def settle(self, gather: Callable[[Tensor], Any]) -> None:
        """Read the steps back from the device and add them up over all processes, which call it together."""
        if self._steps:
            mine = torch.stack(self._steps)
            self._steps.clear()
            # Step by step, so that the sums are the same however often they were read back in between
            for step in gather(mine).cpu().double().view(-1, *mine.shape).sum(0):
                self._table = self._table + step

    def state(self) -> list[list[float]]:
        """The sums as plain values, after `settle`."""
        return self._table.tolist()

    def line(self) -> dict[str, float]:
        """The means for a line of the log, after `settle`; the sums begin anew."""
        names = [f"loss_class_{number}" for number in range(self._rows - 1)]
        if self._rows == 2 < self._none + 1:
            names = ["loss_any_class"]
        found = zip([*names, "loss_no_class"], *self._table.tolist(), strict=True)
        self._table = torch.zeros_like(self._table)
        return {name: loss / weight for name, loss, weight in found if weight}
