"""Sample quality of a model: its samples and real images in the eyes of a feature network.

Samples are drawn in parts that processes share and a killed run finds again. Beside every number stands its
floor: what other real images reach against the same reference.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from hf_ddpm.data import ImageStream
from hf_ddpm.generate import image_generators
from hf_ddpm.metrics import (
    Features,
    load_extractor,
    load_reference,
    sample_metrics,
    save_reference,
)
from hf_ddpm.parts import Parts, why_not_writable
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.progress import progress
from hf_ddpm.samplers import whole_config
from hf_ddpm.seeds import derive_seed
from hf_ddpm.subject import digest_rows, fingerprint

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
            f"num_reference is {wanted}, but the split has {total} images; allowed: 2 to {total - 2}, as "
            "the floor needs others"
        )
    order = np.random.default_rng(derive_seed(4, config.seed)).permutation(total)
    floor = order[wanted : wanted + config.num_samples]
    if len(floor) != config.num_samples and PartialState().is_main_process:
        logger.warning(
            "the floor has %d images, not %d: distances fall with the number of images, so the two "
            "compare only roughly",
            len(floor),
            config.num_samples,
        )
    return np.sort(order[:wanted]), np.sort(floor)


class SampleQuality:
    """A measurement of samples: made, it has refused what can't be done; `run`, it does it.

    Args:
        config: how.
        pipeline: draws the samples, with its own scheduler.
        stream: real images, in the order of their source.
        num_rows: how many they are.
        facts: where they come from, for the reference's file.

    Raises:
        ValueError: a bad extractor, one that doesn't take such images, too few real images, an impossible
            number of sampling steps, or a reference file of something else.
    """

    def __init__(
        self,
        config: QualityConfig,
        pipeline: DDPMPipeline,
        stream: ImageStream,
        num_rows: int,
        facts: dict[str, Any],
    ):
        self._config, self._pipeline, self._stream, self._state = config, pipeline, stream, PartialState()
        self._reference_rows, self._floor_rows = choose_real(config, num_rows)
        try:
            _, self._num_steps, _ = pipeline.check_inputs(num_inference_steps=config.sampling_steps)
        except ValueError as error:
            raise ValueError(str(error).replace("num_inference_steps", "sampling_steps")) from error
        self._extractor = load_extractor(config.extractor, self._state.device or "cpu")
        self._extractor(next(stream.select(self._floor_rows[:1])).unsqueeze(0))  # images that don't fit show
        self._file = None if config.reference is None else Path(config.reference).expanduser()
        self._facts, self._reference = facts, None
        if self._file is not None:
            chosen = fingerprint(digest_rows(stream, self._reference_rows))
            self._facts = facts | {"num_images": len(self._reference_rows), "images": chosen}
            if self._file.exists():
                self._reference = load_reference(self._file, self._extractor.name, self._facts)
            elif reason := why_not_writable(self._file.parent):
                raise ValueError(f"reference {str(self._file)!r} can't be written: {reason}")

    def run(self, weights: str, out: Path) -> dict[str, Any]:
        """Draw the samples and measure them: section "sample_metrics" of the report, on every process.

        Args:
            weights: digest of the network's weights, which parts on disk depend on.
            out: folder of the parts.
        """
        samples, seed = self._draw(weights, out), self._config.seed
        reference = self._reference or self._real(self._reference_rows)
        if self._file is not None and self._reference is None and self._state.is_main_process:
            save_reference(self._file, reference, self._facts)
        floor = self._real(self._floor_rows)
        scheduler: Any = self._pipeline.scheduler
        return {
            "extractor": self._extractor.name,
            "samples": sample_metrics(samples, reference, seed).labelled(),
            "floor": sample_metrics(floor, reference, seed).labelled(),
            "num_samples": len(samples),
            "num_reference": len(reference),
            "num_floor": len(floor),
            "sampling_steps": self._num_steps,
            "scheduler": type(scheduler).__name__,
            "variance_type": scheduler.config.get("variance_type"),
        }

    def _draw(self, weights: str, out: Path) -> Features:
        """Features of the samples; sample i depends on the seed and i alone, as in `hf-ddpm sample`."""
        config, state, scheduler = self._config, self._state, self._pipeline.scheduler
        settings = {
            "samples": [config.num_samples, self._num_steps, config.seed, config.batch_size],
            "model": [weights, type(scheduler).__name__, whole_config(scheduler)],
            "extractor": self._extractor.name,
        }
        parts = Parts(out, settings)
        state.wait_for_everyone()
        starts = range(0, config.num_samples, config.batch_size)
        chunks = [range(i, min(i + config.batch_size, config.num_samples)) for i in starts]
        mine = range(state.process_index, len(chunks), state.num_processes)
        mine = [i for i in mine if i not in parts]
        self._pipeline.set_progress_bar_config(disable=True)
        with progress("sample", self._num_steps * len(mine), "step", state.is_main_process) as bar:

            def advance(*_: Any) -> None:
                bar.update()

            for i in mine:
                images: Any = self._pipeline(
                    len(chunks[i]),
                    image_generators(config.seed, chunks[i]),
                    config.sampling_steps,
                    output_type="pt",
                    return_dict=False,
                    callback_on_step_end=advance,
                )[0]
                parts.save(i, self._extractor((images * 255).round().to(torch.uint8)).tensors())
        state.wait_for_everyone()
        found = Features(self._extractor.name, **parts.load(len(chunks)))
        state.wait_for_everyone()
        return found

    def _real(self, rows: np.ndarray) -> Features:
        """Features of real images."""
        images, size = self._stream.select(rows), self._config.batch_size
        found = []
        with progress("features", len(rows), "image", self._state.is_main_process, leave=False) as bar:
            for start in range(0, len(rows), size):
                batch = torch.stack([next(images) for _ in rows[start : start + size]])
                found.append(self._extractor(batch))
                bar.update(len(batch))
        return Features.cat(found)
