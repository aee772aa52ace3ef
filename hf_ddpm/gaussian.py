"""Gaussian maths: the KL of two diagonal Gaussians, the discretised decoder, nats to bits/dim.

    KL(N(μ₁, σ₁²) ‖ N(μ₂, σ₂²)) = ½ [log σ₂² − log σ₁² − 1 + σ₁²/σ₂² + (μ₁ − μ₂)²/σ₂²]
    log p(x) = log [Φ((x − μ + 1/255)/σ) − Φ((x − μ − 1/255)/σ)],   open-ended at x = −1 and x = 1

It knows tensors and the 256 grey levels x = u/127.5 − 1. It does not know what a diffusion process is.
Everything is elementwise, in nats and computed in float64; sums over dimensions are the caller's.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.special import log_ndtr

HALF_BIN = 1 / 255  # grey levels lie 2/255 apart
EDGE = 0.999  # between the outermost level (±1) and its neighbour (±253/255), on either side
TANH_CLAMP = 1e-12  # the smallest probability of the published code


def normal_kl(
    mean1: Tensor, log_variance1: Tensor | float, mean2: Tensor, log_variance2: Tensor | float
) -> Tensor:
    """Divergence KL(N(mean1, exp log_variance1) ‖ N(mean2, exp log_variance2)), per element.

    Args:
        mean1: mean of the first Gaussian, any shape.
        log_variance1: its log-variance; all four broadcast together.
        mean2: mean of the second Gaussian.
        log_variance2: its log-variance.

    Returns:
        nats, float64, the broadcast shape.
    """
    mean1, log_variance1, mean2, log_variance2 = (
        torch.as_tensor(z, dtype=torch.float64) for z in (mean1, log_variance1, mean2, log_variance2)
    )
    d = log_variance1 - log_variance2
    # expm1(d) − d instead of exp(d) − 1 − d: nothing is lost where the variances nearly agree.
    return 0.5 * (torch.expm1(d) - d + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def discretized_gaussian_log_likelihood(
    x_0: Tensor,
    mean: Tensor,
    log_variance: Tensor | float,
    method: Literal["exact", "tanh"] = "exact",
) -> Tensor:
    """The decoder log p_θ(x_0 | x_1) of 8-bit images, Ho et al. 2020, eq. 13.

        log ∫_{x−1/255}^{x+1/255} N(u; mean, σ²) du,   from −∞ where x = −1, up to +∞ where x = 1

    The 256 probabilities of a pixel sum to 1.

    Args:
        x_0: images on the grid u/127.5 − 1, u in 0..255, any shape.
        mean: mean of the Gaussian (the predicted x_0), broadcastable to x_0.
        log_variance: its log-variance, broadcastable to x_0.
        method: "exact", a difference of log Φ that is right in both tails and has a usable gradient; or
            "tanh", the published code's approximation of Φ with its clamp at 1e-12, for parity with published
            numbers.

    Returns:
        log-probability in nats, elementwise, float64, shape of x_0.

    Raises:
        ValueError: `method` is neither "exact" nor "tanh".
    """
    x_0, mean = x_0.double(), mean.double()
    inverse_sigma = torch.exp(-0.5 * torch.as_tensor(log_variance, dtype=torch.float64))
    low = (x_0 - mean - HALF_BIN) * inverse_sigma
    high = (x_0 - mean + HALF_BIN) * inverse_sigma
    if method == "exact":
        interior = _log_interval(low, high)
        at_black, at_white = log_ndtr(high), log_ndtr(-low)
    elif method == "tanh":
        interior = torch.log((_tanh_cdf(high) - _tanh_cdf(low)).clamp(min=TANH_CLAMP))
        at_black = torch.log(_tanh_cdf(high).clamp(min=TANH_CLAMP))
        at_white = torch.log((1 - _tanh_cdf(low)).clamp(min=TANH_CLAMP))
    else:
        raise ValueError(f"method is {method!r}; allowed: 'exact', 'tanh'")
    return torch.where(x_0 < -EDGE, at_black, torch.where(x_0 > EDGE, at_white, interior))


def bits_per_dim(nats: Tensor, dims: int) -> Tensor:
    """Nats summed over `dims` dimensions, as bits per dimension: nats / (dims · ln 2)."""
    return nats / (dims * math.log(2))


def _log_interval(low: Tensor, high: Tensor) -> Tensor:
    """Log of Φ(high) − Φ(low) without cancellation: the right tail is reflected into the left."""
    right = low + high > 0
    low, high = torch.where(right, -high, low), torch.where(right, -low, high)
    log_high = log_ndtr(high)
    return log_high + torch.log(-torch.expm1(log_ndtr(low) - log_high))


def _tanh_cdf(z: Tensor) -> Tensor:
    """Φ(z) ≈ ½ [1 + tanh(√(2/π) (z + 0.044715 z³))], within 1.8e-4."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
