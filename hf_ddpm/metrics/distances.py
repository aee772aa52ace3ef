"""Sample quality: the distance of two sets of images in the eyes of a feature network, through torchmetrics.

    uint8 images ─► Extractor ─► Features (of samples, of a reference) ─► sample_metrics ─► SampleMetrics

With Gaussians N(μ, Σ) fitted to the D features of either set, k(x, y) = (xᵀy/D + 1)³ and softmax p(y|x),

    Fréchet distance   |μ − μ_r|² + Tr(Σ + Σ_r − 2 (Σ Σ_r)^½)     FID: Heusel et al. 2017, eq. 6
    kernel distance    the unbiased estimate of MMD² under k      KID: Bińkowski et al. 2018
    classifier score   exp E_x KL(p(y|x) ‖ p(y))                  IS: Salimans et al. 2016

A number means nothing without its network. FID, KID and IS are Inception's; any other's carries the network's
name and a hash of its weights (of a DINOv2, Stein et al. 2023 call the first FD-DINOv2). The first and last
are biased by the number of images: compare equal numbers, next to what real images reach among each other.

The standard error of a Fréchet distance is frechet.py's. This file knows no networks (extractors.py does),
pipelines or streams. torchmetrics is imported when used.
"""

import json
import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from hf_ddpm.metrics.extractors import INCEPTION, Features, torchmetrics_module
from hf_ddpm.metrics.frechet import frechet_label
from hf_ddpm.runtime.disk import load_tensors, save_tensors
from hf_ddpm.runtime.messages import one_line
from hf_ddpm.runtime.processes import process_state
from hf_ddpm.runtime.untrusted import check_regular
from hf_ddpm.shown import count, summary

logger = logging.getLogger(__name__)

FEW = 50  # samples, below which a part of the ten that the classifier score takes has under five
# The least log p(y|x): its exp is still a float64, while torchmetrics makes NaN of a probability 0
LEAST_LOG_P = -700.0


def save_reference(path: str | os.PathLike[str], features: Features, facts: Mapping[str, Any]) -> None:
    """Write a reference set's features, 4 N (D + K) bytes, to a safetensors file, whole or not at all.

    Args:
        path: where it goes; its folder is made when missing.
        features: the reference set.
        facts: what its images are (JSON): fingerprint of the data, split, number, seed.

    Raises:
        OSError: it can't be written.
    """
    metadata = {"extractor": features.extractor, "facts": json.dumps(dict(facts))}
    save_tensors(Path(path), features.tensors(), metadata)


def load_reference(path: str | os.PathLike[str], extractor_name: str, facts: Mapping[str, Any]) -> Features:
    """Read what `save_reference` wrote.

    Args:
        path: the file.
        extractor_name: name of the extractor that it must be of.
        facts: what its images must be.

    Returns:
        The reference set's features.

    Raises:
        ValueError: no such file, a damaged one, or another one; the message names what differs.
    """
    try:
        check_regular(Path(path))
        tensors, metadata = load_tensors(Path(path))
        found = {**json.loads(metadata["facts"]), "extractor": metadata["extractor"]}
        features = Features(metadata["extractor"], **tensors)
    # What a file of something else lacks has no common class
    except Exception as error:
        raise ValueError(f"reference {str(path)!r} is missing or damaged: {one_line(error)}") from error
    wanted = {**json.loads(json.dumps(dict(facts))), "extractor": extractor_name}
    differ = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    if differ:
        words = "; ".join(f"{key} is {found.get(key)!r}, wanted {wanted.get(key)!r}" for key in differ)
        raise ValueError(f"reference {str(path)!r} is another one: {words}")
    return features


@final
@dataclass(frozen=True)
class SampleMetrics:
    """How far samples are from a reference.

    Quote a number by the name that `labelled` gives it, which names the network too.

    Attributes:
        extractor: name of the network.
        frechet_distance: 0 for equal means and covariances; few images raise it.
        kid_mean: MMD², mean over random subsets; unbiased, so it may be below 0.
        kid_std: standard deviation over the subsets; it is not the standard error of `kid_mean`.
        inception_score: (mean, standard deviation) over ten parts of the samples; None without logits. It is
            at most the number of images in a part.
        num_samples: images measured.
        num_reference: images they were compared with.
    """

    extractor: str
    frechet_distance: float
    kid_mean: float
    kid_std: float
    inception_score: tuple[float, float] | None
    num_samples: int
    num_reference: int

    def __repr__(self) -> str:
        return summary(self, self._facts)

    def _facts(self) -> list[str]:
        """What its one-line `repr` says: the distances by their names, and of how many images they are."""
        named = [f"{name} {value:.4g}" for name, value in self.labelled().items() if " std" not in name]
        return [*named, f"{count(self.num_samples, 'sample')} against {self.num_reference:,}"]

    def labelled(self) -> dict[str, float]:
        """The numbers by name: FID, KID and IS if Inception's, else FD, KD and CS with the network's name.

        Such a name is "FD (fashion-mnist@ab12cd34)".
        """
        kd, score = ("KID", "IS") if self.extractor == INCEPTION else ("KD", "CS")
        values = {kd: self.kid_mean, f"{kd} std": self.kid_std}
        if self.inception_score is not None:
            values |= {score: self.inception_score[0], f"{score} std": self.inception_score[1]}
        named = {f"{name} ({self.extractor})": value for name, value in values.items()}
        return {frechet_label(self.extractor): self.frechet_distance} | named


def sample_metrics(samples: Features, reference: Features, seed: int = 0) -> SampleMetrics:
    """Measure samples against a reference, in float64; the global random state is left alone.

    Args:
        samples: N >= 2 images.
        reference: M >= 2 images of the same extractor.
        seed: of KID's 100 pairs of subsets and of the score's split into ten parts. A subset has 1000 images,
            or half of the smaller set, as subsets of all its images would be equal.

    Raises:
        ValueError: too few images, different extractors or widths, values not finite, no torchmetrics.

    Fewer than 50 samples with logits are warned about: their score says more of their number than of them.
    """
    if samples.extractor != reference.extractor:
        raise ValueError(f"samples are by {samples.extractor}, the reference is by {reference.extractor}")
    x, y = samples.features.double(), reference.features.double()
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features are {x.shape[1]} wide, the reference's {y.shape[1]}")
    for name, given in (("samples", samples), ("reference", reference)):
        if len(given) < 2:
            raise ValueError(f"{name}: {len(given)} images; allowed: at least 2")
        if not all(part.isfinite().all() for part in given.tensors().values()):
            raise ValueError(f"{name}: the features of {given.extractor} are not finite")

    # Every process of a launch has all the features already
    alone: Any = {"sync_on_compute": False}
    given = nn.Identity()
    given.num_features = x.shape[1]  # pyright: ignore[reportArgumentType]
    frechet = torchmetrics_module("fid").FrechetInceptionDistance(given, **alone)
    # A common shift changes no distance, but less cancels in Σx² − Nμ²
    for part, real in ((x, False), (y, True)):
        frechet.update(part - y.mean(0), real=real)

    score, size = None, max(2, min(1000, min(len(x), len(y)) // 2))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer")
        # Not torch.manual_seed, which would reseed accelerators too
        torch.default_generator.manual_seed(seed)
        kernel = torchmetrics_module("kid").KernelInceptionDistance(
            given, subsets=100, subset_size=size, **alone
        )
        kernel.update(x, real=False)
        kernel.update(y, real=True)
        kid_mean, kid_std = (value.item() for value in kernel.compute())
        if samples.logits is not None:
            if len(x) < FEW and process_state().is_main_process:
                kind = "IS" if samples.extractor == INCEPTION else "CS"
                logger.warning(
                    "%s of %d images says little: each of its ten parts has %d at most, which bounds it; "
                    "use %d or more, 50,000 for published numbers",
                    f"{kind} ({samples.extractor})",
                    len(x),
                    -(-len(x) // 10),
                    FEW,
                )
            classes = torchmetrics_module("inception").InceptionScore(given, splits=10, **alone)
            classes.update(samples.logits.double().log_softmax(1).clamp(min=LEAST_LOG_P))
            mean, std = classes.compute()
            score = mean.item(), std.item()
    distance = frechet.compute().item()
    return SampleMetrics(samples.extractor, distance, kid_mean, kid_std, score, len(x), len(y))
