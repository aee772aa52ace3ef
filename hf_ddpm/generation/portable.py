"""A pipeline's folder: written so that plain diffusers loads what it can run, read from a folder or the Hub.

It knows files and the Hub, and no sampling.
"""

import json
import logging
import os
import tempfile
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import diffusers

from hf_ddpm.folders.index import HUB_OPTIONS, check_folder, entries, fetch, resolve
from hf_ddpm.folders.layout import INDEX
from hf_ddpm.generation.samplers import diffusers_messages, load_reason
from hf_ddpm.publishing.publish import collect, send
from hf_ddpm.runtime.messages import redact

logger = logging.getLogger(__name__)
# Parts passed to a running `from_pretrained`, which calls `load_config` without them.
PASSED: ContextVar[frozenset[str]] = ContextVar("PASSED", default=frozenset())
Pipeline = TypeVar("Pipeline", bound="PortablePipeline")


class PortablePipeline(diffusers.DDPMPipeline):
    """A `diffusers.DDPMPipeline` whose folder says who can run it, and that reads no pickle and runs no code.

    What plain diffusers can run rightly is written in its words, and loads where hf_ddpm is not installed.
    What it can't (network classes that it doesn't have, "learned" variances, "mean" and "score" predictions)
    is written as hf_ddpm's: plain diffusers refuses such a folder, and `from_pretrained` of this class loads
    it.
    """

    def to_json_string(self) -> str:
        """Content of `model_index.json`."""
        index = json.loads(super().to_json_string()) | entries(self.unet, self.scheduler)
        index["_class_name"] = diffusers.DDPMPipeline.__name__  # which a subclass of ours may not be called
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Diffusers' `load_config`, with entries by which its loader finds the classes known here."""
        config: Any = super().load_config(*args, **kwargs)
        return resolve(config, PASSED.get(), strict=False) if isinstance(config, dict) else config

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the folder: `model_index.json`, `scheduler/`, and `unet/` with safetensors weights.

        Args:
            save_directory: the folder.
            safe_serialization: only `True`.
            push_to_hub: publish the folder as well, with `repo_id` (by default its name) and other keywords
                of `push_to_hub` in `kwargs`.
            **kwargs: as in diffusers, such as `variant`.

        Raises:
            ValueError: `safe_serialization=False` (pickles are never written), a network that is not
                diffusers' kind, or a folder that can't be written.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False would write a pickle; allowed: safetensors only")
        if not hasattr(self.unet, "save_pretrained"):
            raise ValueError(
                f"{type(self.unet).__name__} can't be saved in a pipeline; allowed: a diffusers ModelMixin"
            )
        saving = {key: kwargs.pop(key) for key in ("variant", "max_shard_size") if key in kwargs}
        if kwargs and not push_to_hub:
            raise ValueError(f"save_pretrained has no use for {', '.join(kwargs)} without push_to_hub")
        try:  # where a file is in the way, diffusers would log a line and return
            Path(save_directory).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"folder {str(save_directory)!r} can't be written: {error.strerror}") from error
        super().save_pretrained(save_directory, safe_serialization=True, **saving)
        if push_to_hub:
            self._publish(save_directory, kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:  # type: ignore[override]
        """Publish the pipeline on the Hub, with a card: `hf_ddpm.hub.publish` of a folder saved for it.

        Args:
            repo_id: "user/name", or "name" for your own namespace; made if it is not there.
            **kwargs: of `publish`, such as `private`, `revision`, `token`, `commit_message` and `license`.

        Returns:
            The repository's address.

        Raises:
            ValueError: a bad argument, or a network that can't be saved.
            PublishError: the Hub refused, or could not be reached.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return self._publish(folder, repo_id, **kwargs)

    @staticmethod
    def _publish(folder: str | os.PathLike, repo_id: str, **kwargs: Any) -> str:
        sending = {key: kwargs.pop(key) for key in ("token", "retry") if key in kwargs}
        private, message = bool(kwargs.pop("private", False)), kwargs.pop("commit_message", None)
        publication = collect(folder, repo_id, **kwargs)
        return send(publication, private, "call it again", message, **sending).url

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls: type[Pipeline], pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> Pipeline:
        """Load a pipeline from a folder or a Hub id; keywords as in diffusers' `from_pretrained`.

        Only safetensors are read: `use_safetensors` is on and can't be turned off. No code of a repository is
        downloaded or run, unless you say `trust_remote_code=True`, which leaves loading to diffusers.

        Raises:
            ValueError: nothing there, not a pipeline, a class that is not known here, weights that are
                missing, cut short, not safetensors or not of the network that the config describes.
        """
        name = os.fspath(pretrained_model_name_or_path)
        shown = redact(name)
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise ValueError("use_safetensors=False would load a pickle; allowed: safetensors only")
        folder = Path(name).expanduser()
        looks_local = folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
        if looks_local and not folder.exists():
            raise ValueError(f"model folder {shown!r} does not exist")
        if folder.exists() and not (folder / INDEX).is_file():
            raise ValueError(f"model folder {shown!r} has no {INDEX}: it is not a pipeline folder")
        token: Any = kwargs.get("token")
        passed = frozenset({"unet", "scheduler"} & set(kwargs))
        from_hub, trusted = not folder.exists(), bool(kwargs.get("trust_remote_code"))
        try:
            with diffusers_messages() as messages:
                place = name if from_hub else str(folder)
                if not trusted:
                    options = {key: kwargs.pop(key) for key in HUB_OPTIONS if key in kwargs}
                    folder = fetch(name, kwargs.get("variant"), **options) if from_hub else folder
                    check_folder(folder, kwargs.get("variant"), passed)
                    place = str(folder)
                reset = PASSED.set(passed)
                try:
                    pipeline = super().from_pretrained(place, **kwargs)
                finally:
                    PASSED.reset(reset)
        except Exception as error:  # what diffusers, safetensors or the Hub client raise
            tried = "no such folder, and from the Hub: " if from_hub else ""
            reason = redact(words := load_reason(error), token)
            raise ValueError(f"can't load a pipeline from {shown!r}: {tried}{reason}") from (
                error if words == reason else None  # its words would tell
            )
        for message in messages:
            if "newly initialized" in message:  # diffusers fills in what the weights file lacks, at random
                raise ValueError(f"can't load a pipeline from {shown!r}: {message}")
            logger.warning(redact(message))
        if from_hub:
            pipeline.register_to_config(_name_or_path=name)  # not the cache's folder
        return pipeline
