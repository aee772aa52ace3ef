"""Images in and out: files, folders and data sets become levels with names and labels, and the way back.

What comes back are the pixels, as they are decoded here: the grey levels, the order, the names, the labels.
What a file says beside them, such as its format, a colour profile or a date, does not. An image of which
something would be lost is refused: more than 8 bits, transparency that the model doesn't have, further
frames. This file knows neither networks nor how images are coded.
"""

import csv
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from hf_ddpm.compression.container import MOST_FILES, Side, check_names
from hf_ddpm.data.encoded import EIGHT_BITS, read_image
from hf_ddpm.data.files import inside, read_regular
from hf_ddpm.data.files import shown as shown_path
from hf_ddpm.data.holdout import Choice, name_of_split
from hf_ddpm.data.listing import list_folder
from hf_ddpm.data.shards import Shards
from hf_ddpm.data.sources import PARQUET, open_source
from hf_ddpm.folders.layout import sample_name
from hf_ddpm.runtime.disk import named, whole_file, write_folder
from hf_ddpm.runtime.messages import one_line, shown
from hf_ddpm.shown import fields_line

METADATA = "metadata.csv"  # what `datasets` reads beside image files
FILE_NAME, LABEL = "file_name", "label"
PNG = ".png"
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # Pillow's, by the number of channels
OF_DATASET = re.compile(r"(?P<name>.+?):(?P<split>[^:\[\]/]+)(?P<slice>\[[^\[\]]*\])?(:(?P<rows>[0-9-]+))?")
ROWS = re.compile(r"(\d{1,15})(?:-(\d{1,15}))?")


@dataclass(frozen=True, eq=False)
class Collection:
    """Images with what comes back beside their pixels.

    Attributes:
        images: grey levels, (N, C, H, W), uint8.
        side: names and labels.
        title: what messages call them.
    """

    images: np.ndarray
    side: Side
    title: str

    __repr__ = fields_line


def open_images(places: Sequence[str], shape: tuple[int, int, int]) -> Collection:
    """Open images.

    Args:
        places: one folder, of whose files all images are taken; or image files; or one data set as
            DATASET:SPLIT, DATASET:SPLIT[A:B] or DATASET:SPLIT:ROWS, with one row or a range as in 0-99.
        shape: (C, H, W) that they must have.

    Raises:
        ValueError: there are none, or one that can't be read or has another shape or more than 8 bits.
    """
    if len(places) == 1 and not os.path.isfile(first := os.path.expanduser(places[0])):
        if os.path.isdir(first):
            return _of_folder(places[0], first, shape)
        if found := OF_DATASET.fullmatch(places[0]):
            return _of_dataset(places[0], found, shape)
    files = [(os.path.basename(os.path.expanduser(place)), os.path.expanduser(place)) for place in places]
    for name, path in zip(places, (path for _, path in files), strict=True):
        if not os.path.isfile(path):
            kind = "a folder among other images" if os.path.isdir(path) else "no file and no folder"
            raise ValueError(
                f"IMAGES has {shown_path(name)!r}, {kind}; allowed: a folder, image files, or DATASET:SPLIT "
                "as in digits:test or digits:test:0-99"
            )
    return _of_files(places[0] if len(places) == 1 else f"{len(places):,} files", files, shape)


def _of_folder(name: str, root: str, shape: tuple[int, int, int]) -> Collection:
    listing = list_folder(root)
    if not listing.images:
        hint = f"; its parquet files are read as {name}:train" if listing.parquet else ""
        raise ValueError(f"the folder {shown_path(name)!r} has no images that can be read{hint}")
    return _of_files(name, [(file, os.path.join(root, file)) for file in listing.images], shape)


def _of_files(title: str, files: Sequence[tuple[str, str]], shape: tuple[int, int, int]) -> Collection:
    """Images of files, by names that end in .png."""
    names = [name if name.lower().endswith(PNG) else f"{name}{PNG}" for name, _ in files]
    try:
        check_names(names, len(names))
    except ValueError as error:
        raise ValueError(f"IMAGES {error}") from None
    pixels = np.empty((len(files), *shape), np.uint8)
    for place, (_, path) in enumerate(files):
        try:
            pixels[place] = _levels(read_regular(path), shape)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(f"{shown_path(path)}: {reason}") from None
    numbered = names == [sample_name(place) for place in range(len(names))]
    return Collection(pixels, Side(None if numbered else names), title)


def _of_dataset(title: str, found: re.Match[str], shape: tuple[int, int, int]) -> Collection:
    name, split, part, rows = found["name"], found["split"], found["slice"] or "", found["rows"]
    if rows is not None:
        span = ROWS.fullmatch(rows)
        last = None if span is None else int(span[2] or span[1])
        if span is None or last is None or last < int(span[1]) or part:
            raise ValueError(f"IMAGES has the rows {shown(rows)}; allowed: a row, or a range as in 0-99")
        part = f"[{int(span[1])}:{last + 1}]"
    choice = Choice(f"{split}{part}")
    source, column = open_source(os.path.expanduser(name), name_of_split(choice.split)).select_column(None)
    chosen = None if choice.whole else choice
    shards = Shards(source, column, chosen)
    total = sum(shards.counts)
    if rows is not None and total <= (last or 0) - int(span[1]):  # type: ignore[index]
        raise ValueError(f"IMAGES has the rows {shown(rows)}, but {source.title} ends before")
    if not 0 < total <= MOST_FILES:
        raise ValueError(f"{shards.title} has {total:,} images; allowed: 1 to {MOST_FILES:,}")
    pixels = np.empty((total, *shape), np.uint8)
    for place, row in enumerate(shards.rows()):
        try:
            value = shards.encoded(row)
            pixels[place] = _levels(value, shape)
        except ValueError as error:
            raise ValueError(f"{shards.name(row)}: {error}") from None
    labels, classes = _labels(source, chosen)
    names = None
    if shards.addressable:
        names = [shards.relative(shards.image_file(i).value["path"]) for i in range(total)]
        names = [name if name.lower().endswith(PNG) else f"{name}{PNG}" for name in names]
        check_names(names, total)
    return Collection(pixels, Side(names, labels, classes), title)


def _levels(value: Any, shape: tuple[int, int, int]) -> np.ndarray:
    """The grey levels of an encoded image or an array, (C, H, W), uint8, of which nothing is lost.

    Raises:
        ValueError: it has another shape or more than 8 bits, or further frames.
    """
    if isinstance(value, bytes):
        try:
            raster = read_image(value)
        # Pillow has a dozen kinds of error for broken data
        except Exception as error:
            raise ValueError(f"can't be read: {one_line(error, 120)}") from None
        if raster.storage != EIGHT_BITS:
            raise ValueError(f"is stored as {raster.storage}; allowed: {EIGHT_BITS}")
        if raster.frames:
            raise ValueError("has several frames or pages, of which only the first would come back")
        values = raster.values
    else:
        values = np.asarray(value)
        values = values[:, :, None] if values.ndim == 2 else values
        whole = values.dtype.kind in "iu" and values.size and 0 <= values.min() and values.max() <= 255
        if not whole or values.ndim != 3:
            raise ValueError("is no image of 8 bits")
        values = values.astype(np.uint8)
    found = values.transpose(2, 0, 1)
    if found.shape != tuple(shape):
        raise ValueError(f"is {found.shape} (C, H, W); allowed: the model's {tuple(shape)}")
    return found


def _labels(source: Any, choice: Choice | None) -> tuple[list[int] | None, list[str] | None]:
    """The numbers in a data set's column of labels, and their names, as far as it has them."""
    known = [key for key, kind in source.features.items() if isinstance(kind, datasets.ClassLabel)]
    kind: Any = source.features.get(LABEL)
    plain = isinstance(kind, datasets.Value) and kind.dtype.lstrip("u") in ("int8", "int16", "int32", "int64")
    column = LABEL if LABEL in known or plain else known[0] if len(known) == 1 else None
    if column is None or source.kind == "images":
        return None, None
    bare = replace(source, features=datasets.Features({column: datasets.Value("int64")}))
    labels = [row.value for row in Shards(bare, column, choice).rows()]
    if not all(isinstance(label, int) for label in labels):
        return None, None
    names: Any = getattr(source.features[column], "names", None)
    return labels, list(names) if names else None


def check_out(out: str, option: str = "out") -> Path:
    """Where images may be written: a folder that is new or empty, or a parquet file that is not there yet.

    Raises:
        ValueError: something is there.
    """
    path = Path(out).expanduser()
    there = any(path.iterdir()) if path.is_dir() else path.exists() or path.is_symlink()
    if there or (path.is_dir() and path.suffix.lower() == PARQUET):
        raise ValueError(
            f"{option} {out!r} is there already; allowed: a new or empty folder, or a new .parquet file"
        )
    return path


def write_images(path: Path, images: np.ndarray, side: Side) -> None:
    """Write images into a folder of PNG files, or into a parquet file as `datasets` reads it.

    A folder of images with labels gets a metadata.csv.

    Args:
        path: the folder, or a file whose name ends in .parquet.
        images: grey levels, (N, C, H, W), uint8, C 1 to 4.
        side: names and labels.

    Raises:
        ValueError: images that no PNG holds.
        OSError: it can't be written.
    """
    if images.shape[1] not in MODES:
        raise ValueError(f"images have {images.shape[1]} channels; allowed in a PNG: 1 to 4")
    names = side.names or [sample_name(place) for place in range(len(images))]
    if path.suffix.lower() == PARQUET:
        with named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            _write_parquet(partial, images, names, side)
        return

    def fill(place: Path) -> None:
        for name, data in zip(names, map(png_bytes, images), strict=True):
            file = Path(inside(name, str(place)))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        if side.labels is not None:
            with (place / METADATA).open("w", newline="", encoding="utf-8") as file:
                rows = csv.writer(file)
                rows.writerow([FILE_NAME, LABEL])
                rows.writerows(zip(names, _texts(side), strict=True))

    with named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_folder(path, fill)


def _texts(side: Side) -> Iterator[str]:
    """Each label by its name, or the number where it has none."""
    for label in side.labels or []:
        named = side.classes is not None and 0 <= label < len(side.classes)
        yield side.classes[label] if named else str(label)  # type: ignore[index]


def _write_parquet(file: Path, images: np.ndarray, names: Sequence[str], side: Side) -> None:
    columns: dict[str, Any] = {
        "image": [
            {"bytes": data, "path": name} for name, data in zip(names, map(png_bytes, images), strict=True)
        ]
    }
    features: dict[str, Any] = {"image": datasets.Image()}
    if side.labels is not None:
        columns[LABEL] = side.labels
        known = side.classes is not None and all(-1 <= label < len(side.classes) for label in side.labels)
        features[LABEL] = (
            datasets.ClassLabel(names=list(side.classes or ())) if known else datasets.Value("int64")
        )
    table = pa.table(columns, schema=datasets.Features(features).arrow_schema)
    pq.write_table(table, file)


def png_bytes(image: np.ndarray) -> bytes:
    """An image (C, H, W), uint8, as a PNG file's bytes, as small as Pillow makes it."""
    values = image.transpose(1, 2, 0)
    data = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(values[:, :, 0] if len(image) == 1 else values))
    assert picture.mode == MODES[len(image)]
    picture.save(data, "PNG", optimize=True)
    return data.getvalue()
