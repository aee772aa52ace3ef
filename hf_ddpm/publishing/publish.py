"""What of a model's folder is published, and with which card.

A list of what goes, not of what stays: whatever else a run's folder holds, no user of the model needs it.
"""

import json
import logging
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id
from PIL import Image
from safetensors import safe_open

from hf_ddpm.folders.guard import make_empty, read_json, weights_files
from hf_ddpm.folders.index import check_folder, needs_us, part_folder
from hf_ddpm.folders.layout import (
    CARD,
    COMMANDS,
    CURVE,
    CUSTOM_PIPELINE,
    EVALUATION,
    GRIDS,
    INDEX,
    LOG,
    NOTES,
    PLOTS,
    RECORD,
    SAMPLES_PICTURE,
    SHOWN,
    WEIGHTS,
)
from hf_ddpm.models import NETWORKS, weights_digest
from hf_ddpm.publishing.card import MARK, CardFacts, make_card
from hf_ddpm.publishing.upload import Published, PublishError, Retry, reason, upload
from hf_ddpm.runtime.messages import one_line, redact

logger = logging.getLogger(__name__)

EMA_WEIGHTS = re.compile(rf"{WEIGHTS}\.ema_(0|0[._]\d+)\.safetensors")
TOLD = (NOTES, COMMANDS)  # what a person says of a model, and the pictures made of it
DRAWN = (CURVE, SAMPLES_PICTURE, *SHOWN)
LOGGED = ("step", "images", "seconds", "loss", "heldout_bpd", "heldout_stderr", "heldout_images")


@dataclass(frozen=True)
class Publication:
    """What is sent.

    Attributes:
        files: content by path in the repository.
        facts: what the card was made with.
        portable: whether plain diffusers loads it.
    """

    files: Mapping[str, Path | bytes]
    facts: CardFacts
    portable: bool

    def describe(self) -> str:
        """Every file with its size, a line each."""
        sizes = {path: _size(content) for path, content in sorted(self.files.items())}
        lines = [f"{size:>14,} bytes  {path}" for path, size in sizes.items()]
        return "\n".join([*lines, f"{sum(sizes.values()):>14,} bytes  in {len(sizes)} files"])


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
    evaluation go only if it measured the weights that are sent. With the main weights go what a person wrote
    of them, `notes.md` and `commands.sh`, and the pictures training.png, progressive.png and
    interpolation.png. A README.md that hf_ddpm did not write is sent as it is, instead of a card.

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
    check_repo_id(repo_id)
    if not (folder / INDEX).is_file():
        raise ValueError(f"model {shown!r} is no folder with a {INDEX}; allowed: a pipeline's folder")
    config = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    place = part_folder(folder, "unet")
    weights = _weights(place, ema_decay, main_decay(config))
    is_main = ema_decay in (None, main_decay(config))
    variant = None if is_main else next(iter(weights.values())).stem.removeprefix(f"{WEIGHTS}.")
    try:
        index = check_folder(folder, variant)
    except ValueError as error:
        raise ValueError(f"model {shown!r} can't be published: {error}") from error
    files: dict[str, Path | bytes] = {INDEX: folder / INDEX}
    files["scheduler/scheduler_config.json"] = part_folder(folder, "scheduler") / "scheduler_config.json"
    files["unet/config.json"] = place / "config.json"
    files |= {f"unet/{name}": path for name, path in weights.items()}
    for path in files.values():
        if isinstance(path, Path) and not path.is_file():
            raise ValueError(f"model {shown!r} has no {path.relative_to(folder).as_posix()}")

    # What was said and measured of it, in files of their own
    if config:
        files[RECORD] = redact((folder / RECORD).read_text(encoding="utf-8")).encode()
    if (folder / EVALUATION).is_file() and _measured(
        folder / EVALUATION, index, place / "config.json", list(weights.values())
    ):
        files[EVALUATION] = redact((folder / EVALUATION).read_text(encoding="utf-8")).encode()
        files |= {name: folder / name for name in PLOTS if (folder / name).is_file()}
    if is_main:
        if grids := sorted((folder / GRIDS).glob("step-*.png")):
            files[SAMPLES_PICTURE] = grids[-1]
        files |= {name: folder / name for name in (*TOLD, *DRAWN) if (folder / name).is_file()}
    _refuse_links(folder, [folder / RECORD, folder / EVALUATION, folder / CARD, *files.values()])
    files |= {name: redact(_text(folder / name)).encode() for name in TOLD if name in files}
    if picture is not None:
        files[SAMPLES_PICTURE] = _readable_picture(Path(picture).expanduser())
    if custom_pipeline:
        files[CUSTOM_PIPELINE] = b"from hf_ddpm import DDPMPipeline\n"

    # The card, from these files
    facts = CardFacts(
        repo_id=repo_id,
        revision=None if revision == "main" else revision,
        license=license or config.get("license"),
        dataset_license=dataset_license or config.get("dataset_license"),
        dataset_id=dataset_id or find_dataset_id(folder),
        ema_decay=main_decay(config) if is_main else ema_decay,
        training=_training(folder / LOG),
    )
    own = folder / CARD
    if own.is_file() and MARK not in (text := _text(own)):
        files[CARD] = redact(text).encode()
    else:
        try:
            files[CARD] = make_card(files, facts).encode()
        except (KeyError, TypeError, AttributeError) as error:
            words = f"the files of {shown!r} are not what they should be, {type(error).__name__}: {error}"
            raise ValueError(f"{words}; allowed: files as hf_ddpm writes them") from error
    return Publication(files, facts, not needs_us(index))


def needed_files(folder: Path, ema_decay: float | None = None) -> list[Path]:
    """What of a model's folder `collect` may read: the files of a snapshot.

    Raises:
        ValueError: one of them is a link out of the folder.
    """
    names = (INDEX, RECORD, EVALUATION, CARD, LOG, *TOLD, *DRAWN, *PLOTS)
    names += ("scheduler/scheduler_config.json", "unet/config.json")
    found = [folder / name for name in names if (folder / name).is_file()]
    grids = sorted((folder / GRIDS).glob("step-*.png"))[-1:]
    config = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    weights = _weights(folder / "unet", ema_decay, main_decay(config)).values()
    _refuse_links(folder, [*found, *grids, *weights])
    return [*found, *grids, *weights]


def check_repo_id(repo_id: str) -> None:
    """Refuse what can't be a repository's name.

    Raises:
        ValueError: it is none.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        shown = redact(str(repo_id))
        raise ValueError(
            f"repo_id is {shown!r}; allowed: user/name of letters, digits, '-', '_' and '.', 96 at most"
        ) from None


def _weights(place: Path, ema_decay: float | None, main: float | None = None) -> dict[str, Path]:
    """The weights files by the name under which they are published; those of a decay become the main ones."""
    if ema_decay in (None, main):
        files = [*weights_files(place), *place.glob(f"{WEIGHTS}.safetensors.index.json")]
        return {path.name: path for path in files}
    found = {
        float(match[1].replace("_", ".")): path
        for path in place.glob("*")
        if (match := EMA_WEIGHTS.fullmatch(path.name))
    }
    if ema_decay not in found:
        decays = ", ".join(str(decay) for decay in sorted({*found, *([] if main is None else [main])}))
        raise ValueError(
            f"ema_decay is {ema_decay}, of which there are no weights; allowed: {decays or 'none'}"
        )
    return {f"{WEIGHTS}.safetensors": found[ema_decay]}


def main_decay(config: Mapping[str, Any]) -> float | None:
    """The decay of a run's main weights, by its config."""
    try:
        return float(str(config.get("ema_decay")).split(",")[0])
    except ValueError:
        return None


def is_main_weights(path: str) -> bool:
    """Whether a file of a repository is read as weights, or as shards of them, by who names no variant."""
    name = rf"{WEIGHTS}(-\d+-of-\d+)?\.safetensors|{WEIGHTS}\.safetensors\.index\.json"
    return re.fullmatch(rf"(unet/)?({name})", path) is not None


def _measured(report: Path, index: Mapping[str, Any], config: Path, weights: list[Path]) -> bool:
    """Whether an evaluation is of these weights: a run goes on after it, and may hold several."""
    found = read_json(report)
    network = make_empty(NETWORKS[index["unet"][1]], read_json(config))
    tensors = {}
    for file in weights:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}
    # In float32, as a pipeline has them once it is loaded, whatever the file's precision
    tensors = {name: z.float() if z.is_floating_point() else z for name, z in tensors.items()}
    same = found.get("model", {}).get("weights") == weights_digest(network.config, tensors)  # type: ignore[arg-type]
    if not same:
        logger.warning("%s is of other weights than these: its numbers and plots are left out", report.name)
    return same


def _refuse_links(folder: Path, files: Iterable[Path | bytes]) -> None:
    for path in files:
        if isinstance(path, Path) and not path.resolve().is_relative_to(folder.resolve()):
            name, shown = path.relative_to(folder).as_posix(), redact(os.fspath(folder))
            raise ValueError(f"{name} is a link out of {shown!r}; allowed: its own files")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _readable_picture(path: Path) -> Path:
    try:
        with Image.open(path) as image:
            if image.format != "PNG":
                raise ValueError(f"it is {image.format}")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"picture {str(path)!r} can't be read: {one_line(error)}; allowed: a PNG file"
        ) from None
    return path


def find_dataset_id(folder: Path) -> str | None:
    """Hub id of the data set that a run was trained on, None where that can't be told.

    The config's `dataset` may be a folder relative to where the run was started. That place is known where
    the config's relative `output_dir` leads to the run; there, what is no file is the Hub's.
    """
    config = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
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


def _training(log: Path) -> dict[str, Any] | None:
    """The last numbers of a run's log; None if it has none."""
    found: dict[str, Any] = {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        try:
            numbers = json.loads(line)
        except ValueError:  # a killed run may leave half a line
            continue
        found |= {key: numbers[key] for key in LOGGED if key in numbers}
        if "heldout_bpd" in numbers:
            found["heldout_step"] = numbers["step"]
    return found if "images" in found else None


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


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
