"""Images as people have them, as one batch of tensors: PIL images, arrays, tensors, and lists of these.

One rule serves all who take images: the bound of images (`DDPMPipeline.bits_per_dim`), pictures (pictures.py)
and grids (grids.py). Numbers are grey levels in uint8, or floating point in [−1, 1].
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from hf_ddpm.checks import described
from hf_ddpm.data.pixels import to_float

PIL_MODES = ("L", "RGB", "RGBA")  # the modes whose 8-bit numbers are grey levels of pixels
CHANNELS = (1, 3, 4)  # grey, RGB and RGBA: of an image whose form is to be told by its shape alone
FARTHEST = 2.0  # what is farther from 0 is no image in [-1, 1], nor what a network makes of one


def as_images(images: Any, shape: tuple[int, int, int] | None) -> Tensor:
    """Images of any usual form as one batch.

    Args:
        images: a PIL image of mode L, RGB or RGBA; an array or a tensor of (H, W), (C, H, W), (H, W, C),
            (B, H, W), (B, C, H, W) or (B, H, W, C), uint8 or floating point; or a list of such.
        shape: (C, H, W) of the model's images, which tells the forms apart; None where there is no model.
            Then C is 1, 3 or 4, a list holds single images, and all of them have one shape.

    Returns:
        (B, C, H, W), float32, or float64 if it was; uint8 has become the levels u/127.5 − 1.

    Raises:
        ValueError: something else, another shape, a PIL image with a transparent colour, or an array
            or tensor whose form can't be told from another one.
    """
    if not _is_list(images):
        return _of_one(images, shape, False)
    if not images:
        raise ValueError("there are no images; allowed: at least one")
    found = [as_images(image, shape) if _is_list(image) else _of_one(image, shape, True) for image in images]
    shapes = sorted({tuple(image.shape[1:]) for image in found})
    if len(shapes) > 1:
        raise ValueError(
            f"images have shapes {shapes[0]} and {shapes[1]} (C, H, W); allowed: all of one shape"
        )
    return torch.cat(found)


def as_pictures(images: Any, shape: tuple[int, int, int] | None = None) -> Tensor:
    """Images for a picture: as `as_images`, of any iterable, looked at once for numbers that can't be right.

    A tensor (B, C, H, W) of floating-point numbers has this package's form, and is taken as it is.

    Args:
        images: as in `as_images`, in [−1, 1] if they are floating point.
        shape: as in `as_images`.

    Returns:
        (B, C, H, W), float32 or float64, without a gradient.

    Raises:
        ValueError: as in `as_images`, no images, numbers that are not finite, or far out of [−1, 1], or only
            in [0, 1] and not on the levels of 8 bits.
    """
    if isinstance(images, Tensor) and images.ndim == 4 and images.is_floating_point():
        found = images
    else:
        single = isinstance(images, Image.Image | np.ndarray | Tensor | str | bytes | dict)
        found = as_images(list(images) if isinstance(images, Iterable) and not single else images, shape)
    if found.numel() == 0 or found.is_meta:
        raise ValueError(f"images are {described(found)}; allowed: at least one image of at least one pixel")
    found = found.detach()
    found = found if found.dtype == torch.float64 else found.float()
    low, high = (end.item() for end in found.aminmax())
    if not -FARTHEST <= low <= high <= FARTHEST:  # nor is NaN
        raise ValueError(f"images have values from {low:g} to {high:g}; allowed: [-1, 1], or uint8")
    u = (found.double() + 1) * 127.5
    if 0 <= low < high <= 1 and (u - u.round()).abs().max() > 1e-3:
        raise ValueError(
            f"images have values from {low:g} to {high:g}, none below 0; allowed: [-1, 1], or uint8 (did you "
            "mean 2 * x - 1?)"
        )
    return found


def _is_list(images: Any) -> bool:
    return isinstance(images, Sequence) and not isinstance(images, str | bytes)


def _of_one(image: Any, shape: tuple[int, int, int] | None, single: bool) -> Tensor:
    """A PIL image, an array or a tensor as a batch; `single` says that without a model it holds one image."""
    if isinstance(image, Image.Image):
        return _of_picture(image, shape)
    x = image
    if isinstance(x, np.ndarray) and x.dtype in (np.uint8, np.float32, np.float64):
        x = torch.from_numpy(x.copy())  # PIL's arrays can't be written to, and torch wants no other strides
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.dtype == torch.uint8):
        raise ValueError(f"images are {described(image)}; allowed: PIL images, uint8, or float32 or float64")
    found = _by_its_shape(x, single) if shape is None else _in_order(x, shape)
    return to_float(found) if found.dtype == torch.uint8 else found


def _of_picture(image: Image.Image, shape: tuple[int, int, int] | None) -> Tensor:
    """A PIL image as (1, C, H, W), float32. Its form is known, so it fits a model of any shape."""
    if image.mode not in PIL_MODES or "transparency" in image.info:
        which = "a transparent colour" if image.mode in PIL_MODES else f"PIL mode {image.mode}"
        raise ValueError(f"an image has {which}; allowed: {', '.join(PIL_MODES)} (image.convert)")
    pixels = torch.from_numpy(np.asarray(ImageOps.exif_transpose(image)).copy())
    pixels = pixels.view(*pixels.shape[:2], -1).permute(2, 0, 1)
    if shape is not None and pixels.shape != shape:
        found = f"an image of PIL mode {image.mode} is {tuple(pixels.shape)}"
        raise ValueError(f"{found}; the model's are {shape} (C, H, W)")
    return to_float(pixels[None])


def _in_order(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """The tensor as (B, C, H, W)."""
    channels, height, width = shape
    forms: dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]] = {
        "(C, H, W)": ((channels, height, width), lambda: x[None]),
        "(H, W, C)": ((height, width, channels), lambda: x.permute(2, 0, 1)[None]),
    }
    if channels == 1:
        forms["(H, W)"] = ((height, width), lambda: x[None, None])
        forms["(B, H, W)"] = ((-1, height, width), lambda: x[:, None])
    forms["(B, C, H, W)"] = ((-1, channels, height, width), lambda: x)
    forms["(B, H, W, C)"] = ((-1, height, width, channels), lambda: x.permute(0, 3, 1, 2))
    fits = {}
    for name, (wanted, make) in forms.items():
        if len(wanted) == x.ndim and all(a in (-1, b) for a, b in zip(wanted, x.shape, strict=True)):
            fits[name] = make()
    if not fits:
        raise ValueError(f"images are {described(x)}; the model's are {shape} (C, H, W)")
    return _only(fits, x, "estimate_bound, which takes (B, C, H, W)")


def _by_its_shape(x: Tensor, single: bool) -> Tensor:
    """The tensor as (B, C, H, W), of images in grey, RGB or RGBA; `single` says that it is one image."""
    fits = {}
    small = [side in CHANNELS for side in x.shape]
    if x.ndim == 2:
        fits["(H, W)"] = x[None, None]
    if x.ndim == 3 and small[0]:
        fits["(C, H, W)"] = x[None]
    if x.ndim == 3 and small[2]:
        fits["(H, W, C)"] = x.permute(2, 0, 1)[None]
    elif x.ndim == 3 and not single:
        fits["(B, H, W)"] = x[:, None]
    if x.ndim == 4 and small[1]:
        fits["(B, C, H, W)"] = x
    if x.ndim == 4 and small[3]:
        fits["(B, H, W, C)"] = x.permute(0, 3, 1, 2)
    if not fits:
        raise ValueError(
            f"images are {described(x)}; allowed: 1, 3 or 4 channels, or any number of them as floating "
            "point in [-1, 1], (B, C, H, W)"
        )
    return _only(fits, x, "floating point in [-1, 1], (B, C, H, W)")


def _only(fits: dict[str, Tensor], x: Tensor, instead: str) -> Tensor:
    """What a tensor is in the one form that fits it, or in each of several that say the same."""
    first, *others = fits.values()
    if not all(first.shape == other.shape and torch.equal(first, other) for other in others):
        raise ValueError(
            f"images of shape {tuple(x.shape)} may be {' or '.join(fits)}; allowed: PIL images, whose "
            f"form is known, or {instead}"
        )
    return first
