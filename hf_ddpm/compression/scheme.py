"""Bit-Swap along the chain (Kingma et al. 2019): images become bits at the rate of the variational bound.

The latents are z_t = k_t δ_t with whole k_t, and u are the grey levels of the images. With the words of
coder.py:

    encode:  draw k_0 ~ Q(z_0 | x_0);  push u ~ P(u | z_0)
             for t = 1 .. K−1:  draw k_t ~ Q(z_t | z_{t−1});  push k_{t−1} ~ P(z_{t−1} | z_t)
             push k_{K−1} ~ N(0, 1)
    decode:  the same lines backwards; push becomes pop, and draw becomes undraw

    Q(z_0 | x_0) = N(√ᾱ_0 x_0, 1 − ᾱ_0)            Q(z_t | z_{t−1}) = N(√α_t z_{t−1}, β_t)
    P(z_{t−1} | z_t) = N(c0 x̂_0 + c_t z_t, σ_t²)   P(u | z_0) = the decoder L_0
    δ_t = r min(std of Q, least std of P)

Both ways ask the network once per step and image. What is drawn comes back when the images are decoded, so
that the bits that stay are on average those of the bound,

    E[bits] = (L_T + Σ L_t + L_0) / ln 2,

which is how bits-back coding (Hinton & van Camp 1993) makes a code of a bound (Ho et al. 2020, eq. 5).

Whoever decodes has to come to the same laws, to the last bit. So a law depends on the network's answer only
through whole numbers: the mean in parts of a bin, a group of the variances, and the place of x̂_0 among 64
places per grey level. The rest is tables, which are made once. The file knows the mathematics, and no files.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.checks import described
from hf_ddpm.compression.coder import (
    LEVELS,
    TAIL,
    BinnedNormal,
    Categories,
    GridNormal,
    PixelLaw,
    Stack,
)
from hf_ddpm.decoders import AnyDecoder, LevelsDecoder
from hf_ddpm.parametrization import parametrization, to_x0
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.shown import fields_line
from hf_ddpm.variances import (
    LEARNED,
    AnyVariance,
    VarianceByValue,
    check_scored,
    log_variance_table,
    value_bins,
    variance,
)

BIN_WIDTH = 1.0  # r: of the latents' bins, in units of the smaller of the two standard deviations
PARTS = 32  # M: into how many parts a bin is divided for the means
PLACES = 64  # of x̂_0, per grey level
LAST_PLACE = (LEVELS - 1) * PLACES
BLOCK = 256  # places whose laws are made at once, always the same ones, as sums depend on their neighbours
# Variances that a network learns: log σ² in steps of 1/32, from e^−40 to e^10
LEARNED_STEPS, LEAST_LEARNED, MOST_LEARNED = 32, -40, 10
ANSWER_PLACES = 2**24  # per unit of x̂_0, in which answers in float64 are compared


class WrongAnswer(ValueError):
    """The network answered something that no image can be coded with."""


@dataclass(frozen=True, eq=False)
class Chain:
    """A chain and a network, ready to code images; made of what both who encode and who decode know.

    Attributes:
        process: the chain of K steps, respaced or whole.
        model: a denoiser (x_t, t) → output, t as the network counts; where images have labels, (x_t, t,
            labels) → output.
        shape: (C, H, W) of the images.
        prediction_type: what the network predicts.
        variance: of the reverse steps, as a bound takes it: a name, or numbers that were measured.
        decoder: "exact" or a `LevelsDecoder`.
        clip_x0: clip x̂_0 to [−1, 1].
        dtype: in which the network is asked.
        bin_width: r.
        parts: M.
        asked: called with the number of images after each question to the network, for progress.

    Raises:
        ValueError: a variance or a decoder that doesn't go with the chain.
    """

    process: DiffusionProcess
    model: Callable[..., Tensor]
    shape: tuple[int, int, int]
    prediction_type: str = "epsilon"
    variance: AnyVariance = "fixed_large"
    decoder: AnyDecoder = "exact"
    clip_x0: bool = True
    dtype: torch.dtype = torch.float64
    bin_width: float = BIN_WIDTH
    parts: int = PARTS
    asked: Callable[[int], object] = lambda images: None

    __repr__ = fields_line

    def __post_init__(self) -> None:
        parametrization(self.prediction_type)
        check_scored(self.process, self.variance)
        if self.decoder != "exact" and not isinstance(self.decoder, LevelsDecoder):
            raise ValueError(f"decoder is {self.decoder!r}; allowed: 'exact', or a LevelsDecoder")
        if isinstance(self.decoder, LevelsDecoder) and len(self.decoder.log_levels) != self.shape[0]:
            raise ValueError(
                f"the decoder levels has grey levels of {len(self.decoder.log_levels)} channels; allowed: "
                f"the images' {self.shape[0]}"
            )

    def __len__(self) -> int:
        """K, the number of steps."""
        return len(self.process)

    @property
    def dims(self) -> int:
        """C·H·W."""
        return math.prod(self.shape)

    @property
    def learns(self) -> bool:
        """Whether the network learns the variances."""
        return isinstance(self.variance, str) and self.variance in LEARNED

    # Tables, each (K,) or (K, G) for G groups of pixels, float64

    @cached_property
    def std_q(self) -> np.ndarray:
        """The standard deviation of Q(z_t | z_{t−1}), and of Q(z_0 | x_0) at t = 0, (K,)."""
        return self.process.betas.sqrt().numpy()

    @cached_property
    def scale_q(self) -> np.ndarray:
        """What multiplies z_{t−1}, or x_0, in the mean of Q, (K,)."""
        return self.process.sqrt_alphas.numpy()

    @cached_property
    def std_p(self) -> np.ndarray:
        """σ_t of P(z_{t−1} | z_t), and the σ of the Gaussian decoder at t = 0, for each group, (K, G)."""
        own = self.variance
        if self.learns:
            steps = (MOST_LEARNED - LEAST_LEARNED) * LEARNED_STEPS
            log_variance = LEAST_LEARNED + torch.arange(steps + 1, dtype=torch.float64) / LEARNED_STEPS
            return (0.5 * log_variance).exp().expand(len(self), -1).numpy()
        if isinstance(own, VarianceByValue):
            table = own.log_variance
        elif isinstance(own, Tensor):
            table = own.double().cpu()[:, None]
        else:
            table = log_variance_table(self.process, own)[:, None]
        return (0.5 * table).exp().numpy()

    @cached_property
    def least_std_p(self) -> np.ndarray:
        """The least standard deviation of P(z_t | z_{t+1}), 1 at t = K − 1, (K,)."""
        least = self.std_p.min(1)
        if self.learns:
            least = (0.5 * self.process.log_fixed_small).exp().numpy()
        return np.append(least[1:], 1.0)

    @cached_property
    def delta(self) -> np.ndarray:
        """δ_t, the width of the bins of z_t, (K,)."""
        return self.bin_width * np.minimum(self.std_q, self.least_std_p)

    @cached_property
    def _laws(self) -> "PixelLaws":
        return PixelLaws(self.decoder, self.std_p[0])

    @cached_property
    def digest(self) -> str:
        """Sixteen hex digits of all tables that the laws are made of, to the last bit."""
        coefficients = self.process.posterior_mean_coef_x0, self.process.posterior_mean_coef_xt
        tables = [self.std_q, self.scale_q, self.std_p, self.delta, *(z.numpy() for z in coefficients)]
        if isinstance(self.decoder, LevelsDecoder):
            tables += [self.decoder.log_levels.numpy(), self.decoder.log_sigma.numpy()]
        found = hashlib.sha256(f"{self.prediction_type} {self.clip_x0} {self.parts} {self.shape}".encode())
        for table in tables:
            found.update(np.ascontiguousarray(table, dtype="<f8").tobytes())
        return found.hexdigest()[:16]

    # Laws

    def q_law(self, t: int, before: np.ndarray) -> GridNormal:
        """The law of k_t given z_{t−1}, or given x_0 at t = 0, (n,)."""
        std = np.full(before.size, self.std_q[t] / self.delta[t])
        return self._law(t, self.scale_q[t] * before.ravel(), std)

    def p_law(self, t: int, z: np.ndarray, labels: np.ndarray | None = None) -> GridNormal:
        """The law of k_{t−1} given z_t, (B, C, H, W), for t ≥ 1; the network is asked."""
        mean_x0, groups = self.answer(z, t, labels)
        self.asked(len(z))
        c0 = self.process.posterior_mean_coef_x0[t].item()
        ct = self.process.posterior_mean_coef_xt[t].item()
        std = self.std_p[t][groups.ravel()] / self.delta[t - 1]
        return self._law(t - 1, c0 * mean_x0.ravel() + ct * z.ravel(), std)

    def prior_law(self, number: int) -> GridNormal:
        """The law of k_{K−1} for so many pixels, N(0, 1)."""
        last = len(self) - 1
        return self._law(last, np.zeros(number), np.full(number, 1.0 / self.delta[last]))

    def pixel_law(self, z: np.ndarray, labels: np.ndarray | None = None) -> PixelLaw:
        """The law of the grey levels given z_0, (B, C, H, W); the network is asked."""
        mean_x0, groups = self.answer(z, 0, labels)
        self.asked(len(z))
        return self._laws.at(mean_x0, groups)

    def _law(self, t: int, mean: np.ndarray, std: np.ndarray) -> GridNormal:
        places = np.rint(mean * (self.parts / self.delta[t]))
        if not np.abs(places).max(initial=0) < 2.0**50:  # nor is NaN
            raise WrongAnswer("the network's answer makes a mean that is not finite, or far too large")
        window = math.ceil(TAIL * std.max(initial=1.0)) + 2
        return GridNormal(places.astype(np.int64), self.parts, std, window)

    @torch.no_grad()
    def answer(
        self, z: np.ndarray, t: int, labels: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """What the network says of z_t.

        Args:
            z: z_t, (B, C, H, W), float64.
            t: index into the chain.
            labels: of the images, (B,), int64, where the model takes them.

        Returns:
            x̂_0, clipped if the chain clips, float64, and the group of each pixel's variance, int64, both
            (B, C, H, W).

        Raises:
            WrongAnswer: it is not finite.
        """
        x_t = torch.from_numpy(np.ascontiguousarray(z))
        steps = self.process.timesteps[t].expand(len(x_t)).clone()
        given = () if labels is None else (torch.from_numpy(labels),)
        output = self.model(x_t.to(self.dtype), steps, *given)
        channels = self.shape[0]
        if not isinstance(output, Tensor) or output.shape not in (
            x_t.shape,
            (len(x_t), 2 * channels, *self.shape[1:]),
        ):
            raise WrongAnswer(f"the network answered {described(output)}; allowed: the shape of its images")
        output = output.double()
        mean_x0 = to_x0(self.process, self.prediction_type, output[:, :channels], x_t, t)
        if self.clip_x0:
            mean_x0 = mean_x0.clamp(-1, 1)
        if not mean_x0.isfinite().all():
            step = int(self.process.timesteps[t])
            raise WrongAnswer(f"the network's answer at step {step} is not finite; allowed: finite numbers")
        groups = torch.zeros_like(mean_x0, dtype=torch.int64)
        if self.learns:
            kind: Any = variance(self.variance)  # type: ignore[arg-type]
            log_variance = kind.from_output(self.process, output[:, channels:], t)
            place = ((log_variance - LEAST_LEARNED) * LEARNED_STEPS).round()
            if not place.isfinite().all():
                raise WrongAnswer("a variance of the network is not finite; allowed: finite numbers")
            groups = place.clamp(0, self.std_p.shape[1] - 1).long()
        elif self.std_p.shape[1] > 1:
            groups = value_bins(mean_x0)
        return mean_x0.numpy(), groups.numpy()

    # Both ways

    def encode(self, stack: Stack, images: np.ndarray, labels: np.ndarray | None = None) -> None:
        """Put images on a stack.

        Args:
            stack: it needs about 2.6 to 3.6 + 2 log2 1/r bits for each of their numbers to draw from.
            images: grey levels, (B, C, H, W), uint8.
            labels: as in `answer`.

        Raises:
            Exhausted: the stack has too few bits; what it holds is then of no use.
            WrongAnswer: the network's answer is not finite.
        """
        shape, number = images.shape, images.size
        k = stack.draw(self.q_law(0, images.astype(np.float64) / 127.5 - 1))
        z = (k * self.delta[0]).reshape(shape)
        stack.push(images.ravel().astype(np.int64), self.pixel_law(z, labels))
        for t in range(1, len(self)):
            later = stack.draw(self.q_law(t, z))
            z = (later * self.delta[t]).reshape(shape)
            stack.push(k, self.p_law(t, z, labels))
            k = later
        stack.push(k, self.prior_law(number))

    def decode(self, stack: Stack, number: int, labels: np.ndarray | None = None) -> np.ndarray:
        """Take images off a stack that `encode` put there as one batch.

        Args:
            stack: it is then as it was before.
            number: B, how many images the batch has.
            labels: as in `answer`.

        Returns:
            Grey levels, (B, C, H, W), uint8.

        Raises:
            Exhausted: they are not on it, or the network answers something else than it did.
            WrongAnswer: the network's answer is not finite.
        """
        shape = (number, *self.shape)
        k = stack.pop(self.prior_law(number * self.dims))
        for t in range(len(self) - 1, 0, -1):
            z = (k * self.delta[t]).reshape(shape)
            earlier = stack.pop(self.p_law(t, z, labels))
            stack.undraw(k, self.q_law(t, (earlier * self.delta[t - 1]).reshape(shape)))
            k = earlier
        u = stack.pop(self.pixel_law((k * self.delta[0]).reshape(shape), labels))
        stack.undraw(k, self.q_law(0, u / 127.5 - 1))
        return u.astype(np.uint8).reshape(shape)

    def answers_digest(self, batches: list[int], labelled: bool = False) -> str:
        """Sixteen hex digits of the network's answers to numbers that are always the same.

        They are asked at the first, the middle and the last step, in batches of these sizes, as an answer
        may depend on the batch. In float32 every bit counts. In float64 answers are compared to 2^−24, as far
        smaller differences change no law but by a rare chance.
        """
        found = hashlib.sha256()
        for batch in batches:
            numbers = np.arange(batch * self.dims, dtype=np.uint64) * np.uint64(2654435761)
            z = ((numbers >> np.uint64(7)) % np.uint64(4096)).astype(np.float64) / 1024 - 2
            for t in sorted({0, len(self) // 2, len(self) - 1}):
                labels = np.zeros(batch, np.int64) if labelled else None
                mean_x0, _ = self.answer(z.reshape(batch, *self.shape), t, labels)
                if self.dtype == torch.float64:
                    mean_x0 = np.rint(mean_x0 * ANSWER_PLACES)
                found.update(np.ascontiguousarray(mean_x0, dtype="<f8").tobytes())
        return found.hexdigest()[:16]


class PixelLaws:
    """The laws of a grey level by the place of x̂_0, of which there are 64 per level between −1 and 1.

    Args:
        decoder: "exact" or a `LevelsDecoder`.
        std: σ of the Gaussian decoder for each group, (G,).
    """

    def __init__(self, decoder: AnyDecoder, std: np.ndarray):
        self._decoder, self._std = decoder, std * 127.5
        self._rows: dict[int, np.ndarray] = {}  # of a block of places, (C, BLOCK, 256)

    def at(self, mean_x0: np.ndarray, groups: np.ndarray) -> PixelLaw:
        """The laws of pixels in their order; only an x̂_0 that is −1 or 1, or beyond, has the outermost place.

        Args:
            mean_x0: x̂_0, (B, C, H, W).
            groups: of their variances, of that shape.
        """
        places = np.clip(np.rint((mean_x0 + 1) * (127.5 * PLACES)), 1, LAST_PLACE - 1).astype(np.int64)
        places[mean_x0 <= -1], places[mean_x0 >= 1] = 0, LAST_PLACE
        if not isinstance(self._decoder, LevelsDecoder):
            return BinnedNormal(places.ravel() / PLACES, self._std[groups.ravel()])
        channels = np.broadcast_to(np.arange(places.shape[1])[:, None, None], places.shape)
        blocks, within = np.divmod(places, BLOCK)
        found = np.empty((*places.shape, LEVELS))
        for block in np.unique(blocks).tolist():
            here = blocks == block
            found[here] = self._block(block)[channels[here], within[here]]
        return Categories(found.reshape(-1, LEVELS))

    def _block(self, block: int) -> np.ndarray:
        """The probabilities of the levels at the places of a block, (C, BLOCK, 256)."""
        if block not in self._rows:
            assert isinstance(self._decoder, LevelsDecoder)
            places = torch.arange(block * BLOCK, (block + 1) * BLOCK, dtype=torch.float64)
            mean = (places / (127.5 * PLACES) - 1).clamp(-1, 1)
            mean[places == LAST_PLACE] = 1.0
            mean = mean.expand(1, len(self._decoder.log_levels), BLOCK)
            self._rows[block] = self._decoder.log_probabilities(mean)[0].exp().numpy()
        return self._rows[block]
