"""advice.py: the flags that a command lacks for its images, and that the command runs with exactly these."""

import io

import numpy as np
import pytest
from PIL import Image as PILImage

from hf_ddpm import TrainConfig, train
from hf_ddpm.data.advice import Needs, Reading, check_images, missing_flags
from hf_ddpm.data.encoded import Head, read_head, read_image
from hf_ddpm.data.stream import load_stream
from hf_ddpm.data.survey import Survey

DEEP = "16 bits"


def found(*heads, unreadable=0, **others):
    """A survey of these images: (height, width), or (height, width, channels, storage)."""
    full = [Head(h, w, "m", *(rest or [3])) for h, w, *rest in heads]
    survey = Survey("data", len(full) + unreadable, len(full) + unreadable, unreadable=unreadable, **others)
    survey.heads.update(full)
    survey.named += ["bad.png"] * bool(unreadable)
    return survey


def flags(survey, needs=None, **reading):
    return " ".join(missing_flags(survey, Reading(**reading), needs or Needs()))


FEW = {"fit": "center_crop", "size": (16, 16)}


@pytest.mark.parametrize(
    ("heads", "reading", "wanted"),
    [
        # Sizes
        ([(28, 28)] * 3, {}, ""),
        ([(80, 120), (3024, 4032)], {}, "--image-size 64 --fit resize_crop"),
        ([(40, 60), (3024, 4032)], {}, "--image-size 40 --fit resize_crop"),
        ([(5, 7), (9, 9)], {}, "--image-size 5 --fit resize_crop"),
        (
            [(9, 200)] + [(200, 100)] * 19,
            {},
            "--image-size 64 --fit resize_crop",
        ),  # one in twenty is enlarged
        ([(9, 200)] + [(200, 100)] * 18, {}, "--image-size 9 --fit resize_crop"),
        ([(80, 120), (100, 90)], {"size": (20, 24)}, "--fit resize_crop"),
        ([(80, 120), (100, 90)], {"size": (20, 24), "fit": "resize"}, ""),
        ([(80, 120), (12, 90)], FEW, "--fit resize_crop"),
        ([(80, 120), (16, 16)], FEW, ""),
        # Channels
        ([(8, 8, 1), (8, 8, 3), (8, 8, 4)], {}, "--channels 3"),
        ([(8, 8, 3), (8, 8, 4)], {}, ""),
        ([(8, 8, 1), (8, 8, 2)], {}, ""),
        ([(8, 8, 1), (8, 8, 2)], {"background": "#ff8000"}, "--channels 3"),
        ([(8, 8, 1), (8, 8, 3)], {"channels": 1}, ""),
        # Depth, which a fit converts too
        ([(8, 8, 1, DEEP), (8, 8, 1)], {}, "--to-8-bit"),
        ([(8, 8, 1, DEEP)], {"to_8_bit": True}, ""),
        ([(8, 8, 1, DEEP), (9, 9, 3)], {}, "--image-size 8 --fit resize_crop --channels 3"),
    ],
)
def test_flags(heads, reading, wanted):
    assert flags(found(*heads), **reading) == wanted


def test_images_that_cannot_be_read_or_do_not_fit():
    assert flags(found((8, 8), unreadable=2)) == "--skip-corrupt"
    assert flags(found((8, 8), unreadable=2), skip_corrupt=True) == ""
    assert flags(found((8, 8), unreadable=2), skip_corrupt=None) == ""  # the command has no such flag
    # With a size that somebody asked for, others may be passed over; not with the first image's
    mixed = found((8, 8), (9, 9))
    assert flags(mixed, skip_corrupt=True, size=(9, 9)) == ""
    assert flags(mixed, skip_corrupt=True, size=(7, 7)) == "--fit resize_crop"
    assert flags(mixed, skip_corrupt=True) == "--image-size 8 --fit resize_crop"
    with pytest.raises(
        ValueError, match=r"^data: 2 images, 2 can't be read .*; allowed: at least one that can be$"
    ):
        check_images(found(unreadable=2), Reading(), Needs())


def test_what_the_network_takes():
    fixed = Needs(shape=(1, 8, 6))
    assert flags(found((8, 6, 1)), fixed) == ""
    assert flags(found((8, 8, 3)), fixed) == "--image-size 8x6 --fit resize_crop --channels 1"
    assert flags(found((8, 6, 1)), fixed, size=(8, 8), channels=3) == "--image-size 8x6 --channels 1"
    with pytest.raises(
        ValueError, match=r"1 image of 8x6 \(HxW\), mode m, for a network of 1x8x6 \(CxHxW\): add"
    ):
        check_images(found((8, 6)), Reading(), fixed)
    eights = Needs(takes=lambda height, width: height % 8 == width % 8 == 0 and max(height, width) <= 256)
    assert flags(found((24, 32)), eights) == ""
    assert flags(found((100, 100)), eights) == "--image-size 64 --fit resize_crop"
    assert flags(found((30, 30)), Needs(eights.takes, most=32)) == "--image-size 24 --fit resize_crop"
    assert flags(found((512, 512)), eights) == "--image-size 64 --fit resize_crop"
    assert flags(found((512, 512)), eights, size=(512, 512)) == ""


def test_a_size_that_the_network_does_not_take_is_told_in_the_same_line():
    eights = Needs(takes=lambda height, width: height % 8 == width % 8 == 0 and max(height, width) <= 256)
    assert flags(found((30, 30)), eights, size=(30, 30)) == "--image-size 24 --fit resize_crop"
    assert flags(found((32, 32)), eights, size=(30, 37)) == "--image-size 24x32 --fit resize_crop"
    assert flags(found((8, 8), (9, 9)), eights, size=(3, 5)) == "--image-size 8 --fit resize_crop"
    assert flags(found((24, 24)), eights, size=(30, 30)) == "--image-size 24"
    assert flags(found((30, 30), unreadable=1), eights, size=(30, 30), fit="resize") == (
        "--image-size 24 --skip-corrupt"
    )
    # Where nothing else is wrong the network's own error names the sizes below and above
    assert flags(found((30, 30)), eights, size=(30, 30), fit="resize") == ""
    none = Needs(takes=lambda height, width: False)
    assert flags(found((30, 30)), none, size=(30, 30)) == ""
    with pytest.raises(ValueError, match="1 image of 30x30, mode m, for a network that takes no 30x31: add"):
        check_images(found((30, 30)), Reading((30, 31)), eights)


def test_arrays_with_odd_axes_are_left_to_their_reader():
    assert flags(found((3, 32, 32), arrays=True)) == ""
    assert flags(found((8, 8, 5), arrays=True), channels=5) == ""
    assert flags(found((8, 8, 3, "uint16"), arrays=True)) == "--to-8-bit"


def test_the_line_is_short_whatever_the_images_are():
    many = found(*((3000 + i, 4000 + i, 3) for i in range(40)), unreadable=40)
    many.heads.update({Head(i, i, f"16-bit MODE{i}", 1, DEEP): 10**6 for i in range(1, 9)})
    many.named[:] = ["n" * 60]
    with pytest.raises(ValueError) as error:
        check_images(many, Reading((8, 8), 3), Needs(shape=(1, 16, 12)))
    line = str(error.value)
    assert len(line) < 300 - len("hf-ddpm evaluate: error: ") and line.startswith(
        "80 images of 48 sizes (1x1 "
    )
    assert line.endswith(": add --image-size 16x12 --fit resize_crop --channels 1 --skip-corrupt")


def picture(rng, mode, turned):
    """An encoded image of a random size, mode and format."""
    height, width = rng.integers(9, 40, 2)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if mode == "16 bits":
        image = PILImage.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
    else:
        image = PILImage.fromarray(pixels).convert(mode)
    kinds = {"RGB": "PNG JPEG WEBP TIFF", "CMYK": "JPEG TIFF", "L": "PNG JPEG TIFF"}.get(mode, "PNG").split()
    exif = PILImage.Exif()
    exif[0x0112] = 6 if turned else 1
    buffer = io.BytesIO()
    image.save(buffer, kinds[rng.integers(len(kinds))], exif=exif)
    return buffer.getvalue()


MODES = ("RGB", "L", "P", "RGBA", "LA", "CMYK", "1", "16 bits")


def test_the_head_says_what_decoding_finds():
    rng = np.random.default_rng(0)
    for mode in MODES:
        for turned in (False, True) * 4:
            data = picture(rng, mode, turned)
            head, raster = read_head(io.BytesIO(data)), read_image(data)
            assert (head.height, head.width, head.channels) == raster.values.shape
            assert head.storage == raster.storage


def test_an_orientation_behind_the_pixels():
    data = picture(np.random.default_rng(0), "RGBA", True)
    start, end = data.index(b"eXIf") - 4, data.index(b"IDAT") - 4
    late = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    head = read_head(io.BytesIO(late))
    assert head == read_head(io.BytesIO(data)) and head[:2] == read_image(late).values.shape[:2]


@pytest.mark.parametrize("seed", range(12))
def test_the_command_runs_with_exactly_these_flags(tmp_path, seed):
    rng = np.random.default_rng(seed)
    for i in range(8):
        mode = MODES[rng.integers(len(MODES))]
        (tmp_path / f"{i}.jpg").write_bytes(picture(rng, mode, rng.random() < 0.3))
    if seed % 2:
        (tmp_path / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nno image")
    survey = load_stream(tmp_path, image_size=8, fit="resize", skip_corrupt=True).survey()
    given = {"fit": ("exact", "center_crop", "resize")[seed % 3]}
    words = " ".join(missing_flags(survey, Reading(**given), Needs())).split()
    added = dict(zip(words[::2], words[1::2], strict=False))
    options = {"fit": added.get("--fit", given["fit"]), "skip_corrupt": "--skip-corrupt" in words}
    options |= {"image_size": int(added["--image-size"])} if "--image-size" in added else {}
    options |= {"channels": int(added["--channels"])} if "--channels" in added else {}
    stream = load_stream(tmp_path, **options)
    assert len(list(stream.images())) == 8 and stream.skipped == seed % 2


def test_train_refuses_with_one_line_and_leaves_no_files(tmp_path):
    data = tmp_path / "photos"
    data.mkdir()
    for i, (size, mode) in enumerate([((120, 80), "RGB"), ((90, 100), "L"), ((70, 70), "RGBA")]):
        PILImage.new(mode, size).save(data / f"{i}.png")
    (data / "9.jpg").write_bytes(b"no image")
    plan = {"dataset": str(data), "output_dir": str(tmp_path / "run"), "model": "tiny"}
    with pytest.raises(ValueError) as error:
        train(TrainConfig(**plan))
    assert str(error.value) == (
        "4 images of 3 sizes (70x70 to 80x120, HxW), modes RGB 1, L 1, RGBA 1, 1 can't be read (9.jpg): add "
        "--image-size 8 --fit resize_crop --channels 3 --skip-corrupt"
    )
    assert not (tmp_path / "run").exists()
    flags = {"image_size": "8", "fit": "resize_crop", "channels": 3, "skip_corrupt": True}
    train(TrainConfig(**plan, **flags, max_steps=3, batch_size=4, sample_every=0, log_every=1))
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert '"skipped": 1' in log[-1]  # one file, met in three epochs
