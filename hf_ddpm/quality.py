"""Sample quality of a model: its samples and real images in the eyes of a feature network.

Samples are drawn in parts that processes share and a killed run finds again. Beside every number stands its
floor: what other real images reach against the same reference.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from hf_ddpm.data import ImageStream
from hf_ddpm.generate import image_generators
from hf_ddpm.metrics import (
    Extractor,
    Features,
    load_extractor,
    load_reference,
    sample_metrics,
    save_reference,
)
from hf_ddpm.parts import Parts
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.progress import progress
from hf_ddpm.seeds import derive_seed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QualityConfig:
    """How sample quality is measured.

    Attributes:
        extractor: "inception", or a folder or Hub id of a vision model.
        num_samples: images drawn.
        sampling_steps: steps of drawing them, None for all T.
        num_reference: real images they are compared with; None for as many, or half of the split.
        reference: file of the reference's features, written or reused; None for none.
        seed: of the samples and of which real images are taken.
        batch_size: images at once in each process.
    """

    extractor: str
    num_samples: int
    sampling_steps: int | None
    num_reference: int | None
    reference: str | None
    seed: int
    batch_size: int


def choose_real(config: QualityConfig, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the reference and of the floor's images, disjoint, both ascending.

    Raises:
        ValueError: the split has too few images.
    """
    wanted = config.num_reference or min(config.num_samples, total // 2)
    if wanted < 2 or total - wanted < 2:
        raise ValueError(
            f"num_reference is {wanted}, but the split has {total} images; allowed: 2 to {total - 2}, as the "
            "floor needs others"
        )
    order = np.random.default_rng(derive_seed(4, config.seed)).permutation(total)
    floor = order[wanted : wanted + config.num_samples]
    if len(floor) != config.num_samples:
        logger.warning(
            "the floor has %d images, not %d: distances fall with the number of images, so the two compare "
            "only roughly",
            len(floor),
            config.num_samples,
        )
    return np.sort(order[:wanted]), np.sort(floor)


def evaluate_samples(
    config: QualityConfig,
    pipeline: DDPMPipeline,
    weights: str,
    stream: ImageStream,
    facts: dict[str, Any],
    out: Path,
) -> dict[str, Any]:
    """Draw samples and measure them.

    Args:
        config: how.
        pipeline: draws the samples, with its own scheduler.
        weights: hash of the network's weights, which parts on disk depend on.
        stream: real images, in the order of their source.
        facts: what these are, for the reference's file; `num_rows` among them.
        out: folder of the parts.

    Returns:
        The section "sample_metrics" of `evaluation.json`, on every process.

    Raises:
        ValueError: a bad extractor, a reference that doesn't fit, too few real images.
    """
    state = PartialState()
    extractor = load_extractor(config.extractor, state.device or "cpu")
    reference_rows, floor_rows = choose_real(config, facts["num_rows"])
    _, num_steps, _ = pipeline.check_inputs(num_inference_steps=config.sampling_steps)

    samples = _draw(config, pipeline, weights, num_steps, extractor, out)
    reference = _real(stream, reference_rows, extractor, config, facts)
    floor = _real(stream, floor_rows, extractor, config, None)
    scheduler: Any = pipeline.scheduler
    return {
        "extractor": extractor.name,
        "samples": sample_metrics(samples, reference, config.seed).labelled(),
        "floor": sample_metrics(floor, reference, config.seed).labelled(),
        "num_samples": len(samples),
        "num_reference": len(reference),
        "num_floor": len(floor),
        "sampling_steps": num_steps,
        "scheduler": type(scheduler).__name__,
        "variance_type": scheduler.config.get("variance_type"),
    }


def _draw(
    config: QualityConfig,
    pipeline: DDPMPipeline,
    weights: str,
    num_steps: int,
    extractor: Extractor,
    out: Path,
) -> Features:
    """Features of the samples; sample i depends on the seed and i alone, as in `hf-ddpm sample`."""
    state, scheduler = PartialState(), pipeline.scheduler
    settings = {
        "samples": [config.num_samples, num_steps, config.seed, config.batch_size],
        "model": [weights, type(scheduler).__name__, dict(scheduler.config)],  # type: ignore[union-attr]
        "extractor": extractor.name,
    }
    parts = Parts(out, settings)
    state.wait_for_everyone()
    chunks = [
        range(i, min(i + config.batch_size, config.num_samples))
        for i in range(0, config.num_samples, config.batch_size)
    ]
    mine = [
        i for i in range(len(chunks)) if i % state.num_processes == state.process_index and i not in parts
    ]
    pipeline.set_progress_bar_config(disable=True)
    with progress("sample", num_steps * len(mine), "step", state.is_main_process) as bar:

        def advance(*_: Any) -> None:
            bar.update()

        for i in mine:
            images: Any = pipeline(
                len(chunks[i]),
                image_generators(config.seed, chunks[i]),
                config.sampling_steps,
                output_type="pt",
                return_dict=False,
                callback_on_step_end=advance,
            )[0]
            parts.save(i, extractor((images * 255).round().to(torch.uint8)).tensors())
    state.wait_for_everyone()
    found = Features(extractor.name, **parts.load(len(chunks)))
    state.wait_for_everyone()
    return found


def _real(
    stream: ImageStream,
    rows: Sequence[int] | np.ndarray,
    extractor: Extractor,
    config: QualityConfig,
    facts: dict[str, Any] | None,
) -> Features:
    """Features of real images; with `facts`, those of the reference, from its file if there is one."""
    file = Path(config.reference) if config.reference and facts is not None else None
    if facts is not None:
        facts = facts | {
            "num_images": len(rows),
            "rows": hashlib.sha256(np.asarray(rows).tobytes()).hexdigest()[:16],
        }
        if file is not None and file.exists():
            return load_reference(file, extractor.name, facts)
    state = PartialState()
    images = stream.select([int(row) for row in rows])
    found = []
    with progress("features", len(rows), "image", state.is_main_process, leave=False) as bar:
        for start in range(0, len(rows), config.batch_size):
            batch: list[Tensor] = [next(images) for _ in rows[start : start + config.batch_size]]
            found.append(extractor(torch.stack(batch)))
            bar.update(len(batch))
    features = Features.cat(found)
    if file is not None and facts is not None and state.is_main_process:
        save_reference(file, features, facts)
    return features
