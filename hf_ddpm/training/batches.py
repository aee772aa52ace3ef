"""Which images of a step are whose: positions in the run's one endless sequence, shared out to processes.

Step n consumes the positions n·G … n·G + G − 1, whatever the number of processes; G is fixed for a run. The
file is integers only: what stands at a position is order.py's, what is drawn there draws.py's.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hf_ddpm.config import TrainConfig
from hf_ddpm.data.order import EMPTY
from hf_ddpm.data.stream import ImageStream, load_stream
from hf_ddpm.runtime.signals import ignore_signals


@dataclass(frozen=True)
class StepShare:
    """One process's part of every step, in micro-steps of equal size.

    Process r takes the positions n·G + r, n·G + r + W, …: every W-th, so that it reads few lanes (order.py).
    All processes have as many slots; where G doesn't divide, the last ones are empty.

    Attributes:
        per_step: images of a step over all processes, G.
        batch_size: the most that a process takes at once.
        rank: this process, 0 to W − 1.
        world_size: number of processes, W.

    Raises:
        ValueError: fewer images in a step than processes.
    """

    per_step: int
    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.per_step < self.world_size:
            raise ValueError(
                f"{self.world_size} processes share the {self.per_step} images of a step; allowed: at most "
                f"{self.per_step} processes"
            )

    @property
    def micro_steps(self) -> int:
        """Micro-steps of each step."""
        return -(-self._slots // self.batch_size)

    @property
    def micro_batch(self) -> int:
        """Slots of each micro-step, at most `batch_size`."""
        return -(-self._slots // self.micro_steps)

    @property
    def _slots(self) -> int:
        return -(-self.per_step // self.world_size)

    def slots(self, first_step: int) -> Iterator[list[int]]:
        """The positions of each micro-step, from `first_step` on without end; `EMPTY` where there is none."""
        step = first_step
        while True:
            for micro in range(self.micro_steps):
                places = range(micro * self.micro_batch, (micro + 1) * self.micro_batch)
                offsets = [place * self.world_size + self.rank for place in places]
                yield [step * self.per_step + j if j < self.per_step else EMPTY for j in offsets]
            step += 1


def open_stream(config: TrainConfig) -> ImageStream:
    """The run's images, in the order that all processes share."""
    return load_stream(
        config.dataset,
        config.split,
        config.size,
        config.channels,
        column=config.image_column,
        fit=config.fit,  # type: ignore[arg-type]
        horizontal_flip=config.horizontal_flip,
        shuffle_buffer=config.shuffle_buffer,
        seed=config.seed,
        skip_corrupt=config.skip_corrupt,
    )


class Batch(NamedTuple):
    """One process's images of a micro-step.

    Attributes:
        positions: of the slots in the run's sequence, (B,); `share.EMPTY` where a slot has none.
        images: uint8, (B, C, H, W), all zeros where there is none.
        present: whether a slot holds an image, (B,), bool, on the CPU.
    """

    positions: list[int]
    images: Tensor
    present: Tensor


class _Batches(IterableDataset):
    """The batches of a share of the stream; an error comes as an item.

    A DataLoader may run it in other processes, of which each makes every k-th batch, and whose exceptions
    arrive as a printed traceback.
    """

    def __init__(self, stream: ImageStream, share: StepShare, first_step: int):
        self.stream, self.share, self.first_step = stream, share, first_step

    def __iter__(self) -> Iterator[Batch | ValueError]:
        worker = get_worker_info()
        mine = (0, None, 1) if worker is None else (worker.id, None, worker.num_workers)
        asked, wanted = itertools.tee(itertools.islice(self.share.slots(self.first_step), *mine))
        try:
            for positions, (images, present) in zip(asked, self.stream.slots(wanted), strict=True):
                yield Batch(positions, images, present)
        except ValueError as error:
            yield error


def make_batches(
    stream: ImageStream, config: TrainConfig, share: StepShare, device: torch.device, first_step: int
) -> Iterator[Batch]:
    """This process's batches from the step `first_step` on, without end; made ahead if the config says so.

    Raises:
        ValueError: an image that can't be read.
    """
    loader = DataLoader(
        _Batches(stream, share, first_step),
        batch_size=None,
        num_workers=config.num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals,
    )
    for batch in loader:
        if isinstance(batch, ValueError):
            raise batch
        yield batch
