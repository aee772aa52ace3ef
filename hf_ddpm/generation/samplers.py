"""What a pipeline must know of diffusers: its samplers by name, its configs, its messages and errors.

This module knows no images.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import diffusers
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError

from hf_ddpm.folders.values import NEEDED
from hf_ddpm.runtime.messages import did_you_mean, one_line
from hf_ddpm.scheduler import DDPMScheduler

SCHEDULERS: dict[str, type] = {
    "ddpm": DDPMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "pndm": diffusers.PNDMScheduler,
    "dpm-solver++": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "deis": diffusers.DEISMultistepScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler-ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
}


def swap_scheduler(pipeline: DiffusionPipeline, name: str, **changes: Any) -> None:
    """Give the pipeline another sampler for the same process.

    Args:
        pipeline: whose `scheduler` is replaced.
        name: a key of `SCHEDULERS`.
        **changes: config keys of the new scheduler, such as `timestep_spacing="trailing"`.

    Raises:
        ValueError: the name is unknown (the nearest is named).
    """
    if name not in SCHEDULERS:
        hint = did_you_mean(name, SCHEDULERS)
        raise ValueError(f"scheduler {name!r} is unknown{hint}; allowed: {', '.join(SCHEDULERS)}")
    config = whole_config(pipeline.scheduler)
    # "trailing" is somebody's choice and stays; the other two are defaults, of which each sampler has its own
    if config.get("timestep_spacing") != "trailing":
        config.pop("timestep_spacing", None)
    if name == "pndm":
        config["set_alpha_to_one"] = True  # else it ends at the noise of step 0, not at x_0
    try:
        pipeline.scheduler = SCHEDULERS[name].from_config(config, **changes)
    # "sigmoid" and "laplace" are words of DDPM's schedulers alone; every sampler takes the betas themselves
    except NotImplementedError:
        config["trained_betas"] = training_scheduler(pipeline.scheduler).process.betas.tolist()
        pipeline.scheduler = SCHEDULERS[name].from_config(config, **changes)


def training_scheduler(scheduler: Any) -> DDPMScheduler:
    """Our scheduler of the process that the network was trained for, by the config of any sampler.

    Raises:
        ValueError: the config lacks a key that says it; `from_config` would fill in a default.
    """
    if isinstance(scheduler, DDPMScheduler):
        return scheduler
    for key in NEEDED:
        if key not in scheduler.config:
            raise ValueError(
                f"the scheduler, {type(scheduler).__name__}, has no {key}; allowed: one of a DDPM"
            )
    return DDPMScheduler.from_config(whole_config(scheduler))  # type: ignore[return-value]


def whole_config(scheduler: Any) -> dict[str, Any]:
    """A scheduler's config without the note of which keys were left at their default.

    `from_config` of another class would replace those keys by its own defaults, which differ: Heun's betas
    are not DDPM's.
    """
    return {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}


@contextlib.contextmanager
def diffusers_messages() -> Iterator[list[str]]:
    """Collect diffusers' warnings in the list instead of printing them, and hide its progress bars."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(one_line(record.getMessage(), limit=None))
    library = logging.getLogger("diffusers")
    handlers, level, bar = library.handlers, library.level, diffusers_logging.is_progress_bar_enabled()
    library.handlers = [handler]
    library.setLevel(logging.WARNING)
    diffusers_logging.disable_progress_bar()
    try:
        yield found
    finally:
        library.handlers = handlers
        library.setLevel(level)
        if bar:
            diffusers_logging.enable_progress_bar()


def load_reason(error: Exception) -> str:
    """Why loading failed, in one line: diffusers' words, and those of safetensors if it was the cause."""
    cause: Any = error
    while cause is not None and not isinstance(cause, SafetensorError):
        cause = cause.__cause__ or cause.__context__
    words, more = one_line(error), "" if cause is None else one_line(cause)
    return words if more in words else f"{words} {more}"
