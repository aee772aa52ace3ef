"""A lock on a folder, held by the system: it ends with its process, however that ends, and leaves no file.

The lock is on the folder itself, not on a file in it, so deleting files doesn't open it. Where a system can't
lock folders (Windows, NFS), a hidden file in the folder is locked instead. A lock belongs to the process that
took it: processes that are forked from it, such as a data loader's, let go of it at once.
"""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

fcntl: Any = None
msvcrt: Any = None
try:
    import fcntl
except ModuleNotFoundError:  # Windows
    import msvcrt

logger = logging.getLogger(__name__)

_HELD: set[int] = set()  # descriptors of what this process has locked


class FolderLock:
    """Keeps other processes out of a folder, from `acquire` to `release` or the process's end.

    Args:
        folder: made when missing, and deleted on release if nothing was written into it.
        spare: name of the file in it that is locked where folders can't be.
    """

    def __init__(self, folder: Path, spare: str):
        self._folder, self._spare = folder, folder / spare
        self._made: list[Path] = []
        self._number: int | None = None
        self._identity: tuple[int, int] | None = None

    def acquire(self) -> None:
        """Make the folder, lock it, and see that it can be written.

        Raises:
            OSError: it can't be made or written.
            ValueError: another process has locked it; the message says which if the system tells.
        """
        try:
            while not self._try():
                pass
            with tempfile.TemporaryFile(dir=self._folder):
                pass
        except BlockingIOError as error:
            self.release()
            raise ValueError(f"is in use by {error}") from None
        except BaseException:
            self.release()
            raise

    def _try(self) -> bool:
        """Lock the folder that is there now; False if the process that had it before deleted it meanwhile."""
        for folder in (*reversed(self._folder.parents), self._folder):
            if not folder.exists():
                folder.mkdir(exist_ok=True)
                self._made.append(folder)
        self._folder.mkdir(exist_ok=True)  # raises if it is a file
        self._identity = _identity(self._folder)
        self._number = _lock(self._folder, self._spare)
        if self._identity == _identity(self._folder):
            return True
        self._close()
        return False

    def check(self) -> None:
        """See that the folder is where it was; a lock that this process doesn't hold has nothing to see.

        Raises:
            OSError: it was moved, deleted or replaced since it was locked.
        """
        if self._identity not in (None, _identity(self._folder)):
            raise OSError(
                f"the folder {str(self._folder)!r} was moved or deleted while it was in use; what had been "
                "saved there went with it"
            )

    def release(self) -> None:
        """Let others have the folder."""
        with suppress(OSError):  # the folder was never there
            if self._made and os.listdir(self._folder) == [self._spare.name]:
                self._spare.unlink()
        if self._identity in (None, _identity(self._folder)):
            for folder in reversed(self._made):
                with suppress(OSError):  # something is in it
                    folder.rmdir()
        self._made.clear()
        self._identity = None
        self._close()

    def _close(self) -> None:
        _let_go(self._number)
        self._number = None


def _identity(path: Path) -> tuple[int, int] | None:
    """What stays the same of a folder that is moved, and differs for one that takes its place."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Keep other processes out of this context with the same file, by a hidden file beside it.

    Raises:
        OSError: nothing can be written there.
        ValueError: another process is writing the file; the message says which if the system tells.
    """
    place, number = path.with_name(f".{path.name}.claim"), -1
    try:
        while number < 0:
            number = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
            _locks(number)
            found = os.fstat(number)
            if _identity(place) != (found.st_dev, found.st_ino):  # the process that had it has deleted it
                _let_go(number)
                number = -1
        yield
        place.unlink(missing_ok=True)
    except BlockingIOError as error:
        raise ValueError(f"{str(path)!r} is in use by {error}") from None
    finally:
        _let_go(number)


def _lock(folder: Path, spare: Path) -> int | None:
    """Lock a folder, or the file in it; the descriptor that holds the lock, None if neither can be locked.

    Raises:
        BlockingIOError: another process has locked it; the message says which.
        OSError: the file can't be made.
    """
    number = -1
    if fcntl is not None:
        with suppress(OSError):  # a folder that may not be listed
            number = os.open(folder, os.O_RDONLY)
    if number >= 0 and _locks(number):
        return number
    number = os.open(spare, os.O_RDWR | os.O_CREAT, 0o666)
    if _locks(number):
        return number
    logger.warning("%s can't be locked: start no second command that writes there", folder)
    return None


def _locks(number: int) -> bool:
    """Lock a file or folder; if that fails, the descriptor is closed.

    Returns:
        Whether the system can.

    Raises:
        BlockingIOError: another process has locked it; the message says which.
    """
    _HELD.add(number)
    for lock in (_lock_whole, _lock_byte):
        try:
            lock(number)
            return True
        except (BlockingIOError, PermissionError):
            holder = _holder(number)
            _let_go(number)
            raise BlockingIOError(holder) from None
        except OSError:  # of this kind there are no locks here
            continue
    _let_go(number)
    return False


def _let_go(number: int | None) -> None:
    """Close a descriptor, if it is one of this process's."""
    if number in _HELD:
        _HELD.discard(number)
        os.close(number)


def _lock_whole(number: int) -> None:
    """The lock that folders take too."""
    if fcntl is None:
        raise OSError("no such locks here")
    fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _lock_byte(number: int) -> None:
    """The lock that files take everywhere, Windows included; folders don't."""
    if fcntl is None:
        msvcrt.locking(number, msvcrt.LK_NBLCK, 1)
    else:
        fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _holder(number: int) -> str:
    """Who has locked a file, as Linux tells."""
    with suppress(OSError, ValueError, IndexError):
        inode = os.fstat(number).st_ino
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            words = line.split()
            if words[1] in ("FLOCK", "POSIX") and words[5].endswith(f":{inode}") and int(words[4]) > 0:
                return f"process {words[4]}"
    return "another process"


def _forget() -> None:
    """In a forked process: close what the parent has locked, which leaves the locks to the parent."""
    for number in _HELD:
        with suppress(OSError):
            os.close(number)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
