"""Model cards: model_cards/TEMPLATE.md, filled from the files that a model's repository holds.

A card says nothing that these files and `CardFacts` don't say; what is missing is left out. This module does
not know where the files come from or where they go, and folders/numbers.py reads evaluation.json for it.
"""

import dataclasses
import json
import re
import shlex
from collections.abc import Mapping
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
    UNET,
)
from hf_ddpm.folders.numbers import TASK, card_words, check_report, hub_results, training_words
from hf_ddpm.models import NETWORKS
from hf_ddpm.runtime.messages import redact
from hf_ddpm.runtime.untrusted import parse_json, read_bytes, read_json

Files = Mapping[str, "Path | bytes"]  # content by path in the repository

# Written into every card. A README.md without it is a person's own, and is published as it is.
MARK = "<!-- Filled by hf-ddpm from the files beside it, and again. Without this line, it stays as it is. -->"
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
DIGITS = "the UCI optical digits that hf_ddpm embeds"  # hf_ddpm/data/digits/README.md


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
        ValueError: a licence that is not an identifier.
    """

    repo_id: str
    revision: str | None = None
    license: str | None = None
    dataset_license: str | None = None
    dataset_id: str | None = None
    ema_decay: float | None = None
    training: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for key in ("license", "dataset_license"):
            value = getattr(self, key)
            if value is not None and not LICENSE.fullmatch(value):
                raise ValueError(
                    f"{key} is {value!r}; allowed: as the Hub writes it: apache-2.0, mit, cc-by-4.0, other"
                )


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
    schedule, config = _schedule(files), read_json_file(files, RECORD)
    evaluation, training = read_json_file(files, EVALUATION), training_words(facts.training)
    if evaluation:
        check_report(evaluation)
    dataset, license = config.get("dataset"), facts.license or config.get("license")
    dataset_license = facts.dataset_license or config.get("dataset_license")
    if dataset == "digits" and facts.dataset_id is None:
        dataset_license = dataset_license or "cc-by-4.0"

    def id_of(name: str | None) -> str | None:
        """The Hub's id of a data set; None for others than the training images."""
        return facts.dataset_id if name in (dataset, facts.dataset_id) else None

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
        eval_results=hub_results(evaluation, id_of),
    )
    words = {
        "mark": MARK,
        "name": name,
        "repo_id": facts.repo_id,
        "revision": facts.revision,
        "shape": _shape(network_config),
        "network": index[UNET][1],
        "parameters": f"{_parameters(index, network_config):,}",
        "ema": f"averaged over the training with decay {facts.ema_decay}" if facts.ema_decay else None,
        "steps": schedule.get("num_train_timesteps"),
        "schedule": schedule,
        "portable": portable,
        "picture": SAMPLES_PICTURE if SAMPLES_PICTURE in files else None,
        "shown": [(caption, file) for file, caption in SHOWN.items() if file in files],
        "notes": _text(files, NOTES),
        "curve": CURVE if CURVE in files else None,
        "commands": _text(files, COMMANDS),
        "plots": [(caption, file) for file, caption in PLOTS.items() if file in files],
        **card_words(evaluation, call),
        "training": training,
        "seed": config.get("seed"),
        "dataset": call(dataset),
        "split": config.get("split"),
        "dataset_license": dataset_license,
        "license": license,
        "command": _command(config) if config else None,
        "config": json.dumps(config, indent=2),
    }
    text = str(ModelCard.from_template(data, template_str=template(), **words))
    return redact(re.sub(r"\n{3,}", "\n\n", text).strip()) + "\n"


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
