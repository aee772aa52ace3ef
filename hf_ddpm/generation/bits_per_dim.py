"""The bound of a few images under a pipeline's network: images of any usual form → Estimate.

What the bound is, likelihood/ knows; whole data sets, shared by processes, are evaluation/'s.
"""

from typing import Any

from torch import Tensor, nn

from hf_ddpm.decoders import AnyDecoder, LevelsDecoder
from hf_ddpm.denoiser import as_denoiser, scoring_device
from hf_ddpm.generation.given import as_images
from hf_ddpm.likelihood import Estimate, estimate_bound
from hf_ddpm.likelihood.errors import MEASURED, Errors
from hf_ddpm.variances import AnyVariance, plain_name


def bits_per_dim(
    pipeline: Any,
    images: Any,
    num_evals_per_image: int,
    seed: int,
    batch_size: int,
    variance_type: str | None,
    clip_x0: bool,
    decoder: AnyDecoder,
) -> Estimate:
    """The bound of images, by `estimate_bound`; arguments and errors as in `DDPMPipeline.bits_per_dim`."""
    if variance_type is None:  # a sampler that has none leaves it to what the network was trained for
        own = pipeline.trained_scheduler.config["variance_type"]
        variance_type = plain_name(getattr(pipeline.scheduler, "config", {}).get("variance_type", own))
    variance = measured_variance(pipeline, variance_type, clip_x0)
    device = scoring_device(pipeline.device)
    x_0 = as_images(images, pipeline.image_shape).to(device)
    network, weight = pipeline.unet, next(iter(_weights(pipeline.unet)), None)
    denoise = as_denoiser(network, pipeline.device)

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        answer = denoise(x_t if weight is None else x_t.to(weight.dtype), t)
        return answer if isinstance(variance, str) else answer[:, : x_t.shape[1]]

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
            variance_type=variance,
            prediction_type=pipeline.prediction_type,
            clip_x0=clip_x0,
            decoder=measured_decoder(pipeline, decoder, clip_x0),
        )
    finally:
        if was_training:
            network.train()


def measured_variance(pipeline: Any, variance_type: str, clip_x0: bool) -> AnyVariance:
    """The variance of that name; of "optimal" and "by-value" the numbers that were measured.

    Raises:
        ValueError: the pipeline's folder has no errors, or they were measured with another `clip_x0`.
    """
    if variance_type not in MEASURED:
        return variance_type
    errors = _errors(pipeline, f"variance_type is {variance_type!r}", clip_x0)
    return errors.variance(pipeline.process, variance_type)


def measured_decoder(pipeline: Any, decoder: AnyDecoder, clip_x0: bool) -> AnyDecoder:
    """The decoder of that name; of "levels" the numbers that were measured.

    Raises:
        ValueError: as in `measured_variance`.
    """
    if isinstance(decoder, LevelsDecoder) or decoder != "levels":
        return decoder
    return _errors(pipeline, f"decoder is {decoder!r}", clip_x0).decoder(pipeline.process, "levels")


def _errors(pipeline: Any, what: str, clip_x0: bool) -> Errors:
    """The errors that were measured of a pipeline's network, for a bound with this `clip_x0`."""
    if (found := pipeline.errors) is None:
        raise ValueError(f"{what}; allowed: after hf-ddpm plan has measured it")
    if found.of.clip_x0 != clip_x0:
        raise ValueError(
            f"clip_x0 is {clip_x0}, but the errors were measured with {found.of.clip_x0}; allowed: equal"
        )
    return found.errors


def _weights(network: Any) -> list[Tensor]:
    parameters = network.parameters() if isinstance(network, nn.Module) else ()
    return [weight for weight in parameters if weight.is_floating_point()]
