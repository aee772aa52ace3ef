"""Training, Ho et al. 2020, algorithm 1, under Accelerate: data → q_sample → model → objective → folder.

Which image stands at a position of the run, its t, noise, crop and flip depend on (seed, position) alone, and
a step has the same positions on any number of processes. So no generator needs saving: a stopped run goes on
with what the unbroken one would have drawn. The run's folder is its pipeline's folder too (averaged weights),
beside `checkpoints/`, `samples/`, `heldout/`, `log.jsonl`, `training.png` and `train_config.json`.

A checkpoint is saved before a step's pictures and held-out bound are made, so a run that is stopped meanwhile
loses nothing: when it goes on it makes what is missing.
"""

import contextlib
import copy
import functools
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.distributed.tensor import DTensor

from hf_ddpm.config import TrainConfig
from hf_ddpm.folders.layout import CURVE
from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.generation.runs import load_run
from hf_ddpm.publishing.background import BackgroundPush
from hf_ddpm.publishing.upload import PublishError
from hf_ddpm.runtime.disk import WORKER
from hf_ddpm.runtime.processes import on_main_process
from hf_ddpm.runtime.signals import Interrupted, StopSignals, TrainingStopped, interruptible
from hf_ddpm.shown import or_none, summary
from hf_ddpm.spelling import suggest_keywords
from hf_ddpm.training.averages import decay_at
from hf_ddpm.training.curve import draw_curve
from hf_ddpm.training.launch import start_pushing
from hf_ddpm.training.log import RunLog
from hf_ddpm.training.run import OwnObjective, Run, open_run
from hf_ddpm.training.sharding import reshard
from hf_ddpm.training.step import class_gain, optimizer_step
from hf_ddpm.training.words import go_on, next_steps

logger = logging.getLogger(__name__)

# How torch says that a process of a data loader died
DEAD_WORKER = re.compile(WORKER + r"(?: \(pid(?:\(s\))?( [\d, ]+)\))?(?:.*killed by signal: ([\w ]+))?")
STOPPED_PUSH_SECONDS = 10  # that a run which was told to stop waits for an upload


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        output_dir: the run's folder, which `DDPMPipeline.from_pretrained` loads.
        step: optimizer steps done in all.
        images: images seen in all, over every process.
        loss: mean loss of the last logged interval, NaN if this call logged none.
        images_per_second: throughput of this call, without sampling and saving; NaN if it took no step.
        network: the module that the caller handed over, with the weights of the last step; None without one.
        next_steps: commands that sample and measure the model; lines of Python for a network of the caller's.
    """

    output_dir: Path
    step: int
    images: int
    loss: float
    images_per_second: float
    next_steps: tuple[str, ...] = field(default=(), repr=False)
    network: nn.Module | None = field(default=None, repr=False, compare=False)

    @functools.cached_property
    def pipeline(self) -> DDPMPipeline:
        """The run's pipeline, with its averaged weights; of a network of the caller's, around a copy of it.

        Raises:
            ValueError: it can't be loaded, as of a network whose weights FSDP has shared out.
        """
        if self.network is None:
            return load_run(self.output_dir)
        if any(isinstance(weight, DTensor) for weight in self.network.parameters()):
            raise ValueError(
                "FSDP shares the network out; allowed: load_run(folder, model=...), with a new one"
            )
        return load_run(self.output_dir, copy.deepcopy(self.network))

    def __repr__(self) -> str:
        return summary(self, self._facts)

    def _facts(self) -> list[str]:
        """What its one-line `repr` says."""
        folder = f"output_dir={str(self.output_dir)!r}"
        return [f"step {self.step:,}", f"{self.images:,} images", f"loss {self.loss:.4g}", folder]

    def _repr_png_(self) -> bytes | None:
        """The run's curve, for a notebook."""
        return or_none((self.output_dir / CURVE).read_bytes)


@suggest_keywords
def train(
    config: TrainConfig,
    model: nn.Module | None = None,
    *,
    objective: str | OwnObjective | None = None,
    after_step: Callable[[Run], object] | None = None,
) -> TrainResult:
    """Train, and leave a pipeline in `config.output_dir`.

    SIGTERM, SIGINT, SIGHUP and SIGUSR1 end the run after a checkpoint (main thread only). With several
    processes their group ends with the run, so nothing that they do together can follow in the same program.

    Args:
        config: the run.
        model: the network, by default the one that `config.model` names. It is trained in place, in float32.
            For a module that is not a diffusers model, the folder has no `model_index.json`, as no other
            program can make it: `result.pipeline` or `hf_ddpm.load_run(folder, model=...)` is its pipeline.
        objective: what is minimised, by default what `config.objective` names: another name, which then is
            the config's; or an `Objective` or a function, as `make_objective` takes it. A run that began with
            a function is gone on with by passing it again: its name is in the checkpoints, but not in
            `train_config.json`.
        after_step: called with the `Run` after each optimizer step, before anything of that step is logged or
            saved, on every process. It reads, for example, `run.step`, `run.model` (the network) and
            `run.averages`, and should not keep `run.network` beyond the run. What it raises ends the run
            without a checkpoint; with several processes all should raise, as one alone leaves the others
            waiting for it.

    Raises:
        ValueError: bad input: data, model, folder, objective, or a config that differs from the run to go on
            from.
        RuntimeError: the loss or the weights are not finite, or the loss exploded; checkpoints from before
            stand.
        OSError: the folder can't be written any more; checkpoints from before stand.
        PublishError: the run is done, but its last push is not on the Hub; the message says how to bring it
            there.
        TrainingStopped: a signal came, and everything is saved.
    """
    with _told(), interruptible() as came, open_run(config, model, objective) as run:
        push = start_pushing(run.config, run.model, run.accelerator)
        log = RunLog(
            run.folder,
            run.accelerator,
            run.config,
            run.first,
            run.share.per_step,
            run.rows,
            run.state,
            run.skipped.rows,
            None if run.class_names is None else len(run.class_names),
        )
        stop = StopSignals(run.accelerator.num_processes)
        if came:
            raise Interrupted(f"stopped by {came[0]}")
        with stop, log:
            stopped, begun = False, run.shows or run.step >= run.config.max_steps
            if begun:
                _begin(run, log)
                with log.paused():
                    stopped = _show(run, log, stop)
            while run.step < run.config.max_steps and not stopped:
                optimizer_step(run, log)
                if not begun:
                    _begin(run, log)
                    begun = True
                if after_step is not None:
                    after_step(run)
                stopped = _keep(run, log, stop, push)
            if run.step == run.first and not stopped:
                _keep_again(run, push)
        _close(run, log, stopped)
        return _finish(run, log, stop, push, stopped, model)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Put what other libraries know of a run's end in words for the user.

    Raises:
        TrainingStopped: a signal came when there was nothing to save.
        RuntimeError: a process that reads images is gone.
    """
    try:
        yield
    except Interrupted as asked:
        raise TrainingStopped(f"{asked} with nothing left to save; the same command goes on") from None
    except RuntimeError as error:
        if not (found := DEAD_WORKER.match(str(error))):
            raise
        raise RuntimeError(
            f"the process{found[1] or ''} that reads images was ended ({found[2] or 'unexpectedly'}), as "
            "systems do where memory is short; checkpoints from before stand; allowed: fewer num_workers, "
            "or 0"
        ) from error


def _begin(run: Run, log: RunLog) -> None:
    """Write into the run's folder for the first time: what is refused up to here leaves it as it was."""
    run.begin()
    log.begin()


def _show(run: Run, log: RunLog, stop: StopSignals) -> bool:
    """Make the held-out bound and the sample grid of this step, if they are due and not there yet.

    Returns:
        Whether a signal came meanwhile, which leaves out the rest.
    """
    try:
        _show_all(run, log, stop)
    except TrainingStopped:
        return True
    return False


def _show_all(run: Run, log: RunLog, stop: StopSignals) -> None:
    """As `_show`; what is due is made to the end, or a signal raises TrainingStopped."""
    config, process = run.config, run.process
    resumed = run.step == run.first  # a step that another call has taken, which may have kept it already
    if run.heldout is not None and run.due(config.evaluate_every):
        there = resumed and on_main_process(run.accelerator, lambda: log.has(run.step, "heldout_bpd"))
        if not there:
            options = {"variance_type": config.variance_type, "prediction_type": config.prediction_type}
            log.note(run.heldout.evaluate(run.averaged, process, run.step, options, stop.check))
    if run.due(config.sample_every):
        there = resumed and on_main_process(run.accelerator, run.grids.path(run.step).exists)
        if not there:
            run.grids.save(run.averaged, run.step, stop.check)
    reshard(run.averaged)


def _keep(run: Run, log: RunLog, stop: StopSignals, push: BackgroundPush | None) -> bool:
    """Do what is due at this step, in this order: log, checkpoint, held-out bound, pictures, upload.

    A run that is stopped saves a checkpoint whatever is due, and leaves out what comes after it.

    Returns:
        Whether the run was told to stop.
    """
    config, stopped = run.config, stop.agreed()
    if run.due(config.log_every):
        run.write()  # sees whether the folder is still there
        log.log(run.lr, decay_at(next(iter(config.ema_decays.values())), run.step - 1))
    with log.paused():
        shows = run.shows
        if run.class_names is not None and (shows or run.step == config.max_steps):
            log.note(class_gain(run))
            reshard(run.averaged)
        pushes = config.push_to_hub is not None and run.due(config.push_every)
        if stopped or shows or pushes or run.due(config.checkpoint_every):
            run.save(log.state())
        if stopped or (shows and _show(run, log, stop)):
            return True
        if shows or pushes or run.step == config.max_steps:
            run.write(lambda: draw_curve(run.folder))
        if push is not None and pushes:
            push.push(run.step)
    return False


def _keep_again(run: Run, push: BackgroundPush | None) -> None:
    """What a run that has no step left may lack, if it was killed right after its last checkpoint."""
    run.save_pipeline()
    run.write(lambda: draw_curve(run.folder))
    if push is not None:
        push.push(run.step)


def _close(run: Run, log: RunLog, stopped: bool) -> None:
    """End the work of the processes."""
    if not stopped:
        run.accelerator.wait_for_everyone()
    run.close()
    if log.skipped and run.accelerator.is_main_process:
        logger.warning("images that could not be read and were skipped: %d", log.skipped)
    run.accelerator.end_training()


def _finish(
    run: Run,
    log: RunLog,
    stop: StopSignals,
    push: BackgroundPush | None,
    stopped: bool,
    own: nn.Module | None,
) -> TrainResult:
    """Wait for the last upload, and say what the run came to.

    Raises:
        PublishError: the run is done, but not on the Hub.
        TrainingStopped: it was stopped, and waited a little for the upload, which the run that goes on
            starts again.
    """
    if stopped:
        if push is not None:
            with contextlib.suppress(PublishError):
                push.finish(STOPPED_PUSH_SECONDS)
        raise TrainingStopped(
            f"stopped by {stop.name} at step {run.step} of {run.config.max_steps}, saved in "
            f"{str(run.folder)!r}; {go_on(run)}"
        )
    if push is not None:
        push.finish()
    images, lines = run.step * run.share.per_step, next_steps(run) if run.accelerator.is_main_process else ()
    if not isinstance(run.averaged, ModelMixin):
        for line in lines:  # no command has made this network, and so none tells them
            logger.warning("next: %s", line)
    return TrainResult(run.folder, run.step, images, log.loss, log.images_per_second, lines, own)
