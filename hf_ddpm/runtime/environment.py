"""Environment variables of the launch: those that torch, accelerate and the Hub's client read as they are.

These libraries end in tracebacks, or begin something else than was meant, where such a variable holds an odd
value. This file knows names and values only, and imports no library.
"""

import os
import re
from collections.abc import Callable
from typing import NamedTuple

from hf_ddpm.runtime.messages import did_you_mean, shown

WHOLE = re.compile(r"-?[0-9]{1,9}")
ON, OFF = ("1", "true", "yes", "on", "y", "t"), ("0", "false", "no", "off", "n", "f")
DEVICE = re.compile(r"(cpu|cuda|mps|xpu|hpu|npu|mlu|musa|sdaa|neuron|xla)(:[0-9]{1,3})?")
VISIBLE = re.compile(r"(-?[0-9]{1,4}|(GPU|MIG)-[\w/-]+|NoDevFiles)?(,\s*(-?[0-9]{1,4}|(GPU|MIG)-[\w/-]+))*,?")
DEVICE_VARIABLE = "ACCELERATE_TORCH_DEVICE"
PORT = 65_535
COUNTS = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "PMI_SIZE")
COUNTS += ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_NUM_TASKS")
COUNTS += ("OMP_NUM_THREADS", "HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT")
LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
LOCAL = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
FLAGS = ("ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY")
FLAGS += ("FORK_LAUNCHED", "FSDP_OFFLOAD_PARAMS", "FSDP_CPU_RAM_EFFICIENT_LOADING", "FSDP_SYNC_MODULE_STATES")
FLAGS += ("FSDP_USE_ORIG_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING")
REFUSED = ("DEEPSPEED", "MEGATRON_LM", "SAGEMAKER", "PARALLELISM_CONFIG")  # with ACCELERATE_USE_ before
FOLDERS = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "XDG_CACHE_HOME", "TMPDIR")


class Rule(NamedTuple):
    """What an environment variable may hold: a test of its text, and the words for it."""

    fits: Callable[[str], bool]
    allowed: str


def _whole(least: int, most: int = 10**9) -> Callable[[str], bool]:
    return lambda text: bool(WHOLE.fullmatch(text)) and least <= int(text) <= most


def _one_of(*words: str) -> Rule:
    return Rule(lambda text: text.lower() in words, ", ".join(words))


def _usable_folder(text: str) -> bool:
    """Whether a folder can be there: what stands at the path, or first above it, is a folder."""
    path = os.path.abspath(os.path.expandvars(os.path.expanduser(text)))
    try:
        while not os.path.lexists(path) and os.path.dirname(path) != path:
            os.lstat(os.path.dirname(path))
            path = os.path.dirname(path)
    except FileNotFoundError:
        return _usable_folder(os.path.dirname(path))
    except (OSError, ValueError):
        return False
    return os.path.isdir(path)


def _rules() -> dict[str, Rule]:
    """The rule of each variable that is looked at."""
    return {
        **dict.fromkeys(COUNTS, Rule(_whole(1), "a whole number >= 1")),
        **dict.fromkeys(RANKS, Rule(_whole(0), "a whole number >= 0")),
        **dict.fromkeys(LOCAL, Rule(_whole(-1), "a whole number >= 0, or -1")),
        "MASTER_PORT": Rule(_whole(0, PORT), f"a whole number in 0..{PORT}"),
        **dict.fromkeys(FLAGS, _one_of(*ON, *OFF)),
        **{
            f"ACCELERATE_USE_{name}": Rule(lambda text: text.lower() in (*OFF, ""), "false")
            for name in REFUSED
        },
        "ACCELERATE_MIXED_PRECISION": _one_of("no", "fp16", "bf16"),
        DEVICE_VARIABLE: Rule(
            lambda text: bool(DEVICE.fullmatch(text)), "a device of torch, such as cpu, cuda or cuda:0"
        ),
        "CUDA_VISIBLE_DEVICES": Rule(
            lambda text: bool(VISIBLE.fullmatch(text)), "numbers or names of GPUs with commas between"
        ),
        "FSDP_VERSION": _one_of("1", "2"),
        **dict.fromkeys(FOLDERS, Rule(_usable_folder, "a folder")),
    }


def check_environment() -> None:
    """Refuse a launch whose environment is not what the libraries can read.

    Raises:
        ValueError: the message names the variable and what it may hold.
    """
    for name, rule in _rules().items():
        value = os.environ.get(name)
        if value is not None and not rule.fits(value):
            hint = did_you_mean(value, rule.allowed.split(", "))
            raise ValueError(
                f"the environment variable {name} is {shown(value)}{hint}; allowed: {rule.allowed}, or unset"
            )
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is not None and world is not None and int(rank) >= int(world):
        raise ValueError(
            f"the environment variable RANK is {rank}; allowed: below WORLD_SIZE, which is {world}"
        )


def asked_of_accelerate() -> str:
    """The variables that are set for accelerate and the launch, with their values, for an error."""
    names = sorted(name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_")))
    names += [name for name in (*LAUNCH, "MASTER_ADDR", "MASTER_PORT") if name in os.environ]
    return (
        ", ".join(f"{name}={shown(os.environ[name])}" for name in names) or "no variable of a launch is set"
    )
