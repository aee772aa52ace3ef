"""The bound of a few images under a pipeline's network: images of any usual form → Estimate.

What the bound is, likelihood/ knows; whole data sets, shared by processes, are evaluation/'s.
"""

from typing import Any, Literal

from torch import Tensor, nn

from hf_ddpm.denoiser import as_denoiser, scoring_device
from hf_ddpm.generation.given import as_images
from hf_ddpm.likelihood import Estimate, estimate_bound
from hf_ddpm.variances import plain_name


def bits_per_dim(
    pipeline: Any,
    images: Any,
    num_evals_per_image: int,
    seed: int,
    batch_size: int,
    variance_type: str | None,
    clip_x0: bool,
    decoder: Literal["exact", "tanh"],
) -> Estimate:
    """The bound of images, by `estimate_bound`; arguments and errors as in `DDPMPipeline.bits_per_dim`."""
    if variance_type is None:  # a sampler that has none leaves it to what the network was trained for
        own = pipeline.trained_scheduler.config["variance_type"]
        variance_type = plain_name(getattr(pipeline.scheduler, "config", {}).get("variance_type", own))
    device = scoring_device(pipeline.device)
    x_0 = as_images(images, pipeline.image_shape).to(device)
    network, weight = pipeline.unet, next(iter(_weights(pipeline.unet)), None)
    denoise = as_denoiser(network, pipeline.device)

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        return denoise(x_t if weight is None else x_t.to(weight.dtype), t)

    was_training = isinstance(network, nn.Module) and network.training
    try:
        if was_training:
            network.eval()
        return estimate_bound(
            pipeline.process,
            model,
            x_0,
            num_evals_per_image=num_evals_per_image,
            seed=seed,
            batch_size=batch_size,
            variance_type=variance_type,
            prediction_type=pipeline.prediction_type,
            clip_x0=clip_x0,
            decoder=decoder,
        )
    finally:
        if was_training:
            network.train()


def _weights(network: Any) -> list[Tensor]:
    parameters = network.parameters() if isinstance(network, nn.Module) else ()
    return [weight for weight in parameters if weight.is_floating_point()]
