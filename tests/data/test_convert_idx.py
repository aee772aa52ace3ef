"""train_scripts/convert_idx.py and make_digits.py: data sets made from other files."""

import gzip
import importlib
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Features, Image, load_dataset

from hf_ddpm.data.stream import load_stream
from tests.data.pictures import every, noise
from tests.launching import ROOT


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
        with pytest.raises(SystemExit) as left:
            sys.exit(convert_idx.main([str(idx_folder), str(tmp_path / "out"), *arguments]))
        assert left.value.code == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1

    refused("--shards is '0'; allowed: whole numbers >= 1", "--shards", "0")
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
