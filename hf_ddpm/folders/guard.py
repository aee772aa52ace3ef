"""Checks of a folder that may come from a stranger, before any memory is allocated for what it describes.

The sizes of the weights files bound everything: the network that `config.json` describes is made on torch's
"meta" device, which allocates nothing, and is refused as soon as it has more weights than those files hold.
This module reads JSON files and the headers of safetensors files. It loads no weights.
"""

import json
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors import safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from hf_ddpm.folders.layout import CONFIG, TENSORS, is_weights
from hf_ddpm.runtime.messages import one_line

MAX_PIXELS = 2**26  # of an image: 8192 x 8192
MAX_STEPS = 1_000_000  # of a process; no other whole number in a scheduler's config is larger
SLACK = 2  # a network may have twice the weights of its files: diffusers' older layouts differ a little


def read_json(path: Path) -> dict[str, Any]:
    """The keys and values of a JSON file.

    Raises:
        ValueError: the file is missing, can't be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path.name}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not a valid JSON file: {one_line(error)}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds {type(found).__name__}; allowed: keys and values")
    return found


def weights_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files of a network's weights, one file or several shards; [] where there are none."""
    return sorted(path for path in folder.glob(f"*{TENSORS}") if is_weights(path.name, variant))


def check_scheduler(config: Mapping[str, Any]) -> None:
    """Refuse a scheduler's config whose tables would fill the memory.

    Raises:
        ValueError: a whole number is larger than the number of steps that a process may have.
    """
    for key, value in config.items():
        if isinstance(value, int) and abs(value) > MAX_STEPS:
            raise ValueError(f"{key} of the scheduler is {value}; allowed: <= {MAX_STEPS}")


def check_network(network: type[ModelMixin], folder: Path, variant: str | None = None) -> None:
    """Refuse weights and a config that don't belong together, or that would fill the memory.

    Missing files pass: diffusers' loader names them.

    Args:
        network: the class of the network.
        folder: holds its `config.json` and its weights.
        variant: of the weights, as in diffusers' `from_pretrained`.

    Raises:
        ValueError: the index of the shards names other files than those beside it, a weights file is not
            safetensors, the images are too large, or the network has more weights than the files hold.
    """
    for index in folder.glob("*.index*.json"):
        check_shards(index)
    if not (folder / CONFIG).is_file() or not (files := weights_files(folder, variant)):
        return
    check_size(config := read_json(folder / CONFIG))
    tensors = numbers = 0
    for file in files:
        try:
            with safe_open(file, "pt") as header:
                shapes = [header.get_slice(name).get_shape() for name in header.keys()]
        except Exception as error:  # what safetensors raises on foreign bytes has no common class
            raise ValueError(f"Unable to load weights from '{file}'. {one_line(error)}") from error
        tensors += len(shapes)
        numbers += sum(torch.Size(shape).numel() for shape in shapes)
    make_empty(network, config, SLACK * numbers, SLACK * tensors)


def check_shards(index: Path) -> None:
    """Refuse an index of sharded weights that names anything but safetensors files beside it.

    Raises:
        ValueError: it does, or it can't be read.
    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index.name} has no weight_map of names")
    for name in names.values():
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ValueError(f"{index.name} names {name!r}; allowed: safetensors files of its own folder")


def check_size(config: Mapping[str, Any]) -> None:
    """Refuse images that would fill the memory.

    Raises:
        ValueError: `sample_size` is neither a side in pixels nor a pair of them, or is too large.
    """
    size = config.get("sample_size")
    if size is None:
        return
    sides = size if isinstance(size, list) else [size, size]
    whole = all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides)
    if not (len(sides) == 2 and whole and sides[0] * sides[1] <= MAX_PIXELS):
        raise ValueError(f"sample_size is {size!r}; allowed: one or two sides of at most {MAX_PIXELS} pixels")


def make_empty(
    network: type[ModelMixin],
    config: Mapping[str, Any],
    numbers: float = float("inf"),
    tensors: float = float("inf"),
) -> nn.Module:
    """The network on torch's "meta" device: its tensors have shapes, but no memory.

    Args:
        network: its class.
        config: content of its `config.json`.
        numbers: how many weights it may have; making it stops there.
        tensors: in how many tensors these may be.

    Raises:
        ValueError: it has more of either, or its class doesn't take the config.
    """
    thread, found = threading.get_ident(), [0, 0]  # so far: weights, tensors

    def count(module: nn.Module, name: str, weight: torch.Tensor | None) -> None:
        if weight is None or threading.get_ident() != thread:  # the hook sees every module of the process
            return
        before = tuple(found)
        found[0], found[1] = found[0] + weight.numel(), found[1] + 1
        if found[0] > numbers or found[1] > tensors:
            raise ValueError(
                f"{CONFIG} describes a network of more than {before[0]} weights in {before[1]} tensors, but "
                f"its files hold {numbers // SLACK} in {tensors // SLACK}; allowed: a config and weights of "
                "the same network"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            return network.from_config(dict(config))  # type: ignore[attr-defined,return-value]
    except ValueError:
        raise
    except Exception as error:  # what a class raises on a config that is not its own
        raise ValueError(f"{network.__name__} can't be made from {CONFIG}: {one_line(error)}") from error
    finally:
        hook.remove()
