"""A lock on a folder, which the system holds: it ends with its process, however that ends, and leaves no file.

The lock is on the folder itself, not on a file in it, so deleting files doesn't open it. Where a system can't
lock folders (Windows, NFS), a hidden file in the folder is locked instead. A lock belongs to the process that
took it: processes that are forked from it, such as a data loader's, let go of it at once.
"""

import logging
import os
import tempfile
from contextlib import suppress
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
        """See that the folder is where it was.

        Raises:
            OSError: it was moved, deleted or replaced since it was locked.
        """
        if self._identity != _identity(self._folder):
            raise OSError(
                f"the folder {str(self._folder)!r} was moved or deleted while it was in use; what had been "
                "saved there went with it"
            )

    def release(self) -> None:
        """Let others have the folder."""
        if self._made and self._folder.is_dir() and os.listdir(self._folder) == [self._spare.name]:
            self._spare.unlink()
        for folder in reversed(self._made):
            with suppress(OSError):  # something is in it
                folder.rmdir()
        self._made.clear()
        self._close()

    def _close(self) -> None:
        if self._number in _HELD:
            _HELD.discard(self._number)
            os.close(self._number)
        self._number = None


def _identity(path: Path) -> tuple[int, int] | None:
    """What stays the same of a folder that is moved, and differs for one that takes its place."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _lock(folder: Path, spare: Path) -> int | None:
    """Lock a folder, or the file in it; the descriptor that holds the lock, None if neither can be locked.

    Raises:
        ValueError: another process has locked it.
        OSError: the file can't be made.
    """
    number = None
    if fcntl is not None:
        with suppress(OSError):  # a folder that may not be listed
            number = os.open(folder, os.O_RDONLY)
    for lock in (_lock_whole, _lock_byte):
        if number is None:
            number = os.open(spare, os.O_RDWR | os.O_CREAT, 0o666)
        _HELD.add(number)
        try:
            lock(number)
            return number
        except OSError as error:
            known = isinstance(error, BlockingIOError | PermissionError)
            words = f"is in use by {_holder(number)}" if known else str(error.strerror)
            _HELD.discard(number)
            os.close(number)
            number = None
            if known:
                raise ValueError(words) from None
    logger.warning("%s can't be locked (%s): start no second command that writes there", folder, words)
    return None


def _lock_whole(number: int) -> None:
    """The lock that folders take too, on the machines that share them."""
    if fcntl is None:
        raise OSError("no such locks here")
    fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _lock_byte(number: int) -> None:
    """The lock that files take everywhere."""
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
