"""files.py, pages.py and shards.py: what a stranger's data set may open, and what it may take of memory."""

import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image

from hf_ddpm.data.shards import Row, Shards
from hf_ddpm.data.sources import Source
from hf_ddpm.data.stream import load_stream
from tests.data.pictures import noise, png, write_parquet
from tests.data.test_listing import PICTURE
from tests.launching import ROOT

IMAGE = Features({"image": Image()})


def write_paths(folder, *paths):
    folder.mkdir(exist_ok=True)
    rows = [{"bytes": None, "path": path} for path in paths]
    pq.write_table(pa.Table.from_pydict({"image": rows}, schema=IMAGE.arrow_schema), folder / "train.parquet")
    return folder


@pytest.mark.parametrize("path", [
    "/dev/zero", "/dev/stdin", "SECRET", "../secret.png", "link.png", "folder/../../secret.png", "pipe", ".",
    "folder",
    "github://a:b@main/x.png", "http://127.0.0.1:9/x.png", "file://SECRET", "simplecache::file://SECRET",
    "zip://a.png::SECRET", "lost.png", "a\0b", " ", "x" * 5000,
])  # fmt: skip
def test_a_row_opens_no_file_outside_of_its_folder(tmp_path, path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(PICTURE)
    folder = write_paths(tmp_path / "set", path.replace("SECRET", str(secret)))
    (folder / "folder").mkdir()
    os.symlink(secret, folder / "link.png")
    os.mkfifo(folder / "pipe")
    with pytest.raises(ValueError, match=r"^row 0 of .*train\.parquet") as caught:
        load_stream(folder / "train.parquet")
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300
    with pytest.raises(ValueError, match="no usable image"):
        load_stream(folder / "train.parquet", skip_corrupt=True)


def test_a_row_opens_files_in_its_folder(tmp_path):
    folder = write_paths(tmp_path, "images/a.png", str(tmp_path / "images" / "a.png"))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(PICTURE)
    assert len(list(load_stream(folder / "train.parquet").images())) == 2


HOME = "hf://datasets/somebody/set@0123abcd"


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "hf://datasets/other/set@0123abcd/a.png",
        f"{HOME}/../../x@main/a.png",
        f"simplecache::{HOME}/a.png",
        f"zip://a.png::file::{HOME}/b.zip",
        "http://127.0.0.1:9/x.png",
        f"{HOME}x/a.png",
    ],
)
def test_a_row_of_the_hub_opens_files_of_its_repository_alone(path, monkeypatch):
    monkeypatch.setattr("fsspec.open", lambda *_, **__: pytest.fail("opened"))
    dataset = Dataset.from_dict({"image": [None]}, IMAGE).to_iterable_dataset()
    row = Row(0, 0, {"bytes": None, "path": path})
    for kind, stream in (("stream", dataset), ("parquet", None)):
        source = Source("somebody/set", "train", kind, [f"{HOME}/a.parquet"], IMAGE, stream)
        with pytest.raises(ValueError, match="which is not opened"):
            Shards(source, "image").encoded(row)


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"a\.png has 1,099,511,627,776 bytes; allowed: 536,870,912$"):
        load_stream(tmp_path)


# Parquet files that unpack to far more than they take


def dictionary_bomb(file):
    """A thousand times one value of 40 MB, which the file holds once."""
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array([bytes(40 << 20)]))
    paths = pa.array([None] * 1000, pa.string())
    table = pa.table({"image": pa.StructArray.from_arrays([values, paths], ["bytes", "path"])})
    pq.write_table(table, file, compression="zstd")


def page_bomb(file):
    rows = [{"bytes": bytes(20 << 20), "path": None}] * 4
    table = pa.Table.from_pydict({"image": rows}, schema=IMAGE.arrow_schema)
    pq.write_table(table, file, compression="zstd", use_dictionary=False)


def list_bomb(file):
    """One row of 9 million numbers of 64 bits, which are runs of zeros."""
    count = 9_000_000
    lines = pa.ListArray.from_arrays(
        pa.array(np.arange(0, count + 1, 10_000, dtype=np.int32)), pa.array(np.zeros(count, np.int64))
    )
    table = pa.table({"image": pa.ListArray.from_arrays(pa.array([0, len(lines)], pa.int32()), lines)})
    pq.write_table(table, file, compression="zstd")


@pytest.mark.parametrize("bomb", [dictionary_bomb, page_bomb, list_bomb])
def test_a_parquet_bomb_is_refused_before_anything_is_allocated(tmp_path, bomb):
    file = tmp_path / "train.parquet"
    bomb(file)
    pa.default_memory_pool().release_unused()
    assert file.stat().st_size < 20_000
    before = pa.total_allocated_bytes()
    peak = pa.default_memory_pool().max_memory()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"can't read .*train.parquet: .* unpacks to [\d,]+; allowed: "):
            load_stream(tmp_path, column="image", skip_corrupt=True)
    assert pa.total_allocated_bytes() - before < 1 << 20 and pa.default_memory_pool().max_memory() == peak


def test_the_footer_may_lie(tmp_path):
    """What the headers of pages say counts, as pyarrow allocates by them."""
    file = tmp_path / "train.parquet"
    page_bomb(file)
    with pq.ParquetFile(file) as parquet:
        said = parquet.metadata.row_group(0).column(0).total_uncompressed_size
    data, zigzag = bytearray(file.read_bytes()), bytearray()
    number = said << 1
    while number:
        zigzag.append((number & 127) | (128 if number > 127 else 0))
        number >>= 7
    footer = data.rindex(bytes(zigzag))
    small = bytearray([0x80 | 2, *[0x80] * (len(zigzag) - 2), 0])
    data[footer : footer + len(zigzag)] = small
    file.write_bytes(data)
    with pq.ParquetFile(file) as parquet:
        assert parquet.metadata.row_group(0).column(0).total_uncompressed_size == 1
    with pytest.raises(ValueError, match=r"a page of [\d,]+ bytes unpacks to [\d,]+; allowed: 16,777,216"):
        load_stream(tmp_path)


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "brotli", "zstd"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_honest_files_are_read(tmp_path, compression, version):
    """Row groups, dictionaries, statistics and checksums, of each kind of page."""
    values = [png(image) for image in noise(30)] * 4
    write_parquet(tmp_path / "plain", values)
    table = pq.read_table(tmp_path / "plain")
    options = {"data_page_version": version, "data_page_size": 2000, "write_page_checksum": True}
    for name, dictionary in (("with", True), ("without", False)):
        (tmp_path / name).mkdir()
        pq.write_table(
            table,
            *(tmp_path / name / "train.parquet", 50),
            compression=compression,
            use_dictionary=dictionary,
            write_page_index=True,
            **options,
        )
        assert len(list(load_stream(tmp_path / name).images())) == 120


def test_damaged_headers_are_one_line(tmp_path):
    write_parquet(tmp_path, [png(image) for image in noise(20)])
    (file,) = tmp_path.iterdir()
    whole, rng = file.read_bytes(), np.random.default_rng(0)
    for _ in range(150):
        data = bytearray(whole)
        for place in rng.integers(0, len(data) if rng.random() < 0.5 else 80, 3):
            data[place] = rng.integers(256)
        file.write_bytes(data)
        try:
            list(load_stream(tmp_path, skip_corrupt=True).images())
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) <= 300


@pytest.mark.slow
def test_bombs_stay_below_a_limit_of_memory(tmp_path):
    script = "import sys; from hf_ddpm.data.stream import load_stream\ntry: load_stream(sys.argv[1])\n"
    script += (
        "except ValueError: pass\nimport resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    write_parquet(tmp_path / "small", [PICTURE])
    page_bomb(tmp_path / "bomb.parquet")
    peaks = []
    for path in (tmp_path / "small", tmp_path / "bomb.parquet"):
        done = subprocess.run(
            [sys.executable, "-c", script, str(path)], capture_output=True, text=True, cwd=ROOT, check=True
        )
        peaks.append(int(done.stdout))
    assert peaks[1] < peaks[0] + (32 << 10)  # KB
