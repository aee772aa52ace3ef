"""Which images of a step are whose: positions in the run's one endless sequence, shared out to processes.

Step n consumes the positions n·G … n·G + G − 1, whatever the number of processes; G is fixed for a run. Which
image stands at a position is said in data/order.py, and what is drawn for it in draws.py.
"""

import functools
import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hf_ddpm.config import TrainConfig
from hf_ddpm.data.advice import Needs, Reading, check_images
from hf_ddpm.data.order import EMPTY
from hf_ddpm.data.stream import ImageStream, LabelledSlots, load_stream
from hf_ddpm.runtime.disk import WORKER
from hf_ddpm.runtime.memory import check_memory
from hf_ddpm.runtime.processes import held_back
from hf_ddpm.runtime.signals import ignore_signals
from hf_ddpm.shown import fields_line

logger = logging.getLogger(__name__)

_OF_IMAGES = ("hf_ddpm.data.stream", "hf_ddpm.data.pixels")  # the loggers that tell of single images
GRACE_SECONDS = 5  # that the system has to tell of a process's end


@dataclass(frozen=True)
class StepShare:
    """One process's part of every step, in micro-steps of equal size.

    Process r takes every W-th position, n·G + r, n·G + r + W, …, so that it reads few lanes (data/order.py).
    All processes have as many slots; where W does not divide G, the last slots of some are empty.

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

    def wanted(
        self, positions: np.ndarray, first_step: int, worker: int = 0, num_workers: int = 1
    ) -> np.ndarray:
        """Whether positions are a worker's, where several make the micro-steps of `slots` in turn.

        Args:
            positions: of the run, int64.
            first_step: as in `slots`.
            worker: 0 to `num_workers` − 1; worker k makes the micro-steps k, k + `num_workers`, …
            num_workers: how many there are.

        Returns:
            Shape of `positions`, bool.
        """
        step, place = np.divmod(positions, self.per_step)
        place, rank = np.divmod(place, self.world_size)
        micro_step = (step - first_step) * self.micro_steps + place // self.micro_batch
        return (rank == self.rank) & (micro_step % num_workers == worker) & (micro_step >= 0)


def share_steps(config: TrainConfig, accelerator: Accelerator, state: Mapping[str, Any]) -> StepShare:
    """This process's part of each step, whose images are as many as when the run began.

    Args:
        config: the run.
        accelerator: the processes that share a step.
        state: of the checkpoint that the run goes on from; empty for a new run.

    Raises:
        ValueError: fewer images in a step than processes.
    """
    world = accelerator.num_processes
    per_step = config.batch_size * config.gradient_accumulation_steps * world
    share = StepShare(
        state.get("images_per_step", per_step), config.batch_size, accelerator.process_index, world
    )
    if share.per_step != per_step and accelerator.is_main_process:
        logger.warning(
            "the run has steps of %d images; %d processes share them, in %d micro-steps of %d each",
            share.per_step,
            world,
            share.micro_steps,
            share.micro_batch,
        )
    return share


def open_stream(
    config: TrainConfig,
    check: Callable[[ImageStream], object] | None = None,
    class_names: Sequence[str] | None = None,
) -> ImageStream:
    """The run's images, in the order that all processes share.

    Args:
        config: the run.
        check: as in `load_stream`.
        class_names: of the classes, where the run or its network has numbered them already.

    Raises:
        ValueError: a data set that can't be read, one in whose folder of images the run would write, images
            that are too large for the batch, or what `check` raises.
    """
    stream = load_stream(
        config.dataset,
        config.split,
        config.size,
        config.channels,
        column=config.image_column,
        label_column=config.label_column,
        label_names=class_names,
        fit=config.fit,
        background=config.background,
        to_8_bit=config.to_8_bit,
        horizontal_flip=config.horizontal_flip,
        shuffle_memory=config.shuffle_memory,
        seed=config.seed,
        skip_corrupt=config.skip_corrupt,
        holdout=config.holdout,
        check=check,
    )
    folder, output = os.path.realpath(stream.folder or os.devnull), os.path.realpath(config.output_dir)
    if stream.folder and output.startswith(os.path.join(folder, "")):
        if not any(part.startswith((".", "__")) for part in os.path.relpath(output, folder).split(os.sep)):
            raise ValueError(
                f"output_dir {config.output_dir!r} lies in the folder of the images, {config.dataset!r}, of "
                "which the run's pictures would become a part; allowed: a folder outside of it, or hidden"
            )
    # On any device batches are made in this machine's memory, of bytes
    check_memory(
        "batch_size", config.batch_size, math.prod(stream.shape), "image {}x{}x{}".format(*stream.shape)
    )
    return stream


def check_new_images(stream: ImageStream, config: TrainConfig, needs: Needs) -> None:
    """Refuse, before a run begins, images of which it would meet some that it can't read, now or held out.

    Raises:
        ValueError: one line with all the flags to add.
    """
    size = (config.size, config.size) if isinstance(config.size, int) else config.size
    reading = Reading(
        size, config.channels, config.fit, config.background, config.to_8_bit, config.skip_corrupt
    )
    check_images(stream.survey(show=True, held_out=True), reading, needs)


class SkippedRows:
    """Which images of a run could not be read, each counted once however often it is met.

    Args:
        stream: the run's images.
        accelerator: the processes, each of which meets images of its own.
        state: of the checkpoint that the run goes on from; empty for a new run.
    """

    def __init__(self, stream: ImageStream, accelerator: Accelerator, state: Mapping[str, Any]):
        self._stream, self._accelerator = stream, accelerator
        self._known: set[int] = set(state.get("skipped_rows", []))
        self._new: set[int] = set()
        self._said: list[str] = []
        self._told: set[str] = set()

    def note(self, batch: "Batch") -> None:
        """Note the images that a batch of this process should have and hasn't, and what was said of them."""
        self._said += batch.said
        found = batch.present.numpy()  # on the CPU, wherever the images go
        if not found.all():
            for position, present in zip(batch.positions, found, strict=True):
                if position != EMPTY and not present:
                    self._new.add(self._stream.row_at(position))

    def rows(self) -> list[int]:
        """The images by their rows, ascending, over all processes, which call it together.

        Process 0 tells what was said of images since the last call, each line once for all workers and
        processes.
        """
        found = gather_object([(sorted(self._new - self._known), self._said)])
        for new, said in found:
            self._known.update(new)
            for line in said:
                if line not in self._told and self._accelerator.is_main_process:
                    logger.warning("%s", line)
                self._told.add(line)
        self._new.clear()
        self._said = []
        return sorted(self._known)


class Batch(NamedTuple):
    """One process's images of a micro-step.

    Attributes:
        positions: of the slots in the run's sequence, (B,); `data.order.EMPTY` where a slot has none.
        images: uint8, (B, C, H, W), all zeros where there is none.
        present: whether a slot holds an image, (B,), bool, on the CPU.
        said: warnings of reading them, which are for `SkippedRows` to tell.
        labels: the class of each, (B,), int64, as in `data.stream.LabelledSlots`; None without classes.
    """

    positions: list[int]
    images: Tensor
    present: Tensor
    said: Sequence[str] = ()
    labels: Tensor | None = None

    __repr__ = fields_line


class _Batches(IterableDataset):
    """The batches of a share of the stream. An error is yielded as the last item instead of being raised.

    A DataLoader may run it in worker processes, each of which makes every k-th batch. What a worker raises
    would reach the user as a printed traceback.
    """

    def __init__(self, stream: ImageStream, share: StepShare, first_step: int):
        self.stream, self.share, self.first_step = stream, share, first_step

    def __iter__(self) -> Iterator[Batch | ValueError]:
        worker = get_worker_info()
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        mine = itertools.islice(self.share.slots(self.first_step), number, None, count)
        asked, given = itertools.tee(mine)
        wanted = functools.partial(
            self.share.wanted, first_step=self.first_step, worker=number, num_workers=count
        )
        try:
            found = zip(asked, self.stream.slots(given, wanted), strict=True)
            while True:
                with held_back(*_OF_IMAGES) as said:
                    item = next(found, None)
                if item is None:
                    return
                positions, slots = item
                labels = slots.labels if isinstance(slots, LabelledSlots) else None
                yield Batch(positions, slots.images, slots.present, said, labels)
        except ValueError as error:
            yield error


def make_batches(
    stream: ImageStream,
    config: TrainConfig,
    share: StepShare,
    device: torch.device,
    first_step: int,
    skipped: SkippedRows | None = None,
) -> Iterator[Batch]:
    """This process's batches from the step `first_step` on, without end; made ahead if the config says so.

    What they lack is noted in `skipped`.

    Raises:
        ValueError: an image that can't be read.
        RuntimeError: a worker process is gone.
    """
    loader = DataLoader(
        _Batches(stream, share, first_step),
        batch_size=None,
        num_workers=config.num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals,
    )
    for batch in _told_by_torch(iter(loader)) if config.num_workers else loader:
        if isinstance(batch, ValueError):
            raise batch
        if skipped is not None:
            skipped.note(batch)
        yield batch


def _told_by_torch(batches: Iterator[Any]) -> Iterator[Any]:
    """Batches of worker processes, one of which may end while it hands over a batch.

    Raises:
        RuntimeError: it did; the message begins with `disk.WORKER`, as torch's own.
    """
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (ConnectionError, EOFError) as error:
            # The connection broke before the system told of the worker's end; when it does, torch raises here
            time.sleep(GRACE_SECONDS)
            raise RuntimeError(f"{WORKER} exited unexpectedly") from error
        yield batch
