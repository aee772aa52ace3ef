"""Convert idx files (MNIST's format) into parquet shards that `datasets` streams.

    python train_scripts/convert_idx.py /usr/share/datasets/fashion-mnist OUT --shards 8

SOURCE holds `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the `t10k-...` pair, plain or `.gz`, as
Debian's package dataset-fashion-mnist installs them. OUT gets `train-0000i-of-0000N.parquet` and one
`test-...` file: one row group each, images as lossless 8-bit grey PNG, each file written whole or not at all.
"""

from __future__ import annotations

import gzip
import io
import os
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Image
from PIL import Image as PILImage
from tqdm import tqdm

from hf_ddpm.runtime.arguments import Parser, count
from hf_ddpm.runtime.messages import one_line
from hf_ddpm.runtime.streams import guard_streams

SPLITS = {"train": "train", "t10k": "test"}  # idx prefix -> split


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read one idx file of unsigned bytes, plain or gzipped.

    Args:
        path: the file; a name ending in `.gz` is decompressed.
        ndim: dimensions it must have: 3 for images (N, H, W), 1 for labels (N,).

    Returns:
        Its array, uint8.

    Raises:
        ValueError: not an idx file of bytes with `ndim` dimensions, or not as long as its header says.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    header = 4 + 4 * ndim
    if len(data) < header or data[:4] != bytes([0, 0, 8, ndim]):
        raise ValueError(f"{path} is not an idx file of unsigned bytes with {ndim} dimensions")
    shape = tuple(int(n) for n in np.frombuffer(data, dtype=">u4", count=ndim, offset=4))
    if len(data) - header != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path} says shape {shape} but holds {len(data) - header} bytes of data")
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)


def find_idx(source: Path, name: str) -> Path:
    """The file `name` or `name.gz` in `source`; `ValueError` if neither is there."""
    for path in (source / name, source / f"{name}.gz"):
        if path.is_file():
            return path
    raise ValueError(f"no {name} and no {name}.gz in {source}")


def encode_png(image: np.ndarray) -> bytes:
    """Lossless PNG of one grey image, shape (H, W), uint8."""
    buffer = io.BytesIO()
    PILImage.fromarray(image).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def write_shard(path: Path, images: Iterable[np.ndarray], labels: np.ndarray, num_classes: int) -> None:
    """Write one parquet file of one row group, whole or not at all.

    Args:
        path: where it goes; its folder exists.
        images: N grey images, each (H, W), uint8.
        labels: their classes, shape (N,), integers below `num_classes`.
        num_classes: number of classes of the `label` column.
    """
    schema = Features({"image": Image(), "label": ClassLabel(num_classes=num_classes)}).arrow_schema
    column = [{"bytes": encode_png(image), "path": None} for image in images]
    table = pa.Table.from_pydict({"image": column, "label": labels.tolist()}, schema=schema)
    partial = path.with_name(f".{path.name}.partial")
    try:
        pq.write_table(table, partial, compression="zstd", row_group_size=max(1, len(table)))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def convert(source: Path, out: Path, shards: int = 8) -> None:
    """Convert the two idx pairs in `source` into parquet shards in `out`.

    Args:
        source: folder of the idx files.
        out: folder to fill; made when missing, must hold no parquet file that this run doesn't replace.
        shards: number of files of the train split; the test split is one file.

    Raises:
        ValueError: a missing or broken file, a pair of unequal length, or an impossible number of shards.
    """
    splits = {}
    for prefix, split in SPLITS.items():
        images = read_idx(find_idx(source, f"{prefix}-images-idx3-ubyte"), ndim=3)
        labels = read_idx(find_idx(source, f"{prefix}-labels-idx1-ubyte"), ndim=1)
        if len(images) != len(labels):
            raise ValueError(f"{source}: {len(images)} {prefix} images but {len(labels)} labels")
        if len(images) == 0:
            raise ValueError(f"{source}: the {prefix} files hold no image")
        splits[split] = images, labels
    num_train = len(splits["train"][0])
    if not 1 <= shards <= num_train:
        raise ValueError(f"--shards must be 1 to {num_train} (the number of train images), got {shards}")

    num_classes = 1 + max(int(labels.max()) for _, labels in splits.values())
    parts = {"train": shards, "test": 1}
    names = {split: [f"{split}-{i:05d}-of-{n:05d}.parquet" for i in range(n)] for split, n in parts.items()}
    stale = {path.name for path in out.glob("*.parquet")} - {
        name for split in names.values() for name in split
    }
    if stale:
        raise ValueError(
            f"{out} already holds {min(stale)}, which would be read with the new files; remove it first"
        )

    out.mkdir(parents=True, exist_ok=True)
    total = sum(len(labels) for _, labels in splits.values())
    with tqdm(total=total, unit="image", desc=str(out)) as bar:
        for split, (images, labels) in splits.items():
            for name, rows in zip(
                names[split], np.array_split(np.arange(len(labels)), parts[split]), strict=True
            ):
                write_shard(out / name, images[rows], labels[rows], num_classes)
                bar.update(len(rows))


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0, or 2 after one line of error."""
    guard_streams()
    parser = Parser(
        "convert_idx.py",
        "Convert idx files (MNIST, Fashion-MNIST) to parquet shards of image and label columns.",
        "example: %(prog)s /usr/share/datasets/fashion-mnist data/fashion-mnist",
    )
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="folder of the *-ubyte or *-ubyte.gz files"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write the .parquet files to")
    parser.add_argument(
        "--shards", type=count, default=8, help="files of the train split (default: %(default)s)"
    )
    options = parser.parse(sys.argv[1:] if arguments is None else arguments)
    try:
        convert(options.source, options.out, options.shards)
    except (ValueError, OSError) as error:
        print(one_line(f"error: {error}"), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
