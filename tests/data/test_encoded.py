"""encoded.py and pixels.py: image files of every format, depth and kind of transparency, by an oracle."""

import io
import itertools
import logging
import re
import struct
import warnings
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

import hf_ddpm
from hf_ddpm.data.encoded import FORMATS, MAX_PIXELS, ImageRefused, read_image
from hf_ddpm.data.pixels import Decoder, StorageError
from tests.data.pictures import noise
from tests.data.raw_png import CHANNELS, GREY, GREY_ALPHA, PALETTE, RGB, RGBA, chunk, raw_png
from tests.data.raw_tiff import raw_tiff

GROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "#808080": (128, 128, 128), "#ff8001": (255, 128, 1)}
KINDS = [
    *((depth, GREY) for depth in (1, 2, 4, 8, 16)),
    *((depth, PALETTE) for depth in (1, 2, 4, 8)),
    *((depth, kind) for depth in (8, 16) for kind in (RGB, GREY_ALPHA, RGBA)),
]


def nearest(value):
    return int(value + Fraction(1, 2))


def saved(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def rgba_of(numbers, depth, kind, transparent, palette):
    """Colours and alpha of a pixel in 8 bits, from the numbers in a PNG."""
    if kind == PALETTE:
        alpha = 255 if transparent is None else int(transparent[numbers[0]])
        return [int(level) for level in palette[numbers[0]]], alpha
    levels = [nearest(Fraction(int(number) * 255, 2**depth - 1)) for number in numbers]
    if kind in (GREY_ALPHA, RGBA):
        return levels[:-1], levels[-1]
    return levels, 0 if transparent is not None and list(numbers) == list(transparent) else 255


def expected(pixel, channels, ground):
    """The pixel that `Decoder` promises."""
    colours, alpha = pixel
    wanted = channels or len(colours)
    if wanted in (1, 3):
        if len(set(ground)) > 1 and len(colours) == 1:
            colours = colours * 3
        mixed = zip(colours, ground, strict=False)
        colours = [nearest(Fraction(alpha * c + (255 - alpha) * g, 255)) for c, g in mixed]
    if wanted > 2:
        colours = colours * (3 // len(colours))
    elif len(colours) == 3:  # Pillow's luma
        red, green, blue = colours
        colours = [(19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16]
    return colours + [alpha] * (wanted in (2, 4))


@pytest.mark.parametrize(("depth", "kind"), KINDS)
def test_every_png(depth, kind):
    rng = np.random.default_rng(depth * 10 + kind)
    transparents = (False,) if kind in (GREY_ALPHA, RGBA) else (False, True)
    for with_key, channels, (background, ground), interlaced in itertools.product(
        transparents, (None, 1, 2, 3, 4), GROUNDS.items(), (False, True)
    ):
        height, width = rng.integers(1, 10, 2)
        values = rng.integers(0, 2**depth, (height, width, CHANNELS[kind]))
        palette = rng.integers(0, 256, (2**depth, 3)) if kind == PALETTE else None
        key = None
        if with_key:
            key = rng.integers(0, 256, 2**depth) if kind == PALETTE else values[0, -1]
        data = raw_png(values, depth, kind, key, palette, interlaced)
        decode = Decoder(channels, background, to_8_bit=depth == 16)
        if channels is None and kind in (GREY, GREY_ALPHA) and background == "#ff8001":
            if with_key or kind == GREY_ALPHA:
                with pytest.raises(
                    StorageError, match=r"grey image with alpha .* colour '#ff8001'; add chan"
                ):
                    decode(data)
                continue
        pixels = [[rgba_of(numbers, depth, kind, key, palette) for numbers in row] for row in values]
        wanted = [[expected(pixel, channels, ground) for pixel in row] for row in pixels]
        assert decode(data).tolist() == wanted
        if depth == 16:
            with pytest.raises(
                StorageError, match=r"^stored as 16 bits, not 8 bits a channel; add to_8_bit="
            ):
                Decoder(channels, background)(data)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_what_is_opaque_equals_its_plain_version(mode):
    plain = PILImage.fromarray(noise(1, channels=3)[0]).convert(mode[:-1])
    for background, channels in itertools.product(GROUNDS, (None, 1, 2, 3, 4)):
        if (mode, background, channels) != ("LA", "#ff8001", None):
            images = [saved(image, "PNG") for image in (plain, plain.convert(mode))]
            first, second = (Decoder(channels, background)(data) for data in images)
            assert np.array_equal(first, second)


# TIFF: the cases in which Pillow mixes something up are refused


@pytest.mark.parametrize(
    ("bits", "kind", "extra"), [(8, 1, ()), (16, 1, ()), (8, 2, ()), (16, 2, ()), (8, 2, (2,)), (16, 2, (2,))]
)
def test_every_tiff(bits, kind, extra):
    channels = (3 if kind == 2 else 1) + len(extra)
    values = np.random.default_rng(bits).integers(0, 2**bits, (5, 7, channels))
    numbers = np.vectorize(lambda value: nearest(Fraction(int(value) * 255, 2**bits - 1)))(values)
    pixels = [[(row[:3], row[3] if extra else 255) for row in line] for line in numbers.tolist()]
    wanted = [[expected(pixel, None, GROUNDS["white"]) for pixel in line] for line in pixels]
    for order, compressed in itertools.product("<>", (False, True)):
        data = raw_tiff(values, bits, kind, order, extra=extra, compressed=compressed)
        assert Decoder(to_8_bit=True)(data).tolist() == wanted
        if bits == 16:
            with pytest.raises(StorageError, match="stored as 16 bits"):
                Decoder()(data)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"bits": 16, "kind": 0}, "white is 0 in it, which is not read at 16 bits"),
        ({"bits": 16, "kind": 1, "numbers": 2}, "its numbers are signed or of 32 bits"),
        ({"bits": 8, "kind": 1, "numbers": 2}, "its numbers are signed or of 32 bits"),
        ({"bits": 32, "kind": 1}, "its numbers are signed or of 32 bits"),
        ({"bits": 16, "kind": 2, "planes": True}, "its channels lie in planes"),
        ({"bits": 8, "kind": 0, "planes": True}, "its channels lie in planes"),
        ({"bits": 8, "kind": 1, "extra": (2,), "planes": True, "compressed": True}, "lie in planes"),
        ({"bits": 16, "kind": 2, "extra": (1,)}, "its colours of 16 bits lie as RGBa;16"),
        ({"bits": 8, "kind": 8}, "its colours are LAB; allowed: grey, RGB, palettes, CMYK, YCbCr"),
    ],
)
def test_tiffs_that_have_no_reading(facts, words):
    channels = (3 if facts["kind"] in (2, 8) else 1) + len(facts.get("extra", ()))
    data = raw_tiff(np.zeros((4, 4, channels), int), **facts)
    with pytest.raises(ImageRefused, match=words):
        Decoder(to_8_bit=True)(data)


def test_floats(caplog):
    values = np.array([[0, 0.1, 0.5, 1]])
    data = raw_tiff(values[:, :, None], 32, 1, numbers=3)
    with pytest.raises(StorageError, match="stored as floating-point numbers, not 8 bits a channel"):
        Decoder()(data)
    assert Decoder(to_8_bit=True)(data)[0, :, 0].tolist() == [0, 26, 128, 255]
    for bad in (1.01, -0.1, np.nan, np.inf):
        data = raw_tiff(np.full((2, 2, 1), bad), 32, 1, numbers=3)
        with pytest.raises(StorageError, match=r"^floats from .* to .*; allowed: 0 to 1$"):
            Decoder(to_8_bit=True)(data)


# other formats


@pytest.mark.parametrize("magic", ["P2", "P3", "P5", "P6"])
@pytest.mark.parametrize("white", [1, 15, 255, 256, 1000, 65535])
def test_ppm_of_any_depth(magic, white):
    channels = 1 if magic in ("P2", "P5") else 3
    values = np.random.default_rng(white).integers(0, white + 1, (4, 5, channels))
    body = values.astype(">u2" if white > 255 else np.uint8).tobytes()
    if magic in ("P2", "P3"):
        body = " ".join(map(str, values.ravel())).encode() + b"\n"
    data = f"{magic} 5 4 {white}\n".encode() + body
    assert np.array_equal(Decoder(to_8_bit=True)(data), np.floor(values * 255 / white + 0.5))
    if white > 255:
        with pytest.raises(StorageError, match="stored as 16 bits"):
            Decoder()(data)


def test_an_avif_of_10_bits_is_noticed():
    data = bytearray(saved(PILImage.new("RGB", (8, 8)), "AVIF"))
    data[data.index(b"av1C") + 6] |= 0x40
    place = data.index(b"pixi") + 9
    data[place : place + 3] = bytes([10] * 3)
    with pytest.raises(StorageError, match="stored as 10 bits"):
        Decoder()(bytes(data))


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_is_read_which_is_said_once(form, caplog):
    first, *others = (PILImage.fromarray(image) for image in noise(3, channels=3))
    options = {"lossless": True} if form == "WEBP" else {}
    data = saved(first, form, save_all=True, append_images=others, **options)
    decode = Decoder()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert np.array_equal(decode(data), np.asarray(first))
    assert caplog.messages == ["an image file has several frames or pages: the first of each file is read"]


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr"])
@pytest.mark.parametrize("form", ["TIFF", "JPEG"])
def test_colours_with_a_formula_of_pillows(mode, form):
    image = PILImage.fromarray(noise(1, channels=4 if mode == "CMYK" else 3)[0], mode)
    data = saved(image, form)
    assert np.array_equal(Decoder()(data), PILImage.open(io.BytesIO(data)).convert("RGB"))


def test_other_formats_are_not_opened(tmp_path, monkeypatch):
    """An EPS file would have Pillow start the program `gs`, which here would leave a file."""
    program, left = tmp_path / "gs", tmp_path / "left"
    program.write_text(f"#!/bin/sh\ntouch {left}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    image = PILImage.fromarray(noise(1, 8, 8, 3)[0])
    for data in (eps, *(saved(image, form) for form in ("ICO", "PCX", "TGA", "SGI", "DDS"))):
        with pytest.raises(
            ValueError, match=r"^corrupt image: not a whole file of a format that is read: PNG"
        ):
            Decoder()(data)
    assert not left.exists()


def test_every_image_is_opened_with_a_list_of_formats():
    root, calls = Path(hf_ddpm.__file__).parents[1], []
    for file in [*root.glob("hf_ddpm/**/*.py"), *root.glob("train_scripts/**/*.py")]:
        calls += re.findall(r"Image\.open\([^\n]*", file.read_text(encoding="utf-8"))
    assert len(calls) >= 4 and all("formats=" in call for call in calls)
    assert FORMATS == ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM")


# size


def lying_heads():
    """Small files whose heads say that they are larger than what is allowed."""
    side = 2**16 - 1
    for depth, kind in ((8, GREY), (8, RGB), (1, GREY), (16, RGB)):
        for size in ((100_000, 100_000), (9460, 9460), (1, MAX_PIXELS + 1), (2**31 - 1, 2**31 - 1)):
            yield raw_png(np.zeros((1, 1, CHANNELS[kind]), int), depth, kind, size=size)
    for canvas in (1, side):
        yield (
            *(b"GIF89a", struct.pack("<HHBBB", canvas, canvas, 0x80, 0, 0), bytes(6), b","),
            *(struct.pack("<HHHHB", 0, 0, side, side, 0), b"\x02\x02\x44\x01\x00;"),
        )
    yield b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 10**5, 10**5, 1, 24, 0, 0, 0, 0, 0, 0)
    yield b"P6 100000 100000 255\n"
    canvas = (15_999).to_bytes(3, "little") * 2
    yield b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\x10\0\0\0" + canvas
    jpeg = bytearray(saved(PILImage.new("RGB", (8, 8)), "JPEG"))
    place = jpeg.index(b"\xff\xc0") + 5
    jpeg[place : place + 4] = struct.pack(">HH", 65500, 65500)
    yield bytes(jpeg)


def test_an_image_that_says_it_is_too_large_is_refused_before_it_is_decoded():
    for data in lying_heads():
        with warnings.catch_warnings(), pytest.raises(ImageRefused) as refused:
            warnings.simplefilter("error")
            Decoder(to_8_bit=True)(b"".join(data) if isinstance(data, tuple) else data)
        assert str(refused.value).endswith("more than 89,478,485 pixels; allowed: at most so many")


def test_text_in_a_png_that_unpacks_to_much_more_is_refused():
    data = raw_png(np.zeros((2, 2, 1), int), 8, GREY)
    for name in (b"zTXt", b"iCCP"):
        large = chunk(name, b"a\0\0" + zlib.compress(bytes(50 << 20)))
        with pytest.raises(ValueError, match=r"^corrupt image: Decompressed data too large"):
            Decoder()(data[:33] + large + data[33:])


def test_orientation_of_deep_images():
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, 3))
    for turn in range(1, 9):
        deep = read_image(raw_tiff(values, 16, 2, orientation=turn)).values
        plain = read_image(raw_tiff(values // 256, 8, 2, orientation=turn)).values
        assert np.array_equal(deep // 256, plain)
