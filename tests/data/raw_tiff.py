"""TIFF files made by hand, of every depth and layout, which Pillow can't write."""

import struct
import zlib

# Number of a tag, and its type: 3 for 16 bits, 4 for 32
WIDTH, HEIGHT, BITS, COMPRESSION, KIND, PLACES = (256, 3), (257, 3), (258, 3), (259, 3), (262, 3), (273, 4)
ORIENTATION, CHANNELS, ROWS, SIZES, PLANES = (274, 3), (277, 3), (278, 3), (279, 4), (284, 3)
EXTRA, NUMBERS = (338, 3), (339, 3)


def raw_tiff(
    values, bits, kind, order="<", numbers=1, extra=(), planes=False, compressed=False, orientation=1
):
    """A TIFF of the numbers (H, W, C).

    kind: 0 for grey where white is 0, 1 for grey, 2 for RGB, 8 for LAB.
    order: "<" or ">".
    numbers: 1 for unsigned, 2 for signed, 3 for floats.
    extra: what the last channels are: 0 for nothing, 1 for alpha that colours have in them, 2 for alpha.
    planes: whether the channels lie one after the other.
    """
    height, width, channels = values.shape
    raw = values.astype(f"{order}{'_uif'[numbers]}{bits // 8}")
    parts = [raw[:, :, c].tobytes() for c in range(channels)] if planes else [raw.tobytes()]
    if compressed:
        parts = [zlib.compress(part) for part in parts]
    tags = {
        **{WIDTH: [width], HEIGHT: [height], BITS: [bits] * channels, COMPRESSION: [8 if compressed else 1]},
        **{KIND: [kind], PLACES: [0] * len(parts), ORIENTATION: [orientation], CHANNELS: [channels]},
        **{ROWS: [height], SIZES: [len(part) for part in parts], PLANES: [2 if planes else 1]},
        **({EXTRA: extra} if extra else {}),
        NUMBERS: [numbers] * channels,
    }
    end = 8 + 2 + 12 * len(tags) + 4
    for _ in range(2):  # the second time it is known where the parts begin
        entries, beside = b"", b""
        for (tag, form), numbers_of in tags.items():
            packed = struct.pack(f"{order}{'HI'[form - 3] * len(numbers_of)}", *numbers_of)
            entries += struct.pack(f"{order}HHI", tag, form, len(numbers_of))
            if len(packed) <= 4:
                entries += packed.ljust(4, b"\0")
            else:
                entries += struct.pack(f"{order}I", end + len(beside))
                beside += packed
        first = end + len(beside)
        tags[PLACES] = [first + sum(map(len, parts[:i])) for i in range(len(parts))]
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, len(tags))
    return b"".join([head, entries, bytes(4), beside, *parts])
