"""What an evaluation leaves behind: `evaluation.json` for people, `evaluation.safetensors` for comparisons.

The keys of both files are known here, where they are made and compared, and in `folders/numbers.py`, which
makes words and tables of them. No number is computed here but means, errors and shares.
"""

import hashlib
import json
import math
import platform
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_ddpm.evaluation.classes import classes_section
from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.evaluation.images import describe_source, fingerprint
from hf_ddpm.evaluation.memorisation import QUANTILE, NearestFound
from hf_ddpm.evaluation.plan import Evaluation, Plan, Results
from hf_ddpm.evaluation.quality import QualityFound
from hf_ddpm.evaluation.samples import Drawing
from hf_ddpm.folders.layout import EVALUATION, EVALUATION_TENSORS
from hf_ddpm.folders.numbers import check_report
from hf_ddpm.likelihood import Bound, Estimate, decoder_evals, mean_and_stderr
from hf_ddpm.runtime.disk import load_tensors, save_tensors, whole_file
from hf_ddpm.runtime.messages import one_line
from hf_ddpm.runtime.processes import process_state
from hf_ddpm.runtime.untrusted import parse_json, read_bytes, tensor_headers

# The tensors that a comparison looks at: (N,), and (T,) for the last; with their dtypes in safetensors' words
COMPARED = {"bpd": "F64", "image_indices": "I64", "digests": "I64", "proposal": "F64"}
EVERY_STEP = "every step once"  # how an exact evaluation is called
CHAIN_KEYS = (
    "steps",
    "chain",
    "first_variance",
    "decoder",
)  # of the section "method"; two may differ in them
PACKAGES = ("hf_ddpm", "torch", "diffusers", "transformers", "datasets", "torchmetrics", "numpy", "pillow")


# What is written


def build_evaluation(plan: Plan, results: Results, command: str) -> Evaluation:
    """The report and the tensors of a finished evaluation.

    Args:
        plan: what was asked for.
        results: what was found.
        command: the command line, for the record.
    """
    model, config = plan.model, plan.config
    tensors = _images(plan.numbers, plan.digests, plan.proposal) | _per_image(results.bound)
    report = {"bits_per_dim": _bits_per_dim(results.bound, model.variance_type)}
    if results.other_bound is not None and model.other_variance is not None:
        report["other_variance"] = _bits_per_dim(results.other_bound, model.other_variance)
    method = _method(config, len(model.process))
    scored = len(plan.rows) * method["evaluations_per_image"]
    report["method"] = method | {"evaluations": plan.pilot_evaluations + scored}
    report["data"] = describe_source(config, plan.stream) | {
        "num_images": len(plan.rows),
        "num_rows": plan.stream.num_rows(),
        "fingerprint": fingerprint(plan.digests),
        "trained_on": plan.images.seen != 0,
        "num_trained_on": plan.images.seen,
        "num_skipped": plan.images.skipped,
        "changed": None if plan.images.trained is None else plan.images.trained.changed,
    }
    if plan.given is not None:
        dims = math.prod(plan.stream.shape)
        column = config.label_column
        report["classes"] = classes_section(plan.given, tensors["bpd"], results.classified, column, dims)
        tensors["labels"] = plan.given.labels if plan.given.own is None else plan.given.own
    if results.classified is not None:
        tensors["log_probabilities"] = results.classified.log_probabilities
    report["model"] = {
        "name": config.model,
        "weights": model.weights_digest,
        "process": model.process_digest,
        "prediction_type": model.prediction_type,
    }
    last_step = int(model.process.timesteps[0])
    if config.chain != "even" or model.errors is not None or last_step > 0:
        report["few_steps"] = {
            "timesteps": model.process.timesteps.tolist(),
            "last_step": last_step,
            "errors": None if model.errors is None else vars(model.errors.of),
        }
    if plan.other is not None:
        report["comparison"] = paired(Evaluation(report, tensors), plan.other)
    if results.quality is not None and plan.drawing is not None:
        report["sample_metrics"] = sample_metrics_section(results.quality, plan.drawing)
    if results.nearest is not None and plan.drawing is not None:
        report["memorisation"] = _memorisation(plan, results.nearest) | _drawing(plan.drawing)
        trained_on = plan.memorisation is not None and plan.memorisation.trained_on
        report["memorisation"]["trained_on"] = trained_on
        tensors |= _nearest(results.nearest)
    return Evaluation(report | _run_facts(plan.started, command), tensors)


def _images(rows: list[int], digests: Tensor, proposal: Tensor) -> dict[str, Tensor]:
    """Which images are scored, and with which proposal."""
    return {"image_indices": torch.tensor(rows), "digests": digests, "proposal": proposal}


def _per_image(bound: Bound | Estimate) -> dict[str, Tensor]:
    """Each image's bits/dim and its parts, (N,), float64."""
    if isinstance(bound, Bound):
        total, rate, distortion = bound.total_bpd, bound.rate_bpd, bound.distortion_bpd
    else:
        total, rate = bound.per_image_bpd, bound.per_image_rate_bpd
        distortion = bound.per_image_distortion_bpd
    return {"bpd": total, "rate_bpd": rate, "distortion_bpd": distortion, "prior_bpd": bound.prior_bpd}


def _bits_per_dim(bound: Bound | Estimate, variance_type: str) -> dict[str, Any]:
    """Means over the images with standard errors, bits/dim; a single image has no error (null)."""
    numbers: dict[str, Any] = {"variance_type": variance_type}
    for name, values in _per_image(bound).items():
        mean, stderr = mean_and_stderr(values)
        numbers[name] = {"value": mean, "stderr": stderr if len(values) > 1 else None}
    return numbers


def _method(config: EvaluationConfig, steps: int) -> dict[str, Any]:
    """How an image's bits/dim come about: what a comparison needs to be equal, besides the images."""
    evals = config.num_evals_per_image
    return {
        "name": EVERY_STEP if config.exact else "stratified estimate",
        "evaluations_per_image": steps if config.exact else evals,
        "evaluations_of_l_0": 1 if config.exact else decoder_evals(evals),
        "steps": steps,
        "first_variance": config.first_variance if config.steps else None,
        "clip_x0": config.clip_x0,
        "decoder": config.decoder,
        "pilot_images": config.pilot_images,
        "seed": config.seed,
        # Evaluations of earlier versions do not say it, as all chains were even
        **({} if config.chain == "even" else {"chain": config.chain}),
    }


def sample_metrics_section(quality: QualityFound, drawing: Drawing) -> dict[str, Any]:
    """Section "sample_metrics": the samples' numbers beside their floor, and how the samples were drawn."""
    return {
        "extractor": quality.samples.extractor,
        "samples": quality.samples.labelled(),
        "floor": quality.floor.labelled(),
        "num_samples": quality.samples.num_samples,
        "num_reference": quality.samples.num_reference,
        "num_floor": quality.floor.num_samples,
    } | _drawing(drawing)


def _drawing(drawing: Drawing) -> dict[str, Any]:
    """How the samples were drawn."""
    return {
        "sampling_steps": drawing.num_steps,
        "timestep_spacing": drawing.scheduler.config.get("timestep_spacing"),
        "scheduler": type(drawing.scheduler).__name__,
        "variance_type": drawing.scheduler.config.get("variance_type"),
    }


def _memorisation(plan: Plan, found: NearestFound) -> dict[str, Any]:
    """How near the samples are to training images, beside how near held-out images are."""
    return {
        "dataset": plan.config.nearest_dataset,
        "split": plan.config.nearest_split,
        "num_rows": found.num_training,
        "fingerprint": found.training_fingerprint,
        "quantile": QUANTILE,
        "near": found.near,
        "samples": _distances(found.distances, found.near),
        "heldout": _distances(found.heldout_distances, found.near),
    }


def _distances(distances: Tensor, near: float) -> dict[str, Any]:
    """What is said of some images' distances."""
    return {
        "num_images": len(distances),
        "share_near": float((distances <= near).double().mean()),
        "median_distance": float(distances.quantile(0.5)),
        "exact_copies": int((distances == 0).sum()),
    }


def _nearest(found: NearestFound) -> dict[str, Tensor]:
    """Each sample's and each held-out image's nearest training image."""
    return {
        "nearest_rows": found.rows,
        "nearest_distances": found.distances,
        "heldout_rows": found.heldout_rows,
        "heldout_nearest_rows": found.heldout_nearest_rows,
        "heldout_nearest_distances": found.heldout_distances,
    }


def _run_facts(started: float, command: str) -> dict[str, Any]:
    """When, where and by what the evaluation was made."""
    state = process_state()
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "processes": state.num_processes,
        "device": str(state.device),
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a number may depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


# The two files


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write both files, each whole or not at all, evaluation.json last, whose sum the other one holds."""
    text = json.dumps(evaluation.report, indent=2) + "\n"
    save_tensors(folder / EVALUATION_TENSORS, evaluation.tensors, {EVALUATION: _sum(text.encode())})
    with whole_file(folder / EVALUATION) as file:
        file.write_text(text, encoding="utf-8")


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_evaluation(folder: Path) -> Evaluation:
    """What `write_evaluation` wrote.

    Raises:
        ValueError: a file is missing, damaged, or lacks what a comparison looks at.
    """
    try:
        data = read_bytes(folder / EVALUATION)
        check_report(report := parse_json(data, EVALUATION))
        headers = tensor_headers(folder / EVALUATION_TENSORS)
        if lacks := sorted(COMPARED.keys() - headers.keys()):
            raise ValueError(f"it has no {', '.join(lacks)}")
        for name, dtype in COMPARED.items():
            if headers[name] != (dtype, (math.prod(headers[name][1]),)):
                raise ValueError(f"{name} is of {headers[name][0]} {headers[name][1]}; allowed: {dtype} (N,)")
        if len({headers[name][1] for name in COMPARED if name != "proposal"}) != 1:
            raise ValueError("its bpd, image_indices and digests are of several lengths")
        tensors, sums = load_tensors(folder / EVALUATION_TENSORS, need_sum=False)
        if not tensors["bpd"].isfinite().all():
            raise ValueError("its bpd holds NaN or infinite numbers")
        if sums.get(EVALUATION, _sum(data)) != _sum(data):
            raise ValueError(f"{EVALUATION} is not the one that {EVALUATION_TENSORS} was written with")
        return Evaluation(report, tensors)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{str(folder)!r} holds no evaluation that can be read: {one_line(error)}"
        ) from error


# The comparison of two


def foresee(
    config: EvaluationConfig, steps: int, rows: list[int], digests: Tensor, proposal: Tensor
) -> Evaluation:
    """What is known of an evaluation before it is made: all that `check_comparable` looks at.

    Args:
        config: what was asked for.
        steps: of the chain.
        rows: of the images that will be scored.
        digests: of their pixels, (N,), int64.
        proposal: of the estimate's steps, (T,), float64.
    """
    return Evaluation({"method": _method(config, steps)}, _images(rows, digests, proposal))


def check_comparable(ours: Evaluation, theirs: Evaluation, name: str) -> None:
    """Refuse another evaluation that did not score the same images with the same draws.

    Chains and decoders may differ, as they are what is compared; of chains with other steps the draws are
    others for the same images.

    Args:
        ours: this evaluation, or what `foresee` knows of it.
        theirs: the other one.
        name: the other's folder, for the message.

    Raises:
        ValueError: it differs; the message says in what.
    """
    own, method = ours.report["method"], theirs.report["method"]
    free = set(CHAIN_KEYS)
    if own["name"] == method["name"] == EVERY_STEP:
        free |= {"evaluations_per_image"}
    for key, value in own.items():
        if key not in free and method.get(key) != value:
            raise ValueError(
                f"compare_with {name!r} was made with {key} {method.get(key)!r}, this one has {value!r}; "
                "allowed: equal"
            )
    what = {"image_indices": "images", "digests": "images"}
    if own["steps"] == method["steps"] and {own.get("chain"), method.get("chain")} == {None}:
        what["proposal"] = "steps (process or pilot)"
    for key, words in what.items():
        if not torch.equal(ours.tensors[key], theirs.tensors[key]):
            raise ValueError(f"compare_with {name!r} was made with other {words}; allowed: the same")


def paired(ours: Evaluation, theirs: Evaluation) -> dict[str, Any]:
    """The paired difference of two evaluations of the same images with the same draws, in bits/dim."""
    bpd, their_bpd = ours.tensors["bpd"], theirs.tensors["bpd"]
    mean, stderr = mean_and_stderr(bpd - their_bpd)
    unpaired = math.hypot(mean_and_stderr(bpd)[1], mean_and_stderr(their_bpd)[1])
    known = len(bpd) > 1
    return {
        "with": theirs.report["model"],
        "variance_types": [one.report["bits_per_dim"]["variance_type"] for one in (ours, theirs)],
        "chains": [_chain_name(one.report["method"]) for one in (ours, theirs)],
        "difference_bpd": mean,
        "stderr": stderr if known else None,
        "stderr_without_pairing": unpaired if known else None,
    }


def _chain_name(method: Mapping[str, Any]) -> str:
    """A chain and its decoder in a few words, as "50 steps (chosen), decoder levels"."""
    steps, chain, decoder = method["steps"], method.get("chain", "even"), method["decoder"]
    return f"{steps} steps ({chain}), decoder {decoder}"
