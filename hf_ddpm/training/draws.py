"""What is drawn for an image of a run depends on (seed, its position in the run) alone.

So a resumed run draws what the unbroken one would have drawn, on any number of processes, and no generator
needs saving. What a number makes of the steps t is said in importance.py.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.seeds import Use

_BLOCK = 1024  # positions whose seeds come from one generator: seeding costs more than drawing


def draw_uniform(seed: int, positions: Sequence[int]) -> Tensor:
    """A number in [0, 1) for each position, which chooses its step t, (B,), float64, on the CPU."""
    return torch.tensor([_uniform(Use.STEPS, seed, p) for p in map(abs, positions)], dtype=torch.float64)


def draw_hidden(seed: int, positions: Sequence[int], share: float) -> Tensor:
    """Whether the class of each position's image is hidden from the network, (B,), bool, on the CPU.

    Args:
        seed: the run's.
        positions: of the images in the run, (B,).
        share: the probability of it, in [0, 1).
    """
    return torch.tensor([_uniform(Use.LABELS, seed, p) < share for p in map(abs, positions)])


def draw_noise(
    seed: int, positions: Sequence[int], shape: Sequence[int], device: torch.device, number: int = 0
) -> Tensor:
    """Noise ε ~ N(0, I) for each position, (B, *shape), float32, drawn on the device.

    Args:
        seed: the run's.
        positions: of the images in the run, (B,). An empty slot, −1, gets the noise of position 1.
        shape: (C, H, W).
        device: where the noise is drawn. Each kind of device has numbers of its own, which repeat on it.
        number: 0, 1, … for independent noises of the same image.
    """
    noise = torch.empty(len(positions), *shape, device=device)
    generator = torch.Generator(device)
    for image, p in zip(noise, map(abs, positions), strict=True):
        generator.manual_seed(int(_uniform(Use.NOISE + number, seed, p) * 2**53))
        torch.randn(tuple(shape), generator=generator, device=device, out=image)
    return noise


def _uniform(use: int, seed: int, position: int) -> float:
    block, place = divmod(position, _BLOCK)
    # NumPy would split a large seed into words of 32 bits, and so confuse it with other keys
    return _block(use, seed % 2**32, block, seed >> 32)[place]


@functools.lru_cache(maxsize=8)
def _block(*key: int) -> np.ndarray:
    """Uniforms in [0, 1) for `_BLOCK` positions."""
    return np.random.default_rng(key).random(_BLOCK)
