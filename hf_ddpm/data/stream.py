"""Images in: a `datasets` stream becomes uint8 batches, in an order of which any place can be asked for.

    positions ─► rows at these places of the order, still encoded ─► decode ─► fit, flip ─► uint8

The order is order.py's: one for any number of processes, each of which asks for the positions that it wants.
Crops and flips are a function of (seed, epoch, place in the epoch's order). No global random state is read,
and nothing needs saving: a killed run goes on at its position, which is found without replay.

This file deliberately doesn't know models, devices, labels or ranks. Images are not padded, resized or
converted between grey and colour unless told to (pixels.py does, image by image).

Rows are not shuffled by `IterableDataset.shuffle`: the order of a run must outlive an upgrade of `datasets`,
and that shuffle can't be resumed exactly, depends on how ranks share the data, and in datasets 5.2 sleeps for
5 seconds at the end of each epoch.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from numbers import Integral, Real
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.data.encoded import MAX_PIXELS
from hf_ddpm.data.fingerprint import digest_of, take_fingerprint
from hf_ddpm.data.holdout import Choice, Part, Rows, name_of_split
from hf_ddpm.data.labels import Labels, read_labels
from hf_ddpm.data.order import Order
from hf_ddpm.data.ordered import OrderedRows, Wanted, make_order
from hf_ddpm.data.pixels import CORRUPT, FITS, WHITE, Decoder, StorageError, array_storage, fit_pixels
from hf_ddpm.data.shards import Row, Shards
from hf_ddpm.data.sources import open_source
from hf_ddpm.data.survey import Survey, survey, tell
from hf_ddpm.seeds import Use
from hf_ddpm.shown import fields_line, summary
from hf_ddpm.spelling import suggest_keywords

logger = logging.getLogger(__name__)

# Places whose draws share one generator, as seeding costs more than drawing
_DRAWS_PER_BLOCK = 1024
# How many of the images that are passed over a warning names
_NAMED = 10


@suggest_keywords
def load_stream(
    source: str | os.PathLike[str],
    split: str = "train",
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    *,
    column: str | None = None,
    label_column: str | None = None,
    label_names: Sequence[str] | None = None,
    fit: str = "exact",
    background: str = WHITE,
    to_8_bit: bool = False,
    horizontal_flip: bool = False,
    shuffle_memory: float = 0,
    seed: int = 0,
    skip_corrupt: bool = False,
    holdout: float | None = None,
    part: Part = "train",
    check: Callable[[ImageStream], object] | None = None,
) -> ImageStream:
    """Open a data set for streaming and read its first image.

    Args:
        source: "digits" (embedded, 8x8), a folder of images or of parquet files, a parquet file, or a Hub id.
        split: name of the split, or a slice of it as `datasets` spells it, such as "train[:90%]"; see
            `data.holdout.slice_of`.
        image_size: side, or (H, W); None takes the first image's.
        channels: 1 (grey), 3 (RGB), and 2 and 4 (the same with alpha) convert; others must be those of the
            data's arrays. None takes the first image's, grey or RGB.
        column: image column; None finds the only one of encoded images or uint8 arrays (H, W) or (H, W, C).
            Encoded are PNG, JPEG, WebP, BMP, GIF, TIFF, AVIF and PPM, of at most 89,478,485 pixels.
        label_column: column of the images' classes, all of which are read here: a ClassLabel, text or whole
            numbers. For image files it is a column of the metadata beside them, or "label", the names of the
            folders that the files lie in. None reads no labels.
        label_names: names of the classes by their numbers, as another split has them; a row of any other
            class is refused. None takes those of these rows, see labels.py.
        fit: how an image gets `image_size`. "exact": it must have it already. "resize": bicubic.
            "resize_crop": bicubic until it covers H x W, then the centre is cut out. "center_crop" and
            "random_crop": cut out, not scaled.
        background: white, black, or a colour as in #ff8000, on which transparent pixels are laid unless
            `channels` keeps alpha.
        to_8_bit: turn images of 16 bits a channel or of floating-point numbers into levels of 8 bits, by the
            rule of `data.pixels.Decoder`, instead of refusing them. So does a `fit` other than "exact".
        horizontal_flip: mirror each image with probability 1/2.
        shuffle_memory: 0 keeps the source's order. A folder of image files is permuted as a whole by any
            other number. Of parquet files, n holds as many images as n MB (2^20 bytes) take undecoded, drawn
            from all over the data, and permutes them; if all images take less, that is all of them.
        seed: of order, crops, flips, and of the choice of held-out images.
        skip_corrupt: pass over (and count) images that can't be decoded or don't fit, instead of raising.
        holdout: the share of the split's (or slice's) images that are held out, above 0 and below 1, or how
            many, 2 or more; None holds none out. Which ones is a function of (seed, row) alone, for a given
            number of rows: the `data.holdout.held_out`. A split whose rows have to be read to be counted is
            read once for this.
        part: "train": the images that aren't held out. "held-out": those that are. "all": both.
        check: called with the stream before its first image is read; it may refuse it by its `survey`.

    Returns:
        The stream.

    Raises:
        ValueError: an impossible argument, a source that can't be read, or an unusable first image.
    """
    size = (image_size, image_size) if isinstance(image_size, Integral) else image_size
    if size is not None:
        if not isinstance(size, (tuple, list)) or len(size) != 2:
            raise ValueError(f"image_size must be a positive integer or a pair (H, W), got {image_size!r}")
        size = (_checked("image_size", size[0], 1), _checked("image_size", size[1], 1))
        if size[0] * size[1] > MAX_PIXELS:
            raise ValueError(f"image_size is {size[0]}x{size[1]}; allowed: at most {MAX_PIXELS:,} pixels")
    if channels is not None:
        _checked("channels", channels, 1)
    _checked("seed", seed, 0)
    if (
        isinstance(shuffle_memory, bool)
        or not isinstance(shuffle_memory, Real)
        or not 0 <= shuffle_memory < inf
    ):
        raise ValueError(f"shuffle_memory must be a number of MB, at least 0, got {shuffle_memory!r}")
    if fit not in FITS:
        raise ValueError(f"fit must be one of {', '.join(FITS)}, got {fit!r}")

    decoder = Decoder(channels, background, to_8_bit or fit != "exact")
    choice = Choice(str(split), holdout, part, seed)
    found, column = open_source(source, name_of_split(choice.split)).select_column(column)
    tell(found, skip_corrupt)
    decoder.storage = array_storage(found.features[column])
    shards = Shards(found, column, None if choice.whole else choice)
    if label_column is None and label_names is not None:
        raise ValueError("there are label_names without a label_column; allowed: both, or neither")
    labels = None if label_column is None else read_labels(shards, label_column, label_names)
    stream = ImageStream(
        _shards=shards,
        _labels=labels,
        _decoder=decoder,
        _size=size,
        _fit=fit,
        _flip=horizontal_flip,
        _memory=float(shuffle_memory),
        _seed=seed,
        _skip_corrupt=skip_corrupt,
    )
    if check is not None:
        check(stream)
    stream.read_first()
    return stream


class Slots(NamedTuple):
    """Images of given positions, with a hole where there is none.

    Attributes:
        images: uint8 (B, C, H, W), zeros in a hole.
        present: bool (B,), False in a hole.
    """

    images: Tensor
    present: Tensor
    __repr__ = fields_line


class LabelledSlots(NamedTuple):
    """`Slots` of a stream that reads labels.

    Attributes:
        images: uint8 (B, C, H, W), zeros in a hole.
        present: bool (B,), False in a hole.
        labels: the class of each image, int64 (B,); C, "no class", in an empty slot.
    """

    images: Tensor
    present: Tensor
    labels: Tensor
    __repr__ = fields_line


@final
@dataclass(eq=False)
class ImageStream:
    """The images of a data set in the order of order.py; made by `load_stream`.

    An image's position in a run is epoch · `num_rows()` + its place in the epoch's order.

    Attributes:
        shape: (C, H, W) of every image.
    """

    shape: tuple[int, int, int] = field(init=False)
    _shards: Shards = field(repr=False)
    _labels: Labels | None = field(repr=False)
    _decoder: Decoder = field(repr=False)
    _size: tuple[int, int] | None
    _fit: str
    _flip: bool
    _memory: float
    _seed: int
    _skip_corrupt: bool
    _skipped: set[tuple[int, int]] = field(default_factory=set, init=False, repr=False)
    _surveys: dict[bool, Survey] = field(default_factory=dict, init=False, repr=False)

    def __repr__(self) -> str:
        return summary(self, self._facts)

    def _facts(self) -> list[str]:
        """What its one-line `repr` says; rows are counted only where nothing has to be read for it."""
        known = self._shards.addressable or "_order" in self.__dict__
        rows = self._shards.counts[0] if self._shards.addressable else known and self.num_rows()
        images = f"{rows:,} images" if known else "images"
        skipped = [f"{self.skipped:,} passed over"] if self.skipped else []
        return [self._shards.title, f"{images} of {self.shape} (C, H, W)", *skipped]

    def read_first(self) -> None:
        """Find out `shape` by the first image that can be read; done by `load_stream`.

        Raises:
            ValueError: an unusable first image, or none that can be used.
        """
        for row in self._shards.rows():
            try:
                *size, channels = self._decoder(self._shards.encoded(row)).shape
            except ValueError as error:
                if not self._may_skip(error):
                    raise ValueError(f"{self._shards.name(row)}: {error}") from error
                continue
            height, width = self._size or size
            self.shape = (self._decoder.channels or channels, height, width)
            return
        raise ValueError(f"no usable image in {self._shards}")

    @property
    def skipped(self) -> int:
        """How many images the iterators of this object could not read and passed over, each counted once."""
        return len(self._skipped)

    @functools.cached_property
    def _order(self) -> Order:
        return make_order(self._shards, self._memory, self._seed)

    @property
    def row_counts(self) -> list[int]:
        """Rows of each shard, on which the order depends; found once, for some sources by reading them."""
        return list(self._shards.layout.counts)

    def fingerprint(self) -> dict[str, Any]:
        """What tells this data set, and the order in which it is read, from another; see fingerprint.py.

        Raises:
            ValueError: a shard that can't be read.
        """
        labels = {} if self._labels is None else {"labels": self._labels.digest}
        return take_fingerprint(self._shards, self._order) | labels

    def facts(self, fingerprint: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Which images these are, without the name of any: what a run leaves, and an evaluation compares.

        Args:
            fingerprint: of this stream, where it is known already.

        Returns:
            "num_rows": of the whole split. "chosen": how many of them are read. "left_out": of those that the
            split's slice has, how many are not. "fingerprint": of the data and of the choice, 16 hex digits.

        Raises:
            ValueError: a shard that can't be read.
        """
        chosen = self.chosen
        counts = {"num_rows": self.num_rows_of_split, "chosen": len(chosen), "left_out": chosen.left_out}
        return counts | {"fingerprint": digest_of(fingerprint or self.fingerprint())}

    @property
    def folder(self) -> str | None:
        """The folder whose image files are the rows; None for any other source."""
        return self._shards.source.root if self._shards.addressable else None

    def survey(self, show: bool = False, held_out: bool = False) -> Survey:
        """What the heads of the images say: their sizes and modes; looked at once, see survey.py.

        Args:
            show: whether a progress bar is drawn.
            held_out: whether the images that are held out of these are looked at too.

        Raises:
            ValueError: a file of the data set that can't be read.
        """
        if held_out not in self._surveys:
            shards = self._shards.with_held_out if held_out else self._shards
            self._surveys[held_out] = survey(shards, show)
        return self._surveys[held_out]

    def row_at(self, position: int) -> int:
        """The number of the row at a position of the run, epoch · `num_rows()` + place."""
        epoch, place = divmod(position, self.num_rows())
        windows = self._order.lanes > 1
        return self._order.row(epoch, place) if windows else int(self._order.rows(epoch, place, place + 1)[0])

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the images' classes, by their numbers; None where no labels are read."""
        return None if self._labels is None else self._labels.names

    @functools.cached_property
    def labels(self) -> np.ndarray | None:
        """The class of each image in the source's order, int64 (N,); None where no labels are read."""
        return None if self._labels is None else self._labels.ids[self.chosen.all]

    @property
    def class_counts(self) -> list[int] | None:
        """How many of the images each class has; None where no labels are read."""
        return None if self._labels is None else self._labels.counts(self.chosen.all)

    @functools.cached_property
    def _before(self) -> np.ndarray:
        """How many of the images lie in the shards before each one."""
        return np.cumsum([0, *self._shards.counts])

    @property
    def chosen(self) -> Rows:
        """Which rows of the split these are; counted as `num_rows` does."""
        return self._shards.chosen

    @property
    def num_rows_of_split(self) -> int:
        """How many rows the whole split has; counted as `num_rows` does."""
        return sum(self._shards.whole.counts)

    @property
    def split(self) -> str:
        """The split's name as the data set has it, without a slice."""
        return self._shards.source.split

    def unreadable(self, positions: Sequence[int] | np.ndarray) -> list[int]:
        """Which places of epoch 0's order have images that `skip_corrupt` passes over.

        Args:
            positions: the places to look at, ascending; their images are decoded.

        Raises:
            ValueError: an image that can't be read, and isn't to be passed over, or none that can be.
        """
        bad = []
        with OrderedRows(self._shards, self._order) as rows:
            for place in map(int, positions):
                row = rows.row(0, place)
                try:
                    self._pixels(row, 0, place)
                except ValueError as error:
                    if not self._may_skip(error):
                        raise ValueError(f"{self._shards.name(row)}: {error}") from error
                    self._pass_over(row, error)
                    bad.append(place)
        if len(bad) == len(positions):
            raise ValueError(f"no usable image in {self._shards}")
        return bad

    def only(self, rows: Rows, words: str = "") -> ImageStream:
        """Images of the same split, in its order: those with these numbers in the whole split.

        Args:
            rows: which.
            words: what messages add to the name of the split.

        Raises:
            ValueError: there are none, or the first of them can't be read.
        """
        if not len(rows):
            raise ValueError(f"no images are left of {self._shards.title}")
        found = replace(self, _shards=self._shards.choose(rows, words), _memory=0.0)
        found.read_first()
        return found

    def num_rows(self) -> int:
        """How many images an epoch has, those that can't be read included; counted at the first call."""
        return self._order.num_rows

    def images(self, epoch: int = 0, start: int = 0) -> Iterator[Tensor]:
        """The images of one epoch, from place `start` on.

        Args:
            epoch: which epoch's order, zero-based.
            start: places to pass over, whose images are not decoded.

        Returns:
            Iterator of uint8 tensors (C, H, W), on the CPU.
        """
        _checked("epoch", epoch, 0)
        _checked("start", start, 0)
        return self._images(epoch, start)

    def _images(self, epoch: int, start: int) -> Iterator[Tensor]:
        first = epoch * self.num_rows()
        with OrderedRows(self._shards, self._order) as rows:
            for position in range(first + start, first + self.num_rows()):
                _, image = self._image(rows, position)
                if image is not None:
                    yield torch.from_numpy(image.copy())

    def select(self, positions: Sequence[int] | np.ndarray) -> Iterator[Tensor]:
        """The images at places of epoch 0's order; no other one is decoded.

        Args:
            positions: the places, ascending.

        Returns:
            Iterator of uint8 tensors (C, H, W), on the CPU.

        Raises:
            ValueError: an image that can't be read, or a position past the end or not above the one before.
        """
        last = -1
        with OrderedRows(self._shards, self._order) as rows:
            for position in map(int, positions):
                if position <= last:
                    raise ValueError(f"position {position} follows {last}; allowed: ascending, from 0 on")
                if position >= self.num_rows():
                    raise ValueError(f"no row {position} in {self._shards}")
                last, row = position, rows.row(0, position)
                try:
                    yield torch.from_numpy(self._pixels(row, 0, position).copy())
                except ValueError as error:
                    raise ValueError(f"{self._shards.name(row)}: {error}") from error

    def batches(self, batch_size: int, start: int = 0, epochs: int | None = None) -> Iterator[Tensor]:
        """Batches that run across the ends of epochs, so that no image is dropped.

        Args:
            batch_size: images per batch.
            start: positions already consumed, over all epochs; the iterator goes on exactly there.
            epochs: passes over the data in all, those before `start` included; None never ends.

        Returns:
            Iterator of uint8 tensors (B, C, H, W), on the CPU; the last of finitely many may be shorter.

        Raises:
            ValueError: an image that can't be read, or with `skip_corrupt` a whole epoch of them.
        """
        if epochs is not None:
            _checked("epochs", epochs, 1)
        return self._batches(_checked("batch_size", batch_size, 1), _checked("start", start, 0), epochs)

    def _batches(self, batch_size: int, start: int, epochs: int | None) -> Iterator[Tensor]:
        total = self.num_rows()
        batch, in_vain = [], 0
        with OrderedRows(self._shards, self._order) as rows:
            for position in itertools.count(start) if epochs is None else range(start, epochs * total):
                _, image = self._image(rows, position)
                in_vain = in_vain + 1 if image is None else 0
                if in_vain == total:
                    raise ValueError(f"no usable image in {self._shards}")
                if image is not None:
                    batch.append(image)
                if len(batch) == batch_size:
                    yield self._stack(batch)
                    batch = []
        if batch:
            yield self._stack(batch)

    def _stack(self, images: list[np.ndarray]) -> Tensor:
        # Into an array that is there already, as numpy would keep the channels last in a new one
        out = np.empty((len(images), *self.shape), np.uint8)
        return torch.from_numpy(np.stack(images, out=out))

    def slots(
        self, slots: Iterable[Sequence[int]], wanted: Wanted | None = None
    ) -> Iterator[Slots | LabelledSlots]:
        """The images at given positions: what one of several processes trains on.

        Args:
            slots: items of B positions each, epoch · `num_rows()` + place; -1 is an empty slot. Ascending
                within and across the items: others are found too, but a step back costs a seek.
            wanted: which positions the items can have, (n,) int64 → (n,) bool. No row at another one is kept
                in memory, so that processes which share out the positions share out a window too.

        Returns:
            Iterator of `Slots`, one for each item, or of `LabelledSlots` where labels are read. With
            `skip_corrupt`
            an image that can't be read is a hole.

        Raises:
            ValueError: a position below -1, or an image that can't be read.
        """
        with OrderedRows(self._shards, self._order, wanted) as rows:
            for item in slots:
                images = np.zeros((len(item), *self.shape), np.uint8)
                present = np.zeros(len(item), np.bool_)
                labels = np.full(len(item), len(self.class_names or ()))
                for i, position in enumerate(map(int, item)):
                    if _checked("position", position, -1) < 0:
                        continue
                    row, image = self._image(rows, position)
                    if self.labels is not None:
                        labels[i] = self.labels[self._before[row.shard] + row.number]
                    if image is not None:
                        images[i], present[i] = image, True
                found = Slots(torch.from_numpy(images), torch.from_numpy(present))
                yield found if self.labels is None else LabelledSlots(*found, torch.from_numpy(labels))

    def _image(self, rows: OrderedRows, position: int) -> tuple[Row, np.ndarray | None]:
        """The row at a position of the run, and its image (C, H, W), None if that is to be passed over."""
        epoch, place = divmod(position, self.num_rows())
        row = rows.row(epoch, place)
        try:
            return row, self._pixels(row, epoch, place)
        except ValueError as error:
            if not self._may_skip(error):
                hint = "; add skip_corrupt=True to pass over it" * str(error).startswith(CORRUPT)
                raise ValueError(f"{self._shards.name(row)}: {error}{hint}") from error
            self._pass_over(row, error)
            return row, None

    def _may_skip(self, error: ValueError) -> bool:
        return self._skip_corrupt and not isinstance(error, StorageError)

    def _pass_over(self, row: Row, error: ValueError) -> None:
        if row[:2] in self._skipped:
            return
        self._skipped.add(row[:2])
        if len(self._skipped) <= _NAMED:
            logger.warning("skipped %s: %s", self._shards.name(row), error)
        elif len(self._skipped) == _NAMED + 1:
            logger.warning("further images that can't be read are only counted")

    def _pixels(self, row: Row, epoch: int, place: int) -> np.ndarray:
        channels, height, width = self.shape
        pixels = self._decoder(self._shards.encoded(row))
        if pixels.shape[2] != channels:
            hint = "" if self._decoder.channels else "; add channels=3 to convert them, or add channels=1"
            raise ValueError(f"{pixels.shape[2]} channels, wanted {channels}{hint}")
        draws = np.zeros(3)
        if self._flip or self._fit == "random_crop":
            block, index = divmod(place, _DRAWS_PER_BLOCK)
            draws = _uniforms(Use.CROPS, self._seed, epoch, block)[index]
        pixels = fit_pixels(pixels, height, width, self._fit, draws)
        if self._flip and draws[2] < 0.5:
            pixels = pixels[:, ::-1]
        return pixels.transpose(2, 0, 1)


@functools.lru_cache(maxsize=8)
def _uniforms(*key: int) -> np.ndarray:
    return np.random.default_rng(key).random((_DRAWS_PER_BLOCK, 3))


def _checked(name: str, value: Any, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    return int(value)
