"""A sampler by one word: what `hf-ddpm sweep` found best for a model, and the samplers that it compares.

A sampler is spelled as a key of `SCHEDULERS`, and what is chosen of it behind a colon: "unipc",
"ddim:trailing", "ddpm:fixed_small". This module changes which sampler a pipeline has, and knows no images.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_ddpm.checks import described
from hf_ddpm.folders.errors import errors_digest, network_digest, process_digest
from hf_ddpm.folders.layout import SWEEP
from hf_ddpm.folders.sweep import REMEDY, Cell, Sweep, choose, read_sweep
from hf_ddpm.generation.samplers import sampler_class, swap_scheduler
from hf_ddpm.runtime.messages import did_you_mean, one_line, redact, shorten, shown
from hf_ddpm.schedules import SPACINGS
from hf_ddpm.variances import FIXED, LEARNED, MEASURED

logger = logging.getLogger(__name__)

QUALITIES = ("fast", "best")
LONGEST_NAME = 120  # characters of a folder in an error


@dataclass(frozen=True)
class Sampler:
    """A sampler, and what is chosen of it.

    Attributes:
        name: a key of `SCHEDULERS`.
        choice: how its steps are spaced, one of `SPACINGS`; of "ddpm" also one of the fixed variances; None
            for its own.
    """

    name: str
    choice: str | None = None

    def __str__(self) -> str:
        return self.name if self.choice is None else f"{self.name}:{self.choice}"

    @staticmethod
    def parse(text: str) -> "Sampler":
        """The sampler that a text such as "ddim:trailing" spells.

        Raises:
            ValueError: the name or what is chosen is unknown (the nearest is named).
        """
        name, colon, choice = text.partition(":")
        sampler_class(name)
        choices = [*SPACINGS, *(FIXED if name == "ddpm" else ())]
        if colon and choice not in choices:
            hint = did_you_mean(choice, choices)
            raise ValueError(
                f"scheduler {name!r} has no choice {shown(choice)}{hint}; allowed: {', '.join(choices)}"
            )
        return Sampler(name, choice if colon else None)

    def give_to(self, pipeline: Any) -> None:
        """Make it of the scheduler that the pipeline came with, and assign it to the pipeline.

        Raises:
            ValueError: it can't run the process, has no such choice, or the network learns its variance.
        """
        trained = pipeline.trained_scheduler
        own = getattr(trained, "variance_type", None)
        if self.choice in FIXED and own in LEARNED:
            raise ValueError(f"the network learns its variance ({own}); allowed: ddpm without a choice")
        key = "variance_type" if self.choice in FIXED else "timestep_spacing"
        pipeline.scheduler = pipeline.original_scheduler
        swap_scheduler(pipeline, self.name, **({} if self.choice is None else {key: self.choice}))


@contextmanager
def kept_scheduler(pipeline: Any) -> Iterator[None]:
    """Within, the pipeline may be given other samplers; afterwards it has its own, as it was."""
    own = pipeline.scheduler
    try:
        yield
    finally:
        pipeline.scheduler = own


@contextmanager
def sampler_of_quality(pipeline: Any, quality: Any, steps: int | None) -> Iterator[int]:
    """Within, the pipeline has the sampler that its sweep recommends.

    Args:
        pipeline: a pipeline that was loaded from a folder or the Hub.
        quality: "fast" or "best", as `folders.sweep.choose` describes them.
        steps: the number of steps that the caller was given, which has to be None.

    Yields:
        The number of steps.

    Raises:
        ValueError: another word, `steps` is given too, or there is no sweep of this network.
    """
    check_quality(quality)
    if steps is not None:
        raise ValueError(
            f"num_inference_steps is {shown(steps)}, but quality {quality!r} chooses it; allowed: one of "
            "the two"
        )
    with kept_scheduler(pipeline):
        yield give_quality(pipeline, quality)


def give_quality(pipeline: Any, quality: str) -> int:
    """Give a pipeline the sampler that its sweep recommends; returns the number of steps.

    Raises:
        ValueError: another word, there is no sweep of this network, or one of a sampler that is unknown here.
    """
    cell = recommended(pipeline, quality)
    try:
        Sampler.parse(cell.sampler).give_to(pipeline)
    except ValueError as error:
        raise ValueError(
            f"quality {quality!r} is {shown(cell.name)}: {one_line(error, 120)}; {REMEDY}"
        ) from error
    return cell.steps


def plain_config(pipeline: Any) -> dict[str, Any]:
    """What samplers are made of besides the process: plain values of the scheduler that a pipeline came with.

    Its class is among them, and a digest of the measured errors, where its variance is made of these.
    """
    scheduler = pipeline.original_scheduler
    config = {key: value for key, value in scheduler.config.items() if key[:1] != "_"}
    plain = {k: v for k, v in config.items() if v is None or isinstance(v, str | bool | int | float)}
    if plain.get("variance_type") in MEASURED and pipeline.errors is not None:
        plain["errors"] = errors_digest(pipeline.errors.errors)
    return {"class": type(scheduler).__name__, **plain}


def check_quality(quality: Any) -> None:
    """Refuse what is no word for a quality.

    Raises:
        ValueError: the message names the nearest.
    """
    if not isinstance(quality, str) or quality not in QUALITIES:
        hint = did_you_mean(quality, QUALITIES)
        raise ValueError(f"quality is {described(quality)}{hint}; allowed: {', '.join(QUALITIES)}")


def recommended(pipeline: Any, quality: Any) -> Cell:
    """The cell of a pipeline's sweep that a word means; it is told in a line, once.

    Raises:
        ValueError: another word, or there is no sweep of this network.
    """
    check_quality(quality)
    sweep: Sweep | None = pipeline.sweep
    if sweep is None:
        after = "allowed: after hf-ddpm sweep MODEL DATASET --extractor NETWORK"
        if pipeline._folder is None:
            raise ValueError(
                f"quality is {quality!r}, but the pipeline was not loaded from a folder with a {SWEEP}; "
                f"{after}, loaded from MODEL"
            )
        name = shorten(redact(str(pipeline._folder)), LONGEST_NAME)
        raise ValueError(f"quality is {quality!r}, but {name!r} has no {SWEEP}; {after}")
    fast, best = choose(sweep.cells)
    cell = fast if quality == "fast" else best
    kind = sweep.label.partition(" ")[0]
    line = f"quality {quality!r} is {cell.name}: {kind} {cell.words} of {sweep.of.num_samples:,} samples"
    if line not in pipeline._said:
        pipeline._said.add(line)
        logger.warning("%s", one_line(line))
    return cell


def sweep_beside(pipeline: Any) -> Sweep | None:
    """The sweep in the folder that a pipeline was loaded from; None if it holds none.

    Raises:
        ValueError: it can't be read, or it is of another network, process or scheduler than the pipeline's.
    """
    folder: Path | None = pipeline._folder
    if folder is None or not (folder / SWEEP).exists():
        return None
    sweep = read_sweep(folder)
    other = ""
    if not sweep.of.is_of(network_digest(pipeline.unet)):
        other = "other weights"
    elif sweep.of.process != process_digest(pipeline.process):
        other = "another process"
    elif sweep.of.prediction_type != pipeline.prediction_type:
        other = "another prediction type"
    if other:
        raise ValueError(f"the {SWEEP} of this model is of {other} than the pipeline's; {REMEDY}")
    now, then = plain_config(pipeline), sweep.of.scheduler
    # A key that another version of diffusers has more or less is no difference
    if differ := [key for key in now if key in then and now[key] != then[key]]:
        raise ValueError(
            f"the scheduler that the pipeline was loaded with has {differ[0]} {shown(now[differ[0]])}, but "
            f"{SWEEP} was measured with {shown(then[differ[0]])}; {REMEDY}"
        )
    return sweep
