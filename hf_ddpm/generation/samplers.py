"""What a pipeline must know of diffusers: its samplers by name, its configs, its messages and errors.

This module knows no images.
"""

import contextlib
import inspect
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging as diffusers_logging

from hf_ddpm import variances
from hf_ddpm.checks import described
from hf_ddpm.folders.values import NEEDED
from hf_ddpm.parametrization import in_diffusers, parametrization, works_from_pure_noise
from hf_ddpm.runtime.messages import did_you_mean, one_line
from hf_ddpm.scheduler import NETWORK_KEYS, DDPMScheduler
from hf_ddpm.schedules import DIFFUSERS_SPACINGS
from hf_ddpm.spacing import check_spacing, sampling_steps, start_warning
from hf_ddpm.spacing import in_diffusers as spacing_in_diffusers

logger = logging.getLogger(__name__)
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
# The schedulers of diffusers that draw with a DDPM's network: their classes without the word Scheduler.
# tests/generation/test_every_scheduler.py draws with each, and sees every other one refused.
SAMPLERS = (
    "DDPM",
    "DDPMParallel",
    "DDIM",
    "DDIMParallel",
    "PNDM",
    "DPMSolverMultistep",
    "DPMSolverSinglestep",
    "UniPCMultistep",
    "DEISMultistep",
    "SASolver",
    "EulerDiscrete",
    "EulerAncestralDiscrete",
    "HeunDiscrete",
    "LMSDiscrete",
    "KDPM2Discrete",
    "KDPM2AncestralDiscrete",
    "TCD",
    "LCM",
)
# Those that visit the steps that they are told, and so can space them in ways that diffusers doesn't know.
TAKES_STEPS = (DDPMScheduler, diffusers.DPMSolverMultistepScheduler, diffusers.EulerDiscreteScheduler)
# Those that go on from a step by ⌊T/K⌋, whichever step their list has next.
STRIDING = (diffusers.DDIMScheduler, diffusers.DDIMParallelScheduler, diffusers.PNDMScheduler)
# ᾱ_t of two schedulers of one process differ by at most the first plus (t + 1) ᾱ_t times the second, as
# diffusers multiplies t + 1 factors in float32. Most tables err by 1.5e-6, a small constant β by more.
SAME_PROCESS = 1e-5
ROUNDING = 2.0**-24
LCM_WARNING = (
    "LCMScheduler draws with networks that were distilled for it; the images of any other come out too smooth"
)


class Diverged(ValueError):
    """What a pipeline draws is not finite."""


def sampler_class(name: str) -> type:
    """The class of a sampler by its name, a key of `SCHEDULERS`.

    Raises:
        ValueError: the name is unknown (the nearest is named).
    """
    if not isinstance(name, str) or name not in SCHEDULERS:
        hint = did_you_mean(name, SCHEDULERS)
        raise ValueError(f"scheduler {name!r} is unknown{hint}; allowed: {', '.join(SCHEDULERS)}")
    return SCHEDULERS[name]


def swap_scheduler(pipeline: DiffusionPipeline, name: str, **changes: Any) -> None:
    """Give the pipeline another sampler for the same process.

    Args:
        pipeline: whose `scheduler` is replaced. If another process was assigned to it in the meantime, it
            gets its own back.
        name: a key of `SCHEDULERS`.
        **changes: config keys of the new scheduler, such as `timestep_spacing="trailing"`.

    Raises:
        ValueError: the name is unknown (the nearest is named), or the sampler can't run the process.
    """
    kind: Any = sampler_class(name)
    keys = inspect.signature(kind.__init__).parameters
    for key in changes:
        if key not in keys:
            raise ValueError(f"{key} is no config key of {kind.__name__}{did_you_mean(key, keys)}")
    if "timestep_spacing" in changes:
        check_spacing(changes["timestep_spacing"])
        check_takes_spacing(kind, changes["timestep_spacing"])
    trained = getattr(pipeline, "trained_scheduler", None) or training_scheduler(pipeline.scheduler)
    try:
        check_sampler(pipeline.scheduler, trained.config["prediction_type"])
        check_process(pipeline.scheduler, trained)
        # What the sampler doesn't say, such as a variance, is what the network was trained for
        config = whole_config(trained) | whole_config(pipeline.scheduler)
        config |= {key: trained.config[key] for key in NETWORK_KEYS}
    except ValueError:
        config = whole_config(trained)
    # Two are defaults, of which each sampler has its own; another spacing is somebody's choice and stays
    spacing = config.get("timestep_spacing")
    lost = "timestep_spacing" not in changes and not takes_spacing(kind, spacing)
    if lost or spacing in ("leading", "linspace"):
        config.pop("timestep_spacing", None)
    if name == "pndm":
        config["set_alpha_to_one"] = True  # else it ends at the noise of step 0, not at x_0
    scheduler = kind.from_config(config, **changes)
    if lost:
        own = scheduler.config["timestep_spacing"]
        logger.warning("%s can't space its steps by %r, and spaces them by %r", kind.__name__, spacing, own)
    check_sampler(scheduler, trained.config["prediction_type"])  # `changes` may have changed what it reads
    check_process(scheduler, trained)
    _replace(pipeline, scheduler)


def respace(pipeline: DiffusionPipeline, spacing: str) -> None:
    """Give the pipeline the same sampler with another spacing of its steps.

    Args:
        pipeline: whose `scheduler` is replaced.
        spacing: one of `SPACINGS`.

    Raises:
        ValueError: it is none of them, or the sampler has no such choice.
    """
    check_spacing(spacing)
    kind: Any = type(pipeline.scheduler)
    if "timestep_spacing" not in inspect.signature(kind.__init__).parameters:
        raise ValueError(
            f"timestep_spacing is {spacing!r}, but {kind.__name__} has no such key; allowed: none"
        )
    check_takes_spacing(kind, spacing)
    config = whole_config(pipeline.scheduler)
    _replace(pipeline, kind.from_config(config, timestep_spacing=spacing))


def check_takes_spacing(sampler: type, spacing: Any) -> None:
    """Refuse a spacing that diffusers doesn't know for a sampler of its own that lists its steps itself.

    Args:
        sampler: its class.
        spacing: of its steps.

    Raises:
        ValueError: the sampler can't be told its steps.
    """
    if not takes_spacing(sampler, spacing):
        takers = (name for name, kind in SCHEDULERS.items() if issubclass(kind, TAKES_STEPS))
        raise ValueError(
            f"timestep_spacing is {spacing!r}, but {sampler.__name__} takes no steps that others chose; "
            f"allowed: {', '.join(DIFFUSERS_SPACINGS)}, or a sampler of {', '.join(takers)}"
        )


def takes_spacing(sampler: type, spacing: Any) -> bool:
    """Whether a sampler can visit steps of that spacing; True for what is no spacing at all."""
    return spacing_in_diffusers(spacing) or issubclass(sampler, TAKES_STEPS)


def choose_steps(scheduler: Any, num_inference_steps: int, trained: DDPMScheduler) -> None:
    """Set a sampler to K steps, by its own spacing, which diffusers need not know.

    Args:
        scheduler: the sampler.
        num_inference_steps: K.
        trained: our scheduler of the same process.

    Raises:
        ValueError: the sampler can't take such steps, or so many.
    """
    spacing = scheduler.config.get("timestep_spacing")
    if isinstance(scheduler, DDPMScheduler) or spacing_in_diffusers(spacing):
        scheduler.set_timesteps(num_inference_steps)
        return
    check_takes_spacing(type(scheduler), spacing)
    steps = sampling_steps(trained.process, spacing, num_inference_steps)
    scheduler.set_timesteps(timesteps=steps.tolist())


def _replace(pipeline: DiffusionPipeline, scheduler: Any) -> None:
    """Put another sampler into the pipeline, with the measured errors that the one before was given."""
    before = (pipeline.scheduler, getattr(pipeline, "trained_scheduler", None))
    known = (found.errors for found in before if isinstance(found, DDPMScheduler))
    if isinstance(scheduler, DDPMScheduler):
        scheduler.errors = next((errors for errors in known if errors is not None), None)
    pipeline.scheduler = scheduler


def require_config(scheduler: Any) -> None:
    """Refuse what is no scheduler of diffusers, by its lack of a config.

    Raises:
        ValueError: it has none, or is a class instead of an instance.
    """
    if isinstance(scheduler, type) or not isinstance(getattr(scheduler, "config", None), Mapping):
        raise ValueError(
            f"scheduler is {described(scheduler)}; allowed: a scheduler of diffusers, such as DDPMScheduler()"
        )


def check_sampler(scheduler: Any, prediction_type: Any) -> None:
    """Refuse a scheduler that doesn't draw with a DDPM's network, or doesn't read what this one answers.

    Args:
        scheduler: the sampler.
        prediction_type: what the network predicts.

    Raises:
        ValueError: a scheduler of another kind, of another prediction type, or one that can't read the
            network's answers.
    """
    require_config(scheduler)
    sampler, config = type(scheduler).__name__, scheduler.config
    kind = config.get("prediction_type")
    if not in_diffusers(kind) and not isinstance(scheduler, DDPMScheduler):
        raise ValueError(f"{sampler} can't read a network of prediction_type {kind!r}; allowed: ddpm")
    if not _draws_with_a_ddpm(scheduler):
        shown = ", ".join(name for name in SAMPLERS if not name.endswith("Parallel"))
        raise ValueError(f"the pipeline can't draw with {sampler}; allowed: {shown}")
    if config.get("use_flow_sigmas") or config.get("timestep_type") == "continuous":
        key = "use_flow_sigmas" if config.get("use_flow_sigmas") else "timestep_type"
        raise ValueError(
            f"{key} of {sampler} is {config[key]!r}: no DDPM has such steps; allowed: its default"
        )
    if isinstance(scheduler, diffusers.DDPMScheduler) and not isinstance(scheduler, DDPMScheduler):
        word = config["variance_type"]
        if not variances.in_diffusers(word):
            raise ValueError(f"diffusers' {sampler} can't do variance_type {word!r}; allowed: hf_ddpm's")
    parametrization(kind)  # type: ignore[arg-type]
    if kind != prediction_type:
        raise ValueError(
            f"{sampler} reads prediction_type {kind!r}, but the network was trained for {prediction_type!r}; "
            "allowed: the latter, or a new pipeline: DDPMPipeline(unet, scheduler)"
        )


def _draws_with_a_ddpm(scheduler: Any) -> bool:
    """Whether the class is in `SAMPLERS`, is derived from one, or is somebody's own and has tables."""
    for kind in type(scheduler).__mro__:
        if kind.__module__.startswith("diffusers.schedulers.") and kind is not SchedulerMixin:
            return kind.__name__.removesuffix("Scheduler") in SAMPLERS
    return all(hasattr(scheduler, name) for name in ("alphas_cumprod", "set_timesteps", "step", "timesteps"))


def check_process(scheduler: Any, trained: DDPMScheduler) -> None:
    """Refuse a sampler that runs another process than the network's, by its own tables.

    Args:
        scheduler: the sampler.
        trained: our scheduler of the process that the network was trained for.

    Raises:
        ValueError: it has another number of steps, or ᾱ_t differs at one of them.
    """
    process, sampler = trained.process, type(scheduler).__name__
    if scheduler is trained or getattr(scheduler, "process", None) is process:
        return
    own = process.alphas_cumprod
    found = (
        scheduler.process.alphas_cumprod if isinstance(scheduler, DDPMScheduler) else scheduler.alphas_cumprod
    )
    found = torch.as_tensor(found).detach().to("cpu", torch.float64)
    remedy = "allowed: swap_scheduler(pipeline, name), or a new pipeline: DDPMPipeline(unet, scheduler)"
    if found.shape != own.shape:
        raise ValueError(
            f"{sampler} has {len(found)} steps, but the network was trained for {len(own)}; {remedy}"
        )
    allowed = SAME_PROCESS + ROUNDING * own * torch.arange(1, len(own) + 1)
    beyond = ((found - own).abs() - allowed).nan_to_num(2)
    if (beyond > 0).any():
        t = int(beyond.argmax())
        ignored = trained.config["rescale_betas_zero_snr"] and found[-1] > own[-1] + 2**-23
        why = " (it ignores rescale_betas_zero_snr)" if ignored else ""
        raise ValueError(
            f"{sampler} runs another process than the network's{why}: alphas_cumprod[{t}] is {found[t]:.6g}, "
            f"not {own[t]:.6g}; {remedy}"
        )


def check_steps(scheduler: Any, trained: DDPMScheduler) -> None:
    """Refuse the steps that a sampler of diffusers has chosen, where it would not do what they say.

    Args:
        scheduler: the sampler, after `set_timesteps`.
        trained: our scheduler of the same process.

    Raises:
        ValueError: a step that is repeated or below 0; steps from which the sampler goes to other ones than
            it lists; a first step of which the network says nothing.
    """
    sampler, steps = type(scheduler).__name__, torch.as_tensor(scheduler.timesteps).cpu()
    # Solvers of higher order divide by the distance of two steps; diffusers' "trailing" may end at -1.
    repeats = hasattr(scheduler, "lower_order_nums") and bool((scheduler.sigmas.diff() >= 0).any())
    if repeats or not bool((steps >= 0).all()):
        raise ValueError(
            f"num_inference_steps is {scheduler.num_inference_steps}; allowed: fewer, {sampler} would repeat "
            "a step or pass 0"
        )
    if isinstance(scheduler, STRIDING):
        _check_stride(scheduler)
    first = min(int(steps.max().round()), len(trained) - 1)
    kind = trained.config["prediction_type"]
    if trained.process.alphas_cumprod[first] == 0 and not works_from_pure_noise(kind):
        raise ValueError(
            f"alphas_cumprod is 0 at step {first}, where prediction_type {kind!r} says nothing about x_0; "
            "allowed: steps below it, as timestep_spacing='leading' has"
        )


def _check_stride(scheduler: Any) -> None:
    """Refuse steps that are not ⌊T/K⌋ apart: these samplers go on by that, whatever steps they list."""
    total, number = scheduler.config["num_train_timesteps"], scheduler.num_inference_steps
    stride = total // number
    # PNDM's list has more steps than it stops at
    grid = np.sort(np.unique(getattr(scheduler, "_timesteps", scheduler.timesteps)))
    gaps = np.diff(grid)
    if (gaps != stride).any() or grid[0] >= stride:
        odd = (gaps != stride).nonzero()[0]
        listed = f"{grid[odd[-1]]} after {grid[odd[-1] + 1]}" if len(odd) else f"none after {grid[0]}"
        raise ValueError(
            f"{type(scheduler).__name__} goes down by {stride} from each step, but timestep_spacing "
            f"{scheduler.config['timestep_spacing']!r} lists {listed}; allowed: 'leading', or 'trailing' "
            f"with a num_inference_steps that divides {total}"
        )


def try_step(scheduler: Any, channels: int) -> None:
    """Take one step with an image of one pixel, to hear now what a sampler of diffusers can't do.

    The sampler's state is then to be set anew, by `set_timesteps`.

    Args:
        scheduler: the sampler, after `set_timesteps`.
        channels: of the images.

    Raises:
        ValueError: the step fails, as for a prediction type that the sampler doesn't read.
    """
    image, t = torch.zeros(1, channels, 1, 1), scheduler.timesteps[0]
    learned = isinstance(scheduler, diffusers.DDPMScheduler)
    output = image.repeat(1, variances.outputs(scheduler.config["variance_type"]) if learned else 1, 1, 1)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": torch.Generator()} if takes_generator else {}
    try:
        scheduler.scale_model_input(image, t)
        scheduler.step(output, t, image, **options)
    except Exception as error:  # what diffusers' samplers raise has no common class
        raise ValueError(f"{type(scheduler).__name__} can't take a step: {one_line(error, 200)}") from error


def start_remark(scheduler: Any, trained: DDPMScheduler) -> str | None:
    """What is to be said of a sampler of diffusers before it starts, or None."""
    if isinstance(scheduler, diffusers.LCMScheduler):
        return LCM_WARNING
    first = int(torch.as_tensor(scheduler.timesteps).max().round())
    return start_warning(trained.process, min(first, len(trained) - 1))


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
    return DDPMScheduler.from_config(whole_config(scheduler))


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
