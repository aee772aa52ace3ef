"""The errors of a network's x̂_0, as measured: what variances and chains of fewer steps are made of.

`error_sums` measures a few images. `Errors` holds the sums over many, and says which variance each step of a
chain should have, which steps are best, and what the bound will be:

    optimal      σ_t² = β̃_t (1 + Δ m_t),       m_t the mean of (x̂_0 − x_0)² at step t
    by-value     σ_t² = β̃_t (1 + Δ m_tg),      m_tg that of the pixels whose x̂_0 is in bin g of its values

with Δ = SNR_prev − SNR_t; chains.py has the formulas. At t = 0 both take the σ of L_0 that makes the images
that were measured likeliest. It is not √m_0, as the decoder's law is Gaussian and the errors' is not.

The decoder "levels" knows how often the images have each grey level, and takes the σ of any step where a
chain may end (levels.py). With it the best chain may end at a later step than 0.

Measure on training images: numbers made from the images that are scored would flatter the score. The file
knows tables and a network's answers, and neither data sets nor files.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.checks import as_numbers, check_count, described
from hf_ddpm.decoders import LEVELS, LevelsDecoder, smoothed_levels
from hf_ddpm.gaussian import check_levels, log_decoder
from hf_ddpm.likelihood.bound import check_batch
from hf_ddpm.likelihood.chains import (
    MOST_STEPS,
    BestChains,
    best_chains,
    chain_nats,
    log_posterior_variances,
    log_snr,
    pair_nats,
    prior_nats,
    smoothed_groups,
    smoothed_mse,
)
from hf_ddpm.likelihood.curves import LOG_SIGMAS, lowest, value_at
from hf_ddpm.likelihood.levels import LevelFit, LevelSums, decoder_steps, fit_levels
from hf_ddpm.parametrization import to_x0
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.shown import fields_line
from hf_ddpm.variances import FIXED, MEASURED, VALUE_BINS, VarianceByValue, value_bins

COSTED = ("exact", "levels")  # the decoders of which it says what they cost
PRIOR_PIXELS = 10.0  # like all others, added to each bin of values for its variance
DECODER_EVALS = 200  # the fewest evaluations at t = 0
LARGEST_GAP = 1.0  # in nats of SNR between two steps, for the share of evaluations that the later one gets


def steps_to_measure(process: DiffusionProcess, evaluations: int) -> Tensor:
    """At which steps a given number of evaluations is best spent.

    One in twenty, but at least `DECODER_EVALS`, goes to t = 0, which also settles L_0. Of the others, a half
    is spread evenly over the steps and a half evenly over log SNR, as smoothing can't average where the first
    few steps lie far apart. Where a chain may end, they go to the nearest one of `levels.decoder_steps`.

    Args:
        process: the chain.
        evaluations: how many, more than `DECODER_EVALS`.

    Returns:
        The step of each evaluation, ascending, (evaluations,), int64.

    Raises:
        ValueError: there are fewer evaluations.
    """
    check_count("evaluations", evaluations, DECODER_EVALS + 1)
    total = len(process)
    at_0 = max(DECODER_EVALS, evaluations // 20) if total > 1 else evaluations
    if total == 1:
        return torch.zeros(at_0, dtype=torch.int64)
    snr = process.log_alphas_cumprod - process.one_minus_alphas_cumprod.log()
    gap = (snr[:-1] - snr[1:]).clamp(max=LARGEST_GAP)  # it is infinite at zero terminal SNR
    share = 0.5 / len(gap) + 0.5 * gap / gap.sum()
    places = (torch.arange(evaluations - at_0, dtype=torch.float64) + 0.5) / (evaluations - at_0)
    later = 1 + torch.searchsorted(share.cumsum(0), places).clamp(max=total - 2)
    ends = decoder_steps(process)[1:]
    if len(ends):
        position = log_snr(process)
        nearest = ends[(position[later, None] - position[ends]).abs().argmin(1)]
        later = torch.where(later <= ends[-1], nearest, later)
    return torch.cat([torch.zeros(at_0, dtype=torch.int64), later])


@dataclass(frozen=True, eq=False)
class ErrorSums:
    """What `error_sums` found of B images.

    Attributes:
        squared: the sum of (x̂_0 − x_0)² over the pixels of each bin of x̂_0's value, (B, 32), float64.
        pixels: how many pixels these are, (B, 32), int64.
        decoder_nats: of the images at t = 0, the sum of −log p(x_0 | x_t) over all pixels of each bin, for
            each σ of `LOG_SIGMAS`, (32, 33), float64.
        levels_nats: the same of the decoder by grey levels, of each of the n images that are at one of
            `decoder_steps`, in their order, (n, 32, 33), float64; n is 0 where it was not asked for.
    """

    squared: Tensor
    pixels: Tensor
    decoder_nats: Tensor
    levels_nats: Tensor

    __repr__ = fields_line


@torch.no_grad()
def error_sums(
    process: DiffusionProcess,
    model: Callable[[Tensor, Tensor], Tensor],
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    prediction_type: str = "epsilon",
    clip_x0: bool = True,
    level_sums: LevelSums | None = None,
) -> ErrorSums:
    """The errors of the network's x̂_0 at x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε, by the value of x̂_0.

    Args:
        process: the chain that t indexes.
        model: a denoiser (x_t, t) → output; of a network that learns variances the first C channels count.
        x_0: clean images on the grid u/127.5 − 1, shape (B, C, H, W), float32 or float64.
        t: step of each, shape (B,), int64.
        noise: ε ~ N(0, I), shape of x_0.
        prediction_type: what the network predicts, one of `PREDICTION_TYPES`.
        clip_x0: clip x̂_0 to [−1, 1], as the bound for which this is measured does.
        level_sums: knows the grey levels, to measure the decoder by them too.

    Raises:
        ValueError: an argument is not as above, or the network's answer has another shape.
    """
    check_batch(process, x_0, t, "error_sums(process, model, x_0, t, noise)", noise=noise)
    check_levels("x_0", x_0)
    x_t = process.q_sample(x_0, noise, t)
    output = model(x_t, process.timesteps_at(t))
    batch, channels, *size = x_0.shape
    shapes = [(batch, channels * factor, *size) for factor in (1, 2)]
    if not isinstance(output, Tensor) or tuple(output.shape) not in shapes:
        raise ValueError(f"the model answered {described(output)}; allowed: shape {shapes[0]} or {shapes[1]}")
    x_0, x_t, output = x_0.double(), x_t.double(), output[:, :channels].double()
    mean_x0 = to_x0(process, prediction_type, output, x_t, t)
    if clip_x0:
        mean_x0 = mean_x0.clamp(-1, 1)
    bins = value_bins(mean_x0)
    error = (mean_x0 - x_0).square()
    squared = _per_bin(error, bins)
    pixels = _per_bin(torch.ones_like(error), bins).long()
    curve, first = squared.new_zeros(VALUE_BINS, len(LOG_SIGMAS)), t == 0
    if first.any():
        for i, log_sigma in enumerate(LOG_SIGMAS):
            nats = -log_decoder(x_0[first], mean_x0[first], 2 * log_sigma)
            curve[:, i] = _per_bin(nats, bins[first]).sum(0)
    by_levels = squared.new_zeros(0, VALUE_BINS, len(LOG_SIGMAS)).cpu()
    if level_sums is not None:
        ends = torch.isin(t.cpu(), decoder_steps(process)).to(t.device)
        by_levels = level_sums(x_0[ends], mean_x0[ends])
    return ErrorSums(squared.cpu(), pixels.cpu(), curve.cpu(), by_levels)


@dataclass(frozen=True, eq=False)
class Errors:
    """The errors of a network's x̂_0 at every step of its process; made of sums over images.

    Attributes:
        process: the whole chain, which the network was trained for.
        squared: the sum of (x̂_0 − x_0)² over the pixels of each bin of x̂_0's value, (T, 32), float64.
        pixels: how many pixels these are, (T, 32), int64; some steps may have none, but not t = 0.
        decoder_nats: the sum of −log p(x_0 | x_{t=0}) over all pixels of each bin, for each σ of
            `LOG_SIGMAS`, (32, 33), float64.
        levels: how often the images have each grey level, for each channel, (C, 256), int64.
        levels_nats: the sum of −log P(x_0 | x_t) of the decoder by grey levels over all pixels of each bin,
            for each of the `decoder_steps` and each σ, (R, 32, 33), float64; None where an earlier version
            measured.

    Raises:
        ValueError: a table of another shape, numbers that are not finite, below 0 or so large that they would
            overflow, errors without a pixel, no pixel at t = 0, or a process of more than `chains.MOST_STEPS`
            steps.
    """

    process: DiffusionProcess
    squared: Tensor
    pixels: Tensor
    decoder_nats: Tensor
    levels: Tensor
    levels_nats: Tensor | None = None

    __repr__ = fields_line

    def __post_init__(self) -> None:
        if not isinstance(self.process, DiffusionProcess):
            raise ValueError(f"process is {described(self.process)}; allowed: a DiffusionProcess")
        total = len(self.process)
        if total > MOST_STEPS:
            raise ValueError(f"the process has {total} steps; allowed: at most {MOST_STEPS}")
        shapes = {
            "squared": (total, VALUE_BINS),
            "pixels": (total, VALUE_BINS),
            "decoder_nats": (VALUE_BINS, len(LOG_SIGMAS)),
            "levels": (None, LEVELS),
        }
        if self.levels_nats is not None:
            shapes["levels_nats"] = (len(decoder_steps(self.process)), VALUE_BINS, len(LOG_SIGMAS))
        for name, shape in shapes.items():
            allowed = f"finite numbers >= 0, ({', '.join('C' if n is None else str(n) for n in shape)})"
            found = as_numbers(name, getattr(self, name), allowed)
            fits = found.ndim == len(shape) and all(
                n in (None, m) for n, m in zip(shape, found.shape, strict=True)
            )
            if not fits or not (found.isfinite() & (found >= 0)).all():
                raise ValueError(f"{name} is {described(getattr(self, name))}; allowed: {allowed}")
            object.__setattr__(self, name, found)
            total_of, most = found.double().sum().item(), 1e30 if found.is_floating_point() else 2.0**53
            if total_of > most:  # far above what images have, and far below what overflows
                raise ValueError(f"{name} adds up to {total_of:.1e}; allowed: at most {most:.1e}")
        if not self.pixels[0].sum() > 0 or not self.levels.sum() > 0:
            raise ValueError("no pixel was measured at t = 0; allowed: at least one image there")
        if (self.squared[self.pixels == 0] > 0).any():
            raise ValueError("squared has errors where pixels has no pixel; allowed: 0 there")

    @cached_property
    def x0_mse(self) -> Tensor:
        """m_t, the mean of (x̂_0 − x_0)² at every step, smoothed over log SNR, (T,), float64."""
        return smoothed_mse(self.process, self.squared.sum(1), self.pixels.sum(1))

    @cached_property
    def x0_mse_by_value(self) -> Tensor:
        """m_tg, the same of the pixels in each bin of x̂_0's value, (T, 32), float64."""
        return self._groups[0]

    @cached_property
    def declared_by_value(self) -> Tensor:
        """m'_tg, what the variance by value is made for: m_tg with `PRIOR_PIXELS` added, (T, 32), float64."""
        return smoothed_groups(self.process, self.squared, self.pixels, PRIOR_PIXELS)[0]

    @cached_property
    def value_shares(self) -> Tensor:
        """f_tg, the share of the pixels that are in each bin, (T, 32), float64."""
        return self._groups[1]

    @cached_property
    def _groups(self) -> tuple[Tensor, Tensor]:
        return smoothed_groups(self.process, self.squared, self.pixels)

    @cached_property
    def decoder_sigma(self) -> float:
        """The σ of L_0 that makes the measured images likeliest."""
        return math.exp(lowest(self._decoder)[0])

    @cached_property
    def decoder_sigma_by_value(self) -> Tensor:
        """The same for each bin of x̂_0's value, (32,), float64."""
        return torch.from_numpy(np.exp([lowest(curve)[0] for curve in self._decoder_by_value]))

    @cached_property
    def second_moment(self) -> float:
        """E⟨x_0²⟩, the mean square of a pixel in [−1, 1]."""
        counts = self.levels.sum(0).double()
        return float((counts * (torch.arange(LEVELS) / 127.5 - 1).square()).sum() / counts.sum())

    @property
    def _decoder(self) -> np.ndarray:
        """L_0 in nats per pixel for each σ, (33,)."""
        return (self.decoder_nats.sum(0) / self.pixels[0].sum()).numpy()

    @property
    def _decoder_by_value(self) -> np.ndarray:
        """The same for each bin, (32, 33), with `PRIOR_PIXELS` pixels like all others added."""
        seen = self.pixels[0].double().numpy()[:, None]
        return (self.decoder_nats.numpy() + PRIOR_PIXELS * self._decoder) / (seen + PRIOR_PIXELS)

    def variance(self, process: DiffusionProcess, kind: str) -> Tensor | VarianceByValue:
        """The variance of each step of a chain, as `bound_term` and the functions beside it take it.

        Where a chain begins above step 0, the σ of L_0 is taken to be larger there as √m_t is.

        Args:
            process: the whole chain or one of fewer steps, `self.process.respaced(...)`.
            kind: "optimal" or "by-value".

        Returns:
            log σ_t², a tensor (K,), or by value.

        Raises:
            ValueError: an unknown kind, or a chain of another process.
        """
        if kind not in MEASURED:
            raise ValueError(f"variance is {described(kind)}; allowed: {', '.join(MEASURED)}")
        kept = self._index(process)
        by_value = kind == "by-value"
        whole = self.declared_by_value if by_value else self.x0_mse[:, None]
        mse = whole[kept]
        start = self.decoder_sigma_by_value if by_value else mse.new_tensor([self.decoder_sigma])
        if kept[0] > 0:
            start = start * (mse[0] / whole[0].clamp(min=1e-300)).sqrt()
        gap = (process.snr[:-1] - process.snr[1:])[:, None]
        later = process.posterior_variance[1:, None].log() + torch.log1p(gap * mse[1:])
        table = torch.cat([2 * start.log()[None], later])
        return VarianceByValue(table) if by_value else table[:, 0]

    @cached_property
    def _by_levels(self) -> LevelFit:
        """The decoder by grey levels at every step where a chain may end."""
        if self.levels_nats is None:
            raise ValueError(
                "the errors were measured by an earlier version, without the decoder levels; allowed: "
                "measure them anew with hf-ddpm plan"
            )
        seen = self.pixels[decoder_steps(self.process)]
        return fit_levels(self.process, self.x0_mse, self.levels_nats, seen, PRIOR_PIXELS)

    def decoder(self, process: DiffusionProcess, name: str = "levels") -> LevelsDecoder:
        """The decoder L_0 of a chain, as `bound_term` and the functions beside it take it.

        Args:
            process: the whole chain or one of fewer steps, `self.process.respaced(...)`.
            name: "levels".

        Raises:
            ValueError: another name, a chain of another process, one whose first step is too late for a
                decoder, or errors that an earlier version measured.
        """
        if name != "levels":
            raise ValueError(f"decoder is {described(name)}; allowed: levels")
        first = self._first_step(int(self._index(process)[0]), name)
        return LevelsDecoder(smoothed_levels(self.levels), self._by_levels.log_sigma[first])

    def _first_step(self, step: int, decoder: str) -> int:
        """A step at which a chain is to end, if the decoder was measured there."""
        last = len(self._by_levels.nats) - 1 if decoder == "levels" else 0
        if not 0 <= step <= last:
            allowed = f"0..{last}" if last else "0"
            raise ValueError(
                f"the chain begins at step {step}; allowed with the decoder {decoder}: {allowed}, where it "
                "was measured"
            )
        return step

    def costs(
        self, kind: str, decoder: str = "exact", last_step: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What every step costs under a variance, for `chains.best_chains` and `chains.chain_nats`.

        Args:
            kind: "fixed_small", "fixed_large", "optimal" or "by-value".
            decoder: "exact" or "levels".
            last_step: the step at which chains end; by default any at which the decoder was measured, which
                is 0 for "exact".

        Returns:
            L_0(t), (T,), ∞ where no chain ends; L(s ← t), (T, T); L_T(t), (T,). Nats per dimension, float64.

        Raises:
            ValueError: an unknown kind or decoder, a step at which the decoder was not measured, or errors
                that an earlier version measured.
        """
        if decoder not in COSTED:
            raise ValueError(f"decoder is {described(decoder)}; allowed: {', '.join(COSTED)}")
        if last_step is not None:
            check_count("last_step", last_step, 0)
            self._first_step(last_step, decoder)
        first = torch.full((len(self.process),), torch.inf, dtype=torch.float64)
        prior = prior_nats(self.process, self.second_moment)
        if kind == "by-value":
            pairs = pair_nats(self.process, self.x0_mse_by_value, self.value_shares, self.declared_by_value)
        elif kind == "optimal":
            pairs = pair_nats(self.process, self.x0_mse)
        elif kind in FIXED:
            noise = self.process.one_minus_alphas_cumprod
            declared = torch.zeros_like(noise) if kind == "fixed_small" else noise
            pairs = pair_nats(self.process, self.x0_mse, declared=declared)
        else:
            raise ValueError(f"variance is {described(kind)}; allowed: {', '.join((*FIXED, *MEASURED))}")
        if decoder == "levels":
            nats = self._by_levels.nats
            which = slice(len(nats)) if last_step is None else last_step
            first[which] = nats[which]
        elif kind == "by-value":
            share = self.pixels[0] / self.pixels[0].sum()
            seen = self.decoder_nats.numpy() / np.maximum(self.pixels[0].numpy(), 1)[:, None]
            chosen = self.decoder_sigma_by_value.log().tolist()
            found = [value_at(curve, log_sigma) for curve, log_sigma in zip(seen, chosen, strict=True)]
            first[0] = (share * first.new_tensor(found)).sum()
        elif kind == "optimal":
            first[0] = lowest(self._decoder)[1]
        else:
            # The σ of L_0 is β̃ of the second step, so that L_0 depends on this one
            first[0] = 0
            sigmas = 0.5 * log_posterior_variances(self.process)[0, 1:]
            pairs[0, 1:] += first.new_tensor([value_at(self._decoder, float(sigma)) for sigma in sigmas])
        return first, pairs, prior

    def best_chains(
        self, kind: str, most: int = 200, decoder: str = "exact", last_step: int | None = None
    ) -> BestChains:
        """The best chain of every number of steps up to `most`, and what it is predicted to cost.

        Args:
            kind: the variance, as in `costs`. A fixed one has no chain of one step.
            most: the largest number of steps.
            decoder: as in `costs`; with "levels" the best chain may end at a later step than 0.
            last_step: as in `costs`.

        Raises:
            ValueError: as in `costs`, or a number below 1.
        """
        found = best_chains(*self.costs(kind, decoder, last_step), most)
        if kind in FIXED:
            found.nats[0] = torch.inf  # these need a second step, whose β̃ is the variance of L_0
        return found

    def predicted_bpd(self, process: DiffusionProcess, kind: str, decoder: str = "exact") -> float:
        """The bits/dim that a chain is predicted to have on new images of the same kind.

        Args:
            process: the whole chain or one of fewer steps.
            kind: the variance, as in `costs`.
            decoder: as in `costs`.

        Raises:
            ValueError: an unknown kind or decoder, a chain of another process, or one that begins at a step
                where the decoder was not measured.
        """
        kept = self._index(process).tolist()
        if kind in FIXED and len(kept) == 1:
            raise ValueError(f"the chain has one step; allowed with {kind}: at least 2")
        costs = self.costs(kind, decoder)
        self._first_step(kept[0], decoder)
        return chain_nats(kept, *costs) / math.log(2)

    def _index(self, process: DiffusionProcess) -> Tensor:
        """The steps of the whole chain that a chain visits, (K,)."""
        if not isinstance(process, DiffusionProcess):
            raise ValueError(f"process is {described(process)}; allowed: a DiffusionProcess")
        kept: Any = self.process.index_of(process.timesteps)
        same = torch.allclose(
            process.one_minus_alphas_cumprod, self.process.one_minus_alphas_cumprod[kept], rtol=1e-9, atol=0
        )
        if not same:
            raise ValueError(
                "process is not a chain of the one whose errors these are; allowed: its respaced"
            )
        return kept


def _per_bin(values: Tensor, bins: Tensor) -> Tensor:
    """The sum over the pixels of each bin, (B, 32)."""
    found = values.new_zeros(len(values), VALUE_BINS)
    return found.scatter_add_(1, bins.flatten(1), values.flatten(1))
