"""`load_stream(..., shuffle_memory=1).batches(64)` against `IterableDataset.shuffle(buffer_size=1000)`.

The peer is what a user would write: iterate, `np.asarray(row["image"])`, stack 64. At the end of each epoch
that it shuffles, datasets 5.2 sleeps for 5 seconds (`config.SLEEP_TIME_ON_THREADS_SHUTDOWN`, against a crash
of pyarrow): it is measured as it comes, and without that sleep, which is what reading and decoding cost it.
"""

import importlib
import io
import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Features, Image, load_dataset
from PIL import Image as PILImage

from hf_ddpm.data.stream import load_stream

from .conftest import interleave

pytestmark = pytest.mark.bench

ROOT = Path(__file__).resolve().parents[2]
FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist
IMAGES, SHARDS, BUFFER = 10_000, 8, 1000
MEMORY_MB = 1  # of the stream: a fifth of the small images

MEMORY = """
import itertools, json, sys
import numpy as np, psutil, torch
from datasets import load_dataset
from hf_ddpm import load_stream

who, folder, images, buffer = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

def peer():
    data = load_dataset("parquet", data_files=f"{folder}/*.parquet", split="train", streaming=True)
    data, batch = data.shuffle(seed=0, buffer_size=buffer), []
    for epoch in itertools.count():
        data.set_epoch(epoch)
        for row in data:
            batch.append(np.asarray(row["image"]))
            if len(batch) == 64:
                yield np.stack(batch)
                batch = []

def rss():
    return psutil.Process().memory_info().rss / 2**20

idle = rss()
batches = peer() if who == "peer" else load_stream(folder, shuffle_memory=float(sys.argv[5])).batches(64)
seen = [rss() for batch in itertools.islice(batches, images * 5 // 4 // 64)][images // 4 // 64 :]
batches.close()
figures = {"idle": idle, "start": seen[0], "max": max(seen), "end": seen[-1]}
print(json.dumps({name: round(figure) for name, figure in figures.items()}))
"""


def smooth_images(count):
    """Grey blobs on black, 28x28 uint8, whose PNGs are as long as Fashion-MNIST's."""
    rng, axis = np.random.default_rng(0), np.arange(28)
    for _ in range(count):
        centre, width = rng.uniform(8, 20, 2), rng.uniform(5, 9, 2)
        rows, columns = (np.exp(-((axis - c) ** 2) / w**2) for c, w in zip(centre, width, strict=True))
        image = np.outer(rows, columns) + rng.uniform(0, 0.15, (28, 28))
        yield np.where(image > 0.3, 255 * np.minimum(image, 1), 0).astype(np.uint8)


def png(image):
    buffer = io.BytesIO()
    PILImage.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder of 10,000 grey 28x28 PNGs in 8 shards of one row group, and what they are."""
    monkeypatch.syspath_prepend(ROOT / "train_scripts")
    convert_idx = importlib.import_module("convert_idx")
    if FASHION.is_dir():
        name, images = (
            "fashion-mnist",
            convert_idx.read_idx(convert_idx.find_idx(FASHION, "t10k-images-idx3-ubyte"), 3),
        )
    else:
        name, images = "synthetic", np.stack(list(smooth_images(IMAGES)))
    assert len(images) == IMAGES
    for i, part in enumerate(np.array_split(images, SHARDS)):
        file = tmp_path / f"train-{i:05d}-of-{SHARDS:05d}.parquet"
        convert_idx.write_shard(file, part, np.zeros(len(part), dtype=int), 10)
    return tmp_path, name, round(sum(file.stat().st_size for file in tmp_path.iterdir()) / IMAGES)


@pytest.fixture
def large(tmp_path):
    """A folder of 8000 colour 80x80 PNGs of 19 kB: one file, row groups of 100 as `datasets` writes them."""
    noise = np.random.default_rng(0).integers(0, 256, (100, 80, 80, 3), dtype=np.uint8)
    values = [{"bytes": png(image), "path": None} for image in noise]
    schema = Features({"image": Image()}).arrow_schema
    with pq.ParquetWriter(tmp_path / "train.parquet", schema, use_dictionary=False) as writer:
        for _ in range(80):
            writer.write_table(pa.Table.from_pydict({"image": values}, schema=schema))
    return tmp_path


@pytest.mark.parametrize("sleep", [True, False], ids=["as it comes", "without its sleep"])
def test_images_per_second(small, sleep, monkeypatch, report):
    folder, name, size = small
    if not sleep:
        monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    stream = load_stream(folder, shuffle_memory=MEMORY_MB)
    data = load_dataset("parquet", data_files=f"{folder}/*.parquet", split="train", streaming=True)
    data = data.shuffle(seed=0, buffer_size=BUFFER)

    def ours():
        assert sum(map(len, stream.batches(64, epochs=1))) == IMAGES

    def peer():
        images, batch = 0, []
        for row in data:
            batch.append(np.asarray(row["image"]))
            if len(batch) == 64:
                images += len(np.stack(batch))
                batch = []
        assert images + len(batch) == IMAGES

    figures = interleave(ours, peer, rounds=6, calls=1)
    figures |= {
        f"{who}_images_per_s": round(IMAGES / figures.pop(f"{who}_us") * 1e6) for who in ("ours", "peer")
    }
    report(
        benchmark="an epoch of shuffled images",
        data=name,
        bytes_per_image=size,
        peer_sleeps=sleep,
        **figures,
    )


@pytest.mark.parametrize(
    ("data", "images", "buffer", "memory"), [("small", IMAGES, BUFFER, MEMORY_MB), ("large", 8000, 200, 32)]
)
def test_memory(data, images, buffer, memory, request, report):
    """RSS in MiB over an epoch that follows a quarter of one, each in a process of its own."""
    made = request.getfixturevalue(data)
    folder = made[0] if data == "small" else made
    for who in ("ours", "peer"):
        command = [sys.executable, "-c", MEMORY, who, str(folder), str(images), str(buffer), str(memory)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        report(benchmark="RSS in MiB over an epoch", data=data, who=who, **json.loads(done.stdout))
