"""A model's folder → a repository on the Hub: what publication.py collects, sent by upload.py."""

import os
import shlex
from typing import Any

from hf_ddpm.publication import Publication, collect, is_main_weights
from hf_ddpm.redact import redact
from hf_ddpm.upload import Published, PublishError, Retry, reason, upload


def publish(
    model: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
    retry: Retry | None = None,
    **options: Any,
) -> Published:
    """Send a model's folder to the Hub in one commit; sending the same again makes none.

    Args:
        model: folder of a pipeline or of a run; `collect` says what is sent of it.
        repo_id: "user/name", or "name" for your own namespace; made if it is not there.
        private: whether the repository is made private.
        commit_message: by default says which package sent it.
        token: by default the environment's, or that of `hf auth login`.
        retry: how often to try, and how long to wait in between.
        **options: of `collect`: `revision`, `ema_decay`, `license`, `dataset_license`, `dataset_id`,
            `picture`, `custom_pipeline`.

    Raises:
        ValueError: a bad argument or folder; nothing was sent.
        PublishError: the Hub refused or could not be reached; the message names the command that finishes it.
    """
    command = finishing_command(model, repo_id, private=private, **options)
    return send(collect(model, repo_id, **options), private, command, commit_message, token, retry)


def send(
    publication: Publication,
    private: bool,
    command: str,
    message: str | None = None,
    token: str | bool | None = None,
    retry: Retry | None = None,
) -> Published:
    """Upload what `collect` found.

    Args:
        publication: what.
        private: whether the repository is made private.
        command: that finishes it, for the error.
        message: of the commit.
        token: of the Hub.
        retry: how often.

    Raises:
        ValueError: a private repository was asked for, and there is a public one.
        PublishError: it failed.
    """
    facts = publication.facts
    try:
        return upload(
            publication.files,
            facts.repo_id,
            obsolete=is_main_weights,
            message=redact(message or "Upload with hf_ddpm"),
            private=private,
            revision=facts.revision,
            token=token,
            retry=retry,
        )
    except Exception as error:  # what the Hub's client raises has no common class
        words = redact(reason(error, token), token)
        if isinstance(error, ValueError) and not hasattr(error, "response"):
            raise ValueError(words) from None
        raise PublishError(f"{facts.repo_id!r} was not published: {words}; then: {command}") from None


def finishing_command(model: str | os.PathLike, repo_id: str, **options: Any) -> str:
    """The command line that publishes this; options of `publish` and `collect`."""
    words = ["hf-ddpm", "publish", os.fspath(model), repo_id]
    for key, value in options.items():
        flag = f"--{key.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)] if value not in (None, False) else []
    return redact(shlex.join(words))
