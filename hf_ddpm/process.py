"""The diffusion process: the single source of truth for every constant of q and p.

    q(x_t | x_prev) = N(√α_t x_prev, β_t I)       q(x_t | x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I),  ᾱ_t = Π_{s≤t} α_s
    q(x_prev | x_t, x_0) = N(μ̃_t, β̃_t I)          p_θ(x_prev | x_t) = N(μ̃_t(x_t, x̂_0), σ_t² I)

    process = DiffusionProcess.linear(1000)             β_t of the paper; .cosine(1000), .from_betas(betas)
    x_t = process.q_sample(x_0, noise, t)               eq. 4: noise added in one go
    x_prev = process.p_sample(x_t, t, model)            algorithm 2: one step back

t is zero-based: x_t is the state after step t, x_prev the state before it, and the x_prev of t = 0 is the
image x_0. Tables are float64 and one-dimensional; a coefficient is cast once, to float32 or the images'
dtype, whichever is wider. The file knows no network and not diffusers; what a network's output may mean
besides ε and x_0 is parametrization.py.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.checks import as_numbers, check_images, described
from hf_ddpm.denoiser import as_denoiser
from hf_ddpm.gaussian import bits_per_dim
from hf_ddpm.schedules import make_betas
from hf_ddpm.seeds import draw_noise
from hf_ddpm.shown import summary
from hf_ddpm.spelling import suggest_keywords, tutorial_hint
from hf_ddpm.tables import Tables, add_scaled, narrow, wide

VarianceType = Literal["fixed_small", "fixed_large"]
MAKERS = "DiffusionProcess.linear(1000), .cosine(1000) or .from_betas(betas)"
# Bits/dim of its image that the chain's last x_t may hold before a start from N(0, I) is worth a warning.
PRIOR_WARNING = 0.01


@partial(suggest_keywords, instead=MAKERS)
@dataclass(frozen=True, eq=False)
class DiffusionProcess(Tables):
    """A chain of T Gaussian steps. `linear`, `cosine` and `from_betas` make one, `respaced` a shorter one.

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

    def __post_init__(self) -> None:
        if not all(
            isinstance(table, Tensor) for table in (self.betas, self.log_alphas_cumprod, self.timesteps)
        ):
            raise TypeError(f"DiffusionProcess(...) is not called by its users; call {MAKERS}")

    @classmethod
    @suggest_keywords
    def linear(
        cls, num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> "DiffusionProcess":
        """The process whose β_t grow linearly, by default that of Ho et al. 2020, section 4.

        Args:
            num_train_timesteps: T, at least 1.
            beta_start: the first β, in (0, 1).
            beta_end: the last β, in (0, 1]. The defaults are made for T = 1000: at the end of a shorter chain
                x_t still knows its image (`prior_bpd_at_edges`).

        Raises:
            ValueError: an argument is not as above.
        """
        betas = make_betas("linear", num_train_timesteps, beta_start, beta_end)
        for name, beta in (("beta_start", beta_start), ("beta_end", beta_end)):
            if not 0 < beta <= 1:
                raise ValueError(f"{name} is {described(beta)}; allowed: numbers in (0, 1]")
        return cls.from_betas(betas)

    @classmethod
    @suggest_keywords
    def cosine(cls, num_train_timesteps: int = 1000) -> "DiffusionProcess":
        """The process with the cosine schedule of Nichol & Dhariwal 2021, eq. 17, for any T.

        Args:
            num_train_timesteps: T, at least 1.

        Raises:
            ValueError: it is not.
        """
        return cls.from_betas(make_betas("squaredcos_cap_v2", num_train_timesteps))

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

    if not TYPE_CHECKING:  # type checkers would read it as saying that a process has every name

        def __getattr__(self, name: str) -> Any:
            """Nothing: it is asked for what a process doesn't have, and says what does a tutorial's name."""
            words = f"{type(self).__name__!r} object has no attribute {name!r}{tutorial_hint(name)}"
            raise AttributeError(words, name=name, obj=self)

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
        _check_variance(variance_type)
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

    @suggest_keywords
    def q_sample(
        self,
        x_0: Tensor,
        noise: Tensor | None = None,
        t: Tensor | int | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """A draw of q(x_t | x_0), Ho et al. 2020, eq. 4: `q_sample(x_0, noise, t)`, or `q_sample(x_0, t=t)`.

            x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε

        Args:
            x_0: clean images in [−1, 1], shape (B, C, H, W).
            noise: ε ~ N(0, I), shape of x_0; drawn here if it is left out.
            t: zero-based step of each example, shape (B,) int64, or one int for all. It can't be left out.
            generator: of the noise that is drawn here, by default torch's global one.

        Returns:
            x_t, shape and dtype of x_0 (computed in float32 or wider).

        Raises:
            ValueError: x_0 and the noise are not floating-point tensors of one shape, t is not a step of the
                chain for each of them (steps on an accelerator are trusted to be in it), or there are both
                noise and a generator.
        """
        tables = "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"
        return self._noised("q_sample", "x_0", x_0, noise, t, generator, tables)

    @suggest_keywords
    def q_sample_prev(
        self,
        x_0: Tensor,
        noise: Tensor | None = None,
        t: Tensor | int | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """A draw of q(x_prev | x_0), eq. 4 one step earlier; x_0 itself at t = 0. As in `q_sample`."""
        tables = "sqrt_alphas_cumprod_prev", "sqrt_one_minus_alphas_cumprod_prev"
        return self._noised("q_sample_prev", "x_0", x_0, noise, t, generator, tables)

    @suggest_keywords
    def q_step(
        self,
        x_prev: Tensor,
        noise: Tensor | None = None,
        t: Tensor | int | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """A draw of q(x_t | x_prev), Ho et al. 2020, eq. 2.

            x_t = √α_t x_prev + √β_t ε

        Args:
            x_prev: the state before step t, shape (B, C, H, W).
            noise: as in `q_sample`, and so the others.
            t: zero-based step of each example, shape (B,) int64, or one int for all.
            generator: of the noise that is drawn here.

        Returns:
            x_t, shape and dtype of x_prev (computed in float32 or wider).

        Raises:
            ValueError: as in `q_sample`.
        """
        tables = "sqrt_alphas", "sqrt_betas"
        return self._noised("q_step", "x_prev", x_prev, noise, t, generator, tables)

    def _noised(
        self,
        name: str,
        of: str,
        x: Tensor,
        noise: Tensor | None,
        t: Any,
        generator: torch.Generator | None,
        tables: tuple[str, str],
    ) -> Tensor:
        """The images by the first table and noise by the second; names for errors: the method, the images."""
        if noise is None:
            if t is None:
                raise ValueError(f"t is missing; allowed: {name}({of}, t=t), or {name}({of}, noise, t)")
            check_images(f"{name}({of}, noise, t)", **{of: x})
            self._check_index(t, x)
            noise = draw_noise(x, generator)
        elif generator is not None:
            raise ValueError("there are noise and a generator; allowed: one of them")
        else:
            order = f"{name}({of}, noise, t), or {name}({of}, t=t) to draw the noise"
            check_images(order, **{of: x, "noise": noise})
        a, s = self.at(t, x, *tables)
        return narrow(add_scaled(a * wide(x), s, wide(noise)), x.dtype)

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

    @suggest_keywords
    @torch.no_grad()
    def p_sample(
        self,
        x_t: Tensor,
        t: Tensor | int,
        model: Callable[..., Any] | Tensor,
        *,
        prediction_type: Literal["epsilon", "sample"] = "epsilon",
        variance_type: VarianceType = "fixed_small",
        clip_x0: bool = True,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """A draw of p_θ(x_prev | x_t), Ho et al. 2020: one step of algorithm 2. At t = 0 it adds no noise.

            x_prev = μ̃_t(x_t, x̂_0) + σ_t z,      x̂_0 = (x_t − √(1 − ᾱ_t) ε_θ(x_t, t)) / √ᾱ_t,      z ~ N(0, I)

        With `clip_x0=False` this is line 4 of the algorithm. A whole sample is

            x = torch.randn(16, 1, 28, 28)
            for t in reversed(range(len(process))):
                x = process.p_sample(x, t, model)

        `DDPMPipeline` does that with any sampler, and `DDPMScheduler.step` is one step with diffusers' words.

        Args:
            x_t: the state after step t, shape (B, C, H, W).
            t: zero-based step of each example, shape (B,) int64, or one int for all.
            model: the network, a function (x_t, t) → ε̂ or an `nn.Module`, as `as_denoiser` takes it; or its
                answer, a tensor of the shape of x_t.
            prediction_type: what it answers: "epsilon", ε̂, or "sample", x̂_0. What another network answers,
                `parametrization.to_x0` turns into the latter.
            variance_type: of σ_t²: "fixed_small" for β̃_t, the tutorials' and `DDPMScheduler`'s default, or
                "fixed_large" for β_t.
            clip_x0: clip x̂_0 to [−1, 1], as the published samplers and `DDPMScheduler` do.
            generator: of the noise z, by default torch's global one. At a t that is 0 for every example
                nothing is drawn.

        Returns:
            x_prev, shape and dtype of x_t (computed in float32 or wider), without a gradient.

        Raises:
            ValueError: an argument is not as above, or "epsilon" at ᾱ_t = 0 (zero terminal SNR), where ε says
                nothing about x_0.
        """
        order = "p_sample(x_t, t, model)"
        check_images(order, x_t=x_t)
        self._check_index(t, x_t)
        if prediction_type not in ("epsilon", "sample"):
            raise ValueError(
                f"prediction_type is {described(prediction_type)}; allowed: 'epsilon', 'sample' (which "
                "parametrization.to_x0 makes of the others)"
            )
        _check_variance(variance_type)
        output = model if isinstance(model, Tensor) else self._asked(model, x_t, t)
        check_images(order, x_t=x_t, **{"the model's answer": output})
        x, x_0 = wide(x_t), wide(output)
        if prediction_type == "epsilon":
            x_0 = self.predict_x0(x, x_0, t)
        mean = self.q_posterior_mean(x_0.clamp(-1, 1) if clip_x0 else x_0, x, t)
        last = t == 0 if not isinstance(t, Tensor) else t.device.type == "cpu" and not t.any()
        if not last:
            sigma = "sigma_small" if variance_type == "fixed_small" else "sigma_large"
            mean = add_scaled(mean, self.at(t, x, sigma)[0], wide(draw_noise(x_t, generator)))
        return narrow(mean, x_t.dtype)

    def _asked(self, model: Callable[..., Any], x_t: Tensor, t: Tensor | int) -> Tensor:
        """The model's answer, which gets the step of each example in the network's numbering."""
        steps = (
            t.reshape(-1).to(x_t.device) if isinstance(t, Tensor) else torch.tensor([t], device=x_t.device)
        )
        return as_denoiser(model)(x_t, self.timesteps_at(steps).expand(len(x_t)))


def _check_variance(variance_type: Any) -> None:
    if variance_type not in ("fixed_small", "fixed_large"):
        allowed = "'fixed_small', 'fixed_large'"
        raise ValueError(f"variance_type is {described(variance_type)}; allowed: {allowed}")


def _level(process: DiffusionProcess) -> Tensor:
    return process.alphas_cumprod
