"""shards.py: what is read of files, held in memory and left open."""

import subprocess
import sys
import tracemalloc
from dataclasses import replace

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Array3D, Features, Image, List, Value, load_dataset

from hf_ddpm.data.shards import Shards
from hf_ddpm.data.sources import open_source
from hf_ddpm.data.stream import load_stream
from tests.data.pictures import every, filled, grey_folder, noise, picture_folder, png, write_parquet
from tests.launching import ROOT


class Spy:
    """Counts what pyarrow reads of parquet files: how often it starts on one, and rows."""

    def __init__(self, monkeypatch):
        self.files, self.rows = 0, 0
        iter_batches, spy = pq.ParquetFile.iter_batches, self
        seen = []

        def counted(file, *args, **kwargs):
            if all(file is not one for one in seen):
                spy.files += 1
                seen.append(file)
            for batch in iter_batches(file, *args, **kwargs):
                spy.rows += len(batch)
                yield batch

        monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)


def tiny_rows(folder, count, shards, row_group_size):
    """Many rows that cost nothing to make: 1x1 images, with the row's number in them."""
    values = np.stack([np.arange(count) // 256, np.arange(count) % 256], axis=1).reshape(count, 1, 2)
    feature = List(List(Value("uint8")))
    write_parquet(folder, values.tolist(), shards, feature=feature, row_group_size=row_group_size)


def test_a_process_reads_only_its_lanes_of_a_window(tmp_path, monkeypatch):
    tiny_rows(tmp_path, 8000, shards=3, row_group_size=10)
    stream, spy = load_stream(tmp_path, shuffle_memory=2000 * 66 / 2**20), Spy(monkeypatch)
    for world_size, lanes in [(1, 8), (8, 1)]:
        spy.rows = 0
        filled(stream, range(world_size - 1, 8000, world_size), 100)
        # Units of 2 rows, in row groups of 10: each is passed once a window at most
        assert 8000 * lanes / 8 <= spy.rows <= 8000 * 5, world_size
        assert lanes > 1 or spy.rows < 8000 * 3
    spy.files = spy.rows = 0
    next(stream.slots([range(8000 * 7 + 5000, 8000 * 7 + 5008)]))  # resuming is a seek
    assert spy.files <= 3 and spy.rows <= 8000


def test_a_window_is_one_pass_over_the_files(tmp_path, monkeypatch):
    tiny_rows(tmp_path, 8000, shards=4, row_group_size=100)
    stream, spy = load_stream(tmp_path, shuffle_memory=1), Spy(monkeypatch)
    every(stream)
    assert spy.files == 4 and spy.rows == 8000


def test_rows_are_counted_once_when_they_are_needed(tmp_path, monkeypatch):
    tiny_rows(tmp_path, 300, shards=3, row_group_size=50)
    opened, open_file = [], pq.ParquetFile.__init__
    monkeypatch.setattr(
        pq.ParquetFile, "__init__", lambda *args, **kwargs: (opened.append(1), open_file(*args, **kwargs))[1]
    )
    stream = load_stream(tmp_path, shuffle_memory=1)
    assert stream.shape == (1, 1, 2)
    opened.clear()
    assert stream.num_rows() == 300 and len(opened) == 3  # not before: each footer is read now
    assert len(every(stream)) == len(every(stream, 1)) == 300
    opened.clear()
    assert stream.num_rows() == 300 and stream.row_counts == [100] * 3 and not opened


def large_images(file, rows=10_000, **kwargs):
    """40 MB of images of 4 kB each."""
    values = [png(image) for image in noise(8, 58, 58)]
    images = [{"bytes": values[i % 8], "path": None} for i in range(rows)]
    table = pa.Table.from_pydict({"image": images}, schema=Features({"image": Image()}).arrow_schema)
    pq.write_table(table, file, use_dictionary=False, compression="none", write_batch_size=64, **kwargs)
    assert file.stat().st_size > 30 << 20
    return file


@pytest.mark.parametrize("row_group_size", [100, 10_000])
@pytest.mark.parametrize("memory", [0, 12])
def test_no_more_is_held_than_the_memory(tmp_path, memory, row_group_size):
    """Nor what was read of a row group of 40 MB: a page and a buffer of 1 MB each, beside the window."""
    stream = load_stream(
        large_images(tmp_path / "train.parquet", row_group_size=row_group_size), shuffle_memory=memory
    )
    before, seen = pa.total_allocated_bytes(), []
    batches = stream.batches(64, epochs=2)
    tracemalloc.start()  # what is read of a file are Python's bytes
    next(batches)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    for _ in batches:
        seen.append(pa.total_allocated_bytes() - before)
    assert memory * 0.8 < max(seen) / 2**20 < memory + 8
    # The second epoch holds no more than the first
    assert max(seen[len(seen) // 2 :]) < max(seen) * 1.05 + (1 << 20)
    assert pa.total_allocated_bytes() - before < 1 << 20


@pytest.mark.parametrize("encoding", ["a dictionary", "prefixes"])
def test_rows_that_a_file_repeats_do_not_fill_the_memory(tmp_path, monkeypatch, encoding):
    """A file of 30 kB says what its rows are, not what they take."""
    monkeypatch.setattr("hf_ddpm.data.ordered._ALLOWED_BYTES", 4 << 20)
    rows = [{"bytes": png(noise(1, 100, 100, 3)[0]), "path": None}] * 500
    table = pa.Table.from_pydict({"image": rows}, schema=Features({"image": Image()}).arrow_schema)
    how = {"use_dictionary": False, "column_encoding": {"image.bytes": "DELTA_BYTE_ARRAY"}}
    pq.write_table(table, tmp_path / "train.parquet", **({} if encoding == "a dictionary" else how))
    before = pa.total_allocated_bytes()
    with pytest.raises(ValueError, match=r"train.parquet repeats rows, which take more than 4 MB in memory"):
        next(load_stream(tmp_path, shuffle_memory=8).batches(4))
    assert pa.total_allocated_bytes() - before < 1 << 20
    assert len(next(load_stream(tmp_path).batches(100))) == 100


def test_processes_hold_their_own_rows_of_a_window(tmp_path):
    stream = load_stream(large_images(tmp_path / "train.parquet"), shuffle_memory=64)
    before = pa.total_allocated_bytes()
    slots = stream.slots([range(3, 40, 4)], lambda positions: positions % 4 == 3)
    images = next(slots).images
    assert 8 < (pa.total_allocated_bytes() - before) / 2**20 < 12
    slots.close()
    assert torch.equal(images, next(stream.slots([range(3, 40, 4)])).images)
    with pytest.raises(ValueError, match=r"^the row at place 4 was not wanted"):
        next(stream.slots([[4]], lambda positions: positions % 4 == 3))


def test_what_can_only_be_read_in_large_pieces_is_said_once(tmp_path, caplog):
    stream = load_stream(large_images(tmp_path / "train.parquet"), shuffle_memory=2)
    assert stream.num_rows() == stream.num_rows() == 10_000
    (record,) = (record for record in caplog.records if record.name == "hf_ddpm.data.ordered")
    assert len(record.message) < 300 + len(str(tmp_path)) and "raise shuffle_memory to 3" in record.message
    caplog.clear()
    load_stream(tmp_path, shuffle_memory=64).num_rows()
    picture_folder(tmp_path / "folder", 30)
    load_stream(tmp_path / "folder", shuffle_memory=1e-6).num_rows()
    assert not [record for record in caplog.records if record.name == "hf_ddpm.data.ordered"]


@pytest.mark.parametrize("source", ["parquet", "folder"])
def test_no_file_stays_open(tmp_path, source):
    if source == "folder":
        picture_folder(tmp_path, 40)
    else:
        grey_folder(tmp_path, 400)
    stream = load_stream(tmp_path, shuffle_memory=0.002)

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
    code = "import sys; from hf_ddpm.data.stream import load_stream\n" + "\n".join(
        f"{name} = load_stream(sys.argv[1] + '/{name}', shuffle_memory=0.01).batches(4); next({name})"
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
        source = open_source(tmp_path / name, "train")
        dataset = load_dataset("parquet", data_files={"train": source.files}, split="train", streaming=True)
        ours = Shards(source, "image")
        theirs = Shards(replace(source, kind="stream", dataset=dataset.decode(False)), "image")
        assert list(ours.counts) == list(theirs.counts)
        for shard, count in enumerate(ours.counts):
            for start in range(count + 1):
                read, expected = (
                    [value for chunk in shards.chunks(shard, start) for value in chunk.to_pylist()]
                    for shards in (ours, theirs)
                )
                assert read == expected and len(read) == count - start


def test_a_shard_that_shrank_or_broke_is_named(tmp_path):
    grey_folder(tmp_path, 40, shards=2)
    stream = load_stream(tmp_path, shuffle_memory=0.001)
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
