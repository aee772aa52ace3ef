"""A folder that a command writes into: locked against others, writable, and empty or hf_ddpm's own.

No file that hf_ddpm did not write is ever replaced or deleted, and a folder of a user's photos is not taken
for the place of a run. What tells that a folder is hf_ddpm's own is said here.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate import Accelerator, PartialState

from hf_ddpm.folders.layout import (
    CHECKPOINTS,
    ERRORS,
    EVALUATION,
    INDEX,
    LOCK,
    MEASURED,
    PARTS,
    RECORD,
    RUN,
    STEPS,
    SWEEP,
    SWEEP_PLOT,
)
from hf_ddpm.runtime.lock import FolderLock
from hf_ddpm.runtime.processes import on_main_process
from hf_ddpm.runtime.untrusted import read_json, tensor_headers

# Files that people and batch systems put beside results: scripts, notes and what a command printed
BESIDE = frozenset(
    {".bash", ".cfg", ".csv", ".err", ".ini", ".log", ".md", ".out", ".py", ".sbatch", ".sh", ".slurm"}
    | {".toml", ".txt", ".yaml", ".yml"}
)


@contextmanager
def output_folder(
    folder: Path, option: str, check: Callable[[Path], None], state: Accelerator | PartialState
) -> Iterator[FolderLock]:
    """A folder that no other command can write into in this context; all processes enter it together.

    A folder that is refused, or in which nothing is written, is as it was before.

    Args:
        folder: made when missing.
        option: its name on the command line, for messages.
        check: looks at the folder, and raises a ValueError if it may not be written into.
        state: the processes, of which process 0 holds the lock.

    Raises:
        ValueError: the folder can't be written, another command works there, or what `check` raises.
    """
    lock = FolderLock(folder, LOCK)

    def acquire() -> None:
        try:
            lock.acquire()
        except OSError as error:
            raise ValueError(
                f"{option} {str(folder)!r} can't be written: {error.strerror or error}"
            ) from None
        except ValueError as error:
            raise ValueError(f"{option} {str(folder)!r} {error}; allowed: another folder, or later") from None
        check(folder)

    try:
        on_main_process(state, acquire)
        yield lock
    finally:
        lock.release()


def check_run_folder(folder: Path) -> None:
    """Refuse a folder that holds other things than a run or a pipeline.

    Raises:
        ValueError: the message names one of them.
    """
    own = _is_model(folder) or any((folder / CHECKPOINTS).glob(STEPS))
    check_strangers(folder, "output_dir", RUN, own)


def results_folder(model: str, out: str | None, what: str) -> Path:
    """The folder for what is measured of a model: the one that is named, else the model's.

    Args:
        model: folder or Hub id.
        out: a folder, or None.
        what: the results, for messages.

    Raises:
        ValueError: none is named, and the model is no folder.
    """
    if out is None and not Path(model).expanduser().is_dir():
        raise ValueError(f"out is not given, and {model!r} is no folder for {what}; allowed: a folder as out")
    return Path(model if out is None else out).expanduser()


def check_evaluation_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds other things than an evaluation, a run or a pipeline.

    Args:
        folder: where the results go.
        overwrite: whether the caller said that it may hold other things. Their files are never replaced.

    Raises:
        ValueError: the message names one of them.
    """
    _check_measured(folder, MEASURED, overwrite)


def check_errors_folder(folder: Path, overwrite: bool) -> None:
    """The same for the table of a model's errors."""
    _check_measured(folder, {ERRORS}, overwrite)


def check_sweep_folder(folder: Path, overwrite: bool) -> None:
    """The same for a sweep of samplers and steps."""
    _check_measured(folder, {SWEEP, SWEEP_PLOT}, overwrite)


def _check_measured(folder: Path, names: Collection[str], overwrite: bool) -> None:
    own = _is_model(folder) or _is_report(folder / EVALUATION, "bits_per_dim")
    own = own or _is_report(folder / SWEEP, "cells") or _is_errors(folder / ERRORS)
    check_strangers(folder, "out", names, own or any(folder.glob(f"{PARTS}*")), overwrite)


def check_strangers(
    folder: Path, option: str, writes: Collection[str], own: bool, overwrite: bool | None = None
) -> None:
    """Refuse a folder that holds files of others.

    Args:
        folder: what a command will write into.
        option: its name on the command line.
        writes: the names of what the command writes there.
        own: whether the folder is hf_ddpm's own, in which a user's other files are welcome.
        overwrite: whether the caller said that other files don't matter; None if the command has no such
            option.

    Raises:
        ValueError: the message names one of them.
    """
    if own:
        return
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        if name in writes:
            raise ValueError(
                f"{option} {str(folder)!r} holds {name!r}, which hf_ddpm did not write; allowed: another "
                "folder"
            )
    strangers = [name for name in names if not _beside(folder / name)]
    if strangers and not overwrite:
        said = "" if overwrite is None else ", or --overwrite, which replaces none of them"
        raise ValueError(
            f"{option} {str(folder)!r} holds other things, such as {strangers[0][:60]!r}; allowed: an empty "
            f"or new folder, or one that hf_ddpm wrote{said}"
        )


def _beside(path: Path) -> bool:
    """Whether it is something that may lie in any folder."""
    return path.name.startswith(".") or (path.is_file() and path.suffix.lower() in BESIDE)


def _is_model(folder: Path) -> bool:
    return (folder / INDEX).is_file() or (folder / RECORD).is_file()


def _is_report(file: Path, key: str) -> bool:
    """Whether a file is a report that has a section of this name."""
    with suppress(ValueError):
        return key in read_json(file)
    return False


def _is_errors(file: Path) -> bool:
    """Whether a file is a table of errors."""
    with suppress(ValueError):
        return "decoder_nats" in tensor_headers(file)
    return False
