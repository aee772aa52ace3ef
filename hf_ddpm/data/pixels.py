"""Pixels: an encoded image or an array as uint8, its size, and the way to [-1, 1] and back.

This file knows single images. It never pads, resizes or converts between grey and colour unless told to. How
an image is stored decides what becomes of it, never which values it has. Images stay uint8 until `to_float`,
which is best called on the device.
"""

import hashlib
import logging
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Image, LargeList, List
from PIL import Image as PILImage
from torch import Tensor

from hf_ddpm.data.encoded import EIGHT_BITS, ImageRefused, Raster, read_image
from hf_ddpm.runtime.messages import one_line
from hf_ddpm.shown import fields_line

logger = logging.getLogger(__name__)

# What to do with an image of another size, see `load_stream`
FITS = ("exact", "resize", "resize_crop", "center_crop", "random_crop")
# How the words on an image that can't be decoded begin
CORRUPT = "corrupt image"
# The ground that transparent pixels lie on, where none is named
WHITE = "white"
_GROUNDS = {WHITE: "#ffffff", "black": "#000000"}
# Arrays that become levels of 8 bits when asked for, and the value of white in them
_WHITES = {"bool": 1, "uint16": 65535, "float16": 1, "float32": 1, "float64": 1}


def to_float(images_uint8: Tensor) -> Tensor:
    """Grey levels in the model's range, x / 127.5 − 1.

    Args:
        images_uint8: any shape, uint8.

    Returns:
        The same shape, float32, in [-1, 1].

    Raises:
        ValueError: another dtype.
    """
    if images_uint8.dtype != torch.uint8:
        raise ValueError(f"to_float needs uint8 images, got {images_uint8.dtype}")
    return images_uint8.to(torch.float32) / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """The nearest grey level: exact inverse of `to_float` on all 256 levels, clamped outside [-1, 1].

    Args:
        x: any shape, floating point.

    Returns:
        The same shape, uint8.

    Raises:
        ValueError: another dtype.
    """
    if not x.is_floating_point():
        raise ValueError(f"to_uint8 needs floating-point images, got {x.dtype}")
    return ((x.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def image_digest(image_uint8: Tensor) -> int:
    """A 64-bit digest of an image's pixels (C, H, W), as a signed number; the same on every machine."""
    pixels = image_uint8.contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(pixels, digest_size=8).digest(), "big", signed=True)


class StorageError(ValueError):
    """A data set is stored in a way that isn't read: true of all of its images, so none is passed over."""


def parse_background(text: str) -> tuple[int, int, int]:
    """The levels (red, green, blue) of a ground.

    Args:
        text: white, black, or a colour as in #ff8000.

    Raises:
        ValueError: it is something else.
    """
    digits = _GROUNDS.get(text, text) if isinstance(text, str) else ""
    if not re.fullmatch("#[0-9a-fA-F]{6}", digits):
        raise ValueError(f"background is {text!r}; allowed: white, black, or a colour as in '#ff8000'")
    red, green, blue = bytes.fromhex(digits[1:])
    return red, green, blue


def array_storage(feature: Any) -> str | None:
    """The type of the numbers of a `datasets` column of arrays or lists; None for encoded images."""
    while isinstance(feature, (List, LargeList)):
        feature = feature.feature
    return None if isinstance(feature, (Image, dict)) else feature.dtype


@dataclass
class Decoder:
    """What turns the rows of a data set into pixels of 8 bits.

    Alpha, which is an alpha channel, a transparent colour, or a palette's, is not kept unless `channels` says
    so: transparent pixels are laid on a ground, in 8 bits and without gamma,

        c = round((α c + (255 − α) g) / 255)

    so that an image that is opaque everywhere is what it would be without alpha. Without `channels` an image
    is grey or colour as its file is; a palette counts as colour.

    Numbers of 8 bits or fewer are levels. All others are refused unless `to_8_bit` says that they are turned
    into levels, which is done before anything else: round(255 v / white), with white at 65535 in 16 bits (or
    at 2^b − 1 in b bits), at 1 in floating-point numbers, which must lie in [0, 1], and True in booleans. An
    AVIF of 10 or 12 bits is rounded by its decoder.

    Attributes:
        channels: 1 and 2 are grey without and with alpha, 3 and 4 are RGB without and with alpha, and images
            are converted to it; arrays of other numbers of channels are taken as they are. None keeps an
            image's 1 or 3.
        background: the ground, see `parse_background`; grey images with alpha can't lie on a coloured one
            unless `channels` is given.
        to_8_bit: whether other numbers than those of 8 bits are turned into levels.
        storage: the type of the numbers of arrays and lists, see `array_storage`; None for encoded images.

    Raises:
        ValueError: no such background.
    """

    channels: int | None = None
    background: str = WHITE
    to_8_bit: bool = False
    storage: str | None = None
    _ground: tuple[int, int, int] = field(init=False, repr=False)
    _said: bool = field(default=False, init=False, repr=False)

    __repr__ = fields_line

    def __post_init__(self) -> None:
        self._ground = parse_background(self.background)

    def __call__(self, value: Any) -> np.ndarray:
        """The image in a row of a data set.

        Args:
            value: an encoded image (bytes, or a dict with "bytes"), or an array or lists, (h, w) or
                (h, w, C). No path in it is opened.

        Returns:
            Shape (h, w, C), uint8.

        Raises:
            StorageError: numbers that are not levels of 8 bits, or an array that has no such shape.
            ValueError: not an image, or one that is not read.
        """
        data = value.get("bytes") if isinstance(value, dict) else value
        try:
            raster = read_image(data) if isinstance(data, bytes) else self._read_array(data)
        except (StorageError, ImageRefused):
            raise
        # PIL has a dozen kinds of error for broken data
        except Exception as error:
            raise ValueError(f"{CORRUPT}: {one_line(error)}") from error
        if raster.frames and not self._said:
            self._said = True
            logger.warning("an image file has several frames or pages: the first of each file is read")
        return self._with_channels(self._levels(raster))

    def _read_array(self, data: Any) -> Raster:
        storage = self.storage or (data.dtype.name if isinstance(data, np.ndarray) else None)
        if storage is None or data is None:
            raise ImageRefused(f"neither an encoded image nor an array: {str(data)[:40]}")
        if storage != "uint8" and storage not in _WHITES:
            raise StorageError(
                f"its numbers are {storage}, whose white nobody knows; allowed: uint8, or with to_8_bit "
                f"{', '.join(_WHITES)}"
            )
        values = np.asarray(data, storage)
        if values.ndim == 2:
            values = values[:, :, None]
        if values.ndim != 3 or values.size == 0:
            raise ImageRefused(f"an array of shape {values.shape}; allowed: (H, W) or (H, W, C)")
        count = values.shape[2]
        if count not in (1, 3, self.channels):
            hint = f"add channels={count} if it is (H, W, {count})"
            if values.shape[0] in (1, 3, 4):
                hint = "its first axis looks like channels, which belong at the end"
            raise StorageError(f"an array of shape {values.shape}; allowed: (H, W), (H, W, 1 or 3); {hint}")
        return Raster(values, _WHITES.get(storage, 255), storage if storage in _WHITES else EIGHT_BITS)

    def _levels(self, raster: Raster) -> np.ndarray:
        """The numbers as levels of 8 bits."""
        values, white = raster.values, raster.white
        if raster.storage == EIGHT_BITS:
            return values
        if not self.to_8_bit:
            raise StorageError(
                f"stored as {raster.storage}, not {EIGHT_BITS}; add to_8_bit=True to convert such images"
            )
        if values.dtype.kind == "f":
            if not (np.isfinite(values).all() and 0 <= values.min() and values.max() <= 1):
                raise StorageError(f"floats from {values.min()} to {values.max()}; allowed: 0 to 1")
            return np.rint(values.astype(np.float64) * 255).astype(np.uint8)
        # By a table, which takes less memory than the numbers' products would
        table = ((np.arange(2**16, dtype=np.uint32) * 255 + white // 2) // white).astype(np.uint8)
        return table[values.astype(np.uint16, copy=False)]

    def _with_channels(self, levels: np.ndarray) -> np.ndarray:
        """Levels (h, w, C) with the channels that are wanted."""
        count, wanted = levels.shape[2], self.channels
        if wanted == count or count > 4 or wanted not in (None, 1, 2, 3, 4):
            return levels
        colours, alpha = (levels[:, :, :-1], levels[:, :, -1:]) if count in (2, 4) else (levels, None)
        if wanted in (2, 4):
            alpha = np.full_like(levels[:, :, :1], 255) if alpha is None else alpha
            return np.concatenate([_convert(colours, wanted - 1), alpha], axis=2)
        if alpha is not None:
            colours = self._lay_on_ground(colours, alpha)
        return colours if wanted is None else _convert(colours, wanted)

    def _lay_on_ground(self, colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        if colours.shape[2] == 1 and len(set(self._ground)) > 1:
            if self.channels is None:
                raise StorageError(
                    f"a grey image with alpha has no place on the colour {self.background!r}; add channels=3"
                )
            colours = _convert(colours, 3)
        if alpha.min() == 255:
            return colours
        # At most 255 · 255 + 127, so that 16 bits hold it; channel by channel, as NumPy is slow along three
        laid, weight = np.empty(colours.shape, np.uint8), alpha[:, :, 0].astype(np.uint16)
        for channel in range(colours.shape[2]):
            mixed = colours[:, :, channel] * weight + np.uint16(self._ground[channel]) * (255 - weight)
            laid[:, :, channel] = (mixed + np.uint16(127)) // np.uint16(255)
        return laid


def _convert(colours: np.ndarray, channels: int) -> np.ndarray:
    """Grey as RGB, or RGB as grey by Pillow's formula (ITU-R 601-2 luma), (h, w, 1 or 3), uint8."""
    if colours.shape[2] == channels:
        return colours
    if channels == 3:
        return np.repeat(colours, 3, axis=2)
    return np.asarray(PILImage.fromarray(np.ascontiguousarray(colours)).convert("L"))[:, :, None]


def fit_pixels(pixels: np.ndarray, height: int, width: int, fit: str, draws: np.ndarray) -> np.ndarray:
    """Bring an image to a size.

    Args:
        pixels: shape (h, w, C), uint8.
        height: H.
        width: W.
        fit: one of `FITS`, see `load_stream`.
        draws: two numbers, uniform in [0, 1), that place a random crop.

    Returns:
        Shape (H, W, C), uint8.

    Raises:
        ValueError: another size where `fit` is "exact", or an image that is too small to be cropped.
    """
    h, w, channels = pixels.shape
    if (h, w) == (height, width):
        return pixels
    if fit == "exact":
        raise ValueError(f"size {h}x{w} (HxW), wanted {height}x{width}; add fit=resize to scale it")
    if fit in ("resize", "resize_crop"):
        left = top = 0.0
        if fit == "resize_crop":
            # The largest centred box of the wanted proportions
            scale = max(height / h, width / w)
            left, top = max(0.0, (w - width / scale) / 2), max(0.0, (h - height / scale) / 2)
        box = (left, top, w - left, h - top)
        planes = [PILImage.fromarray(np.ascontiguousarray(pixels[:, :, c])) for c in range(channels)]
        planes = [plane.resize((width, height), PILImage.Resampling.BICUBIC, box) for plane in planes]
        return np.stack([np.asarray(plane) for plane in planes], axis=2)
    if h < height or w < width:
        raise ValueError(f"size {h}x{w} (HxW), too small to crop {height}x{width} from it")
    top, left = (h - height) // 2, (w - width) // 2
    if fit == "random_crop":
        top, left = int(draws[0] * (h - height + 1)), int(draws[1] * (w - width + 1))
    return pixels[top : top + height, left : left + width]
