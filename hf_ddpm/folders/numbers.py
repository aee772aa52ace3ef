"""Numbers of a card: evaluation.json and a run's last log lines as tables, words and the Hub's metadata."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

TASK = "unconditional-image-generation"
METRICS = {  # first word of a label in evaluation.json: the Hub's name of the metric
    "FID": "fid",
    "KID": "kid",
    "IS": "inception_score",
    "FD": "frechet_distance",
    "KD": "kernel_distance",
    "CS": "classifier_score",
}


def _number(part: Mapping[str, Any], digits: int = 3) -> str:
    stderr = part["stderr"]
    return f"{part['value']:.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")


def bits_table(report: Mapping[str, Any]) -> dict[str, Any]:
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


def samples_table(report: Mapping[str, Any]) -> dict[str, Any] | None:
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


def hub_results(report: Mapping[str, Any], dataset_id: str | None) -> list[EvalResult]:
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


def heldout_words(training: Mapping[str, Any]) -> str | None:
    """Held-out bits/dim that training noted."""
    if "heldout_bpd" not in training:
        return None
    return _number({"value": training["heldout_bpd"], "stderr": training.get("heldout_stderr")})


def training_words(training: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The run's last numbers, fit to be read."""
    if training is None:
        return None
    loss = {"loss": f"{training['loss']:.4f}"} if "loss" in training else {}
    seconds = training.get("seconds", 0)
    time = {"minutes": f"{seconds / 60:,.0f}"} if seconds > 90 else {}
    return {**training, **loss, **time}


def describe(report: Mapping[str, Any]) -> str:
    """The report in a few lines for a terminal."""
    method, data = report["method"], report["data"]
    lines = []
    for numbers in (report["bits_per_dim"], report.get("other_variance")):
        if numbers is not None:
            rate, distortion = (numbers[key]["value"] for key in ("rate_bpd", "distortion_bpd"))
            lines.append(
                f"{_words(numbers['bpd'])} bits/dim ({numbers['variance_type']}): rate {rate:.4f} "
                f"+ distortion {distortion:.4f}"
            )
    fitted = "" if data["fit"] == "exact" else f", changed by fit {data['fit']}"
    lines.append(
        f"{data['num_images']} of {data['num_rows']} images of {data['dataset']}, {data['split']}{fitted}; "
        f"{method['evaluations_per_image']} network evaluations each ({method['name']})"
    )
    if "comparison" in report:
        found = report["comparison"]
        both = _words({"value": found["difference_bpd"], "stderr": found["stderr"]})
        lines.append(
            f"{both} bits/dim difference to {found['with']['name']} ({' - '.join(found['variance_types'])})"
        )
    if "sample_metrics" in report:
        found = report["sample_metrics"]
        for name, value in found["samples"].items():
            if " std " in name:
                continue
            lines.append(
                f"{name}: {value:.4g} of {found['num_samples']} samples, {found['floor'][name]:.4g} of "
                f"{found['num_floor']} real images"
            )
    if "memorisation" in report:
        lines.append(describe_memorisation(report["memorisation"]))
    return "\n".join(lines)


def describe_memorisation(found: Mapping[str, Any], dataset: str | None = None) -> str:
    """Section "memorisation" in a sentence; `dataset` is what to call the data set, by default its name."""
    ours, floor = found["samples"], found["heldout"]
    where = f"one of the {found['num_rows']} images of {dataset or found['dataset']}, {found['split']}"
    where += "" if found.get("trained_on", True) else " (on which no record says that it was trained)"
    return (
        f"{ours['share_near']:.1%} of {ours['num_images']} samples lie within {found['near']:.1f} grey "
        f"levels (RMSE) of {where}, against {floor['share_near']:.1%} of {floor['num_images']} held-out "
        f"images; median distance {ours['median_distance']:.1f} against {floor['median_distance']:.1f}, "
        f"exact copies {ours['exact_copies']} against {floor['exact_copies']}"
    )


def _words(value: Mapping[str, Any]) -> str:
    stderr = value["stderr"]
    return f"{value['value']:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")
