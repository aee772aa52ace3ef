"""Sizes of `hf-ddpm compress` beside PNG, WebP, JPEG XL, zstd and xz: a table in bytes and bits/dim.

    .venv/bin/python tests/benchmarks/codec_table.py MODEL digits:test --numbers 1,10,100,300

Sheets hold all images in one picture, near to a square. Single files hold one image each, and their sizes
are added up. The others know no model, whose weights are not counted here: the last line says how many bytes
they have. Needs optipng, cjxl (Debian's libjxl-tools), zstd and xz.
"""

import argparse
import contextlib
import io
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from hf_ddpm.compression import compress, decompress
from hf_ddpm.compression.images import open_images
from hf_ddpm.generation.pipeline import DDPMPipeline


def run(*words, data=None):
    return subprocess.run(words, input=data, capture_output=True, check=True).stdout


def picture(pixels):
    values = pixels.transpose(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(values[:, :, 0] if values.shape[2] == 1 else values))


def sheet_of(images):
    """The images in rows and columns, as one (C, H, W)."""
    number, channels, height, width = images.shape
    columns = next(n for n in range(math.isqrt(number), 0, -1) if number % n == 0)
    grid = images.reshape(number // columns, columns, channels, height, width)
    return grid.transpose(2, 0, 3, 1, 4).reshape(channels, number // columns * height, columns * width)


def optipng(pixels, place):
    file = place / "x.png"
    picture(pixels).save(file)
    run("optipng", "-quiet", "-o5", "-strip", "all", str(file))
    return file.stat().st_size


def webp(pixels, place):
    data = io.BytesIO()
    picture(pixels).convert("RGB").save(data, "WEBP", lossless=True, quality=100, method=6)
    return len(data.getvalue())


def jpeg_xl(pixels, place):
    picture(pixels).save(place / "y.png")
    run("cjxl", str(place / "y.png"), str(place / "y.jxl"), "-d", "0", "-e", "9", "--quiet")
    return (place / "y.jxl").stat().st_size


def peers(images, place):
    """The bytes that each of the others takes, by its name."""
    sheet, raw = sheet_of(images), images.tobytes()
    found = {}
    for name, code in {"PNG (optipng)": optipng, "WebP": webp, "JPEG XL": jpeg_xl}.items():
        found[f"{name}, single"] = sum(code(image, place) for image in images)
        found[f"{name}, sheet"] = code(sheet, place)
    found["zstd -22"] = len(run("zstd", "--ultra", "-22", "-c", data=raw))
    found["xz -9e"] = len(run("xz", "-9e", "-c", data=raw))
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("images", help="as of hf-ddpm compress")
    parser.add_argument(
        "--numbers", default="1,10,100,300,1000", help="of the first images, a row each of those there are"
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="float64")
    parser.add_argument(
        "--verify", type=int, default=1000, help="rows of up to so many images are decoded too"
    )
    args = parser.parse_args()
    pipeline = DDPMPipeline.from_pretrained(args.model)
    images = open_images([args.images], pipeline.image_shape).images
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number in map(int, args.numbers.split(",")):
            some, out = images[:number], Path(folder) / f"{number}.hfdc"
            if len(some) < number:
                continue
            sizes = compress(pipeline, some, out, steps=args.steps, batch=args.batch, dtype=args.dtype)
            seconds = None
            if number <= args.verify:
                again = decompress(pipeline, out)
                assert np.array_equal(again.images.numpy(), some)
                seconds = again.seconds
            row = {"images": number, "raw": some.size, **peers(some, Path(folder))}
            row |= {"hf-ddpm": sizes.file, "net bits/dim": round(sizes.net_bpd, 4)}
            rows.append(row)
            speeds = {"seconds": round(sizes.seconds, 1), "seconds back": seconds and round(seconds, 1)}
            print(json.dumps(row | speeds), flush=True)
    names = [name for name in rows[0] if name not in ("images", "net bits/dim")]
    print("\n| images | " + " | ".join(str(row["images"]) for row in rows) + " |")
    print("|---|" + "---|" * len(rows))
    for name in names:
        cells = (f"{row[name]:,} ({8 * row[name] / row['raw']:.2f})" for row in rows)
        print(f"| {name} | " + " | ".join(cells) + " |")
    print(
        "| the images in batches, net | " + " | ".join(f"({row['net bits/dim']:.2f})" for row in rows) + " |"
    )
    weights = sum(file.stat().st_size for file in Path(args.model).glob("unet/*"))
    weights += sum(file.stat().st_size for file in Path(args.model).glob("errors.safetensors"))
    print(f"\nthe model's weights and errors: {weights:,} bytes, which are not counted")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with contextlib.suppress(BrokenPipeError):
        main()
    sys.stdout.flush()
