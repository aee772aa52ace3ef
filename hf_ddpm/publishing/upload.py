"""Files → one commit on the Hub, tried again where that may help.

The Hub's client repeats uploads of files by itself, but not the commit. This module knows requests and their
errors; which files are sent, and why, is publish.py's.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from hf_ddpm.runtime.hub import quiet_client
from hf_ddpm.runtime.messages import one_line, redact

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
# What httpx (httpx2 for hub 2) raises when nothing answers shares a base class with the Hub's own errors.
HTTPError: Any = next(kind for kind in HfHubHTTPError.__mro__ if kind.__module__.startswith("httpx"))
# Answers after which another try may succeed; 412: another commit was made in between
PASSING = (408, 409, 412, 425, 429, 500, 502, 503, 504)
REASONS = {
    401: "the Hub doesn't know the token, or there is none: log in with `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there: it needs the permission to write to this repository",
    404: "there is no such repository or branch, or the token may not see it",
    429: "the Hub asks for fewer requests",
}


class PublishError(RuntimeError):
    """Publishing failed; the message says why, in one line."""


@dataclass(frozen=True)
class Retry:
    """How often to try, and how long to wait in between.

    Attributes:
        attempts: at most so many tries.
        first_wait: seconds to wait after the first failure; doubled after each.
        longest_wait: seconds to wait at most, even where the Hub asks for more.
        sleep: called with the seconds to wait; False means that no other try is to follow.
    """

    attempts: int = 5
    first_wait: float = 2.0
    longest_wait: float = 60.0
    sleep: Callable[[float], bool] = lambda seconds: time.sleep(seconds) or True

    def run(self, action: Callable[[], Result]) -> Result:
        """The action's result.

        Raises:
            Exception: the action's last error, at once if another try would end the same.
        """
        wait = self.first_wait
        for attempt in range(1, self.attempts + 1):
            try:
                return action()
            except Exception as error:
                if attempt == self.attempts or not is_passing(error):
                    raise
                pause = min(max(wait, _asked_wait(error)), self.longest_wait)
                logger.warning(
                    "%s; trying again in %.3g s (%d of %d)", reason(error), pause, attempt, self.attempts
                )
                if not self.sleep(pause):
                    raise
                wait = min(2 * wait, self.longest_wait)
        raise ValueError(f"attempts is {self.attempts}; allowed: >= 1")


def is_passing(error: BaseException) -> bool:
    """Whether another try may succeed: dropped connections, timeouts, and a server in trouble."""
    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in PASSING
    cause = error.__cause__
    if isinstance(error, RuntimeError) and cause is not None:  # of the client's upload threads
        return is_passing(cause)
    return isinstance(error, (HTTPError, ConnectionError, TimeoutError, RuntimeError))


def reason(error: BaseException, token: str | bool | None = None) -> str:
    """Why a request failed, in one line without secrets."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, HfHubHTTPError):
        status, said = error.response.status_code, one_line(error.server_message or "", 80)
        words = REASONS.get(status, "the Hub answered with an error")
        return redact(f"{words} (status {status}{': ' * bool(said)}{said})", token)
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return reason(error.__cause__, token)
    if isinstance(error, HTTPError):
        return f"the Hub can't be reached: {redact(one_line(error), token)}"
    return redact(one_line(error), token)


def _asked_wait(error: Exception) -> float:
    """The seconds that the Hub's answer asks to wait for; 0 if it asks for none."""
    asked = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return float(asked) if asked.isdecimal() else 0.0


@dataclass(frozen=True)
class Published:
    """Where the files are now.

    Attributes:
        url: the repository's address.
        commit: id of its newest commit.
        changed: whether this call made that commit.
    """

    url: str
    commit: str
    changed: bool


def upload(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    *,
    obsolete: Callable[[str], bool],
    message: str,
    private: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    retry: Retry | None = None,
) -> Published:
    """Make the repository and its branch where they are missing, and one commit of what differs.

    Args:
        files: content by path in the repository.
        repo_id: "user/name" or "name".
        obsolete: says of a path in the repository that is not in `files` whether it is deleted.
        message: of the commit.
        private: whether the repository is made private.
        revision: a branch, by default main.
        token: by default the environment's, or that of `hf auth login`.
        retry: how often to try, and how long to wait in between.

    Raises:
        ValueError: a private repository was asked for, and there is a public one.
        Exception: what the Hub's client raises.
    """
    retry, api = retry or Retry(), HfApi(token=token, library_name="hf_ddpm")

    def prepare() -> Any:
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if revision not in (None, "main"):
            api.create_branch(url.repo_id, branch=revision, exist_ok=True)
        return url, api.model_info(url.repo_id, revision=revision)

    def commit(full_id: str, operations: Callable[[], list[Any]]) -> Any:
        return api.create_commit(full_id, operations(), commit_message=message, revision=revision)

    with quiet_client():
        url, before = retry.run(prepare)
        if private and not before.private:
            raise ValueError(
                f"repository {url.repo_id!r} is there and public; allowed with private: a new name, or make "
                "it private in its settings first"
            )
        there = {sibling.rfilename for sibling in before.siblings or ()}
        gone = sorted(path for path in there - set(files) if obsolete(path))

        def operations() -> list[Any]:
            # Made anew for each try. The client asks the Hub which files differ, so that a commit that was
            # made although its answer got lost is not made twice
            added = [CommitOperationAdd(path, content) for path, content in files.items()]
            return added + [CommitOperationDelete(path) for path in gone]

        made = retry.run(lambda: commit(url.repo_id, operations))
    return Published(redact(str(url)), made.oid, made.oid != before.sha)
