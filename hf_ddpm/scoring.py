"""The bound of a data set's rows, in parts of one batch that processes share and a killed run finds again.

An image's numbers depend on the seed and its row alone, not on the batch or the number of processes.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_ddpm.config import EvaluationConfig
from hf_ddpm.data import ImageStream
from hf_ddpm.generate import process_state
from hf_ddpm.likelihood import (
    Bound,
    Estimate,
    default_proposal,
    estimate_bound,
    evaluate_bound,
    image_noise,
    pilot_proposal,
)
from hf_ddpm.parts import Parts
from hf_ddpm.pixels import to_float
from hf_ddpm.progress import Counted, progress
from hf_ddpm.subject import Subject

# What the bound of an image depends on, besides the model and the data.
SCORING = (
    *(
        "exact",
        "num_evals_per_image",
        "pilot_images",
        "clip_x0",
        "decoder",
        "steps",
        "first_variance",
        "seed",
    ),
    *("dataset", "split", "num_images", "image_column", "fit", "batch_size"),
)


def score(
    config: EvaluationConfig, subject: Subject, stream: ImageStream, rows: list[int], total: int, out: Path
) -> tuple[Bound | Estimate, Tensor, Tensor, int]:
    """The rows' bound, the proposal, a digest of each image, and the number of network evaluations."""
    state, process = process_state(), subject.process
    options: dict[str, Any] = {
        "variance_type": subject.variance_type,
        "prediction_type": subject.prediction_type,
        "clip_x0": config.clip_x0,
        "decoder": config.decoder,
    }
    settings = {key: getattr(config, key) for key in SCORING}
    parts = Parts(out, settings | options | {"weights": subject.weights_digest(), "rows": total})
    state.wait_for_everyone()

    proposal, denoiser = default_proposal(process), Counted(subject.denoiser)
    if config.pilot_images:
        pilot = to_float(torch.stack(list(stream.select(rows[: config.pilot_images])))).to(state.device)
        proposal = pilot_proposal(process, denoiser, pilot, seed=config.seed, **options)

    chunks = [rows[i : i + config.batch_size] for i in range(0, len(rows), config.batch_size)]
    mine = [
        i for i in range(len(chunks)) if i % state.num_processes == state.process_index and i not in parts
    ]
    per_row = len(process) if config.exact else config.num_evals_per_image
    images = stream.select([row for i in mine for row in chunks[i]])
    evaluations = denoiser.count + per_row * len(rows)
    total = per_row * sum(len(chunks[i]) for i in mine)
    with progress("evaluate", total, "eval", state.is_main_process) as denoiser.bar:
        for i in mine:
            pixels = torch.stack([next(images) for _ in chunks[i]])
            x_0 = to_float(pixels).to(state.device)
            found: Bound | Estimate
            if config.exact:
                noise = image_noise(config.seed, chunks[i], x_0)
                found = evaluate_bound(process, denoiser, x_0, noise_fn=noise, **options)
            else:
                found = estimate_bound(
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
            tensors = {key: value for key, value in vars(found).items() if key not in ("proposal", "seed")}
            parts.save(i, tensors | {"digests": torch.tensor([_digest(image) for image in pixels])})
    state.wait_for_everyone()
    tensors = parts.load(len(chunks))
    state.wait_for_everyone()
    digests = tensors.pop("digests")
    result = Bound(**tensors) if config.exact else Estimate(**tensors, proposal=proposal, seed=config.seed)
    return result, proposal, digests, evaluations


def _digest(image: Tensor) -> int:
    """Of an image's pixels, as a signed 64-bit number."""
    return int.from_bytes(
        hashlib.blake2b(image.numpy().tobytes(), digest_size=8).digest(), "big", signed=True
    )
