"""The model that is evaluated: a pipeline's network, and the process and variance that it is scored with.

What would make the numbers false is refused, such as a scheduler that contradicts the training record beside
it.
"""

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_ddpm.config import TrainConfig, make_scheduler
from hf_ddpm.denoiser import Denoiser, as_denoiser, scoring_device
from hf_ddpm.folders.layout import RECORD, TRAINED_ON
from hf_ddpm.folders.values import MAX_STEPS, NEEDED
from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.generation.runs import load_run
from hf_ddpm.generation.samplers import training_scheduler
from hf_ddpm.models import weights_digest
from hf_ddpm.parametrization import PREDICTION_TYPES
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.runtime.messages import one_line
from hf_ddpm.runtime.untrusted import read_json
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.shown import fields_line
from hf_ddpm.variances import FIXED, LEARNED, plain_name

# A scheduler's settings that an error names when they differ from those of the training record
PROCESS_KEYS = (*NEEDED, "rescale_betas_zero_snr")


@dataclass(frozen=True, eq=False)
class ScoredModel:
    """A model, ready to be scored.

    Attributes:
        pipeline: the model, on its device, in eval mode.
        process: the chain, full or respaced.
        prediction_type: what the network's answer means.
        variance_type: the reverse variance it is scored with.
        record: the training run's config, None where the model has none.
        data_record: what the run says of the images that it was trained on (`ImageStream.facts`); None where
            it says nothing.
    """

    pipeline: DDPMPipeline
    process: DiffusionProcess
    prediction_type: str
    variance_type: str
    record: TrainConfig | None
    data_record: Mapping[str, Any] | None = None

    __repr__ = fields_line

    @property
    def other_variance(self) -> Literal["fixed_small", "fixed_large"] | None:
        """The other fixed variance, which can be scored without the network; None if this one is learned."""
        others: Any = [name for name in FIXED if name != self.variance_type]
        return others[0] if self.variance_type in FIXED else None

    @property
    def denoiser(self) -> Denoiser:
        """The network as `likelihood` calls it."""
        return as_denoiser(self.pipeline.unet, self.pipeline.device)

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
        weights: dict[str, Tensor] = self.pipeline.unet.state_dict()  # type: ignore[assignment]
        return weights_digest(getattr(self.pipeline.unet, "config", {}), weights)


def load_scored_model(
    model: str,
    device: torch.device,
    variance_type: str | None = None,
    steps: int | None = None,
    first_variance: Literal["spaced", "full"] = "spaced",
    network: nn.Module | None = None,
) -> ScoredModel:
    """Load a pipeline folder or Hub id, also one that plain diffusers wrote.

    Args:
        model: folder or Hub id.
        device: where the network goes.
        variance_type: "fixed_small" or "fixed_large", for a network that learns none; by default the
            scheduler's.
        steps: K of the respaced chain, by the scheduler's own spacing; by default all T.
        first_variance: σ_0² of a respaced chain, see `DiffusionProcess.respaced`.
        network: for a run of a module of somebody's own: such a module, as `load_run` takes it.

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
    if variance_type is not None and own in LEARNED:
        raise ValueError(
            f"variance_type is {variance_type!r}, but the network learns its own ({own}); allowed: none"
        )
    if own not in (*FIXED, *LEARNED):
        raise ValueError(
            f"the scheduler of {model!r} has variance_type {own!r}; allowed: {', '.join((*FIXED, *LEARNED))}"
        )
    process = scheduler.process
    if steps is not None:
        if steps > len(process):
            raise ValueError(f"steps is {steps}; allowed: <= {len(process)} (T)")
        scheduler.set_timesteps(steps)
        process = process.respaced(scheduler.timesteps, first_variance)
    if len(process) < 2:
        raise ValueError(f"the process of {model!r} has one step; allowed: at least 2")
    record, facts = _read_record(model, scheduler), Path(model).expanduser() / TRAINED_ON
    data_record = read_json(facts) if record is not None and facts.exists() else None
    return ScoredModel(pipeline, process, prediction_type, variance_type or own, record, data_record)


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
