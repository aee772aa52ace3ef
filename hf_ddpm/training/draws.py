"""What is drawn for an image of a run: t and ε depend on (seed, its position in the run) alone.

So a resumed run draws what the unbroken one would have drawn, on any number of processes, and no generator
needs saving.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.seeds import Use

_BLOCK = 1024  # positions whose seeds come from one generator: seeding costs more than drawing


def draw_uniform(seed: int, positions: Sequence[int]) -> Tensor:
    """A number in [0, 1) for each position, which chooses its t, (B,), float64, on the CPU."""
    return torch.tensor([_uniform(Use.STEPS, seed, p) for p in map(abs, positions)], dtype=torch.float64)


def draw_t(seed: int, positions: Sequence[int], num_steps: int) -> Tensor:
    """Steps t ~ U{0, …, T − 1} for each position, (B,), int64, on the CPU."""
    return (draw_uniform(seed, positions) * num_steps).long().clamp(max=num_steps - 1)


def draw_noise(
    seed: int, positions: Sequence[int], shape: Sequence[int], device: torch.device, number: int = 0
) -> Tensor:
    """Noise ε ~ N(0, I) for each position, (B, *shape), float32, drawn on the device.

    A device has numbers of its own; within one kind they repeat. Noise of another `number` is independent.
    """
    noise = torch.empty(len(positions), *shape, device=device)
    generator = torch.Generator(device)
    for image, p in zip(noise, map(abs, positions), strict=True):  # an empty slot is −1: some position's
        generator.manual_seed(int(_uniform(Use.NOISE + number, seed, p) * 2**53))
        torch.randn(tuple(shape), generator=generator, device=device, out=image)
    return noise


def _uniform(use: int, seed: int, position: int) -> float:
    block, place = divmod(position, _BLOCK)
    return _block(use, seed % 2**32, block, seed >> 32)[place]  # NumPy would split a large seed into words


@functools.lru_cache(maxsize=8)
def _block(*key: int) -> np.ndarray:
    """Uniforms in [0, 1) for `_BLOCK` positions."""
    return np.random.default_rng(key).random(_BLOCK)
