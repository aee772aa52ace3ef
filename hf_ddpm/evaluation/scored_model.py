"""The model that is evaluated: a pipeline's network, and the process and variance that it is scored with.

What would make the numbers false is refused, such as a scheduler that contradicts the training record beside
it.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_ddpm.config import TrainConfig, make_scheduler
from hf_ddpm.decoders import NAMED, AnyDecoder
from hf_ddpm.denoiser import Denoiser, as_denoiser, num_classes, scoring_device
from hf_ddpm.folders.errors import StoredErrors, network_digest, read_errors
from hf_ddpm.folders.layout import ERRORS, RECORD, TRAINED_ON
from hf_ddpm.folders.values import MAX_STEPS, NEEDED
from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.generation.runs import load_run
from hf_ddpm.generation.samplers import training_scheduler
from hf_ddpm.guidance import Conditioned
from hf_ddpm.likelihood.errors import MEASURED
from hf_ddpm.parametrization import PREDICTION_TYPES
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.runtime.messages import one_line
from hf_ddpm.runtime.untrusted import read_json
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.schedules import quadratic_steps
from hf_ddpm.shown import fields_line
from hf_ddpm.spacing import sampling_steps
from hf_ddpm.variances import FIXED, LEARNED, AnyVariance, plain_name

# A scheduler's settings that an error names when they differ from those of the training record
PROCESS_KEYS = (*NEEDED, "rescale_betas_zero_snr")


@dataclass(frozen=True, eq=False)
class ScoredModel:
    """A model, ready to be scored.

    Attributes:
        pipeline: the model, on its device, in eval mode.
        process: the chain, full or respaced.
        prediction_type: what the network's answer means.
        variance_type: the reverse variance it is scored with, by name.
        decoder_name: the decoder it is scored with, by name.
        learns: whether the network learns variances, which then are the second half of its answer.
        errors: the measured errors, where the variance, the decoder or the steps are made of them, else None.
        record: the training run's config, None where the model has none.
        data_record: what the run says of the images that it was trained on (`ImageStream.facts`); None where
            it says nothing.
    """

    pipeline: DDPMPipeline
    process: DiffusionProcess
    prediction_type: str
    variance_type: str
    decoder_name: str
    learns: bool
    errors: StoredErrors | None
    record: TrainConfig | None
    data_record: Mapping[str, Any] | None = None

    __repr__ = fields_line

    @property
    def other_variance(self) -> Literal["fixed_small", "fixed_large"] | None:
        """The other fixed variance, which can be scored without the network; None if this one is learned."""
        others: Any = [name for name in FIXED if name != self.variance_type]
        return others[0] if self.variance_type in FIXED else None

    @functools.cached_property
    def variance(self) -> AnyVariance:
        """The variance as `likelihood` takes it: a name, or numbers that were measured."""
        if self.variance_type not in MEASURED:
            return self.variance_type
        assert self.errors is not None
        return self.errors.errors.variance(self.process, self.variance_type)

    @functools.cached_property
    def decoder(self) -> AnyDecoder:
        """The decoder as `likelihood` takes it: a name, or numbers that were measured."""
        if self.decoder_name in NAMED:
            return self.decoder_name
        assert self.errors is not None
        return self.errors.errors.decoder(self.process, self.decoder_name)

    @property
    def denoiser(self) -> Denoiser:
        """The network as `likelihood` calls it: without its own variances where others are scored."""
        denoiser = as_denoiser(self.pipeline.unet, self.pipeline.device)
        if not self.learns or self.variance_type in LEARNED:
            return denoiser
        return lambda x_t, t: denoiser(x_t, t)[:, : x_t.shape[1]]

    def given(self, label: int | Tensor) -> Denoiser:
        """The network as `denoiser`, for one class of all images, or one of each, (B,); C is "no class"."""
        conditioned = as_denoiser(Conditioned(self.pipeline.unet, label), self.pipeline.device)
        if not self.learns or self.variance_type in LEARNED:
            return conditioned
        return lambda x_t, t: conditioned(x_t, t)[:, : x_t.shape[1]]

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes, by default their numbers; None of a model without classes."""
        count, names = num_classes(self.pipeline.unet), self.pipeline.id2label or {}
        return None if count is None else tuple(names.get(y, str(y)) for y in range(count))

    @property
    def device(self) -> torch.device:
        """Where the bound is computed."""
        return scoring_device(self.pipeline.device)

    @functools.cached_property
    def process_digest(self) -> str:
        """Sixteen hex digits of the process and of what the network's answer means."""
        found = hashlib.sha256(f"{self.prediction_type} {self.process.first_log_variance}".encode())
        for table in (self.process.betas, self.process.timesteps):
            found.update(table.numpy().tobytes())
        return found.hexdigest()[:16]

    @functools.cached_property
    def weights_digest(self) -> str:
        """Sixteen hex digits of the network's weights and config."""
        return network_digest(self.pipeline.unet)


def load_scored_model(
    model: str,
    device: torch.device,
    variance_type: str | None = None,
    steps: int | None = None,
    first_variance: Literal["spaced", "full"] = "spaced",
    chain: str = "even",
    errors: str | None = None,
    network: nn.Module | None = None,
    decoder: str = "exact",
    last_step: int | None = None,
) -> ScoredModel:
    """Load a pipeline folder or Hub id, also one that plain diffusers wrote.

    Args:
        model: folder or Hub id.
        device: where the network goes.
        variance_type: "fixed_small" or "fixed_large", for a network that learns none; "optimal" or
            "by-value" of measured errors; by default the scheduler's.
        steps: K of the respaced chain; by default all T.
        first_variance: σ_0² of a respaced chain, see `DiffusionProcess.respaced`.
        chain: which K steps: "even", by the scheduler's own spacing, "quadratic", or "chosen" by the measured
            errors as the best ones for the variance.
        errors: folder of the measured errors, by default the model's.
        network: for a run of a module of somebody's own: such a module, as `load_run` takes it.
        decoder: of L_0: "exact", "tanh", or "levels" of measured errors.
        last_step: where a chosen chain is to end; by default at the best step for the decoder.

    Raises:
        ValueError: a bad model, a scheduler that contradicts the training record, a variance that the network
            can't be scored with, or an impossible number of steps.
    """
    pipeline = (DDPMPipeline.from_pretrained(model) if network is None else load_run(model, network)).to(
        device
    )
    if isinstance(pipeline.unet, nn.Module):
        pipeline.unet.eval()
    try:
        scheduler: Any = training_scheduler(pipeline.scheduler)
    except ValueError as error:
        raise ValueError(f"model {model!r}: {error}") from error
    prediction_type = scheduler.config["prediction_type"]
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"the scheduler of {model!r} has prediction_type {prediction_type!r}; "
            f"allowed: {', '.join(PREDICTION_TYPES)}"
        )
    own = plain_name(scheduler.variance_type)
    if variance_type in FIXED and own in LEARNED:
        raise ValueError(
            f"variance_type is {variance_type!r}, but the network learns its own ({own}); allowed: none, "
            f"{', '.join(MEASURED)}"
        )
    if own not in (known := (*FIXED, *LEARNED, *MEASURED)):
        raise ValueError(f"the scheduler of {model!r} has variance_type {own!r}; allowed: {', '.join(known)}")
    process, scored = scheduler.process, variance_type or own
    stored = None
    if scored in MEASURED or chain == "chosen" or decoder not in NAMED:
        stored = _measured_errors(pipeline, scheduler, model, errors)
    if steps is not None:
        if steps > len(process):
            raise ValueError(f"steps is {steps}; allowed: <= {len(process)} (T)")
        kept = _kept_steps(scheduler, steps, chain, stored, scored, decoder, last_step)
        process = process.respaced(kept, first_variance)
    if len(process) < 2:
        raise ValueError(f"the process of {model!r} has one step; allowed: at least 2")
    record, facts = _read_record(model, scheduler), Path(model).expanduser() / TRAINED_ON
    return ScoredModel(
        pipeline=pipeline,
        process=process,
        prediction_type=prediction_type,
        variance_type=scored,
        decoder_name=decoder,
        learns=own in LEARNED,
        errors=stored,
        record=record,
        data_record=read_json(facts) if record is not None and facts.exists() else None,
    )


def _measured_errors(
    pipeline: DDPMPipeline, scheduler: DDPMScheduler, model: str, errors: str | None
) -> StoredErrors:
    """The measured errors of a model, from its own folder or another one.

    Raises:
        ValueError: there are none, or they are of another model.
    """
    if errors is None:
        found = pipeline.errors
        if found is None:
            raise ValueError(
                f"model {model!r} has no {ERRORS}; allowed: after hf-ddpm plan, or its folder as errors"
            )
        return found
    place = Path(errors).expanduser()
    return read_errors(
        place.parent if place.name == ERRORS else place,
        scheduler.process,
        scheduler.config["prediction_type"],
        network_digest(pipeline.unet),
    )


def _kept_steps(
    scheduler: DDPMScheduler,
    steps: int,
    chain: str,
    stored: StoredErrors | None,
    variance_type: str,
    decoder: str,
    last_step: int | None,
) -> Sequence[int]:
    """The K steps of a chain, in the network's numbering."""
    if chain == "quadratic":
        return quadratic_steps(len(scheduler.process), steps)
    if chain == "chosen":
        assert stored is not None
        # Of a learned variance no table is known; it is nearest to the optimal one
        kind = "optimal" if variance_type in LEARNED else variance_type
        costed = "exact" if decoder in NAMED else decoder  # the published formula's costs are nearly those
        try:
            return stored.errors.best_chains(kind, steps, costed, last_step).steps(steps)
        except ValueError as error:
            if last_step is None:
                raise
            raise ValueError(f"last_step is {last_step} for {steps} steps: {error}") from None
    spacing, offset = scheduler.config["timestep_spacing"], scheduler.config["steps_offset"]
    return sampling_steps(scheduler.process, spacing, steps, offset).tolist()


def _read_record(model: str, scheduler: DDPMScheduler) -> TrainConfig | None:
    """The training run's config, if the model's folder has one; it must agree with the scheduler."""
    file = Path(model).expanduser() / RECORD
    if not file.exists():
        return None
    try:
        record = TrainConfig.of_run(file)
    except ValueError as error:  # which may show a stranger's value whole
        raise ValueError(one_line(error)) from None
    if record.num_train_timesteps > MAX_STEPS:
        raise ValueError(
            f"{RECORD}: num_train_timesteps is {record.num_train_timesteps}; allowed: at most {MAX_STEPS}"
        )
    trained = make_scheduler(record)
    same = scheduler.process.betas.shape == trained.process.betas.shape and torch.allclose(
        scheduler.process.betas, trained.process.betas, rtol=1e-9, atol=0
    )
    keys = [key for key in PROCESS_KEYS if scheduler.config[key] != trained.config[key]]
    if not same or "prediction_type" in keys:
        differ = ", ".join(
            f"{key} {scheduler.config[key]!r}, trained {trained.config[key]!r}" for key in keys
        )
        raise ValueError(
            f"the scheduler of {model!r} contradicts its {RECORD}: {differ or 'other betas'}; "
            "allowed: the process that the network was trained with"
        )
    return record
