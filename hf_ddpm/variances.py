"""The variance σ_t² of the reverse step p_θ(x_prev | x_t), by name: everything about a variance type, once.

    variance_type                    log σ_t²
    fixed_small, fixed_small_log     log β̃_t, with β̃_2 for β̃_1
    fixed_large, fixed_large_log     log β_t, with β̃_2 for β_1
    learned                          v, the network's second C channels
    learned_range                    f log β_t + (1 − f) log β̃_t,  f = (v + 1)/2, with β̃_2 for β̃_1
    optimal                          log β̃_t (1 + Δ m_t), m_t the measured error of x̂_0, Δ = SNR_prev − SNR_t
    by-value                         the same, m_t that of the pixels whose x̂_0 is about the same

Here β̃_1 and β_1 belong to the first step and β̃_2 to the second, as the paper counts.

In place of a name, a bound takes numbers: a table of log σ_t², shape (T,), or a `VarianceByValue`, which has
them for each value of the predicted x_0. `likelihood.errors` makes both from a network's measured errors:
"optimal" and "by-value" are names only where such errors are at hand.

To add a variance type, add its row to `VARIANCES`. With `trained=True`, runs of `train` may choose it.

Sources: Ho et al. 2020, section 3.2; Nichol & Dhariwal 2021, eq. 15. The file knows no network, no sampler.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_ddpm.checks import as_numbers, described
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.shown import fields_line
from hf_ddpm.tables import wide, wide_dtype

VALUE_BINS = 32  # of the predicted x_0: 30 even ones between −1 and 1, and −1 and 1 themselves


def learned_range_log_variance(process: DiffusionProcess, v: Tensor, t: Tensor | int) -> Tensor:
    """The log-variance log σ_t² interpolated by the network, Nichol & Dhariwal 2021, eq. 15.

        log σ² = f log β_t + (1 − f) log β̃_t,   f = (v + 1)/2,   with β̃_2 for β̃_1 at t = 0

    Args:
        process: the chain that t indexes.
        v: the second half of the network's output channels, shape (B, C, H, W); not bounded to [−1, 1].
        t: zero-based index into the chain, shape (B,) int64, or one int for all.

    Returns:
        log-variance, shape of v, float32 or wider.
    """
    low, high = process.at(t, v, "log_fixed_small", "log_betas")
    f = (wide(v) + 1) / 2
    return f * high + (1 - f) * low


@dataclass(frozen=True)
class Variance:
    """A variance type. It is fixed and has tables, learned and read from the network's output, or measured.

    Attributes:
        log_variance: of a fixed one, a function of the process that gives log σ_t², (T,) float64, with a
            finite entry at t = 0 for the decoder L_0; else None.
        sigma: of a fixed one, a function of the process that gives what the sampler multiplies its noise by,
            (T,) float64, 0 at t = 0; else None.
        from_output: of a learned one, a function (process, v, t) that gives log σ_t² from the second C
            channels of the output, v of shape (B, C, H, W), in float32 or wider; else None.
        measured: whether it is made of the network's measured errors, `likelihood.Errors.variance`.
        trained: whether runs of `train` may choose it.
        in_diffusers: whether diffusers' own `DDPMScheduler` runs it rightly.
        same_as: the type that this name of diffusers' is another word for, else None.
    """

    log_variance: Callable[[DiffusionProcess], Tensor] | None = None
    sigma: Callable[[DiffusionProcess], Tensor] | None = None
    from_output: Callable[[DiffusionProcess, Tensor, Tensor | int], Tensor] | None = None
    measured: bool = False
    trained: bool = True
    in_diffusers: bool = True
    same_as: str | None = None

    __repr__ = fields_line

    @property
    def outputs(self) -> int:
        """Channels of the network's output per channel of the images: 1, or 2 if the variance is learned."""
        return 1 if self.from_output is None else 2


def value_bins(x_0: Tensor) -> Tensor:
    """The bin of each value of a predicted x_0: where it lies between −1 and 1.

    Bin 0 holds −1 and all below, bin 31 holds 1 and all above, as clipping gathers values there; the bins 1
    to 30 divide what lies between evenly. So a clipped x_0 and the same one before it have equal bins.

    Args:
        x_0: of any shape, floating point.

    Returns:
        Numbers in 0..31, shape of x_0, int64.
    """
    inner = ((x_0.clamp(-1, 1) + 1) * ((VALUE_BINS - 2) / 2)).long().clamp(0, VALUE_BINS - 3) + 1
    return torch.where(x_0 <= -1, 0, torch.where(x_0 >= 1, VALUE_BINS - 1, inner))


@dataclass(frozen=True, eq=False)
class VarianceByValue:
    """A variance σ_t² that depends on the value that the network predicts for a pixel.

    Attributes:
        log_variance: log σ_t² for each bin of `value_bins`, (T, 32), float64; entry 0 is that of L_0.

    Raises:
        ValueError: it is no such table, or not all of it is finite.
    """

    log_variance: Tensor

    __repr__ = fields_line

    def __post_init__(self) -> None:
        allowed = f"finite numbers, (T, {VALUE_BINS})"
        table = as_numbers("log_variance", self.log_variance, allowed, torch.float64)
        if table.ndim != 2 or table.shape[1] != VALUE_BINS or not table.isfinite().all():
            raise ValueError(f"log_variance is {described(self.log_variance)}; allowed: {allowed}")
        object.__setattr__(self, "log_variance", table)

    def __len__(self) -> int:
        """T, the number of steps."""
        return len(self.log_variance)

    def at(self, process: DiffusionProcess, mean_x0: Tensor, t: Tensor | int) -> Tensor:
        """The log-variance log σ_t² of each pixel.

        Args:
            process: the chain that t indexes.
            mean_x0: the predicted x_0, clipped or not, shape (B, C, H, W).
            t: zero-based index into the chain, shape (B,) int64, or one int for all.

        Returns:
            log-variance, shape of `mean_x0`, float32 or wider.
        """
        found = process.at_groups(t, value_bins(mean_x0.detach()), self.log_variance)
        return found.to(wide_dtype(mean_x0.dtype))


# What a bound takes as its variance: a name, log σ_t² of each step, or of each step and predicted value
AnyVariance = str | Tensor | VarianceByValue

FIXED_SMALL = Variance(lambda process: process.log_fixed_small, lambda process: process.sigma_small)
FIXED_LARGE = Variance(lambda process: process.log_fixed_large, lambda process: process.sigma_large)

VARIANCES: dict[str, Variance] = {
    "fixed_small": FIXED_SMALL,
    "fixed_small_log": replace(FIXED_SMALL, trained=False, same_as="fixed_small"),
    "fixed_large": FIXED_LARGE,
    # The stock scheduler makes NaN of it.
    "fixed_large_log": replace(FIXED_LARGE, trained=False, same_as="fixed_large", in_diffusers=False),
    # The stock scheduler takes it for a variance, which may be negative.
    "learned": Variance(from_output=lambda process, v, t: wide(v), trained=False, in_diffusers=False),
    "learned_range": Variance(from_output=learned_range_log_variance),
    # The stock scheduler knows neither, and samples as with "fixed_small".
    "optimal": Variance(measured=True, trained=False, in_diffusers=False),
    "by-value": Variance(measured=True, trained=False, in_diffusers=False),
}
# The same without diffusers' second names: fixed, learned, measured, and what a run of `train` may choose.
FIXED = tuple(name for name, kind in VARIANCES.items() if kind.sigma is not None and kind.same_as is None)
LEARNED = tuple(name for name, kind in VARIANCES.items() if kind.outputs == 2 and kind.same_as is None)
MEASURED = tuple(name for name, kind in VARIANCES.items() if kind.measured)
TRAINED = tuple(name for name, kind in VARIANCES.items() if kind.trained)


def variance(variance_type: str) -> Variance:
    """The variance type of that name.

    Raises:
        ValueError: the name is unknown.
    """
    if not isinstance(variance_type, str) or variance_type not in VARIANCES:
        raise ValueError(f"variance_type is {described(variance_type)}; allowed: {', '.join(VARIANCES)}")
    return VARIANCES[variance_type]


def plain_name(variance_type: str) -> str:
    """The name without diffusers' "_log", which changes nothing; an unknown name stays as it is."""
    found = (kind.same_as for name, kind in VARIANCES.items() if name == variance_type)
    return next(found, None) or variance_type


def in_diffusers(variance_type: Any) -> bool:
    """Whether diffusers' own `DDPMScheduler` runs it rightly; True for an unknown name."""
    return not any(name == variance_type and not kind.in_diffusers for name, kind in VARIANCES.items())


def outputs(variance_type: AnyVariance) -> int:
    """Channels of the network's output per channel of the images: 1, or 2 if the variance is learned.

    Args:
        variance_type: a name, or numbers, which no network learns.

    Raises:
        ValueError: the name is unknown.
    """
    return variance(variance_type).outputs if isinstance(variance_type, str) else 1


def log_variance_table(process: DiffusionProcess, variance_type: str) -> Tensor:
    """The table of log σ_t² of a fixed variance type, (T,) float64.

    Raises:
        ValueError: the name is not in `FIXED`, or the chain has one step and so no β̃_2.
    """
    known = isinstance(variance_type, str) and variance_type in FIXED
    table = VARIANCES[variance_type].log_variance if known else None
    if table is None:
        raise ValueError(f"variance_type is {described(variance_type)}; allowed: {', '.join(FIXED)}")
    return table(process)


def check_scored(process: DiffusionProcess, variance_type: AnyVariance) -> None:
    """Check that a bound can be taken with this variance: one of `FIXED` or `LEARNED`, or numbers.

    Args:
        process: the chain.
        variance_type: a name, a table of log σ_t², shape (T,), or one by value.

    Raises:
        ValueError: neither, or numbers for another number of steps.
    """
    if isinstance(variance_type, Tensor):
        if variance_type.shape != (len(process),):
            raise ValueError(
                f"variance_type is a table of shape {tuple(variance_type.shape)}; allowed: ({len(process)},)"
            )
    elif isinstance(variance_type, VarianceByValue):
        if len(variance_type) != len(process):
            raise ValueError(
                f"variance_type has values for {len(variance_type)} steps; allowed: the chain's "
                f"{len(process)}"
            )
    elif not isinstance(variance_type, str) or variance_type not in (*FIXED, *LEARNED):
        allowed = ", ".join((*FIXED, *LEARNED))
        raise ValueError(f"variance_type is {described(variance_type)}; allowed: {allowed}, or a (T,) tensor")


def log_variance_at(
    process: DiffusionProcess,
    variance_type: AnyVariance,
    second: Tensor | None,
    t: Tensor | int,
    like: Tensor,
    mean_x0: Tensor | None = None,
) -> Tensor | float:
    """The log-variance log σ_t² at t, ready to go with images shaped `like`.

    Args:
        process: the chain that t indexes.
        variance_type: a name, a table of log σ_t², shape (T,), or one by value.
        second: the second C channels of the network's output, (B, C, H, W), if the variance is learned.
        t: zero-based index into the chain, shape (B,) int64, or one int for all.
        like: images, shape (B, C, H, W).
        mean_x0: the predicted x_0, shape of `like`, if the variance goes by its value.

    Returns:
        Shape of `like` if it is learned or by value; else a float for an int t, and (B, 1, 1, 1) for a
        tensor.
    """
    if isinstance(variance_type, VarianceByValue):
        assert mean_x0 is not None
        return variance_type.at(process, mean_x0, t)
    if isinstance(variance_type, Tensor):
        return process.at(t, like, variance_type.double())[0]
    kind = variance(variance_type)
    if kind.from_output is not None:
        assert second is not None
        return kind.from_output(process, second, t)
    assert kind.log_variance is not None
    return process.computed_at(t, like, kind.log_variance)[0]
