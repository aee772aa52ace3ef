"""DDPMPipeline: noise → network → scheduler → image, Ho et al. 2020, algorithm 2.

This module knows the sampling loop. What a step does is the scheduler's matter, what the network says of one
x_t is predictor.py's, and folders and the Hub are portable.py's.
"""

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, Literal

import diffusers
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from hf_ddpm.decoders import AnyDecoder
from hf_ddpm.denoiser import Denoiser, as_denoiser
from hf_ddpm.generation.bits_per_dim import bits_per_dim
from hf_ddpm.generation.classes import count_labels
from hf_ddpm.generation.given import as_pictures
from hf_ddpm.generation.inpainting import as_mask, inpaint
from hf_ddpm.generation.measured import check_ending, ended, ending_decoder, give_errors
from hf_ddpm.generation.outputs import OUTPUT_TYPES, PIL_CHANNELS, DDPMPipelineOutput, as_type, to_unit
from hf_ddpm.generation.predictor import PredictingPipeline, check_images
from hf_ddpm.generation.quality import sampler_of_quality
from hf_ddpm.generation.samplers import (
    Diverged,
    check_process,
    check_sampler,
    check_steps,
    choose_steps,
    require_config,
    start_remark,
    try_step,
)
from hf_ddpm.likelihood import Estimate
from hf_ddpm.parametrization import to_x0
from hf_ddpm.runtime.messages import one_line
from hf_ddpm.scheduler import DDPMScheduler, check_generators
from hf_ddpm.spelling import suggest_keywords

logger = logging.getLogger(__name__)
Callback = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


class DDPMPipeline(PredictingPipeline):
    """Unconditional image generation, Ho et al. 2020, algorithm 2, with any DDPM sampler of diffusers.

    A folder that it saves also loads as `diffusers.DDPMPipeline` where hf_ddpm is not installed; a folder
    that plain diffusers wrote loads here, and a stock `DDPMScheduler` in it is replaced by ours with the same
    config.

    Args:
        unet: a `UNet2DModel`, or any module or function (x_t, t) → output.
        scheduler: the sampler. Its config says which process the network was trained for: a sampler that is
            assigned later (`pipeline.scheduler = ...`) is checked at the next call, and refused if it runs
            another process or reads another prediction type. A network of another process gets a new
            pipeline.
        image_shape: (C, H, W) of the images, for a network whose config doesn't say it.

    Example:
        ```py
        >>> pipeline = DDPMPipeline.from_pretrained("runs/digits")
        >>> pipeline(batch_size=4, generator=torch.Generator().manual_seed(0)).images[0].save("digit.png")
        ```
    """

    @suggest_keywords
    def __init__(self, unet: Any, scheduler: Any, image_shape: tuple[int, int, int] | None = None):
        if type(scheduler) is diffusers.DDPMScheduler:
            scheduler = DDPMScheduler.from_config(scheduler.config)
        require_config(scheduler)
        super().__init__(unet=unet if isinstance(unet, nn.Module) else as_denoiser(unet), scheduler=scheduler)  # type: ignore[arg-type]
        self.trained_with(scheduler)
        self._image_shape = None if image_shape is None else _as_shape(image_shape)
        self._said: set[str] = set()

    @suggest_keywords
    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        quality: Literal["fast", "best"] | None = None,
        max_batch_size: int | None = None,
        pred_original_steps: Sequence[int] = (),
        callback_on_step_end: Callback | None = None,
        image_shape: tuple[int, int, int] | None = None,
        class_labels: Any = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        ending: Literal["mean", "mode", "draw"] = "mean",
    ) -> DDPMPipelineOutput | tuple:
        """Draw images.

        Args:
            batch_size (`int`, *optional*): number of images, by default 1, or as many as `class_labels` has.
            generator (`torch.Generator` or a list of `batch_size` of them, *optional*): makes the draws
                repeatable. With a list, an image depends on its own generator only, whatever the batch.
            num_inference_steps (`int`, *optional*): number of steps, by default all T of the training
                process.
            output_type (`str`, defaults to `"pil"`): "pil", "np" (B, H, W, C) or "pt" (B, C, H, W), both in
                [0, 1].
            return_dict (`bool`, defaults to `True`): return a `DDPMPipelineOutput`, or the tuple of its
                fields.
            quality (`str`, *optional*): takes the sampler and the number of steps that `hf-ddpm sweep` found
                for this model, for this call: "fast" is the fewest network evaluations whose images are as
                good as the best, as far as was measured, and "best" is the best.
            max_batch_size (`int`, *optional*): the network sees at most so many images at once. With one
                generator the draws come chunk by chunk, so the images differ from those of one large batch.
            pred_original_steps (`Sequence[int]`, *optional*): positions in `scheduler.timesteps` (0 = first,
                negative from the end) whose predicted x_0 is returned as well: progressive generation.
            callback_on_step_end (`Callable`, *optional*): called as (pipeline, step, timestep, {"sample":
                x_prev}); what it returns under "sample" replaces x_prev.
            image_shape (`tuple`, *optional*): (C, H, W), for a network whose config doesn't say it.
            class_labels (`int`, `str`, or a list, array or tensor of them, *optional*): the class of all
                images, by its number or by its name in `id2label`, or one class for each image. None is "no
                class", never a random one.
            guidance_scale (`float`, defaults to 1.0): w in x̂_0 = x̂_none + w (x̂_class − x̂_none), which is
                clipped afterwards (guidance.py). 1 is the conditional model, 0 the one without a class; any
                other w takes twice the time and memory, as the network sees each image twice.
            guidance_interval (`tuple[float, float]`, *optional*): (lo, hi), guide at steps lo ≤ t < hi of the
                training process alone, by default at all.
            ending (`str`, defaults to `"mean"`): an image is the x_0 that the last step predicts ("mean"),
                or, by the grey levels that `hf-ddpm plan` counted, the likeliest level of each pixel given
                that ("mode") or a draw of one ("draw").

        Returns:
            The images, and the predicted x_0 by position if asked for.

        Raises:
            ValueError: an argument is not as above.
        """
        if batch_size is None:
            batch_size = count_labels(class_labels) or 1
        if quality is not None:
            with sampler_of_quality(self, quality, num_inference_steps) as steps:
                return self(
                    batch_size,
                    generator,
                    steps,
                    output_type,
                    return_dict,
                    max_batch_size=max_batch_size,
                    pred_original_steps=pred_original_steps,
                    callback_on_step_end=callback_on_step_end,
                    image_shape=image_shape,
                    class_labels=class_labels,
                    guidance_scale=guidance_scale,
                    guidance_interval=guidance_interval,
                    ending=ending,
                )
        check_ending(ending)
        shape, num_steps, num_calls = self.check_inputs(
            batch_size, generator, num_inference_steps, output_type, max_batch_size, image_shape
        )
        _require(
            isinstance(pred_original_steps, Sequence | range) and not isinstance(pred_original_steps, str),
            "pred_original_steps",
            pred_original_steps,
            "a list of positions in scheduler.timesteps",
        )
        _check_callback(callback_on_step_end)
        for p in pred_original_steps:
            allowed = range(-num_calls, num_calls)
            fits = p in allowed and not isinstance(p, bool)
            _require(fits, "a position in pred_original_steps", p, f"{allowed[0]}..{allowed[-1]}")
        classes = self.check_classes(batch_size, class_labels, guidance_scale, guidance_interval)
        places = {p: int(p) % num_calls for p in pred_original_steps}
        decoder = ending_decoder(self, ending)
        samples, previews = [], {p: [] for p in places}
        chunk = max_batch_size or batch_size
        for start in range(0, batch_size, chunk):
            size = min(chunk, batch_size - start)
            chosen = generator[start : start + size] if isinstance(generator, list) else generator
            denoise = classes.denoiser(self.unet, start, size)
            sample, predicted = self._sample(
                denoise, (size, *shape), chosen, num_steps, set(places.values()), callback_on_step_end
            )
            samples.append(to_unit(ended(sample, decoder, ending, chosen)))
            for p, place in places.items():
                previews[p].append(to_unit(predicted[place]))
        self.maybe_free_model_hooks()

        images = as_type(samples, output_type)
        x_0s = {p: as_type(x_0, output_type) for p, x_0 in previews.items()} or None
        if not return_dict:
            return (images,) if x_0s is None else (images, x_0s)
        return DDPMPipelineOutput(images=images, pred_original_images=x_0s)

    @suggest_keywords
    @torch.no_grad()
    def denoise(
        self,
        x_t: Tensor,
        t: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        *,
        callback_on_step_end: Callback | None = None,
        class_labels: Any = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
    ) -> Tensor:
        """Draw x_0 given x_t: algorithm 2 from step t on, over the steps t, t − 1, ..., 0.

        Args:
            x_t (`torch.Tensor`): the state after step t, (B, C, H, W), of a variance that fits t, such as
                `process.q_sample(x_0, noise, t)` has.
            t (`int`): zero-based step of the training process.
            generator (`torch.Generator` or a list of B of them, *optional*): of the noise of the steps. With
                a list, an image depends on its own x_t and generator only; equal seeds mean equal noise.
            num_inference_steps (`int`, *optional*): K, as when sampling from noise. The steps taken are t
                itself, which need not be one of the K, and those of the K below t: about K·t/T steps.
            callback_on_step_end (`Callable`, *optional*): as when sampling from noise.
            class_labels (*optional*): as when sampling from noise, and so the next two.
            guidance_scale (`float`, defaults to 1.0): w.
            guidance_interval (`tuple[float, float]`, *optional*): the steps that are guided.

        Returns:
            The images, about in [−1, 1], (B, C, H, W), on the network's device and in its dtype.

        Raises:
            ValueError: an argument is not as above, or the sampler is not `DDPMScheduler`: others keep a
                state that begins with noise.
        """
        scheduler: Any = self.scheduler
        sampler = type(scheduler).__name__
        _require(isinstance(scheduler, DDPMScheduler), "the scheduler", sampler, "DDPMScheduler (ddpm)")
        check_images(x_t)
        _check_callback(callback_on_step_end)
        total = len(self.process)
        whole = isinstance(t, Integral) and not isinstance(t, bool)
        _require(whole and 0 <= t < total, "t", t, f"whole numbers in 0..{total - 1}")
        self.check_inputs(len(x_t), generator, num_inference_steps, "pt", None, tuple(x_t.shape[1:]))  # type: ignore[arg-type]
        classes = self.check_classes(len(x_t), class_labels, guidance_scale, guidance_interval)
        below = [step for step in scheduler.timesteps.tolist() if step < t]
        scheduler.set_timesteps(timesteps=[int(t), *below])
        x = x_t.to(self._execution_device, self._weight.dtype)
        x_0, _ = self._run(classes.denoiser(self.unet), x, generator, set(), callback_on_step_end)
        self.maybe_free_model_hooks()
        return x_0

    @suggest_keywords
    @torch.no_grad()
    def inpaint(
        self,
        image: Any,
        mask: Any,
        *,
        resample: int = 10,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        class_labels: Any = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
    ) -> DDPMPipelineOutput | tuple:
        """Draw some pixels of images anew, given the others: RePaint, Lugmayr et al. 2022, algorithm 1.

        The other pixels come back exactly. Each step is taken `resample` times with the variance β_t, see
        inpainting.py, so the network is called about K · `resample` times.

        Args:
            image: one or more images of the model's shape, in any form of `bits_per_dim`, but that
                floating-point numbers are any in [−1, 1]. For several fillings, give an image several times.
            mask: white (True, 1 or 255) where pixels are filled, black (False, 0) where they are kept: one
                for all images or one for each, a PIL image, an array or a tensor, such as (H, W).
            resample (`int`, defaults to 10): how often each step is taken. 1 is fast, and what is filled then
                fits its surroundings badly.
            generator (`torch.Generator` or a list of B of them, *optional*): as in a call of the pipeline.
            num_inference_steps (`int`, *optional*): K, by default all T of the training process.
            output_type (`str`, defaults to `"pil"`): "pil", "np" or "pt".
            return_dict (`bool`, defaults to `True`): return a `DDPMPipelineOutput`, or a tuple.
            class_labels (*optional*): the class of all images, or one for each.
            guidance_scale (`float`, defaults to 1.0): w.
            guidance_interval (`tuple[float, float]`, *optional*): the steps that are guided.

        Raises:
            ValueError: an argument is not as above, or the sampler is not `DDPMScheduler`.
        """
        scheduler: Any = self.scheduler
        sampler = type(scheduler).__name__
        _require(isinstance(scheduler, DDPMScheduler), "the scheduler", sampler, "DDPMScheduler (ddpm)")
        _require(_is_count(resample), "resample", resample, "whole numbers >= 1")
        x_0 = as_pictures(image, self.shape_or_none)
        channels, height, width = x_0.shape[1:]
        filled = as_mask(mask, len(x_0), height, width)
        _, num_steps, _ = self.check_inputs(
            len(x_0), generator, num_inference_steps, output_type, None, (channels, height, width)
        )
        classes = self.check_classes(len(x_0), class_labels, guidance_scale, guidance_interval)
        denoise = classes.denoiser(self.unet)
        images = inpaint(self, denoise, x_0.cpu(), filled, resample, num_steps, generator)
        self.maybe_free_model_hooks()
        found = as_type([to_unit(images)], output_type)
        return DDPMPipelineOutput(images=found) if return_dict else (found,)

    @suggest_keywords
    def bits_per_dim(
        self,
        images: Any,
        *,
        num_evals_per_image: int = 20,
        seed: int = 0,
        batch_size: int = 64,
        variance_type: str | None = None,
        clip_x0: bool = True,
        decoder: AnyDecoder = "exact",
    ) -> Estimate:
        """How many bits per dimension the model needs for images, by the bound of Ho et al. 2020, eq. 5.

        The estimate is unbiased, and has a standard error: `result.bpd`, `result.stderr` (of one image NaN),
        and each image's in `result.per_image_bpd`. `hf-ddpm evaluate` does the same for a data set.

        Args:
            images (`PIL.Image.Image`, array, `torch.Tensor` or a list of them): 8-bit images of the model's
                shape: PIL images of mode L, RGB or RGBA; uint8 of (H, W), (C, H, W), (H, W, C), (B, H, W),
                (B, C, H, W) or (B, H, W, C); or float32 or float64 of such a shape on the levels
                u/127.5 − 1.
            num_evals_per_image (`int`, defaults to 20): network evaluations per image.
            seed (`int`, defaults to 0): with an image's place in the batch, of its draws.
            batch_size (`int`, defaults to 64): the network sees at most so many x_t at once.
            variance_type (`str`, *optional*): "fixed_small" or "fixed_large", for a network that learns none;
                "optimal" or "by-value" of what `hf-ddpm plan` measured; by default the scheduler's.
            clip_x0 (`bool`, defaults to `True`): clip the predicted x_0 to [−1, 1], as published evaluations
                do.
            decoder (`str` or `LevelsDecoder`, defaults to `"exact"`): of L_0; "tanh" is the
                published code's formula, "levels" knows how often each grey level occurs, as `hf-ddpm plan`
                measured.

        Raises:
            ValueError: images that are none of these, values that are no 8-bit levels, or an argument that is
                not as above.
        """
        return bits_per_dim(
            self, images, num_evals_per_image, seed, batch_size, variance_type, clip_x0, decoder
        )

    def _sample(
        self,
        denoise: Denoiser,
        shape: tuple[int, ...],
        generator: torch.Generator | list[torch.Generator] | None,
        num_steps: int,
        places: set[int],
        callback: Callback | None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """One batch from noise: the samples, and the predicted x_0 at the places asked for."""
        scheduler: Any = self.scheduler  # any of diffusers'
        if not isinstance(scheduler, DDPMScheduler):
            self._choose_steps(num_steps)  # forgets the batch before: other schedulers keep state
        x = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self._weight.dtype)
        return self._run(denoise, x * scheduler.init_noise_sigma, generator, places, callback)

    def _run(
        self,
        denoise: Denoiser,
        x: Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        places: set[int],
        callback: Callback | None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Algorithm 2 over `scheduler.timesteps`, from x at the first of them."""
        scheduler: Any = self.scheduler
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        options: dict[str, Any] = {"generator": generator} if takes_generator else {}
        predicted: dict[int, Tensor] = {}
        finite: list[Tensor] = []
        for step, t in enumerate(self.progress_bar(scheduler.timesteps)):  # type: ignore[call-arg,arg-type]
            x_t = scheduler.scale_model_input(x, t)
            output = denoise(x_t, t.expand(len(x)))
            finite.append(output.isfinite().all())  # looked at in the end: nothing is read back in between
            if not isinstance(scheduler, diffusers.DDPMScheduler):
                output = output[:, : x.shape[1]]  # the others have no use for a learned variance
            result: Any = scheduler.step(output, t, x, **options)
            if step in places:
                predicted[step] = self._pred_original(result, output, x_t, t)
            x = result.prev_sample
            if callback is not None:
                x = _called(callback, self, step, t, x)
        # A clipped x̂_0, or float16 that is cut at its largest number, would hide an infinite answer
        if bad := [step for step, good in enumerate(torch.stack(finite).tolist()) if not good]:
            raise Diverged(
                f"the images are not finite: the network's answer at step {scheduler.timesteps[bad[0]]:g} "
                f"(call {bad[0] + 1} of {len(finite)}) is not; bad weights, a dtype of "
                "too small a range, or a sampler that diverged"
            )
        if not x.isfinite().all():
            raise Diverged("the images are not finite: a bad scheduler config, or a callback's sample")
        return x, predicted

    def _pred_original(self, result: Any, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The predicted x_0 of a step: the scheduler's own, or, if it has none, that of the process."""
        if getattr(result, "pred_original_sample", None) is not None:
            return result.pred_original_sample
        if t != t.round():
            raise ValueError(
                f"{type(self.scheduler).__name__} visits step {t.item():g} and predicts no x_0 there"
            )
        return to_x0(self.process, self.prediction_type, output, x_t, int(t))

    def check_inputs(
        self,
        batch_size: int = 1,
        generator: Any = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        max_batch_size: int | None = None,
        image_shape: tuple[int, int, int] | None = None,
    ) -> tuple[tuple[int, int, int], int, int]:
        """Refuse what `__call__` can't do, before any work, and set the scheduler to the number of steps.

        Arguments and errors are those of `__call__`.

        Returns:
            The images' shape (C, H, W); K; and how often the network is called for an image, which is more
            than K for some samplers.
        """
        count = "whole numbers >= 1"
        _require(_is_count(batch_size), "batch_size", batch_size, count)
        _require(max_batch_size is None or _is_count(max_batch_size), "max_batch_size", max_batch_size, count)
        if generator is not None:
            check_generators(generator, batch_size, self._execution_device)
        _require(output_type in OUTPUT_TYPES, "output_type", output_type, ", ".join(OUTPUT_TYPES))

        shape = self.image_shape if image_shape is None else _as_shape(image_shape)
        self.check_shape(shape)
        as_picture = output_type == "pil" and shape[0] not in PIL_CHANNELS
        _require(not as_picture, "output_type", output_type, f"np, pt for images of {shape[0]} channels")

        total = self._check_sampler()
        num_steps = total if num_inference_steps is None else num_inference_steps
        in_range = _is_count(num_steps) and num_steps <= total
        _require(in_range, "num_inference_steps", num_steps, f"whole numbers in 1..{total}")
        self._set_steps(num_steps, shape[0])
        return shape, num_steps, len(self.scheduler.timesteps)  # type: ignore[attr-defined]

    def _check_sampler(self) -> int:
        """Refuse a sampler that doesn't draw by the network's process; T."""
        scheduler: Any = self.scheduler
        check_sampler(scheduler, self.prediction_type)
        check_process(scheduler, self.trained_scheduler)
        give_errors(self)
        return len(self.trained_scheduler)

    def _choose_steps(self, num_steps: int) -> None:
        choose_steps(self.scheduler, num_steps, self.trained_scheduler)

    def _set_steps(self, num_steps: int, channels: int) -> None:
        """Set the sampler to K steps, and refuse those that it can't do."""
        scheduler: Any = self.scheduler
        try:
            self._choose_steps(num_steps)
        except (ValueError, IndexError) as error:
            sampler = type(scheduler).__name__
            raise ValueError(f"{sampler} can't do {num_steps} steps: {one_line(error)}") from error
        if isinstance(scheduler, DDPMScheduler):
            return
        check_steps(scheduler, self.trained_scheduler)
        try_step(scheduler, channels)
        self._choose_steps(num_steps)  # forgets the step
        remark = start_remark(scheduler, self.trained_scheduler)
        if remark is not None and remark not in self._said:
            self._said.add(remark)
            logger.warning(remark)


def _check_callback(callback: Any) -> None:
    named = f"a {type(callback).__name__}"
    _require(callback is None or callable(callback), "callback_on_step_end", named, "a function")


def count_images(bar: Any) -> Callback:
    """A callback of each step of sampling, which counts the batch in a bar of images, a share at a time."""

    def after_step(pipeline: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> None:
        bar.update(len(tensors["sample"]) / len(pipeline.scheduler.timesteps))

    return after_step


def _called(callback: Callback, pipeline: Any, step: int, t: Tensor, x: Tensor) -> Tensor:
    """x_prev, or what the callback gives in its place."""
    answer = callback(pipeline, step, t, {"sample": x})
    if answer is None:
        return x
    new = answer.get("sample", x) if isinstance(answer, Mapping) else answer
    if not (isinstance(new, Tensor) and new.shape == x.shape and new.is_floating_point()):
        raise ValueError(
            f"callback_on_step_end gave a {type(new).__name__} at step {step}; allowed: None, or "
            f"{{'sample': floating-point tensor of shape {tuple(x.shape)}}}"
        )
    return new.to(x.device, x.dtype)


def _as_shape(shape: Any) -> tuple[int, int, int]:
    """(C, H, W) as it was given, if it is one."""
    counts = isinstance(shape, (tuple, list)) and len(shape) == 3 and all(map(_is_count, shape))
    _require(counts, "image_shape", shape, "(C, H, W), whole numbers >= 1")
    return shape[0], shape[1], shape[2]


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _require(condition: bool, name: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}")
