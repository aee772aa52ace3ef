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

from hf_ddpm.folders.layout import EVALUATION, EVALUATION_TENSORS
from hf_ddpm.likelihood import Bound, Estimate, mean_and_stderr

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
    """Write both files, each whole or not at all, the EVALUATION file last."""
    partial = folder / f".{EVALUATION}.tmp"
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        os.replace(partial, folder / EVALUATION_TENSORS)
        partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder / EVALUATION)
    except SafetensorError as error:  # a full disk, in safetensors' words
        raise OSError(f"can't write {str(folder / EVALUATION_TENSORS)!r}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def read_evaluation(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write_evaluation` wrote.

    Raises:
        ValueError: a file is missing or damaged.
    """
    try:
        report = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
        tensors = load_file(folder / EVALUATION_TENSORS)
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
