"""What a model's folder says, checked before anything is allocated: sizes, weights, names of files.

A folder may come from a stranger. Its weights files bound everything: a network is made on the "meta" device,
which allocates nothing, and only as far as the numbers in the files would fill it. The file knows JSON and
safetensors headers; it loads nothing.
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

from hf_ddpm.folders.layout import WEIGHTS
from hf_ddpm.runtime.messages import one_line

MAX_PIXELS = 2**26  # of an image: 8192 x 8192
MAX_STEPS = 1_000_000  # of a process: the largest number in a scheduler's config
SLACK = 2  # a network may have so many times the numbers of its weights files: old layouts differ a little


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: there is none, or it can't be read.
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
    """The safetensors files of a network's weights in their folder, one or several shards; none if absent."""
    name = WEIGHTS if variant is None else f"{WEIGHTS}.{variant}"
    pattern = re.compile(rf"{re.escape(name)}(-\d+-of-\d+)?\.safetensors")
    return sorted(path for path in folder.glob("*.safetensors") if pattern.fullmatch(path.name))


def check_scheduler(config: Mapping[str, Any]) -> None:
    """Refuse a scheduler's config whose tables would fill the memory.

    Raises:
        ValueError: a number is larger than any process has steps.
    """
    for key, value in config.items():
        if isinstance(value, int) and abs(value) > MAX_STEPS:
            raise ValueError(f"{key} of the scheduler is {value}; allowed: <= {MAX_STEPS}")


def check_network(network: type[ModelMixin], folder: Path, variant: str | None = None) -> None:
    """Refuse weights and a config that don't belong together, or that would fill the memory.

    Args:
        network: the class that the folder is for.
        folder: with `config.json` and the weights.
        variant: as in diffusers' `from_pretrained`.

    Raises:
        ValueError: shards outside the folder, a weights file that is not safetensors, images too large, or a
            network of more weights than the files hold. Missing files are left to diffusers' loader.
    """
    for index in folder.glob("*.index*.json"):
        check_shards(index)
    if not (folder / "config.json").is_file() or not (files := weights_files(folder, variant)):
        return
    check_size(config := read_json(folder / "config.json"))
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
    """Refuse an index file of sharded weights that names anything but files beside it.

    Raises:
        ValueError: a name with a folder in it, or one that is not safetensors; or the index can't be read.
    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index.name} has no weight_map of names")
    for name in names.values():
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ValueError(f"{index.name} names {name!r}; allowed: safetensors files of its own folder")


def check_size(config: Mapping[str, Any]) -> None:
    """Refuse images that no memory holds.

    Raises:
        ValueError: `sample_size` is no side or pair of sides, or too large.
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
    """The network on the "meta" device: shapes, and no memory.

    Args:
        network: its class.
        config: content of its `config.json`.
        numbers: how many weights it may have; making it stops there.
        tensors: and in how many tensors.

    Raises:
        ValueError: it has more, or its class doesn't take the config.
    """
    thread, found = threading.get_ident(), [0, 0]

    def count(module: nn.Module, name: str, weight: torch.Tensor | None) -> None:
        if weight is None or threading.get_ident() != thread:  # the hook sees every module of the process
            return
        found[0], found[1] = found[0] + weight.numel(), found[1] + 1
        if found[0] > numbers or found[1] > tensors:
            raise ValueError(
                f"config.json describes a network of more than {found[0] - weight.numel()} weights in "
                f"{found[1] - 1} tensors, but its files hold {numbers // SLACK} in {tensors // SLACK}; "
                "allowed: a config and weights of the same network"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            return network.from_config(dict(config))  # type: ignore[attr-defined,return-value]
    except ValueError:
        raise
    except Exception as error:  # what a class raises on a config that is not its own
        raise ValueError(f"{network.__name__} can't be made from config.json: {one_line(error)}") from error
    finally:
        hook.remove()
