"""Pixels: an encoded image or an array as uint8, its size, and the way to [-1, 1] and back.

This file knows single images. It never pads, resizes or converts between grey and colour unless told to.
Images stay uint8 until `to_float`, which is best called on the device.
"""

import hashlib
import io
import struct
import zlib
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, ImageOps
from PIL import Image as PILImage
from torch import Tensor

from hf_ddpm.runtime.messages import one_line

# What to do with an image of another size, see `load_stream`
FITS = ("exact", "resize", "resize_crop", "center_crop", "random_crop")
# PIL's mode for the numbers of channels that it converts between
MODES = {1: "L", 3: "RGB"}


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


def decode_pixels(value: Any, channels: int | None) -> np.ndarray:
    """The image in a row of a data set.

    Args:
        value: an encoded image (bytes, or a dict with "bytes"), or an array or lists, (h, w) or (h, w, C).
            No path in it is opened.
        channels: 1 (grey) and 3 (RGB) convert the image; None and others leave it as it is.

    Returns:
        Shape (h, w, C), uint8.

    Raises:
        ValueError: not an image, or values that are not grey levels of 8 bits.
    """
    data = value.get("bytes") if isinstance(value, dict) else value
    mode = MODES.get(channels or 0)
    try:
        pixels = _open_image(data, mode) if isinstance(data, bytes) else np.asarray(data)
    # PIL has a dozen kinds of error for broken data
    except Exception as error:
        raise ValueError(f"corrupt image: {one_line(error)}") from error
    if pixels.ndim not in (2, 3) or pixels.size == 0 or pixels.dtype.kind not in "uif":
        raise ValueError(f"neither an encoded image nor an (H, W) or (H, W, C) array: {str(data)[:40]}")
    if pixels.dtype != np.uint8:
        levels = pixels.astype(np.uint8)
        # Floats up to 1 that are all 0 or 1 are black and white in the range 0..1, not levels of 0..255
        unit_range = pixels.dtype.kind == "f" and pixels.max() == 1
        if (levels != pixels).any() or unit_range:
            raise ValueError(f"values from {pixels.min()} to {pixels.max()} are not all 8-bit grey levels")
        pixels = levels
    pixels = np.atleast_3d(pixels)
    if mode and pixels.shape[2] != channels and pixels.shape[2] in MODES:
        image = PILImage.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
        pixels = np.atleast_3d(np.asarray(image.convert(mode)))
    return pixels


def _open_image(data: bytes, mode: str | None) -> np.ndarray:
    image = open_plain_png(data)
    if image is None:
        image = PILImage.open(io.BytesIO(data))
        image.load()
        # Turned as datasets.Image does it
        if image.getexif().get(ExifTags.Base.Orientation) is not None:
            image = ImageOps.exif_transpose(image)
    plain = {"1": "L", "P": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}
    wanted = mode or plain.get(image.mode, image.mode)
    # Modes I and F have more than 8 bits, which PIL would clip without a word
    if image.mode == wanted or image.mode[0] in "IF":
        return np.asarray(image)
    return np.asarray(image.convert(wanted))


_PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
# Width, height, form and checksum of the chunk IHDR, then length and name of the next chunk
_PNG_HEAD = struct.Struct(">II5sI I4s")
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
# PIL's mode for each form of 8 bits that is not interlaced
_PNG_MODES = {b"\x08\0\0\0\0": "L", b"\x08\2\0\0\0": "RGB", b"\x08\6\0\0\0": "RGBA"}


def open_plain_png(data: bytes) -> PILImage.Image | None:
    """PIL's image of a PNG of the chunks IHDR, one IDAT and IEND; None for any other file.

    Most small images are such PNGs. It takes a third of PIL's time, which goes mostly into finding the format
    and the chunks, not into decoding.
    """
    head = len(_PNG_START) + _PNG_HEAD.size
    if len(data) < head or not data.startswith(_PNG_START):
        return None
    width, height, form, checksum, length, name = _PNG_HEAD.unpack_from(data, len(_PNG_START))
    mode = _PNG_MODES.get(form)
    whole = name == b"IDAT" and data[head + length + 4 :] == _PNG_END and zlib.crc32(data[12:29]) == checksum
    if mode is None or not whole or not 0 < width * height <= (PILImage.MAX_IMAGE_PIXELS or 0):
        return None
    try:
        return PILImage.frombytes(mode, (width, height), data[head : head + length], "zip", mode)
    except ValueError:
        # The data is broken, which PIL will say in its own words
        return None


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
        raise ValueError(
            f"size {h}x{w} (HxW), wanted {height}x{width}; a `fit` other than 'exact' would change it"
        )
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
