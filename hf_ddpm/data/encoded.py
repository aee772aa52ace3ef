"""Encoded images: the bytes of an image file become its numbers, in the depth in which they are stored.

This file knows formats. It knows PNG, JPEG, WebP, BMP, GIF, TIFF, AVIF and PPM and no other: Pillow would
find many more by a file's first bytes, and runs the program `gs` for one of them. Colours become grey or RGB
here, by Pillow's formulas; a colour profile (ICC) or gamma that a file has is ignored, and what has no such
formula, as LAB, is refused. What becomes of depth and alpha is pixels.py's.
"""

import contextlib
import io
import struct
import sys
import warnings
import zlib
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, ImageOps
from PIL import Image as PILImage
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    SAMPLEFORMAT,
)

from hf_ddpm.data.files import MOST_BYTES
from hf_ddpm.shown import fields_line

# Pillow's names of the formats that are read, AVIF's where Pillow was built with it
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM")
# The most pixels of an image, 0.25 GiB of RGB: what Pillow takes for safe
MAX_PIXELS = 89_478_485

EIGHT_BITS = "8 bits a channel"
# The mode that Pillow converts each of its modes of 8 bits to, which is exact but for CMYK and YCbCr
_PLAIN = {
    **{"1": "L", "L": "L", "LA": "LA", "La": "LA", "P": "RGB", "PA": "RGBA", "RGB": "RGB", "RGBA": "RGBA"},
    **{"RGBX": "RGB", "RGBa": "RGBA", "CMYK": "RGB", "YCbCr": "RGB"},
}

# Modes of which a file may name one colour that is transparent
_KEYED = ("1", "L", "RGB", "RGBA", "I;16")


class ImageRefused(ValueError):
    """A whole image that is not read: too large, or with colours or numbers that have no reading here."""


class Raster(NamedTuple):
    """The numbers of an image.

    Attributes:
        values: (h, w, C) with C = 1 for grey, 2 for grey and alpha, 3 for RGB, 4 for RGB and alpha; uint8,
            uint16 or floating point.
        white: the value of white, and of an alpha that is opaque.
        storage: how the source stores them, in words; `EIGHT_BITS` if they are levels of 8 bits.
        frames: whether the file has further frames or pages, which are not read.
    """

    values: np.ndarray
    white: int
    storage: str = EIGHT_BITS
    frames: bool = False

    __repr__ = fields_line


def read_image(data: bytes) -> Raster:
    """The image in a file, its first frame or page, turned as its EXIF orientation says.

    Args:
        data: the file's bytes.

    Raises:
        ImageRefused: more than `MAX_PIXELS`, found before they are decoded, or colours that are not read.
        Exception: whatever Pillow raises for broken data, of which there are a dozen kinds.
    """
    image = open_plain_png(data)
    if image is not None:
        return Raster(_as_array(image), 255)
    image = _open(io.BytesIO(data))
    bits = _bits(image, data)
    if _is_deep_colour(image, bits):
        values, white = _read_deep_colours(data), 65535
    else:
        image = _load(image)
        values, white = _values(image, bits)
    values = _with_transparent_colour(image, values, white, bits)
    storage = _storage(image.mode, bits)
    with contextlib.suppress(Exception):  # broken data after the first frame
        return Raster(values, white, storage, bool(getattr(image, "is_animated", False)))
    return Raster(values, white, storage)


def _storage(mode: str, bits: int) -> str:
    return EIGHT_BITS if bits <= 8 else "floating-point numbers" if mode == "F" else f"{bits} bits"


def _is_deep_colour(image: Any, bits: int) -> bool:
    return bits > 8 and image.mode in ("RGB", "RGBA") and image.format in ("PNG", "TIFF")


class Head(NamedTuple):
    """What the head of an image file says of the image.

    Attributes:
        height: of the image as it is shown, turned as its EXIF orientation says.
        width: likewise.
        mode: Pillow's name of its mode, with its depth if that is more than 8 bits, for people.
        channels: 1 for grey, 2 for grey and alpha, 3 for colour, 4 for colour and alpha.
        storage: how its numbers are stored, as in `Raster`.
    """

    height: int
    width: int
    mode: str
    channels: int
    storage: str = EIGHT_BITS


def read_head(file: BinaryIO) -> Head:
    """What `read_image` will find in a file, told by its head.

    An image is decoded only where its file doesn't end as its format does, so that it may have been cut, or
    where a PNG has its orientation behind the pixels.

    Args:
        file: of the image, at its beginning.

    Raises:
        ImageRefused: it would be refused.
        Exception: whatever Pillow raises for broken data.
    """
    image = _open(file)
    # The settings of an AVIF's codec lie somewhere in its head, and the depth of a PNG at its beginning
    file.seek(0)
    start = file.read(-1 if image.format == "AVIF" else 64)
    bits = _bits(image, start)
    storage = _storage(image.mode, bits)
    mode = "L" if image.mode.startswith("I") else image.mode
    mode = f"{bits}-bit {mode}" if bits > 8 and image.mode != "F" else mode
    if not _ends_well(file, image.format):
        file.seek(0)
        height, width, channels = read_image(file.read(MOST_BYTES)).values.shape
        return Head(height, width, mode, channels, storage)
    # Not `image.getexif()`, which decodes a PNG that has no EXIF
    turned = PILImage.Image.getexif(image).get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    if image.format == "TIFF" and ExifTags.Base.Orientation in image.tag_v2:
        turned = False  # Pillow says its size as it is shown
    height, width = (image.width, image.height) if turned else (image.height, image.width)
    return Head(height, width, mode, _count_channels(image, start), storage)


def _count_channels(image: Any, start: bytes) -> int:
    if image.mode == "F" or image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        plain = "L"
    elif image.format == "PNG" and start[25] == 4:
        plain = "LA"  # which Pillow reads as RGBA in 16 bits
    else:
        plain = _plain_mode(image)
    keyed = image.info.get("transparency") is not None and image.mode in _KEYED
    return {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}[plain] + (keyed and plain in ("L", "RGB"))


def _ends_well(file: BinaryIO, kind: str | None) -> bool:
    """Whether a file is as long as it says, and everything in it that matters was met at its head."""
    size = file.seek(0, io.SEEK_END)
    if kind in ("JPEG", "MPO"):
        file.seek(max(0, size - 2))
        return file.read() == b"\xff\xd9"
    if kind == "WEBP":
        file.seek(4)
        return size >= 8 + int.from_bytes(file.read(4), "little")
    if kind != "PNG":
        return True
    at, met = len(_PNG_START) - 8, b""
    while at < size:
        file.seek(at)
        length, name = int.from_bytes(file.read(4), "big"), file.read(4)
        if name == b"IEND":
            return at + 8 + length <= size
        if name != b"IDAT" and met == b"IDAT":
            return False  # such as an orientation
        at, met = at + 12 + length, name
    return False


def _open(file: BinaryIO) -> Any:
    """Pillow's image of a file's head; nothing is decoded yet."""
    too_large = f"it says that it has more than {MAX_PIXELS:,} pixels; allowed: at most so many"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PILImage.DecompressionBombWarning)
            image = PILImage.open(file, formats=FORMATS)
    except (PILImage.DecompressionBombWarning, PILImage.DecompressionBombError):
        raise ImageRefused(too_large) from None
    except PILImage.UnidentifiedImageError:
        raise ValueError(f"not a whole file of a format that is read: {', '.join(FORMATS)}") from None
    if image.width * image.height > MAX_PIXELS:
        raise ImageRefused(too_large)
    return image


def _load(image: Any) -> Any:
    image.load()
    # Turned as datasets.Image does it
    if image.getexif().get(ExifTags.Base.Orientation) is None:
        return image
    return ImageOps.exif_transpose(image)


def _as_array(image: Any) -> np.ndarray:
    values = np.asarray(image)
    return values if values.ndim == 3 else values[:, :, None]


def _bits(image: Any, data: bytes) -> int:
    """The bits of a channel in the file, of which Pillow may keep 8 without a word."""
    if image.format == "PNG":
        return data[24]
    if image.format == "TIFF":
        tags = image.tag_v2
        bits = max(tags.get(BITSPERSAMPLE, (1,)))
        numbers = max(tags.get(SAMPLEFORMAT, (1,)))
        if numbers == 2 or (bits > 16 and numbers != 3):
            raise ImageRefused("its numbers are signed or of 32 bits; allowed: 1 to 16 bits, and floats")
        # Pillow minds this up to 8 bits only
        white_is_0 = tags.get(PHOTOMETRIC_INTERPRETATION) == 0
        if bits > 8 and white_is_0:
            raise ImageRefused(f"white is 0 in it, which is not read at {bits} bits")
        # Pillow mixes up the planes of other images
        plain = bits == 8 and image.mode in ("L", "RGB", "RGBA") and not white_is_0
        if tags.get(PLANAR_CONFIGURATION, 1) != 1 and not plain:
            raise ImageRefused("its channels lie in planes; allowed: in pixels, or planes of 8 bits of RGB")
        return bits
    if image.format == "PPM":
        # A header's largest value stands where Pillow hands it to its decoder, but for 65535 in grey
        _, *largest = args if isinstance(args := image.tile[0].args, tuple) else (args,)
        if image.mode == "F":
            return 32
        return 16 if image.mode == "I" or max(largest, default=255) > 255 else 8
    if image.format == "AVIF":
        # The boxes of the codec's settings, for colour and alpha; each has flags for 10 or more, and 12 bits
        boxes = [part[1] for part in data.split(b"av1C\x81")[1:] if len(part) > 1]
        return max([12 if box & 0x20 else 10 if box & 0x40 else 8 for box in boxes], default=8)
    return 8


def _values(image: Any, bits: int) -> tuple[np.ndarray, int]:
    """The numbers of a loaded image (h, w, C), and the value of white."""
    if image.mode == "F":
        return _as_array(image), 1
    if image.mode.startswith("I;16"):
        return _as_array(image).astype(np.uint16), 2**bits - 1
    if image.mode == "I" and image.format == "PPM":
        return _as_array(image).astype(np.uint16), 65535
    plain = _plain_mode(image)
    return _as_array(image if image.mode == plain else image.convert(plain)), 255


def _plain_mode(image: Any) -> str:
    """The mode that an image is converted to.

    Raises:
        ImageRefused: its colours are not read.
    """
    plain = _PLAIN.get(image.mode)
    if plain is None:
        raise ImageRefused(f"its colours are {image.mode}; allowed: grey, RGB, palettes, CMYK, YCbCr")
    return "RGBA" if image.mode == "P" and image.has_transparency_data else plain


def _with_transparent_colour(image: Any, values: np.ndarray, white: int, bits: int) -> np.ndarray:
    """The values with an alpha channel, if the file names one colour that is transparent.

    A PNG names it in its own depth, so that in a grey image of 4 bits the number 15 is white.
    """
    key = image.info.get("transparency")
    if key is None or image.mode not in _KEYED or values.shape[2] in (2, 4):
        return values
    scale = white // (2**bits - 1) if image.mode == "L" else 1
    colour = np.array(key) % (2**bits if image.mode != "1" else 256) * scale
    alpha = np.where((values == colour).all(axis=2, keepdims=True), 0, white)
    return np.concatenate([values, alpha.astype(values.dtype)], axis=2)


def _read_deep_colours(data: bytes) -> np.ndarray:
    """All 16 bits of a PNG or TIFF of grey and alpha, RGB, or RGB and alpha, (h, w, C), uint16.

    Pillow keeps the upper byte of each number. Told the other byte order, it keeps the lower one.
    """
    if data.startswith(_PNG_START) and data[25] == 4:
        # Grey and alpha of 16 bits lie as the four channels of 8 bits do that they are read as
        head = data[12:24] + b"\x08\x06" + data[26:29]
        data = data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]
        return np.ascontiguousarray(_as_array(_load(_open(io.BytesIO(data))))).view(">u2").astype(np.uint16)
    upper, lower = _open(io.BytesIO(data)), _open(io.BytesIO(data))
    order = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
    swapped = []
    for tile in upper.tile:
        rawmode, *others = tile.args if isinstance(tile.args, tuple) else (tile.args,)
        if rawmode[:-1] not in ("RGB;16", "RGBX;16", "RGBA;16"):
            raise ImageRefused(f"its colours of 16 bits lie as {rawmode}; allowed: RGB or RGBA")
        rawmode = rawmode[:-1] + order[rawmode[-1]]
        swapped.append(tile._replace(args=(rawmode, *others) if others else rawmode))
    lower.tile = swapped
    values = _as_array(_load(upper)).astype(np.uint16)
    values <<= 8
    values |= _as_array(_load(lower))
    return values


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
    if mode is None or not whole or not 0 < width * height <= MAX_PIXELS:
        return None
    try:
        return PILImage.frombytes(mode, (width, height), data[head : head + length], "zip", mode)
    except ValueError:
        # The data is broken, which PIL will say in its own words
        return None
