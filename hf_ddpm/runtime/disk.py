"""Writing to the disk: a file or a folder whole or not at all, and one wording for what can't be written.

`whole_file` and `save_tensors` write one file, `write_folder` a folder that nothing else is in, and
`update_folder` some files of a folder. All of them write beside the place and rename, so that a process that
is killed leaves nothing half written under a good name.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hf_ddpm.runtime.messages import one_line


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
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            os.replace(partial, path)
    finally:
        # Where nothing could be written there may be no folder to delete from; the error above says why
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all; its folder is made where it is missing.

    Args:
        path: the file.
        tensors: by name; none shares memory with another.
        metadata: texts for the file's header.

    Raises:
        OSError: it can't be written; the message names it.
    """
    with whole_file(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)


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
    place.mkdir(parents=True)
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
    """
    try:
        yield file
    except (OSError, SafetensorError, RuntimeError) as error:
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
