"""A training run: all that a checkpoint is made of, gathered into one and restored from one.

The run's folder is its pipeline's folder too, of weights averaged with each decay, for diffusers to load:

    RUN/model_index.json   scheduler/   unet/diffusion_pytorch_model.safetensors            the first decay
                                        unet/diffusion_pytorch_model.ema_0_999.safetensors  another, a variant
"""

import contextlib
import copy
import dataclasses
import functools
import gc
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast, extract_model_from_parallel
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from hf_ddpm.config import TrainConfig, make_scheduler
from hf_ddpm.data.holdout import BEFORE
from hf_ddpm.data.stream import ImageStream
from hf_ddpm.denoiser import as_denoiser
from hf_ddpm.folders.labels import write_labels
from hf_ddpm.folders.layout import GRIDS, HELDOUT, INDEX, RUN, STEP, TRAINED_ON, UNET, variant_name
from hf_ddpm.folders.output import check_run_folder, output_folder
from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.generation.runs import save_own_network
from hf_ddpm.objectives import Objective, make_objective, per_example
from hf_ddpm.process import PRIOR_WARNING
from hf_ddpm.runtime.disk import delete_partials, update_folder
from hf_ddpm.runtime.lock import FolderLock
from hf_ddpm.runtime.messages import one_line
from hf_ddpm.runtime.processes import on_main_process
from hf_ddpm.training.averages import REST, average_of, prepare_average, rest_of
from hf_ddpm.training.batches import SkippedRows, make_batches, share_steps
from hf_ddpm.training.checkpoint import Checkpoint, save_checkpoint, set_newer_aside
from hf_ddpm.training.classes import NAMES, LastImages, tell_classes
from hf_ddpm.training.heldout import HeldOut, count_seen_before, trained_before
from hf_ddpm.training.importance import LossSecondMoment, UniformSteps
from hf_ddpm.training.launch import make_accelerator
from hf_ddpm.training.network import (
    describe_choice,
    make_model,
    make_optimizer,
    make_schedule,
    prepare_model,
    settle_model,
)
from hf_ddpm.training.resume import check_objective, find_checkpoint, open_data, versions
from hf_ddpm.training.sample_grids import SampleGrids
from hf_ddpm.training.sharding import (
    all_finite,
    check_moments,
    check_weights,
    gather_model,
    gather_optimizer,
    restore_model,
    restore_optimizer,
)

logger = logging.getLogger(__name__)

OwnObjective = Objective | Callable[..., Tensor]  # what a caller may hand over instead of a name


@contextlib.contextmanager
def open_run(
    config: TrainConfig, model: nn.Module | None = None, objective: str | OwnObjective | None = None
) -> Iterator["Run"]:
    """A run whose folder no other command can write into in this context.

    Args:
        config: the run.
        model: the network; None for the one that the config names.
        objective: what is minimised, as in `train`; None for what the config names.

    Raises:
        ValueError: bad input, as in `Run`, or a launch that can't be served.
    """
    precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    config = dataclasses.replace(config, mixed_precision=precision)
    if isinstance(objective, str):
        config, objective = dataclasses.replace(config, objective=objective), None
    accelerator = make_accelerator(config)
    folder = Path(config.output_dir)
    with output_folder(folder, "output_dir", check_run_folder, accelerator) as lock:
        yield Run(config, accelerator, lock, model, objective)


class Run:
    """A run at some step, made from its config or from the checkpoint to go on from.

    Args:
        config: the run, whose `mixed_precision` is resolved.
        accelerator: the processes.
        lock: of the run's folder, which process 0 holds.
        model: the network; None for the one that the config names.
        objective: what is minimised; None for what the config names.

    Attributes:
        config: the run's choices.
        folder: the run's folder.
        accelerator: processes, device and precision.
        step: optimizer steps done.
        first: the step that it started at in this call.
        share: this process's part of each step.
        scheduler: its config is saved with the pipeline; `process` is its process.
        process: q(x_t | x_0) and all that follows from it.
        shape: (C, H, W) of the images.
        rows: images of the data set.
        class_names: of the images' classes, by their numbers; None for a run without classes.
        last: the images of the last micro-step of a run with classes.
        objective: what is minimised.
        steps: how t is chosen.
        cost: what a network that answers zero would lose at each t, (T,), float32, on the device.
        model: the network, in float32; its share, where FSDP shares it out.
        averages: for each decay, as text, the averaged network.
        network: the model as it is called in training: compiled, and wrapped by the launch.
        denoiser: `network` as a denoiser (x_t, t) → output.
        optimizer: AdamW over the model's weights.
        stepper: the optimizer as accelerate steps it.
        schedule: of the learning rate.
        lr: learning rate of the last step; 0 before there is one.
        batches: this process's images from the step on, without end.
        skipped: which images could not be read.
        grids: sample grids of the averaged network.
        heldout: the bound of held-out images; None if the config asks for none.
        is_own: whether the network or the objective is the caller's, so that no command can make them.
        state: plain numbers of the checkpoint that it started from; empty for a new run.

    Raises:
        ValueError: bad input: data, model, folder, or a config that differs from the run to go on from.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        lock: FolderLock,
        model: nn.Module | None = None,
        objective: OwnObjective | None = None,
    ):
        self.config, self.folder, self.accelerator = config, Path(config.output_dir), accelerator
        self._lock = lock
        # The checkpoint to go on from, and this process's share of a step
        start = find_checkpoint(config, self.folder, accelerator)
        self.state: Mapping[str, Any] = {} if start is None else start.state
        self.step = self.first = 0 if start is None else start.step
        self.share = share_steps(config, accelerator, self.state)

        # The process, and the images
        self.scheduler = make_scheduler(config)
        self.process = self.scheduler.process
        if accelerator.is_main_process and self.process.prior_bpd_at_edges > PRIOR_WARNING:
            logger.warning(
                "the schedule ends %.3g bits/dim short of pure noise", self.process.prior_bpd_at_edges
            )
        stream, self._data = open_data(config, self.state, accelerator, model)
        before = trained_before(config, self.folder, bool(self.state))
        self._trained_on = stream.facts(self._data) | ({BEFORE: before} if before else {})
        self.shape, self.rows, self.class_names = stream.shape, stream.num_rows(), stream.class_names
        self.last: LastImages | None = None
        if stream.class_counts is not None:
            self._trained_on["class_counts"] = stream.class_counts
            tell_classes(config, stream)
        if accelerator.is_main_process:
            _tell_images(config, stream, before)
        asked = config.model
        self.config = config = settle_model(config, stream, self.state, model is not None)
        self.is_own = model is not None or objective is not None
        self.heldout = HeldOut(config, self.folder, accelerator, stream) if config.evaluate_every else None
        self.grids = SampleGrids(
            config, self.folder, accelerator, self.scheduler, stream.shape, stream.class_names
        )

        # What is minimised, and at which steps
        self._own_objective = None if objective is None else _name_of(objective)
        check_objective(self._own_objective, self.state)
        self.objective = make_objective(
            config.objective if objective is None else objective,
            prediction_type=config.prediction_type,
            variance_type=config.variance_type,
            snr_gamma=config.snr_gamma,
            hybrid_weight=config.hybrid_weight,
        )
        if self._own_objective is not None and accelerator.is_main_process:
            logger.warning(
                "the objective is %s; train_config.json, and a card made from it, name the config's: %s",
                self._own_objective,
                config.objective,
            )
        kind = LossSecondMoment if config.t_sampler == "importance" else UniformSteps
        self.steps: LossSecondMoment | UniformSteps = kind(len(self.process), accelerator.device)

        # The network, its averages and its optimizer
        if model is None:
            unet = make_model(config, stream, self.scheduler)
        else:  # the launch wraps it, and the config says whether it is compiled
            unet = extract_model_from_parallel(model, keep_torch_compile=False)
        if config.model != asked and start is None and accelerator.is_main_process:
            logger.warning("%s", describe_choice(config.model, unet, stream.shape))
        self.model = prepare_model(unet, config, stream, accelerator)
        sharded = accelerator.distributed_type == DistributedType.FSDP
        # Where processes share the averages out, a whole network to save them from
        self._shell = copy.deepcopy(self.model).cpu() if sharded else None
        self.averages = {name: average_of(self.model) for name in config.ema_decays}
        self.optimizer = make_optimizer(config, self.model)
        self.schedule = make_schedule(config, self.optimizer, self.first)
        self.lr = 0.0
        called = torch.compile(self.model) if config.compile else self.model
        self.network, self.stepper = accelerator.prepare(called, self.optimizer)
        if sharded:
            share_out = functools.partial(fsdp2_prepare_model, accelerator)
            for name, average in self.averages.items():
                self.averages[name] = prepare_average(average, share_out)
        self.denoiser = as_denoiser(self.network)
        if start is not None:
            self.restore(start)
        self.skipped = SkippedRows(stream, accelerator, self.state)
        self.batches = make_batches(stream, config, self.share, accelerator.device, self.first, self.skipped)
        cost = self.objective.cost_of_zero(self.process, self.shape, accelerator.device)
        self.cost = cost.float().to(accelerator.device)

    @property
    def averaged(self) -> nn.Module:
        """The network averaged with the first decay, which is the pipeline's."""
        return next(iter(self.averages.values()))

    def due(self, every: int) -> bool:
        """Whether something that is done at every so many steps, and at the last, is done at this one."""
        return every > 0 and self.step > 0 and (self.step == self.config.max_steps or self.step % every == 0)

    @property
    def shows(self) -> bool:
        """Whether pictures or the held-out bound are due at this step."""
        return self.due(self.config.sample_every) or self.due(self.config.evaluate_every)

    def begin(self) -> None:
        """Make the folder ready for the run's files, once it is sure that there will be some.

        All processes call it together.

        Raises:
            OSError: the folder can't be written.
        """
        self.write(self._tidy)

    def gather(self, noted: Mapping[str, Any]) -> Checkpoint:
        """All of the run as a checkpoint, whole on process 0; all processes call it together.

        Args:
            noted: `RunLog.state`'s.

        Raises:
            RuntimeError: the weights are not finite.
        """
        # DDP shares the model's buffers, but not the averages': process 0's count
        for average in self.averages.values():
            for buffer in average.buffers():
                broadcast(buffer)
        finite: Tensor = self.accelerator.reduce(all_finite(self.model), "mean")  # type: ignore[assignment]
        if finite != 1:
            raise RuntimeError(
                f"the weights are not finite at step {self.step}; checkpoints from before stand"
            )
        averages = self._gather_averages()
        scaler = {} if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()
        optimizers = {"optimizer": gather_optimizer(self.model, self.optimizer), "scaler": scaler}
        if losses := self.steps.state_dict():
            optimizers["t_sampler"] = losses
        world = self.accelerator.num_processes
        state = {"num_processes": world, "images_per_step": self.share.per_step, **noted}
        state |= {"data": self._data, "versions": versions(), "config": dataclasses.asdict(self.config)}
        if self.class_names is not None:
            state[NAMES] = list(self.class_names)
        if self._own_objective is not None:
            state["own_objective"] = self._own_objective
        return Checkpoint(self.step, gather_model(self.model), averages, optimizers, state)

    def restore(self, start: Checkpoint) -> None:
        """Put a checkpoint's weights, averages and states into the run; all processes call it together.

        Raises:
            ValueError: it is of another network, has other losses to draw t by, or values that no run saves.
        """
        for key in ("images_per_step", "data", "pending", "skipped", "config"):
            if key not in start.state:
                raise ValueError(f"the checkpoint at step {start.step} lacks {key!r} in its state")
        try:
            self.steps.load_state_dict(start.optimizer.get("t_sampler", {}))
            check_weights(start.model, self.model)
            restore_model(self.model, start.model)
            for name, average in self.averages.items():
                if name not in start.averages:
                    raise ValueError(f"it has no average with decay {name}")
                check_weights(start.averages[name], average)
                restore_model(average, start.averages[name])
                restore_model(rest_of(average), start.averages[name + REST])
            check_moments(start.optimizer["optimizer"], self.model)
            restore_optimizer(self.model, self.optimizer, start.optimizer["optimizer"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(start.optimizer["scaler"])
        # torch lists every tensor that differs, on a line each; what it raises on odd states has no class
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            reason = one_line(error)[:200]
            raise ValueError(
                f"the checkpoint at step {start.step} is of another network or damaged: {reason}"
            ) from error

    def save(self, noted: Mapping[str, Any]) -> None:
        """Save a checkpoint, then the pipeline; all processes call it together.

        Args:
            noted: `RunLog.state`'s.

        Raises:
            RuntimeError: the weights are not finite; checkpoints from before stand.
            OSError: the folder can't be written any more; checkpoints from before stand.
        """
        checkpoint = self.gather(noted)
        keep = self.config.keep_checkpoints
        self.write(lambda: save_checkpoint(self.folder, checkpoint, keep))
        self.write(lambda: self._write_pipeline(checkpoint.averages))

    def save_pipeline(self) -> None:
        """Save the pipeline without a checkpoint; all processes call it together."""
        averages = self._gather_averages()
        self.write(lambda: self._write_pipeline(averages))

    def write(self, work: Callable[[], object] = lambda: None) -> None:
        """Call `work` on process 0, which writes into the run's folder; all processes call it together.

        Raises:
            OSError: the folder was moved or deleted; or what `work` raises.
        """

        def in_place() -> None:
            self._lock.check()
            work()

        on_main_process(self.accelerator, in_place)

    def close(self) -> None:
        """Let go of what the launch made of the network, and of the images; no step can follow.

        The images' iterator goes before the interpreter does, whose exit a parquet reader can abort. DDP goes
        before its process group: as the group's last owner it would destroy it while it holds Python's lock,
        for which a thread of the group may wait.
        """
        # A network of the caller's computes again as it did before
        self.accelerator.unwrap_model(self.network, keep_fp32_wrapper=False)
        del self.batches, self.network, self.denoiser
        self.accelerator.free_memory()
        gc.collect()

    def _gather_averages(self) -> dict[str, dict[str, Tensor]]:
        rests = {name + REST: rest_of(average) for name, average in self.averages.items()}
        return {name: gather_model(network) for name, network in (self.averages | rests).items()}

    def _write_pipeline(self, averages: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The first average as the folder's pipeline, the others beside it as variants of the weights.

        Of a network that is not of diffusers' kind, the same without `model_index.json`, for `load_run`.

        Args:
            averages: whole weights by decay, as gathered.
        """

        def fill(place: Path) -> None:
            (place / TRAINED_ON).write_text(json.dumps(self._trained_on) + "\n", encoding="utf-8")
            if self.class_names is not None:
                write_labels(place, dict(enumerate(self.class_names)))
            if not isinstance(self.averaged, ModelMixin):
                weights = {name: averages[name] for name in self.averages}
                save_own_network(place, weights, type(self.model).__name__, self.shape, self.scheduler)
                return
            for name, average in self.averages.items():
                if self._shell is not None:
                    self._shell.load_state_dict(averages[name])
                    average = self._shell
                if name == next(iter(self.averages)):
                    DDPMPipeline(average, self.scheduler).save_pretrained(place)
                else:
                    average.save_pretrained(place / UNET, variant=variant_name(name))  # type: ignore[operator]

        update_folder(self.folder, fill, last=INDEX)

    def _tidy(self) -> None:
        """Delete halves of files that a killed training left, and set damaged checkpoints aside."""
        set_newer_aside(self.folder, self.first)
        delete_partials(self.folder, RUN.__contains__)
        for name in (HELDOUT, GRIDS):
            delete_partials(self.folder / name, lambda name: STEP.match(name) is not None)


def _tell_images(config: TrainConfig, stream: ImageStream, before: list[dict[str, Any]]) -> None:
    """Say what the images are, how many are held out, and how many of these the network has seen before."""
    logger.warning("%s", stream.survey(show=True, held_out=True))
    if config.holdout is None:
        return
    logger.warning(
        "%s images to train on, %s held out", f"{stream.num_rows():,}", f"{stream.chosen.left_out:,}"
    )
    if seen := count_seen_before(before, stream):
        words = (
            "%s was trained on %s of the images that are held out now; the same --seed and --holdout as in "
        )
        words += "its run would hold out the same"
        logger.warning(words, config.model, f"{seen:,}")


def _name_of(objective: OwnObjective) -> str:
    """The name of the function that an objective is made of, be it wrapped in `functools.partial` or not."""
    function: Any = objective.loss if isinstance(objective, Objective) else objective
    while isinstance(function, functools.partial):
        # `make_objective` hands the loss to a function of its own, which checks its values
        function = function.args[0] if function.func is per_example else function.func
    return getattr(function, "__qualname__", type(function).__qualname__)
