"""Every choice of a measurement of errors: a frozen dataclass, checked when it is constructed.

Importing this file loads no torch, so that `hf-ddpm` answers at once.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from hf_ddpm.config import check_holdout
from hf_ddpm.evaluation.config import EvaluationConfig, parts
from hf_ddpm.runtime.options import check_options, option
from hf_ddpm.spelling import suggest_keywords

FEWEST_EVALS = 201  # more than the 200 that go to t = 0
MOST_EVALS = 200_000  # a tenth of them is plenty, and their sums have to fit into memory


def _as_evaluate(name: str) -> Any:
    """The option of `evaluate` of that name."""
    field = EvaluationConfig.__dataclass_fields__[name]
    return dataclasses.field(default=field.default, metadata=field.metadata)


@suggest_keywords
@dataclass(frozen=True)
class ErrorsConfig:
    """All choices of a measurement of errors, checked when it is constructed.

    Raises:
        ValueError: a value has the wrong type or lies out of range.
        TypeError: there is no such key; the message names the nearest.
    """

    model: str = _as_evaluate("model")
    dataset: str = _as_evaluate("dataset")
    split: str | None = option(
        None,
        "split of the data set, or a slice as in 'train[:90%]'; by default the one that the run trained on, "
        "else train. What is measured must not be scored later",
    )
    part: str | None = option(
        None,
        "which images of the split: those that the run held out, those that it trained on, or all; by "
        "default those trained on where it held others of the split out",
        choices=parts,
    )
    holdout: float | None = option(
        None,
        "share of the images, or how many, that are held out and not measured; by default as the run had it",
        check=check_holdout,
    )
    holdout_seed: int | None = _as_evaluate("holdout_seed")
    evals: int = option(
        10_000, "network evaluations, spread over steps and images", least=FEWEST_EVALS, most=MOST_EVALS
    )
    image_column: str | None = _as_evaluate("image_column")
    label_column: str | None = _as_evaluate("label_column")
    class_label: str | None = _as_evaluate("class_label")
    channels: int | None = _as_evaluate("channels")
    background: str | None = _as_evaluate("background")
    fit: str | None = _as_evaluate("fit")
    to_8_bit: bool | None = _as_evaluate("to_8_bit")
    skip_corrupt: bool | None = _as_evaluate("skip_corrupt")
    clip_x0: bool = _as_evaluate("clip_x0")
    out: str | None = option(None, "folder for the table, by default MODEL if that is a folder", path=True)
    overwrite: bool = option(False, "replace a table of something else that the folder holds")
    seed: int = option(0, "seed of the chosen images and the noise", least=0, below=2**63)
    batch_size: int = _as_evaluate("batch_size")

    def __post_init__(self) -> None:
        check_options(self)
        _ = self.reading  # refuses what an evaluation would

    @property
    def reading(self) -> EvaluationConfig:
        """The same choices as an evaluation's, for what opens models and images."""
        ours = {field.name for field in dataclasses.fields(self)} - {"evals"}
        return EvaluationConfig(**{name: getattr(self, name) for name in ours})
