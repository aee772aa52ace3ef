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
from typing import Any

import torch
from torch import Tensor

from hf_ddpm.checks import check_images, described
from hf_ddpm.decoders import AnyDecoder, check_decoder, decoder_log_likelihood
from hf_ddpm.gaussian import check_levels, normal_kl
from hf_ddpm.parametrization import parametrization, to_x0
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.shown import count, summary, with_error
from hf_ddpm.variances import AnyVariance, check_scored, log_variance_at, outputs


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

    def __repr__(self) -> str:
        return summary(self, self._facts)

    def _facts(self) -> list[str]:
        """What its one-line `repr` says: the mean over the examples, and its standard error."""
        nats = self.nats.detach().double()
        stderr = nats.std() / len(nats) ** 0.5 if nats.numel() > 1 else nats.new_tensor(float("nan"))
        return [with_error(nats.mean().item(), stderr.item(), "nats"), count(len(nats), "example")]


def prior_kl(process: DiffusionProcess, x_0: Tensor) -> Tensor:
    """L_T = KL(q(x_{T−1} | x_0) ‖ N(0, I)), Ho et al. 2020, eq. 5.

        ½ Σ [ᾱ x_0² − ᾱ − log(1 − ᾱ)],   ᾱ = ᾱ_{T−1}

    Args:
        process: the chain.
        x_0: clean images in [−1, 1], shape (B, ...).

    Returns:
        nats summed over dimensions, float64, (B,).

    Raises:
        ValueError: an argument is not as above.
    """
    check_process(process, "prior_kl(process, x_0)")
    if not isinstance(x_0, Tensor) or not x_0.is_floating_point() or x_0.ndim < 1:
        raise ValueError(f"x_0 is {described(x_0)}; allowed: floating-point images, shape (B, ...)")
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
    variance_type: AnyVariance = "fixed_large",
    prediction_type: str = "epsilon",
    clip_x0: bool = True,
    decoder: AnyDecoder = "exact",
    model_output: Tensor | None = None,
) -> BoundTerm:
    """L_{t−1} of the paper (t ≥ 1 here), or L_0 (t = 0), of x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε; eq. 5.

    Args:
        process: the chain that t indexes; the network gets `process.timesteps[t]`.
        model: a denoiser (x_t, t) → output, or None if `model_output` is given.
        x_0: clean images, shape (B, C, H, W); at t = 0 on the grid u/127.5 − 1, in float32 or float64.
        t: zero-based index into the chain, shape (B,) int64, or one int for all.
        noise: ε ~ N(0, I), shape of x_0.
        variance_type: "fixed_small", "fixed_large", "learned" (the second C channels of the output are
            log σ²), "learned_range" (they interpolate, Nichol & Dhariwal 2021, eq. 15), a table of
            log σ_t², shape (T,), or a `VarianceByValue`.
        prediction_type: what the first C channels mean, one of `PREDICTION_TYPES`.
        clip_x0: clip x̂_0 to [−1, 1], as the published evaluation does.
        decoder: "exact" or "tanh", the published formula: see `discretized_gaussian_log_likelihood`; or a
            `LevelsDecoder`, to which σ_t of t = 0 is nothing.
        model_output: a prediction already made at this x_t; gradients flow to it.

    Returns:
        The term, float64; computed in float64 from x_t in x_0's dtype (float32 for half-precision images).

    Raises:
        ValueError: an unknown name, a shape that doesn't fit, t outside the chain, images at t = 0 that are
            not on the grid, or not exactly one of `model` and `model_output`.
    """
    check_batch(process, x_0, t, "bound_term(process, model, x_0, t, noise)", noise=noise)
    how = checked_options(process, variance_type, prediction_type, clip_x0, decoder)
    if (model is None) == (model_output is None):
        raise ValueError("pass exactly one of model and model_output")
    if _which(process, t)[0]:
        check_levels("x_0", x_0, t == 0 if isinstance(t, Tensor) else None)
    return known_term(process, model, x_0, t, noise, model_output=model_output, **how)


def known_term(
    process: DiffusionProcess,
    model: Callable[[Tensor, Tensor], Tensor] | None,
    x_0: Tensor,
    t: Tensor | int,
    noise: Tensor,
    *,
    variance_type: AnyVariance,
    prediction_type: str,
    clip_x0: bool,
    decoder: AnyDecoder,
    model_output: Tensor | None = None,
) -> BoundTerm:
    """`bound_term` of images that are known to be on the grid; nothing is read back from a device."""
    x_t = process.q_sample(x_0, noise, t)
    if model_output is None:
        if not callable(model):
            raise ValueError(f"model is {described(model)}; allowed: a function of (x_t, t)")
        steps = t if isinstance(t, Tensor) else torch.full(x_0.shape[:1], t, device=x_0.device)
        model_output = model(x_t, process.timesteps_at(steps))
    x_0, x_t = x_0.double(), x_t.double()
    mean_x0, log_variance = predicted(process, model_output, x_t, t, prediction_type, variance_type)
    if clip_x0:
        mean_x0 = mean_x0.clamp(-1, 1)
    nats = term_nats(process, x_0, mean_x0, log_variance, t, decoder)
    x0_mse = (mean_x0 - x_0).square().flatten(1).mean(1)
    snr = process.at(t, x0_mse, "snr")[0]
    return BoundTerm(nats, x0_mse.detach(), (snr * x0_mse).detach())


def term_nats(
    process: DiffusionProcess,
    x_0: Tensor,
    mean_x0: Tensor,
    log_variance: Tensor | float,
    t: Tensor | int,
    decoder: AnyDecoder = "exact",
) -> Tensor:
    """The KL where t ≥ 1, −log of the decoder where t = 0, of p_θ with that x̂_0 and log σ_t².

    Each example's gradient is that of its own term: in the other one, which is computed too where a batch has
    both, x̂_0 and σ may be such that it has none.

    Args:
        process: the chain that t indexes.
        x_0: images on the grid, float64, shape (B, C, H, W).
        mean_x0: x̂_0, float64, shape of x_0.
        log_variance: log σ_t², as `predicted` gives it.
        t: zero-based index into the chain, shape (B,) int64, or one int for all.
        decoder: as in `bound_term`.

    Returns:
        nats summed over dimensions, float64, (B,).
    """
    first, later = _which(process, t)
    both = first and later
    at_0 = (torch.as_tensor(t, device=x_0.device) == 0).view(-1, *[1] * (x_0.ndim - 1))
    nats = x_0.new_zeros(len(x_0))
    if later:
        log_posterior, c0 = process.at(t, x_0, "log_fixed_small", "posterior_mean_coef_x0")
        shift, own = c0 * (mean_x0 - x_0), log_variance
        if both:
            shift, own = torch.where(at_0, 0, shift), torch.where(at_0, log_posterior, own)
        nats = normal_kl(x_0.new_zeros(()), log_posterior, shift, own).flatten(1).sum(1)
    if first:
        mean, own = mean_x0, log_variance
        if both:
            mean, own = torch.where(at_0, mean, x_0), torch.where(at_0, own, 0)
        decoded = -decoder_log_likelihood(decoder, x_0, mean, own).flatten(1).sum(1)
        nats = torch.where(at_0.flatten(), decoded, nats) if both else decoded
    return nats


def predicted(
    process: DiffusionProcess,
    model_output: Tensor,
    x_t: Tensor,
    t: Tensor | int,
    prediction_type: str,
    variance_type: AnyVariance,
) -> tuple[Tensor, Tensor | float]:
    """What a network's output says of p_θ(x_prev | x_t) = N(μ̃_t(x_t, x̂_0), σ_t²).

    Arguments and errors as in `bound_term`; it is computed in x_t's dtype, and gradients flow to the output.

    Returns:
        x̂_0, not clipped, shape of x_t; and log σ_t², a float or a tensor that goes with images of that shape.
    """
    if not isinstance(model_output, Tensor):
        raise ValueError(
            f"the model answered {described(model_output)}; allowed: a tensor, as diffusers models give "
            "through hf_ddpm.denoiser.as_denoiser"
        )
    check_scored(process, variance_type)
    wanted = (x_t.shape[0], x_t.shape[1] * outputs(variance_type), *x_t.shape[2:])
    if model_output.shape != wanted:
        raise ValueError(
            f"the model answered shape {tuple(model_output.shape)}; allowed for variance_type "
            f"{variance_type if isinstance(variance_type, str) else 'of a table'!r}: {wanted}"
        )
    output, *second = model_output.to(x_t.dtype).split(x_t.shape[1], dim=1)
    mean_x0 = to_x0(process, prediction_type, output, x_t, t)
    found = log_variance_at(process, variance_type, second[0] if second else None, t, x_t, mean_x0)
    return mean_x0, found


def check_process(process: Any, order: str) -> None:
    """Refuse what is no process, as when arguments come in another order.

    Raises:
        ValueError: the message says the order.
    """
    if not isinstance(process, DiffusionProcess):
        raise ValueError(
            f"process is {described(process)}; allowed: a DiffusionProcess; the order is {order}"
        )


def check_batch(process: Any, x_0: Any, t: Any, order: str, **noises: Any) -> None:
    """Refuse images, steps and noise that don't go together.

    Args:
        process: the chain.
        x_0: images, (B, C, H, W).
        t: steps, (B,), or one int for all.
        order: the call with its arguments in their order, for the message.
        **noises: of the shape of x_0, by the names of their arguments.

    Raises:
        ValueError: an argument is something else; the message says which, and the order.
    """
    check_process(process, order)
    check_images(order, x_0=x_0, **noises)
    if x_0.ndim < 1:
        raise ValueError(f"x_0 is {described(x_0)}; allowed: shape (B, C, H, W); the order is {order}")
    if not isinstance(t, Tensor):
        process.at(t, x_0)  # refuses what is no step
    elif t.shape != x_0.shape[:1]:
        raise ValueError(
            f"t is {described(t)}; allowed: ({x_0.shape[0]},), one step per example; the order is {order}"
        )


def check_some(name: str, images: Any) -> None:
    """Refuse what is no tensor of at least one image.

    Raises:
        ValueError: it is none, or empty; the message names the argument.
    """
    if not isinstance(images, Tensor) or images.ndim < 2:
        raise ValueError(f"{name} is {described(images)}; allowed: a tensor of shape (N, C, H, W)")
    if images.numel() == 0:
        raise ValueError("there are no images; allowed: at least one")


def checked_options(
    process: Any, variance_type: Any, prediction_type: Any, clip_x0: Any, decoder: Any
) -> dict[str, Any]:
    """The options of a bound, as keywords of `known_term`.

    Raises:
        ValueError: an unknown name, or a table of another shape.
    """
    check_decoder(decoder)
    parametrization(prediction_type)
    check_scored(process, variance_type)
    if not isinstance(clip_x0, bool):
        raise ValueError(f"clip_x0 is {described(clip_x0)}; allowed: True, False")
    return {
        "variance_type": variance_type,
        "prediction_type": prediction_type,
        "clip_x0": clip_x0,
        "decoder": decoder,
    }


def _which(process: DiffusionProcess, t: Tensor | int) -> tuple[bool, bool]:
    """Whether some examples may be at t = 0, and some at t ≥ 1; steps on an accelerator are not read."""
    if not isinstance(t, Tensor):
        return t == 0, t > 0
    if t.device.type != "cpu":
        return True, len(process) > 1
    return bool((t == 0).any()), bool((t > 0).any())
