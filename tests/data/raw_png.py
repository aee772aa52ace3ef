"""PNG files made by hand, of every depth and kind of colour, which Pillow can't write."""

import struct
import zlib

import numpy as np

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}
# First row and column, and steps between rows and columns, of the seven passes of an interlaced PNG
PASSES = (
    *((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4)),
    *((2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)),
)


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def raw_png(values, depth, kind, transparent=None, palette=None, interlaced=False, size=None):
    """A PNG of the numbers (H, W, C) in its own depth; `transparent` are the numbers of the chunk tRNS.

    `size`, (H, W), is what the header says if it lies.
    """
    height, width = size or values.shape[:2]
    passes = PASSES if interlaced else ((0, 0, 1, 1),)
    lines = b""
    for top, left, down, right in passes:
        part = values[top::down, left::right]
        lines += b"".join(b"\0" + _packed(row, depth) for row in part) if part.size else b""
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlaced))]
    if palette is not None:
        parts.append(chunk(b"PLTE", np.asarray(palette, np.uint8).tobytes()))
    if transparent is not None:
        form = np.uint8 if kind == PALETTE else ">u2"
        parts.append(chunk(b"tRNS", np.asarray(transparent).astype(form).tobytes()))
    parts += [chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _packed(row, depth):
    if depth >= 8:
        return row.astype(">u2" if depth == 16 else np.uint8).tobytes()
    bits = (row.reshape(-1, 1) >> np.arange(depth)[::-1]) & 1
    return np.packbits(bits.astype(np.uint8)).tobytes()
