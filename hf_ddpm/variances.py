"""The reverse variance types."""

from torch import Tensor

from hf_ddpm.process import DiffusionProcess
from hf_ddpm.tables import wide

FIXED = {"fixed_small": "log_fixed_small", "fixed_large": "log_fixed_large"}

LEARNED = ("learned", "learned_range")


def variance_table(process: DiffusionProcess, variance_type: str | Tensor) -> str | Tensor | None:
    """Name or values of the table of log σ_t², None for a learned variance."""
    if isinstance(variance_type, Tensor):
        if variance_type.shape != (len(process),):
            raise ValueError(
                f"variance_type is a table of shape {tuple(variance_type.shape)}; allowed: ({len(process)},)"
            )
        return variance_type.double()
    if not isinstance(variance_type, str) or variance_type not in (*FIXED, *LEARNED):
        raise ValueError(
            f"variance_type is {variance_type!r}; allowed: {', '.join((*FIXED, *LEARNED))}, or a (T,) tensor"
        )
    return FIXED.get(variance_type)


SIGMA_TABLES = {
    "fixed_small": "sigma_small",
    "fixed_small_log": "sigma_small",
    "fixed_large": "sigma_large",
    "fixed_large_log": "sigma_large",
}


VARIANCE_TYPES = (*SIGMA_TABLES, *LEARNED)


def learned_range_log_variance(process: DiffusionProcess, v: Tensor, t: Tensor | int) -> Tensor:
    """Log σ_t² interpolated by the network, Nichol & Dhariwal 2021, eq. 15.

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
