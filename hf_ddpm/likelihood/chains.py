"""Chains of fewer steps, from tables alone: what every pair of steps costs, and which K steps cost least.

A reverse step may go from any step t of a process to any earlier one s. Its cost follows from one table, the
error m_t = E⟨(x̂_0 − x_0)²⟩ of the network's x̂_0 at each step, in nats per dimension:

    L(s ← t; σ²) = ½ [ln(σ²/β̃) − 1 + β̃/σ² + c0² m_t/σ²],     c0²/β̃ = SNR_s − SNR_t =: Δ
    the best σ² is β̃ (1 + Δ m_t), which costs ½ ln(1 + Δ m_t)
    σ² = β̃ (1 + Δ m'), for any declared error m', costs ½ [ln(1 + Δ m') − 1 + (1 + Δ m_t)/(1 + Δ m')]

A declared error m' = 0 is "fixed_small", and m' = 1 − ᾱ_t is "fixed_large". Errors may be told apart by
groups of pixels, of which a share f_tg of all pixels is in group g: then the costs of the groups, weighted by
their shares, add up.

The optimal variance is that of Bao et al. 2022 (Analytic-DPM), with the measured error in place of the norm
of the network's answer: the two agree for an exact, unclipped network only. The best steps are found as by
Watson et al. 2021. The file knows tables; how they are measured, it does not know.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.checks import as_numbers, check_count, described
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.shown import fields_line

MOST_STEPS = 4096  # of a process: a table of all pairs has the square of it in numbers
TREND_DEGREE = 7  # of the polynomial in log SNR that a curve of errors is divided by before it is averaged
WIDTH = 0.3  # standard deviation of the averaging weights, in nats of SNR
PASSES = 2  # how often a curve is averaged, each time as a ratio to what the time before gave


def snr_gaps(process: DiffusionProcess) -> Tensor:
    """The gap of every pair of steps, Δ = SNR_s − SNR_t = c0²/β̃.

    Args:
        process: the chain, of at most `MOST_STEPS` steps.

    Returns:
        Δ at [s, t] for s < t, and 0 elsewhere, (T, T), float64.

    Raises:
        ValueError: the chain is longer, or no process.
    """
    _check_process(process)
    return torch.triu(process.snr[:, None] - process.snr, 1)


def log_posterior_variances(process: DiffusionProcess) -> Tensor:
    """The log of β̃, the variance of q(x_s | x_t, x_0), for every pair of steps.

        β̃ = (1 − ᾱ_t/ᾱ_s) (1 − ᾱ_s) / (1 − ᾱ_t)

    Args:
        process: the chain, of at most `MOST_STEPS` steps.

    Returns:
        log β̃ at [s, t] for s < t, and −∞ elsewhere, (T, T), float64.

    Raises:
        ValueError: as in `snr_gaps`.
    """
    _check_process(process)
    log_abar, noise = process.log_alphas_cumprod, process.one_minus_alphas_cumprod
    # No step goes back to the last one, where ᾱ may be 0
    start = torch.cat([log_abar[:-1], log_abar.new_zeros(1)])[:, None]
    return torch.triu(-torch.expm1(log_abar - start) * noise[:, None] / noise, 1).log()


def optimal_log_variances(process: DiffusionProcess, mse: Tensor) -> Tensor:
    """The log of the best variance β̃ (1 + Δ m_t) of the step from t to s, for every pair of steps.

    Args:
        process: the chain, of at most `MOST_STEPS` steps.
        mse: m_t, (T,).

    Returns:
        log σ² at [s, t] for s < t, and −∞ elsewhere, (T, T), float64.

    Raises:
        ValueError: as in `snr_gaps`, or `mse` is not T numbers of at least 0.
    """
    return log_posterior_variances(process) + torch.log1p(snr_gaps(process) * _table(process, "mse", mse))


def log_snr(process: DiffusionProcess) -> Tensor:
    """Log SNR_t, (T,), float64; zero terminal SNR counts as one nat below the step before."""
    found = process.log_alphas_cumprod - process.one_minus_alphas_cumprod.log()
    finite = found[found.isfinite()]
    return found.clamp(min=finite.min().item() - 1 if len(finite) else 0.0)


def averaged(position: Tensor, values: Tensor, weights: Tensor) -> Tensor:
    """Values averaged over neighbouring steps with Gaussian weights of `WIDTH`.

    Args:
        position: where each step lies, (N,), float64.
        values: (N, G), float64.
        weights: how much each counts for the others too, (N, G), above 0.
    """
    near = _weights(position, WIDTH)
    return (near @ (values * weights)) / (near @ weights)


def step_nats(gap: Tensor, mse: Tensor, declared: Tensor | None = None) -> Tensor:
    """What a reverse step costs whose variance is β̃ (1 + Δ m'), in nats per dimension; all broadcast.

    Args:
        gap: Δ = SNR_s − SNR_t.
        mse: the error m_t that x̂_0 has.
        declared: the error m' that the variance was made for; by default m_t, which is the best one.
    """
    if declared is None:
        return 0.5 * torch.log1p(gap * mse)
    excess = gap * (mse - declared) / (1 + gap * declared)
    return 0.5 * (torch.log1p(gap * declared) + excess)


def pair_nats(
    process: DiffusionProcess,
    mse: Tensor,
    shares: Tensor | None = None,
    declared: Tensor | None = None,
) -> Tensor:
    """What the step from t to s costs for every pair of steps, in nats per dimension.

    Args:
        process: the chain, of at most `MOST_STEPS` steps.
        mse: m_t, (T,), or m_tg of G groups of pixels, (T, G).
        shares: f_tg, the share of the pixels that each group has, (T, G), where `mse` has groups.
        declared: the error that the variance is made for, of the shape of `mse`; by default `mse` itself.

    Returns:
        L(s ← t) at [s, t] for s < t, and ∞ elsewhere, (T, T), float64.

    Raises:
        ValueError: as in `snr_gaps`, or a table of another shape or with numbers below 0.
    """
    gap = snr_gaps(process)
    tables = [_table(process, "mse", mse)]
    tables.append(tables[0] if declared is None else _table(process, "declared", declared))
    tables.append(torch.ones_like(tables[0]) if shares is None else _table(process, "shares", shares))
    for name, table in zip(("declared", "shares"), tables[1:], strict=True):
        if table.shape != tables[0].shape or (tables[0].ndim == 2 and shares is None):
            raise ValueError(
                f"{name} is {described(table)} for mse of shape {tuple(tables[0].shape)}; allowed: equal "
                "shapes, and shares where mse has groups"
            )
    total = torch.zeros_like(gap)
    for m, own, share in zip(*(z.view(len(process), -1).T for z in tables), strict=True):
        total += share * step_nats(gap, m, None if declared is None else own)
    return total.masked_fill(torch.tril(torch.ones_like(gap, dtype=torch.bool)), torch.inf)


def prior_nats(process: DiffusionProcess, second_moment: float) -> Tensor:
    """What it costs that a chain begins at step t with N(0, I) in place of q(x_t | x_0), nats per dimension.

        L_T(t) = ½ (ᾱ_t E⟨x_0²⟩ − ᾱ_t − ln(1 − ᾱ_t))

    Args:
        process: the chain.
        second_moment: E⟨x_0²⟩, the mean square of a pixel of the images in [−1, 1].

    Returns:
        L_T(t), (T,), float64.
    """
    abar = process.alphas_cumprod
    return 0.5 * (abar * (second_moment - 1) - torch.log1p(-abar))


@dataclass(frozen=True, eq=False)
class BestChains:
    """The best chain of every number of steps up to K.

    Attributes:
        nats: what the best chain of k steps costs, L_0 and L_T included, nats per dimension, at [k − 1],
            (K,), float64; ∞ where there is none.
    """

    nats: Tensor
    _before: np.ndarray  # at [k − 1, t]: the step before t in the best chain of k steps that ends at t
    _last: np.ndarray  # at [k − 1]: where the best chain of k steps ends

    __repr__ = fields_line

    def steps(self, count: int) -> list[int]:
        """The steps of the best chain of so many, ascending.

        Raises:
            ValueError: there is no such chain.
        """
        check_count("count", count)
        if count > len(self.nats) or not self.nats[count - 1] < np.inf:
            raise ValueError(f"count is {count}; allowed: a number of steps of which there is a chain")
        found = [int(self._last[count - 1])]
        for k in range(count - 1, 0, -1):
            found.append(int(self._before[k, found[-1]]))
        return found[::-1]


def best_chains(first: Tensor, pairs: Tensor, prior: Tensor, most: int) -> BestChains:
    """The best K steps for every K up to `most`, by dynamic programming, Watson et al. 2021.

        C_1[t] = L_0(t),   C_k[t] = min_{s<t} C_{k−1}[s] + L(s ← t),   the answer is min_t C_K[t] + L_T(t)

    Args:
        first: L_0(t), what the decoder costs from step t, (T,); ∞ where no chain may begin.
        pairs: L(s ← t) at [s, t], (T, T), as from `pair_nats`.
        prior: L_T(t), (T,), as from `prior_nats`.
        most: the largest K; more steps than T are left out.

    Raises:
        ValueError: tables of other shapes, NaN in one of them, or `most` below 1.
    """
    check_count("most", most)
    tables = {"first": first, "pairs": pairs, "prior": prior}
    arrays = {
        name: as_numbers(name, z, "numbers", torch.float64).double().numpy() for name, z in tables.items()
    }
    total = len(arrays["first"])
    for name, array in arrays.items():
        wanted = (total, total) if name == "pairs" else (total,)
        if array.shape != wanted or np.isnan(array).any():
            raise ValueError(f"{name} is {described(tables[name])}; allowed: numbers of shape {wanted}")
    cost, above = arrays["first"], np.ascontiguousarray(arrays["pairs"].T)  # at [t, s], whose minima are fast
    above[np.triu_indices(total)] = np.inf  # from t to an earlier s alone
    before = np.zeros((min(most, total), total), dtype=np.int32)
    nats, last = np.empty(len(before)), np.empty(len(before), dtype=np.int32)
    for k in range(len(before)):
        if k:
            through = above + cost
            before[k] = through.argmin(1)
            cost = through[np.arange(total), before[k]]
        last[k] = (cost + arrays["prior"]).argmin()
        nats[k] = cost[last[k]] + arrays["prior"][last[k]]
    return BestChains(torch.from_numpy(nats), before, last)


def chain_nats(steps: Sequence[int], first: Tensor, pairs: Tensor, prior: Tensor) -> float:
    """What the chain of the given steps costs, nats per dimension; the tables are those of `best_chains`.

    Raises:
        ValueError: the steps are not ascending steps of the tables.
    """
    total = len(first)
    if not len(steps) or not all(0 <= s < total for s in steps) or list(steps) != sorted(set(steps)):
        raise ValueError(f"steps are {described(steps)}; allowed: ascending steps in 0..{total - 1}")
    costs = [pairs[s, t] for s, t in pairwise(steps)]
    return float(first[steps[0]] + sum(costs) + prior[steps[-1]])


def smoothed_mse(process: DiffusionProcess, squared: Tensor, pixels: Tensor) -> Tensor:
    """The error m_t at every step, from sums over few images at each, smoothed over log SNR.

    Without it, the best chain would be the one of the luckiest steps. A polynomial in log SNR is fitted to
    log m_t; the ratio of m_t to it is averaged over neighbouring steps with Gaussian weights, and so is the
    ratio to what that gives, which takes off most of the bias where the curve is steep. Steps that lie far
    apart keep their own values, and steps without any image get those of their neighbours.

    Args:
        process: the chain.
        squared: the sum of (x̂_0 − x_0)² over pixels, (T,).
        pixels: over how many, (T,), 0 where no image was looked at.

    Returns:
        m_t, (T,), float64.

    Raises:
        ValueError: tables of another shape, numbers below 0, or no pixel at all.
    """
    squared, pixels = _table(process, "squared", squared), _table(process, "pixels", pixels)
    if squared.ndim != 1 or pixels.ndim != 1 or not pixels.sum() > 0:
        raise ValueError("squared and pixels hold no error; allowed: (T,) numbers, one of them above 0")
    return smoothed(log_snr(process), squared, pixels)


def smoothed(position: Tensor, sums: Tensor, counts: Tensor) -> Tensor:
    """The ratio of two positive tables, smoothed over a position, as in `smoothed_mse`.

    Args:
        position: where each step lies, (N,), float64.
        sums: the numerators, (N,), float64.
        counts: the denominators, (N,); some may be 0.
    """
    weights, faint = _weights(position, WIDTH), 1e-12 * counts.max()
    found = _trend(position, sums, counts)
    for _ in range(PASSES):
        found = found * (weights @ (sums / found) + faint) / (weights @ counts + faint)
    return found


def smoothed_groups(
    process: DiffusionProcess, squared: Tensor, pixels: Tensor, prior_pixels: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The errors m_tg of groups of pixels and the groups' shares f_tg, smoothed over log SNR.

    A group's error is averaged as in `smoothed_mse`, as a ratio to that of all pixels. Then all groups are
    scaled so that Σ_g f_tg m_tg is the error of all pixels.

    Args:
        process: the chain.
        squared: the sum of (x̂_0 − x_0)² over the pixels of each group, (T, G).
        pixels: over how many, (T, G).
        prior_pixels: so many pixels with the error of all are added to each group. A variance that is made of
            the errors needs some, as an error of 0 that was found by chance would cost much on other images.

    Returns:
        m_tg and f_tg, (T, G), float64; the shares of a step add up to 1.

    Raises:
        ValueError: as in `smoothed_mse`.
    """
    squared, pixels = _table(process, "squared", squared), _table(process, "pixels", pixels)
    if squared.ndim != 2 or squared.shape != pixels.shape:
        raise ValueError("squared and pixels differ in shape; allowed: (T, G) both")
    mse = smoothed_mse(process, squared.sum(1), pixels.sum(1))[:, None]
    weights = _weights(log_snr(process), WIDTH)
    prior = max(prior_pixels, 1e-12) * mse
    ratio = (weights @ squared + prior) / (weights @ (pixels * mse) + prior)
    seen = weights @ pixels + 1e-12 * pixels.sum(0)  # far from any image, the share is that of all steps
    shares = seen / seen.sum(1, keepdim=True)
    return mse * ratio / (shares * ratio).sum(1, keepdim=True), shares


def _check_process(process: Any) -> None:
    if not isinstance(process, DiffusionProcess):
        raise ValueError(f"process is {described(process)}; allowed: a DiffusionProcess")
    if len(process) > MOST_STEPS:
        raise ValueError(f"the process has {len(process)} steps; allowed: at most {MOST_STEPS}")


def _table(process: Any, name: str, values: Any) -> Tensor:
    """A table of the chain with numbers of at least 0, float64."""
    _check_process(process)
    allowed = f"finite numbers >= 0 of shape ({len(process)},) or ({len(process)}, groups)"
    table = as_numbers(name, values, allowed, torch.float64)
    if table.ndim not in (1, 2) or len(table) != len(process) or not (table.isfinite() & (table >= 0)).all():
        raise ValueError(f"{name} is {described(values)}; allowed: {allowed}")
    return table


def _weights(position: Tensor, width: float) -> Tensor:
    """How much each step counts for each, 1 for itself, (T, T)."""
    return torch.exp(-0.5 * ((position[:, None] - position) / width).square())


def _trend(position: Tensor, squared: Tensor, pixels: Tensor) -> Tensor:
    """A curve exp(polynomial in log SNR) through the errors, (T,); it never leaves their range."""
    used = (pixels > 0) & (squared > 1e-200 * pixels)  # far below that, nothing is left of a ratio
    if not used.any():
        return torch.ones_like(squared)
    log_mse = (squared[used] / pixels[used]).log().numpy()
    low, high = log_mse.min(), log_mse.max()
    centre, half = (position.max() + position.min()) / 2, (position.max() - position.min()) / 2
    x = ((position - centre) / half.clamp(min=1e-300)).numpy()
    degree = min(TREND_DEGREE, (int(used.sum()) - 1) // 2)
    fit = np.polynomial.Polynomial.fit(
        x[used.numpy()], log_mse, degree, domain=(-1, 1), w=pixels[used].sqrt().numpy()
    )
    return torch.from_numpy(np.exp(np.clip(fit(x), low, high)))
