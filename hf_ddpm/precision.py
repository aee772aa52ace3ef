"""Half precision in, float32 inside, one cast back: the dtype rule of every equation on images."""

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float32, or `dtype` where that is wider."""
    return torch.promote_types(dtype, torch.float32)


def wide(x: Tensor) -> Tensor:
    """`x` in float32 or wider."""
    return x if x.dtype.itemsize >= 4 else x.float()


def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` cast to `dtype`; float16 saturates at ±65504, where a plain cast of an early x̂_0 would overflow."""
    if dtype == torch.float16:
        limit = torch.finfo(dtype).max
        x = x.clamp(-limit, limit)
    return x if x.dtype == dtype else x.to(dtype)
