"""Writing to the disk: a file or a folder whole or not at all, and one wording for what can't be written.

`whole_file` and `save_tensors` write one file, `write_folder` a folder that nothing else is in, and
`update_folder` some files of a folder. All of them write beside the place, force it to the disk and rename,
so that a process that is killed, or a power cut, leaves nothing half written under a good name. At most one
folder above what is written is made, so a run's folder that was moved away is not made anew by its next file.

A file of tensors holds a sum of its own content, which `load_tensors` compares.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_ddpm.runtime.messages import one_line

SUM = "sha256"  # key of a file's sum in the header of its tensors
PARTIAL = re.compile(r"\.(.+)\.\d+\.tmp")  # the names that `whole_file` gives to what it is still writing
WORKER = "DataLoader worker"  # how torch's words on a killed process of a data loader begin


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write a file: it takes the place of `path` when the context ends well, and else is deleted.

    So a reader sees the old file or the new one, never half of one. Processes that write the same file at
    once each write a partial file of their own. The folder is made where it is missing.

    Raises:
        OSError: it can't be written; the message names `path`.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with named(path):
            path.parent.mkdir(exist_ok=True)
            yield partial
            _sync(partial, os.O_RDWR)
            os.replace(partial, path)
    finally:
        # Where nothing could be written there may be no folder to delete from; the error above says why
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def delete_partials(folder: Path, ours: Callable[[str], bool]) -> None:
    """Delete what killed processes left of files that they were writing with `whole_file`.

    Args:
        folder: one that no other process writes into now.
        ours: whether a file of that name is one to look for.
    """
    for path in folder.glob(".*.tmp"):
        if (match := PARTIAL.fullmatch(path.name)) and ours(match[1]):
            path.unlink(missing_ok=True)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all, with a sum of its content in its header.

    Args:
        path: the file; its folder is made where it is missing.
        tensors: by name; none shares memory with another.
        metadata: texts for the file's header.

    Raises:
        OSError: it can't be written; the message names it.
    """
    plain, texts = {name: tensor.contiguous() for name, tensor in tensors.items()}, dict(metadata or {})
    with whole_file(path) as partial:
        save_file(plain, partial, texts | {SUM: _sum(plain, texts)})


def load_tensors(path: Path, need_sum: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `save_tensors` wrote: the tensors, and the texts of the header.

    Args:
        path: the file.
        need_sum: whether a file without a sum is refused; earlier versions wrote none.

    Raises:
        ValueError: it is missing or damaged; the message names it.
    """
    try:
        with safe_open(path, "pt") as file:
            texts = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        found = texts.pop(SUM, None)
        if (need_sum or found is not None) and found != _sum(tensors, texts):
            raise ValueError("its content is not what its sum says" if found else "it has no sum")
    # What safetensors raises on foreign bytes has no common class
    except Exception as error:
        raise ValueError(f"{str(path)!r} is missing or damaged: {one_line(error)}") from error
    return tensors, texts


def _sum(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> str:
    """The SHA-256 of names, types, shapes and values, and of texts, in hex digits."""
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name!r} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Make `folder` hold what `fill(place)` writes: all of it, or, if that fails, what was there before.

    What is written is forced to the disk, so that it would survive a power cut.

    Raises:
        OSError: it can't be written.
        Exception: what `fill` raises.
    """
    with _scratch(folder.with_name(f".{folder.name}.tmp")) as place:
        fill(place)
        for file in (*place.rglob("*"), place):
            to_disk(file)
        if folder.exists():
            old = folder.rename(free_path(folder.with_name(f".{folder.name}.old")))
            try:
                place.rename(folder)
            except OSError:
                old.rename(folder)
                raise
            shutil.rmtree(old)
        else:
            place.rename(folder)
        to_disk(folder.parent)


def update_folder(folder: Path, fill: Callable[[Path], object], last: str) -> None:
    """Like `write_folder`, for a folder that holds other files too: each written file replaces its namesake.

    Each file is replaced in one step, so that a reader sees the old one or the new one, never half of one.
    The file `last`, a path within the folder, comes last.

    Raises:
        OSError: it can't be written.
        Exception: what `fill` raises; nothing is changed then.
    """
    with _scratch(folder / ".new.tmp") as place:
        fill(place)
        for file in place.rglob("*"):
            to_disk(file)
        files = [path.relative_to(place) for path in place.rglob("*") if path.is_file()]
        for file in sorted(files, key=lambda path: path.as_posix() == last):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(place / file, folder / file)


@contextmanager
def _scratch(place: Path) -> Iterator[Path]:
    """An empty folder, deleted afterwards; what a killed process left under its name is deleted first."""
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(exist_ok=True)
    place.mkdir()
    try:
        yield place
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and (error.filename or not error.errno):
            raise  # it names its file: the system's errors in `filename`, those of `named` in their words
        raise OSError(f"can't write {str(place)!r}: {one_line(error)}") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def named(file: Path) -> Iterator[Path]:
    """Raise every error of writing `file` as an OSError that names it.

    Libraries have their own classes and words for a full disk: SafetensorError, or torch's RuntimeError.

    Raises:
        OSError: the context raised an OSError, a SafetensorError or a RuntimeError.
        RuntimeError: a process of a data loader died meanwhile, which has nothing to do with the file.
    """
    try:
        yield file
    except (OSError, SafetensorError, RuntimeError) as error:
        if str(error).startswith(WORKER):
            raise  # torch raises this wherever the program is when a worker dies
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = (isinstance(cause, OSError) and cause.strerror) or one_line(cause)
        raise OSError(f"can't write {str(file)!r}: {reason}") from error


def to_disk(path: Path) -> None:
    """Wait until the content of a file, or the list of names of a folder, would survive a power cut."""
    if path.is_dir():
        with suppress(OSError):  # Windows and some network folders can't
            _sync(path, os.O_RDONLY)
    else:
        with named(path):
            _sync(path, os.O_RDWR)


def _sync(path: Path, flags: int) -> None:
    number = os.open(path, flags)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def why_not_writable(folder: Path) -> str | None:
    """Why nothing can be written into `folder`, in the system's words; None if it can.

    The folder may not be there yet; it is not made.
    """
    there = folder
    try:
        while not (there.exists() or there.is_symlink()):
            there = there.parent
    except OSError as error:  # a name that is too long, or one in a folder that may not be entered
        return error.strerror
    if not there.is_dir():
        return os.strerror(errno.EEXIST if there == folder else errno.ENOTDIR)
    return None if os.access(there, os.W_OK | os.X_OK) else os.strerror(errno.EACCES)


def free_path(path: Path) -> Path:
    """The path, or, where something is there already, the first of `path`-2, `path`-3, ... that is free."""
    numbered = (path.with_name(f"{path.name}-{i}") for i in range(2, 1000))
    return path if not path.exists() else next(other for other in numbered if not other.exists())
