"""Schedules: the β_t that diffusers' schedulers name, in float64, and the steps that a shorter chain visits.

It knows formulas for β and nothing of what is done with them; `DiffusionProcess.from_betas` validates the
result. To add a schedule, write its function and add its row to `SCHEDULES`.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.checks import check_count, described
from hf_ddpm.shown import fields_line
from hf_ddpm.spelling import did_you_mean

DIFFUSERS_SPACINGS = ("linspace", "leading", "trailing")  # of the steps that a shorter chain visits
SPACINGS = (*DIFFUSERS_SPACINGS, "quadratic", "align-your-steps")  # spacing.py has the last two
MAX_BETA = 0.999  # where ᾱ(u) falls too fast, Nichol & Dhariwal 2021, section 3.2


def make_betas(schedule: str, num_steps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """The variances β_t of a named schedule.

    Args:
        schedule: a name in `SCHEDULES`. "linear" is Ho et al. 2020, section 4; "squaredcos_cap_v2" is the
            cosine of Nichol & Dhariwal 2021, eq. 17; "constant" is β_t = beta_start, the article on SDDPM.
        num_steps: T, at least 1.
        beta_start: the first β ("squaredcos_cap_v2" and "laplace" ignore both ends).
        beta_end: the last β.

    Returns:
        float64, shape (T,).

    Raises:
        ValueError: the name is unknown (the nearest is named), or T is not a positive whole number.
    """
    if not isinstance(schedule, str) or schedule not in SCHEDULES:
        hint = did_you_mean(schedule, SCHEDULES)
        raise ValueError(
            f"beta_schedule {described(schedule)} is unknown{hint}; allowed: {', '.join(SCHEDULES)}"
        )
    if not isinstance(num_steps, int) or isinstance(num_steps, bool) or num_steps < 1:
        raise ValueError(f"num_train_timesteps is {described(num_steps)}; allowed: a whole number >= 1")
    for name, beta in (("beta_start", beta_start), ("beta_end", beta_end)):
        if name in SCHEDULES[schedule].uses and (not isinstance(beta, Real) or isinstance(beta, bool)):
            raise ValueError(f"{name} is {described(beta)}; allowed: numbers in (0, 1)")
    return SCHEDULES[schedule].betas(num_steps, beta_start, beta_end)


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas rescaled so that ᾱ_{T−1} = 0 and ᾱ_0 stays, Lin et al. 2023, algorithm 1.

    √ᾱ'_t = (√ᾱ_t − √ᾱ_{T−1}) · √ᾱ_0 / (√ᾱ_0 − √ᾱ_{T−1})
    """
    if len(betas) < 2:
        raise ValueError(
            "rescale_betas_zero_snr needs num_train_timesteps >= 2: one step has no shape to rescale"
        )
    root = torch.cumprod(1 - betas.double(), 0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alphas_cumprod = root**2
    return 1 - torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])


def spaced_timesteps(
    spacing: str,
    num_inference_steps: int | None,
    num_steps: int,
    offset: int = 0,
    even: bool = False,
) -> Tensor:
    """K steps out of T, as diffusers spaces them (Lin et al. 2023, table 2).

        linspace: round(i (T−1)/(K−1))       leading: i ⌊T/K⌋ + offset       trailing: round((i+1) T/K) − 1

    Args:
        spacing: "linspace", "leading" or "trailing".
        num_inference_steps: K, 1 ≤ K ≤ T.
        num_steps: T.
        offset: added to every step of "leading".
        even: take ⌊i T/K⌋ for "leading": ⌊T/K⌋ stops at K − 1 where K is more than half of T.

    Returns:
        int64, shape (K,), descending.

    Raises:
        ValueError: an argument is not as above, or the offset moves a step out of 0..T−1.
    """
    n, total = num_inference_steps, num_steps
    if isinstance(offset, bool) or not isinstance(offset, int | np.integer):
        raise ValueError(f"steps_offset is {described(offset)}; allowed: whole numbers")
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or not 1 <= n <= total:
        raise ValueError(f"num_inference_steps is {described(n)}; allowed: whole numbers in 1..{total}")
    if spacing == "linspace":
        steps = np.linspace(0, total - 1, n).round()
    elif spacing == "leading":
        steps = np.floor(np.arange(n) * (total / n if even else total // n)) + offset
    elif spacing == "trailing":
        # These are diffusers' float steps, ties included. Where its rounding gives one step too many, at −1,
        # ours ends before it.
        steps = (np.round(np.arange(total, 0, -total / n))[:n] - 1)[::-1]
    else:
        raise ValueError(
            f"timestep_spacing is {described(spacing)}; allowed: {', '.join(map(repr, DIFFUSERS_SPACINGS))}"
        )
    if steps[0] < 0 or steps[-1] >= total:
        raise ValueError(
            f"steps_offset {offset} moves {n} steps to {steps[0]:g}..{steps[-1]:g}; allowed: 0..{total - 1}"
        )
    return torch.from_numpy(steps.astype(np.int64)[::-1].copy())


def quadratic_steps(total: int, count: int) -> list[int]:
    """K steps of 0..T−1 that lie quadratically, from 0 up to T−1: dense where there is little noise.

    Where two steps would be the same, the later one gives way upwards. Song et al. 2021 (DDIM), appendix D.2,
    take such steps, but for the constant and the rounding.

    Args:
        total: T.
        count: K.

    Returns:
        The steps, ascending.

    Raises:
        ValueError: T is not a whole number of at least 1, or `count` not one of 1..T.
    """
    check_count("total", total)
    check_count("count", count)
    if count > total:
        raise ValueError(f"count is {count}; allowed: at most {total}")
    places = np.linspace(0, np.sqrt(total - 1), count) ** 2 if count > 1 else np.array([total - 1.0])
    return np.maximum(np.floor(places + 0.5).astype(int), np.arange(count)).tolist()


def _linear(num_steps: int, beta_start: float, beta_end: float) -> Tensor:
    return torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64)


def _scaled_linear(num_steps: int, beta_start: float, beta_end: float) -> Tensor:
    return torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float64) ** 2


def _sigmoid(num_steps: int, beta_start: float, beta_end: float) -> Tensor:
    s = torch.sigmoid(torch.linspace(-6, 6, num_steps, dtype=torch.float64))
    return s * (beta_end - beta_start) + beta_start


def _constant(num_steps: int, beta_start: float, beta_end: float) -> Tensor:
    return torch.full((num_steps,), beta_start, dtype=torch.float64)


def _from_alpha_bar(alpha_bar: Callable[[float], float]) -> Callable[[int, float, float], Tensor]:
    """β_i = min(1 − ᾱ((i+1)/T) / ᾱ(i/T), 0.999)."""

    def betas(num_steps: int, beta_start: float, beta_end: float) -> Tensor:
        levels = [alpha_bar(i / num_steps) for i in range(num_steps + 1)]
        ratios = [after / before for before, after in itertools.pairwise(levels)]
        return torch.tensor([min(1 - ratio, MAX_BETA) for ratio in ratios], dtype=torch.float64)

    return betas


def _cosine(u: float) -> float:
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(u: float) -> float:
    """ᾱ(u) of the Laplace noise schedule as diffusers computes it (Hang et al. 2024)."""
    log_snr = -0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6)
    return math.sqrt(1 / (1 + math.exp(-log_snr)))


@dataclass(frozen=True)
class Schedule:
    """A beta schedule.

    Attributes:
        betas: a function (num_steps, beta_start, beta_end) that gives β_t, (T,) float64.
        uses: which of "beta_start" and "beta_end" act.
        in_diffusers: whether every sampler of diffusers knows the name. The config of any other schedule has
            its betas as `trained_betas` too, which every one of them reads.
    """

    betas: Callable[[int, float, float], Tensor]
    uses: tuple[str, ...] = ("beta_start", "beta_end")
    in_diffusers: bool = False

    __repr__ = fields_line


SCHEDULES: dict[str, Schedule] = {
    "linear": Schedule(_linear, in_diffusers=True),
    "scaled_linear": Schedule(_scaled_linear, in_diffusers=True),
    "squaredcos_cap_v2": Schedule(_from_alpha_bar(_cosine), uses=(), in_diffusers=True),
    # diffusers' DDPMScheduler knows these two, and its other samplers don't
    "sigmoid": Schedule(_sigmoid),
    "laplace": Schedule(_from_alpha_bar(_laplace), uses=()),
    "constant": Schedule(_constant, uses=("beta_start",)),
}
