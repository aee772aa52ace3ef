"""Gaussian maths: the KL of two diagonal Gaussians, the discretised decoder, nats to bits/dim.

    KL(N(μ₁, σ₁²) ‖ N(μ₂, σ₂²)) = ½ [log σ₂² − log σ₁² − 1 + σ₁²/σ₂² + (μ₁ − μ₂)²/σ₂²]
    log p(x) = log [Φ((x − μ + 1/255)/σ) − Φ((x − μ − 1/255)/σ)],   open-ended at x = −1 and x = 1

It knows tensors and the 256 grey levels x = u/127.5 − 1. It does not know what a diffusion process is.
Everything is elementwise, in nats and computed in float64; sums over dimensions are the caller's.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.special import erfcx, log_ndtr

from hf_ddpm.checks import described

HALF_BIN = 1 / 255  # grey levels lie 2/255 apart
EDGE = 0.999  # between the outermost level (±1) and its neighbour (±253/255), on either side
TANH_CLAMP = 1e-12  # the smallest probability of the published code
# How far a value may be from its level, in steps between levels. Float32 arithmetic of any usual spelling of
# u/127.5 − 1 errs by less than 1e-4 of a step; a value in half precision is up to 0.25 of a step off.
LEVEL_TOLERANCE = 1e-3
NARROW = math.log(1e-4)  # of a bin's width in units of σ: below it log Φ loses digits between the two ends
SMALLEST_LOG_SIGMA = -340.0  # below it the square of a bin's distance in units of σ is no float64


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
            "tanh", the published code's formula, with its approximation of Φ and its clamp at 1e-12. It is
            that formula in float64: published numbers were computed in float32, in which it gives others
            from about five σ on (docs/maths.md, section 4).

    Returns:
        log-probability in nats, elementwise, float64, shape of x_0.

    Raises:
        ValueError: x_0 is not on the grid, or `method` is neither "exact" nor "tanh".
    """
    check_levels("x_0", x_0)
    if not isinstance(mean, Tensor):
        raise ValueError(f"mean is {described(mean)}; allowed: a tensor that goes with x_0")
    return log_decoder(x_0, mean, log_variance, method)


@torch.no_grad()
def check_levels(name: str, images: Tensor, only: Tensor | None = None) -> None:
    """Refuse images that are not on the 256 levels u/127.5 − 1, u in 0..255: L_0 says nothing of others.

    A device is read once. Tensors of the device "meta", which hold no values, pass.

    Args:
        name: of the argument, for the message.
        images: shape (B, ...).
        only: which of them are looked at, (B,); by default all.

    Raises:
        ValueError: another dtype than float32 and float64, or a value that is none of the levels; the message
            names the first one, and the likely slip.
    """
    check_holds_levels(name, images)
    if images.is_meta:
        return
    levels = (images + 1) * 127.5
    off = ~((levels - levels.round().clamp(0, 255)).abs() <= LEVEL_TOLERANCE)
    if only is not None:
        off &= only.view(-1, *[1] * (images.ndim - 1))
    if not off.any():
        return
    index = off.nonzero()[0].tolist()
    found = f"{name}{index}" if index else name
    raise ValueError(
        f"{found} is {images[tuple(index)].item():.7g}, none of the 256 levels u/127.5 - 1 of 8-bit images, "
        f"to which L_0 belongs{_likely_slip(images if only is None else images[only])}"
    )


def check_holds_levels(name: str, images: Tensor) -> None:
    """Refuse images whose dtype can't hold the 256 levels; no value is read.

    Raises:
        ValueError: another dtype than float32 and float64.
    """
    if not isinstance(images, Tensor) or images.dtype not in (torch.float32, torch.float64):
        hint = "float32 or float64 images on the 256 levels u/127.5 - 1"
        if isinstance(images, Tensor) and images.is_floating_point():
            hint += ", which half precision can't hold: pass them in float32"
        elif isinstance(images, Tensor):
            hint += ", which hf_ddpm.data.pixels.to_float makes of uint8"
        raise ValueError(f"{name} is {described(images)}; allowed: {hint}")


def _likely_slip(x: Tensor) -> str:
    """What may have been meant instead of these values, as the end of a sentence."""

    def near(values: Tensor) -> bool:
        return bool(((values - values.round()).abs() <= LEVEL_TOLERANCE).all())

    low, high = x.amin().item(), x.amax().item()
    if low >= 0 and high <= 1 and near(255 * x):
        return "; all values are in [0, 1]: did you mean 2 * x - 1?"
    if low >= 0 and 1 < high <= 255 and near(x):
        return "; all values are in 0..255: did you mean x / 127.5 - 1?"
    levels = (x + 1) * 127.5
    rounded = torch.equal(x, x.bfloat16().to(x.dtype)) or torch.equal(x, x.half().to(x.dtype))
    if rounded and bool(((levels - levels.round()).abs() <= 0.26).all()):
        return "; the values seem rounded to half precision, which can't hold the levels: pass float32"
    return ""


def log_decoder(
    x_0: Tensor,
    mean: Tensor,
    log_variance: Tensor | float,
    method: Literal["exact", "tanh"] = "exact",
) -> Tensor:
    """`discretized_gaussian_log_likelihood` of images that are known to be on the grid; reads no device.

    A σ below e^−340 counts as e^−340, so that gradients stay finite.
    """
    x_0, mean = x_0.double(), mean.double()
    log_sigma = 0.5 * torch.as_tensor(log_variance, dtype=torch.float64)
    inverse_sigma = torch.exp(-log_sigma.clamp(min=SMALLEST_LOG_SIGMA))
    low = (x_0 - mean - HALF_BIN) * inverse_sigma
    high = (x_0 - mean + HALF_BIN) * inverse_sigma
    if method == "exact":
        interior = _log_interval(low, high, (x_0 - mean) * inverse_sigma, math.log(2 * HALF_BIN) - log_sigma)
        at_black, at_white = _log_phi(high), _log_phi(-low)
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


def _log_phi(z: Tensor) -> Tensor:
    """log Φ(z), with a gradient that is right at any z: torch's own loses its digits from −1e6 on."""
    found: Any = _LogPhi.apply(z)
    return found


class _LogPhi(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return log_ndtr(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """With φ(z)/Φ(z) = √(2/π) / erfcx(−z/√2)."""
        (z,) = ctx.saved_tensors
        return grads[0] * math.sqrt(2 / math.pi) / erfcx(-z / math.sqrt(2))


def _log_interval(low: Tensor, high: Tensor, middle: Tensor, log_width: Tensor) -> Tensor:
    """Log of Φ(high) − Φ(low) without cancellation: the right tail is reflected into the left.

    A bin of width w with the middle z, both in units of σ, is φ(z) w (1 + (z² − 1) w²/24) where w is small;
    terms in w⁴ are left out.
    """
    narrow = (log_width < NARROW) & (middle.abs() * log_width.exp() < 1e-2)
    # What the other formula is not used for is kept out of its gradient too
    z, width = torch.where(narrow, middle, 0), torch.where(narrow, log_width, NARROW)
    density = width - 0.5 * z**2 - 0.5 * math.log(2 * math.pi) + (z**2 - 1) * torch.exp(2 * width) / 24
    low, high = torch.where(narrow, -0.5, low), torch.where(narrow, 0.5, high)
    right = low + high > 0
    low, high = torch.where(right, -high, low), torch.where(right, -low, high)
    log_high = _log_phi(high)
    return torch.where(narrow, density, log_high + torch.log(-torch.expm1(_log_phi(low) - log_high)))


def _tanh_cdf(z: Tensor) -> Tensor:
    """Φ(z) ≈ ½ [1 + tanh(√(2/π) (z + 0.044715 z³))], within 1.8e-4."""
    z = z.clamp(-100, 100)  # beyond it tanh is ±1, and the gradient of z³ may be infinite
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
