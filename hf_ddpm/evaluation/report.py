"""What an evaluation leaves behind: `evaluation.json` for people, `evaluation.safetensors` for comparisons.

It knows results and files. It reads numbers from Bound and Estimate and computes none of them.
"""

import json
import math
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_ddpm.likelihood import Bound, Estimate, mean_and_stderr

JSON, TENSORS = "evaluation.json", "evaluation.safetensors"
PACKAGES = ("hf_ddpm", "torch", "diffusers", "transformers", "datasets", "torchmetrics", "numpy", "pillow")


def per_image(result: Bound | Estimate) -> dict[str, Tensor]:
    """Each image's bits/dim and its parts, (N,) float64."""
    if isinstance(result, Bound):
        total, rate, distortion = result.total_bpd, result.rate_bpd, result.distortion_bpd
    else:
        total, rate = result.per_image_bpd, result.per_image_rate_bpd
        distortion = result.per_image_distortion_bpd
    return {"bpd": total, "rate_bpd": rate, "distortion_bpd": distortion, "prior_bpd": result.prior_bpd}


def summary(result: Bound | Estimate, variance_type: str) -> dict[str, Any]:
    """Means over the images with standard errors, bits/dim; a single image has no error (null)."""
    numbers: dict[str, Any] = {"variance_type": variance_type}
    for name, values in per_image(result).items():
        mean, stderr = mean_and_stderr(values)
        numbers[name] = {"value": mean, "stderr": stderr if len(values) > 1 else None}
    return numbers


def describe(report: Mapping[str, Any]) -> str:
    """The report in a few lines for a terminal."""
    method, data = report["method"], report["data"]
    lines = []
    for numbers in (report["bits_per_dim"], report.get("other_variance")):
        if numbers is not None:
            rate, distortion = (numbers[key]["value"] for key in ("rate_bpd", "distortion_bpd"))
            lines.append(
                f"{_number(numbers['bpd'])} bits/dim ({numbers['variance_type']}): rate {rate:.4f} "
                f"+ distortion {distortion:.4f}"
            )
    fitted = "" if data["fit"] == "exact" else f", changed by fit {data['fit']}"
    lines.append(
        f"{data['num_images']} of {data['num_rows']} images of {data['dataset']}, {data['split']}{fitted}; "
        f"{method['evaluations_per_image']} network evaluations each ({method['name']})"
    )
    if "comparison" in report:
        found = report["comparison"]
        both = _number({"value": found["difference_bpd"], "stderr": found["stderr"]})
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


def _number(value: Mapping[str, Any]) -> str:
    stderr = value["stderr"]
    return f"{value['value']:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")


def versions() -> dict[str, str]:
    """Of Python and of the packages that a number may depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_evaluation(folder: Path, report: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files, each whole or not at all, the JSON file last."""
    partial = folder / f".{JSON}.tmp"
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        os.replace(partial, folder / TENSORS)
        partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder / JSON)
    except SafetensorError as error:  # a full disk, in safetensors' words
        raise OSError(f"can't write {str(folder / TENSORS)!r}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def read_evaluation(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write_evaluation` wrote.

    Raises:
        ValueError: a file is missing or damaged.
    """
    try:
        report = json.loads((folder / JSON).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
        lacks = {"bpd", "image_indices", "digests", "proposal"} - set(tensors)  # an older version's may
        lacks |= {"model", "method", "bits_per_dim"} - set(report)
        if lacks:
            raise ValueError(f"it has no {', '.join(sorted(lacks))}")
        return report, tensors
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{str(folder)!r} holds no evaluation that can be read: {reason}") from error


def check_comparable(
    method: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    other: tuple[Mapping[str, Any], Mapping[str, Tensor]],
    name: str,
) -> None:
    """Whether another evaluation scored the same images with the same draws.

    Args:
        method: section "method" of this evaluation's report.
        tensors: its `image_indices`, `digests` and `proposal`.
        other: the other evaluation, as `read_evaluation` gives it.
        name: the other's folder, for the message.

    Raises:
        ValueError: it did not; the message says what differs.
    """
    theirs = other[0]["method"]
    for key, value in method.items():
        if theirs.get(key) != value:
            raise ValueError(
                f"compare_with {name!r} was made with {key} {theirs.get(key)!r}, this one has {value!r}; "
                "allowed: equal"
            )
    for key, what in (
        ("image_indices", "images"),
        ("digests", "images"),
        ("proposal", "steps (process or pilot)"),
    ):
        if not torch.equal(tensors[key], other[1][key]):
            raise ValueError(f"compare_with {name!r} was made with other {what}; allowed: the same")


def paired(
    bpd: Tensor, variance_type: str, other: tuple[Mapping[str, Any], Mapping[str, Tensor]]
) -> dict[str, Any]:
    """The paired difference to another evaluation of the same images with the same draws.

    Args:
        bpd: this evaluation's bits/dim of each image, (N,).
        variance_type: what it was scored with.
        other: the other evaluation, as `read_evaluation` gives it.
    """
    report, tensors = other
    mean, stderr = mean_and_stderr(bpd - tensors["bpd"])
    unpaired = math.hypot(mean_and_stderr(bpd)[1], mean_and_stderr(tensors["bpd"])[1])
    known = len(bpd) > 1
    return {
        "with": report["model"],
        "variance_types": [variance_type, report["bits_per_dim"]["variance_type"]],
        "difference_bpd": mean,
        "stderr": stderr if known else None,
        "stderr_without_pairing": unpaired if known else None,
    }
