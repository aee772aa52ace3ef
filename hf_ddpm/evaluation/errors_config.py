"""Every choice of a measurement of errors: a frozen dataclass, checked when it is constructed.

Importing this file loads no torch, so that `hf-ddpm` answers at once.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.runtime.options import check_options, option

FEWEST_EVALS = 201  # more than the 200 that go to t = 0
MOST_EVALS = 200_000  # a tenth of them is plenty, and their sums have to fit into memory


def _as_evaluate(name: str) -> Any:
    """The option of `evaluate` of that name."""
    field = EvaluationConfig.__dataclass_fields__[name]
    return dataclasses.field(default=field.default, metadata=field.metadata)


@dataclass(frozen=True)
class ErrorsConfig:
    """All choices of a measurement of errors, checked when it is constructed.

    Raises:
        ValueError: a value has the wrong type or lies out of range.
    """

    model: str = _as_evaluate("model")
    dataset: str = _as_evaluate("dataset")
    split: str = option("train", "split of the data set: what is measured here must not be scored later")
    evals: int = option(
        10_000, "network evaluations, spread over steps and images", least=FEWEST_EVALS, most=MOST_EVALS
    )
    image_column: str | None = _as_evaluate("image_column")
    channels: int | None = _as_evaluate("channels")
    background: str | None = _as_evaluate("background")
    fit: str = _as_evaluate("fit")
    to_8_bit: bool = _as_evaluate("to_8_bit")
    clip_x0: bool = _as_evaluate("clip_x0")
    out: str | None = option(None, "folder for the table, by default MODEL if that is a folder", path=True)
    overwrite: bool = option(False, "replace a table of something else that the folder holds")
    seed: int = option(0, "seed of the chosen images and the noise", least=0, below=2**63)
    batch_size: int = _as_evaluate("batch_size")

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def reading(self) -> EvaluationConfig:
        """The same choices as an evaluation's, for what opens models and images."""
        ours = {field.name for field in dataclasses.fields(self)} - {"evals"}
        return EvaluationConfig(**{name: getattr(self, name) for name in ours})
