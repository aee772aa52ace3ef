"""Measured errors that are known exactly, for tests of what is made of them."""

import math

import torch

from hf_ddpm.likelihood.errors import LOG_SIGMAS, Errors
from hf_ddpm.likelihood.levels import decoder_steps
from hf_ddpm.variances import VALUE_BINS

PIXELS = 10**9  # of each step and bin: so many that a prior of a few pixels is nothing


def known_errors(process, mse, levels=None, sigma=0.01):
    """Errors with the given m_t, (T,), or m_tg of each bin of x̂_0's value, (T, 32); and σ of L_0."""
    table = torch.tensor(mse, dtype=torch.float64) if not torch.is_tensor(mse) else mse.double()
    table = table[:, None].expand(-1, VALUE_BINS) if table.ndim == 1 else table
    curve = (torch.tensor(LOG_SIGMAS, dtype=torch.float64) - math.log(sigma)).square()
    return Errors(
        process=process,
        squared=table * PIXELS,
        pixels=torch.full((len(process), VALUE_BINS), PIXELS),
        decoder_nats=(1 + curve).expand(VALUE_BINS, -1) * PIXELS,
        levels_nats=(1 + curve).expand(len(decoder_steps(process)), VALUE_BINS, -1) * PIXELS,
        levels=torch.ones(1, 256, dtype=torch.int64) if levels is None else levels,
    )
