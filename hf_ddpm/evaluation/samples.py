"""Samples of a model to be measured, drawn once for all measurements, in parts that processes share.

Sample i depends on the seed and i alone, as in `hf-ddpm sample`. This file knows how samples come about, and
nothing of what they are compared with.
"""

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.evaluation.parts import Parts, pieces
from hf_ddpm.folders.errors import errors_digest
from hf_ddpm.generation.pipeline import Callback, DDPMPipeline, count_images
from hf_ddpm.generation.samplers import respace, whole_config
from hf_ddpm.metrics import Extractor
from hf_ddpm.runtime.processes import process_state
from hf_ddpm.runtime.progress import progress
from hf_ddpm.seeds import image_generators


class Drawing:
    """A drawing of samples. Its inputs are checked when it is constructed; `run` draws.

    Args:
        pipeline: the model, which draws with its own scheduler; its steps are spaced as the config says.
        config: how many samples, in how many steps, with which seed, how many at once in each process.

    Raises:
        ValueError: an impossible number of sampling steps, or a spacing of them that the sampler can't do.

    Attributes:
        scheduler: what draws.
        num_steps: steps of drawing a sample.
        num_calls: network evaluations of drawing a sample, which are more than the steps for some samplers.
        batches: the samples' numbers, in the parts in which they are drawn.
    """

    def __init__(self, pipeline: DDPMPipeline, config: EvaluationConfig):
        self._pipeline, self._config = pipeline, config
        try:
            if config.sampling_spacing is not None:
                respace(pipeline, config.sampling_spacing)
            self.scheduler: Any = pipeline.scheduler
            _, self.num_steps, self.num_calls = pipeline.check_inputs(
                num_inference_steps=config.sampling_steps
            )
        except ValueError as error:
            words = str(error).replace("num_inference_steps", "sampling_steps")
            raise ValueError(words.replace("timestep_spacing", "sampling_spacing")) from error
        self.batches = pieces(config.num_samples, config.batch_size)

    def parts(self, weights: str, out: Path, extractor: Extractor | None, keep: bool = False) -> Parts:
        """Where the samples are kept until the end; arguments as in `run`."""
        facts: dict[str, Any] = {
            "what": "samples",
            "steps": self.num_steps,
            "model": [weights, type(self.scheduler).__name__, whole_config(self.scheduler)],
            "extractor": None if extractor is None else extractor.name,
            "images": keep,
        }
        if getattr(self.scheduler, "errors", None) is not None:
            facts["errors"] = errors_digest(self.scheduler.errors)
        return Parts(out, self._config, facts)

    def draw(self, number: int, callback: Callback) -> Tensor:
        """Draw a batch; the callback is called after each step. Returns uint8, (B, C, H, W)."""
        drawn: Any = self._pipeline(
            len(self.batches[number]),
            image_generators(self._config.seed, self.batches[number]),
            self._config.sampling_steps,
            output_type="pt",
            return_dict=False,
            callback_on_step_end=callback,
        )[0]
        return (drawn * 255).round().to(torch.uint8)

    def run(self, weights: str, out: Path, extractor: Extractor | None, keep: bool) -> dict[str, Tensor]:
        """Draw the samples; every process gets all of them.

        Args:
            weights: digest of the network's weights, which parts on disk depend on.
            out: folder of the parts.
            extractor: a feature network that looks at them, if any.
            keep: whether the images themselves are wanted.

        Returns:
            "images" (N, C, H, W), uint8, if they are wanted, and the tensors of `Features` if there is an
            extractor.
        """

        def draw_batches(numbers: Sequence[int]) -> Generator[dict[str, Tensor], None, None]:
            self._pipeline.set_progress_bar_config(disable=True)
            total = sum(len(self.batches[number]) for number in numbers)
            with progress("sample", total, "image", process_state().is_main_process) as bar:
                for number in numbers:
                    images = self.draw(number, count_images(bar))
                    features = {} if extractor is None else extractor(images).tensors()
                    yield ({"images": images} if keep else {}) | features

        return self.parts(weights, out, extractor, keep).complete(len(self.batches), draw_batches)
