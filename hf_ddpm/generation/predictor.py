"""What a pipeline's network says of one x_t: E[x_0 | x_t] and the score, whatever its prediction type.

This module knows the network and the process that it was trained for, and no sampler: that a network can be
asked about any x_t and that images are drawn with it step by step are two subjects. Drawing is pipeline.py's.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

from hf_ddpm.checks import as_numbers, described
from hf_ddpm.folders.errors import StoredErrors, network_digest, read_errors
from hf_ddpm.folders.layout import ERRORS
from hf_ddpm.folders.sweep import Sweep
from hf_ddpm.generation.classes import Classes, check_classes
from hf_ddpm.generation.portable import PortablePipeline
from hf_ddpm.generation.quality import sweep_beside
from hf_ddpm.generation.samplers import training_scheduler
from hf_ddpm.models.autoencoders import Autoencoder
from hf_ddpm.parametrization import to_score, to_x0
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.scheduler import DDPMScheduler

Pipeline = TypeVar("Pipeline", bound="PredictingPipeline")


def check_images(x_t: Any) -> None:
    """Refuse what are no noisy images.

    Raises:
        ValueError: `x_t` is no floating-point tensor of shape (B, C, H, W).
    """
    if not (isinstance(x_t, Tensor) and x_t.ndim == 4 and x_t.is_floating_point() and len(x_t)):
        raise ValueError(f"x_t is {described(x_t)}; allowed: floating point, (B, C, H, W)")


class PredictingPipeline(PortablePipeline):
    """A network and its process, to be asked about noisy images; the base of `DDPMPipeline`."""

    _image_shape: tuple[int, int, int] | None = None  # as the pipeline was told

    def trained_with(self, scheduler: Any) -> None:
        """Take note of the scheduler whose config says what the network was trained for.

        Args:
            scheduler: the one that the pipeline is made of or that its folder has. Another sampler that is
                assigned later has to run the same process.
        """
        self._made_with = scheduler
        self._trained: tuple[Any, DDPMScheduler] | None = None

    @property
    def trained_scheduler(self) -> DDPMScheduler:
        """Our scheduler of the process that the network was trained for, by the config that it came with.

        Raises:
            ValueError: that config doesn't say it: the scheduler is not one of a DDPM.
        """
        config = self._made_with.config  # another object as soon as a key of it is registered anew
        if self._trained is None or self._trained[0] is not config:
            self._trained = config, training_scheduler(self._made_with)
        return self._trained[1]

    @property
    def original_scheduler(self) -> Any:
        """The scheduler that the pipeline was made or loaded with."""
        return self._made_with

    @property
    def prediction_type(self) -> Any:
        """What the network predicts, by the config that it came with."""
        return self._made_with.config.get("prediction_type")

    @property
    def process(self) -> DiffusionProcess:
        """The process of T steps that the network was trained for, whatever sampler and steps were chosen.

        Raises:
            ValueError: as in `trained_scheduler`.
        """
        return self.trained_scheduler.process

    @property
    def errors(self) -> StoredErrors | None:
        """The errors of the network's x̂_0 that `hf-ddpm plan` measured; None if its folder has none.

        `pipeline.errors.errors.variance(process, "by-value")` is a variance for `evaluate_bound` and the
        functions beside it, of the process or of one of fewer steps.

        Raises:
            ValueError: the file is damaged, or of another network or process than this.
        """
        if self._folder is None or not (self._folder / ERRORS).exists():
            return None
        return read_errors(self._folder, self.process, self.prediction_type, network_digest(self.unet))

    @property
    def sweep(self) -> Sweep | None:
        """What `hf-ddpm sweep` found of samplers and numbers of steps; None if the model's folder has none.

        Raises:
            ValueError: the file is damaged, or of another network, process or scheduler than this.
        """
        return sweep_beside(self)

    @torch.no_grad()
    def predict_x0(
        self, x_t: Tensor, t: int | Tensor, class_labels: Any = None, guidance_scale: float = 1.0
    ) -> Tensor:
        """The network's estimate of E[x_0 | x_t], for any prediction type.

        Args:
            x_t (`torch.Tensor`): noisy images, (B, C, H, W), on the network's device.
            t (`int` or `torch.Tensor`): zero-based step of each image in the training process, shape (B,)
                int64, or one for all.
            class_labels (*optional*): of a class-conditional network: the class, as when images are drawn, by
                default none.
            guidance_scale (`float`, defaults to 1.0): w, as when images are drawn.

        Returns:
            x̂_0, not clipped, shape and dtype of x_t; of a network that learns variances, its first C
            channels.

        Raises:
            ValueError: a step that the process does not have (a tensor on an accelerator is trusted), x_t or
                t of another shape, "epsilon" or "score" at ᾱ_t = 0, or such classes.
        """
        answer = self._answer(x_t, t, class_labels, guidance_scale)
        return to_x0(self.process, self.prediction_type, answer, x_t, t)

    @torch.no_grad()
    def score(
        self, x_t: Tensor, t: int | Tensor, class_labels: Any = None, guidance_scale: float = 1.0
    ) -> Tensor:
        """The network's estimate of the marginal score ∇ log q(x_t), for any prediction type.

            E[√ᾱ_t x_0 | x_t] = x_t + (1 − ᾱ_t) ∇ log q(x_t)        (Tweedie)

        This is the score of the noised data. The *conditional* score ∇ log q(x_t | x_0) = −ε/√(1 − ᾱ_t)
        needs the x_0 that x_t was made of; the marginal score is its mean given x_t. Arguments and errors are
        those of `predict_x0`, but that every prediction type has a score at ᾱ_t = 0.

        Returns:
            The score, shape and dtype of x_t.
        """
        answer = self._answer(x_t, t, class_labels, guidance_scale)
        return to_score(self.process, self.prediction_type, answer, x_t, t)

    def check_classes(
        self, num_images: int, class_labels: Any, guidance_scale: Any, guidance_interval: Any = None
    ) -> Classes:
        """The classes of a batch, once they are known to make sense.

        Args:
            num_images: of the batch.
            class_labels: as in a call of the pipeline, and so the others.
            guidance_scale: w.
            guidance_interval: the steps that are guided.

        Raises:
            ValueError: they make none.
        """
        return check_classes(
            self.unet,
            self.id2label,
            num_images,
            len(self.trained_scheduler),
            class_labels,
            guidance_scale,
            guidance_interval,
        )

    def _answer(self, x_t: Tensor, t: int | Tensor, class_labels: Any, guidance_scale: Any) -> Tensor:
        """The network's output at x_t, (B, C, H, W): of a network that learns variances, the first half."""
        check_images(x_t)
        self.check_shape(tuple(x_t.shape[1:]))
        t = t if isinstance(t, Tensor) else as_numbers("t", t, "one step, or one per image")
        steps = self.process.timesteps_at(t)
        if steps.shape not in ((), x_t.shape[:1]):
            raise ValueError(
                f"t has shape {tuple(steps.shape)} for {len(x_t)} images; allowed: one step, or one per image"
            )
        x = x_t.to(self._weight.dtype) if isinstance(self.unet, nn.Module) else x_t
        denoise = self.check_classes(len(x_t), class_labels, guidance_scale).denoiser(self.unet)
        output = denoise(x, steps.to(x_t.device).expand(len(x_t)))
        return output[:, : x_t.shape[1]]

    def check_shape(self, shape: Sequence[int]) -> None:
        """Refuse images that the network can't take.

        Args:
            shape: (C, H, W) of the images.

        Raises:
            ValueError: a UNet has other channels or halves a side that is odd, an autoencoder another shape.
        """
        allowed = ""
        if isinstance(self.unet, UNet2DModel):
            channels = self.unet.config["in_channels"]
            multiple = 2 ** (len(self.unet.config["block_out_channels"]) - 1)
            if shape[0] != channels or any(side % multiple for side in shape[1:]):
                allowed = f"({channels}, H, W) with H and W multiples of {multiple}, which the UNet halves"
        elif isinstance(self.unet, Autoencoder) and tuple(shape) != self.unet.image_shape:
            allowed = f"{self.unet.image_shape}, which the network was made for"
        if allowed:
            raise ValueError(f"image_shape is {shape!r}; allowed: {allowed}")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images, as the pipeline was told, or from the network's config.

        Raises:
            ValueError: neither says it.
        """
        if self._image_shape is not None:
            return self._image_shape
        config = getattr(self.unet, "config", None)
        if config is None or getattr(config, "sample_size", None) is None:
            raise ValueError(
                f"{type(self.unet).__name__} has no config with a sample_size; pass image_shape=(C, H, W)"
            )
        height, width = np.broadcast_to(config.sample_size, 2).tolist()
        return config.in_channels, height, width

    @property
    def shape_or_none(self) -> tuple[int, int, int] | None:
        """`image_shape`; None where it is not known."""
        try:
            return self.image_shape
        except ValueError:
            return None

    @property
    def device(self) -> torch.device:
        """Where the network is. It need not be one of diffusers' models, which alone know their device."""
        return self._weight.device

    def to(self: Pipeline, *args: Any, **kwargs: Any) -> Pipeline:
        """Move the network in place: diffusers' `to`, or `nn.Module.to` of a network of another kind."""
        if isinstance(self.unet, nn.Module) and not hasattr(self.unet, "dtype"):
            self.unet.to(*args, **kwargs)
            return self
        return super().to(*args, **kwargs)

    @property
    def _weight(self) -> Tensor:
        """Any of the network's weights, for its device and dtype; an empty tensor where it has none."""
        parameters = self.unet.parameters() if isinstance(self.unet, nn.Module) else iter(())
        return next((p for p in parameters if p.is_floating_point()), torch.empty(0))
