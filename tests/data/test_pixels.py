"""pixels.py: grey levels and floats, decoding, channels, sizes."""

import io
import itertools
import re

import numpy as np
import pytest
import torch
from datasets import Array2D, Array3D, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from PIL.PngImagePlugin import PngInfo

from hf_ddpm.data import encoded
from hf_ddpm.data.pixels import Decoder, to_float, to_uint8
from hf_ddpm.data.stream import load_stream
from tests.data.pictures import every, noise, png, write_parquet

# uint8 <-> float


def test_all_256_levels_come_back():
    levels = torch.arange(256, dtype=torch.uint8)
    x = to_float(levels)
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    assert torch.equal(to_uint8(x), levels)
    assert torch.equal(to_uint8(x.double()), levels)


def test_to_uint8_clamps_and_rounds():
    step = 2 / 255
    x = torch.tensor([-3.0, -1 + 0.4 * step, -1 + 0.6 * step, 1.7])
    assert to_uint8(x).tolist() == [0, 0, 1, 255]


def test_conversions_refuse_the_wrong_dtype():
    with pytest.raises(ValueError, match=r"to_float needs uint8 images, got torch.float32"):
        to_float(torch.zeros(2))
    with pytest.raises(ValueError, match=r"to_uint8 needs floating-point images, got torch.uint8"):
        to_uint8(torch.zeros(2, dtype=torch.uint8))


# plain PNGs, which skip PIL's parser


def same_as_pil(data, channels=None):
    """Whether pixels, or the words about what is wrong with them, are those of PIL's own way."""

    def decoded():
        try:
            return Decoder(channels)({"bytes": data, "path": None}).tolist()
        except ValueError as error:
            return re.sub(" at 0x[0-9a-f]+", "", str(error))

    ours = decoded()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoded, "open_plain_png", lambda data: None)
        return ours == decoded()


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["L", "RGB", "RGBA", "LA", "1", "P"]), st.integers(1, 40), st.integers(1, 40),
    st.integers(0, 9), st.sampled_from([None, 1, 3]), st.booleans(),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=3),
)  # fmt: skip
def test_plain_pngs_are_what_pil_reads(mode, height, width, level, channels, smooth, damage):
    values = (
        np.add.outer(3 * np.arange(height), 2 * np.arange(width)) if smooth else noise(1, height, width)[0]
    )
    image, buffer = PILImage.fromarray(values.astype(np.uint8)).convert(mode), io.BytesIO()
    image.save(buffer, "PNG", compress_level=level)
    data = bytearray(buffer.getvalue())
    assert (encoded.open_plain_png(bytes(data)) is not None) == (mode in ("L", "RGB", "RGBA"))
    for place, value in damage:
        data[int(place * len(data))] = value
    assert same_as_pil(bytes(data), channels)


def test_each_byte_of_a_plain_png_counts():
    data = png(noise(1)[0])
    for place, flip in itertools.product(range(len(data)), (1, 2, 4, 128)):
        assert same_as_pil(data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :])
    assert all(same_as_pil(data[:length]) for length in range(len(data)))


def test_pngs_that_are_not_plain_are_left_to_pil():
    image = PILImage.fromarray(noise(1)[0])
    words, deep = PngInfo(), PILImage.fromarray(noise(1)[0].astype(np.uint16))
    words.add_text("Title", "a")
    for picture, options in [(image, {"pnginfo": words}), (image, {"dpi": (9, 9)}), (deep, {})]:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", **options)
        assert encoded.open_plain_png(buffer.getvalue()) is None
    data = png(noise(1)[0])
    for broken in (b"", data[:20], data[:-1], data + b"\0", data.replace(b"IDAT", b"IDOT")):
        assert encoded.open_plain_png(broken) is None


# channels


def test_grey_and_rgb_convert_only_when_asked(tmp_path):
    colour, grey = noise(1, channels=3)[0], noise(1)[0]
    write_parquet(tmp_path / "rgb", [png(colour)])
    write_parquet(tmp_path / "grey", [png(grey)])
    assert load_stream(tmp_path / "rgb").shape == (3, 6, 5)
    assert load_stream(tmp_path / "grey").shape == (1, 6, 5)
    as_grey = np.array(PILImage.fromarray(colour).convert("L"))
    assert torch.equal(every(load_stream(tmp_path / "rgb", channels=1))[0, 0], torch.from_numpy(as_grey))
    as_rgb = every(load_stream(tmp_path / "grey", channels=3))[0]
    assert torch.equal(as_rgb, torch.from_numpy(grey).expand(3, 6, 5))


def test_a_mixture_of_channels_is_an_error(tmp_path):
    write_parquet(tmp_path, [png(noise(1)[0]), png(noise(1, channels=3)[0])])
    with pytest.raises(
        ValueError, match=r"row 1 of .*: 3 channels, wanted 1; add channels=3 to convert them"
    ):
        every(load_stream(tmp_path))
    assert every(load_stream(tmp_path, channels=3)).shape == (2, 3, 6, 5)


def test_the_first_image_decides_between_grey_and_colour_never_on_alpha(tmp_path):
    colour, grey = (noise(1, channels=c)[0] for c in (4, 2))
    for name, images, channels in [("rgba", [colour, colour[:, :, :3]], 3), ("la", [grey, grey[:, :, 0]], 1)]:
        for order, some in enumerate((images, images[::-1])):
            folder = write_parquet(tmp_path / f"{name}{order}", [png(image) for image in some])
            assert load_stream(folder).shape == (channels, 6, 5)
            assert len(every(load_stream(folder))) == 2
            kept = every(load_stream(folder, channels=channels + 1))
            assert torch.equal(kept[order], torch.from_numpy(images[0]).permute(2, 0, 1))
            assert (kept[1 - order, -1] == 255).all()


def test_the_ground_is_chosen(tmp_path):
    clear = np.zeros((6, 5, 4), np.uint8)
    write_parquet(tmp_path, [png(clear)])
    for background, levels in [("black", [0, 0, 0]), ("#ff8001", [255, 128, 1])]:
        assert every(load_stream(tmp_path, background=background))[0, :, 0, 0].tolist() == levels
    assert (every(load_stream(tmp_path)) == 255).all()
    with pytest.raises(ValueError, match="background is 'red'; allowed: white, black, or a colour as in"):
        load_stream(tmp_path, background="red")


# storage


def test_storage_decides_not_the_values(tmp_path):
    """A dark image of 16 bits is not one of 8 bits, and nothing of it is passed over in silence."""
    dark = noise(1)[0].astype(np.uint16)
    write_parquet(tmp_path, [png(dark), png(noise(1)[0]), png(dark * 257)])
    for options in ({}, {"skip_corrupt": True}, {"channels": 3}):
        with pytest.raises(
            ValueError, match=r"^row 0 of .*: stored as 16 bits, .*; add to_8_bit=True to conv"
        ):
            load_stream(tmp_path, **options)
    for options in ({"to_8_bit": True}, {"fit": "resize"}):
        found = every(load_stream(tmp_path, **options))[:, 0].numpy()
        assert np.array_equal(found[0], (dark + 128) // 257)
        assert np.array_equal(found[1], dark) and np.array_equal(found[2], dark)


@pytest.mark.parametrize(
    ("dtype", "white"), [("uint16", 65535), ("float32", 1), ("float64", 1), ("float16", 1), ("bool", 1)]
)
@pytest.mark.parametrize("nested", [True, False])
def test_arrays_of_other_numbers(tmp_path, dtype, white, nested):
    values = (np.random.default_rng(0).random((2, 6, 5)) * white).round(0 if white > 1 else 3).astype(dtype)
    feature = List(List(Value(dtype))) if nested else Array2D(shape=(6, 5), dtype=dtype)
    write_parquet(tmp_path, values.tolist(), feature=feature)
    with pytest.raises(
        ValueError, match=rf"^row 0 of .*: stored as {dtype}, not 8 bits a channel; add to_8_"
    ):
        load_stream(tmp_path, column="image", skip_corrupt=True)
    found = every(load_stream(tmp_path, column="image", to_8_bit=True))[:, 0].numpy()
    assert np.array_equal(found, np.rint(values.astype(float) * 255 / white))


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint32", "uint64"])
def test_whole_numbers_without_a_white_are_refused(tmp_path, dtype):
    write_parquet(tmp_path, [[[0, 1], [1, 100]]], feature=List(List(Value(dtype))))
    with pytest.raises(
        ValueError, match=rf"its numbers are {dtype}, whose white nobody knows; allowed: uint8"
    ):
        load_stream(tmp_path, column="image", to_8_bit=True)


def test_floats_out_of_range_stop_a_run_that_skips(tmp_path):
    rows = [[[0.0, 1.0]], [[0.0, 254.0]]]
    write_parquet(tmp_path, rows, feature=List(List(Value("float32"))))
    stream = load_stream(tmp_path, column="image", to_8_bit=True, skip_corrupt=True)
    with pytest.raises(ValueError, match=r"row 1 of .*: floats from 0.0 to 254.0; allowed: 0 to 1"):
        every(stream)


@pytest.mark.parametrize("shape", [(4, 32, 32), (3, 32, 32), (1, 28, 28)])
def test_channels_that_come_first_are_refused(tmp_path, shape):
    write_parquet(tmp_path, [np.zeros(shape, int).tolist()], feature=Array3D(shape=shape, dtype="uint8"))
    with pytest.raises(ValueError, match=r"its first axis looks like channels, which belong at the end"):
        load_stream(tmp_path)


def test_arrays_of_four_channels_have_no_alpha_unless_they_are_said_to_have_them(tmp_path):
    values = noise(2, channels=4)
    write_parquet(tmp_path, values.tolist(), feature=Array3D(shape=(6, 5, 4), dtype="uint8"))
    for channels in (None, 1, 3):
        with pytest.raises(ValueError, match=r"add channels=4 if it is \(H, W, 4\)"):
            load_stream(tmp_path, channels=channels)
    kept = every(load_stream(tmp_path, channels=4))
    assert torch.equal(kept, torch.from_numpy(values).permute(0, 3, 1, 2))


def test_image_size_is_limited():
    for size in (100_000, (1, 10**9)):
        with pytest.raises(ValueError, match=r"^image_size is \d+x\d+; allowed: at most 89,478,485 pixels$"):
            load_stream("digits", image_size=size, fit="resize")


# fit


def test_exact_refuses_another_size_and_names_the_row(tmp_path):
    write_parquet(tmp_path, [png(noise(1)[0]), png(noise(1, 7, 5)[0])])
    with pytest.raises(
        ValueError, match=r"row 1 of .*train-00000-of-00001.parquet: size 7x5 \(HxW\), wanted 6x5"
    ):
        every(load_stream(tmp_path))


def test_resize_is_pils_bicubic(tmp_path):
    colour = noise(1, 9, 12, channels=3)[0]
    write_parquet(tmp_path, [png(colour)])
    stretched = every(load_stream(tmp_path, image_size=(4, 5), fit="resize"))[0]
    expected = PILImage.fromarray(colour).resize((5, 4), PILImage.Resampling.BICUBIC)
    assert torch.equal(stretched, torch.from_numpy(np.asarray(expected).copy()).permute(2, 0, 1))
    # 9 x 12 covers 6 x 6 from its middle 9 x 9
    covered = every(load_stream(tmp_path, image_size=6, fit="resize_crop"))[0]
    expected = PILImage.fromarray(colour).resize((6, 6), PILImage.Resampling.BICUBIC, (1.5, 0, 10.5, 9))
    assert torch.equal(covered, torch.from_numpy(np.asarray(expected).copy()).permute(2, 0, 1))


def test_crops(tmp_path):
    images = noise(40, 9, 12)
    write_parquet(tmp_path, [png(image) for image in images])
    centre = every(load_stream(tmp_path, image_size=(5, 4), fit="center_crop"))
    assert torch.equal(centre[:, 0], torch.from_numpy(images[:, 2:7, 4:8]))

    stream = load_stream(tmp_path, image_size=(5, 4), fit="random_crop", horizontal_flip=True, seed=3)
    crops = every(stream)[:, 0].numpy()
    places = set()
    for crop, image in zip(crops, images, strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(image, (5, 4))
        for flipped in (False, True):
            wanted = crop[:, ::-1] if flipped else crop
            places |= {(*map(int, p), flipped) for p in np.argwhere((windows == wanted).all((2, 3)))}
    tops, lefts, flips = (set(part) for part in zip(*places, strict=True))
    assert tops == set(range(5)) and lefts == set(range(9)) and flips == {False, True}

    again = load_stream(tmp_path, image_size=(5, 4), fit="random_crop", horizontal_flip=True, seed=3)
    torch.manual_seed(1)  # the global generators must not matter
    np.random.seed(1)  # noqa: NPY002
    assert torch.equal(every(again, start=17)[:, 0], torch.from_numpy(crops[17:]))
    assert not torch.equal(every(stream, epoch=1), every(stream, epoch=0))


def test_crop_of_a_smaller_image_is_an_error(tmp_path):
    write_parquet(tmp_path, [png(noise(1)[0])])
    for fit in ("center_crop", "random_crop"):
        with pytest.raises(ValueError, match=r"row 0 of .*: size 6x5 \(HxW\), too small to crop 6x6"):
            every(load_stream(tmp_path, image_size=6, fit=fit))


def test_exif_orientation_is_applied(tmp_path):
    image = PILImage.fromarray(noise(1)[0])
    exif = PILImage.Exif()
    exif[0x0112] = 6  # a quarter turn
    image.save(tmp_path / "a.png", exif=exif)
    assert load_stream(tmp_path).shape == (1, 5, 6)
