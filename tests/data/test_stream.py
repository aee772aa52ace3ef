import contextlib
import gc
import gzip
import importlib
import io
import itertools
import pickle
import re
import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Array3D, ClassLabel, Features, Image, List, Value, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from PIL.PngImagePlugin import PngInfo

from hf_ddpm.data import pixels
from hf_ddpm.data import shards as rows_module
from hf_ddpm.data.order import Order
from hf_ddpm.data.pixels import FITS, decode_pixels, to_float, to_uint8
from hf_ddpm.data.sources import open_source
from hf_ddpm.data.stream import load_stream
from tests.launching import ROOT


def noise(count, height=6, width=5, channels=1, seed=0):
    """`count` different images (H, W) or (H, W, C)."""
    shape = (count, height, width) if channels == 1 else (count, height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(pixels, mode=None):
    buffer = io.BytesIO()
    image = PILImage.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(folder, values, shards=1, split="train", feature=None, column="image", row_group_size=None):
    """Parquet shards of one image column; `values` are PNG bytes, or lists where `feature` says so.

    `shards` is their number, or the number of rows of each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    schema = Features({column: feature or Image(), "label": ClassLabel(num_classes=2)}).arrow_schema
    rows = [{"bytes": v, "path": None} if isinstance(v, bytes) or v is None else v for v in values]
    cuts = shards if isinstance(shards, int) else np.cumsum(shards)[:-1]
    parts = np.array_split(np.arange(len(rows)), cuts)
    for i, part in enumerate(parts):
        table = pa.Table.from_pydict(
            {column: [rows[k] for k in part], "label": [0] * len(part)}, schema=schema
        )
        file = folder / f"{split}-{i:05d}-of-{len(parts):05d}.parquet"
        pq.write_table(table, file, row_group_size=row_group_size)
    return folder


def grey_folder(folder, count, shards=1, **kwargs):
    images = noise(count)
    write_parquet(folder, [png(image) for image in images], shards, **kwargs)
    return torch.from_numpy(images)[:, None]


def picture_folder(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(noise(count)):
        PILImage.fromarray(image).save(folder / f"{i:03d}.png")
    return folder


def every(stream, epoch=0, start=0):
    return torch.stack(list(stream.images(epoch, start)))


def filled(stream, positions, size=5):
    """What `slots` gives at these positions, asked for `size` at a time; none may be a hole."""
    items = [positions[i : i + size] for i in range(0, len(positions), size)]
    found = list(stream.slots(items))
    assert all(slots.present.all() for slots in found)
    return torch.cat([slots.images for slots in found])


def as_set(images):
    return sorted(image.numpy().tobytes() for image in images)


def truncated(image):
    """A PNG whose pixels end in the middle."""
    data = png(image)
    return data[: data.index(b"IDAT") + 14]


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
            return decode_pixels({"bytes": data, "path": None}, channels).tolist()
        except ValueError as error:
            return re.sub(" at 0x[0-9a-f]+", "", str(error))

    ours = decoded()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixels, "_open_plain_png", lambda data: None)
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
    assert (pixels._open_plain_png(bytes(data)) is not None) == (mode in ("L", "RGB", "RGBA"))
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
        assert pixels._open_plain_png(buffer.getvalue()) is None
    data = png(noise(1)[0])
    for broken in (b"", data[:20], data[:-1], data + b"\0", data.replace(b"IDAT", b"IDOT")):
        assert pixels._open_plain_png(broken) is None


# the embedded digits


def test_digits_are_sklearns_digits():
    from sklearn.datasets import load_digits

    train, test = load_stream("digits"), load_stream("digits", "test")
    assert train.shape == test.shape == (1, 8, 8)
    parts = every(train), every(test)
    assert [len(part) for part in parts] == [1497, 300]
    assert len(torch.cat(parts).unique()) == 17
    levels = np.asarray(load_digits().images)
    theirs = torch.from_numpy((255 * levels / 16 + 0.5).astype(np.uint8))[:, None]
    assert as_set(torch.cat(parts)) == as_set(theirs)


def test_digits_are_small_stratified_and_decode_as_images():
    folder = ROOT / "hf_ddpm" / "data" / "digits"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 400 * 1024
    counts = []
    for split in ("train", "test"):
        data = load_dataset(str(folder), split=split, streaming=True)
        assert isinstance(data.features["image"], Image) and isinstance(data.features["label"], ClassLabel)
        assert next(iter(data))["image"].mode == "L"
        counts.append(np.bincount([row["label"] for row in data.select_columns(["label"])], minlength=10))
    assert abs(counts[1] - 300 / 1797 * (counts[0] + counts[1])).max() <= 1


# sources


def test_parquet_folder_and_single_file(tmp_path):
    images = grey_folder(tmp_path / "data", 10, shards=3)
    assert torch.equal(every(load_stream(tmp_path / "data")), images)
    file = tmp_path / "data" / "train-00001-of-00003.parquet"
    assert torch.equal(every(load_stream(str(file))), images[4:7])


def test_image_folder(tmp_path):
    images = noise(4, channels=3)
    for i, image in enumerate(images):
        folder = tmp_path / ("cats" if i < 2 else "dogs")
        folder.mkdir(exist_ok=True)
        PILImage.fromarray(image).save(folder / f"{i}.png")
    stream = load_stream(tmp_path)
    assert stream.shape == (3, 6, 5)
    assert torch.equal(every(stream), torch.from_numpy(images).permute(0, 3, 1, 2))


def test_images_in_an_archive(tmp_path):
    """Paths that only fsspec opens."""
    shutil.make_archive(str(tmp_path / "data" / "train"), "zip", picture_folder(tmp_path / "pictures", 12))
    stream = load_stream(tmp_path / "data", shuffle_buffer=4)
    assert as_set(every(stream)) == as_set(torch.from_numpy(noise(12))[:, None])


def test_parquet_without_hugging_face_metadata(tmp_path):
    image = noise(1)[0]
    table = pa.table({"picture": [{"bytes": png(image), "path": None}], "name": ["a"]})
    pq.write_table(table, tmp_path / "train.parquet")
    assert torch.equal(every(load_stream(tmp_path)), torch.from_numpy(image)[None, None])


@pytest.mark.parametrize(
    ("feature", "channels"),
    [
        (List(List(Value("uint8"))), 1),
        (List(List(List(Value("uint8")))), 5),
        (Array3D(shape=(6, 5, 2), dtype="uint8"), 2),
    ],
)
def test_columns_of_arrays(tmp_path, feature, channels):
    images = noise(7, channels=channels)
    write_parquet(tmp_path, images.tolist(), shards=2, feature=feature)
    stream = load_stream(tmp_path, shuffle_buffer=3)
    assert stream.shape == (channels, 6, 5)
    assert as_set(every(stream)) == as_set(
        torch.from_numpy(images.reshape(7, 6, 5, channels)).permute(0, 3, 1, 2)
    )
    resized = every(load_stream(tmp_path, image_size=(4, 8), fit="resize"))
    assert resized.shape == (7, channels, 4, 8)


def test_column_can_be_chosen(tmp_path):
    images = noise(2)
    features = Features({"a": Image(), "b": Image()})
    rows = [{"bytes": png(image), "path": None} for image in images]
    table = pa.Table.from_pydict({"a": rows[:1], "b": rows[1:]}, schema=features.arrow_schema)
    pq.write_table(table, tmp_path / "train.parquet")
    assert torch.equal(every(load_stream(tmp_path, column="b"))[0, 0], torch.from_numpy(images[1]))
    with pytest.raises(ValueError, match="several image columns, choose one with column=: a, b"):
        load_stream(tmp_path)


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


def test_other_png_modes(tmp_path):
    grey = noise(1)[0]
    write_parquet(tmp_path / "i", [png(grey.astype(np.uint16))])
    assert torch.equal(every(load_stream(tmp_path / "i"))[0, 0], torch.from_numpy(grey))
    assert torch.equal(every(load_stream(tmp_path / "i", channels=3))[0, 2], torch.from_numpy(grey))
    write_parquet(tmp_path / "one", [png(grey, "1")])
    assert set(every(load_stream(tmp_path / "one")).unique().tolist()) <= {0, 255}
    write_parquet(tmp_path / "palette", [png(noise(1, channels=3)[0], "P")])
    assert load_stream(tmp_path / "palette").shape == (3, 6, 5)
    write_parquet(tmp_path / "rgba", [png(noise(1, channels=3)[0], "RGBA")])
    assert load_stream(tmp_path / "rgba").shape == (4, 6, 5)
    assert load_stream(tmp_path / "rgba", channels=3).shape == (3, 6, 5)
    write_parquet(tmp_path / "deep", [png((grey.astype(np.uint16) + 1) * 200)])
    with pytest.raises(ValueError, match=r"row 0 of .*train-00000.* are not all 8-bit grey levels"):
        load_stream(tmp_path / "deep", channels=1)


def test_a_mixture_of_channels_is_an_error(tmp_path):
    write_parquet(tmp_path, [png(noise(1)[0]), png(noise(1, channels=3)[0])])
    with pytest.raises(ValueError, match=r"row 1 of .*: 3 channels, wanted 1"):
        every(load_stream(tmp_path))
    assert every(load_stream(tmp_path, channels=3)).shape == (2, 3, 6, 5)


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


# order and resuming


def test_order_without_and_with_shuffle(tmp_path):
    images = grey_folder(tmp_path, 50, shards=5)
    plain = load_stream(tmp_path)
    assert torch.equal(every(plain), images) and torch.equal(every(plain, epoch=3), images)
    shuffled = load_stream(tmp_path, shuffle_buffer=8, seed=1)
    orders = [every(shuffled, epoch) for epoch in range(3)]
    orders.append(every(load_stream(tmp_path, shuffle_buffer=8, seed=2)))
    for a, b in itertools.combinations([images, *orders], 2):
        assert as_set(a) == as_set(b) and not torch.equal(a, b)
    assert torch.equal(every(load_stream(tmp_path, shuffle_buffer=8, seed=1), epoch=2), orders[2])


@pytest.mark.parametrize("shuffle_buffer", [0, 1, 20, 1000])
def test_the_order_is_that_of_order(tmp_path, shuffle_buffer):
    counts = [7, 0, 20, 2]
    images = grey_folder(tmp_path, 29, shards=counts, row_group_size=6)
    order, first = Order(counts, shuffle_buffer, 5), np.cumsum([0, *counts])
    stream = load_stream(tmp_path, shuffle_buffer=shuffle_buffer, seed=5)
    for epoch in (0, 3):
        rows = [order.row(epoch, place) for place in range(29)]
        assert torch.equal(every(stream, epoch), images[[first[shard] + row for shard, row in rows]])


def test_images_start_anywhere(tmp_path):
    grey_folder(tmp_path, 20, shards=3)
    stream = load_stream(tmp_path, shuffle_buffer=6)
    whole = every(stream, epoch=4)
    for start in range(20):
        assert torch.equal(every(stream, epoch=4, start=start), whole[start:])
    assert list(stream.images(4, start=20)) == [] == list(stream.images(4, start=99))


def test_skipping_does_not_decode(tmp_path):
    values = [png(image) for image in noise(5)]
    values[2] = b"no image"
    write_parquet(tmp_path, values)
    assert len(every(load_stream(tmp_path), start=3)) == 2


@pytest.mark.parametrize("shuffle_buffer", [0, 5, 100])
def test_any_start_is_the_tail_of_an_unbroken_read(tmp_path, shuffle_buffer):
    grey_folder(tmp_path, 17, shards=[9, 1, 7], row_group_size=4)
    flags = {"horizontal_flip": True, "image_size": (4, 4), "fit": "random_crop"}
    first, later = (load_stream(tmp_path, shuffle_buffer=shuffle_buffer, **flags) for _ in range(2))
    unbroken = torch.cat(list(first.batches(4, epochs=3)))
    assert torch.equal(unbroken, torch.cat([every(later, epoch) for epoch in range(3)]))
    for start in range(0, len(unbroken), 2):
        assert torch.equal(torch.cat(list(later.batches(3, start=start, epochs=3))), unbroken[start:])
        assert torch.equal(filled(later, range(start, len(unbroken))), unbroken[start:])
    assert list(later.batches(4, start=len(unbroken), epochs=3)) == []


def test_batches_run_across_epochs_and_drop_nothing(tmp_path):
    images = grey_folder(tmp_path, 7)
    stream = load_stream(tmp_path)
    assert [len(batch) for batch in stream.batches(4, epochs=3)] == [4, 4, 4, 4, 4, 1]
    endless = list(itertools.islice(stream.batches(4), 9))
    assert all(batch.dtype == torch.uint8 and batch.shape == (4, 1, 6, 5) for batch in endless)
    assert torch.equal(torch.cat(endless), images.repeat(6, 1, 1, 1)[:36])
    assert torch.equal(next(stream.batches(4, start=7_000_002)), images[2:6])  # whole epochs are not read


def test_batches_and_slots_are_contiguous(tmp_path):
    write_parquet(tmp_path, [png(image) for image in noise(4, channels=3)])
    stream = load_stream(tmp_path, horizontal_flip=True)
    assert next(stream.batches(4)).is_contiguous() and next(stream.slots([range(4)])).images.is_contiguous()
    assert next(stream.images()).is_contiguous()


def test_two_iterators_of_one_stream_do_not_disturb_each_other(tmp_path):
    grey_folder(tmp_path, 12, shards=2)
    stream = load_stream(tmp_path, shuffle_buffer=4)
    pairs = list(zip(stream.images(0), stream.images(1), strict=True))
    assert torch.equal(torch.stack([a for a, _ in pairs]), every(stream, 0))
    assert torch.equal(torch.stack([b for _, b in pairs]), every(stream, 1))


# slots: one order for any number of processes


def test_slots(tmp_path):
    images = grey_folder(tmp_path, 5, shards=2)
    stream = load_stream(tmp_path)
    first, second, third = stream.slots([[1, -1, 4], [5, 12], [-1]])
    assert first.images.dtype == torch.uint8 and first.present.dtype == torch.bool
    assert torch.equal(first.images, torch.stack([images[1], torch.zeros_like(images[0]), images[4]]))
    assert first.present.tolist() == [True, False, True]
    assert torch.equal(second.images, images[[0, 2]]) and second.present.all()
    assert not third.present.any() and not third.images.any()
    backwards = torch.tensor([4, 9, 2, 2, 0])  # not promised to be fast
    assert torch.equal(next(stream.slots([backwards])).images, images[backwards % 5])
    lazily = stream.slots(iter([[0], [-7]]))
    assert torch.equal(next(lazily).images, images[:1])


@pytest.mark.parametrize("shuffle_buffer", [0, 12, 1000])
@pytest.mark.parametrize("shards", ["folder", [61], [3, 20, 0, 9, 1, 15, 13], [1, 2, 30, 4, 8, 8, 1, 7]])
def test_any_number_of_processes_reads_one_order(tmp_path, shuffle_buffer, shards):
    """Process r of W takes positions r, r + W, ...: pixels, crops and flips are those of one process."""
    images = torch.from_numpy(noise(61))[:, None]
    if shards == "folder":
        picture_folder(tmp_path, 61)
    else:
        grey_folder(tmp_path, 61, shards, row_group_size=7)
    flags = {"shuffle_buffer": shuffle_buffer, "seed": 2}
    crops = {"horizontal_flip": True, "image_size": 4, "fit": "random_crop"}
    for changes in ({}, crops):
        whole = torch.cat(list(load_stream(tmp_path, **flags, **changes).batches(9, epochs=2)))
        stream = load_stream(tmp_path, **flags, **changes)
        for world_size in (1, 2, 3, 8):
            found = torch.zeros_like(whole)
            for rank in range(world_size):
                found[rank::world_size] = filled(stream, range(rank, 122, world_size))
            assert torch.equal(found, whole)
        if not changes:
            assert as_set(whole[:61]) == as_set(whole[61:]) == as_set(images)


@pytest.mark.parametrize("source", ["parquet", "folder"])
def test_slots_in_a_workers_process(tmp_path, source):
    """Neither a DataLoader's worker nor `datasets` in it may share the rows out a second time."""
    if source == "folder":
        picture_folder(tmp_path, 20)
    else:
        grey_folder(tmp_path, 20, shards=4)
    stream = load_stream(tmp_path, shuffle_buffer=6)
    expected = filled(stream, range(40))

    class Loaded(torch.utils.data.IterableDataset):
        def __iter__(self):
            return stream.slots([range(i, i + 8) for i in range(0, 40, 8)])

    loader = torch.utils.data.DataLoader(Loaded(), batch_size=None, num_workers=1)
    assert torch.equal(torch.cat([images for images, _ in loader]), expected)


def test_a_stream_can_be_sent_to_another_process(tmp_path):
    grey_folder(tmp_path, 9)
    stream = load_stream(tmp_path, shuffle_buffer=4)
    images = every(stream)
    assert torch.equal(every(pickle.loads(pickle.dumps(stream))), images)


@pytest.mark.parametrize("shuffle_buffer", [0, 9])
def test_an_unreadable_image_is_a_hole_and_shifts_nothing(tmp_path, shuffle_buffer):
    images = grey_folder(tmp_path / "whole", 30, shards=3)
    values = [png(image) for image in noise(30)]
    values[5], values[13] = b"broken", truncated(noise(1)[0])
    values[20] = png(noise(1, 7, 7)[0])
    write_parquet(tmp_path / "holes", values, shards=3)
    flags = {"shuffle_buffer": shuffle_buffer, "horizontal_flip": True}
    whole = filled(load_stream(tmp_path / "whole", **flags), range(60))
    bad = {images[row].numpy().tobytes() for row in (5, 13, 20)}
    bad |= {images[row].flip(-1).numpy().tobytes() for row in (5, 13, 20)}
    present = torch.tensor([image.numpy().tobytes() not in bad for image in whole])
    assert (~present).sum() == 6
    for world_size in (1, 3):
        skipped = 0
        for rank in range(world_size):
            stream = load_stream(tmp_path / "holes", skip_corrupt=True, **flags)
            mine = range(rank, 60, world_size)
            found = next(stream.slots([mine]))
            assert torch.equal(found.present, present[mine])
            assert torch.equal(found.images, whole[mine] * present[mine, None, None, None])
            skipped += stream.skipped
        assert skipped == 6
    stream = load_stream(tmp_path / "holes", skip_corrupt=True, **flags)
    assert torch.equal(torch.cat(list(stream.batches(4, epochs=2))), whole[present])
    assert stream.skipped == 6
    assert torch.equal(torch.cat(list(stream.batches(4, start=30, epochs=2))), whole[30:][present[30:]])


@pytest.mark.parametrize("broken", [3, 12])
def test_unreadable_images_are_named_ten_times_at_most(tmp_path, caplog, broken):
    write_parquet(tmp_path, [png(noise(1)[0])] + [b"broken"] * broken)
    stream = load_stream(tmp_path, skip_corrupt=True)
    for _ in range(2):  # what has been named is not named again
        next(stream.slots([range(2 * (broken + 1))]))
    lines, named = [record.getMessage() for record in caplog.records], min(broken, 10)
    assert stream.skipped == 4 * broken and len(lines) == named + (broken > 10)
    for row, line in enumerate(lines[:named], 1):
        assert re.fullmatch(rf"skipped row {row} of .*train-00000-of-00001.parquet: corrupt image: .*", line)
    assert lines[named:] == ["further images that can't be read are only counted"] * (broken > 10)


# what is read, held and left behind


class Spy:
    """Counts what pyarrow reads of parquet files."""

    def __init__(self, monkeypatch):
        self.files, self.rows = 0, 0
        open_parquet, spy = rows_module._open_parquet, self

        class File:
            def __init__(self, file):
                self._file = file
                self.metadata, self.num_row_groups = file.metadata, file.num_row_groups

            def iter_batches(self, *args, **kwargs):
                spy.files += 1
                for batch in self._file.iter_batches(*args, **kwargs):
                    spy.rows += len(batch)
                    yield batch

        @contextlib.contextmanager
        def opened(name):
            with open_parquet(name) as file:
                yield File(file)

        monkeypatch.setattr(rows_module, "_open_parquet", opened)


def tiny_rows(folder, count, shards, row_group_size):
    """Many rows that cost nothing to make: 1x1 images, with the row's number in them."""
    values = np.stack([np.arange(count) // 256, np.arange(count) % 256], axis=1).reshape(count, 1, 2)
    feature = List(List(Value("uint8")))
    write_parquet(folder, values.tolist(), shards, feature=feature, row_group_size=row_group_size)


def test_a_process_reads_only_its_strips(tmp_path, monkeypatch):
    tiny_rows(tmp_path, 8000, shards=3, row_group_size=100)
    stream, spy = load_stream(tmp_path, shuffle_buffer=160), Spy(monkeypatch)
    for world_size, share in [(1, 1), (2, 2), (4, 4), (8, 8), (16, 8)]:
        lanes = 8 // share
        spy.files = spy.rows = 0
        filled(stream, range(world_size - 1, 8000, world_size), 100)
        assert spy.files <= 8 / share * 3
        # at each start in the middle of a shard up to a row group, at each end up to one read too much
        assert 8000 / share - 64 <= spy.rows <= 8000 / share + lanes * 3 * 100 + lanes * 64, world_size
    spy.files = spy.rows = 0
    next(stream.slots([range(8000 * 7 + 5000, 8000 * 7 + 5008)]))  # resuming is a seek
    assert spy.files <= 16 and spy.rows <= 8 * (100 + 20 + 64)


def test_rows_are_counted_once_when_they_are_needed(tmp_path, monkeypatch):
    tiny_rows(tmp_path, 300, shards=3, row_group_size=50)
    counted, count = [], rows_module.Shards._count_in_footer
    monkeypatch.setattr(
        rows_module.Shards, "_count_in_footer", lambda *args: counted.append(args[1]) or count(*args)
    )
    stream = load_stream(tmp_path, shuffle_buffer=8)
    assert stream.shape == (1, 1, 2) and not counted
    assert stream.num_rows() == len(every(stream)) == len(every(stream, 1)) == 300
    assert sorted(counted) == [0, 1, 2]


def held_rows():
    return sum(1 for thing in gc.get_objects() if type(thing) is rows_module.Row)


@pytest.mark.parametrize(("shuffle_buffer", "most"), [(0, 64), (1, 8), (100, 104), (9999, 2000)])
def test_no_more_rows_are_held_than_the_buffer(tmp_path, shuffle_buffer, most):
    tiny_rows(tmp_path, 2000, shards=3, row_group_size=None)
    images = load_stream(tmp_path, shuffle_buffer=shuffle_buffer).images()
    before, seen = held_rows(), []
    for i, _ in enumerate(images):
        if i % 401 == 0:
            seen.append(held_rows() - before)
    assert max(seen) <= most
    if shuffle_buffer >= 100:
        assert max(seen) > most / 2  # the counting counts
    del images
    assert held_rows() == before


def test_a_large_row_group_is_not_held(tmp_path):
    """Neither 40 MB that are one row group nor what was read of it stays in memory, let alone eight times."""
    values = [png(image) for image in noise(8, 58, 58)]
    assert 3000 < len(values[0]) < 4500
    images = [{"bytes": values[i % 8], "path": None} for i in range(10_000)]
    table = pa.Table.from_pydict({"image": images}, schema=Features({"image": Image()}).arrow_schema)
    file = tmp_path / "train.parquet"
    pq.write_table(table, file, use_dictionary=False, compression="none", write_batch_size=64)
    assert file.stat().st_size > 30 << 20
    del table, images
    most = 24 << 20  # eight lanes: a page and a buffer of 1 MB each, and some rows
    stream, before = load_stream(file, shuffle_buffer=80), pa.total_allocated_bytes()
    batches = stream.batches(64, epochs=1)
    tracemalloc.start()  # what fsspec reads are Python's bytes
    next(batches)
    assert tracemalloc.get_traced_memory()[1] < most
    tracemalloc.stop()
    assert max(pa.total_allocated_bytes() - before for _ in batches) < most
    assert pa.total_allocated_bytes() - before < 1 << 20


@pytest.mark.parametrize("source", ["parquet", "folder"])
def test_no_file_stays_open(tmp_path, source):
    if source == "folder":
        picture_folder(tmp_path, 40)
    else:
        grey_folder(tmp_path, 40, shards=5)
    stream = load_stream(tmp_path, shuffle_buffer=9)

    def opened():
        return [file for file in psutil.Process().open_files() if str(tmp_path) in file.path]

    for iterator in (stream.images(), stream.batches(3), stream.slots([[0], [9]]), stream.select([1, 30])):
        next(iterator)
        assert opened() or source == "folder"
        iterator.close()
        assert not opened()


@pytest.mark.slow
def test_a_half_read_stream_leaves_the_interpreter_in_peace(tmp_path):
    grey_folder(tmp_path / "parquet", 400, shards=2)
    picture_folder(tmp_path / "folder", 100)
    code = "import sys; from hf_ddpm.data import load_stream\n" + "\n".join(
        f"{name} = load_stream(sys.argv[1] + '/{name}', shuffle_buffer=80).batches(4); next({name})"
        for name in ("parquet", "folder")
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_parquet_read_directly_is_what_datasets_reads(tmp_path):
    """The columns of a file may lie in another order, and an image column may hold bare bytes."""
    values = [png(image) for image in noise(9)]
    write_parquet(tmp_path / "images", values, shards=2, row_group_size=2)
    write_parquet(tmp_path / "lists", noise(9).tolist(), feature=List(List(Value("uint8"))))
    write_parquet(tmp_path / "arrays", noise(9, channels=2).tolist(), feature=Array3D((6, 5, 2), "uint8"))
    (tmp_path / "mixed").mkdir()
    pq.write_table(pa.table({"image": [{"bytes": values[0], "path": "a"}]}), tmp_path / "mixed" / "0.parquet")
    pq.write_table(pa.table({"image": [{"path": "b", "bytes": values[1]}]}), tmp_path / "mixed" / "1.parquet")
    for name in ("images", "lists", "arrays", "mixed"):
        dataset, files = open_source(tmp_path / name, "train")
        ours = rows_module.Shards(dataset.decode(False), "image", files)
        theirs = rows_module.Shards(dataset.decode(False), "image", [f"shard {i}" for i in range(len(files))])
        assert list(ours.counts) == list(theirs.counts)
        for shard, count in enumerate(ours.counts):
            for start in range(count + 1):
                read = list(ours.read(shard, start))
                assert read == list(theirs.read(shard, start)) and len(read) == count - start


def test_a_shard_that_shrank_or_broke_is_named(tmp_path):
    grey_folder(tmp_path, 40, shards=2)
    stream = load_stream(tmp_path, shuffle_buffer=4)
    assert stream.num_rows() == 40
    file = tmp_path / "train-00001-of-00002.parquet"
    table, data = pq.read_table(file), bytearray(file.read_bytes())
    pq.write_table(table.slice(0, 15), file)
    with pytest.raises(
        ValueError, match=r"train-00001-of-00002.parquet has lost rows since they were counted$"
    ):
        every(stream)
    data[4:600] = bytes(596)
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"^can't read .*train-00001-of-00002.parquet: "):
        every(stream)


# rows by number


@pytest.mark.parametrize("shards", [1, 3])
def test_select_decodes_only_what_is_asked_for(tmp_path, monkeypatch, shards):
    images = grey_folder(tmp_path, 10, shards)
    stream, decoded = load_stream(tmp_path), []
    decode = importlib.import_module("hf_ddpm.data.stream").decode_pixels
    monkeypatch.setattr(
        "hf_ddpm.data.stream.decode_pixels", lambda *value: decoded.append(1) or decode(*value)
    )
    assert stream.num_rows() == 10 and not decoded
    for rows in ([0], [9], [1, 2, 7], [], list(range(10)), np.array([3, 5])):
        decoded.clear()
        found = list(stream.select(rows))
        assert len(decoded) == len(rows)
        assert torch.equal(torch.stack([*found, images[0]])[:-1], images[list(rows)])
    lazily = stream.select([4, 99])
    assert torch.equal(next(lazily), images[4])  # one at a time: what comes later is not read yet


def test_select_follows_the_order_of_the_first_epoch(tmp_path):
    """With a buffer, with crops and flips: positions are places in what `images(0)` gives."""
    grey_folder(tmp_path, 11, 2)
    flags = {"shuffle_buffer": 4, "seed": 3, "horizontal_flip": True, "image_size": 3, "fit": "random_crop"}
    stream = load_stream(tmp_path, **flags)
    images = every(stream)
    assert stream.num_rows() == len(images)
    for rows in ([0, 1, 10], [3], list(range(11))):
        assert torch.equal(torch.stack(list(stream.select(rows))), images[rows])


def test_select_past_the_end(tmp_path):
    grey_folder(tmp_path, 5)
    stream = load_stream(tmp_path)
    for rows in ([5], [0, 4, 5], [100]):
        with pytest.raises(ValueError, match=rf"^no row {rows[-1]} in .*train-00000-of-00001.parquet$"):
            list(stream.select(rows))


def test_select_names_a_corrupt_row_only_if_asked_for_it(tmp_path):
    images = noise(4)
    write_parquet(tmp_path, [png(image) for image in images[:2]] + [truncated(images[2]), png(images[3])])
    stream = load_stream(tmp_path)
    assert stream.num_rows() == 4
    found = torch.stack(list(stream.select([0, 1, 3])))
    assert torch.equal(found[:, 0], torch.from_numpy(images[[0, 1, 3]]))
    with pytest.raises(ValueError, match=r"^row 2 of .*parquet: corrupt image: "):
        list(stream.select([1, 2]))


# errors


@pytest.mark.parametrize("broken", ["truncated", "garbage", "null"])
def test_corrupt_image_names_row_and_file_or_is_skipped(tmp_path, broken):
    images = noise(6)
    values = [png(image) for image in images]
    values[4] = {"truncated": truncated(images[4]), "garbage": b"not a png", "null": None}[broken]
    write_parquet(tmp_path, values, shards=2)
    for shuffle_buffer in (0, 3):
        with pytest.raises(ValueError, match=r"^row 1 of .*train-00001-of-00002.parquet: [^\n]*$"):
            every(load_stream(tmp_path, shuffle_buffer=shuffle_buffer))
    stream = load_stream(tmp_path, skip_corrupt=True)
    assert torch.equal(every(stream)[:, 0], torch.from_numpy(images[[0, 1, 2, 3, 5]]))
    assert stream.skipped == 1
    assert torch.equal(every(stream, start=4)[:, 0], torch.from_numpy(images[[5]]))


def test_corrupt_file_in_a_folder_is_named(tmp_path):
    for i, image in enumerate(noise(3)):
        (tmp_path / f"{i}.png").write_bytes(png(image) if i != 1 else truncated(image))
    with pytest.raises(ValueError, match=r"^row 1 of .*1\.png\)?: corrupt image: "):
        every(load_stream(tmp_path))


def test_corrupt_first_image(tmp_path):
    write_parquet(tmp_path, [b"broken", png(noise(1)[0])])
    with pytest.raises(ValueError, match=r"row 0 of .*corrupt image"):
        load_stream(tmp_path)
    assert load_stream(tmp_path, skip_corrupt=True).shape == (1, 6, 5)


def test_misfits_are_skipped_too(tmp_path):
    write_parquet(tmp_path, [png(noise(1)[0]), png(noise(1, 7, 5)[0]), png(noise(1, channels=3)[0])])
    stream = load_stream(tmp_path, skip_corrupt=True)
    assert len(every(stream)) == 1 and stream.skipped == 2


def test_ragged_and_out_of_range_arrays(tmp_path):
    write_parquet(tmp_path / "ragged", [[[1, 2], [3]]], feature=List(List(Value("uint8"))))
    with pytest.raises(ValueError, match=r"row 0 of .*corrupt image"):
        load_stream(tmp_path / "ragged")
    write_parquet(tmp_path / "large", [[[1, 256]]], feature=List(List(Value("int64"))))
    with pytest.raises(ValueError, match=r"row 0 of .*values from 1 to 256"):
        load_stream(tmp_path / "large", column="image")
    with pytest.raises(ValueError, match=r"row 0 of .*neither an encoded image nor an \(H, W\)"):
        load_stream(tmp_path / "large", column="label")


def test_decompression_bomb(tmp_path, monkeypatch):
    write_parquet(tmp_path, [png(noise(1)[0])])
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match=r"row 0 of .*decompression bomb"):
        load_stream(tmp_path)


def test_a_stream_without_images_raises(tmp_path):
    write_parquet(tmp_path / "bad", [b"broken"] * 2)
    with pytest.raises(ValueError, match="no usable image"):
        load_stream(tmp_path / "bad", skip_corrupt=True)
    grey_folder(tmp_path / "one", 1)
    crops = load_stream(tmp_path / "one", image_size=64, fit="center_crop", skip_corrupt=True)
    with pytest.raises(ValueError, match=r"no usable image in .*train-00000-of-00001.parquet"):
        next(crops.batches(4))
    assert not next(crops.slots([[0, 1]])).present.any()  # one process of several can't know


def test_a_file_that_datasets_cannot_read_is_named(tmp_path):
    write_parquet(tmp_path, [])  # one empty row group, which datasets 5.2 chokes on
    with pytest.raises(ValueError, match=r"(can't read|no usable image in) .*train-00000-of-00001\.parquet"):
        load_stream(tmp_path)


def test_sources_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"PAR1 and nothing more")
    for source, message in [
        (tmp_path / "missing", "no file or folder .*missing .it looks like a path, so the Hub was not asked"),
        ("./missing", "no file or folder ./missing"),
        (
            "somebody/no-such-set",
            "can't read 'somebody/no-such-set' as a data set: no such folder, and from the Hub: ",
        ),
        (tmp_path / "empty", "can't read .*empty' as a data set: "),
        (tmp_path / "notes.txt", "notes.txt is a file, but not a .parquet file"),
        (tmp_path / "broken", "can't read .*broken' as a data set: "),
        ("", "the data set must be 'digits', a path or a Hub id, got ''"),
        (3, "the data set must be 'digits', a path or a Hub id, got 3"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            load_stream(source)
        assert "\n" not in str(caught.value)


def test_unknown_split_and_columns(tmp_path):
    with pytest.raises(ValueError, match="no split 'validation' in digits; it has train, test"):
        load_stream("digits", "validation")
    with pytest.raises(ValueError, match="no column 'picture'; there are: image, label"):
        load_stream("digits", column="picture")
    pq.write_table(pa.table({"text": ["a"], "number": [1]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="no image column; there are: text, number"):
        load_stream(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "image_size must be an integer of at least 1, got 0"),
        ({"image_size": -8}, "image_size must be an integer of at least 1, got -8"),
        ({"image_size": 8.0}, r"image_size must be a positive integer or a pair \(H, W\), got 8.0"),
        ({"image_size": (8, 8, 1)}, r"image_size must be .* got \(8, 8, 1\)"),
        ({"image_size": (8, "8")}, "image_size must be an integer of at least 1, got '8'"),
        ({"channels": 0}, "channels must be an integer of at least 1, got 0"),
        ({"channels": 1.5}, "channels must be an integer of at least 1, got 1.5"),
        ({"channels": True}, "channels must be an integer of at least 1, got True"),
        ({"shuffle_buffer": -1}, "shuffle_buffer must be an integer of at least 0, got -1"),
        ({"shuffle_buffer": 1e3}, "shuffle_buffer must be an integer of at least 0, got 1000.0"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"fit": "pad"}, f"fit must be one of {', '.join(FITS)}, got 'pad'"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_stream("digits", **arguments)


def test_impossible_positions():
    stream = load_stream("digits", "test")
    for call, name in [
        (lambda: stream.images(-1), "epoch"),
        (lambda: stream.images(0, start=-1), "start"),
        (lambda: stream.batches(0), "batch_size"),
        (lambda: stream.batches(4, start=1.5), "start"),
        (lambda: stream.batches(4, epochs=0), "epochs"),
    ]:
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least"):
            call()
    with pytest.raises(ValueError, match="position must be an integer of at least -1, got -2"):
        list(stream.slots([[0, -2]]))


def test_a_number_of_channels_the_data_does_not_have():
    with pytest.raises(ValueError, match=r"row 0 of .*test-00000-of-00001.parquet: 1 channels, wanted 2"):
        every(load_stream("digits", "test", channels=2))


# train_scripts/convert_idx.py


@pytest.fixture
def convert_idx(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "train_scripts")
    return importlib.import_module("convert_idx")


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
    data = header + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def idx_folder(tmp_path):
    folder = tmp_path / "idx"
    folder.mkdir()
    for prefix, images, suffix in [("train", noise(11), ".gz"), ("t10k", noise(4, seed=1), "")]:
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", np.arange(len(images), dtype=np.uint8) % 3)
    return folder


def test_convert_idx(convert_idx, idx_folder, tmp_path):
    out = tmp_path / "out"
    assert convert_idx.main([str(idx_folder), str(out), "--shards", "3"]) == 0
    names = [f"train-0000{i}-of-00003.parquet" for i in range(3)]
    assert sorted(path.name for path in out.iterdir()) == ["test-00000-of-00001.parquet", *names]
    assert all(pq.ParquetFile(path).metadata.num_row_groups == 1 for path in out.iterdir())
    assert torch.equal(every(load_stream(out))[:, 0], torch.from_numpy(noise(11)))
    assert torch.equal(every(load_stream(out, "test"))[:, 0], torch.from_numpy(noise(4, seed=1)))
    data = load_dataset(str(out), split="train", streaming=True)
    assert data.features == Features({"image": Image(), "label": ClassLabel(num_classes=3)})
    assert [row["label"] for row in data] == [i % 3 for i in range(11)]
    assert convert_idx.main([str(idx_folder), str(out), "--shards", "3"]) == 0  # again, over its own files


def test_convert_idx_refuses(convert_idx, idx_folder, tmp_path, capsys):
    def refused(message, *arguments):
        assert convert_idx.main([str(idx_folder), str(tmp_path / "out"), *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1

    refused("--shards must be 1 to 11 (the number of train images), got 0", "--shards", "0")
    refused("--shards must be 1 to 11 (the number of train images), got 12", "--shards", "12")
    labels = idx_folder / "t10k-labels-idx1-ubyte"
    write_idx(labels, np.zeros(5, dtype=np.uint8))
    refused("4 t10k images but 5 labels")
    labels.write_bytes(labels.read_bytes()[:-1])
    refused(f"{labels} says shape (5,) but holds 4 bytes of data")
    labels.write_bytes(b"\0\0\x08\x03")
    refused(f"{labels} is not an idx file of unsigned bytes with 1 dimensions")
    labels.unlink()
    refused(f"no {labels.name} and no {labels.name}.gz in {idx_folder}")
    zipped = idx_folder / "train-images-idx3-ubyte.gz"
    zipped.write_bytes(zipped.read_bytes()[:-9])
    refused(f"{zipped} is not a whole gzip file")
    assert not (tmp_path / "out").exists()


def test_convert_idx_does_not_mix_with_older_shards(convert_idx, idx_folder, tmp_path, capsys):
    assert convert_idx.main([str(idx_folder), str(tmp_path / "out"), "--shards", "2"]) == 0
    assert convert_idx.main([str(idx_folder), str(tmp_path / "out"), "--shards", "3"]) == 2
    assert "already holds train-00000-of-00002.parquet" in capsys.readouterr().err


def test_convert_idx_help(convert_idx, capsys):
    with pytest.raises(SystemExit) as left:
        convert_idx.main(["--help"])
    shown = capsys.readouterr().out
    assert left.value.code == 0 and "SOURCE" in shown and "--shards" in shown


def test_make_digits_is_deterministic(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "train_scripts")
    importlib.import_module("make_digits").main(["--out", str(tmp_path)])
    for split in ("train", "test"):
        name = f"{split}-00000-of-00001.parquet"
        assert pq.read_table(tmp_path / name).equals(
            pq.read_table(ROOT / "hf_ddpm" / "data" / "digits" / name)
        )
