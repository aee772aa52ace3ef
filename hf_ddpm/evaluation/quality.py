"""Sample quality of a model: its samples and real images in the eyes of a feature network.

Beside every number stands its floor: what other real images reach against the same reference. How the samples
come about is samples.py's.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.data.stream import ImageStream
from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.evaluation.images import describe_source, digest_rows, fingerprint
from hf_ddpm.evaluation.parts import pieces
from hf_ddpm.metrics import (
    Features,
    SampleMetrics,
    load_extractor,
    load_reference,
    sample_metrics,
    save_reference,
)
from hf_ddpm.runtime.disk import why_not_writable
from hf_ddpm.runtime.processes import process_state
from hf_ddpm.runtime.progress import progress
from hf_ddpm.seeds import Use, derive_seed
from hf_ddpm.shown import fields_line

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QualityFound:
    """How far images are from the reference.

    Attributes:
        samples: the model's samples.
        floor: as many other real images.
    """

    samples: SampleMetrics
    floor: SampleMetrics

    __repr__ = fields_line


def choose_real(config: EvaluationConfig, total: int) -> tuple[np.ndarray, np.ndarray]:
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
    if len(floor) != config.num_samples and process_state().is_main_process:
        logger.warning(
            "the floor has %d images, not %d: distances fall with the number of images, so the two "
            "compare only roughly",
            len(floor),
            config.num_samples,
        )
    return np.sort(order[:wanted]), np.sort(floor)


class SampleQuality:
    """A measurement of samples. Its inputs are checked when it is constructed; `run` measures.

    Args:
        config: which extractor, how many samples and real images; `extractor` is given.
        stream: real images, in the order of their source.

    Raises:
        ValueError: a bad extractor, one that doesn't take such images, too few real images, or a reference
            file of something else.

    Attributes:
        extractor: the feature network.
        reference_rows: rows of the real images that samples are compared with, ascending.
        floor_rows: rows of the floor's images, ascending.
    """

    def __init__(self, config: EvaluationConfig, stream: ImageStream):
        assert config.extractor is not None
        self._config, self._stream, self._state = config, stream, process_state()
        self.reference_rows, self.floor_rows = choose_real(config, stream.num_rows())
        self.extractor = load_extractor(config.extractor, self._state.device or "cpu")
        # Images that don't fit the network show here
        self.extractor(next(stream.select(self.floor_rows[:1])).unsqueeze(0))
        self._file = None if config.reference is None else Path(config.reference).expanduser()
        self._reference = None
        if self._file is not None:
            chosen = fingerprint(digest_rows(stream, self.reference_rows))
            counted = {"num_images": len(self.reference_rows), "images": chosen}
            self._facts = describe_source(config, stream) | counted
            if self._file.exists():
                self._reference = load_reference(self._file, self.extractor.name, self._facts)
            elif reason := why_not_writable(self._file.parent):
                raise ValueError(f"reference {str(self._file)!r} can't be written: {reason}")

    def run(self, features: Mapping[str, Tensor]) -> QualityFound:
        """Measure the samples, on every process; the reference's features are written if a file is named.

        Args:
            features: the tensors of the samples' `Features`.
        """
        samples, seed = Features(self.extractor.name, **features), self._config.seed
        reference, floor = self.reference(), self.floor()
        return QualityFound(
            samples=sample_metrics(samples, reference, seed), floor=sample_metrics(floor, reference, seed)
        )

    def reference(self) -> Features:
        """Features of the real images that samples are compared with, written if a file is named."""
        reference = self._reference or self._real(self.reference_rows)
        if self._file is not None and self._reference is None and self._state.is_main_process:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            save_reference(self._file, reference, self._facts)
        return reference

    def floor(self) -> Features:
        """Features of other real images."""
        return self._real(self.floor_rows)

    def _real(self, rows: np.ndarray) -> Features:
        """Features of real images."""
        images, found = self._stream.select(rows), []
        with progress("features", len(rows), "image", self._state.is_main_process, leave=False) as bar:
            for piece in pieces(len(rows), self._config.batch_size):
                found.append(self.extractor(torch.stack([next(images) for _ in piece])))
                bar.update(len(piece))
        return Features.cat(found)
