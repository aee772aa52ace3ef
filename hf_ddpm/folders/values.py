"""Which values the configs of networks and schedulers may hold: by the types of arguments, and by rules.

The types are those that a class's `__init__` is annotated with. The rules are for diffusers' U-Net and
schedulers, whose classes accept many values that they then fail on, or silently take for another one. This
module reads no files.
"""

import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

import diffusers
import numpy as np
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from hf_ddpm.runtime.untrusted import shown
from hf_ddpm.schedules import SPACINGS

MAX_STEPS = 1_000_000  # of a process; no other whole number or list in a scheduler's config is larger
LONGEST = 60  # characters of a word
MAX_COUNT = 2**31 - 1  # of a whole number in a network's config; its weights files bound it far below
# Keys that say what the network was trained for: every scheduler of a DDPM has them
NEEDED = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type")
# What diffusers itself adds to every config
ADDED = {
    "_class_name": str,
    "_diffusers_version": str,
    "_name_or_path": str,
    "_use_default_values": list[str],
}

Rule = tuple[Callable[[Any], bool], str]  # whether a value, or a value in a list, is allowed; which ones are


def _range(least: float, most: float = math.inf) -> Rule:
    words = f">= {least:g}" if most == math.inf else f"{least:g} to {most:g}"
    return lambda value: least <= value <= most, words


def _one_of(*words: str) -> Rule:
    return lambda value: value in words, ", ".join(words)


POSITIVE: Rule = (lambda value: value > 0, "> 0")
UNET_RULES: dict[str, Rule] = {
    "in_channels": _range(1),
    "out_channels": _range(1),
    "time_embedding_type": _one_of("positional", "fourier", "learned"),
    "time_embedding_dim": _range(1),
    "freq_shift": _range(0, 1),
    "down_block_types": _one_of(
        *("DownBlock2D", "AttnDownBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D", "KDownBlock2D"),
        *(
            "ResnetDownsampleBlock2D",
            "UNetResDownBlock2D",
            "UNetResAttnDownBlock2D",
            "UNetResSkipDownBlock2D",
        ),
    ),
    "mid_block_type": _one_of("UNetMidBlock2D"),
    "up_block_types": _one_of(
        *("UpBlock2D", "AttnUpBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D", "KUpBlock2D"),
        *("ResnetUpsampleBlock2D", "UNetResUpBlock2D", "UNetResAttnUpBlock2D", "UNetResSkipUpBlock2D"),
    ),
    "block_out_channels": _range(1),
    "layers_per_block": _range(1),
    "mid_block_scale_factor": POSITIVE,
    "downsample_padding": _range(0, 1),
    "downsample_type": _one_of("conv", "resnet"),
    "upsample_type": _one_of("conv", "resnet"),
    "dropout": _range(0, 1),
    "act_fn": _one_of("silu", "swish", "mish", "gelu", "relu"),
    "attention_head_dim": _range(1),
    "norm_num_groups": _range(1),
    "attn_norm_num_groups": _range(1),
    "norm_eps": _range(1e-12, 1),
    "resnet_time_scale_shift": _one_of("default", "scale_shift"),
    "class_embed_type": _one_of("timestep", "identity"),
    "num_class_embeds": _range(1),
    "num_train_timesteps": _range(1),
}
SCHEDULER_RULES: dict[str, Rule] = {
    "num_train_timesteps": _range(1, MAX_STEPS),
    "beta_start": _range(0, 1),
    "beta_end": _range(0, 1),
    "trained_betas": _range(0, 1),
    "dynamic_thresholding_ratio": _range(0, 1),
    "clip_sample_range": POSITIVE,
    "sample_max_value": POSITIVE,
    "timestep_spacing": _one_of(*SPACINGS),
    "steps_offset": _range(0, MAX_STEPS),
    "solver_order": _range(1, 3),
    "original_inference_steps": _range(1, MAX_STEPS),
}


def check_network_values(network: type, config: Mapping[str, Any], file: str) -> None:
    """Refuse a network's config with a value that its class has no use for.

    Keys that the class does not know pass: diffusers ignores them.

    Args:
        network: its class.
        config: content of the file.
        file: what an error calls it.

    Raises:
        ValueError: a value is of another type than the class takes, or outside of what makes sense.
    """
    if config.get("quantization_config") is not None:  # it would choose a library that reads the weights
        raise ValueError(f"{file}: quantization_config is given; allowed: weights that are not quantized")
    hints, rules = dict(_hints(network)), UNET_RULES if network is UNet2DModel else {}
    blocks = [config.get("down_block_types"), config.get("up_block_types")]
    skips = all(isinstance(names, list) and all("Skip" in str(name) for name in names) for names in blocks)
    if network is UNet2DModel and skips:
        hints["norm_num_groups"] = int | None  # as these blocks take it, and the oldest configs have it
    for key, value in config.items():
        _check(file, key, value, hints.get(key, ADDED.get(key, Any)), rules.get(key))


def check_scheduler_values(scheduler: type, config: Mapping[str, Any], file: str) -> None:
    """Refuse a scheduler's config with a value that its class has no use for, or that would fill the memory.

    Keys that the class does not know are held to the schedulers of diffusers that do: another sampler is made
    of the same config.

    Args:
        scheduler: its class.
        config: content of the file.
        file: what an error calls it.

    Raises:
        ValueError: a value is of another type than the class takes, outside of what makes sense, or a whole
            number or list larger than `MAX_STEPS`.
    """
    hints = ADDED | _any_scheduler() | _hints(scheduler)
    for key, value in config.items():
        if isinstance(value, int) and abs(value) > MAX_STEPS:
            raise ValueError(f"{file}: {_key(key)} is {shown(value)}; allowed: at most {MAX_STEPS}")
        if isinstance(value, list) and len(value) > MAX_STEPS:
            raise ValueError(f"{file}: {_key(key)} is a list of {len(value)}; allowed: at most {MAX_STEPS}")
        _check(file, key, value, hints.get(key, Any), SCHEDULER_RULES.get(key))


def is_ddpm_scheduler(scheduler: object) -> bool:
    """Whether a class is a scheduler of diffusers that samples a DDPM, called as (output, t, sample)."""
    if not (isinstance(scheduler, type) and issubclass(scheduler, SchedulerMixin)):
        return False
    step = getattr(scheduler, "step", None)  # some have another name for it
    if step is None:
        return False
    needs = [x.name for x in _parameters(step) if x.default is inspect.Parameter.empty]
    keys = {x.name for x in _parameters(scheduler.__init__)}
    return needs == ["self", "model_output", "timestep", "sample"] and keys.issuperset(NEEDED)


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """The annotated types of a class's arguments; {} where they can't be told."""
    try:
        found = typing.get_type_hints(kind.__init__)
        given = {x.name: x.default for x in _parameters(kind.__init__)}
    except (NameError, TypeError, ValueError):  # annotations that name what only a type checker imports
        return {}
    # A value that is None by default may be None, whatever some annotations of diffusers say
    return {key: x | None if given.get(key) is None else x for key, x in found.items() if key in given}


@functools.cache
def _any_scheduler() -> dict[str, Any]:
    """The types of the arguments that any scheduler of diffusers takes, of those that can replace ours."""
    kinds = [getattr(diffusers, name, None) for name in diffusers.DDPMScheduler._compatibles]
    return {key: x for kind in kinds if is_ddpm_scheduler(kind) for key, x in _hints(kind).items()}


def _check(file: str, key: str, value: Any, hint: Any, rule: Rule | None) -> None:
    if not fits(value, hint):
        raise ValueError(f"{file}: {_key(key)} is {shown(value)}; allowed: {words_of(hint)}")
    known = hint is not Any and key not in ADDED
    if known and isinstance(value, str) and len(value) > LONGEST:
        raise ValueError(f"{file}: {_key(key)} has {len(value)} characters; allowed: at most {LONGEST}")
    if rule is None or value is None:
        return
    if value == []:
        raise ValueError(f"{file}: {_key(key)} is []; allowed: one or more values")
    wrong = [x for x in (value if isinstance(value, list) else [value]) if not rule[0](x)]
    if wrong:
        raise ValueError(f"{file}: {_key(key)} is {shown(wrong[0])}; allowed: {rule[1]}")


def _key(key: str) -> str:
    return key if key.isidentifier() and len(key) <= 40 else shown(key)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e300


# JSON has no arrays: the type beside it, a list of numbers, takes them
PLAIN: dict[type, Callable[[Any], bool]] = {
    int: lambda value: type(value) is int and abs(value) <= MAX_COUNT,
    float: lambda value: _is_number(value) or value == -math.inf,  # as diffusers writes "no limit"
    bool: lambda value: isinstance(value, bool),
    str: lambda value: isinstance(value, str),
    type(None): lambda value: value is None,
    np.ndarray: lambda value: False,
}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of a JSON file is one of an annotated type; types that JSON doesn't know take any."""
    if isinstance(hint, type) and hint in PLAIN:
        return PLAIN[hint](value)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        # "bool | None" stands for numbers too, in diffusers' UniPC
        loose = bool in args and type(None) in args and _is_number(value)
        return loose or any(fits(value, arg) for arg in args)
    if origin is Literal:  # this package and old folders know further words
        return isinstance(value, str)
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            return False
        if origin is list or args[1:] == (...,):
            return all(fits(x, args[0]) for x in value)
        return len(value) == len(args) and all(map(fits, value, args))
    return True


def words_of(hint: Any) -> str:
    """An annotated type in plain words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(words_of(arg) for arg in args if arg is not np.ndarray))
    if origin in (list, tuple):
        return f"a list of {words_of(args[0]).removeprefix('a ')}s"
    if origin is Literal:
        return "text"
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return "null" if hint is type(None) else plain.get(hint, "another type")
