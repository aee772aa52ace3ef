"""The exact denoiser of a finite set of images {x^i} with weights π_i: what a perfect network would answer.

    w_i(x_t) = softmax_i( log π_i + (√ᾱ_t ⟨x_t, x^i⟩ − ½ ᾱ_t ‖x^i‖²) / (1 − ᾱ_t) )        = q(x_0 = x^i | x_t)
    x̂_0(x_t) = Σ_i w_i x^i  = E[x_0 | x_t]

Sampling with it returns the images themselves. A perfect denoiser memorises; what is new in a network's
samples is the network's error. Given x_t alone, x_prev is not Gaussian but a mixture. `step` draws from it:

    q(x_prev | x_t) = Σ_i w_i N(μ̃_t(x_t, x^i), β̃_t I)

The file knows the process and the images; it learns nothing.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_ddpm.checks import as_numbers, check_count, described
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.tables import narrow, wide


class ExactDenoiser:
    """E[x_0 | x_t] for x_0 from a finite set, in the slot of a network of prediction type "sample".

    Everything is computed in float64 on the images' device (not MPS, which has none), piece by piece; x_t may
    be elsewhere.

    Args:
        process: the chain; it says which step t is. A respaced chain's network gets t of the full one, so it
            takes the denoiser of either.
        images: {x^i}, floating point in [-1, 1], shape (M, C, H, W).
        weights: π_i > 0, shape (M,), made to sum to 1; by default all equal.
        chunk_size: images looked at in one piece.

    Raises:
        ValueError: an argument is not as above.
    """

    def __init__(
        self,
        process: DiffusionProcess,
        images: Tensor,
        weights: Tensor | None = None,
        chunk_size: int = 4096,
    ):
        if not isinstance(process, DiffusionProcess):
            raise ValueError(
                f"process is {described(process)}; allowed: a DiffusionProcess; the order is "
                "ExactDenoiser(process, images)"
            )
        real = isinstance(images, Tensor) and images.is_floating_point()
        if not real or images.ndim != 4 or images.numel() == 0:
            shown = described(images)
            if isinstance(images, Tensor):
                shown = f"{images.dtype} of shape {tuple(images.shape)}"
            raise ValueError(f"images are {shown}; allowed: floating point, (M, C, H, W), at least one")
        allowed = f"{len(images)} positive numbers"
        if weights is None:
            weights = torch.ones(len(images))
        weights = as_numbers("weights", weights, allowed, torch.float64)
        if weights.shape != images.shape[:1] or not ((weights > 0) & weights.isfinite()).all():
            raise ValueError(
                f"weights have shape {tuple(weights.shape)} or are not all positive; allowed: {allowed}"
            )
        check_count("chunk_size", chunk_size)
        self.process, self.images, self._chunk_size = process, images, chunk_size
        self._log_weights = (weights / weights.sum()).log().to(images.device)
        pieces = zip(images.flatten(1).split(chunk_size), self._log_weights.split(chunk_size), strict=True)
        # Images with mean 0 have smaller products in the exponent, so that fewer digits cancel there.
        self._centre = torch.stack([log_w.exp() @ piece.double() for piece, log_w in pieces]).sum(0)

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t].

        Args:
            x_t: noisy images, shape (B, C, H, W).
            t: step of each example in the chain's `timesteps`, shape (B,), int64.

        Returns:
            x̂_0, shape, dtype and device of x_t.

        Raises:
            ValueError: a step that the chain doesn't have, or images of another shape.
        """
        peak, total, mean = (self._centre.new_tensor(start) for start in (-torch.inf, 0, 0))
        for log_w, y in self._pieces(x_t, t):
            top = torch.maximum(peak, log_w.amax(1, keepdim=True))
            kept, w = (peak - top).exp(), (log_w - top).exp()
            peak, total, mean = top, total * kept + w.sum(1, keepdim=True), mean * kept + w @ y
        answer = (self._centre + mean / total).view(len(x_t), *self.images.shape[1:])
        return narrow(answer, x_t.dtype).to(x_t.device)

    def weights(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The posterior w of every image, float64, shape (B, M), on the images' device; called as above."""
        return torch.cat([log_w for log_w, _ in self._pieces(x_t, t)], 1).softmax(1)

    def draw(self, x_t: Tensor, t: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One image's index for each example, drawn from w.

        Args:
            x_t: noisy images, shape (B, C, H, W).
            t: step of each example, shape (B,), int64.
            generator: of the draws, on any device.

        Returns:
            Indices, shape (B,), int64, on the images' device.
        """
        cumulative = self.weights(x_t, t).cumsum(1)
        device = cumulative.device if generator is None else generator.device
        uniform = torch.rand(len(x_t), 1, generator=generator, dtype=torch.float64, device=device)
        # The index is that of the first cumulative weight above u · Σw. An image of weight 0 raises the sum
        # by nothing, so it is never chosen.
        below = cumulative <= uniform.to(cumulative.device) * cumulative[:, -1:]
        return below.sum(1).clamp(max=len(self.images) - 1)

    def step(self, x_t: Tensor, t: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A draw of q(x_prev | x_t), the mixture: an image i ~ w, then x_prev ~ q(x_prev | x_t, x^i), eq. 7.

        Args:
            x_t: noisy images, shape (B, C, H, W).
            t: step of each example, shape (B,), int64; x_prev is at the step before it in this chain.
            generator: of the draws, on any device.

        Returns:
            x_prev, shape, dtype and device of x_t; at the chain's first step one of the images.
        """
        x_0 = self.images[self.draw(x_t, t, generator)].to(x_t.device)
        device = x_t.device if generator is None else generator.device
        noise = torch.randn(x_t.shape, generator=generator, dtype=wide(x_t).dtype, device=device)
        index = self.process.index_of(t)
        mean = self.process.q_posterior_mean(x_0.to(noise.dtype), wide(x_t), index)
        (sigma,) = self.process.at(index, mean, "sigma_small")
        return narrow(mean + sigma * noise.to(x_t.device), x_t.dtype)

    def _pieces(self, x_t: Tensor, t: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each piece of the set log w up to a constant, (B, m), and its centred images, (m, CHW)."""
        own = ", ".join(map(str, self.images.shape[1:]))
        if not isinstance(x_t, Tensor) or not x_t.is_floating_point():
            raise ValueError(f"x_t is {described(x_t)}; allowed: floating point, (B, {own})")
        if x_t.shape[1:] != self.images.shape[1:]:
            raise ValueError(f"x_t has shape {tuple(x_t.shape)}; allowed: (B, {own})")
        if not isinstance(t, Tensor) or t.numel() not in (1, len(x_t)):
            raise ValueError(f"t is {described(t)}; allowed: a tensor of shape ({len(x_t)},)")
        x = x_t.to(self.images.device).flatten(1).double()
        a, one_minus = self.process.at(
            self.process.index_of(t.contiguous().view(-1)).expand(len(x)),  # type: ignore[union-attr]
            x,
            "sqrt_alphas_cumprod",
            "one_minus_alphas_cumprod",
        )
        z = a * (x - a * self._centre) / one_minus
        half_snr = a**2 / (2 * one_minus)
        pieces = zip(
            self.images.flatten(1).split(self._chunk_size),
            self._log_weights.split(self._chunk_size),
            strict=True,
        )
        for piece, log_weights in pieces:
            y = piece.double() - self._centre
            yield log_weights + z @ y.T - half_snr * y.square().sum(1), y
