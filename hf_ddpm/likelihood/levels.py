"""What the decoder by grey levels costs at the steps where a chain may end, from sums over few images.

    −log P(u | x_t) = −log G(u) + (level(u) − x̂_0)²/(2σ²) + log Σ_v G(v) exp(−(level(v) − x̂_0)²/(2σ²))

`decoder_steps` are the steps at which it is measured, `LevelSums` sums it for every σ of `LOG_SIGMAS`, and
`fit_levels` makes of these sums the σ of each step and what the decoder costs there. The network's x̂_0 is
known already, so that all of this costs no evaluation more. The file knows tables, not images' files.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.decoders import LEVELS
from hf_ddpm.likelihood.chains import averaged, log_snr, smoothed
from hf_ddpm.likelihood.curves import LOG_SIGMAS, lowest, value_at
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.shown import fields_line
from hf_ddpm.variances import VALUE_BINS, value_bins

LEAST_SNR = 1.0  # of a step that a chain may end at: below it, an image is hardly known from x_t
STEP_GAP = 0.25  # nats of SNR between two steps at which the decoder is measured; others are interpolated
FINE = 16  # points between two levels at which the sum over all levels is computed
BEYOND = 64  # levels beyond −1 and 1 up to which it is, for x̂_0 that are not clipped
LEAST_LOG_MSE = -20.0  # an error below e^−20 counts as that: far below what any σ here tells apart


def decoder_steps(process: DiffusionProcess) -> Tensor:
    """The steps at which the decoder is measured: step 0, and others about `STEP_GAP` of log SNR apart.

    Args:
        process: the chain.

    Returns:
        Ascending steps, (R,), int64; the last one is the latest at which a chain may end.
    """
    position = log_snr(process)
    known = position >= min(np.log(LEAST_SNR), position[0].item())
    steps = [0]
    for t in known.nonzero().flatten().tolist():
        if position[steps[-1]] - position[t] >= STEP_GAP:
            steps.append(t)
    return torch.tensor(steps)


@dataclass(frozen=True, eq=False)
class LevelSums:
    """The decoder's cost of pixels for every σ of `LOG_SIGMAS`.

    Attributes:
        log_levels: log G(u) of each channel, (C, 256), float64.
    """

    log_levels: Tensor

    __repr__ = fields_line

    def __call__(self, x_0: Tensor, mean_x0: Tensor) -> Tensor:
        """The sum of −log P(x_0 | x_t) over the pixels of each bin of x̂_0's value.

        Args:
            x_0: images on the grid u/127.5 − 1, shape (B, C, H, W), float64.
            mean_x0: the predicted x_0, of that shape.

        Returns:
            nats, (B, 32, 33), float64: for each bin of `value_bins` and each σ.
        """
        mean = mean_x0.double().cpu()
        index = ((x_0.double().cpu() + 1) * 127.5).round().long().clamp(0, LEVELS - 1)
        place = ((mean + 1) * 127.5).clamp(-BEYOND, LEVELS - 1 + BEYOND)
        nearest = place.round().clamp(0, LEVELS - 1) / 127.5 - 1
        channels = torch.arange(len(self.log_levels)).view(-1, *[1] * (mean.ndim - 2)).expand_as(index)
        log_g = self.log_levels[channels, index]
        excess = 0.5 * ((index.double() / 127.5 - 1 - mean).square() - (nearest - mean).square())
        grid, bins = self._grid * 127.5 + 127.5, value_bins(mean).flatten(1)
        found = mean.new_zeros(len(mean), VALUE_BINS, len(LOG_SIGMAS))
        for i, log_sigma in enumerate(LOG_SIGMAS):
            log_z = torch.empty_like(mean)
            for c in range(mean.shape[1]):
                log_z[:, c] = torch.from_numpy(np.interp(place[:, c], grid, self._normalisers[c, i]))
            nats = excess * np.exp(-2 * log_sigma) - log_g + log_z
            found[..., i].scatter_add_(1, bins, nats.flatten(1))
        return found

    @property
    def _grid(self) -> np.ndarray:
        """The values of x̂_0 at which the sum over all levels is computed, from low to high."""
        return np.arange(-BEYOND * FINE, (LEVELS - 1 + BEYOND) * FINE + 1) / (FINE * 127.5) - 1

    @cached_property
    def _normalisers(self) -> np.ndarray:
        """Log Σ_v G(v) exp(−[(level(v) − x̂_0)² − (the nearest level's)]/(2σ²)), (C, 33, points).

        Without the nearest level's square it is nearly linear between two points, whatever σ is.
        """
        grid, levels = self._grid, np.arange(LEVELS) / 127.5 - 1
        squares = (levels - grid[:, None]) ** 2
        squares -= squares.min(1, keepdims=True)
        g = self.log_levels.exp().numpy()
        kernels = (np.exp(-0.5 * squares * np.exp(-2 * log_sigma)) for log_sigma in LOG_SIGMAS)
        found = np.stack([np.log(kernel @ g.T) for kernel in kernels])
        return np.ascontiguousarray(found.transpose(2, 0, 1))


@dataclass(frozen=True, eq=False)
class LevelFit:
    """The decoder by grey levels at every step where a chain may end.

    Attributes:
        log_sigma: log σ for each bin of x̂_0's value, (S, 32), float64, for the steps 0..S−1.
        nats: what the decoder costs from there, nats per dimension, (S,), float64.
    """

    log_sigma: Tensor
    nats: Tensor

    __repr__ = fields_line


def fit_levels(
    process: DiffusionProcess, mse: Tensor, nats: Tensor, pixels: Tensor, prior: float
) -> LevelFit:
    """The best σ at every step where a chain may end, and what the decoder costs there.

    The σ of a bin is fitted at each measured step, and its ratio to √m_t is averaged over neighbouring ones.
    The cost is smoothed over log SNR as a ratio to that of the widest σ, which depends on the images and
    hardly on the step: so it matters little which images a step was measured on.

    Args:
        process: the chain.
        mse: m_t, (T,).
        nats: the sums of `LevelSums` at each of the `decoder_steps`, (R, 32, 33).
        pixels: how many pixels these are, (R, 32); some steps may have none, but not t = 0.
        prior: so many pixels like all others are added to each bin.
    """
    steps, position = decoder_steps(process), log_snr(process)
    used = pixels.sum(1) > 0
    rows, seen, sums = steps[used], pixels[used].double(), nats[used].double()
    whole = sums.sum(1, keepdim=True) / seen.sum(1).view(-1, 1, 1)
    curves = ((sums + prior * whole) / (seen[..., None] + prior)).numpy()
    half_log_mse = 0.5 * mse.clamp(min=1e-300).log().clamp(min=LEAST_LOG_MSE)
    fitted = torch.tensor([[lowest(curve)[0] for curve in row] for row in curves], dtype=torch.float64)
    ratio = averaged(position[rows], fitted - half_log_mse[rows, None], seen + 1e-9)
    log_sigma = ratio + half_log_mse[rows, None]
    exact = sums.numpy() / np.maximum(seen.numpy(), 1)[..., None]
    cost = np.array(
        [
            [value_at(curve, float(own)) for curve, own in zip(*row, strict=True)]
            for row in zip(exact, log_sigma, strict=True)
        ]
    )
    widest = sums[:, :, -1].sum(1)
    share = torch.from_numpy(cost) * seen
    control = smoothed(position[rows], share.sum(1), widest)
    costs = control * widest.sum() / seen.sum()
    places, known = -position[: steps[-1] + 1], -position[rows]
    between = [np.interp(places, known, z) for z in (costs, *ratio.T)]
    found = torch.from_numpy(np.stack(between))
    return LevelFit((found[1:] + half_log_mse[: len(places)]).T.contiguous(), found[0])
