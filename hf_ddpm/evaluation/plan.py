"""What an evaluation will do, and what it finds: the two records that prepare, measure and write hand on."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hf_ddpm.data.stream import ImageStream
from hf_ddpm.evaluation.classes import Classified, GivenClasses
from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.evaluation.images import Images
from hf_ddpm.evaluation.memorisation import Memorisation, NearestFound
from hf_ddpm.evaluation.quality import QualityFound, SampleQuality
from hf_ddpm.evaluation.samples import Drawing
from hf_ddpm.evaluation.scored_model import ScoredModel
from hf_ddpm.likelihood import Bound, Estimate
from hf_ddpm.shown import fields_line


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What an evaluation leaves behind, or as much of it as is known.

    Attributes:
        report: content of evaluation.json.
        tensors: content of evaluation.safetensors.
    """

    report: dict
    tensors: dict[str, Tensor]

    __repr__ = fields_line


@dataclass(frozen=True, eq=False)
class Plan:
    """An evaluation whose inputs have been checked.

    Attributes:
        config: what was asked for.
        out: folder of the results; it may be missing.
        model: what is scored.
        images: the images, and what is known of them.
        stream: the same, in the order of their source.
        rows: which of them, ascending places.
        digests: of their pixels, (N,), int64.
        given: the class that each of them is given; None of a model without classes.
        proposal: of the estimate's steps, (T,), float64.
        pilot_evaluations: what learning the proposal took.
        other: the evaluation to compare with, None for none.
        drawing: of samples, None where nothing looks at them.
        quality: their measurement by a feature network, None for none.
        memorisation: the search for their nearest training images, None for none.
        started: `time.perf_counter()` when the work began, seconds.
    """

    config: EvaluationConfig
    out: Path
    model: ScoredModel
    images: Images
    stream: ImageStream
    rows: list[int]
    digests: Tensor
    given: GivenClasses | None
    proposal: Tensor
    pilot_evaluations: int
    other: Evaluation | None
    drawing: Drawing | None
    quality: SampleQuality | None
    memorisation: Memorisation | None
    started: float

    __repr__ = fields_line

    @property
    def numbers(self) -> list[int]:
        """The rows of the images in the whole of their split, ascending."""
        return self.stream.chosen.of(self.rows).tolist()


@dataclass(frozen=True, eq=False)
class Results:
    """What an evaluation has measured.

    Attributes:
        bound: of the images, with the model's variance.
        other_bound: with the other fixed variance, None where the variance is learned.
        quality: of the samples, None where it was not asked for.
        nearest: the nearest training images of the samples, None where they were not asked for.
        classified: what the model says of the images' classes, None where it was not asked.
    """

    bound: Bound | Estimate
    other_bound: Bound | Estimate | None
    quality: QualityFound | None
    nearest: NearestFound | None
    classified: Classified | None

    __repr__ = fields_line
