"""Images by an ordinary lossless code: what fills the stack that the first images draw their bits from.

Bits-back coding draws bits before it gives any back. Were these drawn from chance, a file of few images would
be longer than without a model. So the first image, or a few, are coded by zlib or WebP, whichever is shorter,
and these bytes are what is drawn from. They come out last, whole. This file knows no stack and no model.
"""

import io
import zlib

import numpy as np
from PIL import Image, features

from hf_ddpm.data.encoded import read_image

ZLIB, WEBP = "zlib", "webp"
KINDS = (ZLIB, WEBP)
LARGEST_SIDE = 16_383  # pixels of a WebP


def encode_plain(images: np.ndarray) -> tuple[str, bytes]:
    """Code images without a model.

    Args:
        images: (n, C, H, W), uint8.

    Returns:
        The kind of code, one of `KINDS`, and its bytes.
    """
    found = {ZLIB: zlib.compress(images.tobytes(), 9)}
    number, channels, height, width = images.shape
    if channels in (1, 3) and features.check("webp") and max(number * height, width) <= LARGEST_SIDE:
        sheet = images.transpose(0, 2, 3, 1).reshape(number * height, width, channels)
        data = io.BytesIO()
        picture = Image.fromarray(np.repeat(sheet, 3 // channels, axis=2))
        picture.save(data, "WEBP", lossless=True, quality=100, method=6, exact=True)
        found[WEBP] = data.getvalue()
    kind = min(found, key=lambda name: len(found[name]))
    return kind, found[kind]


def decode_plain(kind: str, data: bytes, shape: tuple[int, int, int, int]) -> np.ndarray:
    """The images that `encode_plain` coded; no more is unpacked than they have.

    Args:
        kind: one of `KINDS`.
        data: the bytes.
        shape: (n, C, H, W).

    Raises:
        ValueError: the bytes are not those of such images.
    """
    number, channels, height, width = shape
    wrong = f"the first {number} images can't be read by {kind}"
    if kind == ZLIB:
        unpacking = zlib.decompressobj()
        try:
            found = unpacking.decompress(data, int(np.prod(shape)) + 1)
        except zlib.error:
            raise ValueError(wrong) from None
        if len(found) != np.prod(shape) or not unpacking.eof or unpacking.unused_data:
            raise ValueError(wrong)
        return np.frombuffer(found, np.uint8).reshape(shape).copy()
    try:
        values = read_image(data).values
    except Exception:  # what Pillow raises on foreign bytes has no common class
        raise ValueError(wrong) from None
    if values.shape != (number * height, width, 3):
        raise ValueError(wrong)
    sheet = values[:, :, :channels].reshape(number, height, width, channels)
    return np.ascontiguousarray(sheet.transpose(0, 3, 1, 2))
