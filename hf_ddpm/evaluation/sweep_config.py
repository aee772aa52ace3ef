"""Every choice of a sweep of samplers and steps: a frozen dataclass, checked when it is constructed.

Importing this file loads no torch, so that `hf-ddpm` answers at once.
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.runtime.messages import shown
from hf_ddpm.runtime.options import check_options, option, read_whole
from hf_ddpm.spelling import suggest_keywords

if TYPE_CHECKING:
    from hf_ddpm.generation.quality import Sampler

MOST_STEPS, MOST_CELLS = 1_000_000, 200
FEWEST_SAMPLES = 10


def _as_evaluate(name: str) -> Any:
    """The option of `evaluate` of that name."""
    field = EvaluationConfig.__dataclass_fields__[name]
    return dataclasses.field(default=field.default, metadata=field.metadata)


def read_steps(name: str, text: str) -> list[int]:
    """Numbers of steps, such as "10,20,50", ascending.

    Raises:
        ValueError: it lists none, a number that can't be one of steps, or one twice.
    """
    found = [read_whole(part.strip()) for part in text.split(",")]
    numbers = sorted(number for number in found if number is not None and 1 <= number <= MOST_STEPS)
    if len(numbers) < len(found) or len(set(numbers)) < len(numbers):
        raise ValueError(
            f"{name} is {shown(text)}; allowed: whole numbers >= 1 with commas between them, none twice, as "
            "in 10,20,50"
        )
    return numbers


def read_samplers(name: str, text: str) -> "list[Sampler]":
    """Samplers, such as "ddpm,ddim:trailing", in their order.

    Raises:
        ValueError: it lists none, an unknown one (the nearest is named), or one twice.
    """
    from hf_ddpm.generation.quality import Sampler

    try:
        found = [Sampler.parse(part.strip()) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{name} is {shown(text)}: {error}") from None
    twice = next((sampler for i, sampler in enumerate(found) if sampler in found[:i]), None)
    if twice is not None:
        raise ValueError(f"{name} is {shown(text)}, with {str(twice)!r} twice; allowed: once")
    return found


@suggest_keywords
@dataclass(frozen=True)
class SweepConfig:
    """All choices of a sweep, checked when it is constructed.

    Raises:
        ValueError: a value has the wrong type or lies out of range.
        TypeError: there is no such key; the message names the nearest.
    """

    model: str = _as_evaluate("model")
    dataset: str = _as_evaluate("dataset")
    split: str | None = _as_evaluate("split")
    part: str | None = _as_evaluate("part")
    holdout: float | None = _as_evaluate("holdout")
    holdout_seed: int | None = _as_evaluate("holdout_seed")
    steps: str = option(
        "10,20,50", "numbers of sampling steps, with commas between them", joined=",", check=read_steps
    )
    schedulers: str = option(
        "ddpm,ddim,dpm-solver++,unipc",
        "samplers, with commas between them: any that `hf-ddpm sample` has; behind a colon how its steps are "
        "spaced, as in ddim:trailing, or the variance of ddpm, as in ddpm:fixed_small",
        joined=",",
        check=read_samplers,
    )
    extractor: str | None = option(
        None,
        "feature network that compares samples with real images: inception, or a folder or Hub id of a "
        "vision model; needed",
        path=True,
    )
    num_samples: int = option(
        1000,
        "samples of each sampler and number of steps, and as many real images beside them",
        least=FEWEST_SAMPLES,
        most=EvaluationConfig.__dataclass_fields__["num_samples"].metadata["most"],
    )
    num_reference: int | None = option(
        None, "real images that the samples are compared with, by default as many", least=2
    )
    image_column: str | None = _as_evaluate("image_column")
    channels: int | None = _as_evaluate("channels")
    background: str | None = _as_evaluate("background")
    fit: str | None = _as_evaluate("fit")
    to_8_bit: bool | None = _as_evaluate("to_8_bit")
    skip_corrupt: bool | None = _as_evaluate("skip_corrupt")
    out: str | None = option(None, "folder for the results, by default MODEL if that is a folder", path=True)
    overwrite: bool = option(False, "replace a sweep of something else that the folder holds")
    seed: int = option(0, "seed of the chosen images and the samples", least=0, below=2**63)
    batch_size: int = _as_evaluate("batch_size")

    def __post_init__(self) -> None:
        if self.extractor is None:  # said before what takes seconds to look at
            raise ValueError(
                "extractor is not given; allowed: inception, or a folder or Hub id of a vision model, "
                "such as a classifier of such images"
            )
        check_options(self)
        _ = self.reading  # refuses what an evaluation would
        if (cells := len(self.step_numbers) * len(self.samplers)) > MOST_CELLS:
            raise ValueError(
                f"steps and schedulers make {cells} pairs; allowed: at most {MOST_CELLS} in one sweep"
            )

    @property
    def step_numbers(self) -> list[int]:
        """The numbers of steps, ascending."""
        return read_steps("steps", self.steps)

    @property
    def samplers(self) -> "list[Sampler]":
        """The samplers, in their order."""
        return read_samplers("schedulers", self.schedulers)

    @property
    def reading(self) -> EvaluationConfig:
        """The same choices as an evaluation's, for what opens models and images and draws samples."""
        ours = {field.name for field in dataclasses.fields(self)} - {"steps", "schedulers"}
        return EvaluationConfig(**{name: getattr(self, name) for name in ours})
