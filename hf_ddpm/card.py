"""Model cards: model_cards/TEMPLATE.md, filled from the files that a model's repository holds.

A card says nothing that its files don't: a number that is missing is left out. It knows what the files mean,
and neither where they come from nor where they go.
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
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_ddpm.config import TrainConfig
from hf_ddpm.guard import make_empty
from hf_ddpm.loading import INDEX, needs_us
from hf_ddpm.models import NETWORKS
from hf_ddpm.redact import redact
from hf_ddpm.report import JSON, describe_memorisation

Files = Mapping[str, "Path | bytes"]  # content by path in the repository

CARD, PICTURE, RECORD = "README.md", "samples.png", "train_config.json"
CURVE, NOTES, COMMANDS = "training.png", "notes.md", "commands.sh"
PLOTS = {
    "bits-per-step.png": "Bits of each step",
    "rate-distortion.png": "Progressive rate and distortion",
    "reconstructions.png": "Reconstructions from each noise level",
}
SHOWN = {  # pictures beside the samples
    "progressive.png": "Progressive generation: predicted x₀ on the way from noise to a sample, a row each",
    "interpolation.png": "Interpolation of two held-out images in the noise of step t, a row for each t",
}
MARK = "<!-- Filled by hf-ddpm from the files beside it, and again. Without this line, it stays as it is. -->"
TASK = "unconditional-image-generation"
METRICS = {  # first word of a label in evaluation.json: the Hub's name of the metric
    "FID": "fid",
    "KID": "kid",
    "IS": "inception_score",
    "FD": "frechet_distance",
    "KD": "kernel_distance",
    "CS": "classifier_score",
}
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
DIGITS = "the UCI optical digits that hf_ddpm embeds"  # hf_ddpm/digits/README.md


@dataclass(frozen=True)
class CardFacts:
    """What a card says besides the model's own files; `card.json` in a folder of model_cards/.

    Attributes:
        repo_id: "user/name" on the Hub.
        revision: branch, None for main.
        license: of the weights, as the Hub writes it: "apache-2.0", "cc-by-4.0", "other".
        dataset_license: of the training images.
        dataset_id: of the training images on the Hub; None if they are not there.
        ema_decay: of the averaged weights, where others than the run's main ones are meant.
        training: last numbers of the run's log: step, images, loss.

    Raises:
        ValueError: a licence that is no identifier.
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
    """The card of a model, Markdown with the Hub's metadata in front.

    Args:
        files: what the repository holds; weights are not needed.
        facts: what the files don't say.

    Raises:
        ValueError: a file that can't be read as what it should be.
    """
    index, network_config = _read(files, INDEX), _read(files, "unet/config.json")
    schedule, config = _schedule(files), _read(files, RECORD)
    evaluation = _read(files, JSON)
    dataset, license = config.get("dataset"), facts.license or config.get("license")
    dataset_license = facts.dataset_license or config.get("dataset_license")
    if dataset == "digits" and facts.dataset_id is None:
        dataset_license = dataset_license or "cc-by-4.0"
    heldout = _heldout(facts.training) if facts.training and not evaluation else None
    same = evaluation.get("data", {}).get("dataset") in (dataset, facts.dataset_id)
    evaluated_id = facts.dataset_id if same else None
    memory = evaluation.get("memorisation")
    searched_id = facts.dataset_id if memory and memory["dataset"] in (dataset, facts.dataset_id) else None
    name = facts.repo_id.split("/")[-1]
    portable = not needs_us(index)
    data = ModelCardData(
        library_name="diffusers" if portable else "hf_ddpm",
        pipeline_tag=TASK,
        tags=["ddpm", TASK, "diffusion"],
        license=license,
        datasets=[facts.dataset_id] if facts.dataset_id else None,
        model_name=name,
        eval_results=_results(evaluation, evaluated_id) if evaluation else None,
    )
    words = {
        "mark": MARK,
        "name": name,
        "repo_id": facts.repo_id,
        "revision": facts.revision,
        "shape": _shape(network_config),
        "network": index["unet"][1],
        "parameters": f"{_parameters(index, network_config):,}",
        "ema": f"averaged over the training with decay {facts.ema_decay}" if facts.ema_decay else None,
        "steps": schedule.get("num_train_timesteps"),
        "schedule": schedule,
        "portable": portable,
        "picture": PICTURE if PICTURE in files else None,
        "shown": [(caption, file) for file, caption in SHOWN.items() if file in files],
        "notes": _text(files, NOTES),
        "curve": CURVE if CURVE in files else None,
        "commands": _text(files, COMMANDS),
        "plots": [(caption, file) for file, caption in PLOTS.items() if file in files],
        "evaluation": evaluation,
        "evaluated": _dataset_words(evaluation["data"]["dataset"], evaluated_id) if evaluation else None,
        "bits": _bits(evaluation) if evaluation else None,
        "samples": _samples(evaluation) if evaluation else None,
        "memory": memory and describe_memorisation(memory, _dataset_words(memory["dataset"], searched_id)),
        "heldout": heldout,
        "training": _rounded(facts.training),
        "seed": config.get("seed"),
        "dataset": _dataset_words(dataset, facts.dataset_id),
        "split": config.get("split"),
        "dataset_license": dataset_license,
        "license": license,
        "command": _command(config) if config else None,
        "config": json.dumps(config, indent=2),
    }
    text = str(ModelCard.from_template(data, template_str=template(), **words))
    return redact(re.sub(r"\n{3,}", "\n\n", text).strip()) + "\n"


def template() -> str:
    """The text of model_cards/TEMPLATE.md, which an installed package holds as well."""
    package = Path(__file__).parent
    places = (package / "TEMPLATE.md", package.parent / "model_cards" / "TEMPLATE.md")
    return next(place for place in places if place.is_file()).read_text(encoding="utf-8")


def card_of(folder: Path) -> str:
    """The card of a published run's folder in model_cards/, from the files in it.

    Raises:
        ValueError: its `card.json` is missing or says what `CardFacts` doesn't know.
    """
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    try:
        return make_card(files, CardFacts(**_read(files, "card.json")))
    except (TypeError, KeyError) as error:
        raise ValueError(f"{str(folder)!r} is no folder of a card: {error}") from error


def card_folders(parent: Path) -> list[Path]:
    """The folders of published runs."""
    return sorted(path.parent for path in parent.glob("*/card.json"))


def _read(files: Files, path: str) -> dict[str, Any]:
    """A JSON file's content, empty if it is not there."""
    found = files.get(path)
    if found is None:
        return {}
    try:
        value = json.loads(found if isinstance(found, bytes) else found.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}; allowed: keys and values")
    return value


def _text(files: Files, path: str) -> str | None:
    """A text file's content, None if it is not there."""
    found = files.get(path)
    if found is None:
        return None
    data = found if isinstance(found, bytes) else found.read_bytes()
    return data.decode(errors="replace").strip()


def _schedule(files: Files) -> dict[str, Any]:
    """The scheduler's config, with diffusers' defaults for what an old one doesn't say."""
    defaults = {"num_train_timesteps": 1000, "beta_schedule": "linear", "prediction_type": "epsilon"}
    config = _read(files, "scheduler/scheduler_config.json")
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
    network = make_empty(NETWORKS[index["unet"][1]], config)
    return sum(weight.numel() for weight in network.parameters())


def _dataset_words(name: str | None, dataset_id: str | None) -> str | None:
    """What a card calls a data set: a link if it is on the Hub, else its folder's name, not where it lay."""
    if dataset_id is not None:
        return f"[{dataset_id}](https://huggingface.co/datasets/{dataset_id})"
    return DIGITS if name == "digits" else name and Path(name).name


def _number(part: Mapping[str, Any], digits: int = 3) -> str:
    stderr = part["stderr"]
    return f"{part['value']:.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")


def _bits(report: Mapping[str, Any]) -> dict[str, Any]:
    """The table of bits/dim: what it is made of, for each fixed variance."""
    columns = [report["bits_per_dim"]] + ([report["other_variance"]] if "other_variance" in report else [])
    rows = [
        [words, *(_number(column[key]) for column in columns)]
        for words, key in (
            ("bits/dim", "bpd"),
            ("rate", "rate_bpd"),
            ("distortion (L₀)", "distortion_bpd"),
        )
    ]
    method, data = report["method"], report["data"]
    clipped = "clipped" if method["clip_x0"] else "unclipped"
    fitted = (
        "" if data["fit"] == "exact" else f" The images were changed to the model's size ({data['fit']})."
    )
    return {
        "columns": [f"variance `{column['variance_type']}`" for column in columns],
        "rows": rows,
        "method": f"Chain of {method['steps']} steps, {method['evaluations_per_image']} network evaluations "
        f"per image ({method['name']}), {clipped} x̂₀, {method['decoder']} discretised decoder.{fitted}",
    }


def _samples(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """The table of sample metrics beside their floor."""
    found = report.get("sample_metrics")
    if found is None:
        return None
    names = [name for name in found["samples"] if " std " not in name]
    rows = [[name, *(f"{found[kind][name]:.4g}" for kind in ("samples", "floor"))] for name in names]
    return {
        "network": f"`{found['extractor']}`",
        "num_samples": found["num_samples"],
        "num_floor": found["num_floor"],
        "rows": rows,
        "method": f"Samples of {found['scheduler']} in {found['sampling_steps']} steps, compared with "
        f"{found['num_reference']} real images.",
    }


def _results(report: Mapping[str, Any], dataset_id: str | None) -> list[EvalResult]:
    """The numbers as the Hub's metadata, which it shows beside the card."""
    data = report["data"]
    kind = dataset_id or Path(data["dataset"]).name
    on = {"task_type": TASK, "dataset_type": kind, "dataset_name": kind, "dataset_split": data["split"]}
    results = []
    for numbers in (report["bits_per_dim"], report.get("other_variance")):
        for metric, key in (("bits_per_dim", "bpd"), ("rate", "rate_bpd"), ("distortion", "distortion_bpd")):
            if numbers is None:
                continue
            value, stderr = numbers[key]["value"], numbers[key]["stderr"]
            error = "" if stderr is None else f", ± {stderr:.3f}"
            words = {"bpd": "bits/dim, upper bound"}.get(key, f"{metric}, bits/dim")
            name = f"{words} ({numbers['variance_type']}{error})"
            results.append(
                EvalResult(**on, metric_type=metric, metric_value=round(value, 4), metric_name=name)
            )
    found = report.get("sample_metrics", {"samples": {}})
    for name, value in found["samples"].items():
        if (metric := METRICS.get(name.split(" ")[0])) and " std " not in name:
            name = f"{name}, {found['num_samples']} samples"
            value = float(f"{value:.4g}")
            results.append(EvalResult(**on, metric_type=metric, metric_value=value, metric_name=name))
    return results


def _heldout(training: Mapping[str, Any]) -> str | None:
    """Held-out bits/dim that training noted."""
    if "heldout_bpd" not in training:
        return None
    return _number({"value": training["heldout_bpd"], "stderr": training.get("heldout_stderr")})


def _rounded(training: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if training is None:
        return None
    loss = {"loss": f"{training['loss']:.4f}"} if "loss" in training else {}
    time = {"minutes": f"{training['seconds'] / 60:,.0f}"} if "seconds" in training else {}
    return {**training, **loss, **time}


def _command(config: Mapping[str, Any]) -> str:
    """The command line of a run: what differs from the defaults."""
    words = ["hf-ddpm", "train"]
    for field in dataclasses.fields(TrainConfig):
        value = config.get(field.name, field.default)
        if value != field.default and value is not None:
            typed = str(value).lower() if isinstance(value, bool) else str(value)
            words += [f"--{field.name}", typed]
    return shlex.join(words)
