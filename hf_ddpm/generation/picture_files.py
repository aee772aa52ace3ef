"""Files of the commands that make one picture: images that they open, and the PNG file that they write."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hf_ddpm.checks import described
from hf_ddpm.config import TrainConfig
from hf_ddpm.data.encoded import FORMATS
from hf_ddpm.data.files import read_regular
from hf_ddpm.data.pixels import WHITE, Decoder
from hf_ddpm.data.stream import load_stream
from hf_ddpm.folders.layout import RECORD
from hf_ddpm.runtime.disk import why_not_writable
from hf_ddpm.runtime.messages import one_line


def open_mask(name: str) -> Image.Image:
    """The picture in a file.

    Raises:
        ValueError: there is none.
    """
    if not _is_file(name):
        raise ValueError(f"mask {name!r} is no file; allowed: an image file, black and white")
    try:
        data = io.BytesIO(read_regular(str(as_path("mask", name))))
        with Image.open(data, formats=FORMATS) as picture:
            picture.load()
            return picture.copy()
    # What PIL raises on foreign bytes has no common class
    except Exception as error:
        raise ValueError(f"mask {name!r} can't be read: {one_line(error, 120)}") from error


def trained_reading(model: str) -> dict[str, Any]:
    """How the model's training run read images, as keywords of `open_image`, if its folder says so."""
    record = Path(model).expanduser() / RECORD
    if not record.is_file():
        return {}
    config = TrainConfig.of_run(record)
    return {"background": config.background, "to_8_bit": config.to_8_bit or config.fit != "exact"}


def open_image(
    name: str | os.PathLike[str],
    shape: tuple[int, int, int],
    column: str | None = None,
    background: str = WHITE,
    to_8_bit: bool = False,
) -> Tensor:
    """An image that is neither resized nor turned from grey to colour or back, uint8 (C, H, W).

    Args:
        name: an image file, or DATASET:SPLIT:ROW with a data set that `load_stream` opens.
        shape: (C, H, W) that it must have.
        column: column of the images in the data set, by default the only one.
        background: what transparent pixels are laid on, unless C is 2 or 4, see `load_stream`.
        to_8_bit: whether deeper images become levels of 8 bits, see `load_stream`.

    Raises:
        ValueError: there is no such image, or it has another shape.
    """
    name = as_text("image", name)
    # Alpha is kept where the model has it; arrays of another number of channels have to be told theirs
    channels = None if shape[0] in (1, 3) else shape[0]
    dataset, _, row = name.rpartition(":")
    dataset, _, split = dataset.rpartition(":")
    if _is_file(name):
        path = as_path("image", name)
        try:
            pixels = Decoder(channels, background, to_8_bit)(read_regular(str(path)))
            image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    elif split.endswith("]"):
        raise ValueError(
            f"image {name!r} names a slice; allowed: a row of a whole split, as in digits:test:17"
        )
    elif dataset and split and row.isascii() and row.isdecimal():
        stream = load_stream(
            dataset, split, None, channels, column=column, background=background, to_8_bit=to_8_bit
        )
        (image,) = stream.select([int(row)])
    else:
        raise ValueError(
            f"image {name!r} is no file; allowed: an image file, or DATASET:SPLIT:ROW such as digits:test:17"
        )
    if image.shape != shape:
        raise ValueError(f"image {name!r} is {tuple(image.shape)} (C, H, W); allowed: the model's {shape}")
    return image


def check_out(out: str, images: Sequence[str], overwrite: bool) -> Path:
    """The path of the picture, which must be writable, and none of the images that it is made of."""
    path = as_path("out", out)
    if path.suffix.lower() != ".png":
        raise ValueError(f"out is {out!r}; allowed: a file name that ends in .png")
    reason = "Is a directory" if path.is_dir() else why_not_writable(path.parent if path.exists() else path)
    if reason:
        raise ValueError(f"out {out!r} can't be written: {reason}")
    if path.exists() and not overwrite:
        raise ValueError(f"out {out!r} is there already; allowed: another file, or --overwrite")
    for name in images:
        if path.exists() and _is_file(name) and path.samefile(as_path("image", name)):
            raise ValueError(f"out {out!r} is the image {name!r}; allowed: another file")
    return path


def _is_file(name: str) -> bool:
    """Whether an image's name is that of a file."""
    return as_path("image", name).is_file()


def as_text(what: str, name: str | os.PathLike[str]) -> str:
    """A name of a file or a model as text; `what` it is for begins the message of the error."""
    if not isinstance(name, str | os.PathLike):
        raise ValueError(f"{what} is {described(name)}; allowed: a name as text or a path")
    return os.fspath(name)


def as_path(what: str, name: str) -> Path:
    """The name as a path.

    Raises:
        ValueError: it can't be one; `what` it is for begins the message.
    """
    try:
        path = Path(name).expanduser()
        # A name that is too long can't be asked for
        path.exists()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{what} {name!r} is no path: {one_line(error)}") from error
    return path
