"""Sample quality of a model: its samples and real images in the eyes of a feature network.

Beside every number stands its floor: what other real images reach against the same reference. How the samples
come about is drawing.py's.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from hf_ddpm.data.stream import ImageStream
from hf_ddpm.evaluation.images import digest_rows, fingerprint
from hf_ddpm.metrics import Features, load_extractor, load_reference, sample_metrics, save_reference
from hf_ddpm.runtime.disk import why_not_writable
from hf_ddpm.runtime.progress import progress
from hf_ddpm.seeds import Use, derive_seed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QualityConfig:
    """How sample quality is measured.

    Attributes:
        extractor: "inception", or a folder or Hub id of a vision model.
        num_samples: images drawn.
        num_reference: real images they are compared with; None for as many, or half of the split.
        reference: file of the reference's features, written or reused; None for none.
        seed: of the samples and of which real images are taken.
        batch_size: images at once in each process.
    """

    extractor: str
    num_samples: int
    num_reference: int | None
    reference: str | None
    seed: int
    batch_size: int


def choose_real(config: QualityConfig, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the reference and of the floor's images, disjoint, both ascending.

    Raises:
        ValueError: the split has too few images.
    """
    wanted = config.num_reference or min(config.num_samples, total // 2)
    if wanted < 2 or total - wanted < 2:
        raise ValueError(
            f"num_reference is {wanted}, but the split has {total} images; allowed: 2 to {total - 2}, as "
            "the floor needs others"
        )
    order = np.random.default_rng(derive_seed(Use.REFERENCE_ROWS, config.seed)).permutation(total)
    floor = order[wanted : wanted + config.num_samples]
    if len(floor) != config.num_samples and PartialState().is_main_process:
        logger.warning(
            "the floor has %d images, not %d: distances fall with the number of images, so the two "
            "compare only roughly",
            len(floor),
            config.num_samples,
        )
    return np.sort(order[:wanted]), np.sort(floor)


class SampleQuality:
    """A measurement of samples: made, it has refused what can't be done; `run`, it does it.

    Args:
        config: how.
        stream: real images, in the order of their source.
        num_rows: how many they are.
        facts: where they come from, for the reference's file.

    Raises:
        ValueError: a bad extractor, one that doesn't take such images, too few real images, or a reference
            file of something else.

    Attributes:
        extractor: the feature network.
    """

    def __init__(
        self,
        config: QualityConfig,
        stream: ImageStream,
        num_rows: int,
        facts: dict[str, Any],
    ):
        self._config, self._stream, self._state = config, stream, PartialState()
        self._reference_rows, self._floor_rows = choose_real(config, num_rows)
        self.extractor = load_extractor(config.extractor, self._state.device or "cpu")
        self.extractor(next(stream.select(self._floor_rows[:1])).unsqueeze(0))  # images that don't fit show
        self._file = None if config.reference is None else Path(config.reference).expanduser()
        self._facts, self._reference = facts, None
        if self._file is not None:
            chosen = fingerprint(digest_rows(stream, self._reference_rows))
            self._facts = facts | {"num_images": len(self._reference_rows), "images": chosen}
            if self._file.exists():
                self._reference = load_reference(self._file, self.extractor.name, self._facts)
            elif reason := why_not_writable(self._file.parent):
                raise ValueError(f"reference {str(self._file)!r} can't be written: {reason}")

    def run(self, features: Mapping[str, Tensor]) -> dict[str, Any]:
        """Measure the samples: section "sample_metrics" of the report, on every process.

        Args:
            features: the tensors of the samples' `Features`.
        """
        samples, seed = Features(self.extractor.name, **features), self._config.seed
        reference = self._reference or self._real(self._reference_rows)
        if self._file is not None and self._reference is None and self._state.is_main_process:
            save_reference(self._file, reference, self._facts)
        floor = self._real(self._floor_rows)
        return {
            "extractor": self.extractor.name,
            "samples": sample_metrics(samples, reference, seed).labelled(),
            "floor": sample_metrics(floor, reference, seed).labelled(),
            "num_samples": len(samples),
            "num_reference": len(reference),
            "num_floor": len(floor),
        }

    def _real(self, rows: np.ndarray) -> Features:
        """Features of real images."""
        images, size = self._stream.select(rows), self._config.batch_size
        found = []
        with progress("features", len(rows), "image", self._state.is_main_process, leave=False) as bar:
            for start in range(0, len(rows), size):
                batch = torch.stack([next(images) for _ in rows[start : start + size]])
                found.append(self.extractor(batch))
                bar.update(len(batch))
        return Features.cat(found)
