"""Names on the Hugging Face Hub, checked before anything is sent or asked, and told from mistyped paths."""

import contextlib
import functools
import itertools
import logging
import os
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from hf_ddpm.runtime.messages import did_you_mean, nearest, one_line, redact, shown

logger = logging.getLogger(__name__)

REPO_ID = re.compile(r"(?=.{1,96}\Z)(?:[A-Za-z0-9_.-]+/)?[A-Za-z0-9_.-]+")
BRANCH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(?:/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
LONGEST_BRANCH = 100
MOST_NEIGHBOURS = 10_000  # files of a folder among which a mistyped name is looked for
# https://huggingface.co/docs/hub/repositories-licenses, read in 2026; the Hub refuses a card with another one
LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc
    cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
    cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
    cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
    eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 lgpl-lr isc intel-research h-research
    lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql
    ofl-1.1 ncsa unlicense zlib pddl deepfloyd-if-license fair-noncommercial-research-license llama2 llama3
    llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown other
""".split()


def looks_like_path(name: str) -> bool:
    """Whether a name can only be a path's, as "/x", "./x", "~x", "x/", "a/b/c", or one with a backslash."""
    slashes = name.count("/")
    return os.path.isabs(name) or name[:1] in (".", "~") or slashes > 1 or name[-1:] == "/" or "\\" in name


def near_path(name: str, suffix: str = "") -> str | None:
    """The folder that a mistyped path was meant for, as far as the folders beside it tell.

    Args:
        name: a path to nothing.
        suffix: of files that are meant as well as folders.

    Returns:
        The path with its mistyped parts put right; None if nothing is like it.
    """
    path = Path(os.path.expanduser(name))
    found = Path(path.anchor)
    parts = path.parts[1:] if path.anchor else path.parts
    # A folder that can't be entered, and a name that is too long
    with contextlib.suppress(OSError, ValueError):
        for number, part in enumerate(parts, 1):
            if not (found / part).exists():
                files = suffix if number == len(parts) else ""
                with os.scandir(found) as entries:
                    near = _nearest_entry(part, itertools.islice(entries, MOST_NEIGHBOURS), files)
                if near is None:
                    return None
                part = near
            found /= part
        return str(found) if found != path else None
    return None


def _nearest_entry(part: str, entries: Iterable[os.DirEntry[str]], suffix: str) -> str | None:
    """The name of a folder, or of a file with a suffix, that is most like the given one in small letters."""
    names = [
        entry.name
        for entry in entries
        if entry.is_dir() or (suffix and entry.name.lower().endswith(suffix) and entry.is_file())
    ]
    near = nearest(part.lower(), {name.lower() for name in names})
    return next((name for name in sorted(names) if name.lower() == near), None)


def or_near(name: str, suffix: str = "") -> str:
    """The words " (did you mean 'photos'?)" on a path to nothing, as `near_path` finds it; or nothing."""
    near = near_path(name, suffix)
    return "" if near is None else f" (did you mean {shown(near)}?)"


def asking_the_hub(name: str, suffix: str = "") -> None:
    """Say that a name is no folder here and the Hub is asked, before that is waited for; once, on process 0.

    Args:
        name: what was given; nothing is said of a name that no repository can have.
        suffix: as in `near_path`.
    """
    if REPO_ID.fullmatch(name):
        _say(one_line(f"no folder {shown(name)} here{or_near(name, suffix)}; asking the Hub"))


@functools.lru_cache(maxsize=1024)
def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        logger.warning(line)


@contextlib.contextmanager
def quiet_client() -> Iterator[None]:
    """Keep the Hub's client from printing this thread's warnings, for those who say what matters of them."""
    thread, client = threading.get_ident(), logging.getLogger("huggingface_hub")

    def keep(record: logging.LogRecord) -> bool:
        return record.thread != thread or record.levelno >= logging.ERROR

    handlers = list(client.handlers)
    for handler in handlers:
        handler.addFilter(keep)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(keep)


def check_repo_id(name: str, value: object) -> None:
    """Refuse what can't be the name of a repository, by the rules of the Hub's client.

    Args:
        name: of the option, for the message.
        value: "user/name", or "name".

    Raises:
        ValueError: it is none.
    """
    bad = True
    if isinstance(value, str) and redact(value) == value and REPO_ID.fullmatch(value):
        # Imported late, so that no command line waits for it that names no repository
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        with contextlib.suppress(HFValidationError):
            validate_repo_id(value)
            bad = False
    if bad:
        raise ValueError(
            f"{name} is {shown(value)}; allowed: user/name of letters, digits, '-', '_' and '.', 96 at most"
        )


def check_license(name: str, value: object) -> None:
    """Refuse a licence that the Hub has no identifier for.

    Raises:
        ValueError: the message names the nearest.
    """
    if value not in LICENSES:
        raise ValueError(
            f"{name} is {shown(value)}{did_you_mean(value, LICENSES)}; allowed: as the Hub writes it: "
            "apache-2.0, mit, cc-by-4.0, other, ... (https://huggingface.co/docs/hub/repositories-licenses)"
        )


def check_branch(name: str, value: object) -> None:
    """Refuse what can't be the name of a branch.

    Raises:
        ValueError: it is none.
    """
    text = value if isinstance(value, str) and len(value) <= LONGEST_BRANCH else ""
    if not BRANCH.fullmatch(text) or redact(text) != text or ".." in text or text.endswith((".", ".lock")):
        raise ValueError(
            f"{name} is {shown(value)}; allowed: a branch of letters, digits, '-', '_', '.' and '/'"
        )
