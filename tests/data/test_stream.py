"""stream.py: the order of images, resuming, positions and slots, unreadable images."""

import itertools
import pickle
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import List, Value

from hf_ddpm.data.order import Order
from hf_ddpm.data.pixels import FITS, Decoder
from hf_ddpm.data.stream import load_stream
from tests.data.pictures import (
    as_set,
    every,
    filled,
    grey_folder,
    noise,
    picture_folder,
    png,
    truncated,
    write_parquet,
)

# order and resuming


def test_order_without_and_with_shuffle(tmp_path):
    images = grey_folder(tmp_path, 50, shards=5)
    plain = load_stream(tmp_path)
    assert torch.equal(every(plain), images) and torch.equal(every(plain, epoch=3), images)
    shuffled = load_stream(tmp_path, shuffle_memory=0.002, seed=1)
    orders = [every(shuffled, epoch) for epoch in range(3)]
    orders.append(every(load_stream(tmp_path, shuffle_memory=0.002, seed=2)))
    for a, b in itertools.combinations([images, *orders], 2):
        assert as_set(a) == as_set(b) and not torch.equal(a, b)
    assert torch.equal(every(load_stream(tmp_path, shuffle_memory=0.002, seed=1), epoch=2), orders[2])


@pytest.mark.parametrize("window", [0, 8, 16, 29])
def test_the_order_is_that_of_order(tmp_path, window):
    """A window has as many rows as the memory holds; what all rows take is in the footers."""
    counts = [7, 0, 20, 2]
    images = grey_folder(tmp_path, 29, shards=counts, row_group_size=6)
    parquets = [pq.ParquetFile(file).metadata for file in sorted(tmp_path.iterdir())]
    groups = [file.row_group(i) for file in parquets for i in range(file.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(2)]
    assert {column.path_in_schema for column in columns} == {"image.bytes", "image.path"}
    each = sum(column.total_uncompressed_size for column in columns) / 29 + 64
    stream = load_stream(tmp_path, shuffle_memory=(window + 0.5) * each / 2**20, seed=5) if window else None
    stream = stream or load_stream(tmp_path, seed=5)
    order = Order([group.num_rows for group in groups], window, 5)
    for epoch in (0, 3):
        rows = [order.row(epoch, place) for place in range(29)]
        assert torch.equal(every(stream, epoch), images[rows])


def test_a_folder_is_permuted_as_a_whole_whatever_the_memory(tmp_path):
    picture_folder(tmp_path, 40)
    images, order = torch.from_numpy(noise(40))[:, None], Order([40], 40, 5)
    for memory in (1e-9, 256):
        stream = load_stream(tmp_path, shuffle_memory=memory, seed=5)
        assert torch.equal(every(stream, 2), images[order.rows(2, 0, 40)])


def test_images_start_anywhere(tmp_path):
    grey_folder(tmp_path, 20, shards=3)
    stream = load_stream(tmp_path, shuffle_memory=0.002)
    whole = every(stream, epoch=4)
    for start in range(20):
        assert torch.equal(every(stream, epoch=4, start=start), whole[start:])
    assert list(stream.images(4, start=20)) == [] == list(stream.images(4, start=99))


def test_skipping_does_not_decode(tmp_path):
    values = [png(image) for image in noise(5)]
    values[2] = b"no image"
    write_parquet(tmp_path, values)
    assert len(every(load_stream(tmp_path), start=3)) == 2


@pytest.mark.parametrize("shuffle_memory", [0, 0.002, 1])
def test_any_start_is_the_tail_of_an_unbroken_read(tmp_path, shuffle_memory):
    grey_folder(tmp_path, 17, shards=[9, 1, 7], row_group_size=4)
    flags = {"horizontal_flip": True, "image_size": (4, 4), "fit": "random_crop"}
    first, later = (load_stream(tmp_path, shuffle_memory=shuffle_memory, **flags) for _ in range(2))
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
    stream = load_stream(tmp_path, shuffle_memory=0.002)
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


@pytest.mark.parametrize("shuffle_memory", [0, 0.003, 1])
@pytest.mark.parametrize("shards", ["folder", [61], [3, 20, 0, 9, 1, 15, 13], [1, 2, 30, 4, 8, 8, 1, 7]])
def test_any_number_of_processes_reads_one_order(tmp_path, shuffle_memory, shards):
    """Process r of W takes positions r, r + W, ...: pixels, crops and flips are those of one process."""
    images = torch.from_numpy(noise(61))[:, None]
    if shards == "folder":
        picture_folder(tmp_path, 61)
    else:
        grey_folder(tmp_path, 61, shards, row_group_size=7)
    flags = {"shuffle_memory": shuffle_memory, "seed": 2}
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
    stream = load_stream(tmp_path, shuffle_memory=0.002)
    expected = filled(stream, range(40))

    class Loaded(torch.utils.data.IterableDataset):
        def __iter__(self):
            return stream.slots([range(i, i + 8) for i in range(0, 40, 8)])

    loader = torch.utils.data.DataLoader(Loaded(), batch_size=None, num_workers=1)
    assert torch.equal(torch.cat([images for images, _ in loader]), expected)


def test_a_stream_can_be_sent_to_another_process(tmp_path):
    grey_folder(tmp_path, 9)
    stream = load_stream(tmp_path, shuffle_memory=0.002)
    images = every(stream)
    assert torch.equal(every(pickle.loads(pickle.dumps(stream))), images)


@pytest.mark.parametrize("shuffle_memory", [0, 1])
def test_an_unreadable_image_is_a_hole_and_shifts_nothing(tmp_path, shuffle_memory):
    images = grey_folder(tmp_path / "whole", 30, shards=3)
    values = [png(image) for image in noise(30)]
    values[5], values[13] = b"broken", truncated(noise(1)[0])
    values[20] = png(noise(1, 7, 7)[0])
    write_parquet(tmp_path / "holes", values, shards=3)
    flags = {"shuffle_memory": shuffle_memory, "horizontal_flip": True}
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
        assert 3 <= skipped <= 3 * world_size  # each by each process that has met it
    stream = load_stream(tmp_path / "holes", skip_corrupt=True, **flags)
    assert torch.equal(torch.cat(list(stream.batches(4, epochs=2))), whole[present])
    assert stream.skipped == 3
    assert torch.equal(torch.cat(list(stream.batches(4, start=30, epochs=2))), whole[30:][present[30:]])


@pytest.mark.parametrize("broken", [3, 12])
def test_unreadable_images_are_named_ten_times_at_most(tmp_path, caplog, broken):
    write_parquet(tmp_path, [png(noise(1)[0])] + [b"broken"] * broken)
    stream = load_stream(tmp_path, skip_corrupt=True)
    for _ in range(2):  # what has been named is not named again
        next(stream.slots([range(2 * (broken + 1))]))
    lines, named = [record.getMessage() for record in caplog.records], min(broken, 10)
    assert stream.skipped == broken and len(lines) == named + (broken > 10)
    for row, line in enumerate(lines[:named], 1):
        assert re.fullmatch(rf"skipped row {row} of .*train-00000-of-00001.parquet: corrupt image: .*", line)
    assert lines[named:] == ["further images that can't be read are only counted"] * (broken > 10)


# rows by number


@pytest.mark.parametrize("shards", [1, 3])
def test_select_decodes_only_what_is_asked_for(tmp_path, monkeypatch, shards):
    images = grey_folder(tmp_path, 10, shards)
    stream, decoded = load_stream(tmp_path), []
    decode = Decoder.__call__
    monkeypatch.setattr(Decoder, "__call__", lambda *value: decoded.append(1) or decode(*value))
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
    flags = {
        "shuffle_memory": 0.002,
        "seed": 3,
        "horizontal_flip": True,
        "image_size": 3,
        "fit": "random_crop",
    }
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
    for shuffle_memory in (0, 0.002):
        with pytest.raises(ValueError, match=r"^row 1 of .*train-00001-of-00002.parquet: [^\n]*$"):
            every(load_stream(tmp_path, shuffle_memory=shuffle_memory))
    stream = load_stream(tmp_path, skip_corrupt=True)
    assert torch.equal(every(stream)[:, 0], torch.from_numpy(images[[0, 1, 2, 3, 5]]))
    assert stream.skipped == 1
    assert torch.equal(every(stream, start=4)[:, 0], torch.from_numpy(images[[5]]))


def test_corrupt_file_in_a_folder_is_named(tmp_path):
    for i, image in enumerate(noise(3)):
        (tmp_path / f"{i}.png").write_bytes(png(image) if i != 1 else truncated(image))
    with pytest.raises(ValueError, match=r"^/.*/1\.png: corrupt image: "):
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


def test_ragged_arrays_and_labels(tmp_path):
    write_parquet(tmp_path / "ragged", [[[1, 2], [3]]], feature=List(List(Value("uint8"))))
    with pytest.raises(ValueError, match=r"row 0 of .*corrupt image"):
        load_stream(tmp_path / "ragged")
    write_parquet(tmp_path / "label", [png(noise(1)[0])])
    with pytest.raises(ValueError, match=r"row 0 of .*its numbers are int64"):
        load_stream(tmp_path / "label", column="label")


def test_a_stream_without_images_raises(tmp_path):
    write_parquet(tmp_path / "bad", [b"broken"] * 2)
    with pytest.raises(ValueError, match="no usable image"):
        load_stream(tmp_path / "bad", skip_corrupt=True)
    grey_folder(tmp_path / "one", 1)
    crops = load_stream(tmp_path / "one", image_size=64, fit="center_crop", skip_corrupt=True)
    with pytest.raises(ValueError, match=r"no usable image in .*train-00000-of-00001.parquet"):
        next(crops.batches(4))
    assert not next(crops.slots([[0, 1]])).present.any()  # one process of several can't know


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
        ({"shuffle_memory": -1}, "shuffle_memory must be a number of MB, at least 0, got -1"),
        ({"shuffle_memory": "9"}, "shuffle_memory must be a number of MB, at least 0, got '9'"),
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
    with pytest.raises(ValueError, match=r"row 0 of .*test-00000-of-00001.parquet: 1 channels, wanted 5$"):
        every(load_stream("digits", "test", channels=5))
