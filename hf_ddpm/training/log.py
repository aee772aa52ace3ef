"""What a training run says: one progress bar, `log.jsonl`, sample grids, and accelerate's trackers.

It knows numbers and pictures and where they are shown. It reads numbers back from the device only where it
says so: in `log`, `state` and `save_grid`.
"""

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor, nn

from hf_ddpm.config import TrainConfig
from hf_ddpm.generation.grids import image_grid, save_image
from hf_ddpm.generation.pipeline import PIL_CHANNELS, DDPMPipeline
from hf_ddpm.runtime.disk import named, to_disk
from hf_ddpm.runtime.processes import on_main_process
from hf_ddpm.runtime.progress import REFRESH, progress
from hf_ddpm.scheduler import DDPMScheduler

QUARTILES = 4
SUMS = ("loss", "images", "weight", "cost of answering zero")


class Record:
    """The run's progress from the step it starts at, a context that leaves no bar or tracker open.

    A step is noted as sums by quartile of t over all processes (`SUMS`), so that a line of the log is the
    same however often the run was stopped inside its interval.

    Args:
        run: the run's folder.
        accelerator: the processes.
        config: the run.
        first: the step it starts at.
        per_step: images of a step, over all processes.
        per_epoch: images of the data set.
        state: what `state` gave at that step; empty for a new run.

    Attributes:
        loss: mean loss of the last logged interval, over all processes.
        images_per_second: throughput since the start, without pauses.
        grad_norm: norm of the last gradient before clipping, on the device; None if it isn't clipped.
        skipped: images that could not be read, over all processes, up to the last log.
    """

    def __init__(
        self,
        run: Path,
        accelerator: Accelerator,
        config: TrainConfig,
        first: int,
        per_step: int,
        per_epoch: int,
        state: Mapping[str, Any],
    ):
        self.run, self.accelerator, self.config = run, accelerator, config
        self.loss = self.images_per_second = math.nan
        self.grad_norm: Tensor | None = None
        self.skipped: int = state.get("skipped", 0)
        self._per_step, self._step, self._first = per_step, first, first
        self._per_epoch, self._in_vain = per_epoch, 0  # positions in a row without an image
        self._sums = torch.zeros(len(SUMS), QUARTILES, device=accelerator.device)  # of this step
        self._steps: list[Tensor] = []  # of this process's steps since the last log, still on the device
        pending = torch.tensor(state.get("pending", []), dtype=torch.float64)
        if pending.ndim == 3 and pending.shape[1] == 2:  # of a checkpoint that had no weights and costs
            pending = torch.cat([pending, pending[:, 1:], pending[:, 1:]], 1)
        self._table = pending.reshape(-1, len(SUMS), QUARTILES)  # of all processes' steps since the last log
        self._worked, self._logged_worked, self._since = 0.0, 0.0, time.perf_counter()
        self._logged_step = first
        self._file = run / "log.jsonl"

        def begin() -> float:
            _keep_lines(self._file, first)
            _replace(run / "train_config.json", config.to_json())
            lines = [json.loads(line) for line in _lines(self._file)]
            timed = [line["seconds"] for line in lines if "seconds" in line]
            return max(timed, default=math.nan if lines else 0.0)  # NaN: a log of before they were noted

        # When it had begun, were it in one piece: what came after the last line that stands is not counted
        self._began = self._since - on_main_process(accelerator, begin)
        if config.trackers:
            facts = {key: value for key, value in dataclasses.asdict(config).items() if value is not None}
            again = {"tensorboard": {"purge_step": first + 1}} if first else {}  # hides what is logged again
            accelerator.init_trackers("hf_ddpm", config=facts, init_kwargs=again)
        self._bar = progress(
            "train",
            config.max_steps * per_step,
            "image",
            accelerator.is_main_process,
            initial=first * per_step,
        )

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self._bar.close()
        if kind is not None:  # a run that ends well finishes them with `end_training`
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def add(self, loss: Tensor, weight: Tensor, cost: Tensor, quartiles: Tensor) -> None:
        """Note a micro-step.

        Args:
            loss: of each image, with its weight, (B,), on its device, where it stays.
            weight: 1 / (T p_t), (B,): 1 for uniform t.
            cost: what answering zero would cost at its t, (B,).
            quartiles: of each image's t, (B,), int64, 0 … 3; −1 for an empty slot.
        """
        chosen = quartiles == torch.arange(QUARTILES, device=quartiles.device)[:, None]
        columns = [z.detach().float() for z in (loss, torch.ones_like(weight), weight, weight * cost)]
        # A product with `chosen` would make nan of 0 · inf
        self._sums += torch.stack([torch.where(chosen, z, 0.0) for z in columns]).sum(-1)

    def advance(self, step: int) -> None:
        """An optimizer step is done."""
        self._step = step
        self._steps.append(self._sums)
        self._sums = torch.zeros_like(self._sums)
        self._bar.update(self._per_step)

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
        now = self._worked + time.perf_counter() - self._since
        speed = (self._step - self._logged_step) * self._per_step / max(now - self._logged_worked, 1e-9)
        self.images_per_second = (self._step - self._first) * self._per_step / max(now, 1e-9)
        self._logged_step, self._logged_worked = self._step, now
        self.loss = float(loss.sum() / images.sum())  # NaN where no image could be read
        self.skipped += self._missing()
        self._table = self._table[:0]

        line: dict[str, float] = {"step": self._step, "images": self._step * self._per_step}
        line |= {"loss": self.loss} if images.any() else {}
        for number, (sum_, total) in enumerate(zip(loss.tolist(), weight.tolist(), strict=True), 1):
            if total:
                line[f"loss_quartile_{number}"] = sum_ / total
        line |= {"lr": lr, "ema_decay": ema_decay}
        line["images_per_second"] = round(speed, 1)
        if math.isfinite(seconds := time.perf_counter() - self._began):
            line["seconds"] = round(seconds, 1)
        norm = math.inf if self.grad_norm is None else float(self.grad_norm)
        if math.isfinite(norm):  # with fp16 it may overflow: that step was left out, and JSON has no infinity
            line["grad_norm"] = norm
        if self.skipped:
            line["skipped"] = self.skipped
        self.note(line)
        self._bar.set_postfix_str(f"step {self._step}, loss {self.loss:.4f}", refresh=False)

    def state(self) -> dict[str, Any]:
        """What another `Record` needs to go on from here, plain values; all processes call it together.

        Raises:
            RuntimeError: as in `log`.
        """
        self._settle()
        if self._file.exists() and self.accelerator.is_main_process:
            to_disk(self._file)  # what a checkpoint follows is as safe as the checkpoint
        return {"pending": self._table.tolist(), "skipped": self.skipped}

    def _settle(self) -> None:
        """Gather this process's steps into the table of all, and look whether they can be right."""
        if not self._steps:
            return
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

    def _missing(self) -> int:
        return len(self._table) * self._per_step - int(self._table[:, 1].sum())

    def has(self, step: int, key: str) -> bool:
        """Whether log.jsonl has a number of that name for the step."""
        return any(_step_of(line) == step and key in json.loads(line) for line in _lines(self._file))

    def note(self, line: Mapping[str, float]) -> None:
        """Write numbers of this step to log.jsonl and the trackers."""
        numbers = {key: value for key, value in line.items() if key != "step"}

        def write() -> None:
            with named(self._file), self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self._step, **numbers}) + "\n")

        on_main_process(self.accelerator, write)
        self.accelerator.log(numbers, step=self._step)

    def grid_path(self, shape: tuple[int, int, int]) -> Path:
        """Where the grid of this step goes: a picture, or an array where images can't be pictures."""
        suffix = ".png" if shape[0] in PIL_CHANNELS else ".npy"
        return self.run / "samples" / f"step-{self._step:08d}{suffix}"

    def save_grid(
        self,
        model: nn.Module,
        scheduler: DDPMScheduler,
        shape: tuple[int, int, int],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Sample, always from the same noise, and show the grid; the processes share the work.

        Args:
            model: the network with its averaged weights.
            scheduler: the run's.
            shape: (C, H, W); images that can't be pictures are saved as an array (B, H, W, C).
            check: called at each step of sampling; it may raise.
        """
        accelerator, path, wanted = self.accelerator, self.grid_path(shape), self.config.sample_num_images
        as_picture, world = path.suffix == ".png", accelerator.num_processes
        each = -(-wanted // world)  # as many for every process: parts of a network that FSDP shares out
        mine = range(accelerator.process_index, each * world, world)
        pipeline = DDPMPipeline(model, scheduler)
        pipeline.set_progress_bar_config(
            desc="sample", leave=False, mininterval=REFRESH, disable=not accelerator.is_main_process
        )
        with accelerator.autocast():
            images: Any = pipeline(
                batch_size=each,
                generator=[torch.Generator().manual_seed(self.config.seed + i) for i in mine],
                num_inference_steps=self.config.sample_steps,
                output_type="pil" if as_picture else "np",
                return_dict=False,
                max_batch_size=self.config.batch_size,
                callback_on_step_end=lambda *_: check(),
                image_shape=shape,
            )[0]
        found = dict(gather_object(list(zip(mine, images, strict=True))))

        def write() -> None:
            images = [found[i] for i in range(wanted)]
            with named(path):
                if as_picture:
                    self._show(save_image(image_grid(images), path))
                    return
                path.parent.mkdir(exist_ok=True)
                partial = path.with_name(f".{path.name}.tmp")
                with partial.open("wb") as file:
                    np.save(file, np.stack(images))
                partial.replace(path)

        on_main_process(accelerator, write)

    def _show(self, grid: Path) -> None:
        """Give a picture to the trackers that take some."""
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                with Image.open(grid) as image:
                    tracker.log_images({"samples": np.asarray(image)[None]}, step=self._step, **layout)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside (sampling, saving) doesn't count as training."""
        self._worked += time.perf_counter() - self._since
        try:
            yield
        finally:
            self._since = time.perf_counter()


def _keep_lines(file: Path, step: int) -> None:
    """Drop log lines past the step that the run goes on from: they will be written again."""
    _replace(file, "".join(line + "\n" for line in _lines(file) if _step_of(line) <= step))


def _lines(file: Path) -> list[str]:
    """A log's lines; a power cut may leave bytes that are no text."""
    return file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []


def _replace(file: Path, text: str) -> None:
    with named(file):
        new = file.with_suffix(".tmp")
        new.write_text(text, encoding="utf-8")
        os.replace(new, file)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # a killed run may leave half a line
        return math.inf
