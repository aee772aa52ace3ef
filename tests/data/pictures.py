"""Images and data sets of them, as the tests of `hf_ddpm.data` write them."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import ClassLabel, Features, Image
from PIL import Image as PILImage


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
