"""The folder of a feature network, which may be a stranger's: what is checked before transformers reads it.

transformers makes any network that a config describes, and follows some keys to other networks or to code.
This file is imported where one is loaded, as it imports transformers.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers.utils import (
    CONFIG_NAME,
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from hf_ddpm.runtime.untrusted import MAX_JSON, make_on_meta, read_json, shown, tensor_headers

FLOATS = ("F64", "F32", "F16", "BF16")
# Keys of a config by which transformers fetches another network, or code that reads the weights
REFUSED = ("quantization_config", "use_pretrained_backbone", "use_timm_backbone", "base_model_name_or_path")
MAX_NUMBER = 2**20  # in a config, as transformers makes lists as long as some of them; vocabularies have 2^18
MAX_SIDE = 2**13  # of the images that a network sees: no published one takes more than 1024


def fetch(repo_id: str) -> Path:
    """Download a network's JSON and safetensors files, but for those in the cache; no pickles, no code.

    Returns:
        The folder in the cache.
    """
    names = [CONFIG_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, SAFE_WEIGHTS_INDEX_NAME]
    return Path(snapshot_download(repo_id, allow_patterns=[*names, f"*{Path(SAFE_WEIGHTS_NAME).suffix}"]))


def check_config(folder: Path) -> None:
    """Refuse a config that can't be read, or that names code or another network for transformers to fetch.

    Raises:
        ValueError: it is refused.
    """
    _check_json(folder / CONFIG_NAME, MAX_NUMBER)


def check_processor(folder: Path) -> None:
    """Refuse an image processor that can't be read, or makes images that would fill the memory.

    Raises:
        ValueError: it is refused.
    """
    for name in (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME):
        if (folder / name).exists():
            _check_json(folder / name, MAX_SIDE)


def _check_json(file: Path, largest: int) -> None:
    """Refuse a JSON file that would fill the memory, or that names code for transformers to fetch.

    Args:
        file: of a feature network, which may be a stranger's.
        largest: the largest whole number in it.

    Raises:
        ValueError: it is refused.
    """
    waiting: list[tuple[str, Any]] = list(read_json(file).items())
    for key, value in waiting:  # which grows by what is found inside
        if isinstance(value, dict | list):
            inner = value.items() if isinstance(value, dict) else ((key, x) for x in value)
            waiting += [(name, x) for name, x in inner if isinstance(x, dict | list | int | str | float)]
        elif isinstance(value, int) and abs(value) > largest:
            raise ValueError(f"{file.name}: {shown(key)} is {shown(value)}; allowed: at most {largest}")
        if key.endswith("_implementation") and value not in (None, "eager", "sdpa"):
            raise ValueError(f"{file.name}: {shown(key)} is {shown(value)}; allowed: eager, sdpa")
        if key in REFUSED and value:
            raise ValueError(f"{file.name}: {key} is {shown(value)}; allowed: none")


def check_weights(folder: Path, make: Callable[[], nn.Module]) -> None:
    """Refuse weights that are no numbers of a network, or a config of a network that is larger than they are.

    Args:
        folder: of a feature network.
        make: makes the network that the config describes.

    Raises:
        ValueError: it is refused.
    """
    if (folder / ADAPTER_CONFIG_NAME).exists():  # it would name another network to load
        raise ValueError(f"there is an {ADAPTER_CONFIG_NAME}; allowed: a network without an adapter")
    names: Any = [SAFE_WEIGHTS_NAME]
    if (folder / SAFE_WEIGHTS_INDEX_NAME).exists():
        names = read_json(folder / SAFE_WEIGHTS_INDEX_NAME, 4 * MAX_JSON).get("weight_map")
        names = set(names.values()) if isinstance(names, dict) else [None]
    if not all(isinstance(name, str) and _is_plain(name) for name in names):
        raise ValueError(f"{SAFE_WEIGHTS_INDEX_NAME} names other files than safetensors of its own folder")
    headers = [header for name in names for header in tensor_headers(folder / name).values()]
    if wrong := [dtype for dtype, _ in headers if dtype not in (*FLOATS, "I64")]:
        raise ValueError(f"weights are of {wrong[0]}; allowed: {', '.join(FLOATS)}")
    numbers = sum(torch.Size(shape).numel() for _, shape in headers)
    # Twice, as a weight that two layers share is made twice, and a pooler may be missing
    make_on_meta(make, 2 * numbers, 2 * len(headers))


def _is_plain(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+", name) is not None and name.endswith(Path(SAFE_WEIGHTS_NAME).suffix)
