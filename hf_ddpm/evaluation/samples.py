"""Samples of a model to be measured, drawn once for all measurements, in parts that processes share.

Sample i depends on the seed and i alone, as in `hf-ddpm sample`. The file knows how samples come about, and
nothing of what they are compared with.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from hf_ddpm.evaluation.parts import Parts
from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.generation.samplers import whole_config
from hf_ddpm.metrics.extractors import Extractor
from hf_ddpm.runtime.progress import progress
from hf_ddpm.seeds import image_generators


class Drawing:
    """Samples that will be drawn: made, it has refused what can't be done; `run`, it does it.

    Args:
        pipeline: draws, with its own scheduler.
        num_samples: images drawn.
        sampling_steps: steps of drawing them, None for all T.
        seed: of their noise.
        batch_size: images at once in each process.

    Raises:
        ValueError: an impossible number of sampling steps.
    """

    def __init__(
        self,
        pipeline: DDPMPipeline,
        num_samples: int,
        sampling_steps: int | None,
        seed: int,
        batch_size: int,
    ):
        self._pipeline, self._num_samples, self._seed = pipeline, num_samples, seed
        self._sampling_steps, self._batch_size, self._state = sampling_steps, batch_size, PartialState()
        try:
            _, self._num_steps, _ = pipeline.check_inputs(num_inference_steps=sampling_steps)
        except ValueError as error:
            raise ValueError(str(error).replace("num_inference_steps", "sampling_steps")) from error

    @property
    def facts(self) -> dict[str, Any]:
        """How the samples are drawn, for the report."""
        scheduler: Any = self._pipeline.scheduler
        return {
            "sampling_steps": self._num_steps,
            "scheduler": type(scheduler).__name__,
            "variance_type": scheduler.config.get("variance_type"),
        }

    def run(self, weights: str, out: Path, extractor: Extractor | None, keep: bool) -> dict[str, Tensor]:
        """Draw the samples; on every process all of them.

        Args:
            weights: digest of the network's weights, which parts on disk depend on.
            out: folder of the parts.
            extractor: a feature network that looks at them, if any.
            keep: whether the images themselves are wanted.

        Returns:
            "images" (N, C, H, W), uint8, if they are wanted, and the tensors of `Features` if there is an
            extractor.
        """
        state, scheduler, size = self._state, self._pipeline.scheduler, self._batch_size
        settings = {
            "samples": [self._num_samples, self._num_steps, self._seed, size],
            "model": [weights, type(scheduler).__name__, whole_config(scheduler)],
            "extractor": None if extractor is None else extractor.name,
            "images": keep,
        }
        parts = Parts(out, settings)
        state.wait_for_everyone()
        chunks = [range(i, min(i + size, self._num_samples)) for i in range(0, self._num_samples, size)]
        mine = range(state.process_index, len(chunks), state.num_processes)
        mine = [i for i in mine if i not in parts]
        self._pipeline.set_progress_bar_config(disable=True)
        with progress("sample", self._num_steps * len(mine), "step", state.is_main_process) as bar:

            def advance(*_: Any) -> None:
                bar.update()

            for i in mine:
                drawn: Any = self._pipeline(
                    len(chunks[i]),
                    image_generators(self._seed, chunks[i]),
                    self._sampling_steps,
                    output_type="pt",
                    return_dict=False,
                    callback_on_step_end=advance,
                )[0]
                images = (drawn * 255).round().to(torch.uint8)
                found = {"images": images} if keep else {}
                parts.save(i, found | ({} if extractor is None else extractor(images).tensors()))
        state.wait_for_everyone()
        samples = parts.load(len(chunks))
        state.wait_for_everyone()
        return samples
