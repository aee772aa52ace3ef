"""What a training run says in numbers: one progress bar, `log.jsonl`, and accelerate's trackers.

The file knows numbers and where they are shown. It reads them back from the device in `log` and `state` only.
A run's files begin in `begin`: what is refused before the first step is done leaves the folder as it was.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from hf_ddpm.config import TrainConfig
from hf_ddpm.folders.layout import LOG, ODD_LINES, RECORD
from hf_ddpm.folders.numbers import read_log
from hf_ddpm.runtime.disk import named, to_disk, whole_file
from hf_ddpm.runtime.processes import on_main_process
from hf_ddpm.runtime.progress import progress, short
from hf_ddpm.training.classes import ClassLosses

logger = logging.getLogger(__name__)

QUARTILES = 4  # of t, of each of which the mean loss is logged
SUMS = ("loss", "images", "weight", "cost of answering zero")  # what is summed up for each quartile
TIMES = frozenset({"images_per_second", "seconds"})  # what of a line tells the time


class RunLog:
    """The run's numbers from the step on that it starts at; as a context, it leaves no bar or tracker open.

    Nothing is written before `begin`.

    Of each step the sums over its images are kept (`SUMS`), by quartile of t. A checkpoint holds those of the
    steps since the last line of the log, so that a line is the same however often the run was stopped in
    between.

    Args:
        folder: the run's folder.
        accelerator: the processes.
        config: the run.
        first: the step it starts at.
        per_step: images of a step, over all processes.
        per_epoch: images of the data set.
        state: what `state` gave at that step; empty for a new run.
        skipped: tells which images could not be read, by their rows; all processes call it together.
        num_classes: C, of a run with classes.

    Raises:
        ValueError: `state` is none of a log's.

    Attributes:
        loss: mean loss of the last logged interval, over all processes.
        images_per_second: throughput since the start, without pauses.
        grad_norm: norm of the last gradient before clipping, on the device; None if it isn't clipped.
        skipped: images that could not be read, each counted once, over all processes, up to the last log.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        config: TrainConfig,
        first: int,
        per_step: int,
        per_epoch: int,
        state: Mapping[str, Any],
        skipped: Callable[[], list[int]] = list,
        num_classes: int | None = None,
    ):
        self.accelerator, self.config = accelerator, config
        self.loss = self.images_per_second = math.nan
        self.grad_norm: Tensor | None = None
        self.skipped: int = state.get("skipped", 0)
        self._skipped_rows = skipped
        self._per_step, self._step, self._first = per_step, first, first
        self._per_epoch = per_epoch
        # Positions in a row at which no image could be read
        self._in_vain = 0
        # The sums of this step, and of this process's steps that were not read back from the device yet
        self._sums = torch.zeros(len(SUMS), QUARTILES, device=accelerator.device)
        self._steps: list[Tensor] = []
        self._by_class = None
        if num_classes is not None:
            self._by_class = ClassLosses(num_classes, state.get("pending_classes", []), accelerator.device)
        # The sums over all processes of each step since the last log
        try:
            pending = torch.tensor(state.get("pending", []), dtype=torch.float64)
            self._table = pending.reshape(-1, len(SUMS), QUARTILES)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"the checkpoint at step {first} has other sums in 'pending' than a log's"
            ) from error
        self._worked, self._logged_worked, self._since = 0.0, 0.0, time.perf_counter()
        self._paused = False
        self._logged_step, self._speed = first, 0.0  # images per second, of the last interval that tells
        self._file, self._known, self._started = folder / LOG, state.get("log"), self._since

        # How many lines the log has, and a sum of them, by which a checkpoint knows them
        self._count, self._sum = 0, hashlib.sha256()
        self._began = math.nan
        self._bar = progress(
            "train",
            config.max_steps,
            "step",
            accelerator.is_main_process,
            initial=first,
            describe=self._words,
            by_time=False,
        )

    def __enter__(self) -> "RunLog":
        self._started = time.perf_counter()
        self._bar.open()
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self._bar.close()
        # A run that ends well finishes its trackers with `end_training`
        if kind is not None:
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def begin(self) -> None:
        """Make the run's files those of the step that it starts at, and start the trackers.

        All processes call it together, once.

        Raises:
            OSError: the folder can't be written.
        """
        config, first = self.config, self._first
        if config.trackers:
            facts = {key: value for key, value in dataclasses.asdict(config).items() if value is not None}
            again = {"tensorboard": {"purge_step": first + 1}} if first else {}  # hides what is logged again
            self.accelerator.init_trackers("hf_ddpm", config=facts, init_kwargs=again)
        # When the run would have begun, had it never been stopped. What was done after the last line that
        # stands is done again, and not counted twice.
        self._began = self._started - on_main_process(self.accelerator, self._begin_files)

    def _begin_files(self) -> float:
        """Write the record, and keep the log up to the first step; the seconds that the run has taken."""
        _replace(self._file.with_name(RECORD), self.config.to_json())
        lines = _keep_lines(self._file, self._first)
        sums = [self._sum.hexdigest()] + [self._add(line) for line in lines]
        if self._known is not None and sums[self._known["lines"] :][:1] != [self._known["sha256"]]:
            logger.warning(
                "%s is not as the run wrote it up to step %d: a line was changed, lost or added",
                self._file,
                self._first,
            )
        return max((line["seconds"] for line in lines if "seconds" in line), default=0.0)

    def add(
        self, loss: Tensor, weight: Tensor, cost: Tensor, quartiles: Tensor, labels: Tensor | None = None
    ) -> None:
        """Note a micro-step.

        Args:
            loss: of each image, with its weight, (B,), on its device, where it stays.
            weight: 1 / (T p_t) of each image, (B,); 1 for uniform t.
            cost: what a network that answers zero would lose at each image's t, (B,).
            quartiles: of each image's t, (B,), int64, 0 … 3; −1 for an empty slot.
            labels: the class that the network was given for each image, (B,), int64; None without classes.
        """
        chosen = quartiles == torch.arange(QUARTILES, device=quartiles.device)[:, None]
        columns = [z.detach().float() for z in (loss, torch.ones_like(weight), weight, weight * cost)]
        # `where`, as a product with `chosen` would make 0 · inf = NaN of an empty slot's loss
        self._sums += torch.stack([torch.where(chosen, z, 0.0) for z in columns]).sum(-1)
        if self._by_class is not None and labels is not None:
            self._by_class.add(loss, weight, labels, quartiles >= 0)

    def advance(self, step: int) -> None:
        """Note that an optimizer step is done, the run's `step`-th."""
        self._step = step
        self._steps.append(self._sums)
        self._sums = torch.zeros_like(self._sums)
        if self._by_class is not None:
            self._by_class.advance()
        self._bar.update()

    def log(self, lr: float, ema_decay: float) -> None:
        """Read the numbers of the interval back from the device, and write them down; all processes together.

        Args:
            lr: learning rate of the last step.
            ema_decay: what the average kept of itself at that step.

        Raises:
            RuntimeError: the loss is not finite or exploded; the message names the step.
        """
        self._settle()
        loss, images, weight, _ = self._table.sum(0)
        now = self._working()
        speed = (self._step - self._logged_step) * self._per_step / max(now - self._logged_worked, 1e-9)
        self.images_per_second = (self._step - self._first) * self._per_step / max(now, 1e-9)
        self._logged_step, self._logged_worked, self._speed = self._step, now, speed
        self.loss = float(loss.sum() / images.sum())  # NaN where no image could be read
        self.skipped = len(self._skipped_rows())
        self._table = self._table[:0]

        line: dict[str, float] = {"step": self._step, "images": self._step * self._per_step}
        line |= {"loss": self.loss} if images.any() else {}
        for number, (sum_, total) in enumerate(zip(loss.tolist(), weight.tolist(), strict=True), 1):
            if total:
                line[f"loss_quartile_{number}"] = sum_ / total
        line |= {} if self._by_class is None else self._by_class.line()
        line |= {"lr": lr, "ema_decay": ema_decay}
        line["images_per_second"] = round(speed, 1)
        line["seconds"] = round(time.perf_counter() - self._began, 1)
        # With fp16 a gradient may overflow. Such a step is left out, and JSON has no infinity.
        norm = math.inf if self.grad_norm is None else float(self.grad_norm)
        if math.isfinite(norm):
            line["grad_norm"] = norm
        if self.skipped:
            line["skipped"] = self.skipped
        self.note(line)
        self._bar.line()

    def state(self) -> dict[str, Any]:
        """What another `RunLog` needs to go on from here, plain values; all processes call it together.

        Raises:
            RuntimeError: as in `log`.
        """
        self._settle()
        if self._file.exists() and self.accelerator.is_main_process:
            to_disk(self._file)  # a checkpoint must not survive a power cut that its log doesn't
        log = {"lines": self._count, "sha256": self._sum.hexdigest()}
        rows = self._skipped_rows()
        found = {"pending": self._table.tolist(), "skipped": len(rows), "skipped_rows": rows, "log": log}
        return found if self._by_class is None else found | {"pending_classes": self._by_class.state()}

    def _add(self, line: Mapping[str, float]) -> str:
        """Count a line of the log; the sum of all lines so far, of all that doesn't tell the time."""
        numbers = {key: value for key, value in line.items() if key not in TIMES}
        self._sum.update(json.dumps(numbers, sort_keys=True).encode())
        self._count += 1
        return self._sum.hexdigest()

    def _settle(self) -> None:
        """Read the steps back from the device, sum them over all processes, and check the losses."""
        if not self._steps:
            return
        if self._by_class is not None:
            self._by_class.settle(self.accelerator.gather)
        mine = torch.stack(self._steps)
        gathered: Any = self.accelerator.gather(mine)
        new = gathered.cpu().double().view(-1, *mine.shape).sum(0)
        self._steps.clear()
        losses = new[:, 0].sum(-1)
        first_new = self._step - len(new) + 1
        if not losses.isfinite().all():
            bad = int((~losses.isfinite()).nonzero()[0])
            raise RuntimeError(
                f"the loss is {losses[bad].item()} at step {first_new + bad}; checkpoints from before stand"
            )
        self._table = torch.cat([self._table, new])
        loss, images, _, cost = self._table.sum(0).sum(-1).tolist()
        if loss > self.config.max_loss * cost:
            raise RuntimeError(
                f"the mean loss of steps {self._step - len(self._table) + 1} to {self._step} is "
                f"{loss / images:.4g}, above max_loss {self.config.max_loss:g} times the {cost / images:.3g} "
                "of guessing zero; checkpoints from before stand"
            )
        for count in new[:, 1].sum(-1).tolist():
            self._in_vain = 0 if count else self._in_vain + self._per_step
        if self._in_vain >= self._per_epoch:
            raise RuntimeError(f"no image of an epoch up to step {self._step} could be read")

    def has(self, step: int, key: str) -> bool:
        """Whether log.jsonl has a number of that name for the step."""
        return any(line["step"] == step and key in line for line in read_log(self._file).lines)

    def note(self, line: Mapping[str, float]) -> None:
        """Write numbers of this step to log.jsonl and the trackers; `begin` has been called before."""
        numbers = {key: value for key, value in line.items() if key != "step"}
        whole = {"step": self._step, **numbers}

        def write() -> None:
            with named(self._file), self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(whole) + "\n")
            self._add(whole)

        on_main_process(self.accelerator, write)
        self.accelerator.log(numbers, step=self._step)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time (of sampling, saving) doesn't count as training."""
        self._worked, self._paused = self._working(), True
        try:
            yield
        finally:
            self._since, self._paused = time.perf_counter(), False

    def _working(self) -> float:
        """Seconds since the start, without pauses."""
        return self._worked if self._paused else self._worked + time.perf_counter() - self._since

    def _words(self) -> str:
        """What the bar says: of the run up to now, but for the loss, which is that of the last interval."""
        epoch = self._step * self._per_step / max(self._per_epoch, 1)
        words = [
            f"step {self._step}/{self.config.max_steps}",
            f"epoch {epoch:.1f}" if epoch >= 1 else f"epoch {epoch:.2f}",
        ]
        if self.loss == self.loss:
            words.append(f"loss {self.loss:.4f}")
        lately = self._working() - self._logged_worked
        if self._step > self._logged_step and (lately > 1 or not self._speed):
            self._speed = (self._step - self._logged_step) * self._per_step / max(lately, 1e-9)
        if self._speed:
            words.append(f"{short(self._speed)} images/s")
        # The time that is left has pauses in it, as the rest will have
        return ", ".join([*words, *filter(None, [self._bar.left(time.perf_counter() - self._started)])])


def _keep_lines(file: Path, step: int) -> list[dict[str, float]]:
    """Drop the log's lines past the step that the run goes on from: they will be written again.

    Lines that are none are moved to another file, but for the last one, which a kill may have cut.

    Returns:
        The lines that stay.
    """
    log = read_log(file)
    moved = {number: line for number, line in log.odd.items() if number != log.cut}
    if moved:
        with named(file.with_name(ODD_LINES)) as place, place.open("ab") as odd:
            odd.writelines(line + b"\n" for line in moved.values())
    for number in list(log.odd)[:5]:
        where = f"moved to {ODD_LINES}" if number in moved else "left out, as a kill may have cut it"
        logger.warning("line %d of %s is damaged or no line of a run's log: %s", number, file, where)
    if len(log.odd) > 5:
        logger.warning("%d more lines of %s are so", len(log.odd) - 5, file)
    kept = [line for line in log.lines if line["step"] <= step]
    _replace(file, "".join(json.dumps(line) + "\n" for line in kept))
    return kept


def _replace(file: Path, text: str) -> None:
    with whole_file(file) as place:
        place.write_text(text, encoding="utf-8")
