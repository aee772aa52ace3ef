"""Two images named by a person → a model's interpolations of them, in a PNG file, on one process.

It knows files and names. The interpolation is pictures.py's.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hf_ddpm.data import load_stream
from hf_ddpm.generate import process_state
from hf_ddpm.parts import why_not_writable
from hf_ddpm.pictures import interpolate
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.pixels import decode_pixels, one_line, to_float
from hf_ddpm.progress import REFRESH


def draw_interpolation(
    model: str,
    image_a: str,
    image_b: str,
    out: str,
    timesteps: Sequence[int] | None = None,
    num_images: int = 9,
    seed: int = 0,
    steps: int | None = None,
    image_column: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Interpolate two images into a PNG file, on one process; returns its path.

    Args:
        model: pipeline folder or Hub id.
        image_a: a file, or DATASET:SPLIT:ROW.
        image_b: another one.
        out: the file.
        timesteps: steps to interpolate at, a row each; by default T/4, T/2 and 3T/4.
        num_images: see `interpolate`.
        seed: see `interpolate`.
        steps: K sampling steps for the whole process, by default all T.
        image_column: of the data sets, by default the only one.
        overwrite: replace the file.

    Raises:
        ValueError: a bad argument, model or image, or a file that can't be written or is there already.
    """
    path = _path("out", out)
    if path.suffix.lower() != ".png":
        raise ValueError(f"out is {out!r}; allowed: a file name that ends in .png")
    place = path.parent if path.exists() else path
    if reason := "Is a directory" if path.is_dir() else why_not_writable(place):
        raise ValueError(f"out {out!r} can't be written: {reason}")
    if path.exists() and not overwrite:
        raise ValueError(f"out {out!r} is there already; allowed: another file, or --overwrite")
    for name in (image_a, image_b):
        if path.exists() and _is_file(name) and path.samefile(_path("image", name)):
            raise ValueError(f"out {out!r} is the image {name!r}; allowed: another file")
    pipeline = DDPMPipeline.from_pretrained(model).to(process_state().device)
    a, b = (open_image(name, pipeline.image_shape, image_column) for name in (image_a, image_b))
    pipeline.set_progress_bar_config(desc="interpolate", leave=False, mininterval=REFRESH)
    total = len(pipeline.process)
    chosen = timesteps or list(dict.fromkeys(total * quarter // 4 for quarter in (1, 2, 3)))
    try:
        sheet = interpolate(pipeline, to_float(a), to_float(b), chosen, num_images, seed, steps)
    except ValueError as error:
        raise ValueError(str(error).replace("num_inference_steps", "steps")) from error  # its name here
    return sheet.save(path)


def open_image(name: str, shape: tuple[int, int, int], column: str | None = None) -> Tensor:
    """An image as it is, neither resized nor converted, uint8 (C, H, W).

    Args:
        name: an image file, or DATASET:SPLIT:ROW with a data set that `load_stream` opens.
        shape: what it must have.
        column: of the data set.

    Raises:
        ValueError: nothing there that is an image, or one of another shape.
    """
    dataset, _, row = name.rpartition(":")
    dataset, _, split = dataset.rpartition(":")
    if _is_file(name):
        path = _path("image", name)
        try:
            image = torch.from_numpy(decode_pixels(path.read_bytes(), None).copy()).permute(2, 0, 1)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    elif dataset and split and row.isdecimal():
        (image,) = load_stream(dataset, split, column=column).select([int(row)])
    else:
        raise ValueError(
            f"image {name!r} is no file; allowed: an image file, or DATASET:SPLIT:ROW such as digits:test:17"
        )
    if image.shape != shape:
        raise ValueError(f"image {name!r} is {tuple(image.shape)} (C, H, W); allowed: the model's {shape}")
    return image


def _path(what: str, name: str) -> Path:
    try:
        path = Path(name).expanduser()
        path.exists()  # which a name that is too long can't be asked
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{what} {name!r} is no path: {one_line(error)}") from error
    return path


def _is_file(name: str) -> bool:
    return _path("image", name).is_file()
