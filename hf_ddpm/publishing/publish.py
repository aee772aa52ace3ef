"""Publishing: a model's folder goes to the Hub in one commit, with a card.

What is sent is a list of what goes, never of what stays: whatever else a run's folder holds, no user of the
model needs it. This module knows folders; the requests to the Hub are upload.py's.
"""

import logging
import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from huggingface_hub.utils import HFValidationError, validate_repo_id
from PIL import Image
from safetensors import safe_open

from hf_ddpm.config import TrainConfig
from hf_ddpm.folders.errors import errors_of
from hf_ddpm.folders.guard import make_empty, weights_files
from hf_ddpm.folders.index import check_folder, needs_us, part_folder
from hf_ddpm.folders.layout import (
    CARD,
    COMMANDS,
    CONFIG,
    CURVE,
    CUSTOM_PIPELINE,
    ERRORS,
    EVALUATION,
    INDEX,
    LABELS,
    LOG,
    NETWORK_FILE,
    NOTES,
    PLOTS,
    RECORD,
    SAMPLES_PICTURE,
    SCHEDULER,
    SCHEDULER_CONFIG,
    SCHEDULER_FILE,
    SHOWN,
    SWEEP,
    SWEEP_PLOT,
    TENSORS,
    TRAINED_ON,
    UNET,
    WEIGHTS_INDEX,
    decay_of,
    is_weights,
    newest_grid,
    weights_name,
)
from hf_ddpm.folders.numbers import last_numbers, measured_weights
from hf_ddpm.folders.sweep import read_sweep
from hf_ddpm.folders.values import fits, words_of
from hf_ddpm.models import NETWORKS, weights_digest
from hf_ddpm.publishing.card import MARK, CardFacts, make_card
from hf_ddpm.publishing.upload import Published, PublishError, Retry, reason, upload
from hf_ddpm.runtime.hub import check_repo_id, or_near
from hf_ddpm.runtime.messages import one_line, redact
from hf_ddpm.runtime.untrusted import check_regular, read_bytes, read_json, shown
from hf_ddpm.shown import fields_line
from hf_ddpm.spelling import suggest_keywords

logger = logging.getLogger(__name__)

TOLD = (NOTES, COMMANDS)  # what a person says of a model
DRAWN = (CURVE, SAMPLES_PICTURE, *SHOWN)  # the pictures made of it


@suggest_keywords
def publish(
    model: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    ema_decay: float | None = None,
    license: str | None = None,
    dataset_license: str | None = None,
    dataset_id: str | None = None,
    picture: str | os.PathLike | None = None,
    custom_pipeline: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
    retry: Retry | None = None,
) -> Published:
    """Send a model's folder to the Hub in one commit; sending the same again makes none.

    Args:
        model: folder of a pipeline or of a run; `collect` says what is sent of it, and what the arguments
            from `revision` to `custom_pipeline` mean.
        repo_id: "user/name", or "name" for your own namespace; made if it is not there.
        private: whether the repository is made private.
        revision: branch, made if it is not there; by default main.
        ema_decay: decay of the weights that are sent.
        license: of the weights.
        dataset_license: of the training images.
        dataset_id: of the training images.
        picture: for the card.
        custom_pipeline: whether `pipeline.py` is added.
        commit_message: by default says which package sent it.
        token: by default the environment's, or that of `hf auth login`.
        retry: how often to try, and how long to wait in between.

    Raises:
        ValueError: a bad argument or folder; nothing was sent.
        PublishError: the Hub refused or could not be reached; the message names the command that finishes it.
    """
    publication = collect(
        model,
        repo_id,
        revision=revision,
        ema_decay=ema_decay,
        license=license,
        dataset_license=dataset_license,
        dataset_id=dataset_id,
        picture=picture,
        custom_pipeline=custom_pipeline,
    )
    return publication.send(private=private, commit_message=commit_message, token=token, retry=retry)


@dataclass(frozen=True)
class Publication:
    """What is sent.

    Attributes:
        files: content by path in the repository.
        facts: what the card was made with.
        portable: whether plain diffusers loads it.
        command: the command line that publishes it, but for `--private`.
    """

    files: Mapping[str, Path | bytes]
    facts: CardFacts
    portable: bool
    command: str

    __repr__ = fields_line

    def describe(self) -> str:
        """Every file with its size, a line each."""
        sizes = {path: _size(content) for path, content in sorted(self.files.items())}
        lines = [f"{size:>14,} bytes  {path}" for path, size in sizes.items()]
        return "\n".join([*lines, f"{sum(sizes.values()):>14,} bytes  in {len(sizes)} files"])

    def send(
        self,
        *,
        private: bool = False,
        commit_message: str | None = None,
        token: str | bool | None = None,
        retry: Retry | None = None,
        remedy: str | None = None,
    ) -> Published:
        """Upload it in one commit; if the repository holds the same already, no commit is made.

        Args:
            private: whether the repository is made private.
            commit_message: by default says which package sent it.
            token: by default the environment's, or that of `hf auth login`.
            retry: how often to try, and how long to wait in between.
            remedy: what the error tells to do when it fails; by default the command that publishes this.

        Raises:
            ValueError: a private repository was asked for, and there is a public one.
            PublishError: the Hub refused or could not be reached.
        """
        try:
            return upload(
                self.files,
                self.facts.repo_id,
                obsolete=is_main_weights,
                message=redact(commit_message or "Upload with hf_ddpm"),
                private=private,
                revision=self.facts.revision,
                token=token,
                retry=retry,
            )
        except Exception as error:  # what the Hub's client raises has no common class
            words = redact(reason(error, token), token)
            if isinstance(error, ValueError) and not hasattr(error, "response"):
                raise ValueError(words) from None
            remedy = remedy or self.command + " --private" * private
            raise PublishError(f"{self.facts.repo_id!r} was not published: {words}; then: {remedy}") from None


def collect(
    model: str | os.PathLike,
    repo_id: str,
    *,
    revision: str | None = None,
    ema_decay: float | None = None,
    license: str | None = None,
    dataset_license: str | None = None,
    dataset_id: str | None = None,
    picture: str | os.PathLike | None = None,
    custom_pipeline: bool = False,
) -> Publication:
    """What of a model's folder goes to the Hub: the pipeline, its card, pictures, evaluation and config.

    Checkpoints, optimizer states, logs, held-out numbers and anything else stay. Numbers and plots of an
    evaluation, and what `hf-ddpm plan` and `hf-ddpm sweep` measured, go only if they are of the weights that
    are sent.
    With the main weights go what a person wrote of them, `notes.md` and `commands.sh`, and the pictures
    training.png, progressive.png and interpolation.png. A README.md that hf_ddpm did not write is sent as it
    is, instead of a card.

    Args:
        model: folder of a pipeline or of a run.
        repo_id: where to.
        revision: branch, for the card.
        ema_decay: sends the weights averaged with this decay, which lie beside the main ones.
        license: of the weights, an identifier of the Hub such as "apache-2.0"; by default the config's.
        dataset_license: of the training images; by default the config's.
        dataset_id: of the training images on the Hub; by default what `find_dataset_id` finds.
        picture: an image file for the card, by default samples.png, else the newest grid of the run.
        custom_pipeline: add `pipeline.py`, by which `diffusers.DiffusionPipeline` makes a pipeline of hf_ddpm
            for those who pass `custom_pipeline` and `trust_remote_code=True`.

    Raises:
        ValueError: no pipeline's folder, or a bad argument.
    """
    folder, shown = Path(model).expanduser(), redact(os.fspath(model))
    check_repo_id("repo_id", repo_id)
    if not (folder / INDEX).is_file():
        if (folder / RECORD).is_file() and (folder / NETWORK_FILE).is_file():
            raise ValueError(
                f"model {shown!r} is the run of a network of your own, which no loader could make; allowed: "
                "a diffusers ModelMixin that hf_ddpm.models.register_network knows"
            )
        near = "" if folder.exists() else or_near(str(folder))
        raise ValueError(f"model {shown!r} is no folder with a {INDEX}{near}; allowed: a pipeline's folder")
    config = _config(folder)
    is_main = ema_decay in (None, main_decay(config))
    weights = _weights(folder, ema_decay)
    variant = None if is_main else next(iter(weights.values())).name.split(".")[1]
    try:
        index = check_folder(folder, variant)
    except ValueError as error:
        raise ValueError(f"model {shown!r} can't be published: {error}") from error
    files: dict[str, Path | bytes] = {**_pipeline_files(folder, shown), **weights}
    if (folder / LABELS).is_file():
        files[LABELS] = folder / LABELS

    # What was said and measured of it, in files of their own
    if config:
        files |= {name: folder / name for name in (RECORD, TRAINED_ON) if (folder / name).is_file()}
    measured = [name for name in (EVALUATION, ERRORS, SWEEP) if (folder / name).is_file()]
    _refuse_links(folder, [folder / name for name in measured])
    digest = _digest(folder, index, list(weights.values())) if measured else ""
    if _is_of(folder, EVALUATION, lambda: measured_weights(read_json(folder / EVALUATION)), digest):
        files |= {name: folder / name for name in (EVALUATION, *PLOTS) if (folder / name).is_file()}
    if _is_of(folder, ERRORS, lambda: errors_of(folder).weights, digest):
        files[ERRORS] = folder / ERRORS
    if _is_of(folder, SWEEP, lambda: digest if read_sweep(folder).of.is_of(digest) else None, digest):
        files |= {name: folder / name for name in (SWEEP, SWEEP_PLOT) if (folder / name).is_file()}
    if is_main:
        if grid := newest_grid(folder):
            files[SAMPLES_PICTURE] = grid
        files |= {name: folder / name for name in (*TOLD, *DRAWN) if (folder / name).is_file()}
    _refuse_links(folder, [folder / RECORD, folder / EVALUATION, folder / CARD, *files.values()])
    for name in {RECORD, EVALUATION, SWEEP, *TOLD} & set(files):
        files[name] = redact(_text(folder / name)).encode()
    if picture is not None:
        files[SAMPLES_PICTURE] = _readable_picture(Path(picture).expanduser())
    if custom_pipeline:
        files[CUSTOM_PIPELINE] = b"from hf_ddpm import DDPMPipeline\n"

    facts = CardFacts(
        repo_id=repo_id,
        revision=None if revision == "main" else revision,
        license=license or config.get("license"),
        dataset_license=dataset_license or config.get("dataset_license"),
        dataset_id=dataset_id or find_dataset_id(folder),
        ema_decay=main_decay(config) if is_main else ema_decay,
        training=last_numbers(folder / LOG),
    )
    own = _own_card(folder)
    files[CARD] = _new_card(files, facts, shown) if own is None else own
    options = {
        "revision": revision,
        "ema_decay": ema_decay,
        "license": license,
        "dataset_license": dataset_license,
        "dataset_id": dataset_id,
        "picture": picture,
        "custom_pipeline": custom_pipeline,
    }
    return Publication(files, facts, not needs_us(index), command_line(model, repo_id, options))


def _own_card(folder: Path) -> bytes | None:
    """The README.md that a person wrote; None where there is none, or one of ours."""
    text = _text(folder / CARD) if (folder / CARD).is_file() else MARK
    return None if MARK in text else redact(text).encode()


def _new_card(files: Mapping[str, Path | bytes], facts: CardFacts, shown: str) -> bytes:
    try:
        return make_card(files, facts).encode()
    except (KeyError, TypeError, AttributeError) as error:
        words = f"the files of {shown!r} are not what they should be, {type(error).__name__}: {error}"
        raise ValueError(f"{words}; allowed: files as hf_ddpm writes them") from error


def needed_files(run: Path) -> list[Path]:
    """What `collect` may read of a run's folder, for its main weights: the files of a snapshot.

    Raises:
        ValueError: one of them is a link out of the folder.
    """
    names = (INDEX, SCHEDULER_FILE, NETWORK_FILE, RECORD, TRAINED_ON, EVALUATION, ERRORS, LABELS, CARD, LOG)
    names += (SWEEP, SWEEP_PLOT, *TOLD, *DRAWN, *PLOTS)
    found = [run / name for name in names if (run / name).is_file()]
    found += [grid] if (grid := newest_grid(run)) else []
    found += _weights(run).values()
    _refuse_links(run, found)
    return found


def _config(folder: Path) -> dict[str, Any]:
    """How a run was started; {} if the folder is not a run's.

    Raises:
        ValueError: the file can't be read, or a value has another type than `TrainConfig` gives it.
    """
    found = read_json(folder / RECORD) if (folder / RECORD).exists() else {}
    for key, kind in get_type_hints(TrainConfig).items():
        if key in found and not fits(found[key], kind):
            raise ValueError(f"{RECORD}: {key} is {shown(found[key])}; allowed: {words_of(kind)}")
    return found


def main_decay(config: Mapping[str, Any]) -> float | None:
    """The decay of a run's main weights, by its config."""
    try:
        return float(str(config.get("ema_decay")).split(",")[0])
    except ValueError:
        return None


def _pipeline_files(folder: Path, shown: str) -> dict[str, Path]:
    """The files of a pipeline but for its weights, by their path in a repository."""
    files = {
        INDEX: folder / INDEX,
        SCHEDULER_FILE: part_folder(folder, SCHEDULER) / SCHEDULER_CONFIG,
        NETWORK_FILE: part_folder(folder, UNET) / CONFIG,
    }
    for path in files.values():
        if not path.is_file():
            raise ValueError(f"model {shown!r} has no {path.relative_to(folder).as_posix()}")
    return files


def _weights(folder: Path, ema_decay: float | None = None) -> dict[str, Path]:
    """The weights files by their path in a repository, where those of any decay are the main ones."""
    place, main = part_folder(folder, UNET), main_decay(_config(folder))
    if ema_decay in (None, main):
        return {f"{UNET}/{path.name}": path for path in [*weights_files(place), *place.glob(WEIGHTS_INDEX)]}
    found = {decay: path for path in place.glob("*") if (decay := decay_of(path.name)) is not None}
    if ema_decay not in found:
        decays = ", ".join(str(decay) for decay in sorted({*found, *([] if main is None else [main])}))
        raise ValueError(
            f"ema_decay is {ema_decay}, of which there are no weights; allowed: {decays or 'none'}"
        )
    return {f"{UNET}/{weights_name()}": found[ema_decay]}


def is_main_weights(path: str) -> bool:
    """Whether diffusers reads a repository's file as weights, or as their index, if no variant is named."""
    name = path.removeprefix(f"{UNET}/")
    return is_weights(name) or name == WEIGHTS_INDEX


def _is_of(folder: Path, name: str, weights: Callable[[], str | None], digest: str) -> bool:
    """Whether a file is there and of the weights that go: a run goes on after it, and may hold several."""
    if not (folder / name).is_file():
        return False
    if weights() == digest:
        return True
    logger.warning("%s is of other weights than these: what was measured of them is left out", name)
    return False


def _digest(folder: Path, index: Mapping[str, Any], weights: list[Path]) -> str:
    """The digest of the network that goes, as a pipeline has it once it is loaded."""
    network = make_empty(NETWORKS[index[UNET][1]], read_json(part_folder(folder, UNET) / CONFIG))
    tensors = {}
    for file in weights:
        if file.suffix == TENSORS:
            with safe_open(file, "pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}
    # In float32, as a pipeline has them once it is loaded, whatever the file's precision
    tensors = {name: z.float() if z.is_floating_point() else z for name, z in tensors.items()}
    return weights_digest(network.config, tensors)  # type: ignore[arg-type]


def _refuse_links(folder: Path, files: Iterable[Path | bytes]) -> None:
    """A link could bring a file of somebody's machine into the repository."""
    for path in files:
        if isinstance(path, Path) and not path.resolve().is_relative_to(folder.resolve()):
            name, shown = path.relative_to(folder).as_posix(), redact(os.fspath(folder))
            raise ValueError(f"{name} is a link out of {shown!r}; allowed: its own files")


def _text(path: Path) -> str:
    return read_bytes(path).decode(errors="replace")


def _readable_picture(path: Path) -> Path:
    try:
        check_regular(path)
        with Image.open(path, formats=["PNG"]):
            pass
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"picture {str(path)!r} can't be read: {one_line(error)}; allowed: a PNG file"
        ) from None
    return path


def find_dataset_id(folder: Path) -> str | None:
    """The Hub's id of the data set that a run was trained on; None where that can't be told.

    The `dataset` of the config may be a folder, relative to where the run was started. That was here if the
    config's relative `output_dir` leads from here to the run; then what is not a file here is on the Hub.
    """
    config = _config(folder)
    if config.get("dataset_id") is not None:
        return config["dataset_id"]
    dataset, out = str(config.get("dataset")), Path(str(config.get("output_dir")))
    if out.is_absolute() or out.resolve() != folder.resolve() or Path(dataset).expanduser().exists():
        return None
    try:
        validate_repo_id(dataset)
    except HFValidationError:
        return None
    return dataset if dataset.count("/") == 1 else None


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def command_line(model: str | os.PathLike, repo_id: str, options: Mapping[str, Any]) -> str:
    """The command line that publishes a folder; options by their names in `publish`."""
    words = ["hf-ddpm", "publish", os.fspath(model), repo_id]
    for key, value in options.items():
        flag = f"--{key.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)] if value not in (None, False) else []
    return redact(shlex.join(words))
