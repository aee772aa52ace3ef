"""Checks of a model's folder that may come from a stranger, before any memory is allocated for it.

The weights files bound everything: the network that `config.json` describes is made on torch's "meta" device,
which allocates nothing, stops as soon as it has more weights than those files hold, must have exactly their
names, shapes and kinds of numbers, and is run there on one image, which tells how much memory that takes.
This module reads JSON files and the headers of safetensors files. It loads no weights.
"""

import functools
import re
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_ddpm.denoiser import as_denoiser
from hf_ddpm.folders.layout import CONFIG, index_names, weights_name
from hf_ddpm.folders.values import check_network_values, check_scheduler_values
from hf_ddpm.models import is_built_in
from hf_ddpm.runtime.messages import one_line
from hf_ddpm.runtime.untrusted import MAX_JSON, TooLarge, make_on_meta, read_json, shown, tensor_headers

MAX_PIXELS = 2**24  # of an image: 4096 x 4096; DDPMs of 1024 x 1024 are the largest that are known
# Memory that a network may take for one image, without its weights. The network of Ho et al. 2020 for images
# of 256 x 256 takes 0.35 GiB, and would take 5.1 GiB for 1024 x 1024
MAX_ACTIVATIONS = 2**33
MAX_SCHEDULER = 32 * 1_000_000  # bytes of a scheduler's config: one million betas of 25 characters
SLACK = 2  # while it is made, a network may register a weight twice: one that two layers share

# The dtypes of safetensors that are loaded for a weight of the network; of others, each is loaded for itself
FLOATS = ("F64", "F32", "F16", "BF16")
OTHERS = {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of diffusers < 0.15


def weights_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files that diffusers would load: the shards that an index names, or one file.

    Args:
        folder: holds them.
        variant: of the weights, as in diffusers' `from_pretrained`.

    Returns:
        The files, sorted; [] where there are none.

    Raises:
        ValueError: the index can't be read, or names anything but safetensors files beside it.
    """
    for name in index_names(variant):
        if (folder / name).exists():
            return sorted({folder / shard for shard in shards_of(folder / name).values()})
    return [path for path in [folder / weights_name(variant)] if path.exists()]


def shards_of(index: Path) -> dict[str, str]:
    """The files of sharded weights, by the names of the weights in them.

    Raises:
        ValueError: the index names anything but safetensors files beside it, or can't be read.
    """
    found = read_json(index, 4 * MAX_JSON)
    names = found.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index.name} has no weight_map of names")
    if not isinstance(found.get("metadata"), dict):
        raise ValueError(f"{index.name} has no metadata of keys and values")
    for name in names.values():
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ValueError(
                f"{index.name} names {shown(name)}; allowed: safetensors files of its own folder"
            )
    return names


def check_scheduler(scheduler: type, file: Path, name: str | None = None) -> None:
    """Refuse a scheduler's config with values that it has no use for, or whose tables would fill the memory.

    Args:
        scheduler: its class.
        file: its config.
        name: what an error calls it, by default the file's own name.

    Raises:
        ValueError: it can't be read, or holds such a value.
    """
    name = file.name if name is None else name
    check_scheduler_values(scheduler, read_json(file, MAX_SCHEDULER, name), name)


def check_network(
    network: type[ModelMixin], folder: Path, variant: str | None = None, place: str = ""
) -> None:
    """Refuse weights and a config that don't belong together, or that would fill the memory.

    Missing files pass: diffusers' loader names them.

    Args:
        network: the class of the network.
        folder: holds its `config.json` and its weights.
        variant: of the weights, as in diffusers' `from_pretrained`.
        place: what errors write before the names of the files, such as "unet/".

    Raises:
        ValueError: the index of the shards names other files than those beside it, a file is no regular one
            or can't be read, a value of the config is none that the class takes, the weights files hold
            other tensors than the network has, or one image would take more than `MAX_ACTIVATIONS`.
    """
    files = weights_files(folder, variant)
    if not (folder / CONFIG).exists() or not files:
        return
    config = read_json(folder / CONFIG, name=f"{place}{CONFIG}")
    check_network_values(network, config, f"{place}{CONFIG}")
    check_size(config, f"{place}{CONFIG}")
    found = _headers(folder, files, variant, place)
    numbers = sum(torch.Size(shape).numel() for _, shape in found.values())
    try:
        empty = make_empty(network, config, SLACK * numbers, SLACK * len(found))
    except TooLarge:
        raise ValueError(
            f"{place}{CONFIG} describes a network of more weights than its files hold, {numbers} in "
            f"{len(found)} tensors; allowed: a config and weights of the same network"
        ) from None
    except ValueError as error:
        raise ValueError(f"{place}{CONFIG}: {one_line(error, limit=160)}") from None
    check_tensors(empty, found, f"{place}{files[0].name}", f"{place}{CONFIG}")
    check_run(empty, config, f"{place}{CONFIG}")


def _headers(
    folder: Path, files: list[Path], variant: str | None, place: str
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What all weights files say of their tensors; shards must hold what their index says."""
    index = next((folder / name for name in index_names(variant) if (folder / name).exists()), None)
    found = {}
    for file in files:
        headers = tensor_headers(file, f"{place}{file.name}")
        if index is not None:
            said = {name for name, shard in shards_of(index).items() if shard == file.name}
            if said != set(headers):
                raise ValueError(f"{place}{file.name} holds other tensors than {index.name} says")
        found |= headers
    return found


def check_tensors(
    network: nn.Module, found: Mapping[str, tuple[str, tuple[int, ...]]], file: str, config: str
) -> None:
    """Refuse weights that are not exactly the network's.

    Args:
        network: on any device, the "meta" one too.
        found: what `tensor_headers` said of the files.
        file: what an error calls the weights file.
        config: what an error calls the config.

    Raises:
        ValueError: a tensor is missing, is one too many, or has another shape or another kind of numbers.
    """
    wanted: dict[str, Tensor] = network.state_dict()
    ignored = getattr(network, "_keys_to_ignore_on_load_unexpected", None) or ()
    found = {_new_name(name, wanted): header for name, header in found.items()}
    found = {name: x for name, x in found.items() if not any(re.search(word, name) for word in ignored)}
    allowed = f"allowed: the tensors of the network that {config} describes"
    for names, what in ((wanted.keys() - found.keys(), "lacks"), (found.keys() - wanted.keys(), "holds")):
        if names:
            first, more = shown(min(names)), f" and {len(names) - 1} more" * (len(names) > 1)
            extra = ", which the network has no use for" * (what == "holds")
            raise ValueError(f"{file} {what} {first}{more}{extra}; {allowed}")
    for name, weight in wanted.items():
        dtype, shape = found[name]
        if shape != tuple(weight.shape):
            raise ValueError(
                f"{file}: {shown(name)} has shape {shown(shape)}; allowed by {config}: "
                f"{shown(tuple(weight.shape))}"
            )
        dtypes = FLOATS if weight.is_floating_point() else (OTHERS.get(weight.dtype, "none"),)
        if dtype not in dtypes:
            raise ValueError(f"{file}: {shown(name)} is of {dtype}; allowed: {', '.join(dtypes)}")


def _new_name(name: str, wanted: Mapping[str, Tensor]) -> str:
    """The name that diffusers gives to a weight of an old file."""
    place, _, last = name.rpartition(".")
    place, _, layer = place.rpartition(".")
    new = f"{place}.{OLD_NAMES.get(layer, layer)}.{last}"
    return new if name not in wanted and new in wanted else name


def check_size(config: Mapping[str, Any], name: str = CONFIG) -> None:
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
        raise ValueError(
            f"{name}: sample_size is {shown(size)}; allowed: one or two sides, of at most {MAX_PIXELS} pixels"
        )


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
    try:
        return make_on_meta(lambda: network.from_config(dict(config)), numbers, tensors)  # type: ignore[attr-defined,return-value]
    except ValueError:
        raise
    except Exception as error:  # what a class raises on a config that is not its own
        raise ValueError(f"{network.__name__} can't be made from {CONFIG}: {one_line(error)}") from error


# What one image takes


class _Flash(TorchFunctionMode):
    """Attention as the kernels of CPUs and GPUs do it: without the matrix of all pairs of pixels."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            query, _, value = (args + tuple((kwargs or {}).values()))[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


class _Memory(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and stops where they pass `MAX_ACTIVATIONS`."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}  # bytes by storage
        self.total = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for x in output if isinstance(output, list | tuple) else [output]:
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                self.total += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata)
        self.peak = max(self.peak, self.total)
        if self.total > MAX_ACTIVATIONS:
            raise MemoryError
        return output

    def _freed(self, storage: int) -> None:
        self.total -= self.alive.pop(storage, 0)


def activations(network: nn.Module, shape: tuple[int, int, int], **given: Any) -> int:
    """The most bytes that a network's tensors take at once while it is called on one image, but for weights.

    Args:
        network: on the "meta" device, where nothing is computed.
        shape: of the image, (C, H, W).
        **given: further arguments of the network.

    Raises:
        MemoryError: they are more than `MAX_ACTIVATIONS`.
        ValueError: the answer's shape is not that of a denoiser.
        Exception: what the network raises.
    """
    x_t = torch.empty(1, *shape, device="meta")
    t = torch.zeros(1, dtype=torch.int64, device="meta")
    with torch.no_grad(), _Flash(), _Memory() as memory:
        as_denoiser(functools.partial(network, **given) if given else network)(x_t, t)
    return memory.peak


def check_run(network: nn.Module, config: Mapping[str, Any], name: str = CONFIG) -> None:
    """Refuse a network that can't be called on an image, or needs more memory for it than it may.

    Networks whose config says no size of the images pass, as do those of others than diffusers and this
    package that can't be run on the "meta" device.

    Args:
        network: on the "meta" device.
        config: content of its `config.json`.
        name: what an error calls the config.

    Raises:
        ValueError: it is refused.
    """
    size, channels = config.get("sample_size"), getattr(network, "config", {}).get("in_channels")
    if size is None or not isinstance(channels, int):
        return
    levels = len(config.get("block_out_channels") or [0])
    sides = size if isinstance(size, list) else [size, size]
    if (
        "down_block_types" in config
    ):  # a U-Net of another size than it can halve is called with one that it can
        sides = [-(-side // 2 ** (levels - 1)) * 2 ** (levels - 1) for side in sides]
    labels = any(config.get(key) is not None for key in ("class_embed_type", "num_class_embeds"))
    given = {"class_labels": torch.zeros(1, dtype=torch.int64, device="meta")} if labels else {}
    try:
        activations(network.eval(), (channels, *sides), **given)
    except MemoryError:
        raise ValueError(
            f"{name}: an image of sample_size {shown(size)} takes this network more memory than "
            f"{MAX_ACTIVATIONS >> 30} GiB; allowed: at most as much"
        ) from None
    except Exception as error:  # what a network raises on a config that makes no sense
        if is_built_in(type(network)):
            raise ValueError(
                f"{name}: {type(network).__name__} of it fails on an image: {one_line(error, limit=120)}"
            ) from None
