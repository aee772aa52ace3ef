"""The decoder L_0 = −log p_θ(x_0 | x_t), by name: the law of an 8-bit image given the last noisy one.

    decoder     p_θ(u | x_t) for the grey level u of a pixel, level(u) = u/127.5 − 1
    exact       the mass of N(x̂_0(x_t), σ²) between the levels' midpoints, open-ended at both ends
    tanh        the same by the published code's formula for Φ, in float64
    levels      G(u) N(level(u); x̂_0(x_t), σ²), normalised over the 256 levels

Any law of the grey level given x_t is a decoder. "exact" and "tanh" are those of published numbers. Their
σ² is the variance of the chain's first step. "levels" knows how often the training images have each level,
G, and has a σ of its own; as both are measured (`likelihood.errors`), a bound takes it as a `LevelsDecoder`,
not by name. Its values cost no more of the network than those of the others.

To add a decoder with a formula, add its row to `DECODERS`.

Source of "exact" and "tanh": Ho et al. 2020, eq. 13. The file knows no network and no chain.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_ddpm.checks import as_numbers, described
from hf_ddpm.gaussian import log_decoder
from hf_ddpm.shown import fields_line
from hf_ddpm.variances import VALUE_BINS, value_bins

LEVELS = 256
CHUNK = 2**18  # numbers that are held at once for all levels of some pixels
LARGEST_LOG_SIGMA = 20.0  # and the smallest one below 0; far beyond both nothing of σ is left to see

# By name: log p_θ(x_0 | x_t) as a function (x_0, x̂_0, log σ²), elementwise; None where numbers are needed
DECODERS: dict[str, Callable[[Tensor, Tensor, Tensor | float], Tensor] | None] = {
    "exact": partial(log_decoder, method="exact"),
    "tanh": partial(log_decoder, method="tanh"),
    "levels": None,
}
NAMED = tuple(name for name, formula in DECODERS.items() if formula is not None)


@dataclass(frozen=True, eq=False)
class LevelsDecoder:
    """A decoder that knows how often each grey level occurs.

        P(u | x_t) = G(u) N(level(u); x̂_0, σ²) / Σ_v G(v) N(level(v); x̂_0, σ²)

    Attributes:
        log_levels: log G(u) of each channel, (C, 256), float64; a constant added to a channel's changes
            nothing.
        log_sigma: log σ for each bin of `variances.value_bins(x̂_0)`, (32,), float64; one number serves all.

    Raises:
        ValueError: tables of other shapes, or numbers that are not finite or beyond ±20 as log σ.
    """

    log_levels: Tensor
    log_sigma: Tensor

    __repr__ = fields_line

    def __post_init__(self) -> None:
        allowed = f"finite numbers, (C, {LEVELS})"
        table = as_numbers("log_levels", self.log_levels, allowed, torch.float64)
        if table.ndim != 2 or not len(table) or table.shape[1] != LEVELS or not table.isfinite().all():
            raise ValueError(f"log_levels is {described(self.log_levels)}; allowed: {allowed}")
        object.__setattr__(self, "log_levels", table.log_softmax(1))
        allowed = f"a number, or ({VALUE_BINS},), between −{LARGEST_LOG_SIGMA:g} and {LARGEST_LOG_SIGMA:g}"
        sigma = as_numbers("log_sigma", self.log_sigma, allowed, torch.float64)
        if sigma.shape not in ((), (VALUE_BINS,)) or not (sigma.abs() <= LARGEST_LOG_SIGMA).all():
            raise ValueError(f"log_sigma is {described(self.log_sigma)}; allowed: {allowed}")
        object.__setattr__(self, "log_sigma", sigma.expand(VALUE_BINS).clone())

    def log_probabilities(self, mean_x0: Tensor) -> Tensor:
        """The log-probability of every grey level for every pixel.

        Args:
            mean_x0: the predicted x_0, clipped or not, shape (B, C, H, W) or (B, C).

        Returns:
            log P(u | x_t), with an axis of the 256 levels behind, float64; their exponentials add up to 1.

        Raises:
            ValueError: it has another number of channels.
        """
        mean, levels, precision = self._tables(mean_x0)
        return self._logits(mean, levels, precision).log_softmax(-1)

    def log_likelihood(self, x_0: Tensor, mean_x0: Tensor) -> Tensor:
        """The log-probability of the grey levels that images have.

        Args:
            x_0: images on the levels u/127.5 − 1, shape (B, C, H, W) or (B, C), floating point. Each value
                counts as the level next to it.
            mean_x0: the predicted x_0, clipped or not, of that shape. Gradients flow to it.

        Returns:
            nats, float64, shape of x_0.

        Raises:
            ValueError: shapes that differ, or another number of channels than the decoder's.
        """
        if not isinstance(x_0, Tensor) or not isinstance(mean_x0, Tensor) or x_0.shape != mean_x0.shape:
            raise ValueError(
                f"x_0 is {described(x_0)} and mean_x0 {described(mean_x0)}; allowed: tensors of one shape"
            )
        mean, levels, precision = self._tables(mean_x0)
        index = ((x_0.double() + 1) * 127.5).round().long().clamp(0, LEVELS - 1)
        log_g = levels.expand(*mean.shape, LEVELS).gather(-1, index[..., None])[..., 0]
        value = index.double() / 127.5 - 1
        with torch.no_grad():
            flat = (z.flatten() for z in torch.broadcast_tensors(mean.detach(), precision))
            rows = self._channels(mean).flatten()
            pieces = zip(*(z.split(CHUNK // LEVELS) for z in (*flat, rows)), strict=True)
            found = [self._normaliser(*piece) for piece in pieces]
            log_z, expected = (torch.cat(column).view_as(mean) for column in zip(*found, strict=True))
        # The derivative of log P(u) by x̂_0 is (level(u) − E level)/σ²: no graph over all levels is kept
        nats = log_g - 0.5 * precision * (value - mean.detach()).square() - log_z
        return nats + precision * (value - expected) * (mean - mean.detach())

    def _tables(self, mean_x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x̂_0 in float64, log G ready to go with it and an axis of levels, and 1/σ² of each pixel."""
        channels = len(self.log_levels)
        if not isinstance(mean_x0, Tensor) or not mean_x0.is_floating_point() or mean_x0.ndim < 2:
            raise ValueError(f"mean_x0 is {described(mean_x0)}; allowed: images, (B, {channels}, H, W)")
        if mean_x0.shape[1] != channels:
            raise ValueError(
                f"the images have {mean_x0.shape[1]} channels, and the decoder levels has grey levels of "
                f"{channels}; allowed: equal"
            )
        mean = mean_x0.double()
        precision = (-2 * self.log_sigma).exp().to(mean.device)[value_bins(mean.detach())]
        levels = self.log_levels.to(mean.device)
        return mean, levels.view(channels, *[1] * (mean.ndim - 2), LEVELS), precision

    @staticmethod
    def _logits(mean: Tensor, log_levels: Tensor, precision: Tensor) -> Tensor:
        """log G(u) − (level(u) − x̂_0)²/(2σ²), with an axis of levels behind."""
        value = torch.arange(LEVELS, dtype=torch.float64, device=mean.device) / 127.5 - 1
        return log_levels - 0.5 * precision[..., None] * (value - mean[..., None]).square()

    def _channels(self, mean: Tensor) -> Tensor:
        """The channel of each pixel, shape of `mean`, int64."""
        channels = torch.arange(len(self.log_levels), device=mean.device)
        return channels.view(-1, *[1] * (mean.ndim - 2)).expand(mean.shape)

    def _normaliser(self, mean: Tensor, precision: Tensor, channels: Tensor) -> tuple[Tensor, Tensor]:
        """The log of Σ_v G(v) exp(−(level(v) − x̂_0)²/(2σ²)), and the expected level; of pixels in a row."""
        logits = self._logits(mean, self.log_levels.to(mean.device)[channels], precision)
        most = logits.amax(1)
        weights = logits.sub_(most[:, None]).exp_()
        value = torch.arange(LEVELS, dtype=torch.float64, device=mean.device) / 127.5 - 1
        total = weights.sum(1)
        return most + total.log(), weights @ value / total


# What a bound takes as its decoder: the name of one with a formula, or numbers
AnyDecoder = str | LevelsDecoder


def check_decoder(decoder: Any) -> None:
    """Check that a bound can be taken with this decoder.

    Raises:
        ValueError: an unknown name, or one whose numbers are missing.
    """
    if isinstance(decoder, LevelsDecoder) or (isinstance(decoder, str) and decoder in NAMED):
        return
    needs = ", which needs numbers that hf-ddpm plan measures" if decoder == "levels" else ""
    allowed = f"{', '.join(NAMED)}, or a LevelsDecoder"
    raise ValueError(f"decoder is {described(decoder)}{needs}; allowed: {allowed}")


def decoder_name(decoder: AnyDecoder) -> str:
    """The name of a decoder in `DECODERS`."""
    return decoder if isinstance(decoder, str) else "levels"


def decoder_log_likelihood(
    decoder: AnyDecoder, x_0: Tensor, mean_x0: Tensor, log_variance: Tensor | float
) -> Tensor:
    """The log-probability log p_θ(x_0 | x_t) of images that are known to be on the grid.

    Args:
        decoder: the name of one with a formula, or numbers.
        x_0: images on the levels u/127.5 − 1, shape (B, C, H, W).
        mean_x0: the predicted x_0, of that shape.
        log_variance: log σ² of the chain's first step, broadcastable to x_0; numbers have a σ of their own.

    Returns:
        nats, float64, shape of x_0.
    """
    if isinstance(decoder, LevelsDecoder):
        return decoder.log_likelihood(x_0, mean_x0)
    formula = DECODERS[decoder]
    assert formula is not None
    return formula(x_0, mean_x0, log_variance)


def smoothed_levels(counts: Tensor) -> Tensor:
    """The log of how often grey levels occur, from counts, with no level impossible.

    One pixel, and one more for each level that was seen just once, is spread evenly over all levels: the
    share of levels that were seen once is about the chance of one that was never seen (Good & Turing).

    Args:
        counts: how often each level was seen in each channel, (C, 256).

    Returns:
        log G, (C, 256), float64; the exponentials of a channel add up to 1.
    """
    counts = counts.double()
    extra = (1 + (counts == 1).sum(1, keepdim=True)) / LEVELS
    return ((counts + extra) / (counts + extra).sum(1, keepdim=True)).log()


def level_entropy(log_levels: Tensor) -> float:
    """The entropy of the grey levels in bits per dimension: what a decoder costs that looks at no image."""
    return float(-(log_levels.exp() * log_levels).sum(1).mean() / math.log(2))
