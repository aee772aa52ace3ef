"""Data folders that nobody means: whole and damaged pictures, odd names, pipes, links, metadata, cards.

`write_folder` draws one from a seeded generator, and says which of its pictures are whole, so that what is
read can be compared with what was written.
"""

import io
import json
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Array3D, ClassLabel, Features, Image, Value
from PIL import Image as PILImage

HEIGHT, WIDTH = 6, 5
TOKEN = "hf_" + "aB3dE5gH" * 4
# Formats that keep every pixel: suffix, PIL's format, and options of its `save`
LOSSLESS = [
    (".png", "PNG", {}),
    (".PNG", "PNG", {"optimize": True}),
    (".bmp", "BMP", {}),
    (".ppm", "PPM", {}),
    (".tif", "TIFF", {}),
    (".tiff", "TIFF", {"compression": "tiff_lzw"}),
    (".tiff", "TIFF", {"compression": "tiff_adobe_deflate"}),
    (".webp", "WEBP", {"lossless": True}),
    ("", "PNG", {}),
    (".dat", "BMP", {}),
]
LOSSY = [
    (".jpg", "JPEG", {}),
    (".jpeg", "JPEG", {"progressive": True}),
    (".gif", "GIF", {}),
    (".avif", "AVIF", {}),
    (".webp", "WEBP", {}),
    (".jp2", "JPEG2000", {}),
    (".ico", "ICO", {}),
    (".tga", "TGA", {}),
    (".pcx", "PCX", {}),
    (".eps", "EPS", {}),
    (".png", "EPS", {}),
    (".pdf", "PDF", {}),
    (".gif", "GIF", {"save_all": True, "append_images": [PILImage.new("RGB", (WIDTH, HEIGHT))] * 3}),
    (".png", "PNG", {"save_all": True, "append_images": [PILImage.new("RGB", (WIDTH, HEIGHT))] * 3}),
]
MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16"]
STEMS = [
    *(
        "0001",
        "a",
        "photo of a train",
        "crash test",
        "train",
        "test-1",
        "validation",
        "photos [2023]",
        "a::b",
    ),
    *(
        "*",
        "?",
        "[a-z]",
        "a,b",
        "~",
        "-rf",
        "%s",
        "{0}",
        "é",
        "漢字",
        "😀",
        " ",
        "a ",
        "a.b.c",
        ".hidden",
        "__x",
    ),
    *(
        "a\nb",
        "\x1b[2J",
        "\u202egnp",
        "x" * 240,
        "a\\b",
        "CON",
        "'",
        '"',
        "$HOME",
        "#1",
        "\udcff\udc80",
        TOKEN,
    ),
    *("metadata", "README", "a.parquet", "a.png", "http:", "hf:", "zip:", "a@b", "a=b", "a&b"),
]
PATHS = [
    "0001.png",
    "a.png",
    "../a.png",
    "/etc/passwd",
    "/dev/zero",
    "a::b",
    "http://127.0.0.1:9/x",
    "\0",
    TOKEN,
]
FOLDERS = [*STEMS, "train", "test", "val", "Train", "training", "cat", "dog", "images", "data", "train/cat"]


def picture(seed: int) -> np.ndarray:
    """An image of its own, uint8 (6, 5, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, form: str, options: dict, mode: str = "RGB") -> bytes:
    """An image as a file of this format has it; nothing where the format can't hold such a one."""
    image, buffer = PILImage.fromarray(pixels), io.BytesIO()
    try:
        image = PILImage.new(mode, image.size, 300) if mode in ("I;16", "LAB") else image.convert(mode)
        image.save(buffer, form, **options)
    except (OSError, ValueError, KeyError):
        return b""
    return buffer.getvalue()


def damaged(draw: random.Random, data: bytes) -> bytes:
    """Bytes of which some are changed, lost or added."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        if not changed:
            break
        # Headers are short, and most of what can go wrong stands there
        place = draw.randrange(min(len(changed), draw.choice((64, 10**9))))
        kind = draw.randrange(7)
        if kind == 0:
            del changed[place:]
        elif kind == 1:
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == 2:
            changed[place : place + 4] = draw.choice(
                (b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0" * 4, b"\0\0\1\0")
            )
        elif kind == 3:
            del changed[place : place + draw.randint(1, 40)]
        elif kind == 4:
            changed[place:place] = draw.randbytes(draw.choice((1, 4, 1000)))
        elif kind == 5:
            changed[place:place] = changed[draw.randrange(len(changed)) :][:200]
        else:
            changed[place : place + 20] = bytes(20)
    return bytes(changed)


# Files that are no pictures


def metadata(draw: random.Random, names: list[str]) -> bytes:
    """A metadata.csv or .jsonl that names some of the files, and other things."""
    odd = [
        "lost.png",
        "../../etc/passwd",
        "/dev/zero",
        "http://127.0.0.1:9/x.png",
        "",
        "a\0b",
        TOKEN,
        "x" * 9000,
    ]
    said = [draw.choice(names or odd) if draw.random() < 0.7 else draw.choice(odd) for _ in range(5)]
    key = draw.choice(["file_name", "file_name", "mask_file_name", "file_names", "x", "a" * 5000, "\x1b[2J"])
    lines = [json.dumps({key: draw.choice([name, name, None, 3, [name]])}) for name in said]
    lines += draw.choice(
        [[], ["[" * 50_000], ["{"], ["7"], ["9" * 5000], ['"\\ud800"'], [json.dumps({key: {}})]]
    )
    rows = [
        key,
        *(name.encode(errors="replace").decode() for name in said),
        *draw.choice([[], ['"'], ["a,b,c"]]),
    ]
    text = "\n".join(draw.choice([lines, rows]))
    data = text.encode(errors="surrogateescape")
    return damaged(draw, data) if draw.random() < 0.3 else data


def card(draw: random.Random, names: list[str]) -> bytes:
    """A README.md that says which files are which split."""
    some = draw.choice(names or ["a"])
    pattern = draw.choice(
        [
            some,
            "*",
            "**",
            "*.png",
            "../*",
            "/etc/*",
            "hf://datasets/x/y",
            "[",
            "**/**/**/**/a",
            "*a" * 300,
            7,
            None,
        ]
    )
    files = draw.choice(
        [
            *(pattern, [pattern], {"train": pattern}, {"train": [pattern, some], 3: "x"}, {None: pattern}),
            *(
                [{"split": "train", "path": pattern}],
                [{"split": draw.choice(STEMS), "path": pattern}],
                [{}],
                {},
            ),
        ]
    )
    config = {
        "config_name": "default",
        "data_files": files,
        **draw.choice([{}, {"data_dir": draw.choice(STEMS)}]),
    }
    said = draw.choice(
        [{"configs": [config]}, {"configs": [config, config]}, {"configs": 7}, {"configs": [7]}, [], 7]
    )
    text = "---\n" + json.dumps(said) + "\n---\n# x\n"
    text = draw.choice(
        [
            *(text, text, text, text),
            "---\n" + "[" * 20_000 + "\n---\n",
            "---\na: &a [x]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(40)) + "---\n",
            "---\na: &a\n  - *a\nconfigs: *a\n---\n",
            "---\nx: !!python/object/apply:os._exit [17]\n---\n",
            "---\nconfigs: 2024-99-99\n---\n",
            "---\n? [a]\n: b\n---\n",
        ]
    )
    data = text.encode(errors="surrogateescape")
    return damaged(draw, data) if draw.random() < 0.2 else data


def parquet(draw: random.Random, pictures: list[np.ndarray]) -> bytes:
    """A parquet file of pictures, or of what is none."""
    png = [encoded(pixels, "PNG", {}) for pixels in pictures]
    kind = draw.randrange(7)
    values = [{"bytes": value, "path": None} for value in png]
    features: dict = {"image": Image()}
    if kind == 1:
        values = [draw.choice([{"bytes": None, "path": draw.choice(PATHS)}, None, value]) for value in values]
    elif kind == 2:
        values = [
            draw.choice([value, {"bytes": damaged(draw, value["bytes"]), "path": None}]) for value in values
        ]
    elif kind == 3:
        values = [pixels.tolist() for pixels in pictures]
        features = {"image": Array3D((HEIGHT, WIDTH, 3), draw.choice(["uint8", "int64", "float32"]))}
    elif kind == 4:
        values, features = [draw.choice(["x", "", None]) for _ in png], {"image": Value("string")}
    elif kind == 5:
        features["label"] = ClassLabel(num_classes=2)
    elif kind == 6:
        features["image2"] = Image()
    schema = Features(features).arrow_schema
    columns = {"image": values, "label": [0] * len(values), "image2": values}
    table = pa.Table.from_pydict({name: columns[name] for name in schema.names}, schema=schema)
    if draw.random() < 0.3:
        text = json.dumps(
            {"info": {"features": draw.choice([7, {}, {"image": 7}, {"image": {"_type": "Sequence"}}])}}
        )
        text = draw.choice([text, "{", "[" * 9000, json.dumps({"info": [1]}), "\x00", TOKEN])
        table = table.replace_schema_metadata({"huggingface": text})
    buffer = io.BytesIO()
    compression = draw.choice(["none", "snappy", "gzip", "zstd"])
    pq.write_table(table, buffer, compression=compression, row_group_size=draw.choice([1, 2, 100]))
    data = buffer.getvalue()
    return data if draw.random() < 0.4 else damaged(draw, data)


def special(draw: random.Random, path: Path) -> None:
    """Something in the place of a file that is none."""
    make: Callable = draw.choice(
        [
            *(os.mkfifo, Path.mkdir, lambda p: p.symlink_to("/dev/zero"), lambda p: p.symlink_to("/dev/tty")),
            *(
                lambda p: p.symlink_to(p.name),
                lambda p: p.symlink_to(".."),
                lambda p: p.symlink_to("/nowhere"),
            ),
            *(lambda p: p.symlink_to("/etc/passwd"), _socket, _huge),
        ]
    )
    make(path)


def _socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # the address of a socket is short
    socket.socket(socket.AF_UNIX).bind(path.name[:90])
    os.chdir(before)


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**36)


def write_folder(draw: random.Random, folder: Path) -> list[np.ndarray]:
    """Draw a folder of up to twelve files.

    Returns:
        Its whole pictures, uint8 (6, 5, 3) each, if it holds nothing but image files and what is left out;
        pictures in hidden files and in folders are not among them, nor are such that share a folder with
        files that say what is read: parquet, metadata and cards.
    """
    folder.mkdir()
    names: list[str] = []
    whole: list[np.ndarray] = []
    plain = draw.random() < 0.5  # files at the top alone
    for number in range(draw.randint(1, 12)):
        pixels = picture(draw.randrange(10**9))
        stem = draw.choice(STEMS) if draw.random() < 0.5 else f"{number:04d}"
        place = "" if plain or draw.random() < 0.5 else draw.choice(FOLDERS) + "/"
        kind = draw.random()
        lossless = kind < 0.45
        suffix, form, options = draw.choice(LOSSLESS if lossless or kind < 0.75 else LOSSY)
        data = encoded(pixels, form, options, "RGB" if kind < 0.75 else draw.choice(MODES))
        data = data if lossless else damaged(draw, data)
        name = f"{place}{stem}{suffix}"
        path = Path(os.fsdecode(os.fsencode(folder) + b"/" + os.fsencode(name)))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() or path.is_symlink():
                continue
            if kind > 0.94:
                special(draw, path)
                continue
            path.write_bytes(data)
        except OSError:
            continue
        names.append(name)
        if lossless and not place and not stem.startswith((".", "__")) and stem not in ("README", "metadata"):
            whole.append(pixels)
    if draw.random() < 0.5:
        return whole if plain else []
    pictures = [picture(draw.randrange(10**9)) for _ in range(4)]
    beside = {
        "metadata.csv": metadata(draw, names),
        "metadata.jsonl": metadata(draw, names),
        "README.md": card(draw, names),
        ".huggingface.yaml": card(draw, names),
        "a.parquet": parquet(draw, pictures),
        "train.parquet": parquet(draw, pictures),
    }
    name = draw.choice([*beside])
    if not (folder / name).exists():
        (folder / name).write_bytes(beside[name])
    return []
