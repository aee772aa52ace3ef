"""Images in: a `datasets` stream becomes uint8 batches, in an order that can be replayed exactly.

    shuffled shards ─► this rank's rows, still encoded ─► shuffle buffer ─► decode ─► fit, flip ─► uint8

The order of an epoch is a pure function of (source, split, shuffle_buffer, seed, epoch, rank, world_size);
crops and flips are one of (seed, epoch, rank, position in that order). No global random state is read.
A killed run resumes by replay, which passes over the images already consumed without decoding them.

What it deliberately doesn't know: models, devices, labels. It never pads, never resizes and never converts
between grey and colour unless told to (pixels.py does, image by image).

Shards and rows are shuffled here, not by `IterableDataset.shuffle`: the order of a run must outlive an
upgrade of `datasets`, and that shuffle, even with a buffer of one row, reads many times slower.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, NamedTuple, final

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets.exceptions import DatasetsError
from torch import Tensor

from hf_ddpm.pixels import FITS, decode_pixels, fit_pixels, one_line
from hf_ddpm.sources import find_column, open_source

_ROWS_PER_READ = 256
_DRAWS_PER_BLOCK = 1024  # positions whose draws share one generator: seeding costs more than drawing


def load_stream(
    source: str | os.PathLike[str],
    split: str = "train",
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    *,
    column: str | None = None,
    fit: str = "exact",
    horizontal_flip: bool = False,
    shuffle_buffer: int = 0,
    seed: int = 0,
    skip_corrupt: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> ImageStream:
    """Open a data set for streaming and read its first image.

    Args:
        source: "digits" (embedded, 8x8), a folder of images or of parquet files, a parquet file, or a Hub id.
        split: name of the split.
        image_size: side, or (H, W); None takes the first image's.
        channels: 1 (grey) and 3 (RGB) convert, others must be the data's; None takes the first image's.
        column: image column; None finds the only one of encoded images or uint8 arrays (H, W) or (H, W, C).
        fit: how an image gets `image_size`: "exact" (it has it already), "resize" (bicubic), "resize_crop"
            (bicubic until it covers H x W, centre kept), "center_crop" or "random_crop" (both unscaled).
        horizontal_flip: mirror each image with probability 1/2.
        shuffle_buffer: 0 keeps the source's order; n shuffles the shards, then draws from n undecoded images.
            A folder of images is one shard sorted by class: give it a buffer of its size (paths, so small).
        seed: of order, crops and flips; the same on all ranks.
        skip_corrupt: pass over (and count) images that can't be decoded or don't fit, instead of raising.
        rank: this process, 0 to `world_size` - 1.
        world_size: processes that share each epoch: whole shards each if their number divides, else every
            `world_size`-th row (the rule of `datasets.distributed.split_dataset_by_node`).

    Returns:
        The stream of this rank.

    Raises:
        ValueError: an impossible argument, a source that can't be read, or an unusable first image.
    """
    size = (image_size, image_size) if isinstance(image_size, Integral) else image_size
    if size is not None:
        if not isinstance(size, (tuple, list)) or len(size) != 2:
            raise ValueError(f"image_size must be a positive integer or a pair (H, W), got {image_size!r}")
        size = (_checked("image_size", size[0], 1), _checked("image_size", size[1], 1))
    if channels is not None:
        _checked("channels", channels, 1)
    for name, value in (("shuffle_buffer", shuffle_buffer), ("seed", seed), ("rank", rank)):
        _checked(name, value, 0)
    if rank >= _checked("world_size", world_size, 1):
        raise ValueError(f"rank must be below world_size {world_size}, got {rank}")
    if fit not in FITS:
        raise ValueError(f"fit must be one of {', '.join(FITS)}, got {fit!r}")

    dataset, files = open_source(source, split)
    column = find_column(dataset, column)
    return ImageStream(
        _dataset=dataset.decode(False).select_columns([column]),
        _column=column,
        _shards=files if len(files) == dataset.num_shards else [f"split {split!r}"] * dataset.num_shards,
        _size=size,
        _channels=channels,
        _fit=fit,
        _flip=horizontal_flip,
        _buffer=shuffle_buffer,
        _seed=seed,
        _skip_corrupt=skip_corrupt,
        _rank=rank,
        _world_size=world_size,
    )


class _Row(NamedTuple):
    shard: int
    number: int
    value: Any  # {"bytes": ..., "path": ...} or nested lists of grey levels


@final
@dataclass(eq=False)
class ImageStream:
    """The images of one rank, in an order that any run with the same arguments repeats; see `load_stream`.

    Attributes:
        shape: (C, H, W) of every image.
        skipped: corrupt images passed over by this object's iterators so far, those of a replay included.
    """

    shape: tuple[int, int, int] = field(init=False)
    skipped: int = field(default=0, init=False)
    _dataset: datasets.IterableDataset = field(repr=False)
    _column: str
    _shards: list[str] = field(repr=False)  # the names messages give them
    _size: tuple[int, int] | None
    _channels: int | None
    _fit: str
    _flip: bool
    _buffer: int
    _seed: int
    _skip_corrupt: bool
    _rank: int
    _world_size: int

    def __post_init__(self) -> None:
        for row in itertools.chain.from_iterable(map(self._read, range(len(self._shards)))):
            try:
                *size, channels = decode_pixels(row.value, self._channels).shape
            except ValueError as error:
                if not self._skip_corrupt:
                    raise ValueError(f"{self._name(row)}: {error}") from error
                continue
            height, width = self._size or size
            self.shape = (self._channels or channels, height, width)
            return
        raise ValueError(f"no usable image in {', '.join(sorted(set(self._shards)))}")

    def images(self, epoch: int = 0, start: int = 0) -> Iterator[Tensor]:
        """This rank's images of one epoch, from the `start`-th on.

        Args:
            epoch: which epoch's order, zero-based.
            start: images to pass over; they are decoded only if `skip_corrupt` has to know which ones count.

        Returns:
            Iterator of uint8 tensors (C, H, W), on the CPU.
        """
        replay = self._replay(_checked("epoch", epoch, 0), _checked("start", start, 0))
        return (image for image in replay if image is not None)

    def num_rows(self) -> int:
        """Rows of this rank's epoch, read through once without decoding."""
        return sum(1 for _ in self._order(0))

    def select(self, positions: Sequence[int] | np.ndarray) -> Iterator[Tensor]:
        """The images at these ascending positions of epoch 0's order; no other one is decoded.

        Raises:
            ValueError: an image that can't be read, or a position past the end or not above the one before.
        """
        rows, at = iter(self._order(0)), -1
        for position in map(int, positions):
            if position <= at:
                raise ValueError(f"position {position} follows {at}; allowed: ascending, from 0 on")
            row = next(itertools.islice(rows, position - at - 1, None), None)
            if row is None:
                raise ValueError(f"no row {position} in {', '.join(sorted(set(self._shards)))}")
            at = position
            try:
                yield self._load(row, 0, position)
            except ValueError as error:
                raise ValueError(f"{self._name(row)}: {error}") from error

    def batches(self, batch_size: int, start: int = 0, epochs: int | None = None) -> Iterator[Tensor]:
        """Batches that run across the ends of epochs, so that no image is dropped.

        Args:
            batch_size: images per batch.
            start: images this rank has consumed in all, over all epochs; the iterator goes on exactly there.
            epochs: passes over the data in all, those before `start` included; None never ends.

        Returns:
            Iterator of uint8 tensors (B, C, H, W), on the CPU; the last of finitely many may be shorter.
        """
        if epochs is not None:
            _checked("epochs", epochs, 1)
        return self._batches(_checked("batch_size", batch_size, 1), _checked("start", start, 0), epochs)

    def _batches(self, batch_size: int, start: int, epochs: int | None) -> Iterator[Tensor]:
        by_row = len(self._shards) % self._world_size != 0 and not self._skip_corrupt
        equal_epochs = self._world_size == 1 or self._buffer == 0 or by_row  # else a rank's share may vary
        epoch, batch = 0, []
        while epochs is None or epoch < epochs:
            found = 0
            for image in self._replay(epoch, start):
                found += 1
                if image is not None:
                    batch.append(image)
                if len(batch) == batch_size:
                    yield torch.stack(batch)
                    batch = []
            passes = max(1, start // found) if equal_epochs else 1
            epoch, start = epoch + passes, max(0, start - passes * found)
        if batch:
            yield torch.stack(batch)

    def _replay(self, epoch: int, start: int) -> Iterator[Tensor | None]:
        """One item per image of this rank's epoch, None for the first `start`; raises if there is none."""
        found = 0
        for position, row in enumerate(self._order(epoch)):
            image = None
            if self._skip_corrupt or found >= start:
                try:
                    image = self._load(row, epoch, position)
                except ValueError as error:
                    if not self._skip_corrupt:
                        raise ValueError(f"{self._name(row)}: {error}") from error
                    self.skipped += 1
                    continue
            found += 1
            yield image if found > start else None
        if not found:
            raise ValueError(f"rank {self._rank} of {self._world_size} has no usable image in epoch {epoch}")

    def _order(self, epoch: int) -> Iterator[_Row]:
        """This rank's rows of an epoch: shuffled shards through a buffer, each drawn row replaced."""
        shards = np.arange(len(self._shards))
        if self._buffer:
            np.random.default_rng([0, self._seed, epoch]).shuffle(shards)
        whole = len(shards) % self._world_size == 0
        mine = shards[self._rank :: self._world_size] if whole else shards
        rows = itertools.chain.from_iterable(map(self._read, mine.tolist()))
        if not whole:
            rows = itertools.islice(rows, self._rank, None, self._world_size)

        rng = np.random.default_rng([1, self._seed, epoch, self._rank])
        buffer: list[_Row] = list(itertools.islice(rows, self._buffer))
        for row in rows:
            if buffer:
                slot = int(rng.integers(len(buffer)))
                buffer[slot], row = row, buffer[slot]
            yield row
        for slot in rng.permutation(len(buffer)):
            yield buffer[slot]

    def _read(self, shard: int) -> Iterator[_Row]:
        number = itertools.count()
        try:
            for batch in self._dataset.shard(len(self._shards), shard).iter(_ROWS_PER_READ):
                yield from (_Row(shard, next(number), value) for value in batch[self._column])
        except (pa.ArrowInvalid, DatasetsError) as error:
            raise ValueError(f"can't read {self._shards[shard]}: {one_line(error)}") from error

    def _name(self, row: _Row) -> str:
        path = row.value.get("path") if isinstance(row.value, dict) else None
        own = f" ({path})" if path and path != self._shards[row.shard] else ""
        return f"row {row.number} of {self._shards[row.shard]}{own}"

    def _load(self, row: _Row, epoch: int, position: int) -> Tensor:
        channels, *size = self.shape
        pixels = decode_pixels(row.value, self._channels)
        if pixels.shape[2] != channels:
            raise ValueError(f"{pixels.shape[2]} channels, wanted {channels}; channels=1 or 3 would convert")
        draws = np.zeros(3)
        if self._flip or self._fit == "random_crop":
            block, place = divmod(position, _DRAWS_PER_BLOCK)
            draws = _uniforms(2, self._seed, epoch, self._rank, block)[place]
        pixels = fit_pixels(pixels, size[0], size[1], self._fit, draws)
        if self._flip and draws[2] < 0.5:
            pixels = pixels[:, ::-1]
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


@functools.lru_cache(maxsize=8)
def _uniforms(*key: int) -> np.ndarray:
    return np.random.default_rng(key).random((_DRAWS_PER_BLOCK, 3))


def _checked(name: str, value: Any, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    return int(value)
