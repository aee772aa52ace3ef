"""The bound of a few images under a pipeline's network: images of any usual form → Estimate.

What the bound is, likelihood/ knows; whole data sets, shared by processes, are evaluation/'s.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from hf_ddpm.checks import described
from hf_ddpm.data.pixels import to_float
from hf_ddpm.denoiser import as_denoiser, scoring_device
from hf_ddpm.likelihood import Estimate, estimate_bound
from hf_ddpm.likelihood.errors import MEASURED
from hf_ddpm.variances import AnyVariance, plain_name

PIL_MODES = ("L", "RGB", "RGBA")  # the modes whose 8-bit numbers are grey levels of pixels


def bits_per_dim(
    pipeline: Any,
    images: Any,
    num_evals_per_image: int,
    seed: int,
    batch_size: int,
    variance_type: str | None,
    clip_x0: bool,
    decoder: Literal["exact", "tanh"],
) -> Estimate:
    """The bound of images, by `estimate_bound`; arguments and errors as in `DDPMPipeline.bits_per_dim`."""
    if variance_type is None:  # a sampler that has none leaves it to what the network was trained for
        own = pipeline.trained_scheduler.config["variance_type"]
        variance_type = plain_name(getattr(pipeline.scheduler, "config", {}).get("variance_type", own))
    variance = measured_variance(pipeline, variance_type, clip_x0)
    device = scoring_device(pipeline.device)
    x_0 = as_images(images, pipeline.image_shape).to(device)
    network, weight = pipeline.unet, next(iter(_weights(pipeline.unet)), None)
    denoise = as_denoiser(network, pipeline.device)

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        answer = denoise(x_t if weight is None else x_t.to(weight.dtype), t)
        return answer if isinstance(variance, str) else answer[:, : x_t.shape[1]]

    was_training = isinstance(network, nn.Module) and network.training
    try:
        if was_training:
            network.eval()
        return estimate_bound(
            pipeline.process,
            model,
            x_0,
            num_evals_per_image=num_evals_per_image,
            seed=seed,
            batch_size=batch_size,
            variance_type=variance,
            prediction_type=pipeline.prediction_type,
            clip_x0=clip_x0,
            decoder=decoder,
        )
    finally:
        if was_training:
            network.train()


def measured_variance(pipeline: Any, variance_type: str, clip_x0: bool) -> AnyVariance:
    """The variance of that name; of "optimal" and "by-value" the numbers that were measured.

    Raises:
        ValueError: the pipeline's folder has no errors, or they were measured with another `clip_x0`.
    """
    if variance_type not in MEASURED:
        return variance_type
    if (found := pipeline.errors) is None:
        raise ValueError(f"variance_type is {variance_type!r}; allowed: after hf-ddpm plan has measured it")
    if found.of.clip_x0 != clip_x0:
        raise ValueError(
            f"clip_x0 is {clip_x0}, but the errors were measured with {found.of.clip_x0}; allowed: equal"
        )
    return found.errors.variance(pipeline.process, variance_type)


def as_images(images: Any, shape: tuple[int, int, int]) -> Tensor:
    """Images of any usual form as one batch on the levels u/127.5 − 1.

    Args:
        images: a PIL image of mode L, RGB or RGBA; an array or a tensor of (H, W), (C, H, W), (H, W, C),
            (B, H, W), (B, C, H, W) or (B, H, W, C), uint8 or on the levels already; or a list of such.
        shape: (C, H, W) of the model's images, which tells the forms apart.

    Returns:
        (B, C, H, W), float32, or float64 if it was.

    Raises:
        ValueError: something else, another shape, a PIL image with a transparent colour, or an array
            or tensor whose form can't be told from another one.
    """
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        if not images:
            raise ValueError("there are no images; allowed: at least one")
        return torch.cat([as_images(image, shape) for image in images])
    if isinstance(images, Image.Image):
        return _of_picture(images, shape)
    if isinstance(images, np.ndarray) and images.dtype in (np.uint8, np.float32, np.float64):
        images = torch.from_numpy(np.ascontiguousarray(images))
    if not isinstance(images, Tensor) or not (images.is_floating_point() or images.dtype == torch.uint8):
        raise ValueError(f"images are {described(images)}; allowed: PIL images, uint8, or float32 or float64")
    found = _in_order(images, shape)
    return to_float(found) if found.dtype == torch.uint8 else found


def _of_picture(image: Image.Image, shape: tuple[int, int, int]) -> Tensor:
    """A PIL image as (1, C, H, W), float32. Its form is known, so it fits a model of any shape."""
    if image.mode not in PIL_MODES or "transparency" in image.info:
        which = "a transparent colour" if image.mode in PIL_MODES else f"PIL mode {image.mode}"
        raise ValueError(f"an image has {which}; allowed: {', '.join(PIL_MODES)} (image.convert)")
    pixels = torch.from_numpy(np.asarray(ImageOps.exif_transpose(image)).copy())
    pixels = pixels.view(*pixels.shape[:2], -1).permute(2, 0, 1)
    if pixels.shape != shape:
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
    first, *others = fits.values()
    if not all(first.shape == other.shape and torch.equal(first, other) for other in others):
        raise ValueError(
            f"images of shape {tuple(x.shape)} may be {' or '.join(fits)}; allowed: PIL images, whose "
            "form is known, or estimate_bound, which takes (B, C, H, W)"
        )
    return first


def _weights(network: Any) -> list[Tensor]:
    parameters = network.parameters() if isinstance(network, nn.Module) else ()
    return [weight for weight in parameters if weight.is_floating_point()]
