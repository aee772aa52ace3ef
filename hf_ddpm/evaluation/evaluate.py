"""A model and a data set → `evaluation.json`: bits/dim with a standard error, what it is made of, and plots.

The images are scored in parts of one batch each, that processes share and that a killed run finds again; an
image's numbers depend on the seed and its row alone. The numbers themselves are likelihood.py's.
"""

import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_ddpm.data.pixels import to_float
from hf_ddpm.data.stream import ImageStream
from hf_ddpm.evaluation.bits_per_dim import make_proposal, score, scoring_options
from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.evaluation.images import digest_rows, fingerprint, open_images
from hf_ddpm.evaluation.memorisation import Memorisation
from hf_ddpm.evaluation.parts import Parts
from hf_ddpm.evaluation.plots import plot_bits_per_step, plot_rate_distortion, plot_reconstruction_levels
from hf_ddpm.evaluation.quality import QualityConfig, SampleQuality
from hf_ddpm.evaluation.report import (
    check_comparable,
    paired,
    per_image,
    read_evaluation,
    summary,
    versions,
    write_evaluation,
)
from hf_ddpm.evaluation.samples import Drawing
from hf_ddpm.evaluation.scored_model import Subject, load_subject
from hf_ddpm.folders.layout import EVALUATION, NEAREST
from hf_ddpm.likelihood import decoder_evals, rate_distortion, with_variance
from hf_ddpm.likelihood.bound import bound_term
from hf_ddpm.runtime.disk import why_not_writable
from hf_ddpm.runtime.processes import process_state
from hf_ddpm.seeds import Use, derive_seed
from hf_ddpm.variances import FIXED

PREVIEWS = 6  # images in the picture of reconstructions


def evaluate(config: EvaluationConfig, command: str = "") -> dict[str, Any]:
    """Score a model, and leave `evaluation.json`, `evaluation.safetensors` and plots in a folder.

    Args:
        config: what to do.
        command: the command line, for the record.

    Returns:
        The content of `evaluation.json`, on every process.

    Raises:
        ValueError: bad input: model, data set, folder, or an extractor; nothing has been written then. Only
            an image of `nearest_dataset` that can't be read shows when it is looked at.
        RuntimeError: the bound is not finite.
    """
    # What is scored, on what, how, and whether the results have a place: all looked at before work begins
    started, state = time.perf_counter(), process_state()
    out = _folder(config)
    other = None if config.compare_with is None else read_evaluation(Path(config.compare_with).expanduser())
    subject = load_subject(
        config.model,
        state.device or torch.device("cpu"),
        config.variance_type,
        config.steps,
        config.first_variance,  # type: ignore[arg-type]
    )
    stream = open_images(subject, config.dataset, config.split, config.image_column, config.fit)
    total = stream.num_rows()
    rows = _choose(total, config.num_images, config.seed)
    digests = digest_rows(stream, rows)
    _score_one(config, subject, stream, rows[0])
    proposal, pilot_evaluations = make_proposal(config, subject, stream, rows)
    tensors = {"image_indices": torch.tensor(rows), "digests": digests, "proposal": proposal}
    method = _method(config, subject)
    if other is not None:
        check_comparable(method, tensors, other, str(config.compare_with))
    source = {
        "dataset": config.dataset,
        "split": config.split,
        "fit": config.fit,
        "shape": list(stream.shape),
    }
    drawing = quality = memory = None
    if config.extractor is not None or config.nearest_dataset is not None:
        drawing = Drawing(
            subject.pipeline, config.num_samples, config.sampling_steps, config.seed, config.batch_size
        )
    if config.extractor is not None:
        how = QualityConfig(
            config.extractor,
            config.num_samples,
            config.num_reference,
            config.reference,
            config.seed,
            config.batch_size,
        )
        quality = SampleQuality(how, stream, total, source)
    if config.nearest_dataset is not None:
        memory = Memorisation(
            config.nearest_dataset,
            config.nearest_split,
            config.image_column,
            config.fit,
            stream,
            (config.dataset, config.split),
            config.num_samples,
            config.seed,
        )
    state.wait_for_everyone()

    # The bound, image by image
    images, weights = fingerprint(digests), subject.weights_digest()
    result = score(config, subject, stream, rows, images, proposal, out)
    numbers = per_image(result)
    if bad := int((~numbers["bpd"].isfinite()).sum()):
        raise RuntimeError(f"the bound is not finite for {bad} of {len(rows)} images")
    evaluations = pilot_evaluations + len(rows) * method["evaluations_per_image"]
    report: dict[str, Any] = {"bits_per_dim": summary(result, subject.variance_type)}
    if subject.variance_type in FIXED:
        swapped = next(name for name in FIXED if name != subject.variance_type)
        report["other_variance"] = summary(with_variance(result, subject.process, swapped), swapped)  # type: ignore
    report["method"] = method | {"evaluations": evaluations}
    report["data"] = source | {
        "num_images": len(rows),
        "num_rows": total,
        "fingerprint": images,
        "trained_on": subject.trained_on(config.dataset, config.split),
    }
    report["model"] = {
        "name": config.model,
        "weights": weights,
        "process": subject.process_digest(),
        "prediction_type": subject.prediction_type,
    }
    if other is not None:
        report["comparison"] = paired(numbers["bpd"], subject.variance_type, other)

    # The samples
    if drawing is not None:
        extractor = None if quality is None else quality.extractor
        samples = drawing.run(weights, out, extractor, keep=memory is not None)
        images = samples.pop("images", torch.empty(0))
        if quality is not None:
            report["sample_metrics"] = quality.run(samples) | drawing.facts
        if memory is not None:
            found, nearest = memory.run(images, out)
            trained_on = subject.trained_on(found["dataset"], found["split"])
            report["memorisation"] = found | drawing.facts | {"trained_on": trained_on}
            tensors |= nearest

    # The files
    report |= {
        "seconds": round(time.perf_counter() - started, 1),
        "processes": state.num_processes,
        "device": str(state.device),
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
    }
    if state.is_main_process:
        curve = rate_distortion(result)
        plot_bits_per_step(curve, out / "bits-per-step.png")
        plot_rate_distortion(curve, out / "rate-distortion.png")
        plot_reconstruction_levels(subject, stream, rows[:PREVIEWS], config, out / "reconstructions.png")
        if memory is None:  # an older evaluation's picture
            (out / NEAREST).unlink(missing_ok=True)
        write_evaluation(out, report, tensors | numbers)
        Parts.clear(out)
    state.wait_for_everyone()
    return report


def _folder(config: EvaluationConfig) -> Path:
    """Where the results go: not made yet, and without an evaluation that nobody said to replace."""
    if config.out is None and not Path(config.model).expanduser().is_dir():
        raise ValueError(
            f"out is not given, and {config.model!r} is no folder for the results; allowed: a folder as out"
        )
    out = Path(config.out if config.out is not None else config.model).expanduser()
    if reason := why_not_writable(out):
        raise ValueError(f"out {str(out)!r} can't be written: {reason}")
    if (out / EVALUATION).exists() and not config.overwrite:
        raise ValueError(
            f"out {str(out)!r} holds an evaluation already; allowed: another folder, or overwrite"
        )
    return out


def _method(config: EvaluationConfig, subject: Subject) -> dict[str, Any]:
    """How an image's bits/dim come about: what a comparison needs to be equal, besides the images."""
    steps, evals = len(subject.process), config.num_evals_per_image
    return {
        "name": "every step once" if config.exact else "stratified estimate",
        "evaluations_per_image": steps if config.exact else evals,
        "evaluations_of_l_0": 1 if config.exact else decoder_evals(evals),
        "steps": steps,
        "first_variance": config.first_variance if config.steps else None,
        "clip_x0": config.clip_x0,
        "decoder": config.decoder,
        "pilot_images": config.pilot_images,
        "seed": config.seed,
    }


@torch.no_grad()
def _score_one(config: EvaluationConfig, subject: Subject, stream: ImageStream, row: int) -> None:
    """Score one image at one step, to be told now what a network's answer doesn't fit."""
    x_0 = to_float(torch.stack(list(stream.select([row])))).to(subject.device)
    options = scoring_options(config, subject)
    bound_term(subject.process, subject.denoiser, x_0, 0, torch.zeros_like(x_0), **options)


def _choose(total: int, num_images: int | None, seed: int) -> list[int]:
    """Rows to score, ascending: all, or a random subset, as a data set may be sorted by class."""
    if num_images is None or num_images == total:
        return list(range(total))
    if num_images > total:
        raise ValueError(f"num_images is {num_images}, but the split has {total}; allowed: 1 to {total}")
    order = np.random.default_rng(derive_seed(Use.SCORED_ROWS, seed)).permutation(total)
    return sorted(order[:num_images].tolist())
