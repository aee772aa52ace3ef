"""Publishing while a network trains: a thread uploads snapshots of the run's folder, always the newest.

Training neither waits for an upload nor fails with it. This module knows threads and snapshots; what is sent
is publish.py's.
"""

import contextlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from hf_ddpm.folders.layout import SNAPSHOTS, TENSORS
from hf_ddpm.publishing.card import CardFacts
from hf_ddpm.publishing.publish import collect, command_line, find_dataset_id, needed_files
from hf_ddpm.publishing.upload import PublishError, Retry
from hf_ddpm.runtime.hub import check_repo_id
from hf_ddpm.runtime.messages import one_line, redact

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Within, the Hub's client shows no progress bars: the run shows one of its own."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


@dataclass(frozen=True)
class _Snapshot:
    step: int
    folder: Path


class BackgroundPush:
    """Uploads of a run's folder, one at a time, in a thread of their own.

    Args:
        run: the run's folder; snapshots lie in it, in a hidden folder.
        repo_id: "user/name", or "name" for your own namespace; made by the first upload if it is not there.
        private: whether it is made private.
        license: of the weights, as in `publish`.
        dataset_license: of the training images.
        dataset_id: of the training images on the Hub; by default what `find_dataset_id` finds.
        token: by default the environment's, or that of `hf auth login`.
        retry: how often an upload is tried; its waits end early when a newer snapshot is there.

    Raises:
        ValueError: a bad repo_id or licence.
    """

    def __init__(
        self,
        run: str | os.PathLike,
        repo_id: str,
        *,
        private: bool = False,
        license: str | None = None,
        dataset_license: str | None = None,
        dataset_id: str | None = None,
        token: str | bool | None = None,
        retry: Retry | None = None,
    ):
        check_repo_id("repo_id", repo_id)
        self._run, self._repo_id, self._private = Path(run), repo_id, private
        self._token, self._retry = token, retry or Retry(attempts=8)
        facts = {"license": license, "dataset_license": dataset_license, "dataset_id": dataset_id}
        self._command = command_line(self._run, repo_id, {"private": private, **facts})
        # A bad licence is refused now, not in the thread
        self._facts = CardFacts(
            repo_id, license=license, dataset_license=dataset_license, dataset_id=dataset_id
        )
        self._changed = threading.Condition()
        self._waiting: _Snapshot | None = None
        self._closing, self._deadline = False, float("inf")
        self._count = 0  # snapshots taken
        self._newest: int | None = None  # step of the last call of `push`
        self._published: int | None = None  # step of the last upload that succeeded
        self._failure: str | None = None
        self._url: str | None = None
        shutil.rmtree(self._run / SNAPSHOTS, ignore_errors=True)  # a killed run may have left some
        self._thread = threading.Thread(target=self._work, name="push to hub", daemon=True)
        self._thread.start()

    def push(self, step: int) -> None:
        """Take a snapshot of the folder as it is now, and upload it when the upload before is done.

        It returns as soon as the snapshot is there, and raises nothing. An older snapshot that still waits
        for its upload is dropped.

        Args:
            step: optimizer steps done, for the commit's message.
        """
        self._newest, self._count = step, self._count + 1
        place = self._run / SNAPSHOTS / f"{self._count}"  # not the step's: that may come twice
        try:
            take_snapshot(self._run, place)
        except Exception as error:  # whatever it is, training goes on
            shutil.rmtree(place, ignore_errors=True)
            self._fail(step, f"no snapshot of the folder: {one_line(error)}")
            return
        with self._changed:
            old, self._waiting = self._waiting, _Snapshot(step, place)
            self._changed.notify_all()
        if old is not None:
            shutil.rmtree(old.folder, ignore_errors=True)

    def finish(self, timeout: float | None = None) -> str | None:
        """Wait until the last snapshot is uploaded, and end the thread.

        Args:
            timeout: seconds to wait at most; by default as long as `retry` goes on.

        Returns:
            The repository's address; None if nothing was pushed.

        Raises:
            PublishError: the newest snapshot is not on the Hub; the message names the command that brings it
                there.
        """
        with self._changed:
            self._closing = True
            self._deadline = float("inf") if timeout is None else time.monotonic() + timeout
            self._changed.notify_all()
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._failure = f"{self._repo_id!r} was not published in {timeout:g} s; then: {self._command}"
        else:
            shutil.rmtree(self._run / SNAPSHOTS, ignore_errors=True)
        if self._newest != self._published:
            words = str(self._failure)
            raise PublishError(words if self._command in words else f"{words}; then: {self._command}")
        return self._url

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closing)
                snapshot, self._waiting = self._waiting, None
            if snapshot is None:
                return
            self._upload(snapshot)
            shutil.rmtree(snapshot.folder, ignore_errors=True)

    def _upload(self, snapshot: _Snapshot) -> None:
        retry = Retry(self._retry.attempts, self._retry.first_wait, self._retry.longest_wait, self._sleep)
        try:
            publication = collect(
                snapshot.folder,
                self._repo_id,
                license=self._facts.license,
                dataset_license=self._facts.dataset_license,
                dataset_id=self._facts.dataset_id or find_dataset_id(self._run),
            )
            with _without_bars():
                done = publication.send(
                    private=self._private,
                    commit_message=f"Step {snapshot.step}",
                    token=self._token,
                    retry=retry,
                    remedy=self._command,
                )
        except Exception as error:  # whatever it is, training goes on
            self._fail(snapshot.step, redact(one_line(error), self._token))
            return
        self._url, self._published = done.url, snapshot.step
        logger.info("step %d is on the Hub: %s", snapshot.step, done.url)

    def _sleep(self, seconds: float) -> bool:
        """Wait before another try; False if there is to be none, for a newer snapshot or the deadline."""
        with self._changed:
            seconds = min(seconds, self._deadline - time.monotonic())
            newer = self._changed.wait_for(lambda: self._waiting is not None, max(seconds, 0))
        return not newer and time.monotonic() < self._deadline

    def _fail(self, step: int, words: str) -> None:
        if self._waiting is not None:
            words += " (a newer one follows)"
        self._failure = words
        logger.warning("step %d was not pushed, training goes on: %s", step, words)


def take_snapshot(run: Path, place: Path) -> None:
    """Keep what of a run's folder is published, as it is now, in another folder of the same disk.

    Files of tensors get a second name, which costs nothing: the run replaces such files, and never writes
    into them. Small files are copied, and so is everything on disks where files can't have two names.
    """
    shutil.rmtree(place, ignore_errors=True)
    for file in needed_files(run):
        target = place / file.relative_to(run)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == TENSORS:
            try:
                os.link(file, target)
                continue
            except OSError:  # another disk, or one without hard links
                pass
        shutil.copyfile(file, target)
