"""Files that may come from a stranger: what they are and how large they are, before any of it is believed.

Nothing here waits for a pipe, reads a device, follows a number that a file claims, or allocates more than the
limits below allow. This file knows JSON, safetensors and networks as such. It knows no model's folder.
"""

import json
import re
import stat
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from hf_ddpm.runtime.messages import one_line

MAX_JSON = 2**22  # bytes of a JSON file: 4 MiB, where a config has 1 KiB and an evaluation 10 KiB
MAX_DEPTH = 20  # of lists and objects within each other
MAX_CONTAINERS = (
    100_000  # lists and objects in a JSON file: an empty one takes 64 bytes of memory for its two
)
MAX_HEADER = 2**24  # bytes of a safetensors header: 16 MiB describe 100,000 tensors
SHOWN = 60  # characters of a value in an error

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class TooLarge(ValueError):
    """A network has more weights than it may."""


Module = TypeVar("Module", bound=nn.Module)


def shown(value: object) -> str:
    """A value of a file as an error shows it: in Python's writing, cut to `SHOWN` characters."""
    if isinstance(value, list | tuple) and len(value) > SHOWN:
        value = value[:SHOWN]
    words = repr(value)
    return words if len(words) <= SHOWN else f"{words[:SHOWN]}…"


def check_regular(path: Path, name: str | None = None) -> None:
    """Refuse what is not a regular file, or a link to one.

    The Hub's cache is made of links out of the model's folder, so a link may lead anywhere.

    Args:
        path: the file.
        name: what an error calls it, by default the file's own name.

    Raises:
        ValueError: it is missing, can't be asked for, or is a folder, a pipe, a socket or a device.
    """
    name = path.name if name is None else name
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise ValueError(f"there is no file named {name}") from None
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "no file")
        raise ValueError(f"{name} is {kind}; allowed: a regular file")


def read_bytes(path: Path, limit: int = MAX_JSON, name: str | None = None) -> bytes:
    """The content of a regular file of at most so many bytes.

    Raises:
        ValueError: it is no regular file, can't be read, or is larger.
    """
    name = path.name if name is None else name
    check_regular(path, name)
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}") from None
    if len(data) > limit:
        raise ValueError(f"{name} has more than {limit} bytes; allowed: at most {limit}")
    return data


def read_json(path: Path, limit: int = MAX_JSON, name: str | None = None) -> dict[str, Any]:
    """The keys and values of a JSON file.

    Args:
        path: the file.
        limit: the most bytes that it may have.
        name: what an error calls it, by default the file's own name.

    Raises:
        ValueError: the file is missing, no regular file or too large, or `parse_json` refuses its content.
    """
    name = path.name if name is None else name
    return parse_json(read_bytes(path, limit, name), name)


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """The keys and values of JSON.

    Args:
        data: the text, UTF-8.
        name: what an error calls it.

    Raises:
        ValueError: it is not JSON, holds something else than keys and values, NaN, a key twice, text that
            can't be written, or more than `MAX_CONTAINERS` lists and objects, deeper than `MAX_DEPTH`.
    """
    if data.count(b"[") + data.count(b"{") > MAX_CONTAINERS:
        raise ValueError(f"{name} has more than {MAX_CONTAINERS} brackets; allowed: at most as many")
    try:
        found = json.loads(data.decode(), object_pairs_hook=_once, parse_constant=_constant)
        if re.search(rb"\\u[dD][89a-fA-F]", data):
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"{name} is not a valid JSON file: it is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{name} is not a valid JSON file: {one_line(error, limit=120)}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name} holds {type(found).__name__}; allowed: keys and values")
    if _is_deeper(found, MAX_DEPTH):
        raise ValueError(f"{name} is nested too deep; allowed: {MAX_DEPTH} levels")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {shown(twice)} stands there twice")
    return found


def _constant(word: str) -> float:
    if word == "NaN":
        raise ValueError("it holds NaN, which is no number")
    return float(word)  # ±Infinity, which diffusers writes for a limit that there is not


def _is_deeper(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(x, levels - 1) for x in inner if isinstance(x, dict | list))


def tensor_headers(path: Path, name: str | None = None) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What a safetensors file says of its tensors; none of them is read.

    Args:
        path: the file.
        name: what an error calls it, by default the file's own name.

    Returns:
        By the tensors' names: the dtype in the words of safetensors ("F32"), and the shape.

    Raises:
        ValueError: it is no regular file or no safetensors, or its header is larger than `MAX_HEADER`.
    """
    name = path.name if name is None else name
    check_regular(path, name)
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
        # A file that is no safetensors at all is left to the library, which says so
        if MAX_HEADER < size < path.stat().st_size:
            raise ValueError(f"its header has {size} bytes; allowed: at most {MAX_HEADER}")
        with safe_open(path, "pt") as opened:
            slices = ((key, opened.get_slice(key)) for key in opened.keys())
            return {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices}
    except Exception as error:  # what safetensors raises on foreign bytes has no common class
        reason = (isinstance(error, OSError) and error.strerror) or one_line(error, limit=120)
        raise ValueError(f"{name} is not a safetensors file that can be read: {reason}") from None


def make_on_meta(
    make: Callable[[], Module], numbers: float = float("inf"), tensors: float = float("inf")
) -> Module:
    """A network on torch's "meta" device: its tensors have shapes, but no memory.

    Args:
        make: makes it.
        numbers: how many weights it may have; making it stops there.
        tensors: in how many tensors these may be.

    Raises:
        TooLarge: it has more of either.
        Exception: what `make` raises.
    """
    thread, found = threading.get_ident(), [0, 0]  # so far: weights, tensors

    def count(module: nn.Module, name: str, weight: torch.Tensor | None) -> None:
        if weight is None or threading.get_ident() != thread:  # the hook sees every module of the process
            return
        found[0], found[1] = found[0] + weight.numel(), found[1] + 1
        if found[0] > numbers or found[1] > tensors:
            raise TooLarge(f"it has more than {numbers:.0f} weights or {tensors:.0f} tensors")

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            return make()
    finally:
        hook.remove()
