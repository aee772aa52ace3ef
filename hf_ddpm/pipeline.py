"""DDPMPipeline: noise → model → scheduler → image.

It knows the sampling loop and the folder that a pipeline is saved in. What a step does is the scheduler's;
how a sampler is chosen by name (`swap_scheduler`) is here, so that scripts and the command line agree.
"""

import difflib
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from safetensors import SafetensorError
from torch import Tensor, nn

from hf_ddpm.models import as_denoiser
from hf_ddpm.parametrization import to_x0
from hf_ddpm.scheduler import DDPMScheduler

SCHEDULERS: dict[str, type] = {
    "ddpm": DDPMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "pndm": diffusers.PNDMScheduler,
    "dpm-solver++": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "deis": diffusers.DEISMultistepScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler-ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
}
OUTPUT_TYPES = ("pil", "np", "pt")
PIL_CHANNELS = (1, 3, 4)


@dataclass
class DDPMPipelineOutput(ImagePipelineOutput):
    """What a call of the pipeline returns.

    Attributes:
        images: the samples, in the asked output type.
        pred_original_images: for each step asked for in `pred_original_steps`, the predicted x_0 there.
    """

    pred_original_images: dict[int, Any] | None = None


class DDPMPipeline(diffusers.DDPMPipeline):
    """Unconditional image generation, Ho et al. 2020, algorithm 2, with any scheduler of diffusers.

    A folder that it saves also loads as `diffusers.DDPMPipeline` where hf_ddpm is not installed; a folder
    that plain diffusers wrote loads here, and a stock `DDPMScheduler` in it is replaced by ours with the same
    config.

    Args:
        unet: a `UNet2DModel`, or any module or function (x_t, t) → output.
        scheduler: the sampler.

    Example:
        ```py
        >>> pipeline = DDPMPipeline.from_pretrained("runs/digits")
        >>> pipeline(batch_size=4, generator=torch.Generator().manual_seed(0)).images[0].save("digit.png")
        ```
    """

    def __init__(self, unet: Any, scheduler: Any):
        if type(scheduler) is diffusers.DDPMScheduler:
            scheduler = DDPMScheduler.from_config(scheduler.config)
        super().__init__(unet=unet if isinstance(unet, nn.Module) else as_denoiser(unet), scheduler=scheduler)  # type: ignore[arg-type]

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        max_batch_size: int | None = None,
        pred_original_steps: Sequence[int] = (),
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]
        | None = None,
        image_shape: tuple[int, int, int] | None = None,
    ) -> DDPMPipelineOutput | tuple:
        """Draw images.

        Args:
            batch_size (`int`, defaults to 1): number of images.
            generator (`torch.Generator` or a list of `batch_size` of them, *optional*): makes the draws
                repeatable. With a list, an image depends on its own generator only, whatever the batch.
            num_inference_steps (`int`, *optional*): number of steps, by default all T of the training
                process.
            output_type (`str`, defaults to `"pil"`): "pil", "np" (B, H, W, C) or "pt" (B, C, H, W), both in
                [0, 1].
            return_dict (`bool`, defaults to `True`): return a `DDPMPipelineOutput`, or the tuple of its
                fields.
            max_batch_size (`int`, *optional*): the network sees at most so many images at once. With one
                generator the draws come chunk by chunk, so the images differ from those of one large batch.
            pred_original_steps (`Sequence[int]`, *optional*): positions in `scheduler.timesteps` (0 = first,
                negative from the end) whose predicted x_0 is returned as well: progressive generation.
            callback_on_step_end (`Callable`, *optional*): called as (pipeline, step, timestep, {"sample":
                x_prev}); what it returns under "sample" replaces x_prev.
            image_shape (`tuple`, *optional*): (C, H, W), for a network whose config doesn't say it.

        Returns:
            The images, and the predicted x_0 by position if asked for.

        Raises:
            ValueError: an argument is not as above.
        """
        shape, positions, num_steps = self._check(
            batch_size,
            generator,
            num_inference_steps,
            output_type,
            max_batch_size,
            pred_original_steps,
            image_shape,
        )
        samples, predictions = [], {position: [] for position in positions}
        chunk = max_batch_size or batch_size
        for start in range(0, batch_size, chunk):
            size = min(chunk, batch_size - start)
            chosen = generator[start : start + size] if isinstance(generator, list) else generator
            sample, predicted = self._sample(
                (size, *shape), chosen, num_steps, positions, callback_on_step_end
            )
            samples.append(_to_unit(sample))
            for position, x_0 in predicted.items():
                predictions[position].append(_to_unit(x_0))
        self.maybe_free_model_hooks()

        images = _as_type(samples, output_type)
        previews = {p: _as_type(x_0, output_type) for p, x_0 in predictions.items()} if positions else None
        if not return_dict:
            return (images,) if previews is None else (images, previews)
        return DDPMPipelineOutput(images=images, pred_original_images=previews)

    def _sample(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | list[torch.Generator] | None,
        num_steps: int,
        positions: Sequence[int],
        callback: Callable[..., dict[str, Tensor] | None] | None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """One batch through algorithm 2; (samples, predicted x_0 by position)."""
        scheduler: Any = self.scheduler  # any of diffusers'
        denoise = as_denoiser(self.unet)
        scheduler.set_timesteps(num_steps)  # again for each batch: many schedulers keep state
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        options: dict[str, Any] = {"generator": generator} if takes_generator else {}

        x = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self._dtype)
        x = x * scheduler.init_noise_sigma
        predicted: dict[int, Tensor] = {}
        for step, t in enumerate(self.progress_bar(scheduler.timesteps)):  # type: ignore[call-arg,arg-type]
            x_t = scheduler.scale_model_input(x, t)
            output = denoise(x_t, t.to(x.device).expand(len(x)))
            if not isinstance(scheduler, diffusers.DDPMScheduler):
                output = output[:, : shape[1]]  # the others have no use for a learned variance
            result: Any = scheduler.step(output, t, x, **options)
            if step in positions:
                predicted[step] = self._pred_original(result, output, x_t, t)
            x = result.prev_sample
            if callback is not None:
                x = (callback(self, step, t, {"sample": x}) or {}).get("sample", x)
        return x, predicted

    def _pred_original(self, result: Any, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The predicted x_0 of a step: the scheduler's own, or by the process of its config."""
        if getattr(result, "pred_original_sample", None) is not None:
            return result.pred_original_sample
        if t != t.round():
            raise ValueError(
                f"{type(self.scheduler).__name__} visits step {t.item():g} and predicts no x_0 there"
            )
        process = DDPMScheduler.from_config(self.scheduler.config).process  # type: ignore[union-attr]
        return to_x0(process, self.scheduler.config["prediction_type"], output, x_t, int(t))

    def _check(
        self,
        batch_size: int,
        generator: Any,
        num_inference_steps: int | None,
        output_type: str,
        max_batch_size: int | None,
        pred_original_steps: Sequence[int],
        image_shape: tuple[int, int, int] | None,
    ) -> tuple[tuple[int, int, int], list[int], int]:
        """The image's shape, the positions to keep, the number of steps: once every argument makes sense."""
        for name, value in (("batch_size", batch_size), ("max_batch_size", max_batch_size)):
            optional = name == "max_batch_size" and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}; allowed: whole numbers >= 1")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"{len(generator)} generators for {batch_size} images; allowed: one, or one per image"
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; allowed: {', '.join(OUTPUT_TYPES)}")
        shape = image_shape or self.image_shape
        if output_type == "pil" and shape[0] not in PIL_CHANNELS:
            raise ValueError(
                f"images of {shape[0]} channels can't be PIL images; allowed here: output_type 'np', 'pt'"
            )
        total = self.scheduler.config["num_train_timesteps"]
        num_steps = total if num_inference_steps is None else num_inference_steps
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or not 1 <= num_steps <= total:
            raise ValueError(f"num_inference_steps is {num_steps!r}; allowed: whole numbers in 1..{total}")
        self.scheduler.set_timesteps(num_steps)
        steps = len(self.scheduler.timesteps)
        if wrong := [p for p in pred_original_steps if not -steps <= p < steps]:
            raise ValueError(
                f"pred_original_steps has {wrong[0]}; allowed: positions in {-steps}..{steps - 1}"
            )
        return shape, sorted({p % steps for p in pred_original_steps}), num_steps

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images, from the network's config.

        Raises:
            ValueError: the network has no config that says it.
        """
        config = getattr(self.unet, "config", None)
        if config is None or getattr(config, "sample_size", None) is None:
            raise ValueError(
                f"{type(self.unet).__name__} has no config with a sample_size; pass image_shape=(C, H, W)"
            )
        height, width = np.broadcast_to(config.sample_size, 2).tolist()
        return config.in_channels, height, width

    @property
    def _dtype(self) -> torch.dtype:
        parameters = self.unet.parameters() if isinstance(self.unet, nn.Module) else iter(())
        return next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike, safe_serialization: bool = True, **kwargs: Any
    ) -> None:
        """Write the folder: `model_index.json`, `scheduler/`, and `unet/` with safetensors weights.

        Raises:
            ValueError: `safe_serialization=False` (pickles are never written), or a network that is not
                diffusers' kind.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False would write a pickle; allowed: safetensors only")
        if not hasattr(self.unet, "save_pretrained"):
            raise ValueError(
                f"{type(self.unet).__name__} can't be saved in a pipeline; allowed: a diffusers ModelMixin"
            )
        super().save_pretrained(save_directory, safe_serialization=True, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> "DDPMPipeline":
        """Load a pipeline from a folder or a Hub id; keywords as in diffusers' `from_pretrained`.

        Only safetensors are read: `use_safetensors` is on and can't be turned off.

        Raises:
            ValueError: nothing there, not a pipeline, weights that are missing, cut short or not safetensors.
        """
        name = os.fspath(pretrained_model_name_or_path)
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise ValueError("use_safetensors=False would load a pickle; allowed: safetensors only")
        looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
        if looks_local and not Path(name).expanduser().exists():
            raise ValueError(f"model folder {name!r} does not exist")
        if Path(name).is_dir() and not (Path(name) / "model_index.json").is_file():
            raise ValueError(f"model folder {name!r} has no model_index.json: it is not a pipeline folder")
        try:
            return super().from_pretrained(name, **kwargs)
        except (OSError, RuntimeError, SafetensorError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"can't load a pipeline from {name!r}: {reason}") from error


def swap_scheduler(pipeline: DiffusionPipeline, name: str, **changes: Any) -> None:
    """Give the pipeline another sampler for the same process.

    Args:
        pipeline: whose `scheduler` is replaced.
        name: a key of `SCHEDULERS`.
        **changes: config keys of the new scheduler, such as `variance_type="fixed_small"`.

    Raises:
        ValueError: the name is unknown (the nearest is named).
    """
    if name not in SCHEDULERS:
        near = difflib.get_close_matches(name, SCHEDULERS, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"scheduler {name!r} is unknown{hint}; allowed: {', '.join(SCHEDULERS)}")
    pipeline.scheduler = SCHEDULERS[name].from_config(pipeline.scheduler.config, **changes)


def _to_unit(x: Tensor) -> Tensor:
    """[−1, 1] → [0, 1] on the CPU, float32."""
    return (x.float() / 2 + 0.5).clamp(0, 1).cpu()


def _as_type(chunks: list[Tensor], output_type: str) -> Any:
    images = torch.cat(chunks)
    if output_type == "pt":
        return images
    array = images.permute(0, 2, 3, 1).numpy()
    return array if output_type == "np" else DiffusionPipeline.numpy_to_pil(array)
