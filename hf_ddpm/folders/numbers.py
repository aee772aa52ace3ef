"""Readers of what was measured: `evaluation.json`, and the last numbers of a run's log.

`evaluation.json` is an object of these sections; bits are bits per dimension, {value, stderr} is a mean over
images with its standard error (null for a single image), and those marked ° may be missing.

    bits_per_dim      variance_type; bpd, rate_bpd, distortion_bpd, prior_bpd: {value, stderr}
    other_variance °  the same under the other fixed variance
    method            name, steps, evaluations_per_image, clip_x0, decoder, seed, … : how bits/dim were taken
    few_steps °       timesteps (that the chain visits), last_step ° (the lowest, where the decoder starts),
                      errors (what those it is made of are of, or null); where the steps, the variance or
                      the decoder were measured, the steps are not even, or the decoder starts above step 0
    data              dataset, split (or a slice of it), part ° (held-out or train, of a split that a run held
                      images out of; else all), holdout ° and holdout_seed ° (which chose them), fit, channels
                      (null: the images' own), background (of transparent pixels), to_8_bit (deeper images
                      were converted, as they are by a `fit`), shape, num_images (scored), num_rows (that
                      could have been), num_skipped ° (that can't be read), fingerprint, trained_on (whether
                      the model was trained on some of these num_rows, for all that is known),
                      num_trained_on ° (on how many; null where nobody knows),
                      changed ° (how the data set is not the one that the run began with, in words)
    model             name, weights (a digest), process (a digest), prediction_type
    classes °         of a class-conditional model: given (the class that each image is told: "its own", the
                      name of one, or "none"), names, label_column; per_class ° {name: {num_images, bpd:
                      {value, stderr}}}, by the images' own classes; classifier °: accuracy, log_probability
                      (nats) and mixture_bpd °, each {value, stderr}, per_class {name: accuracy},
                      evaluations, halving (whether classes were left early)
    comparison °      with (section `model` of the other one), variance_types, chains, difference_bpd, stderr
    sample_metrics °  extractor, samples and floor: {label: value}, num_samples, num_reference, num_floor,
                      scheduler, sampling_steps, timestep_spacing, variance_type; a label with " std " in it
                      is a spread, not a metric
    memorisation °    dataset, split, num_rows, fingerprint, quantile, near (grey levels), trained_on;
                      samples and heldout: {num_images, share_near, median_distance (grey levels),
                      exact_copies}; scheduler, sampling_steps, timestep_spacing, variance_type
    seconds, processes, device, command, date, versions

evaluation/report.py writes it. No other module reads it, but for a comparison of two evaluations, in that
folder. A log is described in training/log.py.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from hf_ddpm.folders.labels import NO_CLASS, OWN_CLASSES
from hf_ddpm.folders.layout import EVALUATION, LOG
from hf_ddpm.folders.values import fits, words_of
from hf_ddpm.runtime.messages import shorten
from hf_ddpm.runtime.untrusted import check_regular, shown
from hf_ddpm.shown import fields_line

TASK = "unconditional-image-generation"
BITS = (("bits/dim", "bpd"), ("rate", "rate_bpd"), ("distortion (L₀)", "distortion_bpd"))  # rows of the table
HUB_BITS = (  # the Hub's name of the metric, its key, what it is called
    ("bits_per_dim", "bpd", "bits/dim, upper bound"),
    ("rate", "rate_bpd", "rate, bits/dim"),
    ("distortion", "distortion_bpd", "distortion, bits/dim"),
)
METRICS = {  # first word of a label in evaluation.json: the Hub's name of the metric
    "FID": "fid",
    "KID": "kid",
    "IS": "inception_score",
    "FD": "frechet_distance",
    "KD": "kernel_distance",
    "CS": "classifier_score",
}
_NUMBER = {"value": float, "stderr": float | None}
_BITS = {"variance_type": str, "bpd": _NUMBER, "rate_bpd": _NUMBER, "distortion_bpd": _NUMBER}
_NEAR = {"num_images": int, "share_near": float, "median_distance": float, "exact_copies": int}
# The types of what is read of evaluation.json, by section and key; the sections of FURTHER may be missing
SECTIONS: dict[str, Any] = {
    "bits_per_dim": _BITS,
    "method": {"name": str, "steps": int, "evaluations_per_image": float, "clip_x0": bool, "decoder": str},
    "data": {
        **{"dataset": str, "split": str, "fit": str},
        **{"num_images": int, "num_rows": int, "trained_on": bool},
    },
    "model": {"name": str},
}
FURTHER: dict[str, Any] = {
    "other_variance": _BITS,
    "sample_metrics": {
        **{"extractor": str, "num_samples": int, "num_reference": int, "num_floor": int},
        **{"scheduler": str, "sampling_steps": int, "samples": {}, "floor": {}},
    },
    "memorisation": {
        **{"dataset": str, "split": str, "num_rows": int, "near": float, "trained_on": bool},
        **{"samples": _NEAR, "heldout": _NEAR},
    },
    "classes": {"given": str},
    "command": str,
}
_PER_CLASS = {"num_images": int, "bpd": _NUMBER}
_CLASSIFIER = {"accuracy": _NUMBER, "log_probability": _NUMBER, "evaluations": int, "halving": bool}
MOST_LISTED = 12  # classes that are told one by one on a terminal
# Keys of the section "data" that may be missing or null
DATA_FURTHER: dict[str, Any] = {
    **{"part": str, "holdout": float, "holdout_seed": int, "num_trained_on": int, "num_skipped": int},
    **{"changed": str},
}
MAX_LINE = 2**16  # bytes of a line of a log that are read; ours have a few hundred
LOGGED = ("step", "images", "seconds", "loss", "heldout_bpd", "heldout_stderr", "heldout_images")


def with_error(number: Mapping[str, float | None], digits: int) -> str:
    """A number {value, stderr} as "3.499 ± 0.017", with so many digits after the point."""
    return f"{number['value']:.{digits}f}" + _error(number, digits)


def _error(number: Mapping[str, float | None], digits: int) -> str:
    return "" if number["stderr"] is None else f" ± {number['stderr']:.{digits}f}"


# An evaluation


def check_report(report: Mapping[str, Any]) -> None:
    """Refuse an evaluation, which may be a stranger's, that lacks what is read of it or holds other types.

    Args:
        report: the content of `evaluation.json`.

    Raises:
        ValueError: it does; the message names the file, the key and the value.
    """
    _check_types(report, SECTIONS | {key: FURTHER[key] for key in FURTHER if report.get(key) is not None}, "")
    if (few := report.get("few_steps")) is not None:
        known = isinstance(few, dict) and few.get("last_step") is not None
        _check_types(report, {"few_steps": {"last_step": int} if known else {}}, "")
    data = report["data"]
    _check_types(data, {k: v for k, v in DATA_FURTHER.items() if data.get(k) is not None}, "data.")
    if report.get("classes") is not None:
        _check_classes(report["classes"])
    if report.get("sample_metrics") is not None:
        ours, floor = (report["sample_metrics"][key] for key in ("samples", "floor"))
        for name, value in (*ours.items(), *floor.items()):
            if not isinstance(value, float) and not fits(value, float):
                raise ValueError(f"{EVALUATION}: {shown(name)} is {shown(value)}; allowed: a number")
        if ours.keys() != floor.keys():
            raise ValueError(f"{EVALUATION}: sample_metrics has other labels in samples than in floor")


def _check_classes(found: Mapping[str, Any]) -> None:
    """Refuse a section "classes" of other types."""
    for key in ("per_class", "classifier"):
        if found.get(key) is not None:
            _check_types(found, {key: {}}, "classes.")
    for name, numbers in (found.get("per_class") or {}).items():
        where = f"classes.per_class.{shorten(name, 40)}"
        if not isinstance(numbers, dict):
            raise ValueError(f"{EVALUATION}: {where} is {shown(numbers)}; allowed: keys and values")
        _check_types(numbers, _PER_CLASS, f"{where}.")
    if (classifier := found.get("classifier")) is not None:
        mixture = {} if classifier.get("mixture_bpd") is None else {"mixture_bpd": _NUMBER}
        _check_types(classifier, _CLASSIFIER | mixture, "classes.classifier.")


def _check_types(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    for key, kind in wanted.items():
        value, name = found.get(key), f"{where}{key}"
        if key not in found:
            raise ValueError(f"{EVALUATION} has no {name}")
        if isinstance(kind, dict) and isinstance(value, dict):
            _check_types(value, kind, f"{name}.")
        elif isinstance(kind, dict) or not fits(value, kind):
            words = "keys and values" if isinstance(kind, dict) else words_of(kind)
            raise ValueError(f"{EVALUATION}: {name} is {shown(value)}; allowed: {words}")


def measured_weights(report: Mapping[str, Any]) -> str | None:
    """The digest of the weights that were measured (`models.weights_digest`); None if it isn't said."""
    model = report.get("model")
    return model.get("weights") if isinstance(model, dict) else None


def card_words(report: Mapping[str, Any], call: Callable[[str], str | None]) -> dict[str, Any]:
    """What a card says of an evaluation.

    Args:
        report: the content of `evaluation.json`; {} where there is none.
        call: what the card calls a data set, by its name in the report.

    Returns:
        bits, classes and samples, each a table with words beside it, memory, a sentence, and
        evaluation_command, a command line; None for what was not measured.
    """
    if not report:
        return dict.fromkeys(("bits", "classes", "samples", "memory", "evaluation_command"))
    memory = report.get("memorisation")
    return {
        "bits": _bits_table(report, call),
        "classes": _classes_table(report),
        "samples": _samples_table(report),
        "memory": memory and describe_memorisation(memory, call(memory["dataset"])),
        "evaluation_command": report.get("command"),
    }


def _bits_table(report: Mapping[str, Any], call: Callable[[str], str | None]) -> dict[str, Any]:
    """The table of bits/dim: what it is made of, for each fixed variance."""
    columns = _variances(report)
    method, data = report["method"], report["data"]
    clipped = "clipped" if method["clip_x0"] else "unclipped"
    fitted = (
        "" if data["fit"] == "exact" else f" The images were changed to the model's size ({data['fit']})."
    )
    if data.get("to_8_bit"):
        fitted += " Images of more than 8 bits a channel were converted to 8."
    return {
        "num_images": data["num_images"],
        "dataset": call(data["dataset"]),
        "split": data["split"] + _holdout_words(data),
        "part": {"held-out": "held-out ", "train": "training "}.get(data.get("part"), ""),
        "trained_on": data["trained_on"],
        "trained_words": _trained_words(data),
        "columns": [f"variance `{column['variance_type']}`{_label_words(report, '`')}" for column in columns],
        "rows": [[words, *(with_error(column[key], 3) for column in columns)] for words, key in BITS],
        "method": f"Chain of {method['steps']} steps, {method['evaluations_per_image']} network evaluations "
        f"per image ({method['name']}), {clipped} x̂₀, {_decoder_sentence(report)}." + fitted,
    }


def _classes_table(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """The table of bits/dim of the images of each class, and what the model says as a classifier."""
    found = report.get("classes")
    if found is None or not found.get("per_class"):
        return None
    return {
        "rows": [
            [name, numbers["num_images"], with_error(numbers["bpd"], 3)]
            for name, numbers in found["per_class"].items()
        ],
        "told": _given_words(report).removeprefix(", "),
        "classifier": found.get("classifier") and _classifier_words(found["classifier"]),
    }


def _classifier_words(found: Mapping[str, Any]) -> str:
    """What the model says as a classifier of the images, in a sentence without its full stop."""
    words = (
        f"accuracy {with_error(found['accuracy'], 3)}, log p(class | image) "
        f"{with_error(found['log_probability'], 3)} nats"
    )
    if found.get("mixture_bpd") is not None:
        words += f", {with_error(found['mixture_bpd'], 4)} bits/dim of the mixture of all classes"
    return words


def _class_lines(report: Mapping[str, Any]) -> list[str]:
    """Section "classes" in lines for a terminal."""
    found, lines = report["classes"], []
    if per_class := found.get("per_class"):
        numbers = {name: one["bpd"] for name, one in per_class.items()}
        what = f"of the images of each class ({_given_words(report).removeprefix(', ')})"
        if len(numbers) > MOST_LISTED:
            order = sorted(numbers, key=lambda name: numbers[name]["value"])
            what = f"of the images of {len(numbers)} classes, the least and the most"
            numbers = {name: numbers[name] for name in (order[0], order[-1])}
        each = [f"{shorten(name, 30)} {with_error(one, 3)}" for name, one in numbers.items()]
        lines.append(f"bits/dim {what}: {', '.join(each)}")
    if classifier := found.get("classifier"):
        lines.append(f"classifying the images: {_classifier_words(classifier)}")
    return lines


def _samples_table(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """The table of sample metrics beside their floor: what other real images reach."""
    found = report.get("sample_metrics")
    if found is None:
        return None
    return {
        "network": f"`{found['extractor']}`",
        "num_samples": found["num_samples"],
        "num_floor": found["num_floor"],
        "rows": [[name, f"{ours:.4g}", f"{floor:.4g}"] for name, ours, floor in _metrics(found)],
        "method": f"Samples of {found['scheduler']} in {found['sampling_steps']} steps, compared with "
        f"{found['num_reference']} real images.",
    }


def hub_results(report: Mapping[str, Any], id_of: Callable[[str], str | None]) -> list[EvalResult] | None:
    """An evaluation's numbers as the metadata that the Hub shows beside a card; None where there are none.

    Args:
        report: the content of `evaluation.json`; {} where there is none.
        id_of: the Hub's id of a data set, by its name in the report; None if it has none.
    """
    if not report:
        return None
    data = report["data"]
    kind = id_of(data["dataset"]) or Path(data["dataset"]).name
    on = {"task_type": TASK, "dataset_type": kind, "dataset_name": kind, "dataset_split": data["split"]}
    found = []  # the Hub's metric, value, words
    for numbers in _variances(report):
        for metric, key, words in HUB_BITS:
            error = _error(numbers[key], 3)
            label = f"{numbers['variance_type']}{_label_words(report)}"
            words = f"{words} ({label}{',' * bool(error)}{error})"
            found.append((metric, round(numbers[key]["value"], 4), words))
    if metrics := report.get("sample_metrics"):
        for name, ours, _ in _metrics(metrics):
            if metric := METRICS.get(name.split(" ")[0]):
                found.append((metric, float(f"{ours:.4g}"), f"{name}, {metrics['num_samples']} samples"))
    return [EvalResult(**on, metric_type=m, metric_value=v, metric_name=words) for m, v, words in found]


def describe(report: Mapping[str, Any]) -> str:
    """An evaluation in a few lines for a terminal."""
    method, data, lines = report["method"], report["data"], []
    for numbers in _variances(report):
        rate, distortion = (numbers[key]["value"] for key in ("rate_bpd", "distortion_bpd"))
        lines.append(
            f"{with_error(numbers['bpd'], 4)} bits/dim ({numbers['variance_type']}{_label_words(report)}): "
            f"rate {rate:.4f} "
            f"+ distortion {distortion:.4f}"
        )
    fitted = "" if data["fit"] == "exact" else f", changed by fit {data['fit']}"
    fitted += ", converted to 8 bits" if data.get("to_8_bit") else ""
    part = {"held-out": "held-out ", "train": "trained-on "}.get(data.get("part"), "")
    seen = f", {data['num_trained_on']} of them trained on" if data.get("num_trained_on") else ""
    seen = "" if data.get("part") == "train" else seen
    if data.get("changed") and data["trained_on"]:
        seen = ", of which nobody knows how many were trained on"
    lines.append(
        f"{data['num_images']} of {data['num_rows']} {part}images of {data['dataset']}, {data['split']}"
        f"{_holdout_words(data)}{seen}{fitted}; "
        f"{method['evaluations_per_image']} network evaluations each ({method['name']})"
    )
    if report.get("classes"):
        lines += _class_lines(report)
    if report.get("few_steps"):
        lines.append(_chain_words(report))
    if found := report.get("comparison"):
        both = with_error({"value": found["difference_bpd"], "stderr": found["stderr"]}, 4)
        ours, theirs = found["chains"]
        chains = "" if ours == theirs else f"; {ours} - {theirs}"
        lines.append(
            f"{both} bits/dim difference to {found['with']['name']} "
            f"({' - '.join(found['variance_types'])}{chains})"
        )
    if found := report.get("sample_metrics"):
        of = f"of {found['num_samples']} samples", f"of {found['num_floor']} real images"
        lines += [f"{name}: {ours:.4g} {of[0]}, {floor:.4g} {of[1]}" for name, ours, floor in _metrics(found)]
    if found := report.get("memorisation"):
        lines.append(describe_memorisation(found))
    return "\n".join(lines)


def _label_words(report: Mapping[str, Any], quote: str = "") -> str:
    """What bits/dim were taken with, but for the decoder of published numbers, each after a comma."""
    decoder = report["method"]["decoder"]
    words = "" if decoder in ("exact", "tanh") else f", decoder {quote}{decoder}{quote}"
    return words + _given_words(report)


def _given_words(report: Mapping[str, Any]) -> str:
    """What a class-conditional model was told of each image, after a comma; empty for other models."""
    if report.get("classes") is None:
        return ""
    given = report["classes"]["given"]
    words = {OWN_CLASSES: "given the image's class", NO_CLASS: "without a class"}
    return f", {words.get(given, f'given class {shorten(given, 40)}')}"


def _decoder_sentence(report: Mapping[str, Any]) -> str:
    """Which decoder bits/dim were taken with, for a card."""
    decoder, start = report["method"]["decoder"], (report.get("few_steps") or {}).get("last_step")
    if decoder in ("exact", "tanh"):
        return f"{decoder} discretised decoder" + (f" that starts at step {start}" if start else "")
    starts = f"starts at step {start} and " if start else ""
    return (
        f"a decoder that {starts}knows how often the training images have each grey level: not the kind of "
        "number that papers report"
    )


def _trained_words(data: Mapping[str, Any]) -> str:
    """Which of the images of an evaluation the model was trained on."""
    if data.get("changed"):
        return "this split, which has changed since"
    seen, rows = data.get("num_trained_on"), data["num_rows"]
    return "this split" if seen in (None, rows) else f"{seen} of the {rows} images that these are chosen from"


def _holdout_words(data: Mapping[str, Any]) -> str:
    """Which holdout chose the images of an evaluation, in brackets; empty where none did."""
    if data.get("holdout") is None:
        return ""
    return f" (holdout {data['holdout']:g}, seed {data.get('holdout_seed')})"


def _chain_words(report: Mapping[str, Any]) -> str:
    """Which steps a chain of fewer steps visits, in a sentence."""
    method, steps = report["method"], report["few_steps"]["timesteps"]
    first = "" if steps[0] == 0 else f"; its decoder starts at step {steps[0]}"
    return (
        f"chain of {method['steps']} steps ({method.get('chain', 'even')}), from step {steps[-1]} down to "
        f"{steps[0]}{first}"
    )


def describe_memorisation(found: Mapping[str, Any], dataset: str | None = None) -> str:
    """Section "memorisation" in a sentence; `dataset` is what to call the data set, by default its name."""
    ours, floor = found["samples"], found["heldout"]
    # A long path would push what follows it out of a printed line
    dataset = dataset or shorten(found["dataset"], 45)
    where = f"one of the {found['num_rows']} images of {dataset}, {found['split']}"
    where += "" if found["trained_on"] else " (on which no record says that it was trained)"
    return (
        f"{ours['share_near']:.1%} of {ours['num_images']} samples lie within {found['near']:.1f} grey "
        f"levels (RMSE) of {where}, against {floor['share_near']:.1%} of {floor['num_images']} held-out "
        f"images; median distance {ours['median_distance']:.1f} against {floor['median_distance']:.1f}, "
        f"exact copies {ours['exact_copies']} against {floor['exact_copies']}"
    )


def _variances(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The sections of bits/dim, one for each variance that was scored."""
    return [report[key] for key in ("bits_per_dim", "other_variance") if key in report]


def _metrics(found: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Section "sample_metrics" without the spreads: label, value of the samples, value of real images."""
    return [
        (name, ours, found["floor"][name]) for name, ours in found["samples"].items() if " std " not in name
    ]


# A run's log


@dataclass(frozen=True)
class Log:
    """The lines of a run's log.

    Attributes:
        lines: the numbers of each line that is one, in the file's order.
        odd: the others by their number, counted from 1: half a line, which a killed run may leave, bytes that
            are no text, JSON of something else, or a number of a step that an earlier line has.
        cut: the number of a last line that has no end; None if there is none.
    """

    lines: list[dict[str, Any]]
    odd: dict[int, bytes]
    cut: int | None

    __repr__ = fields_line


def read_log(log: Path) -> Log:
    """Read a run's log; nothing is found in a file that is not there."""
    lines, odd, seen = [], {}, set()
    if log.exists():
        check_regular(log, LOG)
    data = log.read_bytes() if log.is_file() else b""
    whole = data.split(b"\n")
    for number, line in enumerate(whole, 1):
        numbers = _numbers_in(line)
        keys = set() if numbers is None else {(numbers["step"], key) for key in numbers if key != "step"}
        if numbers is not None and not keys & seen:
            seen |= keys
            lines.append(numbers)
        elif line or number < len(whole):
            odd[number] = line
    return Log(lines, odd, len(whole) if len(whole) in odd else None)


def _numbers_in(line: bytes) -> dict[str, Any] | None:
    """The numbers of a log's line by name, "step" among them; None if it is no such line."""
    try:
        found = json.loads(line.decode("utf-8"))
        step = found["step"]
        finite = all(type(value) in (int, float) and math.isfinite(value) for value in found.values())
    # Bytes that are no text or no JSON, JSON of something else, numbers that no float holds
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    return found if finite and type(step) is int and step >= 0 else None


def last_numbers(log: Path) -> dict[str, Any] | None:
    """The last value of each number of a run's log that a card tells; None if the log has none.

    Returns:
        step, images, and, where they were logged, seconds, loss, and heldout_bpd, heldout_stderr,
        heldout_images and heldout_step, of the last time that held-out images were scored.
    """
    found: dict[str, Any] = {}
    for numbers in read_log(log).lines:
        found |= {key: numbers[key] for key in LOGGED if key in numbers}
        if "heldout_bpd" in numbers:
            found["heldout_step"] = numbers["step"]
    return found if "images" in found else None


def training_words(numbers: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What `last_numbers` found, in words for a card: loss, minutes and heldout are texts, where known."""
    if numbers is None:
        return None
    words = dict(numbers)
    if "loss" in numbers:
        words["loss"] = f"{numbers['loss']:.4f}"
    if numbers.get("seconds", 0) > 90:
        words["minutes"] = f"{numbers['seconds'] / 60:,.0f}"
    if "heldout_bpd" in numbers:
        number = {"value": numbers["heldout_bpd"], "stderr": numbers.get("heldout_stderr")}
        words["heldout"] = with_error(number, 3)
    return words
