"""Writing to the disk: a file or a folder whole or not at all, and one wording for what can't be written."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from hf_ddpm.runtime.messages import one_line


def _free(path: Path) -> Path:
    """The path, or the first of it numbered that nothing is at."""
    numbered = (path.with_name(f"{path.name}-{i}") for i in range(2, 1000))
    return path if not path.exists() else next(other for other in numbered if not other.exists())


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write a file that takes the place of `path` when the context ends well, and else is deleted.

    So a reader sees the old file or the new one, never half of one. The folder is made where it is missing.

    Raises:
        OSError: it can't be written; the message names the file.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Make `folder` hold what `fill(place)` writes: all of it, or, if that fails, what was there before."""
    with _scratch(folder.with_name(f".{folder.name}.tmp")) as place:
        fill(place)
        for file in (*place.rglob("*"), place):
            to_disk(file)
        if folder.exists():
            old = folder.rename(_free(folder.with_name(f".{folder.name}.old")))
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

    Every replacement is atomic, the file `last` comes last, and a reader of files whose content did not
    change in between sees the old or the new ones, never half of one.
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
    """An empty folder that is gone afterwards; what a killed process left under its name goes first."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        yield place
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and (error.filename or not error.errno):
            raise  # it names its file
        raise OSError(f"can't write {str(place)!r}: {one_line(error)}") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def named(file: Path) -> Iterator[Path]:
    """What can't be written, in one class and by name: libraries have their own words for a full disk."""
    try:
        yield file
    except (OSError, SafetensorError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = (isinstance(cause, OSError) and cause.strerror) or one_line(cause)
        raise OSError(f"can't write {str(file)!r}: {reason}") from error


def to_disk(path: Path) -> None:
    """Wait until a file's content, or what a folder lists, would survive a power cut."""
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
    """Why nothing can be written into `folder`, which isn't made here; None if it can."""
    there = folder
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        return os.strerror(errno.EEXIST if there == folder else errno.ENOTDIR)
    return None if os.access(there, os.W_OK | os.X_OK) else os.strerror(errno.EACCES)
