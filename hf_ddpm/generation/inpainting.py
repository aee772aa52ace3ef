"""Inpainting: pixels of an image drawn anew, given the others, by a network trained for no such thing.

RePaint, Lugmayr et al. 2022, algorithm 1. At each step the known pixels are replaced by a draw of
q(x_prev | x_0), and those to be filled come from the model's step back. As that saw known pixels of another
draw, the two parts don't fit each other yet. So the step is repeated: forward again, and back,

    x_t ~ q(x_t | x_prev),   x_prev ~ p_θ(x_prev | x_t) where it is filled, q(x_prev | x_0) where it is known.

To and fro is a step of Langevin dynamics of the filled pixels, of noise 2 β_t, if the step back has the
variance β_t too. With β̃_t, which is less, every repetition takes from the variance of what is filled: so
β_t is used, whichever fixed variance the sampler has. On Gaussian data the filled pixels then tend to their
exact conditional mean and variance as the repetitions grow, with errors of about 1/resample.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageOps
from torch import Tensor

from hf_ddpm.checks import described
from hf_ddpm.denoiser import Denoiser
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.variances import FIXED, plain_name

MODES = ("1", "L", "P", "RGB")  # of PIL's pictures that are taken for masks
SIDES = "allowed: 0 where a pixel is kept, and 1 or 255 (white, True) where it is filled"


def as_mask(mask: Any, num_images: int, height: int, width: int) -> Tensor:
    """Which pixels of some images are filled, from any usual form of a mask.

    Args:
        mask: True, 1 or 255 (white) where a pixel is filled, False or 0 (black) where it is kept: a PIL
            image, an array or a tensor of (H, W), (1, H, W), (H, W, 1), (B, H, W), (B, 1, H, W) or
            (B, H, W, 1), or with three equal channels last; or a list of such, one for each image.
        num_images: B.
        height: H of the images.
        width: W of the images.

    Returns:
        (B, 1, H, W), bool, on the CPU.

    Raises:
        ValueError: something else, another size, another number of masks, other values, or a mask that fills
            no pixel.
    """
    if isinstance(mask, list | tuple) and mask and all(_is_picture(one) for one in mask):
        found = torch.cat([_one_form(one, height, width) for one in mask])
    else:
        found = _one_form(mask, height, width)
    if len(found) not in (1, num_images):
        raise ValueError(f"there are {len(found)} masks for {num_images} images; allowed: as many, or one")
    if not found.flatten(1).any(1).all():
        raise ValueError(f"a mask fills no pixel; {SIDES}")
    return found.expand(num_images, 1, height, width)


def _is_picture(value: Any) -> bool:
    return isinstance(value, Image.Image | np.ndarray | Tensor)


def _one_form(mask: Any, height: int, width: int) -> Tensor:
    """A picture, an array or a tensor as masks, (N, 1, H, W), bool."""
    if isinstance(mask, Image.Image):
        if mask.mode not in MODES or "transparency" in mask.info:
            raise ValueError(f"mask has PIL mode {mask.mode}; allowed: {', '.join(MODES)}, opaque")
        mask = np.asarray(ImageOps.exif_transpose(mask.convert("RGB") if mask.mode == "P" else mask))
    if isinstance(mask, Tensor):
        values = mask.detach().cpu()
        array = (values.float() if values.is_floating_point() else values).numpy()
    else:
        try:
            array = np.asarray(mask)
        except ValueError:
            array = np.array(None)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"mask is {described(mask)}; allowed: a PIL image, an array or a tensor of numbers")
    values = np.unique(array)
    odd = [value for value in values.tolist() if value not in (0, 1, 255)]
    if odd or {1, 255} <= set(values.tolist()):
        raise ValueError(f"mask holds {odd[0] if odd else 'both 1 and 255'}; {SIDES}")
    found, size = torch.from_numpy(np.ascontiguousarray(array != 0)), (height, width)
    shape = tuple(found.shape)
    if shape[-3:-1] == size and shape[-1] in (1, 3) and len(shape) in (3, 4):
        if not (found == found[..., :1]).all():
            raise ValueError("mask has channels that differ; allowed: black and white")
        found, shape = found[..., 0], shape[:-1]
    if shape[-2:] != size or len(shape) not in (2, 3, 4) or (len(shape) == 4 and shape[1] != 1):
        raise ValueError(
            f"mask has shape {tuple(array.shape)}; allowed: the height and width of the images, {size}, and "
            "a number of masks before them"
        )
    return found.reshape(-1, 1, height, width)


def inpaint(
    pipeline: Any,
    denoise: Denoiser,
    x_0: Tensor,
    filled: Tensor,
    resample: int,
    num_steps: int,
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> Tensor:
    """Draw the filled pixels given the others.

    Args:
        pipeline: the model, whose sampler is `DDPMScheduler`.
        denoise: its network, for the classes that are asked for.
        x_0: the images in [−1, 1], (B, C, H, W), float32 or float64.
        filled: which pixels are drawn, (B, 1, H, W), bool.
        resample: how often each step is taken, ≥ 1. The last one, to x_0, is taken once.
        num_steps: K.
        generator: of all noise.

    Returns:
        The images, dtype and device of x_0: known pixels are those of x_0, to the last bit.

    Raises:
        ValueError: the network's answers are not finite.
    """
    scheduler: Any = _sampler(pipeline.scheduler)
    scheduler.set_timesteps(num_steps)
    chain, device, dtype = scheduler.chain, pipeline._execution_device, pipeline._weight.dtype
    known, where = x_0.to(device, dtype), filled.to(device)

    def noise() -> Tensor:
        return randn_tensor(tuple(x_0.shape), generator=generator, device=device, dtype=dtype)  # type: ignore[arg-type]

    x, finite = noise(), []
    places = [place for place in reversed(range(num_steps)) for _ in range(resample if place else 1)]
    for number, place in enumerate(pipeline.progress_bar(places)):
        t = scheduler.timesteps[num_steps - 1 - place]
        output = denoise(x, t.expand(len(x)))
        finite.append(output.isfinite().all())  # looked at in the end: nothing is read back in between
        drawn = scheduler.step(output, t, x, generator=generator).prev_sample
        x = torch.where(where, drawn, chain.q_sample_prev(known, noise(), place) if place else known)
        if place and places[number + 1] == place:
            x = chain.q_step(x, noise(), place)
    if not (torch.stack(finite).all() and x.isfinite().all()):
        raise ValueError("the images are not finite: bad weights, or a dtype of too small a range")
    return torch.where(filled.to(x_0.device), x.to(x_0.device, x_0.dtype), x_0)


def _sampler(scheduler: DDPMScheduler) -> DDPMScheduler:
    """The scheduler with the variance β_t in the place of another fixed one."""
    if plain_name(scheduler.variance_type) not in FIXED:
        return scheduler
    return type(scheduler).from_config(scheduler.config, variance_type="fixed_large")
