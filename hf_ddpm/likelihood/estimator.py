"""An unbiased estimate of the bound from a few network evaluations per image, with its standard error.

L_0 has draws of its own, and the others take one t in each of n equally likely parts of a proposal p:

    B̂ = L_T + mean_k L_0^(k) + (1/n) Σ_j L_{t_j} / p_{t_j},     E B̂ = L_T + Σ_{t≥1} E L_t + E L_0

An image's draws depend on (seed, its index) alone, so batches, processes and models see the same ones.
Importance-sampled t as in Nichol & Dhariwal 2021, section 3.3, with the optimal p_t ∝ √E L_t²; the strata,
and the proposal that needs no pilot, are ours.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.checks import as_numbers, check_count, check_seed
from hf_ddpm.decoders import AnyDecoder
from hf_ddpm.gaussian import bits_per_dim, check_levels
from hf_ddpm.likelihood.bound import check_process, check_some, checked_options, known_term, prior_kl
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.seeds import Use, derive_seed
from hf_ddpm.shown import count, summary, with_error
from hf_ddpm.variances import AnyVariance

UNIFORM_SHARE = 0.1  # of a proposal, so that no weight exceeds 10 (T − 1)
CHUNK = 2**26  # numbers of noise held at once
PIXEL_VARIANCE = 0.25  # what `default_proposal` takes for the spread that a network can't predict


@dataclass(frozen=True, eq=False)
class Estimate:
    """An unbiased estimate of the bound of each of N images, and the n + n_0 draws it is made of.

    Tensors are float64 on the CPU but for the integers.

    Attributes:
        image_indices: which images, (N,) int64.
        prior_bpd: L_T in bits/dim, (N,).
        decoder_bpd: L_0 in bits/dim at each of its draws, (N, n_0).
        decoder_x0_mse: ⟨(x̂_0 − x_0)²⟩ there, (N, n_0).
        t: the steps drawn, all ≥ 1, (N, n) int64.
        terms_bpd: L_t in bits/dim at each, not yet divided by p_t, (N, n).
        x0_mse: ⟨(x̂_0 − x_0)²⟩ there, (N, n).
        proposal: p_t that t was drawn from, (T,), 0 at t = 0 and 1 in sum.
        seed: of the draws.
    """

    image_indices: Tensor
    prior_bpd: Tensor
    decoder_bpd: Tensor
    decoder_x0_mse: Tensor
    t: Tensor
    terms_bpd: Tensor
    x0_mse: Tensor
    proposal: Tensor
    seed: int

    def __repr__(self) -> str:
        return summary(self, self._facts)

    def _facts(self) -> list[str]:
        """What its one-line `repr` says."""
        evals = self.t.shape[1] + self.decoder_bpd.shape[1]
        return [
            with_error(self.bpd, self.stderr, "bits/dim"),
            count(len(self.image_indices), "image"),
            f"{count(evals, 'evaluation')} each",
            f"T={self.proposal.shape[0]}",
            f"seed={int(self.seed)}",
        ]

    @property
    def per_image_rate_bpd(self) -> Tensor:
        """L_T + (1/n) Σ_j L_{t_j} / p_{t_j}, (N,)."""
        if self.t.shape[1] == 0:
            return self.prior_bpd
        return self.prior_bpd + (self.terms_bpd / self.proposal[self.t]).mean(1)

    @property
    def per_image_distortion_bpd(self) -> Tensor:
        """Mean over the draws of L_0, (N,)."""
        return self.decoder_bpd.mean(1)

    @property
    def per_image_bpd(self) -> Tensor:
        """The bound, (N,)."""
        return self.per_image_rate_bpd + self.per_image_distortion_bpd

    @property
    def bpd(self) -> float:
        """Mean bound over the images."""
        return mean_and_stderr(self.per_image_bpd)[0]

    @property
    def stderr(self) -> float:
        """Standard error of `bpd`: the spread of images and of draws together; NaN for one image."""
        return mean_and_stderr(self.per_image_bpd)[1]

    @property
    def rate_bpd(self) -> float:
        """Mean rate over the images."""
        return mean_and_stderr(self.per_image_rate_bpd)[0]

    @property
    def distortion_bpd(self) -> float:
        """Mean distortion over the images."""
        return mean_and_stderr(self.per_image_distortion_bpd)[0]


@torch.no_grad()
def estimate_bound(
    process: DiffusionProcess,
    model: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    *,
    num_evals_per_image: int = 20,
    num_decoder_evals: int | None = None,
    seed: int = 0,
    image_indices: Tensor | Sequence[int] | None = None,
    proposal: Tensor | None = None,
    batch_size: int = 64,
    variance_type: AnyVariance = "fixed_large",
    prediction_type: str = "epsilon",
    clip_x0: bool = True,
    decoder: AnyDecoder = "exact",
) -> Estimate:
    """The bound of each image, unbiased, from a few network evaluations.

    Args:
        process: the chain.
        model: a denoiser (x_t, t) → output, in eval mode.
        images: clean images on the grid u/127.5 − 1, shape (N, C, H, W), float32 or float64.
        num_evals_per_image: network evaluations per image, n + n_0, with n ≥ 1.
        num_decoder_evals: n_0, how many of them are spent on L_0; by default one in six, at least one.
        seed: with an image's index, of its draws.
        image_indices: the images' indices in their data set, (N,), by default 0..N−1.
        proposal: p_t for t ≥ 1 up to a factor, (T,), entry 0 unused; by default `default_proposal`, which is
            the same for all models of a process. It must not depend on these draws.
        batch_size: the network sees at most so many x_t at once.
        variance_type: as in `bound_term`.
        prediction_type: as in `bound_term`.
        clip_x0: as in `bound_term`.
        decoder: as in `bound_term`.

    Raises:
        ValueError: as in `bound_term`, a number that is none or too small, or a proposal that is not
            positive.
    """
    check_process(process, "estimate_bound(process, model, images)")
    how = checked_options(process, variance_type, prediction_type, clip_x0, decoder)
    n_0, p, indices = _plan(process, images, num_evals_per_image, num_decoder_evals, image_indices, proposal)
    check_count("batch_size", batch_size)
    check_seed(seed)
    check_levels("images", images)

    parts, dims = [], images[0].numel()
    per_chunk = max(1, min(batch_size, CHUNK // (num_evals_per_image * dims)))
    for start in range(0, len(images), per_chunk):
        x_0, chunk = images[start : start + per_chunk], indices[start : start + per_chunk]
        draws = [_draws(seed, int(i), p, num_evals_per_image - n_0, n_0, x_0.shape[1:]) for i in chunk]
        t, noise = torch.cat([t for t, _ in draws]), torch.cat([noise for _, noise in draws])
        owner = torch.arange(len(x_0)).repeat_interleave(num_evals_per_image)
        found = []
        for place in torch.arange(len(t)).split(batch_size):
            x, eps = x_0[owner[place].to(x_0.device)], noise[place].to(x_0.device, x_0.dtype)
            term = known_term(process, model, x, t[place].to(x_0.device), eps, **how)
            found.append(torch.stack([term.nats, term.x0_mse]).cpu())
        nats, mse = torch.cat(found, 1).view(2, len(x_0), num_evals_per_image)
        parts.append((chunk, prior_kl(process, x_0).cpu(), t.view_as(nats), nats, mse))
    chunk, prior, t, nats, mse = (torch.cat(column) for column in zip(*parts, strict=True))
    bpd = bits_per_dim(nats, dims)
    return Estimate(
        image_indices=chunk.long(),
        prior_bpd=bits_per_dim(prior, dims),
        decoder_bpd=bpd[:, :n_0],
        decoder_x0_mse=mse[:, :n_0],
        t=t[:, n_0:],
        terms_bpd=bpd[:, n_0:],
        x0_mse=mse[:, n_0:],
        proposal=p,
        seed=seed,
    )


def _plan(
    process: DiffusionProcess,
    images: Tensor,
    num_evals_per_image: int,
    num_decoder_evals: int | None,
    image_indices: Tensor | Sequence[int] | None,
    proposal: Tensor | None,
) -> tuple[int, Tensor, Tensor]:
    """How many evaluations L_0 gets, p_t, and the images' indices; errors as in `estimate_bound`."""
    check_some("images", images)
    check_count("num_evals_per_image", num_evals_per_image)
    if num_decoder_evals is not None:
        check_count("num_decoder_evals", num_decoder_evals)
    steps = len(process)
    n_0 = decoder_evals(num_evals_per_image) if num_decoder_evals is None else num_decoder_evals
    if steps == 1:
        n_0 = num_evals_per_image  # nothing else to evaluate
    if n_0 < 1 or num_evals_per_image < n_0 + (steps > 1):
        raise ValueError(
            f"num_evals_per_image is {num_evals_per_image} with {n_0} for L_0; allowed: at least one for L_0 "
            "and one for the other steps"
        )
    p = default_proposal(process) if proposal is None else _normalised(proposal, steps)
    allowed = f"{len(images)} whole numbers >= 0, one for each image"
    indices = torch.arange(len(images))
    if image_indices is not None:
        indices = as_numbers("image_indices", image_indices, allowed)
    whole = not (indices.is_floating_point() or indices.dtype == torch.bool)
    if not whole or indices.shape != (len(images),) or (indices < 0).any():
        raise ValueError(
            f"image_indices are {tuple(indices.shape)} {indices.dtype} or below 0; allowed: {allowed}"
        )
    return n_0, p, indices


def decoder_evals(num_evals_per_image: int) -> int:
    """How many of an image's evaluations are spent on L_0 if nobody says: one in six, at least one."""
    return max(1, round(num_evals_per_image / 6))


def default_proposal(process: DiffusionProcess) -> Tensor:
    """A proposal without a pilot: p_t ∝ L_t of Gaussian data of variance 1/4, with a share of uniform.

        mse_t = 1 / (4 + SNR_t),     L_t = ½ log(1 + c0² mse_t / β̃_t)  at the optimal variance

    It is the same for all models and variances of a process, so their estimates compare by paired difference.

    Args:
        process: the chain.

    Returns:
        p_t, (T,) float64 on the CPU, 0 at t = 0 and 1 in sum over t ≥ 1.
    """
    if len(process) < 2:
        return torch.zeros(len(process), dtype=torch.float64)
    mse = 1 / (1 / PIXEL_VARIANCE + process.snr)
    gain = process.posterior_mean_coef_x0.square() * mse / process.log_fixed_small.exp()
    return _mixed(torch.log1p(gain)[1:])


@torch.no_grad()
def pilot_proposal(
    process: DiffusionProcess,
    model: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    *,
    num_steps: int = 20,
    seed: int = 0,
    batch_size: int = 64,
    variance_type: AnyVariance = "fixed_large",
    prediction_type: str = "epsilon",
    clip_x0: bool = True,
    decoder: AnyDecoder = "exact",
) -> Tensor:
    """A proposal for `estimate_bound` from a few images: p_t ∝ √E L_t², with a share of uniform.

    √E L_t² is measured on a grid of steps, even in log t, and interpolated in log-log. Any images serve, the
    evaluated ones too: their draws there are fresh.

    Args:
        process: the chain.
        model: a denoiser (x_t, t) → output.
        images: a few clean images, as in `estimate_bound`, shape (M, C, H, W); the pilot costs at most
            M · num_steps evaluations.
        num_steps: grid points.
        seed: of the pilot's noise.
        batch_size: the network sees at most so many x_t at once.
        variance_type: as in `bound_term`.
        prediction_type: as in `bound_term`.
        clip_x0: as in `bound_term`.
        decoder: as in `bound_term`.

    Returns:
        p_t, (T,) float64 on the CPU, 0 at t = 0 and 1 in sum over t ≥ 1.

    Raises:
        ValueError: as in `estimate_bound`.
    """
    check_process(process, "pilot_proposal(process, model, images)")
    how = checked_options(process, variance_type, prediction_type, clip_x0, decoder)
    check_some("images", images)
    check_count("num_steps", num_steps)
    check_count("batch_size", batch_size)
    check_seed(seed)
    check_levels("images", images)
    last = len(process) - 1
    if last < 1:
        return torch.zeros(last + 1, dtype=torch.float64)
    grid = np.unique(np.round(np.geomspace(1, last, num_steps)).astype(int))
    generator = torch.Generator().manual_seed(derive_seed(Use.PILOT, seed))
    squares = []
    for t in grid.tolist():
        noise = randn_like(images, generator)
        pieces = zip(images.split(batch_size), noise.split(batch_size), strict=True)
        nats = torch.cat([known_term(process, model, x, t, eps, **how).nats for x, eps in pieces])
        squares.append(nats.square().mean().item() + 1e-300)  # a term may be exactly 0
    if not np.isfinite(squares).all():
        raise ValueError("the pilot's terms are not finite: the model's answers are not")
    log_rms = np.interp(np.log(np.arange(1, last + 1)), np.log(grid), 0.5 * np.log(squares))
    return _mixed(torch.from_numpy(np.exp(log_rms)))


def mean_and_stderr(values: Tensor) -> tuple[float, float]:
    """Mean over images and its standard error, std(ddof=1)/√N; NaN for one image.

    Right for any scheme within an image, as long as images are drawn independently.
    """
    return values.mean().item(), values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan


def paired_difference(a: Estimate, b: Estimate) -> tuple[float, float]:
    """Mean of B̂ − B̂' over the same images with the same draws, and its standard error, in bits/dim.

    Raises:
        ValueError: the estimates are not of the same images, or not made with the same draws.
    """
    same = {name: torch.equal(getattr(a, name), getattr(b, name)) for name in ("image_indices", "t")}
    same |= {"seed": a.seed == b.seed, "decoder draws": a.decoder_bpd.shape == b.decoder_bpd.shape}
    for name, equal in same.items():
        if not equal:
            raise ValueError(
                f"the estimates differ in {name}; allowed: same images, seed, number and proposal"
            )
    return mean_and_stderr(a.per_image_bpd - b.per_image_bpd)


def randn_like(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Noise in float32 or float64, as wide as the images; drawn on the generator's device."""
    place = like.device if generator is None else generator.device
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.randn(like.shape, generator=generator, device=place, dtype=dtype).to(like.device, like.dtype)


def _mixed(weights: Tensor) -> Tensor:
    """The proposal (T,) from weights of t = 1..T−1, with its share of uniform."""
    p = (1 - UNIFORM_SHARE) * weights / weights.sum().clamp(min=1e-300) + UNIFORM_SHARE / len(weights)
    return _normalised(torch.cat([p.new_zeros(1), p]), len(p) + 1)


def _normalised(proposal: Tensor, steps: int) -> Tensor:
    """p_t over t ≥ 1 as float64 (T,), with 0 at t = 0."""
    p = as_numbers("proposal", proposal, f"({steps},) numbers", torch.float64).clone()
    if p.shape != (steps,):
        raise ValueError(f"proposal has shape {tuple(p.shape)}; allowed: ({steps},)")
    p[0] = 0
    wrong = ~((p > 0) & p.isfinite())
    wrong[0] = False
    if wrong.any():
        t = int(wrong.nonzero()[0])
        raise ValueError(f"proposal[{t}] is {p[t].item()}; allowed: finite and positive for every t >= 1")
    return p / p.sum() if steps > 1 else p


def _draws(seed: int, index: int, p: Tensor, n: int, n_0: int, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """An image's steps, n_0 zeros and one in each of n equally likely parts, and its noise (n_0 + n, ...)."""
    generator = torch.Generator().manual_seed(derive_seed(Use.ESTIMATE, seed, index))
    u = torch.rand(n, generator=generator, dtype=torch.float64)
    where = (torch.arange(n, dtype=torch.float64) + u) / max(n, 1)
    t = torch.searchsorted(p.cumsum(0), where, right=True).clamp(1, max(1, len(p) - 1))
    noise = torch.randn((n_0 + n, *shape), generator=generator, dtype=torch.float32)
    return torch.cat([t.new_zeros(n_0), t]), noise
