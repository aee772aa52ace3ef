"""The terms of the variational bound, Ho et al. 2020, eq. 5, per example, in nats summed over dimensions.

    −log p_θ(x_0) ≤ L_T + Σ_{t≥1} L_t + L_0

    L_T = KL(q(x_{T−1} | x_0) ‖ N(0, I))
    L_t = KL(N(μ̃_t(x_t, x_0), β̃_t) ‖ N(μ̃_t(x_t, x̂_0), σ_t²)),      whose means differ by c0 (x̂_0 − x_0)
    L_0 = −log p_θ(x_0 | x_{t=0}),  the discretised decoder around x̂_0

It knows the process, what a network's output means and Gaussian maths. It does not know how t and the noise
are drawn, nor how terms are summed and averaged (estimator.py, full.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_ddpm.gaussian import discretized_gaussian_log_likelihood, normal_kl
from hf_ddpm.parametrization import parametrization, to_x0
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.variances import check_scored, log_variance_at, outputs

DECODERS = ("exact", "tanh")


@dataclass(frozen=True, eq=False)
class BoundTerm:
    """One term of the bound for each example; all float64, shape (B,).

    Attributes:
        nats: KL(q ‖ p_θ) where t ≥ 1, −log of the decoder where t = 0, summed over dimensions.
        x0_mse: ⟨(x̂_0 − x_0)²⟩, mean over dimensions, of the clipped x̂_0 if it was clipped.
        eps_mse: ⟨(ε̂ − ε)²⟩ with ε̂ re-derived from that x̂_0; SNR_t · x0_mse.
    """

    nats: Tensor
    x0_mse: Tensor
    eps_mse: Tensor


def prior_kl(process: DiffusionProcess, x_0: Tensor) -> Tensor:
    """L_T = KL(q(x_{T−1} | x_0) ‖ N(0, I)), Ho et al. 2020, eq. 5.

        ½ Σ [ᾱ x_0² − ᾱ − log(1 − ᾱ)],   ᾱ = ᾱ_{T−1}

    Args:
        process: the chain.
        x_0: clean images in [−1, 1], shape (B, ...).

    Returns:
        nats summed over dimensions, float64, (B,).
    """
    mean = process.sqrt_alphas_cumprod[-1].item() * x_0.double()
    log_variance = torch.log1p(-process.alphas_cumprod[-1])
    zero = mean.new_zeros(())
    return normal_kl(mean, log_variance.to(mean.device), zero, zero).flatten(1).sum(1)


def bound_term(
    process: DiffusionProcess,
    model: Callable[[Tensor, Tensor], Tensor] | None,
    x_0: Tensor,
    t: Tensor | int,
    noise: Tensor,
    *,
    variance_type: str | Tensor,
    prediction_type: str = "epsilon",
    clip_x0: bool = True,
    decoder: Literal["exact", "tanh"] = "exact",
    model_output: Tensor | None = None,
) -> BoundTerm:
    """L_{t−1} of the paper (t ≥ 1 here), or L_0 (t = 0), of x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε; eq. 5.

    Args:
        process: the chain that t indexes; the network gets `process.timesteps[t]`.
        model: a denoiser (x_t, t) → output, or None if `model_output` is given.
        x_0: clean images on the grid u/127.5 − 1, shape (B, C, H, W).
        t: zero-based index into the chain, shape (B,) int64, or one int for all.
        noise: ε ~ N(0, I), shape of x_0.
        variance_type: "fixed_small", "fixed_large", "learned" (the second C channels of the output are
            log σ²), "learned_range" (they interpolate, Nichol & Dhariwal 2021, eq. 15), or a table of
            log σ_t², shape (T,).
        prediction_type: what the first C channels mean, one of `PREDICTION_TYPES`.
        clip_x0: clip x̂_0 to [−1, 1], as the published evaluation does.
        decoder: "exact" or "tanh", see `discretized_gaussian_log_likelihood`.
        model_output: a prediction already made at this x_t; gradients flow to it.

    Returns:
        The term, float64; computed in float64 from x_t in x_0's dtype (float32 for half-precision images).

    Raises:
        ValueError: an unknown name, a shape that doesn't fit, t outside the chain, or not exactly one of
            `model` and `model_output`.
    """
    _check(process, x_0, t, noise, variance_type, prediction_type, decoder)
    if (model is None) == (model_output is None):
        raise ValueError("pass exactly one of model and model_output")
    x_t = process.q_sample(x_0, noise, t)
    if model_output is None:
        assert model is not None
        steps = t if isinstance(t, Tensor) else torch.full(x_0.shape[:1], t, device=x_0.device)
        model_output = model(x_t, process.timesteps_at(steps))
    if not isinstance(model_output, Tensor):
        raise ValueError(
            f"the model answered {type(model_output).__name__}; allowed: a tensor, as diffusers models give "
            "through hf_ddpm.denoiser.as_denoiser"
        )
    x_0, x_t = x_0.double(), x_t.double()
    mean_x0, log_variance = predicted(process, model_output, x_t, t, prediction_type, variance_type)
    if clip_x0:
        mean_x0 = mean_x0.clamp(-1, 1)

    first, later = _which(process, t)
    nats = x_0.new_zeros(len(x_0))
    if later:
        # log β̃ with a finite first entry: at t = 0 the value is not used, but its gradient must be finite.
        log_posterior, c0 = process.at(t, x_0, "log_fixed_small", "posterior_mean_coef_x0")
        zero = x_0.new_zeros(())
        nats = normal_kl(zero, log_posterior, c0 * (mean_x0 - x_0), log_variance).flatten(1).sum(1)
    if first:
        at_0 = torch.as_tensor(t, device=x_0.device) == 0
        decoded = decoder_nats(x_0, mean_x0, log_variance, at_0 if later else None, decoder)
        nats = torch.where(at_0, decoded, nats) if later else decoded
    x0_mse = (mean_x0 - x_0).square().flatten(1).mean(1)
    snr = process.at(t, x0_mse, "snr")[0]
    return BoundTerm(nats, x0_mse.detach(), (snr * x0_mse).detach())


def decoder_nats(
    x_0: Tensor,
    mean_x0: Tensor,
    log_variance: Tensor | float,
    at_0: Tensor | None = None,
    decoder: Literal["exact", "tanh"] = "exact",
) -> Tensor:
    """−log p_θ(x_0 | x_{t=0}) per example, (B,), where `at_0` (B,), by default everywhere.

    Elsewhere x̂_0 may be so far off that the decoder's gradient is infinite; there it is kept out.
    """
    if at_0 is not None:
        mean_x0 = torch.where(at_0.view(-1, *[1] * (x_0.ndim - 1)), mean_x0, x_0)
    return -discretized_gaussian_log_likelihood(x_0, mean_x0, log_variance, decoder).flatten(1).sum(1)


def predicted(
    process: DiffusionProcess,
    model_output: Tensor,
    x_t: Tensor,
    t: Tensor | int,
    prediction_type: str,
    variance_type: str | Tensor,
) -> tuple[Tensor, Tensor | float]:
    """What a network's output says of p_θ(x_prev | x_t) = N(μ̃_t(x_t, x̂_0), σ_t²).

    Arguments and errors as in `bound_term`; it is computed in x_t's dtype, and gradients flow to the output.

    Returns:
        x̂_0, not clipped, shape of x_t; and log σ_t², a float or a tensor that goes with images of that shape.
    """
    check_scored(process, variance_type)
    wanted = (x_t.shape[0], x_t.shape[1] * outputs(variance_type), *x_t.shape[2:])
    if model_output.shape != wanted:
        raise ValueError(
            f"the model answered shape {tuple(model_output.shape)}; allowed for variance_type "
            f"{variance_type if isinstance(variance_type, str) else 'of a table'!r}: {wanted}"
        )
    output, *second = model_output.to(x_t.dtype).split(x_t.shape[1], dim=1)
    log_variance = log_variance_at(process, variance_type, second[0] if second else None, t, x_t)
    return to_x0(process, prediction_type, output, x_t, t), log_variance


def _check(
    process: DiffusionProcess,
    x_0: Tensor,
    t: Tensor | int,
    noise: Tensor,
    variance_type: str | Tensor,
    prediction_type: str,
    decoder: str,
) -> None:
    """Refuse arguments of `bound_term` that don't fit, before the network runs."""
    if decoder not in DECODERS:
        raise ValueError(f"decoder is {decoder!r}; allowed: {', '.join(DECODERS)}")
    parametrization(prediction_type)
    if not x_0.is_floating_point():
        raise ValueError(f"x_0 is {x_0.dtype}; allowed: floating-point images in [-1, 1]")
    if noise.shape != x_0.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}; allowed: that of x_0, {tuple(x_0.shape)}")
    if isinstance(t, Tensor) and t.shape != x_0.shape[:1]:
        raise ValueError(f"t has shape {tuple(t.shape)}; allowed: ({x_0.shape[0]},), one step per example")
    check_scored(process, variance_type)


def _which(process: DiffusionProcess, t: Tensor | int) -> tuple[bool, bool]:
    """Whether some examples may be at t = 0, and some at t ≥ 1; steps on an accelerator are not read."""
    if not isinstance(t, Tensor):
        return t == 0, t > 0
    if t.device.type != "cpu":
        return True, len(process) > 1
    return bool((t == 0).any()), bool((t > 0).any())
