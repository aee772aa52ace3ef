"""Model cards: model_cards/TEMPLATE.md, filled from the files that a model's repository holds.

A card says nothing that these files and `CardFacts` don't say; what is missing is left out. Text from them
stands in the card as text: it can't become a link, a picture, HTML, another row of a table or a line of the
metadata. Only `notes.md` is Markdown, as a person wrote it. This module does not know where the files come
from or where they go, and folders/numbers.py reads evaluation.json for it.
"""

import dataclasses
import json
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import ModelCard, ModelCardData

from hf_ddpm.config import TrainConfig
from hf_ddpm.folders.guard import MAX_SCHEDULER, make_empty
from hf_ddpm.folders.index import needs_us
from hf_ddpm.folders.layout import (
    COMMANDS,
    CURVE,
    EVALUATION,
    INDEX,
    NETWORK_FILE,
    NOTES,
    PLOTS,
    RECORD,
    SAMPLES_PICTURE,
    SCHEDULER_FILE,
    SHOWN,
    SWEEP,
    SWEEP_PLOT,
    UNET,
)
from hf_ddpm.folders.numbers import TASK, card_words, check_report, hub_results, training_words
from hf_ddpm.folders.sweep import sweep_of, sweep_words
from hf_ddpm.models import NETWORKS
from hf_ddpm.runtime.hub import check_branch, check_license, check_repo_id
from hf_ddpm.runtime.messages import CONTROL, redact
from hf_ddpm.runtime.untrusted import parse_json, read_bytes, read_json

Files = Mapping[str, "Path | bytes"]  # content by path in the repository

# Written into every card. A README.md without it is a person's own, and is published as it is.
MARK = "<!-- Filled by hf-ddpm from the files beside it, and again. Without this line, it stays as it is. -->"
# What Markdown or HTML could take for more than text, but for a "_" inside a word, which is a plain one
ACTIVE = re.compile(r"[&<>\[\]`*|\\~$#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<=/)/|(?<=[wW]{3})\.")
DIGITS = "the UCI optical digits that hf_ddpm embeds"  # hf_ddpm/data/digits/README.md


CHECKS = {
    "repo_id": check_repo_id,
    "revision": check_branch,
    "license": check_license,
    "dataset_license": check_license,
    "dataset_id": check_repo_id,
}


@dataclass(frozen=True)
class CardFacts:
    """What a card says that the files in the repository don't; card.json in a folder of model_cards/.

    Attributes:
        repo_id: "user/name" on the Hub.
        revision: branch, None for main.
        license: of the weights, as the Hub writes it: "apache-2.0", "cc-by-4.0", "other".
        dataset_license: of the training images, written likewise.
        dataset_id: the Hub's id of the training images; None if they are not there.
        ema_decay: decay of the averaged weights; None if it is not known.
        training: the last numbers of the run's log, as `folders.numbers.last_numbers` finds them.

    Raises:
        ValueError: a licence that the Hub doesn't know, or what can't be a repository or a branch.
    """

    repo_id: str
    revision: str | None = None
    license: str | None = None
    dataset_license: str | None = None
    dataset_id: str | None = None
    ema_decay: float | None = None
    training: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for key, check in CHECKS.items():
            if (value := getattr(self, key)) is not None:
                check(key, value)


def make_card(files: Files, facts: CardFacts) -> str:
    """The card of a model: Markdown, with the Hub's metadata in front.

    Args:
        files: the content of the repository's files, by path; weights are not needed.
        facts: what the files don't say.

    Raises:
        ValueError: a file can't be read.
        KeyError, TypeError, AttributeError: a file doesn't hold what it should.
    """
    index, network_config = read_json_file(files, INDEX), read_json_file(files, NETWORK_FILE)
    config, evaluation = read_json_file(files, RECORD), read_json_file(files, EVALUATION)
    if evaluation:
        check_report(evaluation)
    sweep = read_json_file(files, SWEEP)
    if sweep:
        sweep_of(sweep)
    license = facts.license or config.get("license")
    dataset_license = facts.dataset_license or config.get("dataset_license")
    if config.get("dataset") == "digits" and facts.dataset_id is None:
        dataset_license = dataset_license or "cc-by-4.0"
    for key, value in (("license", license), ("dataset_license", dataset_license)):
        if value is not None:
            check_license(key, value)
    said = as_text({"config": config, "schedule": _schedule(files), "evaluation": evaluation, "sweep": sweep})
    dataset, training = said["config"].get("dataset"), training_words(as_text(facts.training))

    def id_of(name: str | None) -> str | None:
        """The Hub's id of a data set; None for others than the training images."""
        return facts.dataset_id if name in (dataset, config.get("dataset"), facts.dataset_id) else None

    def call(name: str | None) -> str | None:
        return _dataset_words(name, id_of(name))

    name, portable = facts.repo_id.split("/")[-1], not needs_us(index)
    data = ModelCardData(
        library_name="diffusers" if portable else "hf_ddpm",
        pipeline_tag=TASK,
        tags=["ddpm", TASK, "diffusion"],
        license=license,
        datasets=[facts.dataset_id] if facts.dataset_id else None,
        model_name=name,
        eval_results=hub_results(_with_texts(evaluation, _plain), id_of),
    )
    command = _text(files, COMMANDS) or (_plain(_command(config)) if config else None)
    measured, swept = (_plain(report.get("command") or "") for report in (evaluation, sweep))
    words = {
        "mark": MARK,
        "name": name,
        "repo_id": facts.repo_id,
        "revision": facts.revision,
        "shape": as_text(_shape(network_config)),
        "network": index[UNET][1],
        "class_conditional": bool(network_config.get("num_class_embeds")),
        "parameters": f"{_parameters(index, network_config):,}",
        "ema": f"averaged over the training with decay {float(facts.ema_decay)}" if facts.ema_decay else None,
        "steps": int(said["schedule"]["num_train_timesteps"]),
        "schedule": said["schedule"],
        "portable": portable,
        "picture": SAMPLES_PICTURE if SAMPLES_PICTURE in files else None,
        "shown": [(caption, file) for file, caption in SHOWN.items() if file in files],
        "notes": _text(files, NOTES),
        "curve": CURVE if CURVE in files else None,
        "plots": [(caption, file) for file, caption in PLOTS.items() if file in files],
        **card_words(said["evaluation"], call),
        "evaluation_command": measured,
        "evaluation_fence": fence(measured, 3),
        "sweep": sweep_words(sweep_of(said["sweep"]), call) if sweep else None,
        "sweep_plot": SWEEP_PLOT if sweep and SWEEP_PLOT in files else None,
        "sweep_command": swept,
        "sweep_fence": fence(swept, 3),
        "training": training,
        "seed": said["config"].get("seed"),
        "dataset": call(dataset),
        "split": said["config"].get("split"),
        "dataset_license": dataset_license,
        "license": license,
        "command": command,
        "fence": fence(command, 4),
        "config": json.dumps(config, indent=2) if config else None,
    }
    text = str(ModelCard.from_template(data, template_str=template(), **words))
    text = redact(re.sub(r"\n{3,}", "\n\n", text).strip()) + "\n"
    return text.encode(errors="backslashreplace").decode()  # a path may hold bytes that are no text


def as_text(value: Any) -> Any:
    """Plain values of a file, whose texts, keys too, are written so that Markdown shows them as they are.

    Entities are used: they are no syntax, whether they stand in prose, in a table or in a link.
    """
    return _with_texts(value, lambda text: ACTIVE.sub(lambda found: f"&#{ord(found.group())};", _plain(text)))


def _plain(text: str) -> str:
    """A text in one line, without characters that control how others are shown."""
    return CONTROL.sub(" ", text)


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Plain values with all texts in them, keys too, changed."""
    if isinstance(value, Mapping):
        return {change(str(key)): _with_texts(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_texts(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def fence(text: str | None, least: int) -> str:
    """Backticks that the text between two rows of them can't end: `least`, or more than it has in a row."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text or "")), default=0))


def template() -> str:
    """The text of model_cards/TEMPLATE.md, of which an installed package holds a copy."""
    package = Path(__file__).parents[1]
    places = (package / "TEMPLATE.md", package.parent / "model_cards" / "TEMPLATE.md")
    return next(place for place in places if place.is_file()).read_text(encoding="utf-8")


def read_json_file(files: Files, path: str) -> dict[str, Any]:
    """The keys and values of a JSON file; {} if it is not there.

    Raises:
        ValueError: it can't be read, or holds something else.
    """
    found = files.get(path)
    if found is None:
        return {}
    return parse_json(found, path) if isinstance(found, bytes) else read_json(found, MAX_SCHEDULER, path)


def _text(files: Files, path: str) -> str | None:
    """The content of a text file; None if it is not there."""
    found = files.get(path)
    if found is None:
        return None
    data = found if isinstance(found, bytes) else read_bytes(found, name=path)
    return data.decode(errors="replace").strip()


def _schedule(files: Files) -> dict[str, Any]:
    """The scheduler's config, with diffusers' defaults for what a config of an older diffusers lacks."""
    defaults = {"num_train_timesteps": 1000, "beta_schedule": "linear", "prediction_type": "epsilon"}
    config = read_json_file(files, SCHEDULER_FILE)
    if config.get("_class_name") == "DDPMScheduler":
        defaults["variance_type"] = "fixed_small"
    return defaults | config


def _shape(config: Mapping[str, Any]) -> str:
    channels = config.get("in_channels")
    kind = {1: "grey", 3: "RGB"}.get(channels, f"{channels}-channel")  # type: ignore[call-overload]
    if config.get("sample_size") is None:
        return kind
    height, width = np.broadcast_to(config["sample_size"], 2).tolist()
    return f"{height}x{width} {kind}"


def _parameters(index: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    network = make_empty(NETWORKS[index[UNET][1]], config)
    return sum(weight.numel() for weight in network.parameters())


def _dataset_words(name: str | None, dataset_id: str | None) -> str | None:
    """What a card calls a data set: a link if it is on the Hub, else its folder's name without the path."""
    if dataset_id is not None:
        return f"[{dataset_id}](https://huggingface.co/datasets/{dataset_id})"
    return DIGITS if name == "digits" else name and Path(name).name


def _command(config: Mapping[str, Any]) -> str:
    """The command line that starts a run like this: the options that differ from the defaults."""
    words = ["hf-ddpm", "train"]
    for field in dataclasses.fields(TrainConfig):
        value = config.get(field.name, field.default)
        if value != field.default and value is not None:
            typed = str(value).lower() if isinstance(value, bool) else str(value)
            words += [f"--{field.name}", typed]
    return shlex.join(words)
