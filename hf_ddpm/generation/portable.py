"""A pipeline's folder: written so that plain diffusers loads what it can run; read from a disk or the Hub.

This module knows files and the Hub. It knows nothing of sampling.
"""

import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import diffusers
from safetensors import SafetensorError
from torch import nn

from hf_ddpm.denoiser import num_classes
from hf_ddpm.folders.errors import StoredErrors, write_errors
from hf_ddpm.folders.guard import read_json
from hf_ddpm.folders.index import HUB_OPTIONS, check_folder, entries, fetch, part_folder, resolve
from hf_ddpm.folders.labels import check_labels, read_labels, write_labels
from hf_ddpm.folders.layout import (
    INDEX,
    LABELS,
    NETWORK_FILE,
    RECORD,
    SCHEDULER,
    SCHEDULER_CONFIG,
    SWEEP,
    UNET,
)
from hf_ddpm.folders.sweep import Sweep
from hf_ddpm.folders.values import NEEDED, check_scheduler_values
from hf_ddpm.generation.samplers import diffusers_messages
from hf_ddpm.publishing.publish import collect
from hf_ddpm.publishing.upload import Retry
from hf_ddpm.runtime.disk import whole_file
from hf_ddpm.runtime.hub import asking_the_hub, looks_like_path, or_near
from hf_ddpm.runtime.messages import LIMIT, one_line, redact, shorten
from hf_ddpm.scheduler import NETWORK_KEYS, DDPMScheduler
from hf_ddpm.variances import MEASURED

logger = logging.getLogger(__name__)
# Names of the parts passed to the `from_pretrained` that is running: it calls `load_config` without them
PASSED: ContextVar[frozenset[str]] = ContextVar("PASSED", default=frozenset())
LONG = 120  # characters of a folder's name in an error
LEAST = 40  # to so many of them it is shortened where the reason is long
Pipeline = TypeVar("Pipeline", bound="PortablePipeline")


class PortablePipeline(diffusers.DDPMPipeline):
    """A `diffusers.DDPMPipeline` whose folder says who can run it, and which loads no pickles and no code.

    What plain diffusers runs rightly is written in its words, and loads where hf_ddpm is not installed. What
    it doesn't (network classes that it lacks, "learned" variances, "mean" and "score" predictions) is
    written as hf_ddpm's: plain diffusers refuses such a folder, and `from_pretrained` of this class loads it.
    """

    _folder: Path | None = None  # that it was loaded from
    _id2label: dict[int, str] | None = None

    @property
    def id2label(self) -> dict[int, str] | None:
        """The names of a class-conditional network's classes by their numbers; None if they have none.

        It is read from `labels.json` in the pipeline's folder, saved there, and can be assigned.
        """
        return self._id2label

    @id2label.setter
    def id2label(self, names: Mapping[int, str] | None) -> None:
        classes = num_classes(self.unet)
        if names is not None and classes is None:
            raise ValueError("id2label names classes, but the network knows none; allowed: None")
        self._id2label = None if names is None else check_labels(names, classes)

    def to_json_string(self) -> str:
        """Content of `model_index.json`."""
        index = json.loads(super().to_json_string()) | entries(self.unet, self.scheduler)
        index["_class_name"] = diffusers.DDPMPipeline.__name__  # whatever a subclass of ours is called
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """What diffusers' `load_config` reads, with entries by which its loader finds our classes."""
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
            push_to_hub: publish the folder as well.
            **kwargs: `variant` and `max_shard_size` as in diffusers, and with `push_to_hub`, `repo_id` (by
                default the folder's name) and the keywords of the method `push_to_hub`.

        Raises:
            ValueError: `safe_serialization=False` (pickles are never written), a network that is not
                diffusers' kind, or a folder that can't be written.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False would write a pickle; allowed: safetensors only")
        if not hasattr(self.unet, "save_pretrained"):
            raise ValueError(
                f"{type(self.unet).__name__} can't be saved in a pipeline; allowed: a diffusers ModelMixin "
                "(hf_ddpm.models.register_network), or torch.nn.Module's own state_dict"
            )
        saving = {key: kwargs.pop(key) for key in ("variant", "max_shard_size") if key in kwargs}
        if kwargs and not push_to_hub:
            raise ValueError(f"save_pretrained has no use for {', '.join(kwargs)} without push_to_hub")
        try:  # where a file is in the way, diffusers would log a line and return
            Path(save_directory).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"folder {str(save_directory)!r} can't be written: {error.strerror}") from error
        super().save_pretrained(save_directory, safe_serialization=True, **saving)
        self._save_errors(Path(save_directory))
        if self.id2label is not None:
            write_labels(Path(save_directory), self.id2label)
        self._save_sweep(Path(save_directory))
        if push_to_hub:
            _publish(save_directory, kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    @property
    def errors(self) -> StoredErrors | None:
        """The errors that `hf-ddpm plan` measured; predictor.py reads them."""
        return None

    def _save_errors(self, folder: Path) -> None:
        """Write the measured errors too, if they are those of the network as it is now."""
        try:
            if (found := self.errors) is not None:
                write_errors(folder, found)
            elif isinstance(self.scheduler, DDPMScheduler) and self.scheduler.variance_type in MEASURED:
                logger.warning(
                    "the scheduler has variance_type %r, but no measured errors are saved: hf-ddpm plan "
                    "measures them",
                    self.scheduler.variance_type,
                )
        except ValueError as error:
            logger.warning("%s; it is left out", one_line(error))

    @property
    def sweep(self) -> Sweep | None:
        """What `hf-ddpm sweep` measured; predictor.py reads it."""
        return None

    def _save_sweep(self, folder: Path) -> None:
        """Write the sweep too, if it is of the network as it is now."""
        try:
            if (found := self.sweep) is not None:
                with whole_file(folder / SWEEP) as file:
                    file.write_text(found.text(), encoding="utf-8")
        except ValueError as error:
            logger.warning("%s; it is left out", one_line(error))

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool = False,
        token: str | bool | None = None,
        *,
        revision: str | None = None,
        license: str | None = None,
        dataset_license: str | None = None,
        dataset_id: str | None = None,
        picture: str | os.PathLike | None = None,
        custom_pipeline: bool = False,
        retry: Retry | None = None,
    ) -> str:
        """Save the pipeline in a temporary folder, and publish that on the Hub, with a card.

        Args:
            repo_id: "user/name", or "name" for your own namespace; made if it is not there.
            commit_message: by default says which package sent it.
            private: whether the repository is made private.
            token: by default the environment's, or that of `hf auth login`.
            revision: branch, made if it is not there; by default main.
            license: of the weights, an identifier of the Hub such as "apache-2.0".
            dataset_license: of the training images.
            dataset_id: of the training images on the Hub.
            picture: a PNG file for the card.
            custom_pipeline: whether `pipeline.py` is added, for diffusers' `custom_pipeline`.
            retry: how often to try, and how long to wait in between.

        Returns:
            The repository's address.

        Raises:
            ValueError: a bad argument, or a network that can't be saved.
            PublishError: the Hub refused, or could not be reached.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return _publish(
                folder,
                repo_id,
                commit_message=commit_message,
                private=private,
                token=token,
                revision=revision,
                license=license,
                dataset_license=dataset_license,
                dataset_id=dataset_id,
                picture=picture,
                custom_pipeline=custom_pipeline,
                retry=retry,
            )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls: type[Pipeline], pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> Pipeline:
        """Load a pipeline from a folder or a Hub id; keywords as in diffusers' `from_pretrained`.

        Only safetensors are read: `use_safetensors` is on and can't be turned off. No code of a repository is
        downloaded or run, unless you say `trust_remote_code=True`, which leaves loading to diffusers.

        Raises:
            ValueError: nothing there, not a pipeline, a class that is not known here, a value of a config
                that its class has no use for, weights that are missing, cut short, not safetensors, not
                finite or not exactly those of the network that the config describes, or an image that would
                take more memory than `folders.guard.MAX_ACTIVATIONS`.
        """
        name = os.fspath(pretrained_model_name_or_path)
        where = repr(shorten(redact(name), LONG))
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise ValueError("use_safetensors=False would load a pickle; allowed: safetensors only")
        folder, from_hub = _local_folder(name, where)
        fetched = False
        token: Any = kwargs.get("token")
        passed = frozenset({UNET, SCHEDULER} & set(kwargs))
        trusted = bool(kwargs.get("trust_remote_code"))
        try:
            with diffusers_messages() as messages:
                place = name if from_hub else str(folder)
                if not trusted:
                    options = {key: kwargs.pop(key) for key in HUB_OPTIONS if key in kwargs}
                    folder = fetch(name, kwargs.get("variant"), **options) if from_hub else folder
                    fetched = from_hub
                    check_folder(folder, kwargs.get("variant"), passed)
                    place = str(folder)
                reset = PASSED.set(passed)
                try:
                    pipeline = super().from_pretrained(place, **kwargs)
                finally:
                    PASSED.reset(reset)
            if UNET not in passed:
                refuse_not_finite(pipeline.unet)
                pipeline.id2label = read_labels(folder, classes := num_classes(pipeline.unet))
                if classes is not None and pipeline.id2label is None:
                    logger.warning(
                        "%s has no %s: row %d of its classes is taken for no class", where, LABELS, classes
                    )
        except Exception as error:  # what diffusers, safetensors or the Hub client raise
            tried = f"no such folder{or_near(name)}, and from the Hub: " if from_hub and not fetched else ""
            line = _not_loaded(name, tried + _reason(error, token))
            # An error whose own words hold a secret is not handed on
            secret = any(redact(str(x), token) != str(x) for x in _chain(error))
            raise ValueError(line) from (None if secret else error)
        for message in messages:
            if "newly initialized" in message:  # diffusers fills in what the weights file lacks, at random
                raise ValueError(_not_loaded(name, one_line(message)))
            logger.warning(one_line(redact(message)))
        if SCHEDULER in passed and not (from_hub and trusted):
            _remember_process(pipeline, folder)
        pipeline._folder = folder if folder.is_dir() else None
        if from_hub:
            pipeline.register_to_config(_name_or_path=name)  # not the cache's folder
        return pipeline


def _not_loaded(name: str, reason: str) -> str:
    """The line that says why nothing was loaded: the name gives way to the reason, down to `LEAST`."""
    room = LIMIT - len("can't load a pipeline from '': ")
    reason = shorten(reason, room - LEAST)
    return one_line(f"can't load a pipeline from {shorten(redact(name), room - len(reason))!r}: {reason}")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__


def _reason(error: Exception, token: Any) -> str:
    """Why loading failed, in one line: diffusers' words, and those of safetensors if it was the cause."""
    words = one_line(redact(str(error), token) or error)
    cause = next((x for x in _chain(error) if isinstance(x, SafetensorError)), None)
    more = "" if cause is None else one_line(cause)
    return words if more in words else f"{words} {more}"


def _remember_process(pipeline: Any, folder: Path) -> None:
    """Tell a pipeline that was given a scheduler what its folder's own says that the network was trained for.

    Where the folder has none, or one that says no process, the given one says it.
    """
    try:
        config = read_json(part_folder(folder, SCHEDULER) / SCHEDULER_CONFIG)
        if all(key in config for key in NEEDED):
            known = {key: config[key] for key in NETWORK_KEYS if key in config}
            check_scheduler_values(DDPMScheduler, known, SCHEDULER_CONFIG)
            pipeline.trained_with(DDPMScheduler(**known))
    except (ValueError, TypeError):
        return


def _local_folder(name: str, where: str) -> tuple[Path, bool]:
    """The folder of a pipeline, and whether it is to come from the Hub, as there is no such folder.

    Args:
        name: a folder or a Hub id.
        where: the same, for errors.

    Raises:
        ValueError: it can only be a folder and is none, or it is one without a pipeline in it.
    """
    try:
        folder = Path(name).expanduser()
        there = folder.exists()
        if "\0" in name or (looks_like_path(name) and not there):
            raise ValueError(f"model folder {where} does not exist{or_near(name)}")
        if there and not (folder / INDEX).is_file():
            if (folder / NETWORK_FILE).is_file() and (folder / RECORD).is_file():
                raise ValueError(
                    f"the network of {where} is its owner's; allowed: hf_ddpm.load_run(folder, model=...), "
                    "evaluate(config, network=...)"
                )
            raise ValueError(f"model folder {where} has no {INDEX}: it is not a pipeline folder")
    # A name that is too long, or ~nobody
    except (OSError, RuntimeError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or one_line(error)
        raise ValueError(f"model folder {where} can't be read: {reason}") from None
    if not there:
        asking_the_hub(name)
    return folder, not there


def refuse_not_finite(network: nn.Module) -> None:
    """Refuse a network with weights that are not finite.

    Raises:
        ValueError: the message names the first.
    """
    for name, weight in network.state_dict().items():
        if weight.is_floating_point() and weight.device.type != "meta" and not weight.isfinite().all():
            raise ValueError(f"the weights of {name!r} hold NaN or infinite numbers; allowed: finite ones")


def _publish(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = False,
    token: str | bool | None = None,
    retry: Retry | None = None,
    **collecting: Any,
) -> str:
    """Publish the folder; other keywords are those of `collect`."""
    publication = collect(folder, repo_id, **collecting)
    return publication.send(
        private=bool(private),
        commit_message=commit_message,
        token=token,
        retry=retry,
        remedy="call it again",
    ).url
