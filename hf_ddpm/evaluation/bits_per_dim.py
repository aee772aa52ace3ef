"""The bound of a data set's rows, in parts of one batch that processes share and a killed run finds again.

An image's numbers depend on the seed and its row alone, not on the batch or the number of processes.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_ddpm.data.pixels import to_float
from hf_ddpm.data.stream import ImageStream
from hf_ddpm.denoiser import Counted
from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.evaluation.parts import Parts
from hf_ddpm.evaluation.scored_model import Subject
from hf_ddpm.likelihood import (
    Bound,
    Estimate,
    decoder_evals,
    default_proposal,
    estimate_bound,
    evaluate_bound,
    image_noise,
    pilot_proposal,
)
from hf_ddpm.runtime.processes import process_state
from hf_ddpm.runtime.progress import progress

SHARED = ("proposal", "seed")  # of an Estimate, the same for all images
# What the bound of an image depends on, besides the model and the image, and how images are shared out.
SCORING = ("exact", "num_evals_per_image", "pilot_images", "clip_x0", "decoder", "seed", "batch_size")


def scoring_options(config: EvaluationConfig, subject: Subject) -> dict[str, Any]:
    """The options of `bound_term`."""
    return {
        "variance_type": subject.variance_type,
        "prediction_type": subject.prediction_type,
        "clip_x0": config.clip_x0,
        "decoder": config.decoder,
    }


def make_proposal(
    config: EvaluationConfig, subject: Subject, stream: ImageStream, rows: list[int]
) -> tuple[Tensor, int]:
    """The proposal of every part, the same on every process, and the evaluations that it cost."""
    process, denoiser = subject.process, Counted(subject.denoiser)
    if not config.pilot_images:
        return default_proposal(process), 0
    pilot = torch.stack(list(stream.select(rows[: config.pilot_images])))
    proposal = pilot_proposal(
        process,
        denoiser,
        to_float(pilot).to(subject.device),
        seed=config.seed,
        batch_size=config.batch_size,
        **scoring_options(config, subject),
    )
    return proposal, denoiser.count


def score(
    config: EvaluationConfig,
    subject: Subject,
    stream: ImageStream,
    rows: list[int],
    images: str,
    proposal: Tensor,
    out: Path,
) -> Bound | Estimate:
    """The bound of the rows, on every process.

    Args:
        config: how.
        subject: the model.
        stream: the images, in the order of their source.
        rows: which of them, ascending.
        images: their fingerprint, as parts on disk are of these images only.
        proposal: of `make_proposal`.
        out: folder of the parts.
    """
    state, process, options = process_state(), subject.process, scoring_options(config, subject)
    settings = {key: getattr(config, key) for key in SCORING} | options
    settings |= {"rows": rows, "images": images, "n_0": decoder_evals(config.num_evals_per_image)}
    settings |= {"weights": subject.weights_digest(), "process": subject.process_digest()}
    parts = Parts(out, settings)
    state.wait_for_everyone()

    chunks = [rows[i : i + config.batch_size] for i in range(0, len(rows), config.batch_size)]
    mine = range(state.process_index, len(chunks), state.num_processes)
    mine = [i for i in mine if i not in parts]
    per_row = len(process) if config.exact else config.num_evals_per_image
    pixels = stream.select([row for i in mine for row in chunks[i]])
    total = per_row * sum(len(chunks[i]) for i in mine)
    with progress("evaluate", total, "eval", state.is_main_process) as bar:
        denoiser = Counted(subject.denoiser, bar)
        for i in mine:
            x_0 = to_float(torch.stack([next(pixels) for _ in chunks[i]])).to(subject.device)
            if config.exact:
                noise = image_noise(config.seed, chunks[i], x_0)
                found = vars(evaluate_bound(process, denoiser, x_0, noise_fn=noise, **options))
            else:
                estimate = estimate_bound(
                    process,
                    denoiser,
                    x_0,
                    num_evals_per_image=config.num_evals_per_image,
                    seed=config.seed,
                    image_indices=chunks[i],
                    proposal=proposal,
                    batch_size=config.batch_size,
                    **options,
                )
                found = {key: value for key, value in vars(estimate).items() if key not in SHARED}
            parts.save(i, found)
    state.wait_for_everyone()
    tensors = parts.load(len(chunks))
    state.wait_for_everyone()
    return Bound(**tensors) if config.exact else Estimate(**tensors, proposal=proposal, seed=config.seed)
