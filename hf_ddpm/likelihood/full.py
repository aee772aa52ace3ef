"""The variational bound of images in bits/dim, Ho et al. 2020, eq. 5, with every term, and what it says.

    bits/dim = (L_T + Σ_{t≥1} L_t + L_0) / (D ln 2),     rate = L_T + Σ_{t≥1} L_t,     distortion = L_0

`evaluate_bound` visits every t once; `estimate_bound` (estimator.py) a few; `rate_distortion` reads either as
a progressive code. The file knows terms and sums. It knows no data set, no folder and no process group.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hf_ddpm.checks import check_count, check_seed, described
from hf_ddpm.decoders import AnyDecoder
from hf_ddpm.gaussian import bits_per_dim, check_levels, normal_kl
from hf_ddpm.likelihood.bound import check_process, check_some, checked_options, known_term, prior_kl
from hf_ddpm.likelihood.estimator import Estimate, mean_and_stderr, randn_like
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.seeds import Use, derive_seed
from hf_ddpm.shown import count, painted, summary, with_error
from hf_ddpm.variances import AnyVariance, log_variance_table


@dataclass(frozen=True, eq=False)
class Bound:
    """The bound of each image with every term; float64, on the CPU.

    Attributes:
        terms_bpd: L_t in bits/dim, (B, T), index t; t = 0 is L_0.
        prior_bpd: L_T in bits/dim, (B,).
        x0_mse: ⟨(x̂_0 − x_0)²⟩ at each t, (B, T).
        eps_mse: ⟨(ε̂ − ε)²⟩ at each t, (B, T).
    """

    terms_bpd: Tensor
    prior_bpd: Tensor
    x0_mse: Tensor
    eps_mse: Tensor

    def __repr__(self) -> str:
        return summary(self, self._facts)

    def _facts(self) -> list[str]:
        """What its one-line `repr` says."""
        images, steps = self.terms_bpd.shape
        total = with_error(*mean_and_stderr(self.total_bpd), "bits/dim")
        return [total, count(images, "image"), f"T={steps}"]

    @property
    def rate_bpd(self) -> Tensor:
        """L_T + Σ_{t≥1} L_t, (B,)."""
        return self.prior_bpd + self.terms_bpd[:, 1:].sum(1)

    @property
    def distortion_bpd(self) -> Tensor:
        """L_0, (B,)."""
        return self.terms_bpd[:, 0]

    @property
    def total_bpd(self) -> Tensor:
        """The bound, (B,)."""
        return self.rate_bpd + self.distortion_bpd


@dataclass(frozen=True, eq=False)
class RateDistortion:
    """The bound as a progressive code, Ho et al. 2020, section 4.3; from t = 0 up, float64 on the CPU.

    Attributes:
        t: the steps, or the middles of bins of steps, (K,).
        step_bpd: bits/dim of one step there, mean over images; entry 0 is L_0, (K,).
        bpd: bits/dim received by one who knows x_t: L_T + Σ_{t'>t} L_t', (K,).
        rmse_255: 127.5 √⟨(x̂_0 − x_0)²⟩, the error of x̂_0 on the scale 0..255, (K,).
        rate_bpd: L_T + Σ_{t≥1} L_t.
        distortion_bpd: L_0.
    """

    t: Tensor
    step_bpd: Tensor
    bpd: Tensor
    rmse_255: Tensor
    rate_bpd: float
    distortion_bpd: float

    def __repr__(self) -> str:
        return summary(self, self._facts)

    def _facts(self) -> list[str]:
        """What its one-line `repr` says."""
        parts = f"{self.rate_bpd:.4g} rate + {self.distortion_bpd:.4g} distortion"
        points = f"{count(len(self.t), 'point')} in t={self.t[0].item():g}..{self.t[-1].item():g}"
        return [f"{self.rate_bpd + self.distortion_bpd:.4g} bits/dim = {parts}", points]

    def _repr_png_(self) -> bytes | None:
        """Both curves, for a notebook."""
        return painted(self)


@torch.no_grad()
def evaluate_bound(
    process: DiffusionProcess,
    model: Callable[[Tensor, Tensor], Tensor],
    x_0: Tensor,
    *,
    variance_type: AnyVariance = "fixed_large",
    prediction_type: str = "epsilon",
    clip_x0: bool = True,
    decoder: AnyDecoder = "exact",
    noise_fn: Callable[[int], Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Bound:
    """Every term of the bound once, with independent noise at each t; T network calls on the whole batch.

    Args:
        process: the chain.
        model: a denoiser (x_t, t) → output, in eval mode.
        x_0: clean images on the grid u/127.5 − 1, shape (B, C, H, W), float32 or float64.
        variance_type: as in `bound_term`.
        prediction_type: as in `bound_term`.
        clip_x0: as in `bound_term`.
        decoder: as in `bound_term`.
        noise_fn: the noise for each index t of the chain, shape of x_0, instead of fresh draws.
        generator: of the draws; it may be on the CPU when the images are not.

    Raises:
        ValueError: as in `bound_term`, or there are no images.
    """
    check_process(process, "evaluate_bound(process, model, x_0)")
    how = checked_options(process, variance_type, prediction_type, clip_x0, decoder)
    check_some("x_0", x_0)
    check_levels("x_0", x_0)
    terms = []
    for t in reversed(range(len(process))):
        noise = noise_fn(t) if noise_fn is not None else randn_like(x_0, generator)
        terms.append(known_term(process, model, x_0, t, noise, **how))
    dims = x_0[0].numel()
    nats, x0_mse, eps_mse = (
        torch.stack([getattr(term, name) for term in reversed(terms)], 1).cpu()
        for name in ("nats", "x0_mse", "eps_mse")
    )
    return Bound(bits_per_dim(nats, dims), bits_per_dim(prior_kl(process, x_0), dims).cpu(), x0_mse, eps_mse)


def image_noise(seed: int, image_indices: Sequence[int], like: Tensor) -> Callable[[int], Tensor]:
    """A `noise_fn` whose draws for an image depend on (seed, its index) alone, called for t = T−1 down to 0.

    Args:
        seed: of the draws.
        image_indices: the images' indices in their data set, (B,).
        like: the images, shape (B, ...), for shape, dtype and device.

    Raises:
        ValueError: a seed or an index below 0, or not one index for each image.
    """
    check_seed(seed)
    for index in image_indices:
        check_count("an image's index", index, 0)
    if len(image_indices) != len(like):
        raise ValueError(f"{len(image_indices)} image_indices for {len(like)} images; allowed: equal numbers")
    generators = [torch.Generator().manual_seed(derive_seed(Use.BOUND, seed, int(i))) for i in image_indices]

    def noise(t: int) -> Tensor:
        drawn = [torch.randn(like.shape[1:], generator=g, dtype=torch.float32) for g in generators]
        return torch.stack(drawn).to(like.device, like.dtype)

    return noise


def with_variance(
    result: Bound | Estimate, process: DiffusionProcess, variance_type: Literal["fixed_small", "fixed_large"]
) -> Bound | Estimate:
    """The same evaluation under the other fixed variance: x̂_0 is the same, so no network is called.

        L_t = ½ [log σ²/β̃ − 1 + β̃/σ² + c0² ⟨(x̂_0 − x_0)²⟩ / σ²] nats/dim,     t ≥ 1;     L_0 is shared

    Args:
        result: of `evaluate_bound` or `estimate_bound` with a fixed variance.
        process: the chain that it was made with.
        variance_type: the fixed variance to score it with.

    Raises:
        ValueError: the variance is not a fixed one, or an argument is of another kind.
    """
    _check_result(result)
    check_process(process, "with_variance(result, process, variance_type)")
    t = torch.arange(1, len(process)) if isinstance(result, Bound) else result.t
    mse = result.x0_mse[:, 1:] if isinstance(result, Bound) else result.x0_mse
    shift = process.posterior_mean_coef_x0[t] * mse.sqrt()
    table = log_variance_table(process, variance_type)[t]
    terms = bits_per_dim(normal_kl(shift, process.log_fixed_small[t], shift.new_zeros(()), table), 1)
    if isinstance(result, Bound):
        terms = torch.cat([result.terms_bpd[:, :1], terms], 1)
    return dataclasses.replace(result, terms_bpd=terms)


def rate_distortion(result: Bound | Estimate, num_bins: int = 40) -> RateDistortion:
    """The progressive curve: error of x̂_0 against the bits that tell x_t, Ho et al. 2020, section 4.3.

    Args:
        result: of `evaluate_bound`, for a curve over every t; or of `estimate_bound`, for one over bins of t
            that are about equally likely under its proposal, t = 0 apart.
        num_bins: at most so many bins, for an estimate.

    Raises:
        ValueError: `num_bins` is no whole number above 0, or there is no such result.
    """
    _check_result(result)
    check_count("num_bins", num_bins)
    if isinstance(result, Bound):
        bins = torch.arange(result.terms_bpd.shape[1])
        step, mse = result.terms_bpd.mean(0), result.x0_mse.mean(0)
        hits = torch.ones_like(step)
        parts = result.rate_bpd.mean().item(), result.distortion_bpd.mean().item()
    else:
        p, t = result.proposal, result.t.flatten()
        step, mse, hits = (torch.zeros_like(p) for _ in range(3))
        weight = 1 / (p[t] * max(1, len(t)))  # sums over draws become unbiased sums over t
        step.index_add_(0, t, weight * result.terms_bpd.flatten())
        mse.index_add_(0, t, weight * result.x0_mse.flatten())
        hits.index_add_(0, t, weight)
        step[0], mse[0], hits[0] = result.decoder_bpd.mean(), result.decoder_x0_mse.mean(), 1
        bins = 1 + ((p.cumsum(0) - p) * num_bins).long().clamp(0, num_bins - 1)
        bins[0] = 0
        parts = result.rate_bpd, result.distortion_bpd

    above = step.flip(0).cumsum(0).flip(0) - step
    bins = bins.unique(return_inverse=True)[1]
    count = torch.bincount(bins).double()

    def total(values: Tensor) -> Tensor:
        return torch.zeros_like(count).index_add_(0, bins, values)

    seen = total(hits) > 0
    middle = total(torch.arange(len(bins), dtype=torch.float64)) / count
    bpd = result.prior_bpd.mean() + total(above) / count
    rmse_255 = 127.5 * (total(mse) / total(hits)).sqrt()
    return RateDistortion(middle[seen], (total(step) / count)[seen], bpd[seen], rmse_255[seen], *parts)


def _check_result(result: Any) -> None:
    if not isinstance(result, Bound | Estimate):
        raise ValueError(f"result is {described(result)}; allowed: a Bound or an Estimate")
