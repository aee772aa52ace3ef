"""The Fréchet distance of samples from a reference, with its standard error.

    FD = |μ − μ_r|² + Tr(Σ + Σ_r − 2 (Σ Σ_r)^½)            Heusel et al. 2017, eq. 6

With Σ_r = RᵀR the product Σ Σ_r has the eigenvalues of R Σ Rᵀ beside zeros. That matrix is symmetric and is
the covariance of R x, so no square root of a matrix is taken.

The error is the jackknife's: the samples are dealt into groups, and the distance is taken anew without each
of them. It says how far the distance of other samples of the same model would be off. The reference is the
same for all that are compared, and its own error is not in it. FD is biased by the number of samples, so
distances of unequal numbers of samples are not compared.
"""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from hf_ddpm.metrics.extractors import INCEPTION, Features
from hf_ddpm.shown import count, summary, with_error

GROUPS = 100  # of which the jackknife leaves one out: its error is then known within 7 %
FEWEST = 3  # samples: two are left without one


def frechet_label(extractor: str) -> str:
    """The name of a Fréchet distance: "FID (inception-v3)", else "FD (network@hash)"."""
    return f"{'FID' if extractor == INCEPTION else 'FD'} ({extractor})"


def jackknife_stderr(value: float, left_out: Tensor, num_samples: int) -> float:
    """The standard error of a number by leaving groups of samples out, Busing et al. 1999.

        h_g = N / m_g,   pseudo-value θ̃_g = h_g θ − (h_g − 1) θ_(g),   mean θ̄ = G θ − Σ (1 − m_g / N) θ_(g)
        variance = 1/G Σ (θ̃_g − θ̄)² / (h_g − 1)

    With groups of one sample each, this is the jackknife of Quenouille and Tukey.

    Args:
        value: θ, the number of all samples.
        left_out: θ_(g), the number without the samples g, g + G, g + 2G, …, shape (G,), G ≥ 2.
        num_samples: N ≥ G.
    """
    groups = len(left_out)
    sizes = [len(range(g, num_samples, groups)) for g in range(groups)]
    share = torch.tensor(sizes, dtype=torch.float64) / num_samples
    pseudo = value / share - (1 / share - 1) * left_out.double()
    mean = groups * value - ((1 - share) * left_out).sum()
    return math.sqrt(((pseudo - mean).square() / (1 / share - 1)).mean().item())


@final
@dataclass(frozen=True, eq=False)
class FrechetDistance:
    """A Fréchet distance, and what it is without each group of samples.

    Attributes:
        value: of all samples.
        left_out: without the samples g, g + G, …, for each of the G groups, (G,), float64.
        num_samples: N.
    """

    value: float
    left_out: Tensor
    num_samples: int

    def __repr__(self) -> str:
        return summary(self, self._facts)

    def _facts(self) -> list[str]:
        return [with_error(self.value, self.stderr, "").rstrip(), count(self.num_samples, "sample")]

    @property
    def stderr(self) -> float:
        """The standard error, over samples; the reference is held fixed."""
        return jackknife_stderr(self.value, self.left_out, self.num_samples)

    def minus(self, other: "FrechetDistance") -> tuple[float, float]:
        """The difference to another distance from the same reference, and its standard error.

        Sample i of both is taken for a pair. Samples that begin with the same noise are alike, so that their
        difference is known better than the two errors say; of independent ones it is known as well.

        Raises:
            ValueError: the other one is of another number of samples, by which the distances are biased
                unequally.
        """
        if (self.num_samples, len(self.left_out)) != (other.num_samples, len(other.left_out)):
            raise ValueError(
                f"distances of {self.num_samples} and {other.num_samples} samples are not compared; allowed: "
                "equal numbers"
            )
        value = self.value - other.value
        return value, jackknife_stderr(value, self.left_out - other.left_out, self.num_samples)


def frechet_distance(samples: Features, reference: Features, groups: int = GROUPS) -> FrechetDistance:
    """The distance of samples from a reference, in float64.

    Args:
        samples: N ≥ 3 images.
        reference: M ≥ 2 images of the same extractor.
        groups: how many groups of samples are left out in turn; at most N.

    Raises:
        ValueError: too few images, different extractors or widths, or values that are not finite.
    """
    if samples.extractor != reference.extractor:
        raise ValueError(f"samples are by {samples.extractor}, the reference is by {reference.extractor}")
    x, y = samples.features.double(), reference.features.double()
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features are {x.shape[1]} wide, the reference's {y.shape[1]}")
    for name, z, least in (("samples", x, FEWEST), ("reference", y, 2)):
        if len(z) < least:
            raise ValueError(f"{name}: {len(z)} images; allowed: at least {least}")
        if not z.isfinite().all():
            raise ValueError(f"{name}: the features of {samples.extractor} are not finite")
    if not 2 <= groups:
        raise ValueError(f"groups is {groups}; allowed: at least 2")

    # A common shift changes no distance, but less cancels in Σx² − Nμ²
    centre = y.mean(0)
    root = torch.linalg.qr(y - centre).R / math.sqrt(len(y) - 1)
    parts = [_Sums.of(part, root) for part in _dealt(x - centre, min(groups, len(x)))]
    whole = _Sums(*(sum(values) for values in zip(*(vars(part).values() for part in parts), strict=True)))  # type: ignore[arg-type]
    spread = root.square().sum().item()
    left_out = [whole.without(part).distance(spread) for part in parts]
    return FrechetDistance(whole.distance(spread), torch.tensor(left_out, dtype=torch.float64), len(x))


def _dealt(x: Tensor, groups: int) -> list[Tensor]:
    """The samples g, g + G, … of each group g."""
    return [x[g::groups] for g in range(groups)]


@dataclass(frozen=True, eq=False)
class _Sums:
    """The sums over samples x that a distance is made of: of 1, x, |x|², R x and R x (R x)ᵀ."""

    number: float
    x: Tensor
    squares: Tensor
    seen: Tensor
    products: Tensor

    @staticmethod
    def of(x: Tensor, root: Tensor) -> "_Sums":
        """The sums of shifted samples, (N, D), with R, (r, D)."""
        seen = x @ root.T
        return _Sums(len(x), x.sum(0), x.square().sum(), seen.sum(0), seen.T @ seen)

    def without(self, part: "_Sums") -> "_Sums":
        """The sums of the other samples."""
        pairs = zip(vars(self).values(), vars(part).values(), strict=True)
        return _Sums(*(whole - some for whole, some in pairs))

    def distance(self, spread: float) -> float:
        """The distance from a reference at 0 of which `spread` is the trace of its covariance."""
        n = self.number
        mean, seen = self.x / n, self.seen / n
        own_spread = (self.squares - n * mean.square().sum()) / (n - 1)
        covariance = (self.products - n * torch.outer(seen, seen)) / (n - 1)
        roots = torch.linalg.eigvalsh(covariance).clamp(min=0).sqrt()
        return (mean.square().sum() + own_spread + spread - 2 * roots.sum()).item()
