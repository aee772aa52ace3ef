"""The diffusion process: the single source of truth for every constant of q and p.

    q(x_t | x_prev) = N(√α_t x_prev, β_t I)       q(x_t | x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I),  ᾱ_t = Π_{s≤t} α_s
    q(x_prev | x_t, x_0) = N(μ̃_t, β̃_t I)          p_θ(x_prev | x_t) = N(μ̃_t(x_t, x̂_0), σ_t² I)

t is zero-based: x_t is the state after step t, x_prev the state before it, and the x_prev of t = 0 is the
image x_0. Tables are float64 and one-dimensional; a coefficient is cast once, to float32 or the images'
dtype, whichever is wider. The file knows neither networks nor diffusers; what a network's output means is
parametrization.py.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.checks import as_numbers, check_images, described
from hf_ddpm.gaussian import bits_per_dim
from hf_ddpm.shown import summary
from hf_ddpm.tables import Tables, add_scaled, narrow, wide

VarianceType = Literal["fixed_small", "fixed_large"]
# Bits/dim of its image that the chain's last x_t may hold before a start from N(0, I) is worth a warning.
PRIOR_WARNING = 0.01


@dataclass(frozen=True, eq=False)
class DiffusionProcess(Tables):
    """A chain of T Gaussian steps. Build it with `from_betas`, or from another one with `respaced`.

    Attributes:
        betas: β_t, the variance added by step t, float64, shape (T,).
        log_alphas_cumprod: log ᾱ_t, float64, shape (T,). Kept as a logarithm, so that ᾱ and 1 − ᾱ are both
            exact to the last digits at both ends of the schedule.
        timesteps: the step handed to the network for each index of this chain, int64, shape (T,).
        first_log_variance: log σ_0² of a respaced chain that keeps the full chain's convention, else None.
        original: the chain that a respaced one was made from, which the network was trained on, else None.
    """

    betas: Tensor
    log_alphas_cumprod: Tensor
    timesteps: Tensor
    first_log_variance: float | None = None
    original: "DiffusionProcess | None" = None

    @classmethod
    def from_betas(cls, betas: Tensor | np.ndarray | Sequence[float]) -> "DiffusionProcess":
        """The process with the given β_t; nothing else validates.

        Args:
            betas: T ≥ 1 numbers in (0, 1], 1-D. β = 1 is allowed at the last step only (zero terminal SNR).

        Raises:
            ValueError: the shape or a value is not as above; the message names the first culprit.
        """
        betas = as_numbers("betas", betas, "T >= 1 numbers in (0, 1]", torch.float64).clone()
        if betas.ndim != 1 or len(betas) == 0:
            raise ValueError(f"betas has shape {tuple(betas.shape)}; allowed: (T,) with T >= 1")
        wrong = ~((betas > 0) & (betas <= 1))
        wrong[:-1] |= betas[:-1] == 1
        if wrong.any():
            t = int(wrong.nonzero()[0])
            raise ValueError(
                f"betas[{t}] is {betas[t].item()}; allowed: 0 < beta < 1, and beta = 1 at the last step"
            )
        return cls(betas, torch.cumsum(torch.log1p(-betas), 0), torch.arange(len(betas), device="cpu"))

    def respaced(
        self, timesteps: Tensor | Sequence[int], first_variance: Literal["spaced", "full"] = "spaced"
    ) -> "DiffusionProcess":
        """The process that visits only the given steps; q(x_t | x_0) at the kept steps is unchanged.

            β' = 1 − ᾱ_t / ᾱ_{previous kept t}

        Args:
            timesteps: the steps to keep, in the network's numbering (`self.timesteps`), any order, no
                repeats.
            first_variance: which β̃_2 serves as σ_0² of the decoder: "spaced", this chain's own second step
                (Nichol & Dhariwal 2021), or "full", the full chain's (Bao et al. 2022).

        Raises:
            ValueError: no step, a repeated one, one that this chain does not have, or an unknown
                `first_variance`.
        """
        allowed = "whole numbers, at least one step of the chain"
        kept = as_numbers("timesteps", timesteps, allowed).flatten().sort().values
        if len(kept) == 0:
            raise ValueError(f"timesteps is empty; allowed: {allowed}")
        if kept.dtype == torch.bool:
            raise ValueError(f"timesteps are of dtype bool; allowed: {allowed}")
        if (repeated := kept[1:] == kept[:-1]).any():
            raise ValueError(f"timestep {int(kept[1:][repeated][0])} is repeated; allowed: each step once")
        index = self.index_of(kept)
        if first_variance not in ("spaced", "full"):
            raise ValueError(f"first_variance is {described(first_variance)}; allowed: 'spaced', 'full'")
        log_alphas_cumprod = self.log_alphas_cumprod[index]
        first = self.log_variance("fixed_small")[0].item() if first_variance == "full" else None
        return dataclasses.replace(
            self,
            betas=-torch.expm1(torch.diff(log_alphas_cumprod, prepend=log_alphas_cumprod.new_zeros(1))),
            log_alphas_cumprod=log_alphas_cumprod,
            timesteps=self.timesteps[index],
            first_log_variance=first,
            original=self if self.original is None else self.original,
        )

    def __len__(self) -> int:
        """T, the number of steps."""
        return self.betas.shape[0]  # len() of a tensor is slow

    def __repr__(self) -> str:
        return summary(self, self._facts)

    def _facts(self) -> list[str]:
        """What its one-line `repr` says."""
        steps = f"T={len(self)}"
        if self.original is not None:
            steps += f" of {len(self.original)}, timesteps {self.timesteps[0]}..{self.timesteps[-1]}"
        betas = f"betas {self.betas[0]:.3g} to {self.betas[-1]:.3g}"
        return [steps, betas, f"alphas_cumprod down to {self.log_alphas_cumprod[-1].exp():.3g}"]

    # Constants of q(x_t | x_0), eq. 4. Each is a float64 table of shape (T,).

    @cached_property
    def alphas(self) -> Tensor:
        """α_t = 1 − β_t."""
        return 1 - self.betas

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ_t = Π_{s≤t} α_s."""
        return self.log_alphas_cumprod.exp()

    @cached_property
    def alphas_cumprod_prev(self) -> Tensor:
        """ᾱ_{t−1}, and 1 at t = 0."""
        return torch.cat([self.betas.new_ones(1), self.alphas_cumprod[:-1]])

    @cached_property
    def sqrt_alphas_cumprod_prev(self) -> Tensor:
        """√ᾱ_{t−1}, and 1 at t = 0."""
        return self.alphas_cumprod_prev.sqrt()

    @cached_property
    def sqrt_one_minus_alphas_cumprod_prev(self) -> Tensor:
        """√(1 − ᾱ_{t−1}), and 0 at t = 0."""
        return self.one_minus_alphas_cumprod_prev.sqrt()

    @cached_property
    def sqrt_betas(self) -> Tensor:
        """√β_t."""
        return self.betas.sqrt()

    @cached_property
    def one_minus_alphas_cumprod(self) -> Tensor:
        """1 − ᾱ_t, the variance of x_t given x_0."""
        return -torch.expm1(self.log_alphas_cumprod)

    @cached_property
    def one_minus_alphas_cumprod_prev(self) -> Tensor:
        """1 − ᾱ_{t−1}, and 0 at t = 0."""
        return torch.cat([self.betas.new_zeros(1), self.one_minus_alphas_cumprod[:-1]])

    @cached_property
    def sqrt_alphas_cumprod(self) -> Tensor:
        """√ᾱ_t."""
        return (0.5 * self.log_alphas_cumprod).exp()

    @cached_property
    def sqrt_one_minus_alphas_cumprod(self) -> Tensor:
        """√(1 − ᾱ_t)."""
        return self.one_minus_alphas_cumprod.sqrt()

    @cached_property
    def snr(self) -> Tensor:
        """SNR_t = ᾱ_t / (1 − ᾱ_t)."""
        return self.alphas_cumprod / self.one_minus_alphas_cumprod

    @cached_property
    def prior_bpd_at_edges(self) -> float:
        """L_T of a pixel at ±1 in bits/dim, −½ log(1 − ᾱ_{T−1}): how far the chain's end is from N(0, I)."""
        return bits_per_dim(-0.5 * torch.log1p(-self.alphas_cumprod[-1]), 1).item()

    # Constants of q(x_prev | x_t, x_0), eqs. 6 and 7.

    @cached_property
    def posterior_variance(self) -> Tensor:
        """β̃_t = β_t (1 − ᾱ_{t−1}) / (1 − ᾱ_t); 0 at t = 0."""
        return self.betas * self.one_minus_alphas_cumprod_prev / self.one_minus_alphas_cumprod

    @cached_property
    def posterior_mean_coef_x0(self) -> Tensor:
        """c0 = √ᾱ_{t−1} β_t / (1 − ᾱ_t); 1 at t = 0."""
        return self.alphas_cumprod_prev.sqrt() * self.betas / self.one_minus_alphas_cumprod

    @cached_property
    def posterior_mean_coef_xt(self) -> Tensor:
        """c_t = √α_t (1 − ᾱ_{t−1}) / (1 − ᾱ_t); 0 at t = 0."""
        return self.sqrt_alphas * self.one_minus_alphas_cumprod_prev / self.one_minus_alphas_cumprod

    @cached_property
    def sqrt_alphas(self) -> Tensor:
        """√α_t."""
        # From the logarithms: 1 − β loses digits where a respaced β' is nearly 1.
        previous = torch.cat([self.betas.new_zeros(1), self.log_alphas_cumprod[:-1]])
        return (0.5 * (self.log_alphas_cumprod - previous)).exp()

    # Constants of p_θ(x_prev | x_t).

    def log_variance(self, variance_type: VarianceType) -> Tensor:
        """The log-variance log σ_t² of the reverse step, Ho et al. 2020, section 3.2, float64, shape (T,).

            "fixed_small": log [β̃_2, β̃_2, β̃_3, ...]        "fixed_large": log [β̃_2, β_2, β_3, ...]
            (paper's indices)

        The first entry serves the decoder L_0 alone, since β̃_1 = 0 has no logarithm; the sampler adds no
        noise there.

        Raises:
            ValueError: `variance_type` is unknown, or the chain has one step and so no β̃_2, unless it keeps
                the full chain's (`respaced(..., "full")`).
        """
        if variance_type not in ("fixed_small", "fixed_large"):
            allowed = "'fixed_small', 'fixed_large'"
            raise ValueError(f"variance_type is {described(variance_type)}; allowed: {allowed}")
        return self.log_fixed_small if variance_type == "fixed_small" else self.log_fixed_large

    @cached_property
    def sigma_small(self) -> Tensor:
        """√β̃_t, what the sampler multiplies its noise by; 0 at t = 0."""
        return self.posterior_variance.sqrt()

    @cached_property
    def sigma_large(self) -> Tensor:
        """√β_t, what the sampler multiplies its noise by; 0 at t = 0, where no noise is added."""
        return torch.cat([self.betas.new_zeros(1), self.betas[1:].sqrt()])

    @cached_property
    def log_fixed_small(self) -> Tensor:
        """See `log_variance`."""
        if self.first_log_variance is None and len(self) < 2:
            raise ValueError(
                "a chain of one step has no log-variance: its first entry is the second step's; use T >= 2"
            )
        first = (
            self.posterior_variance[1].log() if self.first_log_variance is None else self.first_log_variance
        )
        return torch.cat(
            [torch.as_tensor(first, dtype=torch.float64).view(1), self.posterior_variance[1:].log()]
        )

    @cached_property
    def log_fixed_large(self) -> Tensor:
        """See `log_variance`."""
        return torch.cat([self.log_fixed_small[:1], self.betas[1:].log()])

    @cached_property
    def log_betas(self) -> Tensor:
        """The logarithm log β_t, the upper end of a learned variance, at t = 0 too."""
        return self.betas.log()

    # The equations.

    def q_sample(self, x_0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """A draw of q(x_t | x_0), Ho et al. 2020, eq. 4.

            x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε

        Args:
            x_0: clean images in [−1, 1], shape (B, C, H, W).
            noise: ε ~ N(0, I), shape of x_0.
            t: zero-based step of each example, shape (B,) int64, or one int for all.

        Returns:
            x_t, shape and dtype of x_0 (computed in float32 or wider).

        Raises:
            ValueError: x_0 and the noise are not floating-point tensors of one shape, or t is not a step of
                the chain for each of them (steps on an accelerator are trusted to be in it).
        """
        check_images("q_sample(x_0, noise, t)", x_0=x_0, noise=noise)
        a, s = self.at(t, x_0, "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
        return narrow(add_scaled(a * wide(x_0), s, wide(noise)), x_0.dtype)

    def q_sample_prev(self, x_0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """A draw of q(x_prev | x_0), eq. 4 one step earlier; x_0 itself at t = 0. As in `q_sample`."""
        check_images("q_sample_prev(x_0, noise, t)", x_0=x_0, noise=noise)
        a, s = self.at(t, x_0, "sqrt_alphas_cumprod_prev", "sqrt_one_minus_alphas_cumprod_prev")
        return narrow(add_scaled(a * wide(x_0), s, wide(noise)), x_0.dtype)

    def q_step(self, x_prev: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """A draw of q(x_t | x_prev), Ho et al. 2020, eq. 2.

            x_t = √α_t x_prev + √β_t ε

        Args:
            x_prev: the state before step t, shape (B, C, H, W).
            noise: ε ~ N(0, I), shape of x_prev.
            t: zero-based step of each example, shape (B,) int64, or one int for all.

        Returns:
            x_t, shape and dtype of x_prev (computed in float32 or wider).

        Raises:
            ValueError: as in `q_sample`.
        """
        check_images("q_step(x_prev, noise, t)", x_prev=x_prev, noise=noise)
        root_alpha, root_beta = self.at(t, x_prev, "sqrt_alphas", "sqrt_betas")
        return narrow(add_scaled(root_alpha * wide(x_prev), root_beta, wide(noise)), x_prev.dtype)

    def predict_x0(self, x_t: Tensor, eps: Tensor, t: Tensor | int) -> Tensor:
        """x̂_0 = (x_t − √(1 − ᾱ_t) ε) / √ᾱ_t, eq. 4 solved for x_0; shapes and dtypes as in `q_sample`.

        Raises:
            ValueError: ᾱ_t = 0 (zero terminal SNR), where ε says nothing about x_0, or as in `q_sample`;
                steps on an accelerator are trusted.
        """
        check_images("predict_x0(x_t, eps, t)", x_t=x_t, eps=eps)
        a, s = self.at(t, x_t, "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
        if (step := self.first_zero(t, _level)) is not None:
            raise ValueError(
                f"alphas_cumprod is 0 at step {step}: the noise there says nothing about x_0; "
                "allowed: steps where it is positive"
            )
        return narrow(add_scaled(wide(x_t), -s, wide(eps)) / a, x_t.dtype)

    def predict_eps(self, x_t: Tensor, x_0: Tensor, t: Tensor | int) -> Tensor:
        """ε̂ = (x_t − √ᾱ_t x_0) / √(1 − ᾱ_t), eq. 4 solved for ε; shapes, dtypes, errors as in `q_sample`."""
        check_images("predict_eps(x_t, x_0, t)", x_t=x_t, x_0=x_0)
        a, s = self.at(t, x_t, "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
        return narrow(add_scaled(wide(x_t), -a, wide(x_0)) / s, x_t.dtype)

    def q_posterior_mean(self, x_0: Tensor, x_t: Tensor, t: Tensor | int) -> Tensor:
        """Mean μ̃_t of q(x_prev | x_t, x_0), Ho et al. 2020, eq. 7.

            μ̃_t = √ᾱ_{t−1} β_t / (1 − ᾱ_t) · x_0  +  √α_t (1 − ᾱ_{t−1}) / (1 − ᾱ_t) · x_t

        Args:
            x_0: clean images in [−1, 1], shape (B, C, H, W).
            x_t: noisy images at step t, shape (B, C, H, W).
            t: zero-based step of each example, shape (B,) int64, or one int for all.

        Returns:
            μ̃_t, shape (B, C, H, W), dtype of x_t (computed in float32 or wider).

        Raises:
            ValueError: as in `q_sample`.
        """
        check_images("q_posterior_mean(x_0, x_t, t)", x_0=x_0, x_t=x_t)
        c0, ct = self.at(t, x_t, "posterior_mean_coef_x0", "posterior_mean_coef_xt")
        return narrow(add_scaled(c0 * wide(x_0), ct, wide(x_t)), x_t.dtype)


def _level(process: DiffusionProcess) -> Tensor:
    return process.alphas_cumprod
