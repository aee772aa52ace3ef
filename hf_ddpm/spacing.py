"""Which K of the T steps a sampler visits, by the name of their spacing.

    linspace, leading, trailing     as diffusers spaces them, Lin et al. 2023, table 2
    quadratic                       K steps from 0 up to the start, as c·i²: dense where there is little noise
    align-your-steps                the noise levels of Sabour et al. 2024, at the steps of this process that
                                    are nearest to them in log SNR

A sampler begins with N(0, I) in place of x_t, so its first step has to be one where x_t knows next to nothing
of its image: the *start* is the lowest step where the KL of a pixel at ±1 is at most 0.01 bits. Few steps
should not be spent above it, but on no account may they begin below.

The file knows steps, and nothing of what is done at them.
"""

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.checks import described
from hf_ddpm.gaussian import bits_per_dim
from hf_ddpm.process import PRIOR_WARNING, DiffusionProcess
from hf_ddpm.schedules import DIFFUSERS_SPACINGS, SPACINGS, quadratic_steps, spaced_timesteps
from hf_ddpm.spelling import did_you_mean

# √(1 − ᾱ)/√ᾱ after 0, 1, ..., 10 of ten steps: Sabour et al. 2024 (Align Your Steps), appendix B, the row of
# DeepFloyd IF, the one of their text-to-image networks whose images are pixels, as ours are
ALIGN_YOUR_STEPS = (160.41, 8.081, 3.315, 1.885, 1.207, 0.785, 0.553, 0.293, 0.186, 0.030, 0.006)


def sampling_steps(
    process: DiffusionProcess, spacing: str, num_inference_steps: int | None, offset: int = 0
) -> Tensor:
    """K steps of a process for a sampler that begins with N(0, I).

    The steps of "linspace", "leading" and "trailing" are diffusers', but where those begin below the start.
    Of "leading", i·⌊T/K⌋ then gives way to ⌊i·T/K⌋, and where that begins below it too, all of them are
    stretched so that the first is the start. Where the process has no start, as it ends before, they stay.

    Args:
        process: the full process of T steps.
        spacing: one of `SPACINGS`.
        num_inference_steps: K, 1 ≤ K ≤ T.
        offset: added to every step of "leading".

    Returns:
        int64, shape (K,), descending.

    Raises:
        ValueError: an argument is not as above, or the offset moves a step out of 0..T−1.
    """
    count, total = num_inference_steps, len(process)
    check_spacing(spacing)
    # These refuse a count or an offset that can't be, whatever the spacing
    word = spacing if spacing in DIFFUSERS_SPACINGS else "linspace"
    grids = [spaced_timesteps(word, count, total, offset, even) for even in (False, True)]
    assert count is not None
    start = start_step(process)
    if spacing == "quadratic":
        last = total - 1 if start is None else max(start, count - 1)
        return torch.tensor(quadratic_steps(last + 1, count)[::-1])
    if spacing == "align-your-steps":
        return _nearest_steps(process, _align_your_steps(count))
    fitting = [steps for steps in grids if start is None or steps[0] >= start]
    return fitting[0] if fitting else _stretched(grids[0], start)


def start_step(process: DiffusionProcess) -> int | None:
    """The lowest step where x_t knows at most 0.01 bits of a pixel at ±1; None if there is none."""
    fits = known_bpd(process) <= PRIOR_WARNING
    return int(fits.int().argmax()) if fits.any() else None


def known_bpd(process: DiffusionProcess) -> Tensor:
    """The KL to N(0, I) of a pixel at ±1 at each step, −½ log2(1 − ᾱ_t), in bits, (T,), float64."""
    return bits_per_dim(-0.5 * torch.log1p(-process.alphas_cumprod), 1)


def start_warning(process: DiffusionProcess, step: int) -> str | None:
    """What to say of sampling that starts from N(0, I) at a step where x_t is not yet noise; else None."""
    known = known_bpd(process)[step].item()
    if known <= PRIOR_WARNING:
        return None
    remedy = "a schedule that ends nearer to pure noise"
    if step < len(process) - 1:
        remedy = f"more steps, timestep_spacing='trailing', or {remedy}"
    return (
        f"sampling starts from N(0, I) at step {step}, where x_t still knows {known:.3g} bits/dim of its "
        f"image: use {remedy}"
    )


def check_spacing(spacing: object) -> None:
    """Refuse what is no word for how the steps of a shorter chain are spaced.

    Raises:
        ValueError: it is not one of `SPACINGS` (the nearest is named).
    """
    if not isinstance(spacing, str) or spacing not in SPACINGS:
        hint = did_you_mean(spacing, SPACINGS)
        raise ValueError(f"timestep_spacing is {described(spacing)}{hint}; allowed: {', '.join(SPACINGS)}")


def in_diffusers(spacing: object) -> bool:
    """Whether diffusers' own samplers space steps so; True for what is no spacing at all."""
    return not any(spacing == name for name in SPACINGS if name not in DIFFUSERS_SPACINGS)


def _align_your_steps(count: int) -> np.ndarray:
    """The noise levels √(1 − ᾱ)/√ᾱ at which K steps are taken, falling, (K,).

    Other numbers of steps than 10 are interpolated in log σ, as the authors do. The last of the K + 1 levels
    is where the last step ends, and is not visited.
    """
    places = np.linspace(0, len(ALIGN_YOUR_STEPS) - 1, count + 1)
    levels = np.interp(places, np.arange(len(ALIGN_YOUR_STEPS)), np.log(ALIGN_YOUR_STEPS))
    return np.exp(levels[:-1])


def _nearest_steps(process: DiffusionProcess, sigmas: np.ndarray) -> Tensor:
    """The steps of a process nearest in log SNR to noise levels that fall, each step once, descending."""
    log_sigma = 0.5 * (process.one_minus_alphas_cumprod.log() - process.log_alphas_cumprod).numpy()
    middles = (log_sigma[1:] + log_sigma[:-1]) / 2  # where the nearest step changes
    steps, places = np.searchsorted(middles, np.log(sigmas)[::-1]), np.arange(len(sigmas))
    # Of equal steps the later one gives way upwards, and at the end of the process all of them downwards
    steps = np.maximum.accumulate(steps - places) + places
    steps = np.minimum(steps, len(process) - len(steps) + places)
    return torch.from_numpy(steps[::-1].copy())


def _stretched(steps: Tensor, start: int | None) -> Tensor:
    """Steps that begin below the start, moved apart so that the first is the start."""
    assert start is not None
    if steps[0] == 0:
        return steps + start
    return torch.floor(steps.double() * (start / int(steps[0])) + 0.5).to(torch.int64)
