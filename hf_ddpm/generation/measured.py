"""What a pipeline does with its network's measured errors: its scheduler's variance, and how a sample ends.

The last step of a sampler gives a predicted x_0. A sample is that, or a grey level u of the law

    P(u | x_t) ∝ G(u) N(level(u); x̂_0, σ²),        level(u) = u/127.5 − 1

which is the decoder "levels" of the bound (decoders.py), with σ of the last step that was visited: its
likeliest level, or a draw. What is measured and how, `hf-ddpm plan` knows.
"""

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from hf_ddpm.decoders import LevelsDecoder
from hf_ddpm.likelihood.errors import Errors
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.spelling import did_you_mean
from hf_ddpm.variances import MEASURED

ENDINGS = ("mean", "mode", "draw")
CHUNK = 2**22  # probabilities that are held at once


def check_ending(ending: Any) -> None:
    """Refuse what is no way to end a sample.

    Raises:
        ValueError: it is not one of `ENDINGS` (the nearest is named).
    """
    if not isinstance(ending, str) or ending not in ENDINGS:
        hint = did_you_mean(ending, ENDINGS)
        raise ValueError(f"ending is {ending!r:.40}{hint}; allowed: {', '.join(ENDINGS)}")


def measured_errors(pipeline: Any, what: str) -> Errors:
    """The measured errors of a pipeline's network: those assigned to its scheduler, or those of its folder.

    Args:
        pipeline: the pipeline.
        what: why they are needed, the beginning of an error: "ending is 'mode'".

    Raises:
        ValueError: there are none, they are damaged, of another network or process, or were measured with
            another clipping of the predicted x_0 than the scheduler's.
    """
    scheduler = pipeline.scheduler
    own = scheduler.errors if isinstance(scheduler, DDPMScheduler) else None
    if own is not None and own is not getattr(pipeline, "_given_errors", None):
        return own
    found = pipeline.errors
    if found is None:
        raise ValueError(f"{what}; allowed: after hf-ddpm plan has measured the model's errors")
    if isinstance(scheduler, DDPMScheduler):
        config = scheduler.config
        within = config["clip_sample"] and config["clip_sample_range"] == 1 and not config["thresholding"]
        free = not config["clip_sample"] and not config["thresholding"]
        if not (within if found.of.clip_x0 else free):
            allowed = f"clip_sample={found.of.clip_x0}" + ", clip_sample_range=1" * found.of.clip_x0
            raise ValueError(
                f"{what}, but the errors were measured with clip_x0 {found.of.clip_x0} and the scheduler "
                f"clips otherwise; allowed: {allowed}, thresholding=False"
            )
    return found.errors


def give_errors(pipeline: Any) -> None:
    """Give the pipeline's scheduler the measured errors, if its variance is made of them.

    Raises:
        ValueError: as in `measured_errors`.
    """
    scheduler = pipeline.scheduler
    if isinstance(scheduler, DDPMScheduler) and scheduler.variance_type in MEASURED:
        found = measured_errors(pipeline, f"variance_type is {scheduler.variance_type!r}")
        if found is not scheduler.errors:
            pipeline._given_errors = scheduler.errors = found


def ending_decoder(pipeline: Any, ending: str) -> LevelsDecoder | None:
    """The law of the grey levels with which samples end; None where they end with the predicted x_0.

    Args:
        pipeline: whose scheduler has its steps already.
        ending: one of `ENDINGS`.

    Raises:
        ValueError: as in `check_ending` and `measured_errors`, or the last step is too noisy for any law of
            the grey levels, as that of "trailing" is.
    """
    check_ending(ending)
    if ending == "mean":
        return None
    errors = measured_errors(pipeline, f"ending is {ending!r}")
    last = int(torch.as_tensor(pipeline.scheduler.timesteps).min().round())
    try:
        return errors.decoder(pipeline.process.respaced([last]))
    except ValueError as error:  # such as a last step that is too noisy
        raise ValueError(f"ending is {ending!r}, but {error}") from None


def ended(
    x_0: Tensor,
    decoder: LevelsDecoder | None,
    ending: str,
    generator: torch.Generator | list[torch.Generator] | None,
) -> Tensor:
    """The samples that predicted images end with.

    Args:
        x_0: predicted images, (B, C, H, W).
        decoder: of `ending_decoder`; with None, `x_0` itself is returned.
        ending: "mode", the likeliest grey level of each pixel, or "draw", one by its probability.
        generator: of the draw, one `randn_tensor` of the shape of `x_0`.

    Returns:
        Images on the levels u/127.5 − 1, shape of `x_0`, on the CPU in float32.
    """
    if decoder is None:
        return x_0
    mean = x_0.detach().cpu().double()  # in this order, as Apple's MPS has no float64
    chance = torch.zeros_like(mean)
    if ending == "draw":
        noise = randn_tensor(x_0.shape, generator=generator, device=x_0.device, dtype=torch.float32)
        chance = torch.special.ndtr(noise.cpu().double())
    rows = max(1, CHUNK // (256 * mean.shape[1] * mean.shape[3]))
    found = torch.empty(mean.shape)
    for i in range(len(mean)):
        for row in range(0, mean.shape[2], rows):
            part = slice(i, i + 1), slice(None), slice(row, row + rows)
            log_p = decoder.log_probabilities(mean[part])
            if ending == "mode":
                level = log_p.argmax(-1)
            else:
                level = (log_p.exp().cumsum(-1) < chance[part][..., None]).sum(-1).clamp(max=255)
            found[part] = (level.double() / 127.5 - 1).float()
    return found
