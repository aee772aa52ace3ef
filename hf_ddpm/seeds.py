"""Seeds derived from what they are for, so that nothing random needs saving.

A key is a use, a seed that a person chose, and whole numbers that tell the draws of this use apart, such as
an image's index. Equal keys give equal draws on every machine and in every process.

NumPy pads a key with zeros, so that keys which differ by zeros at their end are one key:
`derive_seed(1, 0) == derive_seed(1, 0, 0)`. Some uses below share a value, where their keys serve different
generators. Putting the length of a key into it would part them all, but would move every number that was ever
published, so it is left as it is.

Of a seed, torch's generator on the CPU keeps 32 bits; the one of a CUDA device keeps all. So of n seeds used
on the CPU, about n²/2³³ pairs draw equal noise: 0.3 pairs of 50,000 images to be sampled, which then are the
same image twice, and 466 pairs (494 were counted) of the 2,000,896 positions of a training run, where two
different images get equal noise. Seeds that can't collide would move every number too.
"""

from collections.abc import Iterable
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.checks import check_seed, described


class Use(IntEnum):
    """What random numbers are for: the first number of a key."""

    # The order of images, their crops and mirror images: keys of `numpy.random.default_rng`
    SHARDS = 0  # then seed, epoch
    ROWS = 1  # then seed, epoch, lane, block
    CROPS = 2  # then seed, epoch, block of places
    HOLDOUT = 14  # which rows are held out: a key of `numpy.random.SeedSequence`; then seed

    # Training: keys of `numpy.random.default_rng`
    STEPS = 6  # then seed, block of positions
    LABELS = 16  # whether a position's class is hidden; then seed, block of positions
    NOISE = 7  # the first noise of a position; 8, 9, … are further independent ones

    # Measuring and pictures: keys of `derive_seed`
    ESTIMATE = 1  # steps and noise of an image in an estimate of the bound; then seed, index of the image
    PILOT = 2  # then seed
    BOUND = 3  # noise of an image in the exact bound; then seed, index of the image
    REFERENCE_ROWS = 4  # real images that samples are compared with; then seed
    SCORED_ROWS = 5  # images whose bound is taken; then seed
    HELDOUT_ROWS = 6  # images beside which memorisation is judged; then seed
    PICTURE_NOISE = 12  # noise in x_t; then seed, place of the image
    PICTURE_STEPS = 13  # noise of the steps back; then seed, place of the image
    ERRORS = 14  # noise of an image whose errors are measured; then seed, index of the image
    ERROR_STEPS = 15  # which image is measured at which step; then seed


def derive_seed(*key: int) -> int:
    """A seed for a torch generator from whole numbers ≥ 0, such as (use, seed, image index).

    Args:
        key: whole numbers ≥ 0; zeros at the end don't count.

    Returns:
        A whole number in 0..2^63 − 1.

    Raises:
        ValueError: a part of the key is no whole number ≥ 0.
    """
    for number in key:
        check_seed(number)
    return int(np.random.SeedSequence([int(number) for number in key]).generate_state(1, np.uint64)[0] >> 1)


def image_generators(seed: int, indices: Iterable[int]) -> list[torch.Generator]:
    """One generator for each image to be sampled, on the CPU, from the seed and the image's index alone.

    Raises:
        ValueError: the seed or an index is no whole number ≥ 0.
    """
    return [torch.Generator().manual_seed(derive_seed(seed, i)) for i in indices]


def draw_noise(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Noise ε ~ N(0, I) of the shape, dtype and device of images.

    Args:
        like: images, any shape.
        generator: on the CPU or on the images' device; by default torch's global one of that device.

    Raises:
        ValueError: it is no generator.
    """
    device = _device_of(generator, like)
    return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)


def draw_steps(num_steps: int, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Steps t ~ Uniform{0, …, T − 1}, one for each image, shape (B,) int64.

    Args:
        num_steps: T.
        like: images, shape (B, ...), on whose device the steps are.
        generator: as in `draw_noise`, and so the errors.
    """
    device = _device_of(generator, like)
    return torch.randint(num_steps, like.shape[:1], generator=generator, device=device).to(like.device)


def _device_of(generator: torch.Generator | None, like: Tensor) -> torch.device:
    """Where to draw: a generator draws on its own device only."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator is {described(generator)}; allowed: a torch.Generator")
    return like.device if generator is None else generator.device


def check_generators(generator: Any, samples: int, device: torch.device | None = None) -> None:
    """Refuse what can't draw the noise of a batch.

    Args:
        generator: a generator, or a list with one for each sample.
        samples: B.
        device: where the samples are; None where that is not known yet.

    Raises:
        ValueError: neither of the two, another number of them, or generators of a device that can't draw for
            the samples' one: allowed are that one and the CPU.
    """
    if isinstance(generator, torch.Generator) and generator.device == device:  # as at most steps
        return
    found = generator if isinstance(generator, list) else [generator]
    for one in found:
        if not isinstance(one, torch.Generator):
            what = "an element of generator" if found is generator else "generator"
            raise ValueError(f"{what} is {described(one)}; allowed: a torch.Generator, or a list of them")
    if found is generator and len(found) != samples:
        raise ValueError(f"{len(found)} generators for a batch of {samples}; allowed: one, or one per image")
    kinds = sorted({one.device.type for one in found})
    if len(kinds) > 1 or (device is not None and kinds and kinds[0] not in ("cpu", device.type)):
        raise ValueError(
            f"generator is on {' and '.join(kinds)}; allowed: all on the CPU, or all on the samples' device"
        )
